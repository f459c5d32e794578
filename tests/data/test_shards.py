"""Shards hold what the LM gives, survive a kill, and are refused when anything about them is wrong."""

import dataclasses
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch

from ksparse.data import shards as module
from ksparse.data.contexts import Corpus
from ksparse.data.sharded import ShardStream
from ksparse.data.shards import Shards, write, write_sites
from ksparse.errors import CorruptError, InputError, NonFiniteError
from ksparse.lm import agreement
from ksparse.lm.model import LM
from ksparse.storage import atomic, checksums, jsonio, stores

ROWS = 500


@pytest.fixture
def make(small_acts):
    """Return make(folder, dtype=, rows=, ...): write shards of 150 rows, three contexts at a time."""

    def write_them(
        parent,
        *,
        dtype="float32",
        rows=ROWS,
        shard_rows=150,
        split="train",
        progress=lambda done: None,
        **changes,
    ):
        lm = LM(acts=small_acts(lm_batch=3, **changes))
        return write(
            lm,
            Corpus(lm.options, lm.tokenizer, split),
            parent,
            rows=rows,
            dtype=dtype,
            shard_rows=shard_rows,
            progress=progress,
        )

    return write_them


def live(small_acts, rows):
    """Return at least so many activations with document, context and position, in the order of the text."""
    lm = LM(acts=small_acts(lm_batch=3))
    corpus = Corpus(lm.options, lm.tokenizer, "train")
    out = []
    for number, context in enumerate(itertools.islice(corpus.contexts(), rows // 10)):
        batch = corpus.batch([context])
        keep = batch.keep
        out.append(
            (
                lm.acts(batch.tokens, batch.attention)[keep],
                batch.documents[keep],
                torch.full((int(keep.sum()),), number),
                torch.arange(16)[keep[0]],
            )
        )
    return [torch.cat(column) for column in zip(*out)], corpus


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 1e-2)]
)
def test_what_is_read_is_what_the_lm_gives(make, small_acts, tmp_path, dtype, tolerance):
    shards = Shards(make(tmp_path, dtype=dtype))
    assert len(shards.parts) > 2 and ROWS <= shards.rows < ROWS + 3 * 16 and shards.d_model == 16
    (x, document, context, _), corpus = live(small_acts, 800)
    every = np.arange(shards.rows)
    got = shards.read(every)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, x[: shards.rows], rtol=tolerance, atol=tolerance)
    assert np.array_equal(shards.documents(every), document[: shards.rows]) and np.array_equal(
        shards.contexts(every), context[: shards.rows]
    )
    assert all(shards.names[i] == corpus.names[i] for i in set(shards.documents(every).tolist()))
    positions = np.concatenate([part.position for part in shards.parts])
    assert (
        positions.min() == 1
        and positions.max() == 15
        and np.array_equal(positions, live(small_acts, 800)[0][3][: shards.rows])
    )


def test_rows_may_be_read_in_any_order_and_twice(make, tmp_path):
    shards = Shards(make(tmp_path))
    whole = shards.read(np.arange(shards.rows))
    rows = np.array([shards.rows - 1, 0, 149, 150, 151, 0, 300, 299])
    assert torch.equal(shards.read(rows), whole[rows])
    assert shards.read(np.arange(0)).shape == (0, 16)


class Killed(BaseException):
    pass


def entry_rows(folder):
    """Return the rows of each shard of a set."""
    return [entry["rows"] for entry in jsonio.read_json(folder / checksums.MANIFEST)["shards"]]


