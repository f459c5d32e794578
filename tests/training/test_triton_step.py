"""The step by Triton's kernels is that of autograd: compiled where there is a GPU, in Triton's interpreter elsewhere, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ksparse.config import Recipe, from_dict
from ksparse.errors import InputError
from ksparse.kernels import triton_ops
from ksparse.sae.init import initialize_
from ksparse.sae.model import SAE, Shape
from ksparse.training.checkpoint import TrainState
from ksparse.training.steps import prefilter, triton
from ksparse.training.steps.autograd import AutogradStep
from ksparse.training.steps.explicit import ExplicitStep
from ksparse.training.steps.select import build_step
from ksparse.training.steps.triton import TritonStep
from ksparse.training.trainer import DeadLatents, train_step

COMPILED = triton_ops.available()
RUNS = COMPILED or triton_ops.usable(torch.device("cpu"))
DEVICE = "cuda" if COMPILED else "cpu"
ROOT = Path(__file__).resolve().parents[2]
N, D, K, B = 48, 20, 4, 12
pytestmark = pytest.mark.filterwarnings(
    "ignore:TRITON_DEFAULT_FP_FUSION"
)  # Triton 3.9 announces that a default will change


@pytest.mark.slow  # minutes; tests/kernels/test_triton_ops.py interprets the kernels by default
@pytest.mark.timeout(1_200)
@pytest.mark.skipif(RUNS, reason="the tests below run here")
def test_the_steps_agree_in_the_interpreter():
    if triton_ops.triton is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=1_100,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert done.stdout.count(".") >= 7  # a dot for each that passed


def inside(test):
    """Keep a test only where kernels run."""
    return test if RUNS else None


def recipe(**changes) -> Recipe:
    table = {
        "acts": {"normalize": "unit_norm"},
        "sae": {"n_latents": N, "k": K, "dead_after": 1000, "k_aux": 8},
        "optim": {"lr": 3e-4, "ema": 0.9, "ema_span": 1.0, "warmup": 3},
        "run": {},
        "tokens": 100 * B,
        "batch": B,
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        table[section][name] = value
    return from_dict(table)


def made(kind: type, *screen: str, n: int = N, **changes) -> AutogradStep:
    wanted = recipe(sae__n_latents=n, **changes)
    sae, generator = SAE(Shape(D, n, K, wanted.acts.normalize)), torch.Generator().manual_seed(0)
    initialize_(
        sae,
        torch.nn.functional.normalize(torch.randn(500, D, generator=generator), dim=1),
        wanted.sae,
        generator,
    )
    sae.b_enc.data = (
        0.01 * torch.randn(n, generator=generator) if wanted.sae.b_enc else sae.b_enc.data
    )
    return kind(sae.to(DEVICE), wanted, *screen)


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.nn.functional.normalize(torch.randn(B, D, generator=generator), dim=1).to(DEVICE)
        for _ in range(count)
    ]


def taken(
    optimizer: AutogradStep, x: torch.Tensor, number: int, dead: torch.Tensor
) -> tuple[float, ...]:
    """Take a step; return its losses and the gradient's norm."""
    norm = None
    while norm is None:
        part = optimizer.backward(x, baseline=0.03, dead=dead, k_aux=optimizer.recipe.sae.k_aux)
        norm = optimizer.step(number)
    return *(value.item() for value in (part.total, part.nmse, part.auxk)), norm


def run(optimizer: AutogradStep, xs: list[torch.Tensor], dead: int) -> list[tuple[float, ...]]:
    return [
        taken(optimizer, x, number, torch.arange(dead, device=DEVICE) * 2)
        for number, x in enumerate(xs, 1)
    ]


@inside
@pytest.mark.parametrize(
    "changes, dead",
    [
        ({}, 0),
        ({"optim__clip": 0.01, "sae__auxk_share": 0.3}, 20),
        ({"sae__b_enc": False, "sae__auxk_norm": "batch"}, 5),
        ({"sae__unit_norm": False, "optim__ema": 0.0}, 20),
        ({"sae__k_aux": 2}, 20),
    ],
    ids=str,
)
def test_every_step_is_that_of_autograd(changes, dead):
    plain, ours = made(AutogradStep, **changes), made(TritonStep, **changes)
    np.testing.assert_allclose(
        run(ours, batches(3), dead), run(plain, batches(3), dead), rtol=2e-5, atol=1e-7
    )
    for key in ("W_enc", "W_dec", "b_enc", "b_pre"):
        torch.testing.assert_close(
            getattr(ours.sae, key), getattr(plain.sae, key), rtol=0, atol=3e-6
        )
        if plain.average:
            torch.testing.assert_close(ours.average[key], plain.average[key], rtol=0, atol=3e-6)
    assert set(plain.tensors()) <= set(ours.tensors()) and all(
        ours.tensors()[f"step.{key}"] == 3 for key in ("W_enc", "W_dec", "b_pre")
    )


