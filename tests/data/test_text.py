"""Text to documents to contexts: nothing lost, nothing twice, nothing on both sides; and what is wrong is named."""

import gzip
import itertools
import json
import lzma
import random
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from transformers import AutoTokenizer

from ksparse.config import ActsConfig
from ksparse.data import documents as module
from ksparse.data import sources
from ksparse.data.contexts import Corpus, TextCursor
from ksparse.data.documents import PIECE_CHARACTERS, documents
from ksparse.errors import InputError
from ksparse.lm import tokens
from ksparse.storage.rows import SEPARATOR

SPLITS = ("train", "validation", "held-out")


def paragraphs(count, words=30, seed=0):
    draw = random.Random(seed)
    return [
        f"{i} "
        + " ".join(draw.choice(["old", "dog", "naïve", "cat", "runs"]) for _ in range(words))
        + "\n"
        for i in range(count)
    ]


@pytest.fixture
def source(tmp_path):
    """Return source(documents, name): the Acts of a .txt file."""

    def make(texts, name="text.txt", **changes):
        (tmp_path / name).write_text(SEPARATOR.join(texts), encoding="utf-8")
        return ActsConfig(text=str(tmp_path / name), **changes)

    return make


def every(acts, split="train", start=0):
    return list(documents(acts, split, start))


# ---- documents and splits


def test_splits_are_disjoint_and_hold_everything(source):
    texts = paragraphs(400)
    found = {
        split: every(source(texts)) if split == "train" else every(source(texts), split)
        for split in SPLITS
    }
    assert sorted(doc.text for docs in found.values() for doc in docs) == sorted(texts)
    shares = [len(found[split]) / 400 for split in SPLITS]
    assert 0.78 < shares[0] < 0.92 and 0.01 < shares[1] < 0.1 and 0.05 < shares[2] < 0.16
    numbers = [doc.index for docs in found.values() for doc in docs]
    assert sorted(numbers) == list(range(400))


def test_a_document_is_always_on_the_same_side(source):
    """The held-out text stays so if the file grows, is sorted anew, or holds a document twice."""
    texts = paragraphs(200)
    before = {doc.text for doc in every(source(texts), "held-out")}
    after = {
        doc.text
        for doc in every(
            source(sorted(texts + paragraphs(100, seed=1) + texts[:50]), "other.txt"), "held-out"
        )
    }
    assert before and {doc for doc in after if doc in texts} == before


def test_documents_from_a_number_on_are_the_rest_of_all(source):
    acts = source(paragraphs(100))
    whole = every(acts)
    for start in (0, 1, 37, 99, 100, 1000):
        assert every(acts, start=start) == [doc for doc in whole if doc.index >= start]


def test_long_documents_are_cut_at_line_ends_and_lose_nothing(source):
    lines = "".join(f"line {i} of a long file\n" for i in range(5000))
    acts = source([lines, "x" * (2 * PIECE_CHARACTERS + 5), "short\n"])
    pieces = sorted(
        (doc for split in SPLITS for doc in every(acts, split)), key=lambda doc: doc.index
    )
    assert (
        "".join(doc.text for doc in pieces) == lines + "x" * (2 * PIECE_CHARACTERS + 5) + "short\n"
    )
    assert all(0 < len(doc.text) <= PIECE_CHARACTERS for doc in pieces) and len(
        {doc.name for doc in pieces}
    ) == len(pieces)
    assert all(
        doc.text.endswith("\n") and len(doc.text) >= PIECE_CHARACTERS // 2 for doc in pieces[:4]
    )
    assert pieces[-1].name == "text.txt:2" and pieces[0].name == "text.txt:0#0"


def test_the_built_in_text_has_disjoint_splits():
    names = {
        split: {
            doc.name.partition("#")[0]
            for doc in itertools.islice(documents(ActsConfig(text="pylm"), split), 60)
        }
        for split in SPLITS
    }
    assert all(names.values()) and not (
        names["train"] & names["held-out"] or names["train"] & names["validation"]
    )


# ---- readers


