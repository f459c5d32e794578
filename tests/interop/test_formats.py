"""What is written and read again is the same SAE, or an error names what the format cannot hold."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ksparse
from ksparse import interop
from ksparse.errors import CorruptError, InputError
from ksparse.interop import compatibility, foreign, hook_names
from ksparse.sae.activations import ACTIVATIONS
from ksparse.sae.normalization import KINDS as NORMALIZATIONS

HELD = [
    (form, activation, normalize)
    for form, module in interop.FORMATS.items()
    for activation, kinds in module.SUPPORTED.items()
    for normalize in kinds
]
CENTRED = {
    "sae_lens",
    "sparsify",
    "openai",
}  # formats whose encoders take b_pre off, so that no number changes


def assert_same(a, b, x, atol=2e-6, unit=1.0):
    """Compare latents and reconstructions; unit: what latents of `a` are divided by in `b`."""
    with torch.no_grad():
        latents = a.encode(x).dense(a.shape.n_latents) / unit
        torch.testing.assert_close(
            latents,
            b.encode(x).dense(b.shape.n_latents),
            atol=atol * max(1, latents.abs().max().item()),
            rtol=0,
        )
        torch.testing.assert_close(a(x), b(x), atol=10 * atol, rtol=1e-5)


@pytest.mark.parametrize("form, activation, normalize", HELD)
def test_write_and_read_is_the_identity(form, activation, normalize, make_sae, x, tmp_path):
    sae = make_sae(activation, normalize)
    interop.write(sae, tmp_path / "sae", form)
    again = ksparse.load(tmp_path / "sae")
    assert again.metadata == sae.metadata
    assert (again.shape.activation, again.shape.normalize, again.shape.k) == (
        activation,
        normalize,
        sae.shape.k,
    )
    assert again.shape.factor == pytest.approx(sae.shape.factor, rel=1e-6)
    for key in sae.state_dict():
        old, new = getattr(sae, key).detach(), getattr(again, key).detach()
        if form in CENTRED:
            assert torch.equal(old, new), key
        else:
            torch.testing.assert_close(old, new, atol=2e-6, rtol=2e-6)
    assert_same(sae, again, x)


@pytest.mark.parametrize("form", list(interop.FORMATS))
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_what_is_written_is_the_same_sae_or_the_error_names_what_is_lost(
    form, activation, normalize, make_sae, x, tmp_path
):
    sae = make_sae(activation, normalize)
    try:
        again = written(sae, tmp_path / "sae", form)
    except InputError as error:
        assert f"{form} cannot hold this SAE's" in str(error) and (
            activation in str(error) or normalize in str(error)
        )
        assert not (tmp_path / "sae").exists()
    else:  # where decoder rows need norm 1, latents are divided by the scale
        in_raw_units = normalize == "dataset" and (
            form == "dictionary_learning" or (form, activation) == ("sae_lens", "topk")
        )
        assert_same(sae, again, x, unit=sae.shape.factor if in_raw_units else 1.0)


def written(sae, folder, form, **options):
    interop.write(sae, folder, form, **options)
    return interop.load(folder)


def test_the_scale_of_a_data_set_is_folded_into_the_weights_exactly(make_sae, x):
    sae = make_sae("topk", "dataset")
    folded = compatibility.adapt(sae, "sparsify", {"topk": ("none",)})
    assert folded.shape.normalize == "none"
    assert_same(sae, folded, x)


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "relu", "jump_relu", "gated"])
def test_decoder_rows_keep_their_norm_in_the_files_of_dictionary_learning(
    activation, make_sae, x, tmp_path, caplog
):
    """The library refuses other rows."""
    sae = make_sae(activation, "dataset")
    with caplog.at_level("INFO", "ksparse"):
        again = written(sae, tmp_path / "sae", "dictionary_learning")
    assert (
        "latents are divided by the data set's scale, 0.3, because dictionary_learning needs "
        "decoder rows of norm 1" in caplog.text
    )
    torch.testing.assert_close(again.W_dec.norm(dim=1), torch.ones(20))
    assert_same(sae, again, x, unit=0.3)
    dict_class = json.loads((tmp_path / "sae" / "config.json").read_text())["trainer"]["dict_class"]
    assert (
        dict_class
        == {
            "topk": "AutoEncoderTopK",
            "batch_topk": "BatchTopKSAE",
            "relu": "AutoEncoder",
            "jump_relu": "JumpReluAutoEncoder",
            "gated": "GatedAutoEncoder",
        }[activation]
    )


def test_unit_norm_is_written_as_layer_norm_only_on_request_and_is_off_by_the_epsilon(
    make_sae, x, tmp_path
):
    sae = make_sae("topk", "unit_norm")
    with pytest.raises(
        InputError,
        match=r"cannot hold this SAE's normalisation, unit_norm; it holds none, layer_norm, constant_norm. "
        r"Use --normalization layer_norm .* or --normalization outside",
    ):
        interop.write(sae, tmp_path / "a", "sae_lens")
    again = written(sae, tmp_path / "b", "sae_lens", normalization="layer_norm")
    deviation, unit = x.std(1, keepdim=True), 5**0.5  # rows of norm 1 on inputs of norm sqrt(d - 1)
    expected = unit * sae.encode(x).dense(20)
    off = (again.encode(x).dense(20) - expected).abs()
    rounding = unit * ((sae.W_enc @ sae.b_pre).abs().max() * 1e-6 + 3e-5)
    assert (off <= expected * 2e-5 / deviation + rounding).all()


def test_outside_leaves_the_normalisation_to_the_user(make_sae, x, tmp_path):
    sae = make_sae("topk", "unit_norm")
    again = written(sae, tmp_path / "sae", "sparsify", normalization="outside")
    inputs = sae.normalize(x)
    torch.testing.assert_close(inputs.restore(again(inputs.x)), sae(x))


def test_batch_topk_is_written_as_a_threshold_for_each_latent(make_sae, x, tmp_path):
    sae = make_sae("batch_topk")
    again = written(sae, tmp_path / "sae", "sae_lens")
    assert again.shape.activation == "jump_relu"
    assert_same(sae, again, x)


def test_a_standard_autoencoder_with_free_norms_is_written_as_the_class_that_keeps_them(
    make_sae, x, tmp_path
):
    sae = make_sae("relu")
    sae.W_dec.data *= 2
    assert_same(sae, written(sae, tmp_path / "sae", "dictionary_learning"), x)
    assert (
        json.loads((tmp_path / "sae" / "config.json").read_text())["trainer"]["dict_class"]
        == "AutoEncoderNew"
    )


@pytest.mark.parametrize("n, d", [(20, 6), (49, 7), (1000, 3), (131072, 768), (4099, 640)])
def test_llamascopium_recovers_the_number_of_latents(n, d):
    from ksparse.interop.llamascopium import _expansion
    from ksparse.sae.model import Shape

    assert int(d * _expansion(Shape(d, n, 1))) == n


def test_all_formats_are_recognised_by_their_files(make_sae, tmp_path):
    for form in [*interop.FORMATS, "ksparse"]:
        activation = "jump_relu" if form == "gemma_scope" else "topk"
        interop.write(
            make_sae(activation, "layer_norm" if form == "openai" else "none"),
            tmp_path / form,
            form,
        )
        assert ksparse.load(tmp_path / form).shape.activation == activation
    with pytest.raises(
        InputError, match="holds no SAE itself; its folders .*sae_lens.* do: name one"
    ):
        ksparse.load(tmp_path)
    assert ksparse.load(tmp_path, subfolder="sparsify").shape.k == 4


def test_a_single_file_can_be_loaded(make_sae, tmp_path):
    interop.write(make_sae("topk", "layer_norm"), tmp_path / "a", "openai")
    interop.write(make_sae("jump_relu"), tmp_path / "b", "gemma_scope")
    (tmp_path / "a" / "autoencoder.pt").rename(tmp_path / "8.pt")
    assert ksparse.load(tmp_path / "8.pt").shape.normalize == "layer_norm"
    assert ksparse.load(tmp_path / "b" / "params.npz").shape.activation == "jump_relu"


def test_half_precision_is_read_as_float32(make_sae, tmp_path):
    interop.write(make_sae(), tmp_path / "sae", "sparsify")
    file = tmp_path / "sae" / "sae.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    (tmp_path / "sae" / "manifest.json").unlink()
    assert ksparse.load(tmp_path / "sae").W_enc.dtype == torch.float32


def test_a_file_that_differs_from_its_checksum_is_refused(make_sae, tmp_path):
    interop.write(make_sae(), tmp_path / "sae", "sparsify")
    file = tmp_path / "sae" / "sae.safetensors"
    save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    with pytest.raises(CorruptError, match="sae.safetensors is damaged"):
        ksparse.load(tmp_path / "sae")


# ---- settings of other libraries ------------------------------------------------------------------------------------


def test_the_flat_settings_of_old_sae_lens_are_read(make_sae, x, tmp_path):
    sae = make_sae("topk")
    interop.write(sae, tmp_path, "sae_lens")
    for name in ("ksparse.json", "manifest.json"):
        (tmp_path / name).unlink()
    old = {
        "model_name": "gpt2-small",
        "hook_point": "blocks.8.hook_resid_post",
        "d_in": 6,
        "d_sae": 20,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
        "apply_b_dec_to_input": True,
        "normalize_activations": False,
        "context_size": 128,
        "prepend_bos": True,
        "dataset_path": "some/text",
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    again = ksparse.load(tmp_path)
    assert_same(sae, again, x)
    acts = again.metadata["acts"]
    assert (acts["lm"], acts["site"], acts["context"], acts["text"]) == (
        "gpt2",
        "resid_post.8",
        128,
        "some/text",
    )


def test_sae_lens_metadata_name_the_model_and_the_hook(make_sae, tmp_path):
    interop.write(make_sae(), tmp_path / "sae", "sae_lens")
    metadata = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert (
        metadata["hook_name"] == "blocks.8.hook_resid_post"
        and metadata["model_name"] == "gpt2"
        and metadata["context_size"] == 64
    )


@pytest.mark.parametrize(
    "site, hook, model_class",
    [
        ("resid_post.8", "blocks.8.hook_resid_post", "HookedTransformer"),
        ("mlp_out.0", "blocks.0.hook_mlp_out", "HookedTransformer"),
        ("blocks.8.attn.hook_z", "blocks.8.attn.hook_z", "HookedTransformer"),
        ("transformer.h.8", "transformer.h.8", "AutoModelForCausalLM"),
    ],
)
def test_sae_lens_metadata_name_the_class_of_models_that_have_the_hook(
    site, hook, model_class, make_sae, tmp_path
):
    sae = make_sae()
    sae.metadata["acts"] = sae.metadata["acts"] | {"site": site}
    interop.write(sae, tmp_path / "sae", "sae_lens")
    metadata = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["model_class_name"]) == (hook, model_class)


def test_sae_lens_can_rescale_by_decoder_norms_where_all_are_equal(make_sae, x, tmp_path, caplog):
    """Its own default for TopK, which its dashboards want."""
    for norm in (1.0, 2.5):
        sae = make_sae()
        sae.W_dec.data *= norm
        with caplog.at_level("INFO", "ksparse"):
            again = written(sae, tmp_path / str(norm), "sae_lens")
        config = json.loads((tmp_path / str(norm) / "cfg.json").read_text())
        assert config["rescale_acts_by_decoder_norm"] is True
        torch.testing.assert_close(again.W_dec.norm(dim=1), torch.ones(20))
        assert_same(sae, again, x, unit=1 / norm)
    assert "latents are multiplied by the norm of the decoder's rows, 2.5" in caplog.text


def test_decoder_norms_that_differ_are_kept_for_sae_lens(make_sae, x, tmp_path):
    """Rescaling by them would choose other latents."""
    sae = make_sae()
    sae.W_dec.data *= torch.linspace(0.5, 2, 20)[:, None]
    again = written(sae, tmp_path / "sae", "sae_lens")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert config["rescale_acts_by_decoder_norm"] is False
    assert torch.equal(again.W_dec, sae.W_dec)
    assert_same(sae, again, x)


@pytest.mark.parametrize("keep, expected", [("text", True), ("all", False)])
def test_sae_lens_metadata_say_whether_special_tokens_were_excluded(
    keep, expected, make_sae, tmp_path
):
    sae = make_sae()
    sae.metadata["policy"] = {"keep": keep}
    interop.write(sae, tmp_path / "sae", "sae_lens")
    assert (
        json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"][
            "exclude_special_tokens"
        ]
        is expected
    )


SETTINGS = {
    "sae_lens": (
        "cfg.json",
        {
            "metadata": {
                "exclude_special_tokens": [0, 50256],
                "seqpos_slice": [1, None],
                "neuronpedia_id": "gpt2/8-res",
                "prepend_bos": False,
                "model_class_name": "HookedTransformer",
                "model_name": "gpt2-small",
                "hook_name": "blocks.8.hook_resid_post",
                "model_from_pretrained_kwargs": {"center_writing_weights": False},
            },
            "reshape_activations": "hook_z",
        },
    ),
    "sparsify": ("cfg.json", {"expansion_factor": 32, "wandb": "some/run"}),
    "dictionary_learning": (
        "config.json",
        {
            "trainer": {"dict_class": "AutoEncoderTopK", "lr": 3e-4, "seed": 7},
            "buffer": {"n_ctxs": 100},
            "sweep": 3,
        },
    ),
    "llamascopium": ("config.json", {"dtype": "torch.float32", "jumprelu_threshold_window": 2.0}),
}


@pytest.mark.parametrize("form", list(SETTINGS))
def test_settings_of_a_format_are_kept_when_an_sae_is_written_in_that_format_again(
    form, make_sae, tmp_path, caplog
):
    name, settings = SETTINGS[form]
    interop.write(make_sae(), tmp_path / "a", form)
    for other in ("manifest.json", "ksparse.json"):
        (tmp_path / "a" / other).unlink()
    merged = json.loads((tmp_path / "a" / name).read_text())
    for key, value in settings.items():
        merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    (tmp_path / "a" / name).write_text(json.dumps(merged))
    with caplog.at_level("WARNING", "ksparse"):
        interop.convert(tmp_path / "a", tmp_path / "ours", "ksparse")
    assert ("hook_z: x is the concatenation of the heads' outputs" in caplog.text) == (
        form == "sae_lens"
    )
    interop.convert(tmp_path / "ours", tmp_path / "b", form)
    again = json.loads((tmp_path / "b" / name).read_text())
    for key, value in settings.items():
        if isinstance(value, dict):
            assert {inner: again[key][inner] for inner in value} == value
        else:
            assert again[key] == value


def test_settings_of_one_format_are_not_written_into_another(make_sae, tmp_path):
    sae = make_sae()
    sae.metadata = {
        "origin": {
            "format": "sparsify",
            "settings": {"wandb": "some/run", "metadata": {"exclude_special_tokens": True}},
        }
    }
    interop.write(sae, tmp_path / "sae", "sae_lens")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert "wandb" not in config and config["metadata"]["exclude_special_tokens"] is False


def test_a_scaling_factor_beside_sae_lens_weights_is_used_and_a_missing_one_is_an_error(
    make_sae, tmp_path
):
    interop.write(make_sae(), tmp_path, "sae_lens")
    (tmp_path / "manifest.json").unlink()
    change(tmp_path / "cfg.json", normalize_activations="expected_average_only_in")
    with pytest.raises(
        InputError,
        match="multiplied by a constant .* that is not in the file, nor is there activation_scaler.json",
    ):
        ksparse.load(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    assert (ksparse.load(tmp_path).shape.normalize, ksparse.load(tmp_path).shape.factor) == (
        "dataset",
        0.5,
    )


def test_sparsify_folders_name_the_site(make_sae, tmp_path):
    interop.write(make_sae(), tmp_path / "run" / "layers.10", "sparsify")
    for name in ("ksparse.json", "manifest.json"):
        (tmp_path / "run" / "layers.10" / name).unlink()
    (tmp_path / "run" / "config.json").write_text(
        '{"model": "EleutherAI/pythia-160m", "dataset": "some/text", "ctx_len": 2048}'
    )
    acts = ksparse.load(tmp_path / "run" / "layers.10").metadata["acts"]
    assert (acts["lm"], acts["site"], acts["context"]) == (
        "EleutherAI/pythia-160m",
        "resid_post.10",
        2048,
    )


def test_the_path_of_a_published_openai_file_names_the_site(make_sae, tmp_path):
    interop.write(make_sae("topk", "layer_norm"), tmp_path / "a", "openai")
    place = tmp_path / "gpt2-small" / "resid_post_attn_v5_32k" / "autoencoders"
    place.mkdir(parents=True)
    (tmp_path / "a" / "autoencoder.pt").rename(place / "8.pt")
    origin = ksparse.load(place / "8.pt").metadata["origin"]
    assert (origin["lm"], origin["site"], origin["context"]) == ("gpt2", "resid_mid.8", 64)


def test_gemma_scope_is_read_in_lower_case_and_for_embeddings(make_sae, x, tmp_path):
    sae = make_sae("jump_relu")
    interop.write(sae, tmp_path / "embedding" / "width_4k", "gemma_scope")
    file = tmp_path / "embedding" / "width_4k" / "params.npz"
    arrays = {key.lower(): value for key, value in np.load(file).items()}
    for name in ("ksparse.json", "manifest.json"):
        (file.parent / name).unlink()
    np.savez(file, **arrays)
    sae.b_pre.data.zero_()
    again = ksparse.load(file)
    torch.testing.assert_close(again.W_dec, sae.W_dec * math.sqrt(6))
    torch.testing.assert_close(again.W_enc, sae.W_enc / math.sqrt(6))


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("resid_post.8", "blocks.8.hook_resid_post"),
        ("mlp_out.0", "blocks.0.hook_mlp_out"),
        ("resid_pre.11", "blocks.11.hook_resid_pre"),
        ("transformer.h.3.mlp.c_proj:in", "transformer.h.3.mlp.c_proj:in"),
    ],
)
def test_hook_names_are_a_two_way_map(ours, theirs):
    assert hook_names.to_hook(ours) == theirs and hook_names.from_hook(theirs) == ours


@pytest.mark.parametrize(
    "module, site, layer",
    [
        ("layers.10", "resid_post.10", 10),
        ("h.0.attn", "h.0.attn", 0),
        ("transformer.h.5.mlp", "transformer.h.5.mlp", 5),
        ("embed_tokens", "embed_tokens", None),
        ("model.layers.2.self_attn.o_proj:in", "model.layers.2.self_attn.o_proj:in", 2),
    ],
)
def test_module_names_become_sites(module, site, layer):
    assert hook_names.from_module(module) == site and hook_names.layer_of(site) == layer


# ---- trust -------------------------------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return print, ("code has run",)


@pytest.mark.parametrize(
    "table", [{"encoder.weight": torch.zeros(4, 2), "k": Code()}, Code()], ids=["inside", "alone"]
)
@pytest.mark.parametrize("name", ["ae.pt", "8.pt", "sae_weights.pt"])
def test_a_pickle_with_code_is_refused_and_not_run(table, name, tmp_path, capsys):
    torch.save(table, tmp_path / name)
    (tmp_path / "config.json").write_text(
        '{"sae_type": "sae", "hook_point_in": "a", "hook_point_out": "a", "trainer": {"dict_class": "AutoEncoderTopK"}}'
    )
    with pytest.raises(
        InputError,
        match=r"is a pickle with code in it \(\S*print\S*\); ksparse reads tensors and plain values only",
    ):
        ksparse.load(tmp_path / name if name == "8.pt" else tmp_path)
    assert "code has run" not in capsys.readouterr().out


def test_an_archive_with_objects_is_refused(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([Code()], dtype=object))
    with pytest.raises(InputError, match="params.npz is a pickle with code in it"):
        ksparse.load(tmp_path)


def change(file, **changes):
    table = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))


def tensors(file, **changes):
    found = load_file(file) | changes
    save_file({key: value for key, value in found.items() if value is not None}, file)


@pytest.mark.parametrize(
    "form, damage, error, message",
    [
        (
            "sae_lens",
            lambda f: tensors(f / "sae_weights.safetensors", W_dec=torch.zeros(6, 20)),
            InputError,
            r"tensor 'W_dec' has shape \[6, 20\], expected \[n = 20, d = 6\]",
        ),
        (
            "sae_lens",
            lambda f: tensors(f / "sae_weights.safetensors", b_enc=None),
            InputError,
            r"lacks the tensor 'b_enc'; it has W_dec, W_enc, b_dec",
        ),
        (
            "sae_lens",
            lambda f: tensors(f / "sae_weights.safetensors", W_skip=torch.zeros(6, 6)),
            InputError,
            r"holds W_skip, which an SAE of this kind does not have",
        ),
        (
            "sae_lens",
            lambda f: tensors(f / "sae_weights.safetensors", b_enc=torch.full((20,), torch.nan)),
            InputError,
            r"'b_enc' holds NaN or infinity",
        ),
        (
            "sae_lens",
            lambda f: tensors(f / "sae_weights.safetensors", scaling_factor=torch.full((20,), 2.0)),
            InputError,
            r"scaling_factor is not 1",
        ),
        (
            "sae_lens",
            lambda f: change(f / "cfg.json", architecture="temporal"),
            InputError,
            r"architecture is 'temporal'; it is a temporal SAE: its code of a token depends on earlier",
        ),
        (
            "sae_lens",
            lambda f: change(f / "cfg.json", normalize_activations="covariance_whitening"),
            InputError,
            r"normalize_activations is 'covariance_whitening'",
        ),
        (
            "sae_lens",
            lambda f: change(f / "cfg.json", k=...),
            InputError,
            r"cfg.json lacks the key 'k'",
        ),
        (
            "sae_lens",
            lambda f: change(f / "cfg.json", k="4"),
            InputError,
            r"'k' is '4', expected a value of type int",
        ),
        (
            "sae_lens",
            lambda f: change(f / "cfg.json", d_sae=21),
            InputError,
            r"d_sae is 21, the tensors of sae_weights.safetensors have 20",
        ),
        (
            "sae_lens",
            lambda f: (f / "cfg.json").write_text("{"),
            CorruptError,
            r"cfg.json is not JSON",
        ),
        (
            "sae_lens",
            lambda f: (f / "sae_weights.safetensors").write_bytes(b"x"),
            CorruptError,
            r"sae_weights.safetensors is truncated or damaged",
        ),
        (
            "sparsify",
            lambda f: change(f / "cfg.json", transcode=True),
            InputError,
            r"transcode is True; ksparse has no such SAE",
        ),
        (
            "sparsify",
            lambda f: change(f / "cfg.json", activation="groupmax"),
            InputError,
            r"activation is 'groupmax'",
        ),
        (
            "sparsify",
            lambda f: change(f / "cfg.json", num_latents=21),
            InputError,
            r"says d_in = 6 and 21 latents, the tensors of sae.safetensors have 6 and 20",
        ),
        (
            "dictionary_learning",
            lambda f: change(f / "config.json", trainer={"dict_class": "CrossCoder"}),
            InputError,
            r"dict_class is 'CrossCoder'; ksparse reads",
        ),
        (
            "dictionary_learning",
            lambda f: (f / "config.json").unlink(),
            InputError,
            r"has no config.json beside it that says whether",
        ),
        (
            "dictionary_learning",
            lambda f: (f / "ae.pt").write_bytes(b"abc"),
            CorruptError,
            r"ae.pt is not a file of torch.save, or is damaged",
        ),
        (
            "dictionary_learning",
            lambda f: torch.save([1], f / "ae.pt"),
            InputError,
            r"ae.pt holds a list, expected a dictionary of tensors",
        ),
        (
            "openai",
            lambda f: repack(f / "autoencoder.pt", activation="Sigmoid"),
            InputError,
            r"activation is 'Sigmoid'; ksparse reads 'TopK', 'ReLU'",
        ),
        (
            "openai",
            lambda f: repack(f / "autoencoder.pt", activation_state_dict={}),
            InputError,
            r"lacks the key 'k'",
        ),
        (
            "openai",
            lambda f: repack(
                f / "autoencoder.pt", activation_state_dict={"k": 4, "postact_fn": "Identity"}
            ),
            InputError,
            r"postact_fn is 'Identity'",
        ),
        (
            "gemma_scope",
            lambda f: (f / "params.npz").write_bytes(b"PK"),
            CorruptError,
            r"params.npz is not a NumPy archive of numbers, or is damaged",
        ),
        (
            "gemma_scope",
            lambda f: np.savez(f / "params.npz", W_enc=np.zeros((6, 20), "f4")),
            InputError,
            r"params.npz lacks the tensor 'b_enc'",
        ),
        (
            "llamascopium",
            lambda f: change(f / "config.json", act_fn="batchtopk"),
            InputError,
            r"act_fn is 'batchtopk'; ksparse reads 'relu', 'topk', 'jumprelu'",
        ),
        (
            "llamascopium",
            lambda f: change(f / "config.json", norm_activation="batch-wise"),
            InputError,
            r"norm_activation is 'batch-wise'",
        ),
        (
            "llamascopium",
            lambda f: change(f / "config.json", hook_point_out="blocks.9.hook_mlp_out"),
            InputError,
            r"hook_point_out is 'blocks.9.hook_mlp_out'",
        ),
        (
            "llamascopium",
            lambda f: change(f / "config.json", sae_type="clt"),
            InputError,
            r"sae_type is 'clt'",
        ),
        (
            "llamascopium",
            lambda f: (f / "sae_weights.safetensors").rename(f / "sae_weights.dcp"),
            InputError,
            r"holds a distributed checkpoint",
        ),
    ],
    ids=lambda value: (
        value if isinstance(value, str) and " " not in value and "\\" not in value else ""
    ),
)
def test_what_is_wrong_is_named(form, damage, error, message, make_sae, tmp_path):
    activation, normalize = {
        "gemma_scope": ("jump_relu", "none"),
        "openai": ("topk", "layer_norm"),
    }.get(form, ("topk", "none"))
    interop.write(make_sae(activation, normalize), tmp_path / "sae", form)
    for name in ("ksparse.json", "manifest.json"):
        (tmp_path / "sae" / name).unlink()
    damage(tmp_path / "sae")
    with pytest.raises(error, match=message) as caught:
        ksparse.load(tmp_path / "sae")
    assert str(tmp_path) in str(caught.value)


def repack(file, **changes):
    torch.save(torch.load(file, weights_only=True) | changes, file)


def test_an_unknown_format_is_named_with_the_nearest_one(make_sae, tmp_path):
    with pytest.raises(InputError, match="there is no format 'saelens'; did you mean 'sae_lens'?"):
        interop.write(make_sae(), tmp_path / "sae", "saelens")


def test_nothing_is_overwritten(make_sae, tmp_path):
    ksparse.save(make_sae(), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("")
    with pytest.raises(InputError, match="b already exists and is not empty; give a new folder"):
        interop.convert(tmp_path / "a", tmp_path / "b", "sparsify")


def test_only_tensors_and_plain_values_are_written(tmp_path):
    with pytest.raises(TypeError, match="Path is not a tensor or a plain value|PosixPath is not"):
        foreign.write_torch({"a": tmp_path}, tmp_path / "file.pt")


def test_a_topk_that_selects_by_decoder_norm_warns_that_latents_change_their_unit(
    make_sae, tmp_path, caplog
):
    sae = make_sae()
    sae.W_dec.data *= torch.linspace(0.5, 2, 20)[:, None]
    interop.write(sae, tmp_path, "llamascopium")
    change(tmp_path / "config.json", sparsity_include_decoder_norm=True)
    (tmp_path / "manifest.json").unlink()
    with caplog.at_level("WARNING", "ksparse"):
        ksparse.load(tmp_path)
    assert (
        "latents are multiplied by the norms that their decoder rows had, 0.5 to 2" in caplog.text
    )


def test_the_command_converts_there_and_back(make_sae, x, tmp_path, capsys):
    from ksparse import cli

    sae = make_sae("topk", "dataset")
    ksparse.save(sae, tmp_path / "a")
    cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "sae_lens"])
    assert "20 latents, topk, normalisation none" in capsys.readouterr().out
    cli.main(["convert", str(tmp_path / "b"), str(tmp_path / "c"), "--to", "ksparse"])
    assert_same(sae, ksparse.load(tmp_path / "c"), x, unit=sae.shape.factor)
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "d"), "--to", "openai"])
    assert (
        end.value.code == 2
        and "openai cannot hold this SAE's normalisation, dataset; it holds layer_norm. No conversion is available"
        in capsys.readouterr().err
    )
