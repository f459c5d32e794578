"""The harvest benchmark counts the work of the pass that it times, and refuses what cannot be."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from ksparse import bench, cli
from ksparse.bench.harvest import Product, count_work
from ksparse.data.contexts import Corpus
from ksparse.errors import InputError
from ksparse.lm.model import LM

SMALL = {"site": "resid_post.1", "context": 16, "lm_batch": (2, 3), "rounds": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def found(tiny_lm, text_file):
    setting = bench.HarvestSetting(lm=str(tiny_lm("llama")), text=str(text_file), **SMALL)
    return setting, bench.bench_harvest(setting)


def test_flops_are_those_of_the_products_and_of_attention_up_to_the_site(found):
    setting, result = found
    lm = LM(setting.lm, setting.site)
    parameters = sum(
        part.numel()
        for name, part in lm.model.named_parameters()
        if part.ndim == 2 and ("layers.0." in name or "layers.1." in name)
    )
    config = lm.model.config
    width = config.num_attention_heads * getattr(config, "head_dim", 0) or config.hidden_size
    attention = 2 * 2 * 2 * setting.context * width  # layers, products, an addition with each
    for size, row in result["batches"].items():
        assert row["tokens"] == int(size) * setting.context > row["kept"] > 0
        assert row["flops_per_token"] == 2 * parameters + attention


def test_speeds_and_shares_follow_from_what_was_measured(found):
    _, result = found
    assert set(result["batches"]) == {"2", "3"} and result["lm_dtype"] == "float32"
    for row in result["batches"].values():
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["best_tokens_per_s"] >= row["tokens_per_s"]
        assert row["share"] > 0 and row["share_processor"] > 0


def test_what_is_timed_is_what_training_reads(small_acts):
    acts = small_acts()
    lm = LM(acts=acts)
    corpus = Corpus(acts, lm.tokenizer, "train")
    contexts = [context for context, _ in zip(corpus.contexts(), range(3))]
    batch = corpus.batch(contexts)
    expected = lm.acts(batch.tokens, batch.attention)[batch.keep]
    assert torch.equal(bench.harvest.harvest(lm, corpus, contexts), expected)


def test_products_of_linear_layers_and_of_conv1d_are_counted_in_inference_mode():
    a, layer = torch.randn(2, 3, 4), torch.nn.Linear(4, 5)
    with torch.inference_mode():
        work = count_work(lambda: layer(a))
    assert work.products == {Product(6, 4, 5): 1} and work.flops == 2 * 6 * 4 * 5


def test_the_command_prints_a_line_for_each_size_and_writes_json(
    tiny_lm, text_file, capsys, tmp_path
):
    file = tmp_path / "harvest.json"
    words = ["--site", "resid_post.0", "--context", "8", "--lm-batch", "2", "--rounds", "1"]
    lm, text = str(tiny_lm("gpt2")), str(text_file)
    cli.main(["bench", "--lm", lm, "--text", text, *words, "--device", "cpu", "--json", str(file)])
    out = capsys.readouterr().out
    assert "up to resid_post.0, contexts of 8, float32" in out and "tokens/s" in out
    assert json.loads(file.read_text())["batches"]["2"]["tokens"] == 16


def test_flags_of_the_step_are_refused_beside_lm(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--lm", "pylm/0.3m", "--n", "64"])
    assert end.value.code == 2 and "--n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_batch": ()}, r"lm_batch of a benchmark is \(\); give whole numbers from 1"),
        ({"lm_batch": (4, 0)}, r"lm_batch of a benchmark is \(4, 0\)"),
        ({"rounds": 0}, "rounds of a benchmark is 0"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        bench.HarvestSetting(lm="pylm/0.3m", **change)


def test_a_site_before_every_product_is_refused(tiny_lm, text_file):
    setting = bench.HarvestSetting(
        lm=str(tiny_lm("llama")), text=str(text_file), **SMALL | {"site": "model.embed_tokens"}
    )
    with pytest.raises(InputError, match="has no matrix product; give another --site"):
        bench.bench_harvest(setting)


class Pretender:
    """A contestant of bench/harvest.py that answers from a list."""

    def __init__(self, name, square, *seconds):
        self.name = name
        self.answers = [{"ready": square}, *({"wall": s, "processor": s} for s in seconds)]

    def answer(self):
        return self.answers.pop(0)

    ask = answer


@pytest.fixture
def measure():
    script = Path(__file__).resolve().parents[1] / "bench" / "harvest.py"
    return runpy.run_path(str(script))["measure"]


def test_libraries_are_compared_by_the_median_of_ratios_in_a_round(measure):
    ours, other = Pretender("ours", 1.0, 1.0, 2.0, 4.0), Pretender("other", 1.0, 2.0, 6.0, 4.0)
    found = measure([ours, other], 3)
    assert found["other"]["wall_ratio"] == 2 and found["ours"]["processor_ratio"] == 1


def test_a_library_that_reads_other_activations_is_an_error(measure):
    with pytest.raises(SystemExit, match="other reads other activations"):
        measure([Pretender("ours", 1.0), Pretender("other", 1.1)], 1)
