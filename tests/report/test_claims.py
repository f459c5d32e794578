"""Claims: what a run's numbers say of its SAE, at two standard errors."""

from __future__ import annotations

import json

import pytest

from ksparse.report import claims
from ksparse.report.claims import decide
from ksparse.report.sections import quality
from ksparse.report.source import Number, RunSource

from .conftest import RESULTS, estimate

CLAIMS = [claim for part in quality.PARTS for claim in part.claims]
# Of each claim: the evaluation, and a change of its result for which the claim does not hold.
AGAINST = [
    ("downstream", {"ce_delta": estimate(2.9)}),
    ("probes", {"gain_over_channels": estimate(-0.03)}),
    ("probes", {"gain_over_random_sae": estimate(-0.03)}),
    ("n2g", {"recall": estimate(0.01, 0.0001), "shuffled_recall": estimate(0.02, 0.0001)}),
    ("n2g", {"precision": estimate(0.01, 0.0001), "shuffled_precision": estimate(0.02, 0.0001)}),
    ("ablation", {"difference": estimate(-0.03)}),
]


def judge(source: RunSource) -> list[claims.ClaimVerdict]:
    return claims.judge_claims(source, CLAIMS)


def changed(run, name: str, changes: dict) -> RunSource:
    run.eval_file(name).write_text(json.dumps(RESULTS[name] | changes))
    return RunSource(run)


@pytest.mark.parametrize(
    "value, se, said",
    [
        (2.1, 1.0, "holds"),
        (-2.1, 1.0, "does not hold"),
        (2.0, 1.0, "unclear"),
        (-2.0, 1.0, "unclear"),
        (0.0, 0.0, "unclear"),
        (0.1, 0.0, "holds"),
        (9.0, None, "unclear"),
    ],
)
def test_a_claim_is_decided_at_two_standard_errors(value, se, said) -> None:
    assert decide(Number(value, se)) == said


def test_all_claims_hold_for_numbers_that_are_good(make_run) -> None:
    verdicts = judge(RunSource(make_run()))
    assert [claim.verdict for claim in verdicts] == ["holds"] * len(AGAINST) and not any(
        claim.meaning for claim in verdicts
    )
    assert claims.count_verdicts(verdicts) == "6 of 6 hold"


@pytest.mark.parametrize("index", range(len(AGAINST)))
def test_a_claim_that_does_not_hold_says_what_that_means(make_run, index) -> None:
    verdicts = judge(changed(make_run(), *AGAINST[index]))
    assert [claim.verdict for claim in verdicts] == [
        "does not hold" if i == index else "holds" for i in range(len(AGAINST))
    ]
    if_not = CLAIMS[index].if_not
    assert (
        verdicts[index].meaning == if_not
        if isinstance(if_not, str)
        else "later predictions" in verdicts[index].meaning
    )
    assert claims.count_verdicts(verdicts) == "5 of 6 hold, 1 does not"


@pytest.mark.parametrize("index", range(len(AGAINST)))
def test_a_claim_whose_numbers_have_large_errors_is_unclear(make_run, index) -> None:
    name, changes = AGAINST[index]
    vague = {key: {"value": RESULTS[name][key]["value"], "se": 2.0} for key in changes}
    verdicts = judge(changed(make_run(), name, vague))[index]
    assert verdicts.verdict == "unclear" and "two standard errors" in verdicts.meaning


@pytest.mark.parametrize("index", range(len(AGAINST)))
def test_a_claim_without_its_numbers_is_not_made(make_run, index) -> None:
    name, changes = AGAINST[index]
    verdicts = judge(
        changed(make_run(), name, {key: {"value": None, "se": None} for key in changes})
    )
    assert [claim.statement for claim in verdicts] == [
        claim.statement for i, claim in enumerate(CLAIMS) if i != index
    ]


def test_evaluations_that_were_not_run_claim_nothing(make_run) -> None:
    assert judge(RunSource(make_run("a", evals=()))) == []
    assert [claim.statement for claim in judge(RunSource(make_run("b", evals=("ablation",))))] == [
        CLAIMS[-1].statement
    ]


def test_numbers_without_a_standard_error_decide_nothing(make_run) -> None:
    verdicts = judge(changed(make_run(), "ablation", {"difference": estimate(0.3, None)}))[-1]
    assert verdicts.verdict == "unclear" and "no standard error" in verdicts.meaning


def test_a_claims_numbers_are_the_results(make_run) -> None:
    said = " ".join(claim.evidence for claim in judge(RunSource(make_run())))
    for number in (
        "0.163 ± 0.006 nats per token, 4.7 % of the mean activation’s 3.47",
        "Probe loss 0.410 with its latents, 0.500 with channels: a gain of 0.090 ± 0.004 nats",
        "0.520 with random latents",
        "31.0 % ± 1.0; with another latent’s patterns 1.4 % ± 0.5",
        "73.0 % ± 1.0; with another latent’s patterns 0.8 % ± 0.2",
        "12.0 % ± 1.0 of the logits for a latent, 40.0 % ± 1.0 for a channel; the paired difference is 28.0 % ± 1.0",
    ):
        assert number in said


def test_the_error_of_a_difference_is_never_too_small() -> None:
    """Two numbers of the same latents may hang together in any way; the sum of their errors covers all."""
    assert claims.subtract(Number(3, 1), Number(1, 2)) == Number(2, 3)
    assert (
        claims.subtract(Number(3, None), Number(1, 2)) == Number(2, None)
        and claims.subtract(None, Number(1, 2)) is None
    )


@pytest.mark.parametrize(
    "verdicts, words",
    [
        (["holds", "unclear"], "1 of 2 hold, 1 is unclear"),
        (["does not hold"] * 2, "0 of 2 hold, 2 do not"),
        (["holds", "does not hold", "unclear"], "1 of 3 hold, 1 does not, 1 is unclear"),
    ],
)
def test_the_claims_are_counted_in_words(verdicts, words) -> None:
    assert (
        claims.count_verdicts([claims.ClaimVerdict("", verdict, "", "") for verdict in verdicts])
        == words
    )


@pytest.mark.parametrize(
    "here, words",
    [
        (0.013, "does matter to less of the vocabulary"),
        (0.0001, "matters to no less of the vocabulary"),
    ],
)
def test_a_latent_that_is_less_sparse_than_a_channel_is_explained_by_its_parts(
    make_run, here, words
):
    changes = {
        "difference": estimate(-0.02, 0.001),
        "difference_here": estimate(here, 0.001),
        "later": estimate(0.16),
        "channel_later": estimate(0.14),
    }
    verdicts = judge(changed(make_run(), "ablation", changes))[-1]
    assert verdicts.verdict == "does not hold"
    assert (
        words in verdicts.meaning
        and "16 % of a latent’s squared effect falls on later predictions, 14 % of a channel’s"
        in verdicts.meaning
    )