@inside
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("n", [N, 300])  # too few latents for buckets, and enough
def test_a_screened_step_has_the_exact_steps_values(kind, n, monkeypatch):
    plain, screened = made(AutogradStep, n=n), made(TritonStep, kind, n=n)
    np.testing.assert_allclose(
        run(screened, batches(3), 5), run(plain, batches(3), 5), rtol=2e-5, atol=1e-7
    )
    assert screened.screened == 3 * B and screened.audit(batches(1)[0])["screen_latents_wrong"] == 0
    rows = screened.low.rows.float() * (1 if kind == "bfloat16" else screened.low.scale[:, None])
    error = (
        rows - screened.sae.W_enc.detach()
    ).abs()  # the copy follows the weights; the interpreter cuts off where the compiler rounds
    assert (
        error <= (rows.abs() * 2**-7 if kind == "bfloat16" else screened.low.scale[:, None] * 0.501)
    ).all()
    monkeypatch.setattr(triton, "MARGIN", 1e9)
    monkeypatch.setattr(prefilter, "MARGIN", 1e9)  # no token is clear
    before = screened.redone
    np.testing.assert_allclose(
        run(screened, batches(1), 0), run(plain, batches(1), 0), rtol=2e-5, atol=1e-7
    )
    assert screened.redone == before + (B if n > N else 0)


@inside
def test_a_batch_comes_again_where_more_of_it_is_unclear_than_was_done_again(monkeypatch):
    ours, x, none = (
        made(TritonStep, "int8", n=300),
        batches(1)[0],
        torch.arange(0, device=DEVICE),
    )
    monkeypatch.setattr(triton, "MARGIN", 1e9)
    monkeypatch.setattr(prefilter, "MARGIN", 1e9)
    before, candidates = everything(ours), ours.candidates
    ours.backward(x, baseline=0.03, dead=none, k_aux=8)
    assert ours.again == 1  # one of 12 tokens
    assert ours.step(1) is None and ours.redone == 0 and ours.updates == 0
    assert all(
        torch.equal(value, before[key])
        for key, value in everything(ours).items()
        if key != "screen.again"
    )
    ours.backward(x, baseline=0.03, dead=none, k_aux=8)
    assert ours.again == B and ours.step(1) > 0
    assert (ours.redone, ours.screened, ours.updates) == (B, B, 1) and ours.candidates > candidates
    monkeypatch.undo()
    run(ours, batches(2), 0)
    assert ours.redone == B and ours.again == 0  # all are clear
    other = made(TritonStep, "int8", n=300)
    other.restore(ours.tensors() | {"screen.again": torch.tensor(5)}, ours.updates)
    assert other.again == 5


@inside
@pytest.mark.parametrize("screen", [(), ("int8",), ("bfloat16",)], ids=str)
def test_weights_read_in_bfloat16_are_copies_that_follow_the_masters(screen):
    plain, ours = (
        made(AutogradStep, n=300),
        made(TritonStep, *screen, n=300, optim__precision="bfloat16"),
    )
    np.testing.assert_allclose(run(ours, batches(3), 5), run(plain, batches(3), 5), rtol=2e-2)
    assert set(ours.copies) == {"W_enc", "W_dec"} and ours.sae.W_enc.dtype == torch.float32
    for key, copy in ours.copies.items():
        weight = getattr(ours.sae, key).detach()
        assert (
            copy.dtype == torch.bfloat16
            and ((copy.float() - weight).abs() <= weight.abs() * 2**-7).all()
        )  # the interpreter cuts off
        torch.testing.assert_close(weight, getattr(plain.sae, key).detach(), rtol=0, atol=2e-3)
    if screen == ("bfloat16",):
        assert ours.low.rows is ours.copies["W_enc"]  # one copy serves both
    if screen == ("int8",):
        error = (
            ours.low.rows.float() * ours.low.scale[:, None] - ours.sae.W_enc.detach()
        ).abs()  # of the masters, not of the copy
        assert (error <= ours.low.scale[:, None] * 0.501).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(RUNS, reason="Triton's interpreter takes it")
