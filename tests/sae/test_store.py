"""An autoencoder comes back from disk as it went, or a message names what is wrong with the file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ksparse
from ksparse import files
from ksparse.errors import CorruptError, InputError
from ksparse.recipe import Recipe, to_toml
from ksparse.sae import store
from ksparse.sae.model import SAE, Shape


@pytest.fixture
def sae():
    torch.manual_seed(0)
    made = SAE(Shape(6, 20, 4, "dataset", 0.3), {"acts": {"site": "resid_post.1"}, "step": 7})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


@pytest.fixture
def folder(sae, tmp_path):
    """Return a folder without sums, as somebody else may have put it on the Hub."""
    store.write(sae, tmp_path)
    return tmp_path


def same(a, b):
    assert a.shape == b.shape and a.metadata == b.metadata
    assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def test_save_and_load_are_the_identity(sae, tmp_path):
    ksparse.save(sae, tmp_path / "sae")
    loaded = ksparse.load(tmp_path / "sae")
    same(sae, loaded)
    raw = torch.randn(3, 6)
    assert torch.equal(sae(raw), loaded(raw))
    assert {file.name for file in (tmp_path / "sae").iterdir()} == {"sae.safetensors", "sae.json", "manifest.json"}


def test_a_folder_without_sums_loads_too(sae, folder):
    same(sae, ksparse.load(folder))
    same(sae, ksparse.load(str(folder)))


def test_a_subfolder_may_be_named(sae, tmp_path):
    ksparse.save(sae, tmp_path / "layer" / "8")
    same(sae, ksparse.load(tmp_path, subfolder="layer/8"))


def test_the_loaded_autoencoder_can_be_trained(folder):
    loaded = ksparse.load(folder)
    loaded(torch.randn(3, 6)).sum().backward()
    assert loaded.W_enc.grad is not None


def test_any_float_type_on_disk_is_read_as_float32(sae, folder):
    save_file({key: value.half() for key, value in load_file(folder / store.WEIGHTS).items()}, folder / store.WEIGHTS)
    assert ksparse.load(folder).W_enc.dtype == torch.float32


def test_more_tensors_than_are_needed_do_no_harm(sae, folder):
    save_file(load_file(folder / store.WEIGHTS) | {"threshold": torch.zeros(1)}, folder / store.WEIGHTS)
    same(sae, ksparse.load(folder))


def change(folder, **changes):
    config = json.loads((folder / store.CONFIG).read_text()) | changes
    (folder / store.CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def tensors(folder, **changes):
    found = load_file(folder / store.WEIGHTS) | changes
    save_file({key: value for key, value in found.items() if value is not None}, folder / store.WEIGHTS)


@pytest.mark.parametrize("damage, error, message", [
    (lambda f: tensors(f, W_dec=torch.zeros(6, 20)), CorruptError, r"sae\.safetensors: tensor 'W_dec' has shape \[6, 20\], expected \[20, 6\]"),
    (lambda f: tensors(f, b_enc=None), CorruptError, r"sae\.safetensors lacks the tensor 'b_enc'; it has W_dec, W_enc, b_pre"),
    (lambda f: (f / store.WEIGHTS).write_bytes((f / store.WEIGHTS).read_bytes()[:-1]), CorruptError, r"sae\.safetensors is truncated or damaged"),
    (lambda f: (f / store.WEIGHTS).write_bytes((f / store.WEIGHTS).read_bytes()[:5]), CorruptError, r"sae\.safetensors is truncated or damaged"),
    (lambda f: (f / store.WEIGHTS).write_bytes(b""), CorruptError, r"sae\.safetensors is truncated or damaged"),
    (lambda f: (f / store.WEIGHTS).unlink(), CorruptError, r"sae\.safetensors is missing"),
    (lambda f: (f / store.CONFIG).write_text("{"), CorruptError, r"sae\.json is not JSON"),
    (lambda f: change(f, k=...), CorruptError, r"sae\.json lacks the key 'k'"),
    (lambda f: change(f, factor=...), CorruptError, r"sae\.json lacks the key 'factor'"),
    (lambda f: change(f, format=2), InputError, r"sae\.json has format 2; this version of ksparse reads 1"),
    (lambda f: change(f, format=...), InputError, r"sae\.json has format None"),
    (lambda f: change(f, k=21), InputError, r"k is 21, more than the 20 latents"),
    (lambda f: change(f, k="4"), InputError, r"k of an SAE is '4'"),
    (lambda f: change(f, normalize="x"), InputError, r"normalisation 'x' is unknown"),
    (lambda f: change(f, n_latents=21), CorruptError, r"tensor 'W_enc' has shape \[20, 6\], expected \[21, 6\]"),
    (lambda f: (f / store.CONFIG).unlink(), InputError, r"holds no SAE: expected sae\.json and sae\.safetensors, or a run with recipe\.toml; found sae\.safetensors"),
], ids=["wrong_shape", "missing_tensor", "truncated", "nearly_nothing", "empty", "no_weights", "half_a_config", "no_k", "no_factor", "unknown_format",
        "no_format", "k_too_large", "k_is_text", "unknown_normalisation", "another_n", "no_config"])
def test_what_is_wrong_is_named(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        ksparse.load(folder)
    assert str(folder) in str(caught.value) or "k " in str(caught.value) or "normalisation" in str(caught.value)


def test_a_flipped_bit_of_a_saved_autoencoder_is_noticed(sae, tmp_path):
    """safetensors itself takes it for a weight."""
    ksparse.save(sae, tmp_path / "sae")
    weights = tmp_path / "sae" / store.WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    load_file(weights)
    with pytest.raises(CorruptError, match="sae.safetensors is damaged"):
        ksparse.load(tmp_path / "sae")


def test_a_run_gives_its_newest_intact_checkpoint(sae, tmp_path):
    (tmp_path / "recipe.toml").write_text(to_toml(Recipe()))
    with pytest.raises(InputError, match="has no checkpoint to load: nothing has been saved yet"):
        ksparse.load(tmp_path)
    for step in (1, 2):
        sae.metadata["step"] = step
        with files.committed(tmp_path / "checkpoints" / f"step-{step:08d}") as tmp:
            store.write(sae, tmp)
    assert ksparse.load(tmp_path).metadata["step"] == 2
    for step in (2, 1):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / store.WEIGHTS).unlink()
        if step == 2:
            assert ksparse.load(tmp_path).metadata["step"] == 1
    with pytest.raises(InputError, match="has no checkpoint to load: .*step-00000002.*missing"):
        ksparse.load(tmp_path)


@pytest.mark.parametrize("source", ["nobody/nothing", "no/such/folder/anywhere", "nothing"])
def test_what_is_neither_here_nor_on_the_hub_is_refused(source):
    with pytest.raises(InputError, match=f"{source} is neither a folder here nor a Hub repository that can be reached"):
        ksparse.load(source)


def test_a_file_in_place_of_a_folder_is_refused(folder):
    with pytest.raises(InputError, match="holds no SAE: expected"):
        ksparse.load(folder / store.WEIGHTS)


def test_saving_over_a_folder_with_something_else_in_it_is_refused(sae, tmp_path):
    folder = tmp_path / "one"
    store.save(sae, folder)
    store.save(sae, folder)
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(
        InputError, match="holds thesis.tex, which would be lost; give a new folder"
    ):
        store.save(sae, folder)
    assert (folder / "thesis.tex").read_text() == "mine" and store.load(folder).shape == sae.shape
