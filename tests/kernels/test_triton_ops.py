"""The Triton kernels agree with the definition: compiled where there is a GPU, in Triton's interpreter elsewhere.

Triton decides when it is imported whether it interprets, and transformers may have imported it before: so without a GPU these tests run in a process
of their own, started by one test here. To see them one by one: TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton_ops.py
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ksparse.kernels import reference, triton_candidates, triton_ops

COMPILED = triton_ops.available()
pytestmark = pytest.mark.filterwarnings(
    "ignore:TRITON_DEFAULT_FP_FUSION"
)  # Triton 3.9 announces that a default will change
RUNS = COMPILED or (triton_ops.triton is not None and os.environ.get("TRITON_INTERPRET") == "1")
DEVICE = "cuda" if COMPILED else "cpu"
TINY = triton_ops.Tile(tokens=16, latents=32, depth=16, warps=4, stages=2, group=2)  # buckets of 8
SHAPES = {  # b, k, n, d
    "plain": (7, 3, 40, 8),
    "k_is_1": (5, 1, 33, 4),
    "k_is_n": (4, 6, 6, 5),
    "d_not_a_power_of_two": (9, 9, 50, 37),
    "d_is_1": (3, 2, 10, 1),
    "one_row": (1, 4, 9, 3),
    "n_is_1": (6, 1, 1, 7),
    "empty_batch": (0, 3, 10, 4),
    "k_is_0": (4, 0, 6, 3),
    "columns_in_blocks": (3, 2, 4, 1100),
}
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}


def inside(test):
    """Keep a test only where kernels run."""
    return test if RUNS else None


def inputs(shape, dtype=torch.float32, seed=0, repeated=False):
    b, k, n, d = shape
    make = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(size, d, generator=make).to(dtype) for size in (b, n))
    values = torch.rand(b, k, generator=make).to(dtype)
    values[torch.rand(b, k, generator=make) < 0.3] = 0
    if repeated:
        indices = torch.randint(min(n, 2), (b, k), generator=make)
    else:
        indices = (
            torch.stack([torch.randperm(n, generator=make)[:k] for _ in range(b)])
            if b
            else torch.zeros(0, k, dtype=torch.long)
        )
    return [each.to(DEVICE) for each in (values, indices, x, weight)]


def close(out, exact, dtype):
    assert out.dtype == dtype and out.shape == exact.shape
    scale = max(1.0, exact.abs().max().item() if exact.numel() else 1.0)
    torch.testing.assert_close(
        out.double(), exact.double(), rtol=DTYPES[dtype], atol=DTYPES[dtype] * scale
    )


# ---- everywhere


@pytest.mark.skipif(COMPILED, reason="there is a GPU: the tests below run compiled")
@pytest.mark.skipif(RUNS, reason="this is the process of their own")
def test_kernels_agree_with_the_definition_in_the_interpreter():
    if triton_ops.triton is None:
        pytest.skip("Triton is not installed")
    done = run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__],
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert done.stdout.count(".") > 100  # a dot for each that passed


@pytest.mark.skipif(triton_ops.triton is not None and RUNS, reason="already run outside")
def test_importing_the_kernels_does_not_import_triton():
    code = "import sys, ksparse.kernels; print('triton' in sys.modules, 'ksparse.kernels.triton_ops' in sys.modules)"
    assert run([sys.executable, "-c", code]).stdout.split() == ["False", "False"]


@pytest.mark.skipif(triton_ops.triton is not None and RUNS, reason="already run outside")
def test_without_triton_the_module_is_there_and_says_that_it_is_not_available():
    code = "import sys; sys.modules['triton'] = None; from ksparse.kernels import triton_ops; print(triton_ops.available())"
    done = run([sys.executable, "-c", code])
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(RUNS, reason="already run outside")
def test_the_benchmark_says_that_it_needs_a_gpu():
    bench = Path(__file__).resolve().parents[2] / "bench"
    for command in ([sys.executable, str(bench / "gpu.py")], ["bash", str(bench / "gpu.sh")]):
        done = run(command, PYTHON=sys.executable)
        assert (
            done.returncode == 2
            and "no CUDA device: run this on a machine with a GPU" in done.stderr
        )


def run(command, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=kept | environment
    )


# What the interpreter cannot see: whether the compiler takes them. It needs no GPU.
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ksparse.kernels import triton_ops, triton_candidates
tl = triton.language
I, F, B = "*i64", "*fp32", "*bf16"
TYPES = dict(x=B, weight=B, bias=F, values=F, places="*u8", tokens=I, order=I, starts=I, latents="*i32", indices=I, parts=F, weights=F, part_sums=F, out=F, b="i32", n="i32",
             d="i32", k="i32", grad=F, first=F, second=F, average=F, bf16_copy=B, clip_at=F, **dict.fromkeys("rate beta2 gain1 gain2 eps root gain".split(), "fp32"))

def build(name, warps, types={}, **constants):
    kernel, types = getattr(triton_ops, name, None) or getattr(triton_candidates, name), TYPES | types
    signature = {each: "constexpr" if each in constants else types[each] for each in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, each in enumerate(kernel.arg_names) if each == "d" or signature[each][0] == "*"}
    done = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(name, done.asm["ptx"].count("wgmma.mma_async"), done.asm["ptx"].count("shfl.sync"), done.asm["ptx"].count("__local_depot"),
          done.asm["ptx"].count("st.global.v4"))

sums = dict(ROWS=4, COLUMNS=256, SUM=tl.float32)
build("_candidates", 8, {"buckets": "i32"}, TOKENS=128, LATENTS=256, DEPTH=64, GROUP=8, KEPT=2, EVEN=True, FULL=True)
rows = dict(TOKENS=128, LATENTS=256, GROUP=8, KEPT=3, EVEN=True, FULL=True)
build("_keys", 8, dict(x="*i8", weight="*i8", x_scale=F, scale=F, keys="*i32", buckets="i32"), DEPTH=128, BYTES=True, **rows)
build("_largest", 8, dict(keys="*i32", scores=F, latents=I, dropped=F, size="i32", c="i32"), KEPT=3, LATENTS=256, SIZE=8192)
build("_round", 8, dict(x=F, out="*i8", scale=F), COLUMNS=1024)
build("_bucket_again", 4, {"buckets": I}, LATENTS=256, DEPTH=64)
build("_gather_sum", 1, **sums)
build("_gather_dot", 1, **sums)
build("_parts", 1, CHUNK=512, MEASURED=True, **sums)
build("_rows", 1, dict(squares=F, sums=F), CHUNK=512, MEASURED=True, **sums)
build("_choose", 1, dict(x=F, weight=F, latents=I, scores=F, spread=F, near=F, ranked="*i32", exact=F, c="i32", margin="fp32"), CANDIDATES=64, FIRST=32,
      COLUMNS=128, MORE=16, MORE_COLUMNS=128)
build("_decode", 8, dict(x=F, weight=F, error=F, squares=F, slopes=F), ROWS=16, COLUMNS=1024)
build("_adam_row", 8, dict(weight=F, bf16_copy=B, int8_copy="*i8", scale=F), PROJECT=True, UNIT=True, AVERAGE=True, HALF=True, BYTES=True, COLUMNS=1024)
build("_squares", 8, {"weight": F}, PROJECT=True, COLUMNS=1024)
"""


