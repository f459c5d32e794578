"""The section on controls: what was asked is answered there, and what was not is offered."""

from types import SimpleNamespace

import pytest

from ksparse.report.page import environment
from ksparse.report.sections import sanity


def shown(result, recipe=True):
    source = SimpleNamespace(
        result=lambda name: result, recipe=recipe, command=lambda *words: "ksparse " + words[0]
    )
    return environment().from_string(sanity.TEMPLATE).render(facts=sanity.read_facts(source))


def test_answers_are_shown_with_the_page_that_has_their_numbers():
    answer = {"name": "a", "question": "Is it <better>?", "answer": "On 3 of 7 measures."}
    html = shown({"questions": [answer], "page": "sanity/report.html"})
    assert "Is it &lt;better&gt;? <strong>On 3 of 7 measures.</strong>" in html
    assert "sanity/report.html" in html


@pytest.mark.parametrize(
    "recipe, says", [(True, "ksparse sanity"), (None, "only of a run with its recipe")]
)
def test_what_was_not_asked_is_offered_where_it_can_be(recipe, says):
    assert says in shown(None, recipe)
