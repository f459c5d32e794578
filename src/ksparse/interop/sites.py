"""Names of the same place in a model: ours, TransformerLens' (SAELens, Neuronpedia), modules of transformers (sparsify).

| ours | TransformerLens | transformers, under the base model |
|---|---|---|
| resid_pre.8 | blocks.8.hook_resid_pre | h.8:in |
| resid_mid.8 | blocks.8.hook_resid_mid | |
| resid_post.8 | blocks.8.hook_resid_post | h.8, layers.8 |
| attn_out.8 | blocks.8.hook_attn_out | h.8.attn, layers.8.self_attn |
| mlp_out.8 | blocks.8.hook_mlp_out | h.8.mlp, layers.8.mlp |

A name that is in no row is a module's name, and stays what it is.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ksparse.recipe import Acts

_KINDS = "resid_pre|resid_mid|resid_post|attn_out|mlp_out"
_ATTENTION = "attn|self_attn|attention|self_attention"
_MLP = "mlp|feed_forward|ffn"


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
    module = re.fullmatch(rf"(?:.*\.)?(?:h|layers)\.(\d+)(?:\.(?:({_ATTENTION})|({_MLP})))?", name)
    if module is None:
        return name
    return f"{'attn_out' if module[2] else 'mlp_out' if module[3] else 'resid_post'}.{module[1]}"


def from_model(name: str) -> str:
    """Return the Hub's name of a model that TransformerLens calls otherwise."""
    if name in ("gpt2-small", "gpt2"):
        return "gpt2"
    for begin, owner in (("pythia-", "EleutherAI"), ("gemma-", "google"), ("gpt2-", "openai-community")):
        if name.startswith(begin):
            return f"{owner}/{name}"
    return name


def layer_of(site: str) -> int | None:
    """Return the number of the block that a site belongs to, if its name says so."""
    found = re.search(r"\.(\d+)(?:\.|:|$)", site)
    return int(found[1]) if found else None


def metadata(form: str, settings: dict[str, Any], *, lm: str | None = None, site: str | None = None, context: int | None = None,
             bos: bool | None = None, text: str | None = None) -> dict[str, Any]:
    """Return the metadata of an SAE that another library made: `origin`, and `acts` where LM, site and text are all known."""
    known = {"lm": lm, "site": site, "context": context, "text": text, "bos": None if bos is None else "auto" if bos else "none"}
    known = {key: value for key, value in known.items() if value is not None}
    origin = {"format": form, **known, "settings": settings}
    return {"origin": origin, "acts": dataclasses.asdict(Acts(**known))} if {"lm", "site", "text"} <= set(known) else {"origin": origin}
