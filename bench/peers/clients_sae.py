"""What uses SAELens' and dictionary_learning's files, on files that ksparse wrote: SAELens' run_evals, SAEDashboard's NeuronpediaRunner, SAEBench's loaders.

    python clients_sae.py FOLDER LM TEXT

FOLDER/sae_lens/KIND, FOLDER/dictionary_learning/KIND: the files. LM: a Hugging Face LLaMA in a folder. TEXT: a file with a document per line. Prints a JSON
list of {client, kind, …}; a client that stops has `error`. In the environment: sae-lens==6.54.12, dictionary-learning==0.1.0, and by --no-deps sae-dashboard==0.8.0,
sae-bench==0.6.0 (their pins exclude one another), dataclasses-json, eindex-callum, matplotlib; no torchvision.

Replaced, since nothing is downloaded: the LM that SAELens' load_model("HookedTransformer", …) would fetch by name, and hf_hub_download. The class of the LM is the
one that cfg.json names.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import llama_hooked
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

warnings.simplefilter("ignore")


def main() -> None:
    folder, lm, text = (Path(each).resolve() for each in sys.argv[1:])
    torch.set_num_threads(1)
    rows = []
    for client, find in (
        (run_evals, "sae_lens"),
        (dashboard, "sae_lens"),
        (saebench, "dictionary_learning"),
    ):
        for sae in sorted((folder / find).iterdir()):
            row: dict[str, Any] = {"client": client.__name__, "kind": sae.name}
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    row |= client(sae, lm, text)
            except Exception as error:  # any way to stop is a finding
                row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            rows.append(row)
    print(json.dumps(rows))


def load_lm(name: str, lm: Path) -> Any:
    """Return the LM in the class that SAELens' load_model makes of a model_class_name."""
    from sae_lens.load_model import load_model

    tokenizer = AutoTokenizer.from_pretrained(lm)
    if name == "AutoModelForCausalLM":
        return load_model(name, str(lm), device="cpu")
    return llama_hooked.build(
        AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32), tokenizer
    )


def run_evals(path: Path, lm: Path, text: Path) -> dict[str, Any]:
    from sae_lens import SAE, ActivationsStore
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    sae = SAE.load_from_disk(path)
    metadata = sae.cfg.metadata
    model = load_lm(metadata.model_class_name, lm)
    dataset = Dataset.from_dict({"text": text.read_text().splitlines()})
    store = ActivationsStore.from_sae(
        model,
        sae,
        dataset=dataset,
        context_size=64,
        streaming=False,
        store_batch_size_prompts=8,
        train_batch_size_tokens=512,
    )
    found, _ = run_evals(
        sae=sae,
        activation_store=store,
        model=model,
        activation_scaler=ActivationScaler(),
        eval_config=EvalConfig(
            batch_size_prompts=8,
            n_eval_reconstruction_batches=2,
            n_eval_sparsity_variance_batches=4,
            compute_kl=True,
            compute_ce_loss=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        ),
        exclude_special_tokens=metadata.exclude_special_tokens,
    )
    return {
        "hook_name": metadata.hook_name,
        "model_class_name": metadata.model_class_name,
        "exclude_special_tokens": metadata.exclude_special_tokens,
        "explained_variance": found["reconstruction_quality"]["explained_variance"],
        "l0": found["sparsity"]["l0"],
        "ce_with_sae": found["model_performance_preservation"]["ce_loss_with_sae"],
        "ce_without_sae": found["model_performance_preservation"]["ce_loss_without_sae"],
    }


