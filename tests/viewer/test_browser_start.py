"""The start page in a headless Chromium: search with suggestions, latents worth a look, columns, boxes with one command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ksparse import viewer
from ksparse.report.tokens import safe_token
from ksparse.storage.atomic import sha256
from ksparse.storage.jsonio import write_json
from ksparse.storage.run_folder import RunFolder

from .conftest import Browser, serving
from .test_browser import at

TEXTS = "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)"
DEFAULT = ["Latent", "Label or direct logits", "Example", "Density", "Max ↓"]


@pytest.fixture(scope="module")
def site(trained: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of the trained run's pages on the disk."""
    return viewer.export(trained, tmp_path_factory.mktemp("site")).as_uri()


@pytest.fixture(autouse=True)
def forget(browser: Browser):
    """Leave no choice of columns to the next test."""
    yield
    browser.js("try { localStorage.clear() } catch {}")


def resize(browser: Browser, width: int, height: int = 900) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def delete(run: RunFolder, *names: str) -> None:
    for name in names:
        for file in run.eval_file(name).parent.glob(f"{name}[.-]*"):
            file.unlink()


# ---- search --------------------------------------------------------------------------------------


def test_the_start_page_says_what_it_shows_and_has_one_search_field(browser: Browser, site: str):
    browser.open(site)
    browser.find(".hero #search")
    said = browser.text(".hero .summary")
    for words in ("192 latents", "8 of them active", "15,360 activations", "pylm/0.3m"):
        assert words in said
    assert "resid_post.2" in said
    assert browser.js("return document.querySelectorAll('input[type=search]').length") == 1
    browser.press("m")
    browser.find(".bar #search")
    browser.press("/")
    assert browser.js("return document.activeElement.id") == "search"


def test_each_example_query_finds_something(browser: Browser, site: str):
    browser.open(site)
    browser.find(".queries a")
    queries = browser.js(TEXTS, ".queries a")
    assert len(queries) == 3 and "is_a_list" in queries
    for place, query in enumerate(queries, 1):
        browser.open("about:blank")
        browser.open(site)
        browser.find(".queries a")
        browser.js(f"document.querySelectorAll('.queries a')[{place - 1}].click()")
        browser.find("#hits-tokens a.to, #hits-tasks a.to")
        assert query in browser.text("main")


def test_typing_suggests_tokens_tasks_labels_and_numbers(browser: Browser, site: str):
    browser.open(f"{site}#/latent/5")
    browser.find("#label").send_keys("list-like\n")
    browser.until("return ksparse.labels.of(5).label === 'list-like'")
    browser.find(".brand").click()
    field = browser.find(".hero #search")
    field.send_keys("list")
    browser.until(f"return ({TEXTS[7:]}).length >= 2", "#suggestions li")
    kinds = dict(text.split("\n") for text in browser.js(TEXTS, "#suggestions li"))
    assert kinds["list-like"] == "your label of 5" and kinds["is_a_list"] == "probe task"
    assert field.get_attribute("aria-expanded") == "true"
    field.send_keys("\ue015")  # arrow down: the first
    active = browser.js("return document.querySelector('[aria-selected=true] bdi').innerText")
    assert active == "list-like"
    field.send_keys("\n")
    browser.title("Latent 5 ·")
    assert not browser.find("#suggestions").is_displayed()
    browser.press("/")
    browser.js("return document.activeElement").send_keys("12")
    browser.until(f"return ({TEXTS[7:]})[0]?.startsWith('Latent 12')", "#suggestions li")
    browser.find("#suggestions li").click()
    browser.title("Latent 12 ·")


def test_suggested_tokens_are_tokens_of_the_run(browser: Browser, site: str):
    browser.open(site)
    query = browser.find(".queries a:last-child").text
    browser.find(".hero #search").send_keys(query[:3])
    browser.until("return !!document.querySelector('#suggestions li .aside')")
    tokens = browser.js(
        "return ksparse.load('tokens').then(({ strings }) => strings.map(ksparse.bareToken))"
    )
    shown = [text.split("\n") for text in browser.js(TEXTS, "#suggestions li")]
    words = [entry[0] for entry in shown if entry[-1] == "token"]
    assert words and set(words) <= set(tokens) and all(query[:3] in word for word in words)


