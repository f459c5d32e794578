"""The map and the scatter in a headless Chromium: zoom, pan, names, selection to table."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ksparse import viewer
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer import layouts
from ksparse.viewer.resources import Resources
from ksparse.viewer.weights import Decoder

from .conftest import Browser, N, serving
from .test_browser import at
from .test_maps import places_of

DRAWN = "return performance.getEntriesByName(arguments[0]).length > 0"
PICTURE = "return document.querySelector('canvas.map').toDataURL()"
RECORD_TEXTS = """
window.written = [];
const fillText = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
  window.written.push(text);
  return fillText.call(this, text, ...rest);
};
"""


@pytest.fixture(scope="module")
def places(trained: RunFolder) -> np.ndarray:
    """Return the layout by PCA, [n, 2]; NaN for dead latents."""
    return places_of(Resources(trained, 1).get("maps/pca"))


@pytest.fixture
def recording(browser: Browser) -> Iterator[Browser]:
    """Return the browser; `window.written` lists what is written on canvases."""
    command = "Page.addScriptToEvaluateOnNewDocument"
    script = browser.driver.execute_cdp_cmd(command, {"source": RECORD_TEXTS})
    yield browser
    browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def open_map(browser: Browser, address: str) -> Any:
    """Open a map; return its canvas."""
    browser.open("about:blank")
    browser.open(address)
    browser.until(DRAWN, "map")
    return browser.find("canvas.map")


def on_canvas(browser: Browser, places: np.ndarray) -> np.ndarray:
    """Return where latents are on the canvas when all are shown, from its middle, [n, 2]."""
    size = browser.js(
        "const c = document.querySelector('canvas.map');return [c.clientWidth, c.clientHeight]"
    )
    low, high = np.nanmin(places, 0), np.nanmax(places, 0)
    scale = min((size[0] - 48) / (high - low)[0], (size[1] - 48) / (high - low)[1])
    return (places - (low + high) / 2) * [scale, -scale]


def drag(browser: Browser, canvas: Any, *path: tuple[float, float], shift: bool = False) -> None:
    from selenium.webdriver import ActionChains, Keys

    chain = ActionChains(browser.driver, duration=20)
    chain.move_to_element_with_offset(canvas, *map(round, path[0]))
    if shift:
        chain.key_down(Keys.SHIFT)
    chain.click_and_hold()
    for x, y in path[1:]:
        chain.move_to_element_with_offset(canvas, round(x), round(y))
    chain.release()
    if shift:
        chain.key_up(Keys.SHIFT)
    chain.perform()


def inside(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return which points are in a polygon, by the angle that it spans around them."""
    found = []
    for point in points:
        if np.isnan(point).any():
            found.append(False)
            continue
        rays = corners - point
        angles = np.arctan2(rays[:, 1], rays[:, 0])
        steps = np.diff(np.append(angles, angles[0]))
        found.append(abs(((steps + math.pi) % (2 * math.pi) - math.pi).sum()) > math.pi)
    return np.array(found)


# ---- the map -------------------------------------------------------------------------------------


def test_a_latent_of_the_map_shows_its_gloss_and_opens(
    browser: Browser, served: int, places: np.ndarray
):
    from selenium.webdriver import ActionChains

    canvas = open_map(browser, at(served, "#/map?names=none"))
    spots, live = on_canvas(browser, places), np.flatnonzero(np.isfinite(places[:, 0]))
    apart = np.linalg.norm(spots[live, None] - spots[live], axis=-1) + 1e6 * np.eye(len(live))
    number = int(live[apart.min(1).argmax()])  # none is near it
    x, y = map(round, spots[number])
    ActionChains(browser.driver).move_to_element_with_offset(canvas, x, y).perform()
    browser.until("return document.querySelector('.map-tip:not([hidden]) .gloss')")
    assert browser.js("return document.querySelector('.map-tip a.to').textContent") == str(number)
    ActionChains(browser.driver).move_to_element_with_offset(canvas, x, y).click().perform()
    browser.title(f"Latent {number} ·")


