"""The compiled step is the step of plain torch, up to rounding; a screen only chooses, and says how often it would choose otherwise."""

from __future__ import annotations

import ctypes
import dataclasses
import math

import numpy as np
import pytest
import torch

from ksparse.config import Recipe, from_dict
from ksparse.errors import InputError
from ksparse.kernels import native
from ksparse.sae.init import initialize_
from ksparse.sae.model import SAE, Shape
from ksparse.training.steps import autograd, explicit, prefilter, select
from ksparse.training.steps.autograd import AutogradStep
from ksparse.training.steps.explicit import ExplicitStep
from ksparse.training.steps.native import NativeStep
from ksparse.training.steps.prefilter import fastest_prefilter

needs_compiler = pytest.mark.skipif(
    native.load() is None, reason="no C++ compiler here, or KSPARSE_NATIVE=0"
)
pytestmark = needs_compiler
N, D, K = 256, 32, 6


@pytest.fixture(params=["int8 by torch", "int8 in panels", "bfloat16"])
def screen(request, monkeypatch) -> str:
    """Return a screen; both products of whole numbers are tested, whichever is the faster here."""
    monkeypatch.setattr(
        prefilter, "int8_kind", lambda: native.PANELS if "panels" in request.param else 1
    )
    return request.param.split()[0]


def recipe(**changes) -> Recipe:
    table = {
        "acts": {"normalize": "unit_norm"},
        "sae": {"n_latents": N, "k": K, "dead_after": 1000, "k_aux": 16},
        "optim": {"lr": 3e-4, "ema": 0.9, "ema_span": 1.0, "warmup": 3},
        "tokens": 100 * 64,
        "batch": 64,
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        table[section][name] = value
    return from_dict(table)


def made(kind: type, screen: str = "", **changes) -> AutogradStep:
    wanted = recipe(**changes)
    sae, generator = SAE(Shape(D, N, K, wanted.acts.normalize)), torch.Generator().manual_seed(0)
    initialize_(
        sae,
        torch.nn.functional.normalize(torch.randn(500, D, generator=generator), dim=1),
        wanted.sae,
        generator,
    )
    sae.b_enc.data = (
        0.01 * torch.randn(N, generator=generator) if wanted.sae.b_enc else sae.b_enc.data
    )
    return kind(sae, wanted, screen) if screen else kind(sae, wanted)


def batches(count: int, rows: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.nn.functional.normalize(torch.randn(rows, D, generator=generator), dim=1)
        for _ in range(count)
    ]


def run(optimizer: AutogradStep, xs: list[torch.Tensor], dead: int) -> list[tuple[float, ...]]:
    rows = []
    for number, x in enumerate(xs, 1):
        part = optimizer.backward(x, baseline=0.03, dead=torch.arange(dead) * 2, k_aux=16)
        rows.append(
            (
                *(value.item() for value in (part.total, part.nmse, part.auxk)),
                optimizer.step(number),
            )
        )
    return rows


@pytest.mark.parametrize("kind", [NativeStep, ExplicitStep])
@pytest.mark.parametrize(
    "dead", [0, 7, 60, 120]
)  # none, fewer than k_aux, a code that is not sparse among them, one that is
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim__clip": 0.01},
        {"sae__b_enc": False},
        {"sae__unit_norm": False},
        {"optim__ema": 0.0},
        {"sae__auxk_norm": "batch"},
        {"sae__auxk_share": 0.3},
        {"sae__auxk_share": 0.3, "sae__auxk_norm": "batch"},
        {"sae__auxk_coef": 0.0},
        {"optim__beta1": 0.0},
    ],
    ids=str,
)
def test_every_step_is_that_of_autograd(changes, dead, kind):
    plain, compiled = made(AutogradStep, **changes), made(kind, **changes)
    expected, found = run(plain, batches(6), dead), run(compiled, batches(6), dead)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    for key in ("W_enc", "W_dec", "b_enc", "b_pre"):
        torch.testing.assert_close(
            getattr(compiled.sae, key), getattr(plain.sae, key), rtol=0, atol=1e-5
        )
        if plain.average:
            torch.testing.assert_close(compiled.average[key], plain.average[key], rtol=0, atol=1e-5)
    mine, theirs = compiled.tensors(), plain.tensors()
    assert set(theirs) <= set(mine) or kind is ExplicitStep
    assert all(mine[f"step.{key}"] == 6 for key in ("W_enc", "W_dec", "b_pre"))


