"""What a plan counts is what there is: by hand, against an optimiser's own tensors, and in the advice that it gives."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ksparse import cli
from ksparse.config import MeshConfig, Recipe, from_dict, to_toml
from ksparse.errors import DiskError, OutOfMemoryError
from ksparse.kernels import torch_ops
from ksparse.limits import widest
from ksparse.planning import costs, flops, hardware, meshes, plan
from ksparse.planning.costs import Collective, LMSpec, PlanInput
from ksparse.planning.hardware import DEVICES, Device
from ksparse.sae.model import SAE, Shape
from ksparse.training import train
from ksparse.training.steps.explicit import ExplicitStep

UNIT = Device("unit", 1e9, 1e9, 4e9, 1e8, 1e7, 1e6, 2)
"""A device of round figures: 1 GFLOP/s, 100 MB/s, two to a node with 10 MB/s there and 1 MB/s between nodes."""


def recipe(**changes) -> Recipe:
    table = {
        "acts": {"context": 16, "mix": 256, "lm_batch": 8},
        "sae": {"n_latents": 64, "k": 4, "k_aux": 6},
        "optim": {},
        "run": {},
        "mesh": {},
        "curve": {},
        "batch": 64,
        "tokens": 64_000,
    }
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (table[section] if section else table)[name] = value
    return from_dict(table)


def case(card: Device = UNIT, *, step: str = "torch", dead: float = 0.25, **changes) -> PlanInput:
    return PlanInput(recipe(**changes), LMSpec(16, 1000, 600), card, step, dead=dead)


def test_the_prefixes_of_a_matryoshka_sae_are_decoded_once_more():
    plain, nested = recipe(), recipe(sae__prefixes=[8, 16, 32])
    k, d = plain.sae.k, 16
    assert flops.decoder(nested, d) - flops.decoder(plain, d) == 3 * 2 * k * d
    assert flops.decoder(recipe(sae__prefix_draws=3), d) == flops.decoder(nested, d)


# ---- by hand -----------------------------------------------------------------------------------------------------


def test_the_memory_of_a_rank_of_2_x_2_is_what_a_hand_counts():
    own = 2 * 32 * 16 + 32 + 16  # 32 of 64 latents
    assert costs.memory(case(), MeshConfig(2, 2)) == {
        "weights": 4 * own,
        "moments": 8 * own,
        "average": 4 * own,
        "gradients": 4 * own,
        "pre-activations": 4 * 32 * 32,  # 32 of 64 tokens
        "codes": 12 * 32 * 4,
        "values of all slices": 16 * 2 * 32 * 6,  # of AuxK 6 are offered, of the main code 4
        "batch": 5 * 4 * 32 * 16,
        "gathered rows": 4 * 32 * 4 * 16,
        "AuxK": 4 * (4 * 8 * 16 + 2 * 32 * 8),  # 8 dead latents
        "activations block": 256 * (4 * 16 + 16),
        "first activations": 4 * 32_768 * 16,
        "LM": 4 * 1000,
        "LM at work": 12 * 8 * 16 * 16 * 4,
        "libraries": costs.CONTEXT,
    }


@pytest.mark.parametrize(
    "changes, part, size",
    [
        ({"step": "native"}, "gradients", None),
        ({"step": "native"}, "copy for a checkpoint", None),
        ({"optim__ema": 0.0}, "average", None),
        ({"dead": 0.0}, "AuxK", None),
        ({"sae__auxk_coef": 0.0}, "AuxK", None),
        ({"acts__store": "bfloat16"}, "activations block", 256 * (2 * 16 + 16)),
        ({"acts__lm_dtype": "bfloat16"}, "LM", 2000),
        ({"acts__shards": "somewhere"}, "LM", None),
        ({"acts__shards": "somewhere"}, "activations block", None),
        ({"step": "triton"}, "pre-activations", 5 * 3 * 64),
        (
            {"step": "autograd", "sae__activation": {"kind": "relu"}},
            "pre-activations",
            5 * 4 * 64 * 64,
        ),
        ({"curve__held_out": 100}, "held-out activations", 6400),
    ],
)
def test_options_change_the_part_of_the_memory_that_they_say(changes, part, size):
    assert costs.memory(case(**changes), MeshConfig()).get(part) == size


def test_reconstructions_summed_in_bfloat16_are_copied_first():
    asked = case(mesh__reduce="bfloat16")
    assert costs.memory(asked, MeshConfig(2, 2))["batch"] == (5 * 4 + 2) * 32 * 16
    assert costs.memory(asked, MeshConfig(4, 1))["batch"] == 5 * 4 * 16 * 16


def test_main_memory_holds_five_copies_of_a_shard_at_a_checkpoint():
    whole, own = 2 * 64 * 16 + 64 + 16, 2 * 32 * 16 + 32 + 16
    assert costs.main_memory(case(), MeshConfig(2, 2)) == {"at a checkpoint": 4 * own * 5}
    for step, copies in (("native", 1), ("torch", 0)):  # one process on a CPU waits for it
        assert (
            costs.main_memory(case(DEVICES["laptop"], step=step), MeshConfig())["at a checkpoint"]
            == 4 * whole * copies
        )


def test_the_product_is_taken_in_parts_that_fit():
    large = case(sae__n_latents=2**20, sae__k=4, batch=2**12, acts__mix=2**12)
    assert costs.memory(large, MeshConfig())["pre-activations"] == 4 * 2**27


def test_the_collectives_of_2_x_2_are_what_a_hand_counts():
    given = {
        each.name: (each.kind, each.axis, each.ranks, each.bytes)
        for each in costs.communication(case(), MeshConfig(2, 2))
    }
    assert given == {
        "counts": ("all_gather", "latent", 2, 8),
        "values": ("all_gather", "latent", 2, 4 * 32 * (4 + 6)),
        "recon": ("all_reduce", "latent", 2, 4 * 32 * 16 * 2),
        "b_pre_encoder": ("all_reduce", "latent", 2, 4 * 16),
        "norm": ("all_reduce", "latent", 2, 8),
        "loss": ("all_reduce", "data", 2, 8 + 8),
        "W_enc": ("all_reduce", "data", 2, 4 * 32 * 16),
        "W_dec": ("all_reduce", "data", 2, 4 * 32 * 16),
        "b_enc": ("all_reduce", "data", 2, 4 * 32),
        "b_pre": ("all_reduce", "data", 2, 4 * 16),
        "fired": ("all_reduce", "data", 2, 32),
        "finite": ("all_reduce", "all", 4, 8),
        "stop": ("all_reduce", "all", 4, 16),
        "block": ("broadcast", "all", 4, 4 * 64 * 16 // 4),
    }


@pytest.mark.parametrize(
    "changes, name, size",
    [
        ({"dead": 0.0}, "values", 4 * 32 * 4),
        ({"dead": 0.0}, "recon", 4 * 32 * 16),
        ({"mesh__capacity": 1.5}, "values", 4 * 32 * (3 + 6)),
        ({"mesh__capacity": 1.0, "dead": 0.0}, "values", None),
        ({"sae__auxk_coef": 0.0}, "counts", None),
        ({"sae__k_aux": 16}, "values", 4 * 32 * 4),
        ({"sae__auxk_norm": "batch"}, "spread", 4 * 16 + 4),
        ({"mesh__reduce": "bfloat16"}, "recon", 2 * 32 * 16 * 2),
        ({"mesh__reduce": "bfloat16"}, "W_enc", 4 * 32 * 16),
        ({"sae__auxk_share": 0.25}, "recon", 4 * 16 * (32 + 16)),
        ({"acts__shards": "somewhere"}, "block", None),
        ({"step": "autograd", "sae__multi_topk": 0.125}, "values", 4 * 32 * (4 + 12 + 6)),
        ({"step": "autograd", "sae__multi_topk": 0.125}, "values_again", 4 * 2 * 16),
        ({"step": "native", "optim__approx_topk": "int8"}, "candidates", 8),
        ({"step": "native"}, "W_enc", 4 * 32 * 16),
        ({"step": "autograd", "sae__prefixes": [8, 16]}, "recon", 4 * 32 * 16 * 4),
        ({"step": "autograd", "sae__activation": {"kind": "relu"}}, "penalty", 4),
        ({"step": "autograd", "sae__activation": {"kind": "gated"}}, "recon", 4 * 32 * 16 * 2),
        ({"step": "autograd", "sae__activation": {"kind": "gated"}}, "r_mag", 4 * 32),
        ({"step": "autograd", "sae__activation": {"kind": "jump_relu"}}, "penalty_mean", 4),
        ({"step": "autograd", "sae__activation": {"kind": "batch_topk"}}, "largest", 12 + 8192),
        ({"step": "autograd", "sae__multi_topk": 0.125}, "b_pre_encoder", 3 * 64),
    ],
)
def test_options_change_what_is_exchanged(changes, name, size):
    given = {
        each.name: each.bytes for each in costs.communication(case(**changes), MeshConfig(2, 2))
    }
    assert given.get(name) == size


@pytest.mark.parametrize(
    "mesh, axes",
    [
        (MeshConfig(1, 1), set()),
        (MeshConfig(2, 1), {"data", "all"}),
        (MeshConfig(1, 2), {"latent", "all"}),
    ],
)
def test_an_axis_of_one_rank_exchanges_nothing(mesh, axes):
    assert {each.axis for each in costs.communication(case(), mesh)} == axes


def test_a_ring_sends_what_the_textbook_says():
    assert Collective("", "all_reduce", "data", 4, 1000).sent == 2 * 3 / 4 * 1000
    assert Collective("", "all_gather", "latent", 4, 1000).sent == 3 * 1000


def test_the_time_of_a_step_is_what_a_hand_counts():
    spent = costs.seconds(case(dead=0.0), MeshConfig(1, 1))
    gather, over = hardware.GATHER * 1e8, hardware.MEMORY * 1e8
    assert spent["encoder product"] == pytest.approx(2 * 64 * 64 * 16 / 0.8e9)
    assert spent["selection"] == pytest.approx(4 * 64 * 64 * 9 / over)
    assert spent["sparse parts"] == pytest.approx(6 * 64 * 4 * 16 * 4 / gather)
    assert spent["Adam, norms, average"] == pytest.approx(2 * 64 * 16 * 72 / over)
    assert spent["LM"] == pytest.approx(2 * 600 * 64 * 16 / 15 / (hardware.LM * 1e9))
    assert "AuxK" not in spent and sum(spent.values()) == pytest.approx(
        64 / costs.estimate(case(dead=0.0), MeshConfig()).tokens_per_s
    )


@pytest.mark.parametrize(
    "mesh, axis, rate",
    [
        (MeshConfig(1, 2), "latent", 1e7),
        (MeshConfig(1, 4), "latent", 2e6),  # two ports of a node together
        (MeshConfig(2, 1), "data", 1e7),
        (MeshConfig(2, 2), "data", 1e6),
        (MeshConfig(4, 1), "data", 2e6),
        (MeshConfig(2, 2), "latent", 1e7),
        (MeshConfig(2, 2), "all", 2e6),
    ],
)
def test_neighbours_exchange_over_the_link_and_nodes_over_the_ports_that_a_group_has_there(
    mesh, axis, rate
):
    name = {
        "latent": "exchange over latents",
        "data": "exchange over data",
        "all": "exchange of activations",
    }[axis]
    given = [each for each in costs.communication(case(), mesh) if each.axis == axis]
    expected = (
        sum(each.sent for each in given) / (hardware.LINK * rate)
        + sum(each.calls for each in given) * hardware.LATENCY
    )
    assert given and costs.seconds(case(), mesh)[name] == pytest.approx(expected)


# ---- what there is -----------------------------------------------------------------------------------------------


def test_weights_moments_and_average_are_as_large_as_an_optimisers():
    asked = recipe()
    sae = SAE(Shape(16, 64, 4, asked.acts.normalize))
    optimizer = ExplicitStep(sae, asked)
    optimizer.backward(
        torch.randn(64, 16), baseline=1.0, dead=torch.tensor([], dtype=torch.long), k_aux=8
    )
    optimizer.constrain_gradient()
    gradients = sum(weight.grad.numel() * 4 for weight in sae.parameters())
    optimizer.adam.step()
    held: dict[str, int] = {}
    for name, tensor in optimizer.tensors().items():
        key = name.partition(".")[0]
        held[key] = held.get(key, 0) + (tensor.numel() * 4 if key != "step" else 0)
    counted = costs.memory(case(), MeshConfig())
    assert (
        counted["weights"] == held["raw"]
        and counted["average"] == held["average"]
        and counted["gradients"] == gradients
    )
    assert counted["moments"] == held["exp_avg"] + held["exp_avg_sq"]


@pytest.mark.parametrize(
    "changes",
    [{"sae__freeze": "decoder"}, {"sae__freeze": "encoder"}, {"sae__decoder_cosine_min": 0.8}],
    ids=str,
)
def test_frozen_weights_need_no_moments_and_held_ones_their_start(changes):
    asked = recipe(**changes)
    optimizer = ExplicitStep(SAE(Shape(16, 64, 4, asked.acts.normalize)), asked)
    nothing = torch.tensor([], dtype=torch.long)
    optimizer.backward(torch.randn(64, 16), baseline=1.0, dead=nothing, k_aux=8)
    optimizer.step(1)
    held: dict[str, int] = {}
    for name, tensor in optimizer.tensors().items():
        key = name.partition(".")[0]
        held[key] = held.get(key, 0) + (tensor.numel() * 4 if key != "step" else 0)
    counted = costs.memory(case(**changes), MeshConfig())
    assert counted["moments"] == held["exp_avg"] + held["exp_avg_sq"]
    assert counted["average"] == held["average"]
    assert counted.get("start values", 0) == held.get("start", 0)


@pytest.mark.parametrize(
    "step, n, batch, dead, measured",
    [
        ("native", 24_576, 4096, 0.0, 1.27),
        ("native", 24_576, 1024, 0.0, 1.47),
        ("native", 6_144, 4096, 0.0, 1.67),
        ("native", 98_304, 4096, 0.0, 1.22),
        ("native", 24_576, 4096, 0.1, 1.98),
        ("torch", 24_576, 4096, 0.0, 1.57),
        ("torch", 24_576, 1024, 0.0, 2.03),
        ("torch", 6_144, 4096, 0.0, 1.91),
        ("torch", 98_304, 4096, 0.0, 1.78),
        ("torch", 24_576, 4096, 0.1, 2.24),
    ],
)
def test_the_time_of_a_step_is_within_a_third_of_what_was_measured_on_two_cores(
    step, n, batch, dead, measured
):
    """In encoder products, as the lab book of 2026-11-22 has them; the machine's rates are those of its product (326 GFLOP/s) and of Adam (40 GB/s)."""
    machine = dataclasses.replace(
        DEVICES["laptop"], float32=326e9 / hardware.PRODUCT, bandwidth=40e9 / hardware.MEMORY
    )
    asked = recipe(
        sae__n_latents=n, sae__k=32, batch=batch, acts__shards="somewhere", optim__ema=0.0
    )
    spent = costs.seconds(
        PlanInput(asked, LMSpec(768, 0, 0), machine, step, dead=dead), MeshConfig()
    )
    assert sum(spent.values()) / spent["encoder product"] == pytest.approx(measured, rel=1 / 3)


