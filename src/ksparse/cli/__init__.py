"""The verbs. The only station that prints or exits.

    training   demo, train, resume              judging    eval, compare, study, probes
    sweeps     sweep, fit                       pages      report, view
    inside     steer, attribute                 exchange   convert, push
    before     shard, plan, bench, doctor

    arguments  the table of verbs, and how their arguments are read        shown   lines, numbers,
        progress

Nothing heavy is imported before a verb runs, so that help is there at once.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress

from ksparse.cli import convert, evaluate, interventions, prepare, report, sweeps, train
from ksparse.cli.arguments import LOAD_LM, VERBS, usage_of
from ksparse.cli.output import Lines, first_process, visible
from ksparse.errors import DiskError, InputError, KsparseError, unknown
from ksparse.storage.atomic import FULL
from ksparse.trust import taken_from, trusted

EXIT_CODES = (
    "0 done · 1 failed · 2 bad input · 3 NaN or infinity · 4 out of memory · 5 disk · 6 "
    "another process gone · 130 Ctrl-C · 143 SIGTERM (both after saving) · 141 nobody "
    "reads the output"
)
STATIONS = (train, sweeps, evaluate, report, interventions, convert, prepare)
"""In the order in which help lists their verbs."""


def main(arguments: list[str] | None = None) -> None:
    """Run one verb and exit with its code."""
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # before torch: waiting threads that spin cost others' work dearly
    _open_streams()
    try:
        try:
            _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has left, as `| head` does
        sys.stdout = None  # else Python tries once more as it ends
        sys.exit(141)
    except OSError as error:
        if error.errno not in FULL:  # of a file, it would be a DiskError
            raise
        sys.stdout = None
        with suppress(OSError):
            print(f"ksparse: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(DiskError.exit_code)


def _open_streams() -> None:
    """Make the standard streams fit to print to, whatever the caller made of them.

    Of a closed one the system would give the number to the next file that is opened, and what a
    library prints would land in that. A character that the output's encoding lacks is escaped.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0)
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"ksparse {version('ksparse')}")
        sys.exit(0)
    verb, *rest = arguments
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("ksparse").setLevel(logging.INFO if first_process() else logging.ERROR)
    try:
        if verb not in VERBS:
            raise unknown("there is no verb", verb, VERBS, "see `ksparse --help`")
        _check_working_folder()
        code, rest = taken_from(rest) if verb in LOAD_LM else (False, rest)
        with trusted(code):
            VERBS[verb](rest)
    except KsparseError as error:
        with suppress(OSError):  # who reads no messages still gets the exit code
            print(visible(f"ksparse {verb}: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            f"the working folder is not there: {error.strerror}; go to another one"
        ) from None


def usage() -> str:
    verbs = [
        usage_of(name)
        for station in STATIONS
        for name, verb in VERBS.items()
        if verb.__module__ == station.__name__
    ]
    lines = [f"  {usage:<50} {what}" for usage, what in verbs]
    return "\n".join(
        [
            "ksparse: train, scale and judge k-sparse autoencoders on language-model activations",
            "",
            *lines,
            "",
            "`ksparse VERB --help` shows a verb's options.",
            f"Exit codes: {EXIT_CODES}",
        ]
    )