@pytest.mark.skipif(RUNS and not COMPILED, reason="already run outside")
def test_kernels_compile_for_hopper_with_tensor_cores_and_nothing_in_local_memory(tmp_path):
    if (
        triton_ops.triton is None
        or not (
            Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/ptxas"
        ).exists()
    ):
        pytest.skip("there is no Triton with a compiler for NVIDIA's GPUs")
    done = run([sys.executable, "-c", COMPILE], TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    built = {
        name: [int(count) for count in counts]
        for name, *counts in map(str.split, done.stdout.splitlines())
    }
    assert len(built) == 13 and not any(local for _, _, local, _ in built.values())
    assert built["_candidates"][0] > 0 and built["_keys"][0] > 0
    assert built["_adam_row"][3] == 4  # weight, moments and average go to memory 16 bytes at a time


# ---- the encoder


def check_topk(x, weight, bias, k, **options):
    """The choice is that of a float64 product, but for latents nearer to the k-th than rounding; the values are those of what was chosen."""
    values, indices = triton_ops.topk_encode(x, weight, bias, k, **options)
    exact = x.double() @ weight.double().T + bias.double()
    assert values.shape == indices.shape == (len(x), k) and values.dtype == torch.float32
    if not values.numel():
        return
    assert indices.min() >= 0 and indices.max() < len(weight)
    assert all(len(set(row)) == k for row in indices.tolist()), "an index was chosen twice"
    close(values, exact.gather(1, indices), torch.float32)
    close(
        exact.gather(1, indices).sort(1).values.float(),
        exact.topk(k, 1).values.sort(1).values,
        torch.float32,
    )


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [None, 1, 2, 3])
@pytest.mark.parametrize(
    "shape",
    [*SHAPES.values(), (18, 7, 100, 20), (3, 64, 64, 16)],
    ids=[*SHAPES, "many_tiles", "all_of_many"],
)
def test_topk_encode_is_exact_for_any_number_kept(shape, kept, dtype):
    _, _, x, weight = inputs(shape, dtype)
    check_topk(x, weight, torch.randn(shape[2], device=DEVICE), shape[1], tile=TINY, kept=kept)


