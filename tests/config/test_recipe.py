"""A recipe is frozen, complete data: TOML there and back, and every mistake in it is named."""

import dataclasses
import math
import tomllib
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksparse import config as recipes
from ksparse.config import (
    ActsConfig,
    CurveConfig,
    MeshConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    SAEConfig,
    from_dict,
    k_aux,
    load_recipe,
    recipe_of,
    to_dict,
    to_toml,
)
from ksparse.config.evaluation import EvalConfig, StudyConfig, budget_sizes
from ksparse.errors import InputError
from ksparse.evals.registry import EVALS
from ksparse.storage import jsonio
from ksparse.storage.run_folder import RunFolder
from ksparse.training import train
from ksparse.training.steps.autograd import rate_share

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def values(hint):
    """Return a strategy for one key's values."""
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return st.lists(values(typing.get_args(hint)[0]), max_size=3).map(tuple)
    return {
        str: TEXT,
        bool: st.booleans(),
        int: st.integers(8, 10**12),
        float: st.floats(1e-12, 0.9),
    }[hint]


def sections(kind):
    hints = {each.name: typing.get_type_hints(kind)[each.name] for each in dataclasses.fields(kind)}
    return st.builds(
        kind,
        **{
            name: sections(hint) if dataclasses.is_dataclass(hint) else values(hint)
            for name, hint in hints.items()
            if (kind, name)
            not in {
                (SAEConfig, "k"),
                (SAEConfig, "n_latents"),
                (SAEConfig, "activation"),
                (SAEConfig, "prefixes"),
                (SAEConfig, "prefix_draws"),
                (SAEConfig, "decoder_cosine_min"),
                (SAEConfig, "k_start"),
                (SAEConfig, "lm_loss"),
                (ActsConfig, "lm_weights"),
                (ActsConfig, "chat"),
                (ActsConfig, "roles"),
                (OptimConfig, "decay"),
                (CurveConfig, "window"),
                (MeshConfig, "capacity"),
            }
        },
    )  # what other values may forbid


