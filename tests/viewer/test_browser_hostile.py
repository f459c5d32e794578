"""Hostile text on every page of the viewer, served and exported, and in the report: it is only text.

Every name, token, label, explanation, task, path and address is hostile. Nothing of it becomes an
element, an attribute or a request; no script of it runs; nothing asks another host.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ksparse import report, viewer
from ksparse.report.tokens import safe_text, safe_token
from ksparse.storage import checksums
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer import layouts
from ksparse.viewer.weights import Decoder

from ..report.conftest import DEAD, RESULTS, WORDS, build
from ..report.conftest import N as MADE
from ..report.test_page import HOSTILE
from .conftest import Browser, serving
from .test_browser import at

NAME = (
    '"><img src=x onerror=alert(1)>\u202e<script>alert(1)<\u2215script>'  # which a folder can have
)
ELEMENTS = set(
    """
    html head meta title link script style body a header form input nav button main noscript
    dialog h1 h2 h3 h4 h5 dl dt dd div kbd p section article span ol ul li data table thead
    tbody tr th td details summary pre code figure figcaption strong b mark bdi br label
    fieldset legend select option textarea canvas svg g path defs use rect circle line text
    clipPath tspan
    """.split()
)
"""The elements of our pages."""
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
WATCH = """
window.seen = [];
window.written = [];
addEventListener("securitypolicyviolation", (event) => seen.push(`${event.blockedURI} blocked`));
addEventListener("error", (event) => seen.push(`error: ${event.message}`));
for (const name of ["alert", "confirm", "prompt", "open", "print", "eval"]) {
  window[name] = () => { seen.push(name); };
}
const fillText = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
  written.push(text);
  return fillText.call(this, text, ...rest);
};
"""
SETTLED = """
const waits = [...document.querySelectorAll("main [role=status], main .note")]
  .some((note) => note.textContent.trim().endsWith("…"));
const now = [location.href, document.body.innerHTML.length,
  performance.getEntriesByType("resource").length].join(" ");
if (now !== window.stateBefore) [window.stateBefore, window.since] = [now, performance.now()];
const begun = !document.querySelector("main > noscript");
return begun && !waits && document.readyState === "complete" &&
  performance.now() - window.since > 250;
