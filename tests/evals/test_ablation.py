"""Ablation sparsity is its definition, of the edits it says, at the positions it says."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from ksparse.config.evaluation import EvalConfig
from ksparse.errors import InputError
from ksparse.evals import ablation, registry, runner
from ksparse.evals.ablation import Ablation, sparsity
from ksparse.evals.base import EvalContext
from ksparse.evals.batches import HeldOut, SAEBatch
from ksparse.lm.model import LM
from ksparse.lm.tokens import TokenBatch
from ksparse.sae.model import SAE, Shape
from ksparse.storage.run_folder import RunFolder

OPTIONS = EvalConfig(
    tokens=10**6, device="cpu", ablation_positions=6, ablation_latents=7, ablation_horizon=4
)


@pytest.fixture
def subject(small_acts):
    acts = small_acts(lm_batch=4)
    return acts, LM(acts=acts)


def make_sae(acts, d, *, n=64, k=4, seed=0, **shape) -> SAE:
    sae = SAE(Shape(d, n, k, **shape), {"acts": dataclasses.asdict(acts)})
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(d)
    return sae.eval().requires_grad_(False)


def run(sae, lm, acts, **changes):
    """Return (part, result)."""
    data = HeldOut(lm, acts, dataclasses.replace(OPTIONS, **changes))
    part = EvalContext(sae, data).part(Ablation)
    for batch in data:
        part.update(SAEBatch(sae, batch))
    part.compute(lambda what, done, total: None)
    return part, part.finalize()


def slow(differences) -> float:
    """The definition, in numpy; of an even number of values the lower median."""
    differences = np.asarray(differences, np.float64)
    ordered = np.sort(differences, 1)
    differences = differences - ordered[:, [(differences.shape[1] - 1) // 2]]
    return np.abs(differences).sum() ** 2 / (differences**2).sum() / differences.size


def row(tokens):
    return tokens[None], torch.ones_like(tokens[None], dtype=torch.bool)


def logits_with(lm, site, x):
    """Return float64 logits of the site's positions with x[d] at the position, by replay of the context's text."""
    tokens, attention = row(site.tokens[: site.text])
    watched = lm.run_with_cache(tokens, attention)

    def put(old):
        old = old.clone()
        old[0, site.position] = x
        return old

    return lm.run_patched(watched, put)[0, site.position : site.position + site.length].double()


def x_at(lm, site):
    return lm.acts(*row(site.tokens[: site.text]))[0, site.position]


def ordered(part):
    """The sample in the order of its ablation."""
    return sorted(part.sample.sites(), key=lambda site: site.position)


# ---- the number


@pytest.mark.parametrize("vocabulary", [50, 51])
def test_sparsity_is_the_slow_definition(vocabulary):
    differences = (
        torch.randn(5, 3, vocabulary, generator=torch.Generator().manual_seed(0)).exp()
        * torch.tensor([1.0, 5.0, 0.1])[:, None]
    )
    found = sparsity(differences)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([slow(each) for each in differences], rel=1e-5)


def test_gaussian_noise_has_two_over_pi():
    noise = torch.randn(4, 16, 5_000, generator=torch.Generator().manual_seed(1))
    assert sparsity(noise).tolist() == pytest.approx([2 / math.pi] * 4, abs=0.01)


def test_one_changed_prediction_is_one_in_all_and_m_equal_ones_are_m():
    differences = torch.zeros(3, 4, 25)
    differences[0, 2, 7] = 3.0
    differences[1, :, :2] = -0.5
    differences[2, 1, 3:13] = 1e-4
    assert sparsity(differences).tolist() == pytest.approx([1 / 100, 8 / 100, 10 / 100])


def test_sparsity_ignores_scale_and_a_constant_at_each_token():
    differences = torch.randn(
        2, 3, 41, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    ).pow(3)
    expected = sparsity(differences)
    torch.testing.assert_close(sparsity(differences * 1e-5), expected)
    torch.testing.assert_close(
        sparsity(differences + torch.tensor([5.0, -3.0, 0.1])[:, None]), expected
    )


def test_no_effect_has_no_sparsity():
    assert sparsity(torch.full((2, 3, 9), 2.0)).isnan().all()
    assert len(sparsity(torch.zeros(0, 3, 9))) == 0


def test_sums_do_not_depend_on_how_many_rows_are_summed_at_a_time(monkeypatch):
    differences = torch.randn(7, 2, 30, generator=torch.Generator().manual_seed(3))
    expected = sparsity(differences)
    monkeypatch.setattr(ablation, "_PART", 100)
    torch.testing.assert_close(sparsity(differences), expected)


def test_kl_and_loss_difference_are_their_definitions():
    generator = torch.Generator().manual_seed(4)
    before, changes = (
        torch.randn(3, 20, generator=generator),
        torch.randn(2, 3, 20, generator=generator),
    )
    targets = torch.tensor([4, -1, 19])
    found = ablation.measure(before.log_softmax(-1), changes + 2.0, targets)
    p, q = before.double().log_softmax(-1), (before + changes).double().log_softmax(-1)
    torch.testing.assert_close(found.kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-6)
    for j, target in ((0, 4), (2, 19)):
        torch.testing.assert_close(
            found.loss_difference[:, j].double(),
            p[j, target] - q[:, j, target],
            rtol=1e-4,
            atol=1e-6,
        )
    assert found.loss_difference[:, 1].isnan().all()


def test_a_tiny_change_has_a_kl_that_rounding_does_not_drown():
    generator = torch.Generator().manual_seed(5)
    log_p, change = (
        (10 * torch.randn(1, 1000, generator=generator)).log_softmax(-1),
        1e-3 * torch.randn(1, 1, 1000, generator=generator),
    )
    p, q = log_p.double(), (log_p.double() + change[0].double()).log_softmax(-1)
    assert ablation.measure(log_p, change, torch.tensor([-1])).kl.item() == pytest.approx(
        (p.exp() * (p - q)).sum().item(), abs=1e-7
    )


# ---- the edits


@pytest.mark.parametrize("normalize", ["unit_norm", "layer_norm", "dataset", "none"])
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_each_active_latent_is_taken_out_of_the_activation_or_of_its_reconstruction(
    subject, normalize, error
):
    acts, lm = subject
    sae = make_sae(acts, lm.d_model, normalize=normalize, factor=0.7)
    part, result = run(sae, lm, acts, ablation_error=error)
    arrays, expected, kls, losses = result.arrays, [], [], []
    for site in ordered(part):
        x = x_at(lm, site)
        inputs = sae.normalize(x)
        code = sae.encode(x)
        recon = sae.decode_normalized(code)
        before = x if error == "keep" else inputs.restore(recon)
        clean = logits_with(lm, site, before)
        for value, latent in zip(*code):
            if value > 0:
                contribution = inputs.restore(recon) - inputs.restore(
                    recon - value * sae.W_dec[latent]
                )
                changed = logits_with(lm, site, before - contribution)
                expected.append((latent.item(), site.document, slow(changed - clean)))
                p, q = clean.log_softmax(-1), changed.log_softmax(-1)
                kls.append((p.exp() * (p - q)).sum(-1).mean().item())
                losses.append(
                    np.mean(
                        [
                            (p - q)[j, site.tokens[site.position + j + 1]].item()
                            for j in range(site.length)
                            if site.position + j + 1 < site.text
                        ]
                    )
                )
    assert result["n_positions"] == 6 and result["n_ablations"] == len(expected)
    assert arrays["pair_latent"].tolist() == [latent for latent, _, _ in expected]
    assert arrays["pair_document"].tolist() == [document for _, document, _ in expected]
    assert arrays["pair_sparsity"].tolist() == pytest.approx(
        [value for _, _, value in expected], rel=2e-3
    )
    assert result["ablation_sparsity"]["value"] == pytest.approx(
        np.mean([value for _, _, value in expected]), rel=1e-3
    )
    assert result["kl"]["value"] == pytest.approx(np.mean(kls), rel=1e-3)
    assert result["loss_difference"]["value"] == pytest.approx(np.mean(losses), rel=1e-3, abs=1e-5)


def test_the_error_makes_a_difference(subject):
    acts, lm = subject
    sae = make_sae(acts, lm.d_model)
    keep, drop = (run(sae, lm, acts, ablation_error=error)[1] for error in ("keep", "drop"))
    assert keep["ablation_sparsity"] != drop["ablation_sparsity"]
    assert keep["channel_sparsity"] == drop["channel_sparsity"], (
        "channels are always those of the activation"
    )


def test_after_the_last_block_the_numbers_follow_from_the_weights(small_acts):
    """There only the position's own prediction changes, by the unembedding."""
    acts = small_acts(lm_batch=4, site="resid_post.2")
    lm = LM(acts=acts)
    sae = make_sae(acts, lm.d_model, normalize="none")
    part, result = run(sae, lm, acts)
    head = lm.model.transformer.ln_f, lm.model.lm_head
    expected = []
    with torch.no_grad():
        for site in ordered(part):
            x = x_at(lm, site)
            for value, latent in zip(*sae.encode(x)):
                if value > 0:
                    difference = head[1](head[0](x - value * sae.W_dec[latent])) - head[1](
                        head[0](x)
                    )
                    expected.append(slow(difference[None]) / 4)  # of four tokens' predictions
    assert result.arrays["pair_sparsity"].tolist() == pytest.approx(expected, rel=1e-3)
    assert result["effective_tokens"]["value"] == pytest.approx(
        np.mean(expected) * 4 * lm.vocab, rel=1e-3
    )


