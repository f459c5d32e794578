"""A folder is there whole or not at all, whatever fails and whenever; and no altered byte goes unnoticed."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksparse.errors import CorruptError, DiskError, InputError
from ksparse.storage import atomic, checksums, jsonio

OLD, NEW = {"a.txt": "old a", "b.txt": "old b"}, {"a.txt": "new a, longer", "c.txt": "new c"}


def put(path: Path, content: dict[str, str], **facts) -> None:
    with checksums.checksummed_dir(path, **facts) as tmp:
        for name, text in content.items():
            (tmp / name).write_text(text)


def content(path: Path) -> dict[str, str]:
    sums = checksums.verify(path)["sha256"]
    return {name: (path / name).read_text() for name in sums}


def fail_at(monkeypatch, owner, name: str, number: int, error: OSError) -> list[int]:
    """Let call `number` (from 1) of a function fail; return a list that grows with each call."""
    calls: list[int] = []
    real = getattr(owner, name)

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


def test_a_committed_folder_has_its_files_its_facts_and_their_sums(tmp_path):
    put(tmp_path / "one", NEW, step=3)
    assert checksums.verify(tmp_path / "one")["step"] == 3
    assert content(tmp_path / "one") == NEW
    assert {file.name for file in tmp_path.iterdir()} == {"one"}


def test_a_committed_folder_replaces_the_old_one_and_none_of_its_files_stay(tmp_path):
    put(tmp_path / "one", OLD)
    put(tmp_path / "one", NEW)
    assert content(tmp_path / "one") == NEW
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        "a.txt",
        "c.txt",
        checksums.MANIFEST,
    }


def test_committed_makes_the_folders_above(tmp_path):
    put(tmp_path / "x" / "y" / "one", NEW)
    assert content(tmp_path / "x" / "y" / "one") == NEW


def test_committed_files_can_be_read_by_others(tmp_path):
    with checksums.checksummed_dir(tmp_path / "one") as tmp:
        (tmp / "secret").write_text("")
        (tmp / "secret").chmod(0o600)
    assert (tmp_path / "one" / "secret").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("before", [None, OLD], ids=["nothing_before", "an_old_folder_before"])
@pytest.mark.parametrize(
    "owner, name",
    [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "chmod")],
    ids=["fsync", "rename", "replace", "mkdir", "chmod"],
)
def test_whichever_call_fails_the_old_or_the_new_folder_is_whole(tmp_path, owner, name, before):
    number = 0
    while True:
        number += 1
        folder = tmp_path / f"{number}"
        folder.mkdir()
        if before is not None:
            put(folder / "one", before)
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_at(patch, owner, name, number, OSError(errno.EIO, "Input/output error"))
            try:
                put(folder / "one", NEW)
                failed = False
            except OSError:
                failed = True
        if len(calls) < number:
            break
        assert failed, f"call {number} of {name} failed silently"
        if (folder / "one").exists():
            assert content(folder / "one") in ([NEW] if before is None else [before, NEW])
        else:
            assert before is None, f"after call {number} of {name} failed, the old folder is gone"
        assert [file.name for file in folder.iterdir() if file.name != "one"] == [], (
            "a temporary folder is left"
        )
    assert number > 1, f"{name} was never called"


def test_all_is_on_the_disk_before_the_name_is_and_then_the_name(tmp_path, monkeypatch):
    """Else a loss of power may leave the new name with empty files."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("only Linux tells which file a handle is of")
    events = []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: events.append(Path(os.readlink(f"/proc/self/fd/{handle}"))) or sync(handle),
    )
    monkeypatch.setattr(
        Path, "rename", lambda path, target: events.append("rename") or rename(path, target)
    )
    put(tmp_path / "one", NEW)
    at = events.index("rename")
    before = {path.name for path in events[:at]}
    assert {"a.txt", "c.txt", checksums.MANIFEST} <= before and any(
        name.startswith(".tmp-") and name.endswith("-one~") for name in before
    )
    assert events[at + 1 :] == [tmp_path]


def test_an_error_in_the_body_leaves_what_was_there(tmp_path):
    put(tmp_path / "one", OLD)
    with pytest.raises(ZeroDivisionError):
        with checksums.checksummed_dir(tmp_path / "one") as tmp:
            (tmp / "a.txt").write_text("half")
            1 / 0
    assert content(tmp_path / "one") == OLD
    assert {file.name for file in tmp_path.iterdir()} == {"one"}


