"""Pieces -> a folder of static pages, for a web host or for opening from the disk.

    index.html, report.html        what people open
    ksparse-SUM/                   all that the page loads, under a name that its contents give it
    ksparse-site.json              the mark: the files that ksparse wrote, the only ones it touches

From the disk a page may not fetch, so each piece is also a script that hands its JSON to the page.

A folder with a mark is written anew in place, and keeps whatever else it holds. New pages come in
beside the old ones; a rename of index.html changes from these to those at once; what only the old
ones needed is removed after. So a process that is killed leaves one of the two whole, and perhaps
files of the other, which the mark lists and the next export removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from ksparse.errors import CorruptError, InputError
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer.labels import Labels
from ksparse.viewer.resources import Resources

BLOCK = 16
"""Latents in a file of details."""
MARK, PAGE, REPORT = "ksparse-site.json", "index.html", "report.html"
WORK = ".tmp-ksparse-site"
"""Where new pages are made, in the site's own folder: only there a rename is sure to do."""
SCRIPTS = ("base.js", "latent.js", "table.js", "map.js", "search.js", "live.js", "main.js")
STYLE = "style.css"
"""The report's style, on which the viewer's stands."""
ASSETS = {
    PAGE: "text/html; charset=utf-8",
    STYLE: "text/css; charset=utf-8",
    "viewer.css": "text/css; charset=utf-8",
    **{name: "text/javascript; charset=utf-8" for name in SCRIPTS},
}
OURS = re.compile(
    "|".join(
        [
            r"(ksparse-[0-9a-f]{16}/)?data/([a-z]+/)?\w+\.js",
            r"ksparse-[0-9a-f]{16}/[a-z]+\.(js|css)",
            *map(re.escape, (*ASSETS, REPORT)),
        ]
    ),
    re.ASCII,
)
"""Names that any version has written: a mark that lists others is not ours."""


def asset(name: str) -> bytes:
    """Return a file of the page."""
    folder = (
        resources("ksparse.report") / "templates"
        if name == STYLE
        else resources("ksparse.viewer") / "assets"
    )
    return (folder / name).read_bytes()


def write(
    run: RunFolder,
    folder: Path,
    *,
    observe: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Path:
    """Write the pages of a run, in the place of an earlier site's; return the page to open."""
    folder = Path(folder)
    with atomic.translate_oserrors(folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; give a folder for the pages")
        began = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if not (folder / MARK).exists() and any(path.name != WORK for path in folder.iterdir()):
                raise InputError(
                    f"{folder} holds something else than an exported site; "
                    "give an empty or a new folder"
                )
            with _working(folder) as work:
                new = _fill(work, run, observe)
                _put(work, new, folder, run.name)
        finally:
            if began and not any(folder.iterdir()):
                folder.rmdir()
    return folder / PAGE


@contextmanager
def _working(folder: Path) -> Iterator[Path]:
    """Yield an empty folder in `folder` that is gone afterwards; one process at a time has it."""
    work = folder / WORK
    _check_way(folder, f"{WORK}/lock", mine=True)
    with atomic.locked(work, "lock"):
        for left in work.iterdir():  # by one that was killed
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif left.name != "lock":
                left.unlink()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _put(work: Path, new: list[str], folder: Path, run: str) -> None:
    """Move files into their place one by one, the page last; then remove the earlier ones."""
    old = _listed(folder)
    for name in sorted({*new, *old}):
        _check_way(folder, name, mine=name in old)
    _mark(work, sorted({*new, *old}), folder, run)
    for name in sorted(new, key=lambda name: name == PAGE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / name, folder / name)
    for name in sorted(old - {*new}, reverse=True):
        (folder / name).unlink(missing_ok=True)
    for place in sorted({parent for name in old for parent in _parents(name)}, reverse=True):
        if (folder / place).is_dir() and not any((folder / place).iterdir()):
            (folder / place).rmdir()
    _mark(work, sorted(new), folder, run)


def _listed(folder: Path) -> set[str]:
    """Return the names that the mark of an earlier site lists, as far as they are there."""
    if not atomic.inside(folder, MARK).exists():
        return set()
    mark = jsonio.read_table(folder / MARK)
    if "files" not in mark:  # of before there was a list
        paths = [*folder.glob("*"), *folder.glob("data/**/*.js")]
        names = {path.relative_to(folder).as_posix() for path in paths}
        return {name for name in names if _wrote(folder / name, name)}
    names = mark["files"]
    if not isinstance(names, list) or not all(
        isinstance(name, str) and OURS.fullmatch(name) for name in names
    ):
        raise CorruptError(
            f"{folder / MARK} does not list files that ksparse writes; "
            "give a new folder, or take it out of this one"
        )
    return {name for name in names if os.path.lexists(folder / name)}


def _wrote(file: Path, name: str) -> bool:
    """Tell whether ksparse wrote a file of a site without a list: it looks like one of ours."""
    if not file.is_file() or file.is_symlink() or not OURS.fullmatch(name):
        return False
    with file.open("rb") as stream:
        beginning = stream.read(4_096)
    if name == REPORT:
        return b"ksparse report</title>" in beginning
    return name in ASSETS or beginning.startswith(b"ksparse.take(")


def _parents(name: str) -> list[Path]:
    """Return the folders that a name is in, the outermost first."""
    return [parent for parent in Path(name).parents if parent.name][::-1]


def _check_way(folder: Path, name: str, *, mine: bool) -> None:
    """Raise InputError where a file of somebody else's, or a link, is in the way of one of ours."""
    file, parents = folder / name, [folder / parent for parent in _parents(name)]
    strange = [
        parent
        for parent in parents
        if os.path.lexists(parent) and (parent.is_symlink() or not parent.is_dir())
    ]
    if os.path.lexists(file) and not (mine and file.is_file() and not file.is_symlink()):
        strange.append(file)
    if strange:
        raise InputError(
            f"{strange[0]} is in the way of the pages, and ksparse did not write it; "
            "move it, or give another folder. Nothing was changed"
        )


def _mark(work: Path, names: list[str], folder: Path, run: str) -> None:
    mark = json.dumps({"format": 2, "run": run, "files": names}, indent=0)
    (work / MARK).write_text(mark + "\n", encoding="utf-8")
    os.replace(work / MARK, folder / MARK)


def _fill(work: Path, run: RunFolder, observe: Callable[[str, int, int], None]) -> list[str]:
    """Write the pages into an empty folder; return the names of the files."""
    pieces, pages = Resources(run, BLOCK), work / "pages"
    contents, sums = _contents(run, pieces, observe), hashlib.sha256()
    names = []
    for name, content in contents:
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
        shutil.copyfile(run.report_file, work / REPORT)
    report = [REPORT] if (work / REPORT).exists() else []
    return [PAGE, *report, *(f"{home}/{name}" for name in names)]


def _contents(
    run: RunFolder, pieces: Resources, observe: Callable[[str, int, int], None]
) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the contents of all that the page loads."""
    yield from ((name, asset(name)) for name in ASSETS if name != PAGE)
    yield _script("labels", {"latents": Labels(run, pieces.n).all()})
    names = list(pieces.names())
    for done, name in enumerate(names, 1):
        yield _script(name, pieces.get(name))
        observe("pages", done, len(names))


def _script(name: str, piece: Any) -> tuple[str, bytes]:
    script = f"ksparse.take({json.dumps(name)}, {script_json(piece)});\n"
    return f"data/{name}.js", script.encode("ascii")


def script_json(value: Any) -> str:
    """Return JSON of ASCII alone that is also an expression, and cannot end a script or a comment
    of HTML."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
