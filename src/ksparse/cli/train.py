"""Verbs that train: demo, train, finetune, resume."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ksparse import config as recipes
from ksparse.cli.arguments import parse, parse_changes, parse_recipe, split_folder, verb
from ksparse.cli.evaluate import evaluate_saes
from ksparse.cli.output import (
    ProgressBar,
    format_estimate,
    is_first_process,
    print_status,
    write_report,
)
from ksparse.cli.report import raise_on_signal
from ksparse.config import Recipe
from ksparse.config.evaluation import EvalConfig
from ksparse.errors import InputError
from ksparse.planning.tuning import check_parent, default_folder, finetune_recipe, fit_buffer
from ksparse.progress import format_duration, format_elapsed, report
from ksparse.scaling.processes import Processes, check_mesh, in_jobs, local_command
from ksparse.storage.run_folder import RunFolder, open_run


@dataclass(frozen=True)
class TrainArgs(Recipe):
    """Options of `ksparse train`."""

    out: str = ""
    """Folder of the run; by default runs/NAME, with the name of the recipe."""


@dataclass(frozen=True)
class LaunchArgs(Processes, TrainArgs):
    """Options of `ksparse train`, and where its processes are started."""


@verb
def train(arguments: list[str]) -> None:
    """train [RECIPE.toml] [--launch local|slurm] [--key value …]

    Train an autoencoder, or one at each of several sites (--acts.site 'resid_post.*'); the same
    command resumes an interrupted run.
    """
    recipe, options, name = parse_recipe(LaunchArgs, "train", arguments)
    run = RunFolder(Path(options.pop("out") or f"runs/{name}"))
    processes = Processes(**options)
    trained: RunFolder | dict[str, RunFolder] = run
    if processes.launch == "here":
        trained = train_run(recipe, run)
    else:
        _launch(recipe, run, processes)
    if isinstance(trained, dict):
        print_sites(run.path, trained)
    else:
        print_next_steps(run)


def _launch(recipe: Recipe, run: RunFolder, processes: Processes) -> None:
    """Train on processes that are started for it. On this machine torchrun takes this process's
    place."""
    check_mesh(recipe, processes)
    if processes.launch == "slurm" and recipe.acts.names_several_sites:
        raise InputError(
            f"acts.site is {recipe.acts.site!r}, which may name several sites, and --launch slurm "
            "goes on until one run has finished; give one site, or `ksparse sweep` with acts.site "
            "in its grid"
        )
    if processes.launch == "local":
        command, environment = local_command(recipe, run, processes)
        sys.stdout.flush()
        os.execve(command[0], command, environment)
    with (
        ProgressBar("training") as bar,
        raise_on_signal(signal.SIGTERM),
        raise_on_signal(signal.SIGHUP),
    ):

        def observe() -> None:
            row = run.metrics()[-1] if run.metrics_file.is_file() else None
            if row:
                bar.note_metrics(row)
            report("training", row["step"] if row else 0, recipe.steps)

        in_jobs(recipe, run, processes, observe=observe, warn=print_status)


@dataclass(frozen=True)
class FinetuneArgs(TrainArgs):
    """Options of `ksparse finetune`; what is not given is the run's own."""

    loss: Literal["", "kl", "ce", "none"] = ""
    """Short for --sae.lm-loss: the loss of the LM with reconstructions in place of the site's
    activations. kl (default): its divergence from the unchanged LM. ce: its cross-entropy. none:
    neither, the control with the same tokens."""
    out: str = ""
    """Folder of the new run; by default RUN-kl, RUN-ce or RUN-plain."""


@verb
def finetune(arguments: list[str]) -> None:
    """finetune RUN [--loss kl|ce|none] [--tokens N] [--key value …]

    Train a run's autoencoder on, with a loss of the LM behind the site; writes a new run.
    """
    folder, flags = split_folder("finetune", arguments)
    parent = open_run(folder) if folder else None
    recipe = finetune_recipe(parent) if parent is not None else Recipe()
    recipe, options = parse_changes(FinetuneArgs, "finetune RUN", flags, recipe)
    if parent is None:
        return
    check_parent(parent, recipe)
    recipe = fit_buffer(recipe)
    if options["loss"]:
        loss = dataclasses.replace(recipe.sae, lm_loss=options["loss"])
        recipe = dataclasses.replace(recipe, sae=loss)
    run = RunFolder(Path(options["out"] or default_folder(parent, recipe)))
    train_run(recipe, run)
    print_next_steps(run)
    if is_first_process():
        print(f"         ksparse compare {parent.path} {run.path}")


