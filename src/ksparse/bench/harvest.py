"""Measure how fast an LM's activations are read on this machine.

A round takes the same contexts twice: through `harvest`, the path of training and of `ksparse
shard`, and through nothing but the matrix products that the forward pass up to the site is made of,
at their sizes, into reused buffers. The share is the speed of the first over that of the second, in
FLOPs per second. What is missing to 1 is spent on norms, activation functions, rotary embeddings,
masks, attention, and moving data.

FLOPs are counted by torch as the pass runs: 2 m k n for each product [m, k] x [k, n], and those of
attention. Wall time is what counts on a quiet machine. Processor time is given too: other work
changes it less.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ksparse.bench.steps import processor
from ksparse.config import ActsConfig
from ksparse.config.options import Config
from ksparse.errors import InputError

if TYPE_CHECKING:
    import torch

    from ksparse.data.contexts import Context, Corpus
    from ksparse.lm.model import LM


@dataclass(frozen=True)
class HarvestSetting(Config):
    """An LM, a site in it, and the contexts to time.

    Example:
        >>> HarvestSetting(lm="pylm/0.3m", site="resid_post.1").lm_batch
        (4, 16, 64)
    """

    OWNER = "a benchmark"

    lm: str
    """The LM, as `acts.lm`."""
    site: str = "resid_post.3"
    """The site, as `acts.site`."""
    text: str = "pylm"
    """The text, as `acts.text`."""
    context: int = 64
    """Tokens per context."""
    lm_batch: tuple[int, ...] = (4, 16, 64)
    """Contexts per forward pass; several are timed in turn."""
    lm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type in which the LM runs. auto: float32 on a CPU, bfloat16 on an accelerator."""
    rounds: int = 5
    """Passes of each size to time."""
    threads: int = 0
    """CPU threads; 0: torch's default."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("rounds", "context", at_least=1)
        self.check_range("threads", at_least=0)
        if not self.lm_batch or min(self.lm_batch) < 1:
            raise InputError(
                f"lm_batch of a benchmark is {self.lm_batch}; give whole numbers from 1"
            )


class Product(NamedTuple):
    """A matrix product [m, k] x [k, n]."""

    m: int
    k: int
    n: int


class Work(NamedTuple):
    """What a forward pass computes: its FLOPs, attention included, and how often each product."""

    flops: int
    products: Counter[Product]


class Seconds(NamedTuple):
    """The time of one measurement."""

    wall: float
    processor: float


def bench_harvest(
    setting: HarvestSetting,
    observe: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time the reading of an LM's activations.

    Args:
        setting: the LM, its site and contexts.
        observe: called after each round with the number of rounds done, and of all.

    Returns:
        What `ksparse bench --lm … --json` writes: the setting, the machine, and for each number of
        contexts in a pass tokens per second, FLOPs per token, and the share of the speed of the
        products: `share` by wall time, `share_processor` by processor time (CPU only).

    Raises:
        InputError: as `ksparse.LM`, and where the pass has no matrix product.
    """
    import torch

    from ksparse.data.contexts import Corpus
    from ksparse.device import resolve_device
    from ksparse.lm.model import LM

    if setting.threads:
        torch.set_num_threads(setting.threads)
    device = resolve_device(setting.device)
    on_cpu = device == "cpu"
    dtype = setting.lm_dtype
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    acts = ActsConfig(
        lm=setting.lm,
        site=setting.site,
        text=setting.text,
        context=setting.context,
        lm_dtype=dtype,
    )
    lm = LM(acts=acts, device=device)
    corpus = Corpus(acts, lm.tokenizer, "train")
    contexts = list(itertools.islice(corpus.contexts(), max(setting.lm_batch)))
    cases = {size: _Case(lm, corpus, contexts[:size]) for size in setting.lm_batch}
    for case in cases.values():
        case.run()  # the first time is slow
        case.forget()
    for number in range(setting.rounds):
        for case in cases.values():
            case.run()
        observe(number + 1, setting.rounds)
    return {
        **asdict(setting),
        "lm_dtype": dtype,
        "device": device,
        "d_model": lm.d_model,
        "threads": torch.get_num_threads(),
        "processor": _device_name(device),
        "versions": {name: version(name) for name in ("ksparse", "torch", "transformers")},
        "batches": {str(size): case.row(on_cpu) for size, case in cases.items()},
    }


def _device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return processor() if device == "cpu" else device


