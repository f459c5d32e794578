"""What `faults.py --only KIND` kills: every command that writes beside training.

Each kind is a command whose life is a process forked from one that has imported everything. Half of
the lives are killed at a random moment of their time, half at a random call of those that change
what is on the disk, since most moments are spent on other things. After each kill all that was
there before must be whole; after the last one the command must work, give what an undisturbed one
gives, and leave no temporary file.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ksparse import cli
from ksparse.storage import checksums, jsonio
from ksparse.storage.run_folder import RunFolder

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)/(?:\S*[?&]token=([\w-]+))?")
PATIENCE = 120.0  # seconds for a life that is not killed


class Life:
    """A forked process that does one thing; killed at call number `at` of CALLS, if not 0."""

    def __init__(self, work: Callable[[], Any], log: Path, at: int = 0):
        self.log, self.began = log, time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            self._live(work, at)

    def _live(self, work: Callable[[], Any], at: int) -> None:
        code, calls = 1, 0

        def counted(own: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return own(*args, **options)

            return call

        try:
            stream = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for handle in (1, 2):
                os.dup2(stream, handle)
            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
            work()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            self.log.with_suffix(".calls").write_text(str(calls))
            os._exit(code)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def over(self) -> bool:
        """Reap it, if it has ended."""
        if self.pid and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.pid = 0
        return not self.pid

    def end(self) -> int:
        """Wait for it; return its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


class Kind:
    """A command, the folder that it writes to, and what must hold whenever it was killed."""

    def __init__(self, home: Path, run: Path):
        self.home, self.run = home, RunFolder(home / "run")
        shutil.copytree(run, self.run.path)

    def work(self) -> Any:
        """Do it, in the process that may be killed."""

    def wrong(self) -> list[str]:
        """Return what is not whole; ask after each kill."""
        return []

    def contents(self) -> Any:
        """Return what the command makes; the same after an undisturbed one and after the last."""

    def again(self) -> None:
        """Make way for the next life, where the command makes a thing only once."""


def whole_results(run: RunFolder, names: set[str]) -> list[str]:
    wrong = []
    for name in names:
        try:
            result = run.eval(name)
            if result is None or "arrays" in result and run.arrays_file(name, result) is None:
                wrong.append(f"{name} is gone")
        except Exception as error:
            wrong.append(str(error))
    return wrong


class Eval(Kind):
    def work(self) -> None:
        cli.main(
            [
                "eval",
                str(self.run.path),
                "stats",
                "--tokens",
                "600",
                "--examples",
                "2",
                "--device",
                "cpu",
            ]
        )

    def wrong(self) -> list[str]:
        return whole_results(self.run, {"stats", "downstream"}) + whole_page(self.run.report_file)

    def contents(self) -> Any:
        result = self.run.eval("stats")
        names = sorted(path.name for path in (self.run.path / "evals").iterdir())
        return names, {key: value for key, value in result.items() if key != "seconds"}


def whole_page(page: Path) -> list[str]:
    return [] if page.read_text().endswith("</html>\n") else [f"{page} is cut off"]


class Report(Kind):
    def work(self) -> None:
        cli.main(["report", str(self.run.path)])

    def wrong(self) -> list[str]:
        figures = list((self.run.path / "figures").glob("*.svg"))
        cut = [str(file) for file in figures if not file.read_text().rstrip().endswith("</svg>")]
        return (
            whole_results(self.run, {"stats", "downstream"})
            + whole_page(self.run.report_file)
            + cut
            + ["no figures"] * (not figures)
        )

    def contents(self) -> Any:
        return {path.name for path in self.run.path.rglob("*")}, self.run.report_file.read_bytes()