def test_a_screened_step_has_the_exact_steps_values(screen):
    plain, screened = made(AutogradStep), made(NativeStep, screen)
    np.testing.assert_allclose(
        run(screened, batches(6), 7), run(plain, batches(6), 7), rtol=2e-5, atol=1e-7
    )
    assert screened.screened == 6 * 64
    assert screened.audit(batches(1)[0])["screen_latents_wrong"] == 0


def test_a_token_whose_choice_is_not_clear_is_computed_in_full(screen, monkeypatch):
    monkeypatch.setattr(prefilter, "MARGIN", 1e9)
    plain, screened = made(AutogradStep), made(NativeStep, screen)
    np.testing.assert_allclose(
        run(screened, batches(3), 0), run(plain, batches(3), 0), rtol=2e-5, atol=1e-7
    )
    assert screened.redone == screened.screened == 3 * 64
    assert screened.audit(batches(1)[0])["screen_redone"] == 1


def test_the_low_precision_copy_follows_the_weights(screen):
    optimizer = made(NativeStep, screen)
    run(optimizer, batches(3), 7)
    expected, scale = native.quantize(optimizer.sae.W_enc.detach(), optimizer.kind)
    assert torch.equal(optimizer.low, expected)
    assert scale is None or torch.equal(optimizer.low_scale, scale)


@pytest.mark.parametrize(
    "shape", [(1, 3, 5, 1), (17, 33, 77, 5), (5, 16, 31, 31), (200, 64, 4096, 9)], ids=str
)
def test_a_screen_takes_every_shape(screen, shape):
    b, d, n, k = shape
    sae, generator = SAE(Shape(d, n, k, "none")), torch.Generator().manual_seed(0)
    for weight in sae.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    optimizer = NativeStep(sae, recipe(), screen)
    x = torch.randn(b, d, generator=generator)
    values, indices = optimizer.choose(x)
    expected = (x @ sae.W_enc.T + sae.b_enc).detach().topk(k)
    torch.testing.assert_close(
        values.sort(dim=1, descending=True).values, expected.values, rtol=1e-4, atol=1e-4
    )
    assert indices.sort(dim=1).values.tolist() == expected.indices.sort(dim=1).values.tolist()


def test_candidates_that_grew_are_in_the_checkpoint(monkeypatch):
    monkeypatch.setattr(prefilter, "MARGIN", 1e9)  # no token is clear, so more candidates are taken
    optimizer = made(NativeStep, "int8")
    first = optimizer.candidates
    run(optimizer, batches(2), 0)
    assert optimizer.candidates > first
    other = made(NativeStep, "int8")
    other.restore(
        {key: value.clone() for key, value in optimizer.tensors().items()}, optimizer.updates
    )
    assert other.candidates == optimizer.candidates and torch.equal(other.low, optimizer.low)
    before = optimizer.candidates
    optimizer.audit(batches(1)[0])
    assert optimizer.candidates == before  # looking changes nothing


def test_an_audit_counts_what_the_screen_misses(monkeypatch):
    """Neither a wrong copy of the weights nor a margin of nothing may go unseen."""
    monkeypatch.setattr(prefilter, "MARGIN", -1e9)  # everything is taken for clear
    optimizer = made(NativeStep, "bfloat16")
    assert optimizer.audit(batches(1)[0])["screen_latents_wrong"] == 0
    optimizer.low = optimizer.low.flip(0).contiguous()
    found = optimizer.audit(batches(1)[0])
    assert found["screen_latents_wrong"] > 0.5 and found["screen_tokens_wrong"] > 0.9


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_auxk_on_a_share_of_the_tokens_is_that_of_the_batch_also_where_autograd_takes_it_in_parts(
    share, monkeypatch
):
    whole, parts = (
        made(AutogradStep, sae__auxk_share=share),
        made(AutogradStep, sae__auxk_share=share),
    )
    expected = run(whole, batches(3), 7)
    monkeypatch.setattr(autograd, "PRE_ACTS", 13 * N)  # 5 parts, the share ends inside the second
    np.testing.assert_allclose(run(parts, batches(3), 7), expected, rtol=2e-5, atol=1e-7)


def test_pieces_of_a_batch_are_the_batch(monkeypatch):
    whole = made(NativeStep)
    monkeypatch.setattr(explicit, "PIECE", 7 * N)
    parts = made(NativeStep)
    np.testing.assert_allclose(run(parts, batches(3), 7), run(whole, batches(3), 7), rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_threads_give_the_same_bits(threads):
    torch.set_num_threads(threads)
    one, other = made(NativeStep), made(NativeStep)
    assert run(one, batches(4), 7) == run(other, batches(4), 7)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors().values(), other.tensors().values()))


