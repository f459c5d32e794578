"""An autoencoder comes back from disk as it went, or a message names what is wrong with the file."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import ksparse
from ksparse.config import Recipe, to_toml
from ksparse.errors import CorruptError, InputError
from ksparse.sae import serialization
from ksparse.sae.model import SAE, Shape
from ksparse.storage import checksums
from ksparse.storage.run_folder import shard_file


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
    serialization.write(sae, tmp_path)
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
    assert {file.name for file in (tmp_path / "sae").iterdir()} == {
        "sae.safetensors",
        "sae.json",
        "manifest.json",
    }


def test_a_folder_without_sums_loads_too(sae, folder):
    same(sae, ksparse.load(folder))
    same(sae, ksparse.load(str(folder)))


def test_a_subfolder_may_be_named(sae, tmp_path):
    ksparse.save(sae, tmp_path / "layer" / "8")
    same(sae, ksparse.load(tmp_path, subfolder="layer/8"))


def test_the_loaded_autoencoder_can_be_trained(folder):
    loaded = ksparse.load(folder).requires_grad_(True)
    loaded(torch.randn(3, 6)).sum().backward()
    assert loaded.W_enc.grad is not None


def test_any_float_type_on_disk_is_read_as_float32(sae, folder):
    save_file(
        {key: value.half() for key, value in load_file(folder / serialization.WEIGHTS).items()},
        folder / serialization.WEIGHTS,
    )
    assert ksparse.load(folder).W_enc.dtype == torch.float32


def change(folder, **changes):
    config = json.loads((folder / serialization.CONFIG).read_text()) | changes
    (folder / serialization.CONFIG).write_text(
        json.dumps({key: value for key, value in config.items() if value is not ...})
    )


def tensors(folder, **changes):
    found = load_file(folder / serialization.WEIGHTS) | changes
    save_file(
        {key: value for key, value in found.items() if value is not None},
        folder / serialization.WEIGHTS,
    )


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (
            lambda f: tensors(f, W_dec=torch.zeros(6, 20)),
            CorruptError,
            r"sae\.safetensors: tensor 'W_dec' has shape \[6, 20\], expected \[20, 6\]",
        ),
        (
            lambda f: tensors(f, b_enc=None),
            CorruptError,
            r"sae\.safetensors lacks the tensor 'b_enc'; it has W_dec, W_enc, b_pre",
        ),
        (
            lambda f: (f / serialization.WEIGHTS).write_bytes(
                (f / serialization.WEIGHTS).read_bytes()[:-1]
            ),
            CorruptError,
            r"sae\.safetensors is truncated or damaged",
        ),
        (
            lambda f: (f / serialization.WEIGHTS).write_bytes(
                (f / serialization.WEIGHTS).read_bytes()[:5]
            ),
            CorruptError,
            r"sae\.safetensors is truncated or damaged",
        ),
        (
            lambda f: (f / serialization.WEIGHTS).write_bytes(b""),
            CorruptError,
            r"sae\.safetensors is truncated or damaged",
        ),
        (
            lambda f: (f / serialization.WEIGHTS).unlink(),
            CorruptError,
            r"sae\.safetensors is missing",
        ),
        (
            lambda f: (f / serialization.CONFIG).write_text("{"),
            CorruptError,
            r"sae\.json is not JSON",
        ),
        (lambda f: change(f, k=...), CorruptError, r"sae\.json has no key 'k'"),
        (lambda f: change(f, factor=...), CorruptError, r"sae\.json has no key 'factor'"),
        (
            lambda f: change(f, format=2),
            InputError,
            r"sae\.json was written by a newer ksparse \(format 2\); this one reads up to 1",
        ),
        (lambda f: change(f, format=...), InputError, r"sae\.json has format 'None'"),
        (lambda f: change(f, k=21), InputError, r"k is 21, more than the 20 latents"),
        (lambda f: change(f, k="4"), CorruptError, r"sae\.json: 'k' is '4', expected int"),
        (lambda f: change(f, normalize="x"), InputError, r"normalisation 'x' is unknown"),
        (
            lambda f: change(f, n_latents=21),
            CorruptError,
            r"tensor 'W_enc' has shape \[20, 6\], expected \[21, 6\]",
        ),
        (
            lambda f: (f / serialization.CONFIG).unlink(),
            InputError,
            r"holds no SAE: expected sae\.json and sae\.safetensors, or a run with recipe\.toml; "
            r"found sae\.safetensors",
        ),
    ],
    ids=[
        "wrong_shape",
        "missing_tensor",
        "truncated",
        "nearly_nothing",
        "empty",
        "no_weights",
        "half_a_config",
        "no_k",
        "no_factor",
        "unknown_format",
        "no_format",
        "k_too_large",
        "k_is_text",
        "unknown_normalisation",
        "another_n",
        "no_config",
    ],
)
def test_what_is_wrong_is_named(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        ksparse.load(folder)
    assert str(folder) in str(caught.value)


WHOLE = torch.ones(20, 6)


@pytest.mark.parametrize("sums", [True, False], ids=["with_sums", "without_sums"])
@pytest.mark.parametrize(
    "key, value, message",
    [
        ("W_enc", WHOLE * torch.nan, "tensor 'W_enc' holds NaN or infinity"),
        ("W_dec", WHOLE * torch.inf, "tensor 'W_dec' holds NaN or infinity"),
        (
            "b_pre",
            torch.tensor([0.0, 0, 0, 0, 0, -torch.inf]),
            "tensor 'b_pre' holds NaN or infinity",
        ),
        ("W_enc", WHOLE.double() * 1e300, "tensor 'W_enc' holds NaN or infinity"),
        ("W_enc", WHOLE.bool(), "tensor 'W_enc' is of type BOOL, expected float64, float32"),
        (
            "W_enc",
            WHOLE.to(torch.int8),
            "tensor 'W_enc' is of type int8, expected float64, float32",
        ),
        (
            "b_enc",
            torch.ones(20, dtype=torch.int64),
            "tensor 'b_enc' is of type int64, expected float64, float32",
        ),
        (
            "W_dec",
            WHOLE.to(torch.complex64),
            "tensor 'W_dec' is of type C64, expected float64, float32",
        ),
        (
            "W_dec",
            WHOLE.to(torch.float8_e4m3fn),
            "tensor 'W_dec' is of type F8_E4M3, expected float64, float32",
        ),
        ("threshold", torch.ones(1), "holds threshold, which an SAE of this kind does not have"),
    ],
)
def test_a_tensor_that_is_not_of_finite_numbers_is_refused_by_name(
    folder, tmp_path, key, value, message, sums
):
    tensors(folder, **{key: value})
    if sums:
        with checksums.checksummed_dir(tmp_path / "again") as again:
            for name in (serialization.CONFIG, serialization.WEIGHTS):
                (folder / name).rename(again / name)
        folder = tmp_path / "again"
    with pytest.raises(CorruptError, match=message) as caught:
        ksparse.load(folder)
    assert serialization.WEIGHTS in str(caught.value)


@pytest.fixture
def sliced(sae, tmp_path):
    """Return a folder where two files hold half of the latents each, and a function that changes
    tensors of the second.
    """
    (tmp_path / "sliced").mkdir()
    serialization.write_shape(sae.shape, sae.metadata, tmp_path / "sliced")
    for i, rows in enumerate((slice(0, 10), slice(10, 20))):
        own = {
            key: value[rows] if serialization.by_rows(key, value.shape) else value
            for key, value in sae.state_dict().items()
        }
        serialization.write_weights(own, tmp_path / "sliced" / shard_file("sae", i, 2))
    second = tmp_path / "sliced" / shard_file("sae", 1, 2)

    def change_second(**changes):
        save_file(
            {
                key: value
                for key, value in (load_file(second) | changes).items()
                if value is not None
            },
            second,
        )

    return second.parent, change_second


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"W_enc": torch.full((10, 6), torch.nan)}, "tensor 'W_enc' holds NaN or infinity"),
        (
            {"W_enc": torch.ones(10, 6).bool()},
            "tensor 'W_enc' of sae is of different shapes or types in its 2 files",
        ),
        (
            {"W_enc": torch.ones(10, 5)},
            "tensor 'W_enc' of sae is of different shapes or types in its 2 files",
        ),
        (
            {"W_enc": torch.ones(9, 6)},
            "sae.1-of-2.safetensors: tensor 'W_enc' has 9 rows, others have 10",
        ),
        ({"b_enc": None}, r"tensor 'b_enc' has shape \[10\], expected \[20\]"),
        ({"b_enc": torch.tensor(1.0)}, r"tensor 'b_enc' has shape \[10\], expected \[20\]"),
        ({"extra": torch.ones(10)}, "holds extra, which an SAE of this kind does not have"),
    ],
)
def test_a_file_in_slices_is_checked_like_a_whole_one(sliced, changes, message):
    folder, change_second = sliced
    change_second(**changes)
    with pytest.raises(CorruptError, match=message):
        ksparse.load(folder)


def test_a_scalar_in_the_first_slice_is_no_tensor_of_the_others(sliced):
    folder, change_second = sliced
    change_second(b_enc=torch.tensor(1.0))
    first, second = (folder / f"sae.{number}-of-2.safetensors" for number in (0, 1))
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    with pytest.raises(CorruptError, match="'b_enc' of sae is of different shapes or types"):
        ksparse.load(folder)


def test_a_range_of_latents_is_read_without_the_rest(sae, sliced):
    folder, change_second = sliced
    change_second(
        W_enc=torch.cat([sae.W_enc[10:12].detach(), torch.full((8, 6), torch.nan)])
    )  # nobody asks for these
    weights = serialization.rows_of(folder, "sae", slice(8, 12))
    assert torch.equal(weights.take("W_enc", 4, 6), sae.W_enc[8:12])
    assert torch.equal(weights.take("b_pre", 6), sae.b_pre)


def test_a_shape_that_asks_for_more_memory_than_there_is_is_refused_by_the_header(folder):
    change(folder, n_latents=2**40, d_model=2**20)
    with pytest.raises(
        CorruptError, match=r"'W_enc' has shape \[20, 6\], expected \[1099511627776, 1048576\]"
    ):
        ksparse.load(folder)


ACTS = {"lm": "gpt2", "site": "resid_post.8", "text": "t"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation": [1]}, "'activation' is '[1]', expected str"),
        ({"activation": "relo"}, "activation 'relo' is unknown"),
        ({"normalize": {}}, "'normalize' is '{}', expected str"),
        ({"k": True}, "'k' is 'True', expected int"),
        ({"k": 4.0}, "'k' is '4.0', expected int"),
        ({"k": 0}, "k of an SAE is 0"),
        ({"d_model": 10**30}, "'d_model' is too large a number"),
        ({"factor": "x"}, "'factor' is 'x', expected int or float"),
        ({"factor": False}, "'factor' is 'False', expected int or float"),
        ({"factor": 0}, "factor of an SAE is 0"),
        ({"factor": -1.0}, "factor of an SAE is -1.0"),
        ({"factor": 1e300}, "factor of an SAE is 1e+300"),
        ({"factor": 10**400}, "'factor' is too large a number"),
        ({"bandwidth": 1}, "has the key 'bandwidth', which this ksparse does not know in format 1"),
        ({"format": True}, "has format 'True'"),
        ({"format": "1"}, "has format '1'"),
        ({"metadata": []}, "'metadata' is '[]', expected dict or null"),
        ({"metadata": {"acts": []}}, "'metadata.acts' is '[]', expected dict"),
        (
            {"metadata": {"acts": {**ACTS, "lm_dtyp": "float32"}}},
            "unknown key 'acts.lm_dtyp' in metadata.acts; did you mean 'acts.lm_dtype'?",
        ),
        (
            {"metadata": {"acts": {**ACTS, "lm_dtype": "evil"}}},
            "'acts.lm_dtype' in metadata.acts is 'evil'; it must be one of",
        ),
        (
            {"metadata": {"acts": {**ACTS, "site": 3}}},
            "'acts.site' in metadata.acts is 3, of type int; it must be of type str",
        ),
        (
            {"metadata": {"acts": {**ACTS, "context": True}}},
            "'acts.context' in metadata.acts is True",
        ),
        (
            {"metadata": {"acts": {**ACTS, "context": 10**30}}},
            "'acts.context' in metadata.acts is too large a number",
        ),
        (
            {"metadata": {"acts": {**ACTS, "context": 1}}},
            "metadata.acts: acts.context is 1; a context needs at least 3 tokens",
        ),
        ({"metadata": {"policy": 3}}, "'metadata.policy' is '3', expected dict"),
        (
            {"metadata": {"policy": {"bos_token": "x"}}},
            "'metadata.policy.bos_token' is 'x', expected int or null",
        ),
        (
            {"metadata": {"policy": {"keep": "some"}}},
            "'acts.keep' in metadata.policy is 'some'; it must be one of 'text', 'all'",
        ),
        ({"metadata": {"policy": {"kept": "text"}}}, "the unknown key 'metadata.policy.kept'"),
        ({"metadata": {"origin": {"site": 3}}}, "'metadata.origin.site' is '3', expected str"),
        ({"metadata": {"tokens": -1}}, "'metadata.tokens' is -1, expected a number from 0"),
        (
            {"metadata": {"dead_fraction_training": 2}},
            "'metadata.dead_fraction_training' is 2, expected a number from 0 to 1",
        ),
        ({"metadata": {"step": "7"}}, "'metadata.step' is '7', expected int"),
    ],
)
def test_what_sae_json_says_is_checked_key_by_key(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(CorruptError) as caught:
        ksparse.load(folder)
    assert message in str(caught.value) and serialization.CONFIG in str(caught.value)


def test_metadata_of_an_older_ksparse_and_what_users_add_is_kept(folder):
    said = {
        "acts": {"site": "resid_post.1"},
        "policy": {"keep": "text"},
        "notes": [1, {"a": None}],
        "tokens": None,
    }
    change(folder, metadata=said)
    assert ksparse.load(folder).metadata == said


def test_what_could_not_be_read_back_is_not_written(sae, tmp_path):
    sae.metadata["acts"] = {"lm": 3}
    with pytest.raises(InputError, match="'acts.lm' in metadata.acts is 3"):
        ksparse.save(sae, tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_the_policy_in_metadata_has_the_keys_that_a_corpus_writes(small_acts):
    from ksparse.data.contexts import Corpus
    from ksparse.lm.model import LM

    lm = LM(acts=small_acts(shuffle_tokens=True), device="cpu")
    policy = Corpus(lm.options, lm.tokenizer, "train").policy()
    of_kinds = {"tensors", "pretokenized", "chat", "chat_template", "roles"}
    assert set(policy) == set(serialization.POLICY) - of_kinds, "which only other kinds have"
    lm = LM(acts=small_acts(), device="cpu")
    assert "shuffle_tokens" not in Corpus(lm.options, lm.tokenizer, "train").policy()


def test_an_sae_that_names_no_lm_is_not_taken_for_one_of_the_default(sae):
    with pytest.raises(InputError, match="does not say which LM it was trained on"):
        serialization.acts_of(sae.metadata)
    assert serialization.acts_of({"acts": ACTS}).lm == "gpt2"
    with pytest.raises(InputError, match="unknown key 'acts.x' of this SAE's metadata"):
        serialization.acts_of({"acts": {**ACTS, "x": 1}})


@pytest.mark.parametrize(
    "name, message",
    [
        (serialization.WEIGHTS, "sae.safetensors is a FIFO, expected a file"),
        (serialization.CONFIG, "holds no SAE"),
        (checksums.MANIFEST, "manifest.json is a FIFO, expected a file"),
    ],
)
def test_a_fifo_in_the_place_of_a_file_is_refused_and_not_waited_for(sae, folder, name, message):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=message):
        checksums.verify(folder) if name == checksums.MANIFEST else ksparse.load(folder)


@pytest.mark.parametrize(
    "source", ["x" * 5000, "a/" * 2500, "with\0nul", "half\ud800", "nobody/" + "x" * 5000]
)
def test_a_source_that_no_file_can_have_as_its_name_is_refused_in_one_short_line(source):
    with pytest.raises(
        InputError,
        match="does not exist; give|is neither a folder here nor a Hub repository that can be",
    ) as caught:
        ksparse.load(source)
    assert len(str(caught.value)) < 600 and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("subfolder", ["layer.8", "x" * 5000, "a\0b"])
def test_a_subfolder_that_is_not_there_is_named(sae, tmp_path, subfolder):
    ksparse.save(sae, tmp_path / "sae")
    with pytest.raises(InputError, match=f"sae has no '{subfolder[:1]}"):
        ksparse.load(tmp_path / "sae", subfolder=subfolder)


def test_a_flipped_bit_of_a_saved_autoencoder_is_noticed(sae, tmp_path):
    """safetensors itself takes it for a weight."""
    ksparse.save(sae, tmp_path / "sae")
    weights = tmp_path / "sae" / serialization.WEIGHTS
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
        with checksums.checksummed_dir(tmp_path / "checkpoints" / f"step-{step:08d}") as tmp:
            serialization.write(sae, tmp)
    assert ksparse.load(tmp_path).metadata["step"] == 2
    for step in (2, 1):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / serialization.WEIGHTS).unlink()
        if step == 2:
            assert ksparse.load(tmp_path).metadata["step"] == 1
    with pytest.raises(InputError, match="has no checkpoint to load: .*step-00000002.*missing"):
        ksparse.load(tmp_path)


@pytest.mark.parametrize("source", ["nobody/nothing", "no/such/folder/anywhere", "nothing"])
def test_what_is_neither_here_nor_on_the_hub_is_refused(source):
    with pytest.raises(
        InputError,
        match=f"{source} (does not exist; give|is neither a folder here nor a Hub repository)",
    ):
        ksparse.load(source)


def test_a_file_in_place_of_a_folder_is_refused(folder):
    with pytest.raises(InputError, match="holds no SAE: expected"):
        ksparse.load(folder / serialization.WEIGHTS)


def test_saving_over_a_folder_with_something_else_in_it_is_refused(sae, tmp_path):
    folder = tmp_path / "one"
    serialization.save(sae, folder)
    serialization.save(sae, folder)
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(
        InputError, match="holds thesis.tex, which would be lost; give a new folder"
    ):
        serialization.save(sae, folder)
    assert (folder / "thesis.tex").read_text() == "mine" and serialization.load(
        folder
    ).shape == sae.shape
