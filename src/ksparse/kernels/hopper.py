"""hopper.cu from Python: compiled on first use, for the shapes at hand, by the compiler that comes
with torch for CUDA (NVRTC).

The Triton kernels in `triton_candidates` do the same on other GPUs. They write scores to memory,
since they cannot branch on a single number, and share no copies between multiprocessors. This
kernel does both.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from cuda.bindings import nvrtc  # torch for CUDA brings it since 2.10
except ImportError:
    nvrtc = None

SOURCE = Path(__file__).with_name("hopper.cu")
TOKENS, CHUNK, WARP = 128, 128, 32
"""Tokens of a block, bytes of a row multiplied at once, threads of a warp: as in hopper.cu."""
SHARED = 227 * 2**10
"""Bytes of shared memory available to a block."""
MAX_STAGES = 8
MAX_LIST = 16 * WARP
"""Scores that a token's list holds at most: a warp has them in registers when it shortens one."""
BLOCK_THREADS = 384


class TilePlan(NamedTuple):
    """The constants that hopper.cu is compiled with."""

    chunks: int
    """Chunks of CHUNK bytes in a row."""
    resident: bool
    """Whether a block's tokens stay in shared memory; otherwise they are copied with each tile."""
    stages: int
    """Chunks of tiles in the ring: in shared memory, or being copied."""
    per: int
    """Scores of a token's list for each thread of a warp."""
    latents: int
    """Latents of a tile. With few, the ring holds many chunks; with many, tokens that are not
    resident are copied less often."""
    cluster: int = 2
    """Blocks that share copies of latents."""

    @property
    def full(self) -> int:
        """Scores that a list may have before more numbers are compared."""
        return self.per * WARP - 64

    @property
    def bytes(self) -> int:
        """Shared memory of a block, as hopper.cu lays it out."""
        stage, tokens = self.latents * CHUNK, TOKENS * CHUNK
        sides = (self.stages + self.chunks) // self.chunks
        return (
            self.stages * (stage + (0 if self.resident else tokens))
            + (self.chunks * tokens if self.resident else 0)
            + sides * self.latents * 8
            + 8 * (2 * self.stages + 1)
        )


