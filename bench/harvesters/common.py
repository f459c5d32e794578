"""What the adapters of bench/harvest.py share. Needs numpy and torch only.

An adapter loads the LM of --lm, and for each line on its standard input reads the activations of the contexts in --tokens at
the output of layer --layer once. It answers with a line of JSON: wall and processor seconds, and the sum of the activations'
squares, by which the driver sees that all read the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import torch


def arguments() -> tuple[argparse.Namespace, torch.Tensor]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lm", required=True)
    parser.add_argument("--tokens", required=True)
    for name in ("layer", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args, torch.from_numpy(np.load(args.tokens))


def serve(read: Callable[[], torch.Tensor]) -> None:
    """Answer requests with the time of `read`, which returns x[b, t, d]."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    x = read()
    print(json.dumps({"ready": float(x.double().square().sum())}), file=answers, flush=True)
    for _ in sys.stdin:
        wall, used = time.perf_counter(), time.process_time()
        read()
        seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - used}
        print(json.dumps(seconds), file=answers, flush=True)
