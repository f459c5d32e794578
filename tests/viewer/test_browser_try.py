"""Try it, in a headless Chromium: latents are chosen, set and steered, and both texts are in view."""

from __future__ import annotations

import json
import threading
from urllib.parse import quote

import pytest

from ksparse.viewer import live
from ksparse.viewer.live import Live, Stopped

from .conftest import TOKEN, Browser, N, serving

CHOSEN = "return [...document.querySelectorAll('.steered')].map((row) => [row.dataset.latent, row.querySelector('.times').value])"


def at(port: int, path: str) -> str:
    return f"http://127.0.0.1:{port}/?token={TOKEN}{path}"


@pytest.fixture
def page(browser: Browser, served: int) -> Browser:
    """Return the browser, whose `try_it` opens the page and waits until its text is read."""

    def try_it(query: str = "") -> None:
        browser.open("about:blank")
        browser.open(at(served, f"#/try{query}"))
        browser.find("#active .row")

    browser.try_it = try_it
    return browser


def type_into(browser: Browser, selector: str, text: str) -> None:
    field = browser.find(selector)
    field.clear()
    field.send_keys(text)


def steer(browser: Browser) -> None:
    """Press the button and wait for both texts."""
    browser.js("document.querySelector('#effect').replaceChildren()")
    browser.find("#steer").click()
    browser.find("#predictions tbody tr")


def test_an_example_text_is_there_with_its_latents(page: Browser):
    page.try_it()
    assert page.js("return document.querySelector('#text').value").startswith("def ")
    assert page.text(".tokens").startswith("def ")
    assert not page.find("#steer").is_enabled()  # until a latent is chosen


def test_latents_are_added_by_number_and_from_the_text_and_removed(page: Browser):
    page.try_it()
    type_into(page, "#add", "12\n")
    type_into(page, "#add", "3")
    page.find("#add-latent").click()
    page.find("#add").send_keys("12\n")  # once is enough
    assert page.js(CHOSEN) == [["12", "2"], ["3", "2"]]
    first = page.find("#active a.to").text
    page.find("#active .choices button:nth-child(2)").click()
    assert [latent for latent, _ in page.js(CHOSEN)] == ["12", "3", first]
    page.find(".steered[data-latent='12'] .remove").click()
    assert [latent for latent, _ in page.js(CHOSEN)] == ["3", first]
    type_into(page, "#add", f"{N}\n")
    page.until(
        "return document.querySelector('.said-aloud')?.innerText.includes(arguments[0])",
        f"There is no latent {N}; the run has 0 to {N - 1}.",
    )


def test_slider_and_number_follow_each_other_and_far_values_are_warned_about(page: Browser):
    page.try_it("?latent=7")
    slider = page.find(".slider")
    assert [slider.get_attribute(name) for name in ("min", "max", "value")] == ["-3", "3", "2"]
    slider.send_keys("\ue012" * 5)  # to the left
    assert page.js(CHOSEN) == [["7", "1.5"]]
    assert "× " in page.text(".by .said")
    type_into(page, ".times", "-2.25")
    assert abs(float(slider.get_attribute("value")) + 2.25) < 0.1
    assert not page.find(".steered .beyond").is_displayed()
    type_into(page, ".times", "4")
    assert "More than 3 times its largest activation" in page.text(".steered .beyond")


def test_both_texts_are_in_view_with_their_differences_marked(page: Browser, trained):
    text = "def area(self, width):\n    return"
    loud = Live(trained).activations(text)["latents"][-1][0][0]
    page.try_it(f"?text={quote(text)}&latent={loud}")
    type_into(page, ".times", "3")
    type_into(page, "#add", "5\n")
    type_into(page, "[data-latent='5'] .times", "-1")
    type_into(page, "#tokens", "12")
    steer(page)
    request = live.SteerRequest(text, {loud: 3.0, 5: -1.0}, tokens=12)
    expected = Live(trained).steer(request)
    for side, name in (("was", "plain"), ("held", "changed")):
        assert page.js(
            "return document.querySelector(arguments[0]).textContent", f".{side} .written"
        ) == "".join(piece for piece, _ in expected[name])
        assert page.js(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)",
            f".{side} mark.differs",
        ) == [piece for piece, differs in expected[name] if differs]
    assert page.js("return document.querySelectorAll('mark.differs').length") > 0
    titles = page.js("return [...document.querySelectorAll('.side h3')].map((e) => e.innerText)")
    assert titles == ["Without steering", "With steering"]
    assert "Where they differ is marked." in page.text("#difference")
    assert page.js(
        "const { top, bottom } = document.querySelector('#continuations').getBoundingClientRect();"
        "return scrollY == 0 && top >= 0 && bottom <= innerHeight"
    )
    shown = page.js("return document.querySelectorAll('#predictions tbody tr').length")
    assert shown == min(10, len(expected["predictions"]))


