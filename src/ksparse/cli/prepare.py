"""Verbs for before training: shard, plan, bench, doctor."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ksparse.cli.arguments import parse, parse_recipe, refuse_arguments, verb
from ksparse.cli.output import ProgressBar, is_first_process
from ksparse.cli.train import TrainArgs
from ksparse.config import Recipe
from ksparse.display import shown
from ksparse.errors import InputError
from ksparse.planning.costs import UnseenLM
from ksparse.planning.hardware import Hardware
from ksparse.progress import report
from ksparse.storage import atomic, jsonio
from ksparse.storage.stores import open_store


@dataclass(frozen=True)
class ShardArgs(Recipe):
    """Options of `ksparse shard`."""

    out: str = "acts"
    """Folder to write to, in a subfolder named by a hash of what the activations are. s3://… or
    gs://… is a folder in an object store."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Data type on disk."""
    shard_rows: int = 0
    """Activations in a file, which one of several processes computes. 0: as many as take 256 MB in
    float32."""


@verb
def shard(arguments: list[str]) -> None:
    """shard [RECIPE.toml | --from PATH] [--key value …]

    Write activations to disk once, for many runs; of several sites in one pass, a set for each
    (--acts.site 'resid_post.*'). Or, with --from, index a folder or file of tensors that anybody
    made, without copying it (shard --from PATH --help). Several processes write one folder
    together: torchrun --nproc-per-node N -m ksparse shard …
    """
    if any(word.partition("=")[0] == "--from" for word in arguments):
        _index(arguments)
        return
    recipe, options, _ = parse_recipe(ShardArgs, "shard", arguments)
    with shown("writing activations"):
        report("loading torch")
        import torch

        from ksparse.data import shards
        from ksparse.data.contexts import Corpus
        from ksparse.data.shard_sets import ProcessPart
        from ksparse.device import resolve_device
        from ksparse.distributed import local_device, rank_and_size
        from ksparse.lm.model import LM
        from ksparse.training.sites import at_sites

        part = ProcessPart(*rank_and_size())
        sites = list(at_sites(recipe))
        acts = dataclasses.replace(recipe.acts, site=sites[0])
        lm = LM(acts=acts, device=local_device(resolve_device(recipe.run.device)))
        for site in sites[1:]:
            lm.at_site(site)  # refused here if it cannot be read
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        folders = shards.write_sites(
            lm,
            Corpus(acts, lm.tokenizer, "train"),
            options["out"],
            sites,
            rows=recipe.tokens,
            dtype=options["dtype"],
            shard_rows=options["shard_rows"],
            progress=lambda done: report("writing activations", done, recipe.tokens),
            part=part,
        )
    if not is_first_process():
        return
    for site, folder in zip(sites, folders):
        print(f"shards   {folder}" + (f"   ({site})" if len(sites) > 1 else ""))
    last = f"--acts.shards {folders[-1]}"
    print(
        f"next     the same recipe with {last}"
        + (f" --acts.site {sites[-1]}; so for each" if len(sites) > 1 else "")
    )


def _index(arguments: list[str]) -> None:
    """Index tensors that are there."""
    at = next(i for i, word in enumerate(arguments) if word.partition("=")[0] == "--from")
    source, rest = arguments[at].partition("=")[2], arguments[:at] + arguments[at + 1 :]
    if not source and at < len(rest) and not rest[at].startswith("-"):
        source = rest.pop(at)

    @dataclass(frozen=True)
    class IndexArgs:
        """Options of `ksparse shard --from`."""

        out: str = ""
        """Folder for the index, with links to the files; by default the folder of tensors itself,
        and for one file the folder FILE.index beside it."""
        key: str = ""
        """Name of the activations in each file, where it has several tensors."""
        layer: int = -1
        """Which layer of tensors [rows, layers, d]."""

    options = parse(IndexArgs, "shard --from PATH", rest)
    if not source:
        raise InputError("--from needs a folder or a file of activations: ksparse shard --from DIR")
    with ProgressBar("indexing"):
        report("loading torch")
        from ksparse.data import tensors

        folder = tensors.write_index(
            source,
            Path(options.out) if options.out else None,
            key=options.key,
            layer=options.layer,
            progress=lambda done, total: report("indexing", done, total),
        )
        with open_store(folder).reading("manifest.json") as file:
            found = jsonio.read_json(file)
    print(
        f"indexed  {folder}: {found['rows']:,} rows of width {found['d_model']:,} in "
        f"{len(found['files']):,} files\n"
        f"next     ksparse train --acts.shards {folder} --out runs/mine"
    )


@dataclass(frozen=True)
class PlanArgs(TrainArgs):
    """Options of `ksparse plan`."""

    devices: str = ""
    """Numbers of devices, such as 1,8,64,512: plan the best mesh for each, with its memory,
    communication and time."""
    gpu: Literal["here", "a100", "h100", "h200", "laptop"] = "here"
    """Type of device. here: this machine's, whose speed is measured."""
    hardware: Hardware = field(default_factory=Hardware)
    subject: UnseenLM = field(default_factory=UnseenLM)
    dead: float = 0.1
    """Share of the latents to assume dead; the cost of AuxK is proportional to it."""
    json: str = ""
    """File to write the plan to, as JSON; -: write it to standard output, and nothing else."""


