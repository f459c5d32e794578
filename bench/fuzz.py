"""Damage files that ksparse wrote, at random, and see that every reader either says so or is not harmed.

    python bench/fuzz.py --corruptions 2000 --seed 0

Makes once: a run that was stopped (three checkpoints, metrics, curve, evaluations), shards, an exported SAE in one file and in slices, one in SAELens' and one in
dictionary_learning's format, a suite of probe tasks, a sweep's points and law, a study, recipes. Then each time one thing is done to a copy of one of
them (truncate, empty, flip, zero, garbage, delete, swap, rename, links, folders in the place of files, JSON and TOML of other types or values, safetensors
with other headers, manifests that are right but name something outside), and whatever reads it is called; a run is also gone on with to its end.

    detected    a KsparseError, with a message                       harmless    what was read is what was written
    older       the damage was named and an older checkpoint used: the resumed run still ends with the same bytes
    wrong       weights, activations or codes other than those that were written, without a word: must be 0
    crash       any other exception: must be 0

    python bench/fuzz.py --minutes 10

Try inputs that somebody may give, of each of KINDS in turn: texts, suites, recipes, flags, labels, results, shards, autoencoders, checkpoints; then requests to a viewer. Four
are right files whose contents were changed and whose sums were made to fit. Each input is read or refused with a KsparseError, within a time; anything else is
a crash or slow, is printed, and can be had again with --again.

Numbers without a sum (metrics, CSV files, labels, a recipe that a user writes) may be read as they are: no weights come of them. Exit code 1 for wrong or crash.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ksparse import config as recipes
from ksparse import interop
from ksparse import report as reports
from ksparse.cli.arguments import parse_recipe
from ksparse.cli.train import TrainArgs
from ksparse.config import ActsConfig, Recipe
from ksparse.config.evaluation import EvalConfig
from ksparse.data import documents, shards, sources
from ksparse.data.contexts import Corpus
from ksparse.data.documents import SPLITS
from ksparse.data.sharded import ShardStream
from ksparse.errors import Interrupted, KsparseError
from ksparse.evals import runner
from ksparse.evals.probing import suites
from ksparse.evals.probing.suites import folder as suite
from ksparse.lm.model import LM
from ksparse.report import studies
from ksparse.report import sweep as sweeps
from ksparse.sae import serialization
from ksparse.scaling.laws.survey import fit_sweep
from ksparse.scaling.sweeps import grid
from ksparse.steering import load_lm
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.run_folder import RunFolder, open_run, shard_file
from ksparse.training.source import ActivationSource
from ksparse.training.train import train, train_many
from ksparse.viewer.labels import Labels
from ksparse.viewer.resources import Resources

STOP = 8  # the step after which the run is stopped


# ---- what is damaged ---------------------------------------------------------------------------------------------


class World:
    """The folders as they should be, and what reading them should give."""

    def __init__(self, base: Path, recipe: Recipe):
        self.base, self.recipe = base, recipe
        self.expected: dict[str, Any] = {}
        self.reports_left = 0
        self._run()
        self._exports()
        self._shards()
        self._texts()
        self.tokenizer = LM(acts=recipe.acts, device="cpu").tokenizer
        self.feed = ActivationSource(recipe, torch.device("cpu"))
        self.feed.calibration, self.feed.lm_parameters, self.feed.held_out  # noqa: B018, read once
        self.stations: dict[str, Callable[[Path], str]] = {
            "run": self.read_run,
            "shards": self.read_shards,
            "export": self.read_export,
            "sliced": self.read_export,
            "sae_lens": self.read_converted,
            "dictionary_learning": self.read_converted,
            "suite": self.read_suite,
            "sweep": self.read_sweep,
            "study": self.read_study,
            "recipes": self.read_recipes,
        }

    def _run(self) -> None:
        whole = train(self.recipe, self.base.parent / "undisturbed")
        self.final = _bytes(whole.checkpoints()[-1])

        def stop(row: dict[str, Any]) -> None:
            if row["step"] == STOP:
                raise Interrupted("stopped", 15)

        try:
            train(self.recipe, self.base / "run", observe=stop)
        except Interrupted:
            pass
        self.run = RunFolder(self.base / "run")
        self.weights = {
            path.name: serialization.read(path).state_dict() for path in self.run.checkpoints()
        }
        self.sae, self.newest = serialization.load(self.run.path), self.run.checkpoints()[-1].name
        self.run.append_alarm(
            {
                "step": 3,
                "tokens": 3 * self.recipe.batch,
                "alarm": "dead",
                "value": 0.6,
                "limit": 0.5,
                "says": "…",
                "kept_back": 0,
            }
        )
        runner.write_results(
            self.run,
            runner.evaluate(
                self.sae,
                None,
                ("stats", "downstream"),
                EvalConfig(tokens=600, examples=2, device="cpu"),
            ),
        )
        jsonio.write_json(
            self.run.path / "labels.json",
            {"format": 1, "latents": {"3": {"label": "numbers", "star": True}}},
        )

    def _exports(self) -> None:
        serialization.save(self.sae, self.base / "export")
        half = self.sae.shape.n_latents // 2
        with checksums.checksummed_dir(self.base / "sliced") as tmp:
            for i, rows in enumerate((slice(0, half), slice(half, None))):
                own = {
                    key: value[rows] if serialization.by_rows(key, value.shape) else value
                    for key, value in self.sae.state_dict().items()
                }
                serialization.write_weights(own, tmp / shard_file("sae", i, 2))
            serialization.write_shape(self.sae.shape, self.sae.metadata, tmp)
        for name in ("sae_lens", "dictionary_learning"):
            interop.write(self.sae, self.base / name, name, normalization="outside")
        self.converted = {
            name: interop.load(self.base / name).state_dict()
            for name in ("sae_lens", "dictionary_learning")
        }

    def _shards(self) -> None:
        lm = LM(acts=self.recipe.acts, device="cpu")
        folder = shards.write(
            lm,
            Corpus(lm.options, lm.tokenizer, "train"),
            self.base / "acts",
            rows=200,
            shard_rows=80,
        )
        folder.rename(self.base / "shards")
        (self.base / "acts").rmdir()
        self.table = _table(self.base / "shards")

    def _texts(self) -> None:
        suite.write(
            self.base / "suite", "is_one", [{"text": f"x = {i}", "label": i % 2} for i in range(60)]
        )
        jsonio.write_json(
            self.base / "suite" / "index.json", {"format": 1, "tasks": {}, "failed": {}}
        )
        sweep, loss = self.base / "sweep", lambda n, k: 2.5 * n**-0.25 * k**-0.1 + 0.1
        lines = [
            f"r{n}-{k},{n},{k},0.001,pylm/0.3m,{loss(n, k)}"
            for n in (512, 1024, 2048, 4096, 8192)
            for k in (8, 16, 32)
        ]
        atomic.write_text(sweep / "points.csv", "\n".join(["run,n,k,lr,lm,loss", *lines]) + "\n")
        atomic.write_text(
            sweep / "sweep.toml",
            recipes.to_toml(recipes.from_dict({})) + '\n[grid]\n"sae.k" = [8, 16]\nseed = [0, 1]\n',
        )
        jsonio.write_json(sweep / "law.json", fit_sweep(sweep, draws=0).to_dict(), sealed=True)
        curve = {
            "label": "TopK",
            "x": [8.0, 16.0],
            "y": [0.3, 0.2],
            "se": [0.01, None],
            "reference": False,
        }
        jsonio.write_json(
            self.base / "study" / "study.json",
            {
                "format": 1,
                "name": "baselines",
                "question": "Which?",
                "lm": "pylm",
                "site": "resid_post.3",
                "text": "pylm",
                "findings": ["TopK wins"],
                "members": {"TopK": {"l0": {"value": 8.0, "se": 0.25}}},
                "seconds": 1.0,
                "figures": [
                    {
                        "name": "f",
                        "title": "A",
                        "caption": "B",
                        "x": "L0",
                        "y": "error",
                        "log": "xy",
                        "curves": [curve],
                    }
                ],
            },
            sealed=True,
        )
        for i, changes in enumerate(
            (
                {},
                {"sae": {"activation": {"kind": "relu"}}},
                {"acts": {"text": "somewhere.jsonl"}, "tokens": 10**9},
            )
        ):
            atomic.write_text(
                self.base / "recipes" / f"{i}.toml", recipes.to_toml(recipes.from_dict(changes))
            )

    # ---- its readers: each returns harmless, older or wrong, or raises

    def read_run(self, path: Path) -> str:
        run = open_run(path)
        (
            run.metrics(),
            run.curve(),
            run.alarms(),
            run.environment(),
            [run.eval(name) for name in ("stats", "downstream")],
        )
        grid.finished(run)
        if self.reports_left > 0 and not _same_tree(path, self.run.path, "checkpoints"):
            self.reports_left -= 1
            reports.write(run)
            pieces = Resources(run, 16)
            for name in pieces.names():
                json.dumps(pieces.get(name), allow_nan=False)
        newest, wrong = run.newest_intact()
        if newest is not None and not _equal(
            serialization.load(path).state_dict(), self.weights.get(newest.name)
        ):
            return "wrong"
        recipe = run.recipe()
        if recipes.differences(recipe.fingerprint(), self.recipe.fingerprint()):
            return "wrong" if newest is not None else "harmless"  # nothing was trained with it yet
        train_many([recipe], [path], open_source=lambda recipe, device: self.feed)
        there = run.checkpoints()
        if not there or _bytes(there[-1]) != self.final:
            return "wrong"
        return "older" if wrong or newest is None or newest.name != self.newest else "harmless"

    def read_shards(self, path: Path) -> str:
        found = shards.Shards(path)
        found.check_fits(self.recipe.acts)
        return "harmless" if _equal(_table(path), self.table) and found.names else "wrong"

    def read_export(self, path: Path) -> str:
        found = serialization.load(path)
        same = (
            _equal(found.state_dict(), self.sae.state_dict())
            and found.shape == self.sae.shape
            and found.metadata == self.sae.metadata
        )
        return "harmless" if same else "wrong"

    def read_converted(self, path: Path) -> str:
        return (
            "harmless"
            if _equal(interop.load(path).state_dict(), self.converted[path.name])
            else "wrong"
        )

    def read_suite(self, path: Path) -> str:
        suite.read(path)
        return "harmless"

    def read_sweep(self, path: Path) -> str:
        sweep = sweeps.Sweep(path)
        grid.read(path / "sweep.toml")
        sweep.rows, sweep.curves, sweep.mine, sweep.k, sweep.lms  # noqa: B018
        (
            sweeps.law_tables(sweep),
            sweeps.form_tables(sweep),
            sweeps.point_tables(sweep),
            sweeps.summarize(sweep),
        )
        if self.reports_left > 0:
            self.reports_left -= 1
            sweeps.write(path)
        return "harmless"

    def read_study(self, path: Path) -> str:
        studies.write(path)
        return "harmless"

    def read_recipes(self, path: Path) -> str:
        for file in sorted(path.iterdir()):
            if file.suffix == ".toml":
                recipes.load_recipe(file)
        return "harmless"


def _bytes(checkpoint: Path) -> dict[str, str]:
    return {file.name: atomic.sha256(file) for file in sorted(checkpoint.glob("*.safetensors"))}


def _table(folder: Path) -> dict[str, torch.Tensor]:
    found = shards.Shards(folder)
    rows = np.arange(found.rows)
    return {
        "x": found.read(rows),
        "document": torch.from_numpy(found.documents(rows)),
        "context": torch.from_numpy(found.contexts(rows)),
    }


def _equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] | None) -> bool:
    return (
        expected is not None
        and found.keys() == expected.keys()
        and all(torch.equal(found[key], expected[key]) for key in found)
    )


def _same_tree(one: Path, other: Path, but: str) -> bool:
    listed = [
        {
            file.relative_to(root): file.read_bytes()
            for file in sorted(root.rglob("*"))
            if file.is_file() and but not in file.parts
        }
        for root in (one, other)
    ]
    return listed[0] == listed[1]


# ---- what is done to them ----------------------------------------------------------------------------------------


class Damage:
    """One random thing done to a tree of files; `said` is what."""

    def __init__(
        self,
        root: Path,
        outside: Path,
        draw: random.Random,
        ways: Sequence[Callable[[Damage], bool | None]] = (),
        file: Path | None = None,
    ):
        self.root, self.outside, self.draw = root, outside, draw
        self.files = sorted(
            path for path in root.rglob("*") if path.is_file() and path.name != ".lock"
        )
        for _ in range(20):
            self.file = file or draw.choice(self.files)
            ways = ways or [
                *BYTES,
                *PLACES,
                *(3 * JSON if self.file.suffix == ".json" else ()),
                *(2 * LINES if self.file.suffix == ".jsonl" else ()),
                *(3 * TENSORS if self.file.suffix == ".safetensors" else ()),
                *(3 * TOML if self.file.suffix == ".toml" else ()),
            ]
            self.way = draw.choice(ways)
            if self.way(self) is not False:
                break
        self.said = f"{self.way.__name__} {self.file.relative_to(root.parent)}"

    # bytes

    def truncate(self) -> None:
        data = self.file.read_bytes()
        self.file.write_bytes(data[: self.draw.randrange(len(data) + 1)])

    def empty(self) -> None:
        self.file.write_bytes(b"")

    def flip(self) -> bool | None:
        data = bytearray(self.file.read_bytes())
        if not data:
            return False
        for _ in range(self.draw.choice((1, 1, 1, 8))):
            data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        self.file.write_bytes(data)
        return None

    def flip_early(self) -> bool | None:
        data = bytearray(self.file.read_bytes())
        if not data:
            return False
        data[self.draw.randrange(min(64, len(data)))] ^= 1 << self.draw.randrange(8)
        self.file.write_bytes(data)
        return None

    def zero(self) -> bool | None:
        return self._span(lambda n: bytes(n))

    def garble(self) -> bool | None:
        return self._span(self.draw.randbytes)

    def cut_out(self) -> bool | None:
        return self._span(lambda n: b"")

    def double(self) -> bool | None:
        data = self.file.read_bytes()
        self.file.write_bytes(data + data)
        return None

    def _span(self, make: Callable[[int], bytes]) -> bool | None:
        data = self.file.read_bytes()
        if not data:
            return False
        at = self.draw.randrange(len(data))
        n = min(len(data) - at, self.draw.choice((1, 16, 512)))
        self.file.write_bytes(data[:at] + make(n) + data[at + n :])
        return None

    def append(self) -> None:
        self.file.write_bytes(
            self.file.read_bytes()
            + self.draw.choice((b"\n", b"\0", b"}", b"{}", b"null\n", self.draw.randbytes(64)))
        )

    def replace_by_garbage(self) -> None:
        self.file.write_bytes(
            self.draw.choice(
                (
                    self.draw.randbytes(200),
                    b"\xff\xfe",
                    b"[]",
                    b"{}",
                    b"0",
                    b"null",
                    b'"x"',
                    b"[" * 100_000,
                    b'{"a":' * 100_000,
                    b"1" * 10_000,
                    b'{"format": 1}',
                    b"\n\n\n",
                )
            )
        )

    # places

    def delete(self) -> None:
        self.file.unlink()

    def swap(self) -> bool | None:
        same = [
            file for file in self.files if file != self.file and file.suffix == self.file.suffix
        ] or self.files
        other = self.draw.choice(same if self.draw.random() < 0.8 else self.files)
        if other == self.file:
            return False
        mine, theirs = self.file.read_bytes(), other.read_bytes()
        self.file.write_bytes(theirs)
        other.write_bytes(mine)
        return None

    def copy_over(self) -> None:
        self.file.write_bytes(self.draw.choice(self.files).read_bytes())

    def folder_in_its_place(self) -> None:
        self.file.unlink()
        self.file.mkdir()

    def link(self) -> None:
        target = self.draw.choice(
            (
                self.outside,
                self.file,
                Path("/nowhere/at/all"),
                Path(self.file.name + "x"),
                Path("/dev/null"),
                Path("."),
                self.draw.choice(self.files),
            )
        )
        self.file.unlink()
        self.file.symlink_to(target)

    def rename(self) -> None:
        self.file.rename(
            self.file.with_name(
                self.draw.choice(
                    (
                        self.file.name + "~",
                        "x" + self.file.suffix,
                        "." + self.file.name,
                        f".tmp-{self.file.name}-1",
                    )
                )
            )
        )

    def stray(self) -> None:
        place = self.file.parent / self.draw.choice(
            (
                "garbage",
                ".tmp-x-1",
                ".tmp-old-x-1",
                ".tmp-gone-y-2",
                "zz.json",
                "zz.safetensors",
                "zz.jsonl",
                "step-00000099",
                "step-x",
                "sae.0-of-1.safetensors",
                "sae.0-of-0.safetensors",
                "sae.0-of-x.safetensors",
            )
        )
        place.write_bytes(self.draw.randbytes(50)) if self.draw.random() < 0.5 else place.mkdir(
            exist_ok=True
        )

    def folders(self) -> bool | None:
        """Swap, rename, copy or delete whole folders, as of checkpoints."""
        inside = sorted(path for path in self.root.rglob("*") if path.is_dir())
        if not inside:
            return False
        one = self.draw.choice(inside)
        self.file = one
        beside = [other for other in inside if other.parent == one.parent and other != one]
        what = self.draw.choice(("swap", "rename", "copy", "delete", "link", "file", "linked_away"))
        if what == "swap" and beside:
            other, away = self.draw.choice(beside), one.with_name("away")
            one.rename(away), other.rename(one), away.rename(other)
        elif what in ("rename", "copy"):
            to = one.with_name(
                self.draw.choice(("step-00000099", "step-00000001", "step-٣", one.name + "x"))
            )
            one.rename(to) if what == "rename" else shutil.copytree(one, to)
        elif what == "linked_away":
            one.rename(one.with_name("elsewhere")).symlink_to  # noqa: B018
            one.symlink_to("elsewhere")
        else:
            shutil.rmtree(one)
            if what == "link":
                one.symlink_to(self.draw.choice(("/nowhere", ".", one.name)))
            elif what == "file":
                one.write_bytes(b"x")
        return None

    # JSON

    def other_json(self) -> bool | None:
        """Change one value somewhere; a seal then does not fit."""
        return self._json(reseal=False)

    def other_manifest(self) -> bool | None:
        """Change one value of a manifest, and seal it again: what nobody but an attacker does."""
        return self._json(reseal=True) if self.file.name == checksums.MANIFEST else False

    def path_out_of_the_folder(self) -> bool | None:
        """Let a manifest name a file outside its folder, with the right sum, and seal it again."""
        if self.file.name != checksums.MANIFEST:
            return False
        table = jsonio.read_json(self.file)
        name = self.draw.choice(
            (
                "../outside",
                "../../outside",
                str(self.outside),
                "/etc/passwd",
                "..",
                ".",
                "",
                "a/../../outside",
                "x\0y",
                "x" * 300,
                "./x",
            )
        )
        digest = atomic.sha256(self.outside)
        if "shards" in table:
            self.draw.choice(table["shards"]).update(file=name, sha256=digest)
        else:
            table["sha256"][name] = digest
        _seal(self.file, table)
        return None

    def _json(self, reseal: bool) -> bool | None:
        try:
            whole = json.loads(self.file.read_bytes())
        except ValueError:
            return False
        places = list(_places(whole))
        if not places:
            return False
        holder, key = self.draw.choice(places)
        if self.draw.random() < 0.2:
            del holder[key]
        else:
            holder[key] = self._other(holder[key])
        if reseal:
            whole.pop(jsonio.SEAL, None)
            _seal(self.file, whole)
        else:
            self.file.write_text(json.dumps(whole))
        return None

    def _other(self, value: Any) -> Any:
        if (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and self.draw.random() < 0.4
        ):
            return self.draw.choice(
                (value + 1, -value, 0, value * 2, 2**63, 2**40, 10**300, -1, 0.5)
            )
        return self.draw.choice(
            (
                None,
                True,
                "x",
                "../x",
                "/etc/passwd",
                [],
                {},
                [1],
                {"a": 1},
                7,
                -1,
                1.5,
                float("nan"),
                float("inf"),
                10**400,
                "\ud800",
                [[[[]]]],
                copy.deepcopy([value]),
            )
        )

    # JSON lines

    def other_line(self) -> bool | None:
        lines = self.file.read_bytes().split(b"\n")
        at = self.draw.randrange(len(lines))
        try:
            row = json.loads(lines[at])
        except ValueError:
            return False
        if isinstance(row, dict) and row:
            key = self.draw.choice(sorted(row))
            if self.draw.random() < 0.3:
                del row[key]
            else:
                row[key] = self._other(row[key])
        lines[at] = self.draw.choice(
            (
                json.dumps(row).encode(),
                json.dumps(row).encode(),
                b"[]",
                b"7",
                b"null",
                b"{}",
                b'{"step": 1',
                b"\xff",
            )
        )
        self.file.write_bytes(b"\n".join(lines))
        return None

    def shuffle_lines(self) -> None:
        lines = self.file.read_bytes().splitlines(keepends=True)
        self.draw.shuffle(lines)
        self.file.write_bytes(b"".join(lines))

    # safetensors

    def other_length(self) -> None:
        """Let the header be of another length."""
        data = self.file.read_bytes()
        length = self.draw.choice(
            (0, 1, 7, len(data) - 8, len(data), len(data) + 1, 2**31, 2**40, 2**63, 2**64 - 1)
        )
        self.file.write_bytes(length.to_bytes(8, "little") + data[8:])

    def other_header(self) -> bool | None:
        return self._header(resum=False)

    def other_header_with_its_sum(self) -> bool | None:
        """Change a header so that the file may still be read, and give the manifest its new sum: what nobody but an attacker does."""
        return self._header(resum=True)

    def _header(self, resum: bool) -> bool | None:
        data = self.file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        name = self.draw.choice(sorted(set(header) - {"__metadata__"}))
        entry = header[name]
        what = self.draw.choice(("shape", "offsets", "dtype", "name", "gone", "type"))
        if what == "shape":
            entry["shape"] = self.draw.choice(
                ([], [1], entry["shape"][::-1], [2**40, 2**40], [*entry["shape"], 1], [0], [-1])
            )
        elif what == "offsets":
            entry["data_offsets"] = self.draw.choice(
                ([0, 0], [0, 2**60], entry["data_offsets"][::-1], [-8, 8])
            )
        elif what == "dtype":
            entry["dtype"] = self.draw.choice(("F64", "F16", "I32", "BF16", "U8", "X"))
        elif what == "name":
            header[self.draw.choice(("x", "W_enc2", "../x", "\ud800"))] = header.pop(name)
        elif what == "gone":
            del header[name]
        else:
            header[name] = self._other(entry)
        text = json.dumps(header).encode()
        self.file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        manifest = self.file.parent / checksums.MANIFEST
        if resum and manifest.is_file():
            table = jsonio.read_json(manifest)
            for shard in table.get("shards", ()):
                if shard["file"] == self.file.name:
                    shard["sha256"] = atomic.sha256(self.file)
            if "sha256" in table:
                table["sha256"][self.file.name] = atomic.sha256(self.file)
            _seal(manifest, table)
        return None

    # TOML

    def other_toml(self) -> bool | None:
        lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
        places = [i for i, line in enumerate(lines) if " = " in line]
        if not places:
            return False
        at = self.draw.choice(places)
        key, _, value = lines[at].partition(" = ")
        values = (
            "0",
            "-1",
            "1.5",
            "true",
            '"x"',
            "[]",
            "{}",
            "[[]]",
            "nan",
            "inf",
            "1e400",
            "9" * 30,
            "0x" + "f" * 5000,
            "1979-05-27",
            '"../x"',
            '"\\u0000"',
            "'''",
            "[" * 5000,
            value + "1",
            "-" + value,
        )
        lines[at] = self.draw.choice(
            (f"{key} = {self.draw.choice(values)}",) * 4
            + ("", f"{key}x = {value}", f"[{key}]", lines[at] + "\n" + lines[at])
        )
        self.file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return None

    def odd_toml(self) -> None:
        """Add TOML that nobody would write."""
        text = self.file.read_text(encoding="utf-8", errors="replace")
        more = self.draw.choice(
            (
                "a" + ".a" * 300 + " = 1",
                "[" + "a." * 2_500 + "a]",
                "[[sae]]",
                "[sae]\n[sae]",
                "k" * 5_000 + " = 1",
                'acts.lm = "' + "x" * 5_000 + '"',
                "acts.lm = 0x" + "f" * 5_000,
                "sae.activation.kind = [1]",
                'sae.activation = "relu"',
                "run.loggers = [[], 1]",
                "seed = 07:32:00",
                "[grid]\nseed = [" + "1, " * 300 + "]",
                '[grid]\n"sae.k" = 3',
                "[grid]\na = {b = [1, 2]}",
                "[[grid]]\n[[grid]]",
                "grid = 7",
                '[grid]\nseed = [1]\n"" = [1]',
                "\r\r",
                "\0",
                "\ufeff",
                'acts.text = "\\u0000"',
                "x = {a = 1, a = 2}",
                *(
                    f"[grid]\n{key} = [{', '.join(map(str, range(400)))}]\nseed = [{', '.join(map(str, range(4_000)))}]"
                    for key in ("tokens", "batch")
                ),
            )
        )
        self.file.write_text(
            self.draw.choice((f"{more}\n{text}", f"{text}\n{more}")), encoding="utf-8"
        )


BYTES = (
    Damage.truncate,
    Damage.truncate,
    Damage.empty,
    Damage.flip,
    Damage.flip,
    Damage.flip,
    Damage.flip_early,
    Damage.zero,
    Damage.garble,
    Damage.cut_out,
    Damage.double,
    Damage.append,
    Damage.replace_by_garbage,
)
PLACES = (
    Damage.delete,
    Damage.delete,
    Damage.swap,
    Damage.swap,
    Damage.copy_over,
    Damage.folder_in_its_place,
    Damage.link,
    Damage.rename,
    Damage.stray,
    Damage.folders,
    Damage.folders,
)
JSON = (Damage.other_json, Damage.other_json, Damage.other_manifest, Damage.path_out_of_the_folder)
LINES = (Damage.other_line, Damage.other_line, Damage.shuffle_lines)
TENSORS = (Damage.other_length, Damage.other_header, Damage.other_header_with_its_sum)
TOML = (Damage.other_toml, Damage.other_toml)
WITH_THEIR_SUM = (Damage.other_header_with_its_sum, Damage.other_manifest)
"""After these, other weights may be read, since their sums say that they are right."""


# ---- the count ---------------------------------------------------------------------------------------------------


def _seal(file: Path, table: dict[str, Any]) -> None:
    """Write a table with its sum; where it holds what JSON of ours never does, without."""
    try:
        jsonio.write_json(file, table, sealed=True)
    except ValueError:
        file.write_text(json.dumps(table))


def _places(value: Any) -> Any:
    """Yield every (table or list, key) in a JSON value."""
    for key in (
        list(value)
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else ()
    ):
        yield value, key
        yield from _places(value[key])


def attempt(world: World, station: str, outside: Path, draw: random.Random) -> tuple[str, str, str]:
    """Return what came of one damage: the outcome, what was done, and what was said."""
    folder = world.base.parent / "damaged" / station
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(world.base / station, folder)
    damage = Damage(folder, outside, draw)
    try:
        outcome = world.stations[station](folder)
    except Interrupted:
        raise
    except KsparseError as error:
        return ("detected" if str(error).strip() else "crash"), damage.said, str(error)
    except Exception:  # whatever it is, it is what this looks for
        return "crash", damage.said, traceback.format_exc()
    if outcome == "wrong" and damage.way in WITH_THEIR_SUM:
        outcome = "harmless"
    return outcome, damage.said, ""


def fuzz(
    world: World,
    corruptions: int,
    seed: int,
    *,
    pages: int = 0,
    observe: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Return the counts of all outcomes, and what was done where one is bad. pages: how many reports may be written."""
    draw, counts, bad, kinds = random.Random(seed), collections.Counter(), [], collections.Counter()
    by_station: dict[str, collections.Counter] = {
        name: collections.Counter() for name in world.stations
    }
    world.reports_left = pages
    outside = world.base.parent / "outside"
    outside.write_bytes(b"outside")
    names = [*world.stations, *["run"] * 8, *["shards"] * 2]
    for number in range(corruptions):
        station = draw.choice(names)
        outcome, said, why = attempt(world, station, outside, draw)
        counts[outcome] += 1
        by_station[station][outcome] += 1
        kinds[said.split()[0]] += 1
        if outcome in ("wrong", "crash"):
            bad.append({"number": number, "outcome": outcome, "damage": said, "why": why[-1500:]})
        observe(number + 1)
    return {
        "corruptions": corruptions,
        "seed": seed,
        **{name: counts[name] for name in ("detected", "older", "harmless", "wrong", "crash")},
        "by_folder": {name: dict(found) for name, found in by_station.items()},
        "by_damage": dict(kinds.most_common()),
        "bad": bad,
    }


