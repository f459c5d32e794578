"""Test the Triton kernels on a GPU, compare them with the definition in float64, and time them beside the encoder product.

    python bench/gpu.py [--quick] [--only 768|4096]        (gpu.sh sets up what is missing; under ten minutes on an H200)

Times are medians of CUDA events, the variants in turn within each round; ratios are to the bfloat16 encoder product alone. Writes
${OUT:-.}/gpu.json after each part, so that a part that fails leaves what came before. Exit code 2 without a CUDA device, 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
from ksparse.config import from_dict  # noqa: E402
from ksparse.kernels import hopper, reference, triton_candidates, triton_ops  # noqa: E402
from ksparse.sae.model import SAE, Shape  # noqa: E402
from ksparse.training.checkpoint import TrainState  # noqa: E402
from ksparse.training.steps.select import build_step  # noqa: E402
from ksparse.training.trainer import DeadLatents, train_step  # noqa: E402

OUT = Path(os.environ.get("OUT", ".")) / "gpu.json"
SIZES = {
    768: {"d": 768, "n": 131_072, "k": 32, "b": 32_768},
    4096: {"d": 4096, "n": 131_072, "k": 64, "b": 32_768},
}
TRAINING = {
    "train, torch": {"run": {"kernels": "torch"}},
    "train, triton": {"run": {"kernels": "triton"}},
    "train, screened by bfloat16": {"optim": {"approx_topk": "bfloat16"}},
    "train, screened by int8": {"optim": {"approx_topk": "int8"}},
    "train, int8, read in bfloat16": {"optim": {"approx_topk": "int8", "precision": "bfloat16"}},
}
"""Steps of `ksparse train`, the last as fast as it gets."""
REPEAT = 4  # steps that are timed together
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 6e-10}
Call = Callable[[], Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="an eighth of the tokens, few rounds")
    parser.add_argument("--only", type=int, choices=SIZES, help="one of the sizes")
    parser.add_argument("--no-tests", action="store_true", help="times alone")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: run this on a machine with a GPU", file=sys.stderr)
        return 2
    if not triton_ops.available():
        print("no Triton: pip install triton", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {"machine": machine()}
    parts = {} if args.no_tests else {"tests": tests, "errors": errors}
    for d in [args.only] if args.only else SIZES:
        size = SIZES[d] | ({"b": SIZES[d]["b"] // 8} if args.quick else {})
        parts[f"exact_{d}"] = lambda size=size: exactness(**size)
        parts[f"times_{d}"] = lambda size=size: times(**size, rounds=3 if args.quick else 7)
    for name, part in parts.items():
        began = time.perf_counter()
        try:
            report[name] = part()
        except Exception:  # the rest may still be worth having
            report[name] = {"failed": traceback.format_exc()}
        report[name]["seconds"] = round(time.perf_counter() - began, 1)
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        release()
    show(report)
    return int(any("failed" in report[name] for name in parts))


def machine() -> dict[str, Any]:
    import triton

    card = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    return {
        "gpu": card.name,
        "GiB": round(card.total_memory / 2**30),
        "processors": card.multi_processor_count,
        "driver": driver.stdout.strip(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def tests() -> dict[str, Any]:
    """Run the kernels' tests compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), environment.get("PYTHONPATH")]))
    processes = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        *processes,
        "--noconftest",
        "-o",
        "addopts=",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "tests/kernels/test_triton_ops.py",
        "tests/kernels/test_hopper.py",
        "tests/training/test_async_copy.py",
        "tests/training/test_triton_step.py",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    out = {
        "last": (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:],
        "exit": done.returncode,
    }
    return (
        out if done.returncode == 0 else out | {"failed": done.stdout[-8000:] + done.stderr[-2000:]}
    )


# ---- against the definition


