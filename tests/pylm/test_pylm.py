"""The built-in subject: text that is there with every Python, split for good, and a model of it."""

import itertools
import math
import sysconfig
from pathlib import Path

import pytest
import torch

from ksparse import pylm
from ksparse.lm.model import LM
from ksparse.pylm.text import EXCLUDED, SPLITS


@pytest.fixture(scope="module")
def names():
    return {split: [name for name, _ in pylm.documents(split)] for split in SPLITS}


@pytest.fixture(scope="module")
def lm():
    if not (pylm.folder("0.3m") / "model.safetensors").is_file():
        pytest.skip("the built-in model is not in this checkout")
    return LM("pylm/0.3m", "resid_post.1")


def test_splits_of_the_text_are_disjoint_and_in_their_shares(names):
    every = [name for split in names.values() for name in split]
    assert len(set(every)) == len(every) > 300
    for split, part in SPLITS.items():
        assert len(names[split]) / len(every) == pytest.approx(len(part) / 100, abs=0.05)
    assert sorted(number for part in SPLITS.values() for number in part) == list(range(100))


def test_the_text_is_the_standard_library_and_nothing_of_installed_packages(names):
    root = Path(sysconfig.get_paths()["stdlib"])
    every = [name for split in names.values() for name in split]
    assert all(
        name.endswith(".py") and not Path(name).is_absolute() and (root / name).is_file()
        for name in every
    )
    assert not any(set(Path(name).parts) & EXCLUDED for name in every)
    assert not any("site-packages" in name or "torch" in Path(name).parts for name in every)
    assert {"argparse.py", "json/decoder.py"} <= set(every)


def test_a_file_never_changes_sides(names):
    """It goes by a hash of its path alone: these must hold on any machine and for any version of Python."""
    where = {name: split for split, part in names.items() for name in part}
    sides = {
        "argparse.py": "train",
        "json/decoder.py": "held-out",
        "ast.py": "held-out",
        "heapq.py": "train",
        "typing.py": "train",
    }
    assert {name: where[name] for name in sides} == sides


def test_the_order_is_that_of_a_hash_and_the_same_each_time(names):
    again = [name for name, _ in itertools.islice(pylm.documents("train"), 50)]
    assert again == names["train"][:50] != sorted(again)


def test_documents_are_text_with_unix_line_ends():
    for _, source in itertools.islice(pylm.documents("validation"), 40):
        assert source and "\r\n" not in source


def test_an_unknown_split_or_size_is_named():
    with pytest.raises(
        ValueError,
        match="split 'test' of the built-in text does not exist; there are train, validation, held-out",
    ):
        next(pylm.documents("test"))
    with pytest.raises(
        ValueError, match=r"built-in model '1b' does not exist; there are 0\.3m, 1\.9m, 7\.6m"
    ):
        pylm.folder("1b")
    assert pylm.folder() == pylm.folder(pylm.DEFAULT) and pylm.DEFAULT in pylm.SIZES


def test_the_tokenizer_gives_source_code_back(lm):
    for _, source in itertools.islice(pylm.documents("held-out"), 15):
        ids = lm.tokenizer(source, add_special_tokens=False, verbose=False)["input_ids"]
        assert (
            lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == source
            and max(ids) < lm.vocab
        )
    for text in ("\tif x:\n        return 'é😀'\n", "   \n\n", "a  b", "\x00\x7f"):
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_smallest_model_loads_and_knows_python(lm):
    assert lm.d_model == 64 and lm.tokenizer.bos_token_id == 0 and lm.tokenizer.pad_token_id == 1
    ids = lm.tokenize(dict(pylm.documents("held-out")).popitem()[1])[:, :128]
    logits = lm.run_with_cache(ids, torch.ones_like(ids, dtype=torch.bool)).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert loss < 0.8 * math.log(lm.vocab)


def test_the_loss_falls_with_compute(lm):
    table = pylm.loss_table(pylm.folder("0.3m"))
    flops, losses = zip(*table)
    assert len(table) > 5 and list(flops) == sorted(flops) and losses[-1] < losses[0]


def test_a_folder_without_a_log_has_no_table(tmp_path):
    assert pylm.loss_table(tmp_path) == []