@pytest.mark.parametrize(
    "where, number",
    [
        *itertools.product(
            ["before_a_pass", "before_a_shard_is_renamed", "before_an_entry"], [1, 2, 3]
        ),
        ("before_the_names", 1),
        *itertools.product(["before_the_manifest", "before_an_entry_is_removed"], [1, 2]),
    ],
)
def test_a_killed_writer_goes_on_and_the_result_is_the_same(
    make, tmp_path, monkeypatch, where, number
):
    whole = make(tmp_path / "whole")
    calls = []

    def die(own, wanted):
        def call(path, *args, **options):
            if wanted(path):
                calls.append(1)
                if len(calls) == number:
                    raise Killed
            return own(path, *args, **options)

        return call

    with monkeypatch.context() as patch:
        if where == "before_a_shard_is_renamed":
            patch.setattr(
                module.atomic,
                "sha256",
                die(
                    atomic.sha256,
                    lambda path: (
                        path.parent.name.startswith(".tmp-") and path.suffix == ".safetensors"
                    ),
                ),
            )
        elif where == "before_an_entry_is_removed":
            own = stores.Store.remove
            patch.setattr(
                stores.Store, "remove", lambda self, name: die(own, lambda store: True)(self, name)
            )
        elif where != "before_a_pass":
            wanted = {
                "before_an_entry": r"\d+\.json",
                "before_the_names": module.NAMES,
                "before_the_manifest": checksums.MANIFEST,
            }[where]
            patch.setattr(
                module.jsonio,
                "write_json",
                die(jsonio.write_json, lambda path: re.fullmatch(wanted, path.name)),
            )
        stop = (
            {"progress": die(lambda done: None, lambda done: True)}
            if where == "before_a_pass"
            else {}
        )
        with pytest.raises(Killed):
            make(tmp_path / "killed", **stop)
    unfinished = tmp_path / "killed" / whole.name
    entries = len([*unfinished.glob("[0-9]*.json")])
    if where == "before_an_entry_is_removed":
        assert Shards(unfinished).rows >= ROWS
    elif (unfinished / checksums.MANIFEST).exists():
        with pytest.raises(
            InputError, match="is not complete; run the same `ksparse shard` again to finish it"
        ):
            Shards(unfinished)
    done = []
    again = make(tmp_path / "killed", progress=done.append)
    kept = ROWS if where == "before_an_entry_is_removed" else sum(entry_rows(whole)[:entries])
    assert done[0] == min(ROWS, kept), "what was written is kept"
    assert again.name == whole.name
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }


def test_complete_shards_are_not_written_again(make, tmp_path):
    folder = make(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert make(tmp_path) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_other_activations_land_in_another_folder(make, tmp_path):
    options = [
        {},
        {"dtype": "float16"},
        {"rows": 400},
        {"site": "resid_post.0"},
        {"context": 12},
        {"borders": "split"},
        {"keep": "all"},
        {"bos": "none"},
        {"split": "validation", "rows": 100},
    ]
    assert len({make(tmp_path, **option).name for option in options}) == len(options)


def test_what_does_not_change_the_activations_does_not_change_the_folder(make, tmp_path):
    assert make(tmp_path, mix=64) == make(tmp_path, normalize="none") == make(tmp_path)


def test_activations_that_are_not_finite_are_refused_with_the_document(make, tmp_path, monkeypatch):
    own = LM.acts_at
    monkeypatch.setattr(agreement, "check_passes_agree", lambda lm: None)
    monkeypatch.setattr(
        LM, "acts_at", lambda self, *args: {site: x / 0 for site, x in own(self, *args).items()}
    )
    with pytest.raises(
        NonFiniteError,
        match=r"activations at resid_post\.1 are NaN or infinite in document 'words\.txt:\d+'",
    ):
        make(tmp_path)


def test_activations_too_large_for_float16_are_refused_and_not_written_as_infinity(
    make, tmp_path, monkeypatch
):
    own = LM.acts_at
    monkeypatch.setattr(agreement, "check_passes_agree", lambda lm: None)
    monkeypatch.setattr(
        LM, "acts_at", lambda self, *args: {site: x * 1e5 for site, x in own(self, *args).items()}
    )
    assert Shards(make(tmp_path / "wide")).rows >= ROWS
    with pytest.raises(
        NonFiniteError, match=r"NaN or infinite in document .words\.txt:\d+., as float16"
    ):
        make(tmp_path / "narrow", dtype="float16")


def test_several_sites_in_one_pass_are_what_each_is_alone(small_acts, tmp_path, monkeypatch):
    sites = ("resid_post.1", "mlp_out.0", "resid_pre.0")
    alone = []
    for site in sites:
        lm = LM(acts=small_acts(site=site))
        alone.append(
            write(
                lm,
                Corpus(lm.options, lm.tokenizer, "train"),
                tmp_path / "alone",
                rows=200,
                shard_rows=100,
            )
        )
    lm = LM(acts=small_acts(site=sites[0]))
    passes, own = [], lm.forward
    monkeypatch.setattr(lm, "forward", lambda *args: passes.append(1) or own(*args))
    together = write_sites(
        lm,
        Corpus(lm.options, lm.tokenizer, "train"),
        tmp_path / "together",
        sites,
        rows=200,
        shard_rows=100,
    )
    for one, other in zip(alone, together, strict=True):
        assert one.name == other.name
        assert {file.name: file.read_bytes() for file in one.iterdir()} == {
            file.name: file.read_bytes() for file in other.iterdir()
        }
    shutil.rmtree(together[1])
    before = len(passes)
    assert (
        write_sites(
            lm,
            Corpus(lm.options, lm.tokenizer, "train"),
            tmp_path / "together",
            sites,
            rows=200,
            shard_rows=100,
        )
        == together
    )
    assert {file.name: file.read_bytes() for file in together[1].iterdir()} == {
        file.name: file.read_bytes() for file in alone[1].iterdir()
    }
    assert len(passes) == 2 * before, "the same passes again"


def test_sites_that_were_written_before_stay_and_the_others_join_in_one_pass(small_acts, tmp_path):
    """One is complete, one was stopped after other rows than the rest have, two are new."""
    sites = [*(f"resid_post.{i}" for i in range(3)), "mlp_out.0"]

    def written(parent, sites, **options):
        lm = LM(acts=small_acts(site=sites[0]))
        corpus = Corpus(lm.options, lm.tokenizer, "train")
        return write_sites(lm, corpus, tmp_path / parent, sites, rows=200, **options)

    def stop(done):
        if done > 60:
            raise KeyboardInterrupt

    alone = [written("alone", [site], shard_rows=100)[0] for site in sites]
    before = written("acts", sites[:1], shard_rows=100)[0]
    kept = {file.name: file.read_bytes() for file in before.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        written("acts", sites[1:2], shard_rows=40, progress=stop)
    folders = written("acts", sites, shard_rows=100)
    assert [folder.name for folder in folders] == [folder.name for folder in alone]
    assert {file.name: file.read_bytes() for file in before.iterdir()} == kept
    for one, other in zip(map(Shards, alone), map(Shards, folders), strict=True):
        assert one.rows <= other.rows
        rows = np.arange(one.rows)
        torch.testing.assert_close(one.read(rows), other.read(rows))
        assert (one.documents(rows) == other.documents(rows)).all()
        assert (one.contexts(rows) == other.contexts(rows)).all()


# ---- what is wrong is refused


def flip(file, at):
    whole = bytearray(file.read_bytes())
    whole[at] ^= 1
    file.write_bytes(whole)


def manifest(folder, change):
    table = jsonio.read_json(folder / checksums.MANIFEST)
    change(table)
    jsonio.write_json(folder / checksums.MANIFEST, table, sealed=True)


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (
            lambda f: flip(f / "00001.safetensors", -5),
            CorruptError,
            r"00001\.safetensors is damaged: its SHA-256",
        ),
        (
            lambda f: flip(f / "00000.safetensors", 20),
            CorruptError,
            r"00000\.safetensors is damaged",
        ),
        (
            lambda f: (f / "00001.safetensors").write_bytes(
                (f / "00001.safetensors").read_bytes()[:-4]
            ),
            CorruptError,
            r"00001\.safetensors is damaged",
        ),
        (
            lambda f: (f / "00002.safetensors").unlink(),
            CorruptError,
            r"00002\.safetensors is missing",
        ),
        (lambda f: flip(f / "documents.json", 5), CorruptError, r"documents\.json is damaged"),
        (lambda f: (f / checksums.MANIFEST).unlink(), CorruptError, r"manifest\.json is missing"),
        (
            lambda f: (f / checksums.MANIFEST).write_text("{"),
            CorruptError,
            r"manifest\.json is not JSON",
        ),
        (
            lambda f: manifest(f, lambda m: m["shards"][0].update(file="../x.safetensors")),
            CorruptError,
            r"names '\.\./x\.safetensors', which is not a file of its own folder",
        ),
        (
            lambda f: manifest(f, lambda m: m["shards"][0].update(file="/etc/passwd")),
            CorruptError,
            r"names '/etc/passwd', which is not a file",
        ),
        (
            lambda f: (f / checksums.MANIFEST).write_text(
                (f / checksums.MANIFEST).read_text().replace('"d_model": 16', '"d_model": 17')
            ),
            CorruptError,
            r"manifest\.json was altered",
        ),
        (
            lambda f: manifest(f, lambda m: m.update(d_model=17)),
            CorruptError,
            r"column 'x' is F32 of shape .*, the manifest speaks of F32 of shape \[\d+, 17\]",
        ),
        (
            lambda f: manifest(f, lambda m: m["shards"][0].update(rows="many")),
            CorruptError,
            r"is no shard; expected its file, rows and sha256",
        ),
        (
            lambda f: manifest(f, lambda m: m.update(shards=7)),
            CorruptError,
            r"'shards' is '7', expected list",
        ),
        (
            lambda f: manifest(f, lambda m: m.update(format=2)),
            InputError,
            r"manifest\.json was written by a newer ksparse \(format 2\); this one reads up to 1",
        ),
        (
            lambda f: manifest(f, lambda m: m.update(complete=False, rows=9999)),
            InputError,
            r"is not complete; run the same `ksparse shard` again",
        ),
        *[
            (lambda f, wrong=wrong: manifest(f, wrong), CorruptError, message)
            for wrong, message in [
                (
                    lambda m: m["shards"][0].update(rows=0),
                    r"manifest\.json: rows of '00000\.safetensors' is 0; expected a number of at least 1",
                ),
                (lambda m: m["shards"][0].update(rows=-5), r"rows of '00000\.safetensors' is -5"),
                (lambda m: m["shards"][0].update(rows=10**300), r"is 1000+; expected a number"),
                (lambda m: m["shards"][0].update(rows=True), r"is no shard; expected"),
                (lambda m: m.update(rows=0), r"rows is 0; expected"),
                (lambda m: m.update(d_model=-1), r"d_model is -1; expected"),
                (lambda m: m.update(shards=[]), r"says complete, with 0 of \d+ rows in its shards"),
                (lambda m: m.update(complete=False), r"says not complete, with \d+ of \d+ rows"),
                (lambda m: m.update(rows=9999), r"says complete, with \d+ of 9,999 rows"),
                (
                    lambda m: m.update(dtype="int8"),
                    r"'dtype' is 'int8'; expected float32, float16, bfloat16",
                ),
                (lambda m: m.update(dtype=None), r"'dtype' is 'None', expected str"),
                (
                    lambda m: m.update(dtype="bfloat16"),
                    r"column 'x' is F32 .*, the manifest speaks of BF16",
                ),
                (lambda m: m.update(place=[0, 1]), r"'place' is \[0, 1\] and"),
                (lambda m: m.update(place=[0, "1", 2]), r"'place' is"),
                (
                    lambda m: m.update(contexts=-1),
                    r"'contexts' -1; expected three numbers and one, none below 0",
                ),
            ]
        ],
    ],
    ids=[
        "flipped_bit",
        "flipped_bit_in_a_header",
        "truncated",
        "deleted",
        "names_altered",
        "no_manifest",
        "half_a_manifest",
        "outside",
        "absolute",
        "altered",
        "d_model",
        "rows",
        "no_list",
        "format",
        "incomplete",
        "no_rows_in_a_shard",
        "negative",
        "endless",
        "true",
        "no_rows",
        "no_width",
        "no_shards",
        "complete_but_says_not",
        "not_complete_but_says_so",
        "int8",
        "no_dtype",
        "other_dtype",
        "short_place",
        "words",
        "contexts",
    ],
)
def test_damaged_shards_are_refused_and_the_file_named(make, tmp_path, damage, error, message):
    folder = make(tmp_path)
    (tmp_path / "x.safetensors").write_bytes((folder / "00000.safetensors").read_bytes())
    damage(folder)
    with pytest.raises(error, match=message):
        Shards(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda x: {"context": None},
            r"column 'context' is nothing of shape none, the manifest speaks of I32 of shape \[\d+\]",
        ),
        (
            lambda x: {"x": x["x"].double()},
            r"column 'x' is F64 of shape \[\d+, 16\], the manifest speaks of F32",
        ),
        (lambda x: {"x": x["x"].half()}, r"column 'x' is F16"),
        (lambda x: {"x": x["x"].view(torch.int32)}, r"column 'x' is I32"),
        (
            lambda x: {"document": x["document"].view(torch.float32)},
            r"column 'document' is F32 of shape \[\d+\], the manifest speaks of I32",
        ),
        (lambda x: {"position": x["position"].long()}, r"column 'position' is I64"),
        (
            lambda x: {"document": x["document"][:, None]},
            r"column 'document' is I32 of shape \[\d+, 1\]",
        ),
        (
            lambda x: {"document": x["document"] - 9},
            r"column 'document' has numbers from -9 to -?\d+; expected 0 to \d+",
        ),
        (
            lambda x: {"document": x["document"] + 9999},
            r"column 'document' has numbers from 9999 to",
        ),
        (lambda x: {"context": x["context"] + 9999}, r"column 'context' has numbers"),
        (lambda x: {"position": -x["position"]}, r"column 'position' has numbers from -15 to"),
        (
            lambda x: {key: value[:0] for key, value in x.items()},
            r"column 'x' is F32 of shape \[0, 16\], the manifest speaks of F32 of shape \[\d+, 16\]",
        ),
    ],
    ids=[
        "gone",
        "double",
        "half",
        "bits",
        "floats",
        "long",
        "wider",
        "negative",
        "no_name",
        "no_context",
        "no_position",
        "no_rows",
    ],
)
def test_a_column_of_another_type_shape_or_range_is_refused_though_the_sums_are_right(
    make, tmp_path, change, message
):
    from safetensors.torch import load_file, save_file

    folder = make(tmp_path)
    file = folder / "00000.safetensors"
    whole = load_file(file)
    save_file(
        {
            key: value.contiguous()
            for key, value in (whole | change(whole)).items()
            if value is not None
        },
        file,
    )
    manifest(folder, lambda m: m["shards"][0].update(sha256=atomic.sha256(file)))
    with pytest.raises(CorruptError, match=rf"00000\.safetensors: {message}"):
        Shards(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="is no folder of shards; `ksparse shard` writes one"):
        Shards(tmp_path / "no")


