"""Runs of every activation: they learn, are resumed bit for bit, and what follows them along the way does what it says."""

import dataclasses

import pytest
import torch

import ksparse
from ksparse import config as R
from ksparse.config.evaluation import EvalConfig
from ksparse.evals import runner
from ksparse.sae.init import initialize_
from ksparse.sae.model import SAE, Shape
from ksparse.storage import atomic
from ksparse.training import trainer
from ksparse.training.checkpoint import TrainState
from ksparse.training.resample import resampling
from ksparse.training.steps.autograd import AutogradStep
from ksparse.training.steps.select import build_step
from ksparse.training.train import train
from ksparse.training.trainer import update_dead_counts

EVERY = {
    "batch_topk": {},
    "relu": {"l1": 0.02, "resample": 2},
    "jump_relu": {"bandwidth": 0.05},
    "gated": {"l1": 0.02, "resample": 2},
    "prolu": {"l1": 0.02, "gradient": "ste", "resample": 2},
}
EMPTY = torch.zeros(0, dtype=torch.long)


def planted(d=16, m=32, seed=0):
    """Return draw(rows): unit-norm sums of a few of m directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=1)

    def draw(rows):
        z = (torch.rand(rows, m, generator=generator) < 0.08) * (
            0.5 + torch.rand(rows, m, generator=generator)
        )
        x = z @ directions + 0.05 * torch.randn(rows, d, generator=generator)
        return torch.nn.functional.normalize(x - x.mean(1, keepdim=True), dim=1)

    return draw


def begun(activation, *, k=4, n=64, steps=200, batch=128, optim=R.OptimConfig(lr=3e-3), **options):
    """Return (optimiser, draw) of an SAE on planted data."""
    draw = planted()
    recipe = R.Recipe(
        sae=R.SAEConfig(n_latents=n, k=k, activation=activation, dead_after=2000, **options),
        batch=batch,
        tokens=batch * steps,
        optim=optim,
        threads=1,
    )
    sae = SAE(Shape(16, n, k, "unit_norm", 1.0, activation.kind))
    initialize_(sae, draw(2048), recipe.sae, torch.Generator().manual_seed(0))
    return build_step(sae, recipe), draw


def advance(optimizer, draw, steps):
    """Take steps as a member does; return the losses of the last one."""
    state = TrainState(
        since=torch.zeros(len(optimizer.sae.W_enc), dtype=torch.long), baseline=1 / 16
    )
    for state.step in range(1, steps + 1):
        part, _ = trainer.train_step(
            optimizer, draw(optimizer.recipe.batch), state, optimizer.recipe
        )
    return part


# ---- whole runs


@pytest.mark.parametrize("kind", EVERY)
def test_a_resumed_run_is_bitwise_the_same(kind, small_recipe, tmp_path):
    recipe = small_recipe({"sae.activation": {"kind": kind, **EVERY[kind]}, "run.save_every": 5})
    seen = []

    def stop(row):
        seen.append(row["step"])
        if row["step"] == 8:
            raise KeyboardInterrupt

    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "killed", observe=stop)
    killed = train(recipe, tmp_path / "killed", observe=lambda row: seen.append(row["step"]))
    assert seen[8] == 6, "from step 5 on"
    for file in ("sae.safetensors", "optim.safetensors"):
        assert atomic.sha256(killed.checkpoints()[-1] / file) == atomic.sha256(
            whole.checkpoints()[-1] / file
        )
    assert ksparse.load(tmp_path / "whole").shape.activation == kind


@pytest.mark.parametrize("kind", ["topk", *EVERY])
def test_open_optimizer_writes_out_topk_alone(kind, small_recipe):
    recipe = small_recipe({"sae.activation": {"kind": kind}})
    found = build_step(SAE(Shape(16, 64, 4, activation=kind)), recipe)
    assert (type(found) is AutogradStep) == (kind != "topk")


@pytest.mark.parametrize("kind", EVERY)
def test_every_evaluation_takes_a_run_of_every_kind(kind, small_recipe, tmp_path):
    run = train(small_recipe({"sae.activation": {"kind": kind, **EVERY[kind]}}), tmp_path / "run")
    found = runner.evaluate(
        ksparse.load(run.path),
        names=["stats", "downstream", "positions", "n2g", "ablation"],
        options=EvalConfig(
            tokens=400,
            device="cpu",
            examples=2,
            latents=4,
            ablation_positions=2,
            ablation_latents=4,
            ablation_horizon=2,
        ),
    )
    assert found["stats"]["l0"]["value"] > 0 and found["stats"]["nmse"]["value"] < 3
    assert found["stats"].arrays["top_value"].max() == pytest.approx(
        found["stats"].arrays["max_act"].max().item(), rel=1e-2
    )
    assert found["downstream"]["ce_spliced"]["value"] > 0
    errors = found["positions"]["error"]
    assert len(errors) == len(found["positions"]["positions"]) and all(
        each["value"] > 0 for each in errors
    )


# ---- BatchTopK's threshold


def l0(sae, x):
    return (sae.encode(x).values > 0).sum(1).float().mean().item()


@pytest.mark.parametrize("ema", [0.0, 0.999], ids=["raw", "averaged"])
@pytest.mark.parametrize("steps", [30, 200])
def test_the_threshold_that_is_saved_gives_the_l0_that_is_asked_for(steps, ema):
    """Not that of a mean over weights that are long gone: 12 in the place of 16 after 200 steps."""
    optimizer, draw = begun(
        R.BatchTopKConfig(), steps=200, optim=R.OptimConfig(lr=3e-3, ema=ema), batch=1024
    )
    part = advance(optimizer, draw, steps)
    assert (part.code.values > 0).sum() == 4 * 1024
    for sae in (optimizer.raw(), optimizer.averaged()):
        assert l0(sae, draw(8192)) == pytest.approx(4, rel=0.03)


def test_every_checkpoint_of_a_short_run_has_the_l0_that_is_asked_for(small_recipe, tmp_path):
    recipe = small_recipe(
        {
            "sae.activation": {"kind": "batch_topk"},
            "run.save_every": 6,
            "run.keep": 9,
            "batch": 512,
            "acts.mix": 2048,
            "tokens": 12 * 512,
        }
    )
    run = train(recipe, tmp_path / "run")
    assert [path.name for path in run.checkpoints()] == ["step-00000006", "step-00000012"]
    for path in run.checkpoints():
        result = runner.evaluate(
            ksparse.load(path),
            names=["stats"],
            options=EvalConfig(tokens=2000, device="cpu", examples=0),
        )["stats"]
        assert result["l0"]["value"] == pytest.approx(recipe.sae.k, rel=0.05)


def test_a_checkpoint_of_a_step_that_is_left_out_keeps_its_threshold_when_resumed():
    optimizer, draw = begun(R.BatchTopKConfig())
    advance(optimizer, draw, 20)
    whole = optimizer.averaged().threshold
    again, _ = begun(R.BatchTopKConfig())
    again.restore(
        {key: value.clone() for key, value in optimizer.tensors().items()}, optimizer.updates
    )
    assert torch.equal(again.averaged().threshold, whole) and not torch.equal(
        again.sae.threshold, whole
    )


def test_the_threshold_is_the_running_average_of_the_smallest_value_kept_and_moves_in_steps_alone():
    """T31: not of what a ReLU has already set to 0. T32: not by looking."""
    optimizer, draw = begun(R.BatchTopKConfig(threshold_decay=0.75))
    least, x = [], draw(128)
    for step in range(1, 8):
        before = optimizer.sae.threshold.clone()
        part = optimizer.backward(x, baseline=1 / 16, dead=EMPTY, k_aux=4)
        optimizer.forget()
        assert torch.equal(optimizer.sae.threshold, before)
        part = optimizer.backward(x, baseline=1 / 16, dead=EMPTY, k_aux=4)
        optimizer.step(step)
        least.append(part.code.values[part.code.values > 0].min().item())
    assert min(least) > 0
    expected = least[0]
    for number, value in enumerate(least[1:], 2):
        expected += (value - expected) * max(1 / number, 0.25)
    assert optimizer.sae.threshold.item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_a_positive_value_leaves_the_threshold():
    optimizer, draw = begun(R.BatchTopKConfig())
    with torch.no_grad():
        optimizer.sae.b_enc.fill_(-10.0)
        optimizer.sae.threshold.fill_(0.3)
    part = optimizer.backward(draw(128), baseline=1 / 16, dead=EMPTY, k_aux=4)
    optimizer.step(1)
    assert not (part.code.values > 0).any() and optimizer.sae.threshold.item() == pytest.approx(0.3)


# ---- JumpReLU's thresholds


@pytest.mark.parametrize(
    "start, far",
    [(1e-4, lambda l0: l0 > 16), (0.0, lambda l0: True), (0.4, lambda l0: l0 < 1)],
    ids=["dense", "at k", "sparse"],
)
def test_jump_relu_nears_the_l0_that_it_aims_at_from_both_sides(start, far):
    """SAELens #494: thresholds whose logarithm is trained by Adam stay where they are."""
    optimizer, draw = begun(R.JumpReLUConfig(bandwidth=0.1, threshold=start), steps=400)

    def l0(sae):
        return (sae.encode(draw(2048)).values > 0).sum(1).float().mean().item()

    before = l0(optimizer.sae)
    assert far(before)
    advance(optimizer, draw, 400)
    after = l0(optimizer.averaged())
    assert abs(after - 4) < (abs(before - 4) / 3 if start else 0.4)
    assert (optimizer.sae.threshold >= 0).all()


