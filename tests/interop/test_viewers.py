"""Viewers show what the evaluations measured, in the fields that those viewers read."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ksparse
from ksparse.config.evaluation import EvalConfig
from ksparse.errors import InputError
from ksparse.evals import runner
from ksparse.interop import neuronpedia, openai_viewer
from ksparse.interop.latent_examples import LatentExamples
from ksparse.lm.direct_logits import read_head
from ksparse.lm.model import LM
from ksparse.storage.run_folder import RunFolder

SEQUENCE = {"density", "doc_id", "idx", "acts", "act", "tokens", "token_ints"}
FEATURE = {
    "feature_index",
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "frac_nonzero",
    "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "n_prompts_total",
    "n_tokens_in_prompt",
    "dataset",
    "decoder_weights_dist",
    "vector",
    "activations",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm, text_file):
    """Return a small run with stats, ablation and n2g."""
    from ksparse.config import from_dict

    recipe = from_dict(
        {
            "acts": {
                "lm": str(tiny_lm("gpt2")),
                "site": "resid_post.1",
                "text": str(text_file),
                "context": 16,
                "mix": 256,
                "lm_batch": 8,
            },
            "sae": {"n_latents": 64, "k": 4, "k_aux": 8},
            "tokens": 12 * 64,
            "batch": 64,
            "threads": 1,
            "run": {"device": "cpu", "kernels": "torch"},
        }
    )
    trained = ksparse.train(recipe, tmp_path_factory.mktemp("runs") / "run")
    options = EvalConfig(
        tokens=400, examples=3, device="cpu", ablation_positions=4, ablation_latents=8, latents=5
    )
    runner.write_results(
        trained,
        ksparse.evaluate(ksparse.load(trained.path), None, ["stats", "ablation", "n2g"], options),
    )
    return trained


@pytest.fixture(scope="module")
def values(run):
    """Return the latents' values [tokens, n] as the slow definition computes them."""
    result = run.eval("stats")
    sae, lm = ksparse.load(run.path), LM(acts=run.recipe().acts)
    from ksparse.evals.batches import HeldOut

    data = HeldOut(lm, lm.options, EvalConfig(**result["options"] | {"device": "cpu"}))
    with torch.no_grad():
        return (
            torch.cat([sae.encode(batch.x).dense(64) for batch in data]).numpy().astype(np.float64)
        )


def test_moments_and_histograms_are_their_definitions(run, values):
    source = LatentExamples(run)
    for latent in source.live_latents():
        column = values[:, latent]
        np.testing.assert_allclose(
            source.moments(latent), [(column**power).mean() for power in (1, 2, 3, 4)], rtol=1e-4
        )
        bars = np.ceil(column[column > 0] / source.stats["act_bin"]).astype(int)
        assert source.histogram(latent) == {
            int(bar): int((bars == bar).sum()) for bar in np.unique(bars)
        }
    assert source.live_latents() == np.flatnonzero((values > 0).any(0)).tolist()


def test_atoms_have_the_published_fields_and_numbers(run, values, tmp_path):
    count = openai_viewer.export(run, tmp_path / "viewer")
    assert count == len(list((tmp_path / "viewer" / "atoms").glob("[0-9]*.json"))) - len(
        list((tmp_path / "viewer" / "atoms").glob("*-ablated.json"))
    )
    source = LatentExamples(run)
    scale = math.sqrt(16)  # unit_norm: a component of the input is 1 / sqrt(d)
    for latent in source.live_latents():
        atom = json.loads((tmp_path / "viewer" / "atoms" / f"{latent}.json").read_text())
        column = values[:, latent] * scale
        assert atom["density"] == pytest.approx((column > 0).mean(), rel=1e-5)
        assert atom["mean_act"] == pytest.approx(column.mean(), rel=1e-4) and atom[
            "mean_act_squared"
        ] == pytest.approx((column**2).mean(), rel=1e-4)
        assert atom["skew"] == pytest.approx(
            (column**3).mean() / (column**2).mean() ** 1.5, rel=1e-3
        )
        assert atom["kurtosis"] == pytest.approx(
            (column**4).mean() / (column**2).mean() ** 2, rel=1e-3
        )
        assert sum(atom["hist"].values()) == (column > 0).sum()
        assert max(each["act"] for each in atom["top"]) == pytest.approx(
            column.max(), rel=1e-3
        )  # kept in 16 bits
        for each in atom["top"] + atom["random"]:
            assert set(each) == SEQUENCE and len(each["acts"]) == len(each["tokens"]) == len(
                each["token_ints"]
            )
            assert each["acts"][each["idx"]] == each["act"] > 0


