"""Metrics elsewhere, with stand-ins for the libraries."""

import sys
import types

import pytest

from ksparse.errors import InputError
from ksparse.training.train import train


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_rows_and_the_recipe_are_sent(small_recipe, tmp_path, monkeypatch, name):
    started, rows = [], []
    session = types.SimpleNamespace(log=rows.append)
    module = types.SimpleNamespace(init=lambda **options: started.append(options) or session)
    monkeypatch.setitem(sys.modules, name, module)
    run = train(small_recipe({"run.loggers": [name], "tokens": 3 * 64}), tmp_path / "mine")
    assert rows == run.metrics() and len(rows) == 3
    assert started[0]["name"] == "mine" and started[0]["config"]["sae.k"] == 4


def test_tensorboard_gets_numbers_by_step(small_recipe, tmp_path, monkeypatch):
    scalars = []
    writer = types.SimpleNamespace(
        add_scalar=lambda *each: scalars.append(each), flush=lambda: None
    )
    monkeypatch.setitem(
        sys.modules,
        "torch.utils.tensorboard",
        types.SimpleNamespace(SummaryWriter=lambda folder: writer),
    )
    run = train(small_recipe({"run.loggers": ["tensorboard"], "tokens": 3 * 64}), tmp_path / "mine")
    assert [(value, step) for key, value, step in scalars if key == "nmse"] == [
        (row["nmse"], row["step"]) for row in run.metrics()
    ]


def test_a_logger_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    small_recipe, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(
        InputError,
        match=r"the logger trackio is not installed: pip install 'ksparse\[loggers\]', or leave out --run\.loggers",
    ):
        train(
            small_recipe({"run.loggers": ["trackio"]}),
            tmp_path / "run",
            observe=lambda row: pytest.fail("a step was run"),
        )
