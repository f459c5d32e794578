"""Suites published as plain torch files: Qwen-Scope, Goodfire, qresearch, and the attention SAEs of
Kissane et al. 2024 (hook_z).

    acts  = f(W_enc x + b_enc)       hook_z: of x - b_dec
    recon = W_dec acts + b_dec

| ksparse | qwen_scope | goodfire | qresearch | hook_z |
|---|---|---|---|---|
| file | layerL.sae.pt | NAME-SAE-lL.pt(h) | NAME-SAE-lL.pt | NAME.pt, NAME_cfg.json |
| W_enc[n, d] | W_enc[n, d] | encoder_linear.weight[n, d] | encoder.weight[n, d] | W_enc[d, n] |
| b_enc[n] | b_enc | encoder_linear.bias | encoder.bias | b_enc |
| W_dec[n, d] | W_dec[d, n] | decoder_linear.weight[d, n] | decoder.weight[d, n] | W_dec[n, d] |
| b_pre[d] | b_dec | decoder_linear.bias | decoder.bias | b_dec |
| activation | TopK, then ReLU | ReLU | ReLU | ReLU |

Where the encoder reads x itself, b_enc becomes b_enc + W_enc b_dec, since ksparse's encoder
subtracts b_pre from x. k of Qwen-Scope is in the repository's name, SAE-Res-LM-WwK-L0_k, or in a
config.json beside the file. hook_z is the heads' outputs, concatenated: what c_proj reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ksparse.errors import InputError
from ksparse.interop import foreign, hook_names
from ksparse.interop.foreign import CheckedTensors
from ksparse.sae.model import SAE, Shape
from ksparse.storage import atomic


class Description(NamedTuple):
    """What the names and settings around a file say about its SAE."""

    lm: str | None = None
    site: str | None = None
    context: int | None = None
    k: int = 1
    settings: dict[str, Any] = {}  # noqa: RUF012  # never written to


@dataclass(frozen=True)
class Suite:
    """A way of publishing SAEs as torch files with four tensors.

    Args:
        name: name of the format.
        file_name: pattern that the whole name of a file must match.
        W_enc, b_enc, W_dec, b_dec: names of the tensors.
        enc_dims, dec_dims: order of the dimensions of W_enc and W_dec.
        activation: ksparse's name of the activation.
        centered: whether the encoder subtracts b_dec from x.
        describe: reads what the names and settings around a file say.
    """

    name: str
    file_name: str
    W_enc: str
    b_enc: str
    W_dec: str
    b_dec: str
    enc_dims: str
    dec_dims: str
    activation: str
    centered: bool
    describe: Callable[[Path, CheckedTensors], Description]

    def find(self, path: Path) -> Path | None:
        """Return the file of an SAE: `path` itself, or the only file of this suite in it; else
        None."""
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if re.fullmatch(self.file_name, file.name)]
        if len(files) != 1 or not atomic.exists(files[0]) or files[0].is_dir():
            return None
        keys = {self.W_enc, self.b_enc, self.W_dec, self.b_dec}
        found = set(foreign.load_torch_dict(files[0]))
        # A file of the suite's name in which some are missing is a damaged one of this suite.
        return files[0] if found & keys else None

    def read(self, file: Path) -> SAE:
        """Read an SAE from its file."""
        weights = foreign.check_tensors(file, foreign.load_torch_dict(file))
        W_enc = weights.take(self.W_enc, *self.enc_dims)
        W_dec = weights.take(self.W_dec, *self.dec_dims)
        tensors = {
            "W_enc": W_enc if self.enc_dims == "nd" else W_enc.t().contiguous(),
            "b_enc": weights.take(self.b_enc, "n"),
            "W_dec": W_dec if self.dec_dims == "nd" else W_dec.t().contiguous(),
            "b_pre": weights.take(self.b_dec, "d"),
        }
        weights.finish()
        about = self.describe(file, weights)
        if not self.centered:
            foreign.center_encoder_(tensors)
        n, d = weights.lengths["n"], weights.lengths["d"]
        return foreign.build_sae(
            file,
            Shape(d, n, about.k, "none", 1.0, self.activation),
            tensors,
            hook_names.build_metadata(
                self.name, about.settings, lm=about.lm, site=about.site, context=about.context
            ),
        )


def _qwen_scope(file: Path, weights: CheckedTensors) -> Description:
    """Take LM, width and k from the repository's name, and k from config.json where it has one."""
    name = re.search(r"SAE-Res-(Qwen[\w.-]+?)-W(\d+)K-L0_(\d+)", foreign.full_path(file).as_posix())
    config = file.parent / "config.json"
    settings = foreign.read_settings(config) if config.is_file() else None
    k = settings.get_typed("k", int, None) if settings else None
    if name is not None:
        width, l0 = 1024 * int(name[2]), int(name[3])
        if width != weights.lengths["n"]:
            raise InputError(
                f"{file}: the repository's name says {width} latents, the tensors have "
                f"{weights.lengths['n']}"
            )
        if k not in (None, l0):
            raise InputError(f"{config}: k is {k}, the repository's name says {l0}")
        k = l0
    if k is None:
        raise InputError(
            f"{file} does not say how many latents are active; keep the file in a folder with the "
            "name of its repository, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50, or write "
            '{"k": …} into a config.json beside it'
        )
    layer = re.search(r"\d+", file.name)
    return Description(
        lm=f"Qwen/{name[1]}" if name else None,
        site=f"resid_post.{layer[0]}" if layer else None,
        k=k,
        settings=settings.table if settings else {},
    )


