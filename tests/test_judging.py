"""`ksparse.evaluate` and `compare`: what they accept, refuse, show and return."""

import builtins
import dataclasses
import io
import json
import sys

import pytest

import ksparse
from ksparse import display, html, progress
from ksparse.errors import InputError
from ksparse.evals.comparison import SAEComparison
from ksparse.evals.statistics import Result, Results
from ksparse.sae.model import SAE, Shape
from ksparse.training.train import train

SMALL = {"tokens": 64, "per_document": 64, "device": "cpu"}


@pytest.fixture
def run(small_recipe, tmp_path):
    return train(small_recipe(), tmp_path / "run", progress=False)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_an_sae_a_run_and_its_path_have_the_same_results_as_plain_json(run):
    found = [
        ksparse.evaluate(source, names="stats,downstream", progress=False, **SMALL)
        for source in (ksparse.load(run.path), run, str(run.path))
    ]
    assert list(found[0]) == ["stats", "downstream"]
    for results in found:
        results["stats"].pop("seconds"), results["downstream"].pop("seconds")
    assert json.dumps(found[0]) == json.dumps(found[1]) == json.dumps(found[2])


def test_an_lm_may_be_named_and_is_read_at_the_saes_site(run, tiny_lm):
    own = ksparse.evaluate(run, names="stats", progress=False, **SMALL)["stats"]
    for lm in (str(tiny_lm("gpt2")), tiny_lm("gpt2")):
        named = ksparse.evaluate(run, lm, "stats", progress=False, **SMALL)["stats"]
        assert (named["lm"], named["site"]) == (str(tiny_lm("gpt2")), "resid_post.1")
        assert named["nmse"] == own["nmse"]
    found = ksparse.compare([run, run], str(tiny_lm("gpt2")), "stats", progress=False, **SMALL)
    assert [row.values["nmse"]["value"] for row in found.rows] == [own["nmse"]["value"]] * 2


def test_another_lm_by_name_is_refused_as_its_object_is(run):
    with pytest.raises(InputError, match="model_type is 'llama', but 'gpt2' where the SAE was tr"):
        ksparse.evaluate(run, "pylm/0.3m", "stats", progress=False, **SMALL)


def test_saved_results_are_those_that_latents_and_steering_read(run):
    with pytest.raises(InputError, match="there is no result of `stats`"):
        ksparse.load(run).latent(3).max  # noqa: B018
    found = ksparse.evaluate(run, names="stats", save=True, progress=False, **SMALL)["stats"]
    assert run.eval("stats")["nmse"] == found["nmse"]
    sae = ksparse.load(run)
    assert sae.latent(3).max == pytest.approx(float(found.arrays["max_act"][3]))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"force": True}, "keeps only results on its own LM and site, not those with force"),
        ({"lm": "pylm/0.3m"}, "not those on lm 'pylm/0.3m'"),
    ],
)
def test_a_run_keeps_no_results_on_another_lm(run, arguments, words):
    with pytest.raises(InputError, match=words):
        ksparse.evaluate(run, names="stats", save=True, progress=False, **SMALL, **arguments)
    assert run.eval("stats") is None


def test_the_table_is_printed_on_a_terminal_and_neither_in_a_log_nor_when_silenced(
    run, monkeypatch, capsys
):
    ksparse.evaluate(run, names="stats", **SMALL)
    assert "explained_variance" not in capsys.readouterr().err
    for shown in (True, False):
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        ksparse.evaluate(run, names="stats", progress=shown, **SMALL)
        assert ("explained_variance" in stream.getvalue()) is shown
        assert bool(stream.getvalue()) is shown


def test_a_prompt_and_a_notebook_show_the_table_once_as_the_value_that_is_returned(
    monkeypatch, capsys
):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    display.show("a table")
    assert stream.getvalue() == "'a table'\n"
    for where, name in ((sys, "ps1"), (builtins, "__IPYTHON__")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, True, raising=False)
            display.show("a second table")
    monkeypatch.setattr(display, "place", lambda: "notebook")
    display.show("a second table")
    assert "second" not in stream.getvalue() + capsys.readouterr().out


def test_progress_is_shown_by_the_outermost_alone():
    with display.shown("outer") as outer, display.shown("inner") as inner:
        assert outer is not None and inner is None
    assert not progress.is_observed()


def test_train_says_that_it_is_done_unless_silenced(small_recipe, tmp_path, capsys):
    train(small_recipe(), tmp_path / "a", progress=False)
    assert capsys.readouterr().err == ""
    train(small_recipe(), tmp_path / "b")
    assert "training 768 of 768" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, changes, words",
    [
        ((SAE(Shape(4, 8, 2)), None, "downstrem"), {}, "did you mean 'downstream'"),
        ((SAE(Shape(4, 8, 2)), None, 3), {}, "names is 3; it must be an evaluation or a list"),
        ((SAE(Shape(4, 8, 2)), None, []), {}, "no evaluation is named; there are downstream"),
        ((SAE(Shape(4, 8, 2)), "stats"), {}, "third argument: names='stats'"),
        ((SAE(Shape(4, 8, 2)), ["stats"]), {}, r"third argument: names=\['stats'\]"),
        ((SAE(Shape(4, 8, 2)), 3), {}, "lm is 3; it must be an LM with its site"),
        ((SAE(Shape(4, 8, 2)), "gpt2"), {}, "give gpt2 with one: ksparse.LM.'gpt2', site=…"),
        ((SAE(Shape(4, 8, 2)),), {"save": True}, "and this one was not loaded from a run"),
        ((3,), {}, "evaluate needs an SAE, not 3; give a run, a path"),
        (("runs/x", None, "stats"), {"token": 3}, "there is no option 'token'; did you mean"),
        (("runs/x", None, "stats", 3), {}, "options is 3; it must be an EvalConfig or a dict"),
        (("runs/x", None, "stats"), {"text": "one\ntwo"}, "write a text of your own to a file"),
        (("runs/x", None, "stats"), {"text": ["one"]}, "it must name a file, a folder or a data"),
    ],
)
def test_a_wrong_argument_gets_one_sentence(arguments, changes, words):
    with pytest.raises(InputError, match=words):
        ksparse.evaluate(*arguments, **changes)


