"""Check whether this machine can run ksparse: one line for each requirement."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

Check = tuple[str, str, str]
"""Name of the requirement, verdict ("yes", "note" or "no"), and what was found and what to do."""


def checks() -> Iterator[Check]:
    """Check everything that ksparse needs, in the order in which a first run would need it.

    Yields:
        One verdict for each requirement.

    Example:
        >>> [name for name, verdict, detail in checks()][0]
        'python'
    """
    supported = sys.version_info >= (3, 11)
    yield (
        "python",
        "yes" if supported else "no",
        f"{platform.python_version()}" + ("" if supported else "; ksparse needs 3.11 or newer"),
    )
    if importlib.util.find_spec("torch") is None:
        yield "torch", "no", "not installed: pip install torch"
        return
    yield from _torch()
    yield _compiled()
    yield _triton()
    yield from _packages()
    yield _disk()
    yield _model()
    yield _hub()


def _torch() -> Iterator[Check]:
    import torch

    yield "torch", "yes", f"{torch.__version__}, {torch.get_num_threads()} threads"
    device = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    yield (
        "device",
        "yes" if device != "cpu" else "note",
        f"{device} ({name})" + ("" if device != "cpu" else "; no accelerator: small models only"),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        try:
            ones = torch.ones(8, 8, dtype=dtype, device=device)
            correct = bool(((ones @ ones) == 8).all())
        except RuntimeError as error:
            yield (
                name,
                "note",
                f"no matrix products on {device}: {str(error).splitlines()[0]}",
            )
            continue
        yield (
            name,
            "yes" if correct else "no",
            f"matrix products on {device}" + ("" if correct else " are wrong"),
        )


def _compiled() -> Check:
    """Compile the training step unless it is already, and find the fastest approximate top k."""
    from ksparse.kernels import native

    if native.load() is None:
        return (
            "compiler",
            "note",
            "no compiled kernels, so training on a CPU is about a quarter slower: install g++ or "
            "clang++",
        )
    from ksparse.training.steps.prefilter import fastest_prefilter

    fastest = fastest_prefilter()
    return (
        "compiler",
        "yes",
        "training steps on a CPU are compiled; "
        + (
            "no low-precision product is faster here"
            if fastest == "off"
            else f"--optim.approx-topk {fastest} is faster still"
        ),
    )


def _triton() -> Check:
    import torch

    if importlib.util.find_spec("triton") is None:
        needed = torch.cuda.is_available()
        return (
            "triton",
            "note",
            "not installed; "
            + ("pip install triton for the fast kernels" if needed else "not needed without a GPU"),
        )
    from importlib.metadata import version

    return "triton", "yes", version("triton")


def _packages() -> Iterator[Check]:
    for name in ("transformers", "tokenizers", "safetensors", "matplotlib"):
        installed = importlib.util.find_spec(name) is not None
        from importlib.metadata import version

        yield (
            name,
            "yes" if installed else "no",
            version(name) if installed else f"not installed: pip install {name}",
        )


def _disk() -> Check:
    """Write and sync a file in the working folder, where runs are stored by default."""
    here = Path.cwd()
    try:
        with tempfile.NamedTemporaryFile(dir=here) as file:
            file.write(b"ksparse")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return (
            "disk",
            "no",
            f"cannot write in {here}: {error.strerror}; use another folder or --out",
        )
    free = shutil.disk_usage(here).free
    return "disk", "yes" if free > 5e9 else "note", f"{free / 1e9:,.0f} GB free in {here}"


def _model() -> Check:
    from ksparse import pylm

    missing = [
        size for size in pylm.SIZES if not (pylm.folder(size) / "model.safetensors").is_file()
    ]
    if missing:
        return (
            "built-in LM",
            "no",
            f"{', '.join(missing)} missing from the package; install ksparse again",
        )
    files = sum(1 for _ in pylm.documents("held-out"))
    if not files:
        return (
            "built-in LM",
            "no",
            "this Python lacks the source of its standard library, so the built-in text is empty",
        )
    return (
        "built-in LM",
        "yes",
        f"{', '.join(pylm.SIZES)}; {files:,} held-out files of the standard library",
    )


def _hub() -> Check:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return "hub", "note", "HF_HUB_OFFLINE=1: only models already on this machine"
    from huggingface_hub import constants

    host = constants.ENDPOINT.partition("://")[2].partition("/")[0]
    try:
        socket.create_connection((host.partition(":")[0], 443), timeout=3).close()
    except OSError:
        return "hub", "note", f"{host} cannot be reached; local folders and the built-in LM work"
    return "hub", "yes", f"{host} answers"
