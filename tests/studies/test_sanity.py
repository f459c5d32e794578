"""The study sanity: controls that differ in one thing, errors that count seeds, and sentences that follow from them."""

import dataclasses
import math

import pytest
import torch

import ksparse
from ksparse import cli, report, studies
from ksparse.config import to_dict
from ksparse.config.evaluation import SANITY_CONTROLS, StudyConfig
from ksparse.errors import InputError
from ksparse.report import studies as pages
from ksparse.storage import jsonio
from ksparse.studies import sanity
from ksparse.studies.sanity import controls, latents, measure, questions
from ksparse.studies.sanity.measure import Measure, MeasureComparison, SanityEvidence
from ksparse.studies.study import Study
from ksparse.training.train import train
from ksparse.viewer.resources import Resources


@pytest.fixture
def run(small_recipe, tmp_path):
    """Return a small finished run."""
    return train(small_recipe({"tokens": 256, "run.save_every": 2, "seed": 5}), tmp_path / "run")


@pytest.fixture
def asked(run):
    """Return asked(*controls, **changes): the options of the study."""
    return lambda *names, **changes: StudyConfig(
        **{"run": str(run.path), "controls": names, "eval_tokens": 150, "probe_rows": 100}
        | {"threads": 1, "device": "cpu"}
        | changes
    )


@pytest.fixture
def only_quality(monkeypatch):
    monkeypatch.setattr(sanity, "STAGES", (measure.measure_quality,))


def differing(one, other):
    """Return the keys in which two recipes differ, but for those that change no result."""
    flat = [
        {
            f"{section}.{key}": value
            for section, table in to_dict(recipe).items()
            if isinstance(table, dict)
            for key, value in table.items()
            if section not in ("run", "mesh")
        }
        | {"seed": recipe.seed, "tokens": recipe.tokens, "order": recipe.data_seed}
        for recipe in (one, other)
    ]
    return {key for key in flat[0] | flat[1] if flat[0].get(key) != flat[1].get(key)}


def test_each_control_differs_from_the_run_in_one_thing(run, asked):
    subject = controls.asked_run(Study("sanity", asked("all")))
    found = {
        member: differing(run.recipe(), recipe)
        for cohort in controls.cohorts(subject)
        for member, recipe in cohort.members.items()
    }
    assert found == {
        "seed1": {"seed"},
        "seed2": {"seed"},
        "frozen_decoder": {"sae.freeze"},
        "held_decoder": {"sae.decoder_cosine_min"},
        "frozen_encoder": {"sae.freeze"},
        "k1": {"sae.k"},
        "k2": {"sae.k"},
        "k8": {"sae.k"},
        "k16": {"sae.k"},
        "n16": {"sae.n_latents"},
        "n32": {"sae.n_latents"},
        "redrawn": {"acts.lm_weights"},
        "redrawn_keep_embedding": {"acts.lm_weights"},
        "shuffled": {"acts.shuffle_tokens"},
    }
    assert [cohort.own for cohort in controls.cohorts(subject)] == [True, False, False, False]


def test_where_no_control_is_named_the_quick_ones_are_trained(asked):
    subject = controls.asked_run(Study("sanity", asked()))
    assert subject.controls == tuple(name for name, quick in SANITY_CONTROLS.items() if quick)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"run": ""}, "asks about a run"),
        (
            {"tokens": 99, "n_latents": 8},
            "--tokens, --n-latents would train the controls otherwise",
        ),
        ({"controls": ("frozen-decoder",)}, "no control 'frozen-decoder'"),
    ],
)
def test_what_cannot_be_asked_is_named(asked, changes, says):
    with pytest.raises(InputError, match=says):
        controls.asked_run(Study("sanity", dataclasses.replace(asked(), **changes)))


def test_too_few_rows_for_the_probes_are_refused_before_a_control_is_trained(asked, monkeypatch):
    monkeypatch.setattr(controls, "train", lambda *members: pytest.fail("trained"))
    options = dataclasses.replace(asked(), suite="", probe_rows=60)
    with pytest.raises(InputError, match="probe_rows is 60"):
        sanity.run(Study("sanity", options))


def test_an_unfinished_run_has_no_controls(small_recipe, tmp_path, asked):
    def stop(row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), tmp_path / "half", observe=stop)
    with pytest.raises(InputError, match=r"is at step 4 of 12; .* ksparse resume"):
        controls.asked_run(Study("sanity", asked(run=str(tmp_path / "half"))))