@pytest.mark.parametrize(
    "saes, words",
    [
        ("runs/x", "compare needs a list of SAEs, or a dictionary of them by name, not 'runs/x'"),
        ([SAE(Shape(4, 8, 2))], "compare needs two SAEs or more, not 1"),
        ([SAE(Shape(4, 8, 2)), 3], "compare needs an SAE, not 3"),
    ],
)
def test_what_cannot_be_compared_is_refused(saes, words):
    with pytest.raises(InputError, match=words):
        ksparse.compare(saes)


def test_differences_are_paired_and_those_of_equal_saes_are_exactly_nought(run, small_acts):
    sae = ksparse.load(run.path)
    other = SAE(dataclasses.replace(sae.shape, k=2), sae.metadata)
    found = ksparse.compare([run, sae, sae, other], progress=False, **SMALL)
    names = [str(run.path), "n = 64, k = 4", "n = 64, k = 4 (2)", "n = 64, k = 2"]
    assert set(found.results) == set(names) and found.against == names[0]
    for name in names[1:3]:
        assert found.differences[name]["ce_delta"] == {"value": 0, "se": 0, "paired": True}
    numbers = {row.name: row.values["nmse"]["value"] for row in found.rows}
    more = found.differences[names[3]]["nmse"]
    assert more["value"] == pytest.approx(numbers[names[3]] - numbers[names[0]])
    assert f"more than {run.path}" in repr(found) and "n = 64, k = 2" in found._repr_html_()
    json.dumps([found.results, found.differences])
    with pytest.raises(InputError, match="against names an SAE that is not compared, 'k'"):
        ksparse.compare({"a": sae, "b": sae}, against="k")


RESULT = {
    "name": "downstream-train",
    "lm": "<b>x</b>",
    "site": "resid_post.1",
    "n_tokens": 1200,
    "ce_spliced": {"value": 3.5, "se": 0.25},
    "ce_clean": {"value": 3.0, "se": None},
    "kl": {"value": None, "se": None},
    "notes": ["<i>"],
}


def test_a_result_is_a_table_of_values_beside_their_baselines():
    lines = repr(Results(a=Result(RESULT))).splitlines()
    assert lines[0] == "downstream-train · <b>x</b> at resid_post.1 · 1,200 tokens"
    assert lines[2].split("  ", 2)[1:] == ["ce_spliced", "3.5000 ± 0.2500  ce_clean 3.0000"]
    assert lines[3].split() == ["kl", "-"] and lines[4] == "note: <i>" and len(lines) == 5


def test_a_result_without_baselines_has_no_column_for_them():
    table = Result({"name": "stats", "l0": {"value": 4.0, "se": None}}).table()
    assert (table.header, table.rows) == (("number", "value ± se"), [("l0", "4.0000")])


def test_notes_that_all_compared_saes_share_are_said_once():
    def results(*notes):
        value = {"value": 1.0, "se": 0.1}
        return {name: {"name": name, "kl": value, "notes": notes} for name in ("a", "b")}

    found = SAEComparison.of({"x": results("of both", "of x"), "y": results("of both")}, {}, "x")
    assert found.notes() == ["note: of both", "note: x: of x"]


def test_lines_of_tokens_are_lines_and_spaces_in_cells_stay():
    shown = html.tokens(["a\n  b", "<"], [(-1, 0.0, ""), (3, 1.0, "")])
    assert "a↵\n  b" in shown and "&lt;" in shown and "pre-wrap" in shown
    assert 'white-space:pre-wrap">   </td>' in html.grid(["token"], [["   "]])


def test_html_escapes_all_text():
    html = Results(a=Result(RESULT))._repr_html_()
    assert "&lt;b&gt;x&lt;/b&gt;" in html and "<b>" not in html and "<i>" not in html


def test_without_pandas_to_frame_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match="pandas is not installed: pip install pandas"):
        Result(RESULT).to_frame()


def test_one_document_is_not_documents():
    heads = [repr(Result(RESULT | {"n_documents": n})).splitlines()[0] for n in (1, 2)]
    assert heads[0].endswith(" · 1 document") and heads[1].endswith(" · 2 documents")


def test_a_frame_has_a_row_for_each_number():
    pytest.importorskip("pandas")
    frame = Results(a=Result(RESULT)).to_frame()
    assert list(frame["number"]) == ["ce_spliced", "ce_clean", "kl"]
    assert list(frame["value"])[:2] == [3.5, 3.0]
