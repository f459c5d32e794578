"""Tiny random models of every causal LM class of the installed transformers, and a judgement of what
their aliases give.

The judgement does not use ksparse's own check, but definitions: transformers' `hidden_states`;
parts whose weights are set to zero add nothing; what is written at a place arrives behind it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ksparse.errors import InputError
from ksparse.lm.hooks import hooked
from ksparse.lm.model import LM
from ksparse.lm.sites import ALIASES, blocks_of, resolve
from ksparse.sae.model import SAE, Shape
from ksparse.steering import continue_text, steer

LAYERS, WIDTH, VOCABULARY = 3, 32, 300
_SMALL = {
    "hidden_size intermediate_size num_hidden_layers": (WIDTH, 48, LAYERS),
    "num_attention_heads num_key_value_heads head_dim": (4, 2, 8),
    "n_embd n_layer n_head n_inner d_model n_layers n_heads": (
        WIDTH,
        LAYERS,
        4,
        48,
        WIDTH,
        LAYERS,
        4,
    ),
    "num_layers num_heads ffn_dim dim max_seq_len": (LAYERS, 4, 48, WIDTH, 128),
    "max_position_embeddings n_positions vocab_size": (128, 128, VOCABULARY),
    "moe_intermediate_size num_experts num_experts_per_tok": (24, 4, 2),
    "n_routed_experts num_local_experts n_group topk_group": (4, 4, 1, 1),
    "q_lora_rank kv_lora_rank v_head_dim": (8, 8, 8),
    "qk_rope_head_dim qk_nope_head_dim": (4, 4),
    "pad_token_id bos_token_id eos_token_id": (0, 1, 2),
    "state_size attention_hidden_size rotary_dim": (8, WIDTH, 4),
    "decoder_layers encoder_layers decoder_ffn_dim encoder_ffn_dim": (LAYERS, LAYERS, 48, 48),
    "decoder_attention_heads encoder_attention_heads": (4, 4),
    "linear_num_key_heads linear_num_value_heads": (2, 4),
    "linear_key_head_dim linear_value_head_dim": (8, 8),
    "mamba_n_heads mamba_d_head mamba_d_state mamba_expand mamba_n_groups": (8, 8, 8, 2, 1),
}
SMALL = {
    name: value
    for names, values in _SMALL.items()
    for name, value in zip(names.split(), values, strict=True)
}
"""Sizes by the names that most configurations use."""


def kinds() -> list[str]:
    """Return the model types in transformers' registry of causal LMs, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


_MLA = {"head_dim": 4}  # latent attention: the rotary part of a head
_INDEXED = {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 64, "num_key_value_heads": 4}
_TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
_HYBRID = ["linear_attention", "full_attention", "linear_attention"]
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA | {"num_key_value_heads": 4},
    "bailing_hybrid": {"layer_types": _HYBRID},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        "encoder_hash_byte_group_size": [3, 4],
        "patcher_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
        "encoder_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "hidden_size_global": 64,
        },
        "decoder_config": {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "hidden_size_global": 64,
        },
        "global_config": {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "deepseek_v32": _MLA | _INDEXED,
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "per_layer_config": {},
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "index_head_dim": 8,
        "index_n_heads": 2,
        "head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "num_hidden_layers": 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "per_layer_config": {},
    },
    "fuyu": {
        "text_config": _TEXT | {"model_type": "persimmon"},
        "hidden_size": WIDTH,
        "vocab_size": VOCABULARY,
    },
    "got_ocr2": {"text_config": _TEXT | {"model_type": "qwen2"}},
    "moss_transcribe_diarize": {"text_config": _TEXT | {"model_type": "qwen3"}},
    "xmod": {"default_language": "en_XX"},
    "git": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": 32,
        }
    },
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA | _INDEXED,
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": {"layer_types": _HYBRID, "linear_num_heads": 2, "linear_head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": _MLA
    | {
        "num_layers": 3,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mllama": {"cross_attention_layers": []},
    "nemotron_h": {
        "layers_block_type": ["full_attention", "moe", "linear_attention", "mlp"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 24,
    },
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": 28,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 2,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 32,
            "nemo_conv_channels": 32,
            "depthwise_separable_out_channel": 32,
        },
    },
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "qwen3_5_text": {"layer_types": _HYBRID},
    "qwen3_next": {"layer_types": _HYBRID},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "shared_expert_intermediate_size": 24,
    },
    "recurrent_gemma": {"lru_width": 32},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
    },
    "xlstm": {"num_hidden_layers": 3},
    "zamba": {
        "num_hidden_layers": 8,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "num_mem_blocks": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "adapter_rank": 8,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""What a family's configuration needs besides, by model type."""


def model_class(kind: str) -> Any:
    """Return the class that the registry names for a model type."""
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def small_config(cls: Any, layers: int = LAYERS) -> Any:
    """Return a tiny configuration; towers of other modalities get more layers than the text's."""
    names = set(inspect.signature(cls.__init__).parameters) | set(cls.attribute_map)
    if dataclasses.is_dataclass(cls):
        names |= {field.name for field in dataclasses.fields(cls)}
    sizes = {name: value for name, value in SMALL.items() if name in names}
    for name in ("num_hidden_layers", "depth", "n_layers", "num_layers"):
        if name in names:
            sizes[name] = layers
    special = SPECIAL.get(cls.model_type)
    parts = {}
    for name, part in (cls.sub_configs or {}).items() if special is None else ():
        if isinstance(part, type) and issubclass(part, PretrainedConfig) and part.model_type:
            is_text = re.search("text|decoder|llm", name)
            parts[name] = small_config(part, LAYERS if is_text else LAYERS + 2)
    return cls(**sizes | (special or {}) | parts)


def build(kind: str) -> Any:
    """Return a tiny random model whose every part weighs.

    Raises:
        Exception: It cannot be built here, for whatever reason.
    """
    cls = model_class(kind)
    config = small_config(cls.config_class)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > 100e6:
        raise ValueError(f"its smallest known configuration has {size:,} parameters")
    torch.manual_seed(0)
    model = cls(config).eval().float().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
    for module in model.modules():  # transformers sets some of these rows to zero when it loads
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0
    return model


# ---- judging


class Wrong(Exception):
    """An alias does not give what its definition says."""


def token_ids() -> Tensor:
    return torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(5))