@dataclass(frozen=True)
class ResumeArgs:
    """What a resumed run may change, because the result does not depend on it."""

    run: recipes.RunConfig
    mesh: recipes.MeshConfig


@verb
def resume(arguments: list[str]) -> None:
    """resume RUN [--run.key value …]

    Resume an interrupted run, on the same mesh or another.
    """
    folder, flags = split_folder("resume", arguments)
    run = open_run(folder) if folder else None
    recipe = run.recipe() if run else Recipe()
    options = parse(ResumeArgs, "resume RUN", flags, default=ResumeArgs(recipe.run, recipe.mesh))
    if run is None:
        return
    train_run(dataclasses.replace(recipe, run=options.run, mesh=options.mesh), run)
    print_next_steps(run)


DEMO_RECIPE = Recipe()
DEMO_EVALS = EvalConfig(
    tokens=20_000,
    per_document=128,
    probe_rows=300,
    latents=60,
    n2g_examples=8,
    ablation_positions=16,
    ablation_latents=256,
)
"""Small samples: all that the demo does takes about 3 minutes on two cores."""
FIRST_EVALS, MORE_EVALS = ("downstream", "stats"), ("probes", "n2g", "ablation")
LATER_EVAL = "explained_loss"
"""Explains every latent, which alone would take as long as the whole demo."""


@verb
def demo(arguments: list[str]) -> None:
    """demo [--out DIR]

    Train on the built-in LM, evaluate and report: about 3 minutes, without a network.
    """

    @dataclass(frozen=True)
    class DemoArgs:
        """Options of `ksparse demo`."""

        out: str = "runs/demo"
        """Folder of the run."""

    run = RunFolder(Path(parse(DemoArgs, "demo", arguments).out))
    recipe, began = DEMO_RECIPE, time.monotonic()
    print_status(
        f"1/3 training {recipe.sae.n_latents:,} latents, k = {recipe.sae.k}, on {recipe.tokens:,} "
        "activations of a small LM of Python source"
    )
    train_run(recipe, run)
    print_status("2/3 evaluating the reconstruction on held-out files")
    results = evaluate_saes([str(run.path)], list(FIRST_EVALS), DEMO_EVALS)[str(run.path)]
    write_report(run)
    spent = format_elapsed(time.monotonic() - began)
    print(_summarize_reconstruction(recipe, run, results, spent), flush=True)
    print_status("3/3 evaluating the latents: probes, explanations, ablations")
    began_more = time.monotonic()
    results = evaluate_saes([str(run.path)], list(MORE_EVALS), DEMO_EVALS)[str(run.path)]
    later = _later_seconds(recipe, time.monotonic() - began_more)
    write_report(run)
    spent = format_elapsed(time.monotonic() - began)
    print(_summarize_latents(results, spent))
    print(_demo_next_steps(run, later))


def _summarize_reconstruction(
    recipe: Recipe, run: RunFolder, results: dict[str, dict[str, Any]], spent: str
) -> str:
    stats, downstream = (
        {key: format_estimate(results[name][key]) for key in keys}
        for name, keys in (
            ("stats", ("nmse", "l0", "dead_fraction")),
            ("downstream", ("ce_clean", "ce_spliced", "recovered", "compute_fraction")),
        )
    )
    size = f"{recipe.sae.n_latents:,} latents, k = {recipe.sae.k}, {recipe.tokens:,} tokens"
    return f"""
{recipe.acts.lm} at {recipe.acts.site}: {size}, {spent} so far
  normalised MSE          {stats["nmse"]}   (1 = predicting the mean)
  L0, dead latents        {stats["l0"]}, {stats["dead_fraction"]}
  loss of the LM          {downstream["ce_clean"]} -> {downstream["ce_spliced"]} nats per token \
with the reconstruction spliced in
  zero-ablation recovered {downstream["recovered"]}
  compute fraction        {downstream["compute_fraction"]}   (the share of the pre-training compute
                          with which a model reaches this loss)
report   {run.report_file.resolve().as_uri()}
         (the training curve and these numbers; it is written again at the end)
"""


