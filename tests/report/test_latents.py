"""Cards of latents from arrays."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from ksparse.errors import CorruptError
from ksparse.report import latents
from ksparse.report.source import Source

from .conftest import AFTER, BEFORE, DEAD, WORDS, arrays


def cards(run) -> dict[int, latents.Card]:
    return {card.number: card for sample in latents.samples(Source(run)) for card in sample.cards}


def test_dead_latents_are_not_shown_and_no_latent_twice(make_run) -> None:
    found = [card.number for sample in latents.samples(Source(make_run())) for card in sample.cards]
    assert len(found) == len(set(found)) == latents.DENSEST + latents.RANDOM + latents.RAREST
    assert not set(found) & set(DEAD)


def test_the_densest_and_the_rarest_are_that(make_run) -> None:
    density = arrays()["density"]
    densest, _, rarest = (np.array([card.number for card in sample.cards]) for sample in latents.samples(Source(make_run())))
    live = density[density > 0]
    assert density[densest].min() >= np.sort(live)[-latents.DENSEST] and density[rarest].max() <= np.sort(live)[latents.RAREST - 1]


@pytest.mark.parametrize("live", range(12))
def test_few_live_latents_are_each_chosen_once(live: int) -> None:
    density = np.zeros(20)
    density[:live] = np.linspace(0.1, 0.9, live) if live else []
    chosen = np.concatenate(latents.choose(density))
    assert sorted(chosen.tolist()) == list(range(live))


def test_an_example_is_the_window_of_its_context(make_run) -> None:
    run, data = make_run(), arrays()
    for number, card in cards(run).items():
        for example, context, position in zip(card.top, data["top_context"][number], data["top_position"][number]):
            row = data["contexts"][context]
            at = [i for i in range(position - BEFORE, position + AFTER + 1) if 0 <= i < len(row) and row[i] >= 0]
            assert "".join(piece.text for piece in example.pieces) == "".join(
                latents.safe_token(WORDS[row[i]]) for i in at)
            assert [piece.text for piece in example.pieces if piece.peak] == [latents.safe_token(WORDS[row[position]])]


def test_heat_is_the_share_of_the_latents_largest_value(make_run) -> None:
    run = make_run()
    card = next(iter(cards(run).values()))
    pieces = [piece for example in card.top for piece in example.pieces]
    assert card.top[0].value == pytest.approx(card.largest, rel=1e-3)
    assert all(piece.heat == pytest.approx(min(1, piece.value / card.largest), abs=0.006) for piece in pieces)
    assert all(piece.value > 0 or piece.heat == 0 for piece in pieces)


def test_examples_end_where_there_are_no_more(tmp_path, make_run) -> None:
    run, data = make_run(), arrays()
    data["density"][3] = 0.99  # the latent with two examples becomes the densest
    save_file(data, run.path / "evals" / "stats.safetensors")
    assert len(cards(run)[3].top) == 2


def test_tokens_outside_the_vocabulary_are_their_ids(make_run) -> None:
    texts = {piece.text for card in cards(make_run(vocabulary=["a"])).values() for example in card.top for piece in example.pieces}
    assert any("⟨13⟩" in text for text in texts)


def test_not_a_number_among_the_values_does_not_reach_the_page(make_run) -> None:
    run, data = make_run(), arrays()
    data["top_acts"][:, :, 0] = np.nan
    data["cosine"][:] = np.nan
    save_file(data, run.path / "evals" / "stats.safetensors")
    assert all(card.cosine == 0 and np.isfinite([piece.heat for example in card.top for piece in example.pieces]).all()
               for card in cards(run).values())


def test_a_damaged_file_of_arrays_is_named(make_run) -> None:
    run = make_run()
    file = run.path / "evals" / "stats.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CorruptError, match="stats.safetensors has no readable 'density'"):
        latents.samples(Source(run))


@pytest.mark.parametrize("name, change, message", [
    ("contexts", lambda array: array[:1], "no readable 'contexts'.*run the evaluation again"),
    ("top_acts", lambda array: array[:, :, 1:], "windows of 9 tokens, the result says 10"),
    ("top_value", lambda array: array[:2], "no readable 'top_value'"),
])
def test_arrays_that_do_not_fit_together_are_refused(make_run, name, change, message) -> None:
    run, data = make_run(), arrays()
    data[name] = np.ascontiguousarray(change(data[name]))
    save_file(data, run.path / "evals" / "stats.safetensors")
    with pytest.raises(CorruptError, match=message):
        latents.samples(Source(run))
