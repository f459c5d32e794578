"""Check that an SAE is used on the LM, site, contexts and positions it was trained on.

- `check(metadata, lm)` returns notes that belong beside every number, and raises InputError where
  the LM contradicts what the SAE's metadata says.
- `acts_to_read(metadata, lm)` returns the contexts and positions to evaluate it with.
- `acts_to_judge(name, metadata, given)` returns the LM, site and text to judge it on, from what its
  metadata says and what the caller adds.
- `describe(model)` returns what an SAE records about the LM it is trained on.

What the metadata does not fix is no contradiction: another text, more of it, or the same LM under
another name or in another folder.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ksparse.config import ActsConfig
from ksparse.errors import InputError
from ksparse.lm.chat import digest_of
from ksparse.lm.hooks import Site
from ksparse.lm.loading import find_model
from ksparse.lm.model import LM
from ksparse.lm.sites import resolve

if TYPE_CHECKING:
    from ksparse.lm.loading import CausalLM

POLICY = (
    *("context", "bos", "borders", "keep", "shuffle_tokens"),
    *("chat", "roles", "pretokenized"),
)
"""Keys of `acts` that decide which contexts and positions are read."""
_log = logging.getLogger("ksparse")


def describe_lm(model: CausalLM) -> dict[str, Any]:
    """Return what distinguishes LMs of different architecture or size."""
    sizes = {
        name: getattr(model.config, name, None)
        for name in ("model_type", "num_hidden_layers", "hidden_size")
    }
    return {**sizes, "vocabulary": model.get_input_embeddings().weight.shape[0]}


def trained_on(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of `acts` that an SAE's metadata gives: all for our own, those that its file
    names for an SAE of another library, and what was said of activations that anybody made."""
    known = metadata.get("origin") or metadata.get("acts") or {}
    if made_by_others(metadata):
        known = {key: known[key] for key in ("lm", "site", "normalize") if known.get(key)}
    names = [field.name for field in dataclasses.fields(ActsConfig)]
    trained = {name: known[name] for name in names if name in known}
    return trained | ({"roles": tuple(trained["roles"])} if "roles" in trained else {})


def made_by_others(metadata: dict[str, Any]) -> bool:
    """Return whether an SAE was trained on tensors that anybody made, of which no LM and text need
    be known."""
    return bool((metadata.get("policy") or {}).get("tensors"))


def trained_acts(metadata: dict[str, Any], lm: LM) -> ActsConfig:
    """Return the text, contexts and positions an SAE was trained with, for this LM at its site.

    What the metadata does not say is taken from the options the LM was opened with.
    """
    trained = trained_on(metadata)
    acts = (
        ActsConfig(**(metadata["acts"] | trained))
        if metadata.get("acts") and not made_by_others(metadata)
        else dataclasses.replace(
            lm.options, **{key: trained[key] for key in POLICY if key in trained}
        )
    )
    lm_dtype = lm.options.lm_dtype if acts.lm_dtype == "auto" else acts.lm_dtype
    return dataclasses.replace(
        acts,
        lm=lm.options.lm,
        site=lm.options.site,
        lm_batch=lm.options.lm_batch,
        lm_dtype=lm_dtype,
    )


def acts_to_read(metadata: dict[str, Any], lm: LM) -> ActsConfig:
    """Return `own_acts`, with the contexts and positions that the LM was explicitly opened with;
    `check` has allowed these."""
    return dataclasses.replace(trained_acts(metadata, lm), **_overrides(trained_on(metadata), lm))


def acts_to_judge(
    name: str, metadata: dict[str, Any], given: Mapping[str, Any], *, force: bool = False
) -> ActsConfig:
    """Return the LM, site, text, contexts and positions to judge an SAE on.

    What its metadata does not say must be given. `check` compares the LM and the site once the LM
    is loaded.

    Args:
        name: the SAE, for messages.
        metadata: its metadata.
        given: keys of `acts` with the values that the caller names.
        force: read other contexts and positions than those of training.

    Raises:
        InputError: LM, site or text is not known, naming all that are missing; or contexts or
            positions are given that contradict the metadata.

    Example:
        >>> from ksparse.lm import provenance
        >>> origin = {"format": "sparsify", "site": "resid_post.8", "context": 128}
        >>> acts = provenance.acts_to_judge("its", {"origin": origin}, {"lm": "gpt2", "text": "a/"})
        >>> acts.lm, acts.site, acts.context
        ('gpt2', 'resid_post.8', 128)
        >>> provenance.acts_to_judge("its", {"origin": origin}, {"site": "resid_post.8"})
        Traceback (most recent call last):
        ksparse.errors.InputError: its does not say its lm and text; give --lm and --text
    """
    trained = trained_on(metadata)
    missing = [key for key in ("lm", "site", "text") if not (given.get(key) or trained.get(key))]
    if missing:
        raise InputError(
            f"{name} does not say its {_list(missing)}; give "
            f"{_list([f'--{key}' for key in missing])}"
        )
    different = {
        key: value
        for key, value in given.items()
        if key in POLICY and trained.get(key, value) != value
    }
    if different and not force:
        words = "; ".join(
            f"--{key} is {value!r}, but {trained[key]!r} where it was trained"
            for key, value in different.items()
        )
        raise InputError(
            f"{name}: {words}. The numbers would describe something the SAE was not made for: "
            "leave it out, or insist with --force True"
        )
    if given.get("lm", trained.get("lm")) != trained.get("lm"):
        trained.pop("revision", None)  # of the other LM
    return ActsConfig(**(trained | dict(given)))


