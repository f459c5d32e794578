"""The loss of the LM behind the site, and its gradient with respect to reconstructions
(`sae.lm_loss`; Karvonen 2025; Braun et al. 2024 train with it from the start).

The unchanged LM runs on the contexts of a batch. Then its part behind the site runs with the
reconstructions in place of the batch's activations, and back. Contexts, positions and the slices of
the logits are those of the evaluation `downstream`, whose numbers are these on held-out text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ksparse.config import ActsConfig, SAEConfig
from ksparse.data.base import ActivationBatch
from ksparse.errors import InputError
from ksparse.evals.losses import compare, gradient
from ksparse.lm.model import LM
from ksparse.lm.tokens import TokenBatch
from ksparse.sae.losses import LMPull
from ksparse.sae.model import SAE


class SplicedLoss(NamedTuple):
    """What an LM loses with reconstructions in place of its activations.

    Args:
        kl: the sum of KL(unchanged || spliced) over the predictions, in nats, float64.
        ce_delta: the sum of the spliced losses less the unchanged ones, in nats, float64.
        predictions: how many there are.
        gradient: of the sum of one of them, with respect to the raw reconstructions [m, d].
    """

    kl: float
    ce_delta: float
    predictions: int
    gradient: Tensor


class LMLoss:
    """The loss of an LM behind its site.

    Args:
        lm: the LM at the SAE's site. Its weights are frozen.
    """

    def __init__(self, lm: LM):
        self.lm = lm
        self.contexts = lm.options.lm_batch or ActsConfig.lm_batch
        """Contexts in a pass."""

    def of(
        self, sae: SAE, options: SAEConfig, batch: ActivationBatch
    ) -> Callable[[Tensor], LMPull]:
        """Return the loss on a batch of whole contexts, as a function of the reconstructions [b, d]
        of the SAE's normalised inputs.

        Raises:
            InputError: the batch comes without its contexts.
        """
        contexts, inputs = batch.contexts, sae.normalize(batch.x)
        if contexts is None:
            raise InputError(
                f"sae.lm_loss is {options.lm_loss!r}, and these activations come without the "
                "contexts of an LM that they are of; give sae.lm_loss 'none'"
            )

        def pull(recon: Tensor) -> LMPull:
            spliced = self.spliced(options.lm_loss, contexts, inputs.restore(recon))
            count = max(1, spliced.predictions)
            kl, ce_delta = spliced.kl / count, spliced.ce_delta / count
            scale = 1.0
            if options.lm_balance:  # no scale can balance what is nothing
                scale = 1 / kl if kl > 0 else 0.0
            value = kl if options.lm_loss == "kl" else ce_delta
            return LMPull(recon.new_tensor(value), spliced.gradient * inputs.scale / count, scale)

        return pull

    def spliced(self, kind: str, contexts: TokenBatch, recon: Tensor) -> SplicedLoss:
        """Run the LM with reconstructions in place of its activations, and back.

        Args:
            kind: 'kl' or 'ce', of which the gradient is wanted.
            contexts: contexts [b, t]; `keep` are the m positions that are replaced. Predictions
                count from those positions whose next one is replaced too.
            recon: raw activations [m, d] to put there.
        """
        contexts = self.lm.on_device(contexts)
        rows = contexts.keep.sum(1)
        parts = [
            self._spliced_part(kind, TokenBatch(*group), part)
            for group, part in zip(
                zip(*(field.split(self.contexts) for field in contexts), strict=True),
                recon.split([int(count.sum()) for count in rows.split(self.contexts)]),
                strict=True,
            )
        ]
        return SplicedLoss(
            sum(part.kl for part in parts),
            sum(part.ce_delta for part in parts),
            sum(part.predictions for part in parts),
            torch.cat([part.gradient for part in parts]),
        )

    def _spliced_part(self, kind: str, contexts: TokenBatch, recon: Tensor) -> SplicedLoss:
        keep = contexts.keep
        scored = torch.nn.functional.pad(keep[:, :-1] & keep[:, 1:], (0, 1))
        targets = contexts.tokens.roll(-1, 1)[scored]
        if not len(targets):
            return SplicedLoss(0.0, 0.0, 0, torch.zeros_like(recon))
        cached = self.lm.run_with_cache(contexts.tokens, contexts.attention)
        clean = cached.predictions.at(scored)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = recon.detach().clone().requires_grad_()

            def replace(x: Tensor) -> Tensor:
                x = x.clone()
                x[keep] = leaf
                return x

            changed = self.lm.predict_patched(cached, replace, gradient=True).at(scored)
        kl = ce_delta = 0.0

        def of_logits(at: slice, logits: Tensor) -> Tensor:
            nonlocal kl, ce_delta
            unchanged = clean[at].clone()  # those of the pass cannot take part in a gradient
            found = compare(unchanged, logits, targets[at])
            kl += found.kl.sum().item()
            ce_delta += (found.changed - found.clean).sum().item()
            return gradient(kind, unchanged, logits, targets[at])

        slope = changed.gradient(leaf, of_logits)
        return SplicedLoss(kl, ce_delta, len(targets), slope)
