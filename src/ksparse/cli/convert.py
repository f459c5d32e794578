"""Verbs that exchange SAEs with other libraries and the Hub: convert, push."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ksparse.cli.arguments import parse, split_folder, verb
from ksparse.cli.subjects import check_source, name_place
from ksparse.config import ActsConfig, from_dict
from ksparse.errors import InputError, unknown
from ksparse.storage.run_folder import open_run

VIEWER_FORMATS = ("neuronpedia", "sae_dashboard", "atoms")


@dataclass(frozen=True)
class ConvertArgs:
    """Options of `ksparse convert`."""

    to: str
    """Format to write: sae_lens, sparsify, dictionary_learning, openai, gemma_scope, llamascopium
    or ksparse. For an evaluated run, or a folder of `ksparse eval SAE --out`, also the data of
    viewers: neuronpedia, sae_dashboard or atoms."""
    subfolder: str = ""
    """Folder of the SAE inside SRC."""
    revision: str = ""
    """Revision of a Hub repository."""
    normalization: Literal["exact", "layer_norm", "outside"] = "exact"
    """What to do with a normalization that the format does not have. exact: refuse, unless it can
    be folded into the weights. layer_norm: also write unit_norm as layer_norm, which differs by
    about 1e-5 / standard deviation of the activation. outside: leave it to the user of the SAE."""
    fold: bool = False
    """For a format that lacks the SAE's normalization: write the nearest SAE that it holds, and
    measure the difference on held-out activations of the LM."""
    lm: str = ""
    """The LM, where the SAE does not name it."""
    site: str = ""
    """The site, where the SAE does not name it."""
    text: str = ""
    """fold: the text, where the SAE does not name it."""
    model: str = ""
    """neuronpedia, sae_dashboard: Neuronpedia's name of the LM."""
    set: str = "ksparse"
    """neuronpedia, sae_dashboard: name of the source set, without the layer."""
    release: str = ""
    """neuronpedia: name of the release."""
    creator: str = ""
    """neuronpedia: who made it, as shown."""
    creator_id: str = "clkht01d40000jv08hvalcvly"
    """neuronpedia: id of the Neuronpedia user to whom the rows belong; by default that of its own
    exports, which every Neuronpedia database has."""
    url: str = ""
    """neuronpedia: where to read about it."""
    repository: str = ""
    """neuronpedia: Hub repository that holds the weights."""


@verb
def convert(arguments: list[str]) -> None:
    """convert SRC DST --to FORMAT

    Convert an SAE between formats, or write the data of a run for a viewer.
    """
    source, flags = split_folder(
        "convert",
        arguments,
        "an SAE: a run, a folder of any format, or a Hub repository; and a new folder",
    )
    folder, flags = (
        split_folder("convert", flags, "a new folder, after the SAE") if source else ("", flags)
    )
    args = parse(ConvertArgs, "convert SRC DST", flags)
    _check_fold(args)
    check_source(source)
    if args.to in VIEWER_FORMATS:
        print(f"{args.to} {folder}: {_export(source, Path(folder), args):,} latents")
        return
    from ksparse import interop
    from ksparse.interop import foreign, hook_names

    if args.fold:
        print(_fold(source, Path(folder), args))
        return
    foreign.check_new_folder(folder)
    sae = interop.load(
        source, revision=args.revision or None, subfolder=args.subfolder, device="cpu"
    )
    place = {"lm": args.lm, "site": hook_names.from_hook(args.site)}
    name_place(source, sae, {key: value for key, value in place.items() if value})
    interop.write(sae, folder, args.to, normalization=args.normalization)
    sae = interop.load(folder, device="cpu")
    print(
        f"{args.to} {folder}: {sae.shape.n_latents:,} latents, {sae.shape.activation}, "
        f"normalisation {sae.shape.normalize}"
    )


def _check_fold(args: ConvertArgs) -> None:
    if args.fold and args.normalization != "exact":
        raise InputError(
            f"--fold and --normalization {args.normalization} are two ways to write another "
            "normalisation; give one of them"
        )
    if args.fold and args.to in ("ksparse", *VIEWER_FORMATS):
        raise InputError(
            f"--fold is for a format that lacks the SAE's normalisation; {args.to} does not"
        )
    if args.text and not args.fold:
        raise InputError("--text is only used with --fold, which runs the LM")


