"""Load causal LMs and tokenizers of the transformers library, and check that they are complete.

transformers fills tensors that a file lacks with random numbers, ignores tensors it does not know,
and may read integers as real numbers. Each of these would silently give another model, so each is
an error here, with the tensors' names.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Sequence
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ksparse import pylm
from ksparse.config import ActsConfig
from ksparse.errors import InputError
from ksparse.storage import atomic, hub

if TYPE_CHECKING:

    class CausalLM(nn.Module):
        """The part of transformers' models used here; their own annotations hide most of it."""

        base_model: nn.Module
        config: Any
        dtype: torch.dtype

        def get_input_embeddings(self) -> nn.Embedding: ...
        def get_output_embeddings(self) -> nn.Linear: ...
        def generate(self, tokens: Tensor, **options: Any) -> Any: ...


_NEEDED = "a folder with config.json, a GGUF file, a Hub name such as gpt2, or pylm"
MAX_LAYERS = 10_000
MAX_PARAMETERS_PER_BYTE = 16  # more than any quantization packs
_REAL = ("F64", "F32", "F16", "BF16")
"""GGUF's types of tensors that are not quantized."""
_log = getLogger("ksparse")


def find_model(name: str) -> str:
    """Resolve the name of an LM to a folder or a Hub name.

    Args:
        name: `pylm`, `pylm/SIZE`, a folder with config.json, or a name on the Hugging Face Hub.

    Raises:
        InputError: The name is a path that does not exist or holds no complete model.
    """
    if name == "pylm" or name.startswith("pylm/"):
        try:
            return str(pylm.folder(name.partition("/")[2] or pylm.DEFAULT))
        except ValueError as error:
            raise InputError(str(error)) from None
    path = Path(name)
    if is_gguf(name):
        return name
    hub.check_not_missing(name, "model folder", _NEEDED)
    if (path / "adapter_config.json").is_file():
        raise InputError(
            f"model folder {name} holds an adapter (adapter_config.json), which would be left out; "
            "merge it into its LM (PEFT: merge_and_unload, then save_pretrained), and give that"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"model folder {name} has no config.json; it is not a Hugging Face model")
    _check_weight_map(path)
    return name


def is_gguf(name: str) -> bool:
    """Return whether a name is that of a GGUF file on this machine."""
    path = Path(name)
    return path.suffix.lower() == ".gguf" and atomic.exists(path) and path.is_file()


def loading_options(acts: ActsConfig, trust_remote_code: bool) -> dict[str, Any]:
    """Return the keywords with which transformers finds and trusts an LM."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    return (
        options
        if atomic.exists(Path(find_model(acts.lm)))
        else options | {"revision": acts.revision}
    )


def resolve_dtype(acts: ActsConfig, device: str, options: dict[str, Any]) -> ActsConfig:
    """Return the options with `lm_dtype` decided: float32 on a CPU, on a GPU what the LM is stored
    in.

    Args:
        acts: The LM and its options.
        device: Where the LM will run.
        options: As in `load_model`.

    Raises:
        InputError: The LM's config cannot be read.
    """
    if acts.lm_dtype != "auto":
        return acts
    stored = "float32"
    if torch.device(device).type != "cpu":
        config = read_config(find_model(acts.lm), options)
        stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
    taken = stored if stored in ("bfloat16", "float16") else "float32"
    return dataclasses.replace(acts, lm_dtype=cast(Any, taken))


def load_model(source: str, acts: ActsConfig, options: dict[str, Any], device: str) -> CausalLM:
    """Load a causal LM, with every tensor of the model read from its files.

    Args:
        source: A folder, a GGUF file or a Hub name.
        acts: Its precision, how it is spread over devices, and whether it is quantized.
        options: Keywords for `from_pretrained`: `trust_remote_code`, and `revision` for a Hub name.
        device: Where it runs.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        InputError: The model cannot be loaded, or its files lack tensors of the model or hold
            unknown ones; the message names them.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    dtype = getattr(torch, acts.lm_dtype)
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # _check_weights reports tensors that do not fit, in one line
    try:
        config = read_config(source, options)
        _check_size(config, source, dtype, options)
        placement = _placement(acts, config, device)
        loaded: tuple[CausalLM, dict[str, Any]]  # the library's annotation knows the model alone
        loaded = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_named(source),
            **placement,
            **options,
        )
    except (torch.OutOfMemoryError, MemoryError, InputError):
        raise
    # Anything: from transformers, safetensors, a quantizer's package, or the model's own code.
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
    _tell_quantization(model, source, acts)
    if not placement:
        model = model.to(device)  # type: ignore[assignment]
    return model.eval().requires_grad_(False)


