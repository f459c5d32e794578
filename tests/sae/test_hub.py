"""Autoencoders on the Hub, on its own layout on this machine: nothing is fetched."""

from __future__ import annotations

import pytest
import torch

import ksparse
from ksparse.errors import InputError
from ksparse.sae.model import SAE, Shape


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that puts a folder of an SAE into the Hub's cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def publish(sae: SAE, repository: str, subfolder: str = "") -> None:
        home = tmp_path / f"models--{repository.replace('/', '--')}"
        commit = "0" * 40
        ksparse.save(
            sae,
            home / "snapshots" / commit / subfolder if subfolder else home / "snapshots" / commit,
        )
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text(commit)

    return publish


@pytest.mark.parametrize("subfolder", ["", "layer_8"])
def test_a_repository_is_loaded_by_its_name(hub, subfolder):
    sae = SAE(Shape(4, 8, 2))
    sae.W_enc.data.normal_()
    hub(sae, "somebody/saes", subfolder)
    assert torch.equal(ksparse.load("somebody/saes", subfolder=subfolder).W_enc, sae.W_enc)


def test_a_repository_that_is_not_to_be_had_is_named(hub):
    with pytest.raises(
        InputError,
        match="nobody/nothing is neither a folder here nor a Hub repository that can be reached",
    ):
        ksparse.load("nobody/nothing")
