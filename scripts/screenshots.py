"""Screenshots of a run's pages: wide and narrow, light and dark.

    python scripts/screenshots.py RUN OUT [--pages start latent …] [--latent N]

Those of the README and the site, which must be small, are of the demo's run:

    python scripts/screenshots.py runs/demo docs/pictures --pages start latent --latent 3087 \\
        --widths wide --schemes light --tallest 1000 --colours 64

Starts `ksparse view RUN`, opens each page in a headless Chromium, waits until nothing changes any
more, and writes OUT/PAGE-WIDTH-SCHEME.png. Prints what the browser's console said, and pages that
are wider than their window. Needs the extra `test`, Chromium and its chromedriver.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

PAGES = {
    "start": "#/",
    "latent": "#/latent/{latent}",
    "try": "#/try",
    "map": "#/map",
    "scatter": "#/scatter",
    "report": "report.html",
}
WIDTHS = {"wide": 1280, "narrow": 420}
SCHEMES = ("light", "dark")
HEIGHT, TALLEST = 900, 2_600
"""Of the window, and of a picture at most, in pixels."""
QUIET, PATIENCE = 1.2, 120.0
"""Seconds without a change after which a page is done, and to wait for that."""
STATE = """
const waits = [...document.querySelectorAll("main [role=status], main .note")]
  .some((note) => note.textContent.trim().endsWith("…"));
const begun = !document.querySelector("main > noscript");
return [waits || !begun ? "waiting" : document.readyState, document.documentElement.innerHTML.length,
  performance.getEntriesByType("resource").length, performance.getEntriesByType("mark").length];
"""


@contextmanager
def served(run: Path) -> Iterator[str]:
    """Serve a run; yield its address, with the token."""
    command = [sys.executable, "-m", "ksparse", "view", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        address = re.search(r"http://\S+", said)
        if not address:
            raise SystemExit(f"{' '.join(command)} did not start: {said}")
        yield address[0]
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a headless Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    driver = shutil.which("chromedriver")
    if not program or not driver:
        raise SystemExit(
            "install Chromium and its driver: apt-get install chromium chromium-driver"
        )
    options = Options()
    options.binary_location = program
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--force-prefers-reduced-motion",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


def wait_until_quiet(browser: Any) -> None:
    """Wait until the page and what it has loaded have not changed for a while."""
    end = time.monotonic() + PATIENCE
    before, since = None, time.monotonic()
    while time.monotonic() < end:
        now = browser.execute_script(STATE)
        if now != before:
            before, since = now, time.monotonic()
        elif now[0] == "complete" and time.monotonic() - since > QUIET:
            return
        time.sleep(0.1)
    print(f"{browser.current_url} still changes after {PATIENCE:g} s", file=sys.stderr)


def shoot(
    browser: Any, address: str, width: int, scheme: str, file: Path, tallest: int = TALLEST
) -> None:
    """Write a picture of a page, from its top, as tall as it is up to `tallest`."""
    size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    scheme_of_page = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_of_page)
    browser.get("about:blank")
    browser.get(address)
    wait_until_quiet(browser)
    tall, over = browser.execute_script(
        "const page = document.documentElement;"
        "return [page.scrollHeight, page.scrollWidth - innerWidth]"
    )
    # Beyond the window, so that what is sized by the window's height stays as it is.
    clip = {"x": 0, "y": 0, "width": width, "height": min(tallest, tall), "scale": 1}
    picture = browser.execute_cdp_cmd(
        "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
    )
    file.write_bytes(base64.b64decode(picture["data"]))
    said = [entry["message"] for entry in browser.get_log("browser")]
    print(file, *said, *([f"wider than the window by {over}"] if over > 0 else []), flush=True)


def reduce(file: Path, colours: int) -> None:
    """Write a picture again with a palette of so many colours."""
    from PIL import Image

    with Image.open(file) as picture:
        small = picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    small.save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pages", nargs="+", choices=list(PAGES), default=list(PAGES))
    parser.add_argument("--latent", type=int, help="default: the first of the table")
    parser.add_argument("--widths", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--tallest", type=int, default=TALLEST, help="pixels of a picture at most")
    parser.add_argument("--colours", type=int, help="reduce pictures to this many; default: all")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with served(asked.run) as address, chromium() as browser:
        browser.get(address)
        wait_until_quiet(browser)
        first = browser.execute_script("return ksparse.run.first.latents[0]")
        latent = first if asked.latent is None else asked.latent
        base, token = urlsplit(address)._replace(query="").geturl(), urlsplit(address).query
        for page in asked.pages:
            route = PAGES[page].format(latent=latent)
            place = f"{base}?{token}{route}" if route.startswith("#") else f"{base}{route}?{token}"
            if page == "report" and not (asked.run / route).is_file():
                print(f"no {route} in {asked.run}: `ksparse report {asked.run}` writes it")
                continue
            for name, scheme in itertools.product(asked.widths, asked.schemes):
                file = asked.out / f"{page}-{name}-{scheme}.png"
                shoot(browser, place, WIDTHS[name], scheme, file, asked.tallest)
                if asked.colours:
                    reduce(file, asked.colours)


if __name__ == "__main__":
    main()
