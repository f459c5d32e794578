"""Models as other libraries wrap them: what is hooked, and their names of a site.

| library | object | its own names of a site, beside ksparse's |
|---|---|---|
| transformers | the model | the name of a module |
| TransformerLens 3 | HookedTransformer; its hook points are modules | blocks.8.hook_resid_post |
| TransformerLens 4 | TransformerBridge; `hook_dict` has hook points by all names | the same |
| nnsight | LanguageModel, which is no module but holds one, `_module` | model.layers.8.output |
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from ksparse.errors import InputError
from ksparse.lm.hooks import Site
from ksparse.lm.sites import resolve

_HOOKS = "resid_pre|resid_mid|resid_post|attn_out|mlp_out"


def to_hook(site: str) -> str:
    """Return TransformerLens' name of a site; any other name as it is."""
    alias = re.fullmatch(rf"({_HOOKS})\.(\d+)", site)
    return f"blocks.{alias[2]}.hook_{alias[1]}" if alias else site


def from_hook(name: str) -> str:
    """Return the site of a TransformerLens hook name; any other name as it is."""
    hook = re.fullmatch(rf"blocks\.(\d+)\.hook_({_HOOKS})", name)
    return f"{hook[2]}.{hook[1]}" if hook else name


def torch_module(model: object) -> nn.Module:
    """Return the module that a model is, or that nnsight's object holds.

    Raises:
        InputError: there is none, or its weights are not loaded yet.
    """
    if isinstance(model, nn.Module):
        return model
    module = getattr(model, "_module", None)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"an SAE is attached to a torch module, got {type(model).__name__}; of a ksparse.LM, "
            "give lm.model"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise InputError(
            f"the weights of this {type(model).__name__} are not loaded yet, and loading them "
            "makes another module; load it with dispatch=True before an SAE is attached"
        )
    return module


def find_site(model: nn.Module, site: str) -> Site:
    """Find a site in a model, by ksparse's name or by that of the library that made the model.

    Raises:
        InputError: as `ksparse.lm.sites.resolve`.
    """
    hooks = getattr(model, "hook_dict", None)
    if not isinstance(hooks, Mapping):
        return resolve(model, _from_nnsight(model, site))
    name = to_hook(site) if site.startswith("resid_") else site
    if isinstance(hook := hooks.get(name), nn.Module):
        return Site(hook, "out")
    if (name := to_hook(site)) in hooks:
        raise InputError(
            f"site {site!r} is what is added to the residual stream; {name} of this "
            f"{type(model).__name__} may be another place, before a norm or a factor. Give "
            f"{name!r} where it is the same"
        )
    return resolve(model, site)


def _from_nnsight(model: nn.Module, name: str) -> str:
    """Return ksparse's name of nnsight's `model.layers[8].output`, or of the path of a part, which
    begins with the name of the whole; any other name as it is."""
    plain = re.sub(r"\[(\d+)\]", r".\1", name)
    value = re.fullmatch(r"(.+)\.(input|output)", plain)
    if value is not None:
        plain = value[1] + (":in" if value[2] == "input" else "")
    whole, _, part = plain.partition(".")
    if whole == "model" and not _has_module(model, plain) and _has_module(model, part):
        return part
    return name if _has_module(model, name) else plain


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name.partition(":")[0])
    except AttributeError:
        return False
    return True
