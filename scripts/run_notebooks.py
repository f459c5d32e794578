"""Run the notebooks of examples/ and keep their outputs.

    python scripts/run_notebooks.py [examples/01-first-steps.ipynb …]

Each starts in an empty folder. Progress is not kept, since it says how fast this machine was. A notebook
is only written if all its cells ran and nothing in it names a place on this machine.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
PLACE = re.compile(
    r"""(?<![\w.:/~-])/(?:home|root|tmp|var|usr|opt|work|mnt|Users|private)/|[A-Z]:\\|site-packages"""
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, default=NOTEBOOKS)
    for file in parser.parse_args().files:
        began = time.monotonic()
        notebook = execute(file)
        if found := places(notebook):
            sys.exit(f"{file} names a place on this machine: {found[0]}")
        nbformat.write(notebook, file)
        print(f"{time.monotonic() - began:6.1f} s  {file.name}", flush=True)


def execute(file: Path) -> Any:
    """Return a notebook, run from its first cell to its last, with the outputs that are kept."""
    notebook = nbformat.read(file, as_version=4)
    # tqdm, which other libraries import, warns where there are no widgets, and names its file
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=1_800, resources={"metadata": {"path": folder}}, record_timing=False
        )
        client.execute()
    return cleaned(notebook)


def cleaned(notebook: Any) -> Any:
    """Return a notebook without what depends on the machine."""
    for number, cell in enumerate(notebook.cells):
        cell["id"], cell["metadata"] = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if not is_progress(one)]
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return notebook


def is_progress(output: Any) -> bool:
    return output.get("metadata", {}).get("ksparse") == "progress"


def places(notebook: Any) -> list[str]:
    """Return where a notebook names a place on a machine."""
    return [
        text[max(0, match.start() - 40) : match.end() + 40]
        for cell in notebook.cells
        for text in [cell.source, *texts(cell.get("outputs", ()))]
        for match in PLACE.finditer(text)
    ]


def texts(outputs: Iterable[Any]) -> Iterable[str]:
    """Yield all text of outputs."""
    for output in outputs:
        yield from output.get("data", {}).values()
        yield output.get("text", "")


if __name__ == "__main__":
    main()
