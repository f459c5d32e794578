"""Each activation against its definition, in float64 and plain torch; and what else of them has been got wrong elsewhere (T numbers)."""

import dataclasses

import pytest
import torch
from torch import Tensor

from ksparse import config as R
from ksparse.errors import InputError
from ksparse.sae import serialization
from ksparse.sae.activations import base, jump_relu
from ksparse.sae.activations.base import list_columns
from ksparse.sae.init import initialize_
from ksparse.sae.joint import largest_mask
from ksparse.sae.losses import LossInputs, losses
from ksparse.sae.model import SAE, Code, Shape

B, D, N, K = 24, 6, 40, 5
EVERY = {
    "batch_topk": R.BatchTopKConfig(),
    "relu": R.ReLUConfig(),
    "relu, decoder norm": R.ReLUConfig(penalty="decoder_norm"),
    "jump_relu, target": R.JumpReLUConfig(bandwidth=0.4),
    "jump_relu, l0": R.JumpReLUConfig(bandwidth=0.4, penalty="l0"),
    "gated": R.GatedConfig(),
    "prolu, ste": R.ProLUConfig(),
    "prolu, relu": R.ProLUConfig(gradient="relu"),
}
PATHS = {"dense": 10**9, "listed": 1}


def some(
    activation: R.ActivationConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    n: int = N,
    d: int = D,
    k: int = K,
) -> tuple[SAE, Tensor, R.SAEConfig]:
    """Return an SAE with random weights, inputs of norm 1, and its options."""
    torch.manual_seed(seed)
    by_norm = getattr(activation, "penalty", "") == "decoder_norm"
    options = R.SAEConfig(n_latents=n, k=k, activation=activation, unit_norm=not by_norm)
    sae = SAE(Shape(d, n, k, "unit_norm", 1.0, activation.kind)).to(dtype)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.normal_().mul_(0.3)
        if "threshold" in sae.state_dict():
            sae.threshold.abs_().add_(0.05)
        if not by_norm:
            sae.normalize_decoder_()
    return sae, torch.nn.functional.normalize(torch.randn(B, d, dtype=dtype), dim=1), options


def definition(
    sae: SAE, x: Tensor, options: R.SAEConfig, baseline: float, dead: Tensor, k_aux: int
) -> tuple[Tensor, Tensor]:
    """Return (loss, values[b, n]) as the papers write them, densely; where a gradient is made up, by a surrogate whose derivative it is."""
    activation, b = options.activation, len(x)
    p = (x - sae.b_pre) @ sae.W_enc.T
    a = p + sae.b_enc
    cost: Tensor | float = 0.0
    match activation:
        case R.BatchTopKConfig():
            least = a.detach().flatten().sort(descending=True).values[b * K - 1]
            z = torch.relu(a) * (a.detach() >= least)
        case R.ReLUConfig():
            z = torch.relu(a)
            weights = sae.W_dec.norm(dim=1) if activation.penalty == "decoder_norm" else 1.0
            cost = activation.l1 * ((z * weights).sum(1) / x.norm(dim=1)).mean()
        case R.JumpReLUConfig():
            width, hit = activation.bandwidth, (a.detach() > sae.threshold.detach()).double()
            ramp = ((a.detach() - sae.threshold) / width + 0.5).clamp(
                0, 1
            )  # its slope in the threshold is -K((a - threshold) / width) / width
            z = a * hit + sae.threshold.detach() * (ramp - ramp.detach())
            l0 = (hit + ramp - ramp.detach()).sum(1).mean() / K
            cost = activation.coef * ((l0 - 1) ** 2 if activation.penalty == "target" else l0)
        case R.GatedConfig():
            z = (a > 0).double() * torch.relu(sae.r_mag.exp() * p + sae.b_mag)
            frozen = torch.relu(a) @ sae.W_dec.detach() + sae.b_pre.detach()
            cost = (
                activation.l1 * (torch.relu(a).sum(1) / x.norm(dim=1)).mean()
                + activation.aux * (frozen - x).square().mean() / baseline
            )
        case R.ProLUConfig():
            hit = ((a > 0) & (p > 0)).double().detach()
            if activation.gradient == "ste":  # the step in a has the slope of ReLU
                z = torch.relu(p) * (hit + (torch.relu(a) - torch.relu(a).detach()))
            else:
                z = (p * hit).detach() + hit * (a - a.detach())
            cost = activation.l1 * (z.sum(1) / x.norm(dim=1)).mean()
    recon = z @ sae.W_dec + sae.b_pre
    loss = (recon - x).square().mean() / baseline + cost
    if activation.REVIVAL == "auxk" and len(dead):
        error = (x - recon).detach()
        masked = torch.full_like(a, -torch.inf).index_copy(1, dead, a[:, dead])
        kept = torch.relu(
            torch.where(
                masked >= masked.sort(1, descending=True).values[:, k_aux - 1 : k_aux], masked, 0.0
            )
        )
        spread = (error - error.mean(0)).square().mean()
        loss = loss + options.auxk_coef * (kept @ sae.W_dec - error).square().mean() / spread
    return loss, z