def read(
    model: Any, *sites: str, edits: dict[str, Callable[[Tensor], Tensor]] | None = None
) -> list[Tensor]:
    """Return x at several sites of one pass, with others changed."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for site, change in (edits or {}).items():
            hooks.enter_context(hooked(resolve(model, site), change))
        for site in sites:
            record = functools.partial(lambda site, x: seen.update({site: x.clone()}), site)
            hooks.enter_context(hooked(resolve(model, site), record))
        run(model)
    return [seen[site] for site in sites]


def run(model: Any, **options: Any) -> Any:
    parameters = inspect.signature(model.forward).parameters
    options |= {"use_cache": False} if "use_cache" in parameters else {}
    with torch.no_grad():
        return model(input_ids=token_ids(), **options)


def same(a: Tensor, b: Tensor, what: str, scale: Tensor | None = None) -> None:
    """Raise Wrong unless two tensors differ by rounding alone, relative to a third."""
    if a.shape != b.shape:
        raise Wrong(f"{what}: shapes {list(a.shape)} and {list(b.shape)}")
    norm = (b if scale is None else scale).double().norm().clamp_min(1e-30)
    size = float((a.double() - b.double()).norm() / norm)
    if not size < 2e-5:
        raise Wrong(f"{what}: relative difference {size:.2g}")


@contextmanager
def without_weights(modules: list[nn.Module]) -> Iterator[None]:
    """Set all parameters of modules to zero inside a `with` block."""
    kept = [(p, p.clone()) for module in modules for p in module.parameters()]
    try:
        for parameter, _ in kept:
            parameter.zero_()
        yield
    finally:
        for parameter, value in kept:
            parameter.copy_(value)


_KINDS = {
    "": r"norm|_input$",  # the latter mix earlier blocks' streams (Inkling)
    "attention": r"attn|attention|(^|_)att(_|$)",
    "mlp": r"mlp|moe|ffn|feed_?forward|expert|fc\d|fc_|sparse|^ff",
    "mixer": r"mamba|mixer|conv|delta",
}


def kind_of(name: str, module: nn.Module) -> str | None:
    """Return what a module is by its name, else by its class."""
    for text in (name, type(module).__name__):
        for kind, pattern in _KINDS.items():
            if re.search(pattern, text, re.IGNORECASE):
                return kind
    return None


def parts(block: nn.Module, kind: str) -> list[nn.Module]:
    """Return the topmost modules of a block that are of a kind."""
    found = []
    for name, child in block.named_children():
        own = kind_of(name, child)
        if own == kind or (name == "mixer" and kind_of("", child) == kind):
            found.append(child)
        elif own is None or (own == "" and "attn" in name):  # a norm around attention (DBRX)
            found += parts(child, kind)
    return found


def judge(model: Any) -> dict[str, dict[int, str]]:
    """Return {alias: {block: '' if right, or why it is refused}}.

    Raises:
        Wrong: An alias is given that is not what its definition says.
    """
    blocks = blocks_of(model)
    verdicts: dict[str, dict[int, str]] = {alias: {} for alias in ALIASES}
    for number in range(len(blocks)):
        for alias in ALIASES:
            try:
                resolve(model, f"{alias}.{number}")
                verdicts[alias][number] = ""
            except InputError as error:
                verdicts[alias][number] = reason(error)
        given = {alias for alias in ALIASES if not verdicts[alias][number]}
        try:
            check_stream(model, number, given)
            check_parts(model, blocks[number], number, given)
        except Wrong as wrong:
            raise Wrong(f"block {number}: {wrong}") from None
    return verdicts


def reason(error: Exception) -> str:
    """Return the part of a refusal that says why."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^site '[^']*' is refused: |\. Name a module instead.*|; there are$", "", line)


