"""native.cpp from Python: compiled for this machine's processor on first use, and cached for the
user.

It is not in the wheel: code for every processor could not use what most of them can do, and the
wheel would need a build for each platform. Without a compiler, or with KSPARSE_NATIVE=0, `load`
returns None and everything runs on plain torch. Where other users may write to the cache it is
compiled again in each process, since a file of theirs might be run.
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
"""The `kind` of quantized rows that `candidates` multiplies; 1 is int8 and 2 is bfloat16, for
torch's products."""
_log = logging.getLogger("ksparse")


class Matrix(ctypes.Structure):
    """Addresses of a weight, its Adam moments and its average (null if there is none)."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "first", "second", "average")]


class Adam(ctypes.Structure):
    """The numbers of a step of Adam.

    The corrections are 1 - beta^step, `decay` is that of the average, `clip` is a factor on all
    gradients.
    """

    _fields_ = [
        (name, ctypes.c_float)
        for name in ("rate", "beta1", "beta2", "eps", "correction1", "correction2", "decay", "clip")
    ]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return the address of a contiguous CPU tensor; null for None."""
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
    "ks_reconstruct",
    "ks_slopes",
    "ks_transpose",
    "ks_update",
)


class NoPrivateCacheError(OSError):
    """There is no folder in which only this user can have written libraries."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the library, compiled if necessary; None, with a line in the log, where that fails."""
    if os.environ.get("KSPARSE_NATIVE", "1") == "0":
        return None
    try:
        kernels = _open_library()
        for name in _SYMBOLS:
            getattr(kernels, name).restype = None
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        text = (getattr(error, "stderr", None) or str(error)).strip() or type(error).__name__
        _log.info(
            "the compiled kernels are not available (%s); training uses plain torch",
            text.splitlines()[-1],
        )
        return None
    return kernels


def library() -> ctypes.CDLL:
    """Return the library; raise RuntimeError where there is none."""
    loaded = load()
    if loaded is None:
        raise RuntimeError(
            "the compiled kernels are not available here; run.kernels=torch does without them"
        )
    return loaded


def _open_library() -> ctypes.CDLL:
    """Load the library from the cache, or from a temporary folder that is removed at once."""
    try:
        return ctypes.CDLL(str(build()))
    except (NoPrivateCacheError, DiskError) as error:
        _log.info("compiled kernels are not kept (%s)", error)
    with tempfile.TemporaryDirectory(prefix="ksparse-") as folder:
        return ctypes.CDLL(str(build(folder=Path(folder))))


def build(compiler: str | None = None, folder: Path | None = None) -> Path:
    """Compile the library unless it is in the folder already.

    Args:
        compiler: Path of a C++ compiler; $CXX, g++, clang++ or c++ by default.
        folder: Where the library is kept; the user's cache by default.

    Returns:
        The library's path.

    Raises:
        OSError: There is no compiler.
        SubprocessError: The compiler fails.
        NoCache: The user has no cache folder of their own.
    """
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = compiler or next((p for name in names if name and (p := shutil.which(name))), None)
    if compiler is None:
        raise OSError("no C++ compiler: install g++ or clang++, or set CXX")
    tune = "-mcpu=native" if platform.machine().lower() in ("aarch64", "arm64") else "-march=native"
    key = hashlib.sha256(
        repr((SOURCE.read_bytes(), compiler, tune, _FLAGS, _processor())).encode()
    ).hexdigest()[:20]
    path = (folder or _cache()) / f"native-{key}.so"
    if path.is_file() and _is_private(path):
        return path
    with atomic.atomic_file(path) as tmp:  # also where two processes compile at once
        subprocess.run(
            [compiler, *_FLAGS, tune, str(SOURCE), "-o", str(tmp)],
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        )
    path.chmod(0o600)
    return path


def _cache() -> Path:
    """Return the folder of libraries; raise NoCache unless only this user can write to it.

    Loading a library runs it, and anybody can work out the name of ours.
    """
    try:
        configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # The XDG specification says to ignore a relative path.
        home = configured if configured.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        home = Path()
    if not home.is_absolute():
        raise NoPrivateCacheError(
            "this user has no home folder; set XDG_CACHE_HOME to a folder of its own"
        )
    folder = home / "ksparse"
    with atomic.translate_oserrors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        shared = next((parent for parent in folder.resolve().parents if _is_open(parent)), None)
        if shared or not _is_private(folder):
            raise NoPrivateCacheError(
                f"others can write to {shared or folder}; "
                "set XDG_CACHE_HOME to a folder of this user alone"
            )
    return folder


