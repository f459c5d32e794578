"""Any SAE is judged, shown and used by the same commands as a run of ours."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

import ksparse
from ksparse.config.evaluation import EvalConfig
from ksparse.errors import CorruptError, InputError
from ksparse.evals.registry import DEFAULT
from ksparse.lm import provenance
from ksparse.lm.model import LM
from ksparse.storage.run_folder import RunFolder, open_run

D, N = 16, 24
QUICK = ["--tokens", 200, "--per-document", 64, "--device", "cpu"]
SMALL = [
    *QUICK, "--probe-rows", 40, "--latents", 6, "--n2g-examples", 4, "--ngram-tokens", 500,
    "--ablation-positions", 2, "--ablation-latents", 8, "--ablation-horizon", 2,
]  # fmt: skip


@pytest.fixture
def weights():
    """Weights of an SAE that reconstructs somewhat: W_enc [n, d] and W_dec [n, d]."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(N, D, generator=g), dim=1)
    return {
        "W_enc": rows.clone(),
        "W_dec": rows,
        "b_enc": torch.zeros(N),
        "b_dec": 0.1 * torch.randn(D, generator=g),
    }


def sae_lens(folder, w, **metadata):
    folder.mkdir()
    config = {"d_in": D, "d_sae": N, "architecture": "topk", "k": 4, "dtype": "float32"}
    config |= {
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    (folder / "cfg.json").write_text(json.dumps({**config, "metadata": metadata}))
    save_file({**w, "W_enc": w["W_enc"].T.contiguous()}, folder / "sae_weights.safetensors")
    return folder


def sparsify(folder, w):
    folder.mkdir()
    config = {
        "activation": "topk",
        "expansion_factor": 1,
        "normalize_decoder": True,
        "num_latents": N,
    }
    (folder / "cfg.json").write_text(
        json.dumps(
            {
                **config,
                "k": 4,
                "multi_topk": False,
                "skip_connection": False,
                "transcode": False,
                "d_in": D,
            }
        )
    )
    save_file(
        {
            "encoder.weight": w["W_enc"],
            "encoder.bias": w["b_enc"],
            "W_dec": w["W_dec"],
            "b_dec": w["b_dec"],
        },
        folder / "sae.safetensors",
    )
    return folder


def dictionary_learning(folder, w):
    folder.mkdir()
    (folder / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoderTopK", "k": 4}}')
    torch.save(
        {
            "encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"],
            "decoder.weight": w["W_dec"].T.contiguous(), "b_dec": w["b_dec"], "k": torch.tensor(4),
        },
        folder / "ae.pt",
    )  # fmt: skip
    return folder


def gemma_scope(folder, w):
    import numpy as np

    folder.mkdir()
    arrays = {key: value.numpy() for key, value in w.items()}
    np.savez(
        folder / "params.npz",
        **arrays | {"W_enc": arrays["W_enc"].T, "threshold": np.full(N, 0.3, "f")},
    )
    return folder


def goodfire(folder, w):
    folder.mkdir()
    linear = {"encoder_linear.weight": w["W_enc"], "encoder_linear.bias": w["b_enc"]}
    linear |= {
        "decoder_linear.weight": w["W_dec"].T.contiguous(),
        "decoder_linear.bias": w["b_dec"],
    }
    file = folder / "Llama-3.1-8B-Instruct-SAE-l1.pth"
    torch.save(linear, file)
    return file


FORMATS = [sae_lens, sparsify, dictionary_learning, gemma_scope, goodfire]


@pytest.fixture
def where(small_acts):
    """Flags that name the LM, site and text."""
    acts = small_acts()
    return ["--lm", acts.lm, "--site", acts.site, "--text", acts.text, "--context", acts.context]


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_an_sae_of_any_format_is_judged_shown_and_used(make, weights, where, tmp_path, verb):
    sae, out = make(tmp_path / "theirs", weights), tmp_path / "results"
    code, printed, err = verb("eval", sae, "stats", "downstream", *where, *QUICK, "--out", out)
    assert code == 0, err
    assert "explained_variance" in printed and (out / "report.html").is_file()
    subject = json.loads((out / "subject.json").read_text())
    assert subject["sae"]["format"] == make.__name__ and subject["acts"]["site"] == "resid_post.1"
    page = (out / "report.html").read_text()
    assert "Nothing is known of its training" in page and make.__name__ in page
    assert "--out runs/again" in page and "training never saw" not in page
    assert verb("report", out)[0] == 0
    code, printed, err = verb("view", out, "--export", tmp_path / "site")
    assert code == 0, err
    near = next((tmp_path / "site").glob("ksparse-*/data/near/0.js")).read_text()
    assert "[" in near
    prompt = ["--prompt", "the cat sat on", "--device", "cpu"]
    code, printed, err = verb("attribute", out, *prompt, "--toward", "a")
    assert code == 0 and "ksparse steer" in printed, err
    code, again, err = verb("attribute", sae, *where[:4], *where[6:], *prompt, "--toward", "a")
    assert code == 0, err
    for line, known in zip(again.splitlines()[:3], printed.splitlines()[:3]):
        assert known.startswith(line), "the folder only adds what is known of the latent"
    code, printed, err = verb(
        "steer", sae, *where[:4], *prompt, "--latent", 1, "--value", 3, "--tokens", 3
    )
    assert code == 0 and "as it is the cat sat on" in printed, err


def test_an_sae_that_does_not_say_its_conversations_is_judged_on_some(
    weights, where, tmp_path, verb
):
    lm, sae = tmp_path / "chat", sae_lens(tmp_path / "theirs", weights)
    shutil.copytree(where[1], lm)
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(lm)
    rows = [
        {"talk": [{"role": role, "content": f"the cat {i}"} for role in ("user", "assistant")]}
        for i in range(400)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--lm", lm, "--site", where[3], "--text", tmp_path / "chats.jsonl", *QUICK]
    chat = ["--text-field", "talk", "--chat", "template", "--roles", "assistant"]
    code, _, err = verb("eval", sae, "stats", *flags, *chat, "--out", tmp_path / "out")
    assert code == 0, err
    policy = json.loads((tmp_path / "out" / "evals" / "stats.json").read_text())["policy"]
    assert policy["chat"] == "template" and policy["roles"] == ["assistant"]
    code, _, err = verb("eval", sae, "stats", *flags, "--text-field", "talk")
    assert code == 2 and "talk" in err and "chat" in err


def test_all_default_evaluations_of_a_foreign_sae_are_kept_reported_and_viewed(
    weights, where, tmp_path, verb
):
    sae, out = sae_lens(tmp_path / "theirs", weights), tmp_path / "results"
    suite = tmp_path / "suite"
    suite.mkdir()
    rows = [
        {"text": f"{('the cat', 'black dogs')[i % 2]} saw {i}", "label": i % 2} for i in range(40)
    ]
    (suite / "cats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [*SMALL, "--suite", suite]
    code, _, err = verb("eval", sae, *where, *small, "--out", out)
    assert code == 0, err
    assert {file.stem for file in (out / "evals").glob("*.json")} == {*DEFAULT, "vocabulary"}
    code, _, err = verb("eval", out, *small)
    assert code == 0 and f"kept     {', '.join(DEFAULT)}" in err, "the folder knows its subject"
    page = (out / "report.html").read_text()
    for words in ("Somers", "damaged", "was not run"):
        assert words not in page
    code, _, err = verb("view", out, "--export", tmp_path / "site")
    assert code == 0, err
    for form, name in (("atoms", "atoms"), ("neuronpedia", "np")):
        code, _, err = verb(
            "convert", out, tmp_path / name, "--to", form, "--model", "tiny", "--creator", "me"
        )
        assert code == 0, err


def test_what_the_file_does_not_say_is_asked_for_with_the_flags_all_at_once(
    weights, where, tmp_path, verb
):
    sae = dictionary_learning(tmp_path / "theirs", weights)
    code, _, err = verb("eval", sae, "stats", *QUICK, "--out", tmp_path / "out")
    assert code == 2
    assert f"{sae} does not say its lm, site and text; give --lm, --site and --text" in err
    code, _, err = verb("eval", sae, "stats", *where[2:4], *QUICK)
    assert "does not say its lm and text; give --lm and --text" in err
    code, _, err = verb("steer", sae, *where[2:4], "--latent", 1, "--value", 1, "--prompt", "a")
    assert code == 2 and "does not say its lm; give --lm" in err
    assert not (tmp_path / "out").exists()
    code, printed, err = verb("eval", sae, "stats", *where, *QUICK)
    assert code == 0 and "explained_variance" in printed, "without --out numbers are printed"


def test_what_the_file_says_is_taken(weights, where, small_acts, tmp_path, verb):
    acts = small_acts()
    says = {"model_name": acts.lm, "hook_name": "blocks.1.hook_resid_post", "context_size": 16}
    sae, out = sae_lens(tmp_path / "theirs", weights, **says), tmp_path / "out"
    code, _, err = verb("eval", sae, "stats", "--text", acts.text, *QUICK, "--out", out)
    assert code == 0, err
    read = open_run(out).subject().acts
    assert (read.lm, read.site, read.context) == (acts.lm, "resid_post.1", 16)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--site", "resid_post.0"], "site is 'resid_post.0', but 'resid_post.1' where"),
        (["--context", 64], "--context is 64, but 16 where it was trained"),
        (["--bos", "none"], "--bos is 'none', but 'auto' where it was trained"),
    ],
    ids=str,
)
def test_what_contradicts_the_file_is_an_error_that_names_both_and_a_note_by_force(
    flags, message, weights, small_acts, tmp_path, verb
):
    acts = small_acts()
    says = {"model_name": acts.lm, "hook_name": "blocks.1.hook_resid_post", "context_size": 16}
    sae = sae_lens(tmp_path / "theirs", weights, **says, prepend_bos=True)
    call = [
        "eval",
        sae,
        "positions",
        "--text",
        acts.text,
        *flags,
        *QUICK,
        "--out",
        tmp_path / "out",
    ]
    code, _, err = verb(*call)
    assert code == 2 and message in err and "--force True" in err
    assert not (tmp_path / "out").exists()
    code, _, err = verb(*call, "--force")
    assert code == 0, err
    result = open_run(tmp_path / "out").eval("positions")
    value = flags[1]
    assert any(repr(value) in note for note in result["notes"])
    assert value in (result["site"], result["policy"]["context"]) or flags[0] == "--bos"
    assert verb("eval", tmp_path / "out", "stats", *QUICK)[0] == 0, "the folder remembers it"


def test_another_lm_of_the_hub_is_a_contradiction_and_another_folder_a_warning(small_acts):
    acts = small_acts()
    lm = LM(acts=acts)
    metadata = {"origin": {"lm": "google/gemma-2-2b", "site": acts.site}}
    assert "one LM under two names" in provenance.check(metadata, lm)[0]
    lm.folder = None  # as of a model on the Hub
    with pytest.raises(InputError, match="lm is .*gpt2.*, but 'google/gemma-2-2b' where"):
        provenance.check(metadata, lm)
    assert "by force: lm is" in provenance.check(metadata, lm, force=True)[0]


def test_an_sae_of_another_width_is_an_error_even_by_force(weights, where, tmp_path, verb):
    wide = {"W_enc": torch.eye(N), "W_dec": torch.eye(N), "b_enc": torch.zeros(N)}
    sae = dictionary_learning(tmp_path / "theirs", wide | {"b_dec": torch.zeros(N)})
    code, _, err = verb("eval", sae, "stats", *where, *QUICK, "--out", tmp_path / "o", "--force")
    assert code == 2 and "the SAE is for d_model = 24" in err and "has 16 at resid_post.1" in err
    assert not (tmp_path / "o").exists()


def test_the_folder_of_one_sae_takes_no_other_and_no_other_site(
    weights, where, small_recipe, tmp_path, verb
):
    first, out = sparsify(tmp_path / "a", weights), tmp_path / "out"
    assert verb("eval", first, "positions", *where, *QUICK, "--out", out)[0] == 0
    second = sparsify(tmp_path / "b", weights | {"b_enc": torch.ones(N)})
    code, _, err = verb("eval", second, "positions", *where, *QUICK, "--out", out)
    assert code == 2 and "holds results of something else: the SAE is" in err and "--out" in err
    for flag, value in (("--site", "resid_post.0"), ("--text", str(first)), ("--context", 8)):
        code, _, err = verb("eval", first, "positions", *where, flag, value, *QUICK, "--out", out)
        assert code == 2 and f"{flag[2:]} is " in err and f"and '{value}' now" in err
    same = shutil.copytree(first, tmp_path / "copy")
    code, _, err = verb("eval", same, "positions", *where, *QUICK, "--out", out)
    assert code == 0 and "kept     positions" in err, "the weights tell, not the place"
    code, _, err = verb("eval", first, "positions", *where, *QUICK, "--out", first)
    assert code == 2 and "holds other files; give a new folder with --out" in err
    run = ksparse.train(small_recipe(), tmp_path / "run")
    code, _, err = verb("eval", first, "positions", *where, *QUICK, "--out", run.path)
    assert code == 2 and "is a run, which keeps only results of its own SAE" in err
    code, _, err = verb("eval", run.path, "positions", "--site", "resid_post.0", *QUICK)
    assert code == 2 and "give a folder for those with --site: --out DIR" in err
    code, _, err = verb("eval", first, run.path, *where, *QUICK)
    assert code == 2 and "one by one" in err and "ksparse compare" in err
    code, _, err = verb("eval", run.path, "positions", *QUICK, "--out", tmp_path / "other")
    assert code == 0, err
    assert (
        "held-out text" in verb("report", tmp_path / "other")[1]
        or open_run(tmp_path / "other").subject().judged.held_out
    )


def test_an_sae_that_moved_or_changed_is_one_clear_error(weights, where, tmp_path, verb):
    sae, out = sparsify(tmp_path / "theirs", weights), tmp_path / "out"
    assert verb("eval", sae, "stats", *where, *QUICK, "--out", out)[0] == 0
    together = tmp_path / "elsewhere"
    together.mkdir()
    shutil.copytree(sae, together / "theirs")
    shutil.copytree(out, together / "out")
    assert torch.equal(ksparse.load(together / "out").W_dec, weights["W_dec"])
    sae.rename(tmp_path / "moved")
    for call in (["view", out, "--export", tmp_path / "site"], ["eval", out, "downstream", *QUICK]):
        code, _, err = verb(*call)
        assert code == 2 and "which is not there any more" in err and str(sae) in err
    assert verb("report", out)[0] == 0, "the page needs no weights"
    sparsify(sae, weights | {"b_enc": torch.ones(N)})
    code, _, err = verb("view", out, "--export", tmp_path / "site")
    assert code == 2 and "is not the one that" in err and "SHA-256" in err
    with pytest.raises(InputError, match="is not the one that"):
        ksparse.load(out)


def test_a_damaged_subject_is_named(weights, where, tmp_path, verb):
    sae, out = sparsify(tmp_path / "theirs", weights), tmp_path / "out"
    assert verb("eval", sae, "positions", *where, *QUICK, "--out", out)[0] == 0
    file = out / "subject.json"
    table = json.loads(file.read_text())
    for changes, message in (
        ({"sae": {}}, "altered"),
        ({"sae": {}, "sha256": None}, "altered|sae.source"),
    ):
        file.write_text(json.dumps(table | changes))
        with pytest.raises(CorruptError, match=message):
            open_run(out)
    with pytest.raises(InputError, match="holds results of an SAE, not a run"):
        RunFolder(out).recipe()
    with pytest.raises(InputError, match="ksparse eval SAE --out DIR"):
        open_run(tmp_path)


def test_convert_names_the_place_that_the_file_does_not(weights, tmp_path, verb):
    sae = dictionary_learning(tmp_path / "theirs", weights)
    place = ["--lm", "gpt2", "--site", "blocks.8.hook_resid_post"]
    code, _, err = verb("convert", sae, tmp_path / "lens", "--to", "sae_lens", *place)
    assert code == 0, err
    metadata = json.loads((tmp_path / "lens" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.8.hook_resid_post"
    code, _, err = verb(
        "convert", tmp_path / "lens", tmp_path / "x", "--to", "sae_lens", "--lm", "b"
    )
    assert code == 2 and "--lm is 'b', but its metadata say 'gpt2'" in err


def test_in_python_another_site_than_the_files_own_raises_unless_told(
    weights, small_acts, tmp_path
):
    acts = small_acts()
    folder = sae_lens(tmp_path / "theirs", weights, hook_name="blocks.0.hook_resid_post")
    sae, lm = ksparse.load(folder), LM(acts=acts)
    options = EvalConfig(tokens=100, per_document=64, examples=0, device="cpu")
    with pytest.raises(InputError, match="site is 'resid_post.1', but 'resid_post.0' where"):
        ksparse.evaluate(sae, lm, ["stats"], options)
    result = ksparse.evaluate(sae, lm, ["stats"], options, force=True)["stats"]
    assert any(note.startswith("by force: site is") for note in result["notes"])
