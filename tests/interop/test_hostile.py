"""Odd, damaged and hostile files: read as their library reads them, or refused by name at once."""

from __future__ import annotations

import collections
import json
import os
import pickle
import socket
import stat
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ksparse
from ksparse import cli, interop
from ksparse.errors import CorruptError, InputError
from ksparse.interop import foreign

TOPK_CONFIG = '{"trainer": {"dict_class": "AutoEncoderTopK"}}'


# ---- the layout that openai/sparse_autoencoder writes: a module's state_dict, with its activation'


class TopK(nn.Module):
    def __init__(self, k, postact_fn):
        super().__init__()
        self.k, self.postact_fn = k, postact_fn

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        table = super().state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        table[f"{prefix}k"], table[f"{prefix}postact_fn"] = self.k, type(self.postact_fn).__name__
        return table


class Tied(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear


class OpenAIModule(nn.Module):
    def __init__(self, n, d, activation, *, tied=False):
        super().__init__()
        self.pre_bias, self.latent_bias = nn.Parameter(torch.randn(d)), nn.Parameter(torch.randn(n))
        self.encoder = nn.Linear(d, n, bias=False)
        self.decoder = Tied(self.encoder) if tied else nn.Linear(n, d, bias=False)
        self.activation = activation
        self.register_buffer("stats_last_nonzero", torch.zeros(n, dtype=torch.long))
        self.register_buffer("latents_activation_frequency", torch.ones(n))
        self.register_buffer("latents_mean_square", torch.zeros(n))

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        table = super().state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        table[f"{prefix}activation"] = type(self.activation).__name__
        table[f"{prefix}activation_state_dict"] = self.activation.state_dict()
        return table

    def forward(self, x):
        """Return latents and reconstruction, as their code computes them."""
        mean = deviation = None
        if isinstance(self.activation, TopK):
            mean = x.mean(-1, keepdim=True)
            deviation = x.std(-1, keepdim=True)
            x = (x - mean) / (deviation + 1e-5)
        latents = torch.relu((x - self.pre_bias) @ self.encoder.weight.T + self.latent_bias)
        if isinstance(self.activation, TopK):
            chosen = latents.topk(self.activation.k, dim=-1)
            latents = torch.zeros_like(latents).scatter(-1, chosen.indices, chosen.values)
        rows = self.encoder.weight if isinstance(self.decoder, Tied) else self.decoder.weight.T
        recon = latents @ rows + self.pre_bias
        return latents, recon if mean is None else recon * deviation + mean


@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("activation", [TopK(4, nn.ReLU()), nn.ReLU()], ids=["topk", "relu"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_state_dicts_of_openais_module_give_its_numbers(activation, tied, legacy, x, tmp_path):
    torch.manual_seed(0)
    module = OpenAIModule(20, 6, activation, tied=tied)
    torch.save(module.state_dict(), tmp_path / "8.pt", _use_new_zipfile_serialization=not legacy)
    table = torch.load(tmp_path / "8.pt", weights_only=True)
    assert type(table) is type(table["activation_state_dict"]) is collections.OrderedDict
    sae = ksparse.load(tmp_path / "8.pt")
    with torch.no_grad():
        latents, recon = module(x)
        torch.testing.assert_close(sae.encode(x).dense(20), latents, atol=1e-5, rtol=0)
        torch.testing.assert_close(sae(x), recon, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "activation, message",
    [
        (TopK(4, nn.Identity()), "postact_fn is 'Identity'; ksparse reads 'ReLU'"),
        (nn.Identity(), "activation is 'Identity'; ksparse reads 'TopK', 'ReLU'"),
    ],
)
def test_an_unknown_activation_of_openais_module_is_named(activation, message, tmp_path):
    torch.save(OpenAIModule(20, 6, activation).state_dict(), tmp_path / "8.pt")
    with pytest.raises(InputError, match=message):
        ksparse.load(tmp_path / "8.pt")


def test_a_tied_decoder_that_is_not_the_encoder_is_refused(tmp_path):
    table = OpenAIModule(20, 6, nn.ReLU(), tied=True).state_dict()
    table["decoder.linear.weight"] = table["decoder.linear.weight"] + 1
    torch.save(table, tmp_path / "8.pt")
    with pytest.raises(
        InputError,
        match="decoder.linear.weight is that of a tied decoder, but differs from encoder.weight",
    ):
        ksparse.load(tmp_path / "8.pt")


@pytest.mark.parametrize(
    "make",
    [
        collections.OrderedDict,
        lambda table: collections.OrderedDict(ae=collections.OrderedDict(table), norm_factor=2.0),
    ],
    ids=["state_dict", "backup"],
)
def test_ordered_dictionaries_of_dictionary_learning_are_dictionaries(make, make_sae, tmp_path):
    interop.write(make_sae(), tmp_path, "dictionary_learning")
    torch.save(make(torch.load(tmp_path / "ae.pt", weights_only=True)), tmp_path / "ae.pt")
    (tmp_path / "manifest.json").unlink()
    assert ksparse.load(tmp_path).shape.n_latents == 20


# ---- tensors -------------------------------------------------------------------------------------


def table(**changes):
    whole = {
        "encoder.weight": torch.ones(20, 6),
        "encoder.bias": torch.ones(20),
        "decoder.weight": torch.ones(6, 20),
        "b_dec": torch.ones(6),
        "k": torch.tensor(4),
        "threshold": torch.tensor(-1.0),
    }
    return {key: value for key, value in (whole | changes).items() if value is not None}


def saved(folder, changes):
    torch.save(table(**changes), folder / "ae.pt")
    (folder / "config.json").write_text(TOPK_CONFIG)
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"encoder.weight": torch.ones(1).expand(2**24, 2**12)},
            "tensor 'encoder.weight' is expanded: 68,719,476,736 numbers on 1 that are stored",
        ),
        (
            {"encoder.bias": torch.ones(1).expand(20)},
            "tensor 'encoder.bias' is expanded: 20 numbers on 1",
        ),
        (
            {"encoder.weight": torch.ones(20, 6).to_sparse()},
            "'encoder.weight' has shape .*|'encoder.weight' is of type a Tensor that is not a plain "
            "tensor",
        ),
        ({"encoder.weight": torch.ones(20, 6, device="meta")}, "'encoder.weight' has shape .*"),
        (
            {"encoder.weight": torch.ones(20, 6, dtype=torch.int32)},
            "'encoder.weight' is of type int32, expected float64, float32",
        ),
        (
            {"encoder.weight": torch.ones(20, 6, dtype=torch.bool)},
            "'encoder.weight' is of type bool",
        ),
        (
            {"encoder.weight": torch.ones(20, 6, dtype=torch.complex64)},
            "'encoder.weight' is of type complex64",
        ),
        ({"encoder.bias": torch.full((20,), torch.inf)}, "'encoder.bias' holds NaN or infinity"),
        ({"encoder.bias": "text"}, "'encoder.bias' has shape|'encoder.bias' is of type a str"),
        ({"k": torch.tensor(torch.nan)}, "'k' is nan, expected a finite number"),
        ({"k": torch.tensor(4.5)}, "'k' is 4.5, expected a whole number"),
        ({"k": torch.tensor(0)}, "k of an SAE is 0"),
        ({"k": torch.tensor([4, 4])}, r"'k' has shape \[2\], expected a single number"),
        ({"k": torch.tensor(True)}, "'k' is of type bool"),
        ({"k": "4"}, "'k' is of type a str that is not a plain tensor"),
        ({"W_skip": torch.ones(6, 6)}, "holds W_skip, which an SAE of this kind does not have"),
        ({"skip": "yes"}, "holds skip, which an SAE of this kind does not have"),
        ({7: torch.ones(1)}, "holds 7, which an SAE of this kind does not have"),
    ],
)
def test_a_tensor_of_a_torch_file_that_is_not_of_finite_numbers_is_refused_by_name(
    changes, message, tmp_path
):
    torch.save({**table(), **changes}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(TOPK_CONFIG)
    with pytest.raises(InputError, match=message) as caught:
        ksparse.load(tmp_path)
    assert "ae.pt" in str(caught.value)


def test_python_numbers_are_read_like_tensors_with_one_element(tmp_path):
    assert ksparse.load(saved(tmp_path, {"k": 4, "threshold": 0.5})).shape.k == 4


@pytest.mark.parametrize("factor", ["2", 0.0, -1.0, float("nan"), torch.ones(3)], ids=str)
def test_the_factor_of_a_backup_is_a_number_above_0(factor, tmp_path):
    torch.save({"ae": table(), "norm_factor": factor}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(TOPK_CONFIG)
    with pytest.raises(InputError, match="norm_factor"):
        ksparse.load(tmp_path)


@pytest.mark.parametrize("held", [[1], 3, "x"])
def test_a_torch_file_without_a_dictionary_is_refused_by_type(held, tmp_path):
    torch.save({"ae": held}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(TOPK_CONFIG)
    with pytest.raises(
        InputError, match=f"holds a {type(held).__name__} instead of a dictionary of tensors"
    ):
        ksparse.load(tmp_path)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("W_enc", torch.ones(6, 20, dtype=torch.int8), "'W_enc' is of type int8"),
        ("b_enc", torch.ones(20, dtype=torch.bool), "'b_enc' is of type BOOL"),
        ("W_dec", torch.full((20, 6), -torch.inf), "'W_dec' holds NaN or infinity"),
        ("log_threshold", torch.full((20,), 1e4), "give a threshold with NaN or infinity"),
    ],
)
def test_tensors_of_a_foreign_safetensors_file_are_checked_too(
    key, value, message, make_sae, tmp_path
):
    interop.write(make_sae("jump_relu"), tmp_path, "sae_lens")
    file = tmp_path / "sae_weights.safetensors"
    found = load_file(file)
    if key == "log_threshold":
        del found["threshold"]
    save_file(found | {key: value}, file)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match=message) as caught:
        ksparse.load(tmp_path)
    assert "sae_weights.safetensors" in str(caught.value)


