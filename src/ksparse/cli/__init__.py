"""The command line, and the only part of ksparse that prints or exits.

    train          demo, train, finetune, resume
    sweeps         sweep, fit
    evaluate       eval, compare, probes
    studies        study, sanity
    explain        explain
    report         report, view
    interventions  steer, attribute
    convert        convert, push
    published      list
    prepare        shard, plan, bench, doctor
    shell          help, completion

    subjects       which LM, site and text an SAE of any kind is used on
    arguments      the table of verbs, and how their arguments are parsed
    examples       command lines to start from, for each verb's help
    output         messages, estimates, progress

Modules import torch inside their verbs, so that help appears at once.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
from contextlib import suppress

from ksparse.cli import (
    convert,
    evaluate,
    explain,
    interventions,
    prepare,
    published,
    report,
    shell,
    studies,
    sweeps,
    train,
)
from ksparse.cli.arguments import LOAD_LM, VERBS, describe_verb
from ksparse.cli.output import EscapingFormatter, escape_unprintable, is_first_process
from ksparse.errors import DiskError, InputError, KsparseError, unknown
from ksparse.storage.atomic import FULL
from ksparse.trust import split_trust_flag, trusted

EXIT_CODES = (
    "0 success · 1 failure · 2 bad input · 3 NaN or infinity · 4 out of memory · 5 disk · "
    "6 another process failed · 129 SIGHUP · 130 Ctrl-C · 143 SIGTERM (all after saving) · "
    "141 broken pipe"
)
GROUPS = {
    "train": (train,),
    "scale": (sweeps,),
    "judge": (evaluate, studies, explain),
    "look": (report,),
    "change": (interventions,),
    "exchange": (convert, published),
    "check, before a run": (prepare,),
    "this command": (shell,),
}
"""The groups in which help lists the verbs, with the modules that hold them."""
COMMAND_MODULES = tuple(module for modules in GROUPS.values() for module in modules)
_WIDEST = 100


def main(arguments: list[str] | None = None) -> None:
    """Run one verb and exit with its code.

    Args:
        arguments: the words of the command line; by default those of this process.
    """
    # Set before torch is imported: threads that spin while they wait slow down other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _open_streams()
    try:
        try:
            _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has left, as `| head` does
        sys.stdout = None  # else Python flushes it once more at exit
        sys.exit(141)
    except OSError as error:
        if error.errno not in FULL:  # an error of a file would be a DiskError
            raise
        sys.stdout = None
        with suppress(OSError):
            print(f"ksparse: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(DiskError.exit_code)


def _open_streams() -> None:
    """Make the standard streams safe to print to, in whatever state the caller left them.

    The number of a closed stream would be given to the next file that is opened, and prints of
    libraries would end up in that file. Characters that the output's encoding lacks are escaped.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["help"]:
        print(usage())
        sys.exit(0)
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"ksparse {version('ksparse')}")
        sys.exit(0)
    verb, *words = arguments
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EscapingFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("ksparse").setLevel(logging.INFO if is_first_process() else logging.ERROR)
    try:
        if verb not in VERBS:
            raise unknown("there is no verb", verb, VERBS, "see `ksparse --help`")
        _check_working_folder()
        trust, words = split_trust_flag(words) if verb in LOAD_LM else (False, words)
        with trusted(trust):
            VERBS[verb](words)
    except KsparseError as error:
        with suppress(OSError):  # the exit code holds even if standard error cannot be written
            print(escape_unprintable(f"ksparse {verb}: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            f"the working folder does not exist: {error.strerror}; change to another one"
        ) from None


def usage() -> str:
    """Return the help of the command without a verb: the verbs by group, each with a sentence."""
    width = min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)
    lines = ["ksparse: train, scale and judge k-sparse autoencoders on language-model activations"]
    for group, modules in GROUPS.items():
        names = {module.__name__ for module in modules}
        lines += ["", group]
        for name, verb in VERBS.items():
            if verb.__module__ in names:
                sentence = describe_verb(name)[1].partition(". ")[0].removesuffix(".")
                lines += textwrap.wrap(
                    f"{name:<11}{sentence}",
                    width,
                    initial_indent="  ",
                    subsequent_indent=" " * 13,
                )
    lines += ["", "`ksparse help VERB` shows the options of a verb, and examples."]
    return "\n".join([*lines, *textwrap.wrap(f"Exit codes: {EXIT_CODES}", width)])
