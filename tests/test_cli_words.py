"""What is typed: help, examples, booleans, completion, and mistakes found before torch loads."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import ksparse
from ksparse import cli, studies
from ksparse.cli import arguments
from ksparse.cli.arguments import box_of, flags_of_verb
from ksparse.cli.examples import EXAMPLES
from ksparse.cli.shell import SHELLS
from ksparse.config import Config
from ksparse.config.evaluation import DEFAULT_EVALUATIONS, EVALUATIONS, STUDIES, EvalConfig
from ksparse.errors import InputError
from ksparse.evals import registry
from ksparse.sae import serialization
from ksparse.storage import hub

ROOT = Path(__file__).resolve().parents[1]


# ---- help


def test_help_lists_every_verb_in_its_group_within_the_width(verb):
    _, out, _ = verb("help")
    assert out == verb("--help")[1] == verb()[1]
    groups = re.split(r"\n\n(?=\S)", out)
    found = [set(re.findall(r"^  (\w+)", group, re.MULTILINE)) for group in groups[1:-1]]
    assert set().union(*found) == set(cli.VERBS) and len(found) == len(cli.GROUPS) == 8
    assert found[2] == {"eval", "compare", "study", "sanity", "probes", "explain"}
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_help_of_a_verb_is_its_help_flag_and_ends_its_text_with_examples(verb, name):
    code, out, _ = verb("help", name)
    assert code == 0 and out == verb(name, "--help")[1]
    words = "".join(out.split())
    assert EXAMPLES[name]
    assert all("".join(f"ksparse {name}".split()) in words for _ in EXAMPLES[name])
    assert all("".join(line.split()) in words for line in EXAMPLES[name])


def test_help_of_what_is_no_verb_says_the_nearest(verb):
    code, _, err = verb("help", "trian")
    assert code == 2 and "did you mean 'train'" in err


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_of_help_parse_as_they_stand(line, monkeypatch, tmp_path, small_recipe):
    from ksparse.config import to_toml

    class Parsed(Exception):
        pass

    def then_stop(function):
        def call(*args, **options):
            function(*args, **options)
            raise Parsed

        return call

    for module in cli.COMMAND_MODULES:
        for name in ("parse", "refuse_arguments"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, then_stop(getattr(module, name)))
    monkeypatch.setattr(arguments, "parse", then_stop(arguments.parse))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.toml").write_text(to_toml(small_recipe()))
    monkeypatch.chdir(tmp_path)
    line = re.sub(r'^eval "\$\((.*?)\)".*', r"\1", line).partition(" >")[0]
    _, name, *words = shlex.split(line)
    if name in ("help", "completion"):
        assert words[0] in (*cli.VERBS, *SHELLS)
        return
    with pytest.raises(Parsed):
        cli.VERBS[name](words)


@pytest.mark.parametrize("name", ["eval", "compare"])
def test_options_of_one_evaluation_are_in_its_box(name):
    out = subprocess.run(
        [sys.executable, "-m", "ksparse", name, "--help"],
        env={**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    ).stdout
    boxes = {
        title: set(re.findall(r"^│ --([\w-]+)", body, re.MULTILINE))
        for title, body in re.findall(r"╭─ (.+?) ─+╮\n(.*?)╰─", out, re.DOTALL)
    }
    for field in fields(EvalConfig):
        box = box_of(field).replace("_", "-")
        assert field.name.replace("_", "-") in boxes[f"{box} options".strip()], field.name
    assert {"probes options", "n2g options", "ablation options"} <= set(boxes)


def test_options_in_boxes_reach_the_evaluations():
    from ksparse.cli.evaluate import CompareArgs, EvalArgs

    words = ["--probe-rows", "7", "--force", "--lm", "gpt2", "--ordering", "umap", "--seed=3"]
    for options in (EvalArgs, CompareArgs):
        args = arguments.parse(options, "eval", words)
        assert type(args) is options and (args.probe_rows, args.force, args.lm) == (7, True, "gpt2")
        assert (args.ordering, args.seed, args.n2g_variant) == ("umap", 3, "ksparse")


# ---- booleans


@dataclass(frozen=True)
class _Switches(Config):
    """Options with a boolean of each default."""

    on: bool = True
    """On."""
    off_now: bool = False
    """Off."""
    text: str = ""
    """Not a boolean."""


@pytest.mark.parametrize(
    "words, on, off_now",
    [
        ([], True, False),
        (["--off-now"], True, True),
        (["--no-on", "--off_now"], False, True),
        (["--on", "False", "--off-now", "True"], False, True),
        (["--on=False", "--off_now=True"], False, True),
        (["--no-off-now"], True, False),
    ],
)
def test_a_boolean_is_a_flag_and_its_old_spelling_stays(words, on, off_now):
    args = arguments.parse(_Switches, "eval", [*words, "--text", "True"])
    assert (args.on, args.off_now, args.text) == (on, off_now, "True")


def test_booleans_of_sections_are_switched_off_in_their_section():
    from ksparse.cli.train import TrainArgs

    for words in (["--sae.no-unit-norm"], ["--sae.unit-norm", "False"]):
        recipe, _, _ = arguments.parse_recipe(TrainArgs, "train", words)
        assert recipe.sae.unit_norm is False


@pytest.mark.parametrize("words", [["--on", "maybe"], ["--on=maybe"], ["--off-now", "false"]])
def test_another_value_of_a_boolean_is_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        arguments.parse(_Switches, "eval", words)
    said = capsys.readouterr()
    assert end.value.code == 2 and words[-1].partition("=")[2] in said.out + said.err


# ---- names without torch


def test_names_that_the_command_line_knows_are_those_that_there_are():
    assert tuple(registry.DEFAULT) == DEFAULT_EVALUATIONS
    assert tuple(registry.EVALS) == EVALUATIONS
    assert set(studies.STUDIES) == set(STUDIES)


@pytest.mark.parametrize(
    "words, message",
    [
        ("trian", "did you mean 'train'"),
        ("eval . downstrem", "did you mean 'downstream'"),
        ("eval . --probe-row 3", "--probe-rows"),
        ("compare a b --evals downstrem", "did you mean 'downstream'"),
        ("study papr", "did you mean 'paper'"),
        ("train --sae.nlatents 3", "--sae.n-latents"),
        ("train --sae.k 5000", "more than the 4096 latents"),
        ("eval runs/nope", "the SAE runs/nope does not exist"),
        ("compare runs/nope runs/nope2", "the SAE runs/nope does not exist"),
        ("steer runs/nope --latent 1 --value 1 --prompt x", "the SAE runs/nope does not exist"),
        ("attribute runs/nope --prompt x", "the SAE runs/nope does not exist"),
        ("convert runs/nope new --to sae_lens", "the SAE runs/nope does not exist"),
        ("report runs/nope", "is not a run"),
        ("resume runs/nope", "is not a run"),
        ("view runs/nope", "is not a run"),
        ("completion tcsh", "there is no completion for 'tcsh'"),
    ],
)
def test_mistakes_are_found_before_torch_loads(words, message, tmp_path):
    code = (
        "import sys, ksparse.cli\n"
        "try: ksparse.cli.main(sys.argv[1:])\n"
        "except SystemExit as end: print('code', end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, cwd=tmp_path
    )
    assert message in " ".join((done.stdout + done.stderr).split()), done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "code 2 False"


# ---- the Hub


@pytest.mark.parametrize(
    "name, local",
    [
        ("gpt2", False),
        ("owner/name", False),
        ("Qwen/Qwen2.5-0.5B", False),
        ("release/blocks.8/x", False),
        ("./gpt2", True),
        ("/models/gpt2", True),
        ("~/gpt2", True),
        ("runs/mine", True),
        ("model.gguf", True),
        ("owner/weights.safetensors", True),
        ("here/nothing", False),
        ("here/below/nothing", True),
    ],
)
def test_what_is_plainly_a_path_is_told_from_a_name_on_the_hub(name, local, tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.is_plainly_local(name) is local


@pytest.fixture
def no_requests(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)


@pytest.mark.parametrize(
    "name",
    ["./nope", "/nope/at/all", "runs/nope", "nope.safetensors", "a/b/c", "a--b", "here/x/no"],
)
def test_a_missing_path_is_one_sentence_without_a_request(name, no_requests, tmp_path, monkeypatch):
    from ksparse.lm.loading import find_model

    (tmp_path / "here" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"^the SAE {re.escape(name)} does not exist; give a run"):
        serialization.locate(name)
    with pytest.raises(InputError, match=rf"^model folder {re.escape(name)} does not exist; give"):
        find_model(name)


@pytest.mark.parametrize("name", ["here/no"])
def test_a_name_of_the_hub_in_a_folder_that_is_here_is_asked_for_and_both_are_named(
    name, tmp_path, monkeypatch
):
    """A folder may have the name of an owner: `google/` with models of one's own."""
    from ksparse.config import ActsConfig
    from ksparse.data import documents

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    both = r"(Hub|cannot be loaded|data set).*nor is it here: the folder here has no 'no'"
    for load in (
        ksparse.load,
        ksparse.LM,
        lambda name: next(iter(documents.documents(ActsConfig(text=name), "train"))),
    ):
        with pytest.raises(InputError, match=both):
            load(name)