def _summarize_latents(results: dict[str, dict[str, Any]], spent: str) -> str:
    def estimate(evaluation: str, key: str) -> str:
        return format_estimate(results[evaluation][key])

    return f"""
its latents, {spent} in all
  probe loss              {estimate("probes", "probe_loss")}   (best channel \
{estimate("probes", "channel_loss")}, random SAE
                          {estimate("probes", "random_sae_loss")})
  explanations (N2G)      recall {estimate("n2g", "recall")}, precision \
{estimate("n2g", "precision")}
  ablation sparsity       {estimate("ablation", "ablation_sparsity")}   (channels \
{estimate("ablation", "channel_sparsity")})
"""


def _later_seconds(recipe: Recipe, spent: float) -> float:
    """Return about how long `LATER_EVAL` takes, from the time that `MORE_EVALS` took."""
    from ksparse.planning import evaluation, plan

    rate = 2e10  # FLOP/s of the LM on two cores; a slower machine shows in `spent`
    case = plan.eval_case(plan.plan_input(recipe, plan.read_lm_spec(recipe), "cpu"))
    small = dataclasses.replace(case, options=DEMO_EVALS)
    planned = sum(evaluation.seconds(name, small, rate) for name in MORE_EVALS)
    return spent / planned * evaluation.seconds(LATER_EVAL, case, rate)


def _demo_next_steps(run: RunFolder, later: float) -> str:
    """Return what to do after the demo, in the order in which a newcomer wants it."""
    return f"""{_activate_line()}report   {run.report_file.resolve().as_uri()}
look     ksparse view {run.path}
         (its latents in the browser; needs pip install 'ksparse[serve]')
more     ksparse eval {run.path} {LATER_EVAL}
         (how well explanations predict; about {format_duration(later)} on this machine)
next     ksparse train --acts.lm gpt2 --acts.site resid_post.6 --acts.text my-texts/ \\
             --tokens 200000 --out runs/mine
         (a model and a text of your own: minutes on a laptop; then `ksparse eval runs/mine \
downstream stats`)
bigger   recipes/ in the repository, such as recipes/gpt2-small-32k.toml for a GPU;
         `ksparse plan RECIPE` says what each costs"""


def _activate_line() -> str:
    """Return the line that puts `ksparse` on the PATH; '' where it is there, or of no use."""
    activate = Path(sys.prefix) / "bin" / "activate"
    if shutil.which("ksparse") or not activate.is_file():
        return ""
    with suppress(ValueError):
        activate = activate.relative_to(Path.cwd())
    return f"first    source {shlex.quote(str(activate))}\n         (once in each new shell)\n"


def train_run(recipe: Recipe, run: RunFolder) -> RunFolder | dict[str, RunFolder]:
    """Train in a run's folder, or that of several sites' runs, with progress shown by the first
    process; return what `ksparse.train` returns."""
    if not is_first_process():
        from ksparse.training.train import train as train_quietly

        return train_quietly(recipe, run.path)
    with ProgressBar("training") as bar:
        report("loading torch")
        from ksparse.training.train import train as train_observed

        return train_observed(recipe, run.path, observe=bar.note_metrics)


def print_next_steps(run: RunFolder) -> None:
    """Write the report of a trained run, and print where it is and what to do next."""
    if not is_first_process():
        return
    write_report(run)
    print(
        f"run      {run.path}\nreport   {run.report_file.resolve().as_uri()}\nnext     ksparse "
        f"eval {run.path}; ksparse report {run.path}"
    )


def print_sites(folder: Path, runs: dict[str, RunFolder]) -> None:
    """Write the reports of runs at several sites, and print where they are and what to do next."""
    if not is_first_process():
        return
    for run in runs.values():
        write_report(run)
    from ksparse.report import sites

    page = sites.write(folder, list(runs.values()))
    for site, run in runs.items():
        print(f"run      {run.path}   ({site})")
    place = shlex.quote(str(folder))
    print(
        f"report   {page.resolve().as_uri()}\nnext     ksparse eval {place}/*/ stats downstream; "
        f"ksparse report {place}"
    )
