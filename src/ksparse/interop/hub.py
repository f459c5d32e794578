"""An SAE as a repository on the Hub: ours, a copy for SAELens where it can hold the SAE, results,
and a card that says what it is and how to load it.

README.md                    the card
sae.json, sae.safetensors    for ksparse.load("user/repo")
sae_lens/                    for SAE.from_pretrained("user/repo", "sae_lens")
run/                         recipe.toml and evals/*.json of a run
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
    """Make a repository of an SAE and upload it; return its address. A token is needed, as for all
    that writes to the Hub (`hf auth login`)."""
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
            said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise InputError(
                f"{repository} could not be written on the Hub ({said}); log in with `hf auth "
                "login`, or "
                "write the same folder here with --folder DIR"
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
    """Write what is uploaded into a new folder; return that folder."""
    _check_name(repository)
    place, run, sae = foreign.new_folder(folder), RunFolder(Path(source)), interop.load(source)
    with atomic.atomic_dir(place, new=True) as folder:
        serialization.write(sae, folder)
        refused = ""
        try:
            interop.write(sae, folder / COPY, "sae_lens", normalization=normalization)
        except InputError as error:
            refused = str(error)
        results: dict[str, Any] = {}
        if run.exists():
            (folder / "run" / "evals").mkdir(
                parents=True
            )  # not in the folder itself, which would then be taken for a run
            shutil.copy(run.recipe_file, folder / "run" / "recipe.toml")
            for file in sorted(run.file("evals").glob("*.json")):
                file = run.file("evals", file.name)
                if file.stem != "vocabulary":
                    results[file.stem] = jsonio.read_table(file)
                    shutil.copy(file, folder / "run" / "evals" / file.name)
        atomic.write_text(
            folder / "README.md",
            card(sae, repository, subfolder=subfolder, results=results, refused=refused),
        )
    return place


def card(
    sae: SAE,
    repository: str,
    *,
    subfolder: str = "",
    results: dict[str, Any] | None = None,
    refused: str = "",
) -> str:
    """Return the model card: front matter, what the SAE is, how to load it, what was measured and
    how.

    results: {evaluation: result}. refused: why there is no copy for SAELens; '' if there is one.
    """
    acts, shape = sae.metadata.get("acts") or sae.metadata.get("origin") or {}, sae.shape
    lm, site = acts.get("lm", "an unknown LM"), acts.get("site", "an unknown site")
    tags = [
        "sparse-autoencoder",
        shape.activation.replace("_", ""),
        *([] if refused else ["saelens"]),
    ]
    front = [
        "---",
        "library_name: ksparse",
        f"tags: [{', '.join(tags)}]",
        *([f"base_model: {lm}"] if _on_hub(lm) else []),
        "---",
    ]
    where = f', subfolder="{subfolder}"' if subfolder else ""
    lens = f"{subfolder}/{COPY}" if subfolder else COPY
    facts = {
        "language model": lm,
        "site": site,
        "activation": shape.activation,
        "latents": f"{shape.n_latents:,}",
        "k": shape.k if shape.activation in ("topk", "batch_topk") else None,
        "d_model": shape.d_model,
        "normalisation of inputs": shape.normalize
        + (f", times {shape.factor:.6g}" if shape.normalize == "dataset" else ""),
        "text": acts.get("text"),
        "tokens": _count(sae.metadata.get("tokens")),
        "context": acts.get("context"),
        "positions": json.dumps(sae.metadata["policy"]) if sae.metadata.get("policy") else None,
    }
    lines = [
        *front,
        "",
        f"# {repository.rpartition('/')[2]}{'/' + subfolder if subfolder else ''}",
        "",
        f"A sparse autoencoder on {lm} at {site}: {shape.n_latents:,} latents, {shape.activation}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items() if value not in (None, "")),
        "",
        "## Load it",
        "",
        "```python",
        "import ksparse",
        "",
        f'sae = ksparse.load("{repository}"{where})',
        f"code = sae.encode(x)   # raw x[..., {shape.d_model}]; the SAE normalises it",
        "```",
        "",
    ]
    if refused:
        lines += [f"There is no copy for SAELens: {refused}.", ""]
    else:
        lines += [
            "```python",
            "from sae_lens import SAE",
            "",
            f'sae = SAE.from_pretrained("{repository}", "{lens}")',
            "```",
            "",
        ]
    return "\n".join([*lines, *_measured(results or {})]) + "\n"


def _measured(results: dict[str, Any]) -> list[str]:
    """Return the headline numbers, each with the settings that it depends on."""
    shown = {
        (name, key): results[name][key]
        for name, key in _HEADLINE
        if isinstance(results.get(name, {}).get(key), dict)
    }
    if not shown:
        return []
    rows = [
        f"| {_HEADLINE[name, key]} | {_value(value)} | {name} |"
        for (name, key), value in shown.items()
    ]
    settings = {
        name: {
            key: results[name].get(key)
            for key in ("options", "policy", "text", "n_tokens", "n_documents")
        }
        for name in dict.fromkeys(name for name, _ in shown)
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


def _value(estimate: dict[str, float | None]) -> str:
    value, se = estimate.get("value"), estimate.get("se")
    if value is None:
        return "-"
    return f"{value:.4g}" + (f" ± {se:.2g}" if se is not None and math.isfinite(se) else "")


def _count(tokens: Any) -> str | None:
    return f"{tokens:,}" if isinstance(tokens, int) else None


def _on_hub(lm: str) -> bool:
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