# ---- penalties and resampling


@pytest.mark.parametrize("kind", ["relu", "gated", "prolu", "prolu, relu", "jump_relu"])
def test_a_larger_penalty_leaves_fewer_active(kind):
    found = []
    for weight in (0.002, 0.1):
        make = {
            "relu": R.ReLUConfig,
            "gated": R.GatedConfig,
            "prolu": R.ProLUConfig,
            "prolu, relu": lambda l1: R.ProLUConfig(l1=l1, gradient="relu"),
            "jump_relu": lambda l1: R.JumpReLUConfig(penalty="l0", coef=l1, bandwidth=0.1),
        }[kind]
        optimizer, draw = begun(make(l1=weight) if kind != "jump_relu" else make(weight), steps=200)
        advance(optimizer, draw, 200)
        found.append(
            (optimizer.averaged().encode(draw(2048)).values > 0).sum(1).float().mean().item()
        )
    assert found[1] < 0.8 * found[0]


def test_the_penalty_rises_over_the_first_share_of_the_steps():
    optimizer, _ = begun(R.ReLUConfig(warmup=0.1), steps=200)
    strengths = []
    for optimizer.updates in (0, 9, 19, 20, 150):
        strengths.append(optimizer.penalty_share)
    assert strengths == [pytest.approx(1 / 20), 0.5, 1.0, 1.0, 1.0]
    assert (
        begun(R.ReLUConfig(warmup=0.0))[0].penalty_share == 1.0
        and begun(R.TopKConfig())[0].penalty_share == 1.0
    )


