"""Feature absorption without an LLM: a general latent stays silent on a special case that another
latent takes. After Chanin et al. 2024, arXiv 2409.14507.

A label is general ("a keyword", "begins with s"), its special cases are single tokens (`return`).
The latent of a label is the one whose firing predicts it best, by F1. A special case is absorbed if

    1. that latent fires on at most `SILENT` of its occurrences,
    2. another latent fires on at least `TAKES` of them, and at least `ITS_OWN` of that latent's
       firing, among labelled tokens, is on this case,
    3. and that latent writes at least `CARRIES` as much along the label's direction as the label's
       own latent does where it fires.

The label's direction is the difference of the mean activations with and without it. Latents are
chosen on one half of the documents and judged on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksparse.evals.base import EvalContext, Metric, Progress
from ksparse.evals.batches import SAEBatch
from ksparse.evals.statistics import Result, ratio
from ksparse.lm.tokens import token_strings

SILENT, TAKES, ITS_OWN, CARRIES = 0.2, 0.8, 0.5, 0.5
LEAST = 5
"""Occurrences of a special case in either half."""
KNOWN = 0.5
"""Least F1 of a label's latent for the label to count as known to the SAE."""
TOKENS = 100_000
"""Tokens of the text that are labelled, at most."""
_LISTED = 30


@dataclass(frozen=True)
class Labelled:
    """Labelled tokens, and what an SAE makes of them.

    Attributes:
        tokens: Token ids [m].
        train: Which rows latents are chosen on, bool [m].
        row: The row of each activation [a].
        latent: Its latent [a].
        value: Its value [a].
        x: Normalised activations [m, d].
        decoder: Decoder rows [n, d].
    """

    tokens: np.ndarray
    train: np.ndarray
    row: np.ndarray
    latent: np.ndarray
    value: np.ndarray
    x: Tensor
    decoder: Tensor

    def fired(self, rows: np.ndarray) -> np.ndarray:
        """Return on how many of some rows, bool [m], each latent fires, [n]."""
        return np.bincount(self.latent[rows[self.row]], minlength=len(self.decoder))

    def along(self, latent: int, rows: np.ndarray, direction: Tensor) -> float:
        """Return what a latent writes along a direction, as a mean over the rows where it fires."""
        return Case(self, np.flatnonzero(rows[self.row])).along(latent, direction)

    @cached_property
    def _by_token(self) -> tuple[np.ndarray, np.ndarray]:
        """The activations in the order of their tokens, and where each token begins."""
        token = self.tokens[self.row]
        order = np.argsort(token, kind="stable")
        return order, np.searchsorted(token[order], np.arange(self.tokens.max() + 2))

    def of_token(self, token: int, rows: np.ndarray) -> Case:
        """Return the activations on the rows of one token that are among `rows`, bool [m]."""
        order, starts = self._by_token
        here = order[starts[token] : starts[token + 1]]
        return Case(self, here[rows[self.row[here]]])


@dataclass(frozen=True)
class Case:
    """The activations on some rows of a special case.

    Attributes:
        data: All tokens.
        activations: The numbers of the activations.
    """

    data: Labelled
    activations: np.ndarray

    def fired(self) -> np.ndarray:
        """Return on how many of the rows each latent fires, [n]."""
        latent = self.data.latent[self.activations]
        return np.bincount(latent, minlength=len(self.data.decoder))

    def along(self, latent: int, direction: Tensor) -> float:
        """Return what a latent writes along a direction, as a mean over the rows where it fires."""
        here = self.activations[self.data.latent[self.activations] == latent]
        if not len(here):
            return 0.0
        return float(self.data.value[here].mean()) * float(self.data.decoder[latent] @ direction)


