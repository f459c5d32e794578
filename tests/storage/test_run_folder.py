"""A run's folder: metrics that survive a kill, checkpoints that are intact or passed over, one process at a time."""

import os
import subprocess
import sys

import pytest

from ksparse.config import Recipe, to_toml
from ksparse.errors import CorruptError, InputError
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.run_folder import RunFolder, open_run


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(to_toml(Recipe(seed=5)))
    return RunFolder(tmp_path / "run")


def test_a_folder_without_recipe_is_no_run(tmp_path):
    with pytest.raises(
        InputError, match="is not a run: it has no recipe.toml. `ksparse train --out .*` makes one"
    ):
        open_run(tmp_path)
    with pytest.raises(InputError, match="is not a run"):
        open_run(tmp_path / "nowhere")


def test_an_empty_run_has_nothing_and_says_so(run):
    assert open_run(run.path).recipe() == Recipe(seed=5) and run.name == "run"
    assert (
        run.metrics() == []
        and run.checkpoints() == []
        and run.eval("stats") is None
        and run.environment() == {}
    )
    assert run.newest_intact() == (None, [])


def test_metrics_come_back_by_step_with_the_last_line_of_each(run):
    for step, nmse in [(1, 0.9), (3, 0.7), (2, 0.8), (3, 0.6)]:
        run.append_metrics({"step": step, "nmse": nmse})
    assert run.metrics() == [
        {"step": 1, "nmse": 0.9},
        {"step": 2, "nmse": 0.8},
        {"step": 3, "nmse": 0.6},
    ]


def test_the_half_line_of_a_killed_process_is_passed_over(run):
    run.append_metrics({"step": 1, "nmse": 0.5})
    with run.metrics_file.open("a") as stream:
        stream.write('{"step": 2, "nm')
    assert run.metrics() == [{"step": 1, "nmse": 0.5}]


@pytest.mark.parametrize(
    "text, last",
    [
        ("", {}),
        ('{"step": 1}\n{"step": 2}\n', {"step": 2}),
        ('{"step": 1}\n{"step": 2, "to', {"step": 1}),
        ('{"step": 1}\n[2]\nNaN\n', {"step": 1}),
        ('{"step": 1, "more": "' + "x" * 200_000 + '"}\n{"step": 2}\n', {"step": 2}),
        ('{"step": 1, "more": "' + "x" * 200_000 + '"}\n', {}),
    ],
)
def test_the_last_whole_line_is_read_from_the_end_of_a_file(tmp_path, text, last):
    (tmp_path / "m.jsonl").write_text(text)
    assert jsonio.read_last_line(tmp_path / "m.jsonl") == last


def test_what_a_run_says_of_itself_does_not_read_its_metrics(run, monkeypatch):
    run.recipe_file.write_text(to_toml(Recipe()))
    for step in range(2000):
        run.append_metrics({"step": step, "tokens": 10 * step, "loss": 0.5})
    monkeypatch.setattr(jsonio, "read_lines", lambda *args, **keys: pytest.fail("all were read"))
    assert run.describe()["tokens"] == 19_990


def test_metrics_never_hold_nan(run):
    with pytest.raises(ValueError):
        run.append_metrics({"step": 1, "nmse": float("nan")})
    assert run.metrics() == []


def test_lines_of_steps_that_are_run_again_are_dropped(run):
    for step in range(1, 6):
        run.append_metrics({"step": step})
    with run.metrics_file.open("a") as stream:
        stream.write('{"step": 6, "nm')
    run.drop_lines_after(3)
    run.append_metrics({"step": 4})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
    assert len(run.metrics_file.read_text().splitlines()) == 4


def checkpoint(run, step):
    with checksums.checksummed_dir(run.checkpoint(step), step=step) as tmp:
        (tmp / "state.json").write_text(f'{{"step": {step}}}')


