"""Studies: what they train, that they go on where they stopped, and that their numbers are what they say."""

import dataclasses
import json
import math

import pytest
import torch

from ksparse import config as recipes
from ksparse import studies
from ksparse.config import Recipe, flat, to_dict
from ksparse.config.evaluation import StudyConfig
from ksparse.errors import InputError
from ksparse.report import studies as pages
from ksparse.sae.model import SAE, Shape
from ksparse.storage import jsonio
from ksparse.studies import ablations, baselines, gaussian, sites, study
from ksparse.studies.study import Study, StudyCurve, at_k, interpolate, power_law
from ksparse.training.train import train


@pytest.fixture
def options(small_recipe, tmp_path):
    """Return options(name, …): a study in a second, of the tiny LM that a small run was trained on."""
    run = train(small_recipe({"tokens": 64, "run.save_every": 1}), tmp_path / "run")

    def make(name, **changes):
        return StudyConfig(
            **{
                "run": str(run.path),
                "out": str(tmp_path / name),
                "tokens": 256,
                "n_latents": 32,
                "k": 2,
                "batch": 64,
                "eval_tokens": 150,
                "threads": 1,
                "device": "cpu",
            }
            | changes
        )

    return make


def answer(path):
    return jsonio.read_json(path / "study.json")


# ---- all four, and what they leave


