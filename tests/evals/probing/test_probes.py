"""Probe loss is that of the best latent on rows it was not chosen on, whatever is probed and wherever."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import re

import numpy as np
import pytest
import torch

from ksparse.config.evaluation import EvalConfig
from ksparse.errors import InputError
from ksparse.evals import runner
from ksparse.evals.base import EvalContext
from ksparse.evals.batches import HeldOut, acts_of
from ksparse.evals.probing import logistic, probes, tasks
from ksparse.evals.probing.tasks import TaskRows
from ksparse.evals.statistics import Clustered
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Shape

OPTIONS = EvalConfig(device="cpu", probe_rows=200, probe_l2=1e-6)


def make_sae(acts, d, n=24, k=4, **shape) -> SAE:
    sae = SAE(Shape(d, n, k, **shape), {"acts": dataclasses.asdict(acts)})
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(d)
    return sae


def write_suite(folder, **found) -> str:
    folder.mkdir(exist_ok=True)
    for name, rows in found.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as stream:
            stream.writelines(
                json.dumps({"text": text, "label": label}) + "\n" for text, label in rows
            )
    return str(folder)


def words(number: int, last: str) -> str:
    return (
        " ".join(
            f"{word}"
            for word in np.random.default_rng(number).choice("cat dog sun hat mat".split(), 4)
        )
        + f" {number}{last}"
    )


@pytest.fixture
def suite(tmp_path):
    """Two tasks: what the last token is; nothing."""
    return write_suite(
        tmp_path / "suite",
        ends=[(words(i, " cat" if i % 2 else " black"), i % 2) for i in range(160)],
        coin=[(words(i, " on"), int(np.random.default_rng(i).random() < 0.5)) for i in range(160)],
    )


@pytest.fixture
def subject(small_acts):
    acts = small_acts(lm_batch=16)
    return acts, LM(acts=acts)


def rows_of(sae, lm, options):
    options = options.resolved()
    subject_ = EvalContext(sae, HeldOut(lm, acts_of(sae, lm, options), options))
    with torch.inference_mode():
        found = tasks.read(lm, subject_.data.acts, options, lambda what, done, total: None)
        return {name: found.rows(name) for name in found.names}


def test_the_best_latent_is_chosen_in_training_and_judged_on_the_other_half(subject, suite):
    acts, lm = subject
    sae, options = make_sae(acts, lm.d_model), dataclasses.replace(OPTIONS, suite=suite)
    result = runner.evaluate(sae, lm, ["probes"], options)["probes"]
    for name, rows in rows_of(sae, lm, options).items():
        train, test = (rows.train == side for side in (True, False))
        z = sae.pre_acts_normalized(sae.normalize(rows.x).x).detach()
        fit = logistic.fit(z[train].T, rows.label[train], l2=1e-6)
        best = int(fit.loss.argmin())
        loss = logistic.cross_entropy(
            z[test, best].double() * fit.weight[best] + fit.bias[best], rows.label[test].double()
        ).mean()
        found = result["tasks"][name]
        assert found["latent"] == best
        assert found["loss"]["value"] == pytest.approx(loss.item(), rel=1e-4)
        assert found["loss_in_sample"]["value"] == pytest.approx(fit.loss[best].item(), rel=1e-4)
        assert [entry["latent"] for entry in found["best_latents"]] == fit.loss.argsort()[
            :10
        ].tolist()


def test_texts_that_are_cut_are_counted(subject, suite):
    acts, lm = subject
    sae = make_sae(acts, lm.d_model)
    result = runner.evaluate(
        sae, lm, "probes", dataclasses.replace(OPTIONS, suite=suite, probe_tokens=5)
    )["probes"]
    assert any(
        re.fullmatch(
            r"\d+ of \d+ texts are longer than 5 tokens and lose their beginning: [\d,]+ tokens were not seen",
            note,
        )
        for note in result["notes"]
    )
    result = runner.evaluate(sae, lm, "probes", dataclasses.replace(OPTIONS, suite=suite))["probes"]
    assert not any("lose" in note for note in result["notes"])


def test_the_means_are_over_tasks(subject, suite):
    acts, lm = subject
    result = runner.evaluate(
        make_sae(acts, lm.d_model), lm, ["probes"], dataclasses.replace(OPTIONS, suite=suite)
    )["probes"]
    for total, own in (
        ("probe_loss", "loss"),
        ("probe_loss_in_sample", "loss_in_sample"),
        ("channel_loss", "channel_loss"),
        ("random_sae_loss", "random_sae_loss"),
        ("dense_probe_loss", "dense_probe_loss"),
        ("prior_loss", "prior_loss"),
    ):
        assert result[total]["value"] == pytest.approx(
            np.mean([task[own]["value"] for task in result["tasks"].values()])
        )
    assert result["gain_over_channels"]["value"] == pytest.approx(
        result["channel_loss"]["value"] - result["probe_loss"]["value"]
    )
    assert result["gain_over_random_sae"]["value"] == pytest.approx(
        result["random_sae_loss"]["value"] - result["probe_loss"]["value"]
    )
    assert result["suite"] == "suite" and result["n_tasks"] == 2


def test_a_planted_binary_latent_has_the_analytic_loss(subject, suite, monkeypatch):
    """One latent is 1 on 90 % of the rows of label 1 and on 20 % of the others; the rest is noise."""
    acts, lm = subject
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(4000) % 2
    x = torch.randn(4000, lm.d_model, generator=generator) * 0.01
    x[:, 3] = (torch.rand(4000, generator=generator) < torch.where(label == 1, 0.9, 0.2)).float()
    planted = TaskRows(
        "planted", x, torch.arange(4000), label, torch.arange(4000), torch.arange(4000) % 4 < 2
    )
    monkeypatch.setattr(
        tasks,
        "read",
        lambda *rest: tasks.ProbeTasks("planted", ("planted",), lambda name: planted, {}),
    )
    sae = SAE(
        Shape(lm.d_model, lm.d_model, 1, normalize="none"), {"acts": dataclasses.asdict(acts)}
    )
    sae.W_enc.data = torch.eye(lm.d_model)
    result = runner.evaluate(sae, lm, ["probes"], OPTIONS)["probes"]
    fires = 0.5 * (0.9 + 0.2)
    entropy = lambda p: -(p * math.log(p) + (1 - p) * math.log(1 - p))
    expected = fires * entropy(0.45 / fires) + (1 - fires) * entropy(0.05 / (1 - fires))
    assert result["tasks"]["planted"]["latent"] == 3
    for name in ("probe_loss", "channel_loss"):  # the latents are the channels here
        assert result[name]["value"] == pytest.approx(expected, abs=3 * result[name]["se"])
    assert result["gain_over_channels"] == {"value": 0, "se": 0}
    assert result["gain_over_random_sae"]["value"] > 2 * result["gain_over_random_sae"]["se"]
    assert result["prior_loss"]["value"] == pytest.approx(math.log(2), abs=1e-6)


def test_many_random_latents_look_good_only_in_sample(subject, monkeypatch):
    """The smallest of n losses on the rows of the fit falls with n although there is nothing to know."""
    acts, lm = subject
    generator = torch.Generator().manual_seed(1)
    x, label = torch.randn(200, lm.d_model, generator=generator), torch.arange(200) % 2
    noise = TaskRows(
        "noise", x, torch.arange(200), label, torch.arange(200), torch.arange(200) % 4 < 2
    )
    monkeypatch.setattr(
        tasks, "read", lambda *rest: tasks.ProbeTasks("noise", ("noise",), lambda name: noise, {})
    )
    few, many = (
        runner.evaluate(make_sae(acts, lm.d_model, n=n), lm, ["probes"], OPTIONS)["probes"]
        for n in (4, 3000)
    )
    assert many["probe_loss_in_sample"]["value"] < few["probe_loss_in_sample"]["value"] - 0.01
    assert many["probe_loss"]["value"] > math.log(2) - 2 * many["probe_loss"]["se"]


@pytest.mark.parametrize("position", ["last", "mean", "max"])
@pytest.mark.parametrize("on", ["pre_acts", "acts"])
def test_every_position_and_value_is_its_definition(subject, suite, position, on):
    acts, lm = subject
    sae, options = (
        make_sae(acts, lm.d_model),
        dataclasses.replace(OPTIONS, suite=suite, position=position, probe_on=on),
    )
    result = runner.evaluate(sae, lm, ["probes"], options)["probes"]
    texts = sorted(json.loads(line)["text"] for line in gzip.open(f"{suite}/ends.jsonl.gz", "rt"))
    label = {
        json.loads(line)["text"]: json.loads(line)["label"]
        for line in gzip.open(f"{suite}/ends.jsonl.gz", "rt")
    }
    rows = rows_of(sae, lm, options)["ends"]
    by_key = {tasks._key(text): text for text in texts}
    z, y = [], []
    for cluster in rows.cluster.tolist():
        x = sae.normalize(lm(by_key[cluster])).x  # one text by itself, without padding
        values = (
            sae.pre_acts_normalized(x).detach()
            if on == "pre_acts"
            else sae.encode_normalized(x).dense(24).detach()
        )
        z.append({"last": values[-1], "mean": values.mean(0), "max": values.amax(0)}[position])
        y.append(label[by_key[cluster]])
    z, y = torch.stack(z), torch.tensor(y)
    assert y.tolist() == rows.label.tolist()
    fit = logistic.fit(z[rows.train].T, y[rows.train], l2=1e-6)
    # A few rows may tie in float32; the loss of the best is what is reported.
    assert result["tasks"]["ends"]["loss_in_sample"]["value"] == pytest.approx(
        fit.loss.min().item(), abs=2e-4
    )
    assert result["options"]["position"] == position and result["options"]["probe_on"] == on


def test_latents_in_slices_are_all_of_them(subject, suite, monkeypatch):
    acts, lm = subject
    options = dataclasses.replace(OPTIONS, suite=suite)
    whole = runner.evaluate(make_sae(acts, lm.d_model, n=50), lm, ["probes"], options)["probes"]
    monkeypatch.setattr(probes, "_SLICE", 7)
    parts = runner.evaluate(make_sae(acts, lm.d_model, n=50), lm, ["probes"], options)["probes"]
    assert parts["tasks"]["ends"]["latent"] == whole["tasks"]["ends"]["latent"]
    assert parts["probe_loss"]["value"] == pytest.approx(whole["probe_loss"]["value"], rel=1e-5)
    torch.testing.assert_close(parts.arrays["best_gain"], whole.arrays["best_gain"])


def test_each_latent_has_its_best_task(subject, suite):
    acts, lm = subject
    sae, options = make_sae(acts, lm.d_model), dataclasses.replace(OPTIONS, suite=suite)
    result = runner.evaluate(sae, lm, ["probes"], options)["probes"]
    gains = []
    for rows in rows_of(sae, lm, options).values():
        train = rows.half(True)
        fit = logistic.fit(
            sae.pre_acts_normalized(sae.normalize(train.x).x).detach().T, train.label, l2=1e-6
        )
        gains.append(
            logistic.cross_entropy(
                torch.tensor(logistic.log_odds(train.label)), train.label.double()
            ).mean()
            - fit.loss
        )
    best = torch.stack(gains).max(0)
    assert result.arrays["best_task"].tolist() == best.indices.tolist()
    torch.testing.assert_close(
        result.arrays["best_gain"].double(), best.values, rtol=1e-4, atol=1e-6
    )


def test_a_random_autoencoder_has_the_shape_and_the_bias_and_rows_of_norm_1(subject):
    acts, lm = subject
    sae = make_sae(acts, lm.d_model)
    made = probes.random_sae(sae, 0)
    assert made.shape == sae.shape and torch.equal(made.b_pre, sae.b_pre)
    torch.testing.assert_close(made.W_enc.norm(dim=1), torch.ones(24))
    assert torch.equal(made.W_enc, probes.random_sae(sae, 0).W_enc) and not torch.equal(
        made.W_enc, probes.random_sae(sae, 1).W_enc
    )


# ---- rows


def test_a_text_is_on_one_side_however_often_it_occurs(subject, tmp_path):
    acts, lm = subject
    twice = [(words(i % 40, " on"), i % 2) for i in range(160)]
    rows = rows_of(
        make_sae(acts, lm.d_model),
        lm,
        dataclasses.replace(OPTIONS, suite=write_suite(tmp_path / "s", twice=twice)),
    )["twice"]
    sides = {}
    for cluster, train in zip(rows.cluster.tolist(), rows.train.tolist()):
        assert sides.setdefault(cluster, train) == train
    assert len(sides) == 40 and 0.3 < rows.train.double().mean() < 0.7


def test_rows_are_cut_to_the_number_asked_for_and_keep_their_balance(subject, tmp_path):
    acts, lm = subject
    suite = write_suite(
        tmp_path / "s", uneven=[(words(i, " on"), int(i % 4 == 0)) for i in range(400)]
    )
    rows = rows_of(
        make_sae(acts, lm.d_model), lm, dataclasses.replace(OPTIONS, suite=suite, probe_rows=200)
    )["uneven"]
    assert len(rows.label) == 200 and rows.label.sum() == 50
    assert rows.label[rows.train].sum() == 25


def test_long_texts_keep_their_end(subject, tmp_path):
    acts, lm = subject
    long = [("hat " * 200 + words(i, " cat" if i % 2 else " on"), i % 2) for i in range(60)]
    sae = make_sae(acts, lm.d_model)
    rows = rows_of(
        sae,
        lm,
        dataclasses.replace(OPTIONS, suite=write_suite(tmp_path / "s", long=long), probe_tokens=8),
    )["long"]
    text = {tasks._key(text): text for text, _ in long}[rows.cluster[0].item()]
    ids = [lm.tokenizer.bos_token_id] + lm.tokenizer(text, add_special_tokens=False)["input_ids"][
        -7:
    ]
    expected = lm.acts(torch.tensor([ids]), torch.ones(1, 8, dtype=torch.bool))[0, -1]
    torch.testing.assert_close(rows.x[0], expected, rtol=1e-4, atol=1e-5)


def test_python_tasks_have_balanced_rows_of_held_out_files(subject):
    """Each row is the activation of a labelled token in a context of its own file."""
    from ksparse import pylm
    from ksparse.evals.probing.python_labels import TASKS, labels

    acts, lm = subject
    found = rows_of(make_sae(acts, lm.d_model), lm, dataclasses.replace(OPTIONS, probe_rows=100))
    assert len(found) > 40
    for rows in found.values():
        for side in (True, False):
            mine = rows.label[rows.train == side]
            assert 2 * mine.sum() == len(mine) >= 2 * tasks.LEAST
        assert not set(rows.cluster[rows.train].tolist()) & set(rows.cluster[~rows.train].tolist())
    name, rows = next(iter(found.items()))
    column, number = [task.name for task in TASKS].index(name), int(rows.cluster[0])
    source = [text for _, text in pylm.documents("held-out")][number]
    encoded = lm.tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)
    ids, own = (
        encoded["input_ids"][:2048],
        labels(source, encoded["offset_mapping"][:2048])[:, column],
    )
    room, best = acts.context - 1, math.inf
    for first in range(0, len(ids), room):
        batch = torch.tensor([[lm.tokenizer.bos_token_id, *ids[first : first + room]]])
        x = lm.acts(batch, torch.ones_like(batch, dtype=torch.bool))[0, 1:]
        distance = (x - rows.x[0]).abs().amax(1)
        distance[torch.from_numpy(own[first : first + room]) != rows.label[0]] = math.inf
        best = min(best, distance.min().item())
    assert best < 1e-4


def test_pooling_is_refused_for_tasks_on_tokens(subject):
    acts, lm = subject
    with pytest.raises(
        InputError, match="position 'mean' is for tasks on texts; the built-in tasks are on tokens"
    ):
        runner.evaluate(
            make_sae(acts, lm.d_model),
            lm,
            ["probes"],
            dataclasses.replace(OPTIONS, position="mean"),
        )


def test_too_few_rows_for_the_built_in_tasks_are_refused_before_anything_is_read(subject):
    acts, lm = subject
    seen = []
    with pytest.raises(InputError, match="probe_rows is 60; .* give at least 80, or texts with"):
        runner.evaluate(
            make_sae(acts, lm.d_model),
            lm,
            ["stats", "probes"],
            dataclasses.replace(OPTIONS, probe_rows=60),
            observe=lambda *work: seen.append(work),
        )
    assert not any("reading" in what for what, *_ in seen)


def test_a_task_with_too_few_rows_of_a_label_is_refused(subject, tmp_path):
    acts, lm = subject
    suite = write_suite(tmp_path / "s", few=[(words(i, " on"), int(i < 25)) for i in range(400)])
    with pytest.raises(
        InputError,
        match="task few: . rows with label 1 in its training half; at least 5 are needed",
    ):
        runner.evaluate(
            make_sae(acts, lm.d_model),
            lm,
            ["probes"],
            dataclasses.replace(OPTIONS, suite=suite, probe_rows=100),
        )


@pytest.mark.parametrize("rows", [40, 79])
def test_too_few_rows_for_the_built_in_tasks_are_refused(subject, rows):
    acts, lm = subject
    sae, options = make_sae(acts, lm.d_model), dataclasses.replace(OPTIONS, probe_rows=rows)
    with pytest.raises(InputError, match=f"probe_rows is {rows}; .* give at least 80, or texts"):
        runner.evaluate(sae, lm, ["probes"], options)


def test_built_in_tasks_that_all_lack_rows_are_refused(subject, monkeypatch):
    acts, lm = subject
    monkeypatch.setattr(tasks.pylm, "documents", lambda split: [("a.py", "x = 1\n" * 40)])
    with pytest.raises(
        InputError, match="no built-in task can be judged on .* tokens: only 0 rows"
    ):
        runner.evaluate(make_sae(acts, lm.d_model), lm, ["probes"], OPTIONS)


def test_a_suite_that_is_not_there_is_an_error(subject):
    acts, lm = subject
    with pytest.raises(InputError, match="nowhere"):
        runner.evaluate(
            make_sae(acts, lm.d_model),
            lm,
            ["probes"],
            dataclasses.replace(OPTIONS, suite="nowhere"),
        )


def test_a_whole_folder_of_real_tasks_runs(shared_data):
    """Issue 3: all 58 tasks, on another model than the built-in."""
    from ksparse.config import ActsConfig

    acts = ActsConfig(
        lm=str(shared_data / "models" / "stories260k"),
        site="resid_post.2",
        text=str(shared_data / "text" / "tinystories.txt.xz"),
    )
    lm = LM(acts=acts)
    options = dataclasses.replace(
        OPTIONS, suite=str(shared_data / "probes"), probe_rows=100, probe_l2=1e-3, probe_tokens=64
    )
    result = runner.evaluate(make_sae(acts, lm.d_model, n=100), lm, ["probes"], options)["probes"]
    files = {
        file.name.removesuffix(".jsonl.gz") for file in (shared_data / "probes").glob("*.jsonl.gz")
    }
    assert set(result["tasks"]) == files and result["n_tasks"] == len(files) >= 58
    assert all(
        0 < task[name]["value"] < math.inf
        for task in result["tasks"].values()
        for name in (
            "loss",
            "loss_in_sample",
            "channel_loss",
            "random_sae_loss",
            "dense_probe_loss",
            "prior_loss",
        )
    )


# ---- standard errors


def test_the_error_of_a_mean_over_tasks_counts_clusters_that_tasks_share():
    draw = np.random.default_rng(0)
    means = []
    for _ in range(400):
        documents = draw.normal(0, 1, 30)
        parts = [
            Clustered(
                torch.arange(30).repeat_interleave(4),
                torch.from_numpy(np.repeat(documents, 4) + draw.normal(0, 0.3, 120)),
            )
            for _ in range(3)
        ]
        means.append(Clustered.mean(parts))
    spread = np.std([mean["value"] for mean in means])
    assert np.mean([mean["se"] for mean in means]) == pytest.approx(spread, rel=0.15)


def test_a_single_cluster_has_no_error_and_nothing_no_mean():
    assert Clustered.mean([Clustered(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]))]) == {
        "value": 2.0,
        "se": None,
    }
    assert Clustered.mean([]) == {"value": None, "se": None}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"probe_l2": 0.0}, "probe_l2 of an evaluation is 0.0; it must be above 0"),
        ({"latents": -1}, "latents of an evaluation is -1; it must not be negative"),
        ({"position": "first"}, "'position' is 'first'; it must be one of 'last', 'mean', 'max'"),
        ({"budget": "huge"}, "'budget' is 'huge'; it must be one of 'small', 'paper'"),
        ({"ablation_horizon": 0}, "ablation_horizon of an evaluation is 0; it must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        EvalConfig(**change)


def test_a_budget_names_its_sizes_and_a_number_overrides_them():
    assert (
        EvalConfig().resolved().tokens == 100_000
        and EvalConfig(budget="paper").resolved().tokens == 10_000_000
    )
    assert EvalConfig(budget="paper", tokens=5).resolved().tokens == 5
    assert EvalConfig(seed=3).resolved().for_eval("n2g").keys() >= {
        "latents",
        "seed",
    } and "suite" not in EvalConfig().for_eval("n2g")