def test_the_ablated_variant_has_an_entry_for_each_prediction(run, tmp_path):
    openai_viewer.export(run, tmp_path / "viewer")
    files = sorted((tmp_path / "viewer" / "atoms").glob("*-ablated.json"))
    table = load_file(run.arrays_file("ablation"))
    assert len(files) == len(table["latent"]) > 0
    for row, latent in enumerate(table["latent"].tolist()):
        [sequence] = json.loads(
            (tmp_path / "viewer" / "atoms" / f"{latent}-ablated.json").read_text()
        )["top"]
        predictions, at = len(sequence["tokens"]) - 1, sequence["idx"]
        lists = [key for key in sequence if key.startswith(("ablate", "kl", "top_"))]
        assert len(lists) == 10 and all(len(sequence[key]) == predictions for key in lists)
        assert sequence["kl"][:at] == [0.0] * at  # what comes before the position is not changed
        if at < predictions:
            assert sequence["kl"][at] == pytest.approx(float(table["kl"][row, 0]))
            assert sequence["top_upvotes_logits"][at] == pytest.approx(
                table["up_values"][row, 0].tolist()
            )


def test_a_dashboard_has_saedashboards_fields(run, tmp_path):
    count = neuronpedia.export_dashboard(
        run, tmp_path / "out", neuronpedia.Publication(model="tiny", set="test")
    )
    batch = json.loads((tmp_path / "out" / "batch-0.json").read_text())
    assert (batch["model_id"], batch["layer"], batch["sae_set"], batch["sae_id_suffix"]) == (
        "tiny",
        1,
        "test",
        None,
    )
    assert len(batch["features"]) == count == len(LatentExamples(run).live_latents())
    for feature in batch["features"]:
        assert set(feature) == FEATURE
        assert feature["pos_values"] == sorted(feature["pos_values"], reverse=True) and feature[
            "neg_values"
        ] == sorted(feature["neg_values"])
        groups = {(each["bin_min"], each["bin_contains"]) for each in feature["activations"]}
        assert (-1.0, -1.0) in groups
        assert sum(feature["neuron_alignment_values"]) > 0
        for each in feature["activations"]:
            assert each["values"][each["qualifying_token_index"]] > 0 and len(
                each["values"]
            ) == len(each["tokens"])


def test_examples_beside_the_strongest_lie_in_intervals_that_say_how_often_they_occur(
    run, values, tmp_path
):
    """The page groups examples by the end of their interval."""
    neuronpedia.export_dashboard(run, tmp_path / "out")
    for feature in json.loads((tmp_path / "out" / "batch-0.json").read_text())["features"]:
        column = values[:, feature["feature_index"]]
        seen = set()
        for each in feature["activations"]:
            value = each["values"][each["qualifying_token_index"]]
            low, high, share = each["bin_min"], each["bin_max"], each["bin_contains"]
            if share == -1:
                assert high == pytest.approx(column.max(), rel=1e-5)
                continue
            seen.add((low, high))
            assert low * 0.999 <= value <= high * 1.001 and high - low == pytest.approx(
                column.max() / 4, rel=1e-3
            )
            near = 1e-3 * column.max()  # values are kept in 16 bits
            assert ((column > low + near) & (column < high - near)).mean() <= share + 1e-6
            assert share <= ((column > low - near) & (column < high + near)).mean() + 1e-6
        assert seen


def test_a_vector_is_what_a_latent_adds_to_raw_activations(run, tmp_path):
    """Neuronpedia steers by strength x vector in the residual stream."""
    neuronpedia.export_dashboard(run, tmp_path / "out")
    sae, lm = ksparse.load(run.path), LM(acts=run.recipe().acts)
    from ksparse.interop.text_activations import read_activations

    raw = read_activations(lm, "held-out", 4096)
    size = (raw - raw.mean(1, keepdim=True)).norm(dim=1).mean()
    for feature in json.loads((tmp_path / "out" / "batch-0.json").read_text())["features"]:
        torch.testing.assert_close(
            torch.tensor(feature["vector"]),
            size * sae.W_dec[feature["feature_index"]].detach(),
            atol=2e-6 * max(1, size.item()),
            rtol=1e-5,
        )


def test_logits_of_a_direction_are_those_of_adding_it_before_a_linear_end(tiny_lm):
    """With a final norm that is made linear, adding a direction to the last residual adds its logits."""
    lm = LM(str(tiny_lm("gpt2")), site="resid_post.2")
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    x = torch.randn(16, generator=torch.Generator().manual_seed(1))
    norm, head = lm.model.transformer.ln_f, lm.model.lm_head
    small = 1e-4 * direction
    deviation = x.var(unbiased=False).add(norm.eps).sqrt()
    changed = (head(norm((x + small).double().float())) - head(norm(x))) / 1e-4 * deviation
    lines = read_head(lm).project(torch.eye(16)) @ read_head(lm).unembedding.float().T
    matrix = lines.T
    normalised = (x - x.mean()) / deviation
    along = (direction @ normalised / 16) * (
        matrix @ normalised
    )  # what the norm's own change of scale takes away
    torch.testing.assert_close(
        matrix @ direction - along,
        changed,
        atol=0.05 * (matrix @ direction).abs().max().item(),
        rtol=0,
    )