def test_half_precision_torch_files_are_read_as_float32(tmp_path):
    halves = {key: value.half() if value.ndim else value for key, value in table().items()}
    assert ksparse.load(saved(tmp_path, halves)).W_enc.dtype == torch.float32


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"W_enc": np.ones((6, 20), dtype="i4")}, "'W_enc' is of type int32"),
        ({"W_enc": np.ones((6, 20), dtype=bool)}, "'W_enc' is of type bool"),
        ({"W_enc": np.ones((6, 20), dtype="c8")}, "'W_enc' is of type complex64"),
        ({"W_enc": np.ones((6, 20), dtype="U3")}, "'W_enc' is of type str"),
        ({"W_enc": np.full((6, 20), np.nan)}, "'W_enc' holds NaN or infinity"),
        ({"W_enc": np.zeros((2**13, 2**11))}, "would grow from .* bytes to"),
        ({"extra": np.zeros(3)}, "holds extra, which"),
        ({"W_enc": np.ones((6, 20), dtype=">f4")}, None),
    ],
)
def test_arrays_of_a_numpy_archive_are_checked_too(arrays, message, make_sae, tmp_path):
    interop.write(make_sae("jump_relu"), tmp_path, "gemma_scope")
    whole = dict(np.load(tmp_path / "params.npz"))
    np.savez_compressed(tmp_path / "params.npz", **whole | arrays)
    (tmp_path / "manifest.json").unlink()
    if message is None:
        assert ksparse.load(tmp_path).shape.n_latents == 20
        return
    with pytest.raises(InputError, match=message) as caught:
        ksparse.load(tmp_path)
    assert "params.npz" in str(caught.value)


