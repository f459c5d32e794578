"""Several sites on one pass of the LM: each SAE is, bit for bit, what it is alone."""

import pytest

import ksparse
from ksparse.data.live import LiveStream
from ksparse.errors import InputError, NonFiniteError
from ksparse.lm.model import LM
from ksparse.storage.run_folder import open_run, runs_in
from ksparse.training.train import train, train_many

from .test_train_many import held, same

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


def written(run):
    """Return when each file of a run's checkpoints was written, and its metrics."""
    times = {file: file.stat().st_mtime_ns for file in (run / "checkpoints").rglob("*")}
    return times, (run / "metrics.jsonl").read_text()


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
    before = written(first)
    monkeypatch.setattr(LM, "at_site", lambda *args: pytest.fail("the finished site was opened"))
    runs = train_many(recipes(), [first, second])
    for run, expected in zip(runs, alone):
        same(held(run), expected)
    assert written(first) == before


def test_a_list_of_sites_is_a_run_for_each_in_a_folder_named_by_it(recipes, alone, tmp_path):
    rows = []
    runs = ksparse.train(
        recipes()[0], tmp_path / "all", site=list(SITES), progress=False, observe=rows.append
    )
    assert list(runs) == list(SITES)
    assert [row["site"] for row in rows] == list(SITES) * 12
    for site, expected in zip(SITES, alone):
        assert runs[site].path == tmp_path / "all" / site
        assert runs[site].recipe().acts.site == site
        same(held(runs[site]), expected)


def test_sites_are_added_to_a_folder_by_the_same_call_with_more(recipes, tmp_path):
    first = ksparse.train(recipes()[0], tmp_path / "all", site=[SITES[0], "resid_post.0"])
    before = written(first[SITES[0]].path)
    more = ksparse.train(recipes()[0], tmp_path / "all", site="resid_post.*")
    assert sorted(run.path.name for run in more.values()) == [f"resid_post.{i}" for i in range(3)]
    assert written(first[SITES[0]].path) == before


def test_a_site_whose_activations_are_not_finite_is_named(recipes, tmp_path, monkeypatch):
    own = LM.acts_at

    def broken(lm, sites, tokens, attention):
        found = own(lm, sites, tokens, attention)
        bad = SITES[1] if len(sites) > 1 else ""  # not while each site is confirmed
        return {site: x / 0 if site == bad else x for site, x in found.items()}

    monkeypatch.setattr(LM, "acts_at", broken)
    with pytest.raises(NonFiniteError, match=rf"activations at {SITES[1]} are NaN or infinite"):
        train_many(recipes(), outs(tmp_path))


def test_what_cannot_be_done_at_several_sites_is_refused(recipes, tmp_path):
    recipe = recipes()[0]
    train(recipe, tmp_path / "one")
    with pytest.raises(InputError, match="one is a run, of one site; for several sites give anoth"):
        train(recipe, tmp_path / "one", site="resid_post.*")
    with pytest.raises(InputError, match="data is given and acts.site is 'resid_post.*'"):
        train(recipe, tmp_path / "two", site="resid_post.*", data=tmp_path)
    with pytest.raises(InputError, match="planted features, which have no sites"):
        train(recipe, tmp_path / "two", site="resid_post.*", text="planted:{}")
    with pytest.raises(InputError, match="a fine-tune goes on with the SAE of one, resid_post.1"):
        ksparse.finetune(tmp_path / "one", site="resid_post.*", out=tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_a_folder_of_several_runs_where_one_is_needed_is_told_which_there_are(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").write_text("")
    assert [run.path.name for run in runs_in(tmp_path)] == ["a", "b"]
    with pytest.raises(InputError, match=r"holds 2 runs, and one is needed here: .* as .*/a; to"):
        open_run(tmp_path)