def check_stream(model: Any, number: int, given: set[str]) -> None:
    """Compare resid_pre and resid_post with transformers' hidden states."""
    wanted = [f"{alias}.{number}" for alias in ("resid_pre", "resid_post") if alias in given]
    if not wanted:
        return
    count = len(blocks_of(model))
    states = getattr(run(model, output_hidden_states=True), "hidden_states", None)
    if states is None or len(states) < count + 1:
        found = None if states is None else len(states)
        raise Wrong(f"transformers gives {found} hidden states for {count} blocks")
    embeddings = model.get_input_embeddings()(token_ids())
    (first,) = read(model, "resid_pre.0")
    x = dict(zip(wanted, read(model, *wanted)))
    # Mamba's hidden states begin after the first block, all others' before it.
    late = (
        states[0].shape == first.shape
        and torch.equal(first, embeddings)
        and not torch.equal(states[0], first)
    )
    states = [first, *states] if late else states
    if f"resid_pre.{number}" in x:
        same(x[f"resid_pre.{number}"], states[number], "resid_pre is not the hidden state")
    if (post := x.get(f"resid_post.{number}")) is None:
        return
    if number < count - 1 or late:
        same(post, states[number + 1], "resid_post is not the hidden state")
        return
    inner = {id(module) for block in blocks_of(model) for module in block.modules()}
    norms = [
        m for m in model.modules() if id(m) not in inner and "norm" in type(m).__name__.lower()
    ]
    errors = []
    for module in [nn.Identity(), *norms]:
        try:
            same(module(post), states[-1], "no norm maps resid_post to the last hidden state")
            return
        except (Wrong, RuntimeError, TypeError) as error:
            errors.append(error)
    # More than a norm may follow (Inkling, several streams): what the last block itself gives.
    outputs: list[Any] = []
    keep = lambda module, args, output: outputs.append(output)
    handle = blocks_of(model)[-1].register_forward_hook(keep)
    run(model)
    handle.remove()
    given = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
    ends = any("final" in name for name, _ in model.base_model.named_children())
    if not ends and post.shape == states[-1].shape:
        raise Wrong(str(errors[0]))
    same(post, given, "resid_post is not what the last block gives")


def check_parts(model: Any, block: nn.Module, number: int, given: set[str]) -> None:
    """Compare what parts add with what is left when their weights are zero; follow changes."""
    site = {alias: f"{alias}.{number}" for alias in ALIASES}
    modules = {"attn_out": parts(block, "attention"), "mlp_out": parts(block, "mlp")}
    if not {"resid_pre", "resid_post"} <= given:
        if given & {"attn_out", "mlp_out", "resid_mid"}:
            raise Wrong("parts are given without the stream")
        return
    pre, post = read(model, site["resid_pre"], site["resid_post"])
    fixed = {site["resid_pre"]: lambda x: pre.clone()}  # parts may be shared with earlier blocks
    added = {name: read(model, site[name])[0] for name in modules if name in given}
    for name in added:
        if not modules[name]:
            raise Wrong(f"{name} is given, but the block has no such part")
        if added[name].norm() < 1e-3 * pre.norm():
            raise Wrong(f"{name} is empty")
        (ablated,) = read(model, site["resid_post"], edits=fixed | {site[name]: torch.zeros_like})
        with without_weights(modules[name]):
            left, without = read(model, site[name], site["resid_post"], edits=fixed)
        same(left, torch.zeros_like(left), f"{name} of a part without weights is not zero", pre)
        same(ablated, without, f"{name} = 0 is not the part without weights", post)
    others = [m for n, m in block.named_children() if kind_of(n, m) is None]
    if len(added) == 2 and not any(True for part in others for _ in part.parameters()):
        with without_weights(modules["attn_out"] + modules["mlp_out"]):
            (rest,) = read(model, site["resid_post"], edits=fixed)
        total = added["attn_out"] + added["mlp_out"] + rest  # another mixer may stand beside them
        same(total, post, "the parts do not sum up")
    if "resid_mid" in given:
        check_middle(model, site, modules["mlp_out"], fixed, post)


