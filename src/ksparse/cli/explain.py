"""The verb that explains latents in words: explain."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from ksparse import progress
from ksparse.cli.arguments import parse, split_folder, verb
from ksparse.cli.output import ProgressBar, format_estimate, write_report
from ksparse.errors import InputError, KsparseError
from ksparse.explain.options import ExplainConfig
from ksparse.storage.run_folder import open_run


@dataclass(frozen=True)
class ExplainArgs(ExplainConfig):
    """Options of `ksparse explain`."""

    trust_remote_code: bool = False
    """Let code that comes with the LM run, if you trust its author. No file can allow it."""


@verb
def explain(arguments: list[str]) -> None:
    """explain RUN [--url URL --model NAME] [--key value …]

    Explain latents in words by a model behind an OpenAI-compatible server, and score the
    explanations. Without --url nothing is sent: the requests and their tokens are counted. Answers
    are kept in the run; the same command goes on with what is missing.
    """
    folder, flags = split_folder("explain", arguments)
    options = parse(ExplainArgs, "explain RUN", flags)
    if options.url and not options.model:
        raise InputError("--url needs --model NAME, the model's name on that server")
    run = open_run(folder)
    from ksparse import interop
    from ksparse.device import resolve_device
    from ksparse.evals.runner import write_results
    from ksparse.explain import texts
    from ksparse.explain.answers import Answers
    from ksparse.explain.examples import collect
    from ksparse.explain.explain import NAME, SCORES, Explainer
    from ksparse.explain.server import ChatServer, ServerError
    from ksparse.lm.model import LM

    secret = os.environ.get(options.key_variable, "").strip()
    server = ChatServer(
        options.url or "http://127.0.0.1",
        options.model,
        secret if options.url else "",
        key_variable=options.key_variable,
        per_minute=options.per_minute,
        tries=options.tries,
        timeout=options.timeout,
    )
    with ProgressBar("texts") as bar, progress.observed(bar):
        sae, acts = interop.load(run.path), run.subject().acts
        key = texts.key_of(sae, acts, options)
        specimens = texts.read(run, key)
        if specimens is None:
            lm = LM(acts=acts, device=str(resolve_device(options.device)))
            specimens = collect(sae, lm, options)
            texts.write(run, key, specimens)
    explainer = Explainer(specimens, options, server, Answers(run))
    needed = explainer.estimate()
    print(
        f"{len(specimens.of)} latents: at most {needed.requests:,} requests, about "
        f"{needed.prompt_tokens:,} tokens sent and at most {needed.answer_tokens:,} tokens back, "
        f"about {needed.longest:,} in the longest; {len(explainer.answers):,} answers are there "
        "already",
        flush=True,
    )
    if not options.url:
        print("nothing was sent; add --url URL --model NAME to ask a server")
        return
    print(f"asking {options.model} at {server.url}: it gets held-out text of the run", flush=True)
    try:
        with ProgressBar("explaining") as bar, progress.observed(bar):
            result = explainer.run()
    except (KsparseError, KeyboardInterrupt) as error:
        again = f"go on with: ksparse explain {shlex.join(arguments)}"
        kept = f"{len(explainer.answers):,} answers are kept in {explainer.answers.file}; {again}"
        if isinstance(error, (ServerError, InputError)):
            raise type(error)(f"{error}. {kept}") from None
        print(kept)
        raise
    write_results(run, {NAME: result})
    for score in SCORES:
        print(
            f"{score:<10} {format_estimate(result[score])}   explanations of other latents "
            f"{format_estimate(result['shuffled_' + score])}   N2G "
            f"{format_estimate(result['n2g_' + score])}"
        )
    answers = result["answers"]
    print(
        f"{'answers':<10} {answers['requests']:,} requests, {explainer.asked:,} of them now; the "
        f"server counted {answers['prompt_tokens']:,} tokens sent and "
        f"{answers['answer_tokens']:,} back"
        + f", and none for {answers['uncounted']:,}"
        * bool(answers["uncounted"])
    )
    for note in result["notes"]:
        print(f"note       {note}")
    write_report(run)
    print(f"saved      {run.eval_file(NAME)}")
