"""What is measured of a run and its controls, and which differences can be told.

A difference of two SAEs has three sources of error: the documents that both read, the samples that
an evaluation draws, and the seeds of both SAEs. The first two are the standard error of an
evaluation; where both SAEs read the same documents in one pass it is that of the paired difference.
The third is estimated from the run and its two other seeds: the variance of their values, less what
the first two explain. It is added twice, for the seed of either SAE.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from ksparse import progress
from ksparse.config.evaluation import EvalConfig
from ksparse.errors import CorruptError, InputError
from ksparse.evals import runner
from ksparse.evals.comparison import COLUMNS
from ksparse.evals.statistics import Value, difference, no_value
from ksparse.sae import serialization
from ksparse.storage import atomic, checksums, jsonio
from ksparse.studies.sanity.controls import RUN, AskedRun, Cohort, folder
from ksparse.studies.study import BATCH, Study

TOLD = 2.0
"""Standard errors beyond which a difference counts as told."""
DETECTABLE = 2.8
"""Standard errors of the smallest difference that four in five repetitions would tell."""
Verdict = Literal["better", "worse", "other", "cannot be told", "not measured"]


@dataclass(frozen=True)
class Measure:
    """A number by which SAEs are compared.

    Attributes:
        name: A short name.
        evaluation: The evaluation that has it.
        key: Its key there; "" if it is made of the evaluation's arrays.
        words: What it is called.
        elsewhere: Whether it means something beside an SAE of another LM or text.
    """

    name: str
    evaluation: str
    key: str
    words: str
    elsewhere: bool = True

    @property
    def better(self) -> int:
        """1 if less is better, -1 if more is, 0 if neither is: as in any comparison."""
        return COLUMNS.get(self.evaluation, {}).get(self.key, 0)


MEASURES = (
    Measure("nmse", "stats", "nmse", "normalised MSE"),
    Measure("ce_delta", "downstream", "ce_delta", "delta CE", elsewhere=False),
    Measure("probe_loss", "probes", "probe_loss", "probe loss"),
    Measure("n2g_f1", "n2g", "f1", "N2G F1"),
    Measure("ablation_sparsity", "ablation", "ablation_sparsity", "ablation sparsity"),
    Measure("density", "stats", "", "density"),
    Measure("token_driven", "token_driven", "token_driven", "token-driven share"),
)
"""The measures; of ablation sparsity less is sparser. Density is the mean of log10 of the densities
of live latents."""


@dataclass(frozen=True)
class MeasureComparison:
    """One measure of the run beside that of a control.

    Attributes:
        measure: The measure.
        run: The run's number.
        control: The control's.
        difference: Run less control, with the standard error over documents, samples and seeds.
        verdict: What the run is beside the control.
    """

    measure: Measure
    run: Value
    control: Value
    difference: Value
    verdict: Verdict

    @property
    def detectable(self) -> float | None:
        """The smallest difference that can be told; None where the error is not known."""
        se = self.difference["se"]
        return None if se is None else DETECTABLE * se


@dataclass
class SanityEvidence:
    """What the study knows: the run, and the results of it and its controls.

    Attributes:
        study: The study.
        subject: The run and the controls that are asked for.
        results: {member: {evaluation: result}}.
        paired: {member: {measure: run less member}}, with the error over documents and samples.
    """

    study: Study
    subject: AskedRun
    results: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    paired: dict[str, dict[str, Value]] = dataclasses.field(default_factory=dict)

    # ---- evaluation

    def evaluate(self, members: Sequence[str], names: Sequence[str]) -> None:
        """Evaluate members in one pass, or read what was evaluated before.

        Differences to the run are paired if the run is the first of the members.
        """
        options, size = eval_options(self.study), BATCH - 1
        others = [member for member in members if member != RUN]
        for first in range(0, max(1, len(others)), size):
            part = others[first : first + size]
            self._evaluate_part([RUN, *part] if RUN in members else part, names, options)

    def _evaluate_part(
        self, members: Sequence[str], names: Sequence[str], options: EvalConfig
    ) -> None:
        kept = {member: self._read_kept(member, names, options) for member in members}
        missing = [member for member in members if kept[member] is None and member != RUN]
        if missing or None in kept.values():
            # The run is in every pass, for the differences to be paired.
            read = [RUN, *missing] if RUN in members else missing
            saes = {
                member: serialization.load(folder(self.study, self.subject, member).path)
                for member in read
            }
            with progress.stage(f"evaluating {', '.join(names)}"):
                evaluated = runner.evaluate_many(saes, None, names, options)
            for member, results in evaluated.items():
                runner.write_results(self.study.run_folder(member), results)
                self._write_paired(member, names, evaluated)
            kept |= {member: self._read_kept(member, names, options) for member in read}
        for member in members:
            results, paired = kept[member] or ({}, {})
            self.results.setdefault(member, {}).update(results)
            self.paired.setdefault(member, {}).update(paired)

    def checksum(self, member: str) -> str:
        """Return the checksum of the checkpoint that a member's SAE is."""
        checkpoint = folder(self.study, self.subject, member).newest_intact()[0]
        assert checkpoint is not None
        return atomic.sha256(checkpoint / checksums.MANIFEST)

    def _read_kept(
        self, member: str, names: Sequence[str], options: EvalConfig
    ) -> tuple[dict[str, Any], dict[str, Value]] | None:
        """Return a member's stored results and differences; None if one is missing or of other
        SAEs."""
        checkpoint = folder(self.study, self.subject, member).newest_intact()[0]
        if checkpoint is None:
            return None
        metadata = serialization.read_shape(checkpoint)[1]
        place = self.study.run_folder(member)
        results = {name: runner.read_kept(place, name, options, metadata) for name in names}
        paired = dict[str, Value]()
        for name in names:
            try:
                file = place.file("paired", f"{name}.json")
                table = jsonio.read_table(file, of=list, differences=dict)
            except (OSError, InputError, CorruptError):
                return None
            if results[name] is None or table["of"] != [self.checksum(RUN), self.checksum(member)]:
                return None
            paired |= table["differences"]
        return results, paired

    def _write_paired(
        self, member: str, names: Sequence[str], evaluated: dict[str, dict[str, Any]]
    ) -> None:
        """Write the differences of a member to the run in the measures of some evaluations, which
        only results of one pass can give; none where the run is not in that pass."""
        for name in names:
            differences = {
                measure.name: {
                    key: value
                    for key, value in difference(
                        evaluated[RUN][name][measure.key], evaluated[member][name][measure.key]
                    ).items()
                    if key in ("value", "se")
                }
                for measure in MEASURES
                if measure.evaluation == name and measure.key and RUN in evaluated
            }
            table = {
                "of": [self.checksum(RUN), self.checksum(member)],
                "differences": differences,
            }
            file = self.study.run_folder(member).file("paired", f"{name}.json")
            jsonio.write_json(file, table, sealed=True)

    # ---- numbers

    def has(self, evaluation: str, *members: str) -> bool:
        """Return whether all members have a result of an evaluation."""
        return all(evaluation in self.results.get(member, {}) for member in members)

    def number(self, member: str, measure: Measure) -> Value:
        """Return a member's number; no value where it was not measured."""
        if not self.has(measure.evaluation, member):
            return no_value()
        if not measure.key:
            return mean_log_density(self.arrays(member, "stats")["density"].numpy())
        number = self.results[member][measure.evaluation][measure.key]
        return {"value": number["value"], "se": number["se"]}

    def arrays(self, member: str, evaluation: str) -> dict[str, Tensor]:
        """Return the arrays of a result, from its file."""
        file = self.study.run_folder(member).arrays_file(evaluation)
        return {} if file is None else load_file(file)

    def arrays_of_run(self, evaluation: str) -> dict[str, Tensor]:
        """Return the arrays of a result that is kept among the run's own."""
        file = self.subject.run.arrays_file(evaluation)
        return {} if file is None else load_file(file)

    def compare(self, control: str) -> list[MeasureComparison]:
        """Return the run beside a control in all measures that mean something for both and are
        there by now."""
        elsewhere = control not in self.own
        return [
            self._compare(control, measure)
            for measure in MEASURES
            if self.has(measure.evaluation, RUN, control) and (measure.elsewhere or not elsewhere)
        ]

    @property
    def own(self) -> list[str]:
        """The members that read the run's own activations."""
        return [RUN, *(member for member, values in self.paired.items() if values)]

    def _compare(self, control: str, measure: Measure) -> MeasureComparison:
        run, other = self.number(RUN, measure), self.number(control, measure)
        plain = self.paired.get(control, {}).get(measure.name) or difference(run, other)
        value, se = plain["value"], plain["se"]
        spread = self.seed_variance(measure)
        if se is not None and spread is not None:
            se = math.sqrt(se**2 + 2 * spread)
        total: Value = {"value": value, "se": se}
        return MeasureComparison(measure, run, other, total, _verdict(total, measure.better))

    def seed_variance(self, measure: Measure) -> float | None:
        """Return the variance of a measure over SAE seeds; None without other seeds.

        It is that of the run and its other seeds, less the mean variance of a value as it enters
        their differences, and at least 0.
        """
        seeds = [seed for seed in self.subject.seeds if self.has(measure.evaluation, seed)]
        numbers = [self.number(member, measure) for member in (RUN, *seeds)]
        values = [number["value"] for number in numbers if number["value"] is not None]
        if len(values) < 2:
            return None
        errors = [
            (self.paired.get(seed, {}).get(measure.name) or difference(numbers[0], number))["se"]
            for seed, number in zip(seeds, numbers[1:])
        ]
        noise = statistics.fmean((error or 0.0) ** 2 / 2 for error in errors)
        return max(0.0, statistics.variance(values) - noise)


