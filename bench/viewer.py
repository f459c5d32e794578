"""The latent viewer in a headless Chromium: how fast it is at many latents, and how it looks.

    python bench/viewer.py times [--latents 4096 131072] [--width 768] [--rounds 20] [--export]     made-up runs: first paint, switch of latents
    python bench/viewer.py shots RUN [--out shots/]                                                 its main pages, light and dark, wide and narrow

Needs the extra `test`, Chromium and its chromedriver.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ksparse import config, viewer
from ksparse.storage import checksums, jsonio
from ksparse.storage.run_folder import RunFolder, open_run
from ksparse.viewer.resources import Resources

VOCABULARY, CONTEXTS, LENGTH, EXAMPLES, BEFORE, AFTER, HORIZON = 50_000, 2_000, 128, 8, 24, 8, 16
SWITCH = """
const [number, done] = arguments;
performance.clearMarks();
const began = performance.now();
location.hash = `#/latent/${number}`;
const shown = { text: null };
(function look() {
  if (!shown.text && performance.getEntriesByName("latent").length) shown.text = performance.now() - began;
  if (shown.text && document.querySelectorAll(".panel .list .row").length > 12) done([shown.text, performance.now() - began]);
  else requestAnimationFrame(look);
})();
"""
PAINT = """
const done = arguments[0];
(function look() {
  const table = performance.getEntriesByName("table")[0], paint = performance.getEntriesByName("first-contentful-paint")[0];
  if (table && paint) requestAnimationFrame(() => setTimeout(() => done([paint.startTime, performance.now()])));
  else requestAnimationFrame(look);
})();
"""


def browser_of_tests() -> Any:
    """Return the tests' module with the browser and the server."""
    file = Path(__file__).resolve().parents[1] / "tests" / "viewer" / "conftest.py"
    made = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location("viewer_conftest", file)
    )
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


def start(module: Any) -> Any:
    return module.Browser("chromium", shutil.which("chromedriver"))


# ---- times -------------------------------------------------------------------------------------------------------


def synthetic(folder: Path, n: int, d: int) -> RunFolder:
    """Write a run of n latents with every array that pages read, drawn at random."""
    random, run = np.random.default_rng(0), RunFolder(folder)
    (folder / "evals").mkdir(parents=True)
    run.recipe_file.write_text(
        config.to_toml(config.from_dict({"sae": {"n_latents": n, "k": 32}})), encoding="utf-8"
    )
    words = [f" w{i}" if i % 3 else f"x{i}" for i in range(VOCABULARY)]
    jsonio.write_json(run.eval_file("vocabulary"), words)
    arrays: dict[str, np.ndarray] = {
        name: random.random(n, np.float32)
        for name in ("density", "mean_act", "max_act", "cosine", "encoder_norm")
    }
    arrays["density"] **= 6
    arrays["contexts"] = random.integers(0, VOCABULARY, (CONTEXTS, LENGTH)).astype(np.int32)
    shape = (n, EXAMPLES)
    for kind in ("top", "band", "random"):
        acts = random.random((n, EXAMPLES, BEFORE + 1 + AFTER), np.float32).astype(np.float16)
        acts[acts < 0.85] = 0
        arrays |= {
            f"{kind}_context": random.integers(0, CONTEXTS, shape).astype(np.int32),
            f"{kind}_position": random.integers(0, LENGTH, shape).astype(np.int32),
            f"{kind}_value": random.random(shape, np.float32),
            f"{kind}_acts": acts,
        }
    arrays |= {
        "histogram": random.integers(0, 500, (n, 20)).astype(np.int32),
        "on_token": random.integers(0, VOCABULARY, shape).astype(np.int32),
        "on_share": -np.sort(-random.random(shape, np.float32)) / 3,
        "together_latent": random.integers(0, n, shape).astype(np.int32),
        "together_phi": -np.sort(-random.random(shape, np.float32)),
        "together_count": random.integers(2, 99, shape).astype(np.int32),
    }
    save_file(arrays, run.eval_file("stats").with_suffix(".safetensors"))
    write(
        run,
        "stats",
        {
            "window": {"before": BEFORE, "after": AFTER},
            "bands": {"count": 4, "each": 2},
            "checkpoint": 0,
        },
    )
    save_file(
        {
            "scored": np.arange(0, n, 4),
            **{
                name: random.random(len(range(0, n, 4)), np.float32)
                for name in ("f1", "precision", "recall")
            },
            "pattern_latent": np.repeat(np.arange(n, dtype=np.int32), 8),
            "pattern_start": np.arange(0, 24 * n + 1, 3, dtype=np.int32),
            "pattern_tokens": random.integers(-1, VOCABULARY, 24 * n).astype(np.int32),
            "pattern_anchored": np.zeros(8 * n, bool),
            "pattern_value": random.random(8 * n, np.float32),
            "pattern_support": random.integers(1, 9, 8 * n).astype(np.int32),
        },
        run.eval_file("n2g").with_suffix(".safetensors"),
    )
    write(run, "n2g", {})
    table = (n, HORIZON, 5)
    save_file(
        {
            "latent": np.arange(n, dtype=np.int32),
            "context_tokens": arrays["contexts"][np.arange(n) % CONTEXTS],
            "position": random.integers(1, 100, n).astype(np.int32),
            "value": random.random(n, np.float32),
            "sparsity": random.random(n, np.float32),
            "kl": random.random(table[:2], np.float32),
            "loss_difference": random.random(table[:2], np.float32),
            **{
                f"{kind}_tokens": random.integers(0, VOCABULARY, table).astype(np.int32)
                for kind in ("up", "down")
            },
            "up_values": random.random(table, np.float32),
            "down_values": -random.random(table, np.float32),
        },
        run.eval_file("ablation").with_suffix(".safetensors"),
    )
    write(run, "ablation", {})
    save_file(
        {
            "best_task": random.integers(0, 61, n).astype(np.int32),
            "best_gain": random.random(n, np.float32),
        },
        run.eval_file("probes").with_suffix(".safetensors"),
    )
    write(
        run,
        "probes",
        {
            "tasks": {
                f"task_{i}": {"latent": i, "best_latents": [{"latent": i + j} for j in range(10)]}
                for i in range(61)
            }
        },
    )
    with checksums.checksummed_dir(run.checkpoint(1)) as tmp:
        save_file(
            {"W_dec": random.standard_normal((n, d), np.float32)}, tmp / "sae.safetensors"
        )  # all that is read of it
    return run


