"""The verbs: what they print, what they leave, how they refuse."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ksparse import cli
from ksparse import config as recipes
from ksparse.cli.evaluate import CompareArgs
from ksparse.cli.output import EscapingFormatter
from ksparse.config import to_toml
from ksparse.config.evaluation import EvalConfig, StudyConfig
from ksparse.scaling.sweeps import grid as grids
from ksparse.storage.run_folder import RunFolder


@pytest.fixture
def recipe_file(small_recipe, tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(to_toml(small_recipe()))
    return file


def test_view_writes_pages_and_says_where(verb, small_recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(to_toml(small_recipe()))
    code, out, _ = verb("view", run, "--export", tmp_path / "site")
    assert code == 0 and out == f"pages    {(tmp_path / 'site' / 'index.html').as_uri()}\n"
    code, out, _ = verb("view", run, "--export", tmp_path / "site", "--latent", 5)
    assert code == 0 and out.endswith("/index.html#/latent/5\n")
    code, _, err = verb("view", run, "--export", tmp_path / "site", "--latent", 64)
    assert code == 2 and "--latent 64: there is no such latent; " in err
    assert "has latents 0 to 63. Give one of these" in err
    code, _, err = verb("view", run, "--export", run)
    assert code == 2 and "holds something else than an exported site" in err
    code, _, err = verb("view", tmp_path / "nothing")
    assert code == 2 and "is not a run" in err


def test_view_serves_until_it_is_interrupted(small_recipe, tmp_path):
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    (tmp_path / "recipe.toml").write_text(to_toml(small_recipe()))
    server = subprocess.Popen(
        [sys.executable, "-m", "ksparse", "view", str(tmp_path), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = server.stdout.readline().split()[1]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(
            address.replace("?token", "data/overview.json?token"), timeout=30
        ) as answer:
            assert json.load(answer)["n"] == 64
    finally:
        server.send_signal(signal.SIGINT)
        _, said = server.communicate(timeout=30)
    assert server.returncode == 130 and said == "stopped\n"


def test_help_lists_every_verb_and_the_exit_codes(verb):
    code, out, _ = verb("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in cli.VERBS)
    assert "143 SIGTERM" in " ".join(out.split())


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_verb_has_help(verb, name):
    code, out, _ = verb(name, "--help")
    assert code == 0 and "usage" in out.lower()


def test_every_flag_has_a_help_text_in_one_paragraph(verb):
    for name in ("train", "eval", "study", "compare", "resume"):
        assert verb(name, "--help")[0] == 0
    sections = [
        kind
        for kind in vars(recipes).values()
        if dataclasses.is_dataclass(kind) and kind is not recipes.Planted  # no section of a recipe
    ]
    fields = [
        field
        for options in (*sections, EvalConfig, StudyConfig, CompareArgs)
        for field in dataclasses.fields(options)
    ]
    assert len(fields) > 120
    for field in fields:
        text = field.metadata["help"]
        assert text and "\n" not in text and text.endswith("."), field.name


@pytest.mark.parametrize("name", ["train", "plan", "eval"])
def test_help_takes_less_than_a_second_of_processor_time(name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "ksparse", name, "--help"], check=True, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["--version"]], ids=" ".join
)
def test_it_ends_quietly_where_nobody_reads_on(arguments, buffered):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"
    } | ({} if buffered else {"PYTHONUNBUFFERED": "1"})
    done = subprocess.run(
        [sys.executable, "-m", "ksparse", *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.parametrize(
    "redirected, code, said",
    [
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 5, "ksparse: the output cannot be written: No space left on device\n"),
        (">/dev/full 2>/dev/full", 5, ""),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(redirected, code, said):
    command = f"{sys.executable} -m ksparse --help {redirected}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_a_closed_stream_gives_its_number_to_no_file_of_ours(tmp_path):
    script = (
        "import os; from ksparse import cli; cli._open_streams(); "
        f"opened = open({str(tmp_path / 'file')!r}, 'w').fileno(); "
        f"open({str(tmp_path / 'number')!r}, 'w').write(str(opened))"
    )
    command = f'{sys.executable} -c "{script}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command]).returncode == 0
    assert int((tmp_path / "number").read_text()) > 2


def test_what_the_outputs_encoding_lacks_is_escaped():
    script = "from ksparse import cli; cli._open_streams(); print('caf\\u00e9')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout) == (0, b"caf\\xe9\n")


def test_an_error_keeps_its_code_where_nobody_reads_messages():
    command = f"{sys.executable} -m ksparse nothing 2>/dev/full"
    assert subprocess.run(["sh", "-c", command]).returncode == 2


def test_a_working_folder_that_is_gone_is_said(verb, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: os.stat(tmp_path / "gone"))
    code, _, said = verb("report", "run")
    assert code == 2 and "the working folder does not exist: No such file" in said


@pytest.mark.parametrize("name", ["train", "eval", "probes", "steer", "attribute"])
def test_help_needs_no_torch(name):
    code = f"import sys; from ksparse import cli\ntry: cli.main(['{name}', '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_train_eval_report_leave_a_whole_run(verb, recipe_file, tmp_path):
    run = RunFolder(tmp_path / "run")
    code, out, err = verb("train", recipe_file, "--sae.k", 3, "--out", run.path)
    assert code == 0, err
    assert "report" in out and "ksparse eval" in out
    assert tomllib.loads(run.recipe_file.read_text())["sae"]["k"] == 3
    assert run.metrics()[-1]["step"] == 12
    code, out, err = verb(
        "eval", run.path, "downstream", "stats", "--tokens", 300, "--device", "cpu"
    )
    assert code == 0, err
    assert json.loads(run.eval_file("stats").read_text())["nmse"]["value"] > 0
    assert set(run.eval("downstream")) >= {
        "ce_clean",
        "ce_spliced",
        "ce_delta",
        "ce_zero",
        "ce_mean",
        "kl",
        "compute_fraction",
    }
    assert "nmse" in out and "±" in out
    before = run.report_file.read_text()
    run.report_file.unlink()
    assert verb("report", run.path)[0] == 0
    assert run.report_file.read_text() == before
    weights = (run.checkpoint(12) / "sae.safetensors").read_bytes()
    assert verb("train", recipe_file, "--sae.k", 3, "--out", run.path)[0] == 0
    assert (run.checkpoint(12) / "sae.safetensors").read_bytes() == weights


def test_a_result_of_the_text_that_was_trained_on_never_takes_the_held_out_ones_place(
    verb, recipe_file, tmp_path
):
    run = RunFolder(tmp_path / "run")
    assert verb("train", recipe_file, "--out", run.path)[0] == 0
    assert verb("eval", run.path, "stats", "--tokens", 200, "--device", "cpu")[0] == 0
    before = run.eval_file("stats").read_bytes(), run.arrays_file("stats").read_bytes()
    code, out, err = verb(
        "eval", run.path, "stats", "--split", "train", "--tokens", 200, "--device", "cpu"
    )
    assert code == 0 and f"stats-train   {run.eval_file('stats-train')}" in out, err
    assert (run.eval_file("stats").read_bytes(), run.arrays_file("stats").read_bytes()) == before
    assert run.arrays_file("stats-train").is_file()
    assert (
        run.eval("stats-train")["policy"]["split"] == "train"
        and run.eval("stats")["policy"]["split"] == "held-out"
    )
    words = " ".join(run.report_file.read_text().split())
    assert "with examples from held-out text, which training never saw." in words
    code, _, err = verb("eval", run.path, "stats", "--split", "test", "--device", "cpu")
    assert code == 2


QUICK = (
    "--tokens",
    600,
    "--probe-rows",
    80,
    "--latents",
    5,
    "--n2g-examples",
    3,
    "--ngram-tokens",
    500,
    "--ablation-positions",
    3,
    "--ablation-latents",
    3,
    "--ablation-horizon",
    4,
    "--device",
    "cpu",
)


def test_eval_asks_everything_if_nothing_is_named(verb, recipe_file, tmp_path):
    assert verb("train", recipe_file, "--out", tmp_path / "run")[0] == 0
    code, out, err = verb("eval", tmp_path / "run", *QUICK)
    assert code == 0, err
    run = RunFolder(tmp_path / "run")
    wanted = {
        "probes": (
            "probe_loss",
            "probe_loss_in_sample",
            "channel_loss",
            "random_sae_loss",
            "dense_probe_loss",
            "prior_loss",
        ),
        "n2g": ("precision", "recall", "f1"),
        "ablation": ("ablation_sparsity", "channel_sparsity"),
        "explained_loss": tuple(
            f"ce_{name}"
            for name in ("clean", "spliced", "n2g", "unigram", "bigram", "zero", "bias")
        ),
        "stats": ("nmse", "l0"),
        "downstream": ("ce_clean", "kl"),
    }
    for name, keys in wanted.items():
        result = json.loads(run.eval_file(name).read_text())
        assert (
            all(set(result[key]) == {"value", "se"} for key in keys)
            and f"\n{name}   " in f"\n{out}"
        )
        assert {"options", "seconds", "notes", "lm", "site", "checkpoint"} <= set(result)


def test_several_runs_share_a_pass_and_each_gets_its_results(verb, recipe_file, tmp_path):
    folders = [tmp_path / f"k{k}" for k in (2, 4)]
    for folder, k in zip(folders, (2, 4)):
        assert verb("train", recipe_file, "--sae.k", k, "--out", folder)[0] == 0
    code, out, err = verb("eval", *folders, "stats", "--tokens", 300, "--device", "cpu")
    assert code == 0, err
    assert [
        RunFolder(folder).eval("stats")["l0"]["value"] <= k for folder, k in zip(folders, (2, 4))
    ] == [True, True]
    assert all(str(folder) in out for folder in folders)


def test_studies_are_asked_by_name_and_their_section_shows_both_runs(verb, recipe_file, tmp_path):
    folders = [tmp_path / f"k{k}" for k in (2, 4)]
    for folder, k in zip(folders, (2, 4)):
        assert verb("train", recipe_file, "--sae.k", k, "--out", folder)[0] == 0
    code, out, err = verb(
        "eval",
        *folders,
        "refinement",
        "progressive",
        "latents",
        "--tokens",
        600,
        "--refine-tokens",
        200,
        "--device",
        "cpu",
    )
    assert code == 0, err
    for name in ("refinement", "progressive", "latents"):
        assert RunFolder(folders[0]).eval(name)["name"] == name and f"\n{name}   " in f"\n{out}"
    assert list(RunFolder(folders[0]).eval("progressive")["beside"]) == ["k4"]
    page = RunFolder(folders[0]).report_file.read_text()
    assert (
        "The code at another k" in page
        and "k4, TopK" in page
        and "Not run yet: Groups of latents" in page
    )


def test_steering_shows_both_continuations_and_attribution_what_to_steer(
    verb, recipe_file, tmp_path
):
    assert verb("train", recipe_file, "--out", tmp_path / "run")[0] == 0
    code, out, err = verb(
        "attribute",
        tmp_path / "run",
        "--prompt",
        "the cat sat",
        "two black dogs",
        "--toward",
        " on",
        "--device",
        "cpu",
    )
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if line.startswith("  latent ")]
    assert rows and float(rows[0][2]) >= float(rows[-1][2]) and "mean over 2 prompts" in out
    latent = rows[0][1]
    code, out, err = verb(
        "steer",
        tmp_path / "run",
        "--latent",
        latent,
        "--value",
        -5,
        "--prompt",
        "the cat",
        "--tokens",
        4,
        "--shown",
        3,
        "--device",
        "cpu",
    )
    assert code == 0, err
    lines = out.splitlines()
    assert (
        lines[0].startswith(f"latent   {latent}")
        and lines[1].startswith("as it is the cat")
        and lines[2].startswith("steered  the cat")
    )
    assert any(line.startswith("next token, KL") for line in lines)
    changes = [
        [float(number) for number in line.split()[-2:]]
        for line in lines
        if line.startswith("  '") or line.startswith('  "')
    ]
    assert len(changes) == 3 and all(0 <= number <= 1 for pair in changes for number in pair)
    assert verb("eval", tmp_path / "run", "stats", "--tokens", 300, "--device", "cpu")[0] == 0
    assert (
        "fires on"
        in verb(
            "steer",
            tmp_path / "run",
            "--latent",
            latent,
            "--scale",
            0,
            "--prompt",
            "the cat",
            "--tokens",
            2,
            "--device",
            "cpu",
        )[1]
    )


def test_steering_far_beyond_a_latents_values_is_said(verb, recipe_file, tmp_path, caplog):
    assert verb("train", recipe_file, "--out", tmp_path / "run")[0] == 0
    steer = (
        "steer",
        tmp_path / "run",
        "--prompt",
        "the cat",
        "--tokens",
        2,
        "--device",
        "cpu",
        "--latent",
    )
    _, out, _ = verb(*steer, 3, "--value", 1e4)
    assert (
        "latent 3 at 10000 is " in caplog.text
        and "times its largest value" in caplog.text
        and "at most on this prompt" in out
    )
    assert verb("eval", tmp_path / "run", "stats", "--tokens", 300, "--device", "cpu")[0] == 0
    largest = load_file(RunFolder(tmp_path / "run").arrays_file("stats"))["max_act"]
    latent = int(largest.argmax())
    for times, said in ((2.9, False), (3.1, True), (-3.1, True)):
        caplog.clear()
        code, out, err = verb(*steer, latent, "--value", times * float(largest[latent]))
        assert code == 0 and (f"latent {latent} at" in caplog.text) == said, err


def test_steering_says_where_nothing_changed_and_shows_tokens_with_their_spaces(
    verb, recipe_file, tmp_path
):
    assert verb("train", recipe_file, "--out", tmp_path / "run")[0] == 0
    steer = (
        "steer",
        tmp_path / "run",
        "--prompt",
        "the cat",
        "--tokens",
        2,
        "--device",
        "cpu",
        "--latent",
        3,
    )
    code, out, err = verb(*steer, "--scale", 1)
    assert code == 0 and out.splitlines()[-1] == "nothing changed" and "next token" not in out, err
    _, out, _ = verb(*steer, "--value", -20, "--shown", 300)
    tokens = [
        line.strip().rpartition("   ")[0].split("   ")[0]
        for line in out.splitlines()
        if line.startswith(("  '", '  "'))
    ]
    assert len(tokens) == len(set(tokens)) and any(token.startswith("' ") for token in tokens)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--value", "nan"), "'value' is nan; it must be a finite number"),
        (("--value", "-inf"), "'value' is -inf"),
        (("--value", "1e308"), "at most 3e+38"),
        (("--scale", "nan"), "'scale' is nan"),
        (("--value", 1, "--temperature", "inf"), "'temperature' is inf"),
        (("--value", 1, "--temperature", "1e-300"), "at least 0.001"),
        (("--value", 1, "--shown", -1), "shown of the command is -1; it must not be negative"),
    ],
)
def test_numbers_that_are_none_end_steering_before_it_loads_anything(verb, flags, message):
    code, out, err = verb("steer", "run", "--latent", 3, "--prompt", "x", *flags)
    assert code == 2 and message in " ".join((out + err).split()) and "Traceback" not in err


def test_probe_tasks_are_built_from_local_copies_and_probed(verb, recipe_file, tmp_path):
    local = tmp_path / "local" / "nyu-mll__glue"
    local.mkdir(parents=True)
    rows = [
        {"sentence": f"the cat {'sat' if i % 2 else 'sits sat'} on mat {i}", "label": i % 2}
        for i in range(200)
    ]
    (local / "cola.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = verb(
        "probes",
        "build",
        tmp_path / "suite",
        "--local",
        tmp_path / "local",
        "--rows",
        100,
        "--only",
        "cola",
    )
    assert code == 0, err + out
    assert "1 tasks made" in out and f"--suite {tmp_path / 'suite'}" in out
    assert verb("train", recipe_file, "--out", tmp_path / "run")[0] == 0
    code, out, err = verb(
        "eval", tmp_path / "run", "probes", "--suite", tmp_path / "suite", "--device", "cpu"
    )
    assert code == 0, err
    assert set(RunFolder(tmp_path / "run").eval("probes")["tasks"]) == {"cola"}


def test_a_build_that_makes_nothing_fails_and_says_why(verb, tmp_path):
    (tmp_path / "local" / "nyu-mll__glue").mkdir(parents=True)
    code, out, _ = verb(
        "probes", "build", tmp_path / "suite", "--local", tmp_path / "local", "--only", "cola"
    )
    assert code == 1 and "cola: " in out and "no rows in" in out


def test_shards_are_written_and_trained_on(verb, recipe_file, tmp_path):
    code, out, err = verb(
        "shard", recipe_file, "--out", tmp_path / "acts", "--tokens", 500, "--dtype", "float32"
    )
    assert code == 0, err
    folder = out.split()[1]
    code, _, err = verb("train", recipe_file, "--acts.shards", folder, "--out", tmp_path / "run")
    assert code == 0, err
    assert RunFolder(tmp_path / "run").metrics()[-1]["step"] == 12


def test_several_sites_are_trained_shown_and_named_where_one_is_needed(verb, recipe_file, tmp_path):
    words = ("--acts.site", "resid_post.[01]", "mlp_out.0", "--run.device", "cpu")
    code, out, err = verb("train", recipe_file, *words, "--out", tmp_path / "all")
    assert code == 0, err
    sites = ("resid_post.0", "resid_post.1", "mlp_out.0")
    for site in sites:
        assert f"run      {tmp_path / 'all' / site}   ({site})" in out
        assert RunFolder(tmp_path / "all" / site).report_file.is_file()
    page = tmp_path / "all" / "report.html"
    assert f"report   {page.as_uri()}" in out and page.is_file()
    page.unlink()
    assert verb("report", tmp_path / "all")[0] == 0 and page.is_file()
    for name in ("resume", "view"):
        code, _, err = verb(name, tmp_path / "all")
        assert code == 2 and "holds 3 runs, and one is needed here: give its own folder" in err
    code, _, err = verb("eval", tmp_path / "all", "stats")
    assert code == 2 and "holds no SAE itself; its folders mlp_out.0, resid_post.0" in err


def test_shards_of_several_sites_are_a_set_for_each_and_each_is_trained_on(
    verb, recipe_file, tmp_path
):
    words = ("--acts.site", "resid_post.[01]", "--tokens", 500, "--dtype", "float32")
    code, out, err = verb("shard", recipe_file, *words, "--out", tmp_path / "acts")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if line.startswith("shards")]
    assert [row[2] for row in rows] == ["(resid_post.0)", "(resid_post.1)"]
    for (_, folder, _), site in zip(rows, ("resid_post.0", "resid_post.1")):
        given = ("--acts.shards", folder, "--acts.site", site, "--tokens", 64)
        code, _, err = verb("train", recipe_file, *given, "--out", tmp_path / site)
        assert code == 0, err
    code, _, err = verb("train", recipe_file, "--acts.shards", rows[0][1], *words[:2])
    assert code == 2 and "a set of shards is of one site" in err


def test_plan_says_what_a_recipe_costs(verb, recipe_file):
    code, out, err = verb("plan", recipe_file)
    assert code == 0, err
    weights = 2 * 64 * 16 + 64 + 16
    assert f"{weights / 1e6:,.1f} M parameters" in out
    for word in ("memory", "FLOPs", "disk", "time"):
        assert f"\n{word}" in out
    assert "acts.chat" not in out
    assert "acts.chat: the LM's part" in verb("plan", recipe_file, "--acts.chat", "template")[1]


def test_a_job_that_follows_one_run_takes_no_several_sites(verb, recipe_file, tmp_path):
    sites = ["--acts.site", "resid_post.*", "--launch", "slurm", "--out", tmp_path / "runs"]
    code, _, err = verb("train", recipe_file, *sites)
    assert code == 2 and "give one site, or `ksparse sweep`" in err
    assert not (tmp_path / "runs.launch").exists()


def test_doctor_gives_a_line_for_each_thing(verb):
    code, out, _ = verb("doctor")
    assert code == 0, out
    for name in (
        "python",
        "torch",
        "device",
        "float32",
        "bfloat16",
        "compiler",
        "triton",
        "disk",
        "hub",
        "built-in LM",
    ):
        assert any(line.split(maxsplit=1)[1].startswith(name) for line in out.splitlines()), name


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["trian"], 2, "did you mean 'train'"),
        (["train", "--sae.kk", "3"], 2, "--sae.k"),
        (["train", "--sae.k", "many"], 2, "many"),
        (["train", "--sae.k", "5000"], 2, "sae.k is 5000, more than the 4096 latents"),
        (["train", "no-such.toml"], 2, "recipe no-such.toml does not exist"),
        (
            ["train", "--acts.lm", "./no-such-model"],
            2,
            "model folder ./no-such-model does not exist",
        ),
        (["train", "--acts.lm", "pylm/9b"], 2, "there are 0.3m"),
        (["eval", "no-such-run"], 2, "neither a folder here nor a Hub repository"),
        (["eval", "."], 2, "holds no SAE"),
        (["eval"], 2, "needs an SAE, such as the run"),
        (["eval", "run", "prob"], 2, "there is no evaluation 'prob'; did you mean 'probes'?"),
        (["eval", "run", "--position", "first"], 2, "first"),
        (["eval", "run", "--budget", "huge"], 2, "huge"),
        (
            ["eval", "run", "refinment"],
            2,
            "there is no evaluation 'refinment'; did you mean 'refinement'?",
        ),
        (["eval", "run", "subspaces", "--ordering", "tsne"], 2, "tsne"),
        (
            ["eval", "run", "refinement", "--refine-exact", "-1"],
            2,
            "refine_exact of an evaluation is -1; it must not be negative",
        ),
        (["steer"], 2, "`ksparse steer` needs an SAE, such as the run"),
        (
            ["steer", "run", "--prompt", "x", "--value", "1"],
            2,
            "steering needs a latent: --latent 123",
        ),
        (
            ["steer", "run", "--latent", "3", "--value", "1"],
            2,
            "steering needs a text to continue: --prompt TEXT",
        ),
        (["steer", "run", "--latent", "3", "--prompt", "x"], 2, "give one of --value V"),
        (
            ["steer", "run", "--latent", "3", "--prompt", "x", "--value", "1", "--scale", "0"],
            2,
            "give one of --value V",
        ),
        (["attribute"], 2, "`ksparse attribute` needs an SAE, such as the run"),
        (
            ["probes"],
            2,
            "`ksparse probes` knows one thing to do, `ksparse probes build DIR`; got nothing",
        ),
        (["probes", "make", "x"], 2, "got make x"),
        (["probes", "build"], 2, "`ksparse probes build` needs the folder to write the tasks to"),
        (["probes", "build", "x", "--only", "colla"], 2, "did you mean 'cola'?"),
        (["resume", "no-such-run"], 2, "is not a run"),
        (["report", "no-such-run"], 2, "is not a run"),
    ],
)
def test_bad_input_ends_with_its_code_and_one_clear_message(
    verb, tmp_path, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    found, out, err = verb(*arguments)
    assert found == code
    assert message in " ".join((out + err).split())
    assert "Traceback" not in err


def test_a_terminal_gets_no_commands_from_names_and_logs(verb, tmp_path):
    code, _, said = verb("report", str(tmp_path / "x\x1b]0;evil\x07\u202ey é"))
    assert code == 2 and "x\\x1b]0;evil\\x07\\u202ey é is not a run" in said and "\x1b" not in said
    record = logging.LogRecord("ksparse", logging.WARNING, "", 0, "%s", ("a\x1b[2Jb\nc",), None)
    assert EscapingFormatter().format(record) == "a\\x1b[2Jb\nc"


def test_a_file_with_an_unknown_key_names_file_and_key(verb, tmp_path):
    file = tmp_path / "typo.toml"
    file.write_text("[sae]\nkk = 3\n")
    code, _, err = verb("train", file)
    assert code == 2 and f"unknown key 'sae.kk' in {file}; did you mean 'sae.k'?" in err


def test_a_changed_recipe_is_refused_with_the_keys(verb, recipe_file, tmp_path):
    assert verb("train", recipe_file, "--out", tmp_path / "run")[0] == 0
    code, _, err = verb("train", recipe_file, "--out", tmp_path / "run", "--sae.k", 2, "--seed", 5)
    assert code == 2 and "sae.k: 4 -> 2" in err and "seed: 0 -> 5" in err


def test_every_recipe_in_the_repository_is_valid():
    found = sorted((Path(__file__).resolve().parents[1] / "recipes").rglob("*.toml"))
    assert found
    for file in found:
        loaded = (
            grids.read(file).recipes.values()
            if file.parent.name == "sweeps"
            else [recipes.load_recipe(file)]
        )
        assert all(recipe.steps > 0 for recipe in loaded)


def test_fit_writes_the_law_of_a_table_of_points(verb, tmp_path):
    from ksparse.scaling.laws import published

    points = published.gpt4()
    (tmp_path / "points.csv").write_text(
        "n,k,loss\n" + "".join(f"{n:.0f},{k:.0f},{loss}\n" for n, k, loss in zip(*points.values()))
    )
    code, out, err = verb(
        "fit",
        tmp_path / "points.csv",
        "--law",
        "nk",
        "--out",
        tmp_path / "fit",
        "--predict",
        "n=65536, k=32",
        "--draws",
        50,
    )
    assert code == 0, err
    found = json.loads((tmp_path / "fit" / "law.json").read_text())
    assert (
        found["law"] == "nk"
        and found["log_rms"] <= 0.01
        and 0 < found["extrapolation_error"] < 0.03
    )
    assert all(set(each) >= {"value", "low", "high"} for each in found["coefficients"].values())
    assert (
        "loss at n = 65,536, k = 32: 0.44" in out
        and "95 % interval [0.44" in out
        and "log-RMS 0.0096" in out
    )
    assert (
        verb("fit", tmp_path / "points.csv", "--law", "n", "--form", "power_each", "--draws", 0)[0]
        == 0
    )
    assert json.loads((tmp_path / "law.json").read_text())["form"] == "power_each"


def test_fit_and_report_of_a_sweep(verb, tmp_path):
    rows = [
        f"{n},{k},{2 * n**-0.2 + 0.1 * k**-0.5}"
        for n in (512, 1024, 2048, 4096, 8192)
        for k in (8, 16, 32)
    ]
    (tmp_path / "points.csv").write_text("n,k,loss\n" + "\n".join(rows) + "\n")
    code, out, err = verb("fit", tmp_path, "--predict", "n=65536,k=32", "--draws", 0)
    assert code == 0, err
    assert (
        "b_n" in out
        and "loss at n = 65,536, k = 32" in out
        and "would add it" in out
        and "laws" in err
    )
    first = (tmp_path / "law.json").read_text()
    (tmp_path / "law.json").unlink()
    assert verb("report", tmp_path)[0] == 0 and (tmp_path / "figures" / "law-joint.svg").is_file()
    assert (
        json.loads((tmp_path / "law.json").read_text())["laws"]["nk"]["log_rms"]
        == json.loads(first)["laws"]["nk"]["log_rms"]
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fit"], "`ksparse fit` needs a sweep's folder or a CSV file of points"),
        (["fit", "points.csv"], "say which law, --law nk|n|c|tokens|lr|s"),
        (["fit", "points.csv", "--law", "nkk"], "there is no law 'nkk'; did you mean 'nk'?"),
        (["fit", "points.csv", "--law", "nk"], "points.csv does not exist"),
        (
            ["fit", "points.csv", "--law", "nk", "--budget", "1e12"],
            "--budget needs the curves of a sweep",
        ),
        (
            ["fit", "points.csv", "--law", "nk", "--predict", "n:5"],
            "--predict takes NAME=NUMBER,NAME=NUMBER, such as n=65536,k=32; got 'n:5'",
        ),
        (["fit", "points.csv", "--law", "nk", "--predict", "n=many"], "got 'n=many'"),
        (["fit", "."], ". holds no points.csv"),
        (["fit", ".", "--law", "nk"], "--law and --out are for a CSV file"),
        (["fit", "points.csv", "--law", "nk", "--draws", "-1"], "--draws is -1"),
    ],
)
def test_fit_refuses_what_it_cannot_fit(verb, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = verb(*arguments)
    assert code == 2 and message in " ".join((out + err).split()) and "Traceback" not in err


# ---- activations and studies


def test_flags_of_an_activation_are_those_of_its_kind(verb, recipe_file, tmp_path):
    code, _, err = verb(
        "train",
        recipe_file,
        "--sae.activation.kind",
        "relu",
        "--sae.activation.l1",
        "0.25",
        "--out",
        tmp_path / "run",
        "--tokens",
        "64",
    )
    assert code == 0, err
    assert RunFolder(tmp_path / "run").recipe().sae.activation == recipes.ReLUConfig(l1=0.25)


def test_a_flag_of_another_kind_is_refused_and_the_kind_named(verb):
    code, _, err = verb("train", "--sae.activation.kind=jump_relu", "--sae.activation.l1", "0.1")
    assert (
        code == 2
        and "unknown key '--sae.activation.l1' of kind 'jump_relu'; it is a key of kind relu, gated, prolu"
        in err
    )
    assert verb("plan", "--sae.activation.bandwith", "1")[0] == 2


def test_help_lists_the_keys_of_the_kind_that_is_named(verb):
    _, out, _ = verb("train", "--sae.activation.kind", "gated", "--help")
    assert "--sae.activation.aux" in out and "--sae.activation.bandwidth" not in out


def test_a_recipe_files_activation_keeps_its_options_under_flags(verb, recipe_file, tmp_path):
    file = tmp_path / "gated.toml"
    file.write_text(recipe_file.read_text().replace('kind = "topk"', 'kind = "gated"\nl1 = 0.5'))
    code, _, err = verb(
        "train", file, "--sae.activation.aux", "0.5", "--out", tmp_path / "run", "--tokens", "64"
    )
    assert code == 0, err
    assert RunFolder(tmp_path / "run").recipe().sae.activation == recipes.GatedConfig(
        l1=0.5, aux=0.5
    )


def test_a_study_prints_what_it_found_and_leaves_a_page(verb, recipe_file, tmp_path, monkeypatch):
    from ksparse.studies import ablations

    monkeypatch.setattr(ablations, "MEMBERS", {"whole": {}})
    assert verb("train", recipe_file, "--out", tmp_path / "run", "--tokens", "64")[0] == 0
    code, out, err = verb(
        "study",
        "recipe",
        "--run",
        tmp_path / "run",
        "--out",
        tmp_path / "study",
        "--tokens",
        "128",
        "--batch",
        "64",
        "--n-latents",
        "32",
        "--k",
        "2",
        "--eval-tokens",
        "100",
        "--threads",
        "1",
        "--device",
        "cpu",
    )
    assert code == 0, err
    assert (
        "- whole: " in out
        and (tmp_path / "study" / "report.html").is_file()
        and (tmp_path / "study" / "figures" / "dead.svg").is_file()
    )
    code, out, err = verb(
        "study", "positions", "--run", tmp_path / "run", "--eval-tokens", "100", "--device", "cpu"
    )
    assert code == 0 and RunFolder(tmp_path / "run").eval("positions")["positions"], err


def test_a_study_that_is_an_evaluation_needs_a_run_and_an_unknown_one_is_named(verb):
    code, _, err = verb("study", "latents")
    assert (
        code == 2 and "study 'latents' is an evaluation of one SAE: name it with --run RUN" in err
    )
    code, _, err = verb("study", "baseline")
    assert code == 2 and "there is no study 'baseline'; did you mean 'baselines'?" in err


def test_the_old_flag_optim_screen_is_taken_with_a_warning(verb, recipe_file, tmp_path, caplog):
    code, _, err = verb("train", recipe_file, "--optim.screen", "off", "--out", tmp_path / "run")
    assert code == 0 and "--optim.screen is now called --optim.approx-topk" in caplog.text, err
    assert RunFolder(tmp_path / "run").recipe().optim.approx_topk == "off"
    caplog.clear()
    assert verb("resume", tmp_path / "run")[0] == 0 and "now called" not in caplog.text
