"""The kernel for Hopper: compiled wherever its compiler is, run and held against the definition where there is such a GPU."""

import subprocess
import sys

import pytest
import torch

from ksparse.kernels import hopper, triton_candidates

HERE = torch.cuda.is_available() and hopper.usable(torch.device("cuda"))
on_hopper = pytest.mark.skipif(not HERE, reason="there is no GPU of compute capability 9.0 here")
with_compiler = pytest.mark.skipif(
    hopper.compiler() is None, reason="cuda-bindings or NVRTC is not installed"
)
SHAPES = {
    "one_tile": (128, 64, 256, 8),
    "ragged": (300, 768, 5000, 48),
    "many_candidates": (77, 16, 300, 100),
    "d_not_in_chunks": (64, 1040, 3000, 20),
    "three_stages": (513, 1024, 20_000, 48),
    "tokens_stream": (256, 4096, 2048, 96),
    "one_candidate": (5, 768, 20_000, 1),
    "longest_lists": (300, 256, 20_000, 398),
    "one_token": (1, 160, 4096, 48),
}


# ---- constants


@pytest.mark.parametrize(
    "d, c",
    [(16, 1), (160, 48), (768, 48), (768, 398), (1024, 96), (1040, 48), (4096, 96), (16_384, 200)],
)
def test_a_plan_fits_the_shared_memory_and_its_lists_hold_what_a_tile_may_add(d, c):
    plan = hopper.plan(d, c)
    assert plan.bytes <= hopper.SHARED and plan.chunks * hopper.CHUNK >= d and plan.stages >= 2
    assert (
        c + c // 8 <= plan.full < plan.per * hopper.WARP
    )  # so many a list keeps when it is thinned out, and there is room for what may come


@pytest.mark.parametrize("d, c", [(100, 48), (768, 400), (768, 0)])
def test_there_is_no_plan_for_rows_that_the_copy_engine_does_not_take_or_lists_too_long(d, c):
    assert hopper.plan(d, c) is None


def test_a_plan_for_more_candidates_than_before_changes_only_now_and_then():
    assert len({hopper.plan(768, c) for c in range(48, 200)}) <= 11  # each is compiled anew


@pytest.mark.parametrize(
    "blocks, most, parts",
    [(256, 512, 1), (64, 512, 2), (32, 512, 4), (2, 512, 8), (2, 1, 1), (2, 0, 1), (20, 3, 3)],
)
def test_few_tokens_split_the_latents_between_processors(blocks, most, parts):
    assert hopper._choose_parts(blocks, most, 132) == parts


def test_a_cpu_has_no_such_kernel():
    assert not hopper.usable(torch.device("cpu"))


def test_importing_the_module_loads_no_driver():
    code = "import sys; from ksparse.kernels import hopper; print(hopper._driver.cache_info().currsize)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "0\n"
    )


# ---- the compiler, which needs no GPU


@with_compiler
@pytest.mark.parametrize("d, c", [(64, 8), (768, 48), (1024, 122), (4096, 96)])
def test_the_kernel_compiles_to_machine_code(d, c):
    code = hopper.compiled(hopper.plan(d, c))
    assert code[:4] == b"\x7fELF" and b"candidates" in code


@with_compiler
def test_what_does_not_compile_says_why(tmp_path, monkeypatch):
    source = tmp_path / "broken.cu"
    source.write_text('extern "C" __global__ void candidates() { nonsense; }')
    monkeypatch.setattr(hopper, "SOURCE", source)
    with pytest.raises(
        RuntimeError, match=r"(?s)hopper\.cu does not compile.*nonsense.*run\.kernels=torch"
    ):
        hopper.compiled.__wrapped__(hopper.plan(64, 8))


# ---- the result, on a GPU


def operands(b, d, n, seed=0):
    make = torch.Generator().manual_seed(seed)
    x, weight = (
        torch.randint(-127, 128, (rows, d), generator=make, dtype=torch.int8).cuda()
        for rows in (b, n)
    )
    x_scale, scale = (torch.rand(rows, generator=make).cuda() + 0.5 for rows in (b, n))
    return x, x_scale, weight, scale, 1000 * torch.randn(n, generator=make).cuda()