def test_an_array_whose_header_claims_too_much_takes_no_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 4), }"
        archive.writestr(
            "W_enc.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        )
    with pytest.raises(CorruptError, match=r"too few for an array of shape \[1099511627776, 4\]"):
        ksparse.load(tmp_path)


# ---- files that are none, pickles without end ----------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        lambda path: bind(path),
        lambda path: os.symlink("/dev/zero", path),
        lambda path: path.mkdir(),
    ],
    ids=["fifo", "socket", "device", "folder"],
)
@pytest.mark.parametrize(
    "name",
    [
        "ae.pt",
        "autoencoder.pt",
        "params.npz",
        "sae_weights.safetensors",
        "sae_weights.pt",
        "cfg.json",
        "config.json",
        "sae.json",
    ],
)
def test_pipes_and_devices_are_refused_without_waiting(make, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    for other in {
        "sae_weights.safetensors": ["cfg.json"],
        "sae_weights.pt": ["config.json"],
        "ae.pt": ["config.json"],
    }.get(name, []):
        (tmp_path / other).write_text(
            '{"trainer": {"dict_class": "AutoEncoderTopK"}, "hook_point_in": "a", '
            '"hook_point_out": "a"}'
        )
    make(tmp_path / name)
    with pytest.raises(
        InputError,
        match=r"is a (FIFO|socket|device), expected a file|cannot be read|holds no SAE|no file "
        r"of torch.save|is not a",
    ):
        ksparse.load(tmp_path)
    with pytest.raises(InputError):
        ksparse.load(tmp_path / name)


def bind(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    assert stat.S_ISSOCK(path.stat().st_mode)


@pytest.mark.parametrize(
    "opcodes", [b"(" * 2**20, b"]" * 2**20, b"K\x01" * 2**19], ids=["marks", "lists", "numbers"]
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_reading_an_endless_pickle_stops_soon(opcodes, legacy, tmp_path):
    file = tmp_path / "8.pt"
    if legacy:
        torch.save({}, file, _use_new_zipfile_serialization=False)
        file.write_bytes(
            pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)
            + pickle.dumps(1001, 2)
            + pickle.dumps({}, 2)
            + b"\x80\x02"
            + opcodes
        )
    else:
        torch.save({}, file)
        replace_in_archive(file, "data.pkl", b"\x80\x02" + opcodes)
    with pytest.raises(
        InputError, match="8.pt holds a pickle of more than 262,144 bytes beside its tensors"
    ):
        ksparse.load(file)


def replace_in_archive(file, suffix, data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, held in members.items():
            archive.writestr(name, data if name.endswith(suffix) else held)


def test_a_compressed_torch_file_is_refused(tmp_path):
    saved(tmp_path, {})
    replace_in_archive(tmp_path / "ae.pt", "no such", b"", zipfile.ZIP_DEFLATED)
    with pytest.raises(
        CorruptError,
        match="ae.pt is not a file of torch.save, or is damaged: .* in it is compressed",
    ):
        ksparse.load(tmp_path)


def test_a_storage_larger_than_its_data_in_the_file_is_refused(tmp_path):
    saved(tmp_path, {"encoder.weight": torch.ones(2000, 600)})
    replace_in_archive(tmp_path / "ae.pt", "data/0", bytes(16))
    with pytest.raises(CorruptError, match="ae.pt is not a file of torch.save, or is damaged"):
        ksparse.load(tmp_path)


def test_a_list_nested_many_times_is_abbreviated_in_the_message(tmp_path):
    held = ["x"]
    for _ in range(60):
        held = [held, held]
    torch.save(
        OpenAIModule(20, 6, nn.ReLU()).state_dict() | {"activation": held}, tmp_path / "8.pt"
    )
    with pytest.raises(InputError, match=r"activation is \[\[\[\.\.\.\], \[\.\.\.\]\]"):
        ksparse.load(tmp_path / "8.pt")


# ---- settings of other types ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, file, changes, message",
    [
        ("sae_lens", "cfg.json", {"k": True}, "'k' is True, expected a value of type int"),
        ("sae_lens", "cfg.json", {"k": 10**30}, "'k' is .*, expected a value of type int"),
        ("sae_lens", "cfg.json", {"d_in": "6"}, "'d_in' is '6', expected a value of type int"),
        (
            "sae_lens",
            "cfg.json",
            {"apply_b_dec_to_input": "no"},
            "'apply_b_dec_to_input' is 'no', expected a value of type bool",
        ),
        ("sae_lens", "cfg.json", {"metadata": []}, "'metadata' is not a table"),
        ("sae_lens", "cfg.json", {"architecture": ["topk"]}, r"architecture is \['topk'\]"),
        (
            "sae_lens",
            "cfg.json",
            {"reshape_activations": "spin"},
            "reshape_activations is 'spin'; ksparse reads 'none', 'hook_z'",
        ),
        ("sparsify", "cfg.json", {"d_in": [6]}, r"'d_in' is \[6\], expected a value of type int"),
        (
            "sparsify",
            "cfg.json",
            {"num_latents": 0, "expansion_factor": "x"},
            "'expansion_factor' is 'x'",
        ),
        (
            "dictionary_learning",
            "config.json",
            {"buffer": [1]},
            r"'buffer' is \[1\], expected a value of type dict",
        ),
        (
            "llamascopium",
            "config.json",
            {"use_decoder_bias": "yes"},
            "'use_decoder_bias' is 'yes', expected a value of type bool",
        ),
        (
            "llamascopium",
            "config.json",
            {"hook_point_in": 3},
            "'hook_point_in' is 3, expected a value of type str",
        ),
    ],
)
def test_a_setting_of_another_type_is_named(form, file, changes, message, make_sae, tmp_path):
    interop.write(make_sae(), tmp_path, form)
    (tmp_path / "manifest.json").unlink()
    settings = json.loads((tmp_path / file).read_text()) | changes
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(InputError, match=message) as caught:
        ksparse.load(tmp_path)
    assert file in str(caught.value)


def test_metadata_of_another_type_is_unknown_and_kept_as_it_is(make_sae, tmp_path):
    interop.write(make_sae(), tmp_path / "a", "sae_lens")
    (tmp_path / "a" / "manifest.json").unlink()
    (tmp_path / "a" / "ksparse.json").unlink()
    settings = json.loads((tmp_path / "a" / "cfg.json").read_text())
    settings["metadata"] |= {
        "model_name": 3,
        "hook_name": ["x"],
        "context_size": "64",
        "prepend_bos": 1,
        "dataset_path": {},
    }
    (tmp_path / "a" / "cfg.json").write_text(json.dumps(settings))
    sae = interop.convert(tmp_path / "a", tmp_path / "b", "ksparse")
    assert set(sae.metadata) == {"origin"} and set(sae.metadata["origin"]) == {"format", "settings"}
    assert sae.metadata["origin"]["settings"] == settings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metadata": [1]}, "'metadata' is"),
        ({"k": True}, "'k' is 'True', expected int"),
        ({"format": 9}, r"written by a newer ksparse \(format 9\)"),
        ({"metadata": {"acts": {"lm": 3}}}, "'acts.lm' in metadata.acts is 3"),
        ({"k": 21}, "k is 21, more than the 20 latents"),
    ],
)
def test_the_sidecar_is_checked_like_sae_json(changes, message, make_sae, tmp_path):
    interop.write(make_sae(), tmp_path, "sparsify")
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "ksparse.json").write_text(
        json.dumps(json.loads((tmp_path / "ksparse.json").read_text()) | changes)
    )
    with pytest.raises(InputError, match=message):
        ksparse.load(tmp_path)