def _fold(source: str, folder: Path, args: ConvertArgs) -> str:
    """Write the nearest SAE that a format holds; return what was measured, as lines."""
    from ksparse import interop
    from ksparse.device import resolve_device
    from ksparse.interop import folding, foreign
    from ksparse.lm.model import LM

    foreign.check_new_folder(folder)
    if args.to not in interop.FORMATS:
        raise unknown("there is no format", args.to, ["ksparse", *interop.FORMATS])
    sae = interop.load(
        source, revision=args.revision or None, subfolder=args.subfolder, device="cpu"
    )
    known = sae.metadata.get("acts") or sae.metadata.get("origin") or {}
    given = {key: getattr(args, key) for key in ("lm", "site", "text") if getattr(args, key)}
    if missing := [key for key in ("lm", "site") if not (known | given).get(key)]:
        raise InputError(
            f"{source} does not name its {missing[0]}, whose activations --fold measures on; give "
            f"--{missing[0]}"
        )
    fields = {field.name for field in dataclasses.fields(ActsConfig)}
    acts = {key: value for key, value in known.items() if key in fields} | given
    lm = LM(acts=from_dict({"acts": acts}).acts, device=resolve_device("auto"))
    folded = folding.fold_into(sae, args.to, interop.FORMATS[args.to], lm)
    interop.write(folded, folder, args.to)
    measured = folded.metadata["fold"]
    return (
        f"{args.to} {folder}: {sae.shape.n_latents:,} latents, {folded.shape.activation}, "
        f"normalisation {measured['from']} as {measured['to']}\n"
        f"on {measured['tokens']:,} held-out activations:\n"
        f"  normalised MSE        {measured['nmse']['before']:.4f} before, "
        f"{measured['nmse']['after']:.4f} after\n"
        f"  the same latents on   {measured['equal_supports']:.1%} of activations\n"
        f"  shared active latents {measured['shared_latents']:.1%}"
    )


def _export(source: str, folder: Path, args: ConvertArgs) -> int:
    """Write the data of a run for a viewer; return the number of latents."""
    from ksparse.interop import neuronpedia, openai_viewer

    run = open_run(source)
    if args.to == "atoms":
        return openai_viewer.export(run, folder)
    publication = neuronpedia.Publication(
        **{
            field.name: getattr(args, field.name)
            for field in dataclasses.fields(neuronpedia.Publication)
        }
    )
    export = neuronpedia.export_bulk if args.to == "neuronpedia" else neuronpedia.export_dashboard
    return export(run, folder, publication)


@verb
def push(arguments: list[str]) -> None:
    """push RUN OWNER/NAME [--key value …]

    Upload an SAE to the Hub, with a model card and a copy for SAELens.
    """

    @dataclass(frozen=True)
    class PushArgs:
        """Options of `ksparse push`."""

        subfolder: str = ""
        """Folder in the repository, if it holds several SAEs."""
        visibility: Literal["public", "private"] = "public"
        """Visibility of a repository that does not exist yet."""
        folder: str = ""
        """Write the repository to this folder, and upload nothing."""
        normalization: Literal["exact", "layer_norm", "outside"] = "exact"
        """For the copy for SAELens, as in `ksparse convert`."""

    source, flags = split_folder(
        "push", arguments, "an SAE, such as runs/demo; and the name of a repository"
    )
    repository, flags = (
        split_folder(
            "push", flags, "the name of a repository on the Hub, OWNER/NAME, after the SAE"
        )
        if source
        else ("", flags)
    )
    args = parse(PushArgs, "push RUN OWNER/NAME", flags)
    from ksparse.interop import hub

    if args.folder:
        folder = hub.prepare(
            source,
            args.folder,
            repository,
            subfolder=args.subfolder,
            normalization=args.normalization,
        )
        print(f"folder   {folder}")
    else:
        address = hub.push(
            source,
            repository,
            subfolder=args.subfolder,
            private=args.visibility == "private",
            normalization=args.normalization,
        )
        print(f"hub      {address}")
