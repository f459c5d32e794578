"""TODO ksparse.lm.loading."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ksparse import pylm
from ksparse.errors import InputError
from ksparse.storage import atomic

if TYPE_CHECKING:

    class CausalLM(nn.Module):
        """What is used of transformers' models, whose own annotations hide most of it."""

        base_model: nn.Module
        config: Any
        dtype: torch.dtype

        def get_input_embeddings(self) -> nn.Embedding: ...
        def get_output_embeddings(self) -> nn.Linear: ...
        def generate(self, tokens: Tensor, **options: Any) -> Any: ...


_log = logging.getLogger("ksparse")
MOST_LAYERS = 10_000
PARAMETERS_PER_BYTE = 16  # more than any quantisation packs


# ---- loading -------------------------------------------------------------------------------------


def find_model(name: str) -> str:
    """Return a folder or a Hub name; raise InputError for a path that is not there."""
    if name == "pylm" or name.startswith("pylm/"):
        try:
            return str(pylm.folder(name.partition("/")[2] or pylm.DEFAULT))
        except ValueError as error:
            raise InputError(str(error)) from None
    path = Path(name)
    if not atomic.exists(path) and (
        path.is_absolute() or name.startswith(".") or name.count("/") > 1
    ):
        raise InputError(
            f"model folder {name} does not exist; give a folder with config.json, a Hub name such "
            "as gpt2, or pylm"
        )
    if (path / "adapter_config.json").is_file():
        raise InputError(
            f"model folder {name} holds an adapter (adapter_config.json), which would be left out; "
            "merge it into its LM (PEFT: merge_and_unload, then save_pretrained), and give that"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"model folder {name} has no config.json; it is not a Hugging Face model")
    return name


def load_model(source: str, dtype: torch.dtype, options: dict[str, Any]) -> CausalLM:
    """Load a causal LM; raise InputError, naming them, for tensors that its files lack or hold
    beside what the model has."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of tensors that do not fit is said below, in one line
    try:
        config = read_config(source, options)
        _check_size(config, source, dtype, options)
        loaded: tuple[CausalLM, dict[str, Any]]  # the library's annotation knows the model alone
        loaded = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            source,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except (torch.OutOfMemoryError, MemoryError, InputError):
        raise
    # of transformers, safetensors, a quantiser's package, or code that comes with the model
    except Exception as error:
        raise InputError(
            f"model {source!r} cannot be loaded as a causal LM: {_reason(error)}"
        ) from error
    finally:
        logging.set_verbosity(level)
    model, report = loaded
    _check_weights(model, source, report)
    if not getattr(config, "quantization_config", None):
        _check_dtypes(model, source)
    return model


def read_config(source: str, options: dict[str, Any]) -> Any:
    """Read a model's config.json; raise InputError where it names code of the Hub, or cannot be
    one of a model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # of transformers, or of code that comes with the model
        raise InputError(
            f"model {source!r} cannot be loaded as a causal LM: {_reason(error)}"
        ) from error
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        kernel = str(getattr(part, "_attn_implementation", None) or "")
        if "/" in kernel and not options["trust_remote_code"]:
            raise InputError(
                f"model {source!r}: its config names {kernel!r}, code of the Hub, for its "
                "attention. If you have read that code and "
                "trust it, give --trust-remote-code True; else take the name out of its config.json"
            )
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise InputError(
                f"model {source!r}: its config.json says {layers:,} layers, more than the "
                f"{MOST_LAYERS:,} that any LM has here; put the right number there"
            )
    return config