@pytest.mark.parametrize("kind", [NativeStep, ExplicitStep])
def test_a_batch_that_is_not_finite_changes_nothing(kind):
    optimizer = made(kind)
    run(optimizer, batches(2), 0)
    before = {key: value.clone() for key, value in optimizer.tensors().items()}
    x = batches(1)[0]
    x[3, 5] = math.nan
    part = optimizer.backward(x, baseline=0.03, dead=torch.arange(0), k_aux=16)
    assert not math.isfinite(part.total) and math.isnan(optimizer.step(3))
    assert all(torch.equal(value, before[key]) for key, value in optimizer.tensors().items())


def test_resuming_is_bitwise_the_same_run(small_recipe, tmp_path):
    from ksparse.errors import Interrupted
    from ksparse.training.train import train

    for screen in ("off", "int8", "bfloat16"):
        wanted = small_recipe(
            {"run.kernels": "native", "optim.approx_topk": screen, "run.save_every": 5}
        )
        whole = train(wanted, tmp_path / f"whole-{screen}")
        cut = tmp_path / f"cut-{screen}"

        def stop(row):
            if row["step"] == 7:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Interrupted):
            train(wanted, cut, observe=stop)
        train(wanted, cut)
        for name in ("sae.safetensors", "optim.safetensors"):
            assert (cut / "checkpoints" / "step-00000012" / name).read_bytes() == (
                whole.checkpoint(12) / name
            ).read_bytes()
        if screen != "off":
            assert {"screen_latents_wrong", "screen_tokens_wrong", "screen_redone"} <= set(
                whole.metrics()[-1]
            )


# ---- kernels


@pytest.mark.parametrize(
    "n, k", [(1, 1), (31, 31), (32, 5), (33, 32), (1000, 1), (1000, 256), (5000, 300)]
)
def test_select_is_topk(n, k):
    generator = torch.Generator().manual_seed(n)
    pre, bias = torch.randn(9, n, generator=generator), torch.randn(n, generator=generator)
    for made_ in (
        pre,
        pre.sort(dim=1).values,
        pre.sort(dim=1, descending=True).values,
        (3 * pre).round(),
    ):
        values, indices = native.select(made_.contiguous(), bias, k)
        whole = made_ + bias
        torch.testing.assert_close(values, whole.gather(1, indices.long()), rtol=0, atol=0)
        torch.testing.assert_close(
            values.sort(dim=1).values, whole.topk(k).values.sort(dim=1).values, rtol=0, atol=0
        )
        assert all(len(set(row)) == k for row in indices.tolist())


def test_too_few_numbers_to_choose_from_end_in_nan_and_not_in_silence():
    values, _ = native.select(torch.full((2, 40), math.nan), torch.zeros(40), 3)
    assert values.isnan().all()


def test_lowering_is_rounding():
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    low, none = native.quantize(x, 2)
    assert none is None and torch.equal(low, x.bfloat16())
    low, scale = native.quantize(x, 1)
    torch.testing.assert_close(
        low.float() * scale[:, None], x, rtol=0, atol=x.abs().max().item() / 127 / 2 * 1.01
    )
    assert low.abs().max() == 127


