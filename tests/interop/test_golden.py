"""Files that the libraries wrote, and what they make of them: bench/interop.py --golden made both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ksparse import interop

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "interop"
KINDS = sorted(path.parent for path in GOLDEN.glob("*/*/sae"))
BOUND = 1e-5


def differences(sae, expected):
    x = torch.from_numpy(expected["x"])
    with torch.no_grad():
        latents, recon = sae.encode(x).dense(sae.shape.n_latents), sae(x)
    return abs(latents.numpy() - expected["latents"]).max(), abs(
        recon.numpy() - expected["recon"]
    ).max()


def test_there_is_a_golden_file_of_every_format():
    assert {kind.parent.name for kind in KINDS} == set(interop.FORMATS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.parent.name}-{kind.name}")
def test_files_that_a_library_wrote_give_its_own_numbers(kind):
    expected = np.load(kind / "expected.npz")
    assert (expected["latents"] > 0).any() and (expected["latents"] == 0).any()
    latents, recon = differences(interop.load(kind / "sae"), expected)
    assert latents <= BOUND and recon <= BOUND


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.parent.name}-{kind.name}")
def test_files_written_again_in_the_same_format_still_give_them(kind, tmp_path):
    sae = interop.load(kind / "sae")
    again = interop.convert(kind / "sae", tmp_path / "again", kind.parent.name)
    assert again.shape.n_latents == sae.shape.n_latents
    expected = dict(np.load(kind / "expected.npz"))
    if kind.name == "AutoEncoderTopK-backup":  # folded so that decoder rows stay of norm 1
        assert sae.shape.normalize == "dataset" and again.shape.normalize == "none"
        expected["latents"] = expected["latents"] / sae.shape.factor
    latents, recon = differences(again, expected)
    assert latents <= BOUND and recon <= BOUND
