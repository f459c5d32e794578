"""The bytes that a plan counts are those that the collectives of four real processes send, by name, to the last one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ksparse.config import MeshConfig, Recipe, from_dict, to_dict
from ksparse.planning.costs import LMSpec, PlanInput, communication
from ksparse.planning.hardware import DEVICES
from ksparse.planning.steps import choose_step

STEPS, COMPARED = 4, (1, 2)
"""Steps 2 and 3 are compared: the first and the last also log."""
CASES = {  # what is changed in the recipe; the share of dead latents that a plan is to assume
    "2 x 2": ({}, 0.5),
    "2 x 2, none dead, a slice offers 3": ({"sae.dead_after": 10**9, "mesh.capacity": 1.5}, 0.0),
    "2 x 2, AuxK on a quarter, by batch; bfloat16": (
        {"sae.auxk_share": 0.25, "sae.auxk_norm": "batch", "acts.store": "bfloat16"},
        0.5,
    ),
    "2 x 2, Multi-TopK": ({"sae.multi_topk": 0.125}, 0.5),
    "1 x 4": ({"mesh.data": 1, "mesh.latent": 4}, 0.5),
    "1 x 4, in plain torch": ({"mesh.data": 1, "mesh.latent": 4, "run.kernels": "torch"}, 0.5),
    "1 x 4, summed in bfloat16": (
        {"mesh.data": 1, "mesh.latent": 4, "mesh.reduce": "bfloat16"},
        0.5,
    ),
    "4 x 1, preselected": ({"mesh.data": 4, "mesh.latent": 1, "optim.approx_topk": "int8"}, 0.5),
}


def recipe(given: Recipe, changes: dict) -> Recipe:
    """Return a run of four steps on which latents that the step before did not use are dead."""
    table = to_dict(given)
    changes = {
        "sae.n_latents": 256,
        "sae.k_aux": 8,
        "sae.dead_after": 1,
        "tokens": STEPS * 64,
        "acts.mix": 64,
        "acts.lm_batch": 1,
        "run.log_every": 100,
        "run.save_every": 100,
        "mesh.data": 2,
        "mesh.latent": 2,
        "mesh.timeout": 200.0,
    } | changes
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (table[section] if section else table)[name] = value
    return from_dict(table)


@pytest.fixture(scope="module")
def asked(tmp_path_factory, tiny_lm, text_file):
    from ksparse.config import ActsConfig

    given = from_dict(
        {
            "acts": vars(
                ActsConfig(
                    lm=str(tiny_lm("gpt2")), site="resid_post.1", text=str(text_file), context=16
                )
            ),
            "sae": {"k": 4},
            "optim": {"lr": 3e-3},
            "run": {"device": "cpu"},
            "batch": 64,
            "tokens": 64,
            "threads": 1,
        }
    )
    return {name: recipe(given, changes) for name, (changes, _) in CASES.items()}


@pytest.fixture(scope="module")
def sent(asked, tmp_path_factory):
    """Return the bytes by name of each step of each case, for each of four processes."""
    folder = tmp_path_factory.mktemp("mesh")
    (folder / "cases.json").write_text(
        json.dumps({name: to_dict(each) for name, each in asked.items()})
    )
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=270,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("name", CASES)
def test_a_plan_counts_the_bytes_that_are_sent_by_name(name, asked, sent):
    each = asked[name]
    mesh = MeshConfig(each.mesh.data, each.mesh.latent)
    step = choose_step(each, "cpu", processes=4)
    planned = {
        one.name: one.bytes
        for one in communication(
            PlanInput(each, LMSpec(16, 0, 0), DEVICES["laptop"], step, dead=CASES[name][1]), mesh
        )
    }
    block, again = planned.pop("block"), planned.pop("values_again", 0)
    for number in COMPARED:
        steps = [process[name][number] for process in sent]
        blocks = [step.pop("block", 0) for step in steps]
        assert steps[0].pop("values_again", 0) <= 4 * again  # depends on the data
        assert steps[0] == planned
        assert sum(blocks) == 4 * block  # contexts are dealt out whole, so processes' parts differ


def work(folder: Path) -> None:
    """Be one of the processes: train each case, and write what was sent in each of its steps."""
    import torch.distributed as dist

    from ksparse import distributed as meshes
    from ksparse.training.train import train

    counts: list[Counter] = []
    reduce = meshes.Mesh.all_reduce_max_ints

    def count(self, name, *rest):
        numbers = reduce(self, name, *rest)
        if name == "stop":  # the end of a step
            counts.append(Counter(self.sent))
        return numbers

    meshes.Mesh.all_reduce_max_ints = count
    dist.init_process_group("gloo")
    found = {}
    for name, table in json.loads((folder / "cases.json").read_text()).items():
        counts.clear()
        train(from_dict(table), folder / name)
        found[name] = [dict(after - before) for before, after in zip([Counter(), *counts], counts)]
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401 - once, not in each process
    from mesh import fork

    fork(4, lambda: work(Path(sys.argv[1])))