def reader_files(folder):
    texts = paragraphs(40)
    joined = SEPARATOR.join(texts)
    rows = "".join(json.dumps({"text": item, "label": 1}) + "\n" for item in texts)
    (folder / "a.txt").write_text(joined, encoding="utf-8")
    with lzma.open(folder / "b.txt.xz", "wt", encoding="utf-8") as stream:
        stream.write(joined)
    with gzip.open(folder / "c.txt.gz", "wt", encoding="utf-8") as stream:
        stream.write(joined)
    (folder / "d.jsonl").write_text(rows + "\n")
    with gzip.open(folder / "e.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(rows)
    with lzma.open(folder / "f.jsonl.xz", "wt", encoding="utf-8") as stream:
        stream.write(rows)
    write_parquet(folder / "g.parquet", {"label": [1] * 40, "text": texts})
    packed = [
        zstandard.ZstdCompressor().compress(part.encode()) for part in (joined[:300], joined[300:])
    ]
    (folder / "h.txt.zst").write_bytes(b"".join(packed))
    (folder / "i.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(rows.encode()))
    return texts


def write_parquet(file, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


@pytest.mark.parametrize(
    "name",
    [
        "a.txt",
        "b.txt.xz",
        "c.txt.gz",
        "d.jsonl",
        "e.jsonl.gz",
        "f.jsonl.xz",
        "g.parquet",
        "h.txt.zst",
        "i.jsonl.zst",
    ],
)
def test_every_kind_of_file_gives_the_same_documents(tmp_path, name):
    texts = reader_files(tmp_path)
    found = sorted(
        (doc for split in SPLITS for doc in every(ActsConfig(text=str(tmp_path / name)), split)),
        key=lambda doc: doc.index,
    )
    assert [doc.text for doc in found] == texts and all(
        doc.name == f"{name}:{doc.index}" for doc in found
    )


def test_a_folder_gives_the_documents_of_its_files_by_name(tmp_path):
    texts = reader_files(tmp_path)
    (tmp_path / "notes.md").write_text("not text for us")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "z.txt").write_text("the last one")
    found = sorted(
        (doc for split in SPLITS for doc in every(ActsConfig(text=str(tmp_path)), split)),
        key=lambda doc: doc.index,
    )
    assert [doc.text for doc in found] == texts * 9 + ["the last one"]


def test_a_large_file_is_read_in_parts_with_separators_across_their_ends(tmp_path, monkeypatch):
    texts = [("ab" * 9 + "\n") * 1000 + f"{i}" for i in range(120)]  # over 2 MB
    (tmp_path / "big.txt").write_text(SEPARATOR.join(texts))
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 10**9)
    found = sorted(
        (
            doc
            for split in SPLITS
            for doc in every(ActsConfig(text=str(tmp_path / "big.txt")), split)
        ),
        key=lambda doc: doc.index,
    )
    assert [doc.text for doc in found] == texts


def bad(tmp_path, kind):
    file = (
        tmp_path
        / {
            "missing": "no.txt",
            "not_utf8": "a.txt",
            "not_utf8_jsonl": "a.jsonl",
            "unknown_suffix": "a.docx",
            "no_suffix": "README",
            "truncated_xz": "a.txt.xz",
            "truncated_gz": "a.txt.gz",
            "altered_gz": "a.txt.gz",
            "not_xz": "a.txt.xz",
            "not_gz": "a.txt.gz",
            "truncated_jsonl_xz": "a.jsonl.xz",
            "not_json": "a.jsonl",
            "no_column": "a.jsonl",
            "not_a_table": "a.jsonl",
            "number_in_the_column": "a.jsonl",
            "empty_folder": "folder",
        }[kind]
    )
    whole = SEPARATOR.join(paragraphs(2000)).encode()
    rows = "".join(json.dumps({"text": item}) + "\n" for item in paragraphs(2000)).encode()
    squeezed = gzip.compress(whole)
    content = {
        "not_utf8": b"good text " * 100 + b"\xff\xfe",
        "not_utf8_jsonl": b'{"text": "\xff"}\n',
        "unknown_suffix": b"x",
        "no_suffix": b"x",
        "truncated_xz": lzma.compress(whole)[:-100],
        "truncated_gz": squeezed[:-100],
        "altered_gz": squeezed[:2000] + b"\xff" * 200 + squeezed[2200:],
        "not_xz": whole,
        "not_gz": whole,
        "truncated_jsonl_xz": lzma.compress(rows)[:-100],
        "not_json": b'{"text": "a"}\n{"text": \n',
        "no_column": b'{"content": "a", "id": 1}\n',
        "not_a_table": b'["a"]\n',
        "number_in_the_column": b'{"text": 3}\n',
    }
    if kind == "empty_folder":
        file.mkdir()
        (file / "notes.md").write_text("x")
    elif kind in content:
        file.write_bytes(content[kind])
    return file


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", r"text .*no\.txt does not exist; give a file or folder of \.txt"),
        ("not_utf8", r"a\.txt is not UTF-8: .*; convert it first"),
        ("not_utf8_jsonl", r"a\.jsonl, line 1: not UTF-8: .*; convert the file first"),
        ("unknown_suffix", r"text .*a\.docx is of no known kind; expected a name ending in \.txt"),
        ("no_suffix", r"text .*README is of no known kind"),
        ("truncated_xz", r"a\.txt\.xz cannot be read: .*truncated"),
        ("truncated_gz", r"a\.txt\.gz cannot be read: .*truncated"),
        ("altered_gz", r"a\.txt\.gz (cannot be read: .*truncated|is not UTF-8)"),
        ("not_xz", r"a\.txt\.xz cannot be read: .*not what its name says"),
        ("not_gz", r"a\.txt\.gz cannot be read: .*not what its name says"),
        ("truncated_jsonl_xz", r"a\.jsonl\.xz cannot be read after line [\d,]+: .*truncated"),
        ("not_json", r"a\.jsonl, line 2: not JSON"),
        (
            "no_column",
            r"a\.jsonl, line 1: no text in the column 'text'; there are content, id\. Name it with --acts\.text-field",
        ),
        ("not_a_table", r"a\.jsonl, line 1: no text in the column 'text'; there are list"),
        (
            "number_in_the_column",
            r"a\.jsonl, line 1: the column 'text' holds '3', of type int, not text",
        ),
        ("empty_folder", r"folder .*folder holds no text: expected files ending in \.txt"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(tmp_path, kind, message):
    with pytest.raises(InputError, match=message):
        every(ActsConfig(text=str(bad(tmp_path, kind))))


@pytest.mark.parametrize("name, package", [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    tmp_path, monkeypatch, name, package
):
    for name_ in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, name_, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=rf"needs the package {package}: pip install 'ksparse\["):
        every(ActsConfig(text=str(tmp_path / name)))


@pytest.mark.parametrize(
    "suffix, compress",
    [
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: zstandard.ZstdCompressor().compress(data)),
    ],
    ids=["gz", "xz", "zst"],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("kept", [0.02, 0.6, 0.999])
def test_a_compressed_text_that_is_cut_off_is_an_error_not_a_shorter_text(
    tmp_path, name, suffix, compress, kept
):
    texts = paragraphs(500)
    whole = compress(
        SEPARATOR.join(texts).encode()
        if name == "a.txt"
        else "".join(json.dumps({"text": item}) + "\n" for item in texts).encode()
    )
    (tmp_path / (name + suffix)).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(
        InputError,
        match=rf"{name}{suffix} cannot be read.*; it is truncated or not what its name says",
    ):
        every(ActsConfig(text=str(tmp_path / (name + suffix))))


def test_bytes_that_are_no_zstandard_are_refused(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(b"just some text, and not packed")
    with pytest.raises(InputError, match=r"a\.txt\.zst cannot be read: .*not what its name says"):
        every(ActsConfig(text=str(tmp_path / "a.txt.zst")))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"PAR1" + data[-40:],
        lambda data: data[:-8] + b"\xff" * 8,
        lambda data: data[:40] + b"\xff" * 200 + data[240:],
        lambda data: b"not parquet at all",
    ],
    ids=["empty", "half", "no_body", "no_footer", "garbled_page", "text"],
)
def test_a_damaged_parquet_is_one_error_that_names_it(tmp_path, damage):
    write_parquet(tmp_path / "a.parquet", {"text": paragraphs(300)})
    (tmp_path / "a.parquet").write_bytes(damage((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(
        InputError,
        match=r"a\.parquet cannot be read after row [\d,]+: .*; it is truncated or not what its name says",
    ):
        every(ActsConfig(text=str(tmp_path / "a.parquet")))


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"content": ["a"], "id": [1]}, "no text in the column 'text'; there are content, id"),
        ({"text": [1, 2]}, "the column 'text' holds int64, not text; there are text"),
        ({"text": [1.5]}, "the column 'text' holds double, not text"),
        ({"text": [["a"]]}, "the column 'text' holds list<"),
        ({"text": [{"a": "b"}]}, "the column 'text' holds struct<"),
        ({"text": [b"a"]}, "the column 'text' holds binary, not text"),
        ({"text": [None, None]}, "the column 'text' is null in every row"),
        ({"text": pyarrow.array([None, None], "string")}, "the column 'text' is null in every row"),
    ],
)
def test_a_parquet_without_such_a_column_of_text_is_named_with_those_there_are(
    tmp_path, columns, message
):
    write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(InputError) as error:
        every(ActsConfig(text=str(tmp_path / "a.parquet")))
    assert str(error.value).startswith(
        f"{tmp_path}/a.parquet: {message}"
    ) and "--acts.text-field" in str(error.value)


