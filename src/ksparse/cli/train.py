"""Verbs that train: demo, train, resume."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksparse import config as recipes
from ksparse.cli.arguments import parse, parse_recipe, split_folder, verb
from ksparse.cli.evaluate import evaluate_saes
from ksparse.cli.output import (
    ProgressBar,
    format_estimate,
    is_first_process,
    print_status,
    write_report,
)
from ksparse.config import Recipe
from ksparse.config.evaluation import EvalConfig
from ksparse.progress import report
from ksparse.storage.run_folder import RunFolder, open_run


@dataclass(frozen=True)
class TrainArgs(Recipe):
    """Options of `ksparse train`."""

    out: str = ""
    """Folder of the run; by default runs/NAME, with the name of the recipe."""


@verb
def train(arguments: list[str]) -> None:
    """train [RECIPE.toml] [--key value …]

    Train an autoencoder; the same command resumes an interrupted run.
    """
    recipe, options, name = parse_recipe(TrainArgs, "train", arguments)
    run = RunFolder(Path(options["out"] or f"runs/{name}"))
    train_run(recipe, run)
    print_next_steps(run)


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


@verb
def demo(arguments: list[str]) -> None:
    """demo [--out DIR]

    Train on the built-in LM, evaluate and report: minutes, without a network.
    """

    @dataclass(frozen=True)
    class DemoArgs:
        """Options of `ksparse demo`."""

        out: str = "runs/demo"
        """Folder of the run."""

    run = RunFolder(Path(parse(DemoArgs, "demo", arguments).out))
    recipe, began = Recipe(), time.monotonic()
    print_status(
        f"1/3 training {recipe.sae.n_latents:,} latents, k = {recipe.sae.k}, on {recipe.tokens:,} "
        "activations of a small LM of Python source"
    )
    train_run(recipe, run)
    print_status("2/3 evaluating on held-out files")
    results = evaluate_saes([str(run.path)], [], EvalConfig())[str(run.path)]
    print_status("3/3 writing the report")
    write_report(run)
    print(_summarize_demo(recipe, run, results, time.monotonic() - began))


def _summarize_demo(
    recipe: Recipe, run: RunFolder, results: dict[str, dict[str, Any]], seconds: float
) -> str:
    def estimate(evaluation: str, key: str) -> str:
        return format_estimate(results[evaluation][key])

    size = f"{recipe.sae.n_latents:,} latents, k = {recipe.sae.k}, {recipe.tokens:,} tokens"
    spliced = f"{estimate('downstream', 'ce_clean')} -> {estimate('downstream', 'ce_spliced')}"
    return f"""
{recipe.acts.lm} at {recipe.acts.site}: {size}, {seconds:.0f} s
  normalised MSE          {estimate("stats", "nmse")}   (1 = predicting the mean)
  L0, dead latents        {estimate("stats", "l0")}, {estimate("stats", "dead_fraction")}
  loss of the LM          {spliced} nats per token with the reconstruction spliced in
  zero-ablation recovered {estimate("downstream", "recovered")}
  compute fraction        {estimate("downstream", "compute_fraction")}   (the share of the \
pre-training compute
                          with which a model reaches this loss)
  probe loss              {estimate("probes", "probe_loss")}   (best channel \
{estimate("probes", "channel_loss")}, random SAE
                          {estimate("probes", "random_sae_loss")})
  explanations (N2G)      recall {estimate("n2g", "recall")}, precision \
{estimate("n2g", "precision")}
  loss of explanations    {estimate("explained_loss", "ce_n2g")}   (bigrams \
{estimate("explained_loss", "ce_bigram")}, unigrams {estimate("explained_loss", "ce_unigram")})
  ablation sparsity       {estimate("ablation", "ablation_sparsity")}   (channels \
{estimate("ablation", "channel_sparsity")})

report   {run.report_file.resolve().as_uri()}
look     ksparse view {run.path}
next     ksparse train recipes/gpt2-small-32k.toml
         (the same on GPT-2 small; `ksparse plan` first)"""


def train_run(recipe: Recipe, run: RunFolder) -> None:
    """Train in a run's folder, with progress shown by the first process."""
    if not is_first_process():
        from ksparse.training.train import train as train_quietly

        train_quietly(recipe, run.path)
        return
    with ProgressBar("training") as bar:
        report("loading torch")
        from ksparse.training.train import train as train_observed

        train_observed(recipe, run.path, observe=bar.note_metrics)


def print_next_steps(run: RunFolder) -> None:
    """Write the report of a trained run, and print where it is and what to do next."""
    if not is_first_process():
        return
    write_report(run)
    print(
        f"run      {run.path}\nreport   {run.report_file.resolve().as_uri()}\nnext     ksparse "
        f"eval {run.path}; ksparse report {run.path}"
    )