def test_the_baseline_sets_as_many_distinct_channels_to_zero(subject):
    acts, lm = subject
    part, result = run(make_sae(acts, lm.d_model), lm, acts)
    draw, expected = ablation._random(0, 2), []
    sites = part.sample.sites()
    for some, fork in ablation._forks(lm, sites, part._max_contexts):
        for i in some:
            count = int((part.latents["position"] == i).sum())
            for channel in draw.permutation(lm.d_model)[:count]:
                x = x_at(lm, sites[i])
                changed = x.clone()
                changed[channel] = 0
                expected.append(
                    slow(logits_with(lm, sites[i], changed) - logits_with(lm, sites[i], x))
                )
    assert result["n_channels"] == len(expected) == result["n_ablations"]
    assert part.channels["sparsity"].tolist() == pytest.approx(expected, rel=2e-3)
    assert result["channel_sparsity"]["value"] == pytest.approx(np.mean(expected), rel=1e-3)


def test_no_more_channels_are_drawn_than_there_are():
    x = torch.ones(2, 3)
    row, _, after = ablation._without_channels(
        x, torch.tensor([0] * 5 + [1]), np.random.default_rng(0)
    )
    assert row.tolist() == [0, 0, 0, 1]
    assert (after == 0).sum(1).tolist() == [1] * 4 and (after[:3] == 0).any(0).all()


