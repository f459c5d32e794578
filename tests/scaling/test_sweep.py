"""Grids of recipes, runs that train together, and workers that die."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from ksparse import cli
from ksparse.config import flat, from_dict, to_dict, to_toml
from ksparse.data.live import LiveStream, memory_bytes
from ksparse.errors import InputError
from ksparse.planning.costs import LMSpec, PlanInput, add_memory, sae_memory, site_memory
from ksparse.planning.hardware import DEVICES
from ksparse.planning.sharing import stream_key
from ksparse.scaling.sweeps import launch as launching
from ksparse.scaling.sweeps import run as sweeping
from ksparse.scaling.sweeps.grid import SweepFolder, finished, group_runs, read
from ksparse.scaling.sweeps.launch import Launch
from ksparse.storage import jsonio
from ksparse.storage.run_folder import RunFolder
from ksparse.training import trainer
from ksparse.training.train import train


@pytest.fixture
def sweep_file(small_recipe, tmp_path):
    """Return sweep_file(grid="…", changes): a sweep.toml around small_recipe."""

    def write(
        grid='[grid]\n"sae.n_latents" = [32, 64]\n"sae.k" = [2, 4]\n', changes=(), name="small"
    ):
        file = tmp_path / f"{name}.toml"
        file.write_text(
            to_toml(small_recipe({"curve.held_out": 64, "curve.octaves": 3} | dict(changes)))
            + "\n"
            + grid
        )
        return file

    return write


def points(folder):
    with folder.points_file.open() as stream:
        return list(csv.DictReader(stream))


# ---- what a sweep is


def test_a_grid_is_every_combination_and_each_is_named_by_its_recipe(sweep_file):
    grid = read(sweep_file())
    assert sorted((recipe.sae.n_latents, recipe.sae.k) for recipe in grid.recipes.values()) == [
        (32, 2),
        (32, 4),
        (64, 2),
        (64, 4),
    ]
    assert all(name == jsonio.digest(recipe.fingerprint()) for name, recipe in grid.recipes.items())


def test_what_does_not_change_the_result_does_not_change_the_name(sweep_file):
    assert set(read(sweep_file(changes={"run.log_every": 7, "run.keep": 1})).recipes) == set(
        read(sweep_file()).recipes
    )


def test_several_grids_are_put_together_and_points_in_both_counted_once(sweep_file):
    grid = read(
        sweep_file('[[grid]]\n"sae.k" = [2, 4]\n[[grid]]\nsae.k = [4]\n"optim.lr" = [3e-3, 1e-2]\n')
    )
    assert sorted((recipe.sae.k, recipe.optim.lr) for recipe in grid.recipes.values()) == [
        (2, 3e-3),
        (4, 3e-3),
        (4, 1e-2),
    ]


def test_seeds_of_a_grid_share_the_order_of_the_data(small_recipe, tmp_path):
    file = tmp_path / "seeds.toml"
    table = {
        key: value for key, value in to_dict(small_recipe()).items() if key not in ("order", "seed")
    }
    file.write_text(
        to_toml(from_dict(table)).replace("order = -1\n", "") + "[grid]\nseed = [0, 1]\n"
    )
    recipes = list(read(file).recipes.values())
    assert {recipe.data_seed for recipe in recipes} == {0} and {
        recipe.seed for recipe in recipes
    } == {0, 1}
    assert len({json.dumps(stream_key(recipe)) for recipe in recipes}) == 1


@pytest.mark.parametrize(
    "grid, message",
    [
        (
            "[grid]\n"
            + "".join(
                f"{key} = [{', '.join(map(str, range(1, 1001)))}]\n" for key in ("tokens", "seed")
            ),
            r"has 1,000,000 points; at most 100,000 make a sweep",
        ),
        (
            '[grid]\n"acts.lm" = 0x' + "f" * 5_000,
            r"'acts\.lm' of the grid in .* is a number of thousands of digits; it must be a list",
        ),
        (
            '[grid]\n"acts.lm" = [0x' + "f" * 5_000 + "]",
            r"acts\.lm = a number of thousands of digits",
        ),
        ("", r"has no grid; write \[grid\] and lists of values"),
        ("[grid]\n", "has no grid"),
        ("grid = 3\n", "is not TOML|has no grid"),
        ('[grid]\n"sae.k" = 3\n', r"'sae\.k' of the grid in .*small\.toml is 3; it must be a list"),
        ('[grid]\n"sae.k" = []\n', r"is \[\]; it must be a list of at least one"),
        (
            '[grid]\n"sae.kk" = [3]\n',
            r"unknown key 'sae\.kk' in .*did you mean 'sae\.k'\? \(at the point sae\.kk = 3 of the grid\)",
        ),
        (
            '[grid]\n"sae.k" = [4, 99]\n',
            r"sae\.k is 99, more than the 64 latents .* \(at the point sae\.k = 99 of the grid\)",
        ),
        ("[grid\n", "is not TOML"),
    ],
)
def test_a_sweep_that_is_none_is_refused(sweep_file, grid, message):
    with pytest.raises(InputError, match=message):
        read(sweep_file(grid))


def test_a_sweep_that_is_not_there_says_so(tmp_path):
    with pytest.raises(InputError, match=r"sweep .*none\.toml does not exist; give a sweep\.toml"):
        read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "grid, names",
    [
        ('[grid]\n"run.kernels" = ["torch", "native"]\n"sae.k" = [2, 4]\n', '"run.kernels"'),
        ("[grid]\nthreads = [1, 2]\n", '"threads"'),
        (
            '[grid]\n"mesh.latent" = [1, 2]\n"run.keep" = [1, 2]\n',
            '"mesh.latent", "run.keep"',
        ),
        ('[[grid]]\n"sae.k" = [2]\n[[grid]]\nrun.device = ["cpu"]\n', '"run.device"'),
    ],
)
def test_a_grid_over_what_does_not_change_the_result_is_refused(sweep_file, grid, names):
    """Its points had one name, so that all but the last were lost."""
    message = (
        rf"^{re.escape(names)} in the grid in .*small\.toml do(es)? not change the result of a run, "
        r"so that its points would be the same run; give (it|them) in the recipe part of the file"
    )
    with pytest.raises(InputError, match=message):
        read(sweep_file(grid))


def test_every_key_of_a_recipe_is_part_of_its_identity_or_refused_in_a_grid(sweep_file):
    for key, value in flat(to_dict(from_dict({}))).items():
        file = sweep_file(f'[grid]\n"{key}" = [{json.dumps(value)}]\n')
        if key.partition(".")[0] in ("run", "mesh", "threads"):
            with pytest.raises(InputError, match="does not change the result"):
                read(file)
        else:
            read(file)


# ---- runs that train together


def planned(recipe):
    return PlanInput(recipe, LMSpec(16, 0, 0), DEVICES["laptop"], "torch")


def members(small_recipe, sizes, **changes):
    return {
        f"{n}-{i}": planned(small_recipe({"sae.n_latents": n} | changes))
        for i, n in enumerate(sizes)
    }


def test_runs_of_one_stream_are_one_group_and_others_are_not(small_recipe):
    todo = members(small_recipe, [64, 32]) | {"other": planned(small_recipe({"acts.context": 12}))}
    assert sorted(map(sorted, group_runs(todo, memory=1e9))) == [["32-1", "64-0"], ["other"]]


def test_runs_at_several_sites_are_one_group_with_a_buffer_for_each(small_recipe):
    todo = {
        f"{site}-{n}": planned(small_recipe({"acts.site": site, "sae.n_latents": n}))
        for site in ("resid_post.0", "resid_post.1")
        for n in (64, 32)
    }
    assert [len(group) for group in group_runs(todo, memory=1e9)] == [4]
    apart = group_runs(todo, memory=1e9, workers=2)
    assert sorted({name[:12] for name in group} for group in apart) == [
        {"resid_post.0"},
        {"resid_post.1"},
    ]
    saes = needed(todo.values())
    extra = sum(site_memory(next(iter(todo.values()))).values())
    assert extra >= memory_bytes(next(iter(todo.values())).recipe.acts, 64, 16)
    assert len(group_runs(todo, memory=saes + extra)) == 1
    assert len(group_runs(todo, memory=saes + extra - 1)) == 2


def test_shards_of_several_sites_are_apart(small_recipe):
    todo = {
        site: planned(small_recipe({"acts.site": site, "acts.shards": f"acts/{site}"}))
        for site in ("resid_post.0", "resid_post.1")
    }
    assert [len(group) for group in group_runs(todo, memory=1e9)] == [1, 1]


def test_a_pattern_of_sites_in_a_sweep_is_a_run_for_each(sweep_file):
    grid = read(
        sweep_file('[grid]\n"acts.site" = ["resid_post.*", "mlp_out.0"]\n"sae.k" = [2, 4]\n')
    )
    assert sorted((recipe.acts.site, recipe.sae.k) for recipe in grid.recipes.values()) == [
        (site, k)
        for site in ("mlp_out.0", "resid_post.0", "resid_post.1", "resid_post.2")
        for k in (2, 4)
    ]
    outside = read(sweep_file(changes={"acts.site": "resid_post.[01]"}))
    assert len(outside) == 2 * 4
    assert all(name == jsonio.digest(recipe.fingerprint()) for name, recipe in grid.recipes.items())


def test_a_sweep_over_sites_reads_the_text_once_and_its_points_say_the_site(
    sweep_file, tmp_path, monkeypatch
):
    passes, own = [], LiveStream._read
    monkeypatch.setattr(
        LiveStream, "_read", lambda *args: passes.append(args[0].sites) or own(*args)
    )
    grid = read(sweep_file('[grid]\n"acts.site" = ["resid_post.[01]"]\n'))
    folder = SweepFolder(tmp_path / "sites")
    assert sweeping.sweep(grid, folder) == {}
    assert set(passes) == {("resid_post.0", "resid_post.1")}
    assert [row["site"] for row in points(folder)] == ["resid_post.0", "resid_post.1"]
    assert folder.table().header[0] == "site"
    planned = jsonio.read_json(folder.plan_file)["cohorts"]
    assert len(planned) == 1


def needed(cases):
    return add_memory(sae_memory(case) for case in cases)


def test_groups_fit_into_memory(small_recipe):
    todo = members(small_recipe, [4096] * 6 + [64] * 3)
    one = needed([todo["4096-0"]])
    for limit in (1.5 * one, 2.5 * one, 100 * one):
        groups = group_runs(todo, memory=limit)
        assert sorted(name for names in groups for name in names) == sorted(todo)
        assert all(needed(todo[name] for name in names) <= limit for names in groups)
    assert len(groups) == 1


def test_there_is_work_for_every_worker_and_it_is_even(small_recipe):
    todo = members(small_recipe, [4096, 4096, 2048, 2048, 64])
    groups = group_runs(todo, memory=1e12, workers=2)
    work = [sum(todo[name].recipe.sae.n_latents for name in names) for names in groups]
    assert len(groups) == 2 and max(work) < 1.1 * min(work)
    assert len(group_runs(todo, memory=1e12, workers=9)) == 5, "no more than there are runs"


# ---- training


def test_a_sweep_trains_collects_and_is_the_same_as_single_runs(sweep_file, tmp_path):
    grid, folder = read(sweep_file()), SweepFolder(tmp_path / "sweep")
    plans = []
    assert sweeping.sweep(grid, folder, planned=plans.append) == {}
    assert [len(cohort.runs) for cohort in plans[0].cohorts] == [4] and plans[0].flops > 0
    name, recipe = next(iter(grid.recipes.items()))
    alone = train(recipe, tmp_path / "alone")
    assert [row["loss"] for row in folder.run(name).curve()] == [
        row["loss"] for row in alone.curve()
    ]
    rows = points(folder)
    assert [(int(row["n"]), int(row["k"])) for row in rows] == [(32, 2), (64, 2), (32, 4), (64, 4)]
    row = next(row for row in rows if row["run"] == name)
    last = alone.curve()[-1]
    assert (
        float(row["loss"]) == last["loss"]
        and int(row["tokens"]) == 768
        and row["converged"] == "false"
        and row["tokens_to_convergence"] == ""
    )
    assert (
        float(row["flops"]) == last["flops"]
        and row["d_model"] == "16"
        and row["activation"] == "topk"
        and float(row["lm_parameters"]) > 0
    )
    with folder.curves_file.open() as stream:
        assert len(list(csv.DictReader(stream))) == sum(len(run.curve()) for run in folder.runs())


def test_finished_runs_are_skipped_and_a_wider_grid_adds_to_them(sweep_file, tmp_path):
    folder = SweepFolder(tmp_path / "sweep")
    sweeping.sweep(read(sweep_file()), folder)
    before = {run.name: run.metrics() for run in folder.runs()}
    wider = read(
        sweep_file('[grid]\n"sae.n_latents" = [32, 64]\n"sae.k" = [2, 4, 8]\n', name="wider")
    )
    plans = []
    sweeping.sweep(wider, folder, planned=plans.append)
    assert len(plans[0].done) == 4 and sum(len(cohort.runs) for cohort in plans[0].cohorts) == 2
    assert len(points(folder)) == 6 and all(
        folder.run(name).metrics() == rows for name, rows in before.items()
    )
    assert folder.file.read_text() == wider.file.read_text() and len(read(folder.file)) == 6


def test_failed_runs_are_named_and_tried_again(sweep_file, tmp_path, monkeypatch):
    grid, folder, own = read(sweep_file()), SweepFolder(tmp_path / "sweep"), trainer.train_step

    def poisoned(optimizer, x, state, recipe, dead):
        nan = recipe.sae.k == 4 and recipe.sae.n_latents == 64
        return own(optimizer, x * float("nan") if nan else x, state, recipe, dead)

    monkeypatch.setattr(trainer, "train_step", poisoned)
    failed = sweeping.sweep(grid, folder)
    name = next(
        name
        for name, recipe in grid.recipes.items()
        if (recipe.sae.k, recipe.sae.n_latents) == (4, 64)
    )
    assert list(failed) == [name] and "NaN or infinite at step 1" in failed[name]
    assert (
        jsonio.read_json(folder.error_file(name)) == {"error": failed[name]}
        and len(points(folder)) == 3
    )
    monkeypatch.setattr(trainer, "train_step", own)
    assert (
        sweeping.sweep(grid, folder) == {}
        and not folder.error_file(name).exists()
        and len(points(folder)) == 4
    )


def test_two_leaders_of_one_sweep_are_refused(sweep_file, tmp_path):
    folder = SweepFolder(tmp_path / "sweep")
    with folder.locked(), pytest.raises(InputError, match=r"sweep is in use by process \d+"):
        sweeping.sweep(read(sweep_file()), folder)


def test_a_run_that_is_not_of_the_sweep_is_refused(sweep_file, tmp_path):
    with pytest.raises(InputError, match=r"has no run 'nonsense'; its runs are "):
        sweeping.train_here(read(sweep_file()), SweepFolder(tmp_path / "sweep"), ["nonsense"])


def test_converged_runs_count_as_finished(small_recipe, tmp_path):
    recipe = small_recipe(
        {"curve.held_out": 64, "curve.converged": 0.9, "curve.octaves": 4, "tokens": 64 * 64}
    )
    run = train(recipe, tmp_path / "run")
    assert finished(run) and run.metrics()[-1]["step"] < recipe.steps
    (run.checkpoints()[-1] / "state.json").write_text("{")
    assert not finished(run) and not finished(RunFolder(tmp_path / "none"))


# ---- the command line


def test_the_command_line_plans_sweeps_and_says_what_is_next(sweep_file, tmp_path, capsys):
    cli_sweep = lambda *more: cli.main(
        ["sweep", str(sweep_file()), "--out", str(tmp_path / "sweep"), *more]
    )
    cli_sweep("--plan", "True")
    assert "4 to do in 1 cohorts" in capsys.readouterr().err and not (tmp_path / "sweep").exists()
    cli_sweep()
    seen = capsys.readouterr()
    assert "4 of 4 runs finished" in seen.out and "ksparse fit" in seen.out and "FLOPs" in seen.err
    cli.main(["sweep", str(tmp_path / "sweep")])
    assert "4 of them finished; 0 to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"workers": 0}, "workers of at least 1"),
        (
            {"workers": 2},
            "the launcher 'here' is one process, but workers is 2; give --launcher processes",
        ),
        ({"launcher": "slurm", "slurm": ("gpu",)}, r"'gpu' of --slurm is not name=value"),
    ],
    ids=str,
)
def test_launches_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Launch(**options)


# ---- workers


class Scripted:
    """A worker that ends after some polls, having finished what it was told to."""

    def __init__(self, finishes, polls=1):
        self.finishes, self.polls, self.stopped = finishes, polls, False

    def done(self):
        self.polls -= 1
        if self.polls < 0:
            self.finishes()
        return self.polls < 0

    def why(self):
        return "scripted end"

    def stop(self):
        self.stopped = True


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(launching, "POLL", 0.001)


def test_a_worker_that_died_is_started_again_with_what_is_left():
    done, starts = set(), []

    def start(names, place):
        starts.append(names)
        first = sum(names == other for other in starts) == 1
        return Scripted(lambda: done.update(names[:1] if first else names))

    failed = launching.run(
        [["a", "b"], ["c"]],
        start,
        lambda names: [name for name in names if name not in done],
        workers=2,
        retries=2,
    )
    assert failed == {} and starts == [["a", "b"], ["c"], ["b"]]


def test_a_job_that_never_ends_well_is_given_up_and_named():
    starts, warned = [], []
    failed = launching.run(
        [["a", "b"]],
        lambda names, place: starts.append(names) or Scripted(lambda: None),
        lambda names: names,
        workers=1,
        retries=2,
        warn=warned.append,
    )
    assert (
        failed == {"a": "scripted end", "b": "scripted end"}
        and len(starts) == 3
        and len(warned) == 2
    )


def test_no_more_workers_than_asked_for_and_places_are_used_again():
    busy, most, places, done = set(), [], [], set()

    def start(names, place):
        busy.add(place)
        places.append(place)
        most.append(len(busy))
        return Scripted(lambda: (busy.discard(place), done.update(names)), polls=2)

    launching.run(
        [[str(i)] for i in range(7)],
        start,
        lambda names: [name for name in names if name not in done],
        workers=3,
        retries=0,
    )
    assert max(most) == 3 and set(places) == {0, 1, 2} and len(places) == 7


def test_stopping_stops_the_workers():
    workers = []

    def observe():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launching.run(
            [["a"], ["b"]],
            lambda names, place: workers.append(Scripted(lambda: None, 99)) or workers[-1],
            lambda names: names,
            workers=2,
            retries=0,
            observe=observe,
        )
    assert [worker.stopped for worker in workers] == [True, True]


def test_a_process_says_how_it_ended(tmp_path):
    for code, message in [
        ("print('bad'); raise SystemExit(3)", "exit code 3: bad"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
    ]:
        worker = launching.Process(
            [sys.executable, "-c", code], tmp_path / f"{len(code)}.log", dict(os.environ)
        )
        while not worker.done():
            time.sleep(0.01)
        assert worker.why() == message
    worker = launching.Process(
        [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", dict(os.environ)
    )
    worker.stop()
    assert worker.why() == "killed by signal 15"


@pytest.fixture
def hostile_folder(tmp_path, monkeypatch):
    """Work in a folder with modules that a worker imports; return what they write when run."""
    folder, mark = tmp_path / "somebodys", tmp_path / "was_run"
    folder.mkdir()
    for name in ("ksparse", "tyro", "torch", "json", "submitit", "pathlib"):
        (folder / f"{name}.py").write_text(
            f"open({str(mark)!r}, 'a').write({name!r}); raise SystemExit(1)"
        )
    monkeypatch.chdir(folder)
    return mark


def test_a_worker_runs_no_module_of_the_working_folder(hostile_folder, tmp_path):
    worker = launching.processes(tmp_path / "sweep", 1)(["x"], 0)
    worker.process.wait(120)
    assert worker.why().startswith("exit code 2: ksparse sweep: ") and not hostile_folder.exists()
    done = subprocess.run(
        launching.command(tmp_path / "sweep", ["x"]), capture_output=True, text=True, timeout=120
    )
    assert (
        "Traceback" not in done.stderr and done.returncode == 2 and not hostile_folder.exists()
    ), "what submitit is given"


def test_a_sweeps_logs_do_not_go_where_a_link_leads(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "logs").symlink_to("../out")
    with pytest.raises(InputError, match="logs leads out of .*sweep"):
        launching.processes(tmp_path / "sweep", 1)(["x"], 0)
    (tmp_path / "sweep" / "points.csv").symlink_to("../out/points.csv")
    with pytest.raises(InputError, match="points.csv leads out of .*sweep"):
        SweepFolder(tmp_path / "sweep").points_file


def killed_once(folder, grid, launch, monkeypatch):
    """Run a sweep of which one worker is killed as soon as a run of it has a checkpoint."""
    victims, own = [], launching.Process.done

    def done(self):
        if not victims and any(run.checkpoints() for run in folder.runs()):
            victims.append(self)
            os.killpg(self.process.pid, signal.SIGKILL)
        return own(self)

    monkeypatch.setattr(launching.Process, "done", done)
    failed = sweeping.sweep(grid, folder, launch)
    return victims, failed


@pytest.mark.slow
def test_a_killed_worker_of_two_costs_no_run_and_changes_no_loss(sweep_file, tmp_path, monkeypatch):
    """Real processes, one of them killed with SIGKILL in the middle."""
    grid = read(
        sweep_file(changes={"tokens": 400 * 64, "run.save_every": 20, "run.log_every": 100})
    )
    undisturbed, folder = SweepFolder(tmp_path / "undisturbed"), SweepFolder(tmp_path / "sweep")
    assert sweeping.sweep(grid, undisturbed) == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    victims, failed = killed_once(
        folder, grid, Launch(launcher="processes", workers=2), monkeypatch
    )
    assert victims and failed == {}
    assert points(folder) == points(undisturbed)


def test_the_cluster_launcher_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(
        InputError,
        match=r"the launcher 'slurm' needs the package submitit: pip install 'ksparse\[slurm\]'",
    ):
        launching.submitted(tmp_path, Launch(launcher="slurm"))


@pytest.mark.slow
def test_submitit_runs_the_cohorts_and_a_killed_job_is_submitted_again(
    sweep_file, tmp_path, monkeypatch, hostile_folder
):
    """submitit's local executor stands for a cluster. Nobody knows where its pickles are."""
    pytest.importorskip("submitit", reason="submitit is not installed (the extra slurm)")
    grid = read(
        sweep_file(changes={"tokens": 400 * 64, "run.save_every": 20, "run.log_every": 100})
    )
    undisturbed, folder = SweepFolder(tmp_path / "undisturbed"), SweepFolder(tmp_path / "sweep")
    sweeping.sweep(grid, undisturbed)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    killed, own = [], launching.Submitted.done

    def done(self):
        if not killed and any(run.checkpoints() for run in folder.runs()):
            killed.append(self.job.job_id)
            for run in folder.runs():  # whoever trains there: the lock names it
                holder = (run.path / ".lock").read_text()
                if holder and not finished(run):
                    os.kill(int(holder), signal.SIGKILL)
                    break
        return own(self)

    monkeypatch.setattr(launching.Submitted, "done", done)
    assert sweeping.sweep(grid, folder, Launch(launcher="local", workers=2)) == {}
    assert killed and points(folder) == points(undisturbed) and not hostile_folder.exists()
    assert (
        all(
            re.fullmatch("jobs-[0-9a-f]{16}", path.name)
            for path in (folder.path / "logs").iterdir()
        )
        and "PYTHONSAFEPATH" not in os.environ
    )