def absorbed_cases(
    data: Labelled, label: np.ndarray, spell: Callable[[int], str]
) -> dict[str, Any] | None:
    """Return the latent of a label and which special cases escape it.

    Args:
        data: Tokens with their codes.
        label: 1, 0, or -1 outside the label's population, [m].
        spell: Gives the string of a token id.

    Returns:
        None if too few tokens have the label to ask. Otherwise a table: the label's latent with its
        recall and precision on the test half, and each special case with its occurrences there, how
        often the label's latent and the other one fire, and whether it is absorbed.
    """
    yes, no = label == 1, label == 0
    halves = {"train": data.train, "test": ~data.train}
    if min((yes & half).sum() for half in halves.values()) < 2 * LEAST or not no.any():
        return None
    fired = {name: data.fired((yes | no) & half) for name, half in halves.items()}
    right = {name: data.fired(yes & half) for name, half in halves.items()}
    main = int(_f1(right["train"], fired["train"], int((yes & data.train).sum())).argmax())
    positives = int((yes & ~data.train).sum())
    direction = data.x[torch.from_numpy(yes)].mean(0) - data.x[torch.from_numpy(no)].mean(0)
    direction = direction / direction.norm().clamp_min(1e-30)
    own = data.along(main, yes & ~data.train, direction)
    counts = {
        name: np.bincount(data.tokens[yes & half], minlength=data.tokens.max() + 1)
        for name, half in halves.items()
    }
    cases = []
    for token in np.flatnonzero(np.minimum(counts["train"], counts["test"]) >= LEAST).tolist():
        size = {name: int(count[token]) for name, count in counts.items()}
        here = {name: data.of_token(token, yes & half) for name, half in halves.items()}
        cases.append({"token": spell(token)} | _judge_case(here, size, fired, main, own, direction))
    return {
        "latent": main,
        "recall": float(right["test"][main] / positives),
        "precision": float(right["test"][main] / max(1, fired["test"][main])),
        "known": bool(_f1(right["test"], fired["test"], positives)[main] >= KNOWN),
        "cases": cases,
    }


def _f1(right: np.ndarray, fired: np.ndarray, positives: int) -> np.ndarray:
    """Return how well each latent's firing predicts the positives, [n].

    Args:
        right: On how many positives each latent fires, [n].
        fired: On how many labelled rows it fires, [n].
        positives: The number of positives.
    """
    f1: np.ndarray = 2 * right / np.maximum(1, fired + positives)
    return f1


def _judge_case(
    case: dict[str, Case],
    size: dict[str, int],
    fired: dict[str, np.ndarray],
    main: int,
    own: float,
    direction: Tensor,
) -> dict[str, Any]:
    """Return whether a special case is absorbed, with the numbers that decide it.

    Args:
        case: Its activations in either half, "train" and "test".
        size: Its occurrences there.
        fired: On how many labelled rows of either half each latent fires.
        main: The label's latent.
        own: What that latent writes along the label's direction.
        direction: The label's direction [d].
    """
    score = _f1(case["train"].fired(), fired["train"], size["train"])
    score[main] = -1
    other, on_case = int(score.argmax()), case["test"].fired()
    of_main, of_other = on_case[main] / size["test"], on_case[other] / size["test"]
    share = on_case[other] / max(1, fired["test"][other])
    carried = case["test"].along(other, direction)
    absorbed = (
        of_main <= SILENT
        and of_other >= TAKES
        and share >= ITS_OWN
        and own > 0
        and carried >= CARRIES * own
    )
    return {
        "count": size["test"],
        "recall": float(of_main),
        "other": other,
        "other_recall": float(of_other),
        "other_share": float(share),
        "carried": carried / own if own > 0 else 0.0,
        "absorbed": bool(absorbed),
    }