def test_latents_without_effect_are_counted_and_left_out(subject):
    acts, lm = subject
    sae = make_sae(acts, lm.d_model)
    part, whole = run(sae, lm, acts)
    mute = whole.arrays["pair_latent"].unique()[::2]
    sae.W_dec.data[mute] = 0
    part, result = run(sae, lm, acts)
    without = torch.isin(result.arrays["pair_latent"], mute)
    assert result["n_without_effect"] == int(without.sum()) > 0
    assert result.arrays["pair_sparsity"].isnan().equal(without)
    assert result["ablation_sparsity"]["value"] == pytest.approx(
        whole.arrays["pair_sparsity"][~without].double().mean().item(), rel=1e-4
    )
    assert result["kl"]["value"] == pytest.approx(part.latents["kl"].mean().item()), (
        "no effect is a KL of 0, not none"
    )
    sae.W_dec.data[:] = 0
    result = run(sae, lm, acts)[1]
    assert (
        result["ablation_sparsity"]
        == result["difference"]
        == result["ablation_sparsity_weighted"]
        == {"value": None, "se": None}
    )
    assert (
        result["effective_tokens"] == {"value": None, "se": None}
        and result["channel_sparsity"]["value"] > 0
    )


def test_an_sae_without_active_latents_has_no_number(subject):
    acts, lm = subject
    sae = make_sae(acts, lm.d_model)
    sae.b_enc.data[:] = -100.0
    result = run(sae, lm, acts)[1]
    assert result["n_ablations"] == result["n_channels"] == result["n_latents"] == 0
    assert (
        result["ablation_sparsity"]["value"]
        is result["channel_sparsity"]["value"]
        is result["kl"]["value"]
        is None
    )
    assert result.arrays["context_tokens"].shape == (0, 16) and result.arrays[
        "up_tokens"
    ].shape == (0, 4, 5)


