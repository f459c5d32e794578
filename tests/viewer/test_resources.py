"""Resources: they say what the files say, stay small however many latents there are, and their strings are safe."""

from __future__ import annotations

import base64
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ksparse.errors import CorruptError
from ksparse.report.tokens import token_of
from ksparse.storage.atomic import sha256
from ksparse.storage.jsonio import write_json
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer import static_site
from ksparse.viewer.columns import COLUMNS
from ksparse.viewer.resources import Resources
from ksparse.viewer.weights import Decoder

from .conftest import N


@pytest.fixture(scope="module")
def resources(trained) -> Resources:
    return Resources(trained, 16)


@pytest.fixture(scope="module")
def files(trained):
    return {
        name: load_file(trained.arrays_file(name))
        for name in ("stats", "n2g", "ablation", "probes")
    }


def decoded(resource) -> np.ndarray:
    return np.frombuffer(base64.b64decode(resource["float32"]), "<f4")


def test_every_named_resource_exists_and_is_json_without_nan(resources):
    names = list(resources.names())
    assert len(names) == len(set(names)) and {
        "overview",
        "tasks",
        "tokens",
        "latents/0",
        f"latents/{N // 16 - 1}",
        "near/3",
        "glosses/0",
        "columns/f1",
    } <= set(names)
    for name in names:
        json.dumps(resources.get(name), allow_nan=False)


@pytest.mark.parametrize(
    "name",
    [
        "latents/12",
        "latents/-1",
        "latents/01",
        "latents/1e3",
        "latents/",
        "latents/\u0661",
        "columns/name",
        "columns/__class__",
        "../recipe.toml",
        "labels/0",
        "",
        "overview/0",
        "latents/0/0",
        "near/" + "9" * 30,
        "latents/" + "9" * 5_000,
        "latents/1\n",
    ],
)
def test_a_name_of_no_resource_gives_none(resources, name):
    assert resources.get(name) is None


def test_columns_are_the_files_numbers(resources, files):
    for key in ("density", "mean_act", "max_act", "cosine"):
        assert np.array_equal(decoded(resources.get(f"columns/{key}")), files["stats"][key])
    f1, effect = decoded(resources.get("columns/f1")), decoded(resources.get("columns/effect"))
    assert np.array_equal(f1[files["n2g"]["scored"]], files["n2g"]["f1"], equal_nan=True)
    assert np.isnan(np.delete(f1, files["n2g"]["scored"])).all()
    assert np.allclose(
        effect[files["ablation"]["latent"]],
        np.nansum(files["ablation"]["kl"].astype(float), 1),
        rtol=1e-5,
    )
    assert {column["key"] for column in resources.get("overview")["columns"]} == {
        column.key for column in COLUMNS
    } - {"detection", "found_in", "nearest", "token_rate"} | {"pca_1", "pca_2"}


def test_a_latents_examples_are_the_files_tokens_and_values(resources, files, trained):
    stats, vocabulary = files["stats"], json.loads(trained.eval_file("vocabulary").read_text())
    latent = int(stats["density"].argmax())
    resource = resources.get(f"latents/{latent // 16}")
    entry = resource["latents"][str(latent)]
    assert entry["values"]["density"] == pytest.approx(stats["density"][latent], rel=1e-4)
    for kind in ("top", "band", "random"):
        assert len(entry[kind]) == (stats[f"{kind}_context"][latent] >= 0).sum() > 0
        for example in entry[kind]:
            place = example["place"]
            context, position = (
                stats["contexts"][stats[f"{kind}_context"][latent, place]],
                stats[f"{kind}_position"][latent, place],
            )
            assert resource["strings"][example["t"][example["at"]]] == token_of(
                vocabulary, int(context[position])
            )
            assert example["a"][example["at"]] == pytest.approx(
                float(stats[f"{kind}_acts"][latent, place, 24]), rel=1e-3
            )
            window = [
                token for token in context[max(0, position - 24) : position + 9] if token >= 0
            ]
            first = example["from"]
            length = len(example["t"])
            # Only what is cut of a word at the ends is left out.
            assert len(window) / 2 <= length == len(example["a"]) <= len(window)
            assert [resource["strings"][i] for i in example["t"]] == [
                token_of(vocabulary, int(token)) for token in context[first : first + length]
            ]
    tokens = json.loads(trained.eval_file("stats").read_text())["n_tokens"]
    assert sum(entry["histogram"]) == pytest.approx(stats["density"][latent] * tokens, abs=1)
    assert [other for other, *_ in entry["together"]] == [
        int(i) for i in stats["together_latent"][latent] if i >= 0
    ]


