"""What an evaluation or a study does, as frozen data. Nothing here imports torch, so that the
command line can show its help at once.

Each option of `EvalConfig` says beside its default which evaluations it is for, and a sample size
what each budget makes of 0. To add an option, add a field: budgets and the options that a result
records are read from the fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ksparse.config import Config
from ksparse.errors import unknown

DEFAULT_EVALUATIONS = ("downstream", "stats", "probes", "n2g", "explained_loss", "ablation")
"""The evaluations that run when none is named."""
COMPARED = ("downstream", "stats")
"""The evaluations that a comparison is made of where none is named."""
EVALUATIONS = (
    *DEFAULT_EVALUATIONS,
    *("positions", "refinement", "progressive", "latents", "subspaces"),
    *("token_driven", "norms", "decoder_projection", "absorption"),
)
"""All evaluations. `ksparse.evals.registry` has their classes."""
STUDIES = ("baselines", "sites", "gaussian", "paper", "recipe", "sanity")
"""All studies. `ksparse.studies` has their functions."""
SANITY_CONTROLS = {
    "seeds": True,
    "frozen_decoder": True,
    "held_decoder": True,
    "frozen_encoder": True,
    "redrawn": True,
    "redrawn_keep_embedding": False,
    "shuffled": False,
    "sweep_k": True,
    "sweep_n": False,
}
"""The controls of the study sanity, and whether they are trained where none is named.
`ksparse.studies.sanity.controls` says what they are."""
_EVERY = "every evaluation"


def check_evaluations(names: Sequence[str]) -> None:
    """Check that evaluations of these names exist.

    Raises:
        InputError: naming the first that does not exist, with a suggestion.
    """
    for name in names:
        if name not in EVALUATIONS:
            raise unknown("there is no evaluation", name, EVALUATIONS)


def _option(default: Any, *evaluations: str) -> Any:
    """Return a field with the evaluations that depend on it; their results record its value."""
    return field(default=default, metadata={"evaluations": evaluations})


def _sample_size(*evaluations: str, small: int, paper: int) -> Any:
    """Return a field for a sample size that is 0 by default: the size of the chosen budget."""
    sizes = {"small": small, "paper": paper}
    return field(default=0, metadata={"evaluations": evaluations, "sizes": sizes})


@dataclass(frozen=True)
class EvalConfig(Config):
    """Which text evaluations use, how much of it, and how each of them works.

    A sample size of 0 is that of the budget. The paper names 400 latents and 16 examples for N2G;
    the other sizes are ours.

    Example:
        >>> from ksparse.config.evaluation import EvalConfig
        >>> EvalConfig(budget="paper", seed=1).resolved().tokens
        10000000
        >>> EvalConfig().for_eval("progressive")["progressive_tokens"]
        0
    """

    OWNER = "an evaluation"

    budget: Literal["small", "paper"] = _option("small", _EVERY)
    """Sample sizes. small: minutes on two cores. paper: tight standard errors, for a GPU."""
    tokens: int = _sample_size(_EVERY, small=100_000, paper=10_000_000)
    """Activations of held-out text to evaluate on, rounded up to whole contexts, fewer if the text
    is shorter; 0: those of the budget (small: 100,000; paper: 10 million). How many were read is
    `n_tokens` of each result."""
    per_document: int = _option(512, _EVERY)
    """Tokens to use per document, so that a small sample still comes from many documents."""
    split: Literal["held-out", "validation", "train"] = _option("held-out", _EVERY)
    """Side of the text. Training uses neither held-out nor validation. Results of a side other than
    held-out get files of their own, such as stats-train.json."""
    text: str = _option("", _EVERY)
    """Text to use instead of the SAE's own: a file, a folder or a data set on the Hub."""
    force: bool = False
    """Evaluate even where the SAE was not trained: at another site, with other contexts or
    positions. The results note it."""
    seed: int = _option(0, _EVERY)
    """Seed of all random samples."""
    device: str = _option("auto", _EVERY)
    """Device: auto, cpu, cuda, cuda:1, mps."""
    lm_batch: int = 0
    """Contexts per forward pass of the LM; 0: as many as in training. Fewer need less memory and
    give the same results."""

    loss_table: str = _option("", "downstream")
    """downstream: file of JSON lines {flops, loss} from the LM's pre-training, for
    compute_fraction; by default training.jsonl in the folder of the LM."""
    examples: int = _option(8, "stats")
    """stats: contexts to keep per latent, this many of its strongest and as many random ones; 0:
    keep nothing about single latents."""

    suite: str = _option("", "probes")
    """probes: folder of tasks, TASK.jsonl or TASK.jsonl.gz with rows {text, label}; by default the
    built-in tasks on Python tokens."""
    position: Literal["last", "mean", "max"] = _option("last", "probes")
    """probes: which values of a text to probe: those at its last token, or the mean or maximum of
    each latent over its tokens."""
    probe_on: Literal["pre_acts", "acts"] = _option("pre_acts", "probes")
    """probes: values before the activation function (paper) or after it."""
    probe_rows: int = _sample_size("probes", small=1_000, paper=4_000)
    """probes: largest number of rows per task; 0: that of the budget (small: 1,000; paper:
    4,000)."""
    probe_l2: float = _option(1e-3, "probes")
    """probes: L2 penalty on the weight of a probe, for inputs scaled to variance 1."""
    probe_tokens: int = _option(512, "probes")
    """probes: largest number of tokens per text; the end of a longer text is used. The LM's own
    limit applies too."""

    latents: int = _sample_size("n2g", "token_driven", small=400, paper=400)
    """n2g, token_driven: number of live latents, drawn at random, whose explanations are scored, or
    whose tokens are put into other contexts; 0: 400."""
    n2g_examples: int = _sample_size("n2g", "explained_loss", small=16, paper=16)
    """n2g: activations per latent from which its explanation is built, and as many to score it; 0:
    16."""
    explained_examples: int = _sample_size("explained_loss", small=4, paper=16)
    """explained_loss: activations per latent from which its explanation is built, at most
    `n2g_examples`; 0: those of the budget (small: 4; paper: 16). All latents are explained, so this
    decides how long it takes."""
    n2g_variant: Literal["ksparse", "official"] = _option("ksparse", "n2g", "explained_loss")
    """n2g, explained_loss: our implementation, or the published code with its faults, for
    comparison."""
    n2g_pad: str = _option("", "n2g", "explained_loss")
    """n2g, explained_loss: text of the token that replaces removed ones; by default chosen for the
    tokenizer."""
    ngram_tokens: int = _sample_size("explained_loss", small=1_000_000, paper=10_000_000)
    """explained_loss: training tokens from which the unigram and bigram baselines are counted; 0:
    those of the budget (small: 1 million; paper: 10 million)."""

    ablation_positions: int = _sample_size("ablation", small=64, paper=2_000)
    """ablation: random positions at which every active latent is ablated; 0: those of the budget
    (small: 64; paper: 2,000)."""
    ablation_latents: int = _sample_size("ablation", small=4_096, paper=0)
    """ablation: latents to ablate where they are strongest, for tables of their own; 0: those of
    the budget (small: 4,096; paper: all)."""
    ablation_horizon: int = _option(16, "ablation")
    """ablation: tokens whose predictions are compared, from the ablated one on (T in the paper)."""
    ablation_error: Literal["keep", "drop"] = _option("keep", "ablation")
    """ablation: keep: remove the latent from the activation itself. drop: from its
    reconstruction."""

    refine_tokens: int = _sample_size("refinement", small=30_000, paper=1_000_000)
    """refinement: tokens whose codes are refined; 0: those of the budget (small: 30,000; paper: 1
    million)."""
    refine_exact: int = _option(64, "refinement")
    """refinement: how many of these tokens to solve exactly as well, as a check; 0: none."""
    progressive_tokens: int = _sample_size("progressive", small=30_000, paper=1_000_000)
    """progressive: tokens to encode at each k and threshold; 0: those of the budget (small: 30,000;
    paper: 1 million)."""
    subspace_rows: int = _sample_size("subspaces", small=4_096, paper=16_384)
    """subspaces: largest number of latents to order; more are sampled. 0: that of the budget
    (small: 4,096; paper: 16,384)."""
    ordering: Literal["spectral", "umap"] = _option("spectral", "subspaces")
    """subspaces: how to order latents: spectral, or UMAP to one dimension as in the paper (pip
    install 'ksparse[umap]')."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("per_document", "probe_tokens", "ablation_horizon", at_least=1)
        self.check_range("examples", "refine_exact", "seed", "lm_batch", at_least=0)
        self.check_range(*budget_sizes("small"), at_least=0, note="; 0 is the budget's size")
        self.check_range(
            "probe_l2", above=0, note=": without a penalty separable data have no optimum"
        )

    def resolved(self) -> EvalConfig:
        """Return the same options with the budget's sample sizes in place of 0."""
        sizes: dict[str, Any] = {
            name: getattr(self, name) or size for name, size in budget_sizes(self.budget).items()
        }
        return dataclasses.replace(self, **sizes)

    def for_eval(self, name: str) -> dict[str, Any]:
        """Return the options that one evaluation depends on, which its result records.

        Args:
            name: the evaluation, such as "probes". One without options of its own depends on those
                of every evaluation.
        """
        return {
            option.name: getattr(self, option.name)
            for option in dataclasses.fields(self)
            if {_EVERY, name} & set(option.metadata.get("evaluations", ()))
        }