def check_middle(
    model: Any, site: dict[str, str], mlp: list[nn.Module], fixed: dict[str, Any], post: Tensor
) -> None:
    """Compare resid_mid with a block without its MLP; what is written there reaches both ways."""
    middle, before = read(model, site["resid_mid"], site["mlp_out"])
    with without_weights(mlp):
        (without,) = read(model, site["resid_post"], edits=fixed)
    same(middle, without, "resid_mid is not the block without its MLP", post)
    wanted = torch.randn(middle.shape, generator=torch.Generator().manual_seed(2)) * middle.std()
    edits = {site["resid_mid"]: lambda x: wanted}
    then, after = read(model, site["mlp_out"], site["resid_post"], edits=edits)
    same(after, wanted + then, "what is written at resid_mid does not arrive", post)
    if (then - before).norm() < 1e-3 * before.norm():
        raise Wrong("what is written at resid_mid does not reach the MLP")


# ---- the LM as a whole


@dataclasses.dataclass
class Row:
    """What is found of one model type."""

    kind: str
    name: str
    problem: str = ""
    """Why there is no LM: 'cannot be built here: …' or 'refused: …'."""
    verdicts: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)
    passes: dict[str, str] = dataclasses.field(default_factory=dict)
    """What `run_patched`, `branch_from` and steered generation do."""

    @property
    def is_built(self) -> bool:
        return not self.problem.startswith("cannot be built")


def examine(kind: str, folder: Path, build_tokenizer: Callable[[Path], None]) -> Row:
    """Build a tiny model of a type, load it as an LM, and judge it.

    Raises:
        Wrong: Something that the LM gives without an error is not what it should be.
    """
    row = Row(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(kind)
            model.save_pretrained(folder)
        except Exception as error:  # of transformers, or of a package that is not there
            row.problem = f"cannot be built here: {_first_line(error)}"
            return row
        build_tokenizer(folder)
        site = "resid_post.1"
        try:
            lm = LM(str(folder), site)
        except InputError as error:
            row.problem = f"refused: {reason(error).replace(str(folder), 'the LM')}"
            return row
        if count := check_loaded(model, lm.model):
            raise Wrong(f"{count} tensors are not those that were saved")
        row.verdicts = judge(lm.model)
        row.passes = check_passes(lm)
    return row


def check_loaded(saved: Any, loaded: Any) -> int:
    """Return how many tensors of the same name differ between two models."""
    tensors = dict(loaded.named_parameters())
    return sum(
        name in tensors and not torch.equal(value, tensors[name])
        for name, value in saved.named_parameters()
    )


def check_passes(lm: LM) -> dict[str, str]:
    """Compare patched runs, branches and steered generation with whole passes under a hook."""
    tokens = token_ids()
    full = torch.ones_like(tokens, dtype=torch.bool)
    if lm.read_only_reason:
        return {"patched": f"read-only: {lm.read_only_reason}"}
    shift = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(3))

    def whole(change: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad(), lm.hooked(change):
            return lm.forward(tokens, full).logits

    cached = lm.run_with_cache(tokens, full)
    patched = lm.run_patched(cached, lambda x: x + shift)
    same(patched, whole(lambda x: x + shift), "run_patched is not a whole pass")
    found = {"patched": "exact" if lm.skippable else "exact, all blocks run"}
    branch = lm.branch_from(tokens, full, 4, 3)
    at = torch.arange(tokens.shape[1])[:, None] == 4
    rows = torch.tensor([1, 0])
    expected = whole(lambda x: torch.where(at, x + shift, x))[rows, 4:7]
    same(branch(rows, branch.x[rows] + shift), expected, "branch_from is not a whole pass")
    found["branch"] = "cached" if type(branch).__name__ == "CachedBranch" else "whole contexts"
    found["steering"] = check_generation(lm)
    return found


def check_generation(lm: LM) -> str:
    """Compare steered generation, with what it remembers, with whole passes for each token."""
    sae = SAE(Shape(lm.d_model, 64, 4), metadata={"policy": {"keep": "text"}})
    for number, parameter in enumerate(sae.parameters()):
        generator = torch.Generator().manual_seed(number)
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    prompt, steps = "the old cat sat on a green mat and ran over two black hills", 6
    try:
        plain = continue_text(lm, prompt, tokens=1).log_probs
        with steer(lm.model, sae, {5: 3.0}, unit="value", site=lm.options.site):
            got = continue_text(lm, prompt, tokens=steps)
    except InputError as error:
        return f"refused: {_first_line(error)}"
    ids = lm.tokenize(prompt)
    for step in range(steps):
        with steer(lm.model, sae, {5: 3.0}, unit="value", site=lm.options.site), torch.no_grad():
            logits = lm.forward(ids, torch.ones_like(ids, dtype=torch.bool)).logits[0, -1]
        if step == 0:
            same(got.log_probs, logits.log_softmax(-1), "steered generation is not a whole pass")
            if torch.allclose(plain, got.log_probs, atol=1e-4):
                raise Wrong("steering does not reach the logits")
        best = logits.topk(2).values
        if best[0] - best[1] > 1e-4 and int(logits.argmax()) != got.tokens[step]:
            raise Wrong(f"steered generation differs from whole passes at token {step}")
        if step + 1 == len(got.tokens):
            break
        ids = torch.cat([ids, torch.tensor([[got.tokens[step]]])], 1)
    return "exact"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:160]


