"""Write the catalog of published SAEs from SAELens' public registry, and count which are read.

    python scripts/list_public_saes.py pretrained_saes.yaml --version 6.54.12

The registry is a file of the package sae-lens. Only facts are taken from it: names, repositories,
paths, models, and the numbers without which a file cannot be used. They are written in patterns
(`ksparse.interop.catalog`), which are expanded again and compared with the registry. The table that
is printed has the share of the entries whose format is read, by the registry's own kinds.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import yaml

from ksparse.interop import catalog, hook_names

FORMATS = {
    None: "sae_lens",
    "gemma_3": "gemma_scope",
    "gemma_2": "gemma_scope",
    "dictionary_learning_1": "dictionary_learning",
    "qwen_scope": "qwen_scope",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "llamascopium",
    "connor_rob_hook_z": "hook_z",
    "goodfire": "goodfire",
    "deepseek_r1": "qresearch",
    "sparsify": "sparsify",
}
"""The registry's kinds of files, and the format that reads each. `bench/published.py` compares each
with the code of the registry's own library."""
OTHER_KINDS = {
    "gemma_2_transcoder": "transcoder",
    "mwhanna_transcoder": "transcoder",
    "mntss_clt_layer_transcoder": "cross-layer transcoder",
    "temporal": "temporal SAE",
}
LICENCES = {
    "google/gemma-scope": "cc-by-4.0",
    "Qwen/SAE-Res": "Qwen",
    "fnlp/Llama": "apache-2.0",
    "qresearch/": "apache-2.0",
}
"""By the beginning of a repository's name, from the repositories' cards; others are not known."""
LMS = {"mistral-7b": "mistralai/Mistral-7B-v0.1"}
SITES = {
    "-res": "resid_post",
    "-res-all": "resid_post",
    "-att": "z",
    "-att-all": "z",
    "-mlp": "mlp_out",
    "-mlp-all": "mlp_out",
    "lxr": "resid_post",
    "lxa": "attn_out",
    "lxm": "mlp_out",
    "r1_distill": "resid_post",
    "qwen-scope": "resid_post",
    "goodfire": "resid_post",
    "andyrdt": "resid_post",
}
LAYER = (r"layer_?(\d+)", r"blocks\.(\d+)\.", r"^l(\d+)[ram]_", r"^(\d+)-")
WIDTH = (
    r"width_(\d+[km])",
    r"W(\d+K)-",
    r"width-(2pow\d+)",
    r"(?:w|v5)[-_](\d+k)",
    r"-(8x|32x)$",
)
WIDTH_OF_SAELENS = r"_(\d{3,6})(?:_anthropic.*|:v\d+)?$"
KNOWN_WIDTHS = {
    "r1_distill": "32k",
    "goodfire": "65k",
    "qresearch": "65k",
    "hook-z": "24k",
    "gpt2-small-res-jb": "24k",
}
NAMED_WIDTHS = {"2pow12": "4k", "2pow14": "16k", "2pow16": "65k", "8x": "32k", "32x": "131k"}


