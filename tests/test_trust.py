"""Nothing in a folder makes its code run: only the call that reads it can."""

import dataclasses
import json
import shutil

import pytest

import ksparse
from ksparse import config as recipes
from ksparse.cli import main
from ksparse.errors import InputError
from ksparse.scaling.sweeps import launch
from ksparse.trust import code_is_trusted, split_trust_flag, trusted


@pytest.fixture
def own_code(tiny_lm, tmp_path):
    """Return (the folder of an LM with code of its own, a file that this code makes)."""
    folder, ran = tmp_path / "lm", tmp_path / "ran"
    shutil.copytree(tiny_lm("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            config
            | {
                "model_type": "own",
                "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"},
            }
        )
    )
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\nclass OwnLM(LlamaForCausalLM):\n    config_class = Own\n"
    )
    return folder, ran


@pytest.fixture
def evil(own_code, small_recipe, tmp_path):
    """Return (a run whose recipe says that code may run, the file that the code makes), trained without that code."""
    folder, ran = own_code
    run = ksparse.train(small_recipe({"run.save_every": 0}), tmp_path / "run")
    recipe = small_recipe()
    recipe = dataclasses.replace(recipe, acts=dataclasses.replace(recipe.acts, lm=str(folder)))
    run.recipe_file.write_text(
        recipes.to_toml(recipe).replace("[run]", "[run]\ntrust_remote_code = true")
    )
    return run, ran


def cli(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
        raise SystemExit(0)
    return caught.value.code


def test_a_recipe_cannot_allow_code_to_run(own_code, small_recipe, tmp_path, caplog):
    folder, ran = own_code
    file = tmp_path / "evil.toml"
    file.write_text(
        recipes.to_toml(small_recipe({"acts.lm": str(folder)})).replace(
            "[run]", "[run]\ntrust_remote_code = true"
        )
    )
    assert "trust" not in recipes.to_toml(recipes.load_recipe(file)) and not hasattr(
        recipes.load_recipe(file).run, "trust_remote_code"
    )
    assert (
        f"run.trust_remote_code in {file} is ignored: a file cannot allow code to run"
        in caplog.text
    )
    for verb in (
        ["plan", file],
        ["train", file, "--out", tmp_path / "r"],
        ["shard", file, "--out", tmp_path / "s"],
    ):
        assert cli(*verb) == 2
        assert not ran.exists()


def test_an_older_recipe_without_leave_is_read_without_a_word(tmp_path, caplog):
    file = tmp_path / "old.toml"
    file.write_text("[run]\ntrust_remote_code = false\n")
    assert recipes.load_recipe(file) == recipes.Recipe() and not caplog.records


def test_a_foreign_run_runs_no_code_in_any_verb(evil, tmp_path, capsys):
    run, ran = evil
    for verb in (
        ["plan", run.recipe_file],
        ["resume", run.path],
        ["eval", run.path, "stats"],
        ["report", run.path],
        ["view", run.path, "--export", tmp_path / "site"],
        ["steer", run.path, "--latent", 1, "--value", 1, "--prompt", "the"],
        ["study", "sites", "--run", run.path, "--out", tmp_path / "study"],
    ):
        cli(*verb)
        assert not ran.exists(), verb


def test_the_flag_of_the_call_lets_code_run_in_every_verb_that_loads_an_lm(
    own_code, small_recipe, tmp_path, capsys
):
    folder, ran = own_code
    file = tmp_path / "mine.toml"
    file.write_text(recipes.to_toml(small_recipe({"acts.lm": str(folder)})))
    run = tmp_path / "run"
    for verb in (
        ["plan", file],
        ["train", file, "--out", run],
        ["eval", run, "stats", "--tokens", 100],
        ["steer", run, "--latent", 1, "--value", 1, "--prompt", "the cat", "--tokens", 2],
    ):
        assert cli(*verb, "--trust-remote-code", "True") == 0, capsys.readouterr().err
        assert ran.exists()
        assert cli(*verb) == (0 if verb[0] in ("train", "eval") else 2), (
            "what the last call was allowed, this one is not"
        )  # a finished run and finished results load no LM
    assert (
        "trust" not in (run / "recipe.toml").read_text()
        and "trust" not in (run / "evals" / "stats.json").read_text()
    )


def test_in_python_it_is_an_argument_of_the_call(own_code, small_recipe, tmp_path):
    folder, ran = own_code
    with pytest.raises(
        InputError, match="trust-remote-code True .in Python trust_remote_code=True"
    ):
        ksparse.train(small_recipe({"acts.lm": str(folder)}), tmp_path / "a")
    assert not ran.exists()
    ksparse.train(small_recipe({"acts.lm": str(folder)}), tmp_path / "a", trust_remote_code=True)
    assert ran.exists() and not code_is_trusted()


def test_workers_of_a_sweep_are_told_on_their_command_line(tmp_path):
    assert "--trust-remote-code" not in launch.command(tmp_path, ["a"])
    with trusted(True):
        assert launch.command(tmp_path, ["a"])[-2:] == ["--trust-remote-code", "True"]
        with trusted(False):
            assert code_is_trusted(), "an inner call does not take back what the outer one allows"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--trust-remote-code="], "is ''; give it alone, or with True or False"),
        (["--trust-remote-code", "no"], "is 'no'; give it alone, or with True or False"),
        (["--trust_remote_code=yes"], "is 'yes'; give it alone, or with True or False"),
        (
            ["--run.trust-remote-code", "True"],
            "is not a key of a recipe, since a stored one could set it",
        ),
        (["--run.trust_remote_code=True"], "is not a key of a recipe"),
    ],
)
def test_the_flag_takes_true_or_false(words, message):
    with pytest.raises(InputError, match=message):
        split_trust_flag(words)


def test_the_flag_is_taken_off_and_the_rest_stays():
    assert split_trust_flag(["a", "--trust-remote-code=True", "--b", "c"]) == (
        True,
        ["a", "--b", "c"],
    )
    assert split_trust_flag(["--trust_remote_code", "False", "d"]) == (False, ["d"])
    assert split_trust_flag(["a", "--trust-remote-code", "--b"]) == (True, ["a", "--b"])
    assert split_trust_flag(["a", "--trust-remote-code"]) == (True, ["a"])


def test_a_config_does_not_name_code_of_the_hub_for_its_attention(tiny_lm, tmp_path):
    shutil.copytree(tiny_lm("llama"), tmp_path / "lm")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    for key in ("attn_implementation", "_attn_implementation"):
        (tmp_path / "lm" / "config.json").write_text(json.dumps(config | {key: "somebody/kernel"}))
        with pytest.raises(
            InputError,
            match="its config names 'somebody/kernel', code on the Hub, for its attention",
        ):
            ksparse.LM(str(tmp_path / "lm"), site="resid_post.1")


def test_plan_does_not_fetch_attention_code_that_a_config_names(tiny_lm, tmp_path, capsys):
    shutil.copytree(tiny_lm("llama"), tmp_path / "lm")
    file = tmp_path / "lm" / "config.json"
    config = json.loads(file.read_text())
    kernel = {"_attn_implementation": "somebody/kernel"}
    file.write_text(json.dumps(config | kernel))
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--acts.lm", str(tmp_path / "lm"), "--acts.site", "resid_post.1"])
    assert ended.value.code == 2
    assert "its config names 'somebody/kernel', code on the Hub" in capsys.readouterr().err