def dashboard(path: Path, lm: Path, text: Path) -> dict[str, Any]:
    from sae_dashboard.neuronpedia import neuronpedia_runner
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
    from sae_lens import SAE, HookedSAETransformer

    if (
        json.loads((path / "cfg.json").read_text())["metadata"]["model_class_name"]
        != "HookedTransformer"
    ):
        return {"left_out": "it takes TransformerLens' hook names only"}

    def from_pretrained(**options: Any) -> Any:
        hf = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32)
        model = llama_hooked.build(hf, AutoTokenizer.from_pretrained(lm), HookedSAETransformer)
        model.process_weights_()  # as TransformerLens' from_pretrained does
        return model

    HookedSAETransformer.from_pretrained = from_pretrained
    if not hasattr(SAE, "load_from_pretrained"):
        SAE.load_from_pretrained = SAE.load_from_disk
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        try:
            data = Path(work) / "data"
            data.mkdir()
            lines = [json.dumps({"text": line}) for line in text.read_text().splitlines()]
            (data / "train.jsonl").write_text("\n".join(lines))
            copy = Path(work) / "sae"
            shutil.copytree(path, copy)
            config = json.loads((copy / "cfg.json").read_text())
            config["metadata"]["model_name"] = "llama"  # it names the folder of the output
            (copy / "cfg.json").write_text(json.dumps(config))
            runner = neuronpedia_runner.NeuronpediaRunner(
                NeuronpediaRunnerConfig(
                    sae_set="set",
                    sae_path=str(copy),
                    outputs_dir=str(Path(work) / "out"),
                    from_local_sae=True,
                    huggingface_dataset_path=str(data),
                    n_prompts_total=64,
                    n_tokens_in_prompt=64,
                    n_prompts_in_forward_pass=16,
                    n_features_at_a_time=32,
                    start_batch=0,
                    end_batch=1,
                    sae_device="cpu",
                    model_device="cpu",
                    activation_store_device="cpu",
                    sae_dtype="float32",
                    model_dtype="float32",
                    sparsity_threshold=1,
                )
            )
            runner.run()
            features = [
                feature
                for file in sorted(Path(work, "out").rglob("batch-*.json"))
                for feature in json.loads(file.read_text())["features"]
            ]
        finally:
            os.chdir(home)
    ends = ("pos_str", "pos_values", "neg_str", "neg_values")
    logits = {str(each["feature_index"]): {end: each[end] for end in ends} for each in features}
    return {
        "features": len(features),
        "keys": sorted(features[0]) if features else [],
        "logits": logits,
    }


def saebench(path: Path, lm: Path, text: Path) -> dict[str, Any]:
    from sae_bench.custom_saes import batch_topk_sae, gated_sae, jumprelu_sae, relu_sae, topk_sae

    loaders = {
        "AutoEncoderTopK": (topk_sae, "load_dictionary_learning_topk_sae"),
        "BatchTopKSAE": (batch_topk_sae, "load_dictionary_learning_batch_topk_sae"),
        "MatryoshkaBatchTopKSAE": (
            batch_topk_sae,
            "load_dictionary_learning_matryoshka_batch_topk_sae",
        ),
        "AutoEncoder": (relu_sae, "load_dictionary_learning_relu_sae"),
        "GatedAutoEncoder": (gated_sae, "load_dictionary_learning_gated_sae"),
        "JumpReluAutoEncoder": (jumprelu_sae, "load_dictionary_learning_jump_relu_sae"),
    }
    trainer = json.loads((path / "config.json").read_text())["trainer"]
    module, name = loaders[trainer["dict_class"]]
    module.hf_hub_download = lambda repo_id, filename, **options: str(path / Path(filename).name)
    sae = getattr(module, name)(
        "nobody/nothing",
        "ae.pt",
        trainer["lm_name"],
        torch.device("cpu"),
        torch.float32,
        layer=trainer["layer"],
    )
    import numpy as np

    x = torch.from_numpy(np.load(path / "x.npy"))
    with torch.no_grad():
        latents = sae.encode(x)
        recon = sae.decode(latents)
    np.savez(path / "found.npz", latents=latents.numpy(), recon=recon.numpy())
    return {"dict_class": trainer["dict_class"]}


if __name__ == "__main__":
    main()
