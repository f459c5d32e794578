"""What the tests share: tiny LMs of seven architectures, a text, a recipe that trains in a second. No network, no GPU."""

from __future__ import annotations

import dataclasses
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # waiting threads that spin cost other processes dearly
os.environ["OMP_NUM_THREADS"] = "1"  # tensors here are tiny; threads would only wait for each other

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from ksparse.config import ActsConfig, Recipe, from_dict
from ksparse.data.contexts import Corpus
from ksparse.data.live import LiveStream
from ksparse.lm.model import LM

hypothesis.settings.register_profile(
    "ksparse", deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.load_profile("ksparse")

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
WORDS = (
    "the cat sat on a mat and saw two black dogs run over old green hills while rain fell from grey skies "
    "def return self value for item in range print 0 1 2 3 = + ( ) : [ ] . , naïve café"
).split()

_COMMON = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_WIDE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
}
_GROUPED = {**_WIDE, "num_key_value_heads": 1, "head_dim": 8}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 128}),
    "gpt_neox": ("GPTNeoX", {**_WIDE, "use_parallel_residual": True}),
    "gpt_neox_serial": ("GPTNeoX", {**_WIDE, "use_parallel_residual": False}),
    "gpt_neo": (
        "GPTNeo",
        {
            "hidden_size": 16,
            "num_layers": 3,
            "num_heads": 2,
            "intermediate_size": 32,
            "window_size": 8,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local", "global"], 1]],
        },
    ),
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", _GROUPED),
    "gemma": ("Gemma", _GROUPED),
    "gemma2": ("Gemma2", {**_GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "qwen2": ("Qwen2", {key: value for key, value in _GROUPED.items() if key != "head_dim"}),
}


def sentences(seed: int, words: int) -> str:
    """Return that many words, drawn with a seed, in lines of eight."""
    chosen = torch.randint(
        len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return (
        "\n".join(" ".join(WORDS[i] for i in chosen[at : at + 8]) for at in range(0, words, 8))
        + "\n"
    )


def build_tokenizer(
    folder: Path,
    *,
    bos: str | None = "<|endoftext|>",
    eos: str | None = "<|endoftext|>",
    pad: str | None = "<|pad|>",
) -> None:
    """Write a byte-level BPE tokenizer of 300 tokens; <|endoftext|> has id 0, <|pad|> id 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([sentences(0, 400)], trainer)
    named = {
        key: value
        for key, value in {"bos_token": bos, "eos_token": eos, "pad_token": pad}.items()
        if value
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def build_lm(
    folder: Path, kind: str, *, tokenizer: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """Write a Hugging Face folder with a randomly initialised LM, its weights large enough for blocks to differ."""
    import transformers

    name, options = ARCHITECTURES[kind]
    config = getattr(transformers, f"{name}Config")(**_COMMON | options | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    build_tokenizer(folder, **tokenizer or {})
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return tiny_lm(kind, tokenizer={...}, **config): the folder of a tiny LM, made once a session."""
    made: dict[str, Path] = {}

    def build(kind: str = "gpt2", **options: Any) -> Path:
        key = repr((kind, sorted(options.items())))
        if key not in made:
            made[key] = build_lm(tmp_path_factory.mktemp(f"{kind}-"), kind, **options)
        return made[key]

    return build


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a .txt file of 120 documents of 5 to 40 words."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(
        "<|endoftext|>".join(sentences(i, 5 + i * 37 % 36) for i in range(120)), encoding="utf-8"
    )
    return file


@pytest.fixture
def small_acts(tiny_lm, text_file) -> Callable[..., ActsConfig]:
    """Return small_acts(**changes): that section of small_recipe."""
    return lambda **changes: dataclasses.replace(
        ActsConfig(
            lm=str(tiny_lm("gpt2")),
            site="resid_post.1",
            text=str(text_file),
            context=16,
            mix=256,
            lm_batch=8,
        ),
        **changes,
    )


@pytest.fixture
def small_recipe(small_acts) -> Callable[..., Recipe]:
    """Return small_recipe({"sae.k": 2, ...}): a run of 12 steps of 64 activations, with 64 latents, 4 of them active."""

    def make(changes: dict[str, Any] | None = None) -> Recipe:
        table: dict[str, Any] = {
            "acts": dataclasses.asdict(small_acts()),
            "sae": {"n_latents": 64, "k": 4, "dead_after": 192, "k_aux": 8},
            "optim": {"lr": 3e-3, "ema": 0.9, "ema_span": 1.0},
            "curve": {},
            "run": {
                "device": "cpu",
                "kernels": "torch",
                "log_every": 1,
                "save_every": 4,
                "keep": 2,
            },
            "tokens": 12 * 64,
            "batch": 64,
            "threads": 1,
        }
        for key, value in (changes or {}).items():
            section, _, name = key.rpartition(".")
            (table.setdefault(section, {}) if section else table)[name] = value
        return from_dict(table)

    return make


@pytest.fixture
def small_stream(small_acts) -> Callable[..., LiveStream]:
    """Return small_stream(batch=, seed=, **changes to small_acts): a fresh live stream."""

    def make(*, batch: int = 32, seed: int = 0, split: str = "train", **changes: Any) -> LiveStream:
        lm = LM(acts=small_acts(**changes))
        return LiveStream(lm, Corpus(lm.options, lm.tokenizer, split), batch=batch, seed=seed)

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data beside the repository, or skip."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(autouse=True)
def _same_threads() -> Any:
    """Give each test the number of threads that the process began with: a run sets its own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def verb(capsys):
    """Return verb("train", ...): (exit code, stdout, stderr)."""

    from ksparse import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
