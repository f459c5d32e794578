"""Report, viewer and export in a headless Chromium: they work, say nothing on the console, ask nobody else, and hostile text is text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ksparse import viewer
from ksparse.report.tokens import safe_token
from ksparse.storage.run_folder import RunFolder

from .conftest import TOKEN, Browser, serving


def at(port: int, path: str = "#/") -> str:
    """Return the address of a page as the command prints it, with the token."""
    return f"http://127.0.0.1:{port}/?token={TOKEN}{path}"


@pytest.fixture(scope="module")
def loudest(trained) -> int:
    """Return the latent with the largest effect that also fires often."""
    stats = load_file(trained.arrays_file("stats"))
    return int(stats["density"].argmax())


# ---- the viewer --------------------------------------------------------------------------------------------------


def test_a_click_widens_an_example_to_its_context_and_more_shows_more(
    browser: Browser, served: int, trained: RunFolder, loudest: int
):
    browser.open(at(served, f"#/latent/{loudest}"))
    button = browser.find(".widen")
    short = browser.text(".texts-list .text")
    browser.find(".texts-list .text").click()
    browser.find(".texts-list .text.whole")
    whole = browser.text(".texts-list .text.whole")
    stats = load_file(trained.arrays_file("stats"))
    tokens = stats["contexts"][stats["top_context"][loudest, 0]]
    vocabulary = json.loads(trained.eval_file("vocabulary").read_text())
    assert len(whole) > len(short) and short.strip("¶ ") in whole
    peak = vocabulary[tokens[stats["top_position"][loudest, 0]]]
    assert browser.js("return document.querySelector('.whole mark').textContent") == safe_token(
        peak
    )
    button.click()
    assert browser.text(".texts-list .text") == short
    shown = "return document.querySelector('.texts-list').children.length"
    assert browser.js(shown) == 5
    browser.find(".more").click()
    assert browser.js(shown) == int((stats["top_context"][loudest] >= 0).sum()) == 8


def test_direct_logits_are_on_the_page_and_in_the_table(
    browser: Browser, served: int, trained: RunFolder, loudest: int
):
    stats = load_file(trained.arrays_file("stats"))
    vocabulary = json.loads(trained.eval_file("vocabulary").read_text())
    browser.open(at(served, f"#/latent/{loudest}"))
    browser.find(".logit-histogram")
    shown = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    for end, word in (("up", "raises"), ("down", "lowers")):
        tokens = [safe_token(vocabulary[i]) for i in stats[f"logits_{end}_token"][loudest]]
        assert browser.js(shown, f".logits.{word} bdi") == [f'"{token}"' for token in tokens]
    browser.open(at(served, "#/latents"))
    browser.until("return document.querySelector('td.words .pair')")
    shown = "return document.querySelector('tbody th a.to').innerText"
    first, cell = int(browser.js(shown)), "return document.querySelector('td.words').innerText"
    token = safe_token(vocabulary[stats["logits_up_token"][first, 0]])
    assert browser.js(cell).startswith(f'"{token.rstrip()}')


def test_search_open_follow_steer_star_and_reload_keep_their_state(
    browser: Browser, run: RunFolder
):
    with serving(run) as port:
        browser.open(at(port))
        assert len(browser.driver.find_elements("css selector", "tbody tr")) == 50 or browser.find(
            "tbody tr"
        )
        browser.press("/")
        browser.js("return document.activeElement").send_keys(
            "def area(self):\n"
        )  # search by text, through the LM
        link = browser.find("#hits-text .list a.to")
        first = int(link.text)
        link.click()
        browser.title(f"Latent {first} ·")
        near = browser.find(
            "section.panel:nth-last-of-type(2) .list a.to, .panel .list a.to"
        )  # follow a neighbour
        number = int(near.text)
        near.click()
        browser.title(f"Latent {number} ·")
        browser.press("s")  # star it
        browser.find("#star[aria-pressed=true]")
        browser.press("e")
        browser.js("return document.activeElement").send_keys("things of area\n")
        browser.until(
            "return fetch('data/labels.json', { headers: { Authorization: `Bearer ${ksparse.token}` } }).then((r) => r.json()).then((t) => JSON.stringify(t).includes('things of area'))"
        )
        browser.find(".latent-head .button").click()  # steer with it
        text = browser.find("#text")
        text.clear()
        text.send_keys("def area(self, width):")
        value = browser.find(".times")
        value.clear()
        value.send_keys("2.5")
        browser.find("#steer").click()
        browser.find("#predictions tbody tr")
        before = browser.text("#predictions"), browser.text("#continuations")
        assert "KL of the next prediction" in browser.text("#effect")
        browser.driver.refresh()
        browser.find("#predictions tbody tr")
        assert (browser.text("#predictions"), browser.text("#continuations")) == before
        browser.open(at(port, f"#/latent/{number}"))
        browser.find("#star[aria-pressed=true]")
        assert browser.js("return document.querySelector('#label').value") == "things of area"
        browser.open(at(port, "#/latents?own=1"))
        browser.until("return document.querySelectorAll('tbody tr').length == 1")
        browser.until("return document.querySelector('tbody .own')?.innerText == 'things of area'")
        assert "★" in browser.text("tbody")
        browser.open(at(port, "#/search?q=things"))
        assert browser.find("#hits-labels a.to").text == str(number)
        browser.until(
            "return document.querySelector('#hits-text').hasChildNodes() && !document.querySelector('[role=status]')"
        )
    assert json.loads((run.path / "labels.json").read_text())["latents"] == {
        str(number): {"label": "things of area", "star": True}
    }


def test_every_page_can_be_reached_by_keys(browser: Browser, served: int):
    browser.open(at(served, "#/latent/7"))
    browser.title("Latent 7 ·")
    for key, words in (
        ("j", "Latent 8 ·"),
        ("k", "Latent 7 ·"),
        ("k", "Latent 6 ·"),
        ("m", "map"),
        ("p", "scatter"),
        ("l", "latents"),
        ("r", "Latent "),
        ("t", "try it"),
    ):
        browser.press(key)
        browser.title(words)
    browser.press("?")
    assert browser.js("return document.querySelector('#keys').open")
    browser.js("return document.activeElement").send_keys("\ue00c")
    browser.press("l")
    browser.title("latents")
    browser.find("tbody tr")
    browser.js("document.activeElement.blur()")
    browser.press("\t")
    assert browser.js("return document.activeElement.id") == "skip"


def test_the_table_is_sorted_filtered_and_linked(browser: Browser, served: int, trained: RunFolder):
    density = load_file(trained.arrays_file("stats"))["density"]
    browser.open(at(served, "#/latents?sort=density"))
    browser.until(
        "return document.querySelector('[aria-sort=descending]')?.innerText.startsWith('Density')"
    )
    shown = [
        int(text)
        for text in browser.js(
            "return [...document.querySelectorAll('tbody a.to')].map((a) => a.innerText)"
        )
    ]
    assert shown == np.argsort(-density, kind="stable")[:50].tolist()
    browser.find("thead [aria-sort] button").click()
    browser.until("return document.querySelector('[aria-sort=ascending]')")
    assert "up=1" in browser.driver.current_url
    browser.open(at(served, "#/latents?density=1..5"))
    browser.until("return document.querySelector('.tally')?.innerText.includes(' of ')")
    assert (
        browser.text(".tally")
        == f"{((density >= 0.01) & (density <= 0.05)).sum()} of {len(density)} latents"
    )
    browser.find("input[name='density least']").clear()
    browser.find("input[name='density least']").send_keys("2\n")
    browser.until("return location.hash.includes('density=2..5')")
    browser.until(
        "return document.querySelector('.tally').innerText == arguments[0]",
        f"{((density >= 0.02) & (density <= 0.05)).sum()} of {len(density)} latents",
    )


@pytest.mark.parametrize("name", ["stats", "n2g", "ablation", "probes"])
def test_a_run_that_lacks_an_evaluation_opens_and_names_the_command(
    browser: Browser, run: RunFolder, loudest: int, name: str
):
    for file in run.eval_file(name).parent.glob(f"{name}.*"):
        file.unlink()
    with serving(run) as port:
        for path in ("#/", f"#/latent/{loudest}"):
            browser.open("about:blank")
            browser.open(at(port, path))
            browser.until(
                "return document.querySelector('.missing')?.innerText.includes(arguments[0])",
                f"ksparse eval tiny {name}",
            )
        browser.open(at(port, "#/map"))
        browser.find("canvas")


def test_missing_pages_and_bad_requests_are_explained(browser: Browser, served: int):
    for path, words in (
        ("#/latent/99999", "There is no latent 99999"),
        ("#/latent/x<b>", "There is no latent"),
        ("#/nowhere", "There is no such page"),
        ("#/try?text=" + "x%20" * 2000, "tokens; at most"),
    ):
        browser.open("about:blank")
        browser.open(at(served, path))
        browser.until(
            "return document.querySelector('main .missing')?.innerText.includes(arguments[0])",
            words,
        )
    assert "400" in browser.heard()[0]  # the browser itself writes of a refused request


def test_the_token_leaves_the_address_and_serves_reloads_other_tabs_and_the_report(
    browser: Browser, served: int
):
    browser.open(at(served, "#/latent/7"))
    browser.title("Latent 7 ·")
    assert browser.js("return location.href") == f"http://127.0.0.1:{served}/#/latent/7"
    browser.driver.refresh()
    browser.title("Latent 7 ·")
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    browser.open(f"http://127.0.0.1:{served}/#/latent/9")
    browser.title("Latent 9 ·")
    browser.find("#report").click()
    browser.title("report")
    browser.driver.close()
    browser.driver.switch_to.window(first)


def test_a_page_without_the_token_says_where_it_is(browser: Browser, served: int):
    browser.open(f"http://127.0.0.1:{served}/?token=of-another-start#/latent/7")
    browser.until(
        "return document.querySelector('main .missing')?.innerText.includes('open the address that `ksparse view` printed')"
    )
    assert "403" in browser.heard()[0]
    browser.open(at(served, "#/latent/7"))
    browser.title("Latent 7 ·")


# ---- the export --------------------------------------------------------------------------------------------------


def test_the_export_works_from_the_disk(
    browser: Browser, trained: RunFolder, tmp_path: Path, loudest: int
):
    page = viewer.export(trained, tmp_path / "site").as_uri()
    browser.open(page)
    browser.find("tbody tr a.to")
    browser.until("return document.querySelector('td.words .pair')")
    browser.until("return document.querySelector('td.example mark')")
    browser.open(f"{page}#/latent/{loudest}")
    browser.title(f"Latent {loudest} ·")
    assert browser.find(".texts-list mark") and browser.find(".panel .list a.to")
    browser.press("s")
    browser.open("about:blank")
    browser.open(f"{page}#/latent/{loudest}")
    browser.find("#star[aria-pressed=true]")
    for path, words in (
        ("#/try", "needs the LM"),
        ("#/search?q=is_a_list", "ksparse view"),
        ("#/map", "Map"),
        ("#/latents?sort=f1", "F1 ↓"),
    ):
        browser.open(f"{page}{path}")
        browser.until(
            "return document.querySelector('main').innerText.includes(arguments[0])", words
        )
    assert browser.find("#report").is_displayed()
    browser.js("localStorage.clear()")


# ---- the report --------------------------------------------------------------------------------------------------


def test_the_report_opens_in_light_dark_narrow_and_print(browser: Browser, trained: RunFolder):
    browser.open(trained.report_file.as_uri())
    for width, features in (
        (1280, {"prefers-color-scheme": "light"}),
        (1280, {"prefers-color-scheme": "dark"}),
        (390, {"prefers-color-scheme": "light"}),
    ):
        browser.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": name, "value": value} for name, value in features.items()]},
        )
        assert (
            browser.js("return document.documentElement.scrollWidth") <= width
        )  # nothing sticks out
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.js("return getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_figures_of_the_report_show_their_values_on_hover(browser: Browser, trained: RunFolder):
    browser.open(trained.report_file.as_uri())
    spots = browser.js(
        "return [...document.querySelectorAll('figure svg .spot')].map((s) => [s.querySelector('title').textContent, s.getBoundingClientRect().width])"
    )
    assert len(spots) > 20 and all(words and width > 0 for words, width in spots)
