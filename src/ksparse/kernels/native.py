"""native.cpp from Python: built for this machine's processor when it is first needed, and kept in
the user's cache.

It is not in the wheel, because code for any processor would leave out what most of them can do, and
because a wheel that carried it would be one for each platform. Without a compiler, or with
KSPARSE_NATIVE=0, `load` returns None and everything runs on plain torch. Where others may have
written to the cache it is built anew in each process, or theirs might be run.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Final, Literal, overload

import torch
from torch import Tensor

from ksparse.errors import DiskError
from ksparse.storage import atomic

SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
)
PANELS: Final = 3
"""The kind of low-precision rows that `screen` multiplies; 1 is int8, 2 bfloat16, for torch's
products."""
_log = logging.getLogger("ksparse")


class Matrix(ctypes.Structure):
    """A weight with its moments and its average; a missing average is null."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "first", "second", "average")]


class Adam(ctypes.Structure):
    """What a step of Adam needs; the corrections are 1 - beta^step, `decay` is the average's,
    `clip` multiplies all gradients."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in ("rate", "beta1", "beta2", "eps", "correction1", "correction2", "decay", "clip")
    ]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return where a contiguous CPU tensor lies; null for None."""
    if tensor is None:
        return ctypes.c_void_p(None)
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"native kernels take contiguous tensors in main memory, got {list(tensor.shape)} on "
            f"{tensor.device}, strides {tensor.stride()}"
        )
    return ctypes.c_void_p(tensor.data_ptr())


_SYMBOLS = (
    "ks_select",
    "ks_lower",
    "ks_rescore",
    "ks_screen",
    "ks_decode",
    "ks_transpose",
    "ks_update",
)


class NoCache(OSError):
    """There is no folder that this user alone can have written libraries to."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the library, built if need be; None where that cannot be done, said once in the
    log."""
    if os.environ.get("KSPARSE_NATIVE", "1") == "0":
        return None
    try:
        opened = _opened()
        for name in _SYMBOLS:
            getattr(opened, name).restype = None
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip() or type(error).__name__
        _log.info(
            "the compiled kernels are not available (%s); training goes on with plain torch",
            said.splitlines()[-1],
        )
        return None
    return opened


def library() -> ctypes.CDLL:
    """Return what `load` does; raise RuntimeError where there is none."""
    loaded = load()
    if loaded is None:
        raise RuntimeError(
            "the compiled kernels are not available here; run.kernels=torch does without them"
        )
    return loaded


def _opened() -> ctypes.CDLL:
    """Load the library from the cache, or from a folder that is gone right after."""
    try:
        return ctypes.CDLL(str(build()))
    except (NoCache, DiskError) as error:
        _log.info("compiled kernels are not kept (%s)", error)
    with tempfile.TemporaryDirectory(prefix="ksparse-") as folder:
        return ctypes.CDLL(str(build(folder=Path(folder))))


def build(compiler: str | None = None, folder: Path | None = None) -> Path:
    """Return the built library; raise OSError without a compiler, SubprocessError if it fails.

    folder: where it is kept; the user's cache if not given, or NoCache where that is none.
    """
    compiler = compiler or next(
        (
            found
            for name in (os.environ.get("CXX"), "g++", "clang++", "c++")
            if name and (found := shutil.which(name))
        ),
        None,
    )
    if compiler is None:
        raise OSError("no C++ compiler: install g++ or clang++, or set CXX")
    tune = "-mcpu=native" if platform.machine().lower() in ("aarch64", "arm64") else "-march=native"
    key = hashlib.sha256(
        repr((SOURCE.read_bytes(), compiler, tune, _FLAGS, _processor())).encode()
    ).hexdigest()[:20]
    path = (folder or _cache()) / f"native-{key}.so"
    if path.is_file() and _of_this_user(path):
        return path
    with atomic.atomic_file(path) as made:  # whole or not at all, also where two processes build
        subprocess.run(
            [compiler, *_FLAGS, tune, str(SOURCE), "-o", str(made)],
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        )
    path.chmod(0o600)
    return path


def _cache() -> Path:
    """Return the folder of libraries; raise NoCache unless this user alone can write there.

    A library is run as it is loaded, and anybody can work out the name of ours.
    """
    try:
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # a relative one is to be ignored
        home = given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        home = Path()
    if not home.is_absolute():
        raise NoCache("this user has no home folder; set XDG_CACHE_HOME to a folder of its own")
    folder = home / "ksparse"
    with atomic.translate_oserrors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        shared = next((above for above in folder.resolve().parents if _open_to_all(above)), None)
        if shared or not _of_this_user(folder):
            raise NoCache(
                f"others can write to {shared or folder}; "
                "set XDG_CACHE_HOME to a folder of this user alone"
            )
    return folder


def _of_this_user(path: Path) -> bool:
    """Return whether nobody but this user and root can have put there what is there."""
    found = path.lstat()
    of_others = stat.S_ISLNK(found.st_mode) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid in (0, os.geteuid()) and not of_others


