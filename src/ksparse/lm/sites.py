"""Sites: the places in an LM whose activations are read and changed, on every architecture by one
definition.

| alias | the activations x[b, t, d] |
|---|---|
| resid_pre.I | the residual stream that block I reads: its input |
| attn_out.I | what attention adds to the stream |
| resid_mid.I | the stream between attention and MLP: resid_pre + attn_out; a change reaches the MLP and the skip around it |
| mlp_out.I | what the MLP adds to the stream: resid_post - resid_mid |
| resid_post.I | the stream that block I gives: its output, before any final norm |

What is added is not always what a module gives: a norm or a factor may follow (Gemma 2, OLMo 2,
Granite), or the module may add the stream itself (BLOOM, MPT). So an alias is not looked up by
name. One pass over a few tokens says which outputs of the block's parts, times which factors, sum
up to what the block adds; a second pass with a change at the alias says whether the change arrives
where the definition has it. An alias that does not stand this test is refused with the reason. Any
other site is a module's name: its output, or with NAME:in its input.
"""  # noqa: E501 (a table)

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
    _keep,
    _key,
    _probing,
    _seen,
    hidden_states,
    hooked,
    not_activations,
)

ALIASES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_ALIAS = re.compile(rf"({'|'.join(ALIASES)})\.(-?\d+)")
_CLASSES = {
    "norm": r"norm|(^|_)ln(_|\d|$)",
    "mlp": r"mlp|ffn|feed_?forward|moe|expert|^ff|fc_?2|fc_?out|fc_?down",
    "attention": r"attn|attention",
    "mixer": r"mixer|mamba|ssm|conv|recurrent|temporal|retention|time_mix",
}
"""What a part of a block is, by its name; the first that fits."""
_PARTS = 3  # at most so many outputs are summed up to what a block adds
_TOKENS = 8
_confirmed: weakref.WeakKeyDictionary[nn.Module, dict[str, Site]] = weakref.WeakKeyDictionary()


# ---- finding -------------------------------------------------------------------------------------


def resolve(model: nn.Module, site: str) -> Site:
    """Return a site by its alias, confirmed on this model, or by a module's name; raise InputError,
    saying what there is."""
    found = _outline(model, site)
    if not _ALIAS.fullmatch(site):
        return Site(*found)
    if site not in (known := _confirmed.setdefault(model, {})):
        token = _probing.set(True)
        try:
            known[site] = _confirm(model, site)
        finally:
            _probing.reset(token)
    return known[site]


def outline(model: nn.Module, site: str) -> ModuleEnd:
    """Return about where a site is, by names alone: enough to count what is computed before it, on
    a model without weights."""
    return _outline(model, site)


def _outline(model: nn.Module, site: str) -> ModuleEnd:
    if alias := _ALIAS.fullmatch(site):
        numbered = blocks_of(model)
        if -len(numbered) <= int(alias[2]) < len(numbered):
            block, wanted = numbered[int(alias[2])], alias[1]
            if wanted in ("resid_pre", "resid_post"):
                return ModuleEnd(block, "in" if wanted == "resid_pre" else "out")
            parts = [
                part
                for name, part in block.named_children()
                if _class(name) == ("mlp" if wanted == "mlp_out" else "attention")
            ]
            if parts:
                return ModuleEnd(parts[-1], "out")
        raise InputError(f"site {site!r} does not exist; there are\n{describe_sites(model)}")
    name, _, at = site.partition(":")
    modules = dict(model.named_modules())
    # Names may also begin at the base model.
    within = f"{getattr(model, 'base_model_prefix', '')}.{name}"
    module = modules.get(name) or modules.get(within) if name else None
    if module is None or at not in ("", "in", "out"):
        raise InputError(f"site {site!r} does not exist; there are\n{describe_sites(model)}")
    return ModuleEnd(module, at or "out")


