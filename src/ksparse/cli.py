"""The verbs. The only file that prints or exits.

Nothing heavy is imported before a verb runs, so that help is there at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ksparse import files
from ksparse import recipe as recipes
from ksparse.errors import InputError, KsparseError
from ksparse.options import EvalOptions, StudyOptions
from ksparse.recipe import Recipe
from ksparse.runs import RunFolder, open_run

EXIT_CODES = "0 done · 1 failed · 2 bad input · 3 NaN or infinity · 4 out of memory · 5 disk · 130 Ctrl-C · 143 SIGTERM (both after saving)"


def main(arguments: list[str] | None = None) -> None:
    """Run one verb and exit with its code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads that spin cost others' work dearly
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0)
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"ksparse {version('ksparse')}")
        sys.exit(0)
    verb, *rest = arguments
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("ksparse").setLevel(logging.INFO)
    try:
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, 1)
            raise InputError(f"there is no verb {verb!r}" + (f"; did you mean `ksparse {near[0]}`?" if near else "; see `ksparse --help`"))
        VERBS[verb](rest)
    except KsparseError as error:
        print(f"ksparse {verb}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def usage() -> str:
    lines = [f"  {name:<9}{(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(["ksparse: train, scale and judge k-sparse autoencoders on language-model activations", "",
                      *lines, "", "`ksparse VERB --help` shows a verb's options.", f"Exit codes: {EXIT_CODES}"])


# ---- training ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainArgs(Recipe):
    out: str = ""
    """Folder of the run; runs/<name of the recipe> if not given."""


@dataclass(frozen=True)
class ShardArgs(Recipe):
    out: str = "acts"
    """Folder that gets a subfolder named by a hash of what the activations are."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Numbers on disk."""


def train(arguments: list[str]) -> None:
    """train [RECIPE.toml] [--key value …]   train an autoencoder; the same command again goes on"""
    recipe, extra, name = _recipe(TrainArgs, "train", arguments)
    run = RunFolder(Path(extra["out"] or f"runs/{name}"))
    _train(recipe, run)
    _say_next(run)


def resume(arguments: list[str]) -> None:
    """resume RUN [--run.key value …]        go on with an interrupted run"""
    folder, rest = _folder("resume", arguments)
    run = open_run(folder) if folder else None
    settings = _parse(recipes.Run, "resume RUN", rest, default=run.recipe().run if run else recipes.Run(), prefix="run")
    _train(dataclasses.replace(run.recipe(), run=settings), run)
    _say_next(run)


def demo(arguments: list[str]) -> None:
    """demo [--out DIR]                      train on the built-in LM, evaluate, report: minutes, no network"""

    @dataclass(frozen=True)
    class DemoArgs:
        out: str = "runs/demo"
        """Folder of the run."""

    run = RunFolder(Path(_parse(DemoArgs, "demo", arguments).out))
    recipe, began = Recipe(), time.monotonic()
    _say(f"1/3 training {recipe.sae.n_latents:,} latents, k = {recipe.sae.k}, on {recipe.tokens:,} activations of a small LM of Python source")
    _train(recipe, run)
    _say("2/3 evaluating on held-out files")
    results = _evaluate([str(run.path)], [], EvalOptions())[str(run.path)]
    _say("3/3 writing the report")
    _report(run)
    stats, downstream, probe, n2g, explained, ablation = (
        results[name] for name in ("stats", "downstream", "probes", "n2g", "explained_loss", "ablation"))
    print(f"""
{recipe.acts.lm} at {recipe.acts.site}: {recipe.sae.n_latents:,} latents, k = {recipe.sae.k}, {recipe.tokens:,} tokens, {time.monotonic() - began:.0f} s
  normalised MSE          {_value(stats['nmse'])}   (1 = predicting the mean)
  L0, dead latents        {_value(stats['l0'])}, {_value(stats['dead_fraction'])}
  loss of the LM          {_value(downstream['ce_clean'])} -> {_value(downstream['ce_spliced'])} nats per token with the reconstruction spliced in
  zero-ablation recovered {_value(downstream['recovered'])}
  compute fraction        {_value(downstream['compute_fraction'])}   (a model of that share of the pre-training compute is as good)
  probe loss              {_value(probe['probe_loss'])}   (best channel {_value(probe['channel_loss'])}, random SAE {_value(probe['random_sae_loss'])})
  explanations (N2G)      recall {_value(n2g['recall'])}, precision {_value(n2g['precision'])}
  loss of explanations    {_value(explained['ce_n2g'])}   (bigrams {_value(explained['ce_bigram'])}, unigrams {_value(explained['ce_unigram'])})
  ablation sparsity       {_value(ablation['ablation_sparsity'])}   (channels {_value(ablation['channel_sparsity'])})

report   {run.report_file.resolve().as_uri()}
next     ksparse train recipes/gpt2-small-32k.toml      (the same on GPT-2 small; `ksparse plan` first)""")


