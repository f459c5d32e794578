"""Build the site of the documentation: `make docs`.

    python scripts/site/build.py [--out build/site]

Pages stay where they are in the repository (README.md, docs/, examples/ …). Here they are copied into
one folder, build/pages, with links between them rewritten; the pages of the reference are written from
the code; and Sphinx makes the site, without a network. Warnings are errors: a link or a picture that
leads nowhere stops the build, and so do a picture without a description and a file from another site.
Open build/site/index.html. Needs the extra `docs`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
UNSORTED = "How to"
"""The part of the site that gets the pages of docs/ which nav.toml does not name."""


def navigation(nav: str, written: Iterable[str]) -> dict[str, list[str]]:
    """Return the pages of each part of the site, by their files in the repository.

    Args:
        nav: nav.toml.
        written: pages that must be in the site, also where nav.toml does not name them.
    """
    parts: dict[str, list[str]] = {
        title: list(part["pages"]) for title, part in tomllib.loads(nav).items()
    }
    named = {page for pages in parts.values() for page in pages}
    parts[UNSORTED] += sorted(set(written) - named)
    return parts


NAV = navigation(
    (HERE / "nav.toml").read_text(),
    (file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("*.md")),
)
OF_THE_ROOT = {"README.md": "index.md", "AGENTS.md": "agents.md"}
LINK = re.compile(r"(\[(?:[^\]\[]|\[[^\]]*\])*\])\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    out = parser.parse_args().out
    pages = ROOT / "build" / "pages"
    stage(pages)
    shutil.rmtree(out, ignore_errors=True)
    from sphinx.cmd.build import build_main

    failed = build_main(
        ["-q", "-W", "--keep-going", "-d", str(pages) + ".cache", str(pages), str(out)]
    )
    found = list(faults(out))
    for fault in found:
        print(fault, file=sys.stderr)
    if failed or found:
        sys.exit("the site has faults, named above")
    print(f"site     {out / 'index.html'}")


# ---- the pages, put together


def stage(folder: Path) -> None:
    """Write everything that the site is made of into a folder: pages, pictures, settings."""
    import reference

    shutil.rmtree(folder, ignore_errors=True)
    write_text(folder / "conf.py", (HERE / "conf.py").read_text())
    write_text(folder / "_static" / "site.css", (HERE / "site.css").read_text())
    for path, text in reference.pages().items():
        write_text(folder / path, text)
    for file in ["README.md", *(page for pages in NAV.values() for page in pages)]:
        if not file.startswith("reference/"):
            text = (ROOT / file).read_text(encoding="utf-8")
            text = with_links(text, file, lambda target: bring(target, folder))
            text = with_descriptions(text) if file.endswith(".ipynb") else text
            write_text(folder / place(file), text + contents() if file == "README.md" else text)


def contents() -> str:
    """Return what tells Sphinx which pages there are, in which order."""
    return "".join(
        f"\n\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n"
        + "\n".join(str(place(page).with_suffix("")) for page in pages)
        + "\n```\n"
        for title, pages in NAV.items()
    )


def place(file: str) -> PurePosixPath:
    """Return where a file of the repository is in the site."""
    path = PurePosixPath(file)
    if len(path.parts) == 1 and path.suffix == ".md":
        return PurePosixPath(OF_THE_ROOT.get(file, file.lower()))
    if path.parts[0] == "docs":
        return path.relative_to("docs")
    if path.suffix == ".ipynb":
        return PurePosixPath("tutorials", path.name)
    return path if path.parts[0] == "reference" else PurePosixPath("files", path)


def bring(file: str, folder: Path) -> PurePosixPath:
    """Return where a file that a page links to is in the site; copy it there unless it is a page."""
    target = place(file)
    pages = {"README.md", *(page for pages in NAV.values() for page in pages)}
    if file not in pages and not (folder / target).exists():
        if not (ROOT / file).is_file():
            raise SystemExit(f"{file}: a page links to it, and it is not there")
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / target)
    return target


def with_links(text: str, file: str, bring: Callable[[str], PurePosixPath]) -> str:
    """Return a page with its links to files as they are in the site.

    Args:
        text: the page, Markdown or a notebook's JSON.
        file: where it is in the repository.
        bring: takes the file that a link leads to, and returns where that is in the site.
    """
    here = place(file).parent

    def moved(match: re.Match[str]) -> str:
        words, target, anchor = match.groups()
        source = os.path.normpath(PurePosixPath(file).parent / target)
        source = f"{source}/README.md" if (ROOT / source).is_dir() else source
        return f"{words}({os.path.relpath(bring(source), here)}{anchor or ''})"

    codes = CODE.findall(text)  # is left alone, also in the words of a link
    masked = CODE.sub("\0", text)
    return re.sub("\0", lambda _, code=iter(codes): next(code), LINK.sub(moved, masked))


def with_descriptions(notebook: str) -> str:
    """Return a notebook whose figures have the text above them, and their code, as description."""
    content, said = json.loads(notebook), ""
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            said = " ".join(re.sub(r"[#`*]", "", source).split())
        else:
            image = {"alt": f"{said} ({source.splitlines()[-1] if source else ''})"}
            cell["metadata"] = {"mystnb": {"image": image}}
    return json.dumps(content)


def write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


# ---- the site, looked through


class Elements(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements(file: Path) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(file.read_text(encoding="utf-8"))
    return parser.found


def faults(site: Path) -> Iterator[str]:
    """Yield what is wrong in a built site: links to nowhere, pictures without a description, and files
    that a browser would load from elsewhere."""
    files = {file.resolve(): elements(file) for file in sorted(site.rglob("*.html"))}
    anchors = {
        file: {
            attributes[key]
            for _, attributes in found
            for key in ("id", "name")
            if key in attributes
        }
        for file, found in files.items()
    }
    for file, found in files.items():
        for tag, attributes in found:
            where = f"{file.relative_to(site.resolve())}: <{tag}>"
            if tag == "img" and re.fullmatch(r"|\S+\.(svg|png)", attributes.get("alt") or ""):
                yield f"{where} {attributes.get('src')} has no description"
            for key in ("src", "href", "data"):
                link = attributes.get(key) or ""
                if re.match(r"(https?:)?//", link):
                    if tag not in ("a", "svg") and attributes.get("rel") != "canonical":
                        yield f"{where} would load {link}"
                elif link and not re.match(r"[a-z]+:", link):
                    path, _, anchor = link.partition("#")
                    target = (file.parent / path.partition("?")[0]).resolve() if path else file
                    if not target.exists():
                        yield f"{where} leads to {link}, which is not there"
                    elif anchor and target in anchors and anchor not in anchors[target]:
                        yield f"{where} leads to {link}, which has no such place"


if __name__ == "__main__":
    main()
