"""What the verbs share that take any SAE: the flags that say which LM, site and text it is used on,
and how they are joined with what its metadata say."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ksparse.config import ActsConfig
from ksparse.errors import InputError
from ksparse.storage import hub
from ksparse.storage.hub import NEEDED
from ksparse.storage.run_folder import Judged, RunFolder, Subject

if TYPE_CHECKING:  # `ksparse --help` needs no torch
    from ksparse.lm.model import LM
    from ksparse.sae.model import SAE


@dataclass(frozen=True)
class SubjectArgs:
    """Flags that say what an SAE is used on, where its metadata do not."""

    lm: str = ""
    """LM, where the SAE does not name it: a name on the Hub, a folder, or pylm."""
    site: str = ""
    """Site, where the SAE does not name it: resid_post.8, or a module's name."""
    context: int = 0
    """Tokens per context; 0: as the SAE was trained, or 64."""
    bos: Literal["", "auto", "none"] = ""
    """Whether contexts begin with BOS (auto, none); by default as the SAE was trained."""
    subfolder: str = ""
    """Folder of the SAE inside a folder or a Hub repository."""
    revision: str = ""
    """Revision of a Hub repository."""

    @property
    def given(self) -> dict[str, Any]:
        """The keys of `acts` that were given, with their values."""
        from ksparse.interop.hook_names import from_hook

        keys = {"lm": self.lm, "site": from_hook(self.site), "context": self.context}
        return {key: value for key, value in (keys | {"bos": self.bos}).items() if value}

    @property
    def any_given(self) -> bool:
        """Whether one of these flags was given."""
        return bool(self.given or self.subfolder or self.revision)


class OpenSubject(NamedTuple):
    """An SAE, and what it is used on."""

    sae: SAE
    subject: Subject

    def load_lm(self, device: str) -> LM:
        """Load the LM at the site, and check that the SAE belongs there."""
        from ksparse.device import resolve_device
        from ksparse.lm import provenance
        from ksparse.lm.model import LM

        lm, judged = LM(acts=self.subject.acts, device=resolve_device(device)), self.subject.judged
        provenance.check(
            self.sae.metadata,
            lm,
            force=judged is not None and judged.forced,
            like=self.subject.acts,
        )
        return lm


def check_source(source: str) -> None:
    """Raise InputError for an SAE that is plainly a path here and is missing, before torch loads.

    Names of published SAEs have more parts than those of the Hub, and pass.
    """
    hub.check_not_missing(source, "the SAE", NEEDED, more_parts=True)


def open_subject(
    source: str, flags: SubjectArgs, *, text: str = "", force: bool = False, needs_text: bool = True
) -> OpenSubject:
    """Load an SAE of any format, and say what it is used on.

    Args:
        source: what `ksparse.load` takes.
        flags: what the user names.
        text: the text that the user names.
        force: use it where it was not trained.
        needs_text: whether a text must be known.

    Raises:
        InputError: LM, site or text is missing, naming the flags; or one contradicts the metadata.
    """
    from ksparse import interop
    from ksparse.lm import provenance
    from ksparse.sae.serialization import weights_sha256

    revision, subfolder = flags.revision or None, flags.subfolder
    folder, given = RunFolder(Path(source)), flags.given | ({"text": text} if text else {})
    sae = interop.load(source, revision=revision, subfolder=subfolder, device="cpu")
    if folder.is_judged():
        subject = folder.subject()
        acts = dataclasses.replace(subject.acts, **given)
        return OpenSubject(sae, dataclasses.replace(subject, acts=acts))
    # An LM that only runs on a prompt needs no text.
    asked = given if needs_text else {"text": ActsConfig.text} | given
    acts = provenance.acts_to_judge(source, sae.metadata, asked, force=force)
    shape, foreign = sae.shape, "origin" in sae.metadata
    local = Path(source).exists()
    judged = Judged(
        source=os.path.abspath(source) if local else source,
        local=local,
        subfolder=flags.subfolder,
        revision=flags.revision,
        format=interop.format_of(source, revision=revision, subfolder=subfolder),
        weights_sha256=weights_sha256(sae),
        step=sae.metadata.get("step"),
        held_out=not foreign and (sae.metadata.get("acts") or {}).get("text") == acts.text,
        forced=force,
    )
    chosen = shape.activation in ("topk", "batch_topk") or not foreign
    return OpenSubject(
        sae,
        Subject(
            acts=acts,
            n_latents=shape.n_latents,
            k=shape.k if chosen else None,
            activation=shape.activation,
            normalize=shape.normalize,
            d_model=shape.d_model,
            judged=judged,
        ),
    )


def place_subject(folder: RunFolder, subject: Subject) -> Subject:
    """Return a subject whose SAE is named relative to the folder of its results.

    Raises:
        InputError: results of something else are there.
    """
    folder.check_subject(subject)
    if folder.is_judged() or subject.judged is None or not subject.judged.local:
        return subject
    source = folder.relative_source(subject.judged.source)
    return dataclasses.replace(subject, judged=dataclasses.replace(subject.judged, source=source))


def name_place(source: str, sae: SAE, given: dict[str, str]) -> None:
    """Add LM and site to the metadata of an SAE that does not say them.

    Args:
        source: what the SAE was loaded from; a folder of results knows both.
        sae: the SAE.
        given: the LM and site that the user names, by key.

    Raises:
        InputError: the metadata name others.
    """
    from ksparse.lm.provenance import trained_on

    folder, known = RunFolder(Path(source)), trained_on(sae.metadata)
    if folder.is_judged():
        acts = folder.subject().acts
        given = {"lm": acts.lm, "site": acts.site} | given
    for key, value in given.items():
        if known.get(key, value) != value and not folder.is_judged():
            raise InputError(
                f"{source}: --{key} is {value!r}, but its metadata say {known[key]!r}; leave it out"
            )
    missing = {key: value for key, value in given.items() if key not in known}
    if missing:
        origin = sae.metadata.get("origin") or {"format": "unknown"}
        sae.metadata["origin"] = origin | missing


def refuse_for_a_run(source: str, flags: SubjectArgs) -> None:
    """Raise InputError where a run is to be judged on something else without a folder for it."""
    if RunFolder(Path(source)).exists() and (given := flags.given):
        raise InputError(
            f"{source} is a run, which keeps only results on its own LM, site and contexts; give a "
            f"folder for those with --{next(iter(given))}: --out DIR"
        )