@pytest.mark.parametrize("form", ["string", "large_string", "string_view", "dictionary"])
def test_every_form_of_text_in_a_parquet_is_read_and_a_name_may_have_dots(tmp_path, form):
    texts = paragraphs(9)
    column = (
        pyarrow.array(texts).dictionary_encode()
        if form == "dictionary"
        else pyarrow.array(texts, getattr(pyarrow, form)())
    )
    write_parquet(tmp_path / "a.parquet", {"a": [1] * 9, "a.text": column})
    found = sorted(
        doc
        for split in SPLITS
        for doc in every(ActsConfig(text=str(tmp_path / "a.parquet"), text_field="a.text"), split)
    )
    assert [doc.text for doc in found] == texts


# ---- rows without text, and halves of characters


def put_rows(folder, kind, texts):
    """Write texts, some of them None or with half a character, as a source of that kind; return its Acts."""
    if kind == "parquet":
        encoded = [
            None if item is None else item.encode("utf-8", "surrogatepass") for item in texts
        ]
        array = pyarrow.array(encoded, "binary")
        array = pyarrow.Array.from_buffers(
            pyarrow.string(), len(array), array.buffers()
        )  # as another program may write it
        write_parquet(folder / "a.parquet", {"text": array})
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text(
            "".join(json.dumps({"text": item}) + "\n" for item in texts)
        )
    elif kind == "bytes":
        (folder / "a.jsonl").write_bytes(
            "".join(json.dumps({"text": item}, ensure_ascii=False) + "\n" for item in texts).encode(
                "utf-8", "surrogatepass"
            )
        )
    elif kind == "txt":
        (folder / "a.txt").write_bytes(SEPARATOR.join(texts).encode("utf-8", "surrogatepass"))
    return ActsConfig(
        text="owner/data" if kind == "hub" else str(next(folder.iterdir())), context=16
    )