def test_a_recipe_that_asks_for_other_activations_is_refused_and_the_keys_named(
    make, small_acts, tmp_path
):
    shards = Shards(make(tmp_path))
    shards.check_fits(small_acts(mix=64, normalize="none", lm_batch=1, shards=str(tmp_path)))
    with pytest.raises(
        InputError,
        match=r"are of other activations: acts\.site: the shards have 'resid_post\.1', the recipe 'resid_post\.0'",
    ):
        shards.check_fits(small_acts(site="resid_post.0"))
    with pytest.raises(
        InputError,
        match=r"acts\.context: the shards have 16, the recipe 32; acts\.keep: the shards have 'text', the recipe 'all'",
    ):
        shards.check_fits(dataclasses.replace(small_acts(), context=32, keep="all"))
    shards.manifest["acts"]["novelty"] = 1
    with pytest.raises(InputError, match=r"acts\.novelty: the shards have 1, the recipe None"):
        shards.check_fits(small_acts())


# ---- the stream of shards


@pytest.fixture
def stream(make, tmp_path):
    folder = make(tmp_path)
    return lambda **options: ShardStream(Shards(folder), **{"batch": 64, "seed": 0} | options)


def test_the_rows_of_a_batch_are_a_function_of_seed_and_step(stream):
    first, again, other = stream(), stream(), stream(seed=1)
    for step in (7, 0, 3, 20):
        assert np.array_equal(first.rows(step), again.rows(step)) and len(first.rows(step)) == 64
        assert not np.array_equal(first.rows(step), other.rows(step))