SCHEMA = json.loads((Path(__file__).parent / "neuronpedia_schema.json").read_text())
"""Facts of Neuronpedia's database, by bench/peers/clients_neuronpedia.py --facts."""
TABLES = {
    "release": "SourceRelease",
    "model": "Model",
    "sourceset": "SourceSet",
    "source": "Source",
    "features": "Neuron",
    "activations": "Activation",
    "explanations": "Explanation",
}
"""The files of the bulk import, in the order in which they are imported."""
TYPES = {
    "text": str,
    "boolean": bool,
    "integer": int,
    "double precision": (int, float),
    "timestamp without time zone": str,
    "int4": int,
    "float8": (int, float),
    "Visibility": str,
}


def check_row(table, row, known):
    """Assert what Postgres and Prisma would: known columns, types, required values, references."""
    columns = SCHEMA[table]["columns"]
    assert set(row) <= set(columns), f"{table} has no column {set(row) - set(columns)}"
    for name, (kind, *rules) in columns.items():
        value = row.get(name)
        assert name in row or "required" not in rules, f"{table}.{name} is missing"
        assert value is not None or name not in row or "not null" not in rules, f"{table}.{name}"
        if value is not None:
            items = value if kind.endswith("[]") else [value]
            assert all(isinstance(item, TYPES[kind.removesuffix("[]")]) for item in items), name
    for names, (other, keys) in SCHEMA[table]["references"].items():
        values = tuple(row.get(name) for name in names.split())
        if None not in values:
            assert (tuple(keys.split()), values) in known[other], f"{table}.{names} -> {other}"


def test_each_row_of_the_bulk_folder_is_one_that_neuronpedias_database_takes(run, tmp_path):
    names = {"model": "tiny", "set": "test", "release": "rel", "creator": "me"}
    count = neuronpedia.export_bulk(
        run, tmp_path / "out", neuronpedia.Publication(**names, repository="me/tiny")
    )
    home = tmp_path / "out" / "tiny" / "1-test"
    assert {file.name.partition(".")[0] for file in home.iterdir()} == set(TABLES)
    known = {table: set() for table in [*TABLES.values(), "User", "ExplanationType"]}
    known["User"] = {(("id",), (neuronpedia.DEFAULT_CREATOR_ID,))}
    keys = {
        (other, tuple(columns.split()))
        for table in TABLES.values()
        for other, columns in SCHEMA[table]["references"].values()
    }
    rows = {}
    for kind, table in TABLES.items():
        files = [home / f"{kind}.jsonl"]
        if not files[0].exists():
            files = sorted((home / kind).glob("*.jsonl.gz"))
        rows[kind] = []
        for file in files:
            text = file.read_bytes()
            text = gzip.decompress(text) if file.suffix == ".gz" else text
            rows[kind] += [json.loads(line) for line in text.splitlines()]
        for row in rows[kind]:
            check_row(table, row, known)
            for other, columns in keys:
                if other == table:
                    known[table].add((columns, tuple(row.get(column) for column in columns)))
    assert len(rows["features"]) == count and len(rows["explanations"]) > 0
    assert {row["visibility"] for kind in list(TABLES)[:4] for row in rows[kind]} == {"PUBLIC"}
    assert rows["source"][0]["hfRepoId"] == "me/tiny"
    assert (rows["model"][0]["layers"], rows["model"][0]["dimension"]) == (3, 16)
    assert {row["authorId"] for row in rows["explanations"]} == {neuronpedia.DEFAULT_CREATOR_ID}
    assert len({row["id"] for row in rows["activations"]}) == len(rows["activations"])
    for row in rows["activations"]:
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
    first = rows["features"][0]
    assert (first["hookName"], first["sourceSetName"]) == ("blocks.1.hook_resid_post", "test")


def read_rows(file):
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]


@pytest.fixture
def explained(run, tmp_path):
    """Return a function that writes a result of `explain` of the first live latent into a copy of the run."""

    def write(**changes):
        copy = RunFolder(shutil.copytree(run.path, tmp_path / "explained"))
        latent = LatentExamples(copy).live_latents()[0]
        row = {"latent": latent, "explanation": "names", "detection": 0.8, "fuzzing": 0.5}
        values = {
            "options": {"model": "asked"},
            "answers": {"models": {"judge": 9}},
            "tells_apart": {"detection": True, "fuzzing": False},
            "latents": [row],
        }
        copy.eval_file("explain").write_text(json.dumps(values | changes))
        return copy

    return write