class Export(Kind):
    def work(self) -> None:
        cli.main(["view", str(self.run.path), "--export", str(self.home / "site")])

    def wrong(self) -> list[str]:
        site = self.home / "site"
        if not site.exists():
            return [] if not hasattr(self, "made") else ["the site is gone"]
        if not hasattr(self, "made"):
            if (
                not (site / "ksparse-site.json").exists()
                or Life(self.work, self.home / "first.log").end()
            ):
                return []
            (site / "CNAME").write_text("mine")
            (site / ".git").mkdir()
            (site / ".git" / "HEAD").write_text("mine")
            self.made = self.contents()
        now = self.contents()
        return [
            f"{name} is not what it was" for name in self.made if now.get(name) != self.made[name]
        ]

    def contents(self) -> Any:
        place = self.home / "site"
        return {
            str(path.relative_to(place)): path.read_bytes()
            for path in sorted(place.rglob("*"))
            if path.is_file() and not str(path.relative_to(place)).startswith(".tmp-")
        }


class Labels(Kind):
    """A server is killed while a client sets labels; each that was answered must be there."""

    def __init__(self, home: Path, run: Path):
        super().__init__(home, run)
        self.kept: dict[str, str] = {}

    def work(self) -> None:
        cli.main(["view", str(self.run.path), "--port", "0"])

    def post_until(self, life: Life, until: float) -> None:
        """Set labels until a time, or until the server is gone."""
        while not (address := ADDRESS.search(life.said()) if life.log.exists() else None):
            if life.over() or time.monotonic() > life.began + PATIENCE:
                return
            time.sleep(0.005)
        port, token = int(address[1]), address[2]
        head = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {token}"} if token else {}
        )
        while time.monotonic() < until and not life.over():
            latent, label = str(random.randrange(64)), f"label {time.monotonic_ns()}"
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                connection.request(
                    "POST",
                    "/api/label",
                    json.dumps({"latent": int(latent), "label": label, "star": False}),
                    head,
                )
                answer = connection.getresponse()
                answer.read()
            except OSError:
                self.kept.pop(latent, None)  # nobody knows whether it was written
                continue
            except http.client.HTTPException:
                self.kept.pop(latent, None)
                continue
            finally:
                connection.close()
            if answer.status != 200:
                raise SystemExit(f"a label was refused: {answer.status}\n{life.said()}")
            self.kept[latent] = label

    def wrong(self) -> list[str]:
        file = self.run.path / "labels.json"
        found = jsonio.read_json(file)["latents"] if file.is_file() else {}
        return [
            f"latent {latent}: {found.get(latent)} instead of {label!r}"
            for latent, label in self.kept.items()
            if found.get(latent, {}).get("label") != label
        ]


class Shard(Kind):
    """Written through Python, where a shard may be small, so that there are several."""

    def work(self) -> None:
        from ksparse.data import shards
        from ksparse.data.contexts import Corpus
        from ksparse.lm.model import LM

        acts = self.run.recipe().acts
        lm = LM(acts=acts, device="cpu")
        shards.write(
            lm, Corpus(acts, lm.tokenizer, "train"), self.home / "acts", rows=1200, shard_rows=150
        )

    def folder(self) -> Path | None:
        return next(
            (path for path in (self.home / "acts").glob("*") if not path.name.startswith(".")), None
        )

    def wrong(self) -> list[str]:
        folder = self.folder()
        if folder is None or not (folder / checksums.MANIFEST).is_file():
            return []
        manifest = jsonio.read_table(folder / checksums.MANIFEST)
        before, self.before = getattr(self, "before", 0), len(manifest["shards"])
        try:
            for entry in manifest["shards"]:
                checksums.check_file(folder, entry["file"], entry["sha256"])
        except Exception as error:
            return [str(error)]
        lost = [f"{before} shards were there, {self.before} are"] if self.before < before else []
        if manifest["complete"]:
            self.again()
        return lost

    def again(self) -> None:
        shutil.rmtree(self.home / "acts", ignore_errors=True)
        self.before = 0

    def contents(self) -> Any:
        return {path.name: path.read_bytes() for path in self.folder().iterdir()}