@pytest.mark.parametrize("batch", [64, 7, 600, 1300])
def test_each_epoch_is_a_permutation_of_all_rows_and_a_new_one(stream, batch):
    made = stream(batch=batch)
    n = made.shards.rows
    rows = np.concatenate([made.rows(step) for step in range(-(-3 * n // batch))])
    epochs = [rows[i * n : (i + 1) * n] for i in range(3)]
    assert all(np.array_equal(np.sort(epoch), np.arange(n)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


@pytest.mark.parametrize("batch", [64, 600])
def test_with_a_window_whole_files_are_shuffled_together_each_epoch_anew(stream, batch):
    made = stream(batch=batch, window=150)
    n, counts = made.shards.rows, made.shards.counts
    rows = np.concatenate([made.rows(step) for step in range(-(-3 * n // batch))])
    epochs = [rows[i * n : (i + 1) * n] for i in range(3)]
    assert all(np.array_equal(np.sort(epoch), np.arange(n)) for epoch in epochs)
    file = np.searchsorted(np.cumsum(counts), epochs[0], side="right")
    first = made._windows_of(0)[0]
    size = int(counts[first].sum())
    assert len(counts) > 3 and 150 <= size < n
    assert set(file[:size]) == set(first.tolist()) and not set(file[size:]) & set(first.tolist())
    assert np.abs(np.diff(epochs[0][:size])).mean() > 20, "shuffled within it"
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_stream_with_a_window_goes_on_from_every_cursor(stream):
    whole = list(itertools.islice(stream(window=200).batches(), 12))
    for number in range(11):
        after = next(stream(window=200).batches(whole[number].cursor))
        assert torch.equal(after.x, whole[number + 1].x)
    assert torch.equal(stream(window=200).sample(64), whole[0].x)


def test_going_on_from_every_cursor_gives_the_same_bits(stream):
    whole = list(itertools.islice(stream().batches(), 12))
    for number in range(11):
        after = next(stream().batches(json.loads(json.dumps(whole[number].cursor))))
        assert torch.equal(after.x, whole[number + 1].x) and torch.equal(
            after.documents, whole[number + 1].documents
        )


def test_batches_are_the_rows_and_their_documents(stream):
    made = stream()
    batch = next(made.batches({"step": 5}))
    assert torch.equal(batch.x, made.shards.read(made.rows(5)))
    assert np.array_equal(
        batch.documents, made.shards.documents(made.rows(5))
    ) and batch.cursor == {"step": 6}
    assert set(made.document_names(batch.documents)) == {
        made.shards.names[i] for i in batch.documents.tolist()
    }


def test_neighbours_in_a_batch_are_few_and_a_sample_moves_nothing(stream):
    made = stream()
    sample = made.sample(100)
    batches = made.batches()
    shares = []
    for _ in range(8):
        next(batches)
        shares.append(made.same_context_fraction())
    assert 0 < np.mean(shares) < 0.25  # 64 of 500 rows
    assert torch.equal(sample, made.sample(100)) and made.sample(10**6).shape == (
        made.shards.rows,
        16,
    )


def test_shards_with_nan_name_the_document(stream):
    made = stream()
    row = int(made.rows(0)[3])
    own = made.shards.read
    made.shards.read = lambda rows: own(rows).masked_fill(
        torch.from_numpy(rows == row)[:, None], torch.nan
    )
    name = made.shards.names[int(made.shards.documents(np.array([row]))[0])]
    with pytest.raises(
        NonFiniteError,
        match=f"1 activations of .* are NaN or infinite, the first in document '{name}'",
    ):
        next(made.batches())
