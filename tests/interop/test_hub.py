"""A repository's folder: what is in it is what its card says, and loads from the Hub's layout on this machine. Nothing is uploaded."""

from __future__ import annotations

import re

import pytest
import torch

import ksparse
from ksparse import interop
from ksparse.config.evaluation import EvalConfig
from ksparse.errors import InputError
from ksparse.evals import runner
from ksparse.interop import hub


@pytest.fixture(scope="module")
def published(request, tmp_path_factory):
    """Put a folder into the Hub's cache on this machine, under a repository's name."""
    from huggingface_hub import constants

    cache = tmp_path_factory.mktemp("hub")
    patch = pytest.MonkeyPatch()
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    request.addfinalizer(patch.undo)

    def publish(repository: str, make) -> None:
        home = cache / f"models--{repository.replace('/', '--')}"
        make(home / "snapshots" / ("0" * 40))
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("0" * 40)

    return publish


def test_a_run_is_a_repository_that_ksparse_and_sae_lens_can_load(
    small_recipe, tmp_path, published
):
    run = ksparse.train(small_recipe({"acts.normalize": "layer_norm"}), tmp_path / "run")
    sae = ksparse.load(run.path)
    runner.write_results(
        run,
        ksparse.evaluate(sae, None, ["downstream", "stats"], EvalConfig(tokens=200, device="cpu")),
    )
    published("somebody/small", lambda folder: hub.prepare(run.path, folder, "somebody/small"))
    loaded, copy = (
        ksparse.load("somebody/small"),
        ksparse.load("somebody/small", subfolder="sae_lens"),
    )
    x = torch.randn(20, sae.shape.d_model)
    for again in (loaded, copy):
        assert torch.equal(again(x), sae(x)) and again.metadata == sae.metadata


def test_the_card_says_what_it_is_how_to_load_it_and_what_was_measured_how(make_sae, tmp_path):
    results = {
        "stats": {
            "nmse": {"value": 0.0863, "se": 0.0017},
            "l0": {"value": 4.0, "se": None},
            "options": {"tokens": 200},
            "policy": {"context": 16},
            "text": "t",
            "n_tokens": 200,
            "n_documents": 9,
        }
    }
    card = hub.card(
        make_sae("topk", "dataset"), "somebody/small", subfolder="layer_8", results=results
    )
    for text in (
        "library_name: ksparse",
        "tags: [sparse-autoencoder, topk, saelens]",
        "base_model: gpt2",
        'ksparse.load("somebody/small", subfolder="layer_8")',
        'SAE.from_pretrained("somebody/small", "layer_8/sae_lens")',
        "| site | resid_post.8 |",
        "| normalisation of inputs | dataset, times 0.3 |",
        "| normalised MSE (1 = predicting the mean) | 0.0863 ± 0.0017 | stats |",
        '"policy": {"context": 16}',
        "| k | 4 |",
    ):
        assert text in card, text


def test_the_code_in_the_card_runs(make_sae, published):
    sae = make_sae()
    card = hub.card(sae, "somebody/other")
    published("somebody/other", lambda folder: ksparse.save(sae, folder))
    names: dict = {"x": torch.randn(3, 6)}
    exec(re.search(r"```python\n(import ksparse.*?)```", card, re.DOTALL)[1], names)
    assert names["code"].values.shape == (3, 4)


def test_the_card_says_why_there_is_no_copy_for_sae_lens(make_sae, tmp_path):
    ksparse.save(make_sae("topk", "unit_norm"), tmp_path / "sae")
    hub.prepare(tmp_path / "sae", tmp_path / "a", "somebody/small")
    assert not (tmp_path / "a" / "sae_lens").exists()
    card = (tmp_path / "a" / "README.md").read_text()
    assert (
        "There is no copy for SAELens: sae_lens cannot hold this SAE's normalisation, unit_norm"
        in card
        and "saelens" not in card.split("---")[1]
    )
    hub.prepare(tmp_path / "sae", tmp_path / "b", "somebody/small", normalization="layer_norm")
    assert interop.load(tmp_path / "b" / "sae_lens").shape.normalize == "layer_norm"


def test_an_upload_sends_that_folder(make_sae, tmp_path, monkeypatch):
    import huggingface_hub

    ksparse.save(make_sae(), tmp_path / "sae")
    done = {}

    class Api:
        def create_repo(self, repository, **options):
            done["made"] = (repository, options["private"])

        def upload_folder(self, *, repo_id, folder_path, path_in_repo, commit_message):
            done["sent"] = (
                repo_id,
                path_in_repo,
                sorted(file.name for file in folder_path.iterdir()),
            )

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert (
        hub.push(tmp_path / "sae", "somebody/small", subfolder="a", private=True)
        == "https://huggingface.co/somebody/small"
    )
    assert done == {
        "made": ("somebody/small", True),
        "sent": ("somebody/small", "a", ["README.md", "sae.json", "sae.safetensors", "sae_lens"]),
    }


def test_an_upload_that_fails_says_what_to_do(make_sae, tmp_path):
    ksparse.save(make_sae(), tmp_path / "sae")
    with pytest.raises(
        InputError,
        match="somebody/small could not be written on the Hub .*log in with `hf auth login`, or write the same folder here with --folder DIR",
    ):
        hub.push(tmp_path / "sae", "somebody/small")


@pytest.mark.parametrize("name", ["small", "a/b/c", "some body/x"])
def test_a_name_that_is_not_owner_slash_name_is_refused(name, make_sae, tmp_path):
    ksparse.save(make_sae(), tmp_path / "sae")
    with pytest.raises(
        InputError, match="is not the name of a repository on the Hub; give OWNER/NAME"
    ):
        hub.prepare(tmp_path / "sae", tmp_path / "a", name)


def test_the_command_writes_a_folder_without_uploading(make_sae, tmp_path, capsys):
    from ksparse import cli

    ksparse.save(make_sae(), tmp_path / "sae")
    cli.main(["push", str(tmp_path / "sae"), "somebody/small", "--folder", str(tmp_path / "a")])
    assert (tmp_path / "a" / "README.md").is_file() and str(
        tmp_path / "a"
    ) in capsys.readouterr().out
