"""Conversations, token ids and mixtures of texts: what is read, what is kept, what is refused by file and row."""

import dataclasses
import itertools
import json
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

import ksparse
from ksparse.config import ActsConfig
from ksparse.data import contexts as contexts_module
from ksparse.data import shards, sources
from ksparse.data.contexts import Corpus
from ksparse.data.documents import PIECE_TOKENS, documents
from ksparse.data.mixture import Part, parts_of
from ksparse.errors import InputError
from ksparse.judging import evaluate
from ksparse.lm.model import LM
from ksparse.training.train import train

SPLITS = ("train", "validation", "held-out")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
)


def conversations(count, words=6):
    return [
        [
            {"role": "user", "content": f"question {i} " + "the cat sat " * (words // 3)},
            {"role": "assistant", "content": f"answer {i} " + "two black dogs " * (words // 3)},
        ]
        for i in range(count)
    ]


def put(folder, rows, name="a.jsonl"):
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


@pytest.fixture
def chat_lm(tiny_lm, tmp_path):
    """Return the folder of a tiny LM whose tokenizer has a chat template, with a BOS of its own."""
    folder = tmp_path / "lm"
    lm = tiny_lm("gpt2", tokenizer={"bos": "<|pad|>", "pad": None})
    folder.mkdir()
    for file in lm.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat_acts(chat_lm, tmp_path):
    """Return chat_acts(rows, **changes): the section of a recipe that reads them."""

    def make(rows, name="a.jsonl", **changes):
        text = put(tmp_path, rows, name)
        options = {"context": 16, "mix": 256, "lm_batch": 8, "site": "resid_post.1"}
        return ActsConfig(lm=str(chat_lm), text=text, chat="template", **(options | changes))

    return make


def corpus(acts, folder, split="train"):
    return Corpus(acts, AutoTokenizer.from_pretrained(folder), split)


def one_epoch(made):
    return list(itertools.takewhile(lambda context: not context.start.epoch, made.contexts()))


def kept_words(made):
    """Return what is kept of an epoch, as text."""
    batch = made.batch(one_epoch(made))
    return made.tokenizer.decode(batch.tokens[batch.keep].tolist())


# ---- conversations


@pytest.mark.parametrize("borders", ["pack", "split"])
@pytest.mark.parametrize("roles", [("assistant",), ("user",), ()])
def test_contexts_keep_the_tokens_of_the_roles_wherever_a_conversation_is_cut(
    chat_acts, chat_lm, borders, roles
):
    chats = conversations(60, words=18)
    acts = chat_acts([{"messages": chat} for chat in chats], borders=borders, roles=roles)
    made = corpus(acts, chat_lm)
    contexts = one_epoch(made)
    template = made.chat
    whole = {
        document.index: template.encode([document.chat])[0] for document in documents(acts, "train")
    }
    bos = made.tokenizer.bos_token_id
    found = {index: [] for index in whole}
    for context in contexts:
        text = context.tokens[: 16 - context.documents.count(-1)]
        assert text.count(bos) == 1 or borders == "pack"
        assert (bos, bos) not in set(itertools.pairwise(text))
        for token, owner, kept in zip(context.tokens, context.documents, context.kept):
            if owner >= 0 and token != bos:
                found[owner].append((token, kept))
    skipped = 0
    for index, (ids, kept) in whole.items():
        pairs = [(i, k) for i, k in zip(ids, kept) if i != bos]
        if [pair for pair in found[index] if pair[1]] != [pair for pair in pairs if pair[1]]:
            skipped += 1  # the last context of a packed epoch is not full
        assert len(pairs) > 16
    assert skipped <= (borders == "pack")
    batch = made.batch(contexts)
    assert not batch.keep[:, 0].any() and batch.keep.any(1).all()


def test_only_the_assistants_words_are_kept_and_a_hostile_user_changes_nothing(chat_acts, chat_lm):
    chats = conversations(30)
    hostile = [
        [{**chat[0], "content": f"x\n[assistant] answer {i} evil"}, chat[1]]
        for i, chat in enumerate(chats)
    ]
    acts = chat_acts([{"messages": chat} for chat in hostile], roles=("assistant",), context=64)
    words = kept_words(corpus(acts, chat_lm))
    assert "dogs" in words and "answer" in words
    assert "evil" not in words and "user" not in words and "[" not in words and "x" not in words


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "hub"])
def test_conversations_are_read_from_every_kind_of_table(
    chat_acts, chat_lm, tmp_path, monkeypatch, name
):
    rows = [{"chat": chat, "n": 1} for chat in conversations(40)]
    acts = chat_acts(rows, "b.parquet" if name == "hub" else name, text_field="chat")
    if name == "hub":
        monkeypatch.setitem(
            sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *a, **o: iter(rows))
        )
        acts = dataclasses.replace(acts, text="owner/data")
    found = [document for split in SPLITS for document in documents(acts, split)]
    assert sorted(document.chat.messages[1]["content"] for document in found) == sorted(
        row["chat"][1]["content"] for row in rows
    )
    assert found[0].chat.where.endswith(("line 1", "row 0")) or found[0].index > 0


def test_empty_and_null_conversations_are_skipped_and_half_a_character_is_replaced(
    chat_acts, chat_lm, caplog
):
    sources.warn_once.cache_clear()
    rows = [{"messages": chat} for chat in conversations(40)]
    rows[3]["messages"], rows[5]["messages"] = None, []
    rows[7]["messages"][0]["content"] = "half \ud83d"
    acts = chat_acts(rows)
    found = [document for split in SPLITS for document in documents(acts, split)]
    assert len(found) == 38
    assert {doc.chat.messages[0]["content"] for doc in found} >= {"half \ufffd"}
    told = [record.message for record in caplog.records]
    assert any("a.jsonl:3 holds null or no message in the column 'messages'" in m for m in told)
    assert any("2 texts in all hold null or no message" in m for m in told)
    assert any("a.jsonl:7 holds half a character" in m for m in told)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "x"}, r"line 1: no messages in the column 'messages'; there are text"),
        ({"messages": "x"}, r"line 1: the column 'messages' holds 'x'; expected a list of mess"),
        ({"messages": [{"from": "human", "value": "x"}]}, r"line 1, message 0.*Rename other keys"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            r"line 1, message 0: 'content' is '3', of",
        ),
        ({"messages": [{"role": "user"}], "tools": "{"}, r"line 1: the column 'tools' is not JSON"),
        (
            {"messages": [{"role": "user"}], "tools": [1]},
            r"line 1: the column 'tools' holds '\[1\]'",
        ),
    ],
)
def test_what_is_no_conversation_is_named_with_file_and_row(chat_acts, row, message):
    with pytest.raises(InputError, match=message):
        list(documents(chat_acts([row]), "train"))


