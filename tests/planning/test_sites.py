"""A plan of several sites counts the LM once and a shuffle buffer for each site."""

import dataclasses
import json

import pytest

from ksparse.config import MeshConfig, from_dict, to_toml
from ksparse.data.live import memory_bytes
from ksparse.errors import InputError
from ksparse.planning import costs, flops, plan, sites
from ksparse.planning.costs import UnseenLM

NAMES = ("resid_post.0", "resid_post.1", "transformer.h.2.mlp.c_fc")
"""Of widths 16, 16 and 64, in the order in which a pass reaches them."""


@pytest.fixture
def several(small_recipe):
    """Return several(**options of plan_sites): the plan of three sites of a small LM."""
    recipe = small_recipe({"acts.site": list(NAMES), "curve.held_out": 128})
    return lambda **options: sites.plan_sites(recipe, **{"card": "laptop"} | options)


@pytest.fixture
def apart(small_recipe):
    return [
        plan.plan(small_recipe({"acts.site": name, "curve.held_out": 128}), card="laptop")
        for name in NAMES
    ]


def test_memory_is_that_of_one_lm_a_buffer_for_each_site_and_all_saes(several, apart):
    together, parts = several().memory, [each.requested.memory for each in apart]
    acts, batch = apart[0].case.recipe.acts, apart[0].case.recipe.batch
    assert together["LM"] == parts[0]["LM"] and together["libraries"] == parts[0]["libraries"]
    assert together["activations block"] == sum(memory_bytes(acts, batch, d) for d in (16, 16, 64))
    assert together["held-out activations"] == 4 * 128 * (16 + 16 + 64)
    assert together["first activations"] == parts[2]["first activations"]  # one at a time
    saes = costs.add_memory(costs.sae_memory(each.case) for each in apart)
    assert together["SAEs"] == saes + 8 * batch * (16 + 16)  # batches of the other sites
    assert max(sum(one.values()) for one in parts) < sum(together.values())
    assert sum(together.values()) < sum(sum(one.values()) for one in parts)


def test_the_lm_runs_once_and_to_the_last_site(several, apart):
    last = max(each.case.subject.before_site for each in apart)
    assert last == apart[2].case.subject.before_site > apart[1].case.subject.before_site
    assert several().flops["LM"] == flops.lm(last)
    assert several().flops["encoder product"] == sum(2 * 64 * d for d in (16, 16, 64))
    lm = [each.requested.seconds["LM"] for each in apart]
    assert several().seconds["LM"] == pytest.approx(max(lm)) and max(lm) == lm[2]
    saved = several().seconds_apart - sum(several().seconds.values())
    assert saved == pytest.approx(lm[0] + lm[1])


def test_checkpoints_of_all_are_counted(several, apart):
    assert several().disk == sum(each.disk for each in apart)


def test_the_command_says_so(verb, small_recipe, tmp_path):
    file = tmp_path / "sites.toml"
    file.write_text(to_toml(small_recipe({"acts.site": "resid_post.*"})))
    code, out, err = verb("plan", file, "--gpu", "h100", "--json", tmp_path / "plan.json")
    assert code == 0, err
    assert "at 3 sites, resid_post.0, resid_post.1, resid_post.2: d_model 16, " in out
    assert "up to the last site; one pass reads all" in out
    assert "for the shuffle buffers, one for each site" in out
    assert "a run for each site, one after another, about" in out
    assert list(json.loads((tmp_path / "plan.json").read_text())["sites"]) == [
        f"resid_post.{i}" for i in range(3)
    ]


def test_buffers_that_are_dear_are_named_with_the_way_out(small_recipe):
    recipe = small_recipe({"acts.site": list(NAMES), "acts.mix": 2**26})
    dear = "\n".join(sites.lines(sites.plan_sites(recipe, card="laptop")))
    assert "note         shuffle buffers of 3 sites are dear here; activations on disk" in dear
    assert "`ksparse shard`, in one pass" in dear and "or --acts.mix " in dear
    assert "dear" not in "\n".join(
        sites.lines(sites.plan_sites(small_recipe({"acts.site": list(NAMES)}), card="laptop"))
    )


def test_an_lm_that_is_not_at_hand_has_sites_by_name_alone(small_recipe):
    unseen = UnseenLM(d_model=512, parameters=10**8)
    listed = small_recipe({"acts.site": ["a.0", "a.1"], "acts.lm": "no/such"})
    assert len(sites.plan_sites(listed, card="h100", unseen=unseen).cases) == 2
    with pytest.raises(InputError, match=r"has the pattern 'a\.\*', .* list them by name"):
        wild = dataclasses.replace(listed.acts, site="a.*")
        sites.plan_sites(dataclasses.replace(listed, acts=wild), card="h100", unseen=unseen)


def test_meshes_are_compared_for_one_site(several):
    with pytest.raises(InputError, match="the best mesh is found for one site"):
        several(devices=[1, 2])


def test_a_mesh_divides_the_saes_and_not_the_buffers(several, small_recipe):
    one = several()
    recipe = from_dict(
        {"mesh": {"data": 1, "latent": 2}, "sae": {"n_latents": 64, "k": 4}, "batch": 64}
    )
    cases = [
        dataclasses.replace(case, recipe=dataclasses.replace(case.recipe, mesh=recipe.mesh))
        for case in one.cases.values()
    ]
    split = sites.memory(cases, MeshConfig(1, 2))
    assert split["activations block"] == one.memory["activations block"]
    assert split["SAEs"] < one.memory["SAEs"]


def test_a_lack_of_memory_is_explained_for_all_sites(several, small_recipe):
    recipes = [small_recipe({"acts.site": name}) for name in NAMES]
    assert "for these 3 SAEs at 3 sites; smaller by" in sites.explain_memory(recipes)
    assert "for this recipe; smaller by" in sites.explain_memory(recipes[:1])