@pytest.mark.parametrize("kind", recipes.ACTIVATION_CONFIGS.values())
def test_toml_round_trip_of_every_key_of_each_activation(tmp_path, kind):
    @given(activation=sections(kind))
    def check(activation):
        unit_norm = getattr(activation, "penalty", "") != "decoder_norm"
        recipe = Recipe(sae=SAEConfig(activation=activation, unit_norm=unit_norm))
        (tmp_path / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
        assert (
            load_recipe(tmp_path / "recipe.toml") == recipe and from_dict(to_dict(recipe)) == recipe
        )

    check()


def test_a_recipe_without_an_activation_is_one_of_topk():
    table = to_dict(Recipe())
    del table["sae"]["activation"]
    assert from_dict(table) == Recipe() and Recipe().sae.activation.kind == "topk"


@given(recipe=sections(Recipe))
def test_toml_round_trip_of_every_key(tmp_path_factory, recipe):
    file = tmp_path_factory.getbasetemp() / "recipe.toml"
    file.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert from_dict(to_dict(recipe)) == recipe


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_toml_keeps_any_text(text):
    recipe = Recipe(acts=ActsConfig(text=text))
    assert tomllib.loads(to_toml(recipe))["acts"]["text"] == text


def test_toml_writes_every_key_so_that_a_changed_default_does_not_change_an_old_run():
    written = recipes.flat(tomllib.loads(to_toml(Recipe())))
    assert written == recipes.flat(to_dict(Recipe())) and len(written) > 40


def test_a_recipe_is_frozen():
    for part in (Recipe(), ActsConfig(), SAEConfig(), OptimConfig(), RunConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)


@pytest.mark.parametrize(
    "table, message",
    [
        ({"sae": {"kk": 3}}, r"unknown key 'sae\.kk'; did you mean 'sae\.k'\?"),
        ({"sae": {"n_latent": 3}}, r"unknown key 'sae\.n_latent'; did you mean 'sae\.n_latents'\?"),
        ({"token": 3}, r"unknown key 'token'; did you mean 'tokens'\?"),
        ({"k": 3}, r"unknown key 'k'; did you mean 'sae\.k'\?"),
        ({"k_aux": 3}, r"unknown key 'k_aux'; did you mean 'sae\.k_aux'\?"),
        ({"zzzzzzzz": 3}, r"unknown key 'zzzzzzzz'; the keys are acts\.lm, .* threads"),
        ({"sae": 3}, r"'sae' is a section; write \[sae\] and its keys"),
        ({"sae": {"k": "3"}}, r"'sae\.k' is '3', of type str; it must be of type int"),
        ({"sae": {"k": 3.5}}, r"'sae\.k' is 3\.5, of type float; it must be of type int"),
        ({"sae": {"k": True}}, r"'sae\.k' is True, of type bool; it must be of type int"),
        ({"optim": {"lr": True}}, r"'optim\.lr' is True, of type bool; it must be of type float"),
        (
            {"optim": {"lr": "1e-3"}},
            r"'optim\.lr' is '1e-3', of type str; it must be of type float",
        ),
        ({"sae": {"b_enc": 1}}, r"'sae\.b_enc' is 1, of type int; it must be of type bool"),
        ({"acts": {"lm": 1}}, r"'acts\.lm' is 1, of type int; it must be of type str"),
        ({"tokens": math.inf}, r"'tokens' is inf, of type float; it must be of type int"),
        (
            {"acts": {"normalize": "unit_norms"}},
            r"'acts\.normalize' is 'unit_norms'; it must be one of 'unit_norm', .*'none'\. Did you mean 'unit_norm'\?",
        ),
        ({"acts": {"bos": True}}, r"'acts\.bos' is True; it must be one of 'auto', 'none'"),
        ({"run": {"loggers": "wandb"}}, r"'run\.loggers' is 'wandb'; it must be a list"),
        (
            {"run": {"loggers": ["wandbb"]}},
            r"'run\.loggers' is 'wandbb'; it must be one of 'tensorboard', 'wandb', 'trackio'\. Did you mean 'wandb'\?",
        ),
        ({"sae": {"k": 0}}, r"sae\.k is 0; it must be at least 1"),
        ({"sae": {"auxk_share": 0}}, r"sae\.auxk_share is 0\.0; it must be above 0 and at most 1"),
        (
            {"sae": {"auxk_share": 1.5}},
            r"sae\.auxk_share is 1\.5; it must be above 0 and at most 1",
        ),
        ({"mesh": {"latent": -1}}, r"mesh\.latent is -1; it must not be negative"),
        ({"mesh": {"data": -1}}, r"mesh\.data is -1; it must not be negative"),
        (
            {"mesh": {"capacity": 0.5}},
            r"mesh\.capacity is 0\.5; below 1 .* give 0 \(exact\) or at least 1",
        ),
        ({"mesh": {"timeout": 0}}, r"mesh\.timeout is 0\.0; it must be above 0 seconds"),
        ({"sae": {"n_latents": -1}}, r"sae\.n_latents is -1; it must be at least 1"),
        ({"tokens": 0}, r"tokens is 0; it must be at least 1"),
        ({"batch": 0}, r"batch is 0; it must be at least 1"),
        ({"acts": {"lm_batch": -1}}, r"acts\.lm_batch is -1; it must not be negative"),
        ({"acts": {"mix": 0}}, r"acts\.mix is 0; it must be at least 1"),
        ({"run": {"log_every": 0}}, r"run\.log_every is 0; it must be at least 1"),
        ({"run": {"keep": 0}}, r"run\.keep is 0; it must be at least 1"),
        (
            {"sae": {"k": 5, "n_latents": 4}},
            r"sae\.k is 5, more than the 4 latents of sae\.n_latents; give a smaller k",
        ),
        (
            {"sae": {"k": 2, "n_latents": 7, "multi_topk": 0.125}},
            r"Multi-TopK needs 4 x sae\.k = 8 latents, sae\.n_latents is 7",
        ),
        ({"sae": {"activation": 3}}, r"'sae\.activation' is a section; write \[sae\.activation\]"),
        (
            {"sae": {"activation": {"kind": "rel"}}},
            r"'sae\.activation\.kind' is 'rel'; it must be one of 'topk', .*Did you mean 'relu'\?",
        ),
        (
            {"sae": {"activation": {"kind": "relu", "bandwidth": 1.0}}},
            r"unknown key 'sae\.activation\.bandwidth' of kind 'relu'; it is a key of kind jump_relu",
        ),
        (
            {"sae": {"activation": {"l1": 1.0}}},
            r"unknown key 'sae\.activation\.l1' of kind 'topk'; it is a key of kind relu, gated, prolu",
        ),
        (
            {"sae": {"activation": {"kind": "relu", "l": 1.0}}},
            r"unknown key 'sae\.activation\.l' of kind 'relu'; did you mean 'sae\.activation\.l1'\?",
        ),
        (
            {"sae": {"activation": {"kind": "relu", "zzz": 1.0}}},
            r"unknown key 'sae\.activation\.zzz' of kind 'relu'; its keys are kind, l1",
        ),
        (
            {"sae": {"activation": {"kind": "relu", "l1": "a"}}},
            r"'sae\.activation\.l1' is 'a', of type str; it must be of type float",
        ),
        (
            {"sae": {"activation": {"kind": "relu", "l1": -1.0}}},
            r"sae\.activation\.l1 is -1\.0; it must not be negative",
        ),
        (
            {"sae": {"activation": {"kind": "gated", "resample": -1}}},
            r"sae\.activation\.resample is -1; it must not be negative",
        ),
        (
            {"sae": {"activation": {"kind": "jump_relu", "warmup": 1.5}}},
            r"sae\.activation\.warmup is 1\.5; it must be from 0 to 1",
        ),
        (
            {"sae": {"activation": {"kind": "jump_relu", "bandwidth": -0.1}}},
            r"sae\.activation\.bandwidth is -0\.1; it must not be negative",
        ),
        (
            {"sae": {"activation": {"kind": "batch_topk", "threshold_decay": 1.0}}},
            r"threshold_decay is 1\.0; it must be from 0 to 1, and less than 1",
        ),
        (
            {"sae": {"activation": {"kind": "relu"}, "multi_topk": 0.1}},
            r"sae\.multi_topk is 0\.1; it is for sae\.activation\.kind = 'topk', not 'relu'",
        ),
        (
            {"sae": {"activation": {"kind": "relu"}, "auxk_coef": 0.5}},
            r"sae\.auxk_coef is 0\.5; sae\.activation\.kind = 'relu' has no AuxK but sae\.activation\.resample",
        ),
        (
            {"sae": {"activation": {"kind": "relu", "penalty": "decoder_norm"}}},
            r"'decoder_norm', which is for decoder rows of free norm; give sae\.unit_norm = false",
        ),
        (
            {"sae": {"activation": {"kind": "relu"}, "unit_norm": False}},
            r"would evade the L1 penalty of sae\.activation\.kind = 'relu'; leave it true, or give .*decoder_norm",
        ),
        (
            {"sae": {"activation": {"kind": "prolu"}, "unit_norm": False}},
            r"would evade the L1 penalty of sae\.activation\.kind = 'prolu'; leave it true$",
        ),
        (
            {"sae": {"activation": {"kind": "gated"}, "b_enc": False}},
            r"sae\.activation\.kind = 'gated' is sparse by its biases, and needs them",
        ),
        ({"acts": {"context": 2}}, r"acts\.context is 2; a context needs at least 3 tokens"),
        *[
            (
                {section: {key: value}} if section else {key: value},
                rf"{section and section + '.'}{key} is {value}; it must .*not be negative",
            )
            for section, key, value in [
                ("sae", "auxk_coef", -0.5),
                ("sae", "k_aux", -1),
                ("sae", "dead_after", -1),
                ("sae", "multi_topk", -0.5),
                ("optim", "lr", -0.5),
                ("optim", "warmup", -1),
                ("optim", "clip", -0.5),
                ("", "threads", -1),
                ("", "seed", -1),
                ("run", "save_every", -1),
            ]
        ],
        *[
            (
                {"optim": {key: value}},
                rf"optim\.{key} is {value}; it must be from 0 up to, but not including, 1",
            )
            for key, value in [
                ("ema", 1.0),
                ("ema", -0.1),
                ("beta1", 1.0),
                ("beta2", 1.5),
            ]
        ],
        ({"optim": {"decay": 1.5}}, r"optim\.decay is 1\.5; it must be from 0 to 1$"),
        *[
            ({section: {key: math.nan}}, rf"{section}\.{key}' is nan; it must be a finite number")
            for section, key in [
                ("optim", "lr"),
                ("optim", "clip"),
                ("optim", "eps"),
                ("optim", "lr_at_32k"),
                ("sae", "auxk_coef"),
                ("sae", "multi_topk"),
                ("optim", "ema"),
                ("run", "save_minutes"),
            ]
        ],
        *[
            ({section: {key: math.inf}}, rf"{section}\.{key}' is inf")
            for section, key in [("optim", "lr"), ("sae", "auxk_coef")]
        ],
    ],
    ids=str,
)
def test_every_mistake_is_named(table, message):
    with pytest.raises(InputError, match=message):
        from_dict(table)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Recipe(tokens="200k"), r"'tokens' is '200k', of type str; it must be of type int"),
        (
            lambda: Recipe(tokens=None),
            r"'tokens' is None, of type NoneType; it must be of type int",
        ),
        (
            lambda: recipes.SAEConfig(k=1.5),
            r"'sae\.k' is 1\.5, of type float; it must be of type int",
        ),
        (
            lambda: recipes.OptimConfig(lr="fast"),
            r"'optim\.lr' is 'fast', of type str; it must be of type float",
        ),
        (
            lambda: recipes.OptimConfig(beta1=math.nan),
            r"'optim\.beta1' is nan; it must be a finite number$",
        ),
        (
            lambda: recipes.OptimConfig(lr=1e308),
            r"'optim\.lr' is 1e\+308; it must be a finite number, at most 3e\+38",
        ),
        (
            lambda: recipes.ReLUConfig(l1=math.inf),
            r"'sae\.activation\.l1' is inf; it must be a finite number",
        ),
        (
            lambda: recipes.ActsConfig(bos="always"),
            r"'acts\.bos' is 'always'; it must be one of 'auto', 'none'",
        ),
        (
            lambda: recipes.RunConfig(loggers="wandb"),
            r"'run\.loggers' is 'wandb'; it must be a list",
        ),
        (
            lambda: Recipe(sae=3),
            r"'sae' is 3; it must be SAEConfig\(…\), or a dictionary of its keys",
        ),
        (
            lambda: Recipe(sae=recipes.ActsConfig()),
            r"'sae' is ActsConfig\(.*; it must be SAEConfig",
        ),
        (lambda: Recipe(sae={"kk": 3}), r"unknown key 'sae\.kk'"),
        (
            lambda: recipes.SAEConfig(activation="relu"),
            r"'sae\.activation' is 'relu'; it must be TopKConfig\(…\) or BatchTopKConfig",
        ),
        (
            lambda: EvalConfig(tokens="many"),
            r"'tokens' is 'many', of type str; it must be of type int",
        ),
        (lambda: EvalConfig(probe_l2=math.inf), r"'probe_l2' is inf; it must be a finite number"),
        (lambda: EvalConfig(seed=-1), r"seed of an evaluation is -1; it must not be negative"),
        (
            lambda: StudyConfig(tokens=1.5),
            r"'tokens' is 1\.5, of type float; it must be of type int",
        ),
        (
            lambda: Recipe(optim=recipes.OptimConfig(lr_at_32k=0.0)),
            r"optim\.lr_at_32k is 0\.0; it must be above 0",
        ),
        (
            lambda: Recipe(optim=recipes.OptimConfig(eps=0.0)),
            r"optim\.eps is 0\.0; it must be above 0",
        ),
        (lambda: Recipe(order=-2), r"order is -2; it must be -1, as seed, or not be negative"),
        (
            lambda: Recipe(run=recipes.RunConfig(save_minutes=-1.0)),
            r"run\.save_minutes is -1\.0; it must not be negative",
        ),
    ],
)
def test_python_is_told_what_toml_is_told(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_what_stands_for_a_value_becomes_it_in_python_as_in_toml():
    made = Recipe(
        tokens=1e6,
        sae={"n_latents": 128, "k": 4, "activation": {"kind": "relu", "l1": 1}},
        run=recipes.RunConfig(loggers=["wandb"]),
    )
    assert (made.tokens, made.sae.n_latents, made.sae.activation, made.run.loggers) == (
        1_000_000,
        128,
        recipes.ReLUConfig(l1=1.0),
        ("wandb",),
    )
    assert type(made.tokens) is int and made == from_dict(recipes.to_dict(made))


@pytest.mark.parametrize(
    "optim, message",
    [
        (
            {"warmup": 101},
            r"optim\.warmup is 101 steps; the run has 100 \(6,400 tokens in batches of 64\): it would never reach its learning rate\. Give a shorter warm-up, or more tokens",
        ),
        (
            {"warmup": 60, "decay": 0.5},
            r"the run has 100 .*, of which the rate falls in the last 50: it would never reach .*less optim\.decay",
        ),
    ],
)
def test_a_run_that_never_reaches_its_learning_rate_is_refused_before_it_begins(
    optim, message, tmp_path
):
    recipe = from_dict({"optim": optim, "tokens": 6400, "batch": 64})
    with pytest.raises(InputError, match=message):
        train.begin(RunFolder(tmp_path), recipe)
    assert not (tmp_path / "recipe.toml").exists()


@pytest.mark.parametrize(
    "optim",
    [{"warmup": 100}, {"warmup": 51, "decay": 0.5}, {"decay": 1}, {"warmup": 1, "decay": 1}],
)
def test_a_run_that_has_its_learning_rate_at_one_step_is_not(optim):
    recipe = from_dict({"optim": optim, "tokens": 6400, "batch": 64})
    recipes.check_schedule(recipe)
    assert max(rate_share(step, recipe) for step in range(1, 101)) == 1.0


def test_decay_may_be_the_whole_run():
    assert from_dict({"optim": {"decay": 1}}).optim.decay == 1.0


def test_whole_numbers_may_be_written_as_floats_and_floats_as_whole_numbers():
    recipe = from_dict({"tokens": 1e9, "optim": {"lr": 1}})
    assert (
        recipe.tokens == 10**9
        and isinstance(recipe.tokens, int)
        and isinstance(recipe.optim.lr, float)
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("sae = ", "is not TOML"),
        ("[sae]\nkk = 3", r"unknown key 'sae\.kk' in .*it\.toml; did you mean"),
        ("k = 1\nk = 2", "is not TOML"),
    ],
)
def test_a_file_with_a_mistake_is_named(tmp_path, text, message):
    (tmp_path / "it.toml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(tmp_path / "it.toml")
    assert "it.toml" in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a" + ".a" * 3_001 + " = 1", "or 3,000 dots in a line"),
        ("[a" + ".a" * 3_001 + "]", "or 3,000 dots in a line"),
        ("".join(f"[{i}{'.a' * 400}]\n" for i in range(60)), "or 3,000 dots in a line"),
        ("#" * 9_000_000, "more than 8,388,608 bytes"),
        ("[" * 5_000, "is not TOML"),
        ("seed = [" + "[" * 5_000, "is not TOML: maximum recursion"),
        ("seed = " + "1" * 5_000, "is not TOML: Exceeds the limit"),
        (
            "acts.lm = 0x" + "f" * 5_000,
            "is a number of thousands of digits, of type int; it must be of type str",
        ),
        ("acts.bos = 0x" + "f" * 5_000, "must be one of 'auto', 'none'"),
        ("k" * 100_000 + " = 1", "unknown key 'kkkk"),
        ("sae.activation." + "k" * 100_000 + " = 1", "unknown key 'sae.activation.kkkk"),
        ("seed = '" + "x" * 100_000 + "'", "is 'xxxx"),
        ("run.loggers = '" + "x" * 100_000 + "'", "it must be a list"),
        ("acts = 7", "'acts' in .* is a section"),
        ("seed = 1\r\n\r\n\0", "is not TOML"),
    ],
    ids=[
        "dots",
        "dotted_header",
        "many_headers",
        "large",
        "brackets",
        "lists",
        "digits",
        "hex",
        "hex_choice",
        "long_key",
        "long_key_of_a_kind",
        "long_value",
        "long_list",
        "no_section",
        "nul",
    ],
)
def test_a_hostile_file_is_one_short_error(tmp_path, text, message):
    (tmp_path / "r.toml").write_text(text, newline="")
    with pytest.raises(InputError, match=message) as error:
        recipes.load_recipe(tmp_path / "r.toml")
    assert "r.toml" in str(error.value) and len(str(error.value)) < 1_500


