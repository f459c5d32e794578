"""Train the built-in language models of Python source, and their tokenizer.

    python scripts/train_pylm.py tokenizer
    python scripts/train_pylm.py 0.3m --tokens 12_000_000
    python scripts/train_pylm.py 7.6m --minutes 90
    python scripts/train_pylm.py 1.9m --tokens 60_000_000 --state lm.pt    # again: goes on from lm.pt

One recipe for all sizes: a Llama-shaped model; random windows of 256 tokens, each beginning with BOS; Muon for the
matrices of the blocks and Adam for the rest, at a constant rate; the weights that are evaluated and saved are a
power-law average over the last twentieth or so of training. So every row of training.jsonl is what the recipe
reaches with that much compute, with no cooling-down still to come, and a loss can be read back as compute. With
--cool the rate falls linearly to 0 over the last part of the tokens; of that part only the end is in the log.

The log's columns: tokens seen; FLOPs, 6 x parameters x tokens + 12 x layers x d x context x tokens / 2; loss, in nats per token on
held-out files in contexts of 64 (BOS and 63 tokens; predictions from BOS left out), as the evaluation of SAEs has it;
bits per byte of the same.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ksparse import pylm

MODELS = Path(pylm.__file__).parent / "models"
VOCAB, WINDOW, BOS, PAD = 2048, 256, "<|endoftext|>", "<|pad|>"
SHAPES = {"0.3m": (64, 4, 2), "1.9m": (160, 5, 5), "7.6m": (256, 9, 4)}  # d_model, layers, heads
FILES = ("tokenizer.json", "tokenizer_config.json")


def train_tokenizer() -> None:
    """Train a byte-level BPE on the training split; id 0 is BOS, EOS and separator, id 1 padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((text for _, text in pylm.documents("train")), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=PAD,
        model_max_length=512,
    )
    wrapped.save_pretrained(MODELS / "tokenizer")


