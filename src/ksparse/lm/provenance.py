"""Whether an SAE is asked about what it was trained on: which LM, at which site, in which contexts
and positions.

    check(metadata, lm)          sentences that belong to every number; InputError where the LM
                                 contradicts what the SAE says of itself
    read_with(metadata, lm)      its own contexts and positions, unless the LM was opened with
                                 others
    describe(model)              what an SAE notes of the LM that it is trained on

What only refines is no contradiction: another text, more of it, the same LM under another name or
in another folder.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from ksparse.config import ActsConfig
from ksparse.errors import InputError
from ksparse.lm.loading import find_model
from ksparse.lm.model import LM
from ksparse.lm.sites import resolve

if TYPE_CHECKING:
    from ksparse.lm.loading import CausalLM

POLICY = ("context", "bos", "borders", "keep")
_log = logging.getLogger("ksparse")


def describe(model: CausalLM) -> dict[str, Any]:
    """Return what tells LMs of different architecture or size apart."""
    sizes = {
        name: getattr(model.config, name, None)
        for name in ("model_type", "num_hidden_layers", "hidden_size")
    }
    return {**sizes, "vocabulary": model.get_input_embeddings().weight.shape[0]}


def trained_on(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of `acts` that an SAE's metadata knows: all of one of ours, some of one that
    was converted, none."""
    known = metadata.get("acts") or metadata.get("origin") or {}
    return {
        each.name: known[each.name] for each in dataclasses.fields(ActsConfig) if each.name in known
    }


def own_acts(metadata: dict[str, Any], lm: LM) -> ActsConfig:
    """Return the text, contexts and positions that an SAE was trained with, on this LM at its site;
    what it does not say is as the LM was opened."""
    trained = trained_on(metadata)
    acts = (
        ActsConfig(**trained)
        if metadata.get("acts")
        else dataclasses.replace(
            lm.options, **{key: trained[key] for key in POLICY if key in trained}
        )
    )
    return dataclasses.replace(
        acts, lm=lm.options.lm, site=lm.options.site, lm_batch=lm.options.lm_batch
    )


def read_with(metadata: dict[str, Any], lm: LM) -> ActsConfig:
    """Return the same with the contexts and positions that the LM was opened with, which `check`
    has allowed."""
    return dataclasses.replace(own_acts(metadata, lm), **_asked(trained_on(metadata), lm))


def check(
    metadata: dict[str, Any], lm: LM, *, force: bool = False, like: ActsConfig | None = None
) -> list[str]:
    """Return what is to be said beside every number of this SAE on this LM; raise InputError for a
    contradiction, unless by force.

    like: contexts and positions that were asked for in place of its own; these are said, not
    refused.
    """
    trained = trained_on(metadata)
    if not trained:
        return [
            "the SAE does not say what it was trained on; nothing shows that it belongs to "
            f"{lm.options.lm} at {lm.options.site}"
        ]
    notes = _policy_notes(trained, dataclasses.asdict(like)) if like else []
    if _name(trained.get("lm", "")) not in ("", _name(lm.options.lm)):
        notes.append(
            f"the LM is {lm.options.lm!r}, the SAE was trained on {trained['lm']!r}; if these are "
            "not one LM under two names, its numbers mean nothing here"
        )
    wrong = [
        f"{what} is {asked!r}, but {own!r} where the SAE was trained"
        for what, asked, own in _contradictions(metadata, trained, lm, like is None)
    ]
    if wrong and not force:
        raise InputError(
            f"{'; '.join(wrong)}. Its numbers would be of something that it was not made for: give "
            "its own, or insist with force=True (--force True)"
        )
    notes += [f"by force: {each}" for each in wrong]
    notes += _longer(trained, _asked(trained, lm))
    for note in notes:
        _log.warning("%s", note)
    return notes


def _contradictions(
    metadata: dict[str, Any], trained: dict[str, Any], lm: LM, policy: bool
) -> list[tuple[str, Any, Any]]:
    """Return (what, asked, trained with) for each."""
    found = (
        [(key, value, trained[key]) for key, value in _asked(trained, lm).items()] if policy else []
    )
    if "site" in trained and not same_site(lm.model, lm.options.site, trained["site"]):
        found.append(("site", lm.options.site, trained["site"]))
    if "tokenizer" in trained and trained["tokenizer"] != lm.options.tokenizer:
        found.append(("tokenizer", lm.options.tokenizer, trained["tokenizer"]))
    if lm.folder is None and trained.get("revision", lm.options.revision) != lm.options.revision:
        found.append(("revision", lm.options.revision, trained["revision"]))
    own, here = metadata.get("subject") or {}, describe(lm.model)
    return found + [
        (f"the LM's {key}", here[key], own[key])
        for key in here
        if key in own and own[key] != here[key]
    ]


def _asked(trained: dict[str, Any], lm: LM) -> dict[str, Any]:
    """Return the contexts and positions that the LM was opened with, where they are neither the
    default nor the SAE's."""
    asked = {
        key: getattr(lm.options, key)
        for key in POLICY
        if getattr(lm.options, key) != getattr(ActsConfig(), key)
    }
    if lm.tokenizer.bos_token_id is None:
        asked.pop("bos", None)
    return {key: value for key, value in asked.items() if trained.get(key, value) != value}


def _policy_notes(trained: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    unlike = {key: asked[key] for key in POLICY if trained.get(key, asked[key]) != asked[key]}
    return [
        f"{key} is {value!r}, as asked, but {trained[key]!r} where the SAE was trained"
        for key, value in unlike.items()
    ] + _longer(trained, unlike)


def _longer(trained: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    own, context = trained.get("context"), asked.get("context")
    return (
        [
            f"contexts of {context} tokens are longer than the {own} that the SAE was trained on; "
            "it never saw such positions"
        ]
        if own and context and context > own
        else []
    )


def same_site(model: nn.Module, asked: str, own: str) -> bool:
    """Return whether two names are of one place in the model."""
    try:
        return asked == own or resolve(model, asked) == resolve(model, own)
    except InputError:  # the LM has no such site
        return False


def _name(lm: str) -> str:
    """Return what an LM is called wherever it lies: the last part of its name or folder."""
    name = find_model(lm) if lm == "pylm" else lm
    return name.rstrip("/").rpartition("/")[2].lower()