def test_a_gpu_gathers_the_rows_of_as_many_tokens_as_planned():
    assert costs.GATHERED == torch_ops._ROWS


@pytest.mark.parametrize("step", ["autograd", "torch", "native", "triton"])
def test_several_saes_need_what_each_holds_and_the_largest_step(step):
    small, large = case(step=step), case(step=step, sae__n_latents=256)
    alone = {one: costs.add_memory([costs.sae_memory(one)]) for one in (small, large)}
    for one in (small, large):
        parts = costs.memory(one, MeshConfig())
        assert alone[one] == sum(size for name, size in parts.items() if name not in costs.STREAM)
    both = costs.add_memory([costs.sae_memory(small), costs.sae_memory(large)])
    weights = 16 * small.parameters  # raw, two moments, average
    assert alone[large] + weights <= both < sum(alone.values())


def test_a_plan_a_checkpoint_and_the_room_for_it_count_the_same_bytes(
    small_recipe, tmp_path, monkeypatch
):
    recipe = small_recipe({"run.keep": 3, "run.save_every": 100})
    run = train.train(recipe, tmp_path / "run")
    planned = plan.plan(recipe).disk
    files = ("sae.safetensors", "optim.safetensors")
    tensors = sum(
        tensor.numel() * tensor.element_size()
        for name in files
        for key, tensor in load_file(run.checkpoints()[-1] / name).items()
        if key != "since" and not key.startswith("step.")
    )
    assert planned == 4 * tensors == costs.disk_bytes(recipe, 2 * 64 * 16 + 64 + 16)
    for free, fits in ((planned - 1, False), (planned, True)):
        usage = lambda path, free=free: SimpleNamespace(free=free)
        monkeypatch.setattr(train.checkpoint.shutil, "disk_usage", usage)
        if fits:
            train.train(recipe, tmp_path / "fits")
        else:
            with pytest.raises(DiskError, match="disk too small"):
                train.train(recipe, tmp_path / "too small")