def _train(recipe: Recipe, run: RunFolder) -> None:
    _say("loading torch and the language model")
    from ksparse.training.loop import train as train_

    with Progress("training", recipe.steps * recipe.batch) as progress:
        def observe(row: dict[str, Any]) -> None:
            nmse = "-" if row["nmse"] is None else f"{row['nmse']:.4f}"
            progress(row["tokens"], f"nmse {nmse} · dead {row['dead']:.1%} · {row['tokens_per_s']:,.0f} tokens/s")

        train_(recipe, run.path, observe=observe)


def _say_next(run: RunFolder) -> None:
    _report(run)
    print(f"run      {run.path}\nreport   {run.report_file.resolve().as_uri()}\nnext     ksparse eval {run.path}; ksparse report {run.path}")


def sweep(arguments: list[str]) -> None:
    """sweep SWEEP.toml [--key value …]      train a grid of recipes, many on one stream; the same command goes on, or widens it"""
    from ksparse.scaling.grid import SweepFolder, read
    from ksparse.scaling.launch import Launch

    @dataclass(frozen=True)
    class SweepArgs(Launch):
        out: str = ""
        """Folder of the sweep; sweeps/<name of the file> if not given. A sweep's folder may also be named in place of its file."""
        plan: bool = False
        """Only say what would be done."""
        only: tuple[str, ...] = ()
        """Train these runs alone, as one cohort in this process: what a worker does."""

    source, rest = _folder("sweep", arguments, "a sweep.toml, such as recipes/sweeps/pylm.toml, or the folder of a sweep")
    options = _parse(SweepArgs, "sweep SWEEP.toml", rest)
    inside = Path(source).is_dir()
    grid = read(Path(source) / "sweep.toml" if inside else source)
    folder = SweepFolder(Path(options.out or (source if inside else f"sweeps/{Path(source).stem}")))
    _say("loading torch and looking at the language models")
    from ksparse.scaling import sweep as sweeping

    if options.only:
        sweeping.train_here(grid, folder, options.only)
        return
    launch = Launch(**{each.name: getattr(options, each.name) for each in dataclasses.fields(Launch)})
    if options.plan:
        _show_plan(sweeping.plan(grid, folder, launch))
        return
    with Progress("training", 0) as progress:
        failed = sweeping.sweep(grid, folder, launch, observe=lambda done, total, note: progress(done, note, total), planned=_show_plan)
    print(f"sweep    {folder.path}: {len(grid) - len(failed)} of {len(grid)} runs finished\npoints   {folder.points_file}")
    for name, why in failed.items():
        print(f"failed   {folder.run(name).path}: {why}")
    if failed:
        print(f"next     ksparse sweep {folder.path}      (goes on with the failed ones)")
        sys.exit(1)
    print(f"next     ksparse fit {folder.path}; ksparse report {folder.path}")


def _show_plan(plan: Any) -> None:
    from ksparse.training.plan import amount_of_bytes, duration

    _say(f"sweep    {plan.total} runs, {len(plan.done)} of them finished; {sum(len(cohort.runs) for cohort in plan.cohorts)} to do in {len(plan.cohorts)} cohorts on {plan.device}")
    for number, cohort in enumerate(plan.cohorts, 1):
        _say(f"cohort {number} {len(cohort.runs)} SAEs, {cohort.latents:,} latents, at most {cohort.tokens:,} activations in sum: {cohort.flops:.3g} FLOPs "
             f"and {cohort.flops_lm:.3g} of the LM, {amount_of_bytes(cohort.memory)}, about {duration(cohort.seconds)}")
    if plan.cohorts:
        _say(f"in all   {plan.flops:.3g} FLOPs, about {duration(plan.seconds)} within a factor of 2, {amount_of_bytes(plan.disk)} of checkpoints "
             f"({amount_of_bytes(plan.free)} free here)")


# ---- evaluating and showing --------------------------------------------------------------------------------------


def evaluate(arguments: list[str]) -> None:
    """eval RUN … [NAME …] [--key value …]    judge on held-out text: downstream, stats, probes, … (those six if none is named)"""
    folder, rest = _folder("eval", arguments)
    words = [folder]
    while rest and not rest[0].startswith("-"):
        words.append(rest.pop(0))
    options = _parse(EvalOptions, "eval RUN [RUN …] [NAME …]", rest)
    sources, names = [folder], []
    for word in words[1:]:
        (sources if "/" in word or Path(word).exists() else names).append(word)
    for source, results in _evaluate(sources, names, options).items():
        run = RunFolder(Path(source))
        if len(sources) > 1:
            print(f"\n{source}")
        for name, result in results.items():
            _show(result, run.eval_file(name) if run.exists() else "")
        if run.exists():
            _report(run)
            print(f"report   {run.report_file.resolve().as_uri()}")


def _show(result: dict[str, Any], file: Path | str) -> None:
    print(f"{result['name']}   {file}".rstrip())
    for key, value in result.items():
        if isinstance(value, dict) and set(value) == {"value", "se"}:
            print(f"  {key:<32}{_value(value)}")
    for note in result["notes"]:
        print(f"  note: {note}")


