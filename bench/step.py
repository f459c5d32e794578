"""A whole training step of ksparse as one function, for tools that time it beside other libraries.

make(cfg) -> step(x[b, d]): normalise nothing, forward, backward, AuxK over the dead, Adam, unit-norm decoder, dead accounting, average off.
cfg: d, n, k, B, lr, seed, dead_tokens, auxk_coef, mean[d], var, opts {"kernels": "torch" | "native", "screen": "off" | "int8" | "bfloat16" | "auto"}.
"""

from __future__ import annotations

from typing import Any

import torch

from ksparse.recipe import from_dict, k_aux
from ksparse.sae.init import initialize_
from ksparse.sae.model import SAE, Shape
from ksparse.training.loop import open_optimizer


def make(cfg: Any) -> Any:
    recipe = from_dict({"acts": {"normalize": "none"}, "sae": {"n_latents": cfg.n, "k": cfg.k, "auxk_coef": cfg.auxk_coef, "dead_after": cfg.dead_tokens},
                        "optim": {"lr": cfg.lr, "ema": 0.0, "screen": cfg.opts.get("screen", "off")}, "run": {"kernels": cfg.opts.get("kernels", "auto")},
                        "batch": cfg.B, "tokens": 1000 * cfg.B, "seed": cfg.seed})
    sae = SAE(Shape(cfg.d, cfg.n, cfg.k, "none"))
    generator = torch.Generator().manual_seed(cfg.seed)
    initialize_(sae, cfg.mean + cfg.var**0.5 * torch.randn(4096, cfg.d, generator=generator), recipe.sae, generator)
    sae.b_pre.data.copy_(cfg.mean)
    optimizer, since, taken = open_optimizer(sae, recipe), torch.zeros(cfg.n, dtype=torch.long), 0

    def step(x: torch.Tensor) -> None:
        nonlocal taken
        taken += 1
        dead = (since >= cfg.dead_tokens).nonzero().squeeze(1)
        part = optimizer.backward(x, baseline=cfg.var, dead=dead, k_aux=k_aux(recipe.sae, cfg.d))
        optimizer.step(taken)
        since.add_(len(x))
        since[part.code.indices[part.code.values > 0]] = 0

    def set_dead(latents: torch.Tensor) -> None:
        since[latents] = cfg.dead_tokens
        sae.b_enc.data[latents] = -4 * sae.W_enc.detach().norm(dim=1).mean()

    step.set_dead = set_dead
    step.recon = lambda x: sae(x).detach()
    step.n_dead = lambda: int((since >= cfg.dead_tokens).sum())
    return step
