"""SAEs on disk: sae.safetensors (W_enc, b_enc, W_dec, b_pre and the activation's tensors) and
sae.json (its shape and what it was trained on).

Where several processes wrote it, each left its rows in a file of its own: sae.0-of-2.safetensors,
sae.1-of-2.safetensors. `rows_of` reads any range of latents from either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ksparse import config
from ksparse.config import ActsConfig
from ksparse.errors import CorruptError, InputError
from ksparse.sae.model import SAE, Shape
from ksparse.sae.tensor_files import CheckedTensors, StoredTensor, safetensors_file, views
from ksparse.storage import atomic, checksums, hub, jsonio
from ksparse.storage.run_folder import RunFolder, shard_files

WEIGHTS, CONFIG, FORMAT = "sae.safetensors", "sae.json", 1
_SHAPE: dict[str, jsonio.Types] = {
    "d_model": int,
    "n_latents": int,
    "k": int,
    "normalize": str,
    "factor": (int, float),
}
_METADATA: dict[str, jsonio.Types] = {
    "acts": dict,
    "policy": dict,
    "origin": dict,
    "tokens": int,
    "step": int,
    "dead_after": int,
    "ksparse": str,
    "baseline": (int, float),
    "dead_fraction_training": (int, float),
}
_LARGEST = {
    "tokens": 2**63,
    "step": 2**63,
    "dead_after": 2**63,
    "baseline": 1e300,
    "dead_fraction_training": 1,
}
_ORIGIN = {
    "format": str,
    "lm": str,
    "site": str,
    "context": int,
    "bos": str,
    "text": str,
    "settings": dict,
}
_NOT_READ = ["*examples.safetensors"]
"""Files that Gemma Scope 2 has beside each SAE: texts, larger than the SAE itself."""
POLICY: dict[str, jsonio.Types] = {
    "context": int,
    "bos_token": (int, type(None)),
    "separator_token": (int, type(None)),
    "borders": str,
    "keep": str,
    "split": str,
    "tokens_per_document": (int, type(None)),
    "shuffle_tokens": bool,
    "pretokenized": bool,
    "chat": str,
    "chat_template": str,
    "roles": list,
    "tensors": str,
}
"""The keys of `metadata.policy`, as `Corpus.policy` and `Tensors.policy` write them."""


def save(sae: SAE, folder: Path | str) -> None:
    """Write an SAE as a new folder, with checksums.

    Args:
        sae: the SAE.
        folder: where to write it; an SAE that is already there is replaced.

    Example:
        >>> import ksparse
        >>> ksparse.save(ksparse.load("runs/demo"), "my-sae")
        >>> ksparse.load("my-sae").shape.k
        32
    """
    checksums.check_replaceable(Path(folder))
    with checksums.checksummed_dir(Path(folder)) as tmp:
        write(sae, tmp)


def write(sae: SAE, folder: Path) -> None:
    """Write the two files into a folder that the caller commits, such as a checkpoint."""
    write_weights(sae.state_dict(), folder / WEIGHTS)
    write_shape(sae.shape, sae.metadata, folder)


def write_weights(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Write the weights of an SAE, or of one shard."""
    save_file({key: value.detach().contiguous() for key, value in weights.items()}, file)


def write_shape(shape: Shape, metadata: dict[str, Any], folder: Path) -> None:
    """Write an SAE's shape and metadata, without its weights."""
    check_metadata(metadata, folder / CONFIG)
    jsonio.write_json(folder / CONFIG, {"format": FORMAT, **asdict(shape), "metadata": metadata})


def load(source: Path | str, *, revision: str | None = None, subfolder: str = "") -> SAE:
    """Load an SAE.

    Args:
        source: a run (its newest intact checkpoint is loaded), a checkpoint, a folder with
            sae.safetensors, or the name of a Hub repository with such a folder.
        revision: revision of the Hub repository.
        subfolder: folder in the source that holds the SAE.
    """
    folder = locate(source, revision=revision, subfolder=subfolder)
    run = RunFolder(folder)
    if run.exists():
        checkpoint, errors = run.newest_intact()
        if checkpoint is None:
            why = "; ".join(errors) or "nothing has been saved yet"
            raise InputError(f"run {folder} has no checkpoint to load: {why}")
        return read(checkpoint)
    if not (folder / CONFIG).is_file():
        names = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
        raise InputError(
            f"{folder} holds no SAE: expected {CONFIG} and {WEIGHTS}, or a run with recipe.toml; "
            f"found {names}"
        )
    if (folder / checksums.MANIFEST).is_file():
        checksums.verify(folder)
    return read(folder)