def test_reading_in_bfloat16_is_refused_where_nothing_does():
    with pytest.raises(
        InputError,
        match="optim.precision is 'bfloat16', which needs a CUDA GPU, the package triton and TopK",
    ):
        build_step(SAE(Shape(D, N, K)), recipe(optim__precision="bfloat16"))


@inside
def test_the_recipe_asks_for_it_and_another_step_takes_its_checkpoint_up():
    ours = build_step(
        SAE(Shape(D, N, K)).to(DEVICE), recipe(run__kernels="triton", optim__approx_topk="auto")
    )
    assert (
        type(ours) is TritonStep and ours.screen == "off"
    )  # 48 latents with k = 4: a screen could save nothing
    ours = build_step(
        SAE(Shape(D, 300, K)).to(DEVICE),
        recipe(sae__n_latents=300, run__kernels="triton", optim__approx_topk="auto"),
    )
    assert ours.screen == "int8"
    ours = build_step(SAE(Shape(D, N, K)).to(DEVICE), recipe(optim__precision="bfloat16"))
    assert type(ours) is TritonStep and set(ours.copies) == {"W_enc", "W_dec"}
    ours = made(TritonStep)
    run(ours, batches(2), 5)
    other = made(ExplicitStep)
    other.restore({key: value.clone() for key, value in ours.tensors().items()}, ours.updates)
    x = batches(3)[2:]
    np.testing.assert_allclose(run(other, x, 5), run(ours, x, 5), rtol=2e-5)


@inside
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # in the interpreter's numpy
@pytest.mark.parametrize("options", [{}, {"approx_topk": "int8", "precision": "bfloat16"}], ids=str)
def test_a_batch_that_is_not_finite_changes_nothing(options):
    ours = made(
        TritonStep,
        *([options["approx_topk"]] if options else []),
        n=300,
        **{f"optim__{key}": value for key, value in options.items()},
    )
    before = everything(ours)
    x = batches(1)[0]
    x[3, 5] = torch.nan
    part = ours.backward(x, baseline=0.03, dead=torch.arange(0, device=DEVICE), k_aux=8)
    assert not torch.isfinite(part.total) and np.isnan(ours.step(1))
    assert all(torch.equal(value, before[key]) for key, value in everything(ours).items())


@pytest.mark.skipif(not COMPILED, reason="there is no GPU here to wait for")
@pytest.mark.parametrize("k_aux", [2, 8])  # AuxK by lists, and dense
@pytest.mark.parametrize("norm", ["token", "batch"])
def test_a_step_with_dead_latents_waits_for_nothing_but_the_norm(norm, k_aux):
    ours = made(
        TritonStep,
        "int8",
        n=300,
        optim__precision="bfloat16",
        optim__clip=0.01,
        sae__k_aux=k_aux,
        sae__auxk_norm=norm,
        sae__dead_after=2 * B,
    )
    state = TrainState(since=torch.zeros(300, dtype=torch.long, device=DEVICE), baseline=0.03)
    dead = DeadLatents(2 * B)
    for x in batches(6):
        state.step += 1
        if state.step == 4:
            ours.restore(
                {key: value.clone() for key, value in ours.tensors().items()}, ours.updates
            )
        torch.cuda.set_sync_debug_mode(
            "error" if state.step > 4 else "default"
        )  # to wait for an event is allowed
        try:
            part, norm_found = train_step(ours, x, state, ours.recipe, dead)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert norm_found > 0
    assert part.auxk > 0 and len(dead.indices(state.since)) > 20


def everything(optimizer: TritonStep) -> dict[str, torch.Tensor]:
    """Return what the next step depends on, the copies in low precision too."""
    low = (
        {f"low.{key}": value for key, value in optimizer.low._asdict().items()}
        if optimizer.kind
        else {}
    )
    return {
        key: value.clone() for key, value in (optimizer.tensors() | optimizer.copies | low).items()
    }