def unpacked(low: torch.Tensor, n: int, d: int) -> torch.Tensor:
    """Return the whole numbers [n, d] of panels: of 16 latents, for every four components, the four of each latent."""
    panels = low.view(-(-n // 16), -(-d // 32) * 8, 16, 4)
    return panels.permute(0, 2, 1, 3).reshape(-(-n // 16) * 16, -1)[:n, :d].int()


def scores(
    x: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Return [b, n]: the definition of what a screen by panels compares."""
    n, d = len(bias), x.shape[1]
    unit = x.abs().amax(1, keepdim=True) / 63
    q = torch.where(unit > 0, x / unit, 0.0)
    q = torch.where(q < 0, (q - 0.5).ceil(), (q + 0.5).floor())
    return (q.double() @ unpacked(low, n, d).double().t()) * unit.double() * scale[
        0, :n
    ].double() + bias.double()


@pytest.mark.parametrize("n, d", [(1, 1), (16, 32), (50, 70), (33, 4096)])
def test_panels_hold_the_latents_and_a_span_of_them_fits_sixteen_bits(n, d):
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(n, d, generator=generator) * torch.rand(n, 1, generator=generator)
    weight[0] = 0
    weight[-1, :] = 0
    weight[-1, d // 2] = 5.0  # all in one component
    weight[n // 2] = weight[n // 2].abs()  # all of one sign
    low, scale = native.quantize(weight, native.PANELS)
    found = unpacked(low, n, d)
    torch.testing.assert_close(
        found * scale[0, :n, None], weight, rtol=0, atol=scale[0].max().item() * 0.501
    )
    spans = torch.nn.functional.pad(found, (0, -d % 32)).view(n, -1, 32)
    assert (
        127 * max(spans.clamp(min=0).sum(2).max().item(), -spans.clamp(max=0).sum(2).min().item())
        <= 32767
    )
    torch.testing.assert_close(scale[1, :n], -64 * found.sum(1) * scale[0, :n])
    assert (scale[1, n:] == -torch.inf).all()


@pytest.mark.parametrize(
    "b, n, d, k, c",
    [(1, 20, 5, 1, 2), (7, 100, 33, 4, 9), (401, 4096, 96, 8, 24), (3, 40, 64, 40, 40)],
)
@pytest.mark.parametrize("portable", [False, True])
def test_a_screen_by_panels_is_its_definition(b, n, d, k, c, portable, request, monkeypatch):
    """Its whole numbers are those of torch, whatever the processor's instructions; 401 tokens are more than a thread's block."""
    if portable:
        monkeypatch.setattr(native, "load", lambda: request.getfixturevalue("portable_library"))
    generator = torch.Generator().manual_seed(b)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((b, d), (n, d), (n,)))
    x[0] = 0
    low, scale = native.quantize(weight, native.PANELS)
    values, indices, dropped, spread = native.candidates(low, scale, bias, x, weight, k, c)
    score, exact = scores(x, low, scale, bias), x.double() @ weight.double().t() + bias.double()
    best = score.topk(min(n, c + 1), dim=1)
    candidates = best.indices[:, :c]
    chosen = exact.gather(1, candidates).topk(k, dim=1)
    assert torch.equal(candidates.gather(1, chosen.indices).sort(1).values, indices.long())
    torch.testing.assert_close(
        values.double(), exact.gather(1, indices.long()), rtol=1e-4, atol=1e-4
    )
    assert (
        (dropped == -torch.inf).all()
        if c >= n
        else torch.allclose(dropped.double(), best.values[:, c], rtol=1e-4, atol=1e-4)
    )
    error = exact.gather(1, candidates) - score.gather(1, candidates)
    torch.testing.assert_close(spread.double(), error.square().mean(1).sqrt(), rtol=1e-2, atol=1e-4)


@pytest.fixture(scope="module")
def portable_library(tmp_path_factory):
    """Return the library as a processor without AVX2 has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("portable")))
        patch.setattr(native, "_FLAGS", (*native._FLAGS, "-O1", "-DKS_PORTABLE"))
        library = ctypes.CDLL(str(native.build()))
    library.ks_lower.restype = library.ks_screen.restype = None
    return library


def test_where_too_few_scores_pass_the_bar_nothing_is_certain():
    """Latents in such an order that an eighth of them says nothing about the rest."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(5, 32, generator=generator),
        torch.randn(4096, 32, generator=generator),
        torch.zeros(4096),
    )
    bias[:512], bias[512:] = 100, -100
    values, indices, dropped, _ = native.candidates(
        *native.quantize(weight, native.PANELS), bias, x, weight, 8, 30
    )
    assert (dropped == torch.inf).all()
    sae = SAE(Shape(32, 4096, 8, "none"))
    sae.W_enc.data, sae.b_enc.data = weight, bias
    optimizer = NativeStep(sae, recipe(), "int8")
    _, found = optimizer.choose(x)
    assert (
        found.sort(1).values.tolist()
        == (x @ weight.T + bias).topk(8).indices.sort(1).values.tolist()
    )


def test_the_transposed_lists_hold_every_entry_above_zero_once_in_the_order_of_tokens():
    generator = torch.Generator().manual_seed(0)
    values, indices = (
        torch.randn(50, 4, generator=generator),
        torch.randint(20, (50, 4), generator=generator).int(),
    )
    starts, order = native.transpose(values, indices, 20)
    assert starts[-1] == (values > 0).sum()
    for latent in range(20):
        mine = order[starts[latent] : starts[latent + 1]].tolist()
        assert (
            mine
            == ((indices.flatten() == latent) & (values.flatten() > 0)).nonzero().flatten().tolist()
        )


def test_kernels_refuse_memory_that_they_cannot_read():
    with pytest.raises(ValueError, match="contiguous tensors in main memory"):
        native.select(torch.zeros(4, 6).t(), torch.zeros(4), 1)


# ---- which step runs


def test_the_recipe_says_which_step_runs(monkeypatch):
    sae = SAE(Shape(D, N, K))
    assert type(select.build_step(sae, recipe())) is NativeStep
    assert (
        type(
            select.build_step(
                sae,
                dataclasses.replace(
                    recipe(), run=dataclasses.replace(recipe().run, kernels="torch")
                ),
            )
        )
        is ExplicitStep
    )
    assert type(select.build_step(sae, recipe(sae__multi_topk=0.125))) is AutogradStep
    monkeypatch.setattr(native, "load", lambda: None)
    assert type(select.build_step(sae, recipe())) is ExplicitStep
    with pytest.raises(InputError, match="run.kernels is 'native', which needs a CPU, a C"):
        select.build_step(
            sae,
            dataclasses.replace(recipe(), run=dataclasses.replace(recipe().run, kernels="native")),
        )
    with pytest.raises(
        InputError, match="optim.approx_topk is 'int8', which needs the compiled kernels"
    ):
        select.build_step(sae, recipe(optim__approx_topk="int8"))


def test_the_fastest_screen_is_one_of_them():
    assert fastest_prefilter() in ("off", "int8", "bfloat16")


def test_without_a_compiler_there_is_no_library(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(OSError, match=r"no C\+\+ compiler: install g\+\+ or clang\+\+, or set CXX"):
        native.build()
    monkeypatch.setenv("KSPARSE_NATIVE", "0")
    assert native.load.__wrapped__() is None


def test_a_kernel_without_a_library_says_so(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)
    with pytest.raises(RuntimeError, match="compiled kernels are not available here"):
        native.select(torch.zeros(1, 4), torch.zeros(4), 2)


@pytest.mark.parametrize("kind", [ExplicitStep, NativeStep])
def test_a_step_without_a_gradient_says_so(kind):
    step = kind(SAE(Shape(8, 32, 2)), from_dict({"sae": {"n_latents": 32, "k": 2}}))
    with pytest.raises(RuntimeError, match="no gradient is pending"):
        step.step(1)


def test_a_library_is_built_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = native.build()
    stamp = path.stat().st_mtime_ns
    assert (
        native.build() == path
        and path.stat().st_mtime_ns == stamp
        and path.parent == tmp_path / "ksparse"
    )


# ---- what a step costs, counted


class Work(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts products of b x d by d x n, and new tensors of b x n or n x d numbers."""

    def __init__(self, b: int):
        super().__init__()
        self.b, self.products, self.wide, self.weights = b, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.layout != torch.strided:
            return out  # sparse, for all its shape
        if "mm" in func.__name__ and isinstance(out, torch.Tensor) and out.shape == (self.b, N):
            self.products += 1
        elif (
            isinstance(out, torch.Tensor)
            and not func.is_view
            and "out" not in (kwargs or {})
            and not any(out is arg for arg in args)
        ):
            self.wide += out.numel() >= self.b * N
            self.weights += out.shape == (N, D)
        return out


@pytest.mark.parametrize(
    "kind, products, wide, weights",
    [(AutogradStep, 1, 2, 6), (ExplicitStep, 1, 0, 0), (NativeStep, 1, 0, 0)],
)
def test_only_the_encoder_product_is_dense(kind, products, wide, weights, monkeypatch):
    """A step makes one product with all latents; the written-out ones no new [b, n] and no new [n, d] either."""
    monkeypatch.setattr(explicit.torch_ops, "_LATENTS", N // 4)  # of so few latents
    optimizer = made(kind, optim__ema=0.0)
    xs = batches(3, 512)
    run(optimizer, xs[:2], 0)
    with Work(512) as work:
        optimizer.backward(xs[2], baseline=0.03, dead=torch.arange(0), k_aux=16)
        optimizer.step(3)
    assert work.products == products
    assert (work.wide <= wide, work.weights <= weights) == (True, True), (work.wide, work.weights)


@pytest.mark.parametrize("changes", [{}, {"sae__auxk_norm": "batch", "optim__clip": 0.01}], ids=str)
def test_no_tensor_of_the_written_out_step_is_made_on_another_device_than_the_weights(
    changes, monkeypatch
):
    """A tensor made without a device lands, here, where there is no memory; on a GPU it would be on the CPU."""
    monkeypatch.setattr(explicit.torch_ops, "_has_sampled_product", lambda x: False)  # as on a GPU
    optimizer = made(ExplicitStep, **changes)
    for number, x in enumerate(batches(2), 1):
        dead = torch.arange(60) * 2
        with torch.device("meta"):
            optimizer.backward(x, baseline=0.03, dead=dead, k_aux=16)
            assert math.isfinite(optimizer.step(number))
    assert all(value.device.type == "cpu" for value in optimizer.tensors().values())