# ---- sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["x" * 5000, "a\0b", "half\ud800", "/proc/self/mem", "/dev/zero"]
)
def test_convert_refuses_a_bad_source_in_one_line(source, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", source, str(tmp_path / "out"), "--to", "sparsify"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.splitlines()) == 1 and len(error) < 700


def test_the_search_for_an_sae_skips_links_and_folders_that_cannot_be_entered(
    make_sae, tmp_path, monkeypatch
):
    (tmp_path / "a" / "closed").mkdir(parents=True)
    (tmp_path / "a" / "link").symlink_to("/")
    ksparse.save(make_sae(), tmp_path / "a" / "deep" / "sae")
    real = os.scandir

    def scandir(path):
        assert os.path.realpath(path).startswith(str(tmp_path.resolve()))
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        InputError,
        match="holds no SAE itself; its folders a/deep/sae do: name one, with --subfolder a/deep/sae ",
    ):
        ksparse.load(tmp_path)


def test_a_damaged_file_does_not_hide_the_saes_of_other_folders(make_sae, tmp_path):
    ksparse.save(make_sae(), tmp_path / "good")
    (tmp_path / "odd").mkdir()
    os.mkfifo(tmp_path / "odd" / "8.pt")
    with pytest.raises(InputError, match="holds no SAE itself; its folders good do"):
        ksparse.load(tmp_path)


def test_tensors_have_one_reader():
    from ksparse.sae import serialization, tensor_files

    assert foreign.CheckedTensors is tensor_files.CheckedTensors is serialization.CheckedTensors