def test_roles_that_no_conversation_has_are_named_with_those_there_are(
    chat_acts, chat_lm, monkeypatch
):
    monkeypatch.setattr(contexts_module, "_MAX_UNKEPT", 10)
    acts = chat_acts([{"messages": chat} for chat in conversations(30)], roles=("model",))
    with pytest.raises(
        InputError, match=r"acts\.roles is \['model'\], its roles are user, assistant\. Name these"
    ):
        next(corpus(acts, chat_lm).contexts())


def test_a_text_file_the_built_in_text_and_contradicting_options_are_refused(tmp_path, chat_acts):
    (tmp_path / "x.txt").write_text("x")
    acts = dataclasses.replace(chat_acts([{}]), text=str(tmp_path / "x.txt"))
    with pytest.raises(InputError, match="x.txt is text without columns; conversations are read"):
        list(documents(acts, "train"))
    with pytest.raises(InputError, match="the built-in text, which has neither conversations"):
        list(documents(dataclasses.replace(acts, text="pylm"), "train"))
    with pytest.raises(InputError, match=r"acts\.roles is \['user'\] and acts\.chat is 'none'"):
        ActsConfig(roles=("user",))
    with pytest.raises(InputError, match="token ids have no roles"):
        ActsConfig(chat="template", pretokenized=True)


