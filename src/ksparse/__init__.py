"""Train, scale and evaluate k-sparse autoencoders on language-model activations.

    sae  = ksparse.load("runs/demo")
    lm   = sae.lm()              # or ksparse.LM("gpt2", site="resid_post.8")
    code = lm.encode(["The Eiffel Tower is in Paris."], sae)   # Code(values[t, k], indices[t, k])
    ksparse.evaluate(sae, lm, ["downstream", "probes", "n2g"])
    ksparse.compare(["runs/k16", "runs/k32"])                  # paired differences
    run  = ksparse.train(lm="gpt2", site="resid_post.8", text="my.txt", out="runs/mine")
    ksparse.finetune(run)                                      # with the LM's own loss beside it
    ksparse.fit(ksparse.sweep("sweep.toml"))                   # scaling laws of a grid of recipes

Names are imported when they are first used, so `import ksparse` does not import torch.
"""

from typing import Any

_MODULE_OF = {
    "Code": "ksparse.sae.model",
    "KsparseError": "ksparse.errors",
    "LM": "ksparse.lm.model",
    "Recipe": "ksparse.config",
    "SAE": "ksparse.sae.model",
    "attach": "ksparse.steering",
    "compare": "ksparse.judging",
    "convert": "ksparse.interop",
    "evaluate": "ksparse.judging",
    "finetune": "ksparse.training.finetune",
    "fit": "ksparse.scaling.calls",
    "load": "ksparse.interop",
    "open_run": "ksparse.storage.run_folder",
    "save": "ksparse.sae.serialization",
    "steer": "ksparse.steering",
    "sweep": "ksparse.scaling.calls",
    "train": "ksparse.training.train",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("ksparse")
    if name not in _MODULE_OF:
        raise AttributeError(
            f"module 'ksparse' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    from importlib import import_module

    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
