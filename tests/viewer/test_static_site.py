"""Static pages: an export replaces what ksparse wrote, and nothing else, and a killed one leaves a whole site."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from ksparse import cli, viewer
from ksparse.config import from_dict, to_toml
from ksparse.errors import CorruptError, InputError
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer import static_site
from ksparse.viewer.labels import Labels


@pytest.fixture
def bare(tmp_path: Path) -> RunFolder:
    """Return a run that is a recipe and a report."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.recipe_file.write_text(to_toml(from_dict({"sae": {"n_latents": 32, "k": 2}})))
    run.report_file.write_text("<!DOCTYPE html><title>run · ksparse report</title>")
    return run


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def older(folder: Path, run: RunFolder) -> None:
    """Write a site as it was before the mark had a list."""
    viewer.export(run, folder)
    home = next(folder.glob("ksparse-*/"))
    for name in static_site.ASSETS:
        (folder / name).write_bytes(static_site.asset(name))
    shutil.move(home / "data", folder / "data")
    shutil.rmtree(home)
    (folder / static_site.MARKER).write_text('{"format": 1, "run": "run"}\n')


def test_the_marker_lists_what_was_written_and_the_page_names_all_that_it_loads(bare, tmp_path):
    page = viewer.export(bare, tmp_path / "site")
    files = tree(tmp_path / "site")
    mark = json.loads(files.pop(static_site.MARKER))
    assert mark == {"format": 2, "run": "run", "files": sorted(files)}
    loaded = re.findall(r'(?:src|href)="([^"#]+\.(?:js|css))"', page.read_text())
    assert (
        len(loaded) == 11
        and {*loaded} < {*files}
        and files["report.html"] == bare.report_file.read_bytes()
    )


def test_the_same_pages_have_the_same_names(bare, tmp_path):
    viewer.export(bare, tmp_path / "one")
    viewer.export(bare, tmp_path / "two")
    before = tree(tmp_path / "two")
    viewer.export(bare, tmp_path / "two")
    assert tree(tmp_path / "one") == before == tree(tmp_path / "two")


def test_an_export_keeps_what_it_did_not_write(bare, tmp_path):
    folder = tmp_path / "site"
    viewer.export(bare, folder)
    old = {*tree(folder)}
    for name in (
        ".git/HEAD",
        "CNAME",
        "data/notes.js",
        f"{next(folder.glob('ksparse-*/')).name}/mine.txt",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"mine {name}")
    mine = {name: content for name, content in tree(folder).items() if name not in old}
    assert len(mine) == 4
    Labels(bare, 32).set(3, "numbers", True)
    bare.report_file.unlink()
    viewer.export(bare, folder)
    viewer.export(bare, tmp_path / "fresh")
    assert tree(folder) == tree(tmp_path / "fresh") | mine


@pytest.mark.parametrize("name", ["report.html", "index.html"])
def test_a_foreign_file_in_the_way_is_named(bare, tmp_path, name):
    folder, report = tmp_path / "site", bare.report_file.read_bytes()
    bare.report_file.unlink()
    viewer.export(bare, folder)
    mark = json.loads((folder / static_site.MARKER).read_text())
    (folder / static_site.MARKER).write_text(
        json.dumps(mark | {"files": [file for file in mark["files"] if file != name]})
    )
    (folder / name).write_text("mine")
    bare.report_file.write_bytes(report)
    before = tree(folder)
    with pytest.raises(
        InputError,
        match=f"{name} is in the way of the pages, and ksparse did not write it; .* Nothing was changed",
    ):
        viewer.export(bare, folder)
    assert tree(folder) == before


