"""What evaluations cost: the parts of the plan, and a measured peak."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from ksparse.config import ActsConfig
from ksparse.config.evaluation import EvalConfig
from ksparse.evals import registry
from ksparse.limits import LOGITS_BYTES
from ksparse.planning import evaluation
from ksparse.planning.costs import LMSpec
from ksparse.planning.evaluation import EvalCase

SMALL = LMSpec(64, 400_000, 100_000, 200_000, 1_000)
LARGE = dataclasses.replace(SMALL, vocabulary=262_144)


def case(subject=SMALL, **changes):
    values = {"acts": ActsConfig(context=64, lm_batch=8), "options": EvalConfig(tokens=1_000)}
    return EvalCase(subject, n_latents=256, k=8, **values | changes)


def test_the_default_evaluations_are_those_of_the_registry():
    assert evaluation.DEFAULT == tuple(registry.DEFAULT)


def test_logits_are_counted_as_they_are_and_never_above_their_budget():
    assert evaluation.memory(case())["logits"] == 4 * 3 * 512 * 1_000
    assert evaluation.memory(case(LARGE))["logits"] == 3 / 4 * LOGITS_BYTES


def test_memory_falls_with_the_batch_of_the_lm():
    wide, narrow = (case(options=EvalConfig(lm_batch=batch)) for batch in (64, 8))
    assert sum(evaluation.memory(narrow).values()) < sum(evaluation.memory(wide).values())
    assert evaluation.memory(narrow) == evaluation.memory(case())


def test_ablations_at_random_positions_are_counted_apart_from_those_of_single_latents():
    """One of the former takes 2 k runs, one of the latter a single one."""
    phases = evaluation.parts(["ablation"], case())
    options = EvalConfig().resolved()
    at_random = phases[f"ablation: {evaluation.ABLATING}"]
    at_strongest = phases[f"ablation: {evaluation.FILLING_TABLES}"]
    assert at_random.seconds / options.ablation_positions == pytest.approx(
        2 * 8 * at_strongest.seconds / 256
    )
    assert at_random.work / options.ablation_positions > 3 * at_strongest.work / 256


def test_direct_logits_take_work_for_each_latent_and_token_of_the_vocabulary():
    large = evaluation.parts(["stats"], case(LARGE))["stats: direct logits"]
    by_hand = 2 * 64 * 262_144 * (256 + 64) + evaluation.LOGIT * 256 * 262_144
    assert large.work == by_hand and large.seconds == 0
    assert evaluation.seconds("stats", case(LARGE), 1e9) > by_hand / 1e9


def test_suffixes_that_latents_share_are_counted_once():
    few, many = (
        evaluation._n2g_reading(examples, positions=500, context=64)[evaluation.FINDING_SUFFIXES]
        for examples in (500, 32_000)
    )
    assert few[0] == pytest.approx(500 / (1 - evaluation.LONGER), rel=1e-3)
    assert few[0] < many[0] <= 500 * 64  # no more than each suffix of each position


def test_each_loss_that_progressive_and_refinement_measure_is_counted():
    from ksparse.evals import progressive

    assert evaluation.PROGRESSIVE == 2 * len(progressive.MULTIPLES) + 1
    options = EvalConfig(tokens=1_000, progressive_tokens=500, refine_tokens=1_000)

    def work(*names):
        part = evaluation.parts(names, case(LARGE, options=options))[
            f"pass 1: {evaluation.READING}"
        ]
        return part.work

    large = case(LARGE, options=options)
    passes = (evaluation.PROGRESSIVE * 0.5 + 1) * 1_000
    more = work("downstream", "progressive", "refinement") - work("downstream")
    assert more == pytest.approx(passes * (large.after + large.head))
    assert work("progressive") > work("stats")


def test_what_each_sae_needs_is_reported_in_a_round_of_its_own():
    for part, expected in evaluation.parts(list(registry.DEFAULT), case(saes=3)).items():
        shared = ("pass", "reading Python", "labelling", "counting")
        assert expected.rounds == (1 if any(word in part for word in shared) else 3), part


def test_work_grows_with_what_is_asked():
    def work(name, **options):
        return evaluation.seconds(name, case(options=EvalConfig(tokens=1_000, **options)), 1e9)

    assert work("downstream") > work("stats")
    assert work("ablation", ablation_positions=128) > work("ablation")
    assert work("n2g", latents=100) < work("n2g", latents=200)
    assert work("probes", probe_rows=2_000) > 1.5 * work("probes")


@pytest.mark.parametrize("names", [["stats"], ["probes"], list(registry.DEFAULT)])
def test_what_is_expected_is_what_is_reported(names, tiny_lm, text_file, monkeypatch):
    """Every phase that the plan expects is reported under that name, so that it can end."""
    from ksparse import progress
    from ksparse.evals import runner
    from ksparse.evals.probing import tasks
    from ksparse.lm.model import LM
    from ksparse.sae.model import SAE, Shape

    monkeypatch.setattr(tasks, "_TOKENS_PER_ROW", 100)
    acts = ActsConfig(
        lm=str(tiny_lm("gpt2")), site="resid_post.1", text=str(text_file), context=16, lm_batch=8
    )
    lm = LM(acts=acts)
    sae = SAE(
        Shape(lm.d_model, 32, 4, "unit_norm", 1.0, "topk"), {"acts": dataclasses.asdict(acts)}
    )
    expected, reported, ended, left = set(), {}, {}, []

    class Watch(progress.Observer):
        forecast = progress.Forecast()

        def expect(self, parts):
            expected.update(parts)
            self.forecast.expect(parts)

        def report(self, what, done, total, stage=progress.Stage()):
            reported.setdefault(stage.key(what), done)
            ended[stage.key(what)] = (done, total)
            self.forecast.report(stage.key(what), done, total)

        def finish(self, stage):
            self.forecast.finish(f"{stage.name}: ")
            left.append(self.forecast.seconds_left())

    options = EvalConfig(
        tokens=200,
        per_document=64,
        latents=8,
        probe_rows=80,
        ngram_tokens=200,
        device="cpu",
        ablation_positions=4,
        ablation_latents=4,
        ablation_horizon=4,
    )
    runner.evaluate(sae, lm, names, options, observe=Watch())
    explained = {part for part in expected if part.startswith("n2g: ")}
    assert expected - explained <= set(reported), "n2g may find no latent with enough examples"
    assert set(reported.values()) == {0}, "a phase is reported when it begins"
    for part in expected & {"pass 1: reading the mean activation"}:
        assert ended[part] == (2, 2), "200 tokens in batches of 8 contexts of 16"
    assert left[-1] == 0.0


MEASURE = """
import dataclasses, json, resource, sys
from ksparse.config import ActsConfig
from ksparse.config.evaluation import EvalConfig
from ksparse.evals import runner
from ksparse.lm.model import LM
from ksparse.planning import evaluation
from ksparse.planning.plan import lm_spec
from ksparse.sae.model import SAE, Shape