def test_every_part_of_the_memory_has_a_word_on_what_makes_it_smaller():
    everything = {
        **costs.memory(case(curve__held_out=1), MeshConfig(2, 2)),
        **costs.memory(case(DEVICES["laptop"], step="native"), MeshConfig()),
        **costs.memory(case(step="triton", optim__approx_topk="int8"), MeshConfig()),
        **costs.memory(case(sae__decoder_cosine_min=0.8), MeshConfig()),
    }
    assert set(everything) == set(costs.SMALLER)


def test_out_of_memory_gives_the_plans_own_advice(small_recipe, tmp_path, monkeypatch):
    asked = small_recipe()

    def full(*rest):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(train, "ActivationSource", full)
    with pytest.raises(OutOfMemoryError) as raised:
        train.train_many([asked], [tmp_path / "run"], open_source=full)
    made = plan.plan(asked)
    assert plan.format_bytes(made.requested.bytes) in str(raised.value) and plan.advice(
        made.requested.memory
    ) in str(raised.value)
    assert f"smaller by   {plan.advice(made.requested.memory)}" in plan.lines(
        made
    ) and "--acts.mix" in str(raised.value)


# ---- what to take ------------------------------------------------------------------------------------------------


def test_the_best_mesh_is_the_fastest_of_those_that_fit():
    every = [costs.estimate(case(), MeshConfig(8 // latent, latent)) for latent in (1, 2, 4, 8)]
    tight = sorted(each.bytes for each in every)[1] / hardware.USABLE  # the two that need least
    asked = case(dataclasses.replace(UNIT, memory=tight))
    fitting = [each for each in every if each.bytes <= hardware.USABLE * tight]
    assert len(fitting) == 2
    assert (
        costs.best(asked, 8).tokens_per_s == max(each.tokens_per_s for each in fitting)
        and costs.best(asked, 8).fits
    )


def test_where_nothing_fits_the_mesh_that_needs_least_is_shown():
    asked = case(dataclasses.replace(UNIT, memory=1e6))
    found = costs.best(asked, 8)
    assert not found.fits and found.bytes == min(
        costs.estimate(asked, MeshConfig(8 // latent, latent)).bytes for latent in (1, 2, 4, 8)
    )


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_most_latents_fit_and_twice_as_many_do_not(devices):
    asked = case(DEVICES["h100"], batch=4096, acts__mix=4096)
    most = costs.largest(asked, devices)
    fits = [
        costs.best(
            dataclasses.replace(asked, recipe=recipe(batch=4096, acts__mix=4096, sae__n_latents=n)),
            devices,
        ).fits
        for n in (most, 2 * most)
    ]
    assert most > 0 and fits == [True, False]


def test_16_million_latents_of_width_4096_need_more_than_64_cards_of_80_gb_and_fit_on_512():
    asked = PlanInput(
        recipe(
            sae__n_latents=2**24,
            sae__k=256,
            sae__k_aux=0,
            batch=131_072,
            acts__mix=262_144,
            acts__store="bfloat16",
            acts__lm_dtype="bfloat16",
        ),
        LMSpec(4096, 7 * 10**9, 7 * 10**9),
        DEVICES["h100"],
        dead=0.07,
    )
    assert [costs.best(asked, devices).fits for devices in (1, 8, 64, 512)] == [
        False,
        False,
        False,
        True,
    ]
    weights = 2 * 2**24 * 4096 + 2**24 + 4096
    assert (
        costs.memory(asked, MeshConfig())["weights"] + costs.memory(asked, MeshConfig())["moments"]
        == 12 * weights
    )


# ---- errors, and the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--devices", "1,many"],
            "--devices takes whole numbers with commas between, such as 1,8,64; got 'many'",
        ),
        (["--devices", "0"], "devices is 0; it must be at least 1"),
        (["--devices", "7"], "no mesh of 7 devices divides a batch of 64 and 64 latents"),
        (["--hardware.memory-gb", "-1"], "hardware.memory_gb is -1.0"),
        (["--dead", "1.5"], "dead is 1.5; it is the share of latents that are dead"),
        (
            ["--subject.parameters", "7"],
            "subject.parameters is 7; a subject that is not at hand needs a d_model",
        ),
        (["--subject.d-model", "-1"], "subject.d_model is -1"),
    ],
)
def test_bad_input_gives_one_clear_error(flags, message, small_recipe, tmp_path, capsys):
    file = tmp_path / "small.toml"
    file.write_text(to_toml(small_recipe()))
    capsys.readouterr()  # what making the LM has said
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(file), "--gpu", "h100", *flags])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1