def test_lines_may_end_as_on_windows(tmp_path):
    (tmp_path / "r.toml").write_bytes(b'seed = 3\r\n[acts]\r\nlm = "x"\r\n')
    assert recipes.load_recipe(tmp_path / "r.toml").acts.lm == "x"


@pytest.mark.parametrize(
    "table, message",
    [
        ([], "a recipe is a table of keys, not list"),
        (None, "a recipe is a table of keys, not NoneType"),
        ({1: 2}, "unknown key '1'"),
        ({"acts": {"lm": 10**5000}}, "is a number of thousands of digits"),
        ({"acts": {"lm": "\ud800"}}, r"acts\.lm is '\\ud800', which is not UTF-8"),
        (
            {"acts": {"text": "a\udcff"}},
            r"acts\.text is 'a\\udcff', which is not UTF-8; give another name",
        ),
    ],
)
def test_what_is_no_recipe_is_refused(table, message):
    with pytest.raises(InputError, match=message):
        recipes.from_dict(table)


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no.toml does not exist"):
        load_recipe(tmp_path / "no.toml")
    (tmp_path / "it.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="it.toml is not TOML"):
        load_recipe(tmp_path / "it.toml")


def test_differences_are_named_with_both_values():
    old = to_dict(Recipe())
    new = to_dict(Recipe(sae=SAEConfig(k=64), seed=1))
    assert recipes.differences(old, new) == ["sae.k: 32 -> 64", "seed: 0 -> 1"]
    del new["seed"]
    assert "seed: 0 -> None" in recipes.differences(old, new)


def test_the_fingerprint_leaves_out_only_what_does_not_change_the_result():
    assert (
        Recipe(run=RunConfig(device="cpu", log_every=3, keep=5), threads=3).fingerprint()
        == Recipe().fingerprint()
    )
    for other in (
        Recipe(seed=1),
        Recipe(batch=2),
        Recipe(tokens=2),
        Recipe(sae=SAEConfig(k=1)),
        Recipe(acts=ActsConfig(mix=4096)),
        Recipe(optim=OptimConfig(lr=1.0)),
    ):
        assert other.fingerprint() != Recipe().fingerprint()


def test_the_learning_rate_falls_as_one_over_the_root_of_n():
    assert Recipe(sae=SAEConfig(n_latents=32_768)).lr == pytest.approx(8e-4)
    assert Recipe(sae=SAEConfig(n_latents=4 * 32_768)).lr == pytest.approx(4e-4)
    assert Recipe(optim=OptimConfig(lr=0.5)).lr == 0.5
    nested = SAEConfig(n_latents=32_768, activation={"kind": "batch_topk"}, prefixes=(64,))
    assert Recipe(sae=nested).lr == pytest.approx(1.2e-3)
    assert Recipe(sae=nested, optim=OptimConfig(lr=0.5)).lr == 0.5


def test_steps_cover_all_tokens():
    assert (
        Recipe(tokens=100, batch=50).steps == 2
        and Recipe(tokens=101, batch=50).steps == 3
        and Recipe(tokens=1, batch=50).steps == 1
    )


def test_dead_after_is_ten_million_tokens_or_a_thirty_second_of_a_shorter_run():
    assert Recipe(tokens=10**9).dead_after == 10_000_000
    assert Recipe(tokens=32_000).dead_after == 1000 and Recipe(tokens=3).dead_after == 1
    assert Recipe(sae=SAEConfig(dead_after=7)).dead_after == 7


@pytest.mark.parametrize(
    "d_model, expected", [(768, 512), (512, 256), (4096, 2048), (64, 32), (16, 8), (5120, 2048)]
)
def test_k_aux_is_the_power_of_two_nearest_to_half_of_d_model(d_model, expected):
    assert k_aux(SAEConfig(), d_model) == expected and k_aux(SAEConfig(k_aux=3), d_model) == 3


def test_a_short_run_averages_over_a_share_of_itself():
    short = Recipe(tokens=1000, batch=10, optim=OptimConfig(ema=0.999, ema_span=0.1))
    assert short.ema == pytest.approx(0.9)
    assert Recipe(tokens=10**6, batch=10, optim=OptimConfig(ema=0.999, ema_span=0.1)).ema == 0.999
    assert Recipe(tokens=1, batch=1).ema == 0 and Recipe(optim=OptimConfig(ema=0.0)).ema == 0


@pytest.mark.parametrize("value", ["off", "int8"])
def test_the_old_key_optim_screen_is_read_and_leaves_the_fingerprint_as_it_was(value, caplog):
    recipe = Recipe(optim=OptimConfig(approx_topk=value))
    assert from_dict({"optim": {"screen": value}}) == recipe == Recipe(optim={"screen": value})
    assert recipe.fingerprint()["optim"]["screen"] == value
    assert "approx_topk" not in recipe.fingerprint()["optim"] and not caplog.records
    assert "approx_topk" in to_toml(recipe) and "screen" not in to_toml(recipe)


def test_the_fingerprint_of_the_default_recipe_is_the_one_that_folders_of_sweeps_are_named_by():
    assert jsonio.digest(Recipe().fingerprint()) == "87b7079c38ac30bf"


@pytest.mark.parametrize("kind", ["batch_topk", "jump_relu"])
def test_a_run_of_an_earlier_version_has_the_rate_and_thresholds_of_its_time(kind, tmp_path):
    new = from_dict({"sae": {"activation": {"kind": kind}}})
    later = new.sae.activation.BEFORE
    lines = to_toml(new).splitlines()
    old = [line for line in lines if line.partition(" ")[0] not in later]
    assert len(old) == len(lines) - len(later)
    (tmp_path / "recipe.toml").write_text("\n".join(old))
    assert recipes.load_recipe(tmp_path / "recipe.toml") == new
    run = recipes.load_recipe_of_run(tmp_path / "recipe.toml")
    assert {key: getattr(run.sae.activation, key) for key in later} == later
    assert not set(later) & run.fingerprint()["sae"]["activation"].keys()
    assert run.lr == pytest.approx(new.lr / 1.5) and run.sae.k_first == run.sae.k
    assert set(later) <= new.fingerprint()["sae"]["activation"].keys()


def test_a_changed_key_is_named_as_it_is_written_today():
    old, new = Recipe(), Recipe(optim=OptimConfig(approx_topk="int8"))
    assert recipes.differences(old.fingerprint(), new.fingerprint()) == [
        "optim.approx_topk: 'off' -> 'int8'"
    ]


def test_the_old_and_the_new_name_of_a_key_together_are_refused():
    with pytest.raises(InputError, match="'optim.screen' is the old name of 'optim.approx_topk'"):
        from_dict({"optim": {"screen": "off", "approx_topk": "int8"}})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SAEConfig(k=9, n_latents=8), "sae.k is 9, more than the 8 latents"),
        (lambda: ActsConfig(context=1), "acts.context is 1; a context needs at least 3 tokens"),
        (lambda: OptimConfig(ema=1.0), "optim.ema is 1.0; it must be from 0 up to"),
        (lambda: CurveConfig(converged=0.1), "curve.converged needs a held-out loss"),
        (lambda: RunConfig(alarm_dead=1.0), "alarm_dead is 1.0; .*: it is a share of the latents"),
        (lambda: MeshConfig(capacity=0.1), "mesh.capacity is 0.1; below 1"),
    ],
)
def test_a_section_refuses_its_own_values_before_it_is_part_of_a_recipe(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_result_records_the_options_of_its_evaluation_and_those_of_all():
    every = {"budget", "tokens", "per_document", "split", "text", "seed", "device"}
    assert set(EvalConfig().for_eval("positions")) == every
    assert set(EvalConfig().for_eval("refinement")) == every | {"refine_tokens", "refine_exact"}
    recorded = {name for evaluation in EVALS for name in EvalConfig().for_eval(evaluation)}
    assert {option.name for option in dataclasses.fields(EvalConfig)} - recorded == {
        "force",
        "lm_batch",
    }


@pytest.mark.parametrize("budget", ["small", "paper"])
def test_every_size_of_a_budget_replaces_0_and_nothing_else(budget):
    options = EvalConfig(budget=budget)
    resolved = options.resolved()
    changed = {
        option.name
        for option in dataclasses.fields(EvalConfig)
        if getattr(options, option.name) != getattr(resolved, option.name)
    }
    assert changed == {name for name, size in budget_sizes(budget).items() if size}
    assert EvalConfig(budget=budget, tokens=7).resolved().tokens == 7


def test_a_list_of_sites_is_the_text_that_names_them_all(tmp_path):
    file = tmp_path / "sites.toml"
    file.write_text('[acts]\nsite = ["resid_post.*", "mlp_out.1"]\n')
    expected = ActsConfig(site="resid_post.*, mlp_out.1")
    assert load_recipe(file).acts == expected
    assert ActsConfig(site=("resid_post.*", "mlp_out.1")) == expected
    assert recipe_of(site=["resid_post.*", "mlp_out.1"]).acts == expected
    assert from_dict(tomllib.loads(to_toml(Recipe(acts=expected)))).acts == expected
    assert expected.site_patterns == ("resid_post.*", "mlp_out.1")
    assert expected.names_several_sites and not ActsConfig().names_several_sites


@pytest.mark.parametrize("sites", [[], ["resid_post.1", 2]])
def test_a_list_that_does_not_name_sites_is_refused(sites):
    with pytest.raises(InputError, match=r"'acts\.site' is \["):
        recipe_of(site=sites)
