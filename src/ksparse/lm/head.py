"""Logits in slices: the last hidden states of a pass are kept, and the head runs on some at a time.

The logits of 64 contexts of 64 tokens take 4 GB for a vocabulary of 262,144; their hidden states
take 10 MB. The head is everything that the model's own forward does behind its base model: the
unembedding, scaling, soft caps. It is run by that very forward, with the base model replaced by the
hidden states, and compared with whole passes once for each LM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ksparse.limits import logit_rows
from ksparse.lm.hooks import replaced_forward

if TYPE_CHECKING:
    from ksparse.lm.loading import CausalLM


class Logits:
    """The logits of a pass over contexts [b, t], computed when they are read.

    Args:
        model: the LM.
        outputs: what its base model gave, with `last_hidden_state` [b, t, h]; or the logits
            [b, t, v] themselves, of an LM whose head cannot be run alone.
        vocab: about how many logits there are of a position.
    """

    def __init__(self, model: CausalLM, outputs: Any, vocab: int):
        self._model, self._outputs = model, outputs
        self._rows = logit_rows(vocab)

    def full(self) -> Tensor:
        """Return all logits [b, t, v], in the LM's precision."""
        if isinstance(self._outputs, Tensor):
            return self._outputs
        hidden = self._outputs.last_hidden_state
        return run_head(self._model, type(self._outputs), hidden)

    def at(self, mask: Tensor) -> LogitRows:
        """Return the logits of the positions of mask[b, t], in order, to be read in slices."""
        source = self._outputs
        if isinstance(source, Tensor):
            return LogitRows(source[mask], self._rows, lambda logits: logits)
        model, kind = self._model, type(source)
        return LogitRows(
            source.last_hidden_state[mask],
            self._rows,
            lambda states: run_head(model, kind, states[None])[0],
        )


class LogitRows:
    """The logits of p positions, computed for the rows that are read.

    Args:
        states: what the logits are made of, [p, h].
        step: how many rows `limits.LOGITS_BYTES` allows to be read at a time.
        head: makes logits [r, v] of states [r, h].
    """

    def __init__(self, states: Tensor, step: int, head: Callable[[Tensor], Tensor]):
        self._states, self._step, self._head = states, step, head

    def __len__(self) -> int:
        return len(self._states)

    def gradient(self, at: Tensor, of_logits: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """Return the gradient of a loss with respect to activations that were put into the pass.

        Logits are computed twice, a slice at a time, so that the whole is never held.

        Args:
            at: Those activations, which require a gradient; of `LM.predict_patched(…,
                gradient=True)`.
            of_logits: Called with each slice and its logits [r, v] in float32; returns the gradient
                [r, v] of the loss with respect to them.

        Returns:
            The gradient, in the shape of `at`.
        """
        of_states = torch.empty_like(self._states)
        with torch.inference_mode(False), torch.enable_grad():
            for rows in self.slices():
                states = self._states[rows].detach().requires_grad_()
                logits = self._head(states).float()
                slope = of_logits(rows, logits.detach())
                (of_states[rows],) = torch.autograd.grad(logits, states, slope)
        return torch.autograd.grad(self._states, at, of_states)[0]

    @property
    def nbytes(self) -> int:
        """Bytes held between two reads."""
        return self._states.nbytes

    def slices(self) -> Iterator[slice]:
        """Yield the slices in which all rows should be read."""
        for start in range(0, len(self), self._step):
            yield slice(start, min(start + self._step, len(self)))

    def __getitem__(self, rows: slice) -> Tensor:
        """Compute the logits [r, v] of some rows, in float32."""
        return self._head(self._states[rows]).float()


def run_base(model: CausalLM, **inputs: Any) -> Any:
    """Run a model without its head; the result has `last_hidden_state` [b, t, h]."""
    return model.base_model(**inputs)


def run_head(model: CausalLM, kind: Callable[..., Any], hidden: Tensor) -> Tensor:
    """Return the logits [b, t, v] of hidden states, as the model's own forward makes them.

    Args:
        model: the LM.
        kind: the type of what its base model returns.
        hidden: last hidden states [b, t, h].
    """
    replaced = kind(last_hidden_state=hidden)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    with (
        torch.inference_mode(not hidden.requires_grad),
        replaced_forward(model.base_model, lambda *args, **kwargs: replaced),
    ):
        return model(input_ids=ids, use_cache=False).logits
