"""Published SAEs by name: "release/id", as SAELens' registry names them.

`public_saes.json` holds the releases; `scripts/list_public_saes.py` writes it. Its ids and paths
are rows of patterns:

    ["layer_{0..25}_width_{16,65}k"]                    the path is the id
    ["l{0..31}r_8x", "Llama3_1-8B-Base-L{0}R-8x"]       {0}: what the id has in its first braces
    ["layer_{0,1}/canonical", "layer_{0}/l0_{0=105,87}"]   {0=…}: aligned with its alternatives
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ksparse.errors import InputError, unknown
from ksparse.interop.recognition import OTHER_KINDS
from ksparse.storage import atomic, jsonio

FILE = Path(__file__).with_name("public_saes.json")
FORMAT = 1
_FILES = {
    "sae_lens": ("cfg.json", "sae_weights.safetensors", "activation_scaler.json"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "gemma_scope": ("config.json", "params.safetensors", "params.npz"),
    "llamascopium": ("config.json", "sae_weights.*"),
    "llama_scope": ("hyperparams.json", "sae_weights.*", "checkpoints/*"),
}
"""The files of an SAE below its path; of other formats the path is a file."""
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Release:
    """SAEs that were published together.

    Args:
        name: name of the release.
        repository: repository on the Hub.
        lm: language model.
        kind: "sae", or what else it is (`recognition.OTHER_KINDS`).
        format: name of the format that reads it; empty for other kinds.
        licence: licence of the repository; empty if it is not known.
        site: the kind of site, without its layer.
        layers, widths: what there is.
        saes: rows of patterns.
        factors: {id: what x is multiplied by}, where the files do not say.
        overrides: settings that replace those in the files.
    """

    name: str
    repository: str
    lm: str
    kind: str
    saes: list[list[str]]
    format: str = ""
    licence: str = ""
    site: str = ""
    layers: str = ""
    widths: list[str] = field(default_factory=list)
    factors: dict[str, float] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)

    def entries(self) -> Iterator[tuple[str, str]]:
        """Yield (id, path in the repository) of each SAE."""
        for row in self.saes:
            yield from _expand(row[0], row[-1] if len(row) > 1 else None)

    def patterns(self) -> list[str]:
        """Return the names of all SAEs as patterns, release/id."""
        return [f"{self.name}/{row[0]}" for row in self.saes]

    def matches(self, word: str) -> bool:
        """Return whether a word is part of what describes the release, in any case."""
        described = [self.name, self.repository, self.lm, self.kind, self.format, self.licence]
        return word.lower() in " ".join([*described, self.site, *self.widths]).lower()


@dataclass(frozen=True)
class Entry:
    """One published SAE.

    Args:
        name: release/id.
        repository: repository on the Hub.
        path: its folder or file there.
        lm: language model.
        format: name of the format that reads it.
        hints: what its files do not say, for the format's `read`.
    """

    name: str
    repository: str
    path: str
    lm: str
    format: str
    hints: dict[str, Any]

    def files(self) -> list[str]:
        """Return the names of the files to download, as patterns."""
        if self.format in _FILES:
            return [f"{self.path}/{name}" for name in _FILES[self.format]]
        folder = f"{self.path.rpartition('/')[0]}/".lstrip("/")
        config = f"{self.path.partition('.pt')[0]}_cfg.json"
        return [self.path, config, f"{folder}config.json"]


@functools.cache
def releases() -> dict[str, Release]:
    """Return all releases by name.

    Example:
        >>> from ksparse.interop import catalog
        >>> catalog.releases()["goodfire-llama-3.1-8b-instruct"].site
        'resid_post'
    """
    table = jsonio.read_json(FILE)
    return {name: Release(name=name, **row) for name, row in table["releases"].items()}


def search(word: str = "") -> list[Release]:
    """Return the releases that a word is part of the description of; all without a word.

    Raises:
        InputError: there is none.

    Example:
        >>> from ksparse.interop import catalog
        >>> [release.name for release in catalog.search("goodfire")]
        ['goodfire-llama-3.1-8b-instruct', 'goodfire-llama-3.3-70b-instruct']
    """
    found = [release for release in releases().values() if release.matches(word)]
    if not found:
        raise unknown(
            "no published SAE is described by",
            word,
            releases(),
            "give part of the name of a release, LM, site or repository",
        )
    return found


def find(source: Path | str) -> Entry | None:
    """Return a published SAE by its name; None for what is a path here, or begins with no release.

    Args:
        source: "release/id".

    Raises:
        InputError: the release has no such id, or is of a kind that is not read.

    Example:
        >>> from ksparse.interop import catalog
        >>> entry = catalog.find("gemma-scope-2-270m-pt-res/layer_9_width_16k_l0_medium")
        >>> entry.repository, entry.path
        ('google/gemma-scope-2-270m-pt', 'resid_post/layer_9_width_16k_l0_medium')
    """
    if atomic.exists(Path(source)):
        return None
    name, _, sae = str(source).partition("/")
    release = releases().get(name)
    if release is None:
        return None
    if release.kind != "sae":
        raise InputError(
            f"{name} holds {release.kind}s ({release.repository}): "
            f"{OTHER_KINDS[release.kind].replace('it ', 'each ', 1)}. ksparse reads autoencoders"
        )
    paths = dict(release.entries())
    if sae not in paths:
        raise unknown(
            f"the release {name} has no SAE",
            sae,
            paths,
            f"`ksparse list {name}` lists its {len(paths)}, such as {name}/{next(iter(paths))}",
        )
    hints: dict[str, Any] = {}
    if sae in release.factors:
        hints["factor"] = release.factors[sae]
    if release.overrides:
        hints["overrides"] = release.overrides
    return Entry(f"{name}/{sae}", release.repository, paths[sae], release.lm, release.format, hints)


# ---- patterns ------------------------------------------------------------------------------------


def write_range(values: Iterable[str]) -> str:
    """Return alternatives in the form that stands in braces; numbers in a row as FIRST..LAST.

    Example:
        >>> from ksparse.interop import catalog
        >>> catalog.write_range(["0", "1", "2", "5", "all"])
        '0..2,5,all'
    """
    runs: list[list[str]] = []
    for value in values:
        follows = runs and _is_number(value) and _is_number(runs[-1][-1])
        if follows and int(value) == int(runs[-1][-1]) + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(run) for run in runs)


def _is_number(value: str) -> bool:
    return value.isdecimal() and (value == "0" or value[0] != "0")


def read_range(text: str) -> list[str]:
    """Return the alternatives that `write_range` wrote.

    Example:
        >>> from ksparse.interop import catalog
        >>> catalog.read_range("0..2,5,all")
        ['0', '1', '2', '5', 'all']
    """
    values: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("..")
        values += [str(n) for n in range(int(first), int(last) + 1)] if last else [part]
    return values


def _expand(pattern: str, template: str | None) -> Iterator[tuple[str, str]]:
    """Yield (id, path) of each SAE of a row."""
    pieces = _BRACES.split(pattern)  # literals at even places, alternatives at odd ones
    groups = [read_range(text) for text in pieces[1::2]]
    for chosen in itertools.product(*groups):
        sae = "".join(
            itertools.chain.from_iterable(itertools.zip_longest(pieces[::2], chosen, fillvalue=""))
        )
        yield sae, sae if template is None else _fill(template, groups, chosen)


def _fill(template: str, groups: list[list[str]], chosen: tuple[str, ...]) -> str:
    def value(match: re.Match[str]) -> str:
        number, equals, aligned = match[1].partition("=")
        group = int(number)
        if not equals:
            return chosen[group]
        return aligned.split(",")[groups[group].index(chosen[group])]

    return _BRACES.sub(value, template)