@pytest.mark.parametrize("text", ["texts/mine.txt", "runs/nope", "here/x/nothing", "~/texts"])
def test_a_missing_text_is_no_data_set_on_the_hub(text, tmp_path, monkeypatch):
    from ksparse.config import ActsConfig
    from ksparse.data import documents

    (tmp_path / "here" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"text {re.escape(text)} does not exist; give a file"):
        next(iter(documents.documents(ActsConfig(text=text), "train")))


def test_a_hub_that_does_not_answer_is_one_line_after_one_try(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "no_proxy": "*"}
    done = subprocess.run(
        [sys.executable, "-m", "ksparse", "train", "--acts.lm", "nosuch/model", "--out", "runs/x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("training")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "model 'nosuch/model' is not on this machine, and the Hub" in lines[0]


def test_a_train_that_failed_leaves_a_folder_that_the_corrected_one_takes(
    verb, small_recipe, tmp_path
):
    from ksparse.config import to_toml

    (file := tmp_path / "small.toml").write_text(to_toml(small_recipe()))
    code, _, err = verb("train", file, "--acts.lm", tmp_path / "nosuch", "--out", tmp_path / "run")
    assert code == 2 and "does not exist" in err
    code, _, err = verb("train", file, "--acts.site", "resid_post.99", "--out", tmp_path / "run")
    assert code == 2 and "resid_post" in err
    assert verb("train", file, "--out", tmp_path / "run")[0] == 0


# ---- completion


def complete(line: str, folder: Path, script: str) -> list[str]:
    """Return what bash offers for a line that is typed so far."""
    words = line.split(" ")
    body = (
        f"{script}\nCOMP_WORDS=({' '.join(map(shlex.quote, words))})\n"
        f'COMP_CWORD={len(words) - 1}\n_ksparse\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", body], capture_output=True, text=True, cwd=folder, check=True
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_verbs_recipes_runs_options_and_values(verb, tmp_path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "recipe.toml").touch()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.toml").touch()
    script = verb("completion", "bash")[1]

    def offered(line: str) -> list[str]:
        return complete(line, tmp_path, script)

    assert offered("ksparse tra") == ["train"] and set(offered("ksparse ")) == set(cli.VERBS)
    assert offered("ksparse train recipes/m") == ["recipes/mine.toml"]
    assert offered("ksparse train m") == ["recipes/mine.toml"]
    assert offered("ksparse eval runs/d") == offered("ksparse view d") == ["runs/demo"]
    assert offered("ksparse eval runs/demo down") == ["downstream"]
    assert offered("ksparse help st") == ["steer", "study"]
    assert offered("ksparse train --sae.n-l") == ["--sae.n-latents"]
    assert offered("ksparse eval runs/demo --no-f") == ["--no-force"]
    assert offered("ksparse eval runs/demo --budget p") == ["paper"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_script(verb, shell, tmp_path):
    script = verb("completion", shell)[1]
    assert all(name in script for name in cli.VERBS) and "n-latents" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_flags_that_are_completed_are_those_of_help(verb):
    for name in cli.VERBS:
        written = set(re.findall(r"--([a-zA-Z][\w.-]*)", verb(name, "--help")[1]))
        known = {word.removeprefix("--") for flag in flags_of_verb(name) for word in flag.words}
        examples = {
            flag for line in EXAMPLES[name] for flag in re.findall(r"--([a-zA-Z][\w.-]*)", line)
        }
        others = {"from"} if name == "shard" else set()  # its options are those of another call
        assert examples - others <= {*known, "help"} or name == "bench", name  # its --lm too
        shown = {flag for flag in known if not flag.startswith("sae.activation")}
        assert shown - {"no-trust-remote-code"} <= written | {"trust-remote-code"}, name


def test_a_completion_of_no_shell_says_which_there_are(verb):
    code, _, err = verb("completion")
    assert code == 2 and "needs one shell, bash, zsh, fish; got nothing" in err