def test_the_command_line_shows_tables_and_writes_them_as_json(tmp_path, capsys):
    flags = [
        "--sae.n-latents",
        "1048576",
        "--sae.k",
        "64",
        "--batch",
        "8192",
        "--subject.d-model",
        "1024",
        "--subject.parameters",
        "1000000",
        "--gpu",
        "h100",
        "--devices",
        "1,8,64",
        "--hardware.per-node",
        "4",
    ]
    cli.main(["plan", *flags, "--json", str(tmp_path / "plan.json")])
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [each["devices"] for each in found["meshes"]] == [1, 8, 64] and found["card"][
        "per_node"
    ] == 4
    for each in found["meshes"]:
        assert (
            f"{each['data']} x {each['latent']}" in shown
            and f"{each['tokens_per_s']:,.0f}" in shown
            and f"{each['most_latents']:,}" in shown
        )
        assert each["bytes"] == pytest.approx(sum(each["memory"].values())) and math.isclose(
            each["tokens_per_s"], 8192 / sum(each["seconds"].values())
        )
    for word in (
        "memory of a rank",
        "given by a rank to each collective",
        "milliseconds of a step",
        "an LM that is not at hand: d_model 1,024",
    ):
        assert word in shown
    cli.main(["plan", *flags, "--json", "-"])
    assert json.loads(capsys.readouterr().out)["meshes"] == found["meshes"]