def budget_sizes(budget: str) -> dict[str, int]:
    """Return the sample sizes of a budget, by the names of the options."""
    return {
        option.name: option.metadata["sizes"][budget]
        for option in dataclasses.fields(EvalConfig)
        if "sizes" in option.metadata
    }


@dataclass(frozen=True)
class StudyConfig(Config):
    """What a study trains, on what, and for how long.

    0 and '' leave the choice to the study, which then takes minutes on two cores with the built-in
    LM.

    Example:
        >>> from ksparse.config.evaluation import StudyConfig
        >>> StudyConfig(run="runs/demo", tokens=1e6, seeds=3).tokens
        1000000
    """

    OWNER = "a study"

    run: str = ""
    """Run whose activations and recipe the study starts from; by default the built-in LM and the
    default recipe. A study that is an evaluation needs one."""
    recipe: str = ""
    """Recipe (a TOML file) whose activations and options the study starts from, in place of a
    run's."""
    out: str = ""
    """Folder of the study; by default studies/NAME. The same command continues an unfinished
    study."""
    lm: str = ""
    """LM to use instead of the run's."""
    site: str = ""
    """Site to use instead of the run's."""
    text: str = ""
    """Text to use instead of the run's."""
    tokens: int = 0
    """Activations to train each SAE on; 0: the study's choice."""
    n_latents: int = 0
    """Latents of each SAE, or of the largest where the study varies them; 0: the study's choice."""
    k: int = 0
    """k of each SAE, or the middle one where the study varies it; 0: the study's choice."""
    batch: int = 0
    """Activations per step; 0: those of the recipe, or 1,024."""
    seeds: int = 1
    """SAEs of each kind to train, with different seeds."""
    eval_tokens: int = 30_000
    """Held-out activations to evaluate on."""
    suite: str = ""
    """paper: folder of probe tasks; by default the built-in tasks on Python tokens."""
    probe_rows: int = 200
    """paper: largest number of rows of a probe task."""
    controls: tuple[str, ...] = ()
    """sanity: controls to train, by name: seeds, frozen_decoder, held_decoder, frozen_encoder,
    redrawn, redrawn_keep_embedding, shuffled, sweep_k, sweep_n, or all. None named: those that take
    minutes with the built-in LM."""
    threads: int = 0
    """CPU threads; 0: all cores."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(
            "tokens",
            "n_latents",
            "k",
            "batch",
            "threads",
            at_least=0,
            note="; 0 is the study's own choice",
        )
        self.check_range("seeds", "eval_tokens", "probe_rows", at_least=1)
