"""Publish an SAE as a repository on the Hub, with a model card.

README.md                    the card
sae.json, sae.safetensors    for ksparse.load("user/repo")
sae_lens/                    for SAELens: SAE.from_pretrained("user/repo", "sae_lens"), if it can
                             hold the SAE
run/                         recipe.toml and evals/*.json, if the SAE is a run's
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ksparse import interop
from ksparse.errors import InputError
from ksparse.interop import foreign
from ksparse.interop.compatibility import Normalization
from ksparse.sae import serialization
from ksparse.sae.model import SAE
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder

COPY = "sae_lens"
"""Folder of the copy for SAELens."""
_HEADLINE = {
    ("stats", "nmse"): "normalised MSE (1 = predicting the mean)",
    ("stats", "explained_variance"): "explained variance, raw activations",
    ("stats", "l0"): "L0",
    ("stats", "dead_fraction"): "dead latents",
    ("downstream", "ce_clean"): "loss of the LM, nats per token",
    ("downstream", "ce_spliced"): "with the reconstruction spliced in",
    ("downstream", "recovered"): "share of the zero-ablation loss recovered",
    ("downstream", "kl"): "KL, nats per token",
    ("probes", "probe_loss"): "probe loss, nats",
    ("n2g", "recall"): "explanations (N2G): recall",
    ("n2g", "precision"): "explanations (N2G): precision",
    ("ablation", "ablation_sparsity"): "ablation sparsity",
}


def push(
    source: Path | str,
    repository: str,
    *,
    subfolder: str = "",
    private: bool = False,
    normalization: Normalization = "exact",
) -> str:
    """Upload an SAE as a repository on the Hub. Needs a token (`hf auth login`).

    Args:
        source: what `ksparse.load` takes; of a run, its recipe and results are uploaded too.
        repository: "owner/name"; created if it does not exist.
        subfolder: folder in the repository, for several SAEs in one.
        private: whether a new repository is private.
        normalization: for the copy in SAELens' format, as in `interop.write`.

    Returns:
        The repository's address.

    Raises:
        InputError: the Hub refused, or cannot be reached.
    """
    _check_name(repository)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        prepare(
            source,
            Path(folder) / "repository",
            repository,
            subfolder=subfolder,
            normalization=normalization,
        )
        try:
            api = HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=Path(folder) / "repository",
                path_in_repo=subfolder or None,
                commit_message=f"{Path(source).name}, written by ksparse",
            )
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise InputError(
                f"{repository} could not be written on the Hub ({reason}); log in with `hf auth "
                "login`, or write the same folder here with --folder DIR"
            ) from None
    return f"https://huggingface.co/{repository}"


def prepare(
    source: Path | str,
    folder: Path | str,
    repository: str,
    *,
    subfolder: str = "",
    normalization: Normalization = "exact",
) -> Path:
    """Write the files of a repository into a new folder, without uploading them.

    Args:
        source, repository, subfolder, normalization: see `push`.
        folder: a new or empty folder.

    Returns:
        The folder.
    """
    _check_name(repository)
    target, run, sae = (
        foreign.check_new_folder(folder),
        RunFolder(Path(source)),
        interop.load(source, device="cpu"),
    )
    with atomic.atomic_dir(target, new=True) as folder:
        serialization.write(sae, folder)
        refusal = ""
        try:
            interop.write(sae, folder / COPY, "sae_lens", normalization=normalization)
        except InputError as error:
            refusal = str(error)
        results = _copy_run(run, folder / "run") if run.exists() else {}
        atomic.write_text(
            folder / "README.md",
            card(sae, repository, subfolder=subfolder, results=results, refusal=refusal),
        )
    return target


def _copy_run(run: RunFolder, folder: Path) -> dict[str, Any]:
    """Copy a run's recipe and results; return {evaluation: result}.

    They go into a folder of their own: recipe.toml beside the SAE would make that folder a run.
    """
    results: dict[str, Any] = {}
    (folder / "evals").mkdir(parents=True)
    shutil.copy(run.recipe_file, folder / "recipe.toml")
    for entry in sorted(run.file("evals").glob("*.json")):
        file = run.file("evals", entry.name)
        if file.stem != "vocabulary":
            results[file.stem] = jsonio.read_table(file)
            shutil.copy(file, folder / "evals" / file.name)
    return results


def card(
    sae: SAE,
    repository: str,
    *,
    subfolder: str = "",
    results: dict[str, Any] | None = None,
    refusal: str = "",
) -> str:
    """Return the model card as Markdown: what the SAE is, how to load it, what was measured.

    Args:
        sae: the SAE.
        repository: "owner/name".
        subfolder: folder of the SAE in the repository.
        results: {evaluation: result}.
        refusal: why there is no copy for SAELens; empty if there is one.
    """
    acts, shape = sae.metadata.get("acts") or sae.metadata.get("origin") or {}, sae.shape
    lm, site = acts.get("lm", "an unknown LM"), acts.get("site", "an unknown site")
    tags = [
        "sparse-autoencoder",
        shape.activation.replace("_", ""),
        *([] if refusal else ["saelens"]),
    ]
    facts = _facts(sae, acts, lm, site)
    lines = [
        "---",
        "library_name: ksparse",
        f"tags: [{', '.join(tags)}]",
        *([f"base_model: {lm}"] if _is_hub_name(lm) else []),
        "---",
        "",
        f"# {repository.rpartition('/')[2]}{'/' + subfolder if subfolder else ''}",
        "",
        f"A sparse autoencoder on {lm} at {site}: {shape.n_latents:,} latents, {shape.activation}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items() if value not in (None, "")),
        "",
        *_usage(sae, repository, subfolder, refusal),
        *_measurements(results or {}),
    ]
    return "\n".join(lines) + "\n"


def _facts(sae: SAE, acts: dict[str, Any], lm: str, site: str) -> dict[str, Any]:
    shape = sae.shape
    return {
        "language model": lm,
        "site": site,
        "activation": shape.activation,
        "latents": f"{shape.n_latents:,}",
        "k": shape.k if shape.activation in ("topk", "batch_topk") else None,
        "d_model": shape.d_model,
        "normalisation of inputs": shape.normalize
        + (f", times {shape.factor:.6g}" if shape.normalize == "dataset" else ""),
        "text": acts.get("text"),
        "tokens": _format_count(sae.metadata.get("tokens")),
        "context": acts.get("context"),
        "positions": json.dumps(sae.metadata["policy"]) if sae.metadata.get("policy") else None,
    }


def _usage(sae: SAE, repository: str, subfolder: str, refusal: str) -> list[str]:
    """Return the section on loading the SAE in ksparse and in SAELens."""
    argument = f', subfolder="{subfolder}"' if subfolder else ""
    lines = [
        "## Load it",
        "",
        "```python",
        "import ksparse",
        "",
        f'sae = ksparse.load("{repository}"{argument})',
        f"code = sae.encode(x)   # raw x[..., {sae.shape.d_model}]; the SAE normalises it",
        "```",
        "",
    ]
    if refusal:
        return [*lines, f"There is no copy for SAELens: {refusal}.", ""]
    copy = f"{subfolder}/{COPY}" if subfolder else COPY
    return [
        *lines,
        "```python",
        "from sae_lens import SAE",
        "",
        f'sae = SAE.from_pretrained("{repository}", "{copy}")',
        "```",
        "",
    ]


def _measurements(results: dict[str, Any]) -> list[str]:
    """Return the section with the headline numbers and the settings that they depend on."""
    values = {
        (name, key): results[name][key]
        for name, key in _HEADLINE
        if isinstance(results.get(name, {}).get(key), dict)
    }
    if not values:
        return []
    rows = [
        f"| {_HEADLINE[name, key]} | {_format_estimate(value)} | {name} |"
        for (name, key), value in values.items()
    ]
    settings = {
        name: {
            key: results[name].get(key)
            for key in ("options", "policy", "text", "n_tokens", "n_documents")
        }
        for name in dict.fromkeys(name for name, _ in values)
    }
    splits = sorted(
        {(results[name].get("policy") or {}).get("split", "held-out") for name in settings}
    )
    return [
        "## Measured",
        "",
        f"On {' and '.join(splits)} text, ± one standard error over documents.",
        "",
        "| | | evaluation |",
        "|---|---|---|",
        *rows,
        "",
        "Settings, from `run/evals/*.json`:",
        "",
        "```json",
        json.dumps(settings),
        "```",
    ]


def _format_estimate(estimate: dict[str, float | None]) -> str:
    value, se = estimate.get("value"), estimate.get("se")
    if value is None:
        return "-"
    return f"{value:.4g}" + (f" ± {se:.2g}" if se is not None and math.isfinite(se) else "")


def _format_count(tokens: Any) -> str | None:
    return f"{tokens:,}" if isinstance(tokens, int) else None


def _is_hub_name(lm: str) -> bool:
    return (
        bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", lm))
        and not lm.startswith("pylm")
        and not Path(lm).exists()
    )


def _check_name(repository: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(
            f"{repository!r} is not the name of a repository on the Hub; give OWNER/NAME"
        )