@pytest.mark.parametrize(
    "code, text",
    [
        (errno.ENOSPC, "disk full while writing .*one.* MB free"),
        (errno.EDQUOT, "disk full"),
        (errno.EFBIG, "disk full"),
        (errno.EROFS, "cannot write .*one.*: Read-only.*--out"),
        (errno.EACCES, "cannot write"),
        (errno.EPERM, "cannot write"),
    ],
)
def test_a_disk_error_says_what_to_do(tmp_path, monkeypatch, code, text):
    fail_at(monkeypatch, os, "fsync", 1, OSError(code, os.strerror(code)))
    with pytest.raises(DiskError, match=text):
        put(tmp_path / "one", NEW)


def test_a_full_disk_as_safetensors_reports_it_is_a_disk_error(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(DiskError, match="disk full"):
        with checksums.checksummed_dir(tmp_path / "one"):
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )


def test_another_systems_error_is_passed_on_as_it_is(tmp_path, monkeypatch):
    fail_at(monkeypatch, os, "fsync", 1, OSError(errno.EPROTO, "Protocol error"))
    with pytest.raises(OSError, match="Protocol") as caught:
        put(tmp_path / "one", NEW)
    assert not isinstance(caught.value, DiskError)


def test_a_folder_that_is_removed_while_it_is_written_is_one_error(tmp_path):
    with pytest.raises(DiskError, match="cannot write .*No such file or directory"):
        with checksums.checksummed_dir(tmp_path / "gone" / "one") as tmp:
            shutil.rmtree(tmp_path / "gone")
            (tmp / "a").write_text("a")


# ---- noticing damage


def test_verify_notices_every_flipped_byte_of_every_file(tmp_path):
    folder = tmp_path / "one"
    put(folder, {"a": "0123456789", "empty": "", "b": "x\ny"})
    for name in ("a", "b"):
        whole = (folder / name).read_bytes()
        for at in range(len(whole)):
            (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(CorruptError, match=f"{name} is damaged: its SHA-256"):
                checksums.verify(folder)
        (folder / name).write_bytes(whole)
    checksums.verify(folder)


def test_verify_notices_every_flipped_byte_of_the_table_of_sums(tmp_path):
    folder = tmp_path / "one"
    put(folder, {"a": "0123456789"}, step=7)
    whole = (folder / checksums.MANIFEST).read_bytes()
    table = whole.index(b'"sha256"')
    seal = range(whole.index(b'"checksum"') + 1, whole.index(b'"checksum"') + 9)
    for at in range(table, whole.rindex(b'"') + 1):
        if (
            whole[at : at + 1].isspace() or at in seal
        ):  # a seal under another name is none, and all else is as it was
            continue
        (folder / checksums.MANIFEST).write_bytes(
            whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        )
        with pytest.raises(CorruptError):
            checksums.verify(folder)


@pytest.mark.parametrize(
    "damage, text",
    [
        (
            lambda folder: (folder / "a.txt").unlink(),
            "a.txt is missing, though manifest.json lists it",
        ),
        (lambda folder: (folder / "a.txt").write_text(""), "a.txt is damaged.*0 bytes"),
        (lambda folder: (folder / "a.txt").write_text("new a"), "a.txt is damaged"),
        (lambda folder: (folder / checksums.MANIFEST).unlink(), "manifest.json is missing"),
        (
            lambda folder: (folder / checksums.MANIFEST).write_text("{"),
            "manifest.json is not JSON.*truncated",
        ),
        (
            lambda folder: (folder / checksums.MANIFEST).write_bytes(b"\xff\xfe"),
            "manifest.json is not JSON",
        ),
        (lambda folder: (folder / checksums.MANIFEST).write_text("{}"), "has no table 'sha256'"),
        (lambda folder: (folder / checksums.MANIFEST).write_text("[]"), "is not a table but list"),
    ],
    ids=[
        "deleted",
        "emptied",
        "truncated",
        "no_manifest",
        "half_a_manifest",
        "not_utf8",
        "no_sums",
        "a_list",
    ],
)
def test_verify_names_the_file_that_is_wrong(tmp_path, damage, text):
    put(tmp_path / "one", NEW)
    damage(tmp_path / "one")
    with pytest.raises(CorruptError, match=text):
        checksums.verify(tmp_path / "one")


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../b", "sub/file", "..", ".", "", "./a.txt", "x\0y", "x" * 300],
)
def test_a_manifest_cannot_name_a_file_outside_its_folder(tmp_path, name):
    put(tmp_path / "one", NEW)
    (tmp_path / "x").write_text("outside")
    manifest = jsonio.read_json(tmp_path / "one" / checksums.MANIFEST)
    manifest["sha256"][name] = atomic.sha256(tmp_path / "x")
    jsonio.write_json(tmp_path / "one" / checksums.MANIFEST, manifest, sealed=True)
    with pytest.raises(CorruptError, match="which is not a file of its own folder"):
        checksums.verify(tmp_path / "one")


