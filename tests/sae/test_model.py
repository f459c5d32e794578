"""encode and decode are the equation, written densely; choosing has no gradient, values do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ksparse import kernels
from ksparse.errors import InputError
from ksparse.sae.activations import ACTIVATIONS
from ksparse.sae.model import SAE, Code, Shape
from ksparse.sae.normalization import KINDS


def make(d=6, n=20, k=4, normalize="none", seed=0, dtype=torch.float64, **shape):
    sae = SAE(Shape(d, n, k, normalize, **shape)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.normalize_decoder_()
    return sae


def batch(b=9, d=6, seed=1):
    return torch.randn(b, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_code(sae, x):
    """Write the definition with matrices: ReLU(TopK(W_enc (x - b_pre) + b_enc))."""
    pre = (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    kept = torch.zeros_like(pre).scatter_(1, pre.topk(sae.shape.k, dim=1).indices, 1.0)
    return torch.relu(pre * kept)


@given(
    d=st.integers(1, 9),
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    b=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_code_and_reconstruction_are_the_definition(d, n, k, b, seed):
    sae, x = make(d, n, min(k, n), seed=seed), batch(b, d, seed)
    code = sae.code(x, sae.pre_acts_normalized(x))
    expected = dense_code(sae, x)
    torch.testing.assert_close(code.dense(n), expected)
    torch.testing.assert_close(sae.decode_normalized(code), expected @ sae.W_dec + sae.b_pre)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_takes_raw_activations_and_gives_raw_reconstructions(kind):
    sae = make(normalize=kind, factor=0.3) if kind == "dataset" else make(normalize=kind)
    raw = 4 * batch() + 3
    inputs = sae.normalize(raw)
    torch.testing.assert_close(
        sae(raw), inputs.restore(dense_code(sae, inputs.x) @ sae.W_dec + sae.b_pre)
    )
    torch.testing.assert_close(sae.encode(raw).dense(20), dense_code(sae, inputs.x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_what_was_encoded_gives_the_reconstruction_of_raw_activations(kind, activation):
    sae = make(normalize=kind, factor=0.3 if kind == "dataset" else 1.0, activation=activation)
    raw = 40 * batch(12).reshape(3, 4, 6) + 3
    code = sae.encode(raw)
    torch.testing.assert_close(sae.decode(code), sae(raw), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        sae.pre_acts(raw),
        sae.pre_acts_normalized(sae.normalize(raw).x.flatten(0, 1)).view(3, 4, -1),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_code_is_decoded_on_the_scale_of_its_own_activations(kind):
    sae = make(normalize=kind)
    raw = 40 * batch() + 3
    code, inputs = sae.encode(raw), sae.normalize(raw)
    half = code._replace(values=code.values / 2)
    expected = inputs.restore(half.dense(20) @ sae.W_dec + sae.b_pre)
    torch.testing.assert_close(sae.decode(half), expected)
    torch.testing.assert_close(sae.decode(half.at(slice(2, 5))), expected[2:5])


@pytest.mark.parametrize("kind", KINDS)
def test_a_code_that_does_not_know_its_activations_is_never_decoded_on_a_guessed_scale(kind):
    sae = make(normalize=kind)
    raw = 40 * batch() + 3
    code = Code(*sae.encode(raw))
    if kind in ("none", "dataset"):
        torch.testing.assert_close(sae.decode(code), sae(raw))
        return
    with pytest.raises(
        InputError,
        match=f"does not say what was taken off its activations, and {kind} .*decode_normalized",
    ):
        sae.decode(code)
    cut = sae.encode(raw)
    with pytest.raises(
        InputError, match=r"of shape \[5, 4\], but it was made from activations \[9\]; .*code.at"
    ):
        sae.decode(cut._replace(values=cut.values[:5], indices=cut.indices[:5]))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
def test_any_leading_dims_are_kept(lead):
    sae, raw = make(), torch.randn(*lead, 6, dtype=torch.float64)
    code = sae.encode(raw)
    assert code.values.shape == code.indices.shape == (*lead, 4)
    assert sae(raw).shape == sae.decode_normalized(code).shape == raw.shape
    assert code.dense(20).shape == (*lead, 20)
    torch.testing.assert_close(sae(raw).reshape(-1, 6), sae(raw.reshape(-1, 6)))


def test_encode_gives_the_largest_values_first_and_none_below_0():
    values = make().encode(batch(50)).values
    assert (values >= 0).all() and (values.diff(dim=1) <= 0).all()


def test_l0_is_measured_and_not_k():
    """TopK and then ReLU: fewer than k pre-activations may be positive (T4)."""
    sae, x = make(k=10), batch(200)
    values = sae.code(x, sae.pre_acts_normalized(x)).values
    l0 = (values > 0).sum(1)
    expected = ((x - sae.b_pre) @ sae.W_enc.T + sae.b_enc > 0).sum(1).clamp_max(10)
    assert torch.equal(l0, expected) and l0.min() < 10 and values.shape[1] == 10


def test_decoder_is_free_of_bias_and_decode_adds_it_once():
    sae = make()
    nothing = Code(torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.long))
    assert torch.equal(sae.decoder(nothing), torch.zeros(3, 6, dtype=torch.float64))
    torch.testing.assert_close(sae.decode_normalized(nothing), sae.b_pre.detach().expand(3, 6))


def test_selected_zeros_get_no_gradient():
    """T2: with fewer positives than k, zeros are chosen; no gradient may pass through them."""
    sae, x = make(k=20), batch(30)  # every latent is chosen, half of them below zero
    sae.decode_normalized(sae.code(x, sae.pre_acts_normalized(x))).square().sum().backward()
    got = {key: value.grad.clone() for key, value in sae.named_parameters()}
    sae.zero_grad()
    (dense_code(sae, x) @ sae.W_dec + sae.b_pre).square().sum().backward()
    for key, value in sae.named_parameters():
        torch.testing.assert_close(got[key], value.grad, msg=lambda text, key=key: f"{key}: {text}")


def test_a_latent_that_never_fires_gets_no_gradient():
    sae, x = make(), batch()
    with torch.no_grad():
        sae.b_enc[3] = -1000
    sae.decode_normalized(sae.code(x, sae.pre_acts_normalized(x))).square().sum().backward()
    assert not sae.W_enc.grad[3].any() and not sae.b_enc.grad[3] and not sae.W_dec.grad[3].any()
    assert sae.W_enc.grad.abs().sum() > 0


def test_gradient_of_the_whole_model_is_that_of_the_dense_one():
    sae, raw = make(normalize="layer_norm"), batch(12)
    raw.requires_grad_()
    (sae(raw) - 1).square().sum().backward()
    got = [raw.grad.clone(), *(value.grad.clone() for value in sae.parameters())]
    raw.grad = None
    sae.zero_grad()
    inputs = sae.normalize(raw)
    (
        inputs.restore(dense_code(sae, inputs.x) @ sae.W_dec + sae.b_pre) - 1
    ).square().sum().backward()
    for ours, theirs in zip(got, [raw.grad, *(value.grad for value in sae.parameters())]):
        torch.testing.assert_close(ours, theirs)


def test_pre_acts_carry_no_gradient_since_only_the_choice_needs_them():
    assert not make().pre_acts_normalized(batch().requires_grad_()).requires_grad


def test_choosing_among_some_latents_takes_the_best_of_them():
    sae, x = make(), batch()
    among = torch.tensor([17, 2, 11, 5, 8])
    pre = sae.pre_acts_normalized(x)
    code = sae.code(x, pre, 3, among=among)
    assert set(code.indices.flatten().tolist()) <= set(among.tolist())
    torch.testing.assert_close(
        code.values.sort(1).values, torch.relu(pre[:, among]).topk(3, dim=1).values.sort(1).values
    )


@pytest.mark.parametrize("many", [0, 1, 2])
def test_fewer_latents_to_choose_among_than_k_is_fine(many):
    sae, x = make(), batch()
    code = sae.code(x, sae.pre_acts_normalized(x), 4, among=torch.arange(many))
    assert code.indices.shape == (9, many) and sae.decoder(code).shape == (9, 6)


def test_the_reference_kernels_give_the_same_model():
    sae, raw = make(), batch()
    with kernels.using("reference"):
        expected = sae(raw)
    torch.testing.assert_close(sae(raw), expected)


@pytest.mark.parametrize(
    "raw", [torch.zeros(3, 7), torch.zeros(2, 3, 5)], ids=["wider", "narrower"]
)
def test_another_d_model_is_refused(raw):
    with pytest.raises(
        InputError,
        match=rf"this SAE is for activations of width d_model = 6, got {raw.shape[-1]} \(shape .*\); is it the right model and site",
    ):
        make().encode(raw)


@pytest.mark.parametrize(
    "raw, got",
    [
        ([1.0] * 6, "list"),
        (torch.tensor(1.0), r"torch.float32 \[\]"),
        (torch.ones(2, 6, dtype=torch.complex64), r"torch.complex64 \[2, 6\]"),
    ],
)
def test_what_is_no_activations_is_refused(raw, got):
    with pytest.raises(InputError, match=rf"a tensor of real numbers \[..., 6\], got {got}"):
        make()(raw)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda code: (code.values, code.indices), "got tuple; give what `encode` returned"),
        (lambda code: code[:], "got tuple"),
        (lambda code: code.dense(20), "got Tensor"),
        (lambda code: code._replace(indices=code.indices + 20), "this SAE has latents 0 to 19"),
        (lambda code: code._replace(indices=code.indices - 20), "this SAE has latents 0 to 19"),
        (lambda code: code._replace(indices=code.indices.double()), "latents that do not exist"),
    ],
)
def test_what_is_no_code_of_the_sae_is_not_decoded(change, message):
    sae = make()
    with pytest.raises(InputError, match=message):
        sae.decode(change(sae.encode(batch())))


def test_a_code_is_decoded_in_the_precision_that_the_sae_has_by_then():
    sae = make(normalize="unit_norm")
    code, expected = sae.encode(batch()), sae(batch())
    torch.testing.assert_close(sae.float().decode(code).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_no_activations_have_no_code_and_no_reconstruction(activation, lead):
    sae, raw = make(activation=activation), torch.zeros(*lead, 6)
    assert sae(raw).shape == sae.decode(sae.encode(raw)).shape == raw.shape


def test_activations_of_any_type_are_taken():
    sae = make(dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert sae(batch().to(dtype)).dtype == torch.float32


@pytest.mark.parametrize(
    "shape, message",
    [
        ((4, 8, 9), "k is 9, more than the 8 latents; give a smaller k"),
        ((4, 8, 0), "k of an SAE is 0; it must be a whole number"),
        ((0, 8, 1), "d_model of an SAE is 0"),
        ((4, -8, 1), "n_latents of an SAE is -8"),
        ((4, 8, 2.0), "k of an SAE is 2.0"),
        (
            (4, 8, 2, "unit"),
            "normalisation 'unit' is unknown; there are unit_norm, layer_norm, dataset, none",
        ),
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_is_refused(shape, message):
    with pytest.raises(InputError, match=message):
        Shape(*shape)


def test_decoder_rows_get_norm_1_and_a_zero_row_stays_zero():
    sae = make()
    with torch.no_grad():
        sae.W_dec.mul_(7)[3] = 0
    sae.normalize_decoder_()
    norms = sae.W_dec.detach().norm(dim=1)
    assert norms[3] == 0
    torch.testing.assert_close(norms[norms > 0], torch.ones(19, dtype=torch.float64))


def test_parameters_have_the_latents_first():
    assert {key: tuple(value.shape) for key, value in make().named_parameters()} == {
        "W_enc": (20, 6),
        "b_enc": (20,),
        "W_dec": (20, 6),
        "b_pre": (6,),
    }


def test_metadata_of_two_saes_is_not_shared():
    metadata = {"a": 1}
    first, second = SAE(Shape(2, 2, 1), metadata), SAE(Shape(2, 2, 1), metadata)
    first.metadata["a"] = 2
    assert second.metadata == metadata == {"a": 1}
