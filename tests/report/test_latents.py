"""Cards of latents from arrays."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from ksparse.errors import CorruptError
from ksparse.report.sections import latents
from ksparse.report.source import RunSource
from ksparse.report.tokens import safe_token
from ksparse.storage import jsonio

from .conftest import (
    ABLATION,
    AFTER,
    BEFORE,
    DEAD,
    N2G,
    PROBES,
    WORDS,
    ablation_arrays,
    arrays,
    n2g_arrays,
    tasks,
)


def cards(run) -> dict[int, latents.LatentCard]:
    return {
        card.number: card
        for sample in latents.read_samples(RunSource(run))
        for card in sample.cards
    }


def test_dead_latents_are_not_shown_and_no_latent_twice(make_run) -> None:
    found = [
        card.number
        for sample in latents.read_samples(RunSource(make_run()))
        for card in sample.cards
    ]
    assert (
        len(found)
        == len(set(found))
        == latents.BEST
        + latents.AT_TASKS
        + latents.DENSEST
        + latents.RANDOM
        + latents.RAREST
        + latents.WORST
    )
    assert not set(found) & set(DEAD)


def test_the_densest_and_the_rarest_are_that(make_run) -> None:
    density = arrays()["density"]
    best, at_tasks, densest, _, rarest, _ = (
        [card.number for card in sample.cards]
        for sample in latents.read_samples(RunSource(make_run()))
    )
    density[best + at_tasks] = 0  # shown above
    live = density[density > 0]
    assert (
        density[densest].min() >= np.sort(live)[-latents.DENSEST]
        and density[rarest].max() <= np.sort(live)[latents.RAREST - 1]
    )


@pytest.mark.parametrize("live", range(12))
def test_few_live_latents_are_each_chosen_once(live: int) -> None:
    density = np.zeros(20)
    density[:live] = np.linspace(0.1, 0.9, live) if live else []
    chosen = np.concatenate(latents.sample_by_density(density))
    assert sorted(chosen.tolist()) == list(range(live))


def test_an_example_is_the_window_of_its_context(make_run) -> None:
    run, data = make_run(), arrays()
    for number, card in cards(run).items():
        for example, context, position in zip(
            card.top, data["top_context"][number], data["top_position"][number]
        ):
            row = data["contexts"][context]
            at = [
                i
                for i in range(position - BEFORE, position + AFTER + 1)
                if 0 <= i < len(row) and row[i] >= 0
            ]
            assert "".join(piece.text for piece in example.runs) == "".join(
                safe_token(WORDS[row[i]]) for i in at
            )
            assert [piece.text for piece in example.runs if piece.peak] == [
                safe_token(WORDS[row[position]])
            ]


def test_heat_is_the_share_of_the_latents_largest_value(make_run) -> None:
    run = make_run()
    card = next(iter(cards(run).values()))
    pieces = [piece for example in card.top for piece in example.runs]
    assert card.top[0].value == pytest.approx(card.largest, rel=1e-3)
    assert all(
        piece.heat == pytest.approx(min(1, piece.value / card.largest), abs=0.006)
        for piece in pieces
    )
    assert all(piece.value > 0 or piece.heat == 0 for piece in pieces)


def test_examples_end_where_there_are_no_more(tmp_path, make_run) -> None:
    run, data = make_run(), arrays()
    data["density"][3] = 0.99  # the latent with two examples becomes the densest
    save_file(data, run.path / "evals" / "stats.safetensors")
    assert len(cards(run)[3].top) == 2


def test_a_result_without_examples_has_cards_without_them(make_run) -> None:
    run, data = make_run(), arrays()
    save_file(
        {
            name: array
            for name, array in data.items()
            if not name.startswith(("top_", "random_", "contexts"))
        },
        run.path / "evals" / "stats.safetensors",
    )
    with pytest.raises(CorruptError, match="no readable 'top_context'"):
        cards(run)
    result = jsonio.read_json(run.eval_file("stats"))
    jsonio.write_json(
        run.eval_file("stats"), result | {"options": result["options"] | {"examples": 0}}
    )
    assert len(cards(run)) > latents.DENSEST and not any(
        card.top or card.random for card in cards(run).values()
    )


def test_tokens_outside_the_vocabulary_are_their_ids(make_run) -> None:
    texts = {
        piece.text
        for card in cards(make_run(vocabulary=["a"])).values()
        for example in card.top
        for piece in example.runs
    }
    assert any("⟨13⟩" in text for text in texts)


def test_not_a_number_among_the_values_does_not_reach_the_page(make_run) -> None:
    run, data = make_run(), arrays()
    data["top_acts"][:, :, 0] = np.nan
    data["cosine"][:] = np.nan
    save_file(data, run.path / "evals" / "stats.safetensors")
    assert all(
        card.cosine == 0
        and np.isfinite([piece.heat for example in card.top for piece in example.runs]).all()
        for card in cards(run).values()
    )


def test_a_damaged_file_of_arrays_is_named(make_run) -> None:
    run = make_run()
    file = run.path / "evals" / "stats.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CorruptError, match="stats.safetensors has no readable 'density'"):
        latents.read_samples(RunSource(run))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("contexts", lambda array: array[:1], "no readable 'contexts'.*run the evaluation again"),
        ("top_acts", lambda array: array[:, :, 1:], "windows of 9 tokens, the result says 10"),
        ("top_value", lambda array: array[:2], "no readable 'top_value'"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(make_run, name, change, message) -> None:
    run, data = make_run(), arrays()
    data[name] = np.ascontiguousarray(change(data[name]))
    save_file(data, run.path / "evals" / "stats.safetensors")
    with pytest.raises(CorruptError, match=message):
        latents.read_samples(RunSource(run))


# ---- what other evaluations found


def titles(run) -> dict[str, list[int]]:
    return {title: numbers for title, _, numbers in latents.choose_latents(RunSource(run))}


def test_evaluations_add_samples_of_live_latents_that_have_no_card_yet(make_run) -> None:
    found, arrays_ = titles(make_run()), n2g_arrays()
    f1 = dict(zip(arrays_["scored"].tolist(), arrays_["f1"].tolist()))
    free = {i for i in f1 if np.isfinite(f1[i]) and i not in DEAD}
    order = sorted(free, key=lambda i: -f1[i])
    assert found["Best explained"] == order[: latents.BEST]
    left = [i for i in order if not any(i in found[t] for t in found if t != "Worst explained")]
    assert found["Worst explained"] == left[::-1][: latents.WORST]
    assert len(found["Best at a task"]) == latents.AT_TASKS


@pytest.mark.parametrize(
    "evals, added",
    [
        (("stats",), set()),
        (("stats", "n2g"), {"Best explained", "Worst explained"}),
        (("stats", "probes"), {"Best at a task"}),
        (("stats", "ablation"), set()),
    ],
)
def test_without_an_evaluation_there_is_no_sample_of_it(make_run, evals, added) -> None:
    assert set(titles(make_run(evals=evals))) == {"The densest", "At random", "The rarest"} | added


def test_latents_that_the_run_does_not_have_are_not_chosen(make_run) -> None:
    run, data = make_run(), n2g_arrays()
    data["scored"] += 1_000_000
    save_file(data, run.path / "evals" / "n2g.safetensors")
    run.eval_file("probes").write_text(
        json.dumps(
            PROBES | {"tasks": {"a": tasks(1)["task_00"] | {"latent": 10**9}, "b": {"latent": -1}}}
        )
    )
    assert set(titles(run)) == {"The densest", "At random", "The rarest"}


def test_an_explanation_of_nothing_adds_nothing(make_run) -> None:
    run = make_run()
    empty = {name: array[:0] for name, array in n2g_arrays().items()} | {
        "pattern_start": np.zeros(1, np.int32)
    }
    save_file(empty, run.path / "evals" / "n2g.safetensors")
    run.eval_file("n2g").write_text(
        json.dumps(
            N2G | {key: {"value": None, "se": None} for key in ("recall", "precision", "f1")}
        )
    )
    save_file(
        {name: array[:0] for name, array in ablation_arrays().items()},
        run.path / "evals" / "ablation.safetensors",
    )
    run.eval_file("ablation").write_text(json.dumps(ABLATION | {"n_latents": 0}))
    assert "Best explained" not in titles(run)
    assert all(card.explanation is None and card.effect is None for card in cards(run).values())


def test_a_card_has_what_was_found_of_its_latent(make_run) -> None:
    tables, scored = set(ablation_arrays()["latent"].tolist()), set(n2g_arrays()["scored"].tolist())
    best = {task["latent"]: name for name, task in tasks().items()}
    for number, card in cards(make_run()).items():
        assert card.explanation.count == 6 and len(card.explanation.patterns) == 4
        assert bool(card.explanation.scores) == (number in scored) and (
            card.effect is not None
        ) == (number in tables)
        assert card.tasks == ((best[number],) if number in best else ())
