"""What the command line prints: messages, estimates, progress."""

from __future__ import annotations

import logging

from ksparse.display import ProgressBar, format_estimate, is_first_process, print_status
from ksparse.storage.run_folder import RunFolder

__all__ = [
    "EscapingFormatter",
    "ProgressBar",
    "escape_unprintable",
    "format_estimate",
    "is_first_process",
    "print_status",
    "write_report",
]


def escape_unprintable(text: str) -> str:
    """Return a text with the escape codes of characters that a terminal could take for commands.

    Newlines and tabs stay.
    """
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )


class EscapingFormatter(logging.Formatter):
    """Formatter for log messages, which may quote documents and file names from anywhere."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_unprintable(super().format(record))


def write_report(run: RunFolder) -> None:
    """Write report.html of a run."""
    with ProgressBar("writing the report"):
        from ksparse.report import write

        write(run)