def _open_to_all(folder: Path) -> bool:
    """Return whether everybody may take away what others have in a folder."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _processor() -> str:
    """Return what tells processors apart: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            (line for line in lines if line.lower().startswith(("flags", "features"))),
            platform.processor(),
        )
    except OSError:
        return platform.processor() + platform.machine()


# ---- the kernels on tensors ----------------------------------------------------------------------


def _int(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def select(pre_acts: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (values[b, k], indices[b, k]) of the k largest of pre_acts[b, n] + bias[n], exactly,
    by latent; NaN where there are fewer."""
    b, n = pre_acts.shape
    values, indices = pre_acts.new_empty(b, k), torch.empty(b, k, dtype=torch.int32)
    library().ks_select(
        pointer(pre_acts),
        pointer(bias),
        _int(b),
        _int(n),
        k,
        pointer(values),
        pointer(indices),
        torch.get_num_threads(),
    )
    return values, indices


@overload
def quantize(x: Tensor, kind: Literal[1, 3]) -> tuple[Tensor, Tensor]: ...
@overload
def quantize(x: Tensor, kind: int) -> tuple[Tensor, Tensor | None]: ...
def quantize(x: Tensor, kind: int) -> tuple[Tensor, Tensor | None]:
    """Return rows x[b, d] as int8 with a scale[b] (kind 1), as bfloat16 (kind 2), or as `screen`
    wants its latents (kind 3)."""
    b, d = x.shape
    scale: Tensor | None = None
    if kind == PANELS:
        wide = -(-b // 16) * 16
        out, scale = torch.zeros(wide * -(-d // 32) * 32, dtype=torch.int8), torch.zeros(2, wide)
        scale[1, b:] = -torch.inf  # what fills the last panel up is never chosen
    elif kind == 1:
        out, scale = torch.empty(b, d, dtype=torch.int8), torch.empty(b)
    else:
        out = torch.empty(b, d, dtype=torch.bfloat16)
    library().ks_lower(
        pointer(x), _int(b), _int(d), kind, pointer(out), pointer(scale), torch.get_num_threads()
    )
    return out, scale


def rerank(
    low: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor,
    x: Tensor,
    weight: Tensor,
    k: int,
    c: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (values[b, k], indices[b, k], dropped[b], spread[b]): the k best by exact value of the
    c best of low[b, n]."""
    b, n = low.shape
    values, indices = torch.empty(b, k), torch.empty(b, k, dtype=torch.int32)
    dropped, spread = torch.empty(b), torch.empty(b)
    library().ks_rescore(
        pointer(low),
        1 if low.dtype == torch.int32 else 2,
        pointer(x_scale),
        pointer(w_scale),
        pointer(bias),
        pointer(x),
        pointer(weight),
        _int(b),
        _int(n),
        _int(x.shape[1]),
        k,
        c,
        pointer(values),
        pointer(indices),
        pointer(dropped),
        pointer(spread),
        torch.get_num_threads(),
    )
    return values, indices, dropped, spread


def candidates(
    low: Tensor, scale: Tensor, bias: Tensor, x: Tensor, weight: Tensor, k: int, c: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same of x[b, d] times latents that `lower` has put into panels; the product itself
    is nowhere."""
    b, (n, d) = len(x), weight.shape
    values, indices = torch.empty(b, k), torch.empty(b, k, dtype=torch.int32)
    dropped, spread = torch.empty(b), torch.empty(b)
    library().ks_screen(
        pointer(low),
        pointer(scale),
        pointer(bias),
        pointer(x),
        pointer(weight),
        _int(b),
        _int(n),
        _int(d),
        k,
        c,
        pointer(values),
        pointer(indices),
        pointer(dropped),
        pointer(spread),
        torch.get_num_threads(),
    )
    return values, indices, dropped, spread


def decode(
    x: Tensor, b_pre: Tensor, weight: Tensor, values: Tensor, indices: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:
    """Make values[b, k] >= 0 in place and write error[b, d] = reconstruction - x; return (its
    squared norm[b], <error, row>[b, k])."""
    b, k = values.shape
    square, slopes = x.new_empty(b), x.new_empty(b, k)
    library().ks_decode(
        pointer(x),
        pointer(b_pre),
        pointer(weight),
        _int(b),
        _int(x.shape[1]),
        k,
        pointer(values),
        pointer(indices),
        pointer(error),
        pointer(square),
        pointer(slopes),
        torch.get_num_threads(),
    )
    return square, slopes


def transpose(values: Tensor, indices: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return (starts[n + 1], order): the entries above 0 of each latent are order[starts[i] :
    starts[i + 1]]."""
    starts, order = (
        torch.empty(n + 1, dtype=torch.long),
        torch.empty(values.numel(), dtype=torch.int32),
    )
    library().ks_transpose(
        pointer(values),
        pointer(indices),
        _int(values.numel()),
        _int(n),
        pointer(starts),
        pointer(order),
    )
    return starts, order
