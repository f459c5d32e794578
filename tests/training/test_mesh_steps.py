"""Every kind of step and loss on a mesh takes the steps of one process, up to rounding."""

from __future__ import annotations

import functools

import pytest
import torch

from ksparse.config import from_dict
from ksparse.kernels import native
from ksparse.planning import costs
from ksparse.planning.hardware import DEVICES
from ksparse.planning.steps import choose_step
from ksparse.sae.init import initialize_
from ksparse.sae.model import Shape
from ksparse.sae.sharded import new_sae
from ksparse.training.checkpoint import TrainState
from ksparse.training.steps.select import build_step
from ksparse.training.trainer import l0, train_step

from ..mesh_of_threads import on_mesh

D, N, K, B, STEPS = 16, 512, 4, 64, 6
MESHES = [(1, 4), (2, 2), (4, 1), (1, 2)]
NATIVE = {"run": {"kernels": "native"}}
KINDS = {
    "in torch": {"run": {"kernels": "torch"}},
    "in torch, AuxK on a share by batch": {
        "run": {"kernels": "torch"},
        "sae": {"auxk_norm": "batch", "auxk_share": 0.4},
    },
    "compiled": NATIVE | {"optim": {"approx_topk": "off"}},
    "compiled, preselected": NATIVE | {"optim": {"approx_topk": "int8"}},
    "compiled, preselected in bfloat16": NATIVE | {"optim": {"approx_topk": "bfloat16"}},
    "compiled, not clipped, no b_enc": NATIVE | {"optim": {"clip": 0.0}, "sae": {"b_enc": False}},
    "compiled, AuxK on a share by batch": NATIVE
    | {"sae": {"auxk_norm": "batch", "auxk_share": 0.4}},
    "Multi-TopK": {"sae": {"multi_topk": 0.125}},
    "Multi-TopK, AuxK on a share by batch": {
        "sae": {"multi_topk": 0.125, "auxk_norm": "batch", "auxk_share": 0.4}
    },
    "prefixes": {"sae": {"prefixes": [50, 200]}},
    "drawn prefixes": {"sae": {"prefix_draws": 3}},
    "BatchTopK": {"sae": {"activation": {"kind": "batch_topk"}}},
    "JumpReLU": {"sae": {"activation": {"kind": "jump_relu", "bandwidth": 0.1}}},
    "JumpReLU, L0": {"sae": {"activation": {"kind": "jump_relu", "penalty": "l0"}}},
    "ReLU": {"sae": {"activation": {"kind": "relu", "l1": 0.02}}},
    "Gated": {"sae": {"activation": {"kind": "gated", "l1": 0.02}}},
    "ProLU": {"sae": {"activation": {"kind": "prolu", "l1": 0.02}}},
    "decoder near its start": {"sae": {"decoder_cosine_min": 0.99}},
}


def recipe(kind, data, latent, reduce="float32"):
    table = {
        "sae": {"n_latents": N, "k": K, "dead_after": 2 * B},
        "optim": {"lr": 3e-3, "clip": 0.05, "ema": 0.9, "ema_span": 1.0},
        "batch": B,
        "tokens": STEPS * B,
        "run": {"device": "cpu"},
        "mesh": {"data": data, "latent": latent, "reduce": reduce},
    }
    changes = KINDS[kind]
    if changes.get("sae", {}).get("activation", {}).get("kind") not in ("relu", "gated", "prolu"):
        table["sae"]["k_aux"] = 8
    for section, keys in changes.items():
        table[section] = table[section] | keys
    return from_dict(table)


def batch(number):
    draw = torch.Generator().manual_seed(number)
    directions = torch.randn(3 * D, D, generator=torch.Generator().manual_seed(99))
    code = torch.rand(B, 3 * D, generator=draw) * (torch.rand(B, 3 * D, generator=draw) < 0.06)
    x = code @ directions + 0.05 * torch.randn(B, D, generator=draw)
    return torch.nn.functional.normalize(x, dim=1)


