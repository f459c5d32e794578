"""Explanations for Neuronpedia's database: rows of Explanation and of ExplanationScore.

Neuronpedia's bulk import reads the explanations. It reads no scores: these are imported as files of
their own, the judge first, with `POST /api/admin/import-file` {path, tableName} on a server of
one's own (or by an administrator):

* explanation_score_model.jsonl.gz       ExplanationScoreModel: the model that gave the scores
* explanation_scores/batch-K.jsonl.gz    ExplanationScore

Types of scores are rows of that database: `eleuther_recall` is what it calls detection, and
`eleuther_fuzz` fuzzing; both are balanced accuracies there too. A score by which the judge cannot
tell latents apart is not written: the page shows it without its standard error or baselines.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from ksparse.interop.latent_examples import LatentExamples
from ksparse.storage.run_folder import RunFolder

_SCORE_TYPES = {"detection": "eleuther_recall", "fuzzing": "eleuther_fuzz"}


@dataclass(frozen=True)
class ExplanationSource:
    """The explanations that one method gives."""

    kind: str
    """The method: n2g or explain."""
    notes: str
    """What the method is, as shown."""
    texts: dict[int, str]
    """Explanation of each latent that has one."""
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    """Scores of each explanation, by Neuronpedia's types of scores."""
    judge: str = ""
    """The model that gave the scores."""

    def row(self, latent: int, names: dict[str, str], common: dict[str, str]) -> dict[str, Any]:
        """Return the row of a latent's explanation."""
        return {
            **names,
            "id": self._id(latent, names),
            "index": str(latent),
            "description": self.texts[latent],
            "authorId": common["creatorId"],
            "createdAt": common["createdAt"],
            "updatedAt": common["createdAt"],
            # A type must be one that the database has, and it has none for patterns.
            "typeName": None,
            "explanationModelName": None,
            "notes": self.notes,
        }

    def score_rows(
        self, latent: int, names: dict[str, str], common: dict[str, str]
    ) -> list[dict[str, Any]]:
        """Return the rows of the scores of a latent's explanation."""
        return [
            {
                "id": row_id(self._id(latent, names), kind),
                "initiatedByUserId": common["creatorId"],
                "value": value,
                "explanationId": self._id(latent, names),
                "explanationScoreTypeName": kind,
                "explanationScoreModelName": self.judge,
                "jsonDetails": "[]",
                "createdAt": common["createdAt"],
            }
            for kind, value in self.scores.get(latent, {}).items()
        ]

    def _id(self, latent: int, names: dict[str, str]) -> str:
        return row_id(*names.values(), str(latent), self.kind)


def read_explanations(run: RunFolder, source: LatentExamples) -> list[ExplanationSource]:
    """Return the explanations of a run: N2G's patterns, and those of `ksparse explain`."""
    return [
        ExplanationSource(
            "n2g", "n2g: patterns of tokens, found by ksparse", _patterns(run, source)
        ),
        _in_words(run),
    ]


def judge_row(run: RunFolder, creator: str, created: str) -> dict[str, Any] | None:
    """Return the row of the model that gave the scores; None if there are none to write."""
    found = _in_words(run)
    if not any(found.scores.values()):
        return None
    return {
        "name": found.judge,
        "displayName": found.judge,
        "description": "asked by ksparse explain",
        "featured": False,
        "creatorName": creator,
        "createdAt": created,
        "updatedAt": created,
    }


def row_id(*parts: str) -> str:
    """Return an id that is a hash of what it names."""
    return "c" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _patterns(run: RunFolder, source: LatentExamples) -> dict[int, str]:
    """Return the three N2G patterns of each latent with the most support, as text; '*' is any
    token."""
    if run.eval("n2g") is None:
        return {}
    arrays = source.read("n2g")[1]
    patterns: dict[int, list[tuple[int, str]]] = {}
    for number, latent in enumerate(arrays["pattern_latent"].tolist()):
        tokens = arrays["pattern_tokens"][
            slice(*arrays["pattern_start"][number : number + 2].tolist())
        ].tolist()
        words = "".join("*" if token < 0 else source.token_strings([token])[0] for token in tokens)
        patterns.setdefault(latent, []).append((-int(arrays["pattern_support"][number]), words))
    return {
        latent: " | ".join(words for _, words in sorted(supported)[:3])
        for latent, supported in patterns.items()
    }


def _in_words(run: RunFolder) -> ExplanationSource:
    """Return the explanations of `ksparse explain`, with their scores."""
    result = run.eval("explain") or {}
    rows, told = result.get("latents"), _table(result.get("tells_apart"))
    rows = [
        row
        for row in (rows if isinstance(rows, list) else ())
        if isinstance(row, dict)
        and type(row.get("latent")) is int
        and isinstance(row.get("explanation"), str)
        and row["explanation"]
    ]
    models = list(_table(_table(result.get("answers")).get("models")))
    asked = _table(result.get("options")).get("model")
    return ExplanationSource(
        "explain",
        "explain: by a language model, asked by ksparse",
        {row["latent"]: row["explanation"] for row in rows},
        {
            row["latent"]: {
                kind: float(row[score])
                for score, kind in _SCORE_TYPES.items()
                if isinstance(row.get(score), float) and told.get(score) is not False
            }
            for row in rows
        },
        models[0] if len(models) == 1 else str(asked),
    )


def _table(found: object) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}
