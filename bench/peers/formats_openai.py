"""openai/sparse_autoencoder's files, by hand, since it is not on the package index: its published layout, with an encoder and decoder of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from formats import Both, fit, run
from torch import Tensor


def both(file: dict[str, Any]) -> Both:
    top = file["activation"] == "TopK"

    def inputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not top:
            return x, torch.zeros(1), torch.ones(1)
        mean = x.mean(-1, keepdim=True)
        deviation = (x - mean).std(-1, keepdim=True)
        return (x - mean) / (deviation + 1e-5), mean, deviation

    def encode(x: Tensor) -> Tensor:
        pre = torch.nn.functional.linear(
            inputs(x)[0] - file["pre_bias"], file["encoder.weight"], file["latent_bias"]
        )
        if not top:
            return pre.relu()
        values, indices = pre.topk(file["activation_state_dict"]["k"], dim=-1)
        return torch.zeros_like(pre).scatter(-1, indices, values.relu())

    def decode(latents: Tensor, x: Tensor) -> Tensor:
        _, mean, deviation = inputs(x)
        return (
            torch.nn.functional.linear(latents, file["decoder.weight"]) + file["pre_bias"]
        ) * deviation + mean

    return encode, decode


def made(activation: str) -> Any:
    def make(x: Tensor, folder: Path, n: int, k: int) -> Both:
        d = x.shape[1]
        trained = {
            "pre_bias": torch.zeros(d),
            "encoder.weight": torch.randn(n, d) / d**0.5,
            "latent_bias": torch.zeros(n),
            "decoder.weight": torch.randn(d, n) / d**0.5,
        }
        statistics = {
            "stats_last_nonzero": torch.zeros(n, dtype=torch.long),
            "latents_activation_frequency": torch.zeros(n),
            "latents_mean_square": torch.zeros(n),
        }
        file = {
            **trained,
            **statistics,
            "activation": activation,
            "activation_state_dict": {"k": k, "postact_fn": "ReLU"} if activation == "TopK" else {},
        }
        encode, decode = both(file)
        fit(
            [each.requires_grad_() for each in trained.values()],
            lambda rows: decode(encode(rows), rows),
            x,
        )
        file = {
            key: value.detach() if isinstance(value, Tensor) else value
            for key, value in file.items()
        }
        torch.save(file, folder / "autoencoder.pt")
        return both(file)

    return make


if __name__ == "__main__":
    run(
        {"v5-TopK": made("TopK"), "v4-ReLU": made("ReLU")},
        lambda folder: both(torch.load(folder / "autoencoder.pt", weights_only=True)),
    )
