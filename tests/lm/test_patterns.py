"""A list or a pattern of sites: which sites it names, each once; and that one is asked for where one is needed."""

import pytest

from ksparse.config import ActsConfig
from ksparse.errors import InputError
from ksparse.lm.model import LM
from ksparse.lm.patterns import expand, sites_of
from ksparse.lm.sites import outline, resolve
from ksparse.planning.plan import read_lm_spec


@pytest.fixture
def named(small_acts):
    """Return named(*patterns): the sites that they name on a GPT-2 of three blocks."""
    return lambda *patterns: sites_of(small_acts(site=list(patterns)))


@pytest.mark.parametrize(
    "patterns, sites",
    [
        (["resid_post.*"], ["resid_post.0", "resid_post.1", "resid_post.2"]),
        (["mlp_out.[02]", "resid_pre.1"], ["mlp_out.0", "mlp_out.2", "resid_pre.1"]),
        (["*_out.1"], ["attn_out.1", "mlp_out.1"]),
        (["transformer.h.*.mlp:in"], [f"transformer.h.{i}.mlp:in" for i in range(3)]),
        (["h.?.mlp.c_fc"], [f"transformer.h.{i}.mlp.c_fc" for i in range(3)]),
        (["resid_post.2", "resid_post.0"], ["resid_post.2", "resid_post.0"]),
    ],
)
def test_names_and_patterns_stand_for_these_sites_in_this_order(named, patterns, sites):
    assert named(*patterns) == sites


def test_a_star_is_one_part_of_a_name(named):
    assert named("transformer.h.*") == [f"transformer.h.{i}" for i in range(3)]


def test_a_site_that_is_named_twice_is_taken_once_and_a_word_is_said(named, caplog):
    assert named("resid_post.2", "resid_post.*", "resid_post.-3") == [
        "resid_post.2",
        "resid_post.0",
        "resid_post.1",
    ]
    assert "acts.site names resid_post.2 more than once; it is taken once" in caplog.text
    assert "acts.site names resid_post.0 more than once" in caplog.text


@pytest.mark.parametrize("pattern", ["resid_pots.*", "resid_post.[7-9]", "transformer.h.*.mlp:at"])
def test_a_pattern_that_matches_nothing_is_told_what_there_is(named, pattern):
    with pytest.raises(InputError, match=r"resid_post\.0 … resid_post\.2") as error:
        named("resid_post.1", pattern)
    assert "does not exist" in str(error.value) or f"no site matches {pattern!r}" in str(
        error.value
    )


def test_a_name_of_a_list_that_does_not_exist_is_told_what_there_is(named):
    with pytest.raises(InputError, match=r"site 'resid_post\.3' does not exist; there are"):
        named("resid_post.1", "resid_post.3")
    with pytest.raises(InputError, match="names no site"):
        expand(LM("pylm/0.3m", site="resid_post.1").model, ())


def test_where_one_site_is_needed_several_are_refused_in_one_sentence(small_acts):
    acts = small_acts(site=["resid_post.0", "resid_post.1"])
    message = (
        r"^site 'resid_post\.0, resid_post\.1' is a list or a pattern, and one site is needed here"
    )
    model = LM(acts=small_acts()).model
    for use in (
        lambda: LM(acts=acts),
        lambda: resolve(model, acts.site),
        lambda: outline(model, acts.site),
        lambda: LM(acts=small_acts()).at_site(acts.site),
    ):
        with pytest.raises(InputError, match=message):
            use()


def test_a_plan_of_one_site_refuses_several(small_recipe):
    with pytest.raises(InputError, match="one site is needed here"):
        read_lm_spec(small_recipe({"acts.site": "resid_post.*"}))


def test_several_sites_and_one_set_of_shards_are_refused():
    message = r"acts\.site is 'resid_post\.\*', which may name several sites, and acts\.shards is"
    with pytest.raises(InputError, match=message):
        ActsConfig(site="resid_post.*", shards="acts/x")