def write(run: RunFolder, name: str, result: dict[str, Any]) -> None:
    jsonio.write_json(run.eval_file(name), {"name": name, "notes": []} | result)


def times(latents: list[int], width: int, rounds: int, export: bool) -> None:
    module, rows = browser_of_tests(), []
    browser, random = start(module), np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        for n in latents:
            run = synthetic(Path(folder) / f"n{n}", n, width)
            began = time.monotonic()
            with module.serving(run) as port:
                base = f"http://127.0.0.1:{port}/?token={module.TOKEN}"
                browser.open(base)
                browser.find("tbody tr")
                rows.append(
                    {
                        "n": n,
                        "pages": "served",
                        "start_s": round(time.monotonic() - began, 2),
                        **measure(browser, base, n, rounds, random),
                    }
                )
            if export:
                began = time.monotonic()
                page = viewer.export(run, Path(folder) / f"site{n}")
                spent = time.monotonic() - began
                rows.append(
                    {
                        "n": n,
                        "pages": "from the disk",
                        "export_s": round(spent),
                        **measure(browser, page.as_uri(), n, rounds, random),
                    }
                )
    browser.driver.quit()
    for row in rows:
        print(json.dumps(row))


def measure(
    browser: Any, page: str, n: int, rounds: int, random: np.random.Generator
) -> dict[str, float]:
    """Return medians in milliseconds: of the first paint, of the table, of a latent's own text and counts, and of its neighbours too."""
    paints, switches = [], []
    for _ in range(rounds):
        browser.open("about:blank")
        browser.driver.execute_cdp_cmd("Network.clearBrowserCache", {})
        browser.open(page)
        paints.append(browser.driver.execute_async_script(PAINT))
    for number in random.integers(0, n, rounds).tolist():
        switches.append(browser.driver.execute_async_script(SWITCH, number))
    names = ("first_paint_ms", "table_ms", "latent_ms", "latent_and_neighbours_ms")
    return {
        name: round(statistics.median(values), 1)
        for name, values in zip(names, [*zip(*paints), *zip(*switches)])
    }


# ---- shots -------------------------------------------------------------------------------------------------------


def shots(run: RunFolder, out: Path) -> None:
    """Write pictures of the main pages: NAME-SCHEME-WIDTH.png."""
    module = browser_of_tests()
    browser = start(module)
    latent = Resources(run, 1).columns.first_rows["latents"][0]
    text = "def area(self, width, height):\n    return"
    pages = {
        "latents": ("#/", "td.words .pair, td.words"),
        "latent": (f"#/latent/{latent}", ".panel .list .row"),
        "map": ("#/map", "canvas"),
        "search": ("#/search?q=self", "#hits-text .row, #hits-text .missing"),
        "try": (
            f"#/try?latent={latent}&value=1&text=" + text.replace(" ", "%20").replace("\n", "%0A"),
            "#predictions tr, .missing",
        ),
        "report": ("", "h1"),
    }
    out.mkdir(parents=True, exist_ok=True)
    with module.serving(run) as port:
        for name, (path, ready) in pages.items():
            for scheme in ("light", "dark"):
                for width in (1280, 390):
                    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
                    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                    browser.driver.execute_cdp_cmd(
                        "Emulation.setEmulatedMedia",
                        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
                    )
                    browser.open("about:blank")
                    browser.open(
                        f"http://127.0.0.1:{port}/{'' if path else 'report.html'}?token={module.TOKEN}{path}"
                    )
                    browser.find(ready)
                    time.sleep(0.4)  # for what comes after
                    height = min(2400, browser.js("return document.documentElement.scrollHeight"))
                    browser.driver.execute_cdp_cmd(
                        "Emulation.setDeviceMetricsOverride", size | {"height": height}
                    )
                    time.sleep(0.2)
                    browser.driver.save_screenshot(str(out / f"{name}-{scheme}-{width}.png"))
                    sticks = browser.js("return document.documentElement.scrollWidth - innerWidth")
                    print(
                        out / f"{name}-{scheme}-{width}.png",
                        *browser.drain()[0],
                        *([f"wider than the window by {sticks}"] if sticks > 0 else []),
                    )
    browser.driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    timing = verbs.add_parser("times")
    timing.add_argument("--latents", type=int, nargs="+", default=[4_096, 131_072])
    timing.add_argument("--width", type=int, default=768)
    timing.add_argument("--rounds", type=int, default=20)
    timing.add_argument(
        "--export",
        action="store_true",
        help="also write and open static pages: minutes at many latents",
    )
    shooting = verbs.add_parser("shots")
    shooting.add_argument("run", type=Path)
    shooting.add_argument("--out", type=Path, default=Path("shots"))
    asked = parser.parse_args()
    if asked.verb == "times":
        times(asked.latents, asked.width, asked.rounds, asked.export)
    else:
        shots(open_run(asked.run), asked.out)


if __name__ == "__main__":
    main()