def test_a_run_that_began_from_another_has_no_seeds_of_its_own(small_recipe, tmp_path, asked):
    train(small_recipe({"tokens": 64}), tmp_path / "first")
    changes = {"tokens": 64, "sae.start": str(tmp_path / "first")}
    train(small_recipe(changes), tmp_path / "second")
    with pytest.raises(InputError, match="ask about the run that it began from"):
        controls.asked_run(Study("sanity", asked(run=str(tmp_path / "second"))))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_answers_and_what_is_there_is_not_done_again(run, asked, monkeypatch):
    path = studies.run("sanity", asked("seeds", "frozen_decoder", "redrawn"))
    assert path == run.path / "sanity"
    study = jsonio.read_json(path / "study.json")
    answers = {one["name"]: one for one in study["questions"]}
    table = {row[0]: row for row in answers["frozen-decoder"]["table"]["rows"]}
    assert set(table) == {one.words for one in measure.MEASURES}
    elsewhere = {row[0] for row in answers["redrawn"]["table"]["rows"]}
    assert set(table) - elsewhere == {"delta CE"}
    assert (
        "of 7 measures this SAE cannot be told from a frozen decoder"
        in (answers["frozen-decoder"]["answer"])
    )
    frozen = ksparse.load(path / "runs" / "frozen_decoder")
    start = torch.randn(frozen.W_dec.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(frozen.W_dec, torch.nn.functional.normalize(start, dim=1))
    page = pages.write(path).read_text()
    assert "Is it better than a frozen decoder?" in page
    assert study["command"].startswith(f"ksparse sanity {run.path} ")
    assert " --controls seeds frozen_decoder redrawn" in study["command"]
    assert {"stability", "tokens", "norms", "alignment", "absorption"} <= set(answers)
    stability = run.eval("stability")
    assert set(stability["of"]) == {"run", "seed1", "seed2"} and stability["seeds"][0] == "seed1"
    assert Resources(run, 16).columns.values("found_in").shape == (64,)
    assert "Better than an artefact?" in report.write(run).read_text()
    assert [one["answer"] for one in run.eval("sanity")["questions"]] == [
        one["answer"] for one in study["questions"]
    ]

    def never(*args, **keywords):
        raise AssertionError("something was done again")

    monkeypatch.setattr(measure.runner, "evaluate_many", never)
    again = jsonio.read_json(
        studies.run("sanity", asked("seeds", "frozen_decoder", "redrawn")) / "study.json"
    )
    assert again["questions"] == study["questions"]


def test_differences_of_members_of_a_stream_are_paired_by_document(asked, only_quality):
    study = Study("sanity", asked("frozen_decoder"))
    evidence = SanityEvidence(study, controls.asked_run(study))
    cohort = controls.cohorts(evidence.subject)[0]
    controls.train(study, evidence.subject, cohort)
    measure.measure_quality(evidence, cohort)
    (nmse,) = [one for one in evidence.compare("frozen_decoder") if one.measure.name == "nmse"]
    saes = {
        name: ksparse.load(controls.folder(study, evidence.subject, name).path)
        for name in ("run", "frozen_decoder")
    }
    results = measure.runner.evaluate_many(saes, None, ("stats",), measure.eval_options(study))
    paired = results["run"]["stats"]["nmse"] - results["frozen_decoder"]["stats"]["nmse"]
    assert nmse.difference["value"] == pytest.approx(paired["value"], rel=1e-12)
    assert nmse.difference["se"] == pytest.approx(paired["se"], rel=1e-12)


def test_a_control_that_is_added_is_measured_beside_the_run_alone(asked, only_quality, monkeypatch):
    first = jsonio.read_json(studies.run("sanity", asked("frozen_decoder")) / "study.json")
    read = []
    evaluate = measure.runner.evaluate_many

    def noted(saes, *rest):
        read.append(list(saes))
        return evaluate(saes, *rest)

    monkeypatch.setattr(measure.runner, "evaluate_many", noted)
    both = asked("frozen_decoder", "frozen_encoder")
    second = jsonio.read_json(studies.run("sanity", both) / "study.json")
    assert read == [["run", "frozen_encoder"]]
    answers = [
        {one["name"]: one["table"] for one in study["questions"]} for study in (first, second)
    ]
    assert answers[0]["frozen-decoder"] == answers[1]["frozen-decoder"]
    assert "frozen-encoder" in answers[1]


def test_differences_to_another_sae_of_the_run_are_not_kept(asked, only_quality, monkeypatch):
    studies.run("sanity", asked("frozen_decoder"))
    study = Study("sanity", asked("frozen_decoder"))
    evidence = SanityEvidence(study, controls.asked_run(study))
    read = evidence._read_kept, ("frozen_decoder", ("stats",), measure.eval_options(study))
    assert read[0](*read[1]) is not None
    checksum = SanityEvidence.checksum
    monkeypatch.setattr(
        SanityEvidence, "checksum", lambda self, m: "other" if m == "run" else checksum(self, m)
    )
    assert read[0](*read[1]) is None


def evidence_of(values, pairs, se=0.0):
    """Return evidence of a run, two seeds and a control with these values of one measure."""
    evidence = object.__new__(SanityEvidence)
    names = ["run", "seed1", "seed2", "control"]
    evidence.subject = controls.AskedRun(None, None, ("seeds",))
    evidence.results = {
        name: {"stats": {"nmse": {"value": value, "se": se}}} for name, value in zip(names, values)
    }
    evidence.paired = {
        name: {"nmse": {"value": values[0] - value, "se": pairs}}
        for name, value in zip(names[1:], values[1:])
    }
    return evidence


def test_the_sweeps_say_which_k_is_best_and_what_splits(run, asked, monkeypatch):
    stages = (measure.measure_quality, latents.measure_projection, latents.measure_splitting)
    monkeypatch.setattr(sanity, "STAGES", stages)
    study = jsonio.read_json(studies.run("sanity", asked("sweep_k", "sweep_n")) / "study.json")
    answers = {one["name"]: one for one in study["questions"]}
    assert [row[0] for row in answers["wrong-k"]["table"]["rows"]] == ["1", "2", "4", "8", "16"]
    assert "k is 4: " in answers["wrong-k"]["answer"]
    assert [row[:2] for row in answers["splitting"]["table"]["rows"]] == [
        ["16", "32"],
        ["32", "64"],
    ]
    assert answers["splitting"]["answer"].startswith("From n = 32 to 64 ")


@pytest.mark.parametrize(
    "best, inside, alike, says",
    [
        (
            12.0,
            True,
            [8, 16],
            "at k = 12; within its error also at 8, 16; k is 8: it does not tell",
        ),
        (20.0, True, [16], "at k = 20; k is 8: by it this SAE's k is too low."),
        (
            4.0,
            False,
            [4],
            "at the smallest k tried, 4: the best may be lower; k is 8: by it this SAE's",
        ),
    ],
)
def test_k_is_judged_by_where_the_proxy_is_smallest(best, inside, alike, says):
    assert says in latents._judge_k(8, [4, 8, 16, 32], best, inside, alike)


def test_an_activation_without_k_has_no_sweep_of_it(small_recipe, tmp_path, asked):
    run = train(small_recipe({"tokens": 64, "sae.activation": {"kind": "relu"}}), tmp_path / "relu")
    options = asked("sweep_k", run=str(run.path))
    assert controls.asked_run(Study("sanity", options)).by_k == {}


NMSE = Measure("nmse", "stats", "nmse", "normalised MSE")


def test_the_error_of_a_difference_counts_documents_once_and_seeds_twice():
    evidence = evidence_of([1.0, 1.1, 0.9, 2.0], pairs=0.02)
    noise = 0.02**2 / 2
    assert evidence.seed_variance(NMSE) == pytest.approx(0.01 - noise)
    found = evidence._compare("control", NMSE)
    assert found.difference["se"] == pytest.approx(math.sqrt(0.02**2 + 2 * (0.01 - noise)))
    assert found.detectable == pytest.approx(2.8 * found.difference["se"])
    assert found.verdict == "better"


def test_seeds_that_differ_by_less_than_the_noise_add_nothing():
    evidence = evidence_of([1.0, 1.001, 0.999, 2.0], pairs=0.1)
    assert evidence.seed_variance(NMSE) == 0.0


def test_seeds_can_make_a_difference_untold_that_documents_alone_would_tell():
    evidence = evidence_of([1.0, 1.5, 0.5, 1.3], pairs=0.01)
    assert evidence._compare("control", NMSE).verdict == "cannot be told"
    evidence.subject = controls.AskedRun(None, None, ())
    assert evidence._compare("control", NMSE).verdict == "better"


def compared(verdict, words):
    value = {"value": 0.0, "se": 1.0}
    return MeasureComparison(Measure(words, "", "", words), value, value, value, verdict)


@pytest.mark.parametrize(
    "verdicts, says",
    [
        (
            {"A": "cannot be told", "B": "better", "C": "worse", "D": "other"},
            "On 1 of 4 measures this SAE cannot be told from a frozen decoder (A); it is better by "
            "B; it is worse by C; it differs in D.",
        ),
        (
            {"A": "better", "B": "not measured"},
            "On 0 of 1 measures this SAE cannot be told from a frozen decoder; it is better by A.",
        ),
    ],
)
def test_the_sentence_counts_what_cannot_be_told(verdicts, says):
    found = [compared(verdict, words) for words, verdict in verdicts.items()]
    assert questions.summarize_comparisons(found, "a frozen decoder") == says


def test_the_verb_asks_about_the_run_it_names(run, only_quality, capsys):
    cli.main(
        ["sanity", str(run.path), "--controls", "frozen_encoder", "--eval-tokens", "150"]
        + ["--threads", "1", "--device", "cpu"]
    )
    said = capsys.readouterr().out
    assert "Is it better than a frozen encoder? On " in said
    assert (run.path / "sanity" / "report.html").is_file()
    with pytest.raises(SystemExit):
        cli.main(["sanity", str(run.path), "--run", "other"])
