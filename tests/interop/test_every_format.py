"""Every format: a file as its makers write it is judged by all default evaluations, reported and viewed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ksparse.evals.registry import DEFAULT

from . import test_published as layouts
from .test_judged import SMALL

MAKERS = sorted((Path(__file__).resolve().parents[1] / "golden" / "interop").glob("*/*/sae"))
PUBLISHED = ["gemma_scope_2", "qwen_scope", "llama_scope", "goodfire"]


def published(kind, folder):
    """Write an SAE of width 8 in a published layout; return its place."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(16, 8, generator=g), dim=1)
    w = {"W_enc": rows.T.contiguous(), "W_dec": rows.clone()}
    w |= {"b_enc": torch.zeros(16), "b_dec": torch.zeros(8), "threshold": torch.full((16,), 0.3)}
    if kind == "gemma_scope_2":
        config = layouts.gemma_2_config("model.layers.1.output", width=16)
        return layouts.gemma_scope_2(folder, w, config)
    if kind == "qwen_scope":
        layouts.write_json(folder / "config.json", {"k": 3, "hook_point": "resid_post"})
        return layouts.qwen(folder / "layer1.sae.pt", w)
    if kind == "llama_scope":
        changes = {"d_model": 8, "d_sae": 16, "hook_point_in": "blocks.1.hook_resid_post"}
        return layouts.llama_scope(
            folder, w, **changes, hook_point_out="blocks.1.hook_resid_post", norm_activation=None
        )
    folder.mkdir(parents=True)
    keys = {key.replace(".", "_linear."): value for key, value in layouts.linear(w).items()}
    torch.save(keys, folder / "Llama-3.1-8B-Instruct-SAE-l1.pth")
    return folder / "Llama-3.1-8B-Instruct-SAE-l1.pth"


@pytest.mark.slow
@pytest.mark.parametrize(
    "made", [*MAKERS, *PUBLISHED], ids=lambda made: "-".join(Path(made).parts[-3:-1]) or made
)
def test_every_makers_file_is_judged_by_all_default_evaluations_reported_and_viewed(
    made, tiny_lm, text_file, tmp_path, verb
):
    sae = published(made, tmp_path / "published") if isinstance(made, str) else made
    out = tmp_path / "results"
    lm = tiny_lm("llama", hidden_size=8, head_dim=4)
    flags = ["--lm", lm, "--site", "resid_post.1", "--text", text_file, "--context", 16]
    suite = tmp_path / "suite"
    suite.mkdir()
    rows = [{"text": f"{('the cat', 'dogs')[i % 2]} saw {i}", "label": i % 2} for i in range(100)]
    (suite / "cats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = verb("eval", sae, *flags, *SMALL, "--suite", suite, "--out", out, "--force")
    assert code == 0, err
    assert {file.stem for file in (out / "evals").glob("*.json")} == {*DEFAULT, "vocabulary"}
    losses = json.loads((out / "evals" / "downstream.json").read_text())
    assert losses["ce_spliced"]["value"] > 0 and losses["n_tokens"] > 0
    assert "damaged" not in (out / "report.html").read_text()
    code, _, err = verb("view", out, "--export", tmp_path / "site")
    assert code == 0, err