@inside
def test_topk_encode_is_exact_with_the_tile_that_is_used():
    _, _, x, weight = inputs((5, 4, 300, 70), torch.bfloat16)
    check_topk(x, weight, torch.randn(300, device=DEVICE), 4)


@pytest.fixture
def repaired(monkeypatch):
    """The number of (token, bucket) pairs of each repair."""
    pairs, bucket_scores = [], triton_ops._bucket_scores

    def count(x, weight, bias, token, bucket, tile):
        pairs.append(len(token))
        return bucket_scores(x, weight, bias, token, bucket, tile)

    monkeypatch.setattr(triton_ops, "_bucket_scores", count)
    return pairs


@inside
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_winners_that_all_lie_in_one_bucket_are_found(repaired, kept):
    _, _, x, weight = inputs((20, 8, 200, 12))
    bias = torch.zeros(200, device=DEVICE)
    in_a_bucket = triton_ops.latents_at(
        torch.tensor(9), torch.arange(8), TINY
    )  # all eight places of the second bucket of the third tile
    bias[in_a_bucket] = 100
    check_topk(x, weight, bias, 8, tile=TINY, kept=kept)
    assert len(repaired) == 1 and repaired[0] >= 20
    assert (
        triton_ops.topk_encode(x, weight, bias, 8, tile=TINY, kept=kept)[1].sort(1).values.cpu()
        == in_a_bucket.sort().values
    ).all()


@inside
def test_tokens_with_none_one_and_many_suspect_buckets_are_kept_apart(repaired):
    bias = torch.zeros(200)
    weight, x = torch.zeros(200, 3), torch.eye(3)[[0, 1, 2, 1, 0, 2]]
    make = torch.Generator().manual_seed(0)
    weight[:, 0] = torch.randperm(200, generator=make) * 0.01
    for column, buckets in ((1, [5]), (2, [0, 13, 22])):
        weight[:, column] = torch.randperm(200, generator=make) * 0.001
        for bucket in buckets:
            weight[triton_ops.latents_at(torch.tensor(bucket), torch.arange(4), TINY), column] += 10
    check_topk(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), 12, tile=TINY, kept=3)
    assert repaired


@inside
def test_the_certificate_does_not_fire_where_winners_are_apart(repaired):
    bias = torch.zeros(256, device=DEVICE)
    bias[triton_ops.latents_at(torch.arange(4), torch.zeros(4, dtype=torch.long), TINY)] = 100
    _, _, x, weight = inputs((5, 4, 256, 8))
    check_topk(x, weight, bias, 4, tile=TINY, kept=2)
    assert repaired == []


@inside
def test_ties_choose_each_latent_once():
    x, weight = torch.ones(17, 4, device=DEVICE), torch.zeros(100, 4, device=DEVICE)
    for k in (1, 8, 40, 100):
        check_topk(x, weight, torch.zeros(100, device=DEVICE), k, tile=TINY, kept=2)


@inside
@pytest.mark.parametrize("k", [1, 5, 30])
def test_a_latent_at_minus_infinity_still_beats_padding_and_nan_is_chosen(k):
    _, _, x, weight = inputs((3, k, 35, 4))
    bias = torch.full((35,), -torch.inf, device=DEVICE)
    values, indices = triton_ops.topk_encode(x, weight, bias, k, tile=TINY, kept=2)
    assert indices.max() < 35 and all(len(set(row)) == k for row in indices.tolist())
    bias[7] = torch.nan
    values, indices = triton_ops.topk_encode(x, weight, bias, k, tile=TINY, kept=2)
    assert (indices == 7).any(1).all() and not values[indices == 7].isfinite().any()