def _verdict(total: Value, better: int) -> Verdict:
    value, se = total["value"], total["se"]
    if value is None or se is None:
        return "not measured"
    if abs(value) <= TOLD * se:
        return "cannot be told"
    if not better:
        return "other"
    return "better" if value * better < 0 else "worse"


def mean_log_density(density: np.ndarray) -> Value:
    """Return the mean of log10 of the densities above 0, with its standard error over latents.

    Example:
        >>> import numpy as np
        >>> mean_log_density(np.array([0.0, 0.1, 0.001]))
        {'value': -2.0, 'se': 1.0}
    """
    logs = np.log10(density[density > 0].astype(np.float64))
    if not len(logs):
        return no_value()
    se = float(logs.std(ddof=1) / math.sqrt(len(logs))) if len(logs) > 1 else None
    return {"value": float(logs.mean()), "se": se}


def eval_options(study: Study) -> EvalConfig:
    """Return the options of all evaluations of the study: small samples, so that all controls take
    minutes with the built-in LM."""
    options = study.options
    return EvalConfig(
        tokens=options.eval_tokens,
        per_document=128,
        examples=0,
        device=options.device,
        suite=options.suite,
        probe_rows=options.probe_rows,
        latents=100,
        n2g_examples=8,
        ablation_positions=16,
        ablation_latents=32,
    )


# ---- stages --------------------------------------------------------------------------------------


def measure_quality(evidence: SanityEvidence, cohort: Cohort) -> None:
    """Error, density and downstream loss."""
    evidence.evaluate(cohort.compared, ("stats", "downstream"))


def measure_probes(evidence: SanityEvidence, cohort: Cohort) -> None:
    """Probe loss."""
    evidence.evaluate(cohort.compared, ("probes",))


def measure_n2g(evidence: SanityEvidence, cohort: Cohort) -> None:
    """Explanations by patterns."""
    evidence.evaluate(cohort.compared, ("n2g",))


def measure_tokens(evidence: SanityEvidence, cohort: Cohort) -> None:
    """Latents that follow single tokens."""
    evidence.evaluate(cohort.compared, ("token_driven",))


def measure_ablation(evidence: SanityEvidence, cohort: Cohort) -> None:
    """Ablation sparsity."""
    evidence.evaluate(cohort.compared, ("ablation",))
