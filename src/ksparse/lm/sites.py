"""Sites: the places in an LM whose activations are read and changed, defined the same way on every
architecture.

| alias        | the activations x[b, t, d]                                                       |
|--------------|----------------------------------------------------------------------------------|
| resid_pre.I  | the residual stream that block I reads: its input                                |
| attn_out.I   | what attention adds to the stream                                                |
| resid_mid.I  | resid_pre + attn_out: a change reaches the MLP and the skip connection around it |
| mlp_out.I    | what the MLP adds to the stream: resid_post - resid_mid                          |
| resid_post.I | the stream after block I: its output, before any final norm                      |

What is added to the stream is not always a module's output: a norm or a factor may follow (Gemma 2,
OLMo 2, Granite), or the module may add the stream itself (BLOOM, MPT). So aliases are not looked up
by module name alone. One pass over a few tokens finds which outputs of the block's parts, times
which factors, sum to what the block adds. A second pass, with a change at the alias, checks that
the change arrives where the definition says. An alias that fails is refused with the reason.

Any other site is a module's name: its output, or with NAME:in its input.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ksparse.errors import InputError
from ksparse.lm.hooks import (
    Change,
    ModuleEnd,
    Site,
    hidden_states,
    hidden_states_key,
    hooked,
    not_activations,
    observed,
    probing_passes,
    store_copy,
)

ALIASES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_ALIAS = re.compile(rf"({'|'.join(ALIASES)})\.(-?\d+)")
_ROLES = {
    "norm": r"norm|(^|_)ln(_|\d|$)",
    "mlp": r"mlp|ffn|feed_?forward|moe|expert|^ff|fc_?2|fc_?out|fc_?down",
    "attention": r"attn|attention",
    "mixer": r"mixer|mamba|ssm|conv|recurrent|temporal|retention|time_mix",
}
"""The role of a block's part, by its name; the first pattern that matches."""
_MAX_PARTS = 3
"""The largest number of outputs that are tried as a sum."""
_PROBE_TOKENS = 8
_confirmed: weakref.WeakKeyDictionary[nn.Module, dict[str, Site]] = weakref.WeakKeyDictionary()


def resolve(model: nn.Module, site: str) -> Site:
    """Find a site in a model.

    Args:
        model: Any module; aliases need a causal LM with blocks.
        site: An alias such as `resid_post.8`, which is confirmed on this model, or a module's name,
            or NAME:in.

    Raises:
        InputError: There is no such site, or the alias cannot be confirmed; the message lists the
            sites.
    """
    end = outline(model, site)
    if not _ALIAS.fullmatch(site):
        return Site(*end)
    known = _confirmed.setdefault(model, {})
    if site not in known:
        with probing_passes():
            known[site] = _confirm(model, site)
    return known[site]


def outline(model: nn.Module, site: str) -> ModuleEnd:
    """Return roughly where a site is, by names alone.

    Enough to count what is computed before it, on a model without weights.

    Raises:
        InputError: There is no such site.
    """
    if alias := _ALIAS.fullmatch(site):
        blocks = blocks_of(model)
        if -len(blocks) <= int(alias[2]) < len(blocks):
            block, name = blocks[int(alias[2])], alias[1]
            if name in ("resid_pre", "resid_post"):
                return ModuleEnd(block, "in" if name == "resid_pre" else "out")
            role = "mlp" if name == "mlp_out" else "attention"
            parts = [part for child, part in block.named_children() if _role(child) == role]
            if parts:
                return ModuleEnd(parts[-1], "out")
        raise InputError(f"site {site!r} does not exist; there are\n{describe_sites(model)}")
    name, _, at = site.partition(":")
    modules = dict(model.named_modules())
    # Names may also begin at the base model.
    within_base = f"{getattr(model, 'base_model_prefix', '')}.{name}"
    module = modules.get(name) or modules.get(within_base) if name else None
    if module is None or at not in ("", "in", "out"):
        raise InputError(f"site {site!r} does not exist; there are\n{describe_sites(model)}")
    return ModuleEnd(module, at or "out")


def list_sites(
    model: nn.Module, aliases: Sequence[str] = ("attn_out", "mlp_out", "resid_post")
) -> list[str]:
    """Return the sites of these aliases that the model confirms, block by block."""
    return [
        site
        for number in range(len(blocks_of(model)))
        for alias in aliases
        if _exists(model, site := f"{alias}.{number}")
    ]


def _exists(model: nn.Module, site: str) -> bool:
    try:
        resolve(model, site)
    except InputError:
        return False
    return True