def test_a_link_in_the_place_of_a_file_or_a_folder_of_ours_is_named(bare, tmp_path):
    folder, outside = tmp_path / "site", tmp_path / "outside"
    viewer.export(bare, folder)
    home = next(folder.glob("ksparse-*/"))
    home.rename(outside)
    home.symlink_to(outside)
    before = tree(outside)
    with pytest.raises(InputError, match=f"{home.name} is in the way"):
        viewer.export(bare, folder)
    home.unlink()
    (folder / "index.html").unlink()
    (folder / "index.html").symlink_to(outside / "base.js")
    with pytest.raises(InputError, match="index.html is in the way"):
        viewer.export(bare, folder)
    (folder / static_site.WORK).symlink_to(outside)
    with pytest.raises(InputError, match=f"{static_site.WORK} is in the way"):
        viewer.export(bare, folder)
    assert tree(outside) == before


@pytest.mark.parametrize(
    "listed",
    [
        ["../outside"],
        ["CNAME"],
        ["/etc/passwd"],
        ["data/../CNAME"],
        [".git/HEAD"],
        [5],
        "index.html",
        {"index.html": 1},
        ["style.css\n"],
        ["ksparse-0123456789abcdef/../x.js"],
    ],
)
def test_a_marker_that_lists_what_ksparse_does_not_write_is_refused(bare, tmp_path, listed):
    (tmp_path / "outside").write_text("mine")
    folder = tmp_path / "site"
    viewer.export(bare, folder)
    (folder / "CNAME").write_text("mine")
    (folder / static_site.MARKER).write_text(
        json.dumps({"format": 2, "run": "run", "files": listed})
    )
    before = tree(tmp_path)
    with pytest.raises(
        CorruptError, match=r"ksparse-site\.json does not list files that ksparse writes"
    ):
        viewer.export(bare, folder)
    assert tree(tmp_path) == before


def test_a_site_without_a_list_is_replaced_except_for_foreign_files(bare, tmp_path):
    older(tmp_path / "site", bare)
    mine = {
        "CNAME": b"mine",
        "data/notes.js": b"mine",
        "data/notes.txt": b"mine",
        ".git/HEAD": b"mine",
    }
    for name, content in mine.items():
        (tmp_path / "site" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "site" / name).write_bytes(content)
    viewer.export(bare, tmp_path / "site")
    viewer.export(bare, tmp_path / "fresh")
    assert tree(tmp_path / "site") == tree(tmp_path / "fresh") | mine


def test_a_foreign_report_in_a_site_without_a_list_stays(bare, tmp_path):
    older(tmp_path / "site", bare)
    (tmp_path / "site" / "report.html").write_text("<!DOCTYPE html>mine")
    with pytest.raises(InputError, match="report.html is in the way"):
        viewer.export(bare, tmp_path / "site")
    bare.report_file.unlink()
    viewer.export(bare, tmp_path / "site")
    assert (tmp_path / "site" / "report.html").read_text() == "<!DOCTYPE html>mine"


class Killed(BaseException):
    pass


