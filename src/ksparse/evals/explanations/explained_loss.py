"""How well does the LM predict with each latent replaced by its explanation?

Gao et al. 2024, section 4.4. A latent's prediction s is scaled by E[s a] / E[s^2], a being its
activation: the scale with the least squared error. The scaled predictions are decoded, restored
with the token's own mean and norm, and spliced in. The scales come from documents that neither the
explanations were built on nor the loss is measured on.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ksparse.data.contexts import Corpus
from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import HeldOutBatch, SAEBatch
from ksparse.evals.explanations.builder import (
    SCALE,
    SCORE,
    Activations,
    N2GBuilder,
    batch_activations,
    in_parts,
    pair_keys,
)
from ksparse.evals.explanations.ngrams import Ngrams
from ksparse.evals.statistics import DocumentSums, Result, no_value, ratio
from ksparse.progress import Progress

LOSSES = ("clean", "spliced", "n2g", "unigram", "bigram", "zero", "bias")
_MAX_ACTIVATIONS = 4_000_000  # that the scales are estimated from


class ExplainedLoss(Metric):
    """Cross-entropy with explanations in place of latents, beside the SAE's own, n-grams', with
    zeros, and with b_pre alone."""

    passes = 2

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.builder = context.part(N2GBuilder)
        self.builder.request(np.arange(context.sae.shape.n_latents))
        self.sums = DocumentSums()
        self.scale_mask: list[np.ndarray] = []  # positions that the scales are estimated on
        self.activations: list[Activations] = []
        self.n_contexts = self.n_activations = self.n_predicted = 0

    def update(self, batch: SAEBatch) -> None:
        held_out = batch.held_out
        if self.n_activations < _MAX_ACTIVATIONS:
            activations = batch_activations(batch, self.builder.requested, self.n_contexts)
            activations = activations.select(in_parts(activations.document, SCALE))
            self.activations.append(activations)
            mask = held_out.keep & in_parts(held_out.contexts.documents, SCALE)
            self.scale_mask.append(mask.cpu().numpy())
            self.n_activations += len(activations.latent)
        self.n_contexts += len(held_out.keep)

    def compute(self, progress: Progress) -> None:
        builder, data = self.builder, self.context.data
        latents = np.arange(len(builder.requested))
        self.explanations = builder.explain(latents, progress, data.options.explained_examples)
        self.predictor = builder.predictor(self.explanations)
        self.scale = self._scales()

        def count_ngrams() -> Ngrams:
            corpus = Corpus(
                data.acts, data.lm.tokenizer, "train", per_document=data.options.per_document
            )
            return Ngrams.count(corpus, data.lm.vocab, data.options.ngram_tokens, progress)

        self.ngrams = data.once("ngrams", count_ngrams)

    def _scales(self) -> np.ndarray:
        """Return E[s a] / E[s^2] of each latent, [n]; 1 where it is never predicted."""
        builder, n = self.builder, len(self.builder.requested)
        mask = np.concatenate(self.scale_mask)
        length = mask.shape[1]
        tokens, begins = builder.text(builder.tokens[: len(mask)])
        s = self.predictor.match(tokens, begins, mask[:, builder.text_start :])
        a = Activations(*(np.concatenate(columns) for columns in zip(*self.activations)))
        a_keys = pair_keys(a.context, a.position, a.latent, length, n)
        s_keys = pair_keys(s.context, s.position + builder.text_start, s.latent, length, n)
        activations = np.zeros(len(s_keys))
        if len(a_keys):
            order = np.argsort(a_keys)
            at = np.minimum(np.searchsorted(a_keys[order], s_keys), len(a_keys) - 1)
            activations = np.where(a_keys[order][at] == s_keys, a.value[order][at], 0.0)
        product = np.bincount(s.latent, s.value.astype(float) * activations, n)
        square = np.bincount(s.latent, s.value.astype(float) ** 2, n)
        return np.where(square > 0, product / np.where(square > 0, square, 1), 1.0)

    def update_second_pass(self, batch: SAEBatch) -> None:
        lm, corpus, contexts = batch.held_out.lm, batch.held_out.corpus, batch.held_out.contexts
        keep = batch.held_out.keep & in_parts(contexts.documents, SCORE)
        scored = batch.held_out.once(
            "scored documents", lambda: HeldOutBatch(lm, corpus, contexts._replace(keep=keep))
        )
        if not scored.predicted.any():
            return
        inputs, sae = batch.sae.normalize(scored.x), batch.sae
        recon = inputs.restore(self._decode_explanations(scored) + sae.b_pre)
        losses = {
            "spliced": scored.losses_with(sae(scored.x)),
            "n2g": scored.losses_with(recon),
            "bias": scored.losses_with(inputs.restore(sae.b_pre.expand_as(inputs.x))),
        }
        before, token = (
            tokens[scored.predicted].cpu().numpy()
            for tokens in (contexts.tokens[:, :-1], contexts.tokens[:, 1:])
        )
        losses |= {
            "clean": scored.clean_losses,
            "zero": scored.zero_losses,
            "unigram": torch.from_numpy(self.ngrams.unigram(token)),
            "bigram": torch.from_numpy(self.ngrams.bigram(before, token)),
        }
        self.sums.add(scored.predicted_documents, **losses, tokens=torch.ones(len(token)))

    def _decode_explanations(self, scored: HeldOutBatch) -> Tensor:
        """Return W_dec^T times the scaled predictions at the kept positions, [m, d]."""
        sae, start = self.context.sae, self.builder.text_start
        keep = scored.keep.cpu().numpy()
        tokens, begins = self.builder.text(scored.contexts.tokens.cpu().numpy())
        matches = self.predictor.match(tokens, begins, keep[:, start:])
        self.n_predicted += len(matches.latent)
        row = np.cumsum(keep.ravel()).reshape(keep.shape) - 1
        at = np.stack([row[matches.context, matches.position + start], matches.latent])
        code = torch.sparse_coo_tensor(
            torch.from_numpy(at),
            torch.from_numpy(matches.value * self.scale[matches.latent]).float(),
            (int(keep.sum()), sae.shape.n_latents),
            check_invariants=False,
        ).to(sae.W_dec.device)
        return torch.sparse.mm(code, sae.W_dec)

    def finalize(self) -> Result:
        sums = self.sums
        if not len(sums):
            note = "no document of the text was left to measure the loss on: give more documents"
            return Result({f"ce_{name}": no_value() for name in LOSSES} | {"notes": [note]})
        tokens = sums["tokens"]
        return Result(
            {
                **{f"ce_{name}": ratio(sums[name], tokens) for name in LOSSES},
                "delta_to_bigram": ratio(sums["n2g"] - sums["bigram"], tokens),
                "n_explained": len(self.explanations),
                "n_predictions": int(tokens.sum()),
                "predicted_l0": self.n_predicted / max(1.0, float(tokens.sum())),
                "notes": [
                    f"bigrams and unigrams are of {self.ngrams.tokens:,} training tokens",
                    "b_pre alone and the explanations get back the token's own mean and norm where "
                    "the normalisation took them off",
                ],
            },
            {"scale": torch.from_numpy(self.scale).float()},
        )
