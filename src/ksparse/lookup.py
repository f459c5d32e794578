"""Methods of an object that are written in a room above its own.

`sae.lm()` needs a language model, `sae.latent(…)` the results of a run, `lm.encode(…)` an
autoencoder and a text's contexts, `run.figure(…)` and `sweep.figure(…)` the report: what these
objects are made of knows nothing of that. Each method only names the function that does the work,
which is imported when the method is called. These are all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

FUNCTIONS = {
    "SAE.lm": ("ksparse.steering", "load_lm"),
    "SAE.latent": ("ksparse.interop.latents", "describe_latent"),
    "LM.encode": ("ksparse.data.encoding", "encode_texts"),
    "RunFolder.figure": ("ksparse.report", "draw_figure"),
    "RunFolder.figures": ("ksparse.report", "draw_figures"),
    "SweepFolder.figure": ("ksparse.report.sweep", "draw_figure"),
    "SweepFolder.figures": ("ksparse.report.sweep", "draw_figures"),
}
"""{method: (module, function)}."""


def function_of(method: str) -> Any:
    """Return the function behind a method of FUNCTIONS.

    Example:
        >>> function_of("SAE.lm").__name__
        'load_lm'
    """
    module, name = FUNCTIONS[method]
    return getattr(import_module(module), name)
