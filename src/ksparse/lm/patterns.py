"""Several sites by a list or a pattern: `resid_post.*`, `mlp_out.[1-3]`, `model.layers.*.mlp:in`.

A pattern is compared part by part between dots, so that `*` stands for one part. Aliases and
modules' names are found on a model without weights; the loaded LM confirms each of them.
"""

from __future__ import annotations

import fnmatch
import logging

from torch import nn

from ksparse.config import SEVERAL_SITES, ActsConfig
from ksparse.errors import InputError
from ksparse.lm.hooks import ModuleEnd
from ksparse.lm.loading import find_model, loading_options, read_config, without_weights
from ksparse.lm.sites import ALIASES, blocks_of, describe_sites, outline
from ksparse.trust import code_is_trusted

_log = logging.getLogger("ksparse")


def is_pattern(site: str) -> bool:
    """Return whether a name of `acts.site_patterns` is a pattern, and not one site.

    Example:
        >>> is_pattern("resid_post.*"), is_pattern("resid_post.3")
        (True, False)
    """
    return any(letter in site for letter in SEVERAL_SITES)


def sites_of(acts: ActsConfig) -> list[str]:
    """Return the sites that `acts.site` names, in the order of the list and, for a pattern, of the
    LM; only the LM's config is read.

    Raises:
        InputError: the LM's config cannot be read, or a name or pattern has no site.

    Example:
        >>> sites_of(ActsConfig(lm="pylm/0.3m", site=["resid_post.*", "mlp_out.0"]))
        ['resid_post.0', 'resid_post.1', 'resid_post.2', 'resid_post.3', 'mlp_out.0']
    """
    if not acts.names_several_sites:
        return [acts.site]
    source, options = find_model(acts.lm), loading_options(acts, code_is_trusted())
    model = without_weights(read_config(source, options), source, options)
    return expand(model, acts.site_patterns)


def expand(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Return the sites that names and patterns stand for on a model, each once.

    Raises:
        InputError: a name or pattern has no site; the message lists the sites.
    """
    if not patterns:
        raise InputError(f"acts.site names no site; there are\n{describe_sites(model)}")
    found: dict[object, str] = {}
    for pattern in patterns:
        names = _matching(model, pattern) if is_pattern(pattern) else [pattern]
        if not names:
            raise InputError(
                f"no site matches {pattern!r}, of acts.site; there are\n{describe_sites(model)}"
            )
        for name in names:
            key = _key(model, name)
            if key in found:
                _log.warning("acts.site names %s more than once; it is taken once", found[key])
            found.setdefault(key, name)
    return list(found.values())


def _matching(model: nn.Module, pattern: str) -> list[str]:
    """Return the aliases that a pattern matches, or if there are none the modules' names."""
    blocks = range(len(blocks_of(model)))
    aliases = [f"{alias}.{number}" for number in blocks for alias in ALIASES]
    if named := [site for site in aliases if _matches(site, pattern) and _exists(model, site)]:
        return named
    pattern, colon, end = pattern.partition(":")
    base = f"{getattr(model, 'base_model_prefix', '')}."  # names may also begin at the base model
    return [
        f"{name}{colon}{end}"
        for name, _ in model.named_modules()
        if name and (_matches(name, pattern) or _matches(name, f"{base}{pattern}"))
    ]


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _exists(model: nn.Module, site: str) -> bool:
    try:
        outline(model, site)
    except InputError:
        return False
    return True


def _key(model: nn.Module, site: str) -> object:
    """Return what two names of one site have in common: `resid_post.-1` is that of the last
    block.

    Raises:
        InputError: there is no such site.
    """
    end: ModuleEnd = outline(model, site)
    alias, _, number = site.partition(".")
    if alias in ALIASES:
        return alias, int(number) % len(blocks_of(model))
    return id(end.module), end.at
