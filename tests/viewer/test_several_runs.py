"""Several runs in one viewer: each has its own resources, labels and SAE; a latent's nearest in another run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ksparse.errors import InputError
from ksparse.storage.atomic import sha256
from ksparse.storage.jsonio import read_table, write_json
from ksparse.storage.run_folder import RunFolder, open_run

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from ksparse.viewer.runs import Runs, name_runs  # noqa: E402

from .conftest import TOKEN, Browser, N, serving  # noqa: E402
from .test_server import ask, viewing  # noqa: E402

SHIFT = 5
ODD = "a?b#c%41 <b>d"  # a folder's name that an address and a page must escape
QUOTED = "a%3Fb%23c%2541%20%3Cb%3Ed"


def shift(run: RunFolder, folder: Path) -> RunFolder:
    """Copy a run, with latent i as latent i + SHIFT of the copy."""
    copy = open_run(shutil.copytree(run.path, folder))
    checkpoint = copy.checkpoints()[-1]
    file, manifest = checkpoint / "sae.safetensors", checkpoint / "manifest.json"
    with safe_open(file, framework="np") as tensors:
        metadata = tensors.metadata()
    arrays = {
        name: np.roll(array, SHIFT, axis=0).copy() if array.shape[:1] == (N,) else array
        for name, array in load_file(file).items()
    }
    save_file(arrays, file, metadata)
    table = read_table(manifest)
    table["sha256"][file.name] = sha256(file)
    write_json(manifest, table, sealed=True)
    return copy


@pytest.fixture
def pair(run: RunFolder, tmp_path: Path) -> tuple[RunFolder, RunFolder]:
    return run, shift(run, tmp_path / ODD)


def get(port: int, path: str) -> dict:
    status, _, body = ask(port, path)
    assert status == 200, body
    return json.loads(body)


# ---- resources -----------------------------------------------------------------------------------


def test_each_run_has_its_own_resources_labels_and_report(pair):
    (pair[1].path / "report.html").write_text("<!DOCTYPE html><title>the second</title>")
    with serving(*pair) as port:
        listed = get(port, "/data/runs.json")["runs"]
        assert [(each["name"], each["n"]) for each in listed] == [("tiny", N), (ODD, N)]
        assert get(port, "/data/overview.json")["name"] == "tiny"
        assert get(port, "/data/run/tiny/overview.json")["name"] == "tiny"
        assert get(port, f"/data/run/{QUOTED}/overview.json")["name"] == ODD
        body = {"run": ODD, "latent": 3, "label": "of the second", "star": False}
        assert ask(port, "/api/label", method="POST", body=body)[0] == 200
        assert get(port, "/data/run/tiny/labels.json")["latents"] == {}
        assert list(get(port, f"/data/run/{QUOTED}/labels.json")["latents"]) == ["3"]
        assert b"the second" in ask(port, f"/report.html?run={QUOTED}")[2]
        assert b"the second" not in ask(port, "/report.html")[2]
        assert (
            b"there is no run 'third' here; there are tiny, "
            in ask(port, "/report.html?run=third")[2]
        )
    assert (pair[1].path / "labels.json").exists() and not (pair[0].path / "labels.json").exists()


def test_runs_of_the_same_folder_name_are_told_apart(trained, tmp_path):
    (tmp_path / "b").mkdir()
    copy = open_run(shutil.copytree(trained.path, tmp_path / "b" / "tiny"))
    runs = Runs([trained, copy])
    assert runs.resource("run/tiny/overview")["name"] == "tiny"
    assert runs.resource("run/tiny (2)/overview")["name"] == "tiny (2)"


def test_a_text_is_read_with_the_sae_of_the_run_that_is_asked(pair):
    with serving(*pair) as port:
        answers = [
            json.loads(ask(port, "/api/activations", method="POST", body=body)[2])["latents"]
            for body in ({"text": "def f(x):", "run": name} for name in ("tiny", ODD))
        ]
    assert [[[(i + SHIFT) % N, value] for i, value in row] for row in answers[0]] == answers[1]


@pytest.mark.parametrize(
    "path",
    [
        "run/none/overview",
        "run//overview",
        "run/tiny/",
        "run/tiny",
        "run/tiny/none",
        "run/tiny/recipe.toml",
        "run/../recipe",
        "run/tiny/run/tiny/overview",
        f"run/tiny/nearest/{N}/tiny",
        "run/tiny/nearest/-1/tiny",
        "run/tiny/nearest/x/tiny",
        "run/tiny/nearest/\u0661/tiny",
        "run/tiny/nearest//tiny",
        "run/tiny/nearest/1",
        "run/tiny/nearest/1/none",
        "runs/0",
    ],
)
def test_a_path_of_no_resource_gives_none(trained, path):
    assert Runs(trained).resource(path) is None


def test_a_run_is_opened_when_it_is_first_asked_for(trained, pair):
    runs = Runs([trained, pair[1]])
    opened = lambda: [shown.resources._cached is not None for shown in runs.shown.values()]  # noqa: E731
    runs.resource("runs")
    assert opened() == [False, False]
    runs.resource(f"run/{ODD}/overview")
    assert opened() == [False, True]


def test_runs_are_named_by_their_folders_and_none_is_given_twice(tmp_path):
    folders = [tmp_path / name for name in ("a/k32", "b/k32", "b/\u202ek64", "c/k32")]
    assert name_runs([RunFolder(folder) for folder in folders]) == [
        "k32",
        "k32 (2)",
        "⟨U+202E⟩k64",
        "k32 (3)",
    ]
    with pytest.raises(InputError, match="k32 is given twice; give each run once"):
        name_runs([RunFolder(folders[0]), RunFolder(tmp_path / "b" / ".." / "a" / "k32")])


# ---- nearest -------------------------------------------------------------------------------------


def test_the_nearest_in_another_run_are_those_of_the_largest_cosine(trained, pair):
    from ksparse.sae.serialization import load

    here, there = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (load(run.path).W_dec.detach().double().numpy() for run in (trained, pair[1]))
    )
    runs = Runs([trained, pair[1]])
    for latent in (0, 7, N - 1):
        near = runs.resource(f"run/tiny/nearest/{latent}/{ODD}")["near"]
        cosines = there @ here[latent]
        expected = -np.sort(-cosines)[:12]
        assert near[0][:2] == [(latent + SHIFT) % N, pytest.approx(1, abs=1e-4)]
        assert [cosine for _, cosine, _ in near] == pytest.approx(
            expected[expected > 0].tolist(), abs=1e-4
        )
        for other, cosine, gloss in near:
            assert cosine == pytest.approx(cosines[other], abs=1e-4)
            assert (
                gloss == runs.resource(f"run/{ODD}/latents/{other}")["latents"][str(other)]["gloss"]
            )


def test_runs_that_have_no_directions_in_common_say_why(trained, pair):
    _, other = pair
    path, recipe = f"run/tiny/nearest/1/{ODD}", other.recipe_file.read_text()
    for old, new, why in (
        ('"pylm/0.3m"', '"pylm/1.9m"', "tiny is of pylm/0.3m (main), {} of pylm/1.9m (main); only"),
        ('"resid_post.2"', '"resid_post.1"', "tiny is at resid_post.2, {} at resid_post.1; only"),
    ):
        other.recipe_file.write_text(recipe.replace(old, new))
        assert Runs([trained, other]).resource(path)["why"].startswith(why.format(ODD))
    other.recipe_file.write_text(recipe)
    runs = Runs([trained, other])
    runs.get(ODD).resources.current().decoder.__dict__["_rows"] = np.ones((4, 3), np.float32)
    assert f"components, {ODD} of 3" in runs.resource(path)["why"]
    shutil.rmtree(other.path / "checkpoints")
    assert Runs([trained, other]).resource(path) == {"why": f"{ODD} has no weights to compare"}


# ---- the command ---------------------------------------------------------------------------------


def command(*words: str) -> subprocess.CompletedProcess:
    code = "import sys; from ksparse import cli; cli.main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, "view", *words], capture_output=True, text=True, timeout=120
    )


def test_the_command_shows_several_runs(pair):
    with viewing(pair[0].path, str(pair[1].path)) as (_, port, token):
        status, _, body = ask(port, "/data/runs.json", Authorization=f"Bearer {token}")
    assert [each["name"] for each in json.loads(body)["runs"]] == ["tiny", ODD]


def test_the_command_names_the_run_that_is_missing_or_given_twice(run, tmp_path):
    done = command(str(run.path), str(tmp_path / "none"), "--port", "0")
    assert done.returncode == 2 and str(tmp_path / "none") in done.stderr
    done = command(str(run.path), str(run.path), "--port", "0")
    assert done.returncode == 2 and "is given twice; give each run once" in done.stderr
    assert done.stdout == ""


def test_an_export_of_several_runs_is_a_folder_for_each(pair, tmp_path):
    done = command(str(pair[0].path), str(pair[1].path), "--export", str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == [ODD, "tiny"]
    assert all((tmp_path / "site" / name / "index.html").is_file() for name in ("tiny", ODD))
    assert done.stdout.count("pages    file://") == 2


# ---- in the browser ------------------------------------------------------------------------------


def at(port: int, path: str = "#/") -> str:
    return f"http://127.0.0.1:{port}/?token={TOKEN}{path}"


def hash_of(browser: Browser) -> str:
    return browser.js("return location.hash")


IN_ODD = f"#/run/{QUOTED}/"


def test_the_switch_shows_another_run_and_the_way_back_leads_to_the_first(
    browser: Browser, pair: tuple[RunFolder, RunFolder]
):
    with serving(*pair) as port:
        browser.open(at(port, "#/latent/7"))
        browser.title("Latent 7 · tiny")
        assert hash_of(browser) == "#/run/tiny/latent/7"
        browser.press("s")
        browser.until("return document.querySelector('#star[aria-pressed=true]')")
        browser.js("return ksparse.labels.saved")
        browser.js(
            "const run = document.querySelector('#run'); run.value = arguments[0];"
            "run.dispatchEvent(new Event('change'))",
            ODD,
        )
        browser.until("return location.hash == arguments[0]", IN_ODD)
        browser.until("return ksparse.name == arguments[0]", ODD)
        browser.js("location.hash = '#/latent/7'")  # an address without a run stays in this one
        browser.until("return location.hash == arguments[0]", f"{IN_ODD}latent/7")
        browser.find("#star[aria-pressed=false]")  # stars are of each run
        browser.driver.refresh()
        browser.find("#star[aria-pressed=false]")
        assert browser.js("return document.querySelector('#run').value") == ODD
        assert browser.js(
            "return [...document.querySelectorAll('header nav a:not(#report)')]"
            ".every((a) => a.getAttribute('href').startsWith(arguments[0]))",
            IN_ODD,
        )
        for _ in range(2):
            browser.driver.back()
        browser.title("Latent 7 · tiny")
        browser.find("#star[aria-pressed=true]")
        browser.open("about:blank")  # which ends what the page still asks for
    assert list(read_table(pair[0].path / "labels.json")["latents"]) == ["7"]
    assert not (pair[1].path / "labels.json").exists()


def test_a_latent_leads_to_its_nearest_in_the_other_run_and_both_side_by_side(
    browser: Browser, pair: tuple[RunFolder, RunFolder]
):
    latent = int(load_file(pair[0].arrays_file("stats"))["density"].argmax())
    twin = (latent + SHIFT) % N
    with serving(*pair) as port:
        browser.open(at(port, f"#/run/tiny/latent/{latent}"))
        row = browser.find(".elsewhere .row")
        assert row.text.startswith("1.00") and f"Nearest in {ODD}" in browser.text(".panels")
        assert row.find_element("css selector", "a.to").text == str(twin)
        row.find_element("css selector", "a.said").click()
        browser.title("side by side")
        halves = browser.js(
            "return [...document.querySelectorAll('.beside-part')].map((part) =>"
            "[...part.querySelectorAll('.half')].map((half) => half.innerText))"
        )
        assert len(halves) == 4 and all(len(pair_) == 2 for pair_ in halves)
        (first, second), numbers, logits, examples = halves
        assert first.startswith(f"tiny · {latent}") and second.startswith(f"{ODD} · {twin}")
        assert all("Density" in half for half in numbers)
        assert all("raises" in half and "lowers" in half for half in logits)
        assert all(examples) and "cosine of decoder directions 1.000" in browser.text("h1")
        browser.find(".half:nth-child(2) h2 a").click()
        browser.title(f"Latent {twin} · {ODD}")
        browser.open("about:blank")


def test_a_run_or_a_latent_that_is_not_there_is_said(
    browser: Browser, pair: tuple[RunFolder, RunFolder]
):
    with serving(*pair) as port:
        for path, words in (
            ("#/run/none/latent/1", "There is no run none here; there is tiny, "),
            ("#/run/%ff/", "There is no run %ff here"),
            ("#/run/tiny/beside/1/none/2", "There is no run none here"),
            (f"#/run/tiny/beside/1/tiny/{N}", f"There is no latent {N}; tiny has 0 to {N - 1}"),
            ("#/run/tiny/beside/x/tiny/1", "There is no latent x"),
        ):
            browser.open("about:blank")
            browser.open(at(port, path))
            browser.until(
                "return document.querySelector('main .missing')?.innerText.includes(arguments[0])",
                words,
            )


def test_one_run_has_no_switch_and_its_plain_links(browser: Browser, served: int):
    browser.open(at(served, "#/run/tiny/latent/7"))
    browser.title("Latent 7 · tiny")
    assert not browser.driver.find_elements("css selector", "#run")
    browser.press("j")
    browser.title("Latent 8 · tiny")
    assert hash_of(browser) == "#/latent/8"
    assert not browser.driver.find_elements("css selector", ".elsewhere")
