"""Layouts, dense regions and their names: compared with slow definitions, and on planted groups."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ksparse import viewer
from ksparse.errors import CorruptError, InputError
from ksparse.report.tokens import token_of
from ksparse.sae.serialization import load
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer import layouts, regions
from ksparse.viewer.resources import Resources
from ksparse.viewer.weights import Decoder

from .conftest import N


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def places_of(resource: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(resource["float32"]), "<f4").reshape(-1, 2)


def planted(groups: int = 5, each: int = 60, d: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Return unit rows around a few directions, and the group of each."""
    random = np.random.default_rng(1)
    group = np.repeat(np.arange(groups), each)
    rows = 4 * unit_rows(groups, d, seed=2)[group] + random.standard_normal((len(group), d)) / 3
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), group


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [40, layouts._BLOCK + 500])
def test_pca_is_that_of_the_drawn_rows_whatever_their_number(n):
    rows = unit_rows(n, 12) * np.linspace(1, 3, 12, dtype=np.float32)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    drawn = np.arange(n) % 7 != 3
    layout = layouts.principal(rows, drawn)
    centred = rows[drawn].astype(float) - rows[drawn].astype(float).mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(np.abs(layout.places[drawn]), np.abs(centred @ axes[:2].T), atol=1e-4)
    assert np.isnan(layout.places[~drawn]).all()
    assert layout.made["shares"] == pytest.approx(sizes[:2] ** 2 / (sizes**2).sum(), abs=1e-5)


def test_pca_has_places_in_one_dimension_and_none_without_live_latents():
    line = layouts.principal(np.array([[1.0], [-1.0], [1.0]], np.float32), np.ones(3, bool))
    assert np.allclose(np.abs(np.diff(line.places[:2, 0])), 2) and (line.places[:, 1] == 0).all()
    nothing = layouts.principal(unit_rows(4, 3), np.zeros(4, bool))
    assert np.isnan(nothing.places).all()


def test_the_map_leaves_out_dead_latents_and_counts_them(run: RunFolder):
    file = run.arrays_file("stats")
    density = load_file(file)["density"].copy()
    resource = Resources(run, 16).get("maps/pca")
    drawn = np.isfinite(places_of(resource)).all(1)
    assert np.array_equal(drawn, density > 0)
    assert resource["left_out"] == int((density == 0).sum())
    rows = load(run.path).W_dec.detach().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.allclose(places_of(resource)[drawn], layouts.principal(rows, drawn).places[drawn])


def test_without_stats_all_latents_are_drawn_and_no_region_has_a_name(run: RunFolder):
    for file in run.eval_file("stats").parent.glob("stats*"):
        file.unlink()
    resource = Resources(run, 16).get("maps/pca")
    assert np.isfinite(places_of(resource)).all() and resource["left_out"] == 0
    assert all(set(region) == {"at", "radius", "count"} for region in resource["regions"])


def test_a_run_without_weights_has_no_map(run: RunFolder):
    shutil.rmtree(run.path / "checkpoints")
    resources = Resources(run, 16)
    assert resources.get("overview")["maps"] == [] and resources.get("maps/pca") is None
    with pytest.raises(InputError, match="has no checkpoint, and a map shows the SAE's decoder"):
        viewer.lay_out(run)


# ---- UMAP ----------------------------------------------------------------------------------------


class PretendUMAP:
    """In place of umap-learn, which tests do not need: writes to its progress bar as that does."""

    def __init__(self, **options):
        self.options = options

    def fit_transform(self, rows):
        bar = self.options["tqdm_kwds"]["file"]
        for epoch in (0, 100, 200):
            bar.write(f"\r{epoch}/200 ")
        assert len(rows) == len(self.options["init"])
        return self.options["init"] + 1


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=PretendUMAP))
    monkeypatch.setattr(layouts.importlib.metadata, "version", lambda name: "0.5.99")


