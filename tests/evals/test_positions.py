"""Error by position, against sums over the whole text."""

import pytest
import torch

from ksparse.config.evaluation import EvalConfig
from ksparse.data.contexts import Corpus
from ksparse.evals import runner
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Shape


@pytest.mark.parametrize("keep", ["text", "all"])
def test_positions_are_those_of_the_text_and_add_up_to_the_whole(small_acts, keep):
    lm = LM(acts=small_acts(keep=keep))
    sae = SAE(Shape(16, 64, 4))
    torch.manual_seed(0)
    with torch.no_grad():
        sae.W_dec.normal_(), sae.normalize_decoder_(), sae.W_enc.copy_(sae.W_dec)
    options = EvalConfig(tokens=10**6, device="cpu", examples=1)
    found = runner.evaluate(sae, lm, ["positions", "stats", "downstream"], options)
    positions, stats = found["positions"], found["stats"]
    corpus = Corpus(lm.options, lm.tokenizer, "held-out", per_document=options.per_document)
    counts, norms, errors = (
        torch.zeros(16),
        torch.zeros(16, dtype=torch.float64),
        torch.zeros(16, dtype=torch.float64),
    )
    rows = []
    for context in corpus.contexts():
        if context.start.epoch:
            break
        contexts = corpus.batch([context])
        x = lm.acts(contexts.tokens, contexts.attention)
        normal = sae.normalize(x).x
        with torch.no_grad():
            wrong = (sae.decode_normalized(sae.encode(x)) - normal).double().square().sum(-1)
        counts += contexts.keep[0]
        norms += (x.double().norm(dim=-1) * contexts.keep)[0]
        errors += (wrong * contexts.keep)[0]
        rows.append(normal[contexts.keep])
    there = counts > 0
    assert positions["positions"] == there.nonzero().squeeze(1).tolist() and positions["positions"][
        0
    ] == (1 if keep == "text" else 0)
    x = torch.cat(rows).double()
    baseline = (x - x.mean(0)).square().sum(1).mean()
    assert [each["value"] for each in positions["norm"]] == pytest.approx(
        (norms / counts)[there].tolist(), rel=1e-5
    )
    assert [each["value"] for each in positions["error"]] == pytest.approx(
        (errors / counts / baseline)[there].tolist(), rel=1e-4
    )
    whole = (
        sum(each["value"] * count for each, count in zip(positions["error"], counts[there]))
        / counts.sum()
    )
    assert whole == pytest.approx(stats["nmse"]["value"], rel=1e-4)
    assert positions["predicted"] == [at for at in positions["positions"] if at < 15]
    assert all(each["se"] is None or each["se"] >= 0 for each in positions["ce_delta"])