@verb
def plan(arguments: list[str]) -> None:
    """plan [RECIPE.toml] [--key value …]

    Show parameters, memory, FLOPs, disk and time of a recipe before running it.
    """
    recipe, options, _ = parse_recipe(PlanArgs, "plan", arguments)
    devices = [
        _parse_int("--devices", word) for word in options["devices"].split(",") if word.strip()
    ]
    from ksparse.planning import meshes, sites
    from ksparse.planning import plan as planning

    given: dict[str, Any] = {
        "devices": devices,
        "card": options["gpu"],
        "figures": options["hardware"],
        "dead": options["dead"],
        "unseen": options["subject"],
    }
    if recipe.acts.names_several_sites:
        several = sites.plan_sites(recipe, **given)
        table, lines = sites.to_dict(several), sites.lines(several)
    else:
        planned = planning.plan(recipe, **given)
        table, lines = planning.to_dict(planned), planning.lines(planned) + meshes.lines(planned)
        lines += ["", *meshes.tables(planned)] if devices else []
    if options["json"] == "-":
        print(json.dumps(table, indent=1))
        return
    for line in lines:
        print(line)
    if options["json"]:
        jsonio.write_json(Path(options["json"]), table)


def _parse_int(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"{flag} takes whole numbers with commas between, such as 1,8,64; got {text.strip()!r}"
        ) from None


@verb
def bench(arguments: list[str]) -> None:
    """bench [--n --d --k --batch … | --lm NAME --site SITE …]

    Time a training step on this machine, against the encoder product and a dense step. With --lm,
    time the reading of that LM's activations, against its matrix products (bench --lm NAME --help).
    """
    from ksparse import bench as benchmark

    if any(word.partition("=")[0] == "--lm" for word in arguments):
        _bench_harvest(arguments)
        return

    @dataclass(frozen=True)
    class BenchArgs(benchmark.Setting):
        """Options of `ksparse bench`."""

        json: str = ""
        """File to write the result to, as JSON."""
        picture: str = ""
        """File for a bar chart of it (.svg)."""
        only: tuple[str, ...] = ()
        """Contestants to time, besides the product; by default all."""
        contestant: tuple[str, ...] = ()
        """NAME=FILE.py: also time what make(cfg) in that file returns."""

    options = parse(BenchArgs, "bench", arguments)
    names = {option.name for option in dataclasses.fields(benchmark.Setting)}
    setting = benchmark.Setting(
        **{name: value for name, value in dataclasses.asdict(options).items() if name in names}
    )
    for contestant in options.contestant:
        if not Path(contestant.partition("=")[2]).is_file():
            raise InputError(
                f"contestant {contestant!r} is not NAME=FILE with a file that is there"
            )
    with ProgressBar("rounds"):
        result = benchmark.bench(
            setting,
            dict(contestant.split("=", 1) for contestant in options.contestant),
            only=options.only,
            observe=lambda done, total: report("rounds", done, total),
        )
    _print_benchmark(result)
    if options.json:
        jsonio.write_json(Path(options.json), result)
    if options.picture:
        atomic.write_text(Path(options.picture), benchmark.picture(result))


def _bench_harvest(arguments: list[str]) -> None:
    """Time the reading of an LM's activations."""
    from ksparse import bench as benchmark

    @dataclass(frozen=True)
    class HarvestArgs(benchmark.HarvestSetting):
        """Options of `ksparse bench --lm`."""

        json: str = ""
        """File to write the result to, as JSON."""

    options = parse(HarvestArgs, "bench --lm NAME", arguments)
    names = {option.name for option in dataclasses.fields(benchmark.HarvestSetting)}
    setting = benchmark.HarvestSetting(
        **{name: value for name, value in dataclasses.asdict(options).items() if name in names}
    )
    with ProgressBar("rounds"):
        result = benchmark.bench_harvest(setting, lambda done, total: report("rounds", done, total))
    _print_harvest(result)
    if options.json:
        jsonio.write_json(Path(options.json), result)


def _print_harvest(result: dict[str, Any]) -> None:
    print(
        f"{result['lm']} up to {result['site']}, contexts of {result['context']}, "
        f"{result['lm_dtype']}, {result['threads']} threads, {result['processor']}"
    )
    print(
        f"{'contexts':>8}{'tokens/s':>12}{'best':>12}{'GFLOP/s':>10}{'share':>8}{'of CPU time':>13}"
    )
    for size, row in result["batches"].items():
        speed = row["flops_per_token"] * row["tokens_per_s"] / 1e9
        used = row["share_processor"]
        print(
            f"{size:>8}{row['tokens_per_s']:>12,.0f}{row['best_tokens_per_s']:>12,.0f}"
            f"{speed:>10,.1f}{row['share']:>8.0%}{'-' if used is None else f'{used:.0%}':>13}"
        )
    print("share    of the speed of this machine's matrix products at the same sizes")


def _print_benchmark(result: dict[str, Any]) -> None:
    print(f"{'':<12}{'ratio':>8}{'best':>8}{'ms':>9}{'tokens/s':>12}{'MiB':>8}")
    for name, row in sorted(result["contestants"].items(), key=lambda item: item[1]["ratio"]):
        print(
            f"{name:<12}{row['ratio']:>8.2f}{row['best_ratio']:>8.2f}"
            f"{1000 * row['seconds']:>9.1f}{row['tokens_per_s']:>12,.0f}{row['peak_mib']:>8,}"
        )
    for name, reason in result["left_out"].items():
        print(f"{name:<12}left out: {reason}")


@verb
def doctor(arguments: list[str]) -> None:
    """doctor

    Check whether this machine can run ksparse, with a line for each requirement.
    """
    refuse_arguments("doctor", arguments)
    from ksparse.doctor import checks

    failed = False
    for name, verdict, detail in checks():
        failed |= verdict == "no"
        print(f"{verdict:<5}{name:<14}{detail}")
    if failed:
        sys.exit(1)