def trained(kind, data, latent, reduce="float32"):
    """Return of each process (start weights, first latents, tensors, losses, bytes of a step)."""
    asked = recipe(kind, data, latent, reduce)

    def run(mesh):
        sae = new_sae(Shape(D, N, K, activation=asked.sae.activation.kind), {}, mesh)
        initialize_(sae, batch(0), asked.sae, torch.Generator().manual_seed(1))
        start = {key: value.clone() for key, value in sae.state_dict().items()}
        step = build_step(sae, asked, mesh)
        state = TrainState(torch.zeros(N // latent, dtype=torch.long), 0.02)
        rows = []
        for number in range(1, STEPS + 1):
            state.step = number
            mesh.sent.clear()
            x = batch(number)[mesh.batch_range(B)]
            part, norm = train_step(step, x, state, asked)
            if number == 1:
                first = part.code.dense(N // latent) > 0
            terms = {name: value.item() for name, value in part.terms.items()}
            sent = dict(mesh.sent)
            rows.append(terms | {"norm": norm, "l0": l0(part, mesh)})
        average = step.averaged().state_dict()
        tensors = step.tensors() | {f"use.{key}": value for key, value in average.items()}
        tensors["since"] = state.since
        return start, first, {key: value.clone() for key, value in tensors.items()}, rows, sent

    return on_mesh(data, latent, run, reduce)


def joined(parts, latent, whole):
    """Return the tensors of the first part of the batch's processes put together."""
    out = {}
    for key, value in whole.items():
        mine = [part[key] for part in parts[:latent]]
        shared = value.shape == mine[0].shape
        out[key] = mine[0] if shared and latent > 1 else torch.cat(mine) if value.ndim else mine[0]
    return out


@pytest.fixture(scope="module")
def run():
    """Return run(kind, data, latent, …): what `trained` returns, once for each of them."""
    return functools.cache(trained)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh[0]}x{mesh[1]}")
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_takes_the_steps_of_one_process(kind, mesh, run):
    if "compiled" in kind and native.load() is None:
        pytest.skip("no compiler")
    data, latent = mesh
    start, first, tensors, rows, sent = run(kind, 1, 1)[0]
    parts = run(kind, data, latent)
    assert not sent
    assert torch.equal(
        torch.cat(
            [
                torch.cat([part[1] for part in parts[at : at + latent]], 1)
                for at in range(0, data * latent, latent)
            ]
        ),
        first,
    )
    found = joined([part[0] for part in parts], latent, start)
    for key in ("W_enc", "W_dec", "b_enc", "b_pre"):
        assert torch.equal(found[key], start[key]), key
    found = joined([part[2] for part in parts], latent, tensors)
    for key, value in tensors.items():
        if not key.startswith("screen."):
            apart = (found[key] - value).double().norm() / value.double().norm().clamp_min(1e-9)
            assert apart < 2e-5, (key, apart)
    for part in parts:
        for one, other in zip(part[3], rows, strict=True):
            assert one == pytest.approx(other, rel=2e-5, abs=1e-9)


def planned_bytes(asked, parts):
    """Return the bytes that a step is planned to send, by name, and those it did send; without
    those that depend on the data, which are checked."""
    dead = sum((part[2]["since"] >= asked.dead_after).sum().item() for part in parts) / N
    case = costs.PlanInput(
        asked, costs.LMSpec(D, 0, 0), DEVICES["laptop"], choose_step(asked, "cpu"), dead=dead
    )
    planned = {each.name: each.bytes for each in costs.communication(case, asked.mesh)}
    again, sent = planned.pop("values_again", 0), dict(parts[0][4])
    assert sent.pop("values_again", 0) <= 4 * again + 4 * 8 * 4
    del planned["stop"], planned["block"]  # of the loop around the steps
    return planned, sent


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh[0]}x{mesh[1]}")
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_step_are_those_of_the_plan(kind, mesh, run):
    if "compiled" in kind and native.load() is None:
        pytest.skip("no compiler")
    data, latent = mesh
    planned, sent = planned_bytes(recipe(kind, data, latent), run(kind, data, latent)[:latent])
    assert sent == planned


@pytest.mark.parametrize("mesh", [(1, 4), (2, 2)], ids=lambda mesh: f"{mesh[0]}x{mesh[1]}")
@pytest.mark.parametrize(
    "kind", ["in torch", "compiled, preselected", "Multi-TopK", "BatchTopK", "Gated"]
)
def test_reconstructions_summed_in_bfloat16_are_half_the_bytes_and_train_the_same(kind, mesh, run):
    if "compiled" in kind and native.load() is None:
        pytest.skip("no compiler")
    data, latent = mesh
    parts, exact = run(kind, data, latent, "bfloat16"), run(kind, data, latent)
    planned, sent = planned_bytes(recipe(kind, data, latent, "bfloat16"), parts[:latent])
    assert sent == planned and 2 * sent["recon"] == exact[0][4]["recon"]
    for number, (one, other) in enumerate(zip(parts[0][3], exact[0][3], strict=True)):
        assert one["nmse"] != other["nmse"]
        assert one == pytest.approx(other, rel=0.02 if number else 2**-8)
