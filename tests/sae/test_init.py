"""How an autoencoder starts: b_pre, directions, scale."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from ksparse.config import SAEConfig as Options
from ksparse.sae.init import draw_rows_, geometric_median, initialize_
from ksparse.sae.model import SAE, Shape


def sample(rows=600, d=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, d, generator=generator) * torch.linspace(0.5, 2, d) + 1


def start(seed=0, **options):
    sae = SAE(Shape(8, 48, 4, "none"))
    initialize_(
        sae, sample(), Options(n_latents=48, k=4, **options), torch.Generator().manual_seed(seed)
    )
    return sae


def distances(points, at):
    return (points.double() - torch.as_tensor(at).double()).norm(dim=1).sum().item()


@given(seed=st.integers(0, 10_000), rows=st.integers(3, 30), d=st.integers(1, 4))
def test_geometric_median_has_the_least_sum_of_distances(seed, rows, d):
    points = (
        torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ** 3
    )
    found = geometric_median(points, iterations=3000, tolerance=1e-12)
    best = min(
        (
            minimize(
                lambda y: distances(points, y),
                x0,
                method="Nelder-Mead",
                options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000},
            )
            for x0 in (points.mean(0).numpy(), points.median(0).values.numpy())
        ),
        key=lambda result: result.fun,
    )
    assert distances(points, found) <= best.fun * (1 + 1e-4)


@pytest.mark.parametrize(
    "points, expected",
    [
        ([[0.0], [0.0], [0.0], [4.0], [1.0]], [0.0]),  # the mean is a point and is not the median
        ([[0.0, 0.0]] * 5 + [[10.0, 0.0], [0.0, 10.0]], [0.0, 0.0]),
        ([[1.0, 2.0]] * 4, [1.0, 2.0]),
        ([[3.0, 4.0]], [3.0, 4.0]),
        (
            [[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]],
            [0.0, 0.0],
        ),  # the mean is a point and is the median
        ([[0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [30.0, 1.0], [-10.0, 1.0]], [0.0, 1.0]),
    ],
    ids=[
        "mean_on_a_point",
        "coincident_majority",
        "all_the_same",
        "one_point",
        "centre_of_a_cross",
        "median_on_a_point",
    ],
)
def test_geometric_median_with_points_that_coincide_with_the_iterate(points, expected):
    found = geometric_median(torch.tensor(points, dtype=torch.float64), iterations=2000)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_geometric_median_is_not_the_mean():
    """T18: one library's is; outliers tell them apart."""
    points = torch.cat([sample(), torch.full((30, 8), 1000.0)])
    median = geometric_median(points)
    assert (median - 1).norm() < 1 < 40 < (points.mean(0) - 1).norm()


def test_b_pre_starts_where_it_is_asked_to():
    torch.testing.assert_close(
        start(b_pre_init="geometric_median").b_pre.detach(), geometric_median(sample())
    )
    torch.testing.assert_close(start(b_pre_init="mean").b_pre.detach(), sample().mean(0))
    assert not start(b_pre_init="zero").b_pre.any() and not start().b_enc.any()


def test_tied_encoder_rows_are_a_copy_and_not_a_view():
    """T7: shared storage lets normalising the decoder change the encoder."""
    sae = start(init="tied", init_scale="unit")
    assert torch.equal(sae.W_enc, sae.W_dec) and sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    with torch.no_grad():
        sae.W_dec.zero_()
    torch.testing.assert_close(sae.W_enc.detach().norm(dim=1), torch.ones(48))


def test_tied_encoder_rows_point_along_the_decoders_and_independent_ones_do_not():
    for init, least, most in (("tied", 0.9999, 1.0001), ("independent", -0.3, 0.3)):
        sae = start(init=init)
        cosine = torch.cosine_similarity(sae.W_enc, sae.W_dec).mean().item()
        assert least <= cosine <= most


@pytest.mark.parametrize("b_pre_init", ["geometric_median", "mean", "zero"])
@pytest.mark.parametrize("init", ["tied", "independent"])
def test_scaled_init_gives_reconstructions_the_norm_of_their_inputs(init, b_pre_init):
    sae, x = start(init=init, b_pre_init=b_pre_init), sample()
    recon = (
        (sae.decode_normalized(sae.code(x, sae.pre_acts_normalized(x))) - sae.b_pre)
        .norm(dim=1)
        .mean()
    )
    torch.testing.assert_close(recon, (x - sae.b_pre).norm(dim=1).mean(), rtol=1e-4, atol=0)


def test_decoder_rows_start_with_norm_1_and_unit_scale_keeps_the_encoders_too():
    for init in ("tied", "independent"):
        sae = start(init=init, init_scale="unit")
        for rows in (sae.W_dec, sae.W_enc):
            torch.testing.assert_close(rows.detach().norm(dim=1), torch.ones(48))


def test_the_seed_decides_the_directions():
    assert torch.equal(start(0).W_dec, start(0).W_dec) and not torch.equal(
        start(0).W_dec, start(1).W_dec
    )


def test_a_sample_of_zeros_leaves_finite_weights():
    sae = SAE(Shape(8, 48, 4, "none"))
    initialize_(
        sae, torch.zeros(20, 8), Options(n_latents=48, k=4), torch.Generator().manual_seed(0)
    )
    assert all(torch.isfinite(value).all() for value in sae.parameters())


@pytest.mark.parametrize("rows, width", [(48, 8), (37, 5), (7, 3), (1, 3), (100, 33)])
def test_rows_of_a_shard_are_those_of_one_draw(rows, width, monkeypatch):
    whole = torch.Generator().manual_seed(3)
    drawn, after = torch.randn(rows, width, generator=whole), torch.randn(20, generator=whole)
    for piece in (16, 48, 2**20):
        monkeypatch.setattr("ksparse.sae.init._PIECE", piece)
        for first, stop in ((0, rows), (0, rows // 2), (rows // 2, rows), (rows // 3, rows // 2)):
            generator, part = torch.Generator().manual_seed(3), torch.empty(stop - first, width)
            draw_rows_(part, first, rows, generator)
            assert torch.equal(part, drawn[first:stop])
            assert torch.equal(torch.randn(20, generator=generator), after)


@pytest.mark.parametrize("options", [{}, {"init": "independent", "init_scale": "unit"}], ids=str)
def test_shards_start_as_rows_of_the_whole_to_the_last_bit(options):
    from ksparse.sae.sharded import new_sae

    from ..mesh_of_threads import on_mesh

    def started(mesh):
        sae = new_sae(Shape(8, 48, 4, "none"), {}, mesh)
        draw = torch.Generator().manual_seed(0)
        initialize_(sae, sample(), Options(n_latents=48, k=4, **options), draw)
        return sae

    whole = start(**options)
    for latent in (2, 3, 4, 12):
        shards = on_mesh(1, latent, started)
        for name in ("W_enc", "W_dec"):
            rows = torch.cat([getattr(shard, name) for shard in shards])
            assert torch.equal(rows, getattr(whole, name))