def locate(source: Path | str, *, revision: str | None = None, subfolder: str = "") -> Path:
    """Return the local path of an SAE; it is downloaded from the Hub if `source` is no path."""
    path = Path(source)
    if atomic.exists(path):
        root = path
    else:
        hub.check_not_missing(str(source), "the SAE", hub.NEEDED)
        if not subfolder:
            hub.check_reachable(str(source), "the SAE", hub.NEEDED)
            _check_is_one_sae(str(source), revision)
        patterns = [subfolder, f"{subfolder}/*"] if subfolder else ["*"]  # which may be a file
        root = download(str(source), revision, patterns)
    folder = root / subfolder
    if not atomic.exists(folder):
        raise InputError(f"{path} has no {subfolder[:80]!r} in it")
    return folder


def read(folder: Path) -> SAE:
    """Read an SAE from its folder; errors name the file and the tensor or key."""
    shape, metadata = read_shape(folder)
    # a damaged file must not decide how much memory is allocated
    tensors = rows_of(folder, "sae").all(tensor_shapes(shape))
    sae = SAE(shape, metadata)
    sae.load_state_dict(tensors)
    return sae


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of all tensors of an SAE, its activation's included."""
    with torch.device("meta"):  # no memory is allocated
        return {key: tuple(tensor.shape) for key, tensor in SAE(shape).state_dict().items()}


def read_shape(folder: Path) -> tuple[Shape, dict[str, Any]]:
    """Read the shape and metadata of an SAE."""
    file = folder / CONFIG
    table = jsonio.read_numbered(
        file, FORMAT, _SHAPE, {"activation": str, "metadata": (dict, type(None))}
    )
    metadata = table.pop("metadata", None) or {}
    check_metadata(metadata, file)
    try:
        return Shape(**table), metadata  # files without an activation are of TopK
    except InputError as error:
        raise CorruptError(f"{file}: {error}") from None


def weights_sha256(sae: SAE) -> str:
    """Return the SHA-256 of an SAE's shape and weights, the same in whatever format it lies.

    Example:
        >>> from ksparse.sae.model import SAE, Shape
        >>> first, second = SAE(Shape(8, 32, k=4)), SAE(Shape(8, 32, k=5))
        >>> weights_sha256(first) == weights_sha256(SAE(Shape(8, 32, k=4)))
        True
        >>> weights_sha256(first) == weights_sha256(second)
        False
    """
    digest = hashlib.sha256(repr(sorted(asdict(sae.shape).items())).encode())
    for key, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


def check_metadata(metadata: dict[str, Any], file: Path) -> None:
    """Raise CorruptError, naming the key, where metadata that ksparse reads has another type; other
    keys may hold anything."""
    jsonio.check_keys(
        file,
        metadata,
        {key: types for key, types in _METADATA.items() if metadata.get(key) is not None},
        "metadata.",
    )
    for key, largest in _LARGEST.items():
        if not 0 <= (metadata.get(key) or 0) <= largest:
            raise CorruptError(
                f"{file}: 'metadata.{key}' is {metadata[key]!r}, expected a number from 0 to "
                f"{largest:g}"
            )
    origin, policy = metadata.get("origin") or {}, metadata.get("policy") or {}
    jsonio.check_keys(
        file,
        origin,
        {key: types for key, types in _ORIGIN.items() if key in origin},
        "metadata.origin.",
    )
    _check_policy(policy, file)
    shared = {key: policy[key] for key in ("context", "borders", "keep") if key in policy}
    for part, table in (("acts", metadata.get("acts") or {}), ("policy", shared)):
        try:
            config.from_dict({"acts": table}, where=f" in metadata.{part}")
        except InputError as error:
            raise CorruptError(f"{file}: metadata.{part}: {error}") from None


def _check_policy(policy: dict[str, Any], file: Path) -> None:
    """Raise CorruptError for a key of metadata.policy that is unknown or of another type."""
    unknown = sorted(set(policy) - set(POLICY))
    if unknown:
        raise CorruptError(
            f"{file} has the unknown key 'metadata.policy.{unknown[0][:80]}'; the keys are "
            f"{', '.join(POLICY)}"
        )
    jsonio.check_keys(
        file,
        policy,
        {key: types for key, types in POLICY.items() if key in policy},
        "metadata.policy.",
    )


def acts_of(metadata: dict[str, Any], *, named: bool = True) -> ActsConfig:
    """Return the activations that an SAE was trained on.

    Args:
        metadata: of the SAE.
        named: whether they must name an LM; those that anybody made may not.

    Raises:
        InputError: where its metadata does not name an LM, or is invalid.
    """
    acts = metadata.get("acts")
    tensors = (metadata.get("policy") or {}).get("tensors")
    if isinstance(acts, dict) and not acts.get("lm") and tensors and named:
        raise InputError(
            f"this SAE was trained on the activations in {acts.get('shards')}, which name no LM; "
            "give one: ksparse.LM(name, site=…)"
        )
    if not acts or not isinstance(acts, dict) or not (acts.get("lm") or tensors):
        raise InputError(
            "this SAE does not say which LM it was trained on; give one: ksparse.LM(name, site=…)"
        )
    return config.from_dict({"acts": acts}, where=" of this SAE's metadata").acts