def errors() -> dict[str, Any]:
    """Return the relative error of each kernel, over all its numbers, against the definition in float64."""
    b, d, n, k, out = 512, 768, 8192, 32, {}
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x, weight = (torch.randn(rows, d, device="cuda").to(dtype) for rows in (b, n))
        values, indices = (
            torch.randn(b, k, device="cuda").to(dtype),
            torch.rand(b, n, device="cuda").topk(k).indices,
        )
        indices[:, 0] = 5  # a hot latent
        v, x64, w = values.double(), x.double(), weight.double()
        pairs = {
            "gather_sum": (
                lambda: triton_ops.gather_sum(values, indices, weight),
                reference.gather_sum(v, indices, w),
            ),
            "gather_dot": (
                lambda: triton_ops.gather_dot(x, indices, weight),
                reference.gather_dot(x64, indices, w),
            ),
            "scatter_outer": (
                lambda: triton_ops.scatter_outer(values, indices, x, n),
                reference.scatter_outer(v, indices, x64, n),
            ),
            "scatter_outer_in_parts": (
                lambda: triton_ops.scatter_transposed(
                    triton_ops.sort_by_latent(indices, n, chunk=64), values, x
                ),
                reference.scatter_outer(v, indices, x64, n),
            ),
        }
        for name, (call, exact) in pairs.items():
            poison(exact.numel())
            out[f"{name} {str(dtype)[6:]}"] = (
                ((call().double() - exact).norm() / exact.norm()).item(),
                limit,
            )
    out["adam_rows_"] = adam_error(n, d), 1e-5
    wrong = [name for name, (error, limit) in out.items() if not error <= limit]
    return {name: error for name, (error, _) in out.items()} | (
        {"failed": f"too far off: {wrong}"} if wrong else {}
    )


def poison(size: int) -> None:
    """Leave memory full of NaN where the next tensor will lie."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.full((size,), torch.nan, device="cuda", dtype=dtype)


def adam_error(n: int, d: int) -> float:
    """Return the relative error of two steps' change of the weight."""
    weight = torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=1)
    start, first, second = weight.double(), torch.zeros_like(weight), torch.zeros_like(weight)
    exact = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([exact], lr=1e-2, betas=(0.9, 0.999), eps=1e-6)
    for step in (1, 2):
        grad = torch.randn_like(weight)
        exact.grad = grad.double() - (grad * exact.detach()).sum(1, keepdim=True) * exact.detach()
        adam.step()
        exact.data /= exact.data.norm(dim=1, keepdim=True)
        triton_ops.adam_rows_(
            weight,
            grad,
            first,
            second,
            step=step,
            rate=1e-2,
            beta1=0.9,
            beta2=0.999,
            eps=1e-6,
            project=True,
            unit_norm=True,
        )
    return ((weight.double() - exact.detach()).norm() / (exact.detach() - start).norm()).item()