def describe_sites(model: nn.Module) -> str:
    """List a model's possible aliases, and its modules' names with I for the block number."""
    blocks = blocks_of(model)
    roles = {_role(name) for block in blocks for name, _ in block.named_children()}
    needs = {"resid_mid": {"attention", "mlp"}, "attn_out": {"attention"}, "mlp_out": {"mlp"}}
    aliases = [
        f"{alias}.0 … {alias}.{len(blocks) - 1}"
        for alias in ALIASES
        if blocks and needs.get(alias, set()) <= roles
    ]
    names = dict.fromkeys(
        re.sub(r"\.\d+(?=\.|$)", ".I", name) for name, _ in model.named_modules() if name
    )
    return (
        f"  {', '.join(aliases)}\n  {', '.join(names)}\n  (NAME is a module's output, NAME:in "
        "its input)"
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the model's blocks: the longest module list with attention or another mixer that is
    not inside another such list."""
    lists = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    mixing = [
        blocks
        for blocks in lists
        if any(_role(name) in ("attention", "mixer") for name, _ in blocks[0].named_children())
    ]
    inner = {id(module) for blocks in mixing for block in blocks for module in block.modules()}
    return max((list(blocks) for blocks in mixing if id(blocks) not in inner), key=len, default=[])


def blocks_before(model: nn.Module, site: Site) -> list[nn.Module]:
    """Return the blocks that are complete when the site is read, in order: those before its own
    block, and that one too if the site is its output."""
    blocks = blocks_of(model)
    for number, block in enumerate(blocks):
        if block is site.module:
            return blocks[: number + 1] if site.at == "out" and not site.others else blocks[:number]
        if any(module is site.module for module in block.modules()):
            return blocks[:number]
    return []


def _role(name: str) -> str:
    return next((role for role, pattern in _ROLES.items() if re.search(pattern, name)), "")


# ---- confirming an alias on a model


class _Unconfirmed(Exception):
    """The reason why an alias does not mean on this model what its definition says."""


class _PartRun(NamedTuple):
    """One run of a part of a block, in the order in which parts end."""

    role: str
    module: nn.Module
    input: Any
    output: Any
    runs: int
    """How often this part ran in the pass."""


class _BlockRun(NamedTuple):
    """One pass through a block."""

    pre: Tensor
    post: Tensor
    parts: list[_PartRun]
    limit: float
    """Relative error that rounding may cause."""

    def is_equal(self, a: Any, b: Tensor) -> bool:
        """Return whether two tensors of the pass differ by rounding alone."""
        if not_activations(a) or a.shape != b.shape:
            return False
        scale = (b.double().abs() + self.pre.double().abs()).clamp_min(1e-30)
        return _rms((a.double() - b.double()) / scale) <= self.limit


def _confirm(model: nn.Module, site: str) -> Site:
    """Return the site that an alias means on this model; raise InputError if unconfirmed."""
    alias, blocks = site.partition(".")[0], blocks_of(model)
    number = int(site.partition(".")[2]) % len(blocks)
    block, following = blocks[number], blocks[number + 1] if number + 1 < len(blocks) else None
    try:
        run = _record_block(model, block, following)
        if alias in ("resid_pre", "resid_post"):
            return Site(block, "in" if alias == "resid_pre" else "out")
        sites = _split_block(block, run)
        _check_change(model, block, alias, sites, run)
    except _Unconfirmed as reason:
        raise InputError(
            f"site {site!r} is refused: {reason}. Name a module instead: NAME is its output, "
            f"NAME:in its input; there are\n{describe_sites(model)}"
        ) from None
    return sites[alias]


def _record_block(model: nn.Module, block: nn.Module, following: nn.Module | None) -> _BlockRun:
    """Run a few tokens through the model; record what a block and its parts take and give."""
    ends: dict[str, list[Any]] = {"pre": [], "post": [], "next": []}
    parts: list[_PartRun] = []

    def record_part(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0] if args else kwargs.get(hidden_states_key(args, kwargs))
            parts.append(_PartRun(_role(name), module, _copy(x), _copy(hidden_states(output)), 1))

        return hook

    with ExitStack() as hooks:
        recorded = [("pre", ModuleEnd(block, "in")), ("post", ModuleEnd(block, "out"))]
        if following is not None:
            recorded.append(("next", ModuleEnd(following, "in")))
        for name, end in recorded:
            hooks.enter_context(observed(end, functools.partial(_append_copy, ends[name])))
        for name, part in block.named_children():
            hooks.callback(part.register_forward_hook(record_part(name), with_kwargs=True).remove)
        shape = _run_probe(model)
    if len(ends["post"]) != 1:
        raise _Unconfirmed(
            f"its block runs {len(ends['post'])} times in one pass"
            if ends["post"]
            else "its block does not run in a pass over text"
        )
    for name in ("pre", "post"):
        if problem := not_activations(ends[name][0], shape):
            raise _Unconfirmed(
                f"its block {'takes' if name == 'pre' else 'gives'} {problem}, not activations "
                "[contexts, tokens, width]"
            )
    pre, post = ends["pre"][0], ends["post"][0]
    if ends["next"] and (
        not_activations(ends["next"][0], shape) or not torch.equal(ends["next"][0], post)
    ):
        raise _Unconfirmed("what its block gives is not what the next block takes")
    counts = {
        id(part.module): sum(other.module is part.module for other in parts) for part in parts
    }
    limit = max(3 * torch.finfo(post.dtype).eps, 2e-6)
    return _BlockRun(
        pre, post, [part._replace(runs=counts[id(part.module)]) for part in parts], limit
    )


def _append_copy(values: list[Any], x: Any) -> None:
    values.append(_copy(x))


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _run_probe(model: nn.Module) -> tuple[int, int]:
    """Run a few tokens through a model of any kind, in evaluation mode; return their shape."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    config = getattr(model, "config", None) or getattr(model, "cfg", None)
    vocabulary = (
        len(weight)
        if weight is not None
        else getattr(config, "vocab_size", None) or getattr(config, "d_vocab", None) or 2
    )
    device = (
        weight.device
        if weight is not None
        else next((p.device for p in model.parameters()), torch.device("cpu"))
    )
    numbers = torch.arange(2 * _PROBE_TOKENS, device=device).view(2, _PROBE_TOKENS)
    ids = (numbers * 7919 + vocabulary // 3) % vocabulary
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            _run_on_ids(model, ids)
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # a model's own code may fail on plain token ids in any way
        raise _Unconfirmed(
            f"a pass over {_PROBE_TOKENS} tokens fails ({type(error).__name__}: "
            f"{(str(error) or 'no message').splitlines()[0]})"
        ) from None
    finally:
        for module in training:
            module.training = True
    return 2, _PROBE_TOKENS


def _run_on_ids(model: nn.Module, ids: Tensor) -> None:
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" in parameters:
        model(input_ids=ids, **({"use_cache": False} if "use_cache" in parameters else {}))
    else:
        model(ids)


def _split_block(block: nn.Module, run: _BlockRun) -> dict[str, Site]:
    """Return the sites within a block, such that resid_pre + attn_out + mlp_out = resid_post."""
    candidates = _find_terms(run)
    terms = _find_sum(run, candidates)
    if terms is None:
        return _split_block_with_inner_stream(block, run, candidates)

    def ends(*roles: str) -> list[tuple[ModuleEnd, float]]:
        return [(ModuleEnd(part.module, "out"), f) for part, f in terms if part.role in roles]

    mlp, attention = ends("mlp"), ends("attention")
    mixing = [(ModuleEnd(part.module, "out"), f) for part, f in terms if part.role != "mlp"]
    sites = {}
    if len(attention) == 1:
        sites["attn_out"] = _sum_site(attention)
    if mlp:
        sites["mlp_out"] = _sum_site(mlp)
    if mixing and mlp:
        middle = run.pre + sum(factor * part.output for part, factor in terms if part.role != "mlp")
        reader = next((part.module for part in run.parts if run.is_equal(part.input, middle)), None)
        stream = _sum_site([(ModuleEnd(block, "in"), 1.0), *mixing])
        sites["resid_mid"] = stream._replace(reader=reader)
    return sites


def _find_terms(run: _BlockRun) -> list[_PartRun]:
    """Return the parts that ran once and gave activations of the stream's shape."""
    role = ""
    candidates = []
    for part in run.parts:
        role = part.role if part.role not in ("", "norm") else role
        if (
            part.runs == 1
            and not not_activations(part.output, run.post.shape[:2])
            and part.output.shape == run.post.shape
        ):
            # A norm or dropout has the role of the part that ran before it.
            candidates.append(part._replace(role=role))
    return candidates


def _sum_site(terms: Sequence[tuple[ModuleEnd, float]]) -> Site:
    """Return the site whose x is this sum; it is changed at its last term."""
    *others, (end, factor) = terms
    return Site(end.module, end.at, factor, tuple(others))


def _find_sum(run: _BlockRun, parts: list[_PartRun]) -> list[tuple[_PartRun, float]] | None:
    """Return the fewest parts, with factors, whose outputs sum to what the block adds to the
    stream; None if no few do."""
    weight = 1 / (run.pre.double().abs() + run.post.double().abs()).clamp_min(
        torch.finfo(run.post.dtype).tiny
    )
    target = ((run.post.double() - run.pre.double()) * weight).flatten()
    columns = [(part.output.double() * weight).flatten() for part in parts]
    for size in range(1, _MAX_PARTS + 1):
        for chosen in itertools.combinations(range(len(parts)), size):
            matrix = torch.stack([columns[i] for i in chosen], 1)
            gram = matrix.T @ matrix
            if not torch.isfinite(gram).all() or torch.linalg.matrix_rank(gram) < size:
                continue
            factors = torch.linalg.solve(gram, matrix.T @ target)
            error = _rms(target - matrix @ factors)
            sizes = factors.abs() * matrix.square().mean(0).sqrt()
            if error <= run.limit < sizes.min() / 4:
                rounded = [1.0 if abs(factor - 1) < 1e-3 else factor for factor in factors.tolist()]
                return [(parts[i], factor) for i, factor in zip(chosen, rounded)]
    return None


def _split_block_with_inner_stream(
    block: nn.Module, run: _BlockRun, parts: list[_PartRun]
) -> dict[str, Site]:
    """Return the sites of a block whose MLP module adds the stream itself (MPT), and whose
    attention may too (BLOOM)."""
    ends = [part for part in parts if part.role == "mlp" and run.is_equal(part.output, run.post)]
    for attention in (part for part in parts if part.role == "attention"):
        first = next(i for i, part in enumerate(run.parts) if part.module is attention.module)
        inputs = [part.input for part in run.parts[first + 1 :]]
        for adds_stream in (True, False):
            middle = attention.output if adds_stream else run.pre + attention.output
            if ends and any(run.is_equal(x, middle) for x in inputs):
                return _inner_stream_sites(
                    ModuleEnd(block, "in"),
                    ModuleEnd(attention.module, "out"),
                    ModuleEnd(ends[0].module, "out"),
                    adds_stream,
                )
    raise _Unconfirmed(
        "no outputs of its block's parts sum up to what the block adds to the residual stream"
    )


def _inner_stream_sites(
    pre: ModuleEnd, attention: ModuleEnd, mlp: ModuleEnd, adds_stream: bool
) -> dict[str, Site]:
    """Return the sites of a block whose MLP adds the stream, and whose attention may too."""
    if adds_stream:
        return {
            "attn_out": _sum_site([(pre, -1.0), (attention, 1.0)]),
            "resid_mid": Site(*attention),
            "mlp_out": _sum_site([(attention, -1.0), (mlp, 1.0)]),
        }
    return {
        "attn_out": Site(*attention),
        "resid_mid": _sum_site([(pre, 1.0), (attention, 1.0)]),
        "mlp_out": _sum_site([(pre, -1.0), (attention, -1.0), (mlp, 1.0)]),
    }


def _check_change(
    model: nn.Module, block: nn.Module, alias: str, sites: dict[str, Site], run: _BlockRun
) -> None:
    """Raise unless a change at the alias arrives at the block's end, through the skip connection
    and through the MLP that reads it."""
    if alias not in sites:
        raise _Unconfirmed(
            "its block has no single attention and no MLP that adds to the residual stream alone"
            if not sites
            else f"its block has {', '.join(sorted(sites))}, but no {alias}"
        )
    reads = {"post": Site(block, "out")} | {
        name: sites[name] for name in ("attn_out", "mlp_out") if name in sites
    }
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(run.post.shape[-1], generator=generator)
    shift = (shift * _rms(run.pre)).to(run.post)
    before = _read_sites(model, reads)
    after = _read_sites(model, reads, sites[alias], lambda x: x + shift)
    moved = {name: after[name].double() - before[name].double() for name in reads}
    direct = shift.double() if alias == "resid_mid" else moved[alias]
    through = (
        moved["mlp_out"]
        if alias != "mlp_out" and "mlp_out" in sites
        else torch.zeros_like(moved["post"])
    )
    size = (
        before["post"].double().abs() + after["post"].double().abs() + run.pre.double().abs()
    ).clamp_min(1e-30)
    if _rms((moved["post"] - direct - through) / size) > 4 * run.limit:
        raise _Unconfirmed("a change there does not arrive as it should at the block's end")
    if alias == "resid_mid" and _rms(moved["mlp_out"] / size) <= 4 * run.limit:
        raise _Unconfirmed(
            "attention and MLP of its block read the same activations, so there is no stream "
            "between them"
        )


def _read_sites(
    model: nn.Module,
    sites: dict[str, Site],
    edited: Site | None = None,
    change: Change | None = None,
) -> dict[str, Tensor]:
    """Return x at several sites in one probing pass, optionally with another site changed."""
    values: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        if edited is not None and change is not None:
            hooks.enter_context(hooked(edited, change))
        for name, site in sites.items():
            hooks.enter_context(hooked(site, functools.partial(store_copy, values, name)))
        _run_probe(model)
    return values


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