def test_a_layout_by_umap_is_kept_once_read_back_and_offered(run: RunFolder, pretended):
    assert Resources(run, 16).get("overview")["maps"] == ["pca"]
    reports: list[tuple[str, int, int]] = []
    assert viewer.lay_out(run, observe=lambda *report: reports.append(report))
    assert ("layout", 100, 200) in reports and reports[0][1] == 0
    resources = Resources(run, 16)
    assert resources.get("overview")["maps"] == ["pca", "umap"]
    pca, umap = (resources.get(f"maps/{name}") for name in ("pca", "umap"))
    assert np.array_equal(np.isnan(places_of(pca)), np.isnan(places_of(umap)))
    spread = np.nanmax(places_of(umap), 0) - np.nanmin(places_of(umap), 0)
    assert spread.max() == pytest.approx(10, rel=1e-4)
    assert umap["made"]["n_neighbors"] == 15 and umap["made"]["umap_learn"] == "0.5.99"
    written = layouts.file_of(run).stat().st_mtime_ns
    assert not viewer.lay_out(run) and layouts.file_of(run).stat().st_mtime_ns == written


def test_a_layout_of_another_decoder_is_not_offered(run: RunFolder, pretended):
    viewer.lay_out(run)
    table = json.loads(layouts.file_of(run).read_text())
    layouts.write(run, layouts.read(run, N, table["decoder"]), "another")
    assert Resources(run, 16).get("overview")["maps"] == ["pca"]
    assert Resources(run, 16).get("maps/umap") is None
    assert viewer.lay_out(run)  # written again


def test_a_damaged_layout_is_named(run: RunFolder, pretended):
    viewer.lay_out(run)
    decoder = Decoder(run).identity()
    short = layouts.Layout(np.zeros((N - 1, 2), np.float32))
    layouts.write(run, short, decoder)
    with pytest.raises(CorruptError, match=rf"a place for each of the run's {N} latents"):
        layouts.read(run, N, decoder)
    layouts.file_of(run).write_text(layouts.file_of(run).read_text().replace('"made"', '"maid"'))
    with pytest.raises(CorruptError, match="was altered"):
        layouts.read(run, N, decoder)