def _named_after_the_lm(owner: str) -> Callable[[Path, CheckedTensors], Description]:
    def describe(file: Path, weights: CheckedTensors) -> Description:
        name = re.fullmatch(r"(.+)-SAE-l(\d+)\.pth?", file.name)
        if name is None:
            return Description()
        owners = {"Llama": "meta-llama", "DeepSeek": "deepseek-ai"}
        prefix = owners.get(name[1].partition("-")[0], owner)
        return Description(lm=f"{prefix}/{name[1]}", site=f"resid_post.{name[2]}")

    return describe


def _hook_z(file: Path, weights: CheckedTensors) -> Description:
    """Take the site from NAME_cfg.json."""
    settings = foreign.read_settings(_hook_z_config(file))
    for key, letter in (("act_size", "d"), ("dict_size", "n")):
        size = settings.get_typed(key, int, weights.lengths[letter])
        if size != weights.lengths[letter]:
            raise InputError(
                f"{settings.file}: {key} is {size}, the tensors of {file.name} have "
                f"{weights.lengths[letter]}"
            )
    hook = re.fullmatch(r"blocks\.(\d+)\.attn\.hook_z", settings.get_text("act_name") or "")
    return Description(
        lm="gpt2",
        site=f"transformer.h.{hook[1]}.attn.c_proj:in" if hook else settings.get_text("act_name"),
        context=settings.get("seq_len"),
        settings=settings.table,
    )


def _hook_z_config(file: Path) -> Path:
    return file.with_name(f"{file.name.partition('.pt')[0]}_cfg.json")


class _AttentionSuite(Suite):
    """A suite whose files are recognised by the settings beside them."""

    def find(self, path: Path) -> Path | None:
        """Return the file of an SAE: `path` itself, if NAME_cfg.json is beside it."""
        if path.is_dir() or not _hook_z_config(path).is_file():
            return None
        return super().find(path)


QWEN_SCOPE = Suite(
    "qwen_scope",
    r"layer\d+\.sae\.pt",
    *("W_enc", "b_enc", "W_dec", "b_dec"),
    *("nd", "dn"),
    activation="topk",
    centered=False,
    describe=_qwen_scope,
)
GOODFIRE = Suite(
    "goodfire",
    r".*\.pth?",
    *("encoder_linear.weight", "encoder_linear.bias"),
    *("decoder_linear.weight", "decoder_linear.bias"),
    *("nd", "dn"),
    activation="relu",
    centered=False,
    describe=_named_after_the_lm("Goodfire"),
)
QRESEARCH = Suite(
    "qresearch",
    r".*-SAE-l\d+\.pth?",
    *("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"),
    *("nd", "dn"),
    activation="relu",
    centered=False,
    describe=_named_after_the_lm("qresearch"),
)
HOOK_Z = _AttentionSuite(
    "hook_z",
    r".*\.pt",
    *("W_enc", "b_enc", "W_dec", "b_dec"),
    *("dn", "nd"),
    activation="relu",
    centered=True,
    describe=_hook_z,
)