# ---- what somebody may give --------------------------------------------------------------------


class Trial(NamedTuple):
    """An input: what it is, and what reads it. It may be read or refused with a KsparseError."""

    said: str
    run: Callable[[], Any]


class TooLong(BaseException):
    """An input took longer than it may; no `except Exception` is to take it."""


def text_input(world: World, folder: Path, draw: random.Random) -> Trial:
    """A text of any kind, right or wrong in its bytes, lines, rows, columns or compression."""
    form = draw.choice((".txt", ".jsonl", ".jsonl", ".parquet"))
    column = draw.choice(("text", "text", "text", "a.b", "", "\u00e9"))
    texts = [words(draw) for _ in range(draw.choice((0, 1, 5, 60)))]
    if form == ".txt":
        data = encoded("<|endoftext|>".join(texts), draw)
    elif form == ".jsonl":
        data = b"".join(line(draw, {column: text}) for text in texts)
    else:
        data = table(draw, column, texts)
    squeeze = draw.choice(("", "", ".gz", ".xz", ".zst"))
    data = garbled(packed(squeeze, data), draw) if draw.random() < 0.4 else packed(squeeze, data)
    name = "a" + (form if draw.random() < 0.9 else draw.choice((".txt", ".jsonl", ".parquet")))
    name += squeeze if draw.random() < 0.9 else draw.choice(("", ".gz", ".xz", ".zst"))
    (folder / name).write_bytes(data)
    acts = ActsConfig(
        text=str(folder / draw.choice((name, name, ""))), text_field=column, context=8
    )

    def read() -> None:
        sources.warn_once.cache_clear()
        for split in SPLITS:
            for document in documents.documents(acts, split):
                document.text.encode()
        corpus = Corpus(acts, world.tokenizer, "train", per_document=5)
        corpus.batch(list(itertools.islice(corpus.contexts(), 3)))

    return Trial(name, read)


