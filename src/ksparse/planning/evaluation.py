"""What evaluations cost, before they run: memory, and the work of each phase. Needs no torch.

    EvalCase(subject, acts, options, n_latents, k)   an SAE on an LM, and how it is evaluated
    memory(case)                                     bytes at the peak of `downstream`, by part
    parts(names, case)                               work of each phase, for `progress.expect`
    seconds(name, case, flops_per_s)                 time of one evaluation, alone

The work of the LM is counted in FLOPs: 2 for each parameter of a matrix and token; runs with other
activations at the site start there, and logits are computed only where they are read. What is left
is seconds that were measured on two cores. Where it depends on the data (how long the suffixes of
N2G are), typical numbers stand for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ksparse.config import ActsConfig
from ksparse.config.evaluation import EvalConfig
from ksparse.limits import PRE_ACTS, logit_rows
from ksparse.planning.costs import CONTEXT, CONTEXTS, LIBRARIES, LMSpec, bytes_of
from ksparse.progress import DIRECT_LOGITS, FINDING_SUFFIXES, FINDING_WILDCARDS, Expected

HELD = 10
"""Hidden states, activations and reconstructions [tokens, d_model] of a batch that are held at
once."""
LOGITS_HELD = 3
"""Times that a slice of logits is held: those of two passes, and once what the head needs on its
way to them. `limits.LOGITS_COPIES` leaves room for a head that needs more."""
TOKENIZER = 1_200
"""Bytes of a tokenizer for each token of its vocabulary, measured."""
DEFAULT = ("downstream", "stats", "probes", "n2g", "explained_loss", "ablation")
"""The evaluations that run when none is named."""
READING_MEAN = "reading the mean activation"
READING, READING_AGAIN = "reading the text", "reading the text again"
ABLATING, FILLING_TABLES = "ablating at random positions", "ablating where latents are strongest"
MEAN_BATCHES = 16
"""Batches that the mean activation is computed from, at most."""
PYTHON_TOKENS = 200
"""Tokens of Python source that are read for each row of a built-in task."""
LONGER = 0.84
"""Share of N2G's examples whose suffix is longer than l, of those for which it is longer than
l - 1: 6 tokens on average, measured."""
LOGIT = 600
"""FLOPs of the LM that take as long as to see whether a direct logit is among the largest and in
which bin it lies; measured on a CPU."""
PROGRESSIVE = 23
"""Losses of the LM that `progressive` measures for a token: each of 11 k' by TopK and by a
threshold, and with all positive latents."""
TASKS = 40
"""Tasks of a suite of probes, about."""
_SECONDS = {
    "text": 1e-4,  # for a token of a pass: finding held-out documents, tokenizing, adding up
    "python": 1e-4,  # for a token of Python source that is labelled
    "ngrams": 4e-6,  # for a token that is counted
    "probe": 1e-7,  # for a row of a task and a latent
    "call": 4e-3,  # for a pass of the LM over few tokens
    "change": 2e-8,  # for a logit that an ablation changes: its median, norms and divergence
}


@dataclass(frozen=True)
class EvalCase:
    """SAEs on an LM, and how they are evaluated together."""

    subject: LMSpec
    acts: ActsConfig
    options: EvalConfig
    n_latents: int
    k: int
    saes: int = 1

    @property
    def batch(self) -> int:
        """Tokens in a batch of the LM."""
        contexts = self.options.lm_batch or self.acts.lm_batch or ActsConfig.lm_batch
        return contexts * self.acts.context

    @property
    def to_site(self) -> int:
        """FLOPs of the LM up to the site, for a token."""
        return 2 * self.subject.before_site

    @property
    def body(self) -> int:
        """FLOPs of the whole LM without its head, for a token."""
        return 2 * max(self.subject.body or self.subject.parameters, self.subject.before_site)

    @property
    def after(self) -> int:
        """FLOPs of the LM from the site on, without its head, for a token."""
        return self.body - self.to_site

    @property
    def head(self) -> int:
        """FLOPs of the logits of a token."""
        return 2 * self.subject.d_model * self.subject.vocabulary

    @property
    def encode(self) -> int:
        """FLOPs of encoding a token with all SAEs."""
        return 2 * self.n_latents * self.subject.d_model * self.saes


def memory(case: EvalCase, host: bool = True) -> dict[str, float]:
    """Return the bytes at the peak of the evaluation `downstream`, by part.

    The LM, the SAE and the logits work in turn: the one that needs most counts.

    Args:
        case: the SAE and its LM.
        host: the device is a CPU, which shares its memory with Python and the tokenizer.
    """
    subject, acts = case.subject, case.acts
    d, vocabulary = subject.d_model, subject.vocabulary
    tokens = case.batch
    weights = case.saes * (2 * case.n_latents * d + case.n_latents + d)
    sizes = {
        "libraries": LIBRARIES if host else CONTEXT,
        "tokenizer": TOKENIZER * vocabulary if host else 0,
        "LM": subject.parameters * bytes_of(acts.lm_dtype),
        "hidden states": 4 * HELD * tokens * d,
        "SAE": 4 * weights,
    }
    in_turn = {
        "logits": 4 * LOGITS_HELD * min(tokens, logit_rows(vocabulary)) * vocabulary,
        "LM at work": CONTEXTS * tokens * d * bytes_of(acts.lm_dtype),
        "pre-activations": 4 * min(PRE_ACTS, tokens * case.n_latents),
    }
    largest = max(in_turn, key=lambda name: in_turn[name])
    sizes[largest] = in_turn[largest]
    return {name: float(size) for name, size in sizes.items() if size}


def parts(names: Sequence[str], case: EvalCase) -> dict[str, Expected]:
    """Return the work of each phase of evaluations that run together, by the name under which the
    phase is reported, in the order of the phases."""
    options, result = case.options.resolved(), dict[str, Expected]()
    tokens, saes = options.tokens, case.saes
    whole_passes = "downstream" in names
    if whole_passes:
        sample = min(tokens, MEAN_BATCHES * case.batch)
        result[f"pass 1: {READING_MEAN}"] = Expected(
            case.to_site * sample, 0, _SECONDS["text"] * sample
        )
    if set(names) - {"probes"}:
        more = _spliced_passes(names, case, options)
        flops = case.encode + round(more * (case.after + case.head))
        if whole_passes:
            flops += case.body + (2 + saes) * case.after + (3 + 2 * saes) * case.head
        else:
            flops += case.body + case.head if more else case.to_site
        result[f"pass 1: {READING}"] = Expected(flops * tokens, tokens, _SECONDS["text"] * tokens)
    for name in names:
        result |= {f"{name}: {what}": part for what, part in _phases(name, case, names).items()}
    if "explained_loss" in names:
        flops = case.body + case.encode + (1 + 3 * saes) * case.after + (1 + saes) * case.head
        result[f"pass 2: {READING_AGAIN}"] = Expected(
            flops * tokens, tokens, _SECONDS["text"] * tokens
        )
    return result


def _spliced_passes(names: Sequence[str], case: EvalCase, options: EvalConfig) -> float:
    """Return how many passes of the LM from the site on `progressive` and `refinement` take, for a
    token of the text on average."""
    passes = 0.0
    if "progressive" in names:
        passes += PROGRESSIVE * min(1.0, options.progressive_tokens / options.tokens)
    if "refinement" in names:
        passes += min(1.0, options.refine_tokens / options.tokens)
    return passes * case.saes


def _phases(name: str, case: EvalCase, names: Sequence[str]) -> dict[str, Expected]:
    """Return what an evaluation does between the passes."""
    options = case.options.resolved()
    if name == "stats":
        ends = case.n_latents * case.subject.vocabulary * LOGIT
        rows = case.n_latents + case.subject.d_model  # those of the covariance
        return {DIRECT_LOGITS: Expected(case.saes * (rows * case.head + ends), rounds=case.saes)}
    if name == "probes":
        return _probe_phases(case, options)
    if name == "ablation":
        return _ablation_phases(case, options)
    if name == "n2g":
        latents = min(options.latents, case.n_latents)
        return _explanations(latents, options.n2g_examples, case, options)
    if name == "explained_loss":
        per_latent = min(options.explained_examples, options.n2g_examples)
        others = options.latents if "n2g" in names and per_latent == options.n2g_examples else 0
        latents = max(0, case.n_latents - others)
        counted = options.ngram_tokens
        return {
            **_explanations(latents, per_latent, case, options),
            "counting n-grams": Expected(0, counted, _SECONDS["ngrams"] * counted),
        }
    return {}


def _ablation_phases(case: EvalCase, options: EvalConfig) -> dict[str, Expected]:
    """Return the two rounds of ablations: of all active latents at random positions, and of single
    latents where they are strongest."""
    latents = min(options.ablation_latents or case.n_latents, case.n_latents)
    length = min(options.ablation_horizon, case.acts.context)
    fork = case.acts.context / 2 * case.body + length * (case.body + case.head)

    def round_of(sites: int, ablations: int, originals: int) -> Expected:
        runs = fork + (ablations + originals) * length * (case.after + case.head)
        logits = ablations * length * case.subject.vocabulary
        sites *= case.saes
        return Expected(sites * runs, 0, sites * logits * _SECONDS["change"], case.saes)

    return {
        ABLATING: round_of(options.ablation_positions, 2 * case.k, 2),
        FILLING_TABLES: round_of(latents, 1, 1),
    }


def _probe_phases(case: EvalCase, options: EvalConfig) -> dict[str, Expected]:
    rows, fits = options.probe_rows, TASKS * options.probe_rows * case.n_latents * 2 * case.saes
    fit_seconds = _SECONDS["probe"] * fits
    if options.suite:
        read = case.to_site * TASKS * rows * min(options.probe_tokens, 64)
        return {"fitting probes": Expected(read, 0, fit_seconds, case.saes)}
    tokens = PYTHON_TOKENS * rows
    return {
        "labelling Python source": Expected(0, tokens, _SECONDS["python"] * tokens),
        "reading Python source": Expected(case.to_site * tokens),
        "fitting probes": Expected(case.encode * 2 * TASKS * rows, 0, fit_seconds, case.saes),
    }


def _explanations(
    latents: int, per_latent: int, case: EvalCase, options: EvalConfig
) -> dict[str, Expected]:
    positions = options.tokens // 2  # two of four parts of the documents are built on
    share = latents / case.n_latents
    examples = round(min(latents * per_latent, positions * case.k * share))
    calls = {
        FINDING_SUFFIXES: case.acts.context,
        FINDING_WILDCARDS: case.acts.context * (case.acts.context + 1) // 3,
    }
    return {
        name: Expected(
            round(case.saes * tokens * case.to_site + rows * case.encode),
            0,
            case.saes * min(2 * examples, calls[name]) * _SECONDS["call"],
            case.saes,
        )
        for name, (rows, tokens) in _n2g_reading(examples, positions, case.acts.context).items()
    }


def _n2g_reading(examples: int, positions: int, context: int) -> dict[str, tuple[float, float]]:
    """Return the distinct sequences that N2G reads, and their tokens, by phase.

    Args:
        examples: activations that explanations are built from.
        positions: tokens of the text that they are taken from: latents that are active at the same
            one read the same suffixes.
        context: the longest suffix.
    """
    suffixes = wildcards = suffix_tokens = wildcard_tokens = 0.0
    for length in range(1, context + 1):
        tried = examples * LONGER ** (length - 1)
        ended = tried * (1 - LONGER) if length < context else tried
        rows, changed = min(tried, positions), min(ended, positions) * (length + 1)
        suffixes, suffix_tokens = suffixes + rows, suffix_tokens + rows * (length + 2)
        wildcards, wildcard_tokens = wildcards + changed, wildcard_tokens + changed * (length + 2)
    return {
        FINDING_SUFFIXES: (suffixes, suffix_tokens),
        FINDING_WILDCARDS: (wildcards, wildcard_tokens),
    }


def seconds(name: str, case: EvalCase, flops_per_s: float) -> float:
    """Return about how long an evaluation takes alone, at a speed of the LM in FLOP/s."""
    return sum(part.work / flops_per_s + part.seconds for part in parts([name], case).values())