@pytest.mark.parametrize("dead", [[], [1, 4, 7, 11, 30]], ids=["alive", "dead"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", EVERY)
def test_loss_values_and_gradients_are_those_of_the_definition(name, path, dead, monkeypatch):
    """Every output that a loss uses, every tensor: T1, T2, and a loss that is computed and never differentiated."""
    monkeypatch.setattr(base, "SPARSE_RATIO", 10**9 if path == "dense" else 1)
    sae, x, options = some(EVERY[name])
    dead = torch.tensor(dead, dtype=torch.long)
    expected, z = definition(sae, x, options, 0.1, dead, 3)
    wanted = torch.autograd.grad(expected, list(sae.parameters()), allow_unused=True)
    found = losses(sae, x, LossInputs(baseline=0.1, dead=dead, k_aux=3, options=options))
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.code.dense(N), z)
    gradients = torch.autograd.grad(found.total, list(sae.parameters()), allow_unused=True)
    for (key, _), gradient, want in zip(sae.named_parameters(), gradients, wanted):
        assert want.abs().max() > 1e-6, f"{key} has no gradient to compare"
        torch.testing.assert_close(gradient, want, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["relu", "relu, decoder norm", "gated"])
def test_gradients_of_relu_and_gated_are_derivatives(name, monkeypatch):
    monkeypatch.setattr(base, "SPARSE_RATIO", 1)
    sae, x, options = some(
        dataclasses.replace(EVERY[name], **({"aux": 0.0} if name == "gated" else {})), n=8, d=4, k=2
    )
    keys = [key for key, _ in sae.named_parameters()]

    def loss(*weights):
        with torch.no_grad():
            for key, weight in zip(keys, weights):
                getattr(sae, key).copy_(weight)
        return losses(
            sae,
            x[:6, :4],
            LossInputs(
                baseline=0.1, dead=torch.zeros(0, dtype=torch.long), k_aux=1, options=options
            ),
        ).total

    start = [getattr(sae, key).detach().clone() for key in keys]
    whole = torch.autograd.grad(loss(*start), [getattr(sae, key) for key in keys])
    for number, key in enumerate(keys):
        direction = torch.randn_like(start[number])
        up, down = (
            [
                weight + sign * 1e-6 * direction if i == number else weight
                for i, weight in enumerate(start)
            ]
            for sign in (1, -1)
        )
        slope = (loss(*up) - loss(*down)).item() / 2e-6
        assert slope == pytest.approx(
            (whole[number] * direction).sum().item(), rel=1e-4, abs=1e-8
        ), key


def test_gated_takes_no_gradient_to_the_decoder_from_its_auxiliary_loss():
    sae, x, options = some(R.GatedConfig())
    without = dataclasses.replace(options, activation=R.GatedConfig(aux=0.0))
    with_, other = (
        torch.autograd.grad(
            losses(
                sae,
                x,
                LossInputs(
                    baseline=0.1, dead=torch.zeros(0, dtype=torch.long), k_aux=1, options=each
                ),
            ).total,
            [sae.W_dec, sae.b_pre, sae.b_enc],
        )
        for each in (options, without)
    )
    torch.testing.assert_close(with_[0], other[0])
    assert not torch.allclose(with_[1], other[1]), "b_pre is in the gates' pre-activations too"
    assert not torch.allclose(with_[2], other[2])


def test_the_gradient_of_a_threshold_is_that_of_the_expected_loss():
    """JumpReLU's kernel estimate, averaged over many inputs, is the slope of E[(z - t)^2 + c H(a - threshold)] (Rajamanoharan et al. 2024b)."""
    a = torch.randn(4_000_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    threshold, target, price = (
        torch.tensor([0.7], dtype=torch.float64, requires_grad=True),
        0.4 * a.square(),
        0.3,
    )
    loss = (
        jump_relu._Jump.apply(a, threshold, 0.05) - target
    ).square().mean() + price * jump_relu._Step.apply(a, threshold, 0.05).mean()
    found = torch.autograd.grad(loss, threshold)[0].item()
    at = 0.7
    density = torch.exp(torch.tensor(-(at**2) / 2)).item() / (2 * torch.pi) ** 0.5
    exact = -density * (
        (at - 0.4 * at**2) ** 2 - (0.4 * at**2) ** 2 + price
    )  # what is lost at the border, times how much is there
    assert found == pytest.approx(exact, rel=0.02)


# ---- BatchTopK


@pytest.mark.parametrize("guess", [0.0, 0.3, 1e9])
def test_batch_topk_keeps_k_times_b_values_whatever_is_guessed(guess):
    sae, x, options = some(R.BatchTopKConfig())
    sae.threshold.fill_(guess)
    code = losses(
        sae,
        x,
        LossInputs(baseline=0.1, dead=torch.zeros(0, dtype=torch.long), k_aux=1, options=options),
    ).code
    counts = (code.values > 0).sum(1)
    assert counts.sum() == B * K and len(counts.unique()) > 1


def test_the_largest_of_a_batch_are_exact_with_ties_and_where_few_are_positive():
    ties = torch.tensor([[1.0, 1.0, -1.0], [1.0, 0.5, 0.0]])
    assert (
        largest_mask(ties, 2).sum() == 2
        and not largest_mask(ties, 2)[:, 2].any()
        and not largest_mask(ties, 2)[1, 1]
    )
    assert largest_mask(ties, 6).tolist() == [[True, True, False], [True, True, False]], (
        "what is not above 0 is not kept"
    )
    assert largest_mask(-ties.abs(), 3).sum() == 0


@pytest.mark.parametrize("kind", [name for name in EVERY if name != "relu, decoder norm"])
def test_in_use_no_code_depends_on_the_rest_of_the_batch(kind):
    """T31."""
    sae, x, _ = some(EVERY[kind])
    together = sae.encode(x).dense(N)
    for i in range(B):
        torch.testing.assert_close(sae.encode(x[i : i + 1]).dense(N)[0], together[i])
    assert (together > 0).any() and (together >= 0).all()


# ---- codes


@pytest.mark.parametrize("name", EVERY)
def test_codes_in_use_are_the_values_of_the_definition(name):
    sae, x, options = some(EVERY[name])
    code = sae.encode(x)
    z = definition(sae, sae.normalize(x).x, options, 0.1, torch.zeros(0, dtype=torch.long), 1)[
        1
    ].detach()
    if options.activation.kind == "batch_topk":
        a = (sae.normalize(x).x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
        z = torch.where(a > sae.threshold, a, 0.0)
    torch.testing.assert_close(code.dense(N), z)
    torch.testing.assert_close(sae.decode_normalized(code), z @ sae.W_dec + sae.b_pre)
    assert code.values.shape[1] == (z > 0).sum(1).max() and (code.values.diff(dim=1) <= 0).all()


def test_a_code_of_nothing_is_a_code():
    sae, x, _ = some(R.ReLUConfig())
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    code = sae.encode(x)
    assert code.values.shape == (B, 1) and not code.values.any()
    torch.testing.assert_close(sae.decode_normalized(code), sae.b_pre.expand(B, D))
    assert sae.encode(x.view(4, 6, D)).values.shape == (4, 6, 1)


def test_codes_of_several_widths_are_joined_without_new_activations():
    narrow = Code(torch.tensor([[1.0]]), torch.tensor([[3]]))
    wide = Code(torch.tensor([[2.0, 1.0, 0.5]]), torch.tensor([[1, 2, 0]]))
    joined = Code.concat([narrow, wide])
    assert joined.values.shape == (2, 3)
    torch.testing.assert_close(joined.dense(4), torch.cat([narrow.dense(4), wide.dense(4)]))


def test_listing_is_of_each_true_column_once():
    mask = torch.rand(9, 13, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[4] = False
    indices, real = list_columns(mask)
    back = torch.zeros(9, 13).scatter_add(1, indices, real.float())
    assert torch.equal(back, mask.float()) and indices.shape[1] == mask.sum(1).max()


# ---- the penalty


def test_the_penalty_by_decoder_norm_does_not_see_a_change_of_scale_and_the_papers_does():
    sae, x, options = some(R.ReLUConfig(l1=1.0, penalty="decoder_norm"))
    paper = dataclasses.replace(options, activation=R.ReLUConfig(l1=1.0), unit_norm=True)

    def both():
        return [
            losses(
                sae,
                x,
                LossInputs(
                    baseline=0.1, dead=torch.zeros(0, dtype=torch.long), k_aux=1, options=each
                ),
            ).total.item()
            for each in (options, paper)
        ]

    before = both()
    with torch.no_grad():
        sae.W_enc.div_(3.0), sae.b_enc.div_(3.0), sae.W_dec.mul_(3.0)
    after = both()
    assert after[0] == pytest.approx(before[0]) and after[1] < before[1] - 0.01


@pytest.mark.parametrize("name", ["relu", "gated", "prolu, ste", "jump_relu, l0"])
def test_a_weaker_penalty_is_that_share_of_it(name):
    sae, x, options = some(
        dataclasses.replace(EVERY[name], **({"aux": 0.0} if name == "gated" else {}))
    )
    none, half, full = (
        losses(
            sae,
            x,
            LossInputs(
                baseline=0.1,
                dead=torch.zeros(0, dtype=torch.long),
                k_aux=1,
                options=options,
                penalty_share=strength,
            ),
        ).total.item()
        for strength in (0.0, 0.5, 1.0)
    )
    assert full > none and half == pytest.approx((none + full) / 2)


# ---- beginning, and on disk


@pytest.mark.parametrize("name", ["relu", "gated", "prolu, ste"])
def test_reconstructions_begin_with_the_norm_of_their_inputs(name):
    sae, x, options = some(EVERY[name], dtype=torch.float32, n=256, d=32)
    initialize_(
        sae,
        torch.nn.functional.normalize(torch.randn(2048, 32), dim=1),
        options,
        torch.Generator().manual_seed(0),
    )
    x = torch.nn.functional.normalize(torch.randn(512, 32), dim=1)
    recon = sae.decoder(sae.activate(x))
    assert recon.norm(dim=1).mean().item() == pytest.approx(1.0, rel=0.05)
    assert torch.nn.functional.cosine_similarity(recon, x - sae.b_pre).mean() > 0.85, (
        "half of the latents of a tied SAE add up to its input"
    )


@pytest.mark.parametrize(
    "activation", [R.BatchTopKConfig(), R.JumpReLUConfig()], ids=lambda activation: activation.kind
)
def test_thresholds_begin_where_k_latents_are_active(activation):
    sae, _, options = some(activation, dtype=torch.float32, n=256, d=32)
    sample = torch.nn.functional.normalize(torch.randn(4096, 32), dim=1)
    initialize_(sae, sample, options, torch.Generator().manual_seed(0))
    fresh = torch.nn.functional.normalize(torch.randn(4096, 32), dim=1)
    assert (sae.activate(fresh).values > 0).sum(1).float().mean().item() == pytest.approx(
        K, rel=0.1
    )


def test_a_given_threshold_is_in_the_unit_of_the_input():
    for normalize, expected in (("unit_norm", 0.01), ("layer_norm", 0.01 * 32**0.5)):
        sae = SAE(Shape(32, 64, 4, normalize, 1.0, "jump_relu"))
        initialize_(
            sae,
            torch.randn(64, 32),
            R.SAEConfig(n_latents=64, k=4, activation=R.JumpReLUConfig(threshold=0.01)),
            torch.Generator().manual_seed(0),
        )
        torch.testing.assert_close(sae.threshold.detach(), torch.full((64,), expected))
        narrow = sae.activation.configured(R.JumpReLUConfig(bandwidth=0.001))
        assert narrow.window(sae) == pytest.approx(0.1 * expected)
        # By default 0.4 / sqrt(k) of the norm.
        assert sae.activation.window(sae) == pytest.approx(20 * expected)


@pytest.mark.parametrize("name", EVERY)
def test_an_autoencoder_comes_back_from_disk_with_all_its_tensors(name, tmp_path):
    """T15, T31: thresholds are part of the file."""
    sae, x, _ = some(EVERY[name], dtype=torch.float32)
    serialization.save(sae, tmp_path / "sae")
    back = serialization.load(tmp_path / "sae")
    assert (
        back.shape == sae.shape
        and list(back.state_dict()) == list(sae.state_dict())
        and set(sae.state_dict()) > {"W_enc", "b_enc", "W_dec"}
    )
    assert all(torch.equal(getattr(back, key), value) for key, value in sae.state_dict().items())
    for one, other in zip(back.encode(x), sae.encode(x)):
        assert torch.equal(one, other)


OWN_TENSORS = {
    "topk": [],
    "batch_topk": ["threshold"],
    "relu": [],
    "jump_relu": ["threshold"],
    "gated": ["r_mag", "b_mag"],
    "prolu": [],
}


@pytest.mark.parametrize("kind", OWN_TENSORS)
def test_an_activations_tensors_are_listed_beside_the_others_under_the_names_in_files(kind):
    sae = SAE(Shape(D, N, K, activation=kind))
    names = ["W_enc", "b_enc", "W_dec", "b_pre", *OWN_TENSORS[kind]]
    assert list(sae.state_dict()) == names
    listed = dict(sae.named_parameters()) | dict(sae.named_buffers())
    assert list(listed) == names
    for name, tensor in listed.items():
        assert getattr(sae, name) is tensor
        assert tensor.data_ptr() == sae.state_dict()[name].data_ptr()
    assert set(sae.activation.followed) == set(dict(sae.named_buffers()))
    with pytest.raises(AttributeError):
        _ = sae.no_such_tensor


@pytest.mark.parametrize("kind", OWN_TENSORS)
def test_a_state_dict_loads_by_file_names_alone_and_as_a_part_of_a_larger_module(kind):
    sae, again = (SAE(Shape(D, N, K, activation=kind)) for _ in range(2))
    with torch.no_grad():
        for tensor in sae.state_dict().values():
            tensor.normal_()
    weights = sae.state_dict()
    again.load_state_dict(weights)
    assert list(weights) == list(sae.state_dict()), "the caller's dictionary is left as it was"
    inner, outer = torch.nn.ModuleDict({"sae": sae}), torch.nn.ModuleDict({"sae": SAE(sae.shape)})
    assert list(inner.state_dict()) == [f"sae.{name}" for name in weights]
    outer.load_state_dict(inner.state_dict())
    for loaded in (again, outer["sae"]):
        assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())
    for missing in OWN_TENSORS[kind]:
        with pytest.raises(RuntimeError, match=missing):
            again.load_state_dict({k: value for k, value in weights.items() if k != missing})


def test_options_of_a_recipe_share_the_tensors_and_leave_the_activation_as_it_was():
    sae = SAE(Shape(D, N, K, activation="gated"))
    trained = sae.activation.configured(R.GatedConfig(l1=1.0))
    assert trained.options.l1 == 1.0 and sae.activation.options == R.GatedConfig()
    sae.double()
    assert trained.r_mag is sae.r_mag and trained.r_mag.dtype == torch.float64
    with pytest.raises(ValueError, match="'relu' for an SAE with 'gated'"):
        sae.activation.configured(R.ReLUConfig())


@pytest.mark.parametrize("name", ["topk", *EVERY])
def test_the_loss_is_the_weighted_sum_of_its_named_terms(name):
    sae, x, options = some(R.TopKConfig() if name == "topk" else EVERY[name])
    found = losses(
        sae,
        x,
        LossInputs(
            options, 0.1, torch.tensor([1, 4, 7]), k_aux=2, auxk_weight=0.5, penalty_share=0.25
        ),
    )
    kind = options.activation.kind
    weights = {"nmse": 1.0}
    if kind in ("relu", "prolu", "jump_relu", "gated"):
        weights |= {"penalty": 0.25}
    if kind == "gated":
        weights |= {"gate_error": options.activation.aux}
    if options.uses_auxk:
        weights |= {"auxk": options.auxk_coef}
    assert list(found.terms) == list(weights)
    expected = sum(weight * found.terms[term] for term, weight in weights.items())
    torch.testing.assert_close(found.total, expected)
    assert (found.auxk == 0) == (not options.uses_auxk)


def test_a_file_without_an_activation_is_of_topk(tmp_path):
    from ksparse.storage import jsonio

    sae = SAE(Shape(D, N, K))
    serialization.save(sae, tmp_path / "sae")
    config = jsonio.read_json(tmp_path / "sae" / "sae.json")
    assert config.pop("activation") == "topk"
    (tmp_path / "sae" / "manifest.json").unlink()
    jsonio.write_json(tmp_path / "sae" / "sae.json", config)
    assert serialization.load(tmp_path / "sae").shape.activation == "topk"


def test_an_unknown_activation_lists_those_there_are():
    with pytest.raises(
        InputError, match="activation 'relo' is unknown; there are topk, batch_topk, relu"
    ):
        Shape(D, N, K, activation="relo")


def test_a_file_that_lacks_a_threshold_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    from ksparse.errors import CorruptError

    sae, _, _ = some(R.JumpReLUConfig(), dtype=torch.float32)
    serialization.save(sae, tmp_path / "sae")
    (tmp_path / "sae" / "manifest.json").unlink()
    tensors = load_file(tmp_path / "sae" / "sae.safetensors")
    del tensors["threshold"]
    save_file(tensors, tmp_path / "sae" / "sae.safetensors")
    with pytest.raises(CorruptError, match="lacks the tensor 'threshold'"):
        serialization.load(tmp_path / "sae")
