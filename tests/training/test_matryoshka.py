"""Matryoshka runs: they learn nested prefixes, resume bit for bit, and are judged per prefix."""

import json

import pytest
import torch

import ksparse
from ksparse.config.evaluation import EvalConfig
from ksparse.evals import runner
from ksparse.sae.losses import prefix_reconstructions
from ksparse.storage import atomic
from ksparse.training.steps.autograd import AutogradStep
from ksparse.training.steps.select import build_step
from ksparse.training.train import train

PREFIXES = {
    "topk, fixed": {"sae.prefixes": [8, 24]},
    "batch_topk, fixed": {"sae.activation": {"kind": "batch_topk"}, "sae.prefixes": [8, 24]},
    "batch_topk, drawn": {"sae.activation": {"kind": "batch_topk"}, "sae.prefix_draws": 5},
}


def metrics(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", PREFIXES)
def test_a_resumed_run_is_bitwise_the_same(name, small_recipe, tmp_path):
    recipe = small_recipe(PREFIXES[name] | {"run.save_every": 5})

    def stop(row):
        if row["step"] == 8:
            raise KeyboardInterrupt

    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "killed", observe=stop)
    killed = train(recipe, tmp_path / "killed")
    for file in ("sae.safetensors", "optim.safetensors", "sae.json"):
        assert atomic.sha256(killed.checkpoints()[-1] / file) == atomic.sha256(
            whole.checkpoints()[-1] / file
        )
    logged = {"nmse_8", "nmse_24"} if "fixed" in name else {"nmse_prefixes"}
    assert all(row[key] > 0 for row in metrics(whole) for key in logged)


def test_only_autograd_trains_it(small_recipe):
    recipe = small_recipe(PREFIXES["topk, fixed"])
    sae = ksparse.SAE(ksparse.sae.model.Shape(16, recipe.sae.n_latents, recipe.sae.k))
    assert recipe.needs_autograd and type(build_step(sae, recipe)) is AutogradStep


def test_the_sae_records_its_prefixes_and_is_judged_by_them(small_recipe, tmp_path):
    recipe = small_recipe(PREFIXES["batch_topk, fixed"] | {"tokens": 12_000})
    plain = small_recipe({"sae.activation": {"kind": "batch_topk"}, "tokens": 12_000})
    judged = {}
    for name, made in (("nested", recipe), ("plain", plain)):
        sae = ksparse.load(train(made, tmp_path / name).path)
        assert sae.metadata.get("prefixes") == ([8, 24] if name == "nested" else None)
        sae.metadata["prefixes"] = [8, 24]
        options = EvalConfig(tokens=2000, device="cpu", examples=0)
        judged[name] = runner.evaluate(sae, names=["stats"], options=options)["stats"]
    for name, result in judged.items():
        points = result["prefixes"]
        assert [point["latents"] for point in points] == [8, 24]
        errors = [*(point["nmse"]["value"] for point in points), result["nmse"]["value"]]
        l0 = [*(point["l0"]["value"] for point in points), result["l0"]["value"]]
        assert l0 == sorted(l0) and l0[0] > 0, name
        assert (errors == sorted(errors, reverse=True)) or name == "plain"
    assert (
        judged["nested"]["prefixes"][0]["nmse"]["value"]
        < (judged["plain"]["prefixes"][0]["nmse"]["value"])
    )


def test_errors_per_prefix_are_those_of_codes_without_the_other_latents(small_recipe, tmp_path):
    sae = ksparse.load(train(small_recipe(PREFIXES["topk, fixed"]), tmp_path / "run").path)
    x = torch.randn(50, sae.shape.d_model)
    code = sae.encode(x)
    for size, recon in zip((8, 24), prefix_reconstructions(sae, code, (8, 24))):
        values = torch.where(code.indices < size, code.values, 0.0)
        torch.testing.assert_close(recon, sae.decode_normalized(code._replace(values=values)))