def test_the_address_keeps_what_was_steered_and_a_reload_repeats_it(page: Browser):
    page.try_it("?latent=7")
    type_into(page, "#text", "import os")
    type_into(page, "#tokens", "9")
    assert not page.find("#seed").is_enabled()  # which the likeliest tokens need not
    type_into(page, "#temperature", "1.5")
    type_into(page, "#seed", "11")
    steer(page)
    before = page.text("#continuations")
    query = page.js("return Object.fromEntries(ksparse.address().query)")
    assert query == {
        "text": "import os",
        "steer": "7:2",
        "tokens": "9",
        "temperature": "1.5",
        "seed": "11",
    }
    page.driver.refresh()
    page.find("#predictions tbody tr")
    assert page.text("#continuations") == before
    type_into(page, "#seed", "12")
    steer(page)
    assert page.text("#continuations") != before


def test_a_latent_can_be_steered_at_one_token_only(page: Browser):
    page.try_it("?latent=7&text=import%20os")
    everywhere = (steer(page), page.text("#predictions"))[1]
    page.find(".tokens button:first-child").click()
    page.until("return document.querySelector('#where option:nth-child(2)').value == '0'")
    page.js("document.querySelector('#where').selectedIndex = 1")
    steer(page)
    assert page.js("return ksparse.address().query.get('at')") == "0"
    assert page.text("#predictions") != everywhere


def test_a_latents_page_leads_here_with_the_latent_set_but_not_run(page: Browser, served: int):
    page.open(at(served, "#/latent/7"))
    button = page.find(".latent-head .button")
    assert button.text == "Steer with this latent"
    button.click()
    page.find("#active .row")
    assert page.js(CHOSEN) == [["7", "2"]]
    assert "latent 7" in page.text("#reading")
    assert not page.driver.find_elements("css selector", "#predictions")


def test_stop_and_leaving_end_a_continuation(browser: Browser, trained, monkeypatch):
    begun, ended = threading.Event(), threading.Event()

    def endless(self, request, stop):
        begun.set()
        assert stop.wait(30)
        ended.set()
        raise Stopped("nobody waits")

    monkeypatch.setattr(Live, "steer", endless)
    with serving(trained) as port:
        browser.open(at(port, "#/try?latent=7"))
        browser.find("#active .row")
        for leave in (lambda: browser.find("#stop").click(), lambda: browser.press("l")):
            begun.clear()
            ended.clear()
            browser.find("#steer").click()
            assert begun.wait(30)
            browser.js("document.activeElement.blur()")
            leave()
            assert ended.wait(30)
            if browser.js("return location.hash.startsWith('#/try')"):
                browser.until(
                    "return document.querySelector('#effect').innerText == 'Stopped.'"
                    " && document.querySelector('#stop').hidden"
                )
        browser.title("latents")


def test_an_error_of_the_server_is_one_sentence(page: Browser, served: int):
    page.try_it("?latent=7")
    page.js("document.querySelector('#text').value = arguments[0]", "x " * 2_000)
    page.find("#steer").click()
    page.until("return document.querySelector('#effect [role=alert]')")
    said = page.text("#effect")
    assert "tokens; at most" in said and "\n" not in said
    assert "400" in page.heard()[0]
    page.js("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.find("#steer").click()
    page.until(
        "return document.querySelector('#effect').innerText == arguments[0]",
        "The server of these pages does not answer. Is `ksparse view` still running?",
    )


@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_on_the_page_is_clipped_or_scrolls_inside(page: Browser, width: int):
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    try:
        page.try_it("?steer=7:2,9:-3&text=def%20area(self)%3A")
        page.find("#predictions tbody tr")
        assert page.js("return document.documentElement.scrollWidth") <= width
        assert (
            page.js(
                "return [...document.querySelectorAll('main *')].filter((e) =>"
                " /auto|scroll/.test(getComputedStyle(e).overflowY) && e.localName != 'textarea')"
                ".map((e) => e.outerHTML.slice(0, 80))"
            )
            == []
        )
        page.until(  # it may scroll there smoothly
            "const { top } = document.querySelector('#continuations').getBoundingClientRect();"
            "return top >= 0 && top < innerHeight"
        )
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_stats_multiples_are_of_what_is_known_and_this_is_said(browser: Browser, run):
    for file in run.eval_file("stats").parent.glob("stats.*"):
        file.unlink()
    with serving(run) as port:
        browser.open(at(port, "#/try?text=def%20f(x)%3A"))
        browser.find("#active .choices button:nth-child(2)").click()
        browser.find("#steer").click()
        browser.find("#predictions tbody tr")
        assert "its largest on this text." in browser.text("#effect")
    assert json.loads(run.eval_file("n2g").read_text())