# ---- means and errors


def test_the_ways_of_averaging_are_what_they_say(subject):
    acts, lm = subject
    part, result = run(make_sae(acts, lm.d_model, k=6), lm, acts, ablation_positions=20)
    pairs = part.latents
    value, norm, position = (
        pairs["sparsity"].numpy(),
        pairs["norm"].numpy(),
        pairs["position"].numpy(),
    )
    assert result["ablation_sparsity"]["value"] == pytest.approx(value.mean())
    assert result["ablation_sparsity_weighted"]["value"] == pytest.approx(
        (value * norm).sum() / norm.sum()
    )
    assert result["ablation_sparsity_per_position"]["value"] == pytest.approx(
        np.mean([value[position == p].mean() for p in np.unique(position)])
    )
    assert result["difference"]["value"] == pytest.approx(
        result["channel_sparsity"]["value"] - result["ablation_sparsity"]["value"]
    )
    assert (
        sum(result["histogram"]["counts"]) == len(value) and result["histogram"]["edges"][-1] == 1
    )
    assert sum(result["channel_histogram"]["counts"]) == result["n_channels"]


def test_the_error_of_the_difference_is_that_of_redrawn_documents():
    draw = np.random.default_rng(0)
    pairs = {name: ablation._AblationTable() for name in ("channels", "latents")}
    for document in range(200):
        common = draw.normal(0, 0.1)  # which the difference does not see
        for name, mean in (("channels", 0.6), ("latents", 0.1)):
            m = draw.integers(1, 9)
            values = torch.from_numpy(
                mean + common + draw.normal(0, 0.05) + draw.normal(0, 0.05, m)
            )
            site = ablation.AblationSite(torch.zeros(2), 2, 1, document, 1)
            pairs[name].add(
                site,
                document,
                ablation.AblationEffects(
                    values,
                    values,
                    values,
                    torch.ones(m),
                    torch.zeros(m, 1),
                    torch.zeros(m, 1),
                    torch.zeros(m, 1, 1),
                ),
            )
    found = ablation._difference(pairs["channels"], pairs["latents"], "sparsity")
    means = []
    for chosen in draw.integers(0, 200, (1000, 200)):
        times = np.bincount(chosen, minlength=200)
        a, b = (
            (pair["sparsity"].numpy(), times[pair["document"].numpy()])
            for pair in (pairs["channels"], pairs["latents"])
        )
        means.append((a[0] * a[1]).sum() / a[1].sum() - (b[0] * b[1]).sum() / b[1].sum())
    assert found["value"] == pytest.approx(np.mean(means), abs=0.005) and found[
        "se"
    ] == pytest.approx(np.std(means), rel=0.1)
    assert found["se"] < pairs["latents"].mean("sparsity")["se"]


# ---- the positions


