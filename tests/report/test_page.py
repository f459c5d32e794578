"""The page: what it says, that it is whole whatever is missing, and that text from data stays text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ksparse import report
from ksparse.config import SEVERAL_SITES
from ksparse.errors import InputError
from ksparse.report.sections import quality
from ksparse.report.tokens import safe_text
from ksparse.storage import jsonio
from ksparse.storage.run_folder import RunFolder

from .conftest import (
    ABLATION,
    DEAD,
    DOWNSTREAM,
    N2G,
    PROBES,
    RESULTS,
    STATS,
    WORDS,
    build,
    n2g_arrays,
    tasks,
)
from .html_page import Page

ALLOWED = set(
    """html head meta title style body a header p h1 h2 h3 h4 h5 nav ol ul li main section article div span dl dt dd
              table thead tbody tr th td data details summary pre code figure figcaption strong b mark bdi
              svg g path defs use rect circle text clippath tspan""".split()
)
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><script>alert(1)</script>",
    "' onmouseover='alert(1)",
    "</span></pre></table><h1>",
    "<!--<script>",
    "]]>",
    "\u202eevil",
    "\x00",
    "\ud800",
    "\u2028",
    "&lt;b&gt;",
    "{{ 7 * 7 }}",
    "{% include 'x' %}",
    "javascript:alert(1)",
    "<table>",
    "<svg onload=alert(1)>",
    "https://evil.example/x.js",
    "url(https://evil.example)",
    "</title><script>alert(1)</script>",
    "x" * 1_000_000,
]


def written(run: RunFolder) -> Page:
    return Page(report.write(run).read_text(encoding="utf-8"))


def assert_inert(page: Page) -> None:
    """Check that a page has only elements of the templates, and nothing that runs or loads."""
    assert page.unbalanced == [] and page.declared == "DOCTYPE html"
    assert {element.name for element in page.elements} <= ALLOWED
    for element in page.elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on"), (element.name, name)
            assert name not in ("src", "srcset", "action", "formaction", "ping", "background"), (
                element.name,
                name,
            )
            if name in ("href", "xlink:href"):
                in_viewer = re.fullmatch(r"index\.html#/latent/\d+", value)
                assert value.startswith("#") or in_viewer, value
    ids = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    links = {element.attributes["href"] for element in page.all("a")}
    assert {link[1:] for link in links if not link.startswith("index.html#/")} <= set(ids)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunFolder:
    """Return a run with all results and its page, for tests that only read."""
    run = build(tmp_path_factory.mktemp("whole") / "demo")
    report.write(run)
    return run


@pytest.fixture
def page(whole) -> Page:
    return Page(whole.report_file.read_text(encoding="utf-8"))


def test_a_run_with_all_results_has_every_section(whole, page) -> None:
    assert_inert(page)
    assert [heading.text for heading in page.all("h2")] == [
        "Is it good?",
        "Latents",
        "What its latents know",
        "What latents mean, in words",
        "Better than an artefact?",
        "How it trained",
        "Codes and latents in detail",
        "What was run",
        "How to reproduce it",
    ]
    assert page.all("h1")[0].text == page.all("title")[0].text.split(" · ")[0] == "demo"
    assert page.all("p", **{"class": "summary"})[0].text.startswith("A TopK autoencoder of 64 ")
    assert "Not measured" not in page.text
    assert sorted(file.name for file in (whole.path / "figures").iterdir()) == sorted(
        f"{name}.svg"
        for name in (
            "training-nmse",
            "training-dead",
            "training-steps",
            "training-l0",
            "latents-density",
            "latents-cosine",
            "explained-loss",
            "n2g-latents",
            "ablation-sparsity",
            "probes-tasks",
        )
    )
    assert len(page.all("svg", role="img")) == 10


def test_the_tables_values_are_the_files(page) -> None:
    table = [
        float(element.attributes["value"])
        for element in page.all("data")
        if "table" in element.inside and "details" in element.inside
    ]
    expected = []
    for group in [part.group for part in quality.PARTS]:
        for row in group.rows:
            found = RESULTS[group.eval][row.key]
            expected += (
                [part for part in (found["value"], found["se"]) if part is not None]
                if isinstance(found, dict)
                else [found]
            )
    assert table == expected


def test_the_policy_and_the_amount_of_text_are_under_the_table(page) -> None:
    for said in ("29,289", "70", "separator_token 0", "step 50", "only 70 documents"):
        assert said in page.text


def test_a_result_of_an_older_checkpoint_says_so(make_run) -> None:
    run = make_run()
    run.eval_file("stats").write_text(json.dumps(STATS | {"checkpoint": 30}))
    assert "step 30, though training continued to step 50" in written(run).text


@pytest.mark.parametrize(
    "changes, says",
    [
        ({}, "with examples from held-out text, which training never saw."),
        (
            {"policy": {"split": "validation"}},
            "with examples from validation text, which training never saw.",
        ),
        (
            {"policy": {"split": "train"}},
            "with examples from text that it was trained on.",
        ),
        (
            {"text": "other.txt"},
            "with examples from text of other.txt, which is not what it was trained on.",
        ),
    ],
    ids=str,
)
def test_the_page_says_which_text_its_numbers_are_of(make_run, changes, says) -> None:
    run = make_run()
    run.eval_file("stats").write_text(
        json.dumps(STATS | {"text": run.recipe().acts.text} | changes)
    )
    text = " ".join(written(run).text.split())
    assert says in text and ("training never saw" in text) == ("never saw" in says)


@pytest.mark.parametrize("missing", [tuple(RESULTS), *((name,) for name in RESULTS)], ids="-".join)
def test_a_missing_result_names_the_command_that_adds_it(make_run, missing) -> None:
    page = written(make_run(evals=[name for name in RESULTS if name not in missing]))
    assert_inert(page)
    commands = {code.text for code in page.all("code") if code.text.startswith("ksparse eval")}
    by_name = "ksparse eval demo refinement progressive latents subspaces"  # run only by name
    names = [part.name for part in quality.PARTS if part.name in missing]
    once = (
        f"ksparse eval demo {' '.join(names)}" if len(names) < len(RESULTS) else "ksparse eval demo"
    )
    assert commands == {once, by_name}
    boxes = [box.text for box in page.all("p", **{"class": "missing"})]
    assert sum("Not measured yet" in box or "has not been evaluated" in box for box in boxes) == 1
    assert bool(page.all("article")) == ("stats" not in missing)


def nulled(value):
    """Return a result with null for each number."""
    if isinstance(value, dict):
        return (
            {"value": None, "se": None}
            if "value" in value
            else {key: nulled(item) for key, item in value.items()}
        )
    return value


def test_results_without_a_single_number_make_a_page(make_run) -> None:
    run = make_run()
    for name, result in RESULTS.items():
        run.eval_file(name).write_text(json.dumps(nulled(result)))
    page = written(run)
    assert_inert(page)
    assert (
        "What a good autoencoder shows" not in page.text
        and "nan" not in page.text.lower().replace("nanogpt", "")
    )
    assert page.all("table", **{"class": "tasks"}) and not any(
        "probes" in svg.attributes["aria-label"] for svg in page.all("svg")
    )


def test_verdicts_are_words_above_the_numbers(make_run) -> None:
    run = make_run()
    run.eval_file("ablation").write_text(
        json.dumps(ABLATION | {"difference": {"value": -0.1, "se": 0.01}})
    )
    run.eval_file("n2g").write_text(json.dumps(N2G | {"recall": {"value": 0.02, "se": 0.01}}))
    page = written(run)
    assert_inert(page)
    assert [strong.text for strong in page.all("strong") if "li" in strong.inside] == [
        "holds",
        "holds",
        "holds",
        "unclear",
        "holds",
        "does not hold",
    ]
    assert (
        "4 of 6 hold, 1 does not, 1 is unclear" in page.text
        and "counts such reach as lack of sparsity" in page.text
    )
    assert page.text.index("4 of 6 hold") < page.text.index("How to read it")


@pytest.mark.parametrize("count", [1, 61])
def test_every_task_is_in_the_figure_and_in_the_table(make_run, count) -> None:
    run = make_run()
    run.eval_file("probes").write_text(json.dumps(PROBES | {"tasks": tasks(count)}))
    page = written(run)
    assert_inert(page)
    rows = [
        row.text.split()
        for row in page.all("tr")
        if "details" in row.inside and "table" in row.inside and row.text.split()[0] != "Measure"
    ]
    rows = [row for row in rows if row[0] == "Task" or row[0].startswith("task_")]
    assert [row[0] for row in rows[1:]] == [f"task_{i:02}" for i in range(count)]
    assert rows[1][2:] == [
        "+0.200",
        "0.300",
        "±",
        "0.010",
        "0.500",
        "0.520",
        "0.100",
        "0.693",
        "0.280",
        "500",
        "+",
        "498",
        "50",
        "%",
    ]
    assert {f"task_{i:02}" for i in range(count)} <= {text.text for text in page.all("text")}


def test_best_latents_with_a_card_are_linked_to_it_and_the_card_names_the_task(page) -> None:
    cards = {card.attributes["id"]: card.text for card in page.all("article")}
    links = {link.attributes["href"][1:] for link in page.all("a") if "td" in link.inside}
    best = {f"latent-{task['latent']}": name for name, task in tasks().items()}
    assert links == set(best) & set(cards) and len(links) >= 4
    assert all(best[link] in cards[link] for link in links)


def test_patterns_on_a_card_read_as_text(make_run) -> None:
    run, arrays = make_run(), n2g_arrays()
    for name, value in (
        ("tokens", [WORDS.index("def"), -1, WORDS.index("(")] * 2000),
        ("start", range(0, 6000, 3)),
        ("value", 0.83),
        ("support", 5),
        ("anchored", True),
    ):
        old = arrays[f"pattern_{name}"]
        arrays[f"pattern_{name}"] = np.resize(
            np.array(value), 6000 if name == "tokens" else len(old)
        ).astype(old.dtype)
    save_file(arrays, run.path / "evals" / "n2g.safetensors")
    patterns = [
        item for item in written(run).all("li") if "article" in item.inside and "→" in item.text
    ]
    assert len(patterns) == 33 * 4
    assert all(
        " ".join(item.text.split()).startswith('^ "def" * "(" → 0.83') and "5 examples" in item.text
        for item in patterns
    )


def test_hostile_tokens_are_text_in_patterns_and_effects(make_run) -> None:
    page = written(make_run(vocabulary=HOSTILE[: len(WORDS)]))
    assert_inert(page)
    tokens = {bdi.text for bdi in page.all("bdi") if "li" in bdi.inside or "dd" in bdi.inside}
    assert {'"<script>alert(1)</script>"', '"⟨U+202E⟩evil"', '"]]>"', '"⟨U+D800⟩"'} <= tokens


def test_one_command_asks_for_all_results_whose_options_agree(make_run) -> None:
    run = make_run()
    run.eval_file("ablation").write_text(
        json.dumps(ABLATION | {"options": {"tokens": 5, "text": "other"}})
    )
    commands = [pre.text for pre in written(run).all("pre") if pre.text.startswith("ksparse eval")]
    assert commands == [
        "ksparse eval runs/again stats downstream probes n2g explained_loss --tokens 100000 --per-document 512 --split held-out "
        "--examples 8 --seed 0 --suite suites/demo",
        "ksparse eval runs/again ablation --tokens 5 --text other",
    ]


def test_arrays_that_are_missing_leave_a_page_without_what_they_hold(make_run) -> None:
    run = make_run()
    for name in ("n2g", "ablation"):
        run.eval_file(name).with_suffix(".safetensors").unlink()
    page = written(run)
    assert_inert(page)
    assert (
        "Patterns that predict it" not in page.text
        and not page.all("dl", **{"class": "moved"})
        and "Best at a task" in page.text
    )


def test_three_big_numbers_stand_beside_their_baselines(page) -> None:
    headline = page.all("dl", **{"class": "headline"})[0]
    text = " ".join(headline.text.split())
    for words in (
        "Loss added (ΔCE) 0.163 ± 0.006 nats per token 0: the unchanged LM 3.47: the mean",
        "Explained variance 90.54 % ± 0.09 0 %: predicting the mean",
        "Dead latents 5 % ± 3 0 %: every latent is used 1.6 %: in training, silent for the last",
    ):
        assert words in text
    assert len(page.all("dd", **{"class": "big"})) == 3
    html = page.text
    order = ["Loss added (ΔCE)", "What a good autoencoder shows", "Best explained", "Machine and"]
    assert [html.index(words) for words in order] == sorted(html.index(words) for words in order)


def test_at_most_eight_numbers_come_before_all_are_asked_for(page) -> None:
    key_rows = [cell for cell in page.all("th", scope="row") if "details" not in cell.inside]
    assert [cell.text for cell in key_rows] == [
        "L0",
        "KL from the LM",
        "Gain over channels",
        "F1",
        "Ablation sparsity",
    ]
    assert len(page.all("dd", **{"class": "big"})) + len(key_rows) <= 8
    summary = next(each.text for each in page.all("summary") if "numbers" in each.text)
    measured = [row for part in quality.PARTS for row in part.group.rows]
    assert summary == f"Show all {len(measured)} numbers, and how to read them"


def test_three_latents_are_open_and_each_names_its_page_in_the_viewer(page) -> None:
    cards = page.all("article")
    folded = [card for card in cards if "details" in card.inside]
    assert len(cards) - len(folded) == 3 and cards[:3] == [c for c in cards if c not in folded]
    n2g = n2g_arrays()
    live = ~np.isin(n2g["scored"], DEAD)
    best = n2g["scored"][np.argsort(-np.nan_to_num(n2g["f1"] * live), kind="stable")][:3]
    assert [card.attributes["id"] for card in cards[:3]] == [f"latent-{i}" for i in best]
    links = [a.attributes["href"] for a in page.all("a", **{"class": "in-viewer"})]
    numbers = [card.attributes["id"].removeprefix("latent-") for card in cards]
    assert links == [f"index.html#/latent/{number}" for number in numbers]
    commands = [code.text for code in page.all("code") if "--latent" in code.text]
    assert commands == [f"ksparse view demo --latent {number}" for number in numbers]


def test_a_recipe_alone_makes_a_page(tmp_path) -> None:
    run = RunFolder(tmp_path / "bare")
    run.path.mkdir()
    run.recipe_file.write_text("tokens = 1000\n")
    page = written(run)
    assert_inert(page)
    assert "There are no metrics yet" in page.text and "to be trained on" in page.text


def test_numbers_that_are_null_or_absent_are_not_measured(make_run) -> None:
    run = make_run()
    result = {key: value for key, value in DOWNSTREAM.items() if key != "kl"} | {
        "compute_fraction": {"value": None, "se": None}
    }
    run.eval_file("downstream").write_text(json.dumps(result))
    rows = {
        row.text.split("\n")[1]: row.text
        for row in written(run).all("tr")
        if "not measured" in row.text and "details" in row.inside
    }
    assert set(rows) == {"KL from the LM", "Compute fraction"}
    assert "which are not known for this LM" in rows["Compute fraction"]


def test_arrays_or_vocabulary_that_are_missing_are_asked_for(make_run) -> None:
    run = make_run()
    run.eval_file("vocabulary").unlink()
    assert "Tokens are shown as their ids" in written(run).text
    run.eval_file("stats").with_suffix(".safetensors").unlink()
    page = written(run)
    assert "The text that latents fire on is not in this run" in page.text and not page.all(
        "article"
    )


def test_a_folder_without_a_run_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="is not a run"):
        report.write(RunFolder(tmp_path))


def damage_json(file: Path) -> None:
    file.write_text("{")


def change_type(file: Path) -> None:
    file.write_text("[1]")


def damage_arrays(file: Path) -> None:
    arrays = file.with_suffix(".safetensors")
    arrays.write_bytes(arrays.read_bytes()[:1000])


def change_a_table(file: Path) -> None:
    """Make odd a value that `RunFolder.eval` does not know."""
    jsonio.write_json(file, {**jsonio.read_json(file), "histogram": "odd"}, sealed=True)


def change_options(file: Path) -> None:
    jsonio.write_json(file, {**jsonio.read_json(file), "options": 7}, sealed=True)


def change_the_window(file: Path) -> None:
    odd = {"window": {"before": "odd", "after": 8}}
    jsonio.write_json(file, {**jsonio.read_json(file), **odd}, sealed=True)


def put_another_sum(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"arrays_sha256": "0" * 64}))


def name_other_arrays(file: Path) -> None:
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"arrays": "gone-0123456789abcdef.safetensors"})
    )


def drop_rows(file: Path) -> None:
    arrays = load_file(file.with_suffix(".safetensors"))
    save_file({name: array[:1] for name, array in arrays.items()}, file.with_suffix(".safetensors"))


@pytest.mark.parametrize(
    "name, damage, again",
    [
        ("stats", damage_json, "stats"),
        ("downstream", change_type, "downstream"),
        ("vocabulary", change_type, "stats"),
        ("stats", damage_arrays, "stats"),
        ("n2g", put_another_sum, "n2g"),
        ("ablation", name_other_arrays, "ablation"),
        ("stats", drop_rows, "stats"),
        ("stats", change_options, "stats"),
        ("stats", change_the_window, "stats"),
        ("ablation", change_a_table, "ablation"),
    ],
)
def test_a_damaged_result_is_left_out_with_a_line_and_the_others_are_shown(
    make_run, caplog, name, damage, again
) -> None:
    run = make_run()
    damage(run.eval_file(name))
    page = written(run)
    lines = [element.text for element in page.all("p") if "is damaged and left out" in element.text]
    assert (
        len(lines) == 1
        and f"The result of {name} is damaged and left out. This command writes it again: "
        in " ".join(lines[0].split())
    )
    said = [record.getMessage() for record in caplog.records]
    assert (
        len(said) == 1
        and said[0].startswith(f"the result of {name} is left out: ")
        and said[0].endswith(f"To write it again: ksparse eval demo {again}")
    )
    assert str(run.path) in said[0] and str(run.path) not in page.text
    headings = {row.text.strip() for row in page.all("th", scope="rowgroup")}
    for key, title in (
        ("stats", "Reconstruction error and sparsity"),
        ("downstream", "Effect on the LM’s predictions"),
        ("probes", "What single latents know"),
    ):
        assert any(title in heading for heading in headings) == (key != name)


def test_live_latents_have_cards_and_dead_ones_do_not(page) -> None:
    cards = page.all("article")
    assert len(cards) == 33
    assert not {card.attributes["id"] for card in cards} & {f"latent-{number}" for number in DEAD}


@pytest.mark.parametrize(
    "name, last",
    [
        ('"><img src=x onerror=alert(1)>', False),
        ("' onmouseover='alert(1)", True),
        ("\u202eevil\n", False),
        ("{{ 7 * 7 }}", True),
    ],
)
def test_hostile_text_is_text_wherever_it_is(make_run, name, last) -> None:
    payloads = HOSTILE[-len(WORDS) :] if last else HOSTILE[: len(WORDS)]
    payload = "".join(payloads)
    in_recipe = (
        payload.encode("utf-8", "replace").decode().replace("\x00", "")
    )  # which TOML cannot hold
    run = make_run(
        name,
        vocabulary=payloads,
        changes={f"acts.{key}": in_recipe for key in ("lm", "text", "shards")}
        | {"acts.site": in_recipe.translate(dict.fromkeys(map(ord, SEVERAL_SITES)))},
        environment={
            "versions": {payload: payload},
            "platform": payload,
            "processor": payload,
            "gpus": [payload],
            "threads": 2,
        },
    )
    for eval_name, result in RESULTS.items():
        hostile = {
            "text": payload,
            "notes": [payload],
            "policy": {payload: payload},
            "options": {payload: payload},
        }
        if eval_name == "probes":
            hostile |= {
                "suite": payload,
                "tasks": dict(zip([*payloads, payload], tasks(len(payloads) + 1).values())),
            }
        run.eval_file(eval_name).write_text(json.dumps(result | hostile))
    page = written(run)
    assert_inert(page)
    html = run.report_file.read_text(encoding="utf-8")
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]", html
    )
    assert len(html) < 3_000_000
    marks = {mark.text for mark in page.all("mark")}
    assert {
        text for text in payloads if text.isprintable() and len(text) < 80
    } <= marks  # they are shown, as they are
    assert page.all("h1")[0].text == safe_text(name)


def test_the_page_loads_nothing_and_forbids_it(whole, page) -> None:
    html = whole.report_file.read_text(encoding="utf-8")
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0].attributes["content"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert (
        "http:" not in html
        and "https:" not in html
        and "url(" not in html.replace("url(#", "")
        and "@import" not in html
    )


def test_the_page_can_be_used_without_a_mouse_or_eyes(page) -> None:
    assert page.all("html")[0].attributes["lang"] == "en"
    assert page.all("a")[0].attributes == {"class": "skip", "href": "#content"} and page.all(
        "main", id="content"
    )
    levels = [
        int(element.name[1]) for element in page.elements if re.fullmatch("h[1-6]", element.name)
    ]
    assert (
        levels[0] == 1
        and levels.count(1) == 1
        and all(after - before <= 1 for before, after in zip(levels, levels[1:]))
    )
    assert all(
        svg.attributes["role"] == "img" and svg.attributes["aria-label"] for svg in page.all("svg")
    )
    assert all("scope" in cell.attributes for cell in page.all("th"))
    assert page.all("div", tabindex="0", role="region")


def test_the_same_files_make_the_same_bytes(make_run) -> None:
    run = make_run()
    first = (
        report.write(run).read_bytes(),
        [file.read_bytes() for file in sorted((run.path / "figures").iterdir())],
    )
    assert (
        report.write(run).read_bytes(),
        [file.read_bytes() for file in sorted((run.path / "figures").iterdir())],
    ) == first
    other = make_run("elsewhere/demo")
    assert report.write(other).read_bytes() == first[0]


def test_commands_quote_what_a_shell_would_read(make_run) -> None:
    page = written(make_run("my run; rm x", evals=("stats", "downstream")))
    commands = [pre.text for pre in page.all("pre") if pre.text.startswith("ksparse")]
    assert commands == [
        "ksparse train 'my run; rm x/recipe.toml' --out runs/again --threads 2",
        "ksparse eval runs/again stats downstream --tokens 100000 --per-document 512 --split held-out --examples 8 --seed 0",
        "ksparse report 'my run; rm x'",
    ]


def test_writing_a_page_needs_no_torch_and_importing_it_no_matplotlib(make_run) -> None:
    run = make_run()
    code = (
        f"import sys, pathlib; from ksparse import report; import ksparse.report.page; assert 'matplotlib' not in sys.modules;"
        f"from ksparse.storage.run_folder import RunFolder; report.write(RunFolder(pathlib.Path({str(run.path)!r})));"
        "loaded = {name.partition('.')[0] for name in sys.modules};"
        "assert not loaded & {'torch', 'transformers', 'scipy', 'pandas', 'tyro'}, loaded"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_the_chosen_colours_can_be_read() -> None:
    """Text on the hottest token, and soft text on paper, have a contrast of at least 4.5 in light and in dark."""
    source = (Path(report.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    light, dark = (
        source[: source.index("@media")],
        source[source.index("@media") : source.index("* {")],
    )
    for scheme in (light, dark):
        colours = dict(re.findall(r"--([a-z]+): ([^;]+);", scheme))
        hot = mix(rgb(colours["heat"]), rgb(colours["card"]), float(colours["strength"]))
        assert contrast(rgb(colours["ink"]), hot) >= 4.5
        for name in ("soft", "first", "second"):
            assert contrast(rgb(colours[name]), rgb(colours["paper"])) >= 4.5, name


def rgb(colour: str) -> list[float]:
    return (
        [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        if colour.startswith("#")
        else [float(part) for part in colour.split()]
    )


def mix(above: list[float], below: list[float], share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(above, below)]


def contrast(one: list[float], other: list[float]) -> float:
    """Return the contrast ratio of WCAG 2."""

    def luminance(colour: list[float]) -> float:
        parts = [
            c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4
            for c in colour
        ]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize(
    "name",
    [
        "figures",
        "report.html",
        "metrics.jsonl",
        "evals/stats.json",
        "evals/vocabulary.json",
        "evals/stats.safetensors",
    ],
)
def test_a_report_neither_shows_nor_writes_what_a_link_leads_to(make_run, tmp_path, name) -> None:
    run = make_run()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "key").write_text("secret")
    if (run.path / name).exists():
        (run.path / name).unlink()
    (run.path / name).symlink_to(
        "../out" if name == "figures" else f"{'../' * (name.count('/') + 1)}out/key"
    )
    with pytest.raises(InputError, match=f"{name} leads out of .*demo"):
        report.write(run)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["key"] and (
        tmp_path / "out" / "key"
    ).read_text() == "secret"
    assert name == "report.html" or not run.report_file.exists()


def test_a_report_removes_what_killed_ones_left(make_run) -> None:
    run = make_run()
    for folder in ("figures", "evals", "."):
        (run.path / folder).mkdir(exist_ok=True)
        (run.path / folder / ".tmp-loss.svg-123").write_text("<svg")
    report.write(run)
    assert not list(run.path.rglob(".tmp-*"))


@pytest.mark.parametrize(
    "environment",
    [{"versions": 7}, {"versions": ["x"]}, {"versions": None}, {"threads": "two", "gpus": 3}, {}],
    ids=str,
)
def test_an_environment_of_other_types_still_gives_a_page(tmp_path, environment):
    assert_inert(written(build(tmp_path / "demo", environment=environment)))
