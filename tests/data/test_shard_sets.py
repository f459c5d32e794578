"""Several processes write one set of shards, here or in an object store, and it is that of one process."""

import itertools
import shutil
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

import ksparse
from ksparse.data import shard_sets, shards
from ksparse.data.contexts import Corpus
from ksparse.data.shard_sets import ProcessPart
from ksparse.data.sharded import ShardStream
from ksparse.data.shards import Shards, write
from ksparse.errors import CorruptError, InputError
from ksparse.lm.model import LM
from ksparse.storage import cache, checksums, jsonio, stores
from ksparse.storage.stores import open_store
from ksparse.training.train import train

ROWS = 700


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "PAUSES", (0.0,))
    monkeypatch.setattr(shards, "_SECONDS_BETWEEN_LOOKS", 0.01)
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


class Killed(BaseException):
    pass


@pytest.fixture
def make(small_acts):
    """Return make(folder, rank, size, passes=): be one of several processes, killed after some passes of the LM."""

    def write_part(parent, rank=0, size=1, *, passes=10**6, rows=ROWS, progress=None, **changes):
        lm = LM(acts=small_acts(**{"lm_batch": 3} | changes))
        left = itertools.count(passes, -1)
        own = lm.acts_at

        def acts_at(sites, tokens, attention):
            if tokens.shape[1] == 16 and next(left) == 0:
                raise Killed
            return own(sites, tokens, attention)

        lm.acts_at = acts_at
        return write(
            lm,
            Corpus(lm.options, lm.tokenizer, "train"),
            parent,
            rows=rows,
            shard_rows=100,
            part=ProcessPart(rank, size),
            progress=progress or (lambda done: None),
        )

    return write_part


def content(folder):
    store, found = open_store(folder), {}
    for name in store.names():
        with store.reading(name) as file:
            found[name] = file.read_bytes()
    return found


@pytest.fixture
def whole(make, tmp_path):
    return content(make(tmp_path / "whole"))