def test_the_map_zooms_and_moves_by_wheel_buttons_keys_and_drag(browser: Browser, served: int):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    canvas = open_map(browser, at(served, "#/map"))
    canvas.send_keys("0")
    home = browser.js(PICTURE)
    wheel = ScrollOrigin.from_element(canvas, 40, 30)
    changes = (
        lambda: ActionChains(browser.driver).scroll_from_origin(wheel, 0, -240).perform(),
        lambda: browser.find("#zoom-in").click(),
        lambda: browser.find("#zoom-out").click(),
        lambda: canvas.send_keys("+"),
        lambda: canvas.send_keys("-"),
        lambda: canvas.send_keys(Keys.ARROW_RIGHT),
        lambda: drag(browser, canvas, (0, 0), (70, 50)),
    )
    for change in changes:
        change()
        browser.until(PICTURE + " !== arguments[0]", home)
        browser.find("#zoom-all").click()
        browser.until(PICTURE + " === arguments[0]", home)
    assert browser.js("return scrollY") == 0 and "#/map" in browser.driver.current_url


def test_two_fingers_zoom_the_map(browser: Browser, served: int):
    canvas = open_map(browser, at(served, "#/map"))
    home, corner = browser.js(PICTURE), canvas.location
    touch = browser.driver.execute_cdp_cmd

    def fingers(kind: str, apart: int) -> None:
        middle = (corner["x"] + canvas.size["width"] / 2, corner["y"] + canvas.size["height"] / 2)
        points = [
            {"x": middle[0] + s * apart, "y": middle[1], "id": i} for i, s in enumerate((-1, 1))
        ]
        touch(
            "Input.dispatchTouchEvent",
            {"type": kind, "touchPoints": [] if kind == "touchEnd" else points},
        )

    touch("Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 2})
    try:
        fingers("touchStart", 40)
        for apart in (60, 90, 130):
            fingers("touchMove", apart)
        fingers("touchEnd", 130)
    finally:
        touch("Emulation.setTouchEmulationEnabled", {"enabled": False})
    browser.until(PICTURE + " !== arguments[0]", home)
    assert browser.js("return visualViewport.scale") == 1  # the page itself is not zoomed


def test_a_selection_leads_to_the_table_of_its_latents_and_can_be_cleared(
    browser: Browser, served: int, places: np.ndarray
):
    canvas = open_map(browser, at(served, "#/map?names=none"))
    drag(browser, canvas, (-170, -130), (150, -120), (180, 140), (-20, 60), (-160, 150), shift=True)
    browser.find("#to-table")
    selection = browser.js(
        "return new URLSearchParams(location.hash.split('?')[1]).get('selection')"
    )
    layout, corners = selection.split(":")
    within = inside(np.array(corners.split(","), float).reshape(-1, 2), places)
    assert layout == "pca" and 0 < within.sum() < np.isfinite(places[:, 0]).sum()
    assert browser.text("#selected").startswith(f"{within.sum()} latents selected")
    browser.find("#to-table").click()
    browser.find("#selection")
    tally = "return document.querySelector('.tally').innerText == arguments[0]"
    browser.until(tally, f"{within.sum()} of {N} latents")
    shown = browser.js(
        "return [...document.querySelectorAll('tbody a.to')].map((a) => +a.innerText)"
    )
    assert set(shown) <= set(np.flatnonzero(within).tolist()) and shown
    browser.driver.refresh()
    browser.until("return document.querySelector('.tally')")
    browser.until(tally, f"{within.sum()} of {N} latents")
    browser.find("#selection a").click()  # back to the map, with the selection
    browser.find("#clear").click()
    browser.find("#in-view").click()
    alive = int(np.isfinite(places[:, 0]).sum())
    browser.until(
        "return document.querySelector('#selected').innerText.startsWith(arguments[0])",
        f"{alive} latents selected",
    )
    browser.find("#to-table").click()
    browser.until(tally, f"{alive} of {N} latents")
    browser.find("#selection button").click()
    browser.until(tally, f"{N} latents")
    assert "selection" not in browser.driver.current_url


def test_a_selection_and_a_filter_hold_together(
    browser: Browser, served: int, trained: RunFolder, places: np.ndarray
):
    density = load_file(trained.arrays_file("stats"))["density"]
    low = np.nanmin(places, 0) - 1
    middle = np.nanmedian(places, 0)
    corners = [*low, middle[0], low[1], *middle, low[0], middle[1]]
    text = "pca:" + ",".join(f"{value:.4g}" for value in corners)
    browser.open(at(served, f"#/latents?selection={text}&density=1..50"))
    middle = np.array([f"{value:.4g}" for value in middle], float)
    within = (places < middle).all(1) & (density >= 0.01) & (density <= 0.5)
    browser.until(
        "return document.querySelector('.tally')?.innerText == arguments[0]",
        f"{within.sum()} of {N} latents",
    )


@pytest.mark.parametrize("text", ["pca:1,2", "x", "nowhere:0,0,1,0,1,1", "pca:0,0,a,1,2,2", "%00:"])
def test_a_selection_that_is_none_selects_nothing(browser: Browser, served: int, text: str):
    browser.open("about:blank")
    browser.open(at(served, f"#/latents?selection={text}"))
    browser.until("return document.querySelector('.tally')?.innerText.startsWith('0 of')")
    assert browser.find("#selection button")


def test_the_map_says_how_it_is_made_and_counts_what_it_leaves_out(
    browser: Browser, served: int, places: np.ndarray, trained: RunFolder
):
    open_map(browser, at(served, "#/map"))
    words = browser.text("#how")
    assert "first two principal components" in words and "of the variance" in words
    dead = int(np.isnan(places[:, 0]).sum())
    assert (f"{dead} of {N} latents are left out" in words) == (dead > 0)
    assert "--map umap" in words


def test_regions_are_named_on_the_map_and_listed_and_a_click_goes_there(
    recording: Browser, served: int, trained: RunFolder
):
    resource = Resources(trained, 1).get("maps/pca")
    named = [region for region in resource["regions"] if region["fires"]]
    assert named, "the run has no region with a name"
    open_map(recording, at(served, "#/map"))
    written = recording.js("return window.written")
    assert named[0]["fires"][0][0] in written
    recording.find(".map-regions summary").click()
    rows = recording.driver.find_elements("css selector", ".map-regions li")
    assert len(rows) == len(named) and f'"{named[0]["fires"][0][0]}"' in rows[0].text
    home = recording.js(PICTURE)
    rows[0].find_element("css selector", "button").click()
    recording.until(PICTURE + " !== arguments[0]", home)
    recording.find("#map-names").send_keys("none")
    recording.until("return location.hash.includes('names=none')")
    assert not recording.driver.find_elements("css selector", ".map-regions")


def test_few_latents_in_view_are_named_each(recording: Browser, served: int, places: np.ndarray):
    canvas = open_map(recording, at(served, "#/map?names=none"))
    assert recording.js("return window.written.length") == 0
    for _ in range(5):
        canvas.send_keys("+")
    recording.until("return window.written.length > 0")


def test_labels_of_ones_own_are_written_on_the_map(
    recording: Browser, run: RunFolder, places: np.ndarray
):
    number = int(np.nanargmax(places[:, 0]))
    table = {"format": 1, "latents": {str(number): {"label": "mine", "star": True}}}
    (run.path / "labels.json").write_text(json.dumps(table))
    with serving(run) as port:
        open_map(recording, at(port, "#/map"))
        assert "mine" in recording.js("return window.written")


def test_a_layout_by_umap_is_shown_once_it_is_there(browser: Browser, run: RunFolder):
    layout = layouts.Layout(
        np.random.default_rng(0).random((N, 2), np.float32),
        {"n_neighbors": 15, "min_dist": 0.1, "umap_learn": "0.5"},
    )
    with serving(run) as port:
        open_map(browser, at(port, "#/map"))
        assert not browser.driver.find_elements("css selector", "#map-layout")
        layouts.write(run, layout, Decoder(run).identity())
        open_map(browser, at(port, "#/map"))
        assert "placed by UMAP" in browser.text("#how") and "15 neighbours" in browser.text("#how")
        browser.find("#map-layout").send_keys("PCA")
        browser.until("return document.querySelector('#how')?.innerText.includes('principal')")
        assert "layout=pca" in browser.driver.current_url


def test_a_run_without_weights_says_why_it_has_no_map(browser: Browser, run: RunFolder):
    shutil.rmtree(run.path / "checkpoints")
    with serving(run) as port:
        browser.open(at(port, "#/map"))
        browser.until("return document.querySelector('main').innerText.includes('no autoencoder')")


def test_the_map_of_an_export_zooms_and_selects(
    browser: Browser, trained: RunFolder, tmp_path: Path, places: np.ndarray
):
    page = viewer.export(trained, tmp_path / "site").as_uri()
    canvas = open_map(browser, f"{page}#/map?names=none")
    home = browser.js(PICTURE)
    canvas.send_keys("+")
    browser.until(PICTURE + " !== arguments[0]", home)
    browser.find("#select").click()
    drag(browser, canvas, (-170, -130), (150, -120), (180, 140), (-160, 150))
    chosen = int(browser.find("#selected strong").text.split()[0])
    browser.find("#to-table").click()
    browser.until(
        "return document.querySelector('.tally')?.innerText == arguments[0]",
        f"{chosen} of {N} latents",
    )


@pytest.mark.parametrize("page", ["map", "scatter"])
def test_it_fits_narrow_windows_in_light_and_dark(browser: Browser, served: int, page: str):
    pictures = []
    try:
        for scheme in ("light", "dark"):
            browser.driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": 420, "height": 900, "deviceScaleFactor": 2, "mobile": False},
            )
            browser.driver.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
            )
            browser.open("about:blank")
            browser.open(at(served, f"#/{page}"))
            browser.until(DRAWN, page)
            assert browser.js("return document.documentElement.scrollWidth") <= 420
            assert browser.js(
                "const c = document.querySelector('canvas');return c.width === 2 * c.clientWidth"
            )
            pictures.append(browser.js(PICTURE))
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert pictures[0] != pictures[1]