@inside
def test_more_winners_than_latents_are_refused():
    _, _, x, weight = inputs((2, 1, 5, 4))
    with pytest.raises(ValueError, match="k is 6, but there are 5 latents"):
        triton_ops.topk_encode(x, weight, torch.zeros(5, device=DEVICE), 6)


@inside
@pytest.mark.parametrize(
    "k, n, kept",
    [
        (32, 131_072, 2),
        (64, 131_072, 3),
        (32, 32_768, 3),
        (256, 131_072, 4),
        (32, 1_000_000, 2),
        (1, 1024, 2),
    ],
)
def test_so_many_of_a_bucket_are_kept(k, n, kept):
    assert triton_ops._kept(k, n // 64) == kept


# ---- the sparse operations


# ---- candidates by a product in low precision


def in_full(low):
    """The rows that a low-precision copy stands for, in float64."""
    return low.rows.double() * (1 if low.scale is None else low.scale.double()[:, None])


@inside
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("kept", [None, 1, 2, 3])
@pytest.mark.parametrize(
    "b, d, n, c", [(18, 20, 100, 7), (5, 37, 300, 12), (3, 64, 64, 8), (1, 16, 32, 1)]
)
def test_candidates_have_their_scores_and_a_bound_on_all_others(b, d, n, c, kept, kind):
    _, _, x, weight = inputs((b, 1, n, d))
    bias, low = torch.randn(n, device=DEVICE), triton_candidates.quantize(weight, kind)
    found = triton_candidates.candidates(
        x, low, bias, c, tile=TINY._replace(depth=32), kept=kept
    )  # the least that tensor cores take of bytes
    scores = in_full(triton_candidates.quantize(x, kind)) @ in_full(low).T + bias.double()
    assert all(len(set(row)) == c for row in found.latents.tolist()), "a latent is named twice"
    torch.testing.assert_close(
        found.scores.double(), scores.gather(1, found.latents), rtol=2**-19, atol=2e-6
    )
    others = scores.scatter(1, found.latents, -torch.inf).amax(1)
    assert (found.dropped.double() >= others - 2e-6).all()
    if (
        kept == 3 and c == 7
    ):  # hardly a bucket holds more of the best: what is bound is what is there
        clear = found.scores.amin(1) > found.dropped
        assert clear.any()
        assert (
            found.latents[clear].sort(1).values == scores[clear].topk(c, 1).indices.sort(1).values
        ).all()


@inside
def test_int8_rows_are_within_half_a_unit_and_zeros_stay_zeros():
    _, _, x, _ = inputs((6, 1, 8, 37))
    x[2] = 0
    low = triton_candidates.quantize(x, "int8")
    assert (low.rows[2] == 0).all() and low.rows.int().abs().amax(1).tolist() == [
        127,
        127,
        0,
        127,
        127,
        127,
    ]
    assert ((in_full(low) - x.double()).abs() <= 0.5001 * low.scale.double()[:, None]).all()


@inside
@pytest.mark.parametrize("size, c, kept", [(24, 5, 3), (64, 64, 2), (96, 1, 3), (200, 17, 4)])
def test_the_largest_keys_are_those_that_sorting_finds(size, c, kept):
    keys = torch.randint(
        -(2**31),
        2**31 - 1,
        (9, size),
        dtype=torch.int32,
        generator=torch.Generator().manual_seed(size),
    ).to(DEVICE)
    keys[1], keys[2, ::2], keys[3] = (
        7,
        11,
        torch.arange(size, device=DEVICE),
    )  # equal ones; the bits of numbers near 0
    fast, slow = (
        triton_candidates.largest(keys, c, kept, TINY),
        triton_candidates.largest_by_sorting(keys, c, kept, TINY),
    )
    torch.testing.assert_close(
        fast.scores.sort(1).values, slow.scores.sort(1).values, rtol=0, atol=0, equal_nan=True
    )
    distinct = [row for row in range(9) if len(set(keys[row].tolist())) == size]
    assert len(distinct) >= 7 and torch.equal(
        fast.latents[distinct].sort(1).values, slow.latents[distinct].sort(1).values
    )
    torch.testing.assert_close(
        fast.dropped[distinct], slow.dropped[distinct], rtol=0, atol=0, equal_nan=True
    )


@inside
def test_without_enough_buckets_there_are_no_candidates_and_an_unknown_precision_is_named():
    _, _, x, weight = inputs((3, 1, 31, 8))
    assert (
        triton_candidates.candidates(
            x,
            triton_candidates.quantize(weight, "int8"),
            torch.zeros(31, device=DEVICE),
            2,
            tile=TINY,
        )
        is None
    )
    with pytest.raises(
        ValueError, match="low precision 'int4' is unknown; there are bfloat16 and int8"
    ):
        triton_candidates.quantize(x, "int4")


@inside
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "repeated"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_kernels_agree_with_the_definition(shape, repeated, dtype):
    values, indices, x, weight = inputs(shape, dtype, repeated=repeated)
    v, x64, w = values.double(), x.double(), weight.double()
    close(
        triton_ops.gather_sum(values, indices, weight), reference.gather_sum(v, indices, w), dtype
    )
    close(triton_ops.gather_dot(x, indices, weight), reference.gather_dot(x64, indices, w), dtype)
    close(
        triton_ops.scatter_outer(values, indices, x, len(weight)),
        reference.scatter_outer(v, indices, x64, len(weight)),
        dtype,
    )
    close(
        triton_ops.gather_dot(x, indices, weight, dtype=torch.float32),
        reference.gather_dot(x64, indices, w),
        torch.float32,
    )
    close(
        triton_ops.gather_sum(values.float(), indices.int(), weight),
        reference.gather_sum(v, indices, w),
        torch.promote_types(dtype, torch.float32),
    )


@inside
@pytest.mark.parametrize("margin", [0.5, 6.0, float("inf")])
@pytest.mark.parametrize(
    "b, c, k, n, d",
    [
        (7, 12, 5, 60, 37),
        (3, 40, 1, 50, 8),
        (4, 20, 20, 30, 300),
        (2, 70, 33, 90, 16),
        (0, 8, 3, 20, 4),
        (3, 300, 9, 400, 5),
    ],
)
def test_the_best_candidates_are_chosen_by_exact_value(b, c, k, n, d, margin):
    _, latents, x, weight = inputs((b, c, n, d))
    bias = torch.randn(n, device=DEVICE)
    exact = torch.gather(x @ weight.T + bias, 1, latents)
    scores = exact + 0.01 * torch.randn(exact.shape, device=DEVICE)
    values, indices, spread = triton_ops.choose(x, latents, scores, weight, bias, k, margin=margin)
    best = scores.argsort(1, descending=True)[:, :k]
    close(
        spread,
        (exact - scores)
        .gather(
            1, best if c <= triton_ops.MOST_CANDIDATES else best.new_tensor(range(c)).expand(b, c)
        )
        .double()
        .square()
        .mean(1)
        .sqrt(),
        torch.float32,
    )
    close(values, torch.gather(x @ weight.T + bias, 1, indices).double(), torch.float32)
    assert (values.diff(dim=1) <= 0).all() and all(len(set(row)) == k for row in indices.tolist())
    if margin >= 6:  # errors are within three spreads
        close(values, exact.topk(k, 1).values.double(), torch.float32)


@inside
def test_candidates_of_equal_score_nan_and_none_at_all():
    x, weight, bias, latents = (
        torch.ones(4, 8, device=DEVICE),
        torch.zeros(30, 8, device=DEVICE),
        torch.zeros(30, device=DEVICE),
        torch.arange(20).expand(4, 20),
    )
    x[1, 3] = torch.nan
    scores = torch.zeros(4, 20, device=DEVICE)
    scores[2, 5:] = -torch.inf  # a screen that found fewer
    values, indices, _ = triton_ops.choose(
        x, latents.to(DEVICE), scores, weight, bias, 7, margin=6.0
    )
    assert (
        torch.isnan(values[1]).all()
        and (values[[0, 3]] == 0).all()
        and all(len(set(indices[i].tolist())) == 7 for i in (0, 1, 3))
    )
    assert ((indices >= 0) & (indices < 20)).all()


@inside
@pytest.mark.parametrize("shape", [shape for name, shape in SHAPES.items()], ids=list(SHAPES))
def test_decoding_is_error_square_and_slopes(shape):
    values, indices, x, weight = inputs(shape)
    bias, error = torch.randn(shape[3], device=DEVICE), torch.full_like(x, torch.nan)
    squares, slopes = triton_ops.decode(values, indices, weight, bias, x, error)
    exact = (
        reference.gather_sum(values.double(), indices, weight.double()) + bias.double() - x.double()
    )
    close(error, exact, torch.float32)
    close(squares, exact.square().sum(1), torch.float32)
    close(
        slopes, reference.gather_dot(exact, indices, weight.double()) * (values > 0), torch.float32
    )


@inside
@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "repeated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_rows_come_with_their_squares_and_the_sums_of_weights(shape, dtype, repeated):
    values, indices, x, weight = inputs(shape, repeated=repeated)
    x = x.to(dtype)
    weights, n = torch.randn(values.shape, device=DEVICE), len(weight)
    rows, squares, sums = triton_ops.scatter_measured(
        triton_ops.sort_by_latent(indices, n, chunk=5), values, x, weights
    )
    exact = reference.scatter_outer(values.double(), indices, x.double(), n)
    assert rows.dtype == torch.float32
    close(rows, exact, torch.float32)
    close(squares, exact.square().sum(1), torch.float32)
    close(
        sums,
        reference.scatter_outer(
            weights.double(), indices, torch.ones(len(x), 1, device=DEVICE, dtype=torch.float64), n
        ).squeeze(1),
        torch.float32,
    )


@inside
@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 19, 20])
def test_hot_latents_are_added_up_in_parts(chunk):
    values, indices, x, weight = inputs((20, 4, 9, 5), repeated=True)
    indices[:, 0], indices[3, 1] = 5, 8  # latent 5 on every token, and once more on some
    exact = reference.scatter_outer(values.double(), indices, x.double(), 9)
    lists, ones = triton_ops.sort_by_latent(indices, 9, chunk=chunk), torch.ones_like(values)
    assert lists.starts.diff().max() > chunk
    rows, _, counts = triton_ops.scatter_measured(lists, values, x, ones)
    close(rows, exact, torch.float32)
    assert torch.equal(counts, lists.starts.diff().float())