# ---- leftovers


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    put(tmp_path / "one", OLD)
    shutil.copytree(tmp_path / "one", tmp_path / ".tmp-two-123")
    shutil.copytree(tmp_path / "one", tmp_path / ".tmp-old-one-123")
    (tmp_path / ".tmp-metrics.jsonl-123").write_text("half a fi")
    (tmp_path / "keep.txt").write_text("")
    atomic.remove_leftovers(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"one", "keep.txt"}


def test_an_old_folder_that_was_moved_away_comes_back(tmp_path):
    """The process was killed between the two renames."""
    put(tmp_path / "step-1", OLD)
    (tmp_path / "step-1").rename(tmp_path / ".tmp-old-step-1-123")
    shutil.copytree(tmp_path / ".tmp-old-step-1-123", tmp_path / ".tmp-step-1-123")
    atomic.remove_leftovers(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"step-1"} and content(
        tmp_path / "step-1"
    ) == OLD


def test_removing_leftovers_of_a_folder_that_is_not_there_does_nothing(tmp_path):
    atomic.remove_leftovers(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


# ---- single files


@given(
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
        ),
    )
)
def test_json_comes_back_as_it_went(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "value.json"
    jsonio.write_json(file, value)
    assert jsonio.read_json(file) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")]], ids=str)
def test_json_never_holds_nan_or_infinity(tmp_path, value):
    with pytest.raises(ValueError):
        jsonio.write_json(tmp_path / "x.json", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "owner, name", [(os, "fsync"), (Path, "replace")], ids=["fsync", "replace"]
)
def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, owner, name):
    atomic.write_text(tmp_path / "x.txt", "old")
    fail_at(monkeypatch, owner, name, 1, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DiskError, match="disk full while writing .*x.txt"):
        atomic.write_text(tmp_path / "x.txt", "new")
    assert (tmp_path / "x.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_digest_depends_on_every_fact_and_not_on_their_order():
    assert jsonio.digest({"a": 1, "b": [2]}) == jsonio.digest({"b": [2], "a": 1})
    assert (
        len(
            {
                jsonio.digest(facts)
                for facts in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": 1, "b": None})
            }
        )
        == 5
    )
    assert (
        json.loads(json.dumps(jsonio.digest({}))) == jsonio.digest({})
        and len(jsonio.digest({})) == 16
    )


# ---- seals, tables, lines


def test_a_sealed_table_comes_back_without_its_seal_and_no_value_of_it_can_be_changed(tmp_path):
    file, table = tmp_path / "x.json", {"a": 1, "b": [1.5, None, "é"], "c": {"d": True}}
    jsonio.write_json(file, table, sealed=True)
    assert jsonio.read_json(file) == table and set(json.loads(file.read_text())) == {
        *table,
        jsonio.SEAL,
    }
    for change in (
        {"a": 2},
        {"a": 1.0},
        {"a": "1"},
        {"b": []},
        {"c": {"d": False}},
        {"e": None},
        {jsonio.SEAL: "0"},
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(
            CorruptError,
            match="x.json was altered: its checksum does not match",
        ):
            jsonio.read_json(file)
        jsonio.write_json(file, table, sealed=True)
    file.write_text(json.dumps(dict(reversed(json.loads(file.read_text()).items()))))
    assert jsonio.read_json(file) == table, "order and spacing are no content"


@pytest.mark.parametrize(
    "text", ["{", "", "[NaN]", "[Infinity]", "[1e999]", "[-1e999]", "[" * 100_000, "9" * 5000]
)
def test_what_is_not_json_of_ours_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CorruptError, match="x.json is not JSON: .* truncated or was altered"):
        jsonio.read_json(tmp_path / "x.json")


def test_a_folder_or_a_link_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "x.json").mkdir()
    (tmp_path / "y.json").symlink_to("y.json")
    (tmp_path / "z.json").symlink_to("nowhere")
    for name, said in (
        ("x", "cannot be read: Is a directory"),
        ("y", "cannot be read: Too many levels"),
        ("z", "is missing"),
    ):
        with pytest.raises(CorruptError, match=f"{name}.json {said}"):
            jsonio.read_json(tmp_path / f"{name}.json")


