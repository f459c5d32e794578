"""Our training step as one function, for tools that time it beside other libraries' (make(cfg) -> step(x[b, d])).

cfg: d, n, k, B, lr, seed, dead_tokens, auxk_coef, mean[d], var, opts {"kernels": "auto" | "torch" | "native", "screen": "off" | "int8" | "bfloat16" | "auto"}.
"""

from __future__ import annotations

from typing import Any

from ksparse.bench import ours


def make(cfg: Any) -> Any:
    return ours(cfg.opts.get("kernels", "auto"), cfg.opts.get("screen", "off"))(cfg)
