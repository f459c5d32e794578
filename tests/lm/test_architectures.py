"""On every architecture an alias is what its definition says, or is refused with the reason; the table
in the docs says which."""

import os
from pathlib import Path

import pytest

from ksparse.lm.sites import ALIASES

from ..conftest import ROOT, build_tokenizer
from .architectures import Row, Wrong, examine, kinds, line, page

TABLE = ROOT / "docs/architectures.md"
FAST = (
    "gpt2 llama gemma3_text qwen2 qwen3_next mamba jamba bloom mpt olmo2 gpt_oss granite opt bert"
).split()
"""Of each family of blocks one: what runs by default."""


@pytest.mark.parametrize("kind", FAST)
def test_aliases_are_right_or_refused_and_the_table_says_so(kind, tmp_path):
    assert line(examine(kind, tmp_path, build_tokenizer)) in TABLE.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_no_class_of_the_registry_is_silently_wrong(tmp_path):
    rows: list[Row] = []
    wrong: dict[str, str] = {}
    for kind in kinds():
        folder = Path(tmp_path / kind)
        try:
            rows.append(examine(kind, folder, build_tokenizer))
        except Wrong as error:
            wrong[kind] = str(error)
    assert not wrong
    assert sum(row.is_built for row in rows) >= 150
    if os.environ.get("KSPARSE_WRITE_TABLE"):
        TABLE.write_text(page(rows))
    assert TABLE.read_text() == page(rows)


def test_a_multimodal_lm_is_read_in_its_text_decoder_never_in_its_vision_tower(tmp_path):
    """Its vision tower has more layers."""
    row = examine("gemma4", tmp_path, build_tokenizer)
    assert {len(found) for found in row.verdicts.values()} == {4}
    assert not any(row.verdicts["resid_post"].values()) and not row.problem


def test_attention_that_does_not_add_the_stream_is_not_taken_for_one_that_does(tmp_path):
    """MPT: a dropout reads what its attention gives, BLOOM's attention adds the stream itself."""
    for kind in ("mpt", "bloom"):
        row = examine(kind, tmp_path / kind, build_tokenizer)
        assert all(not any(row.verdicts[alias].values()) for alias in ALIASES)


def test_a_norm_behind_the_sum_leaves_no_stream_to_add_to(tmp_path):
    row = examine("bart", tmp_path, build_tokenizer)
    assert all(row.verdicts["mlp_out"].values()) and not any(row.verdicts["resid_post"].values())


def test_hashing_that_differs_between_passes_is_refused(tmp_path):
    row = examine("reformer", tmp_path, build_tokenizer)
    assert "two passes over the same tokens do not agree" in row.problem