def test_a_killed_export_leaves_the_old_site_or_the_new_one_and_the_next_mends_the_rest(
    bare, tmp_path, monkeypatch
):
    """Killed before each single change of the folder, with nothing cleaned up."""

    def whole(folder: Path) -> set[str]:
        """Return what a visitor gets: the page, and all that belongs to it."""
        page = (folder / "index.html").read_text()
        home = re.search('data-home="([^"]+)"', page)[1]
        return {
            page,
            *(
                f"{name} {content!r}"
                for name, content in tree(folder).items()
                if name.startswith(home)
            ),
        }

    viewer.export(bare, tmp_path / "old")
    Labels(bare, 32).set(3, "numbers", True)
    viewer.export(bare, tmp_path / "new")
    sites, fresh = [whole(tmp_path / name) for name in ("old", "new")], tree(tmp_path / "new")
    (tmp_path / "old" / "CNAME").write_text("mine")
    left, seen = 0, []
    changes = {
        "os.replace": os.replace,
        "os.unlink": os.unlink,
        "os.rmdir": os.rmdir,
        "os.mkdir": os.mkdir,
        "shutil.rmtree": shutil.rmtree,
    }

    def counted(change):
        def do(*given, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return change(*given, **options)

        return do

    for moment in range(0, 1_000, 5):
        folder = shutil.copytree(tmp_path / "old", tmp_path / f"at{moment}")
        left = moment
        with monkeypatch.context() as patched:
            for name, change in changes.items():
                patched.setattr(name, counted(change))
            try:
                viewer.export(bare, folder)
            except Killed:
                pass
        finished = left >= 0
        seen.append(whole(folder))
        assert seen[-1] in sites and (folder / "CNAME").read_text() == "mine"
        if moment % 3 == 0:
            viewer.export(bare, folder)
            assert tree(folder) == fresh | {"CNAME": b"mine"}
        shutil.rmtree(folder)
        if finished:
            break
    assert moment > 30 and seen[0] == sites[0] and seen[-1] == sites[1]


def test_a_killed_first_export_is_no_foreign_folder(bare, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(static_site, "_install", lambda *given: (_ for _ in ()).throw(Killed))
        patched.setattr(shutil, "rmtree", lambda *given, **options: None)
        with pytest.raises(Killed):
            viewer.export(bare, tmp_path / "site")
    assert [path.name for path in (tmp_path / "site").iterdir()] == [static_site.WORK]
    viewer.export(bare, tmp_path / "site")
    viewer.export(bare, tmp_path / "fresh")
    assert tree(tmp_path / "site") == tree(tmp_path / "fresh")


def test_a_failed_export_leaves_nothing(bare, tmp_path):
    bare.recipe_file.write_text("[")
    with pytest.raises(InputError, match=r"recipe\.toml is not TOML"):
        viewer.export(bare, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_one_export_at_a_time(bare, tmp_path, monkeypatch):
    put = static_site._install

    def meanwhile(*given):
        with pytest.raises(InputError, match=f"is in use by process {os.getpid()}; wait for it"):
            viewer.export(bare, tmp_path / "site")
        put(*given)

    monkeypatch.setattr(static_site, "_install", meanwhile)
    viewer.export(bare, tmp_path / "site")
    assert static_site.WORK not in os.listdir(tmp_path / "site")


def test_a_folder_may_be_named_by_a_link_or_a_dot(bare, tmp_path, monkeypatch):
    viewer.export(bare, tmp_path / "fresh")
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    (tmp_path / "link").symlink_to("one")
    monkeypatch.chdir(tmp_path / "two")
    for _ in range(2):
        viewer.export(bare, tmp_path / "link")
        cli.main(["view", str(bare.path), "--export", "."])
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "fresh")


@pytest.mark.parametrize(
    "make, code, why",
    [
        (lambda path: path.write_text("mine"), 2, "is a file; give a folder for the pages"),
        (lambda path: path.symlink_to("nowhere"), 5, "File exists"),
        (
            lambda path: (path.mkdir(), (path / "thesis.tex").write_text("mine")),
            2,
            "holds something else than an exported site; give an empty or a new folder",
        ),
        (
            lambda path: (path.mkdir(), (path / ".git").mkdir()),
            2,
            "holds something else than an exported site",
        ),
    ],
)
def test_a_place_that_cannot_be_a_site_is_refused(bare, tmp_path, capsys, make, code, why):
    make(tmp_path / "site")
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["view", str(bare.path), "--export", str(tmp_path / "site")])
    said = capsys.readouterr().err
    assert ended.value.code == code and why in said and "Traceback" not in said
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["report.html", "labels.json", "evals/stats.json", "evals/vocabulary.json", "evals"]
)
def test_a_link_in_a_run_is_not_published(bare, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    (bare.path / name).parent.mkdir(exist_ok=True)
    (bare.path / name).unlink(missing_ok=True)
    (bare.path / name).symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=f"{name} leads out of .*ksparse follows no such link"):
        viewer.export(bare, tmp_path / "site")
    assert not (tmp_path / "site").exists()