def test_positions_are_kept_attended_far_enough_and_of_different_contexts(small_acts):
    acts = small_acts(lm_batch=4, borders="split")
    lm = LM(acts=acts)
    part, result = run(make_sae(acts, lm.d_model), lm, acts, ablation_positions=8)
    sites = part.sample.sites()
    assert len(sites) == result["n_positions"] == 8
    rows = {}
    for batch in HeldOut(lm, acts, OPTIONS):
        for i, tokens in enumerate(batch.contexts.tokens.tolist()):
            rows[tuple(tokens), int(batch.contexts.documents[i, 0])] = (
                batch.contexts.keep[i],
                int(batch.contexts.attention[i].sum()),
            )
    assert len({(tuple(site.tokens.tolist()), site.document) for site in sites}) == 8
    for site in sites:
        keep, text = rows[tuple(site.tokens.tolist()), site.document]
        assert (
            keep[site.position]
            and site.position >= 1
            and site.position + 4 <= text == site.text
            and site.length == 4
        )


def offered(size, contexts=100, seed=0, length=20, batch=10):
    sample = ablation._SiteSample(size, 4, ablation._random(seed, 0))
    tokens = torch.arange(contexts)[:, None].expand(-1, length)
    full = torch.ones(contexts, length, dtype=torch.bool)
    keep = full.clone()
    keep[:, 0] = False
    for first in range(0, contexts, batch):
        part = slice(first, first + batch)
        sample.update(TokenBatch(tokens[part], full[part], keep[part], tokens[part]))
    return sample.sites()


def test_never_more_than_asked_for_drawn_evenly_whatever_the_batches():
    found = [offered(10, seed=seed) for seed in range(300)]
    assert all(len(sites) == 10 for sites in found)
    counts = np.bincount([site.document for sites in found for site in sites], minlength=100)
    assert counts.mean() == 30 and 0.7 < counts.var() / (30 * 0.9) < 1.4
    positions = np.bincount([site.position for sites in found for site in sites], minlength=17)
    assert (
        positions[0] == 0 and len(positions) == 17 and (positions[1:] > 130).all()
    )  # of 187.5 expected
    assert [site[1:] for site in offered(10, batch=7)] == [site[1:] for site in offered(10)]
    assert [site.document for site in found[0]] == sorted(site.document for site in found[0])


def test_a_text_with_fewer_contexts_gives_fewer_positions_and_says_so(subject):
    acts, lm = subject
    result = run(make_sae(acts, lm.d_model), lm, acts, ablation_positions=10_000)[1]
    assert 6 < result["n_positions"] < 10_000
    assert any(
        f"the text has {result['n_positions']} contexts with a position to ablate, one each, not 10000"
        in note
        for note in result["notes"]
    )
    assert run(make_sae(acts, lm.d_model), lm, acts)[1]["notes"] == []


def test_a_short_context_lowers_the_horizon_and_says_so(subject):
    acts, lm = subject
    part, result = run(make_sae(acts, lm.d_model), lm, acts, ablation_horizon=16)
    assert result["horizon"] == 15 and {site.position for site in part.sample.sites()} == {1}
    assert result.arrays["kl"].shape[1] == 15
    assert any(
        "ablation_horizon: contexts of 16 tokens leave room for 15, not 16" in note
        for note in result["notes"]
    )


