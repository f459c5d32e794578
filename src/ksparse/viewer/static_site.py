"""Resources -> a folder of static pages, for a web host or to open from the disk.

index.html, report.html    the pages that people open
ksparse-SUM/               everything that index.html loads; SUM is a checksum of the content
ksparse-site.json          the marker: it lists the files that ksparse wrote, and only these are
                           ever replaced or removed

A page opened from the disk may not fetch, so each resource is a script that hands its JSON to the
page.

A folder with a marker is updated in place, and keeps its other files. The new files are moved in
beside the old ones; renaming index.html switches to them at once; then files that only the old
pages needed are removed. A process that is killed in between leaves either the old or the new pages
complete, and perhaps some files of the other; the marker lists these too, and the next export
removes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from ksparse.errors import CorruptError, InputError
from ksparse.progress import Progress, no_progress
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer.labels import Labels
from ksparse.viewer.resources import Resources

BLOCK = 16
"""Latents in a file of details."""
MARKER, PAGE, REPORT = "ksparse-site.json", "index.html", "report.html"
WORK = ".tmp-ksparse-site"
"""Where new pages are made: in the site's own folder, since a rename needs the same disk."""
SCRIPTS = (
    "base.js",
    "notices.js",
    "columns.js",
    "start.js",
    "suggest.js",
    "runs.js",
    "latent.js",
    "table.js",
    "points.js",
    "map.js",
    "scatter.js",
    "search.js",
    "steer.js",
    "live.js",
    "main.js",
)
STYLE = "style.css"
"""The report's style sheet, which the viewer's extends."""
ASSETS = {
    PAGE: "text/html; charset=utf-8",
    STYLE: "text/css; charset=utf-8",
    "viewer.css": "text/css; charset=utf-8",
    **{name: "text/javascript; charset=utf-8" for name in SCRIPTS},
}
WRITTEN_NAMES = re.compile(
    "|".join(
        [
            r"(ksparse-[0-9a-f]{16}/)?data/([a-z]+/)?\w+\.js",
            r"ksparse-[0-9a-f]{16}/[a-z]+\.(js|css)",
            *map(re.escape, (*ASSETS, REPORT)),
        ]
    ),
    re.ASCII,
)
"""Names that some version of ksparse has written; a marker that lists others is not valid."""


def asset(name: str) -> bytes:
    """Return the content of a file of the page."""
    folder = (
        package_files("ksparse.report") / "templates"
        if name == STYLE
        else package_files("ksparse.viewer") / "assets"
    )
    return (folder / name).read_bytes()


