"""The verb that lists published SAEs by the names that every other verb takes: list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ksparse.cli.arguments import parse, verb

if TYPE_CHECKING:
    from ksparse.interop.catalog import Release

_HEADER = ("release", "LM", "site", "layers", "widths", "number", "kind", "licence")


@verb
def list_published(arguments: list[str]) -> None:
    """list [WORD] [--names]

    List published SAEs. Their names are accepted wherever a path of an SAE is.
    """

    @dataclass(frozen=True)
    class ListArgs:
        """Options of `ksparse list`."""

        names: bool = False
        """Print the full name of each SAE, one a line, instead of a table of releases."""

    word = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    args = parse(ListArgs, "list [WORD]", arguments[1:] if word else arguments)
    from ksparse.interop import catalog

    exact = catalog.releases().get(word)
    releases = [exact] if exact else catalog.search(word)
    if args.names:
        for release in releases:
            if release.kind == "sae":
                for sae, _ in release.entries():
                    print(f"{release.name}/{sae}")
    elif len(releases) == 1:
        _print_release(releases[0])
    else:
        _print_table(releases)


def _print_table(releases: list[Release]) -> None:
    rows = [_HEADER, *(_row(release) for release in releases)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print("`ksparse list RELEASE` shows the names of its SAEs")


def _row(release: Release) -> tuple[str, ...]:
    return (
        release.name,
        release.lm,
        release.site or "-",
        release.layers or "-",
        ",".join(release.widths) or "-",
        f"{sum(1 for _ in release.entries()):,}",
        _kind(release),
        release.licence or "-",
    )


def _kind(release: Release) -> str:
    return "SAE" if release.kind == "sae" else f"{release.kind}, not read"


def _print_release(release: Release) -> None:
    values = {
        "release": release.name,
        "repository": release.repository,
        "LM": release.lm,
        "site": release.site or "-",
        "layers": release.layers or "-",
        "widths": ", ".join(release.widths) or "-",
        "kind": _kind(release),
        "format": release.format or "-",
        "licence": release.licence or "see the repository",
    }
    for key, value in values.items():
        print(f"{key:<11}{value}")
    print("names")
    for pattern in release.patterns():
        print(f"  {pattern}")
    if release.kind == "sae":
        print(f"such as    {release.name}/{next(release.entries())[0]}")
