"""A function of edited activations judges SAEs of activations that anybody made, on whole held-out documents."""

import numpy as np
import pytest
import torch

import ksparse
from ksparse.data.tensors import Tensors, write_index
from ksparse.errors import InputError, NonFiniteError
from ksparse.evals.batches import SAEBatch
from ksparse.evals.statistics import ratio

OPTIONS = {"n_latents": 48, "k": 4, "tokens": 4096, "batch": 256}
WEIGHTS = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on rows whose documents are not in one piece, with a label for each row."""
    folder = tmp_path_factory.mktemp("rows")
    x = torch.randn(6000, 8, generator=torch.Generator().manual_seed(0)) + 1
    np.savez(folder / "x.npz", x=x.numpy(), documents=np.arange(6000) % 500)
    write_index(folder)
    return ksparse.train(shards=folder, out=folder / "run", **OPTIONS)


@pytest.fixture(scope="module")
def labels():
    """The likeliest label of each row, which a worse reconstruction makes less likely."""
    x = torch.randn(6000, 8, generator=torch.Generator().manual_seed(0)) + 1
    return (x @ WEIGHTS).argmax(1)


def row_loss(labels):
    return lambda x, rows: torch.nn.functional.cross_entropy(
        x @ WEIGHTS, labels[rows.numbers], reduction="none"
    )


def document_loss(labels):
    """The loss of a document's mean, in the order in which its rows come."""

    def loss(x, rows):
        documents = rows.documents.unique_consecutive()
        assert len(documents) == len(rows.documents.unique()), "a document is in one piece"
        means = torch.stack([x[rows.documents == document].mean(0) for document in documents])
        return (means @ WEIGHTS).square().sum(1)

    return loss


def judged(run, loss, **options):
    found = ksparse.evaluate(run, names="stats", loss=loss, progress=False, **options)
    assert list(found) == ["stats", "own_loss"]
    return found["own_loss"]


def held_out(run):
    table = Tensors(run.recipe().acts.shards, "held-out")
    rows = np.arange(table.rows)
    return table.read(rows), torch.from_numpy(table.chosen), table.documents(rows)


def by_document(values, documents):
    return np.array([values[documents == each].sum() for each in np.unique(documents)])


def test_losses_and_shares_are_those_of_all_held_out_rows(run, labels):
    result = judged(run, row_loss(labels), tokens=10**6)
    sae, (x, numbers, documents) = ksparse.load(run), held_out(run)
    edits = {
        "clean": x,
        "spliced": sae(x).detach(),
        "zero": torch.zeros_like(x),
        "mean": x.double().mean(0).float().expand_as(x),
    }
    losses = {
        name: by_document(
            torch.nn.functional.cross_entropy(
                edited @ WEIGHTS, labels[numbers], reduction="none"
            ).double().numpy(),
            documents,
        )
        for name, edited in edits.items()
    }  # fmt: skip
    count = by_document(np.ones(len(x)), documents)
    expected = {f"loss_{name}": ratio(losses[name], count) for name in edits} | {
        "loss_delta": ratio(losses["spliced"] - losses["clean"], count),
        "recovered": ratio(losses["zero"] - losses["spliced"], losses["zero"] - losses["clean"]),
        "recovered_from_mean": ratio(
            losses["mean"] - losses["spliced"], losses["mean"] - losses["clean"]
        ),
    }
    for name, value in expected.items():
        assert result[name]["value"] == pytest.approx(value["value"], rel=1e-5), name
        assert result[name]["se"] == pytest.approx(value["se"], rel=1e-4), name
    assert result["n_losses"] == result["n_tokens"] == len(x)
    assert result["loss_delta"]["value"] > 0 and result["recovered"]["value"] < 1


def test_a_loss_of_documents_counts_documents(run, labels):
    result = judged(run, document_loss(labels), tokens=10**6)
    x, _, documents = held_out(run)
    means = torch.stack(
        [x[torch.from_numpy(documents == each)].mean(0) for each in np.unique(documents)]
    )
    clean = (means.double() @ WEIGHTS.double()).square().sum(1)
    assert result["loss_clean"]["value"] == pytest.approx(clean.mean().item(), rel=1e-5)
    assert result["n_losses"] == result["n_documents"] == len(np.unique(documents))


def test_a_perfect_reconstruction_recovers_everything(run, labels, monkeypatch):
    monkeypatch.setattr(SAEBatch, "recon", property(lambda batch: batch.inputs.x))
    result = judged(run, row_loss(labels), tokens=10**6)
    assert result["recovered"]["value"] == pytest.approx(1, abs=1e-6)
    assert result["loss_delta"]["value"] == pytest.approx(0, abs=1e-6)


def test_fewer_rows_are_whole_documents_from_all_over(run, labels):
    seen = []

    def loss(x, rows):
        seen.append(rows)
        return document_loss(labels)(x, rows)

    few = judged(run, loss, tokens=120)
    assert 100 <= few["n_tokens"] <= 140 and few["n_tokens"] == 12 * few["n_documents"]
    documents = seen[0].documents.unique()
    assert documents.max() > 400 and documents.min() < 100


def test_two_saes_are_compared_with_paired_differences(run, labels):
    sae = ksparse.load(run)
    worse = ksparse.load(run)
    worse.b_pre.data += 0.2
    found = ksparse.compare(
        {"a": sae, "worse": worse}, names="stats", loss=row_loss(labels), progress=False
    )
    delta = found.differences["worse"]["loss_delta"]
    assert delta["paired"] and delta["value"] > 0 and delta["se"] > 0


def test_results_can_be_kept_in_the_run(run, labels):
    judged(run, lambda x, rows: x.square().sum(1).numpy(), save=True)
    assert run.eval("own_loss")["recovered"]["value"] <= 1


@pytest.mark.parametrize(
    "loss, message",
    [
        (lambda x, rows: 0.5, "loss returned a float for"),
        (lambda x, rows: x, r"loss returned torch.float32 of shape \[\d+, 8\] for"),
        (lambda x, rows: x[:5, 0], r"must return floating-point losses \[\d+\], one for each row"),
        (lambda x, rows: rows.numbers, "loss returned torch.int64 of shape"),
        ("mse", "loss is 'mse'; it must be a function"),
    ],
)
def test_what_is_no_loss_is_refused(run, loss, message):
    with pytest.raises(InputError, match=message):
        judged(run, loss)


def test_a_loss_that_is_not_finite_is_named(run):
    with pytest.raises(NonFiniteError, match="loss returned nan as number 0 of"):
        judged(run, lambda x, rows: x[:, 0] * float("nan"))


def test_rows_in_one_call_and_documents_in_another_are_refused(run):
    def loss(x, rows):
        return x[:, 0] if x.any() else x[: len(rows.documents.unique()), 0]

    with pytest.raises(InputError, match="it must do the same in every call"):
        judged(run, loss)


def test_an_sae_of_an_lm_has_its_own_loss(small_recipe, tmp_path, labels):
    with pytest.raises(InputError, match="the evaluation downstream measures the LM's own"):
        judged(ksparse.train(small_recipe(), tmp_path / "run"), row_loss(labels))