def test_texts_that_are_too_short_everywhere_are_refused(small_acts, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("<|endoftext|>".join(f"the cat {i}" for i in range(200)))
    acts = small_acts(lm_batch=4, borders="split", text=str(file))
    lm = LM(acts=acts)
    with pytest.raises(
        InputError,
        match="no context of the text has a kept position with 11 tokens after it, .* --ablation-horizon",
    ):
        run(make_sae(acts, lm.d_model), lm, acts, ablation_horizon=12)


def test_the_same_seed_gives_the_same_result_and_another_seed_another(subject, small_acts):
    acts, lm = subject
    sae = make_sae(acts, lm.d_model)
    one, same, other = (run(sae, lm, acts, seed=seed)[1] for seed in (3, 3, 4))
    assert dict(one) == dict(same) and dict(one) != dict(other)
    assert all(
        torch.equal(one.arrays[name].nan_to_num(9), same.arrays[name].nan_to_num(9))
        for name in one.arrays
    )
    larger = small_acts(lm_batch=9)
    found = run(sae, LM(acts=larger), larger, seed=3)[1]
    assert torch.equal(found.arrays["pair_latent"], one.arrays["pair_latent"]) and torch.equal(
        found.arrays["latent"], one.arrays["latent"]
    )
    assert found["ablation_sparsity"]["value"] == pytest.approx(
        one["ablation_sparsity"]["value"], rel=1e-4
    )


def test_the_result_does_not_depend_on_how_much_is_run_at_a_time(subject, monkeypatch):
    acts, lm = subject
    sae = make_sae(acts, lm.d_model)
    expected = run(sae, lm, acts)[1]
    monkeypatch.setattr(ablation, "_BYTES", 1)
    found = run(sae, lm, acts)[1]
    assert torch.equal(found.arrays["pair_latent"], expected.arrays["pair_latent"])
    for name in ("ablation_sparsity", "channel_sparsity", "kl"):
        assert found[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-3), name


# ---- tables of single latents


@pytest.fixture(params=["pack", "split"])
def tables(request, small_acts):
    acts = small_acts(lm_batch=4, borders=request.param)
    lm = LM(acts=acts)
    sae = make_sae(acts, lm.d_model)
    return acts, lm, sae, run(sae, lm, acts, ablation_latents=0)[1].arrays


def test_tables_are_of_each_latents_strongest_activation(tables):
    acts, lm, sae, arrays = tables
    best = torch.zeros(64)
    for batch in HeldOut(lm, acts, OPTIONS):
        best = torch.maximum(best, SAEBatch(sae, batch).code.dense(64).amax(0))
    assert sorted(arrays["latent"].tolist()) == best.nonzero().squeeze(1).tolist()
    torch.testing.assert_close(arrays["value"], best[arrays["latent"].long()])
    for latent, tokens, position, value in zip(
        *(arrays[name] for name in ("latent", "context_tokens", "position", "value"))
    ):
        x = lm.acts(*row(tokens[tokens >= 0].long()))[0, position]
        assert sae.encode(x).dense(64)[latent].item() == pytest.approx(value.item(), rel=1e-4)


def test_tables_hold_the_effect_of_the_latents_presence(tables):
    acts, lm, sae, arrays = tables
    for i in range(len(arrays["latent"])):
        text = int((arrays["context_tokens"][i] >= 0).sum())
        position = int(arrays["position"][i])
        site = ablation.AblationSite(
            arrays["context_tokens"][i].long(), text, position, 0, min(4, text - position)
        )
        x = x_at(lm, site)
        contribution = (
            arrays["value"][i] * sae.W_dec[arrays["latent"][i].long()] * sae.normalize(x).scale
        )
        clean, ablated = logits_with(lm, site, x), logits_with(lm, site, x - contribution)
        assert arrays["sparsity"][i].item() == pytest.approx(slow(ablated - clean), rel=1e-2)
        present = clean - ablated
        present = (
            present - present.sort(-1).values[:, [-(-lm.vocab // 2)]]
        )  # the upper middle one: the lower of ablated - clean
        n = site.length
        torch.testing.assert_close(
            arrays["up_values"][i, :n].double(), present.topk(5).values, rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            arrays["down_values"][i, :n].double(),
            present.topk(5, largest=False).values,
            rtol=1e-3,
            atol=1e-4,
        )
        torch.testing.assert_close(
            arrays["up_values"][i, :n].double(),
            present.gather(1, arrays["up_tokens"][i, :n].long()),
            rtol=1e-3,
            atol=1e-4,
        )
        assert (
            (arrays["up_tokens"][i, n:] == -1).all()
            and (arrays["down_values"][i, n:] == 0).all()
            and arrays["kl"][i, n:].isnan().all()
        )
        p, q = clean.log_softmax(-1), ablated.log_softmax(-1)
        torch.testing.assert_close(
            arrays["kl"][i, :n].double(), (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-5
        )
        following = site.tokens[position + 1 : position + 1 + n]
        following = following[following >= 0]
        there = len(following)
        torch.testing.assert_close(
            arrays["loss_difference"][i, :there].double(),
            (p - q)[torch.arange(there), following],
            rtol=1e-3,
            atol=1e-4,
        )
        assert arrays["loss_difference"][i, there:].isnan().all()


def test_a_latent_that_writes_one_tokens_direction_raises_that_token(small_acts):
    """Known effect: after the last block, a latent along an unembedding row."""
    acts = small_acts(lm_batch=4, site="resid_post.2")
    lm = LM(acts=acts)
    lm.model.lm_head.weight.data = lm.model.lm_head.weight.data.clone()
    lm.model.lm_head.weight.data[42] = 20 * torch.eye(16)[0] - 20 * torch.eye(16)[1]
    sae = SAE(Shape(16, 2, 1, "none"), {"acts": dataclasses.asdict(acts)})
    sae.b_enc.data = torch.tensor([5.0, -5.0])
    sae.W_dec.data[0] = (torch.eye(16)[0] - torch.eye(16)[1]) / math.sqrt(2)
    arrays = run(sae, lm, acts)[1].arrays
    assert arrays["latent"].tolist() == [0] and arrays["value"].tolist() == [5.0]
    assert arrays["up_tokens"][0, 0, 0] == 42 and arrays["up_values"][0, 0, 0] > 1


def test_latents_of_tables_come_first_in_one_random_order(subject):
    acts, lm = subject
    sae = make_sae(acts, lm.d_model)
    few, more, all_ = (
        run(sae, lm, acts, ablation_latents=m)[1].arrays["latent"].tolist() for m in (3, 12, 0)
    )
    assert few == more[:3] == all_[:3] and more == all_[:12] and len(more) == 12
    assert all_ != sorted(all_)


def test_only_contexts_that_are_needed_are_remembered(subject):
    acts, lm = subject
    part, _ = run(make_sae(acts, lm.d_model), lm, acts, ablation_latents=2)
    assert len(part.strongest._contexts) <= 2


# ---- with the others


def test_it_is_one_of_the_evaluations(subject, monkeypatch, tmp_path):
    acts, lm = subject
    monkeypatch.setitem(registry.EVALS, "ablation", Ablation)
    seen = []
    results = runner.evaluate(
        make_sae(acts, lm.d_model),
        lm,
        ["stats", "ablation"],
        OPTIONS,
        observe=lambda *what: seen.append(what),
    )
    assert (
        results["ablation"]["options"]["ablation_error"] == "keep"
        and results["ablation"]["n_positions"] == 6
    )
    assert ("2 of 2: ablation: ablating at random positions", 6, 6) in seen
    assert ("2 of 2: ablation: ablating where latents are strongest", 7, 7) in seen
    runner.write_results(RunFolder(tmp_path), results)
    assert (
        RunFolder(tmp_path).eval("ablation")["horizon"] == 4
        and RunFolder(tmp_path).arrays_file("ablation").is_file()
    )


def test_a_bfloat16_lm_gets_a_note(small_acts):
    acts = small_acts(lm_batch=4, lm_dtype="bfloat16")
    lm = LM(acts=acts)
    result = run(make_sae(acts, lm.d_model), lm, acts)[1]
    assert (
        any("computes in bfloat16" in note for note in result["notes"])
        and 0 < result["ablation_sparsity"]["value"] < 1
    )


def test_the_two_parts_of_the_sparsity_are_told_apart():
    """An effect on one token at the position itself, on all tokens alike but one later, and on nothing."""
    differences = torch.zeros(3, 4, 10)
    differences[0, 0, 3] = 2.0
    differences[1, 0, 3] = 2.0
    differences[1, 2, :4] = 1.0
    effects = ablation.measure(
        torch.zeros(4, 10).log_softmax(-1), differences, torch.tensor([1, 2, 3, -1])
    )
    assert effects.later.tolist() == pytest.approx([0, 0.5, math.nan], nan_ok=True)
    assert effects.sparsity_here.tolist() == pytest.approx([0.1, 0.1, math.nan], nan_ok=True)
    assert effects.sparsity.tolist() == pytest.approx(
        [1 / 40, (2 + 4) ** 2 / (4 + 4) / 40, math.nan], nan_ok=True
    )
