"""Names on the Hugging Face Hub, told from paths on this machine before anything is requested."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ksparse.errors import InputError
from ksparse.storage import atomic

NEEDED = (
    "a run, a folder or file of any format that `ksparse convert` names, a published SAE "
    "(`ksparse list`), or a Hub repository, OWNER/NAME"
)
"""What an SAE can be given as."""
_OURS = ("runs", "sweeps", "studies", "recipes", "results", "suites")
"""Folders that commands of ksparse write to or read by default."""
_ENDINGS = (
    *(".safetensors", ".pt", ".pth", ".npz", ".bin", ".gguf", ".toml", ".yaml"),
    *(".json", ".jsonl", ".txt", ".csv", ".parquet", ".gz", ".xz", ".zst", ".py", ".md"),
)
_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_UNREACHABLE_AFTER = 10.0  # seconds


def is_plainly_local(name: str) -> bool:
    """Return whether a name is that of a file or folder here, whether or not that exists.

    It is if it begins like a path, ends like a file, begins with a folder that ksparse writes to,
    or lies in a folder that exists and is not of the form OWNER/NAME.

    Example:
        >>> [is_plainly_local(name) for name in ("./gpt2", "runs/mine", "my.txt", "owner/name")]
        [True, True, True, False]
    """
    first, slash, _ = name.partition("/")
    return bool(
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.lower().endswith(_ENDINGS)
        or (slash and first in _OURS)
        or (slash and not _NAME.fullmatch(name) and atomic.exists(Path(name).parent))
    )


def absence(name: str) -> str:
    """Return what a message on a missing Hub repository adds where its owner has the name of a
    folder here, so that a path may have been meant; "" otherwise."""
    folder = Path(name).parent
    if folder == Path() or not atomic.exists(folder) or atomic.exists(Path(name)):
        return ""
    return f"; nor is it here: the folder {folder} has no {Path(name).name!r}"


def check_not_missing(name: str, what: str, instead: str, *, more_parts: bool = False) -> None:
    """Raise InputError for a path that does not exist, and so must not be asked for on the Hub.

    Args:
        name: a path, or a name on the Hub.
        what: what it names, such as "text".
        instead: what can be given, for the message.
        more_parts: whether names of more than two parts, or otherwise none of the Hub, pass.
    """
    if atomic.exists(Path(name)):
        return
    if is_plainly_local(name) or not (more_parts or _NAME.fullmatch(name)):
        shown = name if len(name) <= 200 else f"{name[:80]}…"
        raise InputError(f"{what} {shown} does not exist; give {instead}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's lines about requests that it repeats, inside the block."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def check_reachable(name: str, what: str, instead: str) -> None:
    """Raise InputError if something that is not on this machine would have to come from a Hub that
    does not answer.

    One request is sent, so that the library's own, each repeated five times, need not be awaited.

    Args:
        name: the name of a repository on the Hub.
        what: what it names, such as "model".
        instead: what can be given, for the message.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    folder = f"models--{name.replace('/', '--')}"
    if constants.HF_HUB_OFFLINE or (Path(constants.HF_HUB_CACHE) / folder / "snapshots").is_dir():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_UNREACHABLE_AFTER)
    except Exception as error:  # of whichever library sends requests
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise InputError(
            f"{what} {name!r} is not on this machine, and the Hub, {constants.ENDPOINT}, cannot be "
            f"reached ({type(error).__name__}: {reason}){absence(name)}; give {instead}"
        ) from None