def test_dead_latents_start_anew_four_times_in_the_first_half():
    recipe = R.Recipe(sae=R.SAEConfig(activation=R.ReLUConfig()), tokens=80 * 1024)
    assert [step for step in range(1, 81) if resampling(step, recipe)] == [10, 20, 30, 40]
    assert not any(
        resampling(step, dataclasses.replace(recipe, sae=R.SAEConfig(activation=other)))
        for other in (R.TopKConfig(), R.ReLUConfig(resample=0))
        for step in range(1, 81)
    )


@pytest.mark.parametrize("kind", ["relu", "gated", "prolu"])
def test_only_dead_latents_start_anew_and_adam_forgets_them(kind):
    optimizer, draw = begun(R.ACTIVATION_CONFIGS[kind](resample=1), steps=6)
    dead, x = torch.tensor([3, 10, 50]), draw(128)
    for step in (1, 2):
        optimizer.backward(x, baseline=1 / 16, dead=dead, k_aux=4)
        optimizer.step(step)
    others = torch.ones(64, dtype=torch.bool)
    others[dead] = False
    twin, _ = begun(R.ACTIVATION_CONFIGS[kind](resample=0), steps=6)
    twin.restore(
        {key: value.clone() for key, value in optimizer.tensors().items()}, optimizer.updates
    )
    for each in (optimizer, twin):
        each.backward(x, baseline=1 / 16, dead=dead, k_aux=4)
        each.step(3)
    sae, plain = optimizer.sae, twin.sae
    for key in ("W_enc", "W_dec", "b_enc", *dict(sae.activation.named_parameters())):
        ours, theirs = getattr(sae, key).detach(), getattr(plain, key).detach()
        assert torch.equal(ours[others], theirs[others]), key
        assert (
            not optimizer.adam.state[getattr(sae, key)]["exp_avg"][dead].any()
            and not optimizer.adam.state[getattr(sae, key)]["exp_avg_sq"][dead].any()
        )
        torch.testing.assert_close(
            getattr(optimizer.averaged(), key)[dead], ours[dead], rtol=1e-4, atol=1e-6
        )
    new = sae.W_dec.detach()[dead]
    directions = torch.nn.functional.normalize(x - sae.b_pre.detach(), dim=1)
    assert ((new @ directions.T).amax(1) > 1 - 1e-5).all(), (
        "each is the direction of an activation of the batch"
    )
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(new, sae.W_enc.detach()[dead]), torch.ones(3)
    )
    assert sae.W_enc.detach()[dead].norm(dim=1).mean() == pytest.approx(
        0.2 * sae.W_enc.detach()[others].norm(dim=1).mean().item(), rel=1e-5
    )
    assert torch.equal(sae.b_pre, plain.b_pre)


