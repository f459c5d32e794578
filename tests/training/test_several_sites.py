"""Several sites on one pass of the LM: each SAE is, bit for bit, what it is alone."""

import pytest
from tests.training.test_train_many import held, same

from ksparse.data.live import LiveStream
from ksparse.lm.model import LM
from ksparse.training.train import train, train_many

SITES = ("resid_post.1", "transformer.h.0.mlp.c_fc")
"""Of widths 16 and 64; the second is the earlier one."""
WITH_CURVES = {"order": 3, "curve.held_out": 64, "curve.octaves": 3}


@pytest.fixture
def recipes(small_recipe):
    """Return recipes(changes): one for each of two sites."""
    return lambda changes=(): [
        small_recipe(WITH_CURVES | dict(changes) | {"acts.site": site}) for site in SITES
    ]


@pytest.fixture
def alone(recipes, tmp_path):
    return [held(train(recipe, tmp_path / "alone" / str(i))) for i, recipe in enumerate(recipes())]


def outs(folder):
    return [folder / str(i) for i in range(len(SITES))]


def test_each_site_is_bit_for_bit_what_it_is_alone(recipes, alone, tmp_path):
    """Weights, moments, averages, counters, cursors, metrics, curves; widths of 16 and 64."""
    for run, expected in zip(train_many(recipes(), outs(tmp_path)), alone):
        same(held(run), expected)
    widths = {expected[0]["sae.safetensors/b_pre"].shape[0] for expected in alone}
    assert widths == {16, 64} and all(len(rows[1]) > 3 for _, rows, _ in alone)


def test_one_pass_of_the_lm_reads_all_sites_and_stops_at_the_last(recipes, tmp_path, monkeypatch):
    passes, reached, own, set_site = [], set(), LiveStream._read, LM._set_site

    def counted(stream, contexts):
        passes.append(stream.sites)
        reached.clear()
        return own(stream, contexts)

    def watched(lm, site):
        set_site(lm, site)
        for number, block in enumerate(lm.model.transformer.h):
            block.register_forward_hook(lambda *args, number=number: reached.add(number))

    monkeypatch.setattr(LiveStream, "_read", counted)
    monkeypatch.setattr(LM, "_set_site", watched)
    train(recipes()[0], tmp_path / "alone")
    alone = len(passes)
    train_many(recipes(), outs(tmp_path / "both"))
    assert passes == [SITES[:1]] * alone + [SITES] * alone
    assert reached == {0, 1}  # of the LM's three blocks


def test_stopped_sites_go_on_to_the_same_bits(recipes, alone, tmp_path):
    def stop(run, row):
        if row["step"] == 6 and run.name == "1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_many(recipes(), outs(tmp_path), observe=stop)
    for run, expected in zip(train_many(recipes(), outs(tmp_path)), alone):
        same(held(run), expected)


def test_a_finished_site_is_not_trained_again_nor_read(recipes, alone, tmp_path, monkeypatch):
    first, second = outs(tmp_path)
    train(recipes()[0], first)
    before = {file: file.stat().st_mtime_ns for file in first.rglob("*") if file.is_file()}
    monkeypatch.setattr(LM, "at_site", lambda *args: pytest.fail("the finished site was opened"))
    runs = train_many(recipes(), [first, second])
    for run, expected in zip(runs, alone):
        same(held(run), expected)
    after = {file: file.stat().st_mtime_ns for file in first.rglob("*") if file.is_file()}
    changed = {file.name for file in before if after[file] != before[file]}
    assert changed <= {"recipe.toml", "environment.json"}