PLACES = ["{}/acts", "memory://bucket{}/acts"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", [[0], [1, 0], [2, 1, 0], [7, 3, 1, 4, 2, 5, 6, 8, 0]])
def test_the_set_of_several_processes_has_the_bytes_of_one(make, whole, tmp_path, place, order):
    folders = [make(place.format(tmp_path), rank, len(order)) for rank in order]
    assert len({str(folder) for folder in folders}) == 1
    assert content(folders[0]) == whole and len(whole) > 8


@pytest.mark.parametrize("place", PLACES)
def test_processes_that_are_killed_are_continued_by_any_number(make, whole, tmp_path, place):
    parent = place.format(tmp_path)
    for rank, size, passes in [(1, 3, 4), (0, 2, 1), (2, 3, 4), (0, 3, 5)]:
        with pytest.raises(Killed):
            make(parent, rank, size, passes=passes)
    with pytest.raises(InputError, match="is not complete; run the same `ksparse shard` again"):
        Shards(stores.join(parent, Shards(tmp_path / "whole" / name_of(tmp_path)).folder.name))
    make(parent, 1, 2)
    assert content(make(parent, 0, 2)) == whole


def name_of(tmp_path):
    (folder,) = (tmp_path / "whole").iterdir()
    return folder.name


def test_a_process_runs_the_lm_on_its_own_shards_alone(make, tmp_path, monkeypatch):
    passes = {}
    for rank, size in [(0, 1), (2, 3), (1, 3), (0, 3)]:
        told = []
        monkeypatch.setattr(
            shards._Harvest, "_tell", lambda self, place, new=0: told.append(new) if new else None
        )
        make(tmp_path / str(size), rank, size)
        passes[rank, size] = len(told)
    assert sum(passes[rank, 3] for rank in range(3)) == passes[0, 1]
    assert max(passes[rank, 3] for rank in range(3)) < passes[0, 1] / 2


def wait(until):
    end = time.monotonic() + 50
    while not until():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_process_0_waits_for_the_others_and_tells_of_their_shards(
    make, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "_SECONDS_BETWEEN_COUNTS", 0.0)
    done = []
    waiting = threading.Thread(
        target=make, args=(tmp_path / "acts", 0, 3), kwargs={"progress": done.append}
    )
    waiting.start()
    wait(lambda: len([*(tmp_path / "acts").glob("*/[0-9]*.json")]) == 3)  # its own shards
    waiting.join(0.1)
    assert waiting.is_alive() and not [*(tmp_path / "acts").glob("*/documents.json")]
    make(tmp_path / "acts", 2, 3)
    make(tmp_path / "acts", 1, 3)
    waiting.join(20)
    (folder,) = (tmp_path / "acts").iterdir()
    assert content(folder) == whole
    assert done == sorted(done) and done[-1] == ROWS


def test_a_silent_process_is_told_of(make, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shards, "_SECONDS_OF_SILENCE", 0.02)
    waiting = threading.Thread(target=make, args=(tmp_path / "acts", 0, 2))
    waiting.start()
    wait(lambda: "the next that is missing is 00001.safetensors" in caplog.text)
    make(tmp_path / "acts", 1, 2)
    waiting.join(20)
    assert "If its process has ended, start the same command again" in caplog.text


def test_shards_of_a_text_that_was_cut_otherwise_are_written_again(make, tmp_path):
    make(tmp_path / "acts", 1, 2, lm_batch=2)
    mixed = make(tmp_path / "acts", lm_batch=3)
    alone = make(tmp_path / "alone", lm_batch=3)
    assert content(mixed) == content(alone)


def test_an_entry_that_is_damaged_is_written_again(make, whole, tmp_path):
    with pytest.raises(Killed):
        make(tmp_path / "acts", passes=7)
    (folder,) = (tmp_path / "acts").iterdir()
    (folder / "00001.json").write_text((folder / "00001.json").read_text()[:-40])
    assert content(make(tmp_path / "acts")) == whole


def test_what_an_earlier_version_left_half_written_is_continued(make, whole, tmp_path):
    """There the manifest listed each shard at once."""
    with pytest.raises(Killed):
        make(tmp_path / "acts", passes=12)
    (folder,) = (tmp_path / "acts").iterdir()
    entries = [jsonio.read_json(file) for file in sorted(folder.glob("[0-9]*.json"))]
    assert len(entries) > 2
    manifest = jsonio.read_json(folder / checksums.MANIFEST)
    manifest["shards"] = [
        {key: each[key] for key in ("file", "rows", "sha256")} for each in entries
    ]
    manifest |= {key: entries[-1][key] for key in ("place", "contexts")}
    jsonio.write_json(folder / checksums.MANIFEST, manifest | {"names_sha256": ""}, sealed=True)
    names = {int(i): name for each in entries for i, name in each["names"].items()}
    jsonio.write_json(folder / "documents.json", [names.get(i, "") for i in range(max(names) + 1)])
    for file in folder.glob("[0-9]*.json"):
        file.unlink()
    make(tmp_path / "acts", 1, 2)
    assert content(make(tmp_path / "acts", 0, 2)) == whole


def test_several_epochs_of_a_short_text_have_the_same_bytes_too(make, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("<|endoftext|>".join(f"the cat sat on {i} mats and saw" for i in range(12)))
    alone = content(make(tmp_path / "alone", text=str(short)))
    (folder,) = (tmp_path / "alone").iterdir()
    assert jsonio.read_json(folder / checksums.MANIFEST)["place"][0] > 1
    for rank in (2, 1):
        make(tmp_path / "acts", rank, 3, text=str(short))
    assert content(make(tmp_path / "acts", 0, 3, text=str(short))) == alone


def test_processes_that_would_cut_the_text_otherwise_are_refused(make, tmp_path):
    with pytest.raises(InputError, match="acts.lm_batch is 0, and 2 processes write one set"):
        make(tmp_path, 0, 2, lm_batch=0)


# ---- reading from an object store


def flip(place, name, at):
    store = open_store(place)
    with store.reading(name) as file:
        data = bytearray(file.read_bytes())
    data[at] ^= 1
    with store.writing(name) as file:
        file.write_bytes(data)


def cut(place, name):
    store = open_store(place)
    with store.reading(name) as file:
        data = file.read_bytes()
    with store.writing(name) as file:
        file.write_bytes(data[:-4])


def test_rows_of_an_object_store_are_those_of_a_folder(make, tmp_path):
    here, there = Shards(make(tmp_path / "acts")), Shards(make("memory://bucket/acts"))
    assert not (tmp_path / "cache").exists(), "nothing is fetched before it is needed"
    rows = np.random.default_rng(0).permutation(here.rows)[:200]
    assert torch.equal(here.read(rows), there.read(rows))
    assert np.array_equal(here.contexts(rows), there.contexts(rows))
    assert np.array_equal(here.documents(rows), there.documents(rows))
    assert here.names == there.names and here.rows == there.rows == len(
        there.read(np.arange(here.rows))
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: flip(f, "00001.safetensors", -5), r"00001\.safetensors is damaged: its SHA-256"),
        (lambda f: cut(f, "00002.safetensors"), r"00002\.safetensors is damaged: .* bytes there"),
        (lambda f: open_store(f).remove("00002.safetensors"), r"00002\.safetensors is missing"),
        (lambda f: flip(f, "documents.json", 5), r"documents\.json is damaged"),
        (lambda f: flip(f, "manifest.json", 30), r"manifest\.json "),
        (lambda f: open_store(f).remove("manifest.json"), r"manifest\.json is missing"),
    ],
)
def test_what_is_damaged_in_an_object_store_is_named(make, damage, message):
    folder = make("memory://bucket/acts")
    damage(folder)
    with pytest.raises(CorruptError, match=f"^{folder}/{message}"):
        whole = Shards(folder)
        whole.read(np.arange(whole.rows))


def test_a_set_that_is_not_there_is_named():
    with pytest.raises(InputError, match="memory://bucket/no is no folder of shards"):
        Shards("memory://bucket/no")


