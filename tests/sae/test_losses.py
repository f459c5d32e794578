"""The losses are those of the paper, and no bug of section 4 of the peers is here."""

import pytest
import torch

from ksparse.config import SAEConfig as Options
from ksparse.sae.joint import Joint
from ksparse.sae.losses import LossInputs, finite_or_zero, losses, relative_error
from ksparse.sae.model import SAE, Shape

N, D, K = 24, 7, 3
DEAD = torch.tensor([4, 9, 15, 20, 23])


def make(seed=0):
    sae = SAE(Shape(D, N, K, "none")).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.b_enc[DEAD] -= 5  # they are rarely among the K largest, and often still positive
        sae.W_enc[DEAD] *= 2
        sae.normalize_decoder_()
    return sae


def batch(b=40, seed=1):
    return (
        torch.randn(b, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    )


def run(sae, x, *, dead=DEAD, k_aux=3, baseline=2.0, **options):
    return losses(
        sae,
        x,
        LossInputs(
            baseline=baseline,
            dead=dead,
            k_aux=k_aux,
            options=Options(**{"n_latents": N, "k": K, **options}),
        ),
    )


def dense(sae, x, k, among=None, *, b_pre=None):
    """Write the code with autograd and matrices."""
    pre = (x - (sae.b_pre if b_pre is None else b_pre)) @ sae.W_enc.T + sae.b_enc
    allowed = torch.zeros(N, dtype=torch.bool).index_fill_(
        0, torch.arange(N) if among is None else among, True
    )
    k = min(k, int(allowed.sum()))
    chosen = pre.masked_fill(~allowed, -torch.inf).topk(k, dim=1).indices
    return torch.relu(pre * torch.zeros_like(pre).scatter_(1, chosen, 1.0))


def expected_aux(sae, x, norm, k_aux=3, dead=DEAD):
    error = (x - dense(sae, x, K) @ sae.W_dec - sae.b_pre).detach()
    predicted = (
        dense(sae, x, k_aux, dead) @ sae.W_dec
    )  # no bias: it is in the reconstruction already
    square = (predicted - error).square()
    if norm == "token":
        return (square.sum(1) / error.square().sum(1)).mean()
    return square.mean() / (error - error.mean(0)).square().mean()


def gradients(sae, loss):
    sae.zero_grad()
    loss.backward()
    return {
        key: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for key, value in sae.named_parameters()
    }


def same(got, expected):
    for key in expected:
        torch.testing.assert_close(
            got[key], expected[key], msg=lambda text, key=key: f"gradient of {key}: {text}"
        )


def test_nmse_is_the_mean_squared_error_over_one_fixed_baseline():
    """T19: the divisor does not depend on the batch."""
    sae, x = make(), batch()
    recon = dense(sae, x, K) @ sae.W_dec + sae.b_pre
    torch.testing.assert_close(run(sae, x, baseline=2.0).nmse, (recon - x).square().mean() / 2)
    halves = [run(sae, half, auxk_coef=0.0).nmse for half in x.split(20)]
    torch.testing.assert_close(sum(halves) / 2, run(sae, x).nmse)


@pytest.mark.parametrize("norm", ["token", "batch"])
@pytest.mark.parametrize("k_aux", [1, 3, 5, 50], ids=lambda k: f"k_aux_{k}")
def test_auxk_is_its_definition_and_so_is_its_gradient(norm, k_aux):
    """All of 4.1: dead latents only, ReLU, the error detached, no bias, divided by the error's own size."""
    sae, x = make(), batch()
    got = run(sae, x, auxk_norm=norm, k_aux=k_aux, auxk_coef=0.5)
    expected = expected_aux(sae, x, norm, k_aux)
    torch.testing.assert_close(got.auxk, expected)
    torch.testing.assert_close(got.total, got.nmse + 0.5 * expected)
    ours = gradients(sae, got.total)
    main = (dense(sae, x, K) @ sae.W_dec + sae.b_pre - x).square().mean() / 2
    same(ours, gradients(sae, main + 0.5 * expected_aux(sae, x, norm, k_aux)))


@pytest.mark.parametrize("norm", ["token", "batch"])
@pytest.mark.parametrize("tokens", [2, 11, 40])
def test_auxk_on_a_share_of_the_tokens_is_the_mean_over_the_first_of_them(norm, tokens):
    sae, x = make(), batch()
    got = losses(
        sae,
        x,
        LossInputs(
            baseline=2.0,
            dead=DEAD,
            k_aux=3,
            options=Options(n_latents=N, k=K, auxk_norm=norm),
            auxk_tokens=tokens,
        ),
    )
    torch.testing.assert_close(got.auxk, expected_aux(sae, x[:tokens], norm))
    same(gradients(sae, got.auxk), gradients(sae, expected_aux(sae, x[:tokens], norm)))
    torch.testing.assert_close(got.nmse, run(sae, x).nmse)


def test_auxk_reaches_the_encoder_of_dead_latents():
    """T1: a fused encoder that forgets the gradient of what AuxK reads leaves this at zero."""
    sae = make()
    grads = gradients(sae, run(sae, batch(), auxk_coef=1.0).auxk)
    assert grads["W_enc"][DEAD].abs().sum() > 0.01 and grads["b_enc"][DEAD].abs().sum() > 0.01
    assert grads["W_dec"][DEAD].abs().sum() > 0.01


def test_auxk_moves_only_dead_latents():
    """The error is detached: the main path is not pulled towards errors that are easy to predict."""
    sae = make()
    grads = gradients(sae, run(sae, batch()).auxk)
    alive = torch.ones(N, dtype=torch.bool).index_fill_(0, DEAD, False)
    assert not any(grads[key][alive].any() for key in ("W_enc", "b_enc", "W_dec"))


def test_auxk_does_not_count_the_bias_twice():
    """With decode() in place of decoder(), the prediction of the error would hold b_pre."""
    sae, x = make(), batch()
    with torch.no_grad():
        sae.W_enc[DEAD], sae.b_enc[DEAD] = (
            0,
            -1,
        )  # dead latents say nothing, so that the error is predicted as 0
    assert run(sae, x).auxk.item() == pytest.approx(1.0)


def test_auxk_gives_b_pre_no_gradient_but_through_the_dead_latents_encoder():
    """The official code adds a live pre_bias to AuxK's reconstruction, whose target has it detached."""
    sae, x = make(), batch()
    grads = gradients(sae, run(sae, x).auxk)
    code = dense(sae, x, 3, DEAD)
    error = (x - dense(sae, x, K) @ sae.W_dec - sae.b_pre).detach()
    wanted = 2 * (code @ sae.W_dec - error) / error.square().sum(1, keepdim=True) / len(x)
    through_encoder = -((wanted @ sae.W_dec.T) * (code > 0)).sum(0) @ sae.W_enc
    torch.testing.assert_close(grads["b_pre"], through_encoder.detach())
    with torch.no_grad():
        sae.W_enc[DEAD], sae.b_enc[DEAD] = 0, 1  # constant latents: b_pre is not in them
    assert not gradients(sae, run(sae, x).auxk)["b_pre"].any()


@pytest.mark.parametrize("dead", [[], [4]], ids=["none_dead", "fewer_dead_than_k_aux"])
@pytest.mark.parametrize("norm", ["token", "batch"])
def test_few_dead_latents_or_none_need_no_special_case(dead, norm):
    sae, x = make(), batch()
    dead = torch.tensor(dead, dtype=torch.long)
    got = run(sae, x, dead=dead, auxk_norm=norm)
    torch.testing.assert_close(
        got.auxk,
        expected_aux(sae, x, norm, 3, dead) if len(dead) else torch.zeros((), dtype=torch.float64),
    )
    assert all(torch.isfinite(grad).all() for grad in gradients(sae, got.total).values())
    if not len(dead):
        torch.testing.assert_close(got.total, got.nmse)


def test_auxk_may_be_turned_off():
    got = run(make(), batch(), auxk_coef=0.0)
    assert got.auxk == 0 and torch.equal(got.total, got.nmse)


def test_auxk_that_is_not_finite_counts_as_a_constant_0():
    """Its value and its gradient: nan_to_num on the value alone leaves 0/0 in the backward pass."""
    sae, x = make(), batch()
    with torch.no_grad():
        sae.b_enc += 50  # the main loss never takes a dead latent
        sae.b_enc[DEAD] -= 50
        sae.W_dec[DEAD] = 1e300
    got = run(sae, x, auxk_coef=1.0)
    assert got.auxk == 0
    assert all(torch.isfinite(grad).all() for grad in gradients(sae, got.total).values())
    for bad in (torch.nan, torch.inf, -torch.inf):
        loss = finite_or_zero(torch.tensor(bad, requires_grad=True))
        assert loss == 0 and not loss.requires_grad
    kept = torch.tensor(2.0, requires_grad=True)
    assert finite_or_zero(kept) is kept


@pytest.mark.parametrize("by_batch", [False, True])
def test_auxk_of_a_perfect_reconstruction_stays_finite(by_batch):
    zero = torch.zeros(4, 3, dtype=torch.float64)
    one_perfect = torch.cat([zero[:1], torch.ones(3, 3, dtype=torch.float64)])

    def error_of(rows):
        return relative_error(zero, rows, Joint().spread(rows, 4) if by_batch else None)

    assert error_of(zero) == 0
    assert torch.isfinite(error_of(one_perfect))


def test_multi_topk_does_not_alter_the_code_that_is_returned():
    """T6: the pass with 4k must not be what is returned, counted and evaluated."""
    sae, x = make(), batch()
    plain, multi = run(sae, x), run(sae, x, multi_topk=0.125)
    assert multi.code.values.shape[1] == K
    assert torch.equal(plain.code.indices, multi.code.indices) and torch.equal(
        plain.code.values, multi.code.values
    )
    assert torch.equal(plain.nmse, multi.nmse) and torch.equal(plain.auxk, multi.auxk)


def test_multi_topk_adds_the_loss_at_4k_with_its_gradient():
    sae, x = make(), batch()
    got = run(sae, x, multi_topk=0.125, auxk_coef=0.0)

    def mse(k):
        return (dense(sae, x, k) @ sae.W_dec + sae.b_pre - x).square().mean() / 2

    torch.testing.assert_close(got.total, mse(K) + 0.125 * mse(4 * K))
    same(gradients(sae, got.total), gradients(sae, mse(K) + 0.125 * mse(4 * K)))


def test_losses_leave_the_autoencoder_as_it_was():
    """T32: asking for a loss has no side effect."""
    sae, x = make(), batch()
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    first, second = run(sae, x), run(sae, x)
    assert torch.equal(first.total, second.total)
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())