def exactness(b: int, d: int, n: int, k: int) -> dict[str, Any]:
    """Compare the choice at full width with that of a float64 product; all winners in few buckets too."""
    b, out = 256, {}
    for name in ("random", "winners_in_one_bucket"):
        x, weight, bias = (torch.randn(*shape, device="cuda") for shape in ((b, d), (n, d), (n,)))
        x, weight = x.bfloat16(), weight.bfloat16()
        if name != "random":
            bias[
                triton_ops.latents_at(
                    torch.tensor(1234), torch.arange(triton_ops.TILE.latents // 4), triton_ops.TILE
                ).cuda()
            ] += 1000 * d**0.5
        pairs, bucket_scores = [], triton_ops._bucket_scores
        triton_ops._bucket_scores = lambda *args: (
            pairs.append(len(args[3])),
            bucket_scores(*args),
        )[1]
        poison(b * k)
        values, indices = triton_ops.topk_encode(x, weight, bias, k)
        triton_ops._bucket_scores = bucket_scores
        pre = torch.cat([x.double() @ part.double().t() for part in weight.split(16_384)], 1).add_(
            bias.double()
        )
        best, mine = (
            pre.topk(k, dim=1).values,
            pre.gather(1, indices).sort(1, descending=True).values,
        )
        same = (
            torch.zeros(b, n, dtype=torch.bool, device="cuda")
            .scatter_(1, indices, True)
            .gather(1, pre.topk(k, dim=1).indices)
        )
        out[name] = {
            "latents_as_float64": same.double().mean().item(),
            "tokens_as_float64": same.all(1).double().mean().item(),
            "worst_loss": ((best - mine).max() / best.abs().max()).item(),
            "distinct": bool((indices.sort(1).values.diff(dim=1) > 0).all()),
            "value_error": ((values.double() - pre.gather(1, indices)).norm() / best.norm()).item(),
            "repaired_buckets_a_token": sum(pairs) / b,
        }
    out["screened"] = screened(b, d, n, k)
    wrong = [
        name
        for name, each in out.items()
        if not (each["worst_loss"] < 1e-4 and each["value_error"] < 1e-4) or not each["distinct"]
    ]
    return out | ({"failed": f"not exact: {wrong}"} if wrong else {})


def screened(b: int, d: int, n: int, k: int) -> dict[str, Any]:
    """Compare what training chooses by int8 with a float64 product of the same float32 numbers."""
    recipe = from_dict(
        {
            "acts": {"normalize": "none"},
            "run": {"kernels": "triton"},
            "optim": {"approx_topk": "int8"},
            "sae": {"n_latents": n, "k": k},
        }
    )
    sae = SAE(Shape(d, n, k, "none")).cuda()
    sae.W_enc.data = torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=1)
    optimizer, x = build_step(sae, recipe), torch.randn(b, d, device="cuda")
    values, indices = optimizer.choose(x)
    pre = torch.cat([x.double() @ part.double().t() for part in sae.W_enc.data.split(16_384)], 1)
    best, mine = pre.topk(k, dim=1), pre.gather(1, indices.long()).sort(1, descending=True).values
    same = (
        torch.zeros(b, n, dtype=torch.bool, device="cuda")
        .scatter_(1, indices.long(), True)
        .gather(1, best.indices)
    )
    return {
        "latents_as_float64": same.double().mean().item(),
        "tokens_as_float64": same.all(1).double().mean().item(),
        "worst_loss": ((best.values - mine).max() / best.values.abs().max()).item(),
        "distinct": bool((indices.sort(1).values.diff(dim=1) > 0).all()),
        "value_error": (
            (values.double() - pre.gather(1, indices.long())).norm() / best.values.norm()
        ).item(),
        "redone": optimizer.redone / b,
    }


# ---- times


