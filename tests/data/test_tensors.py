"""Activations that anybody made: indexed where they are, trained on, and refused by file and row."""

import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ksparse
from ksparse import cli
from ksparse.data import tensor_files
from ksparse.data import tensors as module
from ksparse.data.sharded import ShardStream, open_shards
from ksparse.data.tensors import Tensors, write_index
from ksparse.errors import CorruptError, InputError, NonFiniteError

D, ROWS = 8, 3600


def rows(count=ROWS, seed=0, width=D):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def write_safetensors(file, x):
    save_file({"x": x.bfloat16()}, file)


def write_named(file, x):
    save_file({"acts": x, "other": x[:, :2].contiguous(), "tokens": torch.arange(len(x))}, file)


def write_npy(file, x):
    np.save(file, x.double().numpy())


def write_fortran(file, x):
    np.save(file, np.asfortranarray(x.numpy()))


def write_npz(file, x):
    np.savez(file, x=x.half().numpy(), documents=np.arange(len(x)) // 10)


def write_compressed(file, x):
    np.savez_compressed(file, x=x.numpy())


def write_parquet(file, x):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = arrow.array(x.numpy().ravel())
    column = arrow.FixedSizeListArray.from_arrays(values, x.shape[1])
    parquet.write_table(arrow.table({"x": column, "document": np.arange(len(x)) // 7}), file)


def write_requests(file, x):
    """What vLLM writes for one request: [tokens, layers, d]; layer 1 is x."""
    tokens, layers = torch.arange(len(x)), torch.stack([x + 1, x, x + 2], 1)
    save_file({"token_ids": tokens, "hidden_states": layers}, file)


KINDS = {
    "safetensors": (write_safetensors, ".safetensors", {}),
    "named": (write_named, ".safetensors", {"key": "acts"}),
    "npy": (write_npy, ".npy", {}),
    "fortran": (write_fortran, ".npy", {}),
    "npz": (write_npz, ".npz", {}),
    "compressed": (write_compressed, ".npz", {}),
    "parquet": (write_parquet, ".parquet", {}),
    "requests": (write_requests, ".safetensors", {"layer": 1}),
}


def make(folder, kind="npy", files=3, count=ROWS // 3):
    """Write files of a kind, and return the rows in all of them."""
    write, ending, options = KINDS[kind]
    folder.mkdir(exist_ok=True)
    parts = [rows(count, seed) for seed in range(files)]
    for number, part in enumerate(parts):
        write(folder / f"{number:03d}{ending}", part)
    return torch.cat(parts), options


def whole(folder):
    """Return all rows of the three splits in their order, and the side of each."""
    sides = {split: Tensors(folder, split) for split in module.SPLITS}
    x = torch.empty(sum(each.rows for each in sides.values()), sides["train"].d_model)
    for each in sides.values():
        x[torch.from_numpy(each.chosen)] = each.read(np.arange(each.rows))
    return x, sides


@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_is_trained_and_loaded_from_each_kind_of_file(kind, tmp_path):
    folder = tmp_path / "acts"
    x, options = make(folder, kind, **({"files": 40, "count": 30} if kind == "requests" else {}))
    assert write_index(folder, **options) == folder
    got, _ = whole(folder)
    tolerance = {"safetensors": 1e-2, "npz": 1e-3}.get(kind, 0)
    assert torch.allclose(got, x, rtol=tolerance, atol=tolerance / 10)
    run = ksparse.train(
        shards=folder, n_latents=16, k=2, tokens=512, batch=256, out=tmp_path / "run"
    )
    sae = ksparse.load(run)
    assert sae.shape.d_model == D and sae.metadata["acts"]["lm"] == ""
    assert sae.metadata["policy"]["split"] == "train"


def test_the_splits_have_every_row_once_and_whole_documents(tmp_path):
    make(tmp_path / "a", "npz")
    write_index(tmp_path / "a")
    _, sides = whole(tmp_path / "a")
    every = np.concatenate([each.chosen for each in sides.values()])
    assert sorted(every.tolist()) == list(range(ROWS))
    documents = [set(each.documents(np.arange(each.rows)).tolist()) for each in sides.values()]
    assert len(set.union(*documents)) == sum(map(len, documents)) == 120  # one number, one document
    assert sides["train"].document_names([3]) == ["document 3"]


def test_rows_of_no_document_are_held_out_in_blocks(tmp_path):
    make(tmp_path / "a")
    write_index(tmp_path / "a")
    train, held_out = Tensors(tmp_path / "a"), Tensors(tmp_path / "a", "held-out")
    blocks = [
        {(row // 1200, row % 1200 // module.BLOCK) for row in each.chosen.tolist()}
        for each in (train, held_out)
    ]
    assert not blocks[0] & blocks[1]
    names = held_out.document_names(held_out.documents(np.arange(held_out.rows)).tolist())
    row = held_out.chosen[-1]
    assert names[-1] == f"{row // 1200:03d}.npy, rows from {row % 1200 // 64 * 64:,}"
    assert (
        held_out.describe(held_out.rows - 1)
        == f"{tmp_path / 'a'}/{row // 1200:03d}.npy, row {row % 1200:,}"
    )


def test_a_new_file_leaves_each_row_on_its_side(tmp_path):
    make(tmp_path / "a")
    write_index(tmp_path / "a")
    before = set(Tensors(tmp_path / "a").chosen.tolist())
    np.save(tmp_path / "a" / "999.npy", rows(100, 9).numpy())
    write_index(tmp_path / "a")
    after = Tensors(tmp_path / "a").chosen
    assert set(after[after < ROWS].tolist()) == before and len(after) > len(before)


def test_a_batch_is_a_function_of_the_step_and_an_epoch_has_each_training_row_once(tmp_path):
    make(tmp_path / "a")
    write_index(tmp_path / "a")
    table = open_shards(tmp_path / "a")
    stream = ShardStream(table, batch=table.rows, seed=3)
    assert sorted(stream.rows(1).tolist()) == list(range(table.rows))
    batches = stream.batches()
    first, second = next(batches), next(batches)
    again = next(ShardStream(table, batch=table.rows, seed=3).batches(first.cursor))
    assert torch.equal(second.x, again.x) and not torch.equal(first.x, second.x)


def test_an_index_elsewhere_links_to_the_files_and_one_file_gets_a_folder_of_its_own(tmp_path):
    x, _ = make(tmp_path / "a", files=1)
    for folder in (
        write_index(tmp_path / "a", tmp_path / "index"),
        write_index(tmp_path / "a" / "000.npy"),
    ):
        assert (folder / "000.npy").is_symlink() and torch.equal(whole(folder)[0], x)
    assert folder == tmp_path / "a" / "000.npy.index"
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_a_file_that_is_used_again_is_opened_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_OPEN", 2)
    x, _ = make(tmp_path / "a", files=6, count=64)
    write_index(tmp_path / "a")
    table = Tensors(tmp_path / "a")
    order = np.arange(table.rows)[::-1].copy()
    assert torch.equal(table.read(order), x[torch.from_numpy(table.chosen[order])])
    assert len(table._tables) == 2


# ---- what is wrong when it is indexed ------------------------------------------------------------


def with_nan(folder):
    x = rows(400)
    x[37, 2] = torch.nan
    np.save(folder / "001.npy", x.numpy())


def too_large(folder):
    x = rows(400).double()
    x[5, 0] = 1e300
    np.save(folder / "001.npy", x.numpy())


def wider(folder):
    np.save(folder / "001.npy", rows(400, width=D + 1).numpy())


def cut(folder):
    np.save(folder / "001.npy", rows(1200).numpy())
    os.truncate(folder / "001.npy", 1000)


def cut_safetensors(folder):
    write_safetensors(folder / "001.safetensors", rows())
    os.truncate(folder / "001.safetensors", 500)


def cut_npz(folder):
    write_npz(folder / "001.npz", rows())
    os.truncate(folder / "001.npz", 900)


def no_parquet(folder):
    pytest.importorskip("pyarrow")
    (folder / "001.parquet").write_bytes(b"PAR1 and no more")


def parquet_list(folder):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"x": [[1.0, 2.0], [3.0]]}), folder / "001.parquet")


def parquet_null(folder):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = arrow.array([[1.0] * D, None], arrow.list_(arrow.float32(), D))
    parquet.write_table(arrow.table({"x": column}), folder / "001.parquet")


def whole_numbers(folder):
    np.save(folder / "001.npy", np.zeros((4, D), np.int64))


def three_dimensions(folder):
    np.save(folder / "001.npy", np.zeros((4, 5, D), np.float32))


def no_rows(folder):
    np.save(folder / "001.npy", np.zeros((0, D), np.float32))


def objects(folder):
    np.save(folder / "001.npy", np.array([{}]), allow_pickle=True)


def two_tensors(folder):
    save_file({"a": rows(4), "b": rows(4)}, folder / "001.safetensors")


def fewer_tokens(folder):
    save_file({"x": rows(4), "tokens": torch.arange(3)}, folder / "001.safetensors")


def negative_documents(folder):
    save_file({"x": rows(4), "documents": torch.tensor([0, 0, -1, 2])}, folder / "001.safetensors")


def some_documents(folder):
    save_file({"x": rows(4), "documents": torch.arange(4)}, folder / "001.safetensors")


WRONG = {
    with_nan: (NonFiniteError, "001.npy, row 37: an activation is NaN or infinite"),
    too_large: (NonFiniteError, "001.npy, row 5: an activation is NaN or infinite in float32"),
    wider: (InputError, "001.npy: its activations have the width 9, those of .*000.npy 8"),
    cut: (CorruptError, "001.npy is truncated or damaged"),
    cut_safetensors: (CorruptError, "001.safetensors is truncated or damaged"),
    cut_npz: (CorruptError, "001.npz is truncated or damaged"),
    no_parquet: (CorruptError, "001.parquet is truncated or damaged"),
    parquet_list: (InputError, "001.parquet.*list of varying length"),
    parquet_null: (InputError, "001.parquet, row 1: column 'x' is null"),
    whole_numbers: (InputError, "001.npy.*no tensor that can be activations"),
    three_dimensions: (InputError, "001.npy.*give --layer 0 to 4; if it is .texts, positions, d"),
    no_rows: (InputError, "001.npy.*no activation is in it"),
    objects: (CorruptError, "001.npy is truncated or damaged: it holds Python objects"),
    two_tensors: (
        InputError,
        r"several tensors.*a float32 \[4, 8\], b float32 \[4, 8\].*with --key",
    ),
    fewer_tokens: (InputError, r"its tokens have the shape \[3\], its activations 4 rows"),
    negative_documents: (InputError, "001.safetensors, row 2: its documents hold -1"),
    some_documents: (InputError, "differ in what says which document"),
}


@pytest.mark.parametrize("damage", WRONG, ids=lambda damage: damage.__name__)
def test_what_is_wrong_is_named_with_its_file_and_row_and_no_index_is_written(damage, tmp_path):
    make(tmp_path / "a", files=1)
    damage(tmp_path / "a")
    kind, message = WRONG[damage]
    with pytest.raises(kind, match=message):
        write_index(tmp_path / "a")
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_a_source_that_cannot_be_indexed_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        write_index(tmp_path / "none")
    with pytest.raises(InputError, match="no file of activations"):
        write_index(tmp_path)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(InputError, match="an ending that is not read"):
        write_index(tmp_path / "x.txt")
    make(tmp_path / "a", "named")
    with pytest.raises(InputError, match="has no tensor 'none'; it has acts"):
        write_index(tmp_path / "a", key="none")
    (tmp_path / "a" / "manifest.json").write_text('{"sha256": {}}')
    with pytest.raises(InputError, match="is no index of tensors"):
        write_index(tmp_path / "a", key="acts")


def test_parquet_without_its_package_says_which_to_install(tmp_path, monkeypatch):
    make(tmp_path / "a", "parquet")
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="needs the package pyarrow"):
        write_index(tmp_path / "a")


# ---- what is wrong when it is read ---------------------------------------------------------------


def change_a_number(folder):
    with (folder / "001.npy").open("r+b") as file:
        file.seek(128 + 8 * D * 37)
        file.write(b"\1")


def reorder(folder):
    x = np.load(folder / "001.npy")
    x[[3, 9]] = x[[9, 3]]
    np.save(folder / "001.npy", x)


def rename(folder):
    (folder / "000.npy").rename(folder / "t")
    (folder / "001.npy").rename(folder / "000.npy")
    (folder / "t").rename(folder / "001.npy")


LATER = {
    change_a_number: "001.npy has changed since it was indexed: its activations are others, somewhere in rows 35 to 39",
    reorder: "001.npy has changed.*its rows are in another order, somewhere in rows 0 to 9",
    rename: "000.npy has changed.*it has the content that 001.npy had",
    cut: "001.npy has changed.*it has 1,000 bytes, 76,928 then",
    wider: "001.npy has changed",
    lambda folder: (folder / "001.npy").unlink(): "001.npy is missing",
}


@pytest.mark.parametrize("damage", LATER, ids=lambda damage: damage.__name__)
def test_a_file_that_changes_after_it_was_indexed_is_refused_by_its_rows(damage, tmp_path):
    make(tmp_path / "a")
    write_index(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(CorruptError, match=LATER[damage]):
        Tensors(tmp_path / "a")


def test_a_number_that_becomes_nan_while_it_is_trained_on_is_named(tmp_path):
    make(tmp_path / "a", files=1)
    write_index(tmp_path / "a")
    table = Tensors(tmp_path / "a")
    array = np.load(tmp_path / "a" / "000.npy", mmap_mode="r+")
    array[table.chosen[5], 0] = np.nan
    array.flush()
    with pytest.raises(NonFiniteError, match=f"000.npy, row {table.chosen[5]:,}"):
        next(ShardStream(table, batch=table.rows, seed=0).batches())


def test_a_run_goes_on_with_the_same_bits_and_not_on_other_activations(tmp_path):
    make(tmp_path / "a")
    write_index(tmp_path / "a")

    def train(out, **more):
        return ksparse.train(
            shards=tmp_path / "a",
            n_latents=16,
            k=2,
            tokens=1024,
            batch=64,
            out=tmp_path / out,
            **more,
        )

    def stop(row):
        if row["step"] == 10:
            os.kill(os.getpid(), 2)

    with pytest.raises(ksparse.KsparseError, match="everything is saved"):
        train("stopped", observe=stop)
    resumed, undisturbed = ksparse.load(train("stopped")), ksparse.load(train("whole"))
    assert torch.equal(resumed.W_dec, undisturbed.W_dec)
    with pytest.raises(ksparse.KsparseError, match="everything is saved"):
        train("other", observe=stop)
    np.save(tmp_path / "a" / "000.npy", rows(400, 77).numpy())
    write_index(tmp_path / "a")
    with pytest.raises(InputError, match="begun on other activations"):
        train("other")


def test_the_held_out_curve_is_of_rows_that_are_not_trained_on(tmp_path):
    make(tmp_path / "a", "npz", count=2000)
    write_index(tmp_path / "a")
    run = ksparse.train(
        shards=tmp_path / "a", n_latents=16, k=2, tokens=1024, batch=128, held_out=50,
        out=tmp_path / "run",
    )  # fmt: skip
    assert run.curve()[-1]["loss"] < 1.5


def test_the_command_indexes_and_says_what_is_next(tmp_path, capsys):
    make(tmp_path / "a", "named")
    cli.main(["shard", "--from", str(tmp_path / "a"), "--key", "acts"])
    shown = capsys.readouterr().out
    assert f"indexed  {tmp_path / 'a'}: 3,600 rows of width 8 in 3 files" in shown
    cli.main(["shard", f"--from={tmp_path / 'a'}", "--key=acts", "--out", str(tmp_path / "b")])
    assert Tensors(tmp_path / "b").d_model == D


def test_an_archive_with_python_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([{}], dtype=object))
    with pytest.raises(CorruptError, match="Python objects"):
        tensor_files.open_table(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        archive.writestr("x.npy", b"no array")
    with pytest.raises(CorruptError, match="y.npz is truncated or damaged"):
        tensor_files.open_table(tmp_path / "y.npz")