class Convert(Kind):
    def work(self) -> None:
        cli.main(
            [
                "convert",
                str(self.run.path),
                str(self.home / "converted"),
                "--to",
                "sae_lens",
                "--normalization",
                "outside",
            ]
        )

    def wrong(self) -> list[str]:
        wrong = whole_results(self.run, {"stats", "downstream"}) + (
            [] if self.run.newest_intact()[0] else ["the run has no checkpoint"]
        )
        if (self.home / "converted").exists():
            try:
                checksums.verify(self.home / "converted")
            except Exception as error:
                wrong.append(str(error))
        self.again()
        return wrong

    def again(self) -> None:
        shutil.rmtree(self.home / "converted", ignore_errors=True)

    def contents(self) -> Any:
        return {path.name: path.read_bytes() for path in (self.home / "converted").iterdir()}


KINDS: dict[str, type[Kind]] = {
    "eval": Eval,
    "report": Report,
    "export": Export,
    "labels": Labels,
    "shard": Shard,
    "convert": Convert,
}


def disturbed(kind: str, kills: int, seed: int, run: Path) -> dict[str, Any]:
    """Kill one kind of command so often; return the counts: `wrong` and `leftovers` must be empty."""
    draw, began = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        subject = KINDS[kind](home, run)
        counts: dict[str, Any] = {
            "kind": kind,
            "kills": 0,
            "in_writing": 0,
            "not_reached": 0,
            "wrong": [],
        }
        killed = _labels_killed if isinstance(subject, Labels) else _killed
        killed(subject, kills, draw, counts)
        counts["leftovers"] = [str(path.relative_to(home)) for path in home.rglob(".tmp-*")]
        counts["seconds"] = round(time.monotonic() - began)
        return counts


def _killed(subject: Kind, kills: int, draw: random.Random, counts: dict[str, Any]) -> None:
    log = subject.home / "life.log"
    life = Life(subject.work, log)
    if life.end():
        raise SystemExit(f"the undisturbed command failed:\n{life.said()}")
    longest, calls, expected = (
        time.monotonic() - life.began,
        int(log.with_suffix(".calls").read_text()),
        subject.contents(),
    )
    subject.again()
    while counts["kills"] < kills:
        by_time = draw.random() < 0.5
        life = Life(subject.work, log, 0 if by_time else draw.randint(1, calls))
        until = time.monotonic() + (draw.uniform(0, longest) if by_time else PATIENCE)
        while not life.over() and time.monotonic() < until:
            time.sleep(0.0005)
        if life.over():
            counts["not_reached"] += by_time
        else:
            life.kill()
            life.end()
        counts["kills"] += 1
        counts["in_writing"] += any(True for _ in subject.home.rglob(".tmp-*"))
        counts["wrong"] += subject.wrong()
    subject.again()
    life = Life(subject.work, log)
    if life.end():
        counts["wrong"].append(f"the next command failed: {life.said()}")
    elif subject.contents() != expected and not isinstance(subject, Export):
        counts["wrong"].append("the next command made something else")
    else:
        counts["wrong"] += subject.wrong() if isinstance(subject, Export) else []


def _labels_killed(
    subject: Labels, kills: int, draw: random.Random, counts: dict[str, Any]
) -> None:
    log = subject.home / "life.log"
    while counts["kills"] < kills:
        log.unlink(missing_ok=True)
        by_time = draw.random() < 0.5
        life = Life(subject.work, log, 0 if by_time else draw.randint(1, 60))
        subject.post_until(
            life, time.monotonic() + (draw.uniform(0.3, 1.5) if by_time else PATIENCE)
        )
        if not life.over():
            life.kill()
            life.end()
        counts["kills"] += 1
        counts["in_writing"] += any(True for _ in subject.home.rglob(".tmp-*"))
        counts["wrong"] += subject.wrong()
    log.unlink(missing_ok=True)
    life = Life(subject.work, log)
    subject.post_until(life, time.monotonic() + 1.0)
    if life.over() or not subject.kept:
        counts["wrong"].append(f"the next viewer does not answer: {life.said()}")
    else:
        os.kill(life.pid, signal.SIGTERM)
        life.end()
    counts["wrong"] += subject.wrong()
    counts["kept"] = len(subject.kept)