def harvest(lm: LM, corpus: Corpus, contexts: list[Context]) -> torch.Tensor:
    """Return the kept activations [m, d] of contexts, as training reads them."""
    import torch

    batch = corpus.batch(contexts)
    x = lm.acts(batch.tokens, batch.attention)[batch.keep]
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"activations at {lm.options.site} are NaN or infinite")
    return x


def count_work(run: Callable[[], Any]) -> Work:
    """Run a function, and count the FLOPs and the matrix products of it.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, 3), torch.ones(3, 5)
        >>> count_work(lambda: a @ b)
        Work(flops=60, products=Counter({Product(m=2, k=3, n=5): 1}))
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry, sdpa_flop_count

    aten = torch.ops.aten
    counted = flop_registry | {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **options: (
            sdpa_flop_count(q.shape, k.shape, v.shape)
        )
    }
    flops, products = 0, Counter[Product]()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal flops
            kwargs = kwargs or {}
            packet = function._overloadpacket
            if packet not in counted:
                with self:  # in inference mode, composite operations arrive whole
                    out = function.decompose(*args, **kwargs)
                return function(*args, **kwargs) if out is NotImplemented else out
            out = function(*args, **kwargs)
            flops += int(counted[packet](*args, **kwargs, out_val=out))
            if packet in (aten.mm, aten.addmm):
                a, b = args[-2:]
                products[Product(a.shape[0], a.shape[1], b.shape[1])] += 1
            return out

    with Count():
        run()
    return Work(flops, products)


class _Case:
    """Some contexts, and the time of reading their activations and of the products alone."""

    def __init__(self, lm: LM, corpus: Corpus, contexts: list[Context]):
        import torch

        self.lm, self.corpus, self.contexts = lm, corpus, contexts
        batch = corpus.batch(contexts)
        self.tokens, self.kept = batch.tokens.numel(), int(batch.keep.sum())
        self.work = count_work(lambda: harvest(lm, corpus, contexts))
        if not self.work.products:
            raise InputError(
                f"the pass of {lm.options.lm} up to {lm.options.site} has no matrix product; give "
                "another --site"
            )
        make: dict[str, Any] = {"dtype": lm.model.dtype, "device": lm.device}
        self.products = [
            (
                count,
                torch.randn(shape.m, shape.k, **make),
                torch.randn(shape.n, shape.k, **make),  # as torch.nn.Linear keeps its weight
                torch.empty(shape.m, shape.n, **make),
            )
            for shape, count in self.work.products.items()
        ]
        self.forget()

    def forget(self) -> None:
        self.reading: list[Seconds] = []
        self.multiplying: list[Seconds] = []

    def run(self) -> None:
        """Time both once."""
        self.reading.append(self._time(lambda: harvest(self.lm, self.corpus, self.contexts)))
        self.multiplying.append(self._time(self._multiply))

    def _multiply(self) -> None:
        import torch

        with torch.inference_mode():
            for count, a, weight, out in self.products:
                for _ in range(count):
                    torch.mm(a, weight.t(), out=out)

    def _time(self, work: Callable[[], Any]) -> Seconds:
        import torch

        def finished() -> None:
            if self.lm.device.type != "cpu":
                torch.accelerator.synchronize(self.lm.device)

        finished()
        wall, used = time.perf_counter(), time.process_time()
        work()
        finished()
        return Seconds(time.perf_counter() - wall, time.process_time() - used)

    def row(self, on_cpu: bool) -> dict[str, Any]:
        """Return what was measured."""
        # One pass does all FLOPs, the products alone a part of them.
        done = 2 * sum(p.m * p.k * p.n * count for p, count in self.work.products.items())
        part = self.work.flops / done
        shares = [
            Seconds(part * b.wall / a.wall, part * b.processor / max(a.processor, 1e-9))
            for a, b in zip(self.reading, self.multiplying)
        ]
        seconds = statistics.median(each.wall for each in self.reading)
        best = min(each.wall for each in self.reading)
        return {
            "tokens": self.tokens,
            "kept": self.kept,
            "seconds": seconds,
            "tokens_per_s": self.tokens / seconds,
            "best_tokens_per_s": self.tokens / best,
            "flops_per_token": self.work.flops / self.tokens,
            "product_flops_per_s": done / statistics.median(s.wall for s in self.multiplying),
            "share": statistics.median(each.wall for each in shares),
            "share_processor": statistics.median(each.processor for each in shares)
            if on_cpu
            else None,
        }
