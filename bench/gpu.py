"""Test the Triton kernels on a GPU, compare them with the definition in float64, and time them beside the encoder product.

    python bench/gpu.py [--quick] [--only 768|4096]        (gpu.sh sets up what is missing; under ten minutes on an H200)

Times are medians of CUDA events, the variants in turn within each round; ratios are to the bfloat16 encoder product alone. Writes
${OUT:-.}/gpu.json after each part, so that a part that fails leaves what came before. Exit code 2 without a CUDA device, 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
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
from ksparse.kernels import gpu, reference, screen  # noqa: E402
from ksparse.recipe import from_dict  # noqa: E402
from ksparse.sae.model import SAE, Shape  # noqa: E402
from ksparse.training.member import open_optimizer  # noqa: E402

OUT = Path(os.environ.get("OUT", ".")) / "gpu.json"
SIZES = {768: {"d": 768, "n": 131_072, "k": 32, "b": 32_768}, 4096: {"d": 4096, "n": 131_072, "k": 64, "b": 32_768}}
TILES = [screen.BYTES_TILE, screen.BYTES_TILE._replace(stages=4), screen.BYTES_TILE._replace(depth=64, stages=4), screen.BYTES_TILE._replace(group=16),
         screen.BYTES_TILE._replace(tokens=256, latents=128), screen.BYTES_TILE._replace(tokens=64, warps=4), screen.BYTES_TILE._replace(tokens=64, warps=4, stages=2),
         screen.BYTES_TILE._replace(latents=128, warps=4), screen.BYTES_TILE._replace(warps=4)]
TRAINING = {"train, torch": {"kernels": "torch", "screen": "off"}, "train, triton": {"kernels": "triton", "screen": "off"},
            "train, triton, bfloat16": {"kernels": "triton", "screen": "bfloat16"}, "train, triton, int8": {"kernels": "triton", "screen": "int8"}}
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
    if not gpu.available():
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
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    return {"gpu": card.name, "GiB": round(card.total_memory / 2**30), "processors": card.multi_processor_count,
            "driver": driver.stdout.strip(), "cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton.__version__,
            "python": platform.python_version()}


def tests() -> dict[str, Any]:
    """Run the kernels' tests compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "--noconftest", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider", "--tb=short",
               "tests/kernels/test_gpu.py", "tests/training/test_on_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240)
    out = {"last": (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:], "exit": done.returncode}
    return out if done.returncode == 0 else out | {"failed": done.stdout[-8000:] + done.stderr[-2000:]}


# ---- against the definition


def errors() -> dict[str, Any]:
    """Return the relative error of each kernel, over all its numbers, against the definition in float64."""
    b, d, n, k, out = 512, 768, 8192, 32, {}
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x, weight = (torch.randn(rows, d, device="cuda").to(dtype) for rows in (b, n))
        values, indices = torch.randn(b, k, device="cuda").to(dtype), torch.rand(b, n, device="cuda").topk(k).indices
        indices[:, 0] = 5  # a hot latent
        v, x64, w = values.double(), x.double(), weight.double()
        pairs = {"gather_sum": (lambda: gpu.gather_sum(values, indices, weight), reference.gather_sum(v, indices, w)),
                 "gather_dot": (lambda: gpu.gather_dot(x, indices, weight), reference.gather_dot(x64, indices, w)),
                 "scatter_outer": (lambda: gpu.scatter_outer(values, indices, x, n), reference.scatter_outer(v, indices, x64, n)),
                 "scatter_outer_in_parts": (lambda: gpu.scatter_transposed(gpu.transposed(indices, n, chunk=64), values, x),
                                            reference.scatter_outer(v, indices, x64, n))}
        for name, (call, exact) in pairs.items():
            poison(exact.numel())
            out[f"{name} {str(dtype)[6:]}"] = ((call().double() - exact).norm() / exact.norm()).item(), limit
    out["adam_rows_"] = adam_error(n, d), 1e-5
    wrong = [name for name, (error, limit) in out.items() if not error <= limit]
    return {name: error for name, (error, _) in out.items()} | ({"failed": f"too far off: {wrong}"} if wrong else {})


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
        gpu.adam_rows_(weight, grad, first, second, step=step, rate=1e-2, beta1=0.9, beta2=0.999, eps=1e-6, project=True, unit_norm=True)
    return ((weight.double() - exact.detach()).norm() / (exact.detach() - start).norm()).item()


