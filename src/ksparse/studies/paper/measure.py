"""The evaluations of the study, and access to their numbers.

Each evaluation is of few SAEs, those that its claim is about; all read the same held-out text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ksparse.config.evaluation import EvalConfig
from ksparse.studies.paper import members
from ksparse.studies.paper.members import Sizes
from ksparse.studies.study import Estimate, Study, StudyCurve

QUALITY = ("stats", "downstream")


@dataclasses.dataclass
class Evidence:
    """What the study knows: its SAEs, and the results it has of them.

    Attributes:
        study: The study.
        sizes: The sizes that it varies.
        weights: ReLU's penalty weights whose L0 lie around k, the sparser first.
        results: {member: {evaluation: result}}.
    """

    study: Study
    sizes: Sizes
    weights: list[float]
    results: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def evaluate(self, names: Sequence[str], evaluations: Sequence[str]) -> None:
        """Run evaluations of members, or read what was run before."""
        options = eval_options(self.study)
        for member, results in self.study.evaluate(names, evaluations, options=options).items():
            self.results.setdefault(member, {}).update(results)

    def has(self, evaluation: str, *names: str) -> bool:
        """Return whether all members have a result of an evaluation."""
        return all(evaluation in self.results.get(member, {}) for member in names)

    def number(self, member: str, evaluation: str, key: str) -> Estimate:
        """Return a number of a result, {"value", "se"}."""
        number: Estimate = self.results[member][evaluation][key]
        return number

    def value(self, member: str, evaluation: str, key: str) -> float:
        """Return the value of a number that every such result has."""
        value = self.number(member, evaluation, key)["value"]
        assert value is not None
        return value

    def curve(
        self, label: str, x: Sequence[float], names: Sequence[str], evaluation: str, key: str
    ) -> StudyCurve:
        """Return a number of several members as a curve."""
        numbers = [self.number(member, evaluation, key) for member in names]
        return StudyCurve(
            label, x, [number["value"] for number in numbers], [number["se"] for number in numbers]
        )

    def arrays(self, member: str, evaluation: str) -> dict[str, Tensor]:
        """Return the arrays of a result, from its file."""
        file = self.study.run_folder(member).arrays_file(evaluation)
        return {} if file is None else load_file(file)

    def trained(self, prefix: str = "") -> list[str]:
        """Return the members on disk whose names begin with a prefix."""
        return [member for member in sorted(self.results) if member.startswith(prefix)]

    # ---- members that several claims are about

    @property
    def middle(self) -> str:
        """TopK with the recipe's k, of the size that is compared with others."""
        return members.topk(self.sizes.compared, self.sizes.k)

    @property
    def largest(self) -> str:
        """TopK with the recipe's n and k."""
        return members.topk(self.sizes.n, self.sizes.k)

    @property
    def by_size(self) -> list[str]:
        """TopK with the recipe's k, of rising n."""
        return [members.topk(n, self.sizes.k) for n in self.sizes.latents]

    @property
    def by_k(self) -> list[str]:
        """TopK of the compared size, of rising k."""
        return [members.topk(self.sizes.compared, k) for k in self.sizes.all_k]

    @property
    def relu(self) -> str:
        """ReLU of the compared size with L0 nearest k, seed 0; the sparser until L0 is known."""
        names = [members.relu(self.sizes.compared, weight) for weight in self.weights]
        if not self.has("stats", *names):
            return names[0]
        return min(names, key=lambda name: abs(self.value(name, "stats", "l0") - self.sizes.k))


def eval_options(study: Study) -> EvalConfig:
    """Return the options of all evaluations of the study, some sizes smaller than by default."""
    options = study.options
    tokens = options.eval_tokens
    return EvalConfig(
        tokens=tokens,
        examples=0,
        device=options.device,
        suite=options.suite,
        probe_rows=options.probe_rows,
        latents=50,
        ablation_positions=8,
        ablation_latents=32,
        refine_tokens=min(tokens, 2_000),
        progressive_tokens=min(tokens, 2_000),
    )


def measure_quality(evidence: Evidence) -> None:
    """Error and downstream loss of every TopK and ReLU."""
    sizes, weights = evidence.sizes, evidence.weights
    grid = [members.topk(n, k) for n in sizes.latents for k in sizes.sparsities]
    seeds = range(sizes.seeds)
    evidence.evaluate(
        [
            *dict.fromkeys(grid + evidence.by_k),
            *(members.topk(sizes.compared, sizes.k, seed) for seed in seeds if seed),
            *(members.relu(sizes.compared, l1, seed) for l1 in weights for seed in seeds),
        ],
        QUALITY,
    )
    evidence.evaluate([members.without(part, sizes) for part in members.DEAD], ("stats",))


def measure_probes(evidence: Evidence) -> None:
    """Probe loss of every size, and of ReLU."""
    evidence.evaluate([*evidence.by_size, evidence.relu], ("probes",))


def measure_n2g(evidence: Evidence) -> None:
    """Recall and precision of N2G, TopK beside ReLU."""
    evidence.evaluate([evidence.middle, evidence.relu], ("n2g",))


def measure_ablation(evidence: Evidence) -> None:
    """Ablation sparsity against k."""
    evidence.evaluate(evidence.by_k, ("ablation",))


def measure_refinement(evidence: Evidence) -> None:
    """Shrinkage, TopK beside ReLU."""
    evidence.evaluate([evidence.middle, evidence.relu], ("refinement",))


def measure_latents(evidence: Evidence) -> None:
    """Dense latents against k, error by position, and subspaces."""
    evidence.evaluate(evidence.by_k, ("latents",))
    evidence.evaluate([evidence.middle], ("positions",))
    evidence.evaluate([evidence.largest], ("subspaces",))


def measure_progressive(evidence: Evidence) -> None:
    """Error at other k than the trained one, TopK beside Multi-TopK."""
    evidence.evaluate([evidence.middle, members.multi(evidence.sizes)], ("progressive",))
