"""Do the libraries themselves agree? Their SAEs read here, ours read there, on real activations.

    python bench/interop.py --python sae_lens=ENV/bin/python --python dictionary_learning=… --python sparsify=… --python llamascopium=… --openai CHECKOUT
    python bench/interop.py --python … --golden tests/golden/interop      small ones, for the tests
    python bench/interop.py --clients ENV/bin/python --attach ENV/bin/python --attach … --neuronpedia CHECKOUT --postgres URL --node DIR

Each library is in an environment of its own (`pip install torch==2.13.0`, then sae-lens==6.54.12, dictionary-learning==0.1.0 with nnsight, or eai-sparsify==1.3.3 without the
torchvision that comes along, llamascopium==2.0.0b34 with transformer-lens<4); those not named are left out. openai/sparse_autoencoder is not on the package index:
`--openai CHECKOUT` names a clone. Gemma Scope's files are written by hand and read by SAELens. Activations are those of pylm/0.3m at resid_post.2,
on held-out text. Differences are the largest over all of them, in units of the root mean square of the activations (latents: of the SAE's inputs). Latents of
ours are those of the copy: some formats need other units.

Clients of the formats are judged by their own code: SAELens' run_evals, SAEDashboard's NeuronpediaRunner and SAEBench's loaders (peers/clients_sae.py, which says
what --clients needs), TransformerLens and nnsight (peers/clients_attach.py, in each environment of --attach), Neuronpedia's importer on a Postgres server
(peers/clients_neuronpedia.py). One that stops, or differs, makes the exit status 1.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ksparse import interop, pylm
from ksparse.config import ActsConfig, Recipe, from_dict
from ksparse.config.evaluation import EvalConfig
from ksparse.data.contexts import Corpus
from ksparse.data.documents import documents
from ksparse.errors import InputError
from ksparse.evals import runner
from ksparse.explain import explain
from ksparse.explain.answers import Answers
from ksparse.explain.examples import collect
from ksparse.explain.explain import Explainer
from ksparse.explain.options import ExplainConfig
from ksparse.explain.server import Answer, ChatServer
from ksparse.interop import neuronpedia
from ksparse.lm.model import LM
from ksparse.sae.model import SAE
from ksparse.storage.run_folder import RunFolder
from ksparse.training.train import train

HERE = Path(__file__).resolve().parent
RUNS_ON = {
    "sae_lens": "sae_lens",
    "dictionary_learning": "dictionary_learning",
    "sparsify": "sparsify",
    "llamascopium": "llamascopium",
    "gemma_scope": "sae_lens",
}
"""The library whose environment an adapter needs; openai's needs a clone and torch alone."""
BOUND = 1e-5
ROWS = 512
OURS = [
    ("topk", "none"),
    ("topk", "dataset"),
    ("topk", "layer_norm"),
    ("topk", "unit_norm"),
    ("batch_topk", "dataset"),
    ("relu", "dataset"),
    ("relu", "none"),
    ("jump_relu", "dataset"),
    ("gated", "dataset"),
]


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    pythons = dict(each.split("=", 1) for each in args.python)
    adapters = {
        adapter: pythons[library] for adapter, library in RUNS_ON.items() if library in pythons
    }
    if args.openai:
        os.environ["OPENAI_SPARSE_AUTOENCODER"] = str(args.openai.resolve())
        adapters["openai"] = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        work = emptied(args.work) if args.work else Path(folder)
        raw = activations()
        np.save(work / "raw.npy", raw.numpy())
        np.save(
            work / "acts.npy", (raw / raw.square().mean().sqrt()).numpy()
        )  # as all who train on them scale them
        if args.golden:
            golden(args.golden, adapters, work)
            return
        rows = theirs(adapters, work) + (ours(adapters, work) if adapters else [])
        judged = clients(args, work)
    for row in judged:
        print(
            f"{row['client']:<22}{row['kind']:<34}{'ok' if row['ok'] else 'FAILED'}   {row['found']}"
        )
    for row in rows:
        print(
            f"{row['direction']:<7}{row['format']:<21}{row['kind']:<26}"
            + (
                f"latents {row['latents']:.1e}   recon {row['recon']:.1e}"
                if "recon" in row
                else row["refused"]
            )
        )
    worst = max(
        (max(row["latents"], row["recon"]) for row in rows if row.get("exact")), default=0.0
    )
    print(
        f"largest difference where nothing was asked to be inexact: {worst:.1e} ({'within' if worst <= BOUND else 'ABOVE'} {BOUND:.0e})"
    )
    args.out.write_text(
        json.dumps(
            {
                "bound": BOUND,
                "worst": worst,
                "torch": torch.__version__,
                "rows": rows,
                "clients": judged,
            },
            indent=1,
        )
        + "\n"
    )
    sys.exit(worst > BOUND or not all(row["ok"] for row in judged))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="LIBRARY=PATH",
        help="the interpreter of the library's environment",
    )
    parser.add_argument("--openai", type=Path, help="a clone of openai/sparse_autoencoder")
    parser.add_argument("--clients", metavar="PATH", help="the interpreter of peers/clients_sae.py")
    parser.add_argument(
        "--attach",
        action="append",
        default=[],
        metavar="PATH",
        help="an interpreter with TransformerLens or nnsight, and what ksparse needs",
    )
    parser.add_argument("--neuronpedia", type=Path, help="a clone of hijohnnylin/neuronpedia")
    parser.add_argument("--postgres", metavar="URL", help="of a Postgres server")
    parser.add_argument("--node", type=Path, help="a folder with node_modules/pg, typescript@5")
    parser.add_argument("--work", type=Path, help="keep what is trained there for the next run")
    parser.add_argument("--out", type=Path, default=Path("interop.json"))
    parser.add_argument(
        "--golden",
        type=Path,
        help="write small files with their expected outputs there, and nothing else",
    )
    return parser.parse_args()