def times(b: int, d: int, n: int, k: int, rounds: int) -> dict[str, Any]:
    """Return median milliseconds of each variant, those of the parts first and of the whole steps after."""
    torch.manual_seed(0)
    product, x = (
        torch.empty(b, n, dtype=torch.bfloat16, device="cuda"),
        torch.randn(b, d, device="cuda"),
    )
    milliseconds = measured(pieces(x, n, k, product), rounds)
    del product, x
    release()
    peak, redone = {}, {}
    for name, options in TRAINING.items():
        try:
            step = Training(b, d, n, k, options)
            milliseconds |= measured(
                {name: step}, max(2, rounds // 2), REPEAT if "optim" in options else 1
            )
            peak[name] = torch.cuda.max_memory_allocated() / 2**30
            redone[name] = step.redone()
        except torch.cuda.OutOfMemoryError:
            milliseconds[name] = None
        if name == list(TRAINING)[-1] and step:
            profile(step, f"profile-{d}.txt")
        step = None
        release()
    try:
        dense = Dense(b, d, n, k)
        milliseconds |= measured({"dense step": dense}, max(2, rounds // 2), REPEAT)
        peak["dense step"] = torch.cuda.max_memory_allocated() / 2**30
    except torch.cuda.OutOfMemoryError:
        milliseconds["dense step"] = None
    base = milliseconds["product"]
    return {
        "b": b,
        "d": d,
        "n": n,
        "k": k,
        "ms": milliseconds,
        "ratio": {name: ms and ms / base for name, ms in milliseconds.items()},
        "product_tflops": 2 * b * d * n / base / 1e9,
        "peak_GiB": peak,
        "share_redone": redone,
    }


def pieces(x: Tensor, n: int, k: int, product: Tensor) -> dict[str, Call]:
    """Return the pieces of a step on x[b, d], beside what they replace."""
    d, c, unit, bias = (
        x.shape[1],
        k + max(16, k // 2),
        torch.nn.functional.normalize,
        torch.zeros(n, device="cuda"),
    )
    weight = unit(torch.randn(n, d, device="cuda"), dim=1)
    low, x_low, x_half, half = (
        triton_candidates.quantize(weight, "int8"),
        triton_candidates.quantize(x, "int8"),
        x.bfloat16(),
        weight.bfloat16(),
    )
    found = triton_candidates.candidates(x, low, bias, c)
    values, indices, _ = triton_ops.choose(x, found.latents, found.scores, weight, bias, k)
    error, lists = torch.empty_like(x), triton_ops.sort_by_latent(indices, n)
    grad, zeros = (
        torch.randn(n, d, device="cuda"),
        [torch.zeros(n, d, device="cuda") for _ in range(3)],
    )

    def by_topk() -> Tensor:
        torch.mm(x_half, half.t(), out=product)
        return product.topk(k, dim=1, sorted=False).values

    def adam(unit_norm: bool = False, **copies: Any) -> None:
        triton_ops.adam_rows_(
            weight,
            grad,
            zeros[0],
            zeros[1],
            step=1,
            rate=1e-6,
            **ADAM,
            copies=triton_ops.RowCopies(zeros[2], 0.999, **copies),
            project=unit_norm,
            unit_norm=unit_norm,
        )

    calls: dict[str, Call] = {
        "product": lambda: torch.mm(x_half, half.t(), out=product),
        "product + torch.topk": by_topk,
    }
    if hopper.usable(x.device) and (plan := hopper.plan(d, c)):
        calls["candidates, hopper"] = lambda: hopper.candidates(
            x_low.rows, x_low.scale, low.rows, low.scale, bias, c, plan
        )
    return calls | {
        "candidates, triton": lambda: triton_candidates.candidates(
            x, low, bias, c, k=k + k // 8, tile=triton_candidates.BYTES_TILE
        ),
        "topk_encode (bfloat16)": lambda: triton_ops.topk_encode(x_half, half, bias, k),
        "choose": lambda: triton_ops.choose(x, found.latents, found.scores, weight, bias, k),
        "decode": lambda: triton_ops.decode(values, indices, weight, x[0], x, error),
        "transposed": lambda: triton_ops.sort_by_latent(indices, n),
        "scatter_measured": lambda: triton_ops.scatter_measured(lists, values, x, values),
        "lower(x)": lambda: triton_candidates.quantize(x, "int8"),
        "adam_rows_ (decoder)": lambda: adam(unit_norm=True),
        "adam_rows_ (encoder)": lambda: adam(int8_copy=low.rows, scale=low.scale),
    }


def profile(call: Call, name: str) -> None:
    """Write where the time of a step goes."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as seen:
        call()
        torch.cuda.synchronize()
    (OUT.parent / name).write_text(
        seen.key_averages().table(
            sort_by="cuda_time_total", row_limit=45, max_name_column_width=60
        ),
        encoding="utf-8",
    )


def measured(calls: dict[str, Call], rounds: int, repeat: int = 1) -> dict[str, float]:
    """Return the median milliseconds of each call, `repeat` of them at a time, taken in turn after some for warming up."""
    for call in calls.values():
        for _ in range(1 + repeat):
            call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(repeat):
                call()
            end.record()
            end.synchronize()
            taken[name].append(begin.elapsed_time(end) / repeat)
    return {name: sorted(each)[len(each) // 2] for name, each in taken.items()}


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


class Training:
    """A step as `ksparse train` takes it on a GPU: float32 weights, moments and sums, whatever the options are.

    Each step has a batch of its own, drawn in the time. Noise that comes again is learned by heart within tens of steps, and then hundreds of latents
    are about as large for each token, which activations of a model do not show.
    """

    def __init__(self, b: int, d: int, n: int, k: int, options: dict[str, dict[str, str]]):
        self.recipe = from_dict(
            {
                "acts": {"normalize": "none"},
                "batch": b,
                "tokens": 10**6 * b,
                "sae": {"n_latents": n, "k": k},
            }
            | options
        )
        sae = SAE(Shape(d, n, k, "none")).cuda()
        sae.W_dec.data = torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=1)
        sae.W_enc.data = sae.W_dec.data.clone()
        self.optimizer, self.shape = build_step(sae, self.recipe), (b, d)
        self.state = TrainState(since=torch.zeros(n, dtype=torch.long, device="cuda"), baseline=1.0)
        self.dead = DeadLatents(self.recipe.dead_after)
        if getattr(self.optimizer, "kind", 0):
            self._settle()

    def _settle(self) -> None:
        """Take steps until the screen keeps no more candidates: each new number is compiled for."""
        kept: list[int] = []
        while len(kept) < 80 and (len(kept) < 8 or kept[-1] != kept[-8]):
            self()
            kept.append(self.optimizer.candidates)

    def __call__(self) -> None:
        self.state.step += 1
        if not math.isfinite(
            train_step(
                self.optimizer,
                torch.randn(self.shape, device="cuda"),
                self.state,
                self.recipe,
                self.dead,
            )[1]
        ):
            raise ArithmeticError("the loss or its gradient is not finite")

    def redone(self) -> dict[str, float] | None:
        """Return the candidates of a token in the end, and the share of tokens that were computed in full."""
        optimizer = self.optimizer
        if not getattr(optimizer, "screened", 0):
            return None
        return {"candidates": optimizer.candidates, "tokens": optimizer.redone / optimizer.screened}


class Dense:
    """The same step as people write it: dense autograd under bfloat16 autocast, fused Adam."""

    def __init__(self, b: int, d: int, n: int, k: int):
        W_dec = torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=1)
        self.weights = [
            torch.nn.Parameter(each)
            for each in (
                W_dec.clone(),
                W_dec,
                torch.zeros(n, device="cuda"),
                torch.zeros(d, device="cuda"),
            )
        ]
        self.average = [torch.zeros_like(each) for each in self.weights]
        self.adam, self.k, self.shape = (
            torch.optim.Adam(self.weights, lr=1e-4, fused=True),
            k,
            (b, d),
        )

    def __call__(self) -> Tensor:
        (W_enc, W_dec, b_enc, b_pre), x = (
            self.weights,
            torch.randn(self.shape, device="cuda").bfloat16(),
        )
        with torch.autocast("cuda", torch.bfloat16):
            pre = torch.nn.functional.linear(x - b_pre, W_enc, b_enc)
            values, indices = pre.topk(self.k, dim=1, sorted=False)
            recon = (
                torch.zeros_like(pre).scatter_(1, indices, values.relu().to(pre.dtype)) @ W_dec
                + b_pre
            )
        loss = (recon.float() - x.float()).square().mean()
        loss.backward()
        with torch.no_grad():
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
            self.adam.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
            torch._foreach_lerp_(self.average, [each.detach() for each in self.weights], 0.001)
        self.adam.zero_grad()
        return loss.detach()


def show(report: dict[str, Any]) -> None:
    print(json.dumps(report["machine"]))
    for name, part in report.items():
        if "ms" in part:
            print(
                f"\nd={part['d']} n={part['n']} k={part['k']} b={part['b']}: product at {part['product_tflops']:.0f} TFLOP/s, "
                f"peak GiB {part['peak_GiB']}, redone {part['share_redone']}\n{'':32}{'ms':>10}{'x product':>12}"
            )
            for variant, ms in part["ms"].items():
                print(
                    f"{variant:32}"
                    + (
                        f"{ms:10.3f}{part['ratio'][variant]:12.3f}"
                        if ms
                        else f"{'out of memory':>22}"
                    )
                )
        elif name != "machine":
            print(
                f"\n{name}: {json.dumps({key: value for key, value in part.items() if key != 'failed'})}"
            )
        if "failed" in part:
            print(f"{name} FAILED\n{part['failed'][-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