def test_a_layout_that_is_a_link_out_of_the_run_is_refused(run: RunFolder, tmp_path: Path):
    (tmp_path / "secret.json").write_text("{}")
    (run.path / "map-umap.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(InputError, match="leads out of"):
        Resources(run, 16).get("overview")


def test_umap_asks_for_its_package_and_for_enough_latents(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    words = r"--map umap needs the package umap-learn: pip install 'ksparse\[umap\]'"
    with pytest.raises(InputError, match=words):
        layouts.neighbour_map(unit_rows(9, 3), np.ones(9, bool))
    with pytest.raises(InputError, match="needs 5 latents that fire at least; this run has 4"):
        layouts.neighbour_map(unit_rows(9, 3), np.arange(9) < 4)


@pytest.mark.slow
def test_umap_itself_brings_planted_groups_together():
    pytest.importorskip("umap", reason="the extra `umap` is not installed")
    rows, group = planted()
    drawn = np.arange(len(rows)) % 10 != 0
    reports = []
    layout = layouts.neighbour_map(rows, drawn, lambda *report: reports.append(report))
    assert np.isnan(layout.places[~drawn]).all()
    places, of = layout.places[drawn], group[drawn]
    distance = np.linalg.norm(places[:, None] - places, axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert (of[distance.argmin(1)] == of).all()
    assert "layout" in {what for what, _, _ in reports}


# ---- regions -------------------------------------------------------------------------------------


def test_groups_that_lie_apart_are_regions_whatever_the_scale():
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(6), 400)
    centres = np.array([[0, 0], [8, 0], [0, 8], [8, 8], [4, 4], [4, 12]])
    places = centres[group] + 0.5 * random.standard_normal((len(group), 2))
    for scale in (1, 1e-3, 1e4):
        found = regions.find(scale * places)
        main = [np.bincount(found[group == i]).argmax() for i in range(6)]
        assert len(set(main)) == 6
        assert all((found[group == i] == main[i]).mean() > 0.95 for i in range(6))


def test_latents_without_a_place_are_in_no_region():
    places = np.full((30, 2), np.nan)
    assert (regions.find(places) == -1).all() and regions.describe(places, {}, str) == []
    places[:20] = np.random.default_rng(0).random((20, 2))
    assert (regions.find(places) >= 0).sum() == 20


def test_a_name_is_the_token_whose_mean_share_most_exceeds_that_of_all():
    random = np.random.default_rng(3)
    region = np.repeat([0, 1, 2], [50, 30, 20])
    tokens = random.integers(-1, 12, (100, 3))
    weights = random.random((100, 3)) / 3
    tokens[:40, 0], weights[:40, 0] = 20, 0.9  # most of region 0
    tokens[50:52, 0], weights[50:52, 0] = 21, 1.0  # too few latents of region 1
    vocabulary = [f"t{i}" for i in range(30)]
    places = random.random((100, 2))
    terms = {"fires": regions.TokenShares(tokens, weights)}
    found = regions.describe(places, terms, vocabulary.__getitem__, region)
    assert [each["count"] for each in found] == [50, 30, 20]

    def share(token: int, within: np.ndarray) -> float:
        return float(np.where(tokens[within] == token, weights[within], 0).sum() / within.sum())

    everywhere = np.ones(100, bool)
    for number, each in enumerate(found):
        within = region == number
        expected = []
        for token in range(30):
            here, overall = share(token, within), share(token, everywhere)
            holders = (tokens[within] == token).any(1).sum()
            if holders >= 3 and here >= 2 * overall > 0:
                expected.append((here - overall, f"t{token}", here, overall))
        expected.sort(reverse=True)
        assert [name for name, _, _ in each["fires"]] == [row[1] for row in expected[:3]]
        for (_, here, overall), row in zip(each["fires"], expected):
            assert (here, overall) == (pytest.approx(row[2], 1e-2), pytest.approx(row[3], 1e-2))
    assert found[0]["fires"][0][0] == "t20"
    assert all(name != "t21" for each in found for name, _, _ in each["fires"])


def test_tokens_that_differ_in_case_or_outer_spaces_are_one_name():
    tokens = np.array([[0], [1], [2], [3], [3], [3], [3], [3], [3], [3]])
    weights = np.ones(tokens.shape)
    region = np.array([0] * 3 + [1] * 7)
    spelled = [" The", "the", "THE ", "x"]
    old = regions.LEAST_LATENTS
    places = np.random.default_rng(0).random((10, 2))
    try:
        regions.LEAST_LATENTS = 1
        found = regions.describe(
            places, {"raises": regions.TokenShares(tokens, weights)}, spelled.__getitem__, region
        )
    finally:
        regions.LEAST_LATENTS = old
    assert found[1]["raises"] == [["The", 1.0, 0.3]]
    assert found[0]["raises"] == []  # 1 is less than twice 0.7


def test_regions_of_planted_latents_are_named_by_what_they_fire_on(run: RunFolder):
    rows, group = planted(groups=4, each=N // 4)
    checkpoint = run.checkpoints()[-1]
    manifest = checksums.verify(checkpoint)
    facts = {key: manifest[key] for key in manifest if key != "sha256"}
    with checksums.checksummed_dir(checkpoint, **facts) as tmp:
        save_file({"W_dec": rows}, tmp / "sae.safetensors")
    file = run.arrays_file("stats")
    arrays = {key: np.array(value) for key, value in load_file(file).items()}
    arrays["density"][:] = 0.1
    arrays["on_token"][:, 0], arrays["on_share"][:, 0] = 40 + group, 0.9
    save_file(arrays, file)
    result = jsonio.read_table(run.eval_file("stats"))
    jsonio.write_json(run.eval_file("stats"), result | {"arrays_sha256": atomic.sha256(file)})
    resource = Resources(run, 16).get("maps/pca")
    vocabulary = json.loads(run.eval_file("vocabulary").read_text())
    names = {region["fires"][0][0] for region in resource["regions"] if region["fires"]}
    assert names == {token_of(vocabulary, 40 + i).strip() for i in range(4)}
