"""The top of the page: the three numbers that say most, each beside what it must beat."""

from __future__ import annotations

from typing import Any

from ksparse.report.sections import reconstruction
from ksparse.report.source import RunSource
from ksparse.report.tables import make_cell

NUMBERS = (
    (reconstruction.DOWNSTREAM, "ce_delta", "nats per token"),
    (reconstruction.STATS, "explained_variance", ""),
    (reconstruction.STATS, "dead_fraction", ""),
)
"""The part, the key and the unit of each."""


def read_numbers(source: RunSource) -> list[dict[str, Any]]:
    """Return the three numbers as cells with their units; those not measured are left out."""
    cells = [
        (make_cell(source, part.group, row), unit)
        for part, key, unit in NUMBERS
        for row in part.group.rows
        if row.key == key
    ]
    return [{"cell": cell, "unit": unit} for cell, unit in cells if cell.number is not None]
