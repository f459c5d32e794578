"""convert, push: other libraries, and the Hub."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ksparse.cli.arguments import parse, take_folder, verb
from ksparse.storage.run_folder import open_run


@dataclass(frozen=True)
class ConvertArgs:
    to: str
    """sae_lens, sparsify, dictionary_learning, openai, gemma_scope, llamascopium or ksparse; of an
    evaluated run also what viewers show: neuronpedia, sae_dashboard, atoms."""
    subfolder: str = ""
    """Folder of the SAE in SRC."""
    revision: str = ""
    """Revision of a Hub repository."""
    normalization: Literal["exact", "layer_norm", "outside"] = "exact"
    """What to do with a normalisation that the format has not. exact: refuse, unless it can go into
    the weights. layer_norm: also take that for unit_norm, which differs by about 1e-5 / deviation
    of the activation. outside: leave it to whoever uses the SAE."""
    model: str = ""
    """neuronpedia, sae_dashboard: Neuronpedia's name of the LM."""
    set: str = "ksparse"
    """neuronpedia, sae_dashboard: name of the source set, without the layer."""
    release: str = ""
    """neuronpedia: name of the release."""
    creator: str = ""
    """neuronpedia: who made it."""
    url: str = ""
    """neuronpedia: where to read about it."""
    repository: str = ""
    """neuronpedia: repository on the Hub that holds the weights."""


@verb
def convert(arguments: list[str]) -> None:
    """convert SRC DST --to FORMAT

    write an SAE of any format in another, or what viewers show of a run
    """
    source, rest = take_folder(
        "convert",
        arguments,
        "an SAE: a run, a folder of any format, or a Hub repository; and a new folder",
    )
    folder, rest = (
        take_folder("convert", rest, "a new folder, after the SAE") if source else ("", rest)
    )
    args = parse(ConvertArgs, "convert SRC DST", rest)
    viewers = ("neuronpedia", "sae_dashboard", "atoms")
    if args.to not in viewers:
        from ksparse import interop

        sae = interop.convert(
            source,
            folder,
            args.to,
            revision=args.revision or None,
            subfolder=args.subfolder,
            normalization=args.normalization,
        )
        print(
            f"{args.to} {folder}: {sae.shape.n_latents:,} latents, {sae.shape.activation}, "
            f"normalisation {sae.shape.normalize}"
        )
        return
    from ksparse.interop import neuronpedia, openai_viewer

    run = open_run(source)
    if args.to == "atoms":
        count = openai_viewer.export(run, Path(folder))
    else:
        names = neuronpedia.Publication(
            **{
                field.name: getattr(args, field.name)
                for field in dataclasses.fields(neuronpedia.Publication)
            }
        )
        count = (
            neuronpedia.export_bulk if args.to == "neuronpedia" else neuronpedia.export_dashboard
        )(run, Path(folder), names)
    print(f"{args.to} {folder}: {count:,} latents")


@verb
def push(arguments: list[str]) -> None:
    """push RUN OWNER/NAME [--key value …]

    put an SAE on the Hub, with a card and a copy for SAELens
    """

    @dataclass(frozen=True)
    class PushArgs:
        subfolder: str = ""
        """Folder in the repository, where it holds several SAEs."""
        visibility: Literal["public", "private"] = "public"
        """Of a repository that is not there yet."""
        folder: str = ""
        """Write the repository's folder here, and upload nothing."""
        normalization: Literal["exact", "layer_norm", "outside"] = "exact"
        """For SAELens' copy, as of `ksparse convert`."""

    source, rest = take_folder(
        "push", arguments, "an SAE, such as runs/demo; and the name of a repository"
    )
    repository, rest = (
        take_folder("push", rest, "the name of a repository on the Hub, OWNER/NAME, after the SAE")
        if source
        else ("", rest)
    )
    args = parse(PushArgs, "push RUN OWNER/NAME", rest)
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
