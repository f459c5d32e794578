"""A disk that fills up and one that is read-only: the last checkpoint stays whole, the error says so, and the same command goes on afterwards.

With the rights to mount, on a real tmpfs of 6 MB; for each writer at every page that can be the last one free.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ksparse import cli, interop, report
from ksparse.config import to_toml
from ksparse.config.evaluation import EvalConfig
from ksparse.data import shards
from ksparse.data.contexts import Corpus
from ksparse.errors import DiskError
from ksparse.evals import runner
from ksparse.evals.probing.suites import folder as suite
from ksparse.lm.model import LM
from ksparse.sae import serialization
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.run_folder import RunFolder, open_run
from ksparse.training import checkpoint
from ksparse.training.train import train

PAGE = 4096


class Disk:
    """A small disk of its own."""

    def __init__(self, path: Path):
        self.path, self.filler = path, path / "filler"

    def fill(self, pages: int = 0) -> None:
        """Leave so many pages free."""
        self.filler.unlink(missing_ok=True)
        found = os.statvfs(self.path)
        os.truncate(self.filler, 0) if self.filler.exists() else self.filler.touch()
        with self.filler.open("wb") as stream:
            stream.write(b"x" * max(0, (found.f_bavail - pages) * found.f_frsize))

    def empty(self) -> None:
        self.filler.unlink(missing_ok=True)

    def bar(self) -> None:
        self._mount("remount,ro")

    def unbar(self) -> None:
        self._mount("remount,rw")

    def _mount(self, options: str) -> None:
        subprocess.run(["mount", "-o", options, str(self.path)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"this machine does not let root mount a tmpfs: {done.stderr.strip()}")
    yield Disk(place)
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def trained(small_recipe, disk) -> RunFolder:
    return train(small_recipe(), disk.path / "run")


def last(run: RunFolder) -> dict[str, bytes]:
    """Return the files of the last checkpoint."""
    return {file.name: file.read_bytes() for file in run.checkpoints()[-1].iterdir()}


def tensors(run: RunFolder) -> dict[str, bytes]:
    return {name: content for name, content in last(run).items() if name.endswith(".safetensors")}


# ---- through the command line


def command(capsys, *words: str) -> tuple[int, str]:
    """Run a verb; return its exit code and what it said on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([*words])
        raise SystemExit(0)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("where", ["checkpoint", "metrics"])
def test_a_disk_that_fills_up_while_training_ends_with_code_5_and_the_same_command_goes_on(
    small_recipe, disk, tmp_path, monkeypatch, capsys, where
):
    (tmp_path / "recipe.toml").write_text(to_toml(small_recipe()))
    words = ["train", str(tmp_path / "recipe.toml"), "--out", str(disk.path / "run")]
    with monkeypatch.context() as patch:
        if where == "checkpoint":
            own = checkpoint.commit
            patch.setattr(
                checkpoint,
                "commit",
                lambda run, taken, mesh: (
                    taken.facts["step"] == 8 and disk.fill(3),
                    own(run, taken, mesh),
                ),
            )
        else:
            write = RunFolder.append_metrics
            patch.setattr(
                RunFolder,
                "append_metrics",
                lambda run, row: (
                    row["step"] == 6 and (disk.fill(0), pad(run.metrics_file)),
                    write(run, row),
                ),
            )
        code, said = command(capsys, *words)
    run = open_run(disk.path / "run")
    assert (
        code == 5
        and "disk full while writing" in said
        and "MB free" in said
        and "what was saved before is intact" in said
        and "Traceback" not in said
    )
    assert [path.name for path in run.checkpoints()] == [
        "step-00000004"
    ] and run.newest_intact() == (run.checkpoints()[0], [])
    assert serialization.load(run.path).metadata["step"] == 4
    disk.empty()
    assert command(capsys, *words)[0] == 0
    assert tensors(run) == tensors(train(small_recipe(), tmp_path / "whole"))
    assert [row["step"] for row in run.metrics()] == list(range(1, 13))


def pad(file: Path) -> None:
    """Fill the last page of a file, as far as that goes, so that the next byte needs a new one."""
    with file.open("ab") as stream:
        stream.write(b"\n" * (-file.stat().st_size % PAGE))


def test_a_read_only_disk_ends_with_code_5_and_leaves_all_as_it_is(
    small_recipe, disk, tmp_path, capsys
):
    (tmp_path / "recipe.toml").write_text(to_toml(small_recipe()))
    run = train(small_recipe(), disk.path / "run")
    before = last(run)
    disk.bar()
    for words in (
        ["resume", str(run.path)],
        ["train", str(tmp_path / "recipe.toml"), "--out", str(disk.path / "other")],
        ["report", str(run.path)],
        ["eval", str(run.path), "stats", "--tokens", "300", "--device", "cpu"],
        ["convert", str(run.path), str(disk.path / "other"), "--to", "ksparse"],
    ):
        code, said = command(capsys, *words)
        assert (
            code == 5
            and "cannot write" in said
            and "Read-only file system; give a folder that you may write" in said
            and "Traceback" not in said
        ), words
    disk.unbar()
    assert last(run) == before and serialization.load(run.path).metadata["step"] == 12


# ---- every writer, at every page


