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
Where a convolution or a state-space model stands in for attention (Mamba, LFM2), there is no
attn_out, and resid_mid is the stream behind it.

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

from ksparse.config import SEVERAL_SITES
from ksparse.errors import InputError
from ksparse.lm.hooks import (
    Change,
    ModuleEnd,
    Site,
    hidden_states,
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
    "attention": r"attn|attention|(^|_)att(_|$)",
    "mixer": r"mixer|mamba|ssm|conv|recurrent|temporal|retention|time_mix",
}
"""The role of a block's part, by its name; the first pattern that matches. It only proposes: passes
decide."""
_MAX_PARTS = 3
"""The largest number of outputs that are tried as a sum."""
_PROBE_TOKENS = 8
_confirmed: weakref.WeakKeyDictionary[nn.Module, dict[str, Site | str]] = (
    weakref.WeakKeyDictionary()
)
"""Of each model, the sites of its aliases, or why they are refused."""


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
    require_one(site)
    alias = _ALIAS.fullmatch(site)
    if not alias or not _has_block(model, int(alias[2])):
        return Site(*outline(model, site))
    known = _confirmed.setdefault(model, {})
    if site not in known:
        with probing_passes():
            known |= _confirm(model, alias[1], alias[2])
    found = known[site]
    if isinstance(found, Site):
        return found
    raise InputError(
        f"site {site!r} is refused: {found}. Name a module instead: NAME is its output, NAME:in "
        f"its input; there are\n{describe_sites(model)}"
    )


def outline(model: nn.Module, site: str) -> ModuleEnd:
    """Return roughly where a site is, by names alone.

    Enough to count what is computed before it, on a model without weights.

    Raises:
        InputError: There is no such site.
    """
    require_one(site)
    if alias := _ALIAS.fullmatch(site):
        if _has_block(model, int(alias[2])):
            block, name = blocks_of(model)[int(alias[2])], alias[1]
            if name in ("resid_pre", "resid_post"):
                return ModuleEnd(block, "in" if name == "resid_pre" else "out")
            role = "mlp" if name == "mlp_out" else "attention"
            parts = [part for child, part in block.named_children() if _role(child, part) == role]
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


def require_one(site: str) -> None:
    """Raise InputError for a list or a pattern of sites."""
    if any(letter in site for letter in SEVERAL_SITES):
        raise InputError(
            f"site {site!r} is a list or a pattern, and one site is needed here: give its name, "
            "such as resid_post.3. Several are for train, shard, sweep and plan"
        )


