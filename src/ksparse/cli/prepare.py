"""shard, plan, bench, doctor: before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ksparse.cli.arguments import no_options, parse, recipe_of, verb
from ksparse.cli.output import Progress
from ksparse.cli.train import TrainArgs
from ksparse.config import Recipe
from ksparse.errors import InputError
from ksparse.planning.costs import UnseenLM
from ksparse.planning.hardware import Hardware
from ksparse.storage import atomic, jsonio


@dataclass(frozen=True)
class ShardArgs(Recipe):
    out: str = "acts"
    """Folder that gets a subfolder named by a hash of what the activations are."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Numbers on disk."""


@verb
def shard(arguments: list[str]) -> None:
    """shard [RECIPE.toml] [--key value …]

    write activations to disk once, for many runs
    """
    recipe, extra, _ = recipe_of(ShardArgs, "shard", arguments)
    import torch

    from ksparse.data import shards
    from ksparse.data.contexts import Corpus
    from ksparse.device import resolve_device
    from ksparse.lm.model import LM

    lm = LM(acts=recipe.acts, device=resolve_device(recipe.run.device))
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with Progress("activations", recipe.tokens) as progress:
        folder = shards.write(
            lm,
            Corpus(recipe.acts, lm.tokenizer, "train"),
            Path(extra["out"]),
            rows=recipe.tokens,
            dtype=extra["dtype"],
            progress=lambda done: progress(done, "activations"),
        )
    print(f"shards   {folder}\nnext     the same recipe with --acts.shards {folder}")


@dataclass(frozen=True)
class PlanArgs(TrainArgs):
    devices: str = ""
    """Numbers of devices, such as 1,8,64,512: for each the best mesh, with its memory,
    communication and time."""
    gpu: Literal["here", "a100", "h100", "h200", "laptop"] = "here"
    """Which devices. here: this machine's, whose speed is measured."""
    hardware: Hardware = field(default_factory=Hardware)
    subject: UnseenLM = field(default_factory=UnseenLM)
    dead: float = 0.1
    """Share of the latents that are taken to be dead: AuxK costs in proportion."""
    json: str = ""
    """File for all of it as JSON; - writes that to standard output, and nothing else."""


@verb
def plan(arguments: list[str]) -> None:
    """plan [RECIPE.toml] [--key value …]

    parameters, memory, FLOPs, disk and time, before anything runs; --devices 1,8,64: on meshes
    """
    recipe, asked, _ = recipe_of(PlanArgs, "plan", arguments)
    devices = [_number("--devices", each) for each in asked["devices"].split(",") if each.strip()]
    from ksparse.planning import plan as planning

    made = planning.plan(
        recipe,
        devices=devices,
        card=asked["gpu"],
        figures=asked["hardware"],
        dead=asked["dead"],
        unseen=asked["subject"],
    )
    if asked["json"] == "-":
        print(json.dumps(planning.to_dict(made), indent=1))
        return
    for line in planning.lines(made) + (["", *planning.tables(made)] if devices else []):
        print(line)
    if asked["json"]:
        jsonio.write_json(Path(asked["json"]), planning.to_dict(made))


def _number(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"{flag} takes whole numbers with commas between, such as 1,8,64; got {text.strip()!r}"
        ) from None


@verb
def bench(arguments: list[str]) -> None:
    """bench [--n --d --k --batch …]

    time a training step here, against the encoder product and a dense step
    """
    from ksparse import bench as benchmark

    @dataclass(frozen=True)
    class BenchArgs(benchmark.Setting):
        json: str = ""
        """File for the result."""
        picture: str = ""
        """File for a picture of it (.svg)."""
        only: tuple[str, ...] = ()
        """Time these, and the product."""
        contestant: tuple[str, ...] = ()
        """NAME=FILE.py: also time what make(cfg) in that file returns."""

    options = parse(BenchArgs, "bench", arguments)
    own = {field.name for field in dataclasses.fields(benchmark.Setting)}
    setting = benchmark.Setting(
        **{name: value for name, value in dataclasses.asdict(options).items() if name in own}
    )
    wrong = [each for each in options.contestant if not Path(each.partition("=")[2]).is_file()]
    if wrong:
        raise InputError(f"contestant {wrong[0]!r} is not NAME=FILE with a file that is there")
    with Progress("rounds", setting.rounds) as progress:
        found = benchmark.bench(
            setting,
            dict(each.split("=", 1) for each in options.contestant),
            only=options.only,
            observe=lambda done, total: progress(done, ""),
        )
    print(f"{'':<12}{'ratio':>8}{'best':>8}{'ms':>9}{'tokens/s':>12}{'MiB':>8}")
    for name, row in sorted(found["contestants"].items(), key=lambda item: item[1]["ratio"]):
        print(
            f"{name:<12}{row['ratio']:>8.2f}{row['best_ratio']:>8.2f}"
            f"{1000 * row['seconds']:>9.1f}{row['tokens_per_s']:>12,.0f}{row['peak_mib']:>8,}"
        )
    for name, why in found["left_out"].items():
        print(f"{name:<12}left out: {why}")
    if options.json:
        jsonio.write_json(Path(options.json), found)
    if options.picture:
        atomic.write_text(Path(options.picture), benchmark.picture(found))


@verb
def doctor(arguments: list[str]) -> None:
    """doctor

    say what of this machine is fit for ksparse, a line each
    """
    no_options("doctor", arguments)
    from ksparse.doctor import checks

    failed = False
    for name, verdict, what in checks():
        failed |= verdict == "no"
        print(f"{verdict:<5}{name:<14}{what}")
    if failed:
        sys.exit(1)