def _evaluate(sources: list[str], names: list[str], options: EvalOptions) -> dict[str, dict[str, Any]]:
    """Evaluate the SAEs of runs or folders, and write the results of those that are runs."""
    from ksparse import evals
    from ksparse.interop import load

    evals.check_names(names)
    saes = {source: load(source) for source in sources}
    with Progress("evaluating", 0) as progress:
        found = evals.evaluate_many(saes, None, names or list(evals.DEFAULT), options,
                                    observe=lambda what, done, total: progress(done, "", total, what))
    for source, results in found.items():
        run = RunFolder(Path(source))
        if run.exists():
            evals.write(run, results)
    return found


@dataclass(frozen=True)
class ProbesArgs:
    rows: int = 1_000
    """Rows of a task, half of each label."""
    seed: int = 0
    """Draws the rows."""
    text: str = ""
    """Running text for base64 and the phrase tasks: a data set of the Hub (OWNER/NAME or OWNER/NAME:CONFIG), or a file or folder;
    monology/pile-uncopyrighted if not given."""
    documents: int = 200_000
    """Documents of that text to read."""
    local: str = ""
    """Folder with OWNER__NAME/ folders that stand in for data sets of the Hub."""
    only: tuple[str, ...] = ()
    """Make these tasks alone."""


def probes(arguments: list[str]) -> None:
    """probes build DIR [--key value …]      make the paper's 61 probe tasks from the Hub's data sets: --suite DIR uses them"""
    if arguments[:1] == ["build"]:
        arguments = arguments[1:]
    elif arguments[:1] not in (["-h"], ["--help"]):
        raise InputError(f"`ksparse probes` knows one thing to do, `ksparse probes build DIR`; got {' '.join(arguments) or 'nothing'}")
    folder, rest = _folder("probes build", arguments, "the folder to write the tasks to, such as suites/paper")
    options = _parse(ProbesArgs, "probes build DIR", rest)
    from ksparse import suites

    built = suites.build(folder, rows=options.rows, seed=options.seed, documents=options.documents, local=options.local or None,
                         only=options.only, observe=lambda step: _say(f"{step.state:<9}{step.name}" + (f" · {step.words}" if step.words else "")),
                         **({"text": options.text} if options.text else {}))
    print(f"suite    {built.folder}: {len(built.made)} tasks made, {len(built.kept)} there before, {len(built.failed)} failed")
    for name, why in built.failed.items():
        print(f"  {name}: {why}")
    if built.made or built.kept:
        print(f"next     ksparse eval RUN probes --suite {built.folder}")
    else:
        sys.exit(1)


def report(arguments: list[str]) -> None:
    """report RUN|SWEEP                      write report.html from what a run's or a sweep's folder holds"""
    folder, rest = _folder("report", arguments)
    _no_options("report", rest)
    if (Path(folder) / "points.csv").is_file():
        from ksparse.report import sweep

        if not (Path(folder) / "law.json").is_file():
            _survey(folder)
        print(f"report   {sweep.write(Path(folder)).resolve().as_uri()}")
        return
    run = open_run(folder)
    _report(run)
    print(f"report   {run.report_file.resolve().as_uri()}")


def _report(run: RunFolder) -> None:
    from ksparse.report import write

    write(run)


# ---- laws --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FitArgs:
    law: str = ""
    """Of a CSV file: nk, n, c, tokens, lr or s. Of a sweep all that its points allow are fitted."""
    out: str = ""
    """Folder for law.json of a CSV file; the file's own if not given."""
    form: str = "paper"
    """paper, best (the lowest AICc), or the name of a form as law.json lists them."""
    predict: str = ""
    """Where to say the law's value: n=65536,k=32."""
    budget: float = 0.0
    """Training FLOPs: say the best n and tokens for them. Needs a sweep."""
    draws: int = 1_000
    """Of the bootstrap."""


def fit(arguments: list[str]) -> None:
    """fit SWEEP|POINTS.csv [--key value …]  fit scaling laws to a sweep's runs or to any table of points, with intervals"""
    place, rest = _folder("fit", arguments, "a sweep's folder or a CSV file of points")
    options = _parse(FitArgs, "fit SWEEP|POINTS.csv", rest)
    from ksparse.scaling import law as laws

    at = _assignments("--predict", options.predict)
    if options.draws < 0:
        raise InputError(f"--draws is {options.draws}; it is a number of bootstrap draws, 0 for none")
    if Path(place).is_dir():
        if options.law or options.out:
            raise InputError("--law and --out are for a CSV file; of a sweep every law is fitted, into its own law.json")
        found = _survey(place, form=options.form, draws=options.draws)
        for law in found.laws.values():
            _show_law(law)
        for sentence in [*found.notes, *found.absent.values()]:
            print(f"  note: {sentence}")
        for line in [*found.predictions(at), *found.budgeted(options.budget, at)]:
            print(line)
        print(f"laws     {Path(place) / 'law.json'}\nnext     ksparse report {place}")
        return
    if options.budget:
        raise InputError("--budget needs the curves of a sweep; a CSV of points has none")
    if not options.law:
        raise InputError(f"{place} is not a sweep's folder; for a CSV of points say which law, --law {'|'.join(name for name in laws.LAWS if name != 'optimal')}")
    law = laws.fit(laws.read_points(place, options.law), options.law, form=options.form, draws=options.draws)
    file = Path(options.out or Path(place).parent) / "law.json"
    files.write_json(file, {"format": laws.FORMAT, **law.to_dict()})
    _show_law(law)
    if at:
        print(law.predict(**at).says(law.kind.target, at))
    print(f"law      {file}")


