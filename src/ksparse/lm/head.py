"""Logits in slices: the last hidden states of a pass are kept, and the head runs on some at a time.

The logits of 64 contexts of 64 tokens take 4 GB for a vocabulary of 262,144; their hidden states
take 10 MB. The head is everything that the model's own forward does behind its base model: the
unembedding, scaling, soft caps. It is run by that very forward, with the base model replaced by the
hidden states, and compared with whole passes once for each LM.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ksparse.limits import LOGITS_BYTES
from ksparse.lm.hooks import replaced_forward

if TYPE_CHECKING:
    from ksparse.lm.loading import CausalLM

_COPIES = 6  # of a slice: its logits twice, their logarithms twice, and what is summed of them


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
        self._rows = max(1, LOGITS_BYTES // (4 * _COPIES * vocab))

    def full(self) -> Tensor:
        """Return all logits [b, t, v], in the LM's precision."""
        if isinstance(self._outputs, Tensor):
            return self._outputs
        hidden = self._outputs.last_hidden_state
        return run_head(self._model, self._outputs, hidden)

    def slices(self, mask: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, logits[rows, v] in float32) of the positions of mask[b, t], in order.

        As many rows are computed at a time as `limits.LOGITS_BYTES` allows.
        """
        source = self._outputs
        states = (source if isinstance(source, Tensor) else source.last_hidden_state)[mask]
        for start in range(0, len(states), self._rows):
            part = states[start : start + self._rows]
            if not isinstance(source, Tensor):
                part = run_head(self._model, source, part[None])[0]
            yield slice(start, start + len(part)), part.float()


def run_base(model: CausalLM, **inputs: Any) -> Any:
    """Run a model without its head; the result has `last_hidden_state` [b, t, h]."""
    return model.base_model(**inputs)


@torch.inference_mode()
def run_head(model: CausalLM, outputs: Any, hidden: Tensor) -> Tensor:
    """Return the logits [b, t, v] of hidden states, as the model's own forward makes them.

    Args:
        model: the LM.
        outputs: what its base model gave in some pass, for the type.
        hidden: last hidden states [b, t, h].
    """
    replaced = type(outputs)(last_hidden_state=hidden)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    with replaced_forward(model.base_model, lambda *args, **kwargs: replaced):
        return model(input_ids=ids, use_cache=False).logits