def test_a_recipes_own_mesh_is_planned_as_it_says():
    asked = plan.plan(
        recipe(mesh__data=2, mesh__latent=4),
        card="h100",
        unseen=costs.UnseenLM(d_model=16, parameters=10),
    ).requested
    assert (asked.devices, asked.data, asked.latent) == (8, 2, 4)


ROOMY = dataclasses.replace(UNIT, memory=1e12)


def test_more_devices_sum_gradients_or_have_the_whole_batch():
    found = costs.schemes(case(ROOMY), 4)
    assert (found.gathered.data, found.gathered.latent) == (1, 4)
    assert not [each for each in found.gathered.communication if each.axis == "data"]
    summed = [costs.estimate(case(ROOMY), MeshConfig(data, 4 // data)) for data in (2, 4)]
    assert found.summed.tokens_per_s == max(each.tokens_per_s for each in summed)
    assert costs.schemes(case(), 1).summed is None
    assert costs.schemes(case(batch=63), 2).summed is None


def test_large_weights_favour_the_whole_batch_and_large_batches_favour_gradients():
    def faster(**changes):
        found = costs.schemes(case(ROOMY, dead=0.0, **changes), 4)
        return "gathered" if found.gathered.tokens_per_s > found.summed.tokens_per_s else "summed"

    assert faster(sae__n_latents=4096, batch=64) == "gathered"
    assert faster(sae__n_latents=64, batch=4096, acts__mix=4096) == "summed"


def test_a_plan_names_the_faster_of_both_and_what_they_send():
    asked = case(ROOMY, sae__n_latents=4096, mesh__data=2, mesh__latent=2)
    given = costs.estimate(asked, MeshConfig(2, 2))
    words = meshes.lines(SimpleNamespace(case=asked, requested=given))
    sent = sum(each.sent for each in given.communication if each.axis == "data")
    assert words[0].startswith(
        f"mesh         2 x 2, gradients summed: a rank sends {plan.format_bytes(sent)} of gradients"
    )
    assert "1 x 4, the whole batch on each rank: a rank sends" in words[1]
    assert words[2].endswith("that fits is 1 x 4: --mesh.data 1 --mesh.latent 4")
    alone = costs.estimate(asked, MeshConfig())
    assert meshes.lines(SimpleNamespace(case=asked, requested=alone)) == []
    tight = dataclasses.replace(asked, card=dataclasses.replace(UNIT, memory=1e6))
    words = meshes.lines(
        SimpleNamespace(case=tight, requested=costs.estimate(tight, MeshConfig(2, 2)))
    )
    assert words[0].endswith("tokens/s, does not fit") and words[2].endswith("no mesh of 4 fits")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"run__kernels": "triton"}, "run.kernels triton"),
        ({"optim__precision": "bfloat16"}, "optim.precision bfloat16"),
        ({}, ""),
    ],
)
def test_a_plan_for_several_processes_names_what_they_refuse(changes, words):
    asked = case(ROOMY, step="triton", mesh__latent=2, **changes)
    made = SimpleNamespace(
        case=asked,
        requested=costs.estimate(asked, MeshConfig(1, 2)),
        meshes=[costs.best(asked, count) for count in (1, 2)],
    )
    said = f"{'':<13}several processes refuse {words}: planned without"
    for lines in (meshes.lines(made), meshes.tables(made)):
        assert (said in lines) == bool(words)