def _survey(folder: str, **options: Any) -> Any:
    """Fit all laws of a sweep and write its law.json."""
    from ksparse.scaling import survey

    with Progress("laws", len(survey.LAWS)) as progress:
        found = survey.survey(folder, **options, observe=lambda done, total, what: progress(done, what, total))
    files.write_json(Path(folder) / "law.json", found.to_dict())
    return found


def _show_law(law: Any) -> None:
    print(f"{law.kind.title}   {law.form.equation}")
    for name, each in law.coefficients.items():
        low, high = ("-" if end is None else f"{end:.4g}" for end in (each.low, each.high))
        print(f"  {name:<12}{each.value:>12.5g}   [{low}, {high}]")
    for sentence in law.says():
        print(f"  {sentence}")


def _assignments(flag: str, text: str) -> dict[str, Any]:
    """Return the values of n=65536,k=32."""
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        try:
            found[name.strip()] = value.strip() if name.strip() == "lm" else float(value)
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise InputError(f"{flag} takes NAME=NUMBER,NAME=NUMBER, such as n=65536,k=32; got {part!r}")
    return found


# ---- studies -----------------------------------------------------------------------------------------------------


def study(arguments: list[str]) -> None:
    """study NAME [--run RUN] [--key value …] answer a question with several SAEs, or by an evaluation of one: baselines, sites, …"""
    name, rest = _folder("study", arguments, "the name of a study, such as baselines")
    options = _parse(StudyOptions, "study NAME", rest)
    from ksparse import studies
    from ksparse.evals import EVALS

    studies.check_name(name, tuple(EVALS))
    if name in studies.STUDIES:
        with Progress("reading", 0) as progress:
            folder = studies.run(name, options, observe=lambda what, done, total: progress(done, "", total, what))
        _show_study(folder)
        return
    if not options.run:
        raise InputError(f"study {name!r} is an evaluation of one SAE: say of which, with --run RUN")
    run = open_run(options.run)
    results = _evaluate([options.run], [name], EvalOptions(tokens=options.eval_tokens, text=options.text, device=options.device))
    _show(results[options.run][name], run.eval_file(name))
    _report(run)
    print(f"report   {run.report_file.resolve().as_uri()}")


def _show_study(folder: Path) -> None:
    from ksparse.report import studies as pages

    page = pages.write(folder)
    for finding in pages.read(folder)["findings"]:
        print(f"- {finding}")
    print(f"study    {folder / 'study.json'}\nreport   {page.resolve().as_uri()}")


def view(arguments: list[str]) -> None:
    """view RUN [--export DIR] [--port N]    look at its latents in the browser, on this machine; or write pages for any web host"""

    @dataclass(frozen=True)
    class ViewArgs:
        export: str = ""
        """Folder to write static pages to, without the parts that need the LM; nothing is served then."""
        port: int = 8765
        """Port on 127.0.0.1; 0 takes any that is free."""

    folder, rest = _folder("view", arguments)
    options = _parse(ViewArgs, "view RUN", rest)
    run = open_run(folder)
    from ksparse import viewer

    if options.export:
        with Progress("pages", 0) as progress:
            page = viewer.export(run, Path(options.export), observe=lambda what, done, total: progress(done, "", total, what))
        print(f"pages    {page.resolve().as_uri()}")
        return
    listener = viewer.listen(options.port)
    print(f"latents  http://127.0.0.1:{listener.getsockname()[1]}/   (Ctrl-C ends it)", flush=True)
    viewer.serve(run, listener)


