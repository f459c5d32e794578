"""SAEs of three libraries, trained on the same activations and judged in one comparison; one of them judged by SAELens too.

    python bench/three_libraries.py --shards ACTS/HASH --lm LM --text TEXT --ours RUN --out DIR \\
        --sae-lens ENV/bin/python --sparsify ENV/bin/python

ACTS/HASH: a folder of `ksparse shard`. RUN: a TopK run on these shards; its n, k, tokens, batch and order of rows are those of all.
SAELens trains with its SAETrainer, sparsify with its Trainer (peers/sae_lens_topk.py, peers/sparsify_topk.py), each with its defaults; each saves in its own
format with its own code. Activations are multiplied by one number, so that their norm is sqrt(d) on average: neither normalises by default, and with
raw activations their learning rates would be those of another problem. SAELens' own fold_activation_norm_scaling_factor, and the same product for sparsify,
puts the number into the weights before saving, so that both files take raw activations. Then:

    ksparse compare OURS SAE_LENS SPARSIFY --evals downstream,stats --against OURS

and `sae_lens.evals.run_evals` on the SAELens SAE, on the contexts that ksparse reads (peers/evals_sae_lens.py). SAELens' means are computed again by ksparse's
code and LM by SAELens' definitions: they must be the same numbers. Environments: sae-lens==6.54.12; eai-sparsify==1.3.3 without torchvision.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import ksparse
from ksparse.config import from_dict
from ksparse.config.evaluation import EvalConfig
from ksparse.data.sharded import ShardStream
from ksparse.data.shards import Shards
from ksparse.evals import losses
from ksparse.evals.batches import HeldOut, HeldOutBatch
from ksparse.lm.head import Logits
from ksparse.lm.model import LM

HERE = Path(__file__).resolve().parent


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    saes = {"ksparse": args.ours} | {
        name: train(name, python, args)
        for name, python in (("sae_lens", args.sae_lens), ("sparsify", args.sparsify))
    }
    table = compare(saes, args)
    print(table)
    if args.eval_contexts:
        for line in beside_sae_lens(saes["sae_lens"], args):
            print(line)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("shards", "ours", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("lm", "text", "sae-lens", "sparsify"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (
        ("tokens", 1_200_000),
        ("batch", 1024),
        ("seed", 0),
        ("threads", 2),
        ("eval-tokens", 10_000),
        ("eval-contexts", 32),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def train(name: str, python: str, args: argparse.Namespace) -> Path:
    """Let a library train on the rows of the shards, in the order of our run; return its file."""
    ours = ksparse.load(args.ours)
    acts = ours.metadata["acts"]
    data, work = args.out / "data", args.out / name
    layer = int(acts["site"].removeprefix("resid_post."))
    saved = work / "sae" / f"layers.{layer}"  # sparsify's name for it
    if (saved / "cfg.json").is_file():
        return saved
    if not (data / "train.npy").is_file():
        write_rows(data, args)
    command = [python, HERE / "peers" / f"{name}_topk.py", "--data", data, "--out", work]
    sizes = {"n": ours.shape.n_latents, "k": ours.shape.k}
    sizes |= {key: getattr(args, key) for key in ("tokens", "batch", "seed", "threads")}
    for key, value in sizes.items():
        command += [f"--{key}", str(value)]
    belongs = {
        "model_name": args.lm,
        "module": f"model.layers.{layer}",
        "context": acts["context"],
        "factor": json.loads((data / "factor.json").read_text()),
    }
    command += ["--save", saved, "--belongs", json.dumps(belongs)]
    subprocess.run([str(part) for part in command], check=True, env=environment())
    return saved


def write_rows(data: Path, args: argparse.Namespace) -> None:
    """Write the training rows in order, and the factor that makes their mean norm sqrt(d)."""
    shards = Shards(args.shards)
    stream = ShardStream(shards, batch=args.batch, seed=args.seed)
    steps = args.tokens // args.batch
    data.mkdir(parents=True, exist_ok=True)
    sample = stream.sample(65_536)
    # as SAELens' estimate_scaling_factor: sqrt(d) over the mean norm
    factor = math.sqrt(shards.d_model) / sample.norm(dim=1).mean().item()
    rows = np.lib.format.open_memmap(
        data / "partial.npy", "w+", np.float32, (steps * args.batch, shards.d_model)
    )
    for step, batch in zip(range(steps), stream.batches()):
        rows[step * args.batch : (step + 1) * args.batch] = batch.x.numpy()
    rows.flush()
    (data / "factor.json").write_text(json.dumps(factor))
    (data / "partial.npy").rename(data / "train.npy")


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent / "src")}


def compare(saes: dict[str, Path], args: argparse.Namespace) -> str:
    """Return what `ksparse compare` prints."""
    command = [sys.executable, "-m", "ksparse", "compare", *saes.values(), "--against", args.ours]
    command += ["--evals", "downstream,stats", "--like", args.ours, "--lm", args.lm]
    command += ["--text", args.text, "--tokens", args.eval_tokens, "--lm-batch", 8]
    command += ["--examples", 0, "--json", args.out / "compare.json"]
    done = subprocess.run(
        [str(part) for part in command], check=True, env=environment(), stdout=subprocess.PIPE
    )
    (args.out / "compare.txt").write_bytes(done.stdout)
    return done.stdout.decode()


def beside_sae_lens(folder: Path, args: argparse.Namespace) -> list[str]:
    """Return lines: SAELens' number, ours by our definition, and ours by SAELens'.

    Ours by our definition are those of `downstream` and `stats`; both are computed here from the
    same batches. SAELens' positions are all that are no special token, also those before a special
    token (for losses) and the last (for KL); it sets the activation to zero at every position, ours
    only where activations are kept.
    """
    sae = ksparse.load(folder)
    own_acts = from_dict({"acts": ksparse.load(args.ours).metadata["acts"]}).acts
    acts = dataclasses.replace(
        own_acts,
        lm=args.lm,
        text=args.text or own_acts.text,
        shards="",
        lm_batch=4,
    )
    lm = LM(acts=acts)
    options = EvalConfig(tokens=args.eval_contexts * acts.context, device="cpu")
    batches = list(itertools.islice(HeldOut(lm, acts, options), args.eval_contexts // 4))
    contexts = args.out / "contexts.npy"
    np.save(contexts, torch.cat([batch.contexts.tokens for batch in batches]).numpy())
    theirs = json.loads(
        subprocess.run(
            [args.sae_lens, HERE / "peers" / "evals_sae_lens.py", folder, contexts],
            check=True,
            env=environment(),
            stdout=subprocess.PIPE,
        ).stdout.splitlines()[-1]
    )
    own, same = Means(), Means()
    x, recon, l0 = [], [], []
    with torch.no_grad():
        for batch in batches:
            x_hat = sae(batch.x)
            x.append(batch.x.double())
            recon.append(x_hat.double())
            l0.append((sae.encode(batch.x).values > 0).sum(1).double())
            measure(batch, x_hat, own, same)
            batch.__dict__.pop("cached_run", None)
    x, recon, l0 = torch.cat(x), torch.cat(recon), torch.cat(l0)
    sizes = [len(batch.x) for batch in batches]
    error, spread = (x - recon).square().sum(1), (x - x.mean(0)).square().sum(1)
    explained = 1 - error.sum().item() / spread.sum().item()
    legacy = torch.cat(
        [
            1 - e / (part - part.mean(0)).square().sum(1)
            for e, part in zip(error.split(sizes), x.split(sizes), strict=True)
        ]
    )
    ours = scores(own) | {"explained_variance": explained, "l0": l0.mean().item()}
    again = scores(same) | {
        "explained_variance": explained,
        "explained_variance_legacy": legacy.mean().item(),
        "mse": error.mean().item(),
        "l0": l0.mean().item(),
    }
    rows = {
        key: {"sae_lens": theirs[key], "ours": ours.get(key), "again": again[key]} for key in again
    }
    (args.out / "beside.json").write_text(json.dumps(rows, indent=1))
    return [f"{len(x)} activations, {len(own.values['ce_loss_with_sae'])} batches"] + [
        f"{key:<28}"
        + "".join(f"{'' if value is None else format(value, '.6g'):>14}" for value in row.values())
        for key, row in rows.items()
    ]


class Means:
    """Sums of losses over positions, divided once."""

    def __init__(self) -> None:
        self.values: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        self.values.setdefault(name, []).append(values.double())

    def __getitem__(self, name: str) -> float:
        return torch.cat(self.values[name]).mean().item()


def measure(batch: HeldOutBatch, x_hat: torch.Tensor, own: Means, same: Means) -> None:
    """Add a batch's losses at our positions and at SAELens'."""
    keep, run = batch.keep, batch.cached_run
    targets = torch.nn.functional.pad(batch.contexts.tokens[:, 1:], (0, 1))
    has_next = torch.ones_like(keep)
    has_next[:, -1] = False
    text_next = torch.nn.functional.pad(keep[:, 1:], (0, 1)) & keep

    def replace(rows: torch.Tensor, where: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def edit(activations: torch.Tensor) -> torch.Tensor:
            changed = activations.clone()
            changed[where] = rows
            return changed

        return edit

    nothing = x_hat.new_zeros(())
    spliced = batch.lm.predict_patched(run, replace(x_hat, keep))
    zero = batch.lm.predict_patched(run, replace(nothing, keep))
    zero_all = batch.lm.predict_patched(run, replace(nothing, torch.ones_like(keep)))
    for found, losses_at, kl_at, zeroed in (
        (own, text_next, text_next, zero),
        (same, keep & has_next, keep, zero_all),
    ):
        for name, logits in (("with_sae", spliced), ("with_ablation", zeroed)):
            clean, loss, kl = compare_all(run.predictions, logits, targets, kl_at)
            at_loss = losses_at[kl_at]
            found.add(f"ce_loss_{name}", loss[at_loss])
            found.add(f"kl_div_{name}", kl)
            if name == "with_sae":
                found.add("ce_loss_without_sae", clean[at_loss])


def compare_all(
    before: Logits, after: Logits, targets: torch.Tensor, where: torch.Tensor
) -> list[torch.Tensor]:
    """Return clean losses, losses and KL [p] at the positions of a mask [b, t]."""
    clean, changed, targets = before.at(where), after.at(where), targets[where]
    parts = [losses.compare(clean[rows], changed[rows], targets[rows]) for rows in clean.slices()]
    return [torch.cat([part[column] for part in parts]) for column in range(3)]


def scores(means: Means) -> dict[str, float]:
    """Return the means, and SAELens' two scores of them."""
    found = {name: means[name] for name in means.values}
    zero, spliced = found["ce_loss_with_ablation"], found["ce_loss_with_sae"]
    found["ce_loss_score"] = (zero - spliced) / (zero - found["ce_loss_without_sae"])
    found["kl_div_score"] = 1 - found["kl_div_with_sae"] / found["kl_div_with_ablation"]
    return found


if __name__ == "__main__":
    main()
