"""What is in an object store is written whole, read verified through a bounded cache, and refused in words."""

import hashlib
import os
import sys
import threading

import pytest

from ksparse.errors import CorruptError, DiskError, InputError
from ksparse.storage import jsonio, stores
from ksparse.storage.cache import FOLDER, GIGABYTES, Cache
from ksparse.storage.stores import Store, is_remote, join, open_store


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "PAUSES", (0.0, 0.0))
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


def put(store, name, content):
    with store.writing(name) as file:
        file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def copies(tmp_path):
    return {file.stem for file in (tmp_path / "cache").iterdir() if not file.name.startswith(".")}


@pytest.mark.parametrize("where", ["{}", "file://{}", "local://{}", "memory://bucket{}"])
def test_a_file_that_was_written_is_listed_read_fetched_and_removed(tmp_path, where):
    store = open_store(where.format(tmp_path / "set"))
    assert not store.has("a.bin") and store.names() == set()
    sha256 = put(store, "a.bin", b"one")
    assert store.has("a.bin") and store.names() == {"a.bin"} and store.size("a.bin") == 3
    put(store, "a.bin", b"four")
    with store.reading("a.bin") as file:
        assert file.read_bytes() == b"four"
    with pytest.raises(CorruptError, match="a.bin is damaged: its SHA-256 is"):
        store.fetch("a.bin", sha256)
    sha256 = put(store, "a.bin", b"three")
    assert store.fetch("a.bin", sha256).read_bytes() == b"three"
    store.remove("a.bin")
    store.remove("a.bin")
    assert store.names() == set()


def test_file_urls_are_paths_of_this_machine_and_others_are_not(tmp_path):
    assert type(open_store(f"file://{tmp_path}")) is Store
    assert open_store(f"file://{tmp_path}").place == tmp_path
    assert not is_remote(tmp_path) and is_remote("s3://b/x")
    assert join(f"file://{tmp_path}", "x") == tmp_path / "x"


@pytest.mark.parametrize("where", ["{}/set", "memory://bucket/set"])
def test_a_block_that_fails_writes_nothing(tmp_path, where):
    store = open_store(where.format(tmp_path))
    with pytest.raises(RuntimeError):
        with store.writing("a.bin") as file:
            file.write_bytes(b"half")
            raise RuntimeError
    assert store.names() == set()


def test_a_missing_file_is_named_by_its_url():
    store = open_store("memory://bucket/set")
    for read in (
        lambda: store.fetch("a.bin", "0" * 64),
        lambda: store.reading("a.bin").__enter__(),
    ):
        with pytest.raises(CorruptError, match="^memory://bucket/set/a.bin is missing"):
            read()


def test_errors_while_a_copy_is_read_name_the_file_where_it_is():
    store = open_store("memory://bucket/set")
    put(store, "a.json", b"{")
    with pytest.raises(CorruptError, match="^memory://bucket/set/a.json is not JSON"):
        with store.reading("a.json") as file:
            jsonio.read_json(file)


@pytest.mark.parametrize("name", ["../a.bin", "/etc/passwd"])
def test_names_that_a_manifest_may_hold_stay_in_their_folder(name):
    with pytest.raises(CorruptError, match="is not a file of its own folder"):
        open_store("memory://bucket/set").fetch(name, "0" * 64)


def test_a_checksum_that_is_a_path_is_refused():
    with pytest.raises(CorruptError, match="is no SHA-256 checksum"):
        open_store("memory://bucket/set").fetch("a.bin", "../../x")


# ---- requests that fail


class Flaky:
    """A file system whose requests fail a number of times."""

    def __init__(self, fs, errors):
        self.fs, self.errors = fs, list(errors)

    def __getattr__(self, name):
        own = getattr(self.fs, name)

        def call(*args, **options):
            if name in ("put_file", "get_file", "ls", "size") and self.errors:
                error = self.errors.pop(0)
                if error == "short":
                    with open(args[0], "rb") as stream:
                        self.fs.pipe_file(args[1], stream.read()[:-1])
                    return None
                raise error
            return own(*args, **options)

        return call


def flaky(*errors):
    store = open_store("memory://bucket/set")
    store._fs = Flaky(store._fs, errors)
    return store


def test_requests_that_fail_are_sent_again(caplog):
    store = flaky(ConnectionResetError("reset by peer"), "short")
    sha256 = put(store, "a.bin", b"content")
    assert "memory://bucket/set/a.bin: reset by peer; trying again in 0 s" in caplog.text
    assert "6 of 7 bytes arrived" in caplog.text
    store._fs.errors = [TimeoutError("timed out"), TimeoutError("timed out")]
    assert store.fetch("a.bin", sha256).read_bytes() == b"content"


