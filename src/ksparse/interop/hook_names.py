"""Names of the same site in ksparse, in TransformerLens (SAELens, Neuronpedia) and in transformers
(sparsify).

| ksparse | TransformerLens | transformers, module under the base model |
|---|---|---|
| resid_pre.8 | blocks.8.hook_resid_pre | h.8:in |
| resid_mid.8 | blocks.8.hook_resid_mid | |
| resid_post.8 | blocks.8.hook_resid_post | h.8, layers.8 |
| attn_out.8 | blocks.8.hook_attn_out | |
| mlp_out.8 | blocks.8.hook_mlp_out | |

Any other name is a module's name and is not translated. h.8.mlp is the module's output; a norm or a
factor may still change it before it is added to the residual stream as mlp_out.8.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

from ksparse.config import ActsConfig, from_dict
from ksparse.errors import InputError
from ksparse.sae.model import SAE
from ksparse.steering.hosts import from_hook as from_hook
from ksparse.steering.hosts import to_hook as to_hook


def from_module(name: str) -> str:
    """Return the site of a module's output, given its name under the base model."""
    block = re.fullmatch(r"(?:.*\.)?(?:h|layers)\.(\d+)", name)
    return f"resid_post.{block[1]}" if block else name


def hub_model_name(name: str) -> str:
    """Return the Hub name of a model, given TransformerLens' name."""
    if name in ("gpt2-small", "gpt2"):
        return "gpt2"
    for prefix, owner in (
        ("pythia-", "EleutherAI"),
        ("gemma-", "google"),
        ("gpt2-", "openai-community"),
    ):
        if name.startswith(prefix):
            return f"{owner}/{name}"
    return name


def layer_of(site: str) -> int | None:
    """Return the number of the block that a site's name contains; None if it contains none."""
    match = re.search(r"\.(\d+)(?:\.|:|$)", site)
    return int(match[1]) if match else None


def build_metadata(
    format_name: str,
    settings: dict[str, Any],
    *,
    lm: Any = None,
    site: Any = None,
    context: Any = None,
    bos: Any = None,
    text: Any = None,
) -> dict[str, Any]:
    """Build the metadata of an SAE made by another library.

    Args:
        format_name: name of the format.
        settings: the library's own settings, kept unchanged.
        lm: language model. This and the following come from `settings`; a value that a recipe's
            section `acts` would not accept is dropped.
        site: site, in ksparse's terms.
        context: tokens in a context.
        bos: whether contexts begin with BOS.
        text: text source.

    Returns:
        `origin`: {format, the accepted values, settings}; and `acts`, where LM, site and text are
        all known.
    """
    candidates = {
        "lm": lm,
        "site": site,
        "context": context,
        "text": text,
        "bos": ("none", "auto")[bos] if isinstance(bos, bool) else None,
    }
    accepted: dict[str, Any] = {}
    for key, value in candidates.items():
        try:
            accepted |= {key: getattr(from_dict({"acts": {key: value}}).acts, key)}
        except InputError:
            continue
    origin = {"format": format_name, **accepted, "settings": settings}
    if not {"lm", "site", "text"} <= set(accepted):
        return {"origin": origin}
    return {"origin": origin, "acts": dataclasses.asdict(ActsConfig(**accepted))}


def trained_without_special_tokens(sae: SAE) -> bool:
    """Return whether ksparse trained an SAE without BOS and separators; False for SAEs of other
    libraries, where it is unknown."""
    return (
        "origin" not in sae.metadata
        and (sae.metadata.get("policy") or sae.metadata.get("acts") or {}).get("keep") == "text"
    )


def original_settings(sae: SAE, format_name: str) -> dict[str, Any]:
    """Return a copy of the settings that an SAE was read with, to write it in the same format
    again; {} if it was not read from that format."""
    origin = sae.metadata.get("origin") or {}
    if origin.get("format") != format_name:
        return {}
    return copy.deepcopy(origin.get("settings") or {})


def get_table(settings: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the table under a key; {} where the value is missing or not a table."""
    value = settings.get(key)
    return value if isinstance(value, dict) else {}