def suite_input(world: World, folder: Path, draw: random.Random) -> Trial:
    """A suite, or rows of which one is built."""
    rows = [
        {"text": f"x = {i} {words(draw) if draw.random() < 0.1 else ''}", "label": i % 2}
        for i in range(60)
    ]
    if draw.random() < 0.5:
        data = b"".join(line(draw, row, odd=0.01) for row in rows)
        name = draw.choice(("task.jsonl", "task.jsonl.gz"))
        data = packed(".gz" if name.endswith(".gz") else "", data)
        (folder / name).write_bytes(garbled(data, draw) if draw.random() < 0.3 else data)
        return Trial(name, lambda: suite.read(folder))
    name = draw.choice(("train.jsonl", "train.csv", "train.tsv", "train.parquet", "train.jsonl.gz"))
    place = folder / "local" / "nyu-mll__glue"
    place.mkdir(parents=True)
    if name.endswith("sv"):
        comma = draw.choice((",", "\t", ";"))
        lines = [
            comma.join(("sentence", "label")),
            *(comma.join((words(draw)[:200], str(row["label"]))) for row in rows),
        ]
        data = encoded(draw.choice(("\n", "\r", "\r\n")).join(lines), draw)
    elif name.endswith("parquet"):
        data = table(draw, "sentence", [row["text"] for row in rows])
    else:
        data = b"".join(
            line(draw, {"sentence": row["text"], "label": row["label"]}, odd=0.01) for row in rows
        )
    data = packed(".gz" if name.endswith(".gz") else "", data)
    (place / f"cola.{name}").write_bytes(garbled(data, draw) if draw.random() < 0.3 else data)
    text = place / f"cola.{name}" if draw.random() < 0.5 else folder
    return Trial(
        f"build {name}",
        lambda: suites.build(
            folder / "suite",
            rows=40,
            local=folder / "local",
            text=str(text),
            only=["cola", "base64"],
        ),
    )