def by_rows(key: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor has a row per latent: all do but scalars and b_pre with its
    moments."""
    return len(shape) > 0 and key.rpartition(".")[2] != "b_pre"


def rows_of(folder: Path, stem: str, rows: slice | None = None) -> CheckedTensors:
    """Return the tensors of `stem` in a folder, from one file or from one per shard.

    Args:
        folder: a checkpoint.
        stem: "sae" or "optim".
        rows: range of latents; all if not given. No other rows are read.
    """
    files = shard_files(folder, stem)
    if len(files) == 1 and rows is None:
        return safetensors_file(files[0], CorruptError)
    parts: dict[str, list[StoredTensor]] = {}
    at = 0
    for file in files:
        at = _add(parts, file, at, rows or slice(0, 2**62))
    return CheckedTensors(
        files[0] if len(files) == 1 else folder / f"{stem}.*.safetensors",
        {key: _joined(folder, stem, key, shards) for key, shards in parts.items()},
        CorruptError,
    )


def _add(parts: dict[str, list[StoredTensor]], file: Path, at: int, rows: slice) -> int:
    """Add a file's part of `rows` to each tensor's parts.

    Returns:
        The number of the row after the file's last, `at` being that of its first.
    """
    tensors = views(file)
    lengths = {
        key: stored.shape[0] for key, (stored, _) in tensors.items() if by_rows(key, stored.shape)
    }
    count = max(lengths.values(), default=0)
    # BatchTopK's one threshold of all latents
    lengths = {key: length for key, length in lengths.items() if length == count or length > 1}
    other = [key for key, length in lengths.items() if length != count]
    if other:
        raise CorruptError(
            f"{file}: tensor {other[0]!r} has {lengths[other[0]]} rows, others have {count}"
        )
    for key, (stored, read) in tensors.items():
        if key not in lengths:
            parts.setdefault(key, [stored])
            continue
        local = slice(max(0, rows.start - at), min(count, rows.stop - at))
        if local.start < local.stop:
            part = StoredTensor(
                (local.stop - local.start, *stored.shape[1:]), stored.dtype, partial(read, local)
            )
            parts.setdefault(key, []).append(part)
    return at + count


def _joined(folder: Path, stem: str, key: str, parts: list[StoredTensor]) -> StoredTensor:
    """Return one tensor from its rows in several files."""
    if len({(part.dtype, len(part.shape), part.shape[1:]) for part in parts}) > 1:
        raise CorruptError(
            f"{folder}: tensor {key!r} of {stem} is of different shapes or types in its "
            f"{len(parts)} files"
        )
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return StoredTensor(shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))


def _check_is_one_sae(repository: str, revision: str | None) -> None:
    """Raise InputError for a repository that holds many SAEs, before all of them are downloaded."""
    from huggingface_hub import HfApi

    try:
        with hub.quiet():
            files = HfApi().list_repo_files(repository, revision=revision)
    except Exception:  # no such repository, or no network: the download says which
        return
    if parts := _several_saes(files):
        more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
        raise InputError(
            f"the Hub repository {repository} holds many SAEs: {', '.join(parts[:4])}{more}; "
            f"name one, with --subfolder {parts[0]} (in Python subfolder={parts[0]!r})"
        )


def _several_saes(files: Sequence[str]) -> list[str]:
    """Return the files or folders that each hold an SAE, of the files of a repository; none of a
    run, and none where the repository itself is one SAE."""
    weights = [file for file in files if file.endswith((".safetensors", ".pt", ".pth", ".npz"))]
    at_root = [file for file in weights if "/" not in file]
    single_files = [file for file in at_root if not file.endswith(".safetensors")]
    is_run = "recipe.toml" in files or any(file.startswith("checkpoints/") for file in weights)
    if is_run or (at_root and len(single_files) <= 1):
        return []
    return single_files or sorted({file.rpartition("/")[0] for file in weights})


def download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Download files of a Hub repository whose names match one of the patterns.

    Returns:
        The folder that stands for the repository.

    Raises:
        InputError: it does not exist or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with hub.quiet():
            folder = snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=_NOT_READ,
            )
        return Path(folder)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise InputError(
            f"{repository if len(repository) <= 200 else repository[:80] + '…'} is neither a "
            f"folder here nor a Hub repository "
            f"that can be reached ({type(error).__name__}: {reason}){hub.absence(repository)}"
        ) from None