def write(
    run: RunFolder,
    folder: Path,
    *,
    observe: Progress = no_progress,
) -> Path:
    """Write the pages of a run; see `ksparse.viewer.export`."""
    folder = Path(folder)
    with atomic.translate_oserrors(folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; give a folder for the pages")
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if not (folder / MARKER).exists() and any(
                path.name != WORK for path in folder.iterdir()
            ):
                raise InputError(
                    f"{folder} holds something else than an exported site; "
                    "give an empty or a new folder"
                )
            with _work_folder(folder) as work:
                names = _write_pages(work, run, observe)
                _install(work, names, folder, run.name)
        finally:
            if is_new and not any(folder.iterdir()):
                folder.rmdir()
    return folder / PAGE


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder inside `folder`, under a lock, and remove it afterwards."""
    work = folder / WORK
    _check_path(folder, f"{WORK}/lock", owned=True)
    with atomic.locked(work, "lock"):
        for leftover in work.iterdir():  # of a process that was killed
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            elif leftover.name != "lock":
                leftover.unlink()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _install(work: Path, new: list[str], folder: Path, run: str) -> None:
    """Move the new files into place, the page last; then remove the old ones."""
    old = _read_marker(folder)
    for name in sorted({*new, *old}):
        _check_path(folder, name, owned=name in old)
    _write_marker(work, sorted({*new, *old}), folder, run)
    for name in sorted(new, key=lambda name: name == PAGE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / name, folder / name)
    for name in sorted(old - {*new}, reverse=True):
        (folder / name).unlink(missing_ok=True)
    for place in sorted({parent for name in old for parent in _parents(name)}, reverse=True):
        if (folder / place).is_dir() and not any((folder / place).iterdir()):
            (folder / place).rmdir()
    _write_marker(work, sorted(new), folder, run)


def _read_marker(folder: Path) -> set[str]:
    """Return the files of an earlier site that still exist."""
    if not atomic.inside(folder, MARKER).exists():
        return set()
    marker = jsonio.read_table(folder / MARKER)
    if "files" not in marker:  # markers of format 1 had no list
        paths = [*folder.glob("*"), *folder.glob("data/**/*.js")]
        names = {path.relative_to(folder).as_posix() for path in paths}
        return {name for name in names if _looks_written(folder / name, name)}
    names = marker["files"]
    if not isinstance(names, list) or not all(
        isinstance(name, str) and WRITTEN_NAMES.fullmatch(name) for name in names
    ):
        raise CorruptError(
            f"{folder / MARKER} does not list files that ksparse writes; "
            "give a new folder, or take it out of this one"
        )
    return {name for name in names if os.path.lexists(folder / name)}


def _looks_written(file: Path, name: str) -> bool:
    """Return whether a file looks as if ksparse wrote it, for sites whose marker has no list."""
    if not file.is_file() or file.is_symlink() or not WRITTEN_NAMES.fullmatch(name):
        return False
    with file.open("rb") as stream:
        beginning = stream.read(4_096)
    if name == REPORT:
        return b"ksparse report</title>" in beginning
    return name in ASSETS or beginning.startswith(b"ksparse.take(")


def _parents(name: str) -> list[Path]:
    """Return the folders that contain a name, the outermost first."""
    return [parent for parent in Path(name).parents if parent.name][::-1]


def _check_path(folder: Path, name: str, *, owned: bool) -> None:
    """Raise InputError if a foreign file or a link is where a file is to be written.

    Args:
        folder: the site's folder.
        name: the file to be written.
        owned: whether ksparse wrote the file that is there.
    """
    file, parents = folder / name, [folder / parent for parent in _parents(name)]
    foreign = [
        parent
        for parent in parents
        if os.path.lexists(parent) and (parent.is_symlink() or not parent.is_dir())
    ]
    if os.path.lexists(file) and not (owned and file.is_file() and not file.is_symlink()):
        foreign.append(file)
    if foreign:
        raise InputError(
            f"{foreign[0]} is in the way of the pages, and ksparse did not write it; "
            "move it, or give another folder. Nothing was changed"
        )


def _write_marker(work: Path, names: list[str], folder: Path, run: str) -> None:
    marker = json.dumps({"format": 2, "run": run, "files": names}, indent=0)
    (work / MARKER).write_text(marker + "\n", encoding="utf-8")
    os.replace(work / MARKER, folder / MARKER)


def _write_pages(work: Path, run: RunFolder, observe: Progress) -> list[str]:
    """Write the pages into an empty folder; return the names of the files."""
    pages, sums = work / "pages", hashlib.sha256()
    names = []
    for name, content in _make_files(run, Resources(run, BLOCK), observe):
        sums.update(f"{name} {len(content)} ".encode() + content)
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        (pages / name).write_bytes(content)
        names.append(name)
    home = f"ksparse-{sums.hexdigest()[:16]}"
    pages.rename(work / home)
    root = f'<html lang="en" data-home="{home}/">'
    page = asset(PAGE).replace(b'<html lang="en">', root.encode())
    for name in ASSETS:
        page = page.replace(f'"{name}"'.encode(), f'"{home}/{name}"'.encode())
    (work / PAGE).write_bytes(page)
    if atomic.inside(run.path, run.report_file.name).is_file():
        (work / REPORT).write_bytes(report_page(run))
    report = [REPORT] if (work / REPORT).exists() else []
    return [PAGE, *report, *(f"{home}/{name}" for name in names)]


def _make_files(
    run: RunFolder, resources: Resources, observe: Progress
) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file that the page loads."""
    yield from ((name, asset(name)) for name in ASSETS if name != PAGE)
    yield _make_script("labels", {"latents": Labels(run, resources.n).all()})
    names = list(resources.names())
    for done, name in enumerate(names, 1):
        yield _make_script(name, resources.get(name))
        observe("pages", done, len(names))


def report_page(run: RunFolder) -> bytes:
    """Return a run's report with links into these pages, beside which it lies here."""
    page = run.report_file.read_bytes()
    return page.replace(b'<html lang="en">', b'<html lang="en" data-viewer>', 1)


def _make_script(name: str, resource: Any) -> tuple[str, bytes]:
    script = f"ksparse.take({json.dumps(name)}, {dump_for_script(resource)});\n"
    return f"data/{name}.js", script.encode("ascii")


def dump_for_script(value: Any) -> str:
    """Return ASCII JSON that is a JavaScript expression and cannot end a script or HTML comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