def recipe_input(world: World, folder: Path, draw: random.Random) -> Trial:
    """A recipe or a sweep: a right one with other values, or TOML that nobody would write."""
    given = draw.choice(
        sorted((world.base / "recipes").glob("*.toml")) + [world.base / "sweep" / "sweep.toml"] * 2
    )
    shutil.copy(given, folder / "r.toml")
    for _ in range(draw.choice((1, 1, 3))):
        Damage(
            folder,
            folder,
            draw,
            (Damage.other_toml,) * 3
            + (Damage.odd_toml, Damage.garble, Damage.flip, Damage.cut_out),
        )
    return Trial(
        given.name,
        lambda: (
            grid.read(folder / "r.toml")
            if given.name == "sweep.toml"
            else recipes.load_recipe(folder / "r.toml")
        ),
    )


def flags_input(world: World, folder: Path, draw: random.Random) -> Trial:
    """Flags of `train`, some with values that do not fit."""
    keys = list(recipes.flat(recipes.to_dict(Recipe()))) + [
        "out",
        "sae.activation.l1",
        "help",
        "x",
        "sae",
        "",
    ]
    arguments = []
    for _ in range(draw.choice((1, 2, 6))):
        key = draw.choice(keys)
        key = draw.choice((key, key, key.replace("_", "-"), key[:-1], key + "x"))
        value = draw.choice(
            (
                "0",
                "-1",
                "7",
                "1e9",
                "1.5",
                "nan",
                "inf",
                "-inf",
                "1e400",
                "9" * 30,
                "1" * 5_000,
                "True",
                "none",
                "",
                " ",
                "relu",
                "auto",
                "x" * 5_000,
                "\udcff",
                "\0",
                "--",
                "[]",
                "{}",
                "../x",
                "0x10",
                "1_0",
                "\u0663",
            )
        )
        arguments += draw.choice(([f"--{key}", value], [f"--{key}={value}"], [f"--{key}"], [value]))

    def read() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                recipe, _, _ = parse_recipe(TrainArgs, "train", arguments)
            except SystemExit as done:  # of tyro, which has said why
                if done.code not in (0, 2):
                    raise AssertionError(f"exit code {done.code}") from None
                return
            atomic.write_text(folder / "r.toml", recipes.to_toml(recipe))
            if recipes.load_recipe(folder / "r.toml") != recipe:
                raise AssertionError("the stored recipe is another")

    return Trial(" ".join(map(repr, arguments))[:300], read)


