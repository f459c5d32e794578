"""What an evaluation looks at, as frozen data; without torch, so that the command line can show it
at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ksparse.config import Config
from ksparse.errors import InputError

BUDGETS: dict[str, dict[str, int]] = {
    "small": {
        "tokens": 100_000,
        "probe_rows": 1_000,
        "latents": 400,
        "n2g_examples": 16,
        "ngram_tokens": 1_000_000,
        "ablation_positions": 64,
        "ablation_latents": 4_096,
        "refine_tokens": 30_000,
        "progressive_tokens": 30_000,
        "subspace_rows": 4_096,
    },
    "paper": {
        "tokens": 10_000_000,
        "probe_rows": 4_000,
        "latents": 400,
        "n2g_examples": 16,
        "ngram_tokens": 10_000_000,
        "ablation_positions": 2_000,
        "ablation_latents": 0,
        "refine_tokens": 1_000_000,
        "progressive_tokens": 1_000_000,
        "subspace_rows": 16_384,
    },
}
"""Sample sizes by the name of a budget. The paper names 400 latents and 16 examples; it leaves the
others open."""


@dataclass(frozen=True)
class EvalConfig(Config):
    """Which text, how much of it, and how each question is asked. A sample size of 0 is the
    budget's."""

    budget: Literal["small", "paper"] = "small"
    """small: minutes on two cores. paper: tight standard errors, for a GPU."""
    tokens: int = 0
    """Kept activations of held-out text to look at (small: 100,000; paper: 10 M); fewer if the text
    has fewer."""
    per_document: int = 512
    """Tokens used of each document, so that few tokens still come from many documents."""
    split: Literal["held-out", "validation", "train"] = "held-out"
    """Side of the text. Training sees neither of the first two; results of the others than held-out
    are files of their own, such as stats-train.json."""
    text: str = ""
    """Another text than the SAE's own."""
    force: bool = False
    """Evaluate where the SAE was not trained all the same: at another site, in other contexts or
    positions. The results say so."""
    seed: int = 0
    """Draws every random sample."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    loss_table: str = ""
    """downstream: JSON lines {flops, loss} of the LM's pre-training, for compute_fraction; the LM
    folder's training.jsonl if not given."""
    examples: int = 8
    """stats: contexts kept of each latent, as many of its strongest as of random ones; 0: none, nor
    anything else to show of single latents."""
    suite: str = ""
    """probes: a folder of TASK.jsonl[.gz] with rows {text, label}; the built-in suite of Python
    tokens if not given."""
    position: Literal["last", "mean", "max"] = "last"
    """probes: which token of a text is probed: its last, or the mean or the largest value of each
    latent over all."""
    probe_on: Literal["pre_acts", "acts"] = "pre_acts"
    """probes: values before the TopK (paper) or after it."""
    probe_rows: int = 0
    """probes: most rows of a task (small: 1,000; paper: 4,000)."""
    probe_l2: float = 1e-3
    """probes: penalty on the squared weight of a probe, its input scaled to variance 1; above 0, or
    separable data have no optimum."""
    probe_tokens: int = 512
    """probes: most tokens of a text, of which the end is kept; never more than the LM takes."""
    latents: int = 0
    """n2g: latents whose explanations are scored, drawn at random from the live ones (400)."""
    n2g_examples: int = 0
    """n2g, explained_loss: activations of a latent that its explanation is built from, and as many
    to score it on (16)."""
    n2g_variant: Literal["ksparse", "official"] = "ksparse"
    """n2g: ksparse, or the published code with its faults, to compare."""
    n2g_pad: str = ""
    """n2g: text of the token that stands for a removed one; chosen for the tokenizer if not
    given."""
    ngram_tokens: int = 0
    """explained_loss: training tokens that the unigram and bigram baselines count (small: 1 M;
    paper: 10 M)."""
    ablation_positions: int = 0
    """ablation: random positions at which every active latent is ablated (small: 64; paper:
    2,000)."""
    ablation_latents: int = 0
    """ablation: latents ablated where they are strongest, for their own tables (small: 4,096;
    paper: all)."""
    ablation_horizon: int = 16
    """ablation: tokens whose predictions are compared, the ablated one included (the paper's T)."""
    ablation_error: Literal["keep", "drop"] = "keep"
    """ablation: keep: the latent is taken out of the activation itself. drop: out of its
    reconstruction."""
    refine_tokens: int = 0
    """refinement: tokens whose codes are refined (small: 30,000; paper: 1 M)."""
    refine_exact: int = 64
    """refinement: of these, tokens that are also solved exactly, as a check; 0: none."""
    progressive_tokens: int = 0
    """progressive: tokens that are coded at each k and threshold (small: 30,000; paper: 1 M)."""
    subspace_rows: int = 0
    """subspaces: most latents that are put into an order; more are sampled (small: 4,096; paper:
    16,384)."""
    ordering: Literal["spectral", "umap"] = "spectral"
    """subspaces: how latents are put into an order: spectral, or the paper's UMAP to one dimension
    (pip install 'ksparse[umap]')."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(
            "an evaluation", per_document=1, examples=0, probe_tokens=1, ablation_horizon=1, seed=0
        )
        for name in (*BUDGETS["small"], "refine_exact"):
            if getattr(self, name) < 0:
                raise InputError(
                    f"{name} of an evaluation is {getattr(self, name)}; it must be 0, for the "
                    "budget's, or more"
                )
        if not self.probe_l2 > 0:
            raise InputError(
                f"probe_l2 is {self.probe_l2}; it must be above 0: without a penalty separable "
                "data have no optimum"
            )

    def resolved(self) -> EvalConfig:
        """Return the same options with the budget's sample sizes in place of 0."""
        sizes: dict[str, Any] = {
            name: getattr(self, name) or size for name, size in BUDGETS[self.budget].items()
        }
        return dataclasses.replace(self, **sizes)

    def for_eval(self, name: str) -> dict[str, Any]:
        """Return the options that one evaluation depends on, as its result records them."""
        return {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if key in (*COMMON, *OWN.get(name, ()))
        }