def _named(source: str) -> dict[str, str]:
    """Return the keywords under which `from_pretrained` finds a source."""
    name = "pretrained_model_name_or_path"
    if not is_gguf(source):
        return {name: source}
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"model {source!r} is a GGUF file, which needs the package gguf; install it with the "
            "extra: pip install 'ksparse[gguf]'"
        )
    return {name: str(Path(source).parent), "gguf_file": Path(source).name}


def _placement(acts: ActsConfig, config: Any, device: str) -> dict[str, Any]:
    """Return the keywords of `from_pretrained` for devices and quantization; none for an LM that is
    loaded as it is and moved to one device."""
    stored = getattr(config, "quantization_config", None)
    if acts.lm_device_map == "one" and acts.lm_quantize == "none" and not stored:
        return {}
    needed = ["accelerate"] + ["bitsandbytes"] * (acts.lm_quantize != "none")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing and not (stored and acts.lm_device_map == "one" and acts.lm_quantize == "none"):
        raise InputError(
            f"acts.lm_device_map {acts.lm_device_map} with acts.lm_quantize {acts.lm_quantize} "
            f"needs the package {' and '.join(missing)}; install the extra: "
            "pip install 'ksparse[large]'"
        )
    if stored and acts.lm_quantize != "none":
        raise InputError(
            f"acts.lm_quantize is {acts.lm_quantize}, but {acts.lm} is stored quantized "
            f"({_method(stored)}); leave it out"
        )
    keywords: dict[str, Any] = {}
    if not missing:
        one = acts.lm_device_map == "one"
        keywords["device_map"] = {"": device} if one else acts.lm_device_map
    if acts.lm_quantize != "none":
        from transformers import BitsAndBytesConfig

        keywords["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=acts.lm_quantize == "8bit",
            load_in_4bit=acts.lm_quantize == "4bit",
            bnb_4bit_compute_dtype=getattr(torch, acts.lm_dtype),
        )
    return keywords


def _method(quantization: Any) -> str:
    """Return the name of a quantization from a config."""
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "unknown"))
    return str(getattr(quantization, "quant_method", "unknown")).rpartition(".")[2].lower()


def _tell_quantization(model: CausalLM, source: str, acts: ActsConfig) -> None:
    """Log what of an LM's weights is quantized, or was and is not any more."""
    if is_gguf(source):
        from gguf import GGUFReader

        kinds = Counter(str(tensor.tensor_type.name) for tensor in GGUFReader(source).tensors)
        quantized = {kind: n for kind, n in sorted(kinds.items()) if kind not in _REAL}
        if quantized:
            _log.info(
                "model %s: dequantized to %s: %s",
                source,
                acts.lm_dtype,
                ", ".join(f"{count} tensors of {kind}" for kind, count in quantized.items()),
            )
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    settings = quantizer.quantization_config
    if getattr(settings, "dequantize", False):
        _log.info("model %s: dequantized from %s to %s", source, _method(settings), model.dtype)
    else:
        _log.info("model %s: runs quantized (%s), as it is", source, _method(settings))


def _check_weight_map(folder: Path) -> None:
    """Raise InputError for an index of weights that names files outside its folder."""
    for index in sorted(folder.glob("*.index.json")) if folder.is_dir() else ():
        try:
            names = json.loads(index.read_text()).get("weight_map", {}).values()
        except (OSError, ValueError, AttributeError):
            continue  # transformers says what is wrong with it
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(
                    f"model folder {folder}: {index.name} names the file {name!r}, which is not in "
                    "the folder itself; such a model is not loaded"
                )


