"""What evaluations found of single latents: patterns, effects, tasks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from ksparse.errors import CorruptError
from ksparse.report import findings
from ksparse.report.findings import Explanations
from ksparse.report.source import Arrays, RunSource

from .conftest import DEAD, PROBES, WORDS, ablation_arrays, estimate, n2g_arrays, tasks

DEF, OPEN, SPACES, ANY = WORDS.index("def"), WORDS.index("("), WORDS.index("\n    "), -1


def explained(
    run, patterns: list[tuple[list[int], bool, float, int]], *, latent: int = 7, **arrays
) -> Explanations:
    """Return the reader of a run in which one latent has these patterns, between others."""
    made = [([1], False, 1.0, 1), *patterns, ([2], False, 1.0, 1)]
    found = {
        **n2g_arrays(),
        "pattern_latent": np.array([latent - 1, *[latent] * len(patterns), latent + 1], np.int32),
        "pattern_start": np.array([0, *np.cumsum([len(tokens) for tokens, *_ in made])], np.int32),
        "pattern_tokens": np.array([token for tokens, *_ in made for token in tokens], np.int32),
        "pattern_anchored": np.array([anchored for _, anchored, _, _ in made]),
        "pattern_value": np.array([value for *_, value, _ in made], np.float32),
        "pattern_support": np.array([support for *_, support in made], np.int32),
    } | arrays
    save_file(found, run.path / "evals" / "n2g.safetensors")
    return findings.explanations(RunSource(run))


def shown(explanation: findings.Explanation) -> list[str]:
    return [" ".join(part.text for part in pattern.parts) for pattern in explanation.patterns]


def test_a_pattern_reads_like_the_text_it_matches(make_run) -> None:
    found = explained(
        make_run(), [([DEF, ANY, OPEN], False, 0.83, 5), ([SPACES], True, 0.5, 3)]
    ).find(7)
    assert shown(found) == ['"def" * "("', '^ "↵····"']
    assert [(pattern.value, pattern.support) for pattern in found.patterns] == [
        (pytest.approx(0.83), 5),
        (0.5, 3),
    ]


def test_a_stretch_of_any_token_is_counted(make_run) -> None:
    assert shown(
        explained(make_run(), [([DEF, ANY, ANY, ANY, DEF, DEF], False, 1.0, 1)]).find(7)
    ) == ['"def" *×3 "def" "def"']


def test_the_end_of_a_long_pattern_is_shown(make_run) -> None:
    pattern = explained(make_run(), [([DEF, OPEN] * 30, True, 1.0, 1)]).find(7).patterns[0]
    assert [part.text for part in pattern.parts] == ["…", *['"def"', '"("'] * (findings.PARTS // 2)]


def test_patterns_with_the_most_examples_are_shown_then_those_with_the_largest_values(
    make_run,
) -> None:
    found = explained(
        make_run(),
        [
            ([i], False, value, support)
            for i, value, support in (
                (1, 0.1, 1),
                (2, 0.2, 9),
                (3, 0.3, 1),
                (4, 0.4, 1),
                (5, 0.5, 2),
                (6, 0.6, 1),
            )
        ],
    ).find(7)
    assert [(round(pattern.value, 1), pattern.support) for pattern in found.patterns] == [
        (0.2, 9),
        (0.5, 2),
        (0.6, 1),
        (0.4, 1),
    ]
    assert found.count == 6


def test_scores_are_those_of_the_latent_and_none_where_undefined(make_run) -> None:
    run, arrays = make_run(), n2g_arrays()
    reader = findings.explanations(RunSource(run))
    for i in (0, 5):
        assert reader.find(int(arrays["scored"][i])).scores == {
            name: float(arrays[name][i])
            for name in ("precision", "recall", "f1")
            if np.isfinite(arrays[name][i])
        }
    assert set(reader.find(int(arrays["scored"][0])).scores) == {"recall"}


def test_latents_that_were_neither_explained_nor_scored_have_nothing(make_run) -> None:
    reader = findings.explanations(RunSource(make_run()))
    scored = set(n2g_arrays()["scored"].tolist())
    assert all((reader.find(latent) is None) == (latent not in scored) for latent in DEAD)
    assert reader.find(10_000) is None


def test_only_the_latents_own_patterns_are_read(make_run, monkeypatch) -> None:
    read = []
    monkeypatch.setattr(
        Arrays,
        "_rows",
        lambda self, name, rows, real=Arrays._rows: (
            read.append((name, rows)) or real(self, name, rows)
        ),
    )
    findings.explanations(RunSource(make_run())).find(7)
    whole = {name for name, rows in read if rows == slice(None)}
    assert whole == {"pattern_latent", "scored"} and ("pattern_start", slice(36, 43)) in read


@pytest.mark.parametrize(
    "change",
    [
        {"pattern_start": np.array([0, 1, 9, 10], np.int32)},
        {"pattern_start": np.array([0, 2, 1, 3], np.int32)},
        {"pattern_value": np.zeros(1, np.float32)},
        {"pattern_start": np.array([0, -3, -2, 3], np.int32)},
    ],
)
def test_patterns_that_do_not_fit_together_are_refused(make_run, change) -> None:
    reader = explained(make_run(), [([1], False, 1.0, 1)], **change)
    with pytest.raises(CorruptError, match="n2g.safetensors.*run the evaluation again"):
        reader.find(7)


def test_an_evaluation_without_arrays_has_no_findings(make_run) -> None:
    run = make_run()
    for name in ("n2g", "ablation"):
        run.eval_file(name).with_suffix(".safetensors").unlink()
    assert (
        findings.explanations(RunSource(run)) is None and findings.effects(RunSource(run)) is None
    )


def test_effects_are_those_of_the_latents_own_position(make_run) -> None:
    reader, arrays = findings.effects(RunSource(make_run())), ablation_arrays()
    for row in (0, 20):
        effect = reader.find(int(arrays["latent"][row]))
        assert [value for _, value in effect.up] == arrays["up_values"][row, 0].tolist()
        assert [value for _, value in effect.down] == arrays["down_values"][row, 0].tolist()
        assert effect.sparsity == pytest.approx(float(arrays["sparsity"][row]))
    assert reader.find(10_000) is None


def test_tokens_that_are_not_moved_and_numbers_that_are_none_are_left_out(make_run) -> None:
    run, arrays = make_run(), ablation_arrays()
    arrays["up_values"][0, 0] = [2.0, 0.0, -1.0, np.nan, 1.0]
    arrays["up_tokens"][0, 0] = [DEF, 0, 0, 0, -1]
    arrays["sparsity"][0] = np.nan
    save_file(arrays, run.path / "evals" / "ablation.safetensors")
    effect = findings.effects(RunSource(run)).find(int(arrays["latent"][0]))
    assert effect.up == [("def", 2.0)] and effect.sparsity is None


def test_tasks_are_sorted_by_their_gain_and_those_without_one_are_last(make_run) -> None:
    run = make_run()
    odd = {
        "null": tasks(1)["task_00"] | {"loss": estimate(None)},
        "bare": {},
        "wrong": [1],
        "know nothing": tasks(1)["task_00"]
        | {"loss": estimate(0.7), "channel_loss": estimate(0.9), "random_sae_loss": estimate(0.9)},
    }
    run.eval_file("probes").write_text(json.dumps(PROBES | {"tasks": odd | tasks(3)}))
    found = findings.tasks(RunSource(run))
    assert [task.name for task in found] == [
        "task_00",
        "task_01",
        "task_02",
        "know nothing",
        "bare",
        "null",
    ]
    assert (
        found[0].gain == pytest.approx(0.2)
        and found[3].gain == pytest.approx(0.693 - 0.7)
        and found[4].gain is None
    )


def test_a_gain_is_clear_from_two_standard_errors_on(make_run) -> None:
    run = make_run()
    losses = {"a": estimate(0.48, 0.009), "b": estimate(0.48, 0.011), "c": estimate(0.6)}
    of_each = {name: tasks(1)["task_00"] | {"loss": loss} for name, loss in losses.items()}
    run.eval_file("probes").write_text(json.dumps(PROBES | {"tasks": of_each}))
    assert {task.name: task.is_clear for task in findings.tasks(RunSource(run))} == {
        "a": True,
        "b": False,
        "c": False,
    }


def test_without_probes_there_are_no_tasks(make_run) -> None:
    assert findings.tasks(RunSource(make_run("a", evals=("stats",)))) == []
    run = make_run("b")
    run.eval_file("probes").write_text(json.dumps(PROBES | {"tasks": None}))
    assert findings.tasks(RunSource(run)) == []


def test_a_vocabulary_that_is_missing_leaves_ids(make_run) -> None:
    run = make_run()
    run.eval_file("vocabulary").unlink()
    assert shown(explained(run, [([DEF], False, 1.0, 1)]).find(7)) == ['"⟨1⟩"']
    assert (
        findings.effects(RunSource(run))
        .find(int(ablation_arrays()["latent"][0]))
        .up[0][0]
        .startswith("⟨")
    )