def sites_of(
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
    """List the sites of a model: the aliases that it may have, and the modules' names with the
    block number as I."""
    blocks = blocks_of(model)
    classes = {_class(name) for block in blocks for name, _ in block.named_children()}
    needs = {"resid_mid": {"attention", "mlp"}, "attn_out": {"attention"}, "mlp_out": {"mlp"}}
    aliases = [
        f"{alias}.0 … {alias}.{len(blocks) - 1}"
        for alias in ALIASES
        if blocks and needs.get(alias, set()) <= classes
    ]
    names = dict.fromkeys(
        re.sub(r"\.\d+(?=\.|$)", ".I", name) for name, _ in model.named_modules() if name
    )
    return (
        f"  {', '.join(aliases)}\n  {', '.join(names)}\n  (NAME is a module's output, NAME:in "
        "its input)"
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks: the longest list of modules that have attention or another mixer, and lie
    in no such list themselves."""
    lists = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    mixing = [
        blocks
        for blocks in lists
        if any(_class(name) in ("attention", "mixer") for name, _ in blocks[0].named_children())
    ]
    inner = {id(module) for blocks in mixing for block in blocks for module in block.modules()}
    return max((list(blocks) for blocks in mixing if id(blocks) not in inner), key=len, default=[])


def blocks_before(model: nn.Module, site: Site) -> list[nn.Module]:
    """Return the blocks whose work is done when the site is read: those before its own, and that
    one too if its output is the site."""
    blocks = blocks_of(model)
    for number, block in enumerate(blocks):
        if block is site.module:
            return blocks[: number + 1] if site.at == "out" and not site.others else blocks[:number]
        if any(module is site.module for module in block.modules()):
            return blocks[:number]
    return []


def _class(name: str) -> str:
    return next((what for what, pattern in _CLASSES.items() if re.search(pattern, name)), "")


# ---- confirming ----------------------------------------------------------------------------------


class _BlockPart(NamedTuple):
    """A part of a block in one pass, in the order in which parts end: what it is, what it took and
    gave, how often it ran."""

    what: str
    module: nn.Module
    taken: Any
    given: Any
    runs: int


class _Block(NamedTuple):
    """One pass through a block."""

    pre: Tensor
    post: Tensor
    parts: list[_BlockPart]
    limit: float


def _confirm(model: nn.Module, site: str) -> Site:
    """Return the site that an alias means on this model; raise InputError where that cannot be
    confirmed."""
    alias, blocks = site.partition(".")[0], blocks_of(model)
    number = int(site.partition(".")[2]) % len(blocks)
    block, following = blocks[number], blocks[number + 1] if number + 1 < len(blocks) else None
    try:
        seen = _recorded(model, block, following)
        if alias in ("resid_pre", "resid_post"):
            return Site(block, "in" if alias == "resid_pre" else "out")
        sites = _parted(block, seen)
        _check_change(model, block, alias, sites, seen)
    except _Unconfirmed as why:
        raise InputError(
            f"site {site!r} is refused: {why}. Name a module instead: NAME is its output, NAME:in "
            "its input; there are\n"
            f"{describe_sites(model)}"
        ) from None
    return sites[alias]


class _Unconfirmed(Exception):
    """Why an alias does not mean here what it says."""


def _recorded(model: nn.Module, block: nn.Module, following: nn.Module | None) -> _Block:
    """Run a few tokens through the model; return what the block and its parts take and give."""
    ends: dict[str, list[Tensor]] = {"pre": [], "post": [], "next": []}
    parts: list[_BlockPart] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            taken = args[0] if args else kwargs.get(_key(args, kwargs))
            parts.append(
                _BlockPart(_class(name), module, _copy(taken), _copy(hidden_states(output)), 1)
            )

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(_seen(ModuleEnd(block, "in"), lambda x: ends["pre"].append(_copy(x))))
        hooks.enter_context(_seen(ModuleEnd(block, "out"), lambda x: ends["post"].append(_copy(x))))
        if following is not None:
            hooks.enter_context(
                _seen(ModuleEnd(following, "in"), lambda x: ends["next"].append(_copy(x)))
            )
        for name, part in block.named_children():
            hooks.callback(part.register_forward_hook(note(name), with_kwargs=True).remove)
        shape = _run(model)
    if len(ends["post"]) != 1:
        raise _Unconfirmed(
            f"its block runs {len(ends['post'])} times in one pass"
            if ends["post"]
            else "its block does not run in a pass over text"
        )
    for name in ("pre", "post"):
        if wrong := not_activations(ends[name][0], shape):
            raise _Unconfirmed(
                f"its block {'takes' if name == 'pre' else 'gives'} {wrong}, not activations "
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
    return _Block(pre, post, [part._replace(runs=counts[id(part.module)]) for part in parts], limit)


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _run(model: nn.Module) -> tuple[int, int]:
    """Run a few tokens through a model of any kind, unchanged; return their shape."""
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
    ids = (
        torch.arange(2 * _TOKENS, device=device).view(2, _TOKENS) * 7919 + vocabulary // 3
    ) % vocabulary
    takes = inspect.signature(model.forward).parameters
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            if "input_ids" in takes:
                model(input_ids=ids, **({"use_cache": False} if "use_cache" in takes else {}))
            else:
                model(ids)
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # whatever a model's own code does with plain token ids
        raise _Unconfirmed(
            f"a pass over {_TOKENS} tokens fails ({type(error).__name__}: "
            f"{(str(error) or 'no message').splitlines()[0]})"
        ) from None
    finally:
        for module in training:
            module.training = True
    return 2, _TOKENS


def _parted(block: nn.Module, seen: _Block) -> dict[str, Site]:
    """Return the sites within a block, such that resid_pre + attn_out + mlp_out = resid_post holds
    in the pass."""
    last = ""
    usable = []
    for part in seen.parts:
        last = part.what if part.what not in ("", "norm") else last
        if (
            part.runs == 1
            and not not_activations(part.given, seen.post.shape[:2])
            and part.given.shape == seen.post.shape
        ):
            usable.append(
                part._replace(what=last)
            )  # a norm or dropout belongs to what ran before it
    factors = _summed(seen, usable)
    if factors is None:
        return _with_stream_inside(block, seen, usable)
    mixing = [
        (ModuleEnd(part.module, "out"), factor) for part, factor in factors if part.what != "mlp"
    ]
    mlp = [
        (ModuleEnd(part.module, "out"), factor) for part, factor in factors if part.what == "mlp"
    ]
    attention = [
        (ModuleEnd(part.module, "out"), factor)
        for part, factor in factors
        if part.what == "attention"
    ]
    sites = {}
    if len(attention) == 1:
        sites["attn_out"] = _sum_of(attention)
    if mlp:
        sites["mlp_out"] = _sum_of(mlp)
    if mixing and mlp:
        middle = seen.pre + sum(
            factor * part.given for part, factor in factors if part.what != "mlp"
        )
        reader = next((part.module for part in seen.parts if _same(seen, part.taken, middle)), None)
        sites["resid_mid"] = _sum_of([(ModuleEnd(block, "in"), 1.0), *mixing])._replace(
            reader=reader
        )
    return sites


def _sum_of(terms: Sequence[tuple[ModuleEnd, float]]) -> Site:
    """Return the site whose x is this sum, changed where its last term is."""
    *others, (place, factor) = terms
    return Site(place.module, place.at, factor, tuple(others))


def _summed(seen: _Block, parts: list[_BlockPart]) -> list[tuple[_BlockPart, float]] | None:
    """Return the fewest parts, with factors, that sum up to what the block adds; None if no few
    do."""
    weight = 1 / (seen.pre.double().abs() + seen.post.double().abs()).clamp_min(
        torch.finfo(seen.post.dtype).tiny
    )
    target = ((seen.post.double() - seen.pre.double()) * weight).flatten()
    columns = [(part.given.double() * weight).flatten() for part in parts]
    for size in range(1, _PARTS + 1):
        for chosen in itertools.combinations(range(len(parts)), size):
            matrix = torch.stack([columns[i] for i in chosen], 1)
            gram = matrix.T @ matrix
            if not torch.isfinite(gram).all() or torch.linalg.matrix_rank(gram) < size:
                continue
            factors = torch.linalg.solve(gram, matrix.T @ target)
            error, sizes = (
                _rms(target - matrix @ factors),
                factors.abs() * matrix.square().mean(0).sqrt(),
            )
            if error <= seen.limit < sizes.min() / 4:
                rounded = [1.0 if abs(factor - 1) < 1e-3 else factor for factor in factors.tolist()]
                return [(parts[i], factor) for i, factor in zip(chosen, rounded)]
    return None


def _with_stream_inside(block: nn.Module, seen: _Block, parts: list[_BlockPart]) -> dict[str, Site]:
    """Return the sites of a block whose MLP module adds the stream itself (MPT), and whose
    attention may too (BLOOM)."""
    ends = [part for part in parts if part.what == "mlp" and _same(seen, part.given, seen.post)]
    for attention in (part for part in parts if part.what == "attention"):
        read = [
            part.taken
            for part in seen.parts[
                seen.parts.index(next(p for p in seen.parts if p.module is attention.module)) + 1 :
            ]
        ]
        for inside, middle in ((True, attention.given), (False, seen.pre + attention.given)):
            if ends and any(_same(seen, x, middle) for x in read):
                pre, out = (ModuleEnd(block, "in"), -1.0), ModuleEnd(attention.module, "out")
                mid = Site(*out) if inside else _sum_of([(pre[0], 1.0), (out, 1.0)])
                lost = [(out, -1.0)] if inside else [pre, (out, -1.0)]
                return {
                    "attn_out": _sum_of([pre, (out, 1.0)]) if inside else Site(*out),
                    "resid_mid": mid,
                    "mlp_out": _sum_of([*lost, (ModuleEnd(ends[0].module, "out"), 1.0)]),
                }
    raise _Unconfirmed(
        "no outputs of its block's parts sum up to what the block adds to the residual stream"
    )


def _same(seen: _Block, a: Any, b: Tensor) -> bool:
    """Return whether two tensors of one pass differ by rounding alone."""
    if not_activations(a) or a.shape != b.shape:
        return False
    return (
        _rms(
            (a.double() - b.double())
            / (b.double().abs() + seen.pre.double().abs()).clamp_min(1e-30)
        )
        <= seen.limit
    )


def _check_change(
    model: nn.Module, block: nn.Module, alias: str, sites: dict[str, Site], seen: _Block
) -> None:
    """Raise unless the parts sum up to the whole and a change at the alias arrives: on the skip,
    and in what reads it."""
    if alias not in sites:
        raise _Unconfirmed(
            "its block has no single attention and no MLP that adds to the residual stream alone"
            if not sites
            else f"its block has {', '.join(sorted(sites))}, but no {alias}"
        )
    reads = {"post": Site(block, "out")} | {
        name: sites[name] for name in ("attn_out", "mlp_out") if name in sites
    }
    before, shift = (
        _reading(model, reads),
        torch.randn(seen.post.shape[-1], generator=torch.Generator().manual_seed(0)),
    )
    shift = (shift * _rms(seen.pre)).to(seen.post)
    after = _reading(model, reads, sites[alias], lambda x: x + shift)
    moved = {name: after[name].double() - before[name].double() for name in reads}
    direct = shift.double() if alias == "resid_mid" else moved[alias]
    through = (
        moved["mlp_out"]
        if alias != "mlp_out" and "mlp_out" in sites
        else torch.zeros_like(moved["post"])
    )
    size = (
        before["post"].double().abs() + after["post"].double().abs() + seen.pre.double().abs()
    ).clamp_min(1e-30)
    if _rms((moved["post"] - direct - through) / size) > 4 * seen.limit:
        raise _Unconfirmed("a change there does not arrive as it should at the block's end")
    if alias == "resid_mid" and _rms(moved["mlp_out"] / size) <= 4 * seen.limit:
        raise _Unconfirmed(
            "attention and MLP of its block read the same activations, so there is no stream "
            "between them"
        )


def _reading(
    model: nn.Module,
    sites: dict[str, Site],
    edited: Site | None = None,
    change: Change | None = None,
) -> dict[str, Tensor]:
    """Return x at several sites in one pass, with another changed."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        if edited is not None and change is not None:
            hooks.enter_context(hooked(edited, change))
        for name, site in sites.items():
            hooks.enter_context(hooked(site, functools.partial(_keep, seen, name)))
        _run(model)
    return seen


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