@pytest.fixture
def hub(monkeypatch):
    """Return a list that stands for the rows of a data set of the Hub."""
    given: list = []
    monkeypatch.setitem(
        sys.modules,
        "datasets",
        types.SimpleNamespace(load_dataset=lambda *args, **options: iter(given)),
    )
    sources.warn_once.cache_clear()
    return given


def everything(acts):
    return [doc.text for doc in sorted(doc for split in SPLITS for doc in every(acts, split))]


@pytest.mark.parametrize(
    "kind, name",
    [
        ("jsonl", "a.jsonl"),
        ("bytes", "a.jsonl"),
        ("parquet", "a.parquet"),
        ("txt", "a.txt"),
        ("hub", "owner/data"),
    ],
)
def test_half_a_character_is_read_as_ufffd_and_told_once(
    tmp_path, tiny_lm, caplog, hub, kind, name
):
    texts = [f"{i} \ud83d lone" if i % 20 == 7 else f"{i} \U0001f600 both" for i in range(100)]
    hub.extend({"text": item} for item in texts)
    acts = put_rows(tmp_path, kind, texts)
    assert everything(acts) == [item.replace("\ud83d", "\ufffd") for item in texts]
    next(corpus(acts, tiny_lm()).contexts())  # and the tokenizer takes it
    assert [record.message for record in caplog.records] == [
        f"text {acts.text}: {name}:7 holds half a character (a lone surrogate), which is read as U+FFFD, like all others of this kind",
        f"text {acts.text}: 5 texts in all hold half a character (a lone surrogate), which is read as U+FFFD",
    ]


@pytest.mark.parametrize(
    "kind, name", [("jsonl", "a.jsonl"), ("parquet", "a.parquet"), ("hub", "owner/data")]
)
def test_null_rows_are_skipped_and_counted_and_the_first_is_named(
    tmp_path, caplog, hub, kind, name
):
    texts = paragraphs(300)
    given = [*texts[:200], None, *texts[200:], None]
    hub.extend({"text": item} for item in given)
    acts = put_rows(tmp_path, kind, given)
    assert everything(acts) == texts
    assert [record.message for record in caplog.records] == [
        f"text {acts.text}: {name}:200 holds null in the column 'text', which is skipped, like all others of this kind",
        f"text {acts.text}: 2 texts in all hold null in the column 'text', which is skipped",
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_a_column_that_is_null_in_every_row_is_an_error(tmp_path, hub, kind):
    hub.extend({"text": None} for _ in range(9))
    with pytest.raises(
        InputError,
        match=r"the column 'text' is null in every row; name another with --acts\.text-field",
    ):
        every(put_rows(tmp_path, kind, [None] * 9))


def test_a_connection_to_the_hub_that_breaks_says_after_which_row(hub, monkeypatch):
    def broken(*args, **options):
        yield {"text": "one"}
        raise ConnectionError("connection lost")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", broken)
    with pytest.raises(
        InputError,
        match=r"text 'owner/data' cannot be read after row 0 \(ConnectionError: connection lost\)",
    ):
        everything(ActsConfig(text="owner/data"))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"content": "x", "id": 3}, "no text in the column 'text'; there are content, id"),
        ({"text": 3}, "the column 'text' holds '3', of type int, not text; there are text"),
    ],
)
def test_a_row_of_the_hub_without_text_is_named(hub, row, message):
    hub.extend([{"text": "x"}, row])
    with pytest.raises(InputError, match=rf"owner/data, row 1: {message}"):
        everything(ActsConfig(text="owner/data"))


# ---- hostile files