# ---- the table


def cell(row: Row, alias: str) -> str:
    """Return what the table says of an alias."""
    found = row.verdicts[alias]
    right = [number for number, why in found.items() if not why]
    if len(right) == len(found):
        return "right"
    whys = list(dict.fromkeys(why for why in found.values() if why))
    refused = "refused: " + "; ".join(whys)
    return f"right in {len(right)} of {len(found)} blocks, else {refused}" if right else refused


def line(row: Row) -> str:
    """Return the row of the table of a model type."""
    start = f"| {row.kind} | {row.name} |"
    if row.problem:
        return f"{start} {_plain(row.problem)} | | | | | |"
    cells = " | ".join(_plain(cell(row, alias)) for alias in ALIASES)
    passes = ", ".join(f"{name} {what}" for name, what in row.passes.items())
    return f"{start} {cells} | {_plain(passes)} |"


def _plain(text: str) -> str:
    text = re.sub(r" \(relative difference [^)]*\)", "", text)  # it depends on the machine
    return re.sub(r"\s+", " ", text.replace("|", "/").replace("<", "").replace(">", ""))[:400]


def page(rows: list[Row]) -> str:
    """Return docs/architectures.md."""
    built = [row for row in rows if row.is_built]
    read = [row for row in built if not row.problem]
    classes = len({row.name for row in rows})
    counts = {
        alias: sum(any(not why for why in row.verdicts[alias].values()) for row in read)
        for alias in ALIASES
    }
    numbers = ", ".join(f"{alias} {count}" for alias, count in counts.items())
    lines = "\n".join(line(row) for row in rows)
    return PAGE.format(
        version=transformers.__version__,
        kinds=len(rows),
        classes=classes,
        built=len(built),
        read=len(read),
        refused=len(built) - len(read),
        unbuilt=len(rows) - len(built),
        numbers=numbers,
        aliases=" | ".join(ALIASES),
        lines=lines,
    )


PAGE = """# Architectures

Which aliases of sites are right on which architecture. Made and checked by
`tests/lm/test_architectures.py` with tiny random models of every causal LM class that
transformers {version} has: {kinds} model types, {classes} classes. {built} could be built; {read} of
these are read, {refused} are refused as a whole, none is silently wrong. {unbuilt} could not be built
where the test ran. Aliases that are right in at least one block: {numbers}.

"Right" is judged by definitions, not by the check that ksparse itself makes when it loads an LM:

- `resid_pre` and `resid_post` are transformers' `hidden_states`, the last one before its final norm;
- `attn_out` and `mlp_out` are zero when the weights of attention or MLP are, and setting them to zero
  gives what the block gives without these weights;
- the parts sum up to what the block adds;
- what is written at `resid_mid` arrives at the block's end and in its MLP.

The last column says how passes with changed activations are computed. `patched exact`: `run_patched`
equals a whole pass under a hook. `branch cached`: `branch_from` continues from keys and values;
`whole contexts`: it runs them again, with a warning. `steering exact`: generation under `steer`, with
what the LM remembers of earlier tokens, equals a whole pass for each token.

A refused alias is an error that says why and lists what can be had; modules can always be named.
An LM stored on your disk is checked again when it is loaded: weights may make a difference.

To make this page again: `KSPARSE_WRITE_TABLE=1 python -m pytest -m slow tests/lm/test_architectures.py`.

| model type | class | {aliases} | changed passes |
|---|---|---|---|---|---|---|---|
{lines}
"""