def test_padding_of_a_code_keeps_no_latent_alive():
    """T5: latent 0 stands where a token has fewer active latents than the widest."""
    optimizer, draw = begun(R.ReLUConfig(), n=4096)
    with torch.no_grad():
        optimizer.sae.b_enc.fill_(0.0)
        optimizer.sae.b_enc[0] = -100.0
        optimizer.sae.b_enc[200:] = -100.0
    part = optimizer.backward(draw(128), baseline=1 / 16, dead=EMPTY, k_aux=4)
    assert part.code.values.shape[1] < 4096 // 8 and (part.code.indices == 0).any()
    since = update_dead_counts(torch.zeros(4096, dtype=torch.long), part, 128)
    assert since[0] == 128 and (since[1:200] == 0).any() and (since[200:] == 128).all()


def test_a_batch_taken_in_parts_has_the_same_gradient_and_a_code_as_wide_as_its_widest(monkeypatch):
    from ksparse.training.steps import autograd

    whole, draw = begun(R.ReLUConfig())
    x = draw(96)
    expected = whole.backward(x, baseline=1 / 16, dead=EMPTY, k_aux=4)
    parts, _ = begun(R.ReLUConfig())
    monkeypatch.setattr(autograd, "PRE_ACTS", 64 * 40)
    found = parts.backward(x, baseline=1 / 16, dead=EMPTY, k_aux=4)
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(found.code.dense(64), expected.code.dense(64))
    for key in ("W_enc", "W_dec", "b_enc", "b_pre"):
        torch.testing.assert_close(getattr(parts.sae, key).grad, getattr(whole.sae, key).grad)
