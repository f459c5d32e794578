"""SAEs side by side: the same numbers whatever the format, and no ranking of what is not alike."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import ksparse
from ksparse import interop
from ksparse.errors import InputError
from ksparse.evals import comparison
from ksparse.sae.model import SAE, Shape
from ksparse.storage.run_folder import RunFolder


def made(acts, folder, **changes):
    """Write an SAE that reconstructs badly, but not at random."""
    sae = SAE(
        Shape(16, 32, 8, "none"),
        {"acts": dataclasses.asdict(dataclasses.replace(acts, normalize="none", **changes))},
    )
    eye = torch.eye(16)
    sae.W_enc.data = torch.cat([eye, -eye]) + 0.01 * torch.randn(
        32, 16, generator=torch.Generator().manual_seed(0)
    )
    sae.W_dec.data = torch.cat([eye, -eye])
    sae.b_pre.data.fill_(0.1)
    ksparse.save(sae, folder)
    return folder


def test_one_sae_in_five_formats_has_the_same_numbers_five_times(small_acts, tmp_path, verb):
    first = made(small_acts(), tmp_path / "ours")
    folders = [first]
    for form in ("sae_lens", "sparsify", "dictionary_learning", "llamascopium"):
        interop.convert(first, tmp_path / form, form)
        folders.append(tmp_path / form)
    code, out, err = verb(
        "compare", *folders, "--tokens", 300, "--device", "cpu", "--json", tmp_path / "table.json"
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "table.json").read_text())
    assert (
        len(rows) == 5
        and "ce_delta" in out
        and "±" in out
        and all(str(folder) in out for folder in folders)
    )
    for key in set(rows[0]) - {"name", "against", "differences"}:
        for row in rows[1:]:
            assert row[key]["value"] == pytest.approx(rows[0][key]["value"], rel=1e-4, abs=1e-7), (
                key
            )
            assert row[key]["se"] == pytest.approx(rows[0][key]["se"], rel=1e-3, abs=1e-7), key


def test_a_foreign_sae_that_does_not_say_where_it_belongs_is_compared_where_the_others_do(
    small_acts, tmp_path, verb
):
    first = made(small_acts(), tmp_path / "ours")
    interop.convert(first, tmp_path / "theirs", "dictionary_learning")
    for name in ("ksparse.json", "manifest.json", "config.json"):
        (tmp_path / "theirs" / name).unlink()
    (tmp_path / "theirs" / "config.json").write_text(
        '{"trainer": {"dict_class": "AutoEncoderTopK"}}'
    )
    code, out, err = verb("compare", tmp_path / "theirs", first, "--tokens", 100, "--device", "cpu")
    assert code == 0, err
    code, _, err = verb("compare", tmp_path / "theirs", "--tokens", 100)
    assert (
        code == 2
        and "no SAE says on which LM, site and text it was trained; name them: --lm, --site, --text"
        in err
    )


def test_different_contexts_are_refused_unless_one_is_named_for_all(small_acts, tmp_path, verb):
    a, b = made(small_acts(), tmp_path / "a"), made(small_acts(), tmp_path / "b", context=8)
    code, _, err = verb("compare", a, b, "--tokens", 100, "--device", "cpu")
    assert code == 2 and "acts.context is 16 of one and 8 of the other" in err and "--like" in err
    code, out, err = verb("compare", a, b, "--like", b, "--tokens", 100, "--device", "cpu")
    assert (
        code == 0 and f"note: {a}: context is 8, as asked, but 16 where the SAE was trained" in out
    ), err
    numbers = [line.split()[1:] for line in out.splitlines()[1:3]]
    assert "+0.0000 ± 0.0000" in out.partition(f"more than {a}")[2], "they differ in nothing"
    assert numbers[0] == numbers[1]


def test_another_site_is_refused(small_acts, tmp_path, verb):
    a, b = (
        made(small_acts(), tmp_path / "a"),
        made(small_acts(), tmp_path / "b", site="resid_post.0"),
    )
    code, _, err = verb("compare", a, b, "--tokens", 100, "--device", "cpu")
    assert (
        code == 2
        and f"{b}: site is 'resid_post.1', but 'resid_post.0' where the SAE was trained" in err
        and "--force True" in err
    )
    code, out, err = verb("compare", a, b, "--tokens", 100, "--device", "cpu", "--force", True)
    assert (
        code == 0
        and f"note: {b}: by force: site is 'resid_post.1'" in out
        and f"note: {a}: by force" not in out
    )
    assert (
        verb("compare", a, "--site", "transformer.h.1", "--tokens", 100, "--device", "cpu")[0] == 0
    ), "the same place by another name"
    assert verb("compare", a, a)[0] == 2
    assert "--like names 'c', which is not compared" in verb("compare", a, b, "--like", "c")[2]


RESULT = {
    "ce_delta": {"value": 0.1, "se": 0.01},
    "kl": {"value": 0.1, "se": 0.01},
    "recovered": {"value": 0.9, "se": 0.01},
    "lm": "a",
    "site": "b",
    "text": "c",
    "policy": {"context": 16},
    "n_tokens": 100,
    "n_documents": 9,
    "options": {"tokens": 100, "device": "cpu", "budget": "small"},
}


def results(**changes):
    other = json.loads(json.dumps(RESULT))
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (other[section] if section else other)[name] = value
    return {"x": {"downstream": RESULT}, "y": {"downstream": other}}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text": "d"}, "text is 'c' of one and 'd' of the other"),
        ({"policy__context": 64}, "policy.context is 16 of one and 64 of the other"),
        ({"n_tokens": 99}, "n_tokens is 100 of one and 99"),
        ({"options__tokens": 99}, "options.tokens is 100 of one and 99"),
        ({"site": "e"}, "site is 'b' of one and 'e'"),
    ],
)
def test_results_of_different_policies_are_not_ranked(changes, message):
    with pytest.raises(
        InputError,
        match=f"x and y cannot be ranked by downstream: .*{message}.*leave out --results saved",
    ):
        comparison.table(results(**changes), {"x": "none", "y": "none"})


def test_what_does_not_change_a_number_does_not_matter():
    rows = comparison.table(
        results(
            options__device="cuda", options__budget="paper", ce_delta={"value": 0.05, "se": 0.01}
        ),
        {"x": "none", "y": "none"},
    )
    assert [row.name for row in rows] == ["y", "x"]
    assert [
        row.name for row in comparison.table(results(), {"x": "none", "y": "none"}, "recovered")
    ] == ["x", "y"]


def test_the_sae_whose_ablations_change_fewer_logits_is_first():
    few, many = (
        {"ablation": {**RESULT, "ablation_sparsity": {"value": value, "se": 0.01}}}
        for value in (0.1, 0.3)
    )
    rows = comparison.table({"many": many, "few": few}, {"many": "none", "few": "none"})
    assert [row.name for row in rows] == ["few", "many"]


def test_what_is_not_ranked_is_named():
    with pytest.raises(
        InputError, match="SAEs are not ranked by 'speed'; there are ce_delta, kl, recovered"
    ):
        comparison.table(results(), {"x": "none", "y": "none"}, "speed")
    with pytest.raises(
        InputError, match="of one there are results of downstream, of the other of stats"
    ):
        comparison.check({"x": {"downstream": RESULT}, "y": {"stats": RESULT}})


def test_errors_of_differently_normalised_activations_are_not_side_by_side():
    stats = {
        "stats": {
            **RESULT,
            "nmse": {"value": 0.1, "se": None},
            "explained_variance": {"value": 0.9, "se": None},
            "l0": {"value": 8, "se": None},
            "dead_fraction": {"value": 0, "se": None},
        }
    }
    both = {"x": stats, "y": stats}
    assert "nmse" in comparison.table(both, {"x": "none", "y": "none"})[0].values
    assert "nmse" not in comparison.table(both, {"x": "none", "y": "unit_norm"})[0].values


def test_saved_results_are_taken_as_they_are(small_recipe, tmp_path, verb):
    run = ksparse.train(small_recipe(), tmp_path / "run")
    assert (
        "has no results of downstream and stats"
        in verb("compare", run.path, "--results", "saved")[2]
    )
    assert verb("eval", run.path, "stats", "--tokens", 100, "--device", "cpu")[0] == 0
    code, out, err = verb("compare", run.path, "--results", "saved")
    assert code == 0, err
    assert f"{RunFolder(run.path).eval('stats')['nmse']['value']:.4f}" in out


def test_differences_are_those_of_document_means_by_hand(small_acts, tmp_path, verb):
    from ksparse.config.evaluation import EvalConfig
    from ksparse.evals import runner

    acts = small_acts()
    saes = {
        "a": ksparse.load(made(acts, tmp_path / "a")),
        "b": ksparse.load(made(acts, tmp_path / "b")),
        "c": ksparse.load(made(acts, tmp_path / "c")),
    }
    saes["b"].W_dec.data *= 0.7
    saes["c"].W_dec.data *= 0.7
    saes["c"].W_dec.data[0] *= 0.99
    options = EvalConfig(tokens=800, per_document=64, examples=0, device="cpu")
    results = runner.evaluate_many(saes, None, ["downstream", "stats"], options)
    found = comparison.differences(results, dict.fromkeys(saes, "none"), "c")
    assert set(found) == {"a", "b"}
    for label in found:
        for key, evaluation in (("ce_delta", "downstream"), ("explained_variance", "stats")):
            one, other = (results[name][evaluation][key] for name in (label, "c"))
            entry = found[label][key]
            assert entry["paired"] and entry["value"] == pytest.approx(
                one["value"] - other["value"]
            )
            assert one.clusters.tolist() == other.clusters.tolist()
            m, by_document = len(one.clusters), one.deviations - other.deviations
            assert entry["se"] == pytest.approx((m / (m - 1) * (by_document**2).sum()) ** 0.5)
        assert not found[label]["dead_fraction"]["paired"], "latents of two SAEs are no pairs"
    entry, one = found["b"]["ce_delta"], results["b"]["downstream"]["ce_delta"]
    assert entry["se"] < 0.2 * one["se"], "SAEs that hardly differ have a difference that is sure"


def test_a_paired_error_is_that_of_the_ratio_of_differences():
    import numpy as np

    from ksparse.evals.statistics import DocumentSums, difference, ratio

    g = torch.Generator().manual_seed(0)
    documents = torch.randint(12, (400,), generator=g)
    a, b = torch.rand(400, generator=g), torch.rand(400, generator=g)
    one, other = DocumentSums(), DocumentSums()
    one.add(documents, loss=a, n=torch.ones(400))
    shuffled = torch.randperm(400, generator=g)  # other documents come first
    other.add(documents[shuffled], loss=b[shuffled], n=torch.ones(400))
    together = DocumentSums()
    together.add(documents, loss=a - b, n=torch.ones(400))
    expected = ratio(together["loss"], together["n"])
    found = difference(ratio(one["loss"], one["n"]), ratio(other["loss"], other["n"]))
    assert found["paired"] and found["value"] == pytest.approx(expected["value"])
    assert found["se"] == pytest.approx(expected["se"])
    assert type(one["loss"] - 2 * one["n"]).__name__ == "DocumentTotals"
    assert isinstance(np.asarray(one["loss"]), np.ndarray)


def test_any_evaluations_of_any_number_of_saes_are_compared_against_any_of_them(
    small_acts, tmp_path, verb
):
    suite = tmp_path / "suite"
    suite.mkdir()
    rows = [
        {"text": f"{('the cat', 'black dogs')[i % 2]} saw {i}", "label": i % 2} for i in range(40)
    ]
    (suite / "cats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = [made(small_acts(), tmp_path / name) for name in "abc"]
    sae = ksparse.load(folders[2])
    sae.W_dec.data *= 0.5
    ksparse.save(sae, folders[2])
    small = ["--tokens", 300, "--per-document", 64, "--device", "cpu", "--suite", suite]
    small += ["--latents", 6, "--n2g-examples", 4]
    code, out, err = verb(
        "compare", *folders, "--evals", "downstream,stats,probes,n2g,refinement",
        "--against", folders[1], "--json", tmp_path / "table.json", *small,
    )  # fmt: skip
    assert code == 0, err
    table = {row["name"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    assert "differences" not in table[str(folders[1])]
    assert f"more than {folders[1]}" in out and "*: of independent numbers" in out
    same, worse = (table[str(folders[i])]["differences"] for i in (0, 2))
    for key in ("ce_delta", "probe_loss", "cats.loss", "explained_variance", "nmse_refined"):
        assert same[key] == {"value": 0.0, "se": pytest.approx(0, abs=1e-9), "paired": True}, key
    assert worse["explained_variance"]["value"] < 0 and worse["explained_variance"]["paired"]
    assert same["f1"]["paired"] is False, "each SAE has latents of its own"
    assert "l0" in same and "refinement.l0" in same, "two numbers of one name are told apart"
    code, _, err = verb("compare", *folders, "--against", "x")
    assert code == 2 and "--against names 'x', which is not compared" in err
    code, _, err = verb("compare", *folders, "--evals", "downstreem")
    assert code == 2 and "there is no evaluation 'downstreem'" in err