@pytest.mark.parametrize(
    "table, said",
    [
        ({"n": 1, "t": {}, "x": 0.5}, None),
        ({"n": 1, "t": {}, "x": 2}, None),
        ([], "is not a table but list"),
        ({"t": {}, "x": 1}, "has no key 'n'"),
        ({"n": 1, "x": 1}, "has no table 't'"),
        ({"n": "1", "t": {}, "x": 1}, "'n' is '1', expected int"),
        ({"n": True, "t": {}, "x": 1}, "'n' is 'True', expected int"),
        ({"n": 1, "t": {}, "x": None}, "'x' is 'None', expected int or float"),
    ],
)
def test_a_table_has_the_keys_and_types_that_are_asked_for_or_the_key_is_named(
    tmp_path, table, said
):
    jsonio.write_json(tmp_path / "x.json", table)
    if said is None:
        assert jsonio.read_table(tmp_path / "x.json", n=int, t=dict, x=(int, float)) == table
    else:
        with pytest.raises(CorruptError, match=f"x.json:? {said}"):
            jsonio.read_table(tmp_path / "x.json", n=int, t=dict, x=(int, float))


@pytest.mark.parametrize(
    "table, said",
    [
        ({"format": 2, "n": 1}, None),
        ({"format": 1, "n": 1, "x": 0.5}, None),
        ({"n": 1}, None),
        (
            {"format": 3, "new": {}},
            r"was written by a newer ksparse \(format 3\); this one reads up to 2",
        ),
        ({"format": 0, "n": 1}, "has format '0', expected a number of 1 to 2"),
        ({"format": True, "n": 1}, "has format 'True'"),
        ({"format": 2}, "has no key 'n'"),
        ({"format": 2, "n": 1, "y": 1}, "has the key 'y', which this ksparse does not know"),
        ({"format": 2, "n": 1, "x": "1"}, "'x' is '1', expected float"),
        ({"format": 2, "n": 2**63}, "'n' is too large a number"),
    ],
)
def test_a_numbered_table_holds_the_keys_of_its_format_and_no_others(tmp_path, table, said):
    jsonio.write_json(tmp_path / "x.json", table)
    if said is None:
        read = jsonio.read_numbered(tmp_path / "x.json", 2, {"n": int}, {"x": float}, unnumbered=1)
        assert read == {key: value for key, value in table.items() if key != "format"}
    else:
        with pytest.raises(InputError, match=f"x.json:? {said}"):
            jsonio.read_numbered(tmp_path / "x.json", 2, {"n": int}, {"x": float}, unnumbered=1)


def test_a_table_that_must_have_a_format_number_is_refused_without(tmp_path):
    jsonio.write_json(tmp_path / "x.json", {"n": 1})
    with pytest.raises(CorruptError, match="x.json has format 'None', expected a number of 1 to 2"):
        jsonio.read_numbered(tmp_path / "x.json", 2, {"n": int})


