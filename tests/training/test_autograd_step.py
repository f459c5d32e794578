"""How the weights move, against a hand computation in float64."""

import math

import pytest
import torch

from ksparse.config import ActsConfig, OptimConfig, Recipe
from ksparse.config import SAEConfig as Options
from ksparse.sae.model import SAE, Shape
from ksparse.training.steps.autograd import AutogradStep, rate_share, remove_parallel_

KEYS = ("W_enc", "b_enc", "W_dec", "b_pre")


def make(*, normalize="none", sae_options=None, tokens=1000, **options):
    torch.manual_seed(0)
    recipe = Recipe(
        acts=ActsConfig(normalize=normalize),
        sae=Options(n_latents=12, k=3, **(sae_options or {})),
        tokens=tokens,
        batch=10,
        optim=OptimConfig(**{"lr": 0.01, "ema": 0.9, "ema_span": 1.0} | options),
    )
    sae = SAE(Shape(5, 12, 3, normalize))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        sae.normalize_decoder_()
    return sae, AutogradStep(sae, recipe)


def give_gradients(sae, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.grad = (
            torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None
        )


def by_hand(sae, optimizer, steps):
    """Return the weights after each step: project, clip, Adam, renormalise, in float64."""
    options, recipe = optimizer.recipe.optim, optimizer.recipe
    weights = {key: getattr(sae, key).detach().double() for key in KEYS}
    first = {key: torch.zeros_like(value) for key, value in weights.items()}
    second = {key: torch.zeros_like(value) for key, value in weights.items()}
    history, norms = [], []
    for step in range(1, steps + 1):
        give_gradients(sae, step)
        grads = {key: getattr(sae, key).grad.double() for key in KEYS}
        grads["W_dec"] -= (grads["W_dec"] * weights["W_dec"]).sum(1, keepdim=True) * weights[
            "W_dec"
        ]
        norm = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
        norms.append(norm)
        if options.clip and norm > options.clip:
            grads = {key: grad * options.clip / norm for key, grad in grads.items()}
        for key, grad in grads.items():
            first[key] = options.beta1 * first[key] + (1 - options.beta1) * grad
            second[key] = options.beta2 * second[key] + (1 - options.beta2) * grad**2
            rate = (
                recipe.lr
                * rate_share(step, recipe)
                * (
                    5**-0.5
                    if key in ("b_enc", "b_pre") and recipe.acts.normalize == "unit_norm"
                    else 1
                )
            )
            weights[key] = weights[key] - rate * (first[key] / (1 - options.beta1**step)) / (
                (second[key] / (1 - options.beta2**step)).sqrt() + options.eps
            )
        weights["W_dec"] = weights["W_dec"] / weights["W_dec"].norm(dim=1, keepdim=True)
        history.append(dict(weights))
    return history, norms


def advance(optimizer: AutogradStep, step: int) -> float:
    """Take one step, as the loop does; return the gradient's norm."""
    norm = optimizer.step(step)
    return norm


@pytest.mark.parametrize(
    "options",
    [{}, {"clip": 0.5}, {"warmup": 4, "decay": 0.03}, {"beta1": 0.0, "beta2": 0.99}],
    ids=str,
)
@pytest.mark.parametrize("normalize", ["none", "unit_norm"])
def test_steps_are_project_clip_adam_renormalise(options, normalize):
    """T8, T38, and biases whose rate is in the unit of the input."""
    sae, optimizer = make(normalize=normalize, **options)
    history, norms = by_hand(sae, optimizer, 6)
    for step, (expected, norm) in enumerate(zip(history, norms), 1):
        give_gradients(sae, step)
        norm_found = advance(optimizer, step)
        for key in KEYS:
            torch.testing.assert_close(
                getattr(sae, key).detach().double(),
                expected[key],
                rtol=1e-4,
                atol=1e-6,
                msg=lambda text, key=key: f"{key}: {text}",
            )
        assert norm_found == pytest.approx(norm, rel=1e-5)
        assert optimizer.adam.param_groups[0]["lr"] == pytest.approx(
            0.01 * rate_share(step, optimizer.recipe)
        )
        assert all(parameter.grad is None for parameter in sae.parameters()), (
            "gradients must be forgotten"
        )


def test_decoder_rows_have_norm_1_after_each_step(monkeypatch):
    sae, optimizer = make()
    own = optimizer.adam.step
    seen = []
    monkeypatch.setattr(
        optimizer.adam,
        "step",
        lambda: seen.append((sae.W_dec.grad * sae.W_dec).sum(1).abs().max().item()) or own(),
    )
    for step in range(1, 5):
        give_gradients(sae, step)
        advance(optimizer, step)
        torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(12))
    assert len(seen) == 4 and max(seen) < 1e-5


def test_free_decoder_norms_are_left_alone():
    sae, optimizer = make(sae_options={"unit_norm": False})
    give_gradients(sae, 1)
    along = (sae.W_dec.grad * sae.W_dec).sum(1).abs().max()
    norm = advance(optimizer, 1)
    assert along > 0.1 and (sae.W_dec.detach().norm(dim=1) - 1).abs().max() > 1e-3
    give_gradients(sae, 1)
    assert norm == pytest.approx(
        math.sqrt(sum(parameter.grad.square().sum().item() for parameter in sae.parameters())),
        rel=1e-5,
    )


def test_the_part_along_a_row_is_taken_off_and_only_that():
    weight = torch.nn.functional.normalize(torch.randn(7, 5), dim=1)
    grad = torch.randn(7, 5)
    before = grad.clone()
    remove_parallel_(grad, weight)
    torch.testing.assert_close((grad * weight).sum(1), torch.zeros(7), atol=1e-6, rtol=0)
    taken = before - grad
    torch.testing.assert_close(taken, (taken * weight).sum(1, keepdim=True) * weight)