def _list(words: list[str]) -> str:
    """Return words as "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def check(
    metadata: dict[str, Any], lm: LM, *, force: bool = False, like: ActsConfig | None = None
) -> list[str]:
    """Compare an SAE's metadata with an LM, its site and its options.

    Args:
        metadata: The SAE's metadata.
        lm: The LM it is used on.
        force: Return contradictions as notes instead of raising.
        like: Contexts and positions requested in place of the SAE's own; differences become notes.

    Returns:
        Sentences that belong beside every number of this SAE on this LM; they are also logged.

    Raises:
        InputError: The LM contradicts the metadata, and `force` is False.
    """
    trained = trained_on(metadata)
    if not trained:
        return [
            "the SAE does not say what it was trained on; nothing shows that it belongs to "
            f"{lm.options.lm} at {lm.options.site}"
        ]
    notes = _policy_notes(trained, dataclasses.asdict(like)) if like else []
    if lm.folder is not None and _is_another(trained, lm):
        notes.append(
            f"the LM is {lm.options.lm!r}, the SAE was trained on {trained['lm']!r}; if these are "
            "not one LM under two names, its numbers mean nothing here"
        )
    contradictions = [
        f"{what} is {value!r}, but {trained_value!r} where the SAE was trained"
        for what, value, trained_value in _contradictions(metadata, trained, lm, like is None)
    ]
    if contradictions and not force:
        raise InputError(
            f"{'; '.join(contradictions)}. The numbers would describe something the SAE was not "
            "made for: use its own, or insist with force=True (--force True)"
        )
    notes += [f"by force: {contradiction}" for contradiction in contradictions]
    notes += _length_notes(trained, _overrides(trained, lm))
    for note in notes:
        _log.warning("%s", note)
    return notes


def _contradictions(
    metadata: dict[str, Any], trained: dict[str, Any], lm: LM, with_policy: bool
) -> list[tuple[str, Any, Any]]:
    """Return (what, value here, value in training) of each contradiction."""
    pairs = _overrides(trained, lm).items() if with_policy else ()
    result = [(key, value, trained[key]) for key, value in pairs]
    if lm.folder is None and _is_another(trained, lm):  # a folder may have any name
        result.append(("lm", lm.options.lm, trained["lm"]))
    if "site" in trained and not same_site(lm.model, lm.options.site, trained["site"]):
        result.append(("site", lm.options.site, trained["site"]))
    if "tokenizer" in trained and trained["tokenizer"] != lm.options.tokenizer:
        result.append(("tokenizer", lm.options.tokenizer, trained["tokenizer"]))
    if lm.folder is None and trained.get("revision", lm.options.revision) != lm.options.revision:
        result.append(("revision", lm.options.revision, trained["revision"]))
    result += _other_weights(trained, lm) + _other_template(metadata, lm)
    recorded, actual = metadata.get("subject") or {}, describe_lm(lm.model)
    return result + [
        (f"the LM's {key}", actual[key], recorded[key])
        for key in actual
        if key in recorded and recorded[key] != actual[key]
    ]


def _other_weights(trained: dict[str, Any], lm: LM) -> list[tuple[str, Any, Any]]:
    """Return the contradiction if one of the LMs has its weights drawn anew and the other not."""
    weights = trained.get("lm_weights", ActsConfig.lm_weights)
    here = lm.options.lm_weights
    return [("lm_weights", here, weights)] if weights != here else []


def _other_template(metadata: dict[str, Any], lm: LM) -> list[tuple[str, Any, Any]]:
    """Return the contradiction if conversations were rendered by another template than the LM's."""
    trained = (metadata.get("policy") or {}).get("chat_template")
    here = digest_of(lm.tokenizer.chat_template)
    return [("the chat template", here, trained)] if trained not in (None, here) else []


def _overrides(trained: dict[str, Any], lm: LM) -> dict[str, Any]:
    """Return the policy keys the LM was opened with that are neither the default nor the SAE's."""
    options = {
        key: getattr(lm.options, key)
        for key in POLICY
        if getattr(lm.options, key) != getattr(ActsConfig(), key)
    }
    if lm.tokenizer.bos_token_id is None:
        options.pop("bos", None)
    return {key: value for key, value in options.items() if trained.get(key, value) != value}


def _policy_notes(trained: dict[str, Any], requested: dict[str, Any]) -> list[str]:
    different = {
        key: requested[key] for key in POLICY if trained.get(key, requested[key]) != requested[key]
    }
    return [
        f"{key} is {value!r}, as asked, but {trained[key]!r} where the SAE was trained"
        for key, value in different.items()
    ] + _length_notes(trained, different)


def _length_notes(trained: dict[str, Any], requested: dict[str, Any]) -> list[str]:
    length, context = trained.get("context"), requested.get("context")
    if not (length and context and context > length):
        return []
    return [
        f"contexts of {context} tokens are longer than the {length} that the SAE was trained on; "
        "it never saw such positions"
    ]


def _is_another(trained: dict[str, Any], lm: LM) -> bool:
    """Return whether the LM has another name than the one that the SAE was trained on."""
    return short_name(trained.get("lm", "")) not in ("", short_name(lm.options.lm))


def same_site(
    model: nn.Module, site: str, other: str, *, find: Callable[[nn.Module, str], Site] = resolve
) -> bool:
    """Return whether two names, which `find` looks up, mean the same place in a model."""
    try:
        return site == other or find(model, site) == find(model, other)
    except InputError:  # the LM has no such site
        return False


def short_name(lm: str) -> str:
    """Return the last part of an LM's name or folder, in lower case."""
    name = find_model(lm) if lm == "pylm" else lm
    return name.rstrip("/").rpartition("/")[2].lower()
