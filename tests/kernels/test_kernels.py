"""The fast copies agree with the definition, and both with autograd of dense code."""

import ctypes
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ksparse import kernels
from ksparse.kernels import native, reference, torch_ops

SHAPES = {  # b, k, n, d
    "plain": (7, 3, 40, 8),
    "k_is_1": (5, 1, 33, 4),
    "k_is_n": (4, 6, 6, 5),
    "d_not_a_power_of_two": (9, 5, 50, 37),
    "d_is_1": (3, 2, 10, 1),
    "one_row": (1, 4, 9, 3),
    "n_is_1": (6, 1, 1, 7),
    "empty_batch": (0, 3, 10, 4),
    "k_is_0": (4, 0, 6, 3),
    "more_tokens_than_latents": (70, 2, 5, 3),
    "more_rows_than_are_gathered_at_once": (2100, 2, 11, 3),
}
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2}


def inputs(shape, dtype=torch.float64, seed=0, repeated=False):
    b, k, n, d = shape
    make = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(size, d, generator=make).to(dtype) for size in (b, n))
    values = torch.rand(b, k, generator=make).to(dtype)
    values[torch.rand(b, k, generator=make) < 0.3] = 0
    if repeated:
        indices = torch.randint(min(n, 2), (b, k), generator=make)
    else:
        indices = (
            torch.stack([torch.randperm(n, generator=make)[:k] for _ in range(b)])
            if b
            else torch.zeros(0, k, dtype=torch.long)
        )
    return values, indices, x, weight