@inside
def test_scatter_outer_is_bitwise_the_same_each_time():
    values, indices, x, _ = inputs((40, 6, 30, 33), repeated=True)
    first = triton_ops.scatter_transposed(
        triton_ops.sort_by_latent(indices, 30, chunk=16), values, x
    )
    torch.full((30, 33), torch.nan, device=DEVICE)  # what the next tensor may find in its memory
    assert torch.equal(
        first,
        triton_ops.scatter_transposed(triton_ops.sort_by_latent(indices, 30, chunk=16), values, x),
    )


@inside
def test_a_gradient_may_be_wanted_in_another_precision():
    values, indices, x, _ = inputs((5, 2, 6, 4), torch.bfloat16)
    out = triton_ops.scatter_transposed(
        triton_ops.sort_by_latent(indices, 6), values, x, dtype=torch.float32
    )
    close(out, reference.scatter_outer(values.double(), indices, x.double(), 6), torch.float32)


# ---- the pass over the rows


@inside
@pytest.mark.parametrize("d", [1, 5, 16, 100])
@pytest.mark.parametrize("unit", [False, True], ids=["free", "unit_norm"])
@pytest.mark.parametrize("clip", [1.0, 0.25])
def test_adam_rows_is_projection_clip_adam_norm_and_average(d, unit, clip):
    make = torch.Generator().manual_seed(d)
    weight = torch.nn.functional.normalize(torch.randn(6, d, generator=make), dim=1).to(DEVICE)
    exact = torch.nn.Parameter(weight.double())
    adam, average = (
        torch.optim.Adam([exact], lr=0.01, betas=(0.9, 0.999), eps=1e-6),
        torch.zeros(6, d, dtype=torch.float64, device=DEVICE),
    )
    first, second, mean, low = (torch.zeros(6, d, device=DEVICE) for _ in range(4))
    low = low.bfloat16()
    for step in range(1, 4):
        grad = torch.randn(6, d, generator=make).to(DEVICE)
        slope = grad.double()
        slope = (
            slope - (slope * exact.detach()).sum(1, keepdim=True) * exact.detach()
            if unit
            else slope
        )
        torch.testing.assert_close(
            triton_ops.row_squares(grad, weight, project=unit).double(),
            slope.square().sum(1),
            rtol=1e-4,
            atol=1e-5,
        )
        exact.grad = slope * clip
        adam.step()
        if unit:
            exact.data /= exact.data.norm(dim=1, keepdim=True)
        average.lerp_(exact.data, 1 - 0.99)
        triton_ops.adam_rows_(
            weight,
            grad,
            first,
            second,
            step=step,
            rate=0.01,
            beta1=0.9,
            beta2=0.999,
            eps=1e-6,
            clip=torch.tensor(clip, device=DEVICE) if step > 1 else clip,
            project=unit,
            unit_norm=unit,
            copies=triton_ops.RowCopies(mean, 0.99, bf16_copy=low),
        )
    # at d = 1 the projected gradient is rounding, which Adam makes large: there only the norm says something
    if not (unit and d == 1):
        for out, right in (
            (weight, exact.data),
            (first, adam.state[exact]["exp_avg"]),
            (second, adam.state[exact]["exp_avg_sq"]),
            (mean, average),
        ):
            torch.testing.assert_close(out.double(), right, rtol=1e-4, atol=2e-6)
    if COMPILED:
        assert torch.equal(low, weight.bfloat16())
    else:  # the interpreter cuts off where the compiler rounds
        close(low, weight, torch.bfloat16)
    if unit:
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(6, device=DEVICE))