"""


# ---- a run all of whose strings are hostile ------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["first", "last"],
)
def hostile(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[RunFolder, list[str]]:
    """Return a run all of whose strings are hostile, and the strings of its tokens."""
    payloads = HOSTILE[-len(WORDS) :] if request.param else HOSTILE[: len(WORDS)]
    whole = "".join(payloads)
    in_recipe = whole[:100_000].encode("utf-8", "replace").decode().replace("\x00", "")
    run = build(
        tmp_path_factory.mktemp("hostile") / NAME,
        vocabulary=payloads,
        changes={f"acts.{key}": in_recipe for key in ("lm", "text", "site")},
        environment={
            "versions": {whole: whole},
            "platform": whole,
            "processor": whole,
            "gpus": [whole],
            "threads": 2,
        },
    )
    task = dict(zip([*payloads, whole], RESULTS["probes"]["tasks"].values()))
    for name, result in RESULTS.items():
        run.eval_file(name).write_text(
            json.dumps(
                result
                | {"text": whole, "notes": [whole], "policy": {whole: whole}}
                | ({"tasks": task, "suite": whole} if name == "probes" else {})
            )
        )
    add_counts(run)
    add_explanations(run, payloads)
    add_weights(run, payloads, whole)
    (run.path / "labels.json").write_text(
        json.dumps(
            {
                "format": 1,
                "latents": {
                    "3": {"label": whole[:5_000], "star": True},
                    whole[:50]: {"label": 5},
                    "4": {"label": ["x"]},
                },
            }
        )
    )
    report.write(run)
    return run, payloads


def add_counts(run: RunFolder) -> None:
    """Add what newer results have to a made-up one."""
    file, random = run.eval_file("stats").with_suffix(".safetensors"), np.random.default_rng(1)
    arrays: dict[str, Any] = load_file(file)
    shape = (MADE, 8)
    arrays |= {
        "histogram": random.integers(0, 50, (MADE, 20)).astype(np.int32),
        "on_token": np.arange(MADE * 8, dtype=np.int32).reshape(shape) % len(WORDS),
        "on_share": np.full(shape, 0.125, np.float32),
        **{
            f"logits_{end}_token": np.arange(MADE * 8, dtype=np.int32).reshape(shape) % len(WORDS)
            for end in ("up", "down")
        },
        "logits_up_value": np.full(shape, 2, np.float32),
        "logits_down_value": np.full(shape, -2, np.float32),
        "logits_histogram": random.integers(0, 50, (MADE, 32)).astype(np.int32),
        "together_latent": random.integers(0, MADE, shape).astype(np.int32),
        "together_phi": np.full(shape, 0.5, np.float32),
        "together_count": np.full(shape, 9, np.int32),
        **{
            f"band_{name}": arrays[f"top_{name}"]
            for name in ("context", "position", "value", "acts")
        },
    }
    save_file(arrays, file)
    ablation = run.eval_file("ablation").with_suffix(".safetensors")
    arrays = load_file(ablation)
    m = len(arrays["latent"])
    arrays |= {
        "context_tokens": (np.arange(m * 40, dtype=np.int32) % len(WORDS)).reshape(m, 40),
        "position": np.full(m, 12, np.int32),
        "value": np.ones(m, np.float32),
        "kl": random.random((m, 16)).astype(np.float32),
        "loss_difference": random.random((m, 16)).astype(np.float32),
    }
    save_file(arrays, ablation)
    run.eval_file("stats").write_text(
        json.dumps(
            json.loads(run.eval_file("stats").read_text()) | {"bands": {"count": 4, "each": 2}}
        )
    )


def add_explanations(run: RunFolder, payloads: list[str]) -> None:
    """Add explanations in words, by a model that is not to be trusted."""
    rows = [
        {"latent": i, "explanation": payload[:5_000], "detection": 0.5, "fuzzing": payload[:9]}
        for i, payload in enumerate(payloads)
    ]
    run.eval_file("explain").write_text(json.dumps({"name": "explain", "latents": rows}))


def add_weights(run: RunFolder, payloads: list[str], whole: str) -> None:
    """Add a decoder, and a map with regions that fire on hostile tokens."""
    random, group = np.random.default_rng(2), np.arange(MADE) % 5
    with checksums.checksummed_dir(run.checkpoint(50)) as tmp:
        save_file({"W_dec": random.random((MADE, 8), np.float32)}, tmp / "sae.safetensors")
    angle = 2 * np.pi * group / 5
    places = np.stack([np.cos(angle), np.sin(angle)], 1) + random.random((MADE, 2)) / 5
    made = {"n_neighbors": whole[:3_000], "min_dist": [whole[:3_000]], whole[:500]: whole[:500]}
    layout = layouts.Layout(places.astype(np.float32), made)
    layouts.write(run, layout, Decoder(run).identity())
    file = run.eval_file("stats").with_suffix(".safetensors")
    arrays = {key: np.array(value) for key, value in load_file(file).items()}
    for name in ("on_token", "logits_up_token"):
        arrays[name][:, 0] = 3 * group  # five tokens, of which each is a region's name
    arrays["on_share"][:] = [0.65] + [0.05] * 7
    save_file(arrays, file)


# ---- every page ----------------------------------------------------------------------------------


@pytest.fixture
def watching(browser: Browser) -> Iterator[Browser]:
    """Return the browser; pages note what scripts of others would do, and canvases what they show."""
    command = "Page.addScriptToEvaluateOnNewDocument"
    script = browser.driver.execute_cdp_cmd(command, {"source": WATCH})
    yield browser
    browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def assert_inert(browser: Browser, *shown: str) -> None:
    """Check that a page has none but our elements, no handlers, and these texts as texts."""
    found = browser.js(
        "return [...document.querySelectorAll('*')].map((e) => "
        "[e.localName, e.getAttributeNames(), e.src || e.getAttribute('href') || ''])"
    )
    assert {name for name, _, _ in found} <= ELEMENTS
    assert not [
        names
        for _, names, _ in found
        if any(name.startswith("on") or name == "srcset" for name in names)
    ]
    link = re.compile(
        r"#|data:,|(http://127\.0\.0\.1:\d+|file://)/|report\.html|index\.html#/latent/\d+$|"
        r"(ksparse-[0-9a-f]{16}/)?[a-z]+\.(css|js)$|$"
    )
    assert not [place for _, _, place in found if not link.match(place)]
    text = browser.js("return document.body.textContent")
    assert not UNSEEN.search(text) and len(text) < 1_000_000
    missing = [each for each in shown if each not in text]
    assert not missing, missing


def assert_nothing_ran(browser: Browser) -> None:
    """Check that no script of a string ran or was blocked, and that no canvas shows what is unseen."""
    assert browser.js("return window.seen") == []
    written = browser.js("return window.written")
    assert not [text for text in written if UNSEEN.search(text) or len(text) > 60]
    asked = browser.js("return performance.getEntriesByType('resource').map((e) => e.name)")
    home = browser.js("return location.origin")
    assert all(url.startswith((f"{home}/", "data:", "blob:", "file:")) for url in asked), asked


def open_page(browser: Browser, address: str) -> None:
    """Open a page and wait until nothing changes any more, so that no request is cut off."""
    browser.open("about:blank")
    browser.open(address)
    browser.until(SETTLED)


PAGES = (
    "#/",
    "#/latents",
    "#/latents?own=1",
    "#/latents?sort=density&up=1",
    "#/latent/{live}",
    "#/latent/3",
    "#/latent/{dead}",
    "#/map",
    "#/map?layout=pca&names=raises",
    "#/scatter",
    "#/try",
    "#/search?q=script",
    "#/search?q=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E",
)
"""Every page, and below every parameter with a hostile value."""
PARAMETERS = (
    "{}",
    "latent/{}",
    "latents?sort={}&page={}&density={}&selection={}",
    "map?layout={}&colour={}&names={}&selection={}",
    "scatter?x={}&y={}&colour={}",
    "try?text={}&latent={}&value={}&at={}&where={}",
    "search?q={}",
)
ADDRESSES = ("<script>alert(1)</script>", "\u202e\x00\"'><img src=x onerror=alert(1)>", "x" * 9_000)


def is_refused(message: str) -> bool:
    """Return whether the console only says that the LM, which is not there, could not be asked."""
    return "/api/" in message and "400" in message


@pytest.mark.parametrize("where", ["viewer", "export"])
def test_hostile_text_is_text_on_every_page_of(
    watching: Browser, hostile: tuple[RunFolder, list[str]], where: str, tmp_path: Path
):
    run, payloads = hostile
    tokens = [safe_token(payload) for payload in payloads]
    live = next(i for i in range(MADE) if i not in DEAD)

    def look(base: str) -> None:
        for path in PAGES:
            open_page(watching, base + path.format(live=live, dead=DEAD[0]))
            assert_inert(watching)
            assert_nothing_ran(watching)
            said = watching.drain()[0]
            assert all(map(is_refused, said)), (path, said)
        look_at_map(base)
        open_page(watching, f"{base}#/latents?own=1")
        assert_inert(watching, "⟨U+202E⟩evil" if "\u202eevil" in payloads else "{{ 7 * 7 }}")
        open_page(watching, f"{base}#/")
        assert_inert(watching, safe_text(run.name))
        strings = watching.js(
            "return Promise.all([...Array(arguments[0]).keys()].map((i) => ksparse.latent(i)))"
            ".then((all) => all.flatMap((l) => l.strings))",
            MADE,
        )
        assert set(tokens) <= set(strings)

    def look_at_map(base: str) -> None:
        from selenium.webdriver import ActionChains

        open_page(watching, f"{base}#/map")
        written = watching.js("return window.written")
        names = {(token.strip() or token)[:20] for token in tokens}
        assert any(text[:20] in names for text in written), written
        canvas = watching.find("canvas.map")
        watching.find(".map-regions summary").click()
        moves = ActionChains(watching.driver, duration=5)
        for x in range(-240, 241, 60):
            for y in range(-180, 181, 60):
                moves.move_to_element_with_offset(canvas, x, y)
        moves.perform()
        watching.find(".map-regions button").click()
        for _ in range(6):
            canvas.send_keys("+")
        watching.until(SETTLED)
        assert_inert(watching)
        assert_nothing_ran(watching)

    if where == "export":
        look(viewer.export(run, tmp_path / "site").as_uri())
    else:
        with serving(run) as port:
            look(at(port, ""))


def test_a_hostile_address_is_only_an_address(
    watching: Browser, hostile: tuple[RunFolder, list[str]]
):
    run, _ = hostile
    with serving(run) as port:
        for parameters in PARAMETERS:
            for text in ADDRESSES:
                path = parameters.replace("{}", quote(text, safe=""))
                open_page(watching, at(port, f"#/{path}"))
                assert_inert(watching)
                assert_nothing_ran(watching)
                said = watching.drain()[0]
                assert all(map(is_refused, said)), (parameters, said)


def test_hostile_text_is_text_in_report(watching: Browser, hostile: tuple[RunFolder, list[str]]):
    run, payloads = hostile
    open_page(watching, run.report_file.as_uri())
    assert_inert(
        watching,
        safe_text(run.name),
        *(safe_token(payload) for payload in payloads if payload.isprintable()),
    )
    assert_nothing_ran(watching)