def labels_input(world: World, folder: Path, draw: random.Random) -> Trial:
    """A run's labels.json, edited by hand."""
    shutil.copytree(
        world.base / "run", folder / "run", ignore=shutil.ignore_patterns("checkpoints")
    )
    file = folder / "run" / "labels.json"
    keys = [
        "3",
        "007",
        "-1",
        "1" * 5_000,
        "x",
        "",
        "\u0663",
        "\ud800",
        "9" * 30,
        " 3",
        "1.5",
        "__proto__",
    ]
    table = {
        "format": 1,
        "latents": {
            key: {"label": words(draw)[:50], "star": draw.random() < 0.5}
            for key in draw.sample(keys, draw.randrange(5))
        },
    }
    file.write_bytes(odd_json(table, draw))
    latent, label, star = (
        draw.choice((3, 0, 63, 64, -1, True, None, "3", 10**400)),
        odd_value(draw, words(draw)[:2000]),
        draw.choice((True, False, None, 1)),
    )

    def read() -> None:
        labels = Labels(RunFolder(folder / "run"), 64)
        json.dumps(labels.all())
        labels.set(latent, label, star)
        json.dumps(labels.all())

    return Trial(file.name, read)


def results_input(world: World, folder: Path, draw: random.Random) -> Trial:
    """A run's results, lines or environment, changed as somebody would who makes the sums fit."""
    said = altered(
        world,
        "run",
        folder,
        draw,
        (
            "evals/*",
            "evals/*",
            "metrics.jsonl",
            "environment.json",
            "alarms.jsonl",
            "curve.jsonl",
            "recipe.toml",
        ),
    )
    run = RunFolder(folder / "run")

    def read() -> None:
        reports.write(run)
        pieces = Resources(run, 16)
        for name in pieces.names():
            json.dumps(pieces.get(name), allow_nan=False)

    return Trial(said, read)


def shards_input(world: World, folder: Path, draw: random.Random) -> Trial:
    """Shards, changed as somebody would who makes the sums fit."""
    said = altered(
        world,
        "shards",
        folder,
        draw,
        ("manifest.json", "manifest.json", "*.safetensors", "documents.json"),
    )

    def read() -> None:
        found = shards.Shards(folder / "shards")
        stream = ShardStream(found, batch=16, seed=0)
        for batch in itertools.islice(stream.batches(), 3):
            stream.document_names(batch.documents)
        found.check_fits(world.recipe.acts)

    return Trial(said, read)


def sae_input(world: World, folder: Path, draw: random.Random) -> Trial:
    """An autoencoder in our own format, changed as somebody would who makes the sums fit."""
    name = draw.choice(("export", "sliced"))
    said = altered(
        world, name, folder, draw, ("sae.json", "sae.json", "*.safetensors", "manifest.json")
    )
    with_lm = draw.random() < 0.2

    def read() -> None:
        sae = serialization.load(folder / name)
        sae.decode(sae.encode(torch.randn(3, sae.shape.d_model)))
        if with_lm:
            load_lm(sae, "cpu")

    return Trial(said, read)


def state_input(world: World, folder: Path, draw: random.Random) -> Trial:
    """A run whose checkpoints were changed as somebody would who makes the sums fit; it is gone on with."""
    said = altered(
        world,
        "run",
        folder,
        draw,
        (
            "checkpoints/*/state.json",
            "checkpoints/*/state.json",
            "checkpoints/*/*.json",
            "checkpoints/*/*.safetensors",
        ),
    )
    return Trial(said, lambda: world.read_run(folder / "run"))