def test_scores_of_explanations_are_rows_that_neuronpedias_database_takes(explained, tmp_path):
    neuronpedia.export_bulk(explained(), tmp_path / "out", neuronpedia.Publication(model="tiny"))
    home = tmp_path / "out" / "tiny" / "1-ksparse"
    [judge] = read_rows(home / "explanation_score_model.jsonl.gz")
    files = sorted((home / "explanation_scores").glob("*.jsonl.gz"))
    scores = [row for file in files for row in read_rows(file)]
    explanations = [row for file in (home / "explanations").iterdir() for row in read_rows(file)]
    known = {
        "User": {(("id",), (neuronpedia.DEFAULT_CREATOR_ID,))},
        "Explanation": {(("id",), (row["id"],)) for row in explanations},
        "ExplanationScoreModel": {(("name",), (judge["name"],))},
        # The types are theirs: names that their page of a score knows.
        "ExplanationScoreType": {
            (("name",), (name,)) for name in ("eleuther_recall", "eleuther_fuzz")
        },
    }
    check_row("ExplanationScoreModel", judge, known)
    for row in scores:
        check_row("ExplanationScore", row, known)
    # Fuzzing, by which the judge cannot tell latents apart, has no row.
    assert [(row["explanationScoreTypeName"], row["value"]) for row in scores] == [
        ("eleuther_recall", 0.8)
    ]
    assert judge["name"] == "judge"
    [text] = [row for row in explanations if row["id"] == scores[0]["explanationId"]]
    assert text["description"] == "names"


@pytest.mark.parametrize(
    "changes",
    [
        {"tells_apart": {"detection": False, "fuzzing": False}},
        {"latents": "none"},
        {"latents": [{"latent": 0, "explanation": ""}]},
    ],
)
def test_without_scores_that_say_something_no_file_of_scores_is_written(
    explained, tmp_path, changes
):
    neuronpedia.export_bulk(explained(**changes), tmp_path / "out")
    assert list((tmp_path / "out").rglob("explanations")) != []
    assert list((tmp_path / "out").rglob("explanation_score*")) == []


def test_rows_belong_to_the_user_whose_id_is_given(run, tmp_path):
    publication = neuronpedia.Publication(model="tiny", creator="me", creator_id="c1")
    neuronpedia.export_bulk(run, tmp_path / "out", publication)
    [release] = (tmp_path / "out" / "tiny" / "1-ksparse" / "release.jsonl").read_text().splitlines()
    release = json.loads(release)
    assert (release["creatorId"], release["creatorName"]) == ("c1", "me")


@pytest.mark.parametrize(
    ("site", "hook", "has_logits"),
    [
        ("transformer.h.1", "blocks.1.hook_resid_post", True),
        ("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_fc", False),
    ],
)
def test_an_sae_at_a_module_is_exported_with_logits_where_it_has_any(
    small_recipe, tmp_path, site, hook, has_logits
):
    trained = ksparse.train(small_recipe({"acts.site": site}), tmp_path / "run")
    found = ksparse.evaluate(trained, None, ["stats"], tokens=200, examples=2, device="cpu")
    runner.write_results(trained, found)
    names = neuronpedia.Publication(model="tiny", set="test", creator="me")
    neuronpedia.export_bulk(trained, tmp_path / "bulk", names)
    neuronpedia.export_dashboard(trained, tmp_path / "dashboard", names)
    file = next((tmp_path / "bulk").rglob("features/*.gz"))
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    features = json.loads((tmp_path / "dashboard" / "batch-0.json").read_text())["features"]
    assert {row["hookName"] for row in rows} == {hook}
    for row in [*rows, *features]:
        for end in ("pos_str", "pos_values", "neg_str", "neg_values"):
            assert len(row[end]) == 10 * has_logits, end
        assert bool(row["logits_hist_data_bar_heights"]) is has_logits


def test_what_is_missing_is_named(run, small_recipe, tmp_path):
    from ksparse.config import to_toml

    empty = RunFolder(tmp_path / "empty")
    empty.path.mkdir()
    empty.recipe_file.write_text(to_toml(small_recipe()))
    with pytest.raises(
        InputError, match="has no result of `stats`; run `ksparse eval .*empty stats`"
    ):
        openai_viewer.export(empty, tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(InputError, match="full already exists and is not empty; give a new folder"):
        openai_viewer.export(run, tmp_path / "full")


def test_the_command_writes_all_three(run, tmp_path, capsys):
    from ksparse import cli

    for kind, file in (
        ("atoms", "atoms"),
        ("sae_dashboard", "batch-0.json"),
        ("neuronpedia", "tiny"),
    ):
        cli.main(["convert", str(run.path), str(tmp_path / kind), "--to", kind, "--model", "tiny"])
        assert (tmp_path / kind / file).exists() and "latents" in capsys.readouterr().out