def main() -> None:
    """Read the registry, write the catalog, print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("registry", type=Path)
    parser.add_argument("--version", required=True, help="of sae-lens")
    options = parser.parse_args()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    registry = yaml.load(options.registry.read_text(), Loader=loader)
    releases = {name: describe(name, release) for name, release in sorted(registry.items())}
    source = f"sae-lens {options.version}, pretrained_saes.yaml"
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in releases.items()]
    catalog.FILE.write_text(
        f'{{"format": {catalog.FORMAT}, "source": {json.dumps(source)}, "releases": {{\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )
    check(registry)
    report(registry)


def describe(name: str, release: dict) -> dict:
    """Return a release as the catalog has it."""
    entries = entries_of(release)
    kind = kind_of(release, next(iter(entries.values())))
    described = {
        "repository": release["repo_id"],
        "lm": LMS.get(release["model"], hook_names.hub_model_name(release["model"])),
        "kind": kind,
        "format": FORMATS[release.get("conversion_func")] if kind == "sae" else None,
        "licence": next((v for k, v in LICENCES.items() if release["repo_id"].startswith(k)), None),
        "site": site_of(name, entries),
        "layers": catalog.write_range(layers_of(entries)),
        "widths": widths_of(name, release, entries),
        "saes": compress(entries),
    }
    rows = [row for row in release["saes"] if "norm_scaling_factor" in row]
    if described["format"] in ("sae_lens", "llamascopium") and rows:
        described["factors"] = {str(row["id"]): row["norm_scaling_factor"] for row in rows}
    overrides = dict(release.get("config_overrides") or {})
    if described["format"] == "sae_lens" and overrides:
        described["overrides"] = overrides
    return {key: value for key, value in described.items() if value not in (None, "", [])}


def entries_of(release: dict) -> dict[str, str]:
    """Return {id: path}."""
    return {str(row["id"]): str(row["path"]) for row in release["saes"]}


def kind_of(release: dict, path: str) -> str:
    """Return "sae", or what else a release is."""
    function = release.get("conversion_func")
    if function in OTHER_KINDS:
        return OTHER_KINDS[function]
    if path.startswith("clt"):
        return "cross-layer transcoder"
    return "transcoder" if path.startswith("transcoder") else "sae"


def site_of(name: str, entries: dict[str, str]) -> str:
    hooks = {m[1] for key in entries if (m := re.search(r"hook_([a-z]+(?:_[a-z]+)*)", key))}
    if hooks:
        return ", ".join(sorted(hooks))
    base = name.removesuffix("-canonical")
    fits = [s for k, s in SITES.items() if (base.endswith(k) if k[0] == "-" else k in base)]
    return fits[0] if fits else ""


def layers_of(entries: dict[str, str]) -> list[str]:
    found = {
        next((m[1] for pattern in LAYER if (m := re.search(pattern, key))), None) for key in entries
    }
    return sorted(found - {None}, key=int)


def widths_of(name: str, release: dict, entries: dict[str, str]) -> list[str]:
    texts = [f"{release['repo_id']}-", release["repo_id"], name, *entries.values()]
    is_saelens = release.get("conversion_func") is None
    patterns = (*WIDTH, WIDTH_OF_SAELENS) if is_saelens else WIDTH
    found = {m[1].lower() for text in texts for p in patterns if (m := re.search(p, text))}
    widths = {NAMED_WIDTHS.get(width, width) for width in found}
    if not widths:
        widths = {width for part, width in KNOWN_WIDTHS.items() if part in name}
    return sorted(
        {f"{int(w) // 1000}k" if w.isdigit() and len(w) > 3 else w for w in widths}, key=size_of
    )


def size_of(width: str) -> float:
    number = float(re.match(r"\d+", width)[0])
    return number * {"k": 1e3, "m": 1e6}.get(width[-1], 1)


# ---- patterns ------------------------------------------------------------------------------------


def tokens(text: str) -> list[str]:
    return re.findall(r"\d+|[A-Za-z]+|[^A-Za-z0-9]+", text)


def compress(entries: dict[str, str]) -> list[list[str]]:
    """Return rows [pattern of ids, template of paths] that expand to exactly these entries."""
    groups: dict[tuple, dict[tuple, str]] = {}
    for key, path in entries.items():
        parts = tokens(key)
        shape = tuple(p if not p[0].isalnum() else p.isdigit() for p in parts), len(tokens(path))
        groups.setdefault(shape, {})[tuple(parts)] = path
    return [
        row for group in groups.values() for block in merge(group) for row in rows(block, group)
    ]


def merge(group: dict[tuple, str]) -> list[list[list[str]]]:
    """Merge ids into products of sets, one per token."""
    blocks = [[[token] for token in key] for key in group]
    changed = True
    while changed:
        changed = False
        for place in reversed(range(len(blocks[0]))):
            merged: dict[str, list[list[str]]] = {}
            for block in blocks:
                rest = json.dumps([sorted(s) for i, s in enumerate(block) if i != place])
                if rest in merged:
                    merged[rest][place] = merged[rest][place] + block[place]
                    changed = True
                else:
                    merged[rest] = block
            blocks = list(merged.values())
    return blocks


def rows(block: list[list[str]], group: dict[tuple, str]) -> list[list[str]]:
    """Return a product as rows, split until the paths follow from the ids."""
    block = [
        sorted(s, key=lambda t: (not t.isdigit(), int(t) if t.isdigit() else 0, t)) for s in block
    ]
    template = template_of(block, group)
    if template is not None:
        pattern = "".join(s[0] if len(s) == 1 else f"{{{catalog.write_range(s)}}}" for s in block)
        return [[pattern] if template == pattern else [pattern, template]]
    place = min((len(s), i) for i, s in enumerate(block) if len(s) > 1)[1]
    return [
        row
        for token in block[place]
        for row in rows([*block[:place], [token], *block[place + 1 :]], group)
    ]


def template_of(block: list[list[str]], group: dict[tuple, str]) -> str | None:
    """Return the paths of a product in terms of its sets; None if they do not follow."""
    ids = [[]]
    for alternatives in block:
        ids = [[*key, token] for key in ids for token in alternatives]
    paths = [tokens(group[tuple(key)]) for key in ids]
    varying = [place for place, alternatives in enumerate(block) if len(alternatives) > 1]
    parts = []
    for column in zip(*paths):
        if len(set(column)) == 1:
            parts.append(column[0])
            continue
        for number, place in enumerate(varying):
            values = {}
            if all(
                values.setdefault(key[place], value) == value for key, value in zip(ids, column)
            ):
                same = all(key == value for key, value in values.items())
                aligned = ",".join(values[token] for token in block[place])
                parts.append(f"{{{number}}}" if same else f"{{{number}={aligned}}}")
                break
        else:
            return None
    return "".join(parts)


# ---- checks and counts ---------------------------------------------------------------------------


def check(registry: dict) -> None:
    """Expand the catalog again and compare it with the registry."""
    for name, release in catalog.releases().items():
        if dict(release.entries()) != entries_of(registry[name]):
            raise SystemExit(f"{name} does not expand to the registry's entries")


def report(registry: dict) -> None:
    """Print how many entries are read, by the registry's kinds."""
    counts: dict[tuple[str, str], int] = Counter()
    for release in catalog.releases().values():
        function = registry[release.name].get("conversion_func") or "sae_lens"
        counts[function, release.kind] += sum(1 for _ in release.entries())
    print(f"{catalog.FILE.stat().st_size:,} bytes, {len(registry)} releases")
    print(f"{'registry':<28}{'kind':<24}{'entries':>8}  read by")
    for (function, kind), count in sorted(counts.items(), key=lambda item: -item[1]):
        reader = FORMATS.get(None if function == "sae_lens" else function) if kind == "sae" else "-"
        print(f"{function:<28}{kind:<24}{count:>8}  {reader}")
    saes = {key: n for key, n in counts.items() if "transcoder" not in key[1]}
    read, total = sum(n for key, n in saes.items() if key[1] == "sae"), sum(saes.values())
    print(
        f"SAEs: {read:,} of {total:,} are read, {read / total:.2%}; others: refused by name, "
        f"{sum(counts.values()) - total:,} transcoders"
    )


if __name__ == "__main__":
    main()
