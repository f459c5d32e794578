"""Planted subspaces are found, noise has none, and many latents are sampled and said to be."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch

from ksparse.config.evaluation import EvalConfig
from ksparse.errors import InputError
from ksparse.evals import runner
from ksparse.evals.latents import subspaces
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Shape

OPTIONS = EvalConfig(tokens=300, per_document=60, device="cpu")


def encoder(
    n: int = 400, d: int = 40, share: float = 0.25, noise: float = 0.02, seed: int = 0
) -> tuple[torch.Tensor, np.ndarray]:
    """Return rows [n, d] of which a share lie in that share of the dimensions, turned at random; and which do."""
    draw = np.random.default_rng(seed)
    inside = draw.permutation(n) < share * n
    rows = noise * draw.standard_normal((n, d))
    few = round(share * d)
    rows[inside, :few] += 2.3 * draw.standard_normal((inside.sum(), few)) / few**0.5
    rows[~inside, few:] += 1.6 * draw.standard_normal(((~inside).sum(), d - few)) / (d - few) ** 0.5
    turn, _ = np.linalg.qr(draw.standard_normal((d, d)))
    return torch.from_numpy(rows @ turn), inside


def found(W: torch.Tensor) -> tuple[subspaces.Split, np.ndarray, np.ndarray]:
    rows = subspaces.shares(W)[0].numpy()
    order = subspaces.order(rows)
    return subspaces.split(rows[order]), order, rows


def test_planted_subspaces_are_found_with_their_latents_and_directions():
    W, inside = encoder()
    split, order, rows = found(W)
    assert split.at == pytest.approx(100, abs=4) and abs(len(split.dims) - 10) <= 1
    assert split.separation > 0.6
    first = rows[:, split.dims].sum(1) >= split.border
    assert (first == inside).mean() > 0.98


def test_noise_has_no_subspaces():
    draw = np.random.default_rng(3)
    split, *_ = found(torch.from_numpy(draw.standard_normal((400, 40))))
    assert split.separation < 0.3


def test_shares_are_those_of_the_singular_value_decomposition():
    W = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, S, _ = np.linalg.svd(W.numpy(), full_matrices=False)
    rows, sizes = subspaces.shares(W)
    expected = (U / np.linalg.norm(U, axis=1, keepdims=True)) ** 2
    assert np.allclose(rows, expected) and np.allclose(sizes, S)
    flat = torch.cat([W[:, :5], W[:, :2] - W[:, 2:4]], 1)  # of rank 5
    assert subspaces.shares(flat)[0].shape == (50, 5)


def test_the_order_is_that_of_the_second_eigenvector():
    rows = np.random.default_rng(0).dirichlet(np.ones(5), 60)
    away = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    width = np.sqrt(np.sort(away, 1)[:, subspaces.NEIGHBOURS])
    kernel = np.exp(-away / width[:, None] / width[None])
    root = 1 / np.sqrt(kernel.sum(1))
    _, vectors = np.linalg.eigh(root[:, None] * kernel * root[None])
    slow = np.argsort(vectors[:, -2] * root).tolist()
    assert subspaces.order(rows).tolist() in (slow, slow[::-1])


def planted_sae(acts, d: int, n: int = 200) -> SAE:
    sae = SAE(Shape(d, n, 8), {"acts": dataclasses.asdict(acts)})
    sae.W_enc.data = encoder(n, d)[0].float()
    sae.W_dec.data = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return sae


def test_the_result_says_what_both_sides_are_like(small_acts):
    acts = small_acts()
    lm = LM(acts=acts)
    result = runner.evaluate(planted_sae(acts, lm.d_model), lm, ["subspaces"], OPTIONS)["subspaces"]
    assert result["separation"] > result["separation_of_noise"] + 0.2
    assert result["dims_share"] == pytest.approx(0.25, abs=0.07)
    norms = (
        result["sides"]["first"]["encoder_norm"][2],
        result["sides"]["second"]["encoder_norm"][2],
    )
    assert norms[0] > norms[1] > 1
    assert (
        result["n_ordered"]
        == result["n_live"]
        == len(result.arrays["order"])
        == int((result.arrays["side"] >= 0).sum())
    )
    assert sum(side["n_latents"] for side in result["sides"].values()) == result["n_live"]
    along, at = np.array(result["along_order"]), round(result["cut"] * len(result["along_order"]))
    assert (
        50 < len(along) <= 100 and along[: at - 1].min() > along[at + 1 :].max()
    )  # the first side comes first
    assert np.allclose([sum(shares) for shares in result["by_direction"].values()], 1)


def test_more_latents_than_are_ordered_are_sampled_and_the_result_says_so(small_acts):
    acts = small_acts()
    lm = LM(acts=acts)
    result = runner.evaluate(
        planted_sae(acts, lm.d_model, 2_000),
        lm,
        ["subspaces"],
        dataclasses.replace(OPTIONS, subspace_rows=150),
    )["subspaces"]
    assert result["n_ordered"] == 150 < result["n_live"]
    assert any("150 of them, drawn at random, were ordered" in note for note in result["notes"])
    assert int((result.arrays["side"] >= 0).sum()) == result["n_live"]


def test_too_few_latents_that_fire_are_refused(small_acts):
    acts = small_acts()
    lm = LM(acts=acts)
    sae = SAE(Shape(lm.d_model, 20, 2), {"acts": dataclasses.asdict(acts)})
    with pytest.raises(
        InputError, match="subspaces needs at least 30 latents that fire on the text; 0 do"
    ):
        runner.evaluate(sae, lm, ["subspaces"], OPTIONS)


def test_umap_asks_for_its_package_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(
        InputError,
        match=r"--ordering umap needs the package umap-learn: pip install 'ksparse\[umap\]'",
    ):
        subspaces.order(np.eye(40), "umap")