@pytest.mark.parametrize(
    "line, message",
    [
        (b"[" * 100_000, "not JSON: maximum recursion depth"),
        (b'{"a":' * 100_000, "not JSON: maximum recursion depth"),
        (b'{"text": ' + b"9" * 5_000 + b"}", "not JSON: Exceeds the limit"),
        (b"\xef\xbb\xbf{}", "not JSON: Unexpected UTF-8 BOM"),
        (b'{"text": "a\0b"}', "not JSON: Invalid control character"),
        (b"\0", "not JSON"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
        ('{"text": "a"}'.encode("utf-16-le"), "not JSON"),
        (b'{"text": "\xc3"}', "not UTF-8"),
        (b"7", "no text in the column 'text'; there are int"),
        (b"null", "no text in the column 'text'; there are NoneType"),
        (b'{"text": ["a"]}', "the column 'text' holds"),
        (b'{"\\ud800": 1}', "no text in the column 'text'; there are \ufffd"),
        (
            b"{" + b", ".join(b'"%d": 1' % i for i in range(1000)) + b"}",
            "no text in the column 'text'; there are 0, 1, 2, ",
        ),
        (b'{"text": "' + b"x" * 3_000_000, "longer than 2,000,000 bytes"),
    ],
)
def test_a_hostile_line_is_named_and_the_message_is_short(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(module.rows, "LONGEST", 2_000_000)
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(InputError) as error:
        every(ActsConfig(text=str(tmp_path / "a.jsonl")))
    assert (
        str(error.value).startswith(f"{tmp_path}/a.jsonl, line 3: {message}")
        and len(str(error.value)) < 1_000
    )
    str(error.value).encode()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no_bom", "bom"])
def test_lines_end_as_they_may_and_a_byte_order_mark_is_no_text(tmp_path, end, mark):
    texts = paragraphs(20)
    (tmp_path / "a.jsonl").write_bytes(
        (mark + end.join(json.dumps({"text": item}) for item in texts)).encode()
    )
    (tmp_path / "a.txt").write_bytes((mark + SEPARATOR.join(texts).replace("\n", end)).encode())
    assert (
        everything(ActsConfig(text=str(tmp_path / "a.jsonl")))
        == everything(ActsConfig(text=str(tmp_path / "a.txt")))
        == texts
    )


@pytest.mark.parametrize(
    "content", ["some words of text\n".encode("utf-16-le"), bytes(10_000)], ids=["utf16", "zeros"]
)
def test_text_that_is_full_of_nul_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(
        InputError,
        match=r"a\.txt is not UTF-8 text: it is full of NUL, as UTF-16 and binary files are; convert it first",
    ):
        every(ActsConfig(text=str(tmp_path / "a.txt")))


class Counting(str):
    """A text that counts the characters that are looked at when it is split."""

    looked = 0

    def __add__(self, other):
        return Counting(str(self) + other)

    def __radd__(self, other):
        return Counting(other + str(self))

    def split(self, *args):
        Counting.looked += len(self)
        return super().split(*args)


def test_an_endless_line_is_looked_at_once_and_given_in_pieces_as_it_comes(tmp_path, monkeypatch):
    """What is held is less than two parts, however long the line: else each part would be joined to all before it."""
    part, number = 10_000, 50
    monkeypatch.setattr(module.rows, "_CHUNK", part)
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 1_000)
    parts = iter(["x" * part] * number)

    class Stream:
        read = staticmethod(lambda size: Counting(next(parts, "")))

    monkeypatch.setattr(Counting, "looked", 0)
    chunks = (chunk for _, chunk in module.rows._chunks(tmp_path, Stream()))
    pieces = module._pieces(iter([("line", chunks)]))
    next(pieces)
    assert Counting.looked <= 2 * part, "the first piece waits for the end of no line"
    assert sum(len(piece) for _, piece in pieces) == number * part - 1_000
    assert Counting.looked < 1.01 * number * part


@pytest.mark.parametrize("size", [1, 5, 13, 14, 1000])
def test_separators_are_seen_wherever_a_part_ends(tmp_path, monkeypatch, size):
    texts = ["one", "<|end", "two <|endoftext|", "|>", "three\n" * 40, "<" * 30, "four"]
    (tmp_path / "a.txt").write_text(SEPARATOR.join([" \n", *texts, "\t"]))
    monkeypatch.setattr(module.rows, "_CHUNK", size)
    assert everything(ActsConfig(text=str(tmp_path / "a.txt"))) == texts


def test_a_document_in_parts_is_cut_as_a_whole_one_is(monkeypatch):
    draw = random.Random(0)
    whole = "".join(
        draw.choice("abc \n") if draw.random() < 0.9 else "x" * draw.randrange(300)
        for _ in range(3_000)
    )
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 100)
    expected = list(module._pieces(iter([("a", whole), ("b", "short"), ("c", "")])))
    for size in (1, 7, 99, 100, 101, 5_000):
        chunks = (whole[at : at + size] for at in range(0, len(whole), size))
        assert (
            list(module._pieces(iter([("a", chunks), ("b", iter(["sh", "ort"])), ("c", iter([]))])))
            == expected
        )
    assert expected[0][0] == "a#0" and expected[-2:] == [("b", "short"), ("c", "")]


@pytest.mark.parametrize(
    "name, compress",
    [
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.xz", lzma.compress),
        ("a.jsonl.zst", lambda data: zstandard.ZstdCompressor().compress(data)),
    ],
)
def test_a_small_file_that_unpacks_to_an_endless_line_is_refused_before_it_is_read(
    tmp_path, monkeypatch, name, compress
):
    monkeypatch.setattr(module.rows, "LONGEST", 1_000_000)
    (tmp_path / name).write_bytes(
        compress(b'{"text": "good"}\n{"text": "' + b"x" * 5_000_000 + b'"}\n')
    )
    with pytest.raises(InputError, match=rf"{name}, line 2: longer than 1,000,000 bytes"):
        every(ActsConfig(text=str(tmp_path / name)))


def test_blanks_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module.rows, "LONGEST", 100_000)
    monkeypatch.setattr(module.rows, "_CHUNK", 10_000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b" " * 200_000))
    with pytest.raises(
        InputError, match=r"a\.txt\.gz has 100,000 blank characters in one document"
    ):
        every(ActsConfig(text=str(tmp_path / "a.txt.gz")))