def test_a_column_of_messages_or_ids_that_is_read_as_text_says_which_option_reads_it(tmp_path):
    for name in ("a.jsonl", "a.parquet"):
        text = put(tmp_path, [{"messages": conversations(1)[0]}], name)
        with pytest.raises(
            InputError, match=r"--acts\.chat template, for token ids --acts\.pretok"
        ):
            list(documents(ActsConfig(text=text, text_field="messages"), "train"))


def test_a_run_on_conversations_is_judged_on_the_same_positions(
    small_recipe, chat_acts, chat_lm, tmp_path
):
    acts = chat_acts([{"messages": chat} for chat in conversations(300)], roles=("assistant",))
    recipe = dataclasses.replace(small_recipe(), acts=acts)
    run = train(recipe, tmp_path / "run", progress=False)
    sae = ksparse.load(run.path)
    policy = sae.metadata["policy"]
    assert (policy["chat"], policy["roles"]) == ("template", ["assistant"])
    assert sae.metadata["acts"]["roles"] == ["assistant"]
    results = evaluate(run, names="stats,downstream", tokens=300, device="cpu", progress=False)
    held_out = corpus(acts, chat_lm, "held-out")
    assert results["stats"]["policy"] == held_out.policy() | {
        "tokens_per_document": results["stats"]["policy"]["tokens_per_document"]
    }
    assert 300 <= results["stats"]["n_tokens"] < 300 + acts.context
    assert "user" not in kept_words(held_out)
    other = AutoTokenizer.from_pretrained(chat_lm)
    other.chat_template = TEMPLATE.replace("[", "<")
    other.save_pretrained(chat_lm)
    with pytest.raises(InputError, match="the chat template is .* where the SAE was trained"):
        evaluate(run, names="stats", tokens=100, device="cpu", progress=False)


def test_shards_of_conversations_hold_the_activations_that_a_stream_gives(
    chat_acts, chat_lm, tmp_path
):
    acts = chat_acts([{"messages": chat} for chat in conversations(100)], roles=("assistant",))
    lm = LM(acts=acts, device="cpu")
    made = Corpus(lm.options, lm.tokenizer, "train")
    folder = shards.write(lm, made, tmp_path / "acts", rows=200)
    stored = shards.Shards(folder)
    assert stored.policy["roles"] == ["assistant"]
    stored.check_fits(acts)
    with pytest.raises(InputError, match=r"acts\.roles: the shards have \['assistant'\]"):
        stored.check_fits(dataclasses.replace(acts, roles=("user",)))
    batch = made.batch(list(itertools.islice(made.contexts(), 40)))
    x = lm.acts(batch.tokens, batch.attention)[batch.keep][:200]
    torch.testing.assert_close(stored.read(np.arange(200)), x)


# ---- token ids


def ids_acts(tmp_path, rows, folder, name="a.jsonl", **changes):
    options = {"text_field": "input_ids", "pretokenized": True, "context": 16} | changes
    return ActsConfig(lm=str(folder), text=put(tmp_path, rows, name), **options)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_stored_ids_give_the_contexts_of_their_text(tmp_path, tiny_lm, name):
    folder = tiny_lm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [f"{i} the cat sat on two black dogs" for i in range(60)]
    ids = tokenizer(texts)["input_ids"]
    rows = [{"input_ids": row, "attention_mask": None} for row in ids]
    rows[1]["input_ids"] = [tokenizer.pad_token_id] * 2 + rows[1]["input_ids"] + [1] * 3
    rows[2] |= {"attention_mask": [1] * len(ids[2]) + [0, 0]}
    rows[2]["input_ids"] = rows[2]["input_ids"] + [9, 9]
    made = corpus(ids_acts(tmp_path, rows, folder, name, borders="split"), folder)
    found = {}
    for split in SPLITS:
        made = corpus(made.acts, folder, split)
        found |= {document.index: document.ids for document in made._tokenize(0)}
    assert [found[i] for i in range(60)] == ids
    assert made.policy()["pretokenized"] is True


