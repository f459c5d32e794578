"""What users may rely on: a change here is a change of the interface, and goes into the change log."""

import importlib.metadata

import pytest

import ksparse
from ksparse import cli, config, errors

NAMES = [
    "Code",
    "KsparseError",
    "LM",
    "Recipe",
    "SAE",
    "attach",
    "compare",
    "convert",
    "evaluate",
    "finetune",
    "fit",
    "load",
    "open_run",
    "save",
    "steer",
    "sweep",
    "train",
]
KEYS = {
    "acts.lm",
    "acts.revision",
    "acts.tokenizer",
    "acts.site",
    "acts.text",
    "acts.text_config",
    "acts.text_split",
    "acts.text_field",
    "acts.pretokenized",
    "acts.chat",
    "acts.roles",
    "acts.context",
    "acts.bos",
    "acts.borders",
    "acts.keep",
    "acts.normalize",
    "acts.mix",
    "acts.lm_batch",
    "acts.lm_dtype",
    "acts.lm_device_map",
    "acts.lm_quantize",
    "acts.lm_weights",
    "acts.shuffle_tokens",
    "acts.store",
    "acts.shards",
    "acts.shard_window",
    "sae.n_latents",
    "sae.k",
    "sae.auxk_coef",
    "sae.k_aux",
    "sae.auxk_share",
    "sae.auxk_norm",
    "sae.dead_after",
    "sae.lm_balance",
    "sae.lm_loss",
    "sae.lm_share",
    "sae.multi_topk",
    "sae.prefixes",
    "sae.prefix_draws",
    "sae.prefix_loss",
    "sae.b_enc",
    "sae.init",
    "sae.init_scale",
    "sae.start",
    "sae.k_start",
    "sae.k_anneal",
    "sae.b_pre_init",
    "sae.unit_norm",
    "sae.freeze",
    "sae.decoder_cosine_min",
    "sae.activation.kind",
    "optim.lr",
    "optim.lr_at_32k",
    "optim.beta1",
    "optim.beta2",
    "optim.eps",
    "optim.warmup",
    "optim.decay",
    "optim.clip",
    "optim.ema",
    "optim.ema_span",
    "optim.approx_topk",
    "optim.precision",
    "curve.held_out",
    "curve.per_octave",
    "curve.octaves",
    "curve.converged",
    "curve.window",
    "run.device",
    "run.kernels",
    "run.ahead",
    "run.log_every",
    "run.save_every",
    "run.save_minutes",
    "run.keep",
    "run.on_nonfinite",
    "run.loggers",
    "run.alarm_grad_norm",
    "run.alarm_dead",
    "run.alarm_dead_growth",
    "mesh.data",
    "mesh.latent",
    "mesh.capacity",
    "mesh.reduce",
    "mesh.timeout",
    "tokens",
    "batch",
    "seed",
    "order",
    "threads",
}
EXIT_CODES = {
    "KsparseError": 1,
    "InputError": 2,
    "CorruptError": 2,
    "NonFiniteError": 3,
    "OutOfMemoryError": 4,
    "DiskError": 5,
}


def test_public_names_are_frozen():
    assert ksparse.__all__ == NAMES
    assert dir(ksparse) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(ksparse, name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_no_module_is_named_like_a_public_function(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"ksparse.{name}")


def test_a_mistyped_name_lists_those_there_are():
    with pytest.raises(AttributeError, match="has no attribute 'trian'; it has Code, .* train"):
        ksparse.trian


def test_recipe_keys_are_frozen():
    assert set(config.flat(config.to_dict(config.Recipe()))) == KEYS


@pytest.mark.parametrize("name, code", EXIT_CODES.items())
def test_exit_codes_are_frozen(name, code):
    assert getattr(errors, name).exit_code == code


def test_interruption_exits_like_the_signal():
    assert (
        errors.Interrupted("stopped", 15).exit_code == 143
        and errors.Interrupted("stopped", 2).exit_code == 130
    )


def test_every_error_of_ours_is_a_ksparse_error_and_what_python_users_expect():
    assert issubclass(errors.InputError, ValueError) and issubclass(
        errors.CorruptError, errors.InputError
    )
    assert issubclass(errors.DiskError, OSError) and issubclass(
        errors.NonFiniteError, ArithmeticError
    )
    kinds = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    assert all(issubclass(kind, errors.KsparseError) for kind in kinds)


def test_the_version_is_that_of_the_installed_package(capsys):
    assert ksparse.__version__ == importlib.metadata.version("ksparse")
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"ksparse {ksparse.__version__}\n"