def tokenize(split: str) -> tuple[torch.Tensor, int]:
    """Return the split as one row of ids, a BOS before each document, and its size in bytes of UTF-8."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tokenizer")
    texts = [text for _, text in pylm.documents(split)]
    ids = [i for row in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in [0, *row]]
    return torch.tensor(ids), sum(len(text.encode()) for text in texts)


class HeldOut:
    """Loss on a fixed sample of held-out text, in contexts of 64 tokens, as SAEs are evaluated."""

    def __init__(self, contexts: int = 2048):
        ids, n_bytes = tokenize("held-out")
        self.tokens_per_byte = len(ids) / n_bytes
        rows = ids[: len(ids) // 63 * 63].view(-1, 63)
        rows = rows[:: max(1, len(rows) // contexts)][:contexts]
        self.contexts = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows], 1)

    @torch.inference_mode()
    def __call__(self, model: LlamaForCausalLM) -> float:
        total, count = 0.0, 0
        for batch in self.contexts.split(128):
            logits = model(input_ids=batch).logits[:, 1:-1].float()
            targets = batch[:, 2:]
            keep = (targets != 0) & (batch[:, 1:-1] != 0)
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="none"
            )
            total += losses[keep.flatten()].double().sum().item()
            count += int(keep.sum())
        return total / count


def optimizers(model: LlamaForCausalLM, width: int) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, Adam for embeddings and norms (Jordan et al. 2024)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(
            rest, lr=3e-3, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True
        ),
    ]


def train(
    size: str,
    *,
    tokens: int,
    minutes: float,
    batch: int,
    state: Path | None,
    cool: float = 0.0,
    seed: int = 0,
) -> None:
    """Train one size; with `state`, a file to go on from, written every 5 minutes and at the end."""
    torch.manual_seed(seed)
    d_model, layers, heads = SHAPES[size]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=d_model,
            intermediate_size=8 * round(d_model / 3),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )
    compiled = torch.compile(model)
    average = LlamaForCausalLM(model.config)
    average.load_state_dict(model.state_dict())
    ids, _ = tokenize("train")
    held_out, draw = HeldOut(), torch.Generator().manual_seed(seed)
    n_params = sum(p.numel() for p in model.parameters())
    flops_per_token = 6 * n_params + 6 * layers * d_model * WINDOW
    steps, warmup = tokens // (batch * WINDOW), 30
    evaluate_at = {
        step
        for i in range(6, 2 * math.ceil(math.log2(steps + 1)) + 1)
        if (step := round(2 ** (i / 2))) <= steps * (1 - cool)
    } | {1, steps}
    folder = MODELS / size
    folder.mkdir(parents=True, exist_ok=True)
    opts = optimizers(model, d_model)
    base = [[group["lr"] for group in opt.param_groups] for opt in opts]
    modules, done = [model, average, *opts], 0
    if state and state.exists():
        saved = torch.load(state, weights_only=True)
        for module, values in zip(modules, saved["modules"]):
            module.load_state_dict(values)
        draw.set_state(saved["draw"])
        done = saved["step"]
    rows = folder / "training.jsonl"
    kept = rows.read_text().splitlines() if done else []
    log = rows.open("w")
    log.writelines(f"{row}\n" for row in kept if json.loads(row)["step"] <= done)
    start = saved_at = time.monotonic()
    for step in range(done + 1, steps + 1):
        at = torch.randint(len(ids) - WINDOW, (batch,), generator=draw)
        rows = ids[at[:, None] + torch.arange(WINDOW - 1)]
        rows = torch.cat([torch.zeros(batch, 1, dtype=torch.long), rows], 1)
        for opt, rates in zip(opts, base):
            for group, rate in zip(opt.param_groups, rates):
                left = (steps + 1 - step) / max(1.0, cool * steps)
                group["lr"] = rate * min(1.0, step / warmup, left if cool else 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        with (
            torch.no_grad()
        ):  # power-law average (Karras et al. 2023): always the last twentieth or so of training
            decay = (1 - 1 / step) ** 17
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        out_of_time = time.monotonic() - start > minutes * 60
        if step in evaluate_at or out_of_time:
            nats = held_out(average)
            row = {
                "step": step,
                "tokens": step * batch * WINDOW,
                "flops": flops_per_token * step * batch * WINDOW,
                "loss": nats,
                "bits_per_byte": nats * held_out.tokens_per_byte / math.log(2),
                "train_loss": loss.item(),
            }
            print(json.dumps(row), file=log, flush=True)
            print(f"{size} {row}", flush=True)
            save(average, folder)
        if state and (step == steps or out_of_time or time.monotonic() - saved_at > 300):
            saved_at = time.monotonic()
            save_state(state, step, modules, draw)
        if out_of_time:
            break


def save_state(path: Path, step: int, modules: list, draw: torch.Generator) -> None:
    """Write all that `train` goes on from: the whole file, or the one before it."""
    values = [module.state_dict() for module in modules]
    part = path.with_suffix(".part")
    torch.save({"step": step, "draw": draw.get_state(), "modules": values}, part)
    part.replace(path)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(folder)
    for name in FILES:
        (folder / name).write_bytes((MODELS / "tokenizer" / name).read_bytes())
    (folder / "model.safetensors").chmod(0o644)


def sample(size: str, prompt: str = "def ") -> None:
    model = LlamaForCausalLM.from_pretrained(MODELS / size, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / size)
    ids = torch.tensor([[0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    print(
        tokenizer.decode(
            model.generate(ids, max_new_tokens=200, do_sample=True, temperature=0.7, top_p=0.95)[0]
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tokenizer", "sample", *SHAPES])
    parser.add_argument("--tokens", type=int, default=12_000_000)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after so long, with what there is"
    )
    parser.add_argument("--state", type=Path, help="a file to go on from, if it is there")
    parser.add_argument(
        "--cool", type=float, default=0.0, help="share of the tokens over which the rate falls to 0"
    )
    parser.add_argument("--batch", type=int, default=32, help=f"windows of {WINDOW} tokens a step")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--size", default=pylm.DEFAULT, help="for 'sample'")
    args = parser.parse_args()
    if args.what == "tokenizer":
        train_tokenizer()
    elif args.what == "sample":
        sample(args.size, args.prompt)
    else:
        train(
            args.what,
            tokens=args.tokens,
            minutes=args.minutes,
            batch=args.batch,
            state=args.state,
            cool=args.cool,
        )
