"""Results of one recipe at several sites, side by side: curves over the layers, and a sentence for
each location. Needs no torch.

Results are {site: {evaluation: {key: {"value", "se"}}}}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ksparse.display import format_estimate

_Results = Mapping[str, Mapping[str, Any]]


class Curve(NamedTuple):
    """A number of one location by layer, with standard errors where they are known."""

    label: str
    x: list[int]
    y: list[float | None]
    se: list[float | None]


def place_of(site: str) -> tuple[str, int] | None:
    """Return a site's location and layer; None where its name has no layer.

    Example:
        >>> place_of("resid_post.3"), place_of("model.layers.11.mlp:in"), place_of("model.norm")
        (('resid_post', 3), ('model.layers.I.mlp:in', 11), None)
    """
    parts = re.split(r"(?=[.:])", site)
    for number, part in enumerate(parts):
        if re.fullmatch(r"\.-?\d+", part):
            rest = "".join(parts[number + 1 :])
            return "".join(parts[:number]) + (f".I{rest}" if rest else ""), int(part[1:])
    return None


def locations(results: _Results) -> dict[str, list[str]]:
    """Return {location: its sites by layer} of those whose names have a layer."""
    places = {site: place for site in results if (place := place_of(site)) is not None}
    found: dict[str, list[str]] = {}
    for site in sorted(places, key=lambda site: places[site][1]):
        found.setdefault(places[site][0], []).append(site)
    return {location: found[location] for location in dict.fromkeys(p[0] for p in places.values())}


def curves(results: _Results, evaluation: str, key: str) -> list[Curve]:
    """Return one number of an evaluation by layer, a curve for each location that has it."""
    found = []
    for location, sites in locations(results).items():
        known = [site for site in sites if key in results[site].get(evaluation, {})]
        numbers = [results[site][evaluation][key] for site in known]
        if known:
            found.append(
                Curve(
                    location,
                    [place[1] for site in known if (place := place_of(site))],
                    [number["value"] for number in numbers],
                    [number["se"] for number in numbers],
                )
            )
    return found


def findings(results: _Results) -> list[str]:
    """Return a sentence for each location whose sites all have `stats` and `downstream`."""
    sentences = []
    for location, sites in locations(results).items():
        if not all({"stats", "downstream"} <= set(results[site]) for site in sites):
            continue
        best, worst = (
            pick(sites, key=lambda site: results[site]["stats"]["nmse"]["value"])
            for pick in (min, max)
        )
        losses = [format_estimate(results[site]["downstream"]["ce_delta"]) for site in sites]
        sentences.append(
            f"{location}: error from {format_estimate(results[best]['stats']['nmse'])} at {best} "
            f"to {format_estimate(results[worst]['stats']['nmse'])} at {worst}; delta CE "
            f"{', '.join(losses)} by layer."
        )
    return sentences