def test_a_cell_of_a_parquet_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module.rows, "LONGEST", 1_000)
    write_parquet(tmp_path / "a.parquet", {"text": ["good", "x" * 2_000]})
    with pytest.raises(InputError, match=r"a\.parquet, row 1: longer than 1,000 bytes"):
        every(ActsConfig(text=str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("name", ["x" * 5_000, "a/" * 3_000])
def test_a_name_that_no_file_can_have_is_one_error(name):
    with pytest.raises(InputError, match="text '(x|a/).* cannot be looked up: File name too long"):
        every(ActsConfig(text=name))


@pytest.mark.parametrize("content", ["", "  \n", SEPARATOR, f"\n{SEPARATOR} {SEPARATOR}"], ids=repr)
def test_an_empty_text_is_refused_and_does_not_go_on_for_ever(source, tiny_lm, content):
    with pytest.raises(InputError, match="is empty: no document in it"):
        next(corpus(source([content]), tiny_lm()).contexts())


def test_a_text_without_a_document_on_the_asked_side_says_how_it_is_divided(source, tiny_lm):
    acts = source(["only one document"])
    missing = next(split for split in SPLITS if not every(acts, split))
    with pytest.raises(
        InputError,
        match=rf"has no 64-token context in its split '{missing}' \(1 documents in all, .*85 % train.*smaller --acts.context",
    ):
        next(corpus(acts, tiny_lm(), split=missing).contexts())


def test_documents_cut_below_a_context_are_an_error_that_names_the_limit(source, tiny_lm):
    acts = source(["words " * 200])
    split = next(split for split in SPLITS if every(acts, split))
    short = corpus(acts, tiny_lm(), split, per_document=20)
    with pytest.raises(
        InputError,
        match=r"has no 64-token context .*; only the first 20 tokens of each are used\); "
        r"give more text, or evaluate more of each document with a larger --per-document",
    ):
        next(short.contexts())


def test_an_unknown_split_is_refused(tiny_lm):
    with pytest.raises(
        InputError, match="split 'test' does not exist; there are train, validation, held-out"
    ):
        corpus(ActsConfig(), tiny_lm(), split="test")


# ---- contexts


def corpus(acts, folder, split="train", **options):
    return Corpus(acts, AutoTokenizer.from_pretrained(folder), split, **options)


def one_epoch(made, start=TextCursor()):
    return list(
        itertools.takewhile(
            lambda context: context.start.epoch == start.epoch, made.contexts(start)
        )
    )


def ids_of(made, acts, split="train"):
    """Return {document index: ids}, as the tokenizer gives them."""
    return {
        doc.index: made.tokenizer(doc.text, add_special_tokens=False)["input_ids"]
        for doc in documents(acts, split)
    }


NO_BOS = {"bos": None, "eos": "<|endoftext|>"}
NOTHING = {"bos": None, "eos": None, "pad": None}
POLICIES = {
    "bos": {},
    "no_bos": {"tokenizer": NO_BOS},
    "no_special": {"tokenizer": NOTHING},
    "bos_unused": {"bos": "none"},
}


@pytest.fixture(params=list(POLICIES))
def policy(request, source, tiny_lm):
    """Return policy(borders, ...): a corpus under each policy of BOS, and its Acts."""
    options = dict(POLICIES[request.param])
    folder = (
        tiny_lm("gpt2", tokenizer=options.pop("tokenizer"))
        if "tokenizer" in options
        else tiny_lm("gpt2")
    )

    def make(borders, texts=None, context=16, **changes):
        acts = source(
            texts or paragraphs(60, words=12),
            borders=borders,
            context=context,
            **options,
            **changes,
        )
        return corpus(acts, folder), acts

    return make


def test_packed_contexts_put_together_are_the_text_with_separators(policy):
    made, acts = policy("pack")
    contexts = one_epoch(made)
    assert len(contexts) > 50 and all(
        len(c.tokens) == len(c.documents) == 16 and min(c.documents) >= 0 for c in contexts
    )
    head = 0 if made.bos is None else 1
    stream = []
    for context in contexts:
        assert context.tokens[:head] == [made.bos][:head]
        body = list(zip(context.tokens[head:], context.documents[head:]))
        if head and context.start.offset == 0:
            body.insert(0, (made.separator, context.documents[0]))  # BOS did the separator's work
        stream += body
    expected = [
        (token, index)
        for index, ids in ids_of(made, acts).items()
        for token in ([] if made.separator is None else [made.separator]) + ids
    ]
    assert stream == expected[: len(stream)] and len(expected) - len(stream) < 16


def test_split_contexts_belong_to_one_document_each_and_hold_all_of_it(policy):
    made, acts = policy("split")
    head = 0 if made.bos is None else 1
    found: dict[int, list[int]] = {}
    for context in one_epoch(made):
        assert len(context.tokens) == len(context.documents) == 16
        owners = set(context.documents) - {-1}
        assert len(owners) == 1 and context.documents == sorted(context.documents, reverse=True)
        real = context.tokens[: 16 - context.documents.count(-1)]
        assert real[:head] == [made.bos][:head]
        found.setdefault(owners.pop(), []).extend(real[head:])
    for index, ids in ids_of(made, acts).items():
        assert ids[: len(found[index])] == found[index] and len(ids) - len(found[index]) < 3


@pytest.mark.parametrize("borders", ["pack", "split"])
def test_going_on_from_any_place_gives_the_same_contexts(policy, borders):
    made, acts = policy(borders)
    contexts = list(itertools.islice(made.contexts(), 150))
    assert contexts[-1].start.epoch >= 1, "the text is to be passed more than once"
    for number in range(0, 149, 3):
        again = policy(borders)[0]
        for place in (contexts[number].next, contexts[number + 1].start):
            assert (
                list(itertools.islice(again.contexts(place), 2))[: 149 - number]
                == contexts[number + 1 : number + 3]
            )


@pytest.mark.parametrize("borders", ["pack", "split"])
def test_each_epoch_is_the_same_text(policy, borders):
    made, _ = policy(borders)
    first = one_epoch(made)
    second = one_epoch(made, TextCursor(epoch=1))
    assert [(c.tokens, c.documents) for c in first] == [(c.tokens, c.documents) for c in second]


def test_bos_is_at_position_0_only_and_id_0_counts_as_an_id(source, tiny_lm):
    """A BOS id of 0 is falsy, and is not 'unset'."""
    made = corpus(source(paragraphs(30), borders="split", context=16), tiny_lm())
    assert made.bos == 0 and made.separator == 0 and made.policy()["bos_token"] == 0
    for context in one_epoch(made):
        assert context.tokens[0] == 0 and 0 not in context.tokens[1:]


def test_packed_documents_have_a_separator_between_them_and_it_is_not_kept(source, tiny_lm):
    made = corpus(source(paragraphs(30, words=6), context=32), tiny_lm())
    batch = made.batch(one_epoch(made))
    borders = (batch.documents[:, 1:] != batch.documents[:, :-1]) & (batch.documents[:, :-1] >= 0)
    assert borders.sum() > 20
    assert (batch.tokens[:, 1:][borders] == 0).all()
    assert not batch.keep[batch.tokens == 0].any() and not batch.keep[:, 0].any()
    assert batch.keep[:, 1:][batch.tokens[:, 1:] > 1].all()


@pytest.mark.parametrize(
    "options",
    [{"tokenizer": NO_BOS}, {"tokenizer": NOTHING}, {}],
    ids=["no_bos", "no_special", "bos"],
)
@pytest.mark.parametrize("bos", ["auto", "none"])
def test_the_first_position_is_left_out_with_or_without_bos(source, tiny_lm, options, bos):
    """In a model without BOS the first token takes its role."""
    made = corpus(source(paragraphs(30), context=16, bos=bos), tiny_lm("gpt2", **options))
    batch = made.batch(one_epoch(made))
    assert not batch.keep[:, 0].any() and batch.keep[:, 1:].float().mean() > 0.8
    assert (made.bos is None) == (bool(options) or bos == "none")


def test_keep_all_leaves_out_padding_only(source, tiny_lm):
    made = corpus(source(paragraphs(30), borders="split", context=16, keep="all"), tiny_lm())
    batch = made.batch(one_epoch(made))
    assert (
        torch.equal(batch.keep, batch.documents >= 0)
        and batch.keep[:, 0].all()
        and not batch.keep.all()
    )


def test_padding_is_masked_by_place_though_pad_is_eos(source, tiny_lm):
    """GPT-2's pad is its EOS; an EOS that is in the text is a token, one that fills up is not."""
    acts = source(paragraphs(30), borders="split", context=16, keep="all")
    made = corpus(acts, tiny_lm("gpt2", tokenizer={"pad": "<|endoftext|>"}))
    assert made.pad == made.tokenizer.eos_token_id == 0
    contexts = one_epoch(made)
    batch = made.batch(contexts)
    padding = batch.documents == -1
    assert padding.any() and (batch.tokens[padding] == 0).all()
    assert torch.equal(batch.attention, ~padding)
    assert (
        batch.attention[:, 0].all() and (batch.tokens[:, 0] == 0).all()
    )  # BOS has the id of padding, and is no padding
    real = contexts[0]._replace(tokens=[0, 0, *contexts[0].tokens[2:]])
    assert made.batch([real]).keep[0, 1] and made.batch([real]).attention[0, 1]


def test_a_tokenizer_without_pad_pads_with_what_it_has(source, tiny_lm):
    for tokenizer in ({"pad": None}, NOTHING):
        made = corpus(
            source(paragraphs(9), borders="split", context=16), tiny_lm("gpt2", tokenizer=tokenizer)
        )
        batch = made.batch(one_epoch(made))
        assert (
            (batch.documents == -1).any()
            and batch.tokens.max() < 300
            and not batch.keep[batch.documents == -1].any()
        )


def test_only_so_many_tokens_of_each_document_if_asked(source, tiny_lm):
    made = corpus(source(paragraphs(60, words=40), context=16), tiny_lm(), per_document=10)
    counts: dict[int, int] = {}
    for context in one_epoch(made):
        for token, owner in zip(context.tokens, context.documents):
            counts[owner] = counts.get(owner, 0) + (token > 1)
    assert max(counts.values()) == 10 and made.policy()["tokens_per_document"] == 10


def test_the_policy_says_all_that_decides_what_is_used(source, tiny_lm):
    made = corpus(
        source(paragraphs(9), context=16, borders="split", keep="all"),
        tiny_lm("gpt2", tokenizer=NO_BOS),
        split="held-out",
    )
    assert made.policy() == {
        "context": 16,
        "bos_token": None,
        "separator_token": 0,
        "borders": "split",
        "keep": "all",
        "split": "held-out",
        "tokens_per_document": None,
    }
    json.dumps(made.policy())


def test_documents_are_known_by_name(source, tiny_lm):
    made = corpus(source(paragraphs(30), context=16), tiny_lm())
    owners = {owner for context in one_epoch(made) for owner in context.documents}
    assert all(made.names[owner] == f"text.txt:{owner}" for owner in owners)


def test_empty_documents_in_a_table_do_not_shift_anything(tmp_path, tiny_lm):
    rows = [{"text": item} for pair in zip(paragraphs(40), [""] * 40) for item in pair]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = corpus(ActsConfig(text=str(tmp_path / "a.jsonl"), context=16), tiny_lm())
    contexts = list(itertools.islice(made.contexts(), 60))
    for number in (0, 7, 20, 40):
        assert next(made.contexts(contexts[number].next)) == contexts[number + 1]


# ---- documents that bring their own BOS


def rendered(tokenizer, texts):
    """Return texts as a chat template writes them: BOS first, as a string."""
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": item}], tokenize=False)
        for item in texts
    ]


@pytest.mark.parametrize("bos", ["auto", "none"])
@pytest.mark.parametrize("borders", ["pack", "split"])
@pytest.mark.parametrize(
    "tokenizer", [{}, {"bos": "<|pad|>", "pad": None}], ids=["bos_is_eos", "bos_of_its_own"]
)
def test_documents_that_begin_with_bos_get_no_second_one(
    tmp_path, tiny_lm, borders, bos, tokenizer
):
    folder = tiny_lm("gpt2", tokenizer=tokenizer)
    texts = paragraphs(40, words=12)
    chats = rendered(AutoTokenizer.from_pretrained(folder), texts)
    assert all(
        chat == AutoTokenizer.from_pretrained(folder).bos_token + text
        for chat, text in zip(chats, texts)
    )
    found = {}
    for name, rows in (("plain", texts), ("chat", chats)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": row}) + "\n" for row in rows)
        )
        acts = ActsConfig(
            text=str(tmp_path / f"{name}.jsonl"), borders=borders, bos=bos, context=16
        )
        found[name] = [corpus(acts, folder, split) for split in SPLITS]
    tokens = {
        name: sorted(
            [made.tokenizer.bos_token_id, *ids]
            for made in corpora
            for _, ids, _ in made._tokenize(0)
        )
        for name, corpora in found.items()
    }
    if borders == "split" and bos == "none":  # then BOS is a token of the text like any other, once
        assert [ids[1:] for ids in tokens["chat"]] == tokens["plain"]
    else:
        assert tokens["chat"] == tokens["plain"]
    made = found["chat"][0]
    assert made.tokenizer.bos_token_id not in {
        second for first, second in neighbours(made) if first == made.tokenizer.bos_token_id
    }


def neighbours(made):
    """Return the pairs of tokens, padding left out, that follow one another in the contexts."""
    return {
        pair
        for context in one_epoch(made)
        for pair in itertools.pairwise(context.tokens[: 16 - context.documents.count(-1)])
    }


def test_packed_documents_that_end_with_the_separator_or_are_empty_get_no_second_one(
    tmp_path, tiny_lm
):
    texts = paragraphs(40, words=12)
    kinds = {
        "plain": texts,
        "ended": [text + SEPARATOR for text in texts],
        "gaps": [item for text in texts for item in (text, "")],
    }
    for name, rows in kinds.items():
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": row}) + "\n" for row in rows)
        )
        assert (0, 0) not in neighbours(
            corpus(ActsConfig(text=str(tmp_path / f"{name}.jsonl"), context=16), tiny_lm())
        )


