"""Matryoshka SAEs of other libraries: their prefixes are read, and written as they read them."""

import json
from pathlib import Path

import pytest
import torch

from ksparse import interop
from ksparse.interop import foreign
from ksparse.sae.model import SAE, Shape

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "interop"
THEIRS = {
    "sae_lens/matryoshka": [4, 8],
    "sae_lens/matryoshka-training": [4, 8],
    "dictionary_learning/MatryoshkaBatchTopKSAE": None,
}


def widths_in(folder):
    return json.loads((folder / "cfg.json").read_text())["metadata"][
        "training_architecture_details"
    ]["matryoshka_widths"]


@pytest.mark.parametrize("name", THEIRS)
def test_prefixes_are_read_and_are_in_what_is_written_again(name, tmp_path):
    sae = interop.load(GOLDEN / name / "sae")
    n, prefixes = sae.shape.n_latents, sae.metadata["prefixes"]
    groups = torch.load(GOLDEN / name / "sae" / "ae.pt")["group_sizes"] if "dict" in name else None
    expected = THEIRS[name] or groups.cumsum(0).tolist()[:-1]
    assert prefixes == expected and 0 < prefixes[0] and prefixes[-1] < n
    for form in ("sae_lens", "dictionary_learning"):
        if form == "dictionary_learning" and sae.shape.activation != "batch_topk":
            continue  # a threshold for each latent is a JumpReLU there
        interop.write(sae, tmp_path / form, form)
        (tmp_path / form / interop.SIDECAR).unlink()
        (tmp_path / form / "manifest.json").unlink()
        assert interop.load(tmp_path / form).metadata["prefixes"] == expected


@pytest.mark.parametrize("prefixes", [[], [4, 10]], ids=str)
def test_ours_is_a_matryoshka_there_where_it_records_prefixes(prefixes, tmp_path):
    sae = SAE(Shape(6, 24, 3, "none", activation="batch_topk"), {"prefixes": prefixes})
    with torch.no_grad():
        for weight in sae.parameters():
            weight.normal_()
        sae.normalize_decoder_()
        sae.threshold.fill_(0.4)
    x = torch.randn(9, 6)
    for form in ("sae_lens", "dictionary_learning"):
        interop.write(sae, tmp_path / form, form)
        torch.testing.assert_close(interop.load(tmp_path / form)(x), sae(x))
    weights = foreign.load_torch_dict(tmp_path / "dictionary_learning" / "ae.pt")
    trainer = json.loads((tmp_path / "dictionary_learning" / "config.json").read_text())["trainer"]
    if not prefixes:
        assert trainer["dict_class"] == "BatchTopKSAE" and "group_sizes" not in weights
        return
    assert trainer["dict_class"] == "MatryoshkaBatchTopKSAE"
    assert weights["group_sizes"].tolist() == trainer["group_sizes"] == [4, 6, 14]
    assert widths_in(tmp_path / "sae_lens") == [4, 10, 24]