def test_the_effect_of_a_latent_is_read_token_by_token(resources, files):
    ablation = files["ablation"]
    row = int(np.nansum(ablation["kl"], 1).argmax())
    latent = int(ablation["latent"][row])
    resource = resources.get(f"latents/{latent // 16}")
    effect = resource["latents"][str(latent)]["effect"]
    assert effect["kl"] == [
        None if np.isnan(each) else pytest.approx(float(each), rel=1e-4)
        for each in ablation["kl"][row]
    ]
    assert len(effect["up"]) == len(effect["kl"]) == 6 and all(
        change > 0 for _, change in effect["up"][0]
    )
    assert effect["at"] == min(16, ablation["position"][row])


def test_nearest_latents_are_those_of_the_largest_cosine(resources, trained):
    from ksparse.sae.serialization import load

    rows = load(trained.path).W_dec.detach().double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ rows.T
    near = resources.get("near/2")["near"]
    for latent in range(32, 48):
        expected = -np.sort(-np.delete(cosines[latent], latent))[:12]
        found = near[str(latent)]
        assert np.allclose([cosine for _, cosine, _ in found], expected[expected > 0], atol=1e-4)
        assert all(
            other != latent and cosine == pytest.approx(cosines[latent, other], abs=1e-4)
            for other, cosine, _ in found
        )


def test_the_plane_is_the_first_two_principal_components(trained):
    decoder = Decoder(trained)
    rows = decoder.rows - decoder.rows.mean(0)
    _, sizes, axes = np.linalg.svd(rows.astype(float), full_matrices=False)
    expected = rows @ axes[:2].T
    assert np.allclose(np.abs(decoder.plane), np.abs(expected), atol=1e-3 * sizes[0])
    assert np.array_equal(Decoder(trained).plane, decoder.plane)


def test_the_index_of_tokens_lists_the_latents_that_fire_on_them_most(resources, files):
    on, share = files["stats"]["on_token"], files["stats"]["on_share"]
    token = int(on[on >= 0][0])
    listed = resources.get(f"tokens/{token // 512}")["tokens"][str(token)]
    latent, place = np.nonzero(on == token)
    assert {entry[0] for entry in listed} <= set(latent.tolist()) and len(listed) == min(
        50, len(latent)
    )
    assert [entry[1] for entry in listed] == pytest.approx(
        -np.sort(-share[latent, place])[:50], rel=1e-4
    )
    there = resources.get("tokens")
    assert there["numbers"] == np.unique(on[on >= 0]).tolist() and len(there["strings"]) == len(
        there["numbers"]
    )


def test_tasks_name_their_best_latents_and_latents_their_tasks(resources, trained):
    task = resources.get("tasks")["tasks"][0]
    result = json.loads(trained.eval_file("probes").read_text())["tasks"]["is_a_list"]
    assert task["name"] == "is_a_list" and task["best"][0][0] == result["latent"]
    entry = resources.get(f"latents/{result['latent'] // 16}")["latents"][str(result["latent"])]
    assert entry["tasks"] == [{"name": "is_a_list", "place": 1, "gain": task["gain"]}]


@pytest.mark.parametrize("missing", ["stats", "n2g", "ablation", "probes"])
def test_a_run_that_lacks_an_evaluation_opens_and_names_the_command(run, missing):
    for file in run.eval_file(missing).parent.glob(f"{missing}.*"):
        file.unlink()
    resources = Resources(run, 16)
    for name in resources.names():
        json.dumps(resources.get(name), allow_nan=False)
    assert [lack["command"] for lack in resources.get("overview")["lacks"]] == [
        f"ksparse eval tiny {missing}"
    ]
    assert not {column.key for column in COLUMNS if column.eval == missing} & {
        column["key"] for column in resources.get("overview")["columns"]
    }