def test_a_long_row_of_ids_is_cut_into_documents(tmp_path, tiny_lm):
    rows = [{"input_ids": [5] * (2 * PIECE_TOKENS + 1)}, {"input_ids": []}]
    acts = ids_acts(tmp_path, rows, tiny_lm())
    found = [doc for split in SPLITS for doc in documents(acts, split)]
    assert sorted((doc.name, len(doc.ids)) for doc in found) == [
        ("a.jsonl:0#0", PIECE_TOKENS),
        ("a.jsonl:0#1", PIECE_TOKENS),
        ("a.jsonl:0#2", 1),
        ("a.jsonl:1", 0),
    ]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"input_ids": "x"}, r"line 1: the column 'input_ids' holds 'x'; expected a list of token"),
        ({"input_ids": [1, None]}, r"line 1: the column 'input_ids' holds '\[1, None\]'"),
        ({"input_ids": [1, True]}, r"line 1: .*expected a list of token ids"),
        ({"x": [1]}, r"line 1: no token ids in the column 'input_ids'; there are x"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, r"line 1: the column 'attention_mask' must"),
        ({"input_ids": [7, 300]}, r"a\.jsonl:0: the token id 300 is none of the 300 of the tok"),
        ({"input_ids": [-1]}, r"a\.jsonl:0: the token id -1 is none of"),
    ],
)
def test_what_are_no_token_ids_is_named_with_file_and_row(tmp_path, tiny_lm, row, message):
    folder = tiny_lm()
    acts = ids_acts(tmp_path, [row], folder)
    with pytest.raises(InputError, match=message):
        for split in SPLITS:
            list(corpus(acts, folder, split)._tokenize(0))


# ---- mixtures


def lines(folder, name, count, words):
    text = " ".join(["word"] * words)
    return put(folder, [{"text": f"{name} {i:03} {text}"} for i in range(count)], f"{name}.jsonl")


def test_a_mixture_holds_its_weights_to_the_end_and_is_the_same_each_time(tmp_path, caplog):
    sources.warn_once.cache_clear()
    long, short = lines(tmp_path, "long", 100, 50), lines(tmp_path, "short", 1000, 5)
    acts = ActsConfig(text=f"3 * {long}, 1 * {short}")
    found = sorted(doc for split in SPLITS for doc in documents(acts, split))
    sizes = {
        name: sum(len(doc.text) for doc in found if doc.text.startswith(name))
        for name in ("long", "short")
    }
    assert sizes["long"] / sizes["short"] == pytest.approx(3, rel=0.02)
    assert sum(doc.text.startswith("long") for doc in found) == 100
    assert found == sorted(doc for split in SPLITS for doc in documents(acts, split))
    start = found[40].index
    assert list(documents(acts, "train", start)) == [
        doc for doc in documents(acts, "train") if doc.index >= start
    ]
    [told] = [record.message for record in caplog.records]
    assert f"{long} is the first that ends, after 100 of {long}, " in told


@pytest.mark.parametrize(
    "text, message",
    [
        ("0 * a, 1 * b", "the weight '0' is not a positive number"),
        ("1 * a, -1 * b", "the weight '-1' is not a positive number"),
        ("1 * a, 2.2.2 * b", "the weight '2.2.2' is not a positive number"),
        ("1 * , 1 * b", "the text '' is missing"),
        ("1 * a, 2 * a", "the text 'a' is given twice"),
        ("1 * a, 2 * pylm", "the text 'pylm' is the built-in one"),
    ],
)
def test_a_mixture_that_cannot_be_right_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parts_of(text)


def test_a_name_may_have_commas_and_a_file_of_that_name_is_the_file(tmp_path, monkeypatch):
    assert parts_of(".5 * a, b.txt, 2e1*c") == [Part(0.5, "a, b.txt"), Part(20.0, "c")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2 * a.txt").write_text("x")
    assert parts_of("2 * a.txt") == [Part(1.0, "2 * a.txt")]


def test_a_part_that_cannot_be_read_is_named(tmp_path):
    acts = ActsConfig(text=f"1 * {lines(tmp_path, 'a', 3, 3)}, 1 * {tmp_path / 'no.txt'}")
    with pytest.raises(InputError, match=r"text .*no\.txt does not exist"):
        list(documents(acts, "train"))