def usable(device: torch.device) -> bool:
    """Return whether the kernel can be compiled for and run on a device."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and compiler() is not None
    )


@functools.cache
def compiler() -> tuple[int, int] | None:
    """Return the version of NVRTC; None if it is not installed."""
    try:
        return None if nvrtc is None else nvrtc.nvrtcVersion()[1:]
    except RuntimeError:  # bindings without the library
        return None


def plan(d: int, c: int) -> TilePlan | None:
    """Return the constants for rows of d bytes and c candidates; None if the kernel cannot take
    them."""
    per = -(-min(MAX_LIST, 2 * c + 96) // WARP)
    layouts = ((True, 128, 5), (False, 256, 2))  # resident, latents, fewest stages
    options = (
        TilePlan(-(-d // CHUNK), resident, stages, per, latents)
        for resident, latents, fewest in layouts
        for stages in range(MAX_STAGES, fewest - 1, -1)
    )
    chosen = next(option for option in options if option.bytes <= SHARED)
    return chosen if d % 16 == 0 and 0 < c + c // 8 <= chosen.full else None


def candidates(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    c: int,
    chosen: TilePlan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the c largest of x_scale[b] * scale[n] * <x[b], weight[n]> + bias[n].

    Args:
        x: [b, d] in int8.
        x_scale: [b]
        weight: [n, d] in int8.
        scale: [n]
        bias: [n]
        c: How many to select for each token.
        chosen: What `plan` returned for d and c.

    Returns:
        scores[b, c] and latents[b, c] in no particular order, and an upper bound dropped[b] on the
        scores of all others; it is infinite for a token with fewer than c scores that are not NaN.
    """
    b, n, device = len(x), len(weight), x.device
    blocks, tiles = -(-b // (TOKENS * chosen.cluster)) * chosen.cluster, -(-n // chosen.latents)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    parts = _choose_parts(blocks, min(tiles, n // (4 * c)), processors)
    columns = _stack_columns(scale, bias, tiles * chosen.latents - n)
    slots = parts * blocks * TOKENS * chosen.per * WARP
    lists = torch.empty(slots, dtype=torch.int64, device=device)
    scores = torch.empty(b, parts * c, device=device)
    latents = torch.empty(b, parts * c, dtype=torch.int64, device=device)
    dropped = torch.empty(b, parts, device=device)
    maps = [_map(x, TOKENS), _map(weight, chosen.latents // 2)]
    tensors = (columns, x_scale, lists, scores, latents, dropped)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    arguments = [*maps, *pointers, *map(ctypes.c_int, (b, c, tiles))]
    _launch(chosen, device, (blocks, parts, 1), arguments)
    if parts == 1:
        return scores, latents, dropped[:, 0]
    best, at = scores.topk(c, dim=1, sorted=False)
    best_dropped = scores.scatter(1, at, -torch.inf).amax(1)
    return best, latents.gather(1, at), torch.maximum(best_dropped, dropped.amax(1))


def _stack_columns(scale: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Return scale and bias as [n + padding, 2]."""
    columns = torch.stack((scale, bias), 1)
    if not padding:
        return columns
    # The copy engine fills rows beyond n with zeros; a bias of -inf keeps them out.
    return torch.cat([columns, columns.new_tensor([0.0, -torch.inf]).expand(padding, 2)])


def _choose_parts(blocks: int, most: int, processors: int) -> int:
    """Return into how many parts, at most `most`, to split the latents, so that few multiprocessors
    are idle at the end."""
    return min(
        range(1, max(1, min(8, most)) + 1),
        key=lambda parts: (math.ceil(blocks * parts / processors) / parts, parts),
    )


# ---- the driver


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    """Call the CUDA driver; raise RuntimeError with its message on failure."""
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(
            f"{name} failed: {(text.value or b'unknown').decode()} ({status}); run.kernels=torch "
            "does without these kernels"
        )


def _map(rows: Tensor, box: int) -> Any:
    """Return the copy engine's tensor map of rows[m, d] of bytes.

    It copies boxes of `box` rows of CHUNK bytes, swizzled, with zeros beyond the edges.
    """
    memory = (ctypes.c_uint64 * 24)()
    aligned = (ctypes.c_uint64 * 16).from_buffer(memory, -ctypes.addressof(memory) % 64)
    (m, d), word, half = rows.shape, ctypes.c_uint64, ctypes.c_uint32
    uint8, no_interleave, swizzle_128, promote_256, zeros = 0, 0, 3, 3, 0
    _call(
        "cuTensorMapEncodeTiled",
        ctypes.byref(aligned),
        uint8,
        half(2),
        ctypes.c_void_p(rows.data_ptr()),
        (word * 2)(d, m),
        (word * 1)(d),
        (half * 2)(CHUNK, box),
        (half * 2)(1, 1),
        no_interleave,
        swizzle_128,
        promote_256,
        zeros,
    )
    return aligned


def _launch(
    chosen: TilePlan, device: torch.device, grid: tuple[int, int, int], arguments: list[Any]
) -> None:
    """Launch the kernel on the device's current stream, with ctypes arguments."""
    pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        kernel, threads = _kernel(chosen, device.index), (BLOCK_THREADS, 1, 1)
        _call("cuLaunchKernel", kernel, *grid, *threads, chosen.bytes, stream, pointers, None)


@functools.cache
def _kernel(chosen: TilePlan, index: int) -> ctypes.c_void_p:
    """Return the kernel for these constants, loaded on the current device, number `index`."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(compiled(chosen)))
    _call("cuModuleGetFunction", ctypes.byref(function), module, b"candidates")
    dynamic_shared_bytes = 8
    _call("cuFuncSetAttribute", function, dynamic_shared_bytes, chosen.bytes)
    return function


@functools.cache
def compiled(chosen: TilePlan) -> bytes:
    """Compile hopper.cu with these constants; return the machine code.

    Raises:
        RuntimeError: The compiler fails.
    """
    constants = {
        "CHUNKS": chosen.chunks,
        "RESIDENT": int(chosen.resident),
        "STAGES": chosen.stages,
        "PER": chosen.per,
        "LATENTS": chosen.latents,
        "CLUSTER": chosen.cluster,
    }
    options = [
        b"--gpu-architecture=sm_90a",
        b"--std=c++17",
        *(f"-D{name}={value}".encode() for name, value in constants.items()),
    ]
    status, program = nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"hopper.cu", 0, [], [])
    status, *_ = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(
            f"hopper.cu does not compile with {chosen}: {log.decode()}; run.kernels=torch does "
            "without these kernels"
        )
    code = bytes(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return code