KINDS: dict[str, Callable[[World, Path, random.Random], Trial]] = {
    "text": text_input,
    "suites": suite_input,
    "recipes": recipe_input,
    "flags": flags_input,
    "labels": labels_input,
    "results": results_input,
    "shards": shards_input,
    "sae": sae_input,
    "state": state_input,
}
"""A fuzzer for each kind of input: f(world, empty folder, draw) -> Trial."""


# ---- how it is made odd


def words(draw: random.Random) -> str:
    """Return a text of characters that are known for trouble."""
    parts = (
        "the old dog ",
        "\n",
        "\r",
        "\r\n",
        "\t",
        "\0",
        "\ud83d",
        "\ude00",
        "\U0001f600",
        "\ufeff",
        "\ufffe",
        "\u2028",
        "\x85",
        "\x1b[31m",
        "<|endoftext|>",
        "<|endof",
        "text|>",
        "<s>",
        "caf\u00e9 ",
        "\u202e",
        "\u0301",
        '"',
        "'",
        ",",
        "\\",
        "<script>",
        "x" * 300,
        " " * 300,
    )
    text = "".join(draw.choice(parts) for _ in range(draw.choice((0, 1, 3, 10, 40))))
    return text * draw.choice((1,) * 9 + (200,))


def encoded(text: str, draw: random.Random) -> bytes:
    code = draw.choice(("utf-8",) * 8 + ("utf-8-sig", "utf-16", "utf-16-le", "latin-1", "utf-32"))
    return text.encode(code, "surrogatepass" if code.startswith("utf") else "replace")


def odd_value(draw: random.Random, value: Any) -> Any:
    """Return a value, or another that may be in its place."""
    return (
        value
        if draw.random() < 0.7
        else draw.choice(
            (
                None,
                True,
                0,
                -1,
                1.5,
                10**400,
                float("nan"),
                float("inf"),
                "",
                "x",
                "\ud800",
                "x" * 5_000,
                [],
                [None],
                {},
                {"a": 1},
                [[[[]]]],
                [value],
                {"value": value},
                "../x",
                2**63,
                -(2**31),
            )
        )
    )


