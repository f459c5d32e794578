"""A small trained and evaluated run, its server, and a headless Chromium; tests that need what is not installed say so and are skipped."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ksparse.config import Recipe, from_dict
from ksparse.storage.run_folder import RunFolder, open_run

N, TOKEN = 192, "a-token_of-tests"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run on the built-in LM with all that pages of latents show, its report written."""
    import torch

    from ksparse import report
    from ksparse.config.evaluation import EvalConfig
    from ksparse.evals import runner
    from ksparse.sae.serialization import load
    from ksparse.training.train import train

    folder = tmp_path_factory.mktemp("viewer") / "tiny"
    torch.set_num_threads(1)
    suite = folder.parent / "suite"
    suite.mkdir()
    rows = [
        {"text": f"x{i} = [{i}, {i + 1}]" if i % 2 else f"def f{i}(self):", "label": i % 2}
        for i in range(80)
    ]
    (suite / "is_a_list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [
        file.read_text(encoding="utf-8")[:4_000]
        for file in sorted(Path(json.__file__).parents[1].glob("*.py"))
    ]
    (suite.parent / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    run = train(recipe(suite.parent / "texts.jsonl"), folder)
    options = EvalConfig(
        tokens=2_000,
        per_document=100,
        examples=8,
        device="cpu",
        suite=str(suite),
        latents=40,
        n2g_examples=4,
        ngram_tokens=2_000,
        ablation_positions=4,
        ablation_latents=64,
        ablation_horizon=6,
    )
    sae = load(run.path)
    runner.write_results(
        run, runner.evaluate(sae, None, ("stats", "n2g", "ablation", "probes"), options)
    )
    report.write(run)
    return run


def recipe(text: Path) -> Recipe:
    """Return a run of 60 steps on the built-in LM."""
    table: dict[str, Any] = dataclasses.asdict(Recipe())
    table["acts"] |= {
        "lm": "pylm/0.3m",
        "site": "resid_post.2",
        "text": str(text),
        "context": 64,
        "mix": 2_048,
        "lm_batch": 16,
    }
    table["sae"] |= {"n_latents": N, "k": 8}
    table["run"] |= {"device": "cpu", "kernels": "torch", "log_every": 5, "save_every": 100}
    return from_dict(table | {"tokens": 60 * 256, "batch": 256, "threads": 1})


@pytest.fixture
def run(trained: RunFolder, tmp_path: Path) -> RunFolder:
    """Return a copy of the trained run that a test may change."""
    return open_run(shutil.copytree(trained.path, tmp_path / "tiny"))


# ---- the server --------------------------------------------------------------------------------------------------


@contextmanager
def serving(*runs: RunFolder) -> Iterator[int]:
    """Serve runs from another thread, with TOKEN; yield the port. The server must have had no error of its own."""
    from ksparse.viewer import server

    listener = server.listen(0)
    made, noted, errors = server.make_server(runs, TOKEN), logging.Handler(logging.ERROR), []
    noted.emit = lambda record: errors.append(logging.Formatter().format(record))
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addHandler(noted)
    thread = threading.Thread(target=made.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        made.should_exit = True
        thread.join(60)
        listener.close()
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).removeHandler(noted)
        assert not thread.is_alive()
        assert errors == []


@pytest.fixture(scope="session")
def served(trained: RunFolder) -> Iterator[int]:
    """Return the port at which the trained run is served."""
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    pytest.importorskip("starlette", reason="the extra `serve` is not installed")
    with serving(trained) as port:
        yield port


# ---- the browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """Return a headless Chromium, or skip."""
    pytest.importorskip("selenium", reason="selenium is not installed: pip install 'ksparse[test]'")
    programs = (
        next(
            (
                name
                for name in ("chromium", "chromium-browser", "google-chrome")
                if shutil.which(name)
            ),
            None,
        ),
        shutil.which("chromedriver"),
    )
    if not all(programs):
        pytest.skip(
            "no Chromium with its chromedriver here (Debian: apt-get install chromium chromium-driver)"
        )
    browser = Browser(*programs)
    try:
        yield browser
    finally:
        browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """Return the browser as a fresh visitor; after the test, its console must be clean and every request must have stayed here."""
    chromium.begin()
    yield chromium
    chromium.check()


class Browser:
    """Chromium with the few words that tests need."""

    def __init__(self, program: str, chromedriver: str):
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        options = Options()
        options.binary_location = shutil.which(program)
        for flag in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1280,900",
            "--disable-background-networking",
            "--force-prefers-reduced-motion",
        ):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(chromedriver))
        self.driver.set_script_timeout(60)
        self.allowed: set[str] = set()

    def begin(self) -> None:
        self.driver.get("about:blank")
        self.drain()

    def open(self, address: str) -> None:
        """Go to a page of 127.0.0.1 or of the disk."""
        self.driver.get(address)

    def drain(self) -> tuple[list[str], list[str]]:
        """Return what the console said and what was requested since the last time."""
        said = [entry["message"] for entry in self.driver.get_log("browser")]
        events = [
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        ]
        asked = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return said, asked

    def heard(self, seconds: float = 30.0) -> list[str]:
        """Wait until the console says something, and return that."""
        end = time.monotonic() + seconds
        while not (said := self.drain()[0]):
            assert time.monotonic() < end, f"the console said nothing in {seconds:g} s"
            time.sleep(0.05)
        return said

    def check(self) -> None:
        said, asked = self.drain()
        assert said == []
        places = {(urlsplit(url).scheme, urlsplit(url).hostname) for url in asked}
        assert places <= {
            ("http", "127.0.0.1"),
            ("file", None),
            ("data", None),
            ("blob", None),
            ("about", None),
        }, places

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, *arguments: Any, seconds: float = 30) -> Any:
        """Wait until a script's value is true, and return it."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, poll_frequency=0.02).until(
            lambda driver: driver.execute_script(script, *arguments), f"never true: {script}"
        )

    def find(self, selector: str) -> Any:
        self.until("return !!document.querySelector(arguments[0])", selector)
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str = "main") -> str:
        return self.js("return document.querySelector(arguments[0]).innerText", selector)

    def press(self, keys: str) -> None:
        self.driver.find_element("css selector", "body").send_keys(keys)

    def title(self, words: str) -> None:
        self.until("return document.title.includes(arguments[0])", words)