@inside
def test_adam_rows_keeps_a_row_of_zeros_and_takes_moments_in_bfloat16():
    weight, grad = torch.zeros(2, 5, device=DEVICE), torch.zeros(2, 5, device=DEVICE)
    weight[1], grad[1] = torch.ones(5), torch.arange(5.0)
    first, second = torch.zeros_like(weight).bfloat16(), torch.zeros_like(weight).bfloat16()
    triton_ops.adam_rows_(
        weight,
        grad,
        first,
        second,
        step=1,
        rate=0.1,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        project=True,
        unit_norm=True,
    )
    assert torch.equal(weight[0], torch.zeros(5, device=DEVICE)) and weight[
        1
    ].norm().item() == pytest.approx(1)
    assert first.dtype == torch.bfloat16 and first[1].any()


@inside
def test_adam_rows_leaves_the_row_in_bytes_as_lower_makes_them():
    weight, grad = torch.randn(9, 37, device=DEVICE), torch.randn(9, 37, device=DEVICE)
    weight[4], grad[4] = 0, 0
    low = triton_candidates.Quantized(
        torch.zeros(9, 37, dtype=torch.int8, device=DEVICE), torch.zeros(9, device=DEVICE)
    )
    triton_ops.adam_rows_(
        weight,
        grad,
        torch.zeros_like(weight),
        torch.zeros_like(weight),
        step=1,
        rate=0.1,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        copies=triton_ops.RowCopies(int8_copy=low.rows, scale=low.scale),
    )
    assert all(map(torch.equal, low, triton_candidates.quantize(weight, "int8")))


