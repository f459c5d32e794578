"""What a warm start saves: the SAE of a base LM for its chat model, and a small SAE for a larger one.

    python bench/warm_start.py chat DIR      base to chat: a fresh SAE against `sae.start`, at ever fewer tokens
    python bench/warm_start.py grow DIR      n to 2n: a fresh one of 2n latents against a grown one

`chat` tunes pylm/0.3m on conversations that are made of the standard library: the user gives the name
and first line of documentation of a function, the assistant its source. Then it trains an SAE on the base LM, and
SAEs on the chat model, on the assistant's tokens: fresh ones and ones that begin from the base SAE, each
a whole run with its own tokens. All are compared on the same held-out conversations, with paired
differences. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ksparse
from ksparse import pylm
from ksparse.lm.chat import ChatTemplate, Conversation

TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}\n{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)
CONTEXT, BATCH = 128, 32
SITE, N, K = "resid_post.2", 2048, 16


def conversations() -> Iterator[list[dict[str, str]]]:
    """Yield a conversation for each function of the standard library that is documented."""
    for _, text in pylm.documents("train"):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        lines = text.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            words = ast.get_docstring(node)
            if words and len(source) < 4000:
                asked = f"{node.name}: {words.splitlines()[0]}"
                yield [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": source},
                ]


def tune(out: Path, texts: list[list[dict[str, str]]], tokens: int) -> None:
    """Train an LM on the assistant's tokens of conversations, and save it as a folder of its own."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(pylm.folder("0.3m"))
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(pylm.folder("0.3m"), dtype=torch.float32)
    template = ChatTemplate(tokenizer, ["assistant"])
    ids, kept = [], []
    for at in range(0, len(texts), 256):
        for chat in template.encode([Conversation(messages) for messages in texts[at : at + 256]]):
            ids += [tokenizer.bos_token_id, *chat.ids]
            kept += [False, *chat.kept]
    whole = len(ids) // CONTEXT * CONTEXT
    rows = torch.tensor(ids[:whole]).view(-1, CONTEXT)
    labels = rows.masked_fill(~torch.tensor(kept[:whole]).view(-1, CONTEXT), -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    steps, losses = tokens // (BATCH * CONTEXT), []
    for step in range(steps):
        chosen = torch.randint(len(rows), (BATCH,))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        loss = model(input_ids=rows[chosen], labels=labels[chosen]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tenth = max(1, steps // 10)
    first, last = (sum(part) / len(part) for part in (losses[:tenth], losses[-tenth:]))
    print(f"chat model: loss of the first tenth of tuning {first:.3f}, of the last {last:.3f}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def show(runs: dict[str, Any], against: str, tokens: int, out: Path) -> None:
    """Print NMSE and delta CE of runs, and the paired differences to one of them."""
    found = ksparse.compare(runs, names=["downstream"], against=against, tokens=tokens)
    print(found)
    out.write_text(json.dumps(found.differences, default=str))


def chat(folder: Path, tokens: int, judged: int) -> None:
    """Compare fresh SAEs of a chat model with ones that begin from the base LM's."""
    texts, file, lm = list(conversations()), folder / "chats.jsonl", folder / "lm"
    file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in texts))
    if not (lm / "config.json").exists():
        tune(lm, texts, 2_000_000)
    common = {"site": SITE, "n_latents": N, "k": K, "normalize": "unit_norm"}
    base = ksparse.train(out=folder / "base", lm="pylm/0.3m", tokens=tokens, **common)
    chats = {"lm": str(lm), "text": str(file), "chat": "template", "roles": ["assistant"]} | common
    runs = {"fresh": ksparse.train(out=folder / "fresh", tokens=tokens, **chats)}
    for part in (2, 4, 8, 16):
        few = tokens // part
        runs[f"fresh 1/{part}"] = ksparse.train(out=folder / f"fresh-{part}", tokens=few, **chats)
        runs[f"warm 1/{part}"] = ksparse.train(
            out=folder / f"warm-{part}", tokens=few, start=str(base.path), **chats
        )
    show(runs, "fresh", judged, folder / "chat.json")


def grow(folder: Path, tokens: int, judged: int) -> None:
    """Compare fresh SAEs of 2n latents with ones that begin from n."""
    common = {"lm": "pylm/0.3m", "site": SITE, "k": K}
    base = ksparse.train(out=folder / "small", tokens=tokens, n_latents=N // 2, **common)
    runs = {
        "small": base,
        "fresh": ksparse.train(out=folder / "wide", tokens=tokens, n_latents=N, **common),
    }
    for part in (1, 2, 4):
        few = tokens // part
        runs[f"fresh 1/{part}"] = ksparse.train(
            out=folder / f"wide-{part}", tokens=few, n_latents=N, **common
        )
        runs[f"grown 1/{part}"] = ksparse.train(
            out=folder / f"grown-{part}", tokens=few, n_latents=N, start=str(base.path), **common
        )
    del runs["fresh 1/1"]
    show(runs, "fresh", judged, folder / "grow.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["chat", "grow"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--judged", type=int, default=40_000, help="held-out tokens")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    options.folder.mkdir(parents=True, exist_ok=True)
    {"chat": chat, "grow": grow}[options.what](options.folder, options.tokens, options.judged)


if __name__ == "__main__":
    main()
