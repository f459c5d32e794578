"""The metrics elsewhere: TensorBoard, wandb, trackio. metrics.jsonl is written in any case and is
what ksparse reads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ksparse.config import Recipe, flat, to_dict
from ksparse.errors import InputError
from ksparse.storage.run_folder import RunFolder

Send = Callable[[dict[str, Any]], None]


def open_loggers(recipe: Recipe, run: RunFolder) -> list[Send]:
    """Return one function per logger that takes a row of metrics."""
    openers = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _wandb}
    return [openers[name](name, recipe, run) for name in recipe.run.loggers]


def _tensorboard(name: str, recipe: Recipe, run: RunFolder) -> Send:
    writer = _need("torch.utils.tensorboard", name).SummaryWriter(str(run.path / "tensorboard"))

    def send(row: dict[str, Any]) -> None:
        for key, value in row.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(key, value, row["step"])
        writer.flush()

    return send


def _wandb(name: str, recipe: Recipe, run: RunFolder) -> Send:
    """trackio speaks wandb's language."""
    session = _need(name, name).init(project="ksparse", name=run.name, config=flat(to_dict(recipe)))
    return lambda row: session.log(row)


def _need(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise InputError(
            f"the logger {name} is not installed: pip install 'ksparse[loggers]', or leave out "
            "--run.loggers"
        ) from None
