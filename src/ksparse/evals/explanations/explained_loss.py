"""How well does the LM predict if each latent is replaced by its explanation? Gao et al. 2024,
section 4.4.

Each latent's prediction s is scaled by E[s a] / E[s^2], a being its activation, which is the scale
with the least squared error; the scaled predictions are decoded, given the token's own mean and
norm back, and spliced in. The scale comes from documents that neither the explanations were built
from nor the loss is taken on.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ksparse.data.contexts import Corpus
from ksparse.evals.base import EvalContext, Metric, Progress
from ksparse.evals.batches import HeldOutBatch, SAEBatch
from ksparse.evals.explanations.builder import (
    SCALE,
    SCORE,
    Activations,
    N2GBuilder,
    activations,
    key,
    of_parts,
)
from ksparse.evals.explanations.ngrams import Ngrams
from ksparse.evals.statistics import DocumentSums, Result, ratio

_ENTRIES = 4_000_000  # activations that the scales are estimated from, at most


class ExplainedLoss(Metric):
    """Cross-entropy with explanations in place of latents, beside the SAE's own, n-grams, zeros and
    b_pre alone."""

    passes = 2

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.explainer = context.part(N2GBuilder)
        self.explainer.want(np.arange(context.sae.shape.n_latents))
        self.sums = DocumentSums()
        self.keep: list[np.ndarray] = []  # where the scales are estimated
        self.found: list[Activations] = []
        self.contexts = self.entries = self.predictions = 0

    def update(self, batch: SAEBatch) -> None:
        if self.entries < _ENTRIES:
            found = activations(batch, self.explainer.wanted, self.contexts)
            self.found.append(found.among(of_parts(found.document, SCALE)))
            self.keep.append(
                (batch.held_out.keep & of_parts(batch.held_out.contexts.documents, SCALE))
                .cpu()
                .numpy()
            )
            self.entries += len(self.found[-1].latent)
        self.contexts += len(batch.held_out.keep)

    def compute(self, observe: Progress) -> None:
        explainer, data = self.explainer, self.context.data
        explainer.explain(np.arange(len(explainer.wanted)), observe)
        self.predictor = explainer.predictor()
        self.scale = self._scales()
        self.ngrams = data.once(
            "ngrams",
            lambda: Ngrams(
                Corpus(
                    data.acts, data.lm.tokenizer, "train", per_document=data.options.per_document
                ),
                data.lm.vocab,
                data.options.ngram_tokens,
                observe,
            ),
        )

    def _scales(self) -> np.ndarray:
        """Return E[s a] / E[s^2] of each latent, 1 where it is never predicted."""
        explainer, n = self.explainer, len(self.explainer.wanted)
        keep = np.concatenate(self.keep)
        tokens, begins = explainer.text(explainer.tokens[: len(keep)])
        s = self.predictor.match(tokens, begins, keep[:, explainer.first :])
        a = Activations(*(np.concatenate(columns) for columns in zip(*self.found)))
        length = keep.shape[1]
        keys = key(a.context, a.position, a.latent, length, n)
        order = np.argsort(keys)
        wanted = key(s.context, s.position + explainer.first, s.latent, length, n)
        at = np.minimum(np.searchsorted(keys[order], wanted), max(0, len(keys) - 1))
        act = (
            np.where(keys[order][at] == wanted, a.value[order][at], 0.0)
            if len(keys)
            else np.zeros(len(wanted))
        )
        product, square = (
            np.bincount(s.latent, s.value.astype(float) * act, n),
            np.bincount(s.latent, s.value.astype(float) ** 2, n),
        )
        return np.where(square > 0, product / np.where(square > 0, square, 1), 1.0)

    def update_second_pass(self, batch: SAEBatch) -> None:
        contexts = batch.held_out.contexts
        keep = batch.held_out.keep & of_parts(contexts.documents, SCORE)
        held_out = batch.held_out.once(
            "scored",
            lambda: HeldOutBatch(
                batch.held_out.lm, batch.held_out.corpus, contexts._replace(keep=keep)
            ),
        )
        if not held_out.predicted.any():
            return
        inputs, sae = batch.sae.normalize(held_out.x), batch.sae
        recon = inputs.restore(self._simulated(held_out) + sae.b_pre)
        losses = {
            name: held_out.losses(held_out.log_probs(held_out.spliced(rows)))
            for name, rows in (
                ("spliced", sae(held_out.x)),
                ("n2g", recon),
                ("bias", inputs.restore(sae.b_pre.expand_as(inputs.x))),
            )
        }
        before, token = (
            part[held_out.predicted].cpu().numpy()
            for part in (contexts.tokens[:, :-1], contexts.tokens[:, 1:])
        )
        losses |= {
            "clean": held_out.once(
                "clean", lambda: held_out.losses(held_out.log_probs(held_out.logits))
            ),
            "zero": held_out.zero_losses,
            "unigram": torch.from_numpy(self.ngrams.unigram(token)),
            "bigram": torch.from_numpy(self.ngrams.bigram(before, token)),
        }
        self.sums.add(held_out.predicted_documents, **losses, tokens=torch.ones(len(token)))

    def _simulated(self, held_out: HeldOutBatch) -> Tensor:
        """Return W_dec^T of the scaled predictions at the kept positions, [m, d]."""
        keep = held_out.keep.cpu().numpy()
        tokens, begins = self.explainer.text(held_out.contexts.tokens.cpu().numpy())
        found = self.predictor.match(tokens, begins, keep[:, self.explainer.first :])
        row = np.cumsum(keep.ravel()).reshape(keep.shape) - 1
        at = torch.from_numpy(
            np.stack([row[found.context, found.position + self.explainer.first], found.latent])
        )
        self.predictions += len(found.latent)
        sae = self.context.sae
        code = torch.sparse_coo_tensor(
            at,
            torch.from_numpy(found.value * self.scale[found.latent]).float(),
            (int(keep.sum()), sae.shape.n_latents),
            check_invariants=False,
        ).to(sae.W_dec.device)
        return torch.sparse.mm(code, sae.W_dec)

    def finalize(self) -> Result:
        sums, explainer = self.sums, self.explainer
        names = ("clean", "spliced", "n2g", "unigram", "bigram", "zero", "bias")
        if not len(sums):
            return Result(
                {f"ce_{name}": {"value": None, "se": None} for name in names}
                | {
                    "notes": [
                        "no document of the text was left to measure the loss on: give more "
                        "documents"
                    ]
                }
            )
        tokens = sums["tokens"]
        values = {f"ce_{name}": ratio(sums[name], tokens) for name in names}
        values["delta_to_bigram"] = ratio(sums["n2g"] - sums["bigram"], tokens)
        explained = len(explainer.explanations)
        notes = [
            f"bigrams and unigrams are of {self.ngrams.tokens:,} training tokens",
            "b_pre alone and the explanations get back the token's own mean and norm where the "
            "normalisation took them off",
        ]
        return Result(
            {
                **values,
                "n_explained": explained,
                "n_predictions": int(tokens.sum()),
                "predicted_l0": self.predictions / max(1.0, float(tokens.sum())),
                "notes": notes,
            },
            {"scale": torch.from_numpy(self.scale).float()},
        )