def test_what_fails_each_time_is_an_error_that_says_what_to_do():
    store = flaky(*[ConnectionResetError("reset by peer")] * 3)
    with pytest.raises(
        DiskError,
        match="cannot write memory://bucket/set/a.bin: reset by peer; tried 3 times. Run the same",
    ):
        put(store, "a.bin", b"content")


@pytest.mark.parametrize(
    "error, message",
    [
        (FileNotFoundError("The specified bucket does not exist"), "there is no such bucket"),
        (PermissionError("Access Denied"), r"refuses access \(Access Denied\); check the cred"),
        (
            type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"),
            "no credentials were found .* set AWS_ACCESS_KEY_ID",
        ),
        (
            type("ParamValidationError", (Exception,), {})("Invalid bucket name"),
            "refuses access .Invalid bucket name",
        ),
    ],
)
@pytest.mark.parametrize("doing", ["list", "write", "read"])
def test_what_is_refused_is_said_at_once(error, message, doing):
    store = flaky(error)
    with pytest.raises(InputError, match=f"^memory://bucket/set.*: .*{message}"):
        if doing == "list":
            store.names()
        elif doing == "write":
            put(store, "a.bin", b"content")
        else:
            store.fetch("a.bin", "0" * 64)
    assert store._fs.errors == []


def test_what_is_not_installed_is_named_with_the_command(monkeypatch):
    from fsspec.registry import known_implementations

    monkeypatch.setitem(known_implementations, "gone", {"class": "no_such.FS", "err": "Install it"})
    with pytest.raises(
        InputError,
        match=r"gone://b: a package for gone:// is not installed \(Install it\); for s3: pip install 'ksparse\[remote\]'",
    ):
        open_store("gone://b")
    with pytest.raises(InputError, match="nosuch://b is not a URL that fsspec reads: Protocol not"):
        open_store("nosuch://b")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(InputError, match=r"object stores need fsspec: pip install 'ksparse\[rem"):
        open_store("s3://b")


# ---- the cache


def test_a_damaged_copy_is_fetched_again(caplog):
    store = open_store("memory://bucket/set")
    sha256 = put(store, "a.bin", b"content")
    store.fetch("a.bin", sha256).write_bytes(b"Content")
    assert store.fetch("a.bin", sha256).read_bytes() == b"content"
    assert "a copy of memory://bucket/set/a.bin, is damaged; it is fetched again" in caplog.text


def test_a_transfer_that_was_damaged_is_repeated_once():
    store = open_store("memory://bucket/set")
    sha256 = put(store, "a.bin", b"content")
    own, calls = store._fs.get_file, []

    class Damaging:
        def __getattr__(self, name):
            return getattr(open_store("memory://bucket/set")._fs, name)

        def get_file(self, path, local):
            calls.append(path)
            own(path, local)
            if len(calls) == 1:
                with open(local, "wb") as stream:
                    stream.write(b"conTent")

    store._fs = Damaging()
    assert store.fetch("a.bin", sha256).read_bytes() == b"content" and len(calls) == 2


def test_what_was_not_used_for_longest_makes_room(tmp_path, monkeypatch):
    monkeypatch.setenv(GIGABYTES, "25e-9")
    store = open_store("memory://bucket/set")
    sums = [put(store, f"{i}.bin", bytes([i]) * 10) for i in range(4)]
    files = [store.fetch(f"{i}.bin", sums[i]) for i in range(2)]
    for age, file in enumerate(files):
        os.utime(file, (100 + age, 100 + age))
    store.fetch("0.bin", sums[0])  # used again
    store.fetch("2.bin", sums[2])
    assert copies(tmp_path) == {sums[0], sums[2]}
    store.fetch("1.bin", sums[1])
    assert len(copies(tmp_path)) == 2 and sums[1] in copies(tmp_path)


def test_what_cannot_be_held_together_is_refused_with_the_size(monkeypatch):
    monkeypatch.setenv(GIGABYTES, "2")
    with pytest.raises(
        InputError,
        match=r"memory://bucket/set takes 3\.0 GB, .* keeps 2\.0 GB\. Set KSPARSE_CACHE_GB to 3\.1 or more",
    ):
        open_store("memory://bucket/set").check_room(3 * 10**9)
    open_store("memory://bucket/set").check_room(10**9)


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan"])
def test_a_size_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv(GIGABYTES, text)
    with pytest.raises(InputError, match=f"KSPARSE_CACHE_GB is '{text}'; it is the size"):
        Cache.of_environment()


def test_several_that_want_one_file_fetch_it_once(tmp_path):
    store = open_store("memory://bucket/set")
    sha256 = put(store, "a.bin", b"content")
    calls, found = [], []

    def download(file):
        calls.append(1)
        store.download("a.bin", file)

    def fetch():
        found.append(
            Cache(tmp_path / "cache", 100).fetch("memory://bucket/set/a.bin", sha256, download)
        )

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(set(found)) == 1 and len(found) == 4
