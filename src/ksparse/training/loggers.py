"""Send metrics to TensorBoard, wandb or trackio, beside metrics.jsonl, which is the file that
ksparse reads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ksparse.config import Recipe, flat, to_dict
from ksparse.errors import InputError
from ksparse.storage.run_folder import RunFolder

Send = Callable[[dict[str, Any]], None]


def open_loggers(recipe: Recipe, run: RunFolder) -> list[Send]:
    """Return, for each logger of `run.loggers`, a function that takes a row of metrics.

    Raises:
        InputError: if a logger is not installed.
    """
    openers = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _wandb}
    return [openers[name](name, recipe, run) for name in recipe.run.loggers]


def _tensorboard(name: str, recipe: Recipe, run: RunFolder) -> Send:
    writer = _import_logger("torch.utils.tensorboard", name).SummaryWriter(
        str(run.path / "tensorboard")
    )

    def send(row: dict[str, Any]) -> None:
        for key, value in row.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(key, value, row["step"])
        writer.flush()

    return send


def _wandb(name: str, recipe: Recipe, run: RunFolder) -> Send:
    """Open wandb, or trackio, which has the same interface."""
    session = _import_logger(name, name).init(
        project="ksparse", name=run.name, config=flat(to_dict(recipe))
    )
    return lambda row: session.log(row)


def _import_logger(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise InputError(
            f"the logger {name} is not installed: pip install 'ksparse[loggers]', or leave out "
            "--run.loggers"
        ) from None
