"""The latent viewer in a headless Chromium: how fast it is at many latents.

    python bench/viewer.py [--latents 4096 131072] [--width 768] [--rounds 20] [--export] [--keep DIR]

Made-up runs with every array that pages read. Medians in milliseconds: the first paint, the table,
a latent and its neighbours after a switch, the map, and the longest frame while it is zoomed and
moved. Load averages stand beside them. Needs the extra `test`, Chromium and its chromedriver.
`scripts/screenshots.py` shows how the pages look.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
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
from ksparse.storage.run_folder import RunFolder

VOCABULARY, CONTEXTS, LENGTH, EXAMPLES, BEFORE, AFTER, HORIZON = 50_000, 2_000, 128, 8, 24, 8, 16
BANDS, PER_BAND, LOGITS, LOGIT_BINS, THEMES, EXPLAINED = 4, 5, 10, 32, 60, 500
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


MAP = """
const done = arguments[0], began = performance.now();
performance.clearMarks();
location.hash = "#/map?layout=pca";
(function look() {
  if (performance.getEntriesByName("map").length) {
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
  } else requestAnimationFrame(look);
})();
"""
MOVE = """
const [steps, done] = arguments, canvas = document.querySelector("canvas.map");
const frames = [], box = canvas.getBoundingClientRect();
let step = 0, last = performance.now();
(function move() {
  const now = performance.now();
  frames.push(now - last);
  last = now;
  if (step++ === steps) return done(frames.slice(2));
  const at = { clientX: box.left + box.width * 0.4, clientY: box.top + box.height * 0.6 };
  canvas.dispatchEvent(new WheelEvent("wheel",
    { ...at, deltaY: step % 20 < 10 ? -120 : 120, bubbles: true, cancelable: true }));
  requestAnimationFrame(move);
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
    arrays["density"][random.random(n) < 0.03] = 0  # dead
    arrays["contexts"] = random.integers(0, VOCABULARY, (CONTEXTS, LENGTH)).astype(np.int32)
    # Latents of a theme write similar directions and fire on the same token most.
    theme = random.integers(0, THEMES, n)
    for kind, examples in (("top", EXAMPLES), ("band", BANDS * PER_BAND), ("random", EXAMPLES)):
        shape = (n, examples)
        acts = random.random((*shape, BEFORE + 1 + AFTER), np.float32).astype(np.float16)
        acts[acts < 0.85] = 0
        arrays |= {
            f"{kind}_context": random.integers(0, CONTEXTS, shape).astype(np.int32),
            f"{kind}_position": random.integers(0, LENGTH, shape).astype(np.int32),
            f"{kind}_value": random.random(shape, np.float32),
            f"{kind}_acts": acts,
        }
    shape = (n, EXAMPLES)
    on_token = random.integers(0, VOCABULARY, shape).astype(np.int32)
    on_token[:, 0] = np.where(random.random(n) < 0.6, theme, on_token[:, 0])
    logits = {
        name: random.integers(0, VOCABULARY, (n, LOGITS)).astype(np.int32)
        for name in ("logits_up_token", "logits_down_token")
    }
    logits["logits_up_token"][:, 0] = on_token[:, 0]
    arrays |= logits | {
        "logits_up_value": -np.sort(-random.random((n, LOGITS), np.float32)),
        "logits_down_value": np.sort(-random.random((n, LOGITS), np.float32)),
        "logits_spread": random.random(n, np.float32),
        "logits_histogram": random.integers(0, 500, (n, LOGIT_BINS)).astype(np.int32),
        "histogram": random.integers(0, 500, (n, 20)).astype(np.int32),
        "on_token": on_token,
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
            "bands": {"count": BANDS, "each": PER_BAND},
            "on_share_of": "mass",
            "direct_logits": {"blocks_left_out": 2, "capped": False},
            "policy": {"bos_token": 0, "separator_token": 0},
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
    explained = random.choice(n, min(EXPLAINED, n), replace=False).tolist()
    write(
        run,
        "explain",
        {
            "latents": [
                {"latent": i, "explanation": f"words like w{theme[i]} in lists", "detection": 0.8}
                for i in explained
            ]
        },
    )
    themes = random.standard_normal((THEMES, d), np.float32)
    with checksums.checksummed_dir(run.checkpoint(1)) as tmp:
        rows = themes[theme] + random.standard_normal((n, d), np.float32)
        save_file({"W_dec": rows}, tmp / "sae.safetensors")  # all that is read of it
    return run


def write(run: RunFolder, name: str, result: dict[str, Any]) -> None:
    jsonio.write_json(run.eval_file(name), {"name": name, "notes": []} | result)


def times(latents: list[int], width: int, rounds: int, export: bool, folder: Path) -> None:
    module, rows = browser_of_tests(), []
    browser, random = start(module), np.random.default_rng(1)
    for n in latents:
        run = RunFolder(folder / f"n{n}")
        if not run.exists():
            synthetic(run.path, n, width)
        began = time.monotonic()
        with module.serving(run) as port:
            base = f"http://127.0.0.1:{port}/?token={module.TOKEN}"
            browser.open(base)
            browser.find("tbody tr")
            spent = round(time.monotonic() - began, 2)
            figures = {"n": n, "pages": "served", "start_s": spent}
            rows.append(figures | measure(browser, base, n, rounds, random))
            print(json.dumps(rows[-1]), flush=True)
        if export:
            began = time.monotonic()
            page = viewer.export(run, folder / f"site{n}")
            figures = {
                "n": n,
                "pages": "from the disk",
                "export_s": round(time.monotonic() - began),
            }
            rows.append(figures | measure(browser, page.as_uri(), n, rounds, random))
            print(json.dumps(rows[-1]), flush=True)
    browser.driver.quit()


def busy_seconds(browser: Any) -> float:
    """Return the processor time of the page's thread so far, which other work does not change."""
    browser.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    metrics = browser.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return next(entry["value"] for entry in metrics if entry["name"] == "TaskDuration")


def measure(
    browser: Any, page: str, n: int, rounds: int, random: np.random.Generator
) -> dict[str, Any]:
    """Return medians in milliseconds: of the first paint, the table, a latent's own text and
    counts, its neighbours too, the map (the first time, and again), and of the map's frames while
    it is zoomed, with the longest, and the processor time of one; and the load averages before and
    after."""
    paints, switches, maps = [], [], []
    before = os.getloadavg()[0]
    run_js = browser.driver.execute_async_script
    for _ in range(rounds):
        browser.open("about:blank")
        browser.driver.execute_cdp_cmd("Network.clearBrowserCache", {})
        browser.open(page)
        paints.append(run_js(PAINT))
    for number in random.integers(0, n, rounds).tolist():
        switches.append(run_js(SWITCH, number))
    for _ in range(3):
        maps.append(run_js(MAP))
        run_js("location.hash = '#/latent/0'; setTimeout(arguments[0], 300)")
    run_js(MAP)
    spent = busy_seconds(browser)
    frames = run_js(MOVE, 3 * rounds)
    spent = busy_seconds(browser) - spent
    names = ("first_paint_ms", "table_ms", "latent_ms", "latent_and_neighbours_ms")
    medians = {
        name: round(statistics.median(values), 1)
        for name, values in zip(names, [*zip(*paints), *zip(*switches)])
    }
    return medians | {
        "map_first_ms": round(maps[0]),
        "map_again_ms": round(statistics.median(maps[1:]), 1),
        "map_frame_ms": round(statistics.median(frames), 1),
        "map_longest_frame_ms": round(max(frames), 1),
        "map_frame_cpu_ms": round(1000 * spent / len(frames), 1),
        "load": [round(before, 1), round(os.getloadavg()[0], 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=int, nargs="+", default=[4_096, 131_072])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--export",
        action="store_true",
        help="also write and open static pages: minutes at many latents",
    )
    parser.add_argument("--keep", type=Path, help="keep the made-up runs in this folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times(asked.latents, asked.width, asked.rounds, asked.export, asked.keep or Path(folder))


if __name__ == "__main__":
    main()