@pytest.mark.parametrize(
    "read",
    [jsonio.read_json, jsonio.read_table, jsonio.read_lines, jsonio.read_strings, atomic.sha256],
)
def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path, read):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(CorruptError, match="x.json is a FIFO, expected a file"):
        read(tmp_path / "x.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(CorruptError, match="zero.json is a device, expected a file"):
        read(tmp_path / "zero.json")


def test_a_name_that_no_file_can_have_is_not_there(tmp_path, monkeypatch):
    assert atomic.exists(tmp_path) and not atomic.exists(tmp_path / "x")
    assert not any(atomic.exists(Path(name)) for name in ("x" * 5000, "a\0b", "half\ud800"))

    def closed(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(InputError, match="secret cannot be accessed: Permission denied"):
        atomic.exists(Path("secret"))


def test_damaged_lines_are_left_out_with_one_warning_and_a_half_last_one_without(tmp_path, caplog):
    file = tmp_path / "x.jsonl"
    file.write_bytes(
        b'{"step": 1}\n{"step": 2, "x": NaN}\n{"step": "3"}\n\xff\n[]\n{"x": 1}\n{"step": true}\n{"step": 4}\n{"step": 5'
    )
    assert jsonio.read_lines(file, step=int) == [{"step": 1}, {"step": 4}]
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}: 6 lines are damaged and left out, the first of them line 2"
    ]
    caplog.clear()
    file.write_text('{"step": 1}\n{"step": 5')
    assert jsonio.read_lines(file, step=int) == [{"step": 1}] and not caplog.records


def test_a_process_killed_while_it_removes_a_folder_leaves_no_half_of_it_under_its_name(
    tmp_path, monkeypatch
):
    put(tmp_path / "one", OLD)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: (path / "a.txt").unlink())
    atomic.remove(tmp_path / "one")
    assert not (tmp_path / "one").exists() and re.fullmatch(
        r"\.tmp-gone-[0-9a-f]{16}-one", *[path.name for path in tmp_path.iterdir()]
    )
    monkeypatch.undo()
    atomic.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    put(tmp_path / "one", OLD)
    (tmp_path / "two").symlink_to("one")
    atomic.remove(tmp_path / "two")
    assert content(tmp_path / "one") == OLD and not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    "there",
    [
        lambda path: path.symlink_to("other"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.write_text("x"),
    ],
    ids=["link", "dead_link", "file"],
)
def test_what_stands_in_the_place_of_a_folder_is_replaced_and_what_a_link_leads_to_is_left(
    tmp_path, there
):
    put(tmp_path / "other", OLD)
    there(tmp_path / "one")
    put(tmp_path / "one", NEW)
    assert (
        content(tmp_path / "one") == NEW
        and content(tmp_path / "other") == OLD
        and not (tmp_path / "one").is_symlink()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other"}


def test_tensors_that_the_manifest_does_not_list_are_not_read(tmp_path):
    put(tmp_path / "one", NEW)
    (tmp_path / "one" / "notes.txt").write_text("nobody reads this")
    assert content(tmp_path / "one") == NEW
    (tmp_path / "one" / "sae.0-of-1.safetensors").write_text("x")
    with pytest.raises(
        CorruptError, match="holds sae.0-of-1.safetensors, which its manifest.json does not list"
    ):
        checksums.verify(tmp_path / "one")


# ---- whose files


@pytest.mark.parametrize("names", [("x.txt",), ("sub", "x.txt"), ("sub", "new", "x.txt")])
def test_a_path_of_the_folder_itself_is_returned_whether_it_is_there_or_not(tmp_path, names):
    (tmp_path / "sub").mkdir()
    assert atomic.inside(tmp_path, *names) == tmp_path.joinpath(*names)
    (tmp_path / "sub" / "x.txt").write_text("")
    (tmp_path / "link").symlink_to("sub")
    assert atomic.inside(tmp_path, "link", "x.txt").is_file(), "a link that stays in the folder"
    (tmp_path.parent / "other").symlink_to(tmp_path)
    assert atomic.inside(tmp_path.parent / "other", *names) == (tmp_path.parent / "other").joinpath(
        *names
    )
    (tmp_path.parent / "other").unlink()


@pytest.mark.parametrize(
    "names, link, target",
    [
        (("x.txt",), "x.txt", "{out}/key"),
        (("x.txt",), "x.txt", "{out}/nothing"),
        (("x.txt",), "x.txt", "../out/key"),
        (("sub", "x.txt"), "sub", "{out}"),
        (("sub", "x.txt"), "sub", "two"),
        (("..", "out", "key"), None, None),
    ],
)
def test_a_link_that_leads_out_of_a_folder_is_refused_and_named(tmp_path, names, link, target):
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    out.mkdir()
    (out / "key").write_text("secret")
    (run / "two").symlink_to(out)
    if link:
        (run / link).symlink_to(target.format(out=out))
    with pytest.raises(
        InputError,
        match=f"{link or 'key'} leads out of .*run, to .*out.*put a copy of what is meant",
    ):
        atomic.inside(run, *names)


def test_what_is_neither_a_file_nor_a_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="x.jsonl is neither a file nor a folder"):
        atomic.inside(tmp_path, "x.jsonl")


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs_and_to_nothing_else(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc" / "run", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "sum").write_text("tokens = 1")
    (snapshot / "recipe.toml").symlink_to("../../../blobs/sum")
    assert atomic.inside(snapshot, "recipe.toml").read_text() == "tokens = 1"
    (tmp_path / "key").write_text("secret")
    (blobs / "link").symlink_to("../key")
    (snapshot / "report.html").symlink_to("../../../blobs/link")
    with pytest.raises(InputError, match="report.html leads out"):
        atomic.inside(snapshot, "report.html")


# ---- temporary names, modes, leftovers


def writers(folder: Path) -> None:
    atomic.write_text(folder / "x.txt", "new")
    atomic.write_bytes(folder / "x.bin", b"new")
    with atomic.atomic_file(folder / "x.safetensors") as tmp:
        tmp.write_text("new")
        tmp.chmod(0o600)
    put(folder / "one", NEW)
    with atomic.atomic_dir(folder / "two") as tmp:
        (tmp / "below").mkdir()
        (tmp / "below" / "x.txt").write_text("new")


@pytest.mark.parametrize(
    "umask, file, folder",
    [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775), (0o027, 0o640, 0o750)],
    ids=oct,
)
def test_modes_are_what_the_umask_leaves(tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        writers(tmp_path)
    finally:
        os.umask(before)
    modes = {
        path.relative_to(tmp_path): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")
    }
    assert len(modes) == 10 and all(
        mode == (folder if (tmp_path / path).is_dir() else file) for path, mode in modes.items()
    ), modes


def test_no_temporary_name_can_be_guessed_and_none_follows_a_link(tmp_path, monkeypatch):
    """Also not where somebody did guess one."""
    (tmp_path / "victim").write_text("mine")
    names = []
    make = Path.mkdir
    monkeypatch.setattr(
        Path,
        "mkdir",
        lambda path, **options: (options or names.append(path.name), make(path, **options)),
    )
    for _ in range(2):
        writers(tmp_path)
    made = [name for name in names if re.fullmatch(r"\.tmp-[0-9a-f]{16}-.*", name)]
    assert len(made) == len(set(made)) == 12
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda size: "0" * 16)
    (tmp_path / ".tmp-0000000000000000-y.txt~").symlink_to("victim")
    atomic.write_text(tmp_path / "y.txt", "new")
    assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "y.txt").is_symlink()