def writers(run: RunFolder, small_acts: Callable) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Return what each writes to, and how."""
    sae, home = serialization.load(run.path), run.path.parent
    options = EvalConfig(tokens=300, examples=2, device="cpu")
    lm = LM(acts=small_acts(), device="cpu")
    found = runner.evaluate(sae, lm, ("stats",), options)
    return {
        "evals": (run.path / "evals", lambda: runner.write_results(run, found)),
        "report": (run.path / "figures", lambda: report.write(run)),
        "export": (home / "export", lambda: serialization.save(sae, home / "export")),
        "convert": (
            home / "converted",
            lambda: interop.write(
                sae, home / "converted", "dictionary_learning", normalization="outside"
            ),
        ),
        "shards": (
            home / "acts",
            lambda: shards.write(
                lm, Corpus(lm.options, lm.tokenizer, "train"), home / "acts", rows=60, shard_rows=30
            ),
        ),
        "suite": (
            home / "suite",
            lambda: suite.write(
                home / "suite", "t", [{"text": f"x = {i}", "label": i % 2} for i in range(60)]
            ),
        ),
        "lock": (home / "fresh", lambda: lock(RunFolder(home / "fresh"))),
        "json": (
            home / "some",
            lambda: jsonio.write_json(home / "some" / "x.json", list(range(3000)), sealed=False),
        ),
    }


def lock(run: RunFolder) -> None:
    with run.locked():
        pass


def test_whatever_writes_says_that_the_disk_is_full_and_leaves_what_was_there(
    trained, disk, small_acts
):
    found = writers(trained, small_acts)
    for name, (place, write) in found.items():
        full = pages = 0
        before = whole(place)
        while True:
            disk.fill(pages)
            try:
                write()
                break
            except DiskError as error:
                assert "disk full while writing" in str(error), name
                full += 1
            disk.empty()
            for path, content in before.items():
                assert (
                    path.read_bytes() == content
                    or path.name in ("manifest.json", "documents.json", "report.html")
                    or path.suffix == ".svg"
                    or path.name == ".lock"
                ), (name, path)
            pages = pages + 1 if pages < 6 else pages * 2
        disk.empty()
        assert full > 0, name
    assert trained.newest_intact() == (trained.checkpoints()[-1], [])
    assert not [path for path in disk.path.rglob(".tmp-*")], "leftovers"


def whole(place: Path) -> dict[Path, bytes]:
    return (
        {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        if place.is_dir()
        else {}
    )


def at_step(step: int, taken: checkpoint.Snapshot) -> checkpoint.Snapshot:
    return taken._replace(facts=taken.facts | {"step": step})


def test_a_checkpoint_that_meets_a_full_disk_at_any_page_is_whole_or_not_there(
    small_recipe, disk, monkeypatch
):
    kept = []
    own = checkpoint.commit
    monkeypatch.setattr(
        checkpoint, "commit", lambda run, taken, mesh: (kept.append(taken), own(run, taken, mesh))
    )
    run = train(small_recipe(), disk.path / "run")
    taken = at_step(99, kept[-1])
    before, failures = last(run), 0
    for pages in range(100):
        disk.fill(pages)
        try:
            own(run, taken)
            break
        except DiskError:
            failures += 1
        disk.empty()
        assert last(run) == before and run.newest_intact() == (run.checkpoints()[-1], [])
    assert failures > 3 and checksums.verify(run.checkpoint(99))["step"] == 99


# ---- the same without the right to mount: at every call that writes


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("call", ["mkdir", "open", "write", "fsync", "chmod", "rename", "tensors"])
def test_whichever_call_finds_no_room_the_checkpoint_before_is_whole(
    small_recipe, tmp_path, monkeypatch, call, code
):
    """Whatever call fails first, of all that saving makes: the run has its last checkpoint, and says DiskError."""
    kept = []
    own = checkpoint.commit
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint,
            "commit",
            lambda run, taken, mesh: (kept.append(taken), own(run, taken, mesh)),
        )
        run = train(small_recipe(), tmp_path / "run")
    taken = at_step(99, kept[-1])
    before, number = last(run), 0
    while True:
        number += 1
        with monkeypatch.context() as patch:
            calls = failing(patch, call, number, OSError(code, os.strerror(code)))
            try:
                own(run, taken)
            except DiskError:
                pass
        if len(calls) < number:
            break
        if run.checkpoint(99).exists():  # the disk failed after the folder had its name
            assert checksums.verify(run.checkpoint(99))["step"] == 99
            atomic.remove(run.checkpoint(99))
        assert last(run) == before and not list(run.path.rglob(".tmp-*"))
    assert number > 1, f"saving never calls {call}"


def failing(patch: pytest.MonkeyPatch, call: str, number: int, error: OSError) -> list[int]:
    """Let call `number` of a kind fail; return a list that grows with each."""
    calls: list[int] = []

    def counted(own):
        def made(*args, **options):
            if call == "open" and not {"w", "a"} & set(
                str(args[1] if len(args) > 1 else options.get("mode", "r"))
            ):
                return own(*args, **options)
            calls.append(1)
            if len(calls) == number:
                raise error
            return own(*args, **options)

        return made

    if call == "tensors":
        for module in (serialization, checkpoint):
            patch.setattr(module, "save_file", counted(module.save_file))
    elif call == "write":
        patch.setattr(jsonio.json, "dumps", counted(jsonio.json.dumps))  # what is written next
    elif call == "fsync":
        patch.setattr(os, "fsync", counted(os.fsync))
    else:
        patch.setattr(Path, call, counted(getattr(Path, call)))
    return calls