def test_checkpoints_are_listed_by_step_without_temporary_ones(run):
    for step in (20, 3, 100_000_000):
        checkpoint(run, step)
    (run.path / "checkpoints" / ".tmp-step-00000021-99").mkdir()
    (run.path / "checkpoints" / "step-notes.txt").write_text("")
    assert [path.name for path in run.checkpoints()] == [
        "step-00000003",
        "step-00000020",
        "step-100000000",
    ]


def test_the_newest_intact_checkpoint_is_found_and_the_damage_named(run):
    for step in (1, 2, 3, 4):
        checkpoint(run, step)
    (run.checkpoint(4) / "state.json").write_text("{}")
    (run.checkpoint(3) / checksums.MANIFEST).unlink()
    path, wrong = run.newest_intact()
    assert path == run.checkpoint(2)
    assert (
        len(wrong) == 2
        and "step-00000004/state.json is damaged" in wrong[0]
        and "step-00000003/manifest.json is missing" in wrong[1]
    )
    for step in (1, 2):
        (run.checkpoint(step) / "state.json").unlink()
    assert run.newest_intact()[0] is None and len(run.newest_intact()[1]) == 4


def test_a_checkpoint_under_another_ones_name_is_passed_over(run):
    for step in (4, 8):
        checkpoint(run, step)
    run.checkpoint(4).rename(run.path / "away")
    run.checkpoint(8).rename(run.checkpoint(4))
    (run.path / "away").rename(run.checkpoint(8))
    path, wrong = run.newest_intact()
    assert (
        path is None
        and "step-00000008 is that of step 4, under another name" in wrong[0]
        and len(wrong) == 2
    )


def test_a_checkpoint_of_another_recipe_is_refused_and_the_keys_named(run):
    ours = Recipe(seed=5).fingerprint()
    with checksums.checksummed_dir(run.checkpoint(4), step=4, recipe=ours) as tmp:
        (tmp / "state.json").write_text("{}")
    assert run.newest_intact() == (run.checkpoint(4), [])
    run.recipe_file.write_text(to_toml(Recipe(seed=5, tokens=1000, threads=3)))
    with pytest.raises(
        InputError,
        match=r"step-00000004 was trained with another recipe than .*recipe.toml has now: tokens: 800000 -> 1000\. Put back what was there",
    ):
        run.newest_intact()


def test_a_checkpoint_of_a_version_with_other_keys_is_compared_in_those_that_both_have(run):
    theirs = Recipe(seed=5).fingerprint()
    del theirs["curve"], theirs["sae"]["init"]
    with checksums.checksummed_dir(run.checkpoint(4), step=4, recipe=theirs | {"gone": 1}):
        pass
    assert run.newest_intact() == (run.checkpoint(4), [])


def test_folders_that_are_no_checkpoints_are_not_looked_at(run):
    checkpoint(run, 4)
    for name in ("step-x", "step-", "step-٣", "step-8x", "other"):
        (run.path / "checkpoints" / name).mkdir()
    assert run.checkpoints() == [run.checkpoint(4)]


def test_a_result_under_another_ones_name_is_refused(run):
    jsonio.write_json(run.eval_file("stats"), {"name": "downstream"}, sealed=True)
    with pytest.raises(
        CorruptError, match="stats.json is a result of 'downstream', under another name"
    ):
        run.eval("stats")


def test_alarms_come_back_in_order_and_those_of_steps_taken_again_are_dropped(run):
    rows = [
        {"step": 3, "alarm": "dead"},
        {"step": 3, "alarm": "grad_norm"},
        {"step": 9, "alarm": "dead"},
    ]
    for row in rows:
        run.append_alarm(row)
    assert run.alarms() == rows
    run.drop_lines_after(3)
    assert run.alarms() == rows[:2]


def test_a_damaged_result_is_named(run):
    jsonio.write_json(run.eval_file("stats"), {"nmse": 0.5})
    assert run.eval("stats") == {"nmse": 0.5}
    run.eval_file("stats").write_text('{"nmse": ')
    with pytest.raises(CorruptError, match="stats.json is not JSON"):
        run.eval("stats")