def test_what_a_killed_process_left_goes_with_the_next_write_of_the_same_name_and_nothing_else_does(
    tmp_path,
):
    for name in ("x.txt", "other.txt"):
        (tmp_path / f".tmp-0123456789abcdef-{name}~").mkdir()
        (tmp_path / f".tmp-0123456789abcdef-{name}~" / name).write_text("half")
    (tmp_path / ".tmp-of-somebody").mkdir()
    atomic.write_text(tmp_path / "x.txt", "new")
    assert {path.name for path in tmp_path.iterdir()} == {
        "x.txt",
        ".tmp-0123456789abcdef-other.txt~",
        ".tmp-of-somebody",
    }
    atomic.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_what_a_living_process_is_writing_is_no_leftover(tmp_path):
    with (
        atomic.atomic_file(tmp_path / "x.txt") as file,
        checksums.checksummed_dir(tmp_path / "one") as folder,
    ):
        (folder / "a").write_text("a")
        file.write_text("first")
        atomic.remove_leftovers(tmp_path)
        atomic.write_text(tmp_path / "x.txt", "second")
        put(tmp_path / "one", OLD)
        assert file.is_file() and (folder / "a").is_file()
    assert (tmp_path / "x.txt").read_text() == "first" and content(tmp_path / "one") == {"a": "a"}
    assert {path.name for path in tmp_path.iterdir()} == {"x.txt", "one"}