def test_enter_searches_what_was_typed_and_escape_closes_the_suggestions(
    browser: Browser, site: str
):
    browser.open(site)
    field = browser.find(".hero #search")
    field.send_keys("is_a")
    browser.until("return !!document.querySelector('#suggestions li')")
    field.send_keys("\ue00c")
    assert not browser.find("#suggestions").is_displayed()
    assert field.get_attribute("value") == "is_a"
    browser.press("/")
    browser.js("return document.activeElement").send_keys("is_a_list\n")
    browser.until("return location.hash === '#/search?q=is_a_list'")


# ---- latents worth a look ------------------------------------------------------------------------


def test_latents_worth_a_look_are_the_first_by_their_numbers(
    browser: Browser, site: str, trained: RunFolder
):
    files = {name: load_file(trained.arrays_file(name)) for name in ("stats", "n2g", "ablation")}
    browser.open(site)
    browser.find(".worth-lists")
    lists = {
        title: [int(number) for number in numbers]
        for title, numbers in browser.js(
            "return [...document.querySelectorAll('.worth-lists section')].map((s) =>"
            "[s.querySelector('h3').innerText, [...s.querySelectorAll('a.to')].map((a) => a.innerText)])"
        )
    }
    f1 = np.nan_to_num(files["n2g"]["f1"])
    assert lists["Best explained"][0] == files["n2g"]["scored"][f1.argmax()]
    effect = np.nansum(files["ablation"]["kl"], 1)
    assert lists["Strongest effect"][0] == files["ablation"]["latent"][effect.argmax()]
    stats = files["stats"]
    live, elsewhere = stats["density"] > 0, 1 - stats["on_share"].sum(1)
    strong = stats["max_act"] >= np.quantile(stats["max_act"][live], 0.75)
    rare = stats["density"] <= stats["density"].mean()
    best = np.where(live & strong & rare, elsewhere, -1)
    assert lists["Most surprising"] == np.argsort(-best, kind="stable")[:3].tolist()
    browser.find(".worth-lists a[href*='sort=f1']").click()
    browser.until("return document.querySelector('[aria-sort=descending]')?.innerText == 'F1 ↓'")
    assert not browser.js("return document.querySelector('.worth')")


# ---- the table -----------------------------------------------------------------------------------


def test_the_table_has_five_columns_and_others_on_demand_which_are_remembered(
    browser: Browser, site: str, trained: RunFolder
):
    browser.open(site)
    browser.find("tbody tr")
    assert browser.js(TEXTS, "thead th") == DEFAULT
    browser.find("#columns summary").click()
    browser.find("#columns input[name=f1]").click()
    browser.until(f"return ({TEXTS[7:]}).includes('F1')", "thead th")
    assert browser.js("return document.querySelector('#columns').open")
    browser.open("about:blank")
    browser.open(site)
    browser.find("tbody tr")
    assert browser.js(TEXTS, "thead th") == [*DEFAULT, "F1"]
    browser.find("#columns summary").click()
    browser.find("#columns button").click()
    browser.until(f"return ({TEXTS[7:]}).length === 5", "thead th")
    browser.open(f"{site}#/latents?sort=gain")  # what rows are sorted by is shown
    browser.until(f"return ({TEXTS[7:]}).includes('Task gain ↓')", "thead th")


def test_each_shown_column_has_a_line_that_says_what_it_is(browser: Browser, site: str):
    browser.open(site)
    browser.find(".legend")
    named = browser.js(TEXTS, ".legend dt")
    assert named[:-1] == [name.removesuffix(" ↓") for name in DEFAULT[1:]]
    legend = browser.text(".legend")
    assert "Share of tokens on which it fires, on held-out text." in legend
    assert "· a space, ↵ a line break" in legend