def test_without_a_bias_in_the_topk_it_stays_at_0():
    sae, optimizer = make(sae_options={"b_enc": False})
    before = sae.b_enc.detach().clone()
    give_gradients(sae, 1)
    advance(optimizer, 1)
    assert torch.equal(sae.b_enc, before) and sae.b_enc.grad is None
    assert "exp_avg.b_enc" not in optimizer.tensors() and "exp_avg.W_enc" in optimizer.tensors()


# ---- the schedule


def test_the_first_step_of_a_warm_up_is_not_at_0():
    """T38."""
    recipe = Recipe(tokens=1000, batch=10, optim=OptimConfig(warmup=10))
    assert [rate_share(step, recipe) for step in (1, 2, 9, 10, 11, 100)] == [
        0.1,
        0.2,
        0.9,
        1.0,
        1.0,
        1.0,
    ]


def test_the_last_share_of_the_steps_falls_to_nearly_0():
    recipe = Recipe(tokens=1000, batch=10, optim=OptimConfig(decay=0.2))
    shares = [rate_share(step, recipe) for step in range(1, 101)]
    assert (
        shares[:81] == [1.0] * 81
        and shares[-1] == pytest.approx(1 / 20)
        and shares[89] == pytest.approx(11 / 20)
    )
    assert all(a >= b > 0 for a, b in zip(shares, shares[1:]))


def test_without_warm_up_and_decay_the_rate_is_constant():
    recipe = Recipe(tokens=1000, batch=10)
    assert {rate_share(step, recipe) for step in range(1, 101)} == {1.0}


def test_warm_up_and_decay_together_take_the_smaller():
    recipe = Recipe(tokens=100, batch=10, optim=OptimConfig(warmup=10, decay=1.0))
    assert [rate_share(step, recipe) for step in (1, 5, 6, 10)] == pytest.approx(
        [0.1, 0.5, 0.5, 0.1]
    )


# ---- the average


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_average_is_bias_corrected_and_renormalised(steps):
    sae, optimizer = make()
    total, weight = {key: 0.0 for key in KEYS}, 0.0
    for step in range(1, steps + 1):
        give_gradients(sae, step)
        advance(optimizer, step)
        for key in KEYS:
            total[key] = 0.9 * total[key] + 0.1 * getattr(sae, key).detach().double()
        weight = 0.9 * weight + 0.1
    averaged = optimizer.averaged()
    for key in KEYS:
        expected = total[key] / weight
        if key == "W_dec":
            expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(
            getattr(averaged, key).detach().double(), expected, rtol=1e-5, atol=1e-6
        )
    if steps == 1:
        torch.testing.assert_close(averaged.W_enc, sae.W_enc)


def test_without_an_average_the_weights_themselves_are_used():
    sae, optimizer = make(ema=0.0)
    give_gradients(sae, 1)
    advance(optimizer, 1)
    for key in KEYS:
        torch.testing.assert_close(getattr(optimizer.averaged(), key), getattr(sae, key))
    assert not any(key.startswith("average") for key in optimizer.tensors())


def test_before_the_first_step_the_average_is_the_start():
    sae, optimizer = make()
    assert torch.equal(optimizer.averaged().W_enc, sae.W_enc)


def test_the_averaged_sae_is_a_copy():
    sae, optimizer = make(ema=0.0)
    averaged = optimizer.averaged()
    with torch.no_grad():
        averaged.W_enc.zero_()
        averaged.metadata["x"] = 1
    assert sae.W_enc.abs().sum() > 0 and "x" not in sae.metadata


# ---- for checkpoints


def test_what_was_given_out_and_taken_back_goes_on_exactly():
    sae, optimizer = make(warmup=3)
    for step in range(1, 4):
        give_gradients(sae, step)
        advance(optimizer, step)
    saved = {key: value.clone() for key, value in optimizer.tensors().items()}
    other, fresh = make(warmup=3)
    with torch.no_grad():
        other.W_enc.zero_()
    fresh.restore(saved, optimizer.updates)
    for step in range(4, 7):
        for each, its_sae in ((optimizer, sae), (fresh, other)):
            give_gradients(its_sae, step)
            advance(each, step)
    assert all(
        torch.equal(value, fresh.tensors()[key]) for key, value in optimizer.tensors().items()
    )
    assert all(
        torch.equal(value, getattr(optimizer.averaged(), key))
        for key, value in fresh.averaged().state_dict().items()
    )
    assert len(saved) == 4 + 4 + 3 * 4


def test_adams_moments_are_float32_and_its_epsilon_the_papers():
    """T9: an epsilon of 6e-10 is nothing beside bfloat16 moments."""
    sae, optimizer = make()
    give_gradients(sae, 1)
    advance(optimizer, 1)
    assert {value.dtype for value in optimizer.tensors().values()} == {torch.float32}
    assert all(group["eps"] == 6.25e-10 for group in optimizer.adam.param_groups)


@pytest.mark.parametrize("total", [math.nan, math.inf])
def test_no_weight_moves_where_the_loss_is_not_finite_though_the_gradient_is(total):
    sae, optimizer = make()
    give_gradients(sae, 1)
    before, optimizer.total = (
        {key: value.clone() for key, value in optimizer.tensors().items()},
        torch.tensor(total),
    )
    assert math.isnan(optimizer.step(1)) and optimizer.updates == 0
    assert all(torch.equal(value, before[key]) for key, value in optimizer.tensors().items())
