"""Explain latents, and score the explanations by detection and fuzzing.

Paulo et al. 2024, sections 3 and 4:

    detection   from the explanation alone, in which of some texts does the latent fire?
    fuzzing     given marked tokens, are they the ones that it fires on?

Both are scored by balanced accuracy: the mean of the share of right answers where the latent fires
and where it does not; 0.5 is guessing. An answer that cannot be read counts as half right.

Baselines, on the same texts: `shuffled_…`, each latent with the explanation of another one; and
`n2g_…`, the patterns of N2G, which detect where one matches, and call marks right where they match
at least half of the marked tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from ksparse import progress
from ksparse.evals.explanations.n2g import over_latents
from ksparse.evals.statistics import Result
from ksparse.explain import prompts
from ksparse.explain.answers import Answers
from ksparse.explain.examples import Specimen, Specimens, Window
from ksparse.explain.options import ExplainConfig
from ksparse.explain.server import Answer, ChatServer

NAME = "explain"
"""The name of the result: evals/explain.json."""
SCORES = ("detection", "fuzzing")
ERRORS = 2
"""Standard errors that own explanations must be ahead of dealt ones to rank latents."""
RATES = tuple(
    prefix + score for prefix in ("", "shuffled_", "n2g_", "n2g_shuffled_") for score in SCORES
)
_CHARACTERS_PER_TOKEN = 3.0  # of short texts as JSON, with marks; servers' tokenizers differ
_SCHEMA_HELPS = (
    "models that do not keep the form of labels may keep it with --schema, if the server can"
)
_SUPPOSED = "x" * 80  # an explanation, before there is one


class Workload(NamedTuple):
    """What explaining will take."""

    requests: int
    """At most: equal explanations are scored once."""
    prompt_tokens: int
    """About; tokenizers differ."""
    answer_tokens: int
    """At most."""
    longest: int
    """Tokens of the longest request with its answer, about: the context that the server needs."""


class Explainer:
    """Asks a server about latents.

    Args:
        specimens: the latents and their texts.
        options: the options.
        server: the server.
        answers: the answers that are there, and where new ones go.
    """

    def __init__(
        self, specimens: Specimens, options: ExplainConfig, server: ChatServer, answers: Answers
    ):
        self.specimens, self.options = specimens, options
        self.server, self.answers = server, answers
        self.asked = 0
        self._stop = threading.Event()

    def estimate(self) -> Workload:
        """Return the requests that have no answer yet, with their tokens."""
        explaining = [self._explaining(specimen) for specimen in self.specimens.of]
        answers = [self.answers.find(body) for body in explaining]
        # Explanations to come are supposed to differ, so that each asks for scores of its own.
        texts = [
            f"{_SUPPOSED}{number}" if answer is None else prompts.read_explanation(answer.text)
            for number, answer in enumerate(answers)
        ]
        scoring = [body for bodies in self._scoring(texts) for body in bodies]
        missing = self._missing(explaining + scoring)
        lengths = [
            round(sum(len(m["content"]) for m in body["messages"]) / _CHARACTERS_PER_TOKEN)
            for body in missing
        ]
        limits = [body["max_tokens"] for body in missing]
        longest = max((sum(pair) for pair in zip(lengths, limits)), default=0)
        return Workload(len(missing), sum(lengths), sum(limits), longest)

    def run(self) -> Result:
        """Ask what has no answer yet, and return the result.

        Raises:
            ServerError: the server does not answer; the answers so far are kept.
            InputError: the server refuses a request.
        """
        start = time.monotonic()
        explaining = [self._explaining(specimen) for specimen in self.specimens.of]
        self._ask_all("explaining", explaining)
        texts = self._read_explanations(explaining)
        scoring = self._scoring(texts)
        self._ask_all("scoring", [body for bodies in scoring for body in bodies])
        rows = self._score(scoring)
        asked = self._unique(explaining + [body for bodies in scoring for body in bodies])
        answers = [self._answer(body) for body in asked]
        return self._result(texts, rows, answers, time.monotonic() - start)

    # ---- asking

    def _explaining(self, specimen: Specimen) -> dict[str, Any]:
        texts = [self._text(window, marked=True) for window in specimen.train]
        return self.server.body(prompts.ask_explanation(texts), prompts.EXPLANATION_TOKENS)

    def _scoring(self, texts: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Return, for each latent, its requests: detection, fuzzing; then with the explanation of
        the latent before it."""
        latents: list[list[dict[str, Any]]] = []
        for number, specimen in enumerate(self.specimens.of):
            bodies = []
            for explanation in self._dealt(texts, number):
                for fuzzing in (False, True):
                    for batch in self._batches(specimen.test):
                        windows = [self._text(window, marked=fuzzing) for window in batch]
                        messages = prompts.ask_labels(explanation, windows, fuzzing=fuzzing)
                        limit = prompts.label_tokens(len(batch))
                        form = prompts.label_schema(len(batch)) if self.options.schema else None
                        bodies.append(self.server.body(messages, limit, form))
            latents.append(bodies)
        return latents

    def _dealt(self, texts: Sequence[str], number: int) -> list[str]:
        """Return a latent's own explanation and the one that it is dealt, if there is another."""
        return [texts[number], texts[number - 1]] if len(texts) > 1 else [texts[number]]

    def _batches(self, windows: list[Window]) -> list[list[Window]]:
        size = self.options.shown
        return [windows[first : first + size] for first in range(0, len(windows), size)]

    def _text(self, window: Window, *, marked: bool) -> str:
        strings = [self.specimens.strings[token] for token in window.tokens.tolist()]
        return prompts.mark(strings, window.marked.tolist()) if marked else "".join(strings)

    def _ask_all(self, what: str, bodies: list[dict[str, Any]]) -> None:
        """Ask what has no answer, several requests at a time; stop at the first that fails."""
        missing, done = self._missing(bodies), 0
        lock = threading.Lock()
        progress.report(what, 0, len(missing))

        def ask(body: dict[str, Any]) -> None:
            if not self._stop.is_set():
                self.answers.add(body, self.server.ask(body, self._stop))

        pool = ThreadPoolExecutor(self.options.parallel)
        try:
            futures = [pool.submit(ask, body) for body in missing]
            for future in futures:
                future.result()
                with lock:
                    done += 1
                    self.asked += 1
                progress.report(what, done, len(missing))
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        self._stop.clear()

    def _unique(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return requests without repetitions, in their order."""
        return list({repr(body): body for body in bodies}.values())

    def _missing(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the requests that have no answer, each once."""
        return [body for body in self._unique(bodies) if self.answers.find(body) is None]

    # ---- scoring

    def _answer(self, body: dict[str, Any]) -> Answer:
        answer = self.answers.find(body)
        assert answer is not None  # all were asked
        return answer

    def _read_explanations(self, bodies: list[dict[str, Any]]) -> list[str]:
        return [prompts.read_explanation(self._answer(body).text) for body in bodies]

    def _score(self, scoring: list[list[dict[str, Any]]]) -> list[dict[str, float]]:
        """Return each latent's scores, and its share of answers that cannot be read."""
        rows = []
        for specimen, bodies in zip(self.specimens.of, scoring, strict=True):
            active = [window.active for window in specimen.test]
            batches = self._batches(specimen.test)
            labels: list[list[bool | None]] = []
            for body, batch in zip(bodies, batches * (len(bodies) // len(batches)), strict=True):
                read = prompts.read_labels(self._answer(body).text, len(batch))
                labels.append([None] * len(batch) if read is None else [*read])
            size = len(batches)
            groups = [
                [label for batch in labels[i : i + size] for label in batch]
                for i in range(0, len(labels), size)
            ]
            row = dict.fromkeys(RATES, float("nan"))
            names = [prefix + score for prefix in ("", "shuffled_") for score in SCORES]
            for name, group in zip(names, groups):
                row[name] = balanced_accuracy(active, group)
            row |= _score_patterns(specimen.test, dealt=len(scoring) > 1)
            row["unread"] = float(np.mean([label is None for group in groups for label in group]))
            rows.append(row)
        return rows

    def _result(
        self,
        texts: list[str],
        rows: list[dict[str, float]],
        answers: list[Answer],
        seconds: float,
    ) -> Result:
        columns = {name: np.array([row[name] for row in rows]) for name in (*RATES, "unread")}
        latents = [
            {
                "latent": specimen.latent,
                "explanation": text,
                **{name: _plain(row[name]) for name in (*RATES, "unread")},
            }
            for specimen, text, row in zip(self.specimens.of, texts, rows, strict=True)
        ]
        options = {
            name: getattr(self.options, name)
            for name in ("model", "examples", "test", "shown", "schema", "tokens", "seed")
        }
        values: dict[str, Any] = {
            "name": NAME,
            "options": options,
            **self.specimens.origin,
            **{name: over_latents(columns[name]) for name in RATES},
            **{
                f"{score}_over_{base}": over_latents(columns[score] - columns[f"{base}_{score}"])
                for base in ("shuffled", "n2g")
                for score in SCORES
            },
            "unread": float(columns["unread"].mean()),
            "n_latents": len(rows),
            "too_few": self.specimens.too_few,
            "latents": latents,
            "answers": _count(answers),
            "seconds": round(seconds, 2),
        }
        values["tells_apart"] = {
            score: tells_apart(values[f"{score}_over_shuffled"]) for score in SCORES
        }
        values["notes"] = _notes(values)
        arrays = {"latent": torch.tensor([specimen.latent for specimen in self.specimens.of])}
        arrays |= {name: torch.from_numpy(columns[name]).float() for name in RATES}
        return Result(values, arrays)


def _count(answers: list[Answer]) -> dict[str, Any]:
    """Return what the server said about the answers that a result is made of."""
    models = [answer.model for answer in answers]
    return {
        "requests": len(answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "answer_tokens": sum(answer.answer_tokens for answer in answers),
        "uncounted": sum(not answer.prompt_tokens for answer in answers),
        "cut": sum(answer.cut for answer in answers),
        "models": {model: models.count(model) for model in sorted({*models} - {""})},
    }


def _notes(values: dict[str, Any]) -> list[str]:
    """Return what a reader of a result must know to read its numbers."""
    answers, asked, rows = values["answers"], values["options"]["model"], values["latents"]
    texts = [row["explanation"] for row in rows]
    empty, same = texts.count(""), sum(texts.count(text) > 1 for text in texts if text)
    named = ", ".join(f"'{model}'" for model in answers["models"])
    too_few = len(values["too_few"])
    notes = [
        f"{score}: the judge cannot tell. Explanations of other latents score as well "
        f"({_show(values['shuffled_' + score])}) as a latent's own ({_show(values[score])}), so "
        "the scores of single latents rank nothing"
        for score in SCORES
        if values["tells_apart"][score] is False
    ]
    said = {
        f"{values['unread']:.1%} of the labels could not be read and count as half right": (
            values["unread"] > 0
        ),
        _SCHEMA_HELPS: values["unread"] > 0.1 and not values["options"]["schema"],
        f"{empty} of {len(rows)} latents got an answer without words for an explanation": empty > 0,
        f"{same} of {len(rows)} latents have the explanation of another one": same > 0,
        f"{answers['cut']} of {answers['requests']} answers end at the limit of tokens": (
            answers["cut"] > 0
        ),
        f"asked for model '{asked}'; the server says that {named} answered": (
            answers["models"].keys() - {asked} != set()
        ),
        f"{too_few} latents that were looked at fire in too few texts, or in too many, and are "
        "left out": too_few > 0,
        "one latent: there is no other explanation to compare with": len(rows) == 1,
    }
    return notes + [note for note, is_so in said.items() if is_so]


def _show(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} ± {estimate['se']:.3f}"


def balanced_accuracy(active: Sequence[bool], labels: Sequence[bool | None]) -> float:
    """Return the mean of the shares of right labels among active and among silent texts.

    Args:
        active: whether the latent fires in each text.
        labels: the labels given; None, which could not be read, is half right.

    Example:
        >>> balanced_accuracy([True, True, False, False], [True, False, False, False])
        0.75
        >>> balanced_accuracy([True, False], [None, None])
        0.5
    """
    right = np.array(
        [
            0.5 if label is None else float(label == truth)
            for truth, label in zip(active, labels, strict=True)
        ]
    )
    truth = np.array(active, bool)
    return float((right[truth].mean() + right[~truth].mean()) / 2)


def tells_apart(difference: dict[str, float | None]) -> bool | None:
    """Return whether own explanations score better than those of other latents.

    The mean paired difference must exceed `ERRORS` standard errors over latents. Where it does not,
    the judge cannot tell latents apart by their explanations, and the scores rank nothing.

    Args:
        difference: `value` and `se` of own less dealt explanations.

    Returns:
        None without a standard error, as with one latent.

    Example:
        >>> tells_apart({"value": 0.1, "se": 0.02})
        True
    """
    value, se = difference["value"], difference["se"]
    return None if value is None or se is None else value > ERRORS * se


def _score_patterns(windows: list[Window], *, dealt: bool) -> dict[str, float]:
    """Return the scores of N2G's patterns: the latent's own, and those it is dealt."""
    active = [window.active for window in windows]
    detect: Callable[[Window, np.ndarray], bool] = lambda _, where: bool(where.any())  # noqa: E731
    fuzz: Callable[[Window, np.ndarray], bool] = lambda w, where: bool(  # noqa: E731
        where[w.marked].mean() >= 0.5
    )
    scores = {}
    for prefix in ("n2g_", "n2g_shuffled_")[: 1 + dealt]:
        for score, decide in zip(SCORES, (detect, fuzz)):
            where = [w.predicted if prefix == "n2g_" else w.dealt for w in windows]
            labels = [decide(w, at) for w, at in zip(windows, where, strict=True)]
            scores[prefix + score] = balanced_accuracy(active, labels)
    return scores


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
