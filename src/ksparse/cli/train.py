"""demo, train, resume."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksparse import config as recipes
from ksparse.cli.arguments import parse, recipe_of, take_folder, verb
from ksparse.cli.evaluate import evaluate_saes
from ksparse.cli.output import Progress, first_process, say, write_report, written
from ksparse.config import Recipe
from ksparse.config.evaluation import EvalConfig
from ksparse.storage.run_folder import RunFolder, open_run


@dataclass(frozen=True)
class TrainArgs(Recipe):
    out: str = ""
    """Folder of the run; runs/<name of the recipe> if not given."""


@verb
def train(arguments: list[str]) -> None:
    """train [RECIPE.toml] [--key value …]

    train an autoencoder; the same command again goes on
    """
    recipe, extra, name = recipe_of(TrainArgs, "train", arguments)
    run = RunFolder(Path(extra["out"] or f"runs/{name}"))
    train_run(recipe, run)
    say_next(run)


@dataclass(frozen=True)
class ResumeArgs:
    """What another process may do differently, since the result does not depend on it."""

    run: recipes.RunConfig
    mesh: recipes.MeshConfig


@verb
def resume(arguments: list[str]) -> None:
    """resume RUN [--run.key value …]

    go on with an interrupted run, on the same mesh or another
    """
    folder, rest = take_folder("resume", arguments)
    run = open_run(folder) if folder else None
    recipe = run.recipe() if run else Recipe()
    settings = parse(ResumeArgs, "resume RUN", rest, default=ResumeArgs(recipe.run, recipe.mesh))
    if run is None:
        return
    train_run(dataclasses.replace(recipe, run=settings.run, mesh=settings.mesh), run)
    say_next(run)


@verb
def demo(arguments: list[str]) -> None:
    """demo [--out DIR]

    train on the built-in LM, evaluate, report: minutes, no network
    """

    @dataclass(frozen=True)
    class DemoArgs:
        out: str = "runs/demo"
        """Folder of the run."""

    run = RunFolder(Path(parse(DemoArgs, "demo", arguments).out))
    recipe, began = Recipe(), time.monotonic()
    say(
        f"1/3 training {recipe.sae.n_latents:,} latents, k = {recipe.sae.k}, on {recipe.tokens:,} "
        "activations of a small LM of Python source"
    )
    train_run(recipe, run)
    say("2/3 evaluating on held-out files")
    results = evaluate_saes([str(run.path)], [], EvalConfig())[str(run.path)]
    say("3/3 writing the report")
    write_report(run)
    stats, downstream, probe, n2g, explained, ablation = (
        results[name]
        for name in ("stats", "downstream", "probes", "n2g", "explained_loss", "ablation")
    )
    trained = f"{recipe.sae.n_latents:,} latents, k = {recipe.sae.k}, {recipe.tokens:,} tokens"
    channel, untrained = written(probe["channel_loss"]), written(probe["random_sae_loss"])
    bigrams, unigrams = written(explained["ce_bigram"]), written(explained["ce_unigram"])
    spliced = f"{written(downstream['ce_clean'])} -> {written(downstream['ce_spliced'])}"
    recall, precision = written(n2g["recall"]), written(n2g["precision"])
    latent, channels = written(ablation["ablation_sparsity"]), written(ablation["channel_sparsity"])
    print(f"""
{recipe.acts.lm} at {recipe.acts.site}: {trained}, {time.monotonic() - began:.0f} s
  normalised MSE          {written(stats["nmse"])}   (1 = predicting the mean)
  L0, dead latents        {written(stats["l0"])}, {written(stats["dead_fraction"])}
  loss of the LM          {spliced} nats per token with the reconstruction spliced in
  zero-ablation recovered {written(downstream["recovered"])}
  compute fraction        {written(downstream["compute_fraction"])}   (a model of that share of
                          the pre-training compute is as good)
  probe loss              {written(probe["probe_loss"])}   (best channel {channel}, random SAE
                          {untrained})
  explanations (N2G)      recall {recall}, precision {precision}
  loss of explanations    {written(explained["ce_n2g"])}   (bigrams {bigrams}, unigrams {unigrams})
  ablation sparsity       {latent}   (channels {channels})

report   {run.report_file.resolve().as_uri()}
look     ksparse view {run.path}
next     ksparse train recipes/gpt2-small-32k.toml
         (the same on GPT-2 small; `ksparse plan` first)""")


def train_run(recipe: Recipe, run: RunFolder) -> None:
    if not first_process():
        from ksparse.training.train import train as silent

        silent(recipe, run.path)
        return
    say("loading torch and the language model")
    from ksparse.training.train import train as train_

    with Progress("training", recipe.steps * recipe.batch) as progress:

        def observe(row: dict[str, Any]) -> None:
            nmse = "-" if row["nmse"] is None else f"{row['nmse']:.4f}"
            progress(
                row["tokens"],
                f"nmse {nmse} · dead {row['dead']:.1%} · {row['tokens_per_s']:,.0f} tokens/s",
            )

        train_(recipe, run.path, observe=observe)


def say_next(run: RunFolder) -> None:
    if not first_process():
        return
    write_report(run)
    print(
        f"run      {run.path}\nreport   {run.report_file.resolve().as_uri()}\nnext     ksparse "
        f"eval {run.path}; ksparse report {run.path}"
    )