def emptied(folder: Path) -> Path:
    """Remove what an earlier run left there, but what it trained."""
    for path in folder.glob("*"):
        if path.is_dir() and path.name != "runs":
            shutil.rmtree(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def activations() -> torch.Tensor:
    """Return raw held-out activations [rows, d]."""
    lm = LM("pylm/0.3m", site="resid_post.2")
    corpus = Corpus(lm.options, lm.tokenizer, "held-out", per_document=64)
    found: list[torch.Tensor] = []
    for context in corpus.contexts():
        batch = corpus.batch([context])
        found.append(lm.acts(batch.tokens, batch.attention)[batch.keep])
        if sum(map(len, found)) >= ROWS:
            break
    return torch.cat(found)[:ROWS]


def adapter(name: str, python: str, what: str, folder: Path, acts: Path, *more: str) -> None:
    """Run one adapter; stop with what it says if it fails."""
    command = [python, HERE / "peers" / f"formats_{name}.py", what, folder, acts, *more]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(f"{name} {what} failed:\n{done.stderr[-3000:]}")


def differences(sae: SAE, expected: Any, copy: SAE | None = None) -> dict[str, float]:
    """Compare latents with those of `copy`, and reconstructions with those of `sae`."""
    x = torch.from_numpy(expected["x"])
    size = x.square().mean().sqrt().item()
    with torch.no_grad():
        encoded = (copy or sae).encode(x).dense(sae.shape.n_latents).numpy()
        latents, recon = encoded, sae(x).numpy()
    own = (copy or sae).normalize(x).x.square().mean().sqrt().item()
    return {
        "latents": float(abs(latents - expected["latents"]).max()) / own,
        "recon": float(abs(recon - expected["recon"]).max()) / size,
    }


def theirs(adapters: dict[str, str], work: Path) -> list[dict[str, Any]]:
    """Read what each library made of its own."""
    rows = []
    for name, python in adapters.items():
        adapter(name, python, "make", work / name, work / "acts.npy")
        for folder in sorted(work.joinpath(name).iterdir()):
            found = differences(interop.load(folder / "sae"), np.load(folder / "expected.npz"))
            rows.append(
                {"direction": "theirs", "format": name, "kind": folder.name, "exact": True, **found}
            )
    return rows


def ours(adapters: dict[str, str], work: Path) -> list[dict[str, Any]]:
    """Write what ksparse trained in each format that holds it, and let the library read it."""
    saes = {
        f"{activation}-{normalize}": trained(activation, normalize, work)
        for activation, normalize in OURS
    }
    rows = []
    for name, python in adapters.items():
        folder = work / f"to-{name}"
        for kind, sae in saes.items():
            try:
                interop.write(sae, folder / kind / "sae", name, normalization="layer_norm")
            except InputError as error:
                rows.append(
                    {
                        "direction": "ours",
                        "format": name,
                        "kind": kind,
                        "refused": str(error).partition(";")[0],
                    }
                )
        adapter(name, python, "check", folder, work / "raw.npy")
        for each in sorted(folder.iterdir()):
            copy = interop.load(each / "sae")
            found = differences(saes[each.name], np.load(each / "expected.npz"), copy)
            rows.append(
                {
                    "direction": "ours",
                    "format": name,
                    "kind": each.name,
                    "exact": "unit_norm" not in each.name,
                    **found,
                }
            )
    return rows


def clients(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Let the clients of the formats use what ksparse writes."""
    rows: list[dict[str, Any]] = []
    if args.clients:
        rows += sae_clients(args.clients, work)
    if args.attach:
        trained("topk", "none", work)
    for python in args.attach:
        found = client(
            python, "attach", pylm.folder("0.3m"), "resid_post.2", work / "runs" / "topk-none"
        )
        rows += [
            {
                "client": row["object"],
                "kind": row["site"],
                "ok": row["logits"] < 1e-4 * row["effect"] and row["restored"],
                "found": f"x {row['x']:.1e}, logits {row['logits']:.1e} of {row['effect']:.1f}",
            }
            for row in found
        ]
    if args.neuronpedia:
        rows += neuronpedia_clients(args, work)
    return rows


def sae_clients(python: str, work: Path) -> list[dict[str, Any]]:
    folder, saes = work / "clients", {}
    raw = np.load(work / "raw.npy")
    for kind, sae in {
        f"{activation}-{normalize}": trained(activation, normalize, work)
        for activation, normalize in OURS
    }.items():
        for site in (
            ("resid_post.2", "model.layers.2") if "topk-unit" in kind else ("resid_post.2",)
        ):
            sae.metadata["acts"]["site"] = site
            name = kind if site == "resid_post.2" else f"{kind}-at-a-module"
            interop.write(sae, folder / "sae_lens" / name, "sae_lens", normalization="layer_norm")
        sae.metadata["acts"]["site"] = "resid_post.2"
        if sae.shape.normalize in ("none", "dataset"):
            target = folder / "dictionary_learning" / kind
            interop.write(sae, target, "dictionary_learning")
            np.save(target / "x.npy", raw)
            saes[kind] = sae
    acts = ActsConfig(lm="pylm/0.3m")
    texts = [text for _, _, text in itertools.islice(documents(acts, "held-out"), 60)]
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(each.split("\n")) for each in texts))
    rows = []
    for row in client(python, "sae", folder, pylm.folder("0.3m"), text):
        hidden = ("client", "kind", "keys", "logits")
        facts = {key: value for key, value in row.items() if key not in hidden}
        ok = "error" not in row
        if row["client"] == "dashboard" and row["kind"] == "topk-none" and ok:
            facts |= (compared := compared_logits(row["logits"], work))
            ok = compared["latents"] > 0 and compared["logits"] < 1e-3  # it rounds to 3 digits
        if row["client"] == "saebench" and ok:
            target = folder / "dictionary_learning" / row["kind"]
            expected = dict(np.load(target / "found.npz")) | {"x": raw}
            for extra in ("x.npy", "found.npz"):
                (target / extra).unlink()
            facts |= differences(saes[row["kind"]], expected, interop.load(target))
            ok = max(facts["latents"], facts["recon"]) <= BOUND
        rows.append({"client": row["client"], "kind": row["kind"], "ok": ok, "found": facts})
    return rows


class Parrot(ChatServer):
    """A server that gives the same answer to every request."""

    def ask(self, body: dict[str, Any], stop: Any = None) -> Answer:
        return Answer('words with "quotes", a \\ and 日本')


def explained(run: RunFolder) -> None:
    """Add explanations in words to a run, as `ksparse explain` does."""
    options = ExplainConfig(latents=20, tokens=20_000, device="cpu")
    sae = interop.load(run.path)
    specimens = collect(sae, LM(acts=run.subject().acts, device="cpu"), options)
    explainer = Explainer(specimens, options, Parrot("http://127.0.0.1", "none"), Answers(run))
    runner.write_results(run, {explain.NAME: explainer.run()})


def neuronpedia_clients(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Let Neuronpedia import the folder made for it, and what its own converter makes of batch-K.json."""
    run = evaluated("unit_norm", work)
    explained(run)
    names = neuronpedia.Publication(model="tiny", set="test", creator="me")
    neuronpedia.export_bulk(run, work / "import", names)
    neuronpedia.export_dashboard(run, work / "dashboards", names)
    source = work / "import" / "tiny" / "2-test"
    rows = {
        table: [
            json.loads(line)
            for file in (source / name).glob("*.gz")
            for line in gzip.decompress(file.read_bytes()).splitlines()
        ]
        for table, name in (
            ("Neuron", "features"),
            ("Activation", "activations"),
            ("Explanation", "explanations"),
        )
    }
    kinds = Counter(row["notes"].partition(":")[0] for row in rows["Explanation"])
    complete = set(kinds) == {"n2g", "explain"} and all(row["pos_str"] for row in rows["Neuron"])
    written = {"SourceRelease": 1, "Model": 1, "SourceSet": 1, "Source": 1}
    written |= {table: len(each) for table, each in rows.items()}
    found = []
    for kind, folder, expected in (
        ("its import", source, written),
        ("its converter of batch-K.json", work / "dashboards", written | {"Explanation": 0}),
    ):
        python = args.clients or sys.executable
        imported = client(python, "neuronpedia", args.neuronpedia, args.postgres, folder, args.node)
        ok = complete and imported == expected
        facts = imported | (dict(kinds) if folder is source else {})
        found.append({"client": "Neuronpedia", "kind": kind, "ok": ok, "found": facts})
    return found


def evaluated(normalize: str, work: Path) -> RunFolder:
    """Return the run of a TopK SAE with what viewers show."""
    trained("topk", normalize, work)
    run = RunFolder(work / "runs" / f"topk-{normalize}")
    if run.eval("stats") is None:
        options = EvalConfig(tokens=20_000, device="cpu")
        results = runner.evaluate(interop.load(run.path), None, ["stats", "n2g"], options)
        runner.write_results(run, results)
    return run


def compared_logits(theirs: dict[str, Any], work: Path) -> dict[str, float]:
    """Compare the direct logits of SAEDashboard's own run with those of `--to sae_dashboard`."""
    folder = work / "dashboards-none"
    neuronpedia.export_dashboard(evaluated("none", work), folder)
    features = [
        feature
        for file in sorted(folder.glob("batch-*.json"))
        for feature in json.loads(file.read_text())["features"]
    ]
    worst, shared, both = (
        0.0,
        0,
        [each for each in features if str(each["feature_index"]) in theirs],
    )
    for ours in both:
        other = theirs[str(ours["feature_index"])]
        for end in ("pos", "neg"):
            values = zip(ours[f"{end}_values"], other[f"{end}_values"], strict=True)
            worst = max(worst, *(abs(a - b) for a, b in values))
            shared += len(set(ours[f"{end}_str"]) & set(other[f"{end}_str"]))
    return {
        "latents": len(both),
        "logits": worst,
        "shared_of_20": shared / max(1, len(both)),
    }


def client(python: str, name: str, *arguments: Any) -> Any:
    """Run one client; return what it prints as JSON, or stop with what it says if it fails."""
    done = subprocess.run(
        [python, HERE / "peers" / f"clients_{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent / "src")},
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def trained(activation: str, normalize: str, work: Path) -> SAE:
    """Return an SAE that ksparse trained for a little while."""
    table = {
        "acts": {"lm": "pylm/0.3m", "site": "resid_post.2", "normalize": normalize},
        "sae": {"n_latents": 256, "k": 8, "activation": {"kind": activation}},
        "tokens": 60_000,
        "threads": 1,
        "run": {"device": "cpu", "kernels": "torch"},
    }
    recipe: Recipe = from_dict(table)
    folder = work / "runs" / f"{activation}-{normalize}"
    return interop.load(folder if folder.exists() else train(recipe, folder).path)


def golden(folder: Path, adapters: dict[str, str], work: Path) -> None:
    """Write a few KB of each library: 16 latents on 8 channels, with what the library makes of 5 rows."""
    np.save(work / "small.npy", np.load(work / "acts.npy")[:, :8])
    for name, python in adapters.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        adapter(
            name,
            python,
            "make",
            folder / name,
            work / "small.npy",
            "--n",
            "16",
            "--k",
            "3",
            "--rows",
            "5",
        )
        print(name, ", ".join(sorted(path.name for path in (folder / name).iterdir())))


if __name__ == "__main__":
    main()