class Absorption(Metric):
    """The share of special cases that another latent takes from a general one: of first letters on
    any text, and of the built-in labels of Python tokens on the built-in text."""

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.parts: list[tuple[Tensor, ...]] = []
        self.count = 0

    def update(self, batch: SAEBatch) -> None:
        if self.count >= TOKENS:
            return
        held_out, code = batch.held_out, batch.code
        tokens = held_out.contexts.tokens[held_out.keep]
        self.parts.append(
            tuple(
                part.cpu()
                for part in (tokens, held_out.documents, batch.inputs.x, code.values, code.indices)
            )
        )
        self.count += len(tokens)

    def compute(self, progress: Progress) -> None:
        lm = self.context.lm
        strings = token_strings(lm.tokenizer, range(lm.vocab))
        self.spell = strings.__getitem__
        sources = [("first letter", *self._first_letters(strings))]
        if self.context.data.acts.text == "pylm":
            sources.append(("Python", *self._python(progress)))
        self.labels: dict[str, dict[str, Any]] = {}
        total, done = sum(len(labels) for _, _, labels in sources), 0
        for source, data, labels in sources:
            for name, label in labels.items():
                found = absorbed_cases(data, label, self.spell)
                if found is not None:
                    self.labels[name] = {"source": source, **found}
                progress("looking for absorbed cases", done := done + 1, total)

    def _first_letters(self, strings: Sequence[str]) -> tuple[Labelled, dict[str, np.ndarray]]:
        """Return the text's tokens, and of each letter whether a word's token begins with it."""
        columns = _concatenate(self.parts)
        data = _labelled(*columns, self.context.sae.W_dec)
        first = np.array([_first_letter(string) for string in strings])
        letter = first[data.tokens]
        labels = {
            f"begins with {each}": np.where(letter == "", -1, letter == each).astype(np.int8)
            for each in sorted(set(letter) - {""})
        }
        return data, labels

    def _python(self, progress: Progress) -> tuple[Labelled, dict[str, np.ndarray]]:
        """Return tokens of held-out Python files, and their exact labels."""
        from ksparse.evals.probing.tasks import labelled_python

        pool = labelled_python(
            self.context.lm,
            self.context.data.acts,
            min(TOKENS, self.context.options.tokens),
            progress,
        )
        sae = self.context.sae
        x = sae.normalize(pool.x).x
        values, indices = sae.encode(pool.x)
        data = _labelled(
            torch.from_numpy(pool.tokens),
            torch.from_numpy(pool.documents),
            x,
            values,
            indices,
            sae.W_dec,
        )
        return data, pool.labels

    def finalize(self) -> Result:
        known = {name: found for name, found in self.labels.items() if found["known"]}
        cases = [(name, case) for name, found in known.items() for case in found["cases"]]
        counts = np.array([case["count"] for _, case in cases], float)
        absorbed = np.array([case["count"] * case["absorbed"] for _, case in cases], float)
        silent = np.array([case["count"] * (case["recall"] <= SILENT) for _, case in cases], float)
        listed = sorted(
            ({"label": name, **case} for name, case in cases if case["absorbed"]),
            key=lambda case: -case["count"],
        )
        return Result(
            {
                "absorbed": ratio(absorbed, counts),
                "silent": ratio(silent, counts),
                "n_labels": len(self.labels),
                "n_known": len(known),
                "n_cases": len(cases),
                "n_absorbed": len(listed),
                "labels": {
                    name: {key: value for key, value in found.items() if key != "cases"}
                    | {"n_cases": len(found["cases"])}
                    for name, found in self.labels.items()
                },
                "cases": listed[:_LISTED],
            }
        )


def _first_letter(string: str) -> str:
    """Return the first letter of a token that begins a word, in lower case; '' of other tokens."""
    word = string.strip()
    return word[0].lower() if word and word[0].isascii() and word.isalpha() else ""


def _concatenate(
    parts: list[tuple[Tensor, ...]],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the columns of all parts; codes may have different widths."""
    columns = list(zip(*parts))
    widest = max(values.shape[1] for values in columns[3])
    tokens, documents, x = (torch.cat(column) for column in columns[:3])
    values, indices = (
        torch.cat([torch.nn.functional.pad(part, (0, widest - part.shape[1])) for part in column])
        for column in columns[3:]
    )
    return tokens, documents, x, values, indices


def _labelled(
    tokens: Tensor, documents: Tensor, x: Tensor, values: Tensor, indices: Tensor, decoder: Tensor
) -> Labelled:
    """Return tokens and their codes as `Labelled`; even documents are for choosing."""
    values, indices = values.cpu(), indices.cpu()
    row, slot = (values > 0).nonzero(as_tuple=True)
    return Labelled(
        tokens.cpu().numpy(),
        (documents % 2 == 0).cpu().numpy(),
        row.numpy(),
        indices[row, slot].numpy(),
        values[row, slot].double().numpy(),
        x.cpu().float(),
        decoder.detach().cpu().float(),
    )