def load_tokenizer(source: str, options: dict[str, Any]) -> Any:
    """Load a tokenizer from a folder or the Hub; raise InputError where there is none."""
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not any(
        (Path(source) / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        raise InputError(f"folder {source} has no tokenizer; name one with --acts.tokenizer")
    try:
        return AutoTokenizer.from_pretrained(**_named(source), **options)
    except InputError:
        raise
    # Anything: from transformers, tokenizers, a missing package, or the model's own code.
    except Exception as error:
        raise InputError(
            f"tokenizer {source!r} cannot be loaded: {_reason(error)}; name another with "
            "--acts.tokenizer"
        ) from error


def read_config(source: str, options: dict[str, Any]) -> Any:
    """Read a model's config.json.

    Raises:
        InputError: It cannot be read, names attention code on the Hub without trust, or describes
            an impossible model.
    """
    from transformers import AutoConfig

    if not atomic.exists(Path(source)):
        hub.check_reachable(source, "model", _NEEDED)
    try:
        with hub.quiet():
            config = AutoConfig.from_pretrained(**_named(source), **options)
    except InputError:
        raise
    except Exception as error:  # from transformers, or from the model's own code
        raise InputError(
            f"model {source!r} cannot be loaded as a causal LM: {_reason(error)}"
            f"{hub.absence(source)}"
        ) from error
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        kernel = str(getattr(part, "_attn_implementation", None) or "")
        if "/" in kernel and not options["trust_remote_code"]:
            raise InputError(
                f"model {source!r}: its config names {kernel!r}, code on the Hub, for its "
                "attention. If you have read that code and trust it, give --trust-remote-code "
                "True; otherwise remove the name from its config.json"
            )
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > MAX_LAYERS:
            raise InputError(
                f"model {source!r}: its config.json says {layers:,} layers, more than the "
                f"{MAX_LAYERS:,} allowed; correct the number there"
            )
    return config


def without_weights(
    config: Any, source: str, options: dict[str, Any], dtype: torch.dtype | None = None
) -> CausalLM:
    """Build a causal LM from a config on the meta device, where it takes no memory.

    Args:
        config: The model's configuration.
        source: The model's name, for error messages.
        options: As in `load_model`.
        dtype: Of the parameters; float32 by default.

    Raises:
        InputError: No causal LM can be built from the config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=dtype or torch.float32,
                trust_remote_code=options["trust_remote_code"],
            )
    except Exception as error:  # from transformers, torch, or the model's own code
        raise InputError(
            f"model {source!r} cannot be loaded as a causal LM, none can be made of its config: "
            f"{_reason(error)}"
        ) from error


def _check_size(config: Any, source: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Raise InputError, before memory is allocated, if a folder's config describes far more
    parameters than its weight files can hold."""
    if not atomic.exists(Path(source)) or is_gguf(source):
        return
    weights = [*Path(source).glob("*.safetensors"), *Path(source).glob("*.bin")]
    size = sum(file.stat().st_size for file in weights if file.is_file())
    model = without_weights(config, source, options, dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if size and parameters > size * MAX_PARAMETERS_PER_BYTE:
        raise InputError(
            f"model {source!r}: its config.json describes {parameters:,} parameters, its weights "
            f"are {size:,} bytes, so they cannot be of this model; complete the folder"
        )


def _reason(error: Exception) -> str:
    """Return the first line of an error, with what to do where it asks for trust in code."""
    text = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    if "trust_remote_code" in str(error):
        return (
            f"{line[:200].rstrip('.')}. If you have read that code and trust it, give "
            "--trust-remote-code True (in Python trust_remote_code=True)"
        )
    return line


def _check_weights(model: nn.Module, source: str, report: dict[str, Any]) -> None:
    """Raise InputError where the files and the model do not hold the same tensors.

    Whole parts that the model does not have (a vision tower, a second head) are allowed in the
    files, with a warning.
    """
    modules = {_without_numbers(name) for name, _ in model.named_modules()}
    buffers = {name for name, _ in model.named_buffers()}
    extra = sorted(set(report.get("unexpected_keys", ())) - buffers)
    unknown = [name for name in extra if _without_numbers(name.rpartition(".")[0]) in modules]
    missing = sorted(report.get("missing_keys", ()))
    mismatched = sorted(
        str(key[0] if isinstance(key, tuple) else key) for key in report.get("mismatched_keys", ())
    )
    problems = [
        f"{what}: {_preview(names)}"
        for what, names in (
            ("missing", missing),
            ("of another shape", mismatched),
            ("unknown to the model", unknown),
        )
        if names
    ]
    if not problems and extra:
        _log.warning(
            "model %s: its files hold parts that the causal LM does not have, which are left out: "
            "%s",
            source,
            _preview(extra),
        )
    if problems:
        if missing and extra and not unknown:
            problems.append(f"unknown to the model: {_preview(extra)}")
        raise InputError(
            f"model {source!r}: its weights do not fit its config, so that the LM would not be "
            f"what its files say. Tensors {'; '.join(problems)}. Save the model again with "
            "save_pretrained under its own names, or complete the folder"
        )


def _check_dtypes(model: nn.Module, source: str) -> None:
    """Raise InputError for parameters stored as integers, booleans or complex numbers, which would
    be read as real numbers of other values."""
    from safetensors import safe_open

    parameters = {
        _without_prefix(model, name) for name, _ in model.named_parameters(remove_duplicate=False)
    }
    for path in sorted(Path(source).glob("model*.safetensors")):
        file = safe_open(path, framework="pt")
        for name in sorted(file.keys()):
            dtype = file.get_slice(name).get_dtype()
            is_real = dtype.startswith(("F", "BF"))
            if _without_prefix(model, name) in parameters and not is_real:
                raise InputError(
                    f"model {source!r}: {name} in {path.name} is of {dtype}, not of real numbers, "
                    "and its config names no quantisation; save the model again"
                )


def _without_prefix(model: nn.Module, name: str) -> str:
    """Return a tensor's name without the base model's prefix, which files may omit."""
    return name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def _without_numbers(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", name)


def _preview(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (
        f" and {len(names) - most:,} more" if len(names) > most else ""
    )
