"""Names of the same place in a model: ours, TransformerLens' (SAELens, Neuronpedia), modules of
transformers (sparsify).

| ours | TransformerLens | transformers, under the base model |
|---|---|---|
| resid_pre.8 | blocks.8.hook_resid_pre | h.8:in |
| resid_mid.8 | blocks.8.hook_resid_mid | |
| resid_post.8 | blocks.8.hook_resid_post | h.8, layers.8 |
| attn_out.8 | blocks.8.hook_attn_out | |
| mlp_out.8 | blocks.8.hook_mlp_out | |

A name that is in no row is a module's name, and stays what it is: h.8.mlp is what the module gives,
which a norm or a factor may still change before it is added to the stream as mlp_out.8.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

from ksparse.config import ActsConfig, from_dict
from ksparse.errors import InputError
from ksparse.sae.model import SAE

_KINDS = "resid_pre|resid_mid|resid_post|attn_out|mlp_out"


def to_hook(site: str) -> str:
    """Return TransformerLens' name of a site."""
    alias = re.fullmatch(rf"({_KINDS})\.(\d+)", site)
    return f"blocks.{alias[2]}.hook_{alias[1]}" if alias else site


def from_hook(name: str) -> str:
    """Return the site of a TransformerLens name."""
    hook = re.fullmatch(rf"blocks\.(\d+)\.hook_({_KINDS})", name)
    return f"{hook[2]}.{hook[1]}" if hook else name


def from_module(name: str) -> str:
    """Return the site of the output of a module, named from the base model on."""
    block = re.fullmatch(r"(?:.*\.)?(?:h|layers)\.(\d+)", name)
    return f"resid_post.{block[1]}" if block else name


def from_model(name: str) -> str:
    """Return the Hub's name of a model that TransformerLens calls otherwise."""
    if name in ("gpt2-small", "gpt2"):
        return "gpt2"
    for begin, owner in (
        ("pythia-", "EleutherAI"),
        ("gemma-", "google"),
        ("gpt2-", "openai-community"),
    ):
        if name.startswith(begin):
            return f"{owner}/{name}"
    return name


def layer_of(site: str) -> int | None:
    """Return the number of the block that a site belongs to, if its name says so."""
    found = re.search(r"\.(\d+)(?:\.|:|$)", site)
    return int(found[1]) if found else None


def metadata(
    form: str,
    settings: dict[str, Any],
    *,
    lm: Any = None,
    site: Any = None,
    context: Any = None,
    bos: Any = None,
    text: Any = None,
) -> dict[str, Any]:
    """Return the metadata of an SAE that another library made: `origin`, and `acts` where LM, site
    and text are all known.

    What is not of its type is not known; `settings` has it as it is.
    """
    said = {
        "lm": lm,
        "site": site,
        "context": context,
        "text": text,
        "bos": ("none", "auto")[bos] if isinstance(bos, bool) else None,
    }
    known: dict[str, Any] = {}
    for key, value in said.items():
        try:
            known |= {key: getattr(from_dict({"acts": {key: value}}).acts, key)}
        except InputError:
            continue
    origin = {"format": form, **known, "settings": settings}
    return (
        {"origin": origin, "acts": dataclasses.asdict(ActsConfig(**known))}
        if {"lm", "site", "text"} <= set(known)
        else {"origin": origin}
    )


def trained_without_special_tokens(sae: SAE) -> bool:
    """Return whether ksparse trained an SAE, and left BOS and separators out; of others' it is not
    known.
    """
    return (
        "origin" not in sae.metadata
        and (sae.metadata.get("policy") or sae.metadata.get("acts") or {}).get("keep") == "text"
    )


def carried(sae: SAE, form: str) -> dict[str, Any]:
    """Return the settings that an SAE came with in a format, for writing it in the same one again;
    {} if it came otherwise.
    """
    origin = sae.metadata.get("origin") or {}
    return copy.deepcopy(origin.get("settings") or {}) if origin.get("format") == form else {}


def table(settings: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a table in settings; {} where there is none."""
    found = settings.get(key)
    return found if isinstance(found, dict) else {}