def scores_of(x, x_scale, weight, scale, bias):
    """The definition, rounded where the kernel rounds: the product is exact, then one multiplication, then one fused."""
    product = (x.double() @ weight.double().T).float() * scale
    return torch.addcmul(
        bias.double().expand(len(x), -1), product.double(), x_scale[:, None].double()
    ).float()


def check(args, c, plan=None):
    scores, latents, dropped = hopper.candidates(*args, c, plan or hopper.plan(args[0].shape[1], c))
    exact = scores_of(*args)
    assert (
        scores.shape == latents.shape == (len(exact), c)
        and 0 <= latents.min()
        and latents.max() < exact.shape[1]
    )
    assert torch.equal(scores, exact.gather(1, latents))
    assert torch.equal(scores.sort(1).values, exact.topk(c, 1).values.sort(1).values)
    assert c == 1 or (latents.sort(1).values.diff(dim=1) > 0).all(), "a latent is there twice"
    assert (exact.scatter(1, latents, -torch.inf).amax(1) <= dropped).all() and (
        dropped <= scores.amin(1)
    ).all()


@on_hopper
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_the_candidates_are_the_largest_and_the_bound_holds(shape, cluster):
    b, d, n, c = shape
    check(operands(b, d, n), c, hopper.plan(d, c)._replace(cluster=cluster))


@on_hopper
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["rising", "falling", "equal", "few_columns"])
def test_the_order_of_the_scores_does_not_matter(kind, parts, monkeypatch):
    monkeypatch.setattr(hopper, "_choose_parts", lambda *_: parts)
    x, x_scale, weight, scale, bias = operands(500, 256, 6000)
    at = torch.arange(6000.0).cuda()
    bias = {
        "rising": 1e4 * at,
        "falling": -1e4 * at,
        "equal": torch.ones_like(at),
        "few_columns": torch.where(at % 8 < 2, 1e8 * torch.rand_like(at), 0),
    }[kind]
    check((torch.zeros_like(x) if kind == "equal" else x, x_scale, weight, scale, bias), 48)


@on_hopper
def test_a_token_of_nan_is_bounded_by_infinity_and_others_are_as_ever():
    x, x_scale, weight, scale, bias = operands(300, 128, 3000)
    scores, latents, dropped = hopper.candidates(
        x, x_scale, weight, scale, bias, 20, hopper.plan(128, 20)
    )
    x_scale[::7] = torch.nan
    again = hopper.candidates(x, x_scale, weight, scale, bias, 20, hopper.plan(128, 20))
    assert (again[2][::7] == torch.inf).all() and (again[1] >= 0).all() and (again[1] < 3000).all()
    fine = ~torch.isnan(x_scale)
    assert all(
        torch.equal(one[fine], other[fine]) for one, other in zip((scores, latents, dropped), again)
    )


@on_hopper
def test_it_repeats_bit_for_bit():
    args = operands(4096, 768, 16_384)
    first, second = (hopper.candidates(*args, 48, hopper.plan(768, 48)) for _ in range(2))
    assert all(map(torch.equal, first, second))


@on_hopper
def test_the_screen_takes_it_and_finds_what_triton_finds():
    x, weight, bias = (
        torch.randn(200, 160).cuda(),
        torch.randn(4096, 160).cuda(),
        torch.randn(4096).cuda(),
    )
    low = triton_candidates.quantize(weight, "int8")
    mine, triton = (
        triton_candidates.candidates(x, low, bias, 40),
        triton_candidates.candidates(x, low, bias, 40, tile=triton_candidates.BYTES_TILE, kept=8),
    )
    assert torch.allclose(
        mine.scores.sort(1).values, triton.scores.sort(1).values, rtol=2**-16
    )  # Triton's keys have fewer bits
    assert (mine.dropped <= mine.scores.amin(1)).all()


@on_hopper
def test_what_the_driver_refuses_is_named():
    with pytest.raises(RuntimeError, match=r"cuModuleGetFunction failed: .*run\.kernels=torch"):
        hopper._call("cuModuleGetFunction", None, None, b"nothing")
