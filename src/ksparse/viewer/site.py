"""Pieces -> a folder of static pages, for a web host or for opening from the disk.

From the disk a page may not fetch, so each piece is also a script that hands its JSON to the page.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from ksparse import files
from ksparse.errors import InputError
from ksparse.runs import RunFolder
from ksparse.viewer.labels import Labels
from ksparse.viewer.pieces import Pieces

BLOCK = 16
"""Latents in a file of details."""
MARK = "ksparse-site.json"
"""The file by which a folder is known as one of ours, which may be replaced."""
SCRIPTS = ("base.js", "latent.js", "table.js", "map.js", "search.js", "live.js", "main.js")
STYLE = "style.css"
"""The report's style, on which the viewer's stands."""
ASSETS = {"index.html": "text/html; charset=utf-8", STYLE: "text/css; charset=utf-8", "viewer.css": "text/css; charset=utf-8",
          **{name: "text/javascript; charset=utf-8" for name in SCRIPTS}}


def asset(name: str) -> bytes:
    """Return a file of the page."""
    folder = resources("ksparse.report") / "templates" if name == STYLE else resources("ksparse.viewer") / "assets"
    return (folder / name).read_bytes()


def write(run: RunFolder, folder: Path, *, observe: Callable[[str, int, int], None] = lambda what, done, total: None) -> Path:
    """Write the pages of a run; a folder that holds anything else is left alone. Return the page to open."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / MARK).is_file())):
        raise InputError(f"{folder} holds something else than an exported site; give an empty or a new folder")
    tmp = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        with files.explained(folder):
            _fill(tmp, run, observe)
            if folder.exists():
                shutil.rmtree(folder)
            tmp.rename(folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return folder / "index.html"


def _fill(folder: Path, run: RunFolder, observe: Callable[[str, int, int], None]) -> None:
    pieces = Pieces(run, BLOCK)
    (folder / "data").mkdir(parents=True)
    for name in ASSETS:
        (folder / name).write_bytes(asset(name))
    if run.report_file.is_file():
        shutil.copyfile(run.report_file, folder / "report.html")
    _script(folder, "labels", {"latents": Labels(run, pieces.n).all()})
    names = list(pieces.names())
    for done, name in enumerate(names, 1):
        _script(folder, name, pieces.get(name))
        observe("pages", done, len(names))
    (folder / MARK).write_text(json.dumps({"format": 1, "run": run.name}) + "\n", encoding="utf-8")


def _script(folder: Path, name: str, piece: Any) -> None:
    file = folder / "data" / f"{name}.js"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"ksparse.take({json.dumps(name)}, {script_json(piece)});\n", encoding="ascii")


def script_json(value: Any) -> str:
    """Return JSON of ASCII alone that is also an expression, and cannot end a script or a comment of HTML."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