def without_weights(
    config: Any, source: str, options: dict[str, Any], dtype: torch.dtype | None = None
) -> CausalLM:
    """Return a causal LM of a config's shape that takes no memory; raise InputError if no LM can
    have it."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=dtype or torch.float32,
                trust_remote_code=options["trust_remote_code"],
            )
    except Exception as error:  # of transformers, torch, or of code that comes with the model
        raise InputError(
            f"model {source!r} cannot be loaded as a causal LM, none can be made of its config: "
            f"{_reason(error)}"
        ) from error


def _check_size(config: Any, source: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Raise InputError, before memory is taken, for a folder's config of far more parameters than
    its weights can hold."""
    if not atomic.exists(Path(source)):
        return
    weights = [*Path(source).glob("*.safetensors"), *Path(source).glob("*.bin")]
    size = sum(file.stat().st_size for file in weights if file.is_file())
    model = without_weights(config, source, options, dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if size and parameters > size * PARAMETERS_PER_BYTE:
        raise InputError(
            f"model {source!r}: its config.json describes {parameters:,} parameters, its weights "
            f"are {size:,} bytes, so that they cannot be of this model; complete the folder"
        )


def _reason(error: Exception) -> str:
    """Return the first line of an error, with what to do where code of the model's own is
    needed."""
    said = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
    line = next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
    if "trust_remote_code" in str(error):
        return (
            f"{line[:200].rstrip('.')}. If you have read that code and trust it, give "
            "--trust-remote-code True "
            "(in Python trust_remote_code=True)"
        )
    return line


def _check_weights(model: nn.Module, source: str, report: dict[str, Any]) -> None:
    """Raise InputError where a model's file and the model do not hold the same tensors: what is
    missing would be random.

    Whole parts that the model does not have (a vision tower, a second head) may be in the file; a
    line says so.
    """
    modules = {_numberless(name) for name, _ in model.named_modules()}
    buffers = {name for name, _ in model.named_buffers()}
    extra = sorted(set(report.get("unexpected_keys", ())) - buffers)
    inside = [name for name in extra if _numberless(name.rpartition(".")[0]) in modules]
    missing = sorted(report.get("missing_keys", ()))
    shaped = sorted(
        str(key[0] if isinstance(key, tuple) else key) for key in report.get("mismatched_keys", ())
    )
    wrong = [
        f"{what}: {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("of another shape", shaped),
            ("unknown to the model", inside),
        )
        if names
    ]
    if not wrong and len(extra) and not missing:
        _log.warning(
            "model %s: its files hold parts that the causal LM does not have, which are left out: "
            "%s",
            source,
            _some(extra),
        )
    if wrong:
        if missing and extra and not inside:
            wrong.append(f"unknown to the model: {_some(extra)}")
        raise InputError(
            f"model {source!r}: its weights do not fit its config, so that the LM would not be "
            "what its files say. "
            f"Tensors {'; '.join(wrong)}. Save the model again with save_pretrained under its own "
            "names, or complete the folder"
        )


def _check_dtypes(model: nn.Module, source: str) -> None:
    """Raise InputError for parameters that a folder's files hold as integers, truth values or
    complex numbers: read as real numbers, they would be others."""
    from safetensors import safe_open

    parameters = {_bare(model, name) for name, _ in model.named_parameters(remove_duplicate=False)}
    for file in sorted(Path(source).glob("model*.safetensors")):
        held = safe_open(file, framework="pt")
        for name in sorted(held.keys()):
            dtype = held.get_slice(name).get_dtype()
            if _bare(model, name) in parameters and not dtype.startswith(("F", "BF")):
                raise InputError(
                    f"model {source!r}: {name} in {file.name} is of {dtype}, not of real numbers, "
                    "and its config names no quantisation; save the model again"
                )


def _bare(model: nn.Module, name: str) -> str:
    """Return a tensor's name without that of the base model, with or without which it is saved."""
    return name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def _numberless(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", name)


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (
        f" and {len(names) - most:,} more" if len(names) > most else ""
    )


def _load_tokenizer(source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not any(
        (Path(source) / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        raise InputError(f"folder {source} has no tokenizer; name one with --acts.tokenizer")
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (
        Exception
    ) as error:  # of transformers, tokenizers, a missing package, or code that comes with the model
        raise InputError(
            f"tokenizer {source!r} cannot be loaded: {_reason(error)}; name another with "
            "--acts.tokenizer"
        ) from error