@dataclass(frozen=True)
class StudyConfig(Config):
    """What a study trains, on what, and how long. 0 or nothing is the study's own choice, which
    takes minutes on two cores for the built-in LM."""

    run: str = ""
    """A run whose activations and recipe the study starts from; the defaults, on the built-in LM,
    if not given. Evaluations as studies need one."""
    out: str = ""
    """Folder of the study; studies/NAME if not given. The same command goes on with what is
    there."""
    lm: str = ""
    """Another LM than the run's."""
    site: str = ""
    """Another site."""
    text: str = ""
    """Another text."""
    tokens: int = 0
    """Activations that each SAE is trained on."""
    n_latents: int = 0
    """Latents of each SAE; the largest where a study varies them."""
    k: int = 0
    """k of each SAE; the middle one where a study varies them."""
    batch: int = 1024
    """Activations in a step."""
    seeds: int = 1
    """SAEs of each kind, with different initial weights."""
    eval_tokens: int = 30_000
    """Held-out activations to judge on."""
    threads: int = 0
    """CPU threads; 0: as many as the machine has."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "n_latents", "k", "threads"):
            if getattr(self, name) < 0:
                raise InputError(
                    f"{name} of a study is {getattr(self, name)}; it must be 0, for the study's "
                    "own choice, or more"
                )
        self.at_least("a study", batch=1, seeds=1, eval_tokens=1)


COMMON = ("budget", "tokens", "per_document", "split", "text", "seed", "device")
OWN = {
    "downstream": ("loss_table",),
    "stats": ("examples",),
    "probes": ("suite", "position", "probe_on", "probe_rows", "probe_l2", "probe_tokens"),
    "n2g": ("latents", "n2g_examples", "n2g_variant", "n2g_pad"),
    "explained_loss": ("n2g_examples", "n2g_variant", "n2g_pad", "ngram_tokens"),
    "ablation": ("ablation_positions", "ablation_latents", "ablation_horizon", "ablation_error"),
    "refinement": ("refine_tokens", "refine_exact"),
    "progressive": ("progressive_tokens",),
    "subspaces": ("subspace_rows", "ordering"),
}
