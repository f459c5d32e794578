"""The numbers are what their definitions say, on text that training never saw."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ksparse.config.evaluation import EvalConfig
from ksparse.data.contexts import Corpus
from ksparse.data.documents import documents
from ksparse.errors import CorruptError, InputError, NonFiniteError
from ksparse.evals import downstream, registry, runner, stats
from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import HeldOut, HeldOutPass
from ksparse.evals.statistics import DocumentSums, Result, ratio, share
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Shape
from ksparse.sae.normalization import normalize
from ksparse.storage import jsonio
from ksparse.storage.run_folder import RunFolder

OPTIONS = EvalConfig(tokens=400, per_document=60, examples=3, device="cpu")


@pytest.fixture
def subject(small_acts):
    acts = small_acts(lm_batch=4)
    return acts, LM(acts=acts)


def kept(acts, lm, options=OPTIONS):
    """Return the held-out activations [m, d] and their documents, gathered the slow way."""
    corpus = Corpus(acts, lm.tokenizer, options.split, per_document=options.per_document)
    xs, owners = [], []
    for context in corpus.contexts():
        if context.start.epoch:
            break
        batch = corpus.batch([context])
        xs.append(lm.acts(batch.tokens, batch.attention)[batch.keep])
        owners.append(batch.documents[batch.keep])
    return torch.cat(xs), torch.cat(owners)


def make_sae(acts, d, *, n=64, k=4, seed=0, **shape) -> SAE:
    sae = SAE(Shape(d, n, k, **shape), {"acts": dataclasses.asdict(acts)})
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(d)
    return sae


def identity_sae(acts, d) -> SAE:
    """An SAE that reconstructs everything: one latent for each direction and sign."""
    sae = SAE(Shape(d, 2 * d, 2 * d), {"acts": dataclasses.asdict(acts)})
    eye = torch.eye(d)
    sae.W_enc.data = sae.W_dec.data = torch.cat([eye, -eye])
    return sae


# ---- estimates


def test_a_ratio_is_of_sums_not_a_mean_of_ratios():
    value = ratio(np.array([1.0, 9.0]), np.array([1.0, 99.0]))["value"]
    assert value == pytest.approx(10 / 100)


def test_the_standard_error_of_a_ratio_is_that_of_many_redrawn_samples():
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 40, 300)
    sums = np.array([draw.normal(2 + draw.normal(0, 0.5), 1, size).sum() for size in sizes])
    found = ratio(sums, sizes)
    resampled = [sums[i].sum() / sizes[i].sum() for i in draw.integers(0, 300, (2000, 300))]
    assert found["se"] == pytest.approx(np.std(resampled), rel=0.1)


def test_one_document_has_a_value_and_no_standard_error():
    assert ratio(np.array([3.0]), np.array([2.0])) == {"value": 1.5, "se": None}


def test_a_share_has_the_binomial_standard_error():
    assert share(1, 4) == {"value": 0.25, "se": pytest.approx(math.sqrt(0.25 * 0.75 / 4))}


def test_document_sums_do_not_depend_on_how_the_tokens_are_batched():
    owners, values = torch.tensor([5, 5, 9, 2, 5, 9]), torch.arange(6.0)
    whole, parts = DocumentSums(), DocumentSums()
    whole.add(owners, value=values)
    for i in range(6):
        parts.add(owners[i : i + 1], value=values[i : i + 1])
    assert sorted(whole["value"]) == sorted(parts["value"]) == [3.0, 5.0, 7.0]
    assert len(parts) == 3


def test_a_result_is_plain_values_alone():
    for value in (np.float64(1.0), np.int64(1), torch.tensor(1.0), {1, 2}, np.zeros(2)):
        with pytest.raises(
            TypeError, match=r"the result\['a'\]\[0\]\['se'\] is a \w+\.\w+, not a plain value"
        ):
            Result({"a": [{"se": value}]})
    assert [
        type(each)
        for each in (
            *ratio(np.array([1.0, 3.0]), np.array([2.0, 2.0])).values(),
            *share(1, 4).values(),
        )
    ] == [float] * 4


# ---- stats


def test_nmse_explained_variance_and_l0_are_their_definitions(subject):
    acts, lm = subject
    sae = make_sae(acts, lm.d_model)
    raw, _ = kept(acts, lm)
    inputs = normalize(raw, "unit_norm")
    pre = (
        inputs.x.double() @ sae.W_enc.T.double()
        - (sae.W_enc.double() @ sae.b_pre.double())
        + sae.b_enc.double()
    )
    cut = pre.topk(4).values[:, -1:]
    z = torch.where(pre >= cut, pre, 0).relu()
    recon = z @ sae.W_dec.double() + sae.b_pre.double()
    x, y = inputs.x.double(), raw.double()
    restored = recon * inputs.scale + inputs.mean
    result = runner.evaluate(sae, lm, ["stats"], dataclasses.replace(OPTIONS, tokens=10**6))[
        "stats"
    ]
    assert result["n_tokens"] == len(raw)
    assert result["nmse"]["value"] == pytest.approx(
        ((x - recon) ** 2).sum().item() / ((x - x.mean(0)) ** 2).sum().item(), rel=1e-5
    )
    assert result["explained_variance"]["value"] == pytest.approx(
        1 - ((y - restored) ** 2).sum().item() / ((y - y.mean(0)) ** 2).sum().item(), rel=1e-4
    )
    assert result["l0"]["value"] == pytest.approx((z > 0).sum(1).double().mean().item())
    assert result["dead_fraction"]["value"] == pytest.approx(
        ((z > 0).sum(0) == 0).double().mean().item()
    )
    assert torch.allclose(result.arrays["density"].double(), (z > 0).double().mean(0), atol=1e-7)


def test_predicting_the_mean_has_a_normalised_mse_of_one(subject):
    acts, lm = subject
    sae = SAE(Shape(lm.d_model, 8, 2), {"acts": dataclasses.asdict(acts)})
    sae.b_pre.data = normalize(kept(acts, lm)[0], "unit_norm").x.mean(0)
    result = runner.evaluate(sae, lm, ["stats"], dataclasses.replace(OPTIONS, tokens=10**6))[
        "stats"
    ]
    assert result["nmse"]["value"] == pytest.approx(1, abs=1e-5)
    assert result["l0"]["value"] == 0 and result["dead_fraction"]["value"] == 1


def test_explained_variance_does_not_forgive_a_constant_offset(subject):
    acts, lm = subject
    sae = identity_sae(acts, lm.d_model)
    exact = runner.evaluate(sae, lm, ["stats"], OPTIONS)["stats"]["explained_variance"]["value"]
    sae.W_dec.data = sae.W_dec.data.clone()
    sae.b_pre.data += 0.3  # taken off before the encoder, added after the decoder: no change
    same = runner.evaluate(sae, lm, ["stats"], OPTIONS)["stats"]["explained_variance"]["value"]
    sae.b_enc.data[: lm.d_model] += 0.3  # now every direction is reconstructed with an offset
    worse = runner.evaluate(sae, lm, ["stats"], OPTIONS)["stats"]["explained_variance"]["value"]
    assert exact == pytest.approx(1, abs=1e-6) and same == pytest.approx(1, abs=1e-5)
    assert worse < 0.99


def test_the_result_does_not_depend_on_the_size_of_batches(subject, small_acts):
    acts, lm = subject
    sae = make_sae(acts, lm.d_model)
    other = LM(acts=small_acts(lm_batch=9))
    one, two = (
        runner.evaluate(
            sae, each, ["stats", "downstream"], dataclasses.replace(OPTIONS, tokens=10**6)
        )
        for each in (lm, other)
    )
    for name, key in (
        ("stats", "nmse"),
        ("stats", "l0"),
        ("downstream", "ce_spliced"),
        ("downstream", "kl"),
    ):
        assert one[name][key]["value"] == pytest.approx(two[name][key]["value"], rel=1e-5), key


def test_examples_are_the_strongest_one_a_context_and_their_window_shows_the_value(subject):
    acts, lm = subject
    result = runner.evaluate(make_sae(acts, lm.d_model), lm, ["stats"], OPTIONS)["stats"]
    arrays = result.arrays
    assert result["window"]["before"] == stats.BEFORE
    for kind in ("top", "random"):
        context, value = arrays[f"{kind}_context"], arrays[f"{kind}_value"]
        there = context >= 0
        assert there.any()
        peak = arrays[f"{kind}_acts"][:, :, stats.BEFORE].float()
        assert torch.allclose(peak[there], value[there], rtol=2e-3)
        for row in context:
            assert len(set(row[row >= 0].tolist())) == int((row >= 0).sum())
    fires = arrays["density"] > 0
    assert torch.allclose(
        arrays["top_value"][fires, 0], arrays["max_act"][fires], rtol=1e-3
    )  # stored in half precision
    assert (arrays["top_value"][:, :-1] >= arrays["top_value"][:, 1:]).all()
    assert not torch.equal(arrays["top_context"], arrays["random_context"])


def test_windows_do_not_reach_into_another_context():
    values = torch.ones(2, 4, 1)
    indices = torch.zeros(2, 4, 1, dtype=torch.int32)
    window = stats.windows(values, indices, torch.tensor([[1]]), torch.tensor([[0]]))[0, 0]
    assert window.tolist() == [0.0] * stats.BEFORE + [1.0] * 4 + [0.0] * (stats.AFTER - 3)


# ---- downstream


def test_a_perfect_reconstruction_changes_nothing_downstream(subject):
    acts, lm = subject
    result = runner.evaluate(identity_sae(acts, lm.d_model), lm, ["downstream"], OPTIONS)[
        "downstream"
    ]
    assert result["ce_delta"]["value"] == pytest.approx(0, abs=1e-5)
    assert result["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert result["recovered"]["value"] == pytest.approx(1, abs=1e-3)


def test_an_sae_that_gives_the_mean_is_the_mean_ablation(subject):
    acts, lm = subject
    sae = SAE(Shape(lm.d_model, 8, 2, normalize="none"), {"acts": dataclasses.asdict(acts)})
    options = dataclasses.replace(OPTIONS, tokens=200)
    mean = runner.HeldOut(lm, acts, options).mean_activation()
    sae.b_pre.data = mean
    result = runner.evaluate(sae, lm, ["downstream"], options)["downstream"]
    assert result["ce_spliced"]["value"] == pytest.approx(result["ce_mean"]["value"], rel=1e-6)
    sae.b_pre.data = torch.zeros_like(mean)
    result = runner.evaluate(sae, lm, ["downstream"], options)["downstream"]
    assert result["ce_spliced"]["value"] == pytest.approx(result["ce_zero"]["value"], rel=1e-6)
    assert result["recovered"]["value"] == pytest.approx(0, abs=1e-6)


def test_all_runs_replace_and_measure_the_same_positions(subject):
    """Cross-entropy and KL computed with hooks by hand, BOS left alone in every run."""
    acts, lm = subject
    sae = make_sae(acts, lm.d_model)
    corpus = Corpus(acts, lm.tokenizer, "held-out", per_document=OPTIONS.per_document)
    losses = {"clean": [], "spliced": [], "zero": []}
    for context in corpus.contexts():
        if context.start.epoch:
            break
        batch = corpus.batch([context])
        for name in losses:

            def change(module, args, output, name=name):
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                at = batch.keep[0]
                if name == "spliced":
                    hidden[0, at] = sae(hidden[0, at])
                if name == "zero":
                    hidden[0, at] = 0
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = lm.model.transformer.h[1].register_forward_hook(change)
            with torch.no_grad():
                logits = lm.model(batch.tokens, use_cache=False).logits[0].log_softmax(-1)
            handle.remove()
            for t in range(len(logits) - 1):
                if batch.keep[0, t] and batch.keep[0, t + 1]:
                    losses[name].append(-logits[t, batch.tokens[0, t + 1]].item())
    result = runner.evaluate(sae, lm, ["downstream"], dataclasses.replace(OPTIONS, tokens=10**6))[
        "downstream"
    ]
    assert result["n_predictions"] == len(losses["clean"])
    for name, values in losses.items():
        assert result[f"ce_{name}"]["value"] == pytest.approx(np.mean(values), rel=1e-5), name


@pytest.mark.parametrize(
    "delta, expected", [(0.0, 1.0), (-0.1, 1.0), (1.0, 0.1), (0.5, math.sqrt(0.1)), (9.0, 0.01)]
)
def test_the_compute_fraction_is_read_off_the_loss_table(delta, expected):
    table = [(1e10, 4.0), (1e11, 3.0), (1e12, 2.0)]
    found = downstream.compute_fraction(table, {"value": delta, "se": 0.0})
    assert found["value"] == pytest.approx(expected)


def test_a_loss_that_was_never_measured_has_no_compute_fraction():
    unknown = {"value": None, "se": None}
    assert downstream.compute_fraction([(1e10, 4.0), (1e11, 3.0)], unknown) == unknown


def test_without_a_loss_table_there_is_no_compute_fraction_and_a_note_says_why(subject):
    acts, lm = subject
    result = runner.evaluate(make_sae(acts, lm.d_model), lm, ["downstream"], OPTIONS)["downstream"]
    assert result["compute_fraction"] == {"value": None, "se": None}
    assert any("--loss-table" in note for note in result["notes"])


def test_a_given_loss_table_is_used_and_its_shift_is_told(subject, tmp_path):
    acts, lm = subject
    file = tmp_path / "losses.jsonl"
    file.write_text("\n".join(json.dumps({"flops": 10.0**i, "loss": 20 - i}) for i in range(3, 9)))
    options = dataclasses.replace(OPTIONS, loss_table=str(file))
    result = runner.evaluate(make_sae(acts, lm.d_model), lm, ["downstream"], options)["downstream"]
    assert 0 < result["compute_fraction"]["value"] <= 1
    assert result["loss_table"]["shift"] == pytest.approx(result["ce_clean"]["value"] - 12)
    assert any("shifted" in note for note in result["notes"])
    file.write_text("not a table")
    with pytest.raises(
        InputError, match="losses.jsonl is not lines of JSON with 'flops' and 'loss'"
    ):
        runner.evaluate(make_sae(acts, lm.d_model), lm, ["downstream"], options)


# ---- the protocol


def test_constructing_metrics_runs_no_lm_and_reads_no_text(subject, monkeypatch):
    acts, lm = subject
    data = HeldOut(lm, acts, dataclasses.replace(OPTIONS, n2g_pad=" cat").resolved())
    context = EvalContext(make_sae(acts, lm.d_model), data)

    def refuse(*args, **options):
        raise AssertionError("a constructor has run the LM or read the text")

    for name in ("forward", "__call__"):
        monkeypatch.setattr(type(lm.model), name, refuse)
    monkeypatch.setattr(type(lm.tokenizer), "__call__", refuse)
    monkeypatch.setattr(Corpus, "contexts", refuse)
    for name, metric in registry.EVALS.items():
        assert isinstance(context.part(metric), metric), name
    with pytest.raises(AssertionError, match="a constructor has run the LM"):
        data.mean_activation()


def test_a_pass_counts_what_it_has_read_and_another_pass_changes_nothing(subject):
    acts, lm = subject
    data = HeldOut(lm, acts, OPTIONS)
    one = HeldOutPass(data)
    batches = list(one)
    read = one.tokens, one.contexts, one.documents
    assert read[0] == sum(int(batch.keep.sum()) for batch in batches) >= OPTIONS.tokens
    assert read[1] == sum(len(batch.keep) for batch in batches) and len(read[2]) > 1
    next(iter(data))
    next(iter(HeldOutPass(data)))
    assert (one.tokens, one.contexts, one.documents) == read


def test_an_evaluation_is_prepared_before_the_first_batch_and_gets_two_passes_if_it_asks(
    subject, monkeypatch
):
    acts, lm = subject
    calls = []

    class Recorder(Metric):
        passes = 2

        def prepare(self):
            calls.append("prepare")

        def update(self, batch):
            calls.append("update")

        def compute(self, progress):
            calls.append("compute")

        def update_second_pass(self, batch):
            calls.append("update_second_pass")

        def finalize(self):
            return Result({"calls": len(calls)})

    monkeypatch.setitem(registry.EVALS, "recorder", Recorder)
    result = runner.evaluate(make_sae(acts, lm.d_model), lm, ["recorder"], OPTIONS)["recorder"]
    n = calls.count("update")
    assert n > 1 and 0 <= result["n_tokens"] - OPTIONS.tokens < acts.context
    assert calls == ["prepare"] + ["update"] * n + ["compute"] + ["update_second_pass"] * n


@pytest.mark.parametrize("lm_batch", [1, 4, 64])
@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_the_number_of_tokens_is_rounded_up_to_whole_contexts(small_acts, tokens, lm_batch):
    acts = small_acts(lm_batch=lm_batch)
    lm = LM(acts=acts)
    of_contexts = [
        int(batch.keep.sum())
        for batch in HeldOut(lm, dataclasses.replace(acts, lm_batch=1), OPTIONS)
    ]
    read = [sum(of_contexts[: n + 1]) for n in range(len(of_contexts))]
    options = dataclasses.replace(OPTIONS, tokens=tokens)
    result = runner.evaluate(make_sae(acts, lm.d_model), lm, ["stats"], options)["stats"]
    assert result["n_tokens"] == min(n for n in read if n >= tokens)


# ---- what is refused


def test_an_sae_of_another_width_names_both_widths_and_its_own_lm(subject):
    acts, lm = subject
    with pytest.raises(
        InputError,
        match=r"the SAE is for d_model = 7, .* has 16 at resid_post.1; the SAE was trained on",
    ):
        runner.evaluate(make_sae(acts, 7), lm, ["stats"], OPTIONS)


def test_an_unknown_evaluation_gets_a_suggestion():
    with pytest.raises(InputError, match="no evaluation 'stat'; did you mean 'stats'"):
        registry.check_names(["stat"])


def test_an_sae_that_does_not_name_its_lm_asks_for_one():
    with pytest.raises(InputError, match="give one: ksparse.LM"):
        runner.evaluate(SAE(Shape(4, 8, 2)))


def test_text_without_a_held_out_document_says_so(subject, tmp_path):
    acts, lm = subject
    file = tmp_path / "one.txt"
    file.write_text("the cat sat on a mat " * 20)
    with pytest.raises(InputError, match="split 'held-out'"):
        runner.evaluate(
            make_sae(acts, lm.d_model), lm, ["stats"], dataclasses.replace(OPTIONS, text=str(file))
        )


def test_nan_activations_name_the_document(subject):
    acts, lm = subject
    common = lm.tokenize("the")[0, -1]
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[common] = float("nan")
    try:
        with pytest.raises(NonFiniteError, match=r"in document 'words.txt:\d+'"):
            runner.evaluate(
                make_sae(acts, lm.d_model),
                lm,
                ["stats"],
                dataclasses.replace(OPTIONS, tokens=10**6),
            )
    finally:
        with torch.no_grad():
            lm.model.get_input_embeddings().weight[common] = 0.0


def test_results_are_written_as_json_and_arrays(subject, tmp_path):
    acts, lm = subject
    run = RunFolder(tmp_path)
    runner.write_results(
        run, runner.evaluate(make_sae(acts, lm.d_model), lm, ["stats", "downstream"], OPTIONS)
    )
    written = run.eval("stats")
    assert written["policy"]["context"] == 16 and written["options"]["per_document"] == 60
    arrays = tmp_path / "evals" / f"stats-{written['arrays_sha256'][:16]}.safetensors"
    assert (
        run.arrays_file("stats") == arrays
        and written["arrays"] == arrays.name
        and arrays.stat().st_mode & 0o777 == 0o644
    )
    vocabulary = json.loads((tmp_path / "evals" / "vocabulary.json").read_text())
    assert len(vocabulary) == lm.vocab and vocabulary[0] == "<|endoftext|>"
    assert run.eval("probes") is None


@pytest.fixture
def results():
    """Return two results of `stats`, of other tensors each."""
    return [
        Result(
            {"name": "stats", "value": value},
            {"density": torch.full((5,), float(value))},
            {"vocabulary": ["a"]},
        )
        for value in (1, 2)
    ]


def whole(run):
    """Return the result of a run and its arrays, which belong together or this raises."""
    result = run.eval("stats")
    arrays = load_file(run.arrays_file("stats", result))
    assert arrays["density"].tolist() == [float(result["value"])] * 5
    return result["value"]


def names(run):
    return sorted(file.name for file in (run.path / "evals").iterdir())


class Killed(BaseException):
    """From here on nothing changes on the disk."""


def killed_at(place, function):
    """Stop a function at a call that changes the disk; return whether there are so many."""
    calls = 0

    def counted(own):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls >= place:
                raise Killed
            return own(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            function()
        except Killed:
            return True
    return False


def test_an_evaluation_killed_at_any_call_leaves_the_older_result_or_the_newer_one_whole(
    results, tmp_path
):
    run, place, seen = RunFolder(tmp_path), 0, []
    killed = True
    while killed:
        place += 1
        runner.write_results(run, {"stats": results[0]})
        killed = killed_at(place, lambda: runner.write_results(run, {"stats": results[1]}))
        seen.append(whole(run))
        runner.write_results(run, {"stats": results[1]})
        assert (
            whole(run) == 2
            and len(names(run)) == 4
            and not [name for name in names(run) if ".tmp-" in name]
        ), "leftovers"
    assert place > 12 and set(seen) == {1, 2} and seen == sorted(seen)


def test_nobody_else_writes_results_between_the_arrays_and_their_json(
    results, tmp_path, monkeypatch
):
    run, write, refused = RunFolder(tmp_path), jsonio.write_json, []

    def between(path, value, **options):
        if path.name == "stats.json":
            with pytest.raises(
                InputError,
                match=f"evals is in use by process {os.getpid()}; try again when",
            ):
                with run.lock_evals(wait=0.0):
                    pass
            refused.append(path)
        write(path, value, **options)

    monkeypatch.setattr(jsonio, "write_json", between)
    runner.write_results(run, {"stats": results[0]})
    assert len(refused) == 1 and whole(run) == 1


def test_evaluations_of_one_run_at_once_never_have_ones_arrays_under_the_others_json(
    results, tmp_path
):
    run = RunFolder(tmp_path)
    for _ in range(3):
        pids = []
        for result in results:
            pids.append(os.fork())
            if not pids[-1]:
                try:
                    runner.write_results(run, {"stats": result})
                    os._exit(0)
                finally:
                    os._exit(1)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
        assert whole(run) in (1, 2) and len(names(run)) == 4


def test_results_of_before_arrays_had_their_sum_in_the_name_are_read_and_replaced(
    results, tmp_path
):
    run = RunFolder(tmp_path)
    runner.write_results(run, {"stats": results[0]})
    old = run.path / "evals" / "stats.safetensors"
    run.arrays_file("stats").rename(old)
    jsonio.write_json(
        run.eval_file("stats"),
        {key: value for key, value in run.eval("stats").items() if key != "arrays"},
        sealed=True,
    )
    assert run.arrays_file("stats") == old and whole(run) == 1
    runner.write_results(run, {"stats": results[1]})
    assert whole(run) == 2 and not old.exists() and len(names(run)) == 4


def test_other_results_and_arrays_that_cannot_be_told_apart_stay(results, tmp_path):
    run = RunFolder(tmp_path)
    runner.write_results(run, {"stats": results[0]})
    for name, text in (
        ("n2g.json", "{"),
        ("n2g-0123456789abcdef.safetensors", ""),
        ("mine.safetensors", ""),
        ("gone-0123456789abcdef.safetensors", ""),
    ):
        (run.path / "evals" / name).write_text(text)
    runner.write_results(run, {"downstream": Result({"name": "downstream"})})
    assert {
        "n2g.json",
        "n2g-0123456789abcdef.safetensors",
        "mine.safetensors",
        run.arrays_file("stats").name,
    } < set(names(run))
    assert "gone-0123456789abcdef.safetensors" not in names(run), "no result names these"


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda file: file.unlink(), "is missing, though stats.json names it"),
        (lambda file: file.write_bytes(b"x"), "is damaged or of another result than stats.json"),
    ],
)
def test_arrays_that_are_not_those_of_the_result_are_named_with_what_mends_it(
    results, tmp_path, damage, said
):
    run = RunFolder(tmp_path / "run")
    runner.write_results(run, {"stats": results[0]})
    damage(run.arrays_file("stats"))
    with pytest.raises(
        CorruptError,
        match=rf"stats-[0-9a-f]{{16}}.safetensors {said}; ksparse eval run stats writes both again",
    ):
        run.arrays_file("stats")


# ---- what is not seen is said


def test_documents_longer_than_the_limit_are_counted_in_the_result(subject):
    acts, lm = subject
    result = runner.evaluate(
        make_sae(acts, lm.d_model),
        lm,
        "stats",
        dataclasses.replace(OPTIONS, per_document=20, tokens=10**6),
    )["stats"]
    lengths = [
        len(lm.tokenizer(document.text, add_special_tokens=False)["input_ids"])
        for document in documents(acts, "held-out")
    ]
    lost = [length - 20 for length in lengths if length > 20]
    assert lost and any(
        note.startswith(
            f"{len(lost)} of {len(lengths)} documents are longer than the limit of 20 tokens"
        )
        and f"; {sum(lost):,} of their tokens were not seen" in note
        for note in result["notes"]
    ), result["notes"]
    whole = runner.evaluate(
        make_sae(acts, lm.d_model), lm, "stats", dataclasses.replace(OPTIONS, per_document=10**6)
    )["stats"]
    assert not any("limit" in note for note in whole["notes"])


def test_examples_of_a_part_of_the_text_are_said_to_be(subject, monkeypatch):
    acts, lm = subject
    assert not any(
        "first" in note
        for note in runner.evaluate(make_sae(acts, lm.d_model), lm, "stats", OPTIONS)["stats"][
            "notes"
        ]
    )
    monkeypatch.setattr(stats, "_EXAMPLE_TOKENS", 100)
    notes = runner.evaluate(make_sae(acts, lm.d_model), lm, "stats", OPTIONS)["stats"]["notes"]
    assert any(
        note.startswith("examples, and what is counted beside them, are of the first 8 of ")
        for note in notes
    )


def test_fewer_contexts_in_a_pass_give_the_same_results_and_are_what_the_lm_is_given(
    subject, monkeypatch
):
    acts, lm = subject
    sae = make_sae(acts, lm.d_model)
    sizes = []
    whole = lm.predict

    def count(tokens, *rest):
        sizes.append(len(tokens))
        return whole(tokens, *rest)

    monkeypatch.setattr(lm, "predict", count)
    results = [
        runner.evaluate(sae, lm, ["downstream"], dataclasses.replace(OPTIONS, lm_batch=batch))
        for batch in (0, 2)
    ]
    assert max(sizes[: len(sizes) // 2]) == acts.lm_batch == 4 and sizes[-1] <= 2
    one, other = (result["downstream"] for result in results)
    for key in ("ce_clean", "ce_spliced", "kl"):
        assert one[key]["value"] == pytest.approx(other[key]["value"], rel=1e-5)


def test_a_result_is_handed_over_as_soon_as_it_is_complete(subject):
    acts, lm = subject
    saes = {label: make_sae(acts, lm.d_model) for label in ("a", "b")}
    events = []
    results = runner.evaluate_many(
        saes,
        lm,
        ["explained_loss", "stats", "downstream"],
        OPTIONS,
        observe=lambda what, done, total: events.append(what),
        on_result=lambda label, name, result: events.append((label, name)),
    )
    handed = [event for event in events if isinstance(event, tuple)]
    assert handed == [
        (label, name) for name in ("stats", "downstream", "explained_loss") for label in "ab"
    ]
    assert events.index(("b", "downstream")) < events.index("pass 2: reading the text again")
    assert list(results["a"]) == ["explained_loss", "stats", "downstream"]