# ---- the scatter ---------------------------------------------------------------------------------


def test_the_scatter_has_ticks_units_and_opens_the_latent_that_is_clicked(
    recording: Browser, served: int, trained: RunFolder
):
    from selenium.webdriver import ActionChains

    stats = load_file(trained.arrays_file("stats"))
    recording.open(at(served, "#/scatter?x=cosine&y=max_act"))
    recording.until(DRAWN, "scatter")
    canvas = recording.find("canvas.map")
    written = recording.js("return window.written")
    assert "Enc–dec" in written
    assert any(text.startswith("Max (activation)") for text in written)
    ticks = [float(text) for text in written[: written.index("Enc–dec")]]
    assert len(ticks) >= 6 and len(set(ticks)) >= 4
    low, high = stats["cosine"].min(), stats["cosine"].max()
    across = ticks[
        : next((i for i in range(1, len(ticks)) if ticks[i] <= ticks[i - 1]), len(ticks))
    ]
    assert all(low - 1e-6 <= tick <= high + 1e-6 for tick in across)
    assert np.allclose(np.diff(across), np.diff(across)[0])  # steps are equal
    number = int(stats["cosine"].argmin())  # it stands at the left
    spot = [62 + 8 - canvas.size["width"] / 2, 0]
    moved = ActionChains(recording.driver)
    for y in range(-canvas.size["height"] // 2 + 20, canvas.size["height"] // 2 - 50, 8):
        moved.move_to_element_with_offset(canvas, round(spot[0]), y)
        moved.perform()
        shown = recording.js("return document.querySelector('.map-said a.to')?.textContent")
        if shown == str(number):
            ActionChains(recording.driver).click().perform()
            break
    recording.title(f"Latent {number} ·")