# ---- inside the LM -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SteerArgs:
    latent: tuple[int, ...] = ()
    """Latents to steer, several if wanted."""
    prompt: str = ""
    """Text that the LM continues."""
    value: float | None = None
    """What the latents are held at, of either sign, in the unit of their activations; 0 takes them out."""
    scale: float | None = None
    """Instead: what their own activations are multiplied by."""
    error: Literal["keep", "drop"] = "keep"
    """keep: what the SAE fails to reconstruct stays. drop: the LM gets the reconstruction."""
    tokens: int = 40
    """Most tokens of a continuation."""
    temperature: float = 0.0
    """0: always the likeliest token. Above: drawn, with the same random numbers for both continuations."""
    seed: int = 0
    """Draws the tokens."""
    shown: int = 10
    """Tokens listed whose probability changes most."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def steer(arguments: list[str]) -> None:
    """steer RUN --latent I --value V --prompt … what the LM writes with latents held at a value, beside what it writes as it is"""
    folder, rest = _folder("steer", arguments)
    asked = _parse(SteerArgs, "steer RUN", rest)
    if not asked.latent or not asked.prompt:
        raise InputError(f"steering needs {'a latent: --latent 123' if not asked.latent else 'a text to continue: --prompt TEXT'}")
    if (asked.value is None) == (asked.scale is None):
        raise InputError("give one of --value V, which latents are held at, and --scale S, which their own activations are multiplied by")
    from ksparse import steering
    from ksparse.sae.store import load

    sae = load(folder)
    steering.check_latents(sae, asked.latent)
    lm = steering.lm_of(sae, asked.device)
    how = {"clamp" if asked.scale is None else "scale": dict.fromkeys(asked.latent, asked.value if asked.scale is None else asked.scale)}
    found = steering.compare(lm, sae.to(lm.device), asked.prompt, error=asked.error, tokens=asked.tokens, temperature=asked.temperature,
                             seed=asked.seed, **how)
    for latent in asked.latent:
        print(f"latent   {latent}{_what_is_known(folder, latent)}")
    print(f"as it is {asked.prompt}{found.before.text}\nsteered  {asked.prompt}{found.after.text}")
    print(f"next token, KL {found.kl:.4f} nats{'':<16}as it is   steered")
    for token, before, after in found.moved(asked.shown):
        print(f"  {lm.tokenizer.decode([token])!r:<40}{before:>10.4f}{after:>10.4f}")


def _what_is_known(folder: str, latent: int) -> str:
    """Return what `stats` has found of a latent, so that a value can be chosen; nothing if it has not been run."""
    arrays = RunFolder(Path(folder)).eval_file("stats").with_suffix(".safetensors")
    if not arrays.is_file():
        return ""
    from safetensors.numpy import load_file

    found = load_file(arrays)
    return (f": fires on {found['density'][latent]:.2%} of tokens, with {found['mean_act'][latent]:.3g} on average and "
            f"{found['max_act'][latent]:.3g} at most")


@dataclass(frozen=True)
class AttributeArgs:
    prompt: tuple[str, ...] = ()
    """Texts; what counts is the token after each."""
    toward: tuple[str, ...] = ()
    """Tokens whose mean logit is explained, as they look in a text, leading space included."""
    away: tuple[str, ...] = ()
    """Tokens whose mean logit is taken off; the mean of all logits if not given."""
    shown: int = 10
    """Latents listed on either side."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def attribute(arguments: list[str]) -> None:
    """attribute RUN --prompt … --toward T --away U   which latents the LM's preference for a token hangs on: activation x gradient"""
    folder, rest = _folder("attribute", arguments)
    asked = _parse(AttributeArgs, "attribute RUN", rest)
    from ksparse import steering
    from ksparse.sae.store import load

    sae = load(folder)
    lm = steering.lm_of(sae, asked.device)
    scores = steering.attribute(lm, sae.to(lm.device), asked.prompt, steering.logit_difference(lm, asked.toward, asked.away))
    order = [i for i in scores.abs().argsort(descending=True).tolist() if scores[i]]
    print(f"difference of logits by first-order effect of each latent, mean over {len(asked.prompt)} prompts, all together {scores.sum():+.4f}")
    for latent in sorted(order[: asked.shown], key=lambda i: -scores[i]):
        print(f"  latent {latent:<9}{scores[latent]:>+10.4f}{_what_is_known(folder, latent)}")
    if order:
        print(f"next     ksparse steer {folder} --latent {order[0]} --value 0 --prompt …")


@dataclass(frozen=True)
class CompareArgs(EvalOptions):
    lm: str = ""
    """The LM, where no SAE says which; a Hub name, a folder, or pylm."""
    site: str = ""
    """The site, where no SAE says which."""
    like: str = ""
    """Evaluate all on the text, contexts and positions that this SAE was trained with."""
    by: str = ""
    """Rank by this column; by the first if not given."""
    results: Literal["new", "saved"] = "new"
    """new: evaluate. saved: take the results that runs have."""
    json: str = ""
    """File for the table."""