def odd_json(value: Any, draw: random.Random) -> bytes:
    """Return JSON of a value of which some places are changed, or one number has thousands of digits, or one list thousands of brackets."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((0, 1, 1, 2, 5))):
        if places := list(_places(value)):
            holder, key = draw.choice(places)
            holder[key] = odd_value(draw, holder[key])
    text = json.dumps(value, ensure_ascii=draw.random() < 0.7)
    if draw.random() < 0.1:
        text = text.replace(
            draw.choice((":", ",", "[")),
            draw.choice((":" + "1" * 5_000 + ",", ":" + "[" * 5_000, "[" * 3_000, '{"a":' * 3_000)),
            1,
        )
    return text.encode("utf-8", "surrogatepass")


def line(draw: random.Random, row: dict[str, Any], odd: float = 0.05) -> bytes:
    """Return a line of JSON, or with the given chance something else."""
    if draw.random() > odd:
        return json.dumps(row).encode() + b"\n"
    return draw.choice(
        (
            odd_json(row, draw),
            odd_json(row, draw),
            b"",
            b"null",
            b"[]",
            b"7",
            b"{}",
            b"\xff",
            b"\xef\xbb\xbf{}",
            b"[" * 5_000,
            b"1" * 5_000,
            b'{"text": "\xed\xa0\xbd"}',
        )
    ) + draw.choice((b"\n", b"\r", b"\r\n", b"\n\n", b"", b"\x85"))


def table(draw: random.Random, column: str, texts: list[str]) -> bytes:
    """Return a parquet file whose column holds texts, or something else."""
    import pyarrow as pa
    from pyarrow import parquet

    whole = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    data = [item.encode("utf-8", "surrogatepass") for item in texts]
    binary = pa.array(data, pa.binary())
    made = draw.choice(
        (
            lambda: pa.array(whole, pa.string()),
            lambda: pa.array(whole, pa.large_string()),
            lambda: pa.array(whole, pa.string()).dictionary_encode(),
            lambda: pa.nulls(len(whole)),
            lambda: pa.array(
                [item if draw.random() < 0.8 else None for item in whole], pa.string()
            ),
            lambda: binary,
            lambda: pa.array(list(map(len, whole))),
            lambda: pa.array([[item] for item in whole]),
            lambda: pa.array([{"a": item} for item in whole], pa.struct({"a": pa.string()})),
            lambda: pa.Array.from_buffers(pa.string(), len(binary), binary.buffers()),
            lambda: pa.array([draw.random() for _ in whole]),
        )
    )()
    columns = {
        column: made,
        "label": pa.array([i % 2 for i in range(len(texts))]),
        "n": pa.array(range(len(texts))),
    }
    if draw.random() < 0.1:
        columns.pop(column)
    stream = io.BytesIO()
    parquet.write_table(
        pa.table(columns),
        stream,
        compression=draw.choice(("none", "snappy", "gzip", "zstd")),
        row_group_size=draw.choice((1, 7, 1000)),
        use_dictionary=draw.random() < 0.5,
        data_page_version=draw.choice(("1.0", "2.0")),
    )
    return stream.getvalue()


def packed(squeeze: str, data: bytes) -> bytes:
    import zstandard

    return {
        "": bytes,
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
    }[squeeze](data)


def garbled(data: bytes, draw: random.Random) -> bytes:
    """Return bytes of which some are cut off, changed, doubled or put elsewhere."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 10))):
        at, n = draw.randrange(len(found) + 1), draw.choice((1, 1, 4, 100))
        found[at : at + n] = draw.choice(
            (
                lambda: b"",
                lambda: draw.randbytes(n),
                lambda: bytes(n),
                lambda: found[at : at + n] * 2,
                lambda: draw.choice((b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf")),
            )
        )()
    return bytes(found[: draw.randrange(len(found) + 1)] if draw.random() < 0.3 else found)


def altered(
    world: World, station: str, folder: Path, draw: random.Random, patterns: Sequence[str]
) -> str:
    """Copy a station, change contents of some of its files, and make the sums fit; return what was done."""
    root = folder / station
    shutil.copytree(world.base / station, root)
    said = []
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        there = sorted(root.glob(draw.choice(patterns)))
        if not there:
            continue
        file = draw.choice(there)
        try:
            said.append(f"{alter(file, draw)} {file.relative_to(root)}")
        except (ValueError, RecursionError, OSError, RuntimeError):
            continue  # it was spoilt already
    for file in sorted(root.rglob("*.json")):
        resum(file)
    return ", ".join(said)


def alter(file: Path, draw: random.Random) -> str:
    """Change what a file holds; return how."""
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        name = draw.choice(sorted(tensors))
        tensor = tensors[name]
        ways: dict[str, Callable[[], Any]] = {
            "nan in": lambda: torch.full_like(
                tensor, float("nan") if tensor.is_floating_point() else -1
            ),
            "huge": lambda: tensor.fill_(3e38 if tensor.is_floating_point() else 2**30),
            "no rows of": lambda: tensor[:0] if tensor.ndim else tensor[None][:0],
            "half of": lambda: tensor[: len(tensor) // 2] if tensor.ndim else tensor,
            "double": lambda: tensor.double(),
            "int": lambda: tensor.int(),
            "bool": lambda: tensor.bool(),
            "complex": lambda: tensor.to(torch.complex64),
            "turned": lambda: tensor.T if tensor.ndim == 2 else tensor[None],
            "negative": lambda: -tensor,
            "no": lambda: None,
            "scalar": lambda: torch.tensor(1.0),
        }
        way = draw.choice(sorted(ways))
        tensors[draw.choice((name, name, name, "other"))] = ways[way]()
        save_file(
            {
                key: value.contiguous().clone()
                for key, value in tensors.items()
                if value is not None
            },
            file,
        )
        return f"{way} {name}"
    if file.suffix in (".json", ".jsonl"):
        text = file.read_text(encoding="utf-8")
        rows = (
            [json.loads(text)]
            if file.suffix == ".json"
            else [json.loads(row) for row in text.splitlines() if row]
        )
        file.write_bytes(
            b"\n".join(
                odd_json(row, draw)
                if draw.random() < 0.3 or len(rows) == 1
                else json.dumps(row).encode()
                for row in rows
            )
            + b"\n"
        )
        return "odd"
    Damage(file.parent, file.parent, draw, (Damage.other_toml,) * 3 + (Damage.odd_toml,), file)
    return "odd"


def resum(file: Path) -> None:
    """Make the sums in a JSON file fit what lies beside it, and its seal what is in it."""
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return
    if not isinstance(found, dict) or not {jsonio.SEAL, "sha256", "arrays_sha256"} & set(found):
        return
    sums, beside = found.get("sha256"), file.with_suffix(".safetensors")
    if isinstance(sums, dict):
        found["sha256"] = {
            name: atomic.sha256(file.parent / name) if (file.parent / name[:200]).is_file() else sum
            for name, sum in sums.items()
        }
    for entry in found["shards"] if isinstance(found.get("shards"), list) else ():
        if (
            isinstance(entry, dict)
            and isinstance(entry.get("file"), str)
            and (file.parent / entry["file"][:200]).is_file()
        ):
            entry["sha256"] = atomic.sha256(file.parent / entry["file"])
    if "names_sha256" in found and (file.parent / shards.NAMES).is_file():
        found["names_sha256"] = atomic.sha256(file.parent / shards.NAMES)
    if "arrays_sha256" in found and beside.is_file():
        found["arrays_sha256"] = atomic.sha256(beside)
    found.pop(jsonio.SEAL, None)
    _seal(file, found)


# ---- and tried


def try_input(
    world: World, kind: str, folder: Path, seed: int, number: int, limit: float = 0.0
) -> tuple[str, str, str]:
    """Return what came of input `number` of a kind, the same one each time: the outcome, what it was, and what was said."""
    draw = random.Random(f"{kind} {seed} {number}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trial = KINDS[kind](world, folder, draw)

    def stop(signum: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop) if limit else None
    try:
        if limit:
            signal.setitimer(signal.ITIMER_REAL, limit)
        trial.run()
    except KsparseError as error:
        return ("refused" if str(error).strip() else "crash"), trial.said, str(error)
    except TooLong:
        return "slow", trial.said, traceback.format_exc()
    except Exception:
        return "crash", trial.said, traceback.format_exc()
    finally:
        if limit:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    return "read", trial.said, ""


def try_inputs(
    world: World,
    kinds: Sequence[str],
    seed: int,
    *,
    each: int = 0,
    seconds: float = 0.0,
    limit: float = 0.0,
    observe: Callable[[str], None] = lambda said: None,
) -> dict[str, Any]:
    """Try so many inputs of each kind, or as many as so many seconds hold, the kinds in turn; return counts by kind, and the inputs that are bad."""
    counts = {kind: collections.Counter() for kind in kinds}
    bad, began, folder = [], time.monotonic(), world.base.parent / "input"
    for number in itertools.count():
        for kind in kinds:
            until = time.monotonic() + 2.0  # cheap kinds get more inputs than dear ones
            for part in range(100 if seconds else 1):
                outcome, said, why = try_input(
                    world, kind, folder, seed, 100 * number + part, limit
                )
                counts[kind][outcome] += 1
                if outcome in ("crash", "slow"):
                    bad.append(
                        {
                            "input": f"{kind} {seed} {100 * number + part}",
                            "outcome": outcome,
                            "said": said,
                            "why": why[-1500:],
                        }
                    )
                    observe(
                        f"{kind} {seed} {100 * number + part}: {outcome}, {said[:200]}\n{why[-1500:]}"
                    )
                if time.monotonic() > until:
                    break
        if number + 1 == each or seconds and time.monotonic() - began > seconds:
            return {
                "seed": seed,
                "inputs": {kind: dict(counts[kind]) for kind in kinds},
                "bad": bad,
            }


def small_recipe(folder: Path) -> Recipe:
    """Return a run of 12 steps on the smallest built-in LM and some Python source."""
    texts = [
        file.read_text(encoding="utf-8")[:4_000]
        for file in sorted(Path(json.__file__).parents[1].glob("*.py"))[:60]
    ]
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    return recipes.from_dict(
        {
            "acts": {
                "lm": "pylm/0.3m",
                "site": "resid_post.2",
                "text": str(folder / "texts.jsonl"),
                "mix": 256,
                "context": 32,
                "lm_batch": 8,
            },
            "sae": {"n_latents": 64, "k": 4, "dead_after": 64, "k_aux": 8},
            "curve": {"held_out": 64, "octaves": 3},
            "run": {
                "device": "cpu",
                "kernels": "torch",
                "log_every": 1,
                "save_every": 3,
                "keep": 3,
            },
            "tokens": 12 * 32,
            "batch": 32,
            "threads": 1,
        }
    )


# ---- requests to the viewer ----------------------------------------------------------------------


def requests(
    run: RunFolder, count: int, seed: int, *, observe: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Send requests at random to a viewer of a run, over labels of all kinds; count the answers.

    bad: status 500, an exception in the log, no end within a minute, a label or an unreadable
    file of labels that is gone. The run's own labels are put back.
    """
    from ksparse.viewer import server

    draw, statuses, bad, raised = random.Random(seed), collections.Counter(), [], []
    listener, made = server.listen(0), server.make_server(run, "token")
    port, patience, server.PATIENCE = listener.getsockname()[1], server.PATIENCE, 0.1
    noted = logging.Handler()
    noted.emit = lambda record: raised.append(logging.Formatter().format(record))
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addHandler(noted)
    thread = threading.Thread(target=made.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    labels, kept = run.path / "labels.json", run.path / "labels.json.kept"
    if labels.exists():
        labels.rename(kept)
    try:
        for number in range(count):
            if number == 0 or draw.random() < 0.03:
                with atomic.locked(run.path, ".labels.lock", wait=60):  # an answer may be under way
                    content = _labels(draw, labels)
            sent = b"".join(_request(draw, port) for _ in range(draw.choice((1, 1, 1, 1, 2))))
            answer = _answer(port, sent)
            statuses[answer[:12].decode("latin-1").partition(" ")[2] or "closed"] += 1
            why = [
                *raised,
                *(["500"] if b"HTTP/1.1 500" in answer else []),
                *([] if answer != b"late" else ["no end"]),
                *_lost(labels, content),
            ]
            if why:
                bad.append({"number": number, "sent": repr(sent[:600]), "why": why[0][-1500:]})
                raised.clear()
            observe(number + 1)
    finally:
        made.should_exit = True
        thread.join(30)
        listener.close()
        server.PATIENCE = patience
        _remove(labels)
        if kept.exists():
            kept.rename(labels)
    return {"requests": count, "seed": seed, "statuses": dict(statuses.most_common()), "bad": bad}


STRANGE = (
    None,
    True,
    False,
    "",
    "x",
    "\0",
    "\ud800",
    "\u202e<script>",
    "日本 \U0001f600",
    "x" * 30_000,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**400,
    -(10**4000),
    0.5,
    -1e38,
    1e38,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    [],
    {},
    [1],
    {"a": 1},
    [[[[]]]],
    "<|endoftext|>",
    "def f(x):\n    return ",
)
_PATHS = (
    "/",
    "/report.html",
    "/main.js",
    "/data/overview.json",
    "/data/labels.json",
    "/data/latents/3.json",
    "/data/near/0.json",
    "/data/glosses/0.json",
    "/data/tasks.json",
    "/data/example.json",
    "/data/runs.json",
    "/data/run/x/overview.json",
    "/data/tokens/0.json",
    "/data/columns/density.json",
    "/data/maps/pca.json",
    *("/api/label", "/api/steer") * 5,
    *("/api/activations",) * 3,
)
_PARTS = (
    "..",
    "%2e%2e",
    "%00",
    "%ff",
    "%ed%a0%80",
    "//",
    "latents/-1",
    "9" * 5_000,
    "?token=",
    "#",
)
_HEADERS = (
    ("Host", "localhost"),
    ("Host", ""),
    ("Host", "evil.example"),
    ("Host", "\xe9"),
    ("Origin", "null"),
    ("Authorization", "Bearer \xff"),
    ("Authorization", ""),
    ("Authorization", "x" * 5_000),
    ("Content-Type", "APPLICATION/JSON ; x"),
    ("Content-Type", ""),
    ("Content-Type", "\xff"),
    ("Content-Length", "10"),
    ("Content-Length", "-1"),
    ("Content-Length", "9" * 30),
    ("Transfer-Encoding", "chunked"),
    ("Transfer-Encoding", "x"),
    ("Expect", "100-continue"),
    ("Upgrade", "websocket"),
    ("Connection", "upgrade"),
    ("Connection", "keep-alive"),
    ("X-Forwarded-For", "\xff,,"),
    ("X-Forwarded-Proto", "x"),
    ("Range", "bytes=9-"),
    ("Sec-Fetch-Site", "x"),
    ("Cookie", "a=\xff;;"),
    ("X" * 300, "y" * 70_000),
)


def _request(draw: random.Random, port: int) -> bytes:
    """Return the bytes of one request, each part of it right or not."""
    path = draw.choice(_PATHS)
    if draw.random() < 0.1:
        at = draw.randrange(1, len(path) + 1)
        path = path[:at] + draw.choice(_PARTS) + path[at:]
    if draw.random() < 0.1:
        path += draw.choice(("?token=token", "?token=%ff&token=token", "?" + "&" * 500, "?token"))
    api = path.startswith("/api")
    method = (
        draw.choice(("GET", "HEAD", "PUT", "OPTIONS", "FOO", "get"))
        if draw.random() < 0.1
        else "POST"
        if api
        else "GET"
    )
    body = _body(draw) if api or draw.random() < 0.05 else b""
    headers = {
        "Host": f"127.0.0.1:{port}",
        "Connection": "close",
        "Authorization": "Bearer token",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    }
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        name, value = draw.choice(_HEADERS)
        headers[name] = value
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    whole = f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body
    if draw.random() < 0.05:
        at = draw.randrange(len(whole))
        whole = draw.choice(
            (whole[:at], whole[:at] + draw.randbytes(3) + whole[at:], draw.randbytes(99))
        )
    return whole


def _body(draw: random.Random) -> bytes:
    table: dict[str, Any] = {
        "text": "def f(x):",
        "latent": 3,
        "latents": [[3, 1.5], [5, -1]],
        "tokens": 4,
        "star": True,
        "label": f"a label {draw.random()}",
    }
    if draw.random() < 0.3:
        table["at"] = 1
    for _ in range(draw.choice((0, 0, 1, 1, 2))):
        key = draw.choice(
            ("text", "latent", "latents", "tokens", "temperature", "seed", "run", "label")
            + ("star", "at", "")
        )
        table[key] = draw.choice(STRANGE)
    text = json.dumps(table)
    return draw.choice(
        (
            *(text.encode(),) * 12,
            text.encode("utf-16"),
            b"",
            text[: draw.randrange(len(text))].encode(),
            json.dumps(list(table)).encode(),
            draw.randbytes(50),
            b"[" * 100_000,
            b" " * 1_000_001,
            b'{"latents": %s1%s, "text": "x"}' % (b"[" * 900, b"]" * 900),
            b'{"latents": [[3, 1e400]], "text": "x"}',
            b'{"latent": 1' + b"0" * 5_000 + b"}",
            text.replace("}", ', "latent": 5}').encode(),
        )
    )


def _answer(port: int, sent: bytes) -> bytes:
    """Return what comes back until the server closes the connection, which may be nothing."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        answer = b""
        try:
            client.sendall(sent)
            while part := client.recv(1 << 16):
                answer += part
        except TimeoutError:
            return b"late"
        except OSError:  # it did not want to hear the rest
            pass
        return answer


def _labels(draw: random.Random, file: Path) -> Any:
    """Put labels of some kind beside a run; return its latents, or the text that is none."""
    _remove(file)
    keys = ("1", "3", "017", "x", "\u0661", "\ud800", "1" * 5_000, "-1", "__proto__", "9" * 12)
    entries = (
        {},
        {"label": "y", "star": True},
        {"label": draw.choice(STRANGE[:10])},
        {"star": draw.choice(STRANGE[:10]), "more": [1]},
    )
    latents = {draw.choice(keys): draw.choice(entries) for _ in range(5)}
    unreadable = (
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"format": 2, "latents": {}}',
        '{"format": 1, "latents": {"1": 5}}',
        '{"format": NaN}',
    )
    what = draw.choice(("ours",) * 5 + ("unreadable",) * 3 + ("deep", "link", "folder", "fifo"))
    if what == "link":
        file.symlink_to(draw.choice(("/etc/hostname", "nowhere", ".", "labels.json")))
    elif what == "folder":
        file.mkdir()
    elif what == "fifo":
        os.mkfifo(file)
    elif what == "deep":
        nested = "[" * 900 + "]" * 900
        file.write_text('{"format": 1, "latents": {"1": {"a": ' + nested + "}}}")
    else:
        text = draw.choice(unreadable)
        file.write_text(json.dumps({"format": 1, "latents": latents}) if what == "ours" else text)
        return latents if what == "ours" else text
    return None


def _lost(file: Path, content: Any) -> list[str]:
    """Return what is gone of labels that were there; requests write to a few of them."""
    if isinstance(content, str) and file.read_text() != content:
        return ["unreadable labels were overwritten"]
    if isinstance(content, dict):
        left = json.loads(file.read_text())["latents"]
        return ["a label is gone"] if {*content} - {*left} - {"0", "1", "3", "5"} else []
    return []


def _remove(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corruptions", type=int, default=2000)
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="try inputs of all kinds in turn for so long, instead of corruptions",
    )
    parser.add_argument(
        "--kinds", default=",".join([*KINDS, "requests"]), help="of these kinds alone: %(default)s"
    )
    parser.add_argument(
        "--again", default="", help="one input, such as 'text 0 17', and leave it in ./fuzz-input"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="how long one input may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pages", type=int, default=200, help="reports that are written, at most; a second each"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("ksparse").setLevel(logging.CRITICAL)
    began = time.monotonic()

    def progress(done: int) -> None:
        if done % 100 == 0:
            spent = time.monotonic() - began
            print(
                f"{done} of {options.corruptions}, {spent:.0f} s, about {spent / done * (options.corruptions - done):.0f} s to go",
                file=sys.stderr,
                flush=True,
            )

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "whole").mkdir()
        world = World(Path(folder) / "whole", small_recipe(Path(folder)))
        if options.again:
            kind, seed, number = options.again.split()
            print(
                *try_input(
                    world, kind, Path("fuzz-input"), int(seed), int(number), options.seconds
                ),
                sep="\n",
            )
            return
        kinds = options.kinds.split(",")
        if options.minutes:
            found = try_inputs(
                world,
                [kind for kind in kinds if kind != "requests"],
                options.seed,
                seconds=54 * options.minutes,
                limit=options.seconds,
                observe=lambda said: print(said, file=sys.stderr, flush=True),
            )
            if "requests" in kinds:  # about a tenth of the time
                asked = requests(world.run, int(150 * options.minutes), options.seed)
                found = {**found, "requests": asked, "bad": found["bad"] + asked["bad"]}
        else:
            found = fuzz(
                world, options.corruptions, options.seed, pages=options.pages, observe=progress
            )
    print(json.dumps(found | {"seconds": round(time.monotonic() - began)}, indent=1))
    sys.exit(1 if found["bad"] else 0)


if __name__ == "__main__":
    main()