def _has_block(model: nn.Module, number: int) -> bool:
    count = len(blocks_of(model))
    return -count <= number < count


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
    roles = {_role(name, part) for block in blocks for name, part in block.named_children()}
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
    """Return the model's blocks: a module list with attention or another mixer that is not inside
    another such list.

    Of several lists, those of the text decoder count, not those of a tower for images or sound:
    first those that have as many layers as the text's config says, then the longest.
    """
    decoder = _text_decoder(model)
    lists = [
        module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    mixing = [blocks for blocks in lists if _mixes(blocks[0])]
    inner = {id(module) for blocks in mixing for block in blocks for module in block.modules()}
    outer = [list(blocks) for blocks in mixing if id(blocks) not in inner]
    layers = _text_layers(model)
    return max(outer, key=lambda blocks: (len(blocks) == layers, len(blocks)), default=[])


def _text_decoder(model: nn.Module) -> nn.Module:
    """Return the part of a model that reads text, where the model itself says which that is."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) else model


def _text_layers(model: nn.Module) -> int | None:
    """Return the number of layers of the text decoder; None if the config does not say."""
    try:
        text = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    except (AttributeError, TypeError, ValueError):  # no config, or several texts in it
        return None
    return getattr(text, "num_hidden_layers", None)


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


def _mixes(block: nn.Module) -> bool:
    """Return whether a block has attention or another mixer, perhaps behind a norm (DBRX)."""
    parts = [*block.named_children()]
    parts += [inner for name, part in parts if _role(name) == "norm" for inner in _children(part)]
    return any(_role(name, part) in ("attention", "mixer") for name, part in parts)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.named_children())


def _role(name: str, part: nn.Module | None = None) -> str:
    """Return the role of a part by its name; of one that is called just mixer, by its class too."""
    role = next((role for role, pattern in _ROLES.items() if re.search(pattern, name)), "")
    if name != "mixer" or part is None:
        return role
    kind = type(part).__name__.lower()
    return next((role for role in ("attention", "mlp") if re.search(_ROLES[role], kind)), role)


# ---- confirming an alias on a model


class _Unconfirmed(Exception):
    """The reason why an alias does not mean on this model what its definition says."""


class _PartRun(NamedTuple):
    """One run of a part of a block, in the order in which parts end."""

    role: str
    module: nn.Module
    inputs: dict[int | str, Any]
    """Its tensors of real numbers, by position or keyword."""
    output: Any
    runs: int
    """How often this part ran in the pass."""

    @property
    def is_flat(self) -> bool:
        """Whether its output lacks the borders of contexts: [tokens, width]."""
        return self.output.ndim == 2

    def reads(self, x: Tensor, run: _BlockRun) -> bool:
        """Return whether an argument equals x, up to rounding."""
        return any(run.is_equal(given, x) for given in self.inputs.values())


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


def _confirm(model: nn.Module, alias: str, number: str) -> dict[str, Site | str]:
    """Return the sites that an alias, and those found with it, mean in a block; or why not."""
    blocks = blocks_of(model)
    index = int(number) % len(blocks)
    block, following = blocks[index], blocks[index + 1] if index + 1 < len(blocks) else None
    stream = ("resid_pre", "resid_post")
    group = stream if alias in stream else ("attn_out", "mlp_out", "resid_mid")
    found: dict[str, Site | str] = {}
    try:
        run = _record_block(model, block, following)
        if alias in stream:
            return {
                f"{name}.{number}": Site(block, "in" if name == "resid_pre" else "out")
                for name in stream
            }
        sites, terms = _split_block(model, block, run)
    except _Unconfirmed as reason:
        return {f"{name}.{number}": str(reason) for name in group}
    for name in group:
        try:
            _check_change(model, block, name, sites, terms, run)
            found[f"{name}.{number}"] = sites[name]
        except _Unconfirmed as reason:
            found[f"{name}.{number}"] = str(reason)
    return found


def _record_block(model: nn.Module, block: nn.Module, following: nn.Module | None) -> _BlockRun:
    """Run a few tokens through the model; record what a block and its parts take and give."""
    ends: dict[str, list[Any]] = {"pre": [], "post": [], "next": []}
    parts: list[_PartRun] = []

    def record_part(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = {key: _copy(x) for key, x in _real_inputs(args, kwargs)}
            role = _role(name, module)
            parts.append(_PartRun(role, module, inputs, _copy(hidden_states(output)), 1))

        return hook

    with ExitStack() as hooks:
        recorded = [("pre", ModuleEnd(block, "in")), ("post", ModuleEnd(block, "out"))]
        if following is not None:
            recorded.append(("next", ModuleEnd(following, "in")))
        for name, end in recorded:
            hooks.enter_context(observed(end, functools.partial(_append_copy, ends[name])))
        for name, part in _named_parts(block):
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


def _named_parts(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a block's parts, and those of a part that is none of attention, mixer and MLP."""
    children = list(block.named_children())
    return children + [
        inner
        for name, part in children
        if _role(name, part) in ("", "norm")
        for inner in part.named_children()
    ]


def _real_inputs(args: Any, kwargs: Any) -> list[tuple[int | str, Tensor]]:
    """Return the tensors of real numbers among the arguments of a module."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return [(key, x) for key, x in named if isinstance(x, Tensor) and x.is_floating_point()]


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


def _split_block(
    model: nn.Module, block: nn.Module, run: _BlockRun
) -> tuple[dict[str, Site], list[Site]]:
    """Return the sites within a block, and all terms of what it adds to the stream."""
    candidates = _find_terms(run)
    terms = _find_sum(run, candidates)
    if terms is None:
        sites = _split_block_with_inner_stream(model, block, run, candidates)
        return sites, [sites["attn_out"], sites["mlp_out"]]
    entry = ModuleEnd(block, "in")

    def site(chosen: Sequence[tuple[_PartRun, float]], *more: tuple[ModuleEnd, float]) -> Site:
        ends = [(ModuleEnd(part.module, "out"), factor) for part, factor in chosen]
        is_flat = any(part.is_flat for part, _ in chosen)
        return _sum_site([*more, *ends])._replace(shaped_like=entry if is_flat else None)

    mlp = [(part, factor) for part, factor in terms if part.role == "mlp"]
    attention = [(part, factor) for part, factor in terms if part.role == "attention"]
    sites = {}
    if len(attention) == 1:
        sites["attn_out"] = site(attention)
    if mlp:
        sites["mlp_out"] = site(mlp)
        count = terms.index(mlp[0])  # of those that ran before
        before, behind = terms[:count], terms[count + len(mlp) :]
        if not behind and any(part.role in ("attention", "mixer") for part, _ in before):
            middle = run.pre + sum(factor * part.output.view_as(run.pre) for part, factor in before)
            sites["resid_mid"] = site(before, (entry, 1.0))._replace(
                reader=next((part.module for part in run.parts if part.reads(middle, run)), None)
            )
    return sites, [site([term]) for term in terms]


def _find_terms(run: _BlockRun) -> list[_PartRun]:
    """Return the parts that ran once and gave activations of the stream, perhaps without the
    borders of contexts, with their roles."""
    parts: list[_PartRun] = []
    for part in run.parts:
        if part.role in ("", "norm"):
            # What goes on with exactly the output of another part, as a norm may, has its role.
            made_by = (
                other.role
                for other in reversed(parts)
                if any(
                    x.shape == other.output.shape and torch.equal(x, other.output)
                    for x in part.inputs.values()
                )
            )
            part = part._replace(role=next(made_by, ""))
        if isinstance(part.output, Tensor) and part.output.is_floating_point():
            parts.append(part)
    width = run.post.shape[-1]
    flat = (run.post.numel() // width, width)
    return [
        part for part in parts if part.runs == 1 and part.output.shape in (run.post.shape, flat)
    ]


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
    columns = [(part.output.double().view_as(weight) * weight).flatten() for part in parts]
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
    model: nn.Module, block: nn.Module, run: _BlockRun, parts: list[_PartRun]
) -> dict[str, Site]:
    """Return the sites of a block whose MLP module adds the stream itself (MPT), and whose
    attention may too (BLOOM)."""
    ends = [part for part in parts if part.role == "mlp" and run.is_equal(part.output, run.post)]
    for attention in (part for part in parts if part.role == "attention" and not part.is_flat):
        for adds_stream in (False, True):
            middle = attention.output if adds_stream else run.pre + attention.output
            if (
                ends
                and _passes_on(model, run, ends[0], middle)
                and (not adds_stream or _passes_on(model, run, attention, run.pre))
            ):
                return _inner_stream_sites(
                    ModuleEnd(block, "in"),
                    ModuleEnd(attention.module, "out"),
                    ModuleEnd(ends[0].module, "out"),
                    adds_stream,
                )
    raise _Unconfirmed(
        "no outputs of its block's parts sum up to what the block adds to the residual stream"
    )


def _passes_on(model: nn.Module, run: _BlockRun, part: _PartRun, stream: Tensor) -> bool:
    """Return whether a part is given the stream in an argument of its own and adds it to its
    output: what is added to that argument alone is added to the output."""
    keys = [key for key, x in part.inputs.items() if run.is_equal(x, stream)]
    outputs: list[Any] = []
    shift = _shift(run)

    def change(module: nn.Module, args: Any, kwargs: Any) -> Any:
        shifted = {key: x + shift if key in keys else x for key, x in enumerate(args)}
        named = {key: x + shift if key in keys else x for key, x in kwargs.items()}
        return tuple(shifted.values()), named

    with ExitStack() as hooks:
        hooks.callback(part.module.register_forward_pre_hook(change, with_kwargs=True).remove)
        end = ModuleEnd(part.module, "out")
        hooks.enter_context(observed(end, functools.partial(_append_copy, outputs)))
        _run_probe(model)
    return len(keys) == 1 and run.is_equal(outputs[0] - shift, part.output)


def _shift(run: _BlockRun) -> Tensor:
    """Return a random vector [d], as large as the stream."""
    shift = torch.randn(run.post.shape[-1], generator=torch.Generator().manual_seed(0))
    return (shift * _rms(run.pre)).to(run.post)


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
    model: nn.Module,
    block: nn.Module,
    alias: str,
    sites: dict[str, Site],
    terms: list[Site],
    run: _BlockRun,
) -> None:
    """Raise unless a change at the alias arrives at the block's end, through the skip connection
    and through the MLP that reads it."""
    if alias not in sites:
        raise _Unconfirmed(
            f"its block has {' and '.join(sorted(sites))}, but no {alias}"
            if sites
            else "what its block adds to the residual stream is neither one attention's output nor "
            "an MLP's"
        )
    reads = {"post": Site(block, "out")} | {str(i): term for i, term in enumerate(terms)}
    reads |= {"mlp_out": sites["mlp_out"]} if "mlp_out" in sites else {}
    shift = _shift(run)
    before = _read_sites(model, reads)
    after = _read_sites(model, reads, sites[alias], lambda x: x + shift)
    moved = {name: after[name].double() - before[name].double() for name in reads}
    arrived = sum(moved[str(i)] for i in range(len(terms)))
    size = (
        before["post"].double().abs() + after["post"].double().abs() + run.pre.double().abs()
    ).clamp_min(1e-30)
    if _rms((moved["post"] - arrived) / size) > 4 * run.limit:
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