def compare(arguments: list[str]) -> None:
    """compare A B … [--key value …]         SAEs of any format on the same text, positions and baselines: one table"""
    folder, rest = _folder("compare", arguments, "the SAEs to compare: runs, folders of any format, or Hub repositories")
    sources = [folder]
    while rest and not rest[0].startswith("-"):
        sources.append(rest.pop(0))
    args = _parse(CompareArgs, "compare A B …", rest)
    from ksparse import interop
    from ksparse.evals import comparison

    repeated = [source for source in sources if sources.count(source) > 1]
    if repeated:
        raise InputError(f"{repeated[0]} is named twice")
    saes = {source: interop.load(source) for source in sources}
    results = _saved(sources) if args.results == "saved" else _together(saes, args)
    rows = comparison.table(results, {source: sae.shape.normalize for source, sae in saes.items()}, args.by)
    width = max(map(len, sources)) + 2
    print(" " * width + "".join(f"{key:>22}" for key in rows[0].values))
    for row in rows:
        print(f"{row.name:<{width}}" + "".join(f"{_value(each):>22}" for each in row.values.values()))
    print("± one standard error over documents; the SAEs saw the same ones, so differences are known better than that")
    if args.json:
        files.write_json(Path(args.json), [{"name": row.name, **row.values} for row in rows])


def _saved(sources: list[str]) -> dict[str, dict[str, Any]]:
    from ksparse.evals.comparison import NAMES

    found = {source: {name: result for name in NAMES if (result := RunFolder(Path(source)).eval(name))} for source in sources}
    for source, results in found.items():
        if not results:
            raise InputError(f"{source} has no results of {' and '.join(NAMES)}; `ksparse eval {source}` makes them of a run, or leave out --results saved")
    return found


def _together(saes: dict[str, Any], args: CompareArgs) -> dict[str, dict[str, Any]]:
    """Evaluate SAEs in one pass, on what one of them was trained with."""
    from ksparse import evals
    from ksparse.acts.lm import LM, resolve_device
    from ksparse.evals.comparison import NAMES

    if args.like and args.like not in saes:
        raise InputError(f"--like names {args.like!r}, which is not compared; there are {', '.join(saes)}")
    told = {source: sae.metadata.get("acts") or {} for source, sae in saes.items()}
    places = {source: acts or sae.metadata.get("origin") or {} for (source, sae), acts in zip(saes.items(), told.values())}
    own = told[args.like] if args.like else next((acts for acts in told.values() if acts), {})
    acts = recipes.Acts(**own | {key: value for key in ("lm", "site", "text") if (value := getattr(args, key))})
    if not own and not (args.lm and args.site):
        raise InputError("no SAE says on which LM, site and text it was trained; name them: --lm, --site, --text")
    for source, place in places.items():
        for key in ("lm", "site"):
            if place.get(key, getattr(acts, key)) != getattr(acts, key) and not getattr(args, key):
                raise InputError(f"{source} is of {key} {place[key]!r}, the others are compared on {getattr(acts, key)!r}; if that is the same by another name, "
                                 f"say so with --{key}")
    if args.like:
        for sae in saes.values():
            sae.metadata["acts"] = dataclasses.asdict(dataclasses.replace(acts, normalize=sae.shape.normalize))
    options = EvalOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(EvalOptions)})
    with Progress("evaluating", 0) as progress:
        return evals.evaluate_many(saes, LM(acts=acts, device=resolve_device(args.device)), NAMES, options,
                                   observe=lambda what, done, total: progress(done, "", total, what))


# ---- other libraries ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvertArgs:
    to: str
    """sae_lens, sparsify, dictionary_learning, openai, gemma_scope, llamascopium or ksparse; of an evaluated run also what viewers show: neuronpedia,
    sae_dashboard, atoms."""
    subfolder: str = ""
    """Folder of the SAE in SRC."""
    revision: str = ""
    """Revision of a Hub repository."""
    normalization: Literal["exact", "layer_norm", "outside"] = "exact"
    """What to do with a normalisation that the format has not. exact: refuse, unless it can go into the weights. layer_norm: also take that for unit_norm, which
    differs by about 1e-5 / deviation of the activation. outside: leave it to whoever uses the SAE."""
    model: str = ""
    """neuronpedia, sae_dashboard: Neuronpedia's name of the LM."""
    set: str = "ksparse"
    """neuronpedia, sae_dashboard: name of the source set, without the layer."""
    release: str = ""
    """neuronpedia: name of the release."""
    creator: str = ""
    """neuronpedia: who made it."""
    url: str = ""
    """neuronpedia: where to read about it."""
    repository: str = ""
    """neuronpedia: repository on the Hub that holds the weights."""


def convert(arguments: list[str]) -> None:
    """convert SRC DST --to FORMAT           write an SAE of any format in another, or what viewers show of a run"""
    source, rest = _folder("convert", arguments, "an SAE: a run, a folder of any format, or a Hub repository; and a new folder")
    folder, rest = _folder("convert", rest, "a new folder, after the SAE") if source else ("", rest)
    args = _parse(ConvertArgs, "convert SRC DST", rest)
    viewers = ("neuronpedia", "sae_dashboard", "atoms")
    if args.to not in viewers:
        from ksparse import interop

        sae = interop.convert(source, folder, args.to, revision=args.revision or None, subfolder=args.subfolder, normalization=args.normalization)
        print(f"{args.to:<9}{folder}: {sae.shape.n_latents:,} latents, {sae.shape.activation}, normalisation {sae.shape.normalize}")
        return
    from ksparse.interop import atoms, neuronpedia

    run = open_run(source)
    if args.to == "atoms":
        count = atoms.export(run, Path(folder))
    else:
        names = neuronpedia.Publication(**{field.name: getattr(args, field.name) for field in dataclasses.fields(neuronpedia.Publication)})
        count = (neuronpedia.bulk if args.to == "neuronpedia" else neuronpedia.dashboard)(run, Path(folder), names)
    print(f"{args.to:<9}{folder}: {count:,} latents")