@inside
def test_adam_rows_changes_nothing_where_the_clip_is_nan():
    tensors = {
        name: torch.randn(9, 37, device=DEVICE)
        for name in ("weight", "grad", "first", "second", "average")
    }
    tensors["second"].abs_()
    tensors |= {
        "bf16_copy": tensors["weight"].bfloat16(),
        **triton_candidates.quantize(tensors["weight"], "int8")._asdict(),
    }
    tensors["int8_copy"] = tensors.pop("rows")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    rows = [tensors[name] for name in ("weight", "grad", "first", "second")]
    copies = {name: tensors[name] for name in ("average", "bf16_copy", "int8_copy", "scale")}
    triton_ops.adam_rows_(
        *rows,
        step=1,
        rate=0.1,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        clip=torch.tensor(math.nan, device=DEVICE),
        project=True,
        unit_norm=True,
        copies=triton_ops.RowCopies(**copies, decay=0.5),
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


@inside
def test_adam_rows_names_a_tensor_that_does_not_fit():
    weight = torch.zeros(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"second is \[4, 3\].*expected a contiguous \[3, 4\]"):
        triton_ops.adam_rows_(
            weight,
            weight.clone(),
            weight.clone(),
            weight.t(),
            step=1,
            rate=1.0,
            beta1=0.9,
            beta2=0.9,
            eps=1.0,
        )
