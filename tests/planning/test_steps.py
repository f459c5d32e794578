"""The planner plans the step that the trainer takes, and refuses what the trainer refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ksparse.config import Recipe, from_dict
from ksparse.errors import InputError
from ksparse.kernels import native, triton_ops
from ksparse.planning import plan
from ksparse.planning.costs import LMSpec
from ksparse.planning.hardware import DEVICES
from ksparse.planning.steps import choose_step, prefilters
from ksparse.training.steps import select

RECIPES = {
    "plain": {},
    "torch": {"run": {"kernels": "torch"}},
    "native": {"run": {"kernels": "native"}},
    "triton": {"run": {"kernels": "triton"}},
    "bfloat16": {"optim": {"precision": "bfloat16"}},
    "bfloat16 in torch": {"optim": {"precision": "bfloat16"}, "run": {"kernels": "torch"}},
    "int8": {"optim": {"approx_topk": "int8"}},
    "any preselection": {"optim": {"approx_topk": "auto"}, "sae": {"n_latents": 64, "k": 4}},
    "Multi-TopK": {"sae": {"multi_topk": 0.125, "n_latents": 512}},
    "ReLU": {"sae": {"activation": {"kind": "relu"}}},
    "ReLU by Triton": {"sae": {"activation": {"kind": "relu"}}, "run": {"kernels": "triton"}},
}
DEVICE_NAMES = ("cpu", "cuda", "cuda:1", "mps")
STEPS = {
    "AutogradStep": "autograd",
    "ExplicitStep": "torch",
    "NativeStep": "native",
    "TritonStep": "triton",
}


@pytest.fixture
def trained_step(monkeypatch):
    """Return trained_step(recipe, device): the step that the trainer builds, or its error."""

    def build(name):
        return lambda *args: STEPS[name]

    for name in STEPS:
        monkeypatch.setattr(select, name, build(name))

    def take(recipe, device):
        sae = SimpleNamespace(W_enc=SimpleNamespace(device=torch.device(device)))
        try:
            return select.build_step(sae, recipe)
        except InputError as error:
            return str(error)

    return take


def planned_step(recipe: Recipe, device: str) -> str:
    try:
        return plan.plan_input(recipe, LMSpec(16, 0, 0), device).step
    except InputError as error:
        return str(error)


def install(monkeypatch, *, native_kernels: bool, triton: bool) -> None:
    monkeypatch.setattr(native, "load", lambda: object() if native_kernels else None)
    monkeypatch.setattr(triton_ops, "available", lambda: triton)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "no_triton"])
@pytest.mark.parametrize("native_kernels", [True, False], ids=["native", "no_native"])
@pytest.mark.parametrize("device", DEVICE_NAMES)
@pytest.mark.parametrize("name", RECIPES)
def test_the_planner_and_the_trainer_take_the_same_step(
    name, device, native_kernels, triton, monkeypatch, trained_step
):
    install(monkeypatch, native_kernels=native_kernels, triton=triton)
    recipe = from_dict(RECIPES[name])
    assert planned_step(recipe, device) == trained_step(recipe, device)


@pytest.mark.parametrize(
    "name, device, native_kernels, triton, step",
    [
        ("plain", "cuda:1", True, True, "triton"),
        ("plain", "cuda:1", True, False, "torch"),
        ("plain", "cpu", True, True, "native"),
        ("plain", "cpu", False, True, "torch"),
        ("plain", "mps", True, False, "autograd"),
        ("torch", "cuda", True, True, "torch"),
        ("bfloat16", "cuda:1", True, True, "triton"),
        ("bfloat16", "cuda", True, False, "optim.precision is 'bfloat16', which needs"),
        ("bfloat16", "cpu", True, True, "optim.precision is 'bfloat16', which needs"),
        ("bfloat16 in torch", "cuda", True, True, "optim.precision is 'bfloat16', which needs"),
        ("triton", "cuda", True, False, "run.kernels is 'triton', which needs a CUDA GPU"),
        ("native", "cuda", True, True, "run.kernels is 'native', which needs a CPU"),
        (
            "int8",
            "cpu",
            False,
            False,
            "optim.approx_topk is 'int8', which needs the compiled kernels",
        ),
        ("Multi-TopK", "cpu", True, True, "autograd"),
        ("ReLU", "cuda", True, True, "autograd"),
        ("ReLU by Triton", "cuda", True, True, "run.kernels is 'triton', which needs"),
    ],
)
def test_the_step_is_the_fastest_that_recipe_device_and_kernels_allow(
    name, device, native_kernels, triton, step, monkeypatch
):
    install(monkeypatch, native_kernels=native_kernels, triton=triton)
    assert planned_step(from_dict(RECIPES[name]), device).startswith(step)


def test_a_plan_for_a_second_gpu_is_that_of_its_step(monkeypatch):
    install(monkeypatch, native_kernels=True, triton=True)
    monkeypatch.setattr(plan, "resolve_device", lambda name: name)
    monkeypatch.setattr(plan, "measure_device", lambda device: DEVICES["h100"])
    monkeypatch.setattr(plan, "read_lm_spec", lambda recipe: LMSpec(16, 1000, 600))
    recipe = from_dict({"run": {"device": "cuda:1"}})
    assert plan.plan(recipe).case.step == "triton"
    install(monkeypatch, native_kernels=True, triton=False)
    assert plan.plan(recipe).case.step == "torch"


def test_other_machines_are_planned_with_all_their_kernels(monkeypatch):
    install(monkeypatch, native_kernels=False, triton=False)
    assert choose_step(Recipe(), "cuda", elsewhere=True) == "triton"
    assert choose_step(Recipe(), "cpu", elsewhere=True) == "native"


def test_several_processes_use_the_compiled_kernels_but_not_triton(monkeypatch):
    install(monkeypatch, native_kernels=True, triton=True)
    relu = from_dict(RECIPES["ReLU"])
    for device, step in (("cpu", "native"), ("cuda:3", "torch")):
        assert choose_step(Recipe(), device, processes=4) == step
        assert choose_step(relu, device, processes=4) == "autograd"
    with pytest.raises(InputError, match="optim.approx_topk is 'int8', which needs the compiled"):
        choose_step(from_dict(RECIPES["int8"]), "cuda:3", processes=4)


def test_candidates_are_few_among_the_latents_of_a_shard():
    few = {"sae": {"n_latents": 512, "k": 4}, "optim": {"approx_topk": "auto"}}
    recipe = from_dict(few | {"mesh": {"latent": 4}})
    assert not prefilters(recipe) and prefilters(recipe, 2)


def test_auto_preselects_only_where_candidates_are_few_of_the_latents():
    def preselects(screen, n, k):
        return prefilters(
            from_dict({"optim": {"approx_topk": screen}, "sae": {"n_latents": n, "k": k}})
        )

    assert not preselects("off", 6400, 4) and preselects("int8", 64, 4)
    assert preselects("auto", 256, 4) and not preselects("auto", 255, 4)