def test_without_bos_takes_one_away_and_only_from_the_beginning():
    assert tokens.without_bos([7, 1, 7], 7) == [1, 7] and tokens.without_bos([7, 7, 1], 7) == [7, 1]
    assert (
        tokens.without_bos([1, 7], 7) == [1, 7]
        and tokens.without_bos([0, 1], None) == [0, 1]
        and tokens.without_bos([], 7) == []
    )
    assert tokens.without_bos([0, 1], 0) == [1]


# ---- what a limit per document leaves out


def test_documents_that_a_limit_cuts_are_counted_once_however_often_they_are_read(source, tiny_lm):
    made = corpus(
        source(paragraphs(30, words=40) + ["short\n"] * 3, context=16), tiny_lm(), per_document=10
    )
    assert (made.cut_documents, made.cut_tokens) == (0, 0)
    list(itertools.islice(made.contexts(), 60))
    lengths = [len(ids) for ids in ids_of(made, made.acts).values()]
    assert made.cut_documents == sum(length > 10 for length in lengths) > 10
    assert made.cut_tokens == sum(max(0, length - 10) for length in lengths)


def test_without_a_limit_no_document_is_cut(source, tiny_lm):
    made = corpus(source(paragraphs(30, words=40), context=16), tiny_lm())
    one_epoch(made)
    assert (made.cut_documents, made.cut_tokens) == (0, 0)