def test_a_recipe_alone_opens(tmp_path, trained):
    run = RunFolder(tmp_path / "bare")
    run.path.mkdir()
    run.recipe_file.write_text(trained.recipe_file.read_text())
    resources = Resources(run, 16)
    assert {name: json.dumps(resources.get(name), allow_nan=False) for name in resources.names()}
    assert len(resources.get("overview")["lacks"]) == 4


def replace_stats(run, arrays):
    """Replace the arrays of stats, and their sum in the result."""
    file = run.arrays_file("stats")
    save_file(arrays, file)
    write_json(
        run.eval_file("stats"), run.eval("stats") | {"arrays_sha256": sha256(file)}, sealed=True
    )


def test_altered_arrays_are_left_out(run, caplog):
    file = run.arrays_file("stats")
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 4
    file.write_bytes(whole)
    assert [lack["command"] for lack in Resources(run, 16).get("overview")["lacks"]] == [
        "ksparse eval tiny stats"
    ]
    assert (
        "is damaged or of another result than stats.json; ksparse eval tiny stats writes both again"
        in caplog.text
    )


def test_old_results_without_counts_open(run):
    file = run.arrays_file("stats")
    old = {
        name: array
        for name, array in load_file(file).items()
        if name.split("_")[0] not in ("band", "on", "together", "histogram")
    }
    replace_stats(run, old)
    resources = Resources(run, 16)
    entry = resources.get("latents/0")["latents"]["0"]
    assert "histogram" not in entry and "band" not in entry and "top" in entry
    assert [lack["command"] for lack in resources.get("overview")["lacks"]] == [
        "ksparse eval tiny stats"
    ]


def test_arrays_of_another_run_are_refused(run):
    file = run.arrays_file("stats")
    arrays = load_file(file)
    replace_stats(run, arrays | {"density": arrays["density"][:-1]})
    with pytest.raises(
        CorruptError,
        match="'density' has shape .191. and is not about the run's 192 latents; run the evaluation again",
    ):
        Resources(run, 16).get("overview")


def test_a_resource_of_details_does_not_grow_with_the_number_of_latents(resources):
    """One block has its latents' own details alone; the overview the first rows alone."""
    whole = sum(len(json.dumps(resources.get(f"latents/{i}"))) for i in range(N // 16))
    assert len(json.dumps(resources.get("latents/0"))) < 3 * whole / (N // 16)
    assert len(resources.get("overview")["first"]["latents"]) == 50


def test_the_static_part_needs_no_torch(trained, tmp_path):
    code = (
        f"import sys; from pathlib import Path; from ksparse import viewer; from ksparse.storage.run_folder import open_run;"
        f"viewer.export(open_run({str(trained.path)!r}), Path({str(tmp_path / 'site')!r}));"
        "loaded = {name.partition('.')[0] for name in sys.modules};"
        "assert not loaded & {'torch', 'transformers', 'starlette', 'uvicorn', 'matplotlib'}, loaded & {'torch', 'matplotlib', 'transformers'}"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
    assert (tmp_path / "site" / "index.html").is_file()


@pytest.mark.parametrize(
    "changes, text",
    [
        ({}, "held-out text"),
        ({"policy": {"split": "validation"}}, "validation text"),
        ({"policy": {"split": "train"}}, "text that it was trained on"),
        ({"text": "other.txt"}, "another text"),
    ],
)
def test_the_pages_say_which_text_the_numbers_are_of(run, changes, text):
    write_json(run.eval_file("stats"), run.eval("stats") | changes, sealed=True)
    overview = Resources(run, 16).get("overview")
    readings = {column["key"]: column["reading"] for column in overview["columns"]}
    assert overview["text"] == text
    assert readings["max_act"] == f"Largest value on {text}"
    assert readings["density"] == f"Share of tokens on which it fires, on {text}"
    page = "".join(static_site.asset(name).decode() for name in static_site.SCRIPTS)
    assert "held-out" not in page and "run.text" in page


def test_columns_are_frozen_data():
    assert dataclasses.is_dataclass(COLUMNS[0]) and len({column.key for column in COLUMNS}) == len(
        COLUMNS
    )