def test_baselines_draw_every_kind_from_one_stream_and_judge_topk_beyond_its_k(
    options, monkeypatch
):
    monkeypatch.setattr(baselines, "SPARSITIES", (1,))
    monkeypatch.setattr(baselines, "PENALTIES", (1 / 16, 16))
    path = studies.run("baselines", options("baselines"))
    found = answer(path)
    kinds = {member.split(" ")[0] for member in found["members"]}
    assert kinds == {
        "TopK",
        "Multi-TopK",
        "BatchTopK",
        "Matryoshka",
        "JumpReLU",
        "ReLU",
        "Gated",
        "ProLU-STE",
        "ProLU-ReLU",
    }
    assert (
        found["members"]["TopK k2"]["l0"]["value"]
        <= 2
        < found["members"]["TopK k2 at 4k"]["l0"]["value"]
        <= 8
    )
    sizes = [point["latents"] for point in found["members"]["Matryoshka k2"]["prefixes"]]
    n = 2 * sizes[-1]
    assert sizes == [n // 16, n // 8, n // 4, n // 2]
    assert "prefixes" not in found["members"]["BatchTopK k2"]
    orders = {
        json.dumps([recipe["acts"], recipe["batch"], recipe["order"]])
        for recipe in (
            to_dict(Study("", options("baselines")).run_folder(member).recipe())
            for member in found["members"]
            if "at 4k" not in member
        )
    }
    assert len(orders) == 1
    assert {figure["name"] for figure in found["figures"]} == {"l0-nmse", "l0-ce", "nmse-ce"}
    assert any(finding.startswith("ReLU ") for finding in found["findings"]) and any(
        finding.startswith("Multi-TopK less TopK") for finding in found["findings"]
    )
    page = pages.write(path)
    assert "ProLU-STE" in page.read_text() and (path / "figures" / "l0-ce.svg").is_file()


@pytest.mark.parametrize(
    "x, says",
    [
        (
            [4.0, 64.0],
            "ReLU costs the LM more than TopK at L0 8.0 by 0.8000 ± 0.0000 nats (error 0.9000 against 0.1000); at L0 16.0 by 0.8000 ± 0.0000 nats (error 0.9000 against 0.1000).",
        ),
        (
            [32.0, 64.0],
            "ReLU at L0 32.0, its lowest, costs the LM more than TopK at 16.0 by 0.8000 ± 0.0000 nats.",
        ),
        (
            [2.0, 4.0],
            "ReLU has no point on either side of one of TopK's values of L0: nothing to compare.",
        ),
    ],
)
def test_a_rival_is_compared_at_topks_sparsity_or_where_it_is_denser_and_still_worse(x, says):
    curves = {
        "TopK": StudyCurve("TopK", [8.0, 16.0], [0.1, 0.1], [0.0, 0.0]),
        "ReLU": StudyCurve("ReLU", x, [0.9, 0.9], [0.0, 0.0]),
    }
    assert baselines._compare_with_topk(curves, curves) == [says]


def test_a_value_that_is_not_known_is_compared_with_nothing():
    known = StudyCurve("ReLU", [4.0, 64.0], [0.9, 0.9], [0.0, 0.0])
    unknown = StudyCurve("TopK", [8.0], [None], [None])
    expected = [
        "ReLU has no point on either side of one of TopK's values of L0: nothing to compare."
    ]
    curves = {"ReLU": known, "TopK": unknown}
    assert baselines._compare_with_topk(curves, curves) == expected


def test_a_study_goes_on_where_it_stopped_and_trains_nothing_twice(options, monkeypatch):
    steps = []
    monkeypatch.setattr(ablations, "MEMBERS", {"whole": {}, "no AuxK": {"auxk_coef": 0.0}})

    def stop(what, done, total):
        steps.append(what)
        if what.startswith("evaluating"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studies.run("recipe", options("again"), observe=stop)
    assert "training" in steps
    again = []
    path = studies.run(
        "recipe", options("again"), observe=lambda what, done, total: again.append(what)
    )
    assert "training" not in again and any(what.startswith("evaluating") for what in again)
    first = answer(path)
    third = []
    assert answer(
        studies.run("recipe", options("again"), observe=lambda what, *rest: third.append(what))
    ) | {"seconds": 0} == first | {"seconds": 0}
    assert third == []
    other = []
    studies.run(
        "recipe", options("again", eval_tokens=300), observe=lambda what, *rest: other.append(what)
    )
    assert any(what.startswith("evaluating") for what in other), "other options, another judgement"


def test_sites_are_read_in_one_pass_and_judged_by_layer_and_position(options):
    path = studies.run("sites", options("sites"))
    found = answer(path)
    assert list(found["members"]) == [
        f"{kind}.{layer}" for layer in range(3) for kind in ("attn_out", "mlp_out", "resid_post")
    ]
    layers = next(figure for figure in found["figures"] if figure["name"] == "layer-nmse")["curves"]
    assert [curve["label"] for curve in layers] == ["attn_out", "mlp_out", "resid_post"] and all(
        curve["x"] == [0, 1, 2] for curve in layers
    )
    positions = next(figure for figure in found["figures"] if figure["name"] == "position-nmse")[
        "curves"
    ][0]
    assert positions["x"] == list(range(1, 16)), "position 0 is not kept"
    shards = {
        recipe.acts.shards
        for recipe in (
            Study("", options("sites")).run_folder(member).recipe() for member in found["members"]
        )
    }
    assert len(shards) == 9


def test_gaussian_data_say_so_and_have_exponents_beside_the_real_ones(options, monkeypatch):
    monkeypatch.setattr(gaussian, "SIZES", 3)
    monkeypatch.setattr(gaussian, "HELD_OUT", 96)
    path = studies.run("gaussian", options("gaussian"))
    found = answer(path)
    assert list(found["members"]) == [
        f"{kind} n{n}" for kind in ("real", "gaussian") for n in (8, 16, 32)
    ]
    for kind in ("real", "gaussian"):
        losses = [found["members"][f"{kind} n{n}"]["nmse"]["value"] for n in (8, 16, 32)]
        assert found["fits"][kind]["exponent"]["value"] == pytest.approx(
            power_law([8, 16, 32], losses)["exponent"]["value"]
        )
        text = Study("", options("gaussian")).run_folder(f"{kind} n8").recipe().acts.text
        assert text.startswith("gaussian:") == (kind == "gaussian")


def test_the_recipes_parts_are_changed_one_by_one(options):
    members = ablations.recipes(Study("recipe", options("parts")))
    whole = flat(to_dict(members["whole"]))
    for member, changes in ablations.MEMBERS.items():
        mine = flat(to_dict(members[member]))
        assert {key for key in whole if whole[key] != mine[key]} == {
            f"sae.{key}" for key in changes
        }, member


def test_seeds_are_members_of_their_own_on_one_stream(options):
    members = ablations.recipes(Study("recipe", options("seeds", seeds=2)))
    assert len(members) == 2 * len(ablations.MEMBERS) and {
        recipe.seed for recipe in members.values()
    } == {0, 1}
    assert {recipe.data_seed for recipe in members.values()} == {0}


def test_a_study_takes_its_subject_from_a_run_and_lets_options_win(options, small_recipe):
    base = Study("x", options("x"))
    # A run's recipe keeps the data type that "auto" was on its device.
    assert base.acts == dataclasses.replace(small_recipe().acts, lm_dtype="float32")
    assert Study("x", options("x", site="resid_post.0")).acts.site == "resid_post.0"
    assert Study("x", StudyConfig()).acts == Recipe().acts
    assert base.run_folder("no AuxK, untied").path.name == "no_AuxK_untied"


# ---- numbers


def test_between_is_a_straight_line_of_logarithms_and_says_nothing_outside():
    curve = StudyCurve("", [10.0, 40.0, 90.0], [1.0, 0.25, 0.1], [0.1, 0.05, 0.01])
    assert interpolate(curve, 20.0)[0] == pytest.approx(0.5) and interpolate(curve, 40.0)[
        0
    ] == pytest.approx(0.25)
    assert interpolate(curve, 20.0)[1] == pytest.approx(0.5 * math.hypot(0.5 * 0.1, 0.5 * 0.2))
    assert interpolate(curve, 9.0) is None and interpolate(curve, 91.0) is None


def test_the_power_law_is_found_with_an_error_that_covers_it():
    n = [256, 512, 1024, 2048, 4096]
    exact = power_law(n, [3.0 * size**-0.25 for size in n])
    assert (
        exact["exponent"]["value"] == pytest.approx(-0.25)
        and exact["factor"]["value"] == pytest.approx(3.0)
        and exact["exponent"]["se"] < 1e-6
    )
    generator = torch.Generator().manual_seed(0)
    away = [
        (
            power_law(
                n,
                [
                    3.0 * size**-0.25 * math.exp(0.05 * noise)
                    for size, noise in zip(n, torch.randn(5, generator=generator).tolist())
                ],
            )["exponent"]
        )
        for _ in range(300)
    ]
    inside = sum(abs(each["value"] + 0.25) < 3.18 * each["se"] for each in away) / len(
        away
    )  # Student's t of 3 degrees of freedom
    assert inside == pytest.approx(0.95, abs=0.035)
    assert power_law([1, 2], [1.0, 0.5])["exponent"] == {"value": -1.0, "se": None}


def test_gaussian_rows_have_the_mean_and_covariance_and_are_a_function_of_the_step():
    x = torch.randn(4000, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 3.0
    x[:, 4] = x[:, 0]  # of no full rank
    stream = gaussian.GaussianStream(x, batch=100_000, seed=0, device=torch.device("cpu"))
    batches = stream.batches()
    first, second = next(batches), next(batches)
    assert not torch.equal(first.x, second.x) and torch.equal(
        next(stream.batches(first.cursor)).x, second.x
    )
    torch.testing.assert_close(
        first.x.mean(0).double(), x.mean(0), atol=0.03 * x.std().item(), rtol=0
    )
    torch.testing.assert_close(
        torch.cov(first.x.T.double()),
        torch.cov(x.T),
        atol=0.02 * torch.cov(x.T).abs().max().item(),
        rtol=0,
    )
    assert not torch.equal(stream.rows(10, -1), stream.rows(10, -2))


def test_the_same_weights_at_another_k():
    sae = SAE(Shape(6, 40, 3, "none"))
    with torch.no_grad():
        for weight in sae.parameters():
            weight.normal_()
    x = torch.randn(9, 6)
    assert at_k(sae, 12).encode(x).values.shape == (9, 12) and torch.equal(
        at_k(sae, 3).encode(x).values, sae.encode(x).values
    )
    with pytest.raises(InputError, match="k = 41 is more than the 40 latents"):
        at_k(sae, 41)


# ---- what is refused


def test_an_unknown_study_is_named_with_what_there_is():
    with pytest.raises(InputError, match="there is no study 'baseline'; did you mean 'baselines'"):
        studies.run("baseline")
    with pytest.raises(InputError, match="there are baselines, sites, gaussian, paper, recipe"):
        studies.check_name("zzz")
    studies.check_name("latents", ["latents"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": -1}, "tokens of a study is -1"),
        ({"seeds": 0}, "seeds of a study is 0; it must be at least 1"),
        ({"batch": -1}, "batch of a study is -1"),
        ({"eval_tokens": 0}, "eval_tokens of a study is 0"),
    ],
    ids=str,
)
def test_options_that_cannot_be_right_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        StudyConfig(**change)


def test_every_default_is_a_recipe():
    for module in (baselines, ablations):
        assert all(
            isinstance(recipe, Recipe)
            for recipe in module.recipes(Study("x", StudyConfig())).values()
        )
    assert len(gaussian.recipes(Study("x", StudyConfig()), "real")) == gaussian.SIZES
    kinds = {
        recipe.sae.activation.kind
        for recipe in baselines.recipes(Study("x", StudyConfig())).values()
    }
    assert kinds == set(recipes.ACTIVATION_CONFIGS)
    assert sites.TOKENS and study.FORMAT == 1