def exactness(b: int, d: int, n: int, k: int) -> dict[str, Any]:
    """Compare the choice at full width with that of a float64 product; all winners in few buckets too."""
    b, out = 256, {}
    for name in ("random", "winners_in_one_bucket"):
        x, weight, bias = (torch.randn(*shape, device="cuda") for shape in ((b, d), (n, d), (n,)))
        x, weight = x.bfloat16(), weight.bfloat16()
        if name != "random":
            bias[gpu._latents(torch.tensor(1234), torch.arange(gpu.TILE.latents // 4), gpu.TILE).cuda()] += 1000 * d**0.5
        pairs, compete = [], gpu._compete
        gpu._compete = lambda *args: (pairs.append(len(args[6])), compete(*args))
        poison(b * k)
        values, indices = gpu.topk_encode(x, weight, bias, k)
        gpu._compete = compete
        pre = torch.cat([x.double() @ part.double().t() for part in weight.split(16_384)], 1).add_(bias.double())
        best, mine = pre.topk(k, dim=1).values, pre.gather(1, indices).sort(1, descending=True).values
        same = torch.zeros(b, n, dtype=torch.bool, device="cuda").scatter_(1, indices, True).gather(1, pre.topk(k, dim=1).indices)
        out[name] = {"latents_as_float64": same.double().mean().item(), "tokens_as_float64": same.all(1).double().mean().item(),
                     "worst_loss": ((best - mine).max() / best.abs().max()).item(), "distinct": bool((indices.sort(1).values.diff(dim=1) > 0).all()),
                     "value_error": ((values.double() - pre.gather(1, indices)).norm() / best.norm()).item(), "repaired_buckets_a_token": sum(pairs) / b}
    out["screened"] = screened(b, d, n, k)
    wrong = [name for name, each in out.items() if not (each["worst_loss"] < 1e-4 and each["value_error"] < 1e-4) or not each["distinct"]]
    return out | ({"failed": f"not exact: {wrong}"} if wrong else {})


def screened(b: int, d: int, n: int, k: int) -> dict[str, Any]:
    """Compare what training chooses by int8 with a float64 product of the same float32 numbers."""
    recipe = from_dict({"acts": {"normalize": "none"}, "run": {"kernels": "triton"}, "optim": {"screen": "int8"}, "sae": {"n_latents": n, "k": k}})
    sae = SAE(Shape(d, n, k, "none")).cuda()
    sae.W_enc.data = torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=1)
    optimizer, x = open_optimizer(sae, recipe), torch.randn(b, d, device="cuda")
    values, indices = optimizer.choose(x)
    pre = torch.cat([x.double() @ part.double().t() for part in sae.W_enc.data.split(16_384)], 1)
    best, mine = pre.topk(k, dim=1), pre.gather(1, indices.long()).sort(1, descending=True).values
    same = torch.zeros(b, n, dtype=torch.bool, device="cuda").scatter_(1, indices.long(), True).gather(1, best.indices)
    return {"latents_as_float64": same.double().mean().item(), "tokens_as_float64": same.all(1).double().mean().item(),
            "worst_loss": ((best.values - mine).max() / best.values.abs().max()).item(), "distinct": bool((indices.sort(1).values.diff(dim=1) > 0).all()),
            "value_error": ((values.double() - pre.gather(1, indices.long())).norm() / best.values.norm()).item(), "redone": optimizer.redone / b}


# ---- times


def times(b: int, d: int, n: int, k: int, rounds: int) -> dict[str, Any]:
    """Return median milliseconds of each variant, those of the parts first and of the whole steps after."""
    torch.manual_seed(0)
    step = Step(b, d, n, k, "int8")
    product = torch.empty(b, n, dtype=torch.bfloat16, device="cuda")
    x, values, indices, lists, grad = step.x, step.values, step.indices, step.lists, torch.randn(n, d, device="cuda")
    keys = torch.randint(-(2**31), 2**31 - 1, (b, 3 * 4 * n // 256), dtype=torch.int32, device="cuda")

    def by_topk() -> Tensor:
        torch.mm(x, step.low_enc.t(), out=product)
        return product.topk(k, dim=1, sorted=False).values

    calls: dict[str, Call] = {
        "product": lambda: torch.mm(x, step.low_enc.t(), out=product), "product + torch.topk": by_topk,
        "topk_encode (bfloat16)": lambda: gpu.topk_encode(x, step.low_enc, step.b_enc, k),
        "choose, screened by int8": lambda: step.choose(x), "  its candidates": lambda: screen.candidates(x, step.low, step.b_enc, step.c, k=k + k // 8),
        "  their choice": lambda: screen.largest(keys, step.c, 3, screen.BYTES_TILE), "  lower(W_enc)": lambda: screen.lower(step.weight["enc"], "int8"),
        "gather_sum": lambda: gpu.gather_sum(values, indices, step.low_dec), "gather_dot": lambda: gpu.gather_dot(x, indices, step.low_dec),
        "transposed": lambda: gpu.transposed(indices, n), "scatter_outer": lambda: gpu.scatter_outer(values, indices, x, n),
        "  its rows": lambda: gpu.scatter_transposed(lists, values, x, dtype=torch.float32),
        "adam_rows_ (decoder)": lambda: step.rows("dec", grad, project=True), "adam_rows_ (encoder)": lambda: step.rows("enc", grad)}
    milliseconds = measured(calls, rounds)
    tiles, redone = sweep(step, rounds), step.redone
    calls.clear()
    del product, grad, keys
    release()
    milliseconds |= measured({"step, int8": step}, rounds)
    peak = {"step, int8": torch.cuda.max_memory_allocated() / 2**30}
    step.kind = "bfloat16"
    milliseconds |= measured({"step, bfloat16": step}, rounds)
    del step, x, values, indices, lists
    release()
    for name, options in TRAINING.items():
        try:
            call = training(b, d, n, k, **options)
            milliseconds |= measured({name: call}, max(2, rounds // 2))
            peak[name] = torch.cuda.max_memory_allocated() / 2**30
            if name == "train, triton, int8":
                profile(call, f"profile-{d}.txt")
        except torch.cuda.OutOfMemoryError:
            milliseconds[name] = None
        call = None
        release()
    try:
        dense = Dense(b, d, n, k)
        milliseconds |= measured({"dense step": dense}, max(2, rounds // 2))
        peak["dense step"] = torch.cuda.max_memory_allocated() / 2**30
    except torch.cuda.OutOfMemoryError:
        milliseconds["dense step"] = None
    base = milliseconds["product"]
    return {"b": b, "d": d, "n": n, "k": k, "ms": milliseconds, "ratio": {name: ms and ms / base for name, ms in milliseconds.items()},
            "product_tflops": 2 * b * d * n / base / 1e9, "tiles": tiles, "peak_GiB": peak, "tokens_redone": redone}


def profile(call: Call, name: str) -> None:
    """Write where the time of a step goes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    (OUT.parent / name).write_text(seen.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=60), encoding="utf-8")


def sweep(step: Step, rounds: int) -> dict[str, Any]:
    """Return milliseconds of the keys and their choice for several tiles; an error's text where one does not fit."""
    calls, out = {}, {}
    for tile in TILES:
        call = lambda tile=tile: screen.candidates(step.x, step.low, step.b_enc, step.c, k=step.k + step.k // 8, tile=tile)  # noqa: E731
        try:
            call(), torch.cuda.synchronize()
            calls[str(tile)] = call
        except Exception as error:  # out of registers or shared memory
            out[str(tile)] = repr(error)[:200]
    return out | measured(calls, max(3, rounds // 2))


def measured(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each call, taken in turn after two for warming up."""
    for call in calls.values():
        call(), call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            taken[name].append(begin.elapsed_time(end))
    return {name: sorted(each)[len(each) // 2] for name, each in taken.items()}


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def training(b: int, d: int, n: int, k: int, kernels: str, screen: str) -> Call:
    """Return a step as `ksparse train` takes it on a GPU: float32 weights, moments and values, whatever the screen is."""
    recipe = from_dict({"acts": {"normalize": "none"}, "batch": b, "tokens": 10**6 * b, "run": {"kernels": kernels}, "optim": {"screen": screen},
                        "sae": {"n_latents": n, "k": k}})
    sae = SAE(Shape(d, n, k, "none")).cuda()
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=1)
    sae.W_enc.data = sae.W_dec.data.clone()
    optimizer, x, none, taken = open_optimizer(sae, recipe), torch.randn(b, d, device="cuda"), torch.arange(0, device="cuda"), itertools.count(1)

    def call() -> None:
        optimizer.backward(x, baseline=1.0, dead=none, k_aux=k)
        optimizer.step(next(taken))

    return call


class Step:
    """A whole training step of these kernels: bfloat16 copies for reading, float32 weights and moments, averages, unit-norm decoder, no AuxK."""

    def __init__(self, b: int, d: int, n: int, k: int, kind: str):
        self.n, self.k, self.kind, self.c, self.taken, self.redone = n, k, kind, k + max(16, k // 2), 0, 0
        W_dec = torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=1)
        self.weight = {"enc": W_dec.clone(), "dec": W_dec}
        self.first, self.second, self.average = ({key: torch.zeros_like(each) for key, each in self.weight.items()} for _ in range(3))
        self.low_enc, self.low_dec = self.weight["enc"].bfloat16(), self.weight["dec"].bfloat16()
        self.b_enc, self.b_pre, self.x = torch.zeros(n, device="cuda"), torch.zeros(d, device="cuda"), torch.randn(b, d, device="cuda").bfloat16()
        self.biases = [torch.nn.Parameter(self.b_enc), torch.nn.Parameter(self.b_pre)]
        self.adam = torch.optim.Adam(self.biases, lr=1e-4, fused=True)
        self.low = screen.lower(self.weight["enc"], kind)
        self.values, self.indices = self.choose(self.x)
        self.lists = gpu.transposed(self.indices, n)

    def rows(self, key: str, grad: Tensor, *, project: bool = False) -> None:
        gpu.adam_rows_(self.weight[key], grad, self.first[key], self.second[key], step=max(1, self.taken), rate=1e-4, **ADAM, project=project,
                       unit_norm=project, average=self.average[key], decay=0.999, low=self.low_dec if key == "dec" else self.low_enc)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose as training does, but by the exact product of bfloat16 rows."""
        if self.kind == "bfloat16":
            return gpu.topk_encode(x, self.low_enc, self.b_enc, self.k)
        scores, latents, dropped = screen.candidates(x, self.low, self.b_enc, self.c, k=self.k + self.k // 8)
        exact = gpu.gather_dot(x, latents, self.low_enc, dtype=torch.float32) + self.b_enc[latents]
        values, at = exact.topk(self.k, dim=1, sorted=False)
        indices, spread = latents.gather(1, at), (exact - scores).square().mean(1).sqrt()
        again = (~(values.amin(1) > dropped + 6 * spread)).nonzero().squeeze(1)
        self.redone = len(again)
        if len(again):
            values[again], indices[again] = gpu.topk_encode(x[again], self.low_enc, self.b_enc, self.k)
        return values, indices

    def __call__(self) -> Tensor:
        self.taken += 1
        centred = (self.x - self.b_pre).bfloat16()
        values, indices = self.choose(centred)
        values.relu_()
        error = gpu.gather_sum(values, indices, self.low_dec).add_(self.b_pre).sub_(self.x)
        loss, scale = error.square().mean(), 2 / error.numel()
        total, error = error.sum(0), error.bfloat16()
        slopes = gpu.gather_dot(error, indices, self.low_dec, dtype=torch.float32).mul_(values > 0)
        lists = gpu.transposed(indices, self.n)
        self.rows("dec", gpu.scatter_transposed(lists, values * scale, error, dtype=torch.float32), project=True)
        per_latent = torch.zeros(self.n, device="cuda").index_add_(0, indices.flatten(), slopes.flatten() * scale)
        self.biases[0].grad, self.biases[1].grad = per_latent, total * scale - per_latent @ self.weight["enc"]
        self.rows("enc", gpu.scatter_transposed(lists, slopes * scale, centred, dtype=torch.float32))
        if self.kind == "int8":
            self.low = screen.lower(self.weight["enc"], "int8")
        self.adam.step()
        return loss


class Dense:
    """The same step as people write it: dense autograd under bfloat16 autocast, fused Adam."""

    def __init__(self, b: int, d: int, n: int, k: int):
        W_dec = torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=1)
        self.weights = [torch.nn.Parameter(each) for each in (W_dec.clone(), W_dec, torch.zeros(n, device="cuda"), torch.zeros(d, device="cuda"))]
        self.average = [torch.zeros_like(each) for each in self.weights]
        self.adam, self.k, self.x = torch.optim.Adam(self.weights, lr=1e-4, fused=True), k, torch.randn(b, d, device="cuda").bfloat16()

    def __call__(self) -> Tensor:
        W_enc, W_dec, b_enc, b_pre = self.weights
        with torch.autocast("cuda", torch.bfloat16):
            pre = torch.nn.functional.linear(self.x - b_pre, W_enc, b_enc)
            values, indices = pre.topk(self.k, dim=1, sorted=False)
            recon = torch.zeros_like(pre).scatter_(1, indices, values.relu().to(pre.dtype)) @ W_dec + b_pre
        loss = (recon.float() - self.x.float()).square().mean()
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
            print(f"\nd={part['d']} n={part['n']} k={part['k']} b={part['b']}: product at {part['product_tflops']:.0f} TFLOP/s, "
                  f"{part['tokens_redone']} tokens redone, peak GiB {part['peak_GiB']}\n{'':28}{'ms':>10}{'x product':>12}")
            for variant, ms in part["ms"].items():
                print(f"{variant:28}" + (f"{ms:10.3f}{part['ratio'][variant]:12.3f}" if ms else f"{'out of memory':>22}"))
            for tile, ms in part["tiles"].items():
                print(f"    {tile}: {ms if isinstance(ms, str) else round(ms, 3)}")
        elif name != "machine":
            print(f"\n{name}: {json.dumps({key: value for key, value in part.items() if key != 'failed'})}")
        if "failed" in part:
            print(f"{name} FAILED\n{part['failed'][-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
