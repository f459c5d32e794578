"""The devices that can be planned for: the makers' figures, and the shares of them that programs
reach.

All figures are dense peaks of one device. A100 SXM 80 GB, H100 SXM and H200 SXM are from NVIDIA's
data sheets, with NVLink each way and one InfiniBand port per GPU (200 Gb/s for the A100, 400 Gb/s
for the others), as in NVIDIA's own eight-GPU machines. The laptop is a guess at an ordinary one
with two to four cores.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ksparse.config import Config
from ksparse.errors import InputError


@dataclass(frozen=True)
class Device:
    """One device and its links to others, in bytes, FLOP/s and bytes per second."""

    name: str
    memory: float
    float32: float
    """FLOP/s of products in full float32, without TF32, as is torch's default."""
    bfloat16: float
    bandwidth: float
    """Bandwidth of its memory, reading and writing together."""
    link: float
    """Bandwidth to other devices of its node, each way."""
    network: float
    """Bandwidth to other nodes, each way."""
    per_node: int
    host: bool = False
    """Whether the device's memory is the machine's, which Python and its libraries share."""


DEVICES = {
    "a100": Device("A100 SXM 80 GB", 80e9, 19.5e12, 312e12, 2.039e12, 300e9, 25e9, 8),
    "h100": Device("H100 SXM", 80e9, 66.9e12, 989.4e12, 3.35e12, 450e9, 50e9, 8),
    "h200": Device("H200 SXM", 141e9, 66.9e12, 989.4e12, 4.8e12, 450e9, 50e9, 8),
    "laptop": Device("laptop", 16e9, 0.25e12, 0.25e12, 40e9, 5e9, 0.1e9, 1, host=True),
}

PRODUCT = 0.8
"""Share of the peak that large products reach: 790 of 989 TFLOP/s in bfloat16 were measured on an
H200."""
MEMORY = 0.9
"""Share of the bandwidth that a plain pass over memory reaches: 4.3 of 4.8 TB/s were measured
on the same H200."""
GATHER = 0.7
"""Share of the bandwidth that reading rows of a few kB in random order reaches. An assumption."""
LINK = 0.85
"""Share of a link that a large collective reaches. An assumption."""
LM = 0.4
"""Share of the peak that the forward pass of an LM reaches. An assumption."""
USABLE = 0.92
"""Share of a device's memory that a plan may fill; the rest is lost to fragmentation."""
LATENCY = 30e-6
"""Seconds that the smallest collective takes. An assumption."""

OVERRIDES = {
    "memory_gb": ("memory", 1e9),
    "float32_tflops": ("float32", 1e12),
    "bfloat16_tflops": ("bfloat16", 1e12),
    "bandwidth_gbs": ("bandwidth", 1e9),
    "link_gbs": ("link", 1e9),
    "network_gbs": ("network", 1e9),
    "per_node": ("per_node", 1),
}
"""The field of `Device` that each key of `Hardware` replaces, and the key's unit."""


@dataclass(frozen=True)
class Hardware(Config):
    """Figures that replace the card's own; 0 leaves them."""

    SECTION = "hardware."

    memory_gb: float = 0.0
    """Memory of a device."""
    float32_tflops: float = 0.0
    """Peak of products in float32, without TF32."""
    bfloat16_tflops: float = 0.0
    """Peak of dense products in bfloat16."""
    bandwidth_gbs: float = 0.0
    """Memory bandwidth."""
    link_gbs: float = 0.0
    """Bandwidth to another device of the same node, each way."""
    network_gbs: float = 0.0
    """Bandwidth of a device to other nodes, each way."""
    per_node: int = 0
    """Devices of a node."""

    def replace_figures(self, card: Device) -> Device:
        """Return the card with these figures in place of its own.

        Raises:
            InputError: for a negative figure.
        """
        changes = {}
        for key, (field, unit) in OVERRIDES.items():
            value = getattr(self, key)
            if value < 0:
                raise InputError(
                    f"hardware.{key} is {value}; it must be above 0, or 0 for the card's own"
                )
            if value:
                changes[field] = value * unit
        return dataclasses.replace(card, **changes)