def close(a, b, dtype):
    assert a.dtype == b.dtype == dtype and a.shape == b.shape
    torch.testing.assert_close(
        a.float(),
        b.float(),
        rtol=DTYPES[dtype],
        atol=DTYPES[dtype] * max(1.0, b.float().abs().max().item() if b.numel() else 1),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "repeated"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_fast_kernels_agree_with_the_definition(shape, repeated, dtype):
    values, indices, x, weight = inputs(shape, dtype, repeated=repeated)
    close(
        torch_ops.gather_sum(values, indices, weight),
        reference.gather_sum(values, indices, weight),
        dtype,
    )
    close(torch_ops.gather_dot(x, indices, weight), reference.gather_dot(x, indices, weight), dtype)
    if (
        dtype != torch.bfloat16
    ):  # the definition adds up in bfloat16, which is worse than the fast copy
        close(
            torch_ops.scatter_outer(values, indices, x, len(weight)),
            reference.scatter_outer(values, indices, x, len(weight)),
            dtype,
        )


def test_fast_weight_gradient_in_bfloat16_is_near_that_in_float32():
    values, indices, x, weight = inputs((9, 3, 12, 5), torch.bfloat16)
    exact = reference.scatter_outer(values.float(), indices, x.float(), 12)
    torch.testing.assert_close(
        torch_ops.scatter_outer(values, indices, x, 12).float(), exact, rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("kernel", [torch_ops, reference], ids=["fast", "reference"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_definition_agrees_with_dense_matrices(kernel, shape):
    values, indices, x, weight = inputs(shape, repeated=True)
    dense = torch.zeros(len(x), len(weight), dtype=torch.float64).scatter_add_(1, indices, values)
    torch.testing.assert_close(kernel.gather_sum(values, indices, weight), dense @ weight)
    torch.testing.assert_close(
        kernel.gather_dot(x, indices, weight), (x @ weight.T).gather(1, indices)
    )
    torch.testing.assert_close(kernel.scatter_outer(values, indices, x, len(weight)), dense.T @ x)


@pytest.mark.parametrize("kernel", [torch_ops, reference], ids=["fast", "reference"])
@given(
    b=st.integers(1, 9),
    k=st.integers(1, 6),
    n=st.integers(6, 40),
    d=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_gather_sum_and_gather_dot_are_adjoint(kernel, b, k, n, d, seed):
    values, indices, x, weight = inputs((b, k, n, d), seed=seed)
    forward = (kernel.gather_sum(values, indices, weight) * x).sum()
    torch.testing.assert_close(forward, (values * kernel.gather_dot(x, indices, weight)).sum())
    torch.testing.assert_close(
        forward, (kernel.scatter_outer(values, indices, x, n) * weight).sum()
    )


# ---- the selection


@given(
    n=st.sampled_from([1, 5, 16, 17, 127, 128, 256, 257, 512, 1024]),
    k=st.integers(1, 6),
    seed=st.integers(0, 999),
    levels=st.sampled_from([1, 2, 5, 0]),
)
def test_topk_is_exact_with_ties_and_any_width(n, k, seed, levels):
    k = min(k, n)
    make = torch.Generator().manual_seed(seed)
    pre = (
        torch.randn(4, n, generator=make)
        if not levels
        else torch.randint(levels, (4, n), generator=make).float()
    )
    indices = torch_ops.topk(pre, k)
    assert indices.shape == (4, k) and indices.min() >= 0 and indices.max() < n
    assert all(len(set(row)) == k for row in indices.tolist()), "an index was chosen twice"
    torch.testing.assert_close(
        pre.gather(1, indices).sort(1).values,
        pre.topk(k, dim=1).values.sort(1).values,
        rtol=0,
        atol=0,
    )


def test_topk_by_groups_is_what_runs_on_wide_rows_and_agrees_with_the_definition(monkeypatch):
    pre = torch.randn(50, 2048, generator=torch.Generator().manual_seed(0))
    pre[:, 7 * 128 : 7 * 128 + 20] += 10  # the largest lie in the same sixteenth of the row
    widths = []
    whole = torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor,
        "topk",
        lambda self, *a, **kw: widths.append(self.shape[-1]) or whole(self, *a, **kw),
    )
    indices = torch_ops.topk(pre, 16)
    assert max(widths) < 2048, "the two-stage selection was not used"
    assert torch.equal(indices.sort(1).values, reference.topk(pre, 16).sort(1).values)


def test_topk_of_an_empty_batch_is_empty():
    for n in (10, 2048):
        assert kernels.topk(torch.zeros(0, n), 3).shape == (0, 3)


def test_topk_carries_no_gradient():
    pre = torch.randn(3, 8, requires_grad=True)
    assert not kernels.topk(pre, 2).requires_grad


def test_using_reference_switches_and_switches_back(monkeypatch):
    calls = []
    monkeypatch.setattr(
        reference, "gather_sum", lambda *a: calls.append("reference") or torch.zeros(1, 1)
    )
    monkeypatch.setattr(
        torch_ops, "gather_sum", lambda *a: calls.append("fast") or torch.zeros(1, 1)
    )
    one = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1)
    with pytest.raises(KeyError, match="stop"):
        with kernels.using("reference"):
            kernels.gather_sum(*one)
            raise KeyError("stop")
    kernels.gather_sum(*one)
    assert calls == ["reference", "fast"]


def test_a_backward_pass_runs_what_its_forward_pass_ran(monkeypatch):
    calls, gather_dot = [], reference.gather_dot
    monkeypatch.setattr(
        reference, "gather_dot", lambda *a: calls.append("reference") or gather_dot(*a)
    )
    values, indices, _, weight = inputs((4, 3, 9, 5))
    with kernels.using("reference"):
        out = kernels.gather_sum(values.requires_grad_(), indices, weight)
    assert calls == []
    thread = threading.Thread(target=lambda: out.sum().backward())
    thread.start(), thread.join()
    assert calls == ["reference"] and values.grad is not None


def test_neither_importing_nor_using_the_operations_edits_the_warning_filters():
    code = (
        "import warnings, torch\n"
        "warnings.simplefilter('error')\n"
        "before = list(warnings.filters)\n"
        "from ksparse.kernels import torch_ops\n"
        "x, w, i = torch.ones(4, 8), torch.ones(16, 8), torch.zeros(4, 3, dtype=torch.long)\n"
        "torch_ops.gather_dot(x, i, w), torch_ops.gather_dot(x.double(), i, w.double())\n"
        "assert warnings.filters == before, warnings.filters\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- gradients


def both(name):
    return pytest.mark.parametrize("kernel", ["fast", "reference"], ids=str)(name)


@both
@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "repeated"])
@pytest.mark.parametrize("shape", [(4, 3, 9, 5), (3, 1, 5, 4), (2, 4, 4, 3)], ids=str)
def test_gather_sum_passes_gradcheck_for_values_and_weight(kernel, shape, repeated):
    values, indices, _, weight = inputs(shape, repeated=repeated)
    values.requires_grad_(), weight.requires_grad_()
    with kernels.using(kernel):
        assert torch.autograd.gradcheck(
            lambda v, w: kernels.gather_sum(v, indices, w), (values, weight)
        )


@both
@pytest.mark.parametrize("given_pre_acts", [False, True], ids=["computed", "given"])
@pytest.mark.parametrize("shape", [(4, 3, 9, 5), (3, 1, 5, 4), (2, 4, 4, 3)], ids=str)
def test_selected_passes_gradcheck_for_x_b_pre_W_enc_and_b_enc(kernel, shape, given_pre_acts):
    _, indices, x, weight = inputs(shape)
    b_pre, b_enc = (
        torch.randn(shape[3], dtype=torch.float64),
        torch.randn(shape[2], dtype=torch.float64),
    )
    every = [x, b_pre, weight, b_enc]

    def chosen(x, b_pre, W_enc, b_enc):
        pre = ((x - b_pre) @ W_enc.T + b_enc).detach() if given_pre_acts else None
        return kernels.selected_pre_acts(x, b_pre, W_enc, b_enc, indices, pre)

    with kernels.using(kernel):
        assert torch.autograd.gradcheck(chosen, [tensor.requires_grad_() for tensor in every])


@both
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_gradients_equal_autograd_of_the_dense_formula(kernel, shape):
    """b_pre's too: it is there twice, before the encoder and after the decoder."""
    b, k, n, d = shape
    _, indices, x, W_enc = inputs(shape, seed=1)
    make = torch.Generator().manual_seed(2)
    W_dec, b_enc, b_pre = (
        torch.randn(*size, generator=make, dtype=torch.float64) for size in ((n, d), (n,), (d,))
    )
    every = [tensor.requires_grad_() for tensor in (x, b_pre, W_enc, b_enc, W_dec)]
    target = torch.randn(b, d, generator=make, dtype=torch.float64)

    dense = (x - b_pre) @ W_enc.T + b_enc
    mask = torch.zeros(b, n, dtype=torch.float64).scatter_(1, indices, 1.0)
    expected = torch.autograd.grad(
        ((torch.relu(dense) * mask) @ W_dec + b_pre - target).square().sum(), every
    )
    with kernels.using(kernel):
        values = torch.relu(
            kernels.selected_pre_acts(x, b_pre, W_enc, b_enc, indices, dense.detach())
        )
        got = torch.autograd.grad(
            (kernels.gather_sum(values, indices, W_dec) + b_pre - target).square().sum(), every
        )
    for name, ours, theirs in zip(("x", "b_pre", "W_enc", "b_enc", "W_dec"), got, expected):
        torch.testing.assert_close(
            ours, theirs, msg=lambda text, name=name: f"gradient of {name}: {text}"
        )


@pytest.mark.parametrize("piece", [1, 5, 15, 16, 1024])
def test_sums_into_memory_that_is_there_are_the_same_bits_in_pieces(piece, monkeypatch):
    values, indices, x, weight = inputs((200, 4, 16, 12), torch.float32)
    indices = torch.where(indices == 7, 8, indices)  # nobody has the seventh
    lists, out = torch_ops.sort_by_latent(indices, 16), torch.full_like(weight, math.nan)
    monkeypatch.setattr(torch_ops, "_LATENTS", piece)
    assert torch_ops.scatter_transposed(lists, values, x, out=out) is out
    assert torch.equal(out, torch_ops.scatter_transposed(lists, values, x)) and not out[7].any()


def test_fast_gradients_are_the_same_bits_each_time():
    values, indices, x, weight = inputs((200, 4, 16, 12), torch.float32)
    first = torch_ops.scatter_outer(values, indices, x, 16)
    assert all(
        torch.equal(first, torch_ops.scatter_outer(values, indices, x, 16)) for _ in range(5)
    )


def test_only_the_gradients_that_are_needed_are_computed(monkeypatch):
    calls = []
    monkeypatch.setattr(torch_ops, "scatter_outer", lambda *a: calls.append("weight"))
    values, indices, _, weight = inputs((4, 3, 9, 5))
    kernels.gather_sum(values.requires_grad_(), indices, weight).sum().backward()
    assert values.grad is not None and not calls


# ---- the library that is kept


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Return a new cache, in which building a library is writing a line."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo built > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ksparse"


def test_a_library_is_kept_where_this_user_alone_can_write(cache):
    cache.parent.mkdir()
    before = os.umask(0)
    try:
        path = native.build()
    finally:
        os.umask(before)
    assert path.parent == cache and path.read_text() == "built\n"
    assert (cache.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    assert [file.name for file in cache.iterdir()] == [path.name]


def give_away(path):
    if os.geteuid():
        pytest.skip("only root gives a file to another user")
    os.chown(path, 54321, 54321)


@pytest.mark.parametrize(
    "plant",
    [
        lambda path: path.chmod(0o666),
        lambda path: path.chmod(0o620),
        give_away,
        lambda path: shutil.move(path, f"{path}.so") and path.symlink_to(f"{path}.so"),
    ],
    ids=["writable_by_all", "writable_by_the_group", "of_another_user", "a_link"],
)
def test_a_library_that_others_may_have_put_there_is_replaced(cache, plant):
    path = native.build()
    path.write_text("planted")
    plant(path)
    assert native.build() == path and path.read_text() == "built\n" and not path.is_symlink()
    assert path.stat().st_uid == os.geteuid() and path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "plant",
    [
        lambda folder: folder.chmod(0o777),
        lambda folder: folder.chmod(0o1777),
        lambda folder: folder.chmod(0o770),
        give_away,
        lambda folder: folder.rename(folder.with_name("x")) and folder.symlink_to("x"),
        lambda folder: folder.parent.chmod(0o777),
    ],
    ids=[
        "writable_by_all",
        "sticky",
        "writable_by_the_group",
        "of_another_user",
        "a_link",
        "below_one_that_all_can_write",
    ],
)
def test_a_cache_that_others_can_write_to_is_not_used(cache, plant, monkeypatch, caplog):
    path = native.build()
    path.write_text("planted")
    plant(cache)
    with pytest.raises(
        native.NoPrivateCacheError,
        match="others can write to .*cache.*; set XDG_CACHE_HOME to a folder of this user alone",
    ):
        native.build()
    opened = []
    monkeypatch.setattr(
        ctypes,
        "CDLL",
        lambda file: (
            opened.append((Path(file).read_text(), Path(file).parent)) or ctypes.PyDLL(None)
        ),
    )
    caplog.set_level("INFO")
    assert native.load.__wrapped__() is None, "it has none of the symbols"
    assert [text for text, _ in opened] == ["built\n"] and not opened[0][1].exists(), (
        "built anew, in a folder that is gone"
    )
    assert [record.getMessage()[:34] for record in caplog.records] == [
        "compiled kernels are not kept (oth",
        "the compiled kernels are not avail",
    ]


def test_a_cache_below_a_sticky_folder_is_used(cache):
    cache.parent.mkdir()
    cache.parent.chmod(0o1777)
    assert native.build().parent == cache


def test_a_relative_cache_is_ignored(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert (
        native.build().parent == tmp_path / "home" / ".cache" / "ksparse"
        and not (tmp_path / "relative").exists()
    )


@pytest.mark.parametrize("home", [None, "relative"])
def test_without_a_home_a_library_is_built_for_this_process_alone(
    cache, monkeypatch, tmp_path, home
):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(
        os, "getuid", lambda: 2**31 - 7
    )  # a user without an entry, as in a container
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        native.NoPrivateCacheError, match="this user has no home folder; set XDG_CACHE_HOME"
    ):
        native.build()
    opened = []
    monkeypatch.setattr(
        ctypes, "CDLL", lambda file: opened.append(Path(file).parent) or ctypes.PyDLL(None)
    )
    assert native.load.__wrapped__() is None and len(opened) == 1 and not opened[0].exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"compiler", "cache"}


@pytest.mark.parametrize("content", ["", "no library"])
def test_what_is_no_library_of_ours_is_one_line_and_plain_torch(
    cache, monkeypatch, caplog, content
):
    native.build().write_text(content)
    caplog.set_level("INFO")
    assert native.load.__wrapped__() is None
    assert (
        len(caplog.records) == 1
        and "training uses plain torch" in caplog.text
        and "\n" not in caplog.records[0].getMessage()
    )


def test_a_compiler_that_fails_is_one_line_and_leaves_nothing(cache, monkeypatch, caplog, tmp_path):
    (tmp_path / "compiler").write_text("#!/bin/sh\necho what >&2; echo is wrong >&2; exit 1\n")
    with pytest.raises(subprocess.CalledProcessError):
        native.build()
    caplog.set_level("INFO")
    assert native.load.__wrapped__() is None and list(cache.iterdir()) == []
    assert [record.getMessage() for record in caplog.records] == [
        "the compiled kernels are not available (is wrong); training uses plain torch"
    ]
