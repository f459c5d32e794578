"""Measure this machine: the speed of a training step, and of reading an LM's activations.

steps    a training step, against the encoder product and a dense step
harvest  activations of an LM, against the matrix products that its forward pass is made of
"""

from ksparse.bench.harvest import HarvestSetting, bench_harvest
from ksparse.bench.steps import BUILT_IN, OwnStep, Setting, activations, bench, ours, picture

__all__ = [
    "BUILT_IN",
    "HarvestSetting",
    "OwnStep",
    "Setting",
    "activations",
    "bench",
    "bench_harvest",
    "ours",
    "picture",
]