acts = ActsConfig(**json.loads(sys.argv[1]))
lm = LM(acts=acts)
sae = SAE(Shape(lm.d_model, 2048, 32, "unit_norm", 1.0, "topk"), {"acts": dataclasses.asdict(acts)})
sae.W_enc.data.normal_(), sae.W_dec.data.normal_()
runner.evaluate(sae, lm, ["downstream"], EvalConfig(tokens=4 * acts.context * acts.lm_batch))
spec = lm_spec(lm.model, lm.module, lm.at, lm.d_model)
planned = evaluation.memory(evaluation.EvalCase(spec, acts, EvalConfig(), 2048, 32))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"planned": sum(planned.values()), "peak": peak}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize(("context", "lm_batch"), [(64, 8), (64, 64), (256, 8)])
def test_the_planned_memory_of_downstream_is_what_it_takes(context, lm_batch):
    acts = {"lm": "pylm/0.3m", "site": "resid_post.1", "context": context, "lm_batch": lm_batch}
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(acts)],
        check=True,
        capture_output=True,
        text=True,
    )
    numbers = json.loads(answer.stdout)
    assert numbers["planned"] == pytest.approx(numbers["peak"], rel=0.25)


def test_the_plan_shows_memory_and_time_of_evaluations(capsys, tmp_path):
    from ksparse import cli

    file = tmp_path / "plan.json"
    flags = ["--acts.lm", "pylm/0.3m", "--acts.site", "resid_post.1", "--json", str(file)]
    cli.main(["plan", *flags])
    shown = capsys.readouterr().out
    assert re.search(r"^evaluation +\d.* for downstream: ", shown, re.M)
    assert re.search(r"^ +roughly .* for all: downstream ", shown, re.M)
    planned = json.loads(file.read_text())["evaluation"]
    assert set(planned["seconds"]) == set(registry.DEFAULT)
    assert planned["memory"]["LM"] > 0 and planned["memory"]["logits"] > 0