def push(arguments: list[str]) -> None:
    """push RUN OWNER/NAME [--key value …]   put an SAE on the Hub, with a card and a copy for SAELens"""

    @dataclass(frozen=True)
    class PushArgs:
        subfolder: str = ""
        """Folder in the repository, where it holds several SAEs."""
        visibility: Literal["public", "private"] = "public"
        """Of a repository that is not there yet."""
        folder: str = ""
        """Write the repository's folder here, and upload nothing."""
        normalization: Literal["exact", "layer_norm", "outside"] = "exact"
        """For SAELens' copy, as of `ksparse convert`."""

    source, rest = _folder("push", arguments, "an SAE, such as runs/demo; and the name of a repository")
    repository, rest = _folder("push", rest, "the name of a repository on the Hub, OWNER/NAME, after the SAE") if source else ("", rest)
    args = _parse(PushArgs, "push RUN OWNER/NAME", rest)
    from ksparse.interop import hub

    if args.folder:
        print(f"folder   {hub.prepare(source, args.folder, repository, subfolder=args.subfolder, normalization=args.normalization)}")
    else:
        address = hub.push(source, repository, subfolder=args.subfolder, private=args.visibility == "private", normalization=args.normalization)
    print(f"hub      {address}")


# ---- before training ---------------------------------------------------------------------------------------------


def shard(arguments: list[str]) -> None:
    """shard [RECIPE.toml] [--key value …]   write activations to disk once, for many runs"""
    recipe, extra, _ = _recipe(ShardArgs, "shard", arguments)
    import torch

    from ksparse.acts import shards
    from ksparse.acts.lm import LM, resolve_device
    from ksparse.acts.text import Corpus

    lm = LM(acts=recipe.acts, device=resolve_device(recipe.run.device), trust_remote_code=recipe.run.trust_remote_code)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with Progress("activations", recipe.tokens) as progress:
        folder = shards.write(lm, Corpus(recipe.acts, lm.tokenizer, "train"), Path(extra["out"]), rows=recipe.tokens,
                              dtype=extra["dtype"], progress=lambda done: progress(done, "activations"))
    print(f"shards   {folder}\nnext     the same recipe with --acts.shards {folder}")


def plan(arguments: list[str]) -> None:
    """plan [RECIPE.toml] [--key value …]    parameters, memory, FLOPs, disk and time, before anything runs"""
    recipe, _, _ = _recipe(TrainArgs, "plan", arguments)
    from ksparse.training.plan import plan as plan_

    for line in plan_(recipe):
        print(line)


def bench(arguments: list[str]) -> None:
    """bench [--n --d --k --batch …]         time a training step here, against the encoder product and a dense step"""
    from ksparse import bench as benchmark

    @dataclass(frozen=True)
    class BenchArgs(benchmark.Setting):
        json: str = ""
        """File for the result."""
        picture: str = ""
        """File for a picture of it (.svg)."""
        only: tuple[str, ...] = ()
        """Time these, and the product."""
        contestant: tuple[str, ...] = ()
        """NAME=FILE.py: also time what make(cfg) in that file returns."""

    options = _parse(BenchArgs, "bench", arguments)
    own = {field.name for field in dataclasses.fields(benchmark.Setting)}
    setting = benchmark.Setting(**{name: value for name, value in dataclasses.asdict(options).items() if name in own})
    wrong = [each for each in options.contestant if not Path(each.partition("=")[2]).is_file()]
    if wrong:
        raise InputError(f"contestant {wrong[0]!r} is not NAME=FILE with a file that is there")
    with Progress("rounds", setting.rounds) as progress:
        found = benchmark.bench(setting, dict(each.split("=", 1) for each in options.contestant), only=options.only, observe=lambda done, total: progress(done, ""))
    print(f"{'':<12}{'ratio':>8}{'best':>8}{'ms':>9}{'tokens/s':>12}{'MiB':>8}")
    for name, row in sorted(found["contestants"].items(), key=lambda item: item[1]["ratio"]):
        print(f"{name:<12}{row['ratio']:>8.2f}{row['best_ratio']:>8.2f}{1000 * row['seconds']:>9.1f}{row['tokens_per_s']:>12,.0f}{row['peak_mib']:>8,}")
    for name, why in found["left_out"].items():
        print(f"{name:<12}left out: {why}")
    if options.json:
        files.write_json(Path(options.json), found)
    if options.picture:
        files.write_text(Path(options.picture), benchmark.picture(found))