def test_a_set_larger_than_the_cache_is_refused_before_it_is_fetched(make, tmp_path, monkeypatch):
    folder = make("memory://bucket/acts")
    monkeypatch.setenv(cache.GIGABYTES, "1e-5")
    whole = Shards(folder)
    with pytest.raises(
        InputError, match=f"{folder} takes 0.0 GB, all of which is needed at the same"
    ):
        whole.read(np.arange(whole.rows))
    assert not (tmp_path / "cache").exists()


def bytes_held(folder):
    total = 0
    for file in folder.glob("*.safetensors"):
        with suppress(FileNotFoundError):  # a thread has just made room
            total += file.stat().st_size
    return total


def test_a_set_larger_than_the_cache_is_read_by_windows(make, tmp_path, monkeypatch):
    there, here = Shards(make("memory://bucket/acts", rows=2000)), Shards(make(tmp_path, rows=2000))
    size = there._bytes(range(len(there.ends)))
    monkeypatch.setenv(cache.GIGABYTES, str(size * 0.6 / 1e9))
    streams = [
        ShardStream(Shards(shards.folder), batch=64, seed=0, window=200) for shards in (here, there)
    ]
    batches = [itertools.islice(stream.batches(), 80) for stream in streams]
    for one, other in zip(*batches):
        assert torch.equal(one.x, other.x)
        assert bytes_held(tmp_path / "cache") <= 0.6 * size
    monkeypatch.setenv(cache.GIGABYTES, str(size * 0.1 / 1e9))
    with pytest.raises(
        InputError, match="or shuffle fewer activations together, with --acts.shard"
    ):
        next(ShardStream(Shards(there.folder), batch=64, seed=0, window=200).batches())


def test_an_sae_trained_from_an_object_store_has_the_same_bits(make, small_recipe, tmp_path):
    weights = []
    for parent in (tmp_path / "acts", "memory://bucket/acts"):
        folder = str(make(parent, lm_batch=8))
        run = train(small_recipe({"acts.shards": folder}), tmp_path / f"run{len(weights)}")
        assert run.recipe().acts.shards == folder
        weights.append(ksparse.load(run).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    result = ksparse.evaluate(run, names=["stats"])
    assert 0 < result["stats"]["nmse"]["value"] < 2


@pytest.mark.parametrize("documents", [True, False])
def test_tensors_in_an_object_store_are_indexed_trained_on_and_judged(
    small_recipe, tmp_path, documents
):
    from safetensors.torch import save_file

    from ksparse.data.tensors import Tensors, write_index

    store = open_store("memory://bucket/tensors")
    x = torch.randn(3, 400, 8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "here").mkdir()
    for number, part in enumerate(x):
        table = {"x": part.contiguous()}
        if documents:
            table["documents"] = torch.arange(400) // 10 + 40 * number
        save_file(table, tmp_path / "here" / f"{number}.safetensors")
        with store.writing(f"{number}.safetensors") as file:
            save_file(table, file)
    assert write_index("memory://bucket/tensors") == "memory://bucket/tensors"
    write_index(tmp_path / "here")
    here, there = Tensors(tmp_path / "here"), Tensors("memory://bucket/tensors")
    assert here.policy == there.policy
    rows = np.arange(here.rows)
    assert torch.equal(here.read(rows), there.read(rows))
    assert there.describe(0).startswith("memory://bucket/tensors/0.safetensors, row ")
    run = ksparse.train(small_recipe(), data="memory://bucket/tensors", out=tmp_path / "run")
    result = ksparse.evaluate(run, names=["stats"])
    assert 0 < result["stats"]["nmse"]["value"] < 2
    flip("memory://bucket/tensors", "1.safetensors", -5)
    with pytest.raises(CorruptError, match="memory://bucket/tensors/1.safetensors is damaged"):
        shutil.rmtree(tmp_path / "cache")
        Tensors("memory://bucket/tensors").read(rows)


def test_an_index_of_an_object_store_stays_there(tmp_path):
    from ksparse.data.tensors import write_index

    store = open_store("memory://bucket/tensors")
    with pytest.raises(
        InputError, match="memory://bucket/tensors is no folder with files of activ"
    ):
        write_index("memory://bucket/tensors")
    with store.writing("a.npy") as file:
        np.save(file, np.ones((4, 2), np.float32))
    with pytest.raises(InputError, match="cannot be in .*: it has links to the files"):
        write_index("memory://bucket/tensors", tmp_path / "index")
    with store.writing("b.npy") as file:
        np.save(file, np.ones((4, 3), np.float32))
    with pytest.raises(
        InputError, match="memory://bucket/tensors/b.npy: its activations have the w"
    ):
        write_index("memory://bucket/tensors")


def test_parts_of_a_process_are_its_numbers_modulo_how_many_there_are():
    assert [[n for n in range(7) if shard_sets.ProcessPart(r, 3).has(n)] for r in range(3)] == [
        [0, 3, 6],
        [1, 4],
        [2, 5],
    ]