def test_an_example_has_its_strongest_token_marked_on_every_page_of_the_table(
    browser: Browser, site: str, trained: RunFolder
):
    stats = load_file(trained.arrays_file("stats"))
    vocabulary = json.loads(trained.eval_file("vocabulary").read_text())
    for path in ("", "#/latents?page=2"):
        browser.open("about:blank")
        browser.open(f"{site}{path}")
        browser.until(
            "return document.querySelectorAll('tbody tr').length > 0 &&"
            "[...document.querySelectorAll('td.example')].every((td) => td.hasChildNodes())"
        )
        shown = browser.js(
            "return [...document.querySelectorAll('tbody tr')].map((row) =>"
            "[Number(row.querySelector('a.to').innerText), row.querySelector('mark')?.textContent])"
        )
        assert len(shown) == 50
        for latent, mark in shown:
            context = stats["top_context"][latent, 0]
            if context < 0:
                assert mark is None
                continue
            token = stats["contexts"][context, stats["top_position"][latent, 0]]
            assert mark == safe_token(vocabulary[token])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_words_and_example_are_seen_without_scrolling_sideways(
    browser: Browser, site: str, scheme: str
):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    resize(browser, 420)
    try:
        browser.open(site)
        browser.find("td.example mark")
        assert browser.js("return document.documentElement.scrollWidth") <= 420
        for cell in ("td.words.words", "td.example", "td.num", ".hero #search"):
            left, right = browser.js(
                "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
                "return [box.left, box.right]",
                cell,
            )
            assert 0 <= left < right <= 420, cell
        assert browser.find("thead button").is_displayed()  # rows can still be sorted
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# ---- what is missing -----------------------------------------------------------------------------


def test_a_run_that_was_not_evaluated_has_one_box_and_one_command(
    browser: Browser, run: RunFolder, tmp_path: Path
):
    delete(run, "stats", "n2g", "ablation", "probes", "downstream", "vocabulary")
    page = viewer.export(run, tmp_path / "site").as_uri()
    for path in ("", "#/latents", "#/latent/5"):
        browser.open("about:blank")
        browser.open(f"{page}{path}")
        browser.find(".missing")
        assert browser.js("return document.querySelectorAll('.missing').length") == 1, path
        assert "has not been evaluated yet" in browser.text(".missing")
        assert browser.text(".missing code") == "ksparse eval tiny"
    browser.find(".panel .list a.to")  # the nearest latents are there without it
    browser.open(f"{page}#/")
    browser.find(".missing")
    assert not browser.js("return document.querySelector('table')")


def test_evaluations_that_are_missing_share_one_box(
    browser: Browser, run: RunFolder, tmp_path: Path
):
    delete(run, "n2g", "ablation")
    page = viewer.export(run, tmp_path / "site").as_uri()
    for path in ("", "#/latent/5"):
        browser.open("about:blank")
        browser.open(f"{page}{path}")
        browser.find(".missing")
        assert browser.js("return document.querySelectorAll('.missing').length") == 1
        assert browser.text(".missing code") == "ksparse eval tiny n2g ablation"


def test_a_command_can_be_copied(browser: Browser, run: RunFolder):
    delete(run, "n2g")
    with serving(run) as port:
        browser.open(at(port))
        origin = f"http://127.0.0.1:{port}"
        permissions = {"origin": origin, "permissions": ["clipboardReadWrite"]}
        browser.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
        button = browser.find(".missing .copy")
        button.click()
        browser.until("return document.querySelector('.missing .copy').innerText == 'Copied'")
        copied = browser.driver.execute_async_script(
            "const done = arguments[0]; navigator.clipboard.readText().then(done, (e) => done(String(e)))"
        )
        assert copied == "ksparse eval tiny n2g"


def test_a_latent_that_never_fires_has_one_box_with_the_command_for_more_text(
    browser: Browser, run: RunFolder, tmp_path: Path
):
    file = run.arrays_file("stats")
    arrays = load_file(file)
    arrays["density"][5] = 0
    save_file(arrays, file)
    result = run.eval("stats") | {"arrays_sha256": sha256(file)}
    write_json(run.eval_file("stats"), result, sealed=True)
    browser.open(f"{viewer.export(run, tmp_path / 'site').as_uri()}#/latent/5")
    browser.find(".texts .missing")
    assert "never fires on held-out text" in browser.text(".texts")
    assert browser.text(".texts code") == "ksparse eval tiny stats --tokens 20000"


def test_a_search_in_an_export_says_what_was_not_found_and_how_to_search_by_text(
    browser: Browser, site: str
):
    browser.open(f"{site}#/search?q=zzzz")
    browser.find("#hits-text .missing")
    assert browser.js("return document.querySelectorAll('main .missing').length") == 1
    assert "No label or token or probe task of this run matches “zzzz”" in browser.text(
        "#hits-text"
    )
    assert browser.text("#hits-text code") == "ksparse view tiny"
    browser.open("about:blank")
    browser.open(f"{site}#/search?q=is_a_list")
    browser.find("#hits-tasks a.to")
    browser.until(
        "return document.querySelector('#hits-text code')?.innerText === 'ksparse view tiny'"
    )
    assert not browser.js("return document.querySelector('main .missing')")