def test_an_old_folder_that_a_living_process_moved_away_is_not_given_back(tmp_path, monkeypatch):
    put(tmp_path / "one", OLD)
    rename = Path.rename

    def watched(path, target):
        if (
            path.parent == tmp_path
            and path.name.startswith(".tmp-")
            and not (tmp_path / "one").exists()
        ):
            atomic.remove_leftovers(tmp_path)
            assert not (tmp_path / "one").exists()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    put(tmp_path / "one", NEW)
    assert content(tmp_path / "one") == NEW and [path.name for path in tmp_path.iterdir()] == [
        "one"
    ]


def test_two_processes_that_commit_the_same_folder_leave_one_of_the_two_whole(
    tmp_path, monkeypatch
):
    """The other's folder comes between the two renames."""
    put(tmp_path / "one", OLD)
    rename, between = Path.rename, []

    def disturbed(path, target):
        done = rename(path, target)
        if ".tmp-old-" in str(target) and not between:
            between.append(1)
            put(tmp_path / "one", {"b": "the other's"})
        return done

    monkeypatch.setattr(Path, "rename", disturbed)
    put(tmp_path / "one", NEW)
    assert (
        between
        and content(tmp_path / "one") == NEW
        and [path.name for path in tmp_path.iterdir()] == ["one"]
    )


def test_a_lock_is_of_one_at_a_time_and_waited_for_as_long_as_is_said(tmp_path):
    with atomic.locked(tmp_path, ".x.lock"):
        with pytest.raises(
            InputError, match=rf"{tmp_path} is in use by process {os.getpid()}; close it first"
        ):
            with atomic.locked(tmp_path, ".x.lock", advice="close it first"):
                pass
        with atomic.locked(tmp_path, ".y.lock"):
            pass
    with atomic.locked(tmp_path, ".x.lock", wait=60):
        pass


def test_a_lock_that_is_a_link_empties_no_file(tmp_path):
    (tmp_path / "run").mkdir()
    for target in ("../victim", "victim"):
        (tmp_path / "run" / target).write_text("mine")
        (tmp_path / "run" / ".lock").symlink_to(target)
        with pytest.raises((InputError, DiskError), match="leads out|cannot write"):
            with atomic.locked(tmp_path / "run"):
                pass
        assert (tmp_path / "run" / target).read_text() == "mine"
        (tmp_path / "run" / ".lock").unlink()


# ---- what is not ours


def test_only_what_was_committed_is_replaceable(tmp_path):
    put(tmp_path / "one", OLD)
    (tmp_path / "empty").mkdir()
    for name in ("one", "empty", "new"):
        checksums.check_replaceable(tmp_path / name)
    (tmp_path / "one" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / ".git").mkdir()
    for name, said in (("one", "holds thesis.tex"), ("two", "holds .git"), ("file", "is a file")):
        with pytest.raises(
            InputError, match=f"{name} {said}, which would be lost; give a new folder"
        ):
            checksums.check_replaceable(tmp_path / name)


def test_a_new_folder_takes_no_others_place_that_came_meanwhile(tmp_path):
    with pytest.raises(InputError, match="one is there already and not empty; give a new folder"):
        with atomic.atomic_dir(tmp_path / "one", new=True) as tmp:
            (tmp / "a").write_text("a")
            put(tmp_path / "one", OLD)
    assert content(tmp_path / "one") == OLD and [path.name for path in tmp_path.iterdir()] == [
        "one"
    ]


def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", "../" + tmp_path.name, tmp_path):
        with pytest.raises(
            InputError,
            match="is the working folder, which cannot be replaced; give the name of a new one",
        ):
            put(name, NEW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sealed", [False, True])
def test_half_a_character_is_written_as_an_escape_and_read_back(tmp_path, sealed):
    value = {"whole": "caf\u00e9", "half": "\ud800", "\udcff": 1}
    jsonio.write_json(tmp_path / "x.json", value, sealed=sealed)
    assert jsonio.read_json(tmp_path / "x.json") == value
    jsonio.write_json(tmp_path / "y.json", {"whole": "caf\u00e9"})
    assert "caf\u00e9" in (tmp_path / "y.json").read_text(encoding="utf-8")