def test_the_lock_refuses_a_second_process_and_names_the_first(tmp_path):
    code = f"import pathlib; from ksparse.storage.run_folder import RunFolder\nwith RunFolder(pathlib.Path({str(tmp_path)!r})).locked(): pass"
    with RunFolder(tmp_path).locked():
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert (
            f"is in use by process {os.getpid()}; wait for it, or give another --out" in done.stderr
        )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode
        == 0
    )


def test_the_lock_goes_with_a_killed_process(tmp_path):
    code = (
        "import pathlib, time; from ksparse.storage.run_folder import RunFolder\n"
        f"with RunFolder(pathlib.Path({str(tmp_path)!r})).locked():\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"in use by process {holder.pid}"):
            with RunFolder(tmp_path).locked():
                pass
        holder.kill()
    with RunFolder(tmp_path).locked():
        pass


def test_the_lock_is_let_go_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with RunFolder(tmp_path).locked():
            1 / 0
    with RunFolder(tmp_path).locked():
        pass


@pytest.mark.parametrize(
    "name, ask",
    [
        ("recipe.toml", lambda run: run.recipe()),
        ("environment.json", lambda run: run.environment()),
        ("metrics.jsonl", lambda run: run.metrics()),
        ("metrics.jsonl", lambda run: run.append_metrics({"step": 1})),
        ("curve.jsonl", lambda run: run.curve()),
        ("curve.jsonl", lambda run: run.append_curve({"step": 1})),
        ("alarms.jsonl", lambda run: run.append_alarm({"step": 1})),
        ("report.html", lambda run: run.report_file),
        ("evals", lambda run: run.eval("stats")),
        ("evals/stats.json", lambda run: run.eval("stats")),
        ("evals/n2g.safetensors", lambda run: run.arrays_file("n2g")),
        ("evals", lambda run: run.lock_evals().__enter__()),
        ("checkpoints", lambda run: run.checkpoints()),
        ("checkpoints", lambda run: run.checkpoint(4)),
        ("checkpoints/step-00000004", lambda run: run.newest_intact()),
        (".lock", lambda run: run.locked().__enter__()),
        ("figures", lambda run: run.remove_leftovers()),
    ],
)
def test_nothing_of_a_run_is_read_or_written_where_a_link_leads_out_of_it(run, tmp_path, name, ask):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".tmp-mine").write_text("")
    for folder in ("evals", "checkpoints"):
        (run.path / folder).mkdir()
    jsonio.write_json(run.path / "evals" / "n2g.json", {"name": "n2g"})
    link = run.path / name
    if link.is_dir():
        link.rename(tmp_path / "out" / "away")
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "out")
    with pytest.raises(InputError, match=f"{name} leads out of .*run, to .*out"):
        ask(run)
    assert (tmp_path / "out" / ".tmp-mine").exists()


def test_leftovers_of_results_and_figures_go_and_what_is_being_written_stays(run):
    for folder in ("evals", "figures", "checkpoints", "."):
        (run.path / folder / ".tmp-x").mkdir(parents=True)
        (run.path / folder / ".tmp-x.json-123").write_text("of an older version")
    with atomic.atomic_file(run.eval_file("stats")) as tmp:
        tmp.write_text("{}")
        run.remove_leftovers()
        assert [path.name for path in run.path.rglob(".tmp-*")] == [tmp.parent.name]
    assert run.eval("stats") == {}


def test_what_is_written_to_a_run_copied_by_hard_links_stays_in_it(run, tmp_path):
    run.append_metrics({"step": 1})
    with run.locked():
        pass
    before = (tmp_path / "run" / ".lock").read_text()
    (tmp_path / "run" / ".lock").write_text("mine")
    copy = RunFolder(tmp_path / "copy")
    copy.path.mkdir()
    for name in (".lock", "metrics.jsonl", "recipe.toml"):
        os.link(run.path / name, copy.path / name)
    with copy.locked():
        copy.append_metrics({"step": 2})
    assert before == str(os.getpid()) and (run.path / ".lock").read_text() == "mine"
    assert run.metrics() == [{"step": 1}]
    assert copy.metrics() == [{"step": 1}, {"step": 2}]