@pytest.mark.parametrize(
    "mesh, sizes",
    [
        ({}, (1, 1)),
        ({"mesh__data": 0}, (4, 1)),
        ({"mesh__latent": 0}, (1, 4)),
        ({"mesh__data": 2, "mesh__latent": 0}, (2, 2)),
        ({"mesh__data": 0, "mesh__latent": 2}, (2, 2)),
    ],
)
def test_a_mesh_fills_up_to_the_number_of_processes(mesh, sizes):
    found = meshes.fit_mesh(recipe(**mesh), "cpu", 4).mesh
    assert (found.data, found.latent) == sizes


def test_a_mesh_of_two_zeros_is_the_plans_best(monkeypatch):
    monkeypatch.setattr(meshes, "read_lm_spec", lambda recipe: LMSpec(16, 1000, 600))
    for changes in ({"sae__n_latents": 4096}, {"batch": 4096, "acts__mix": 4096}):
        asked = recipe(mesh__data=0, mesh__latent=0, **changes)
        found = meshes.fit_mesh(asked, "cpu", 4).mesh
        card = dataclasses.replace(DEVICES["laptop"], per_node=4)
        expected = costs.best(plan.plan_input(asked, LMSpec(16, 1000, 600), "cpu", card=card), 4)
        assert (found.data, found.latent) == (expected.data, expected.latent)
        assert meshes.fit_mesh(asked, "cpu", 1).mesh == MeshConfig()


def test_the_fullest_token_has_about_as_many_latents_in_a_shard_as_planned():
    draw = torch.Generator().manual_seed(0)
    for k, shards, tokens in ((32, 4, 4096), (64, 8, 1024), (8, 2, 512)):
        shard = torch.randint(shards, (tokens, k), generator=draw)
        counts = torch.nn.functional.one_hot(shard, shards).sum(1)  # tokens x shards
        assert abs(int(counts[:, 0].max()) - widest(k, shards, tokens)) <= 2
    assert widest(32, 1, 4096) == 32