def _is_private(path: Path) -> bool:
    """Return whether only this user and root can have written a file or folder."""
    status = path.lstat()
    by_others = stat.S_ISLNK(status.st_mode) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid in (0, os.geteuid()) and not by_others


def _is_open(folder: Path) -> bool:
    """Return whether everybody may replace others' files in a folder."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _processor() -> str:
    """Return what distinguishes processors, since machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            (line for line in lines if line.lower().startswith(("flags", "features"))),
            platform.processor(),
        )
    except OSError:
        return platform.processor() + platform.machine()


# ---- the kernels on tensors


def _int(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def select(pre_acts: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the k largest of pre_acts[b, n] + bias[n], exactly.

    Returns:
        (values[b, k], indices[b, k]), ordered by latent. Values are NaN where fewer than k are not
        NaN.
    """
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
    """Quantize rows x[b, d].

    Args:
        x: [b, d] in float32.
        kind: 1 for int8 with a scale for each row, 2 for bfloat16, or PANELS for the layout in
            which `candidates` takes latents.

    Returns:
        The quantized rows, and their scale (None for bfloat16).
    """
    b, d = x.shape
    scale: Tensor | None = None
    if kind == PANELS:
        padded = -(-b // 16) * 16
        out = torch.zeros(padded * -(-d // 32) * 32, dtype=torch.int8)
        scale = torch.zeros(2, padded)
        scale[1, b:] = -torch.inf  # the padding of the last panel is never chosen
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
    """Recompute the c best of low-precision products exactly, and select the k best of them.

    Args:
        low: Products [b, n], int32 sums or bfloat16.
        x_scale: [b], the scale of int8 rows of x; None for bfloat16.
        w_scale: [n], the scale of int8 rows of the weight; None for bfloat16.
        bias: [n]
        x: [b, d] in float32.
        weight: [n, d] in float32.
        k: How many to select.
        c: How many candidates to recompute.

    Returns:
        values[b, k] and indices[b, k]; dropped[b], the best score that was not a candidate; and
        spread[b], the root mean square of (exact - score) over the candidates.
    """
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
    """Return what `rerank` does, for x[b, d] times latents quantized into panels.

    The full product is never materialised.
    """
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
    """Decode a code, and multiply the error with the decoder rows in use.

    Args:
        x: [b, d]
        b_pre: [d]
        weight: [n, d], the decoder.
        values: [b, k], clamped to >= 0 in place.
        indices: [b, k]
        error: [b, d], written: reconstruction - x.

    Returns:
        The error's squared norm [b], and <error, row> [b, k] where the value is above 0, else 0.
    """
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


def reconstruct(weight: Tensor, values: Tensor, indices: Tensor, recon: Tensor) -> None:
    """Decode a code by the rows of one shard of the latents.

    Args:
        weight: [n, d], the shard's decoder.
        values: [b, k], clamped to >= 0 in place.
        indices: [b, k]
        recon: [b, d], written: the shard's share of the reconstruction, without bias.
    """
    b, k = values.shape
    library().ks_reconstruct(
        pointer(weight),
        _int(b),
        _int(weight.shape[1]),
        k,
        pointer(values),
        pointer(indices),
        pointer(recon),
        torch.get_num_threads(),
    )


def slopes(weight: Tensor, values: Tensor, indices: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `decode` returns, of an error[b, d] that is known."""
    b, k = values.shape
    square, products = error.new_empty(b), error.new_empty(b, k)
    library().ks_slopes(
        pointer(weight),
        _int(b),
        _int(weight.shape[1]),
        k,
        pointer(values),
        pointer(indices),
        pointer(error),
        pointer(square),
        pointer(products),
        torch.get_num_threads(),
    )
    return square, products


def transpose(values: Tensor, indices: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Sort the entries above 0 of values[b, k] by latent.

    Returns:
        (starts[n + 1], order): the entries of latent i are order[starts[i] : starts[i + 1]].
    """
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
