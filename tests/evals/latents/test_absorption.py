"""Absorption: a planted absorbed case is found, and none of the cases that only look like it."""

import numpy as np
import pytest
import torch

from ksparse.config.evaluation import EvalConfig
from ksparse.evals import runner
from ksparse.evals.latents import absorption
from ksparse.evals.latents.absorption import Labelled, absorbed_cases
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Shape

PLAIN, ABSORBED, ELSEWHERE = (1, 2, 3), 4, (5, 6)
"""Tokens 1 to 4 have the label, 5 and 6 do not; of those with it, 4 is the special case."""


def planted(fires, writes):
    """Return tokens whose label latent is 0; fires(token) gives their latents, writes[latent] its direction."""
    tokens = np.tile(np.array([*PLAIN, ABSORBED, *ELSEWHERE]), 40)
    train = np.arange(len(tokens)) % 12 < 6
    pairs = [(row, latent) for row, token in enumerate(tokens) for latent in fires(int(token))]
    row, latent = np.array(pairs).T
    x = torch.zeros(len(tokens), 4)
    x[:, 0] = torch.from_numpy(tokens < 5)
    x[:, 1] = torch.from_numpy(tokens == ABSORBED)
    decoder = torch.tensor(writes, dtype=torch.float)
    data = Labelled(tokens, train, row, latent, np.ones(len(row)), x, decoder)
    return data, (tokens < 5).astype(np.int8)


def absorbing(token):
    """Latent 0 fires on the label, but latent 1 takes token 4; latent 2 fires on all others."""
    return [1] if token == ABSORBED else [0] if token in PLAIN else [2]


ALONG = [[1, 0, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 1, 0]]


def found(fires, writes=ALONG):
    result = absorbed_cases(*planted(fires, writes), str)
    return result, {case["token"]: case["absorbed"] for case in result["cases"]}


def test_a_case_that_another_latent_takes_is_absorbed_and_the_others_are_not():
    result, absorbed = found(absorbing)
    assert absorbed == {"1": False, "2": False, "3": False, "4": True}
    assert result["latent"] == 0 and result["known"] and result["precision"] == 1
    assert result["recall"] == pytest.approx(0.75)
    (case,) = [case for case in result["cases"] if case["absorbed"]]
    assert (
        case["other"] == 1
        and case["other_recall"] == 1
        and case["carried"] == pytest.approx(0.95, abs=0.01)
    )


@pytest.mark.parametrize(
    "fires, writes",
    [
        (lambda token: absorbing(token) + [0] * (token == ABSORBED), ALONG),  # not silent
        (
            lambda token: [2] if token in ELSEWHERE else [0] * (token != ABSORBED),
            ALONG,
        ),  # nobody takes it
        (
            lambda token: [1] if token == ABSORBED or token in ELSEWHERE else [0],
            ALONG,
        ),  # not its own
        (absorbing, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]),  # writes nothing of the label
    ],
    ids=["not silent", "not taken", "not its own", "carries nothing"],
)
def test_what_only_looks_absorbed_is_not(fires, writes):
    assert not any(found(fires, writes)[1].values())


def test_too_few_tokens_are_not_asked_about():
    data, label = planted(absorbing, ALONG)
    label = np.where(np.cumsum(label == 1) > 8, -1, label)
    assert absorbed_cases(data, label, str) is None


def test_first_letters_and_python_labels_are_asked_of_the_text_that_has_them(
    small_acts, monkeypatch
):
    monkeypatch.setattr(absorption, "LEAST", 2)
    options = EvalConfig(tokens=20_000, device="cpu", split="train")
    sae = SAE(Shape(16, 64, 4))
    with torch.no_grad():
        sae.W_dec.normal_(generator=torch.Generator().manual_seed(0))
        sae.normalize_decoder_(), sae.W_enc.copy_(sae.W_dec)
    words = runner.evaluate(sae, LM(acts=small_acts()), ["absorption"], options)["absorption"]
    assert {label["source"] for label in words["labels"].values()} == {"first letter"}
    lm = LM(acts=small_acts(text="pylm", context=32))
    python = runner.evaluate(sae, lm, ["absorption"], options)["absorption"]
    assert {label["source"] for label in python["labels"].values()} == {"first letter", "Python"}
    assert 0 <= python["n_known"] <= python["n_labels"] == len(python["labels"])


@pytest.mark.parametrize(
    "string, letter", [(" The", "t"), ("dog", "d"), ("9x", ""), (" ", ""), ("é", ""), ("a_b", "")]
)
def test_the_first_letter_is_of_words_alone(string, letter):
    assert absorption._first_letter(string) == letter