def doctor(arguments: list[str]) -> None:
    """doctor                                say what of this machine is fit for ksparse, a line each"""
    _no_options("doctor", arguments)
    from ksparse.doctor import checks

    failed = False
    for name, verdict, what in checks():
        failed |= verdict == "no"
        print(f"{verdict:<5}{name:<14}{what}")
    if failed:
        sys.exit(1)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo, "train": train, "resume": resume, "sweep": sweep, "fit": fit, "eval": evaluate, "compare": compare, "study": study,
    "probes": probes, "report": report, "view": view, "steer": steer, "attribute": attribute, "convert": convert, "push": push, "shard": shard,
    "plan": plan, "bench": bench, "doctor": doctor,
}


# ---- arguments ---------------------------------------------------------------------------------------------------


def _recipe(kind: type, verb: str, arguments: list[str]) -> tuple[Recipe, dict[str, Any], str]:
    """Return the recipe of a TOML file, if one is named first, with flags over it; the verb's own options; a name for it."""
    given, name = Recipe(), "default"
    if arguments and not arguments[0].startswith("-"):
        file, *arguments = arguments
        given, name = recipes.load(file), Path(file).stem
    given = dataclasses.replace(given, sae=dataclasses.replace(given.sae, activation=_activation(given.sae.activation, arguments)))
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(Recipe)}
    parsed = _parse(kind, f"{verb} [RECIPE.toml]", arguments, default=kind(**fields))
    own = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(kind)}
    return Recipe(**{key: own.pop(key) for key in fields}), own, name


def _activation(given: recipes.Activation, arguments: list[str]) -> recipes.Activation:
    """Return the activation whose keys the flags --sae.activation.… are: the given one, or that of another kind where they name one."""
    words = [word for argument in arguments for word in (argument.split("=", 1) if argument.startswith("--") else [argument])]
    flags = {word.removeprefix("--sae.activation.").replace("-", "_"): value for word, value in zip(words, [*words[1:], ""])
             if word.startswith("--sae.activation.")}
    kind = recipes.activation_kind({"kind": given.kind} | flags, "--sae.activation.")
    return given if isinstance(given, kind) else kind()


def _parse(kind: type, verb: str, arguments: list[str], default: Any = None, prefix: str = "") -> Any:
    import tyro

    description = (VERBS[verb.split()[0]].__doc__ or "").splitlines()[0].partition("   ")[2].strip()
    if prefix:  # tyro names the flags of a bare dataclass without the section's name
        arguments = [argument.replace(f"--{prefix}.", "--", 1) for argument in arguments]
    return tyro.cli(kind, prog=f"ksparse {verb}", args=arguments, description=description, config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
                    **({} if default is None else {"default": default}))


def _folder(verb: str, arguments: list[str], what: str = "the folder of a run, such as runs/demo") -> tuple[str, list[str]]:
    """Take the folder off the arguments; '' where only help is wanted."""
    if arguments and arguments[0] in ("-h", "--help"):
        return "", arguments
    if not arguments or arguments[0].startswith("-"):
        raise InputError(f"`ksparse {verb}` needs {what}, before anything else")
    return arguments[0], list(arguments[1:])


def _no_options(verb: str, rest: list[str]) -> None:
    """Show help, or refuse arguments, for a verb without options."""
    if rest and rest[0] in ("-h", "--help"):
        print(f"usage: ksparse {VERBS[verb].__doc__}")
        sys.exit(0)
    if rest:
        raise InputError(f"`ksparse {verb}` has no such argument: {' '.join(rest)}")


# ---- what is shown -----------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _value(estimate: dict[str, float | None]) -> str:
    if estimate["value"] is None:
        return "-"
    return f"{estimate['value']:.4f}" + ("" if estimate["se"] is None else f" ± {estimate['se']:.4f}")


class Progress:
    """How far, how fast, how long still: a bar on a terminal, a line every few seconds in a log."""

    EVERY = 5.0

    def __init__(self, what: str, total: int):
        self.what, self.total, self.began, self.last, self.first = what, total, time.monotonic(), 0.0, None
        self.bar = self.task = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                           TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self.task = self.bar.add_task(self.what, total=self.total or None, note="")
            self.bar.start()
        return self

    def __call__(self, done: int, note: str, total: int = 0, what: str = "") -> None:
        """Say how much is done; another `what` than before begins a new bar."""
        self.total = total or self.total
        if what and what != self.what:
            self.what, self.began, self.last, self.first = what, time.monotonic(), 0.0, None
            if self.bar is not None:
                self.bar.update(self.task, visible=self.bar.tasks[-1].completed > 0)
                self.task = self.bar.add_task(what, total=self.total, note="")
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=self.total, note=note)
            return
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if now - self.last < self.EVERY and done < self.total:
            return
        self.last = now
        spent, moved = now - self.began, done - self.first
        left = f", about {spent / moved * (self.total - done):,.0f} s left" if moved and done < self.total else ""
        _say(f"{self.what} {done:,} of {self.total:,}{left}" + (f" · {note}" if note else ""))

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
