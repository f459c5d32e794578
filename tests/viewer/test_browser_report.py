"""The report in a headless Chromium: its order, contents that stay in sight, folded latents, links into the viewer."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksparse import viewer
from ksparse.storage.run_folder import RunFolder

from .conftest import TOKEN, Browser
from .test_browser_start import resize

BOX = (
    "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
    "return [box.left, box.top, box.right, box.bottom]"
)


@pytest.fixture(autouse=True)
def restore(browser: Browser):
    yield
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def test_the_three_numbers_and_the_first_finding_are_on_the_first_screen(
    browser: Browser, trained: RunFolder
):
    resize(browser, 1280)
    browser.open(trained.report_file.as_uri())
    numbers = browser.js("return document.querySelectorAll('.headline .big').length")
    assert numbers == 2  # the loss was not measured
    for part in (".headline", ".claims li"):
        assert 0 < browser.js(BOX, part)[3] <= 900, part


@pytest.mark.parametrize("width", [1280, 420])
def test_the_contents_stay_in_sight_and_lead_to_each_section(
    browser: Browser, trained: RunFolder, width: int
):
    resize(browser, width)
    browser.open(trained.report_file.as_uri())
    browser.js("document.documentElement.style.scrollBehavior = 'auto'")
    anchors = browser.js("return [...document.querySelectorAll('.contents a')].map((a) => a.hash)")
    assert len(anchors) == 9
    for anchor in anchors:
        browser.js("location.hash = arguments[0]", anchor)
        _, top, _, _ = browser.js(BOX, f"{anchor} h2")
        _, _, _, bottom_of_contents = browser.js(BOX, ".contents")
        assert top < 900 and (width > 1000 or top >= bottom_of_contents), anchor
        assert browser.js(BOX, ".contents")[1] >= 0
    assert browser.js("return scrollY") > 1000


def test_three_latents_are_open_and_a_link_opens_a_folded_one(browser: Browser, trained: RunFolder):
    browser.open(trained.report_file.as_uri())
    shown = browser.js(
        "return [...document.querySelectorAll('article')].map((card) => card.checkVisibility())"
    )
    assert shown[:3] == [True] * 3 and not any(shown[3:])
    folded = browser.js("return [...document.querySelectorAll('article')][5].id")
    browser.js("location.hash = arguments[0]", f"#{folded}")
    browser.until("return document.getElementById(arguments[0]).checkVisibility()", folded)


def test_all_numbers_are_shown_on_demand(browser: Browser, trained: RunFolder):
    browser.open(trained.report_file.as_uri())
    table = "return document.querySelector('.all-numbers table').checkVisibility()"
    assert not browser.js(table)
    browser.find(".all-numbers summary").click()
    assert browser.js(table)


def test_a_file_names_the_command_and_the_viewers_copy_links_to_the_latent(
    browser: Browser, trained: RunFolder, served: int, tmp_path: Path
):
    browser.open(trained.report_file.as_uri())
    number = browser.js("return document.querySelector('article').id").removeprefix("latent-")
    command = browser.find(".to-viewer code")
    assert command.is_displayed() and command.text == f"ksparse view tiny --latent {number}"
    assert not browser.find(".in-viewer").is_displayed()
    site = viewer.export(trained, tmp_path / "site").parent / "report.html"
    for address in (site.as_uri(), f"http://127.0.0.1:{served}/report.html?token={TOKEN}"):
        if address.startswith("http"):  # the page keeps the token of an address once opened
            browser.open(f"http://127.0.0.1:{served}/?token={TOKEN}")
            browser.find("tbody tr")
        browser.open(address)
        assert not browser.find(".to-viewer code").is_displayed()
        browser.find(".in-viewer").click()
        browser.title(f"Latent {number} ·")
        browser.find(".texts-list mark")


@pytest.mark.parametrize("width", [1280, 420])
def test_no_command_is_cut_and_no_figure_leaves_half_a_row_empty(
    browser: Browser, trained: RunFolder, width: int
):
    resize(browser, width)
    browser.open(trained.report_file.as_uri())
    cut = browser.js(
        "return [...document.querySelectorAll('.wrapped, p code')].filter((code) =>"
        "code.checkVisibility() && code.scrollWidth > code.clientWidth + 1 && code.clientWidth)"
        ".map((code) => code.textContent)"
    )
    assert cut == []
    rows = browser.js(
        "return [...document.querySelectorAll('.figures')].map((grid) => {"
        "const last = grid.lastElementChild.getBoundingClientRect();"
        "return [grid.getBoundingClientRect().right, last.right]; })"
    )
    assert rows and all(abs(grid - last) < 2 for grid, last in rows)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_points_of_the_scatter_are_seen(browser: Browser, trained: RunFolder, scheme: str):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.open(trained.report_file.as_uri())
    opacity = browser.js(
        "const figure = [...document.querySelectorAll('figure')].find((f) =>"
        "f.textContent.includes('Precision and recall'));"
        "return Math.min(...[...figure.querySelectorAll('use')].map((use) => {"
        "const style = getComputedStyle(use);"
        "return style.fillOpacity * style.opacity; }))"
    )
    assert opacity >= 0.5
