# SPDX-License-Identifier: Apache-2.0
"""Kernels with more blocks, programs and chunks than the small samples of op_db give them."""

import importlib
import math

import pytest
import torch
from backends import needs
from op_check import check
from op_db import (
    bias_gelu_dropout,
    dropout_add_layer_norm,
    in_batch_cross_entropy,
    in_batch_hardest,
    jagged_attention,
    jagged_embedding,
    jagged_gru,
    linear_cross_entropy,
    linear_rank,
    linear_topk,
    multilabel_bce,
)
from op_db import (
    sampled_linear_cross_entropy as sampled,
)
from op_db.case import TYPES

import fastrec
from fastrec import sampled_linear_cross_entropy

triton, tl = (pytest.importorskip(name) for name in ("triton", "triton.language"))
zero_rest = pytest.importorskip("fastrec.kernels.common.tiles").zero_rest
pytestmark = [pytest.mark.triton, needs("triton", "linear_cross_entropy")]


@pytest.mark.parametrize("types", TYPES[:1] + TYPES[2:3], ids=str)
@pytest.mark.parametrize(
    "op, name",
    [
        pytest.param(bias_gelu_dropout.OP, "width_150", id="bias_gelu_dropout-triton"),
        pytest.param(dropout_add_layer_norm.OP, "width_130", id="dropout_add_layer_norm-triton"),
        pytest.param(jagged_embedding.OP, "width_130", id="jagged_embedding-triton"),
    ],
)
def test_programs_of_several_blocks(op, name, types, monkeypatch):
    from fastrec.kernels.common import rows

    ranges = []
    monkeypatch.setattr(rows, "MOST_PARTIALS", 2)
    monkeypatch.setattr(f"fastrec.kernels.{op.name}.row_ranges", seen(rows.row_ranges, ranges))
    check(op, name, "triton", "cpu", types)
    assert ranges and all(programs == 2 and blocks > 1 for programs, blocks in ranges)


def seen(function, results):
    def wrapper(*arguments):
        results.append(function(*arguments))
        return results[-1]

    return wrapper


class Spied:
    """A kernel whose launches leave their arguments, by name, in `launches`."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*values, **options):
            self.launches.append(dict(zip(self.kernel.arg_names, values, strict=False)) | options)
            self.kernel[grid](*values, **options)

        return launch


def launches_of(op, name: str, monkeypatch) -> list[dict]:
    found: list[dict] = []
    module = f"fastrec.kernels.{op.name}"
    for part in ("_fwd_kernel", "_bwd_kernel", "_shared_fwd_kernel", "_shared_bwd_kernel",
                 "_maxima_kernel", "_select_kernel", "_scatter_kernel"):  # fmt: skip
        kernel = getattr(importlib.import_module(module), part, None)
        if kernel is not None:
            monkeypatch.setattr(f"{module}.{part}", Spied(kernel, found))
    check(op, name, "triton", "cpu", TYPES[0])
    return found


@pytest.mark.parametrize(
    "op, name",
    [
        pytest.param(op, name, id=f"{op.name}-triton")
        for op, name in (
            (linear_cross_entropy.OP, "width_1"),
            (in_batch_cross_entropy.OP, "width_130"),
            (in_batch_hardest.OP, "width_130"),
            (linear_rank.OP, "ties_width_1"),
            (linear_topk.OP, "ties_width_1"),
            (multilabel_bce.OP, "width_130"),
            (sampled.OP, "width_130_shared"),
        )
    ],
)
def test_products_are_of_widths_that_are_multiples_of_16(op, name, monkeypatch):
    """Of others a compiled kernel loads number by number."""
    found = launches_of(op, name, monkeypatch)
    assert found and not any(launch["d"] % 16 for launch in found)


@pytest.mark.parametrize(
    "op, name, width",
    [
        pytest.param(op, name, width, id=f"{op.name}-triton")
        for op, name, width in (
            (jagged_attention.OP, "width_130", 130),
            (dropout_add_layer_norm.OP, "width_130", 130),
            (bias_gelu_dropout.OP, "width_150", 150),
            (jagged_embedding.OP, "width_130", 130),
            (jagged_gru.OP, "wide", 40),
        )
    ],
)
def test_other_kernels_are_told_of_vectors(op, name, width, monkeypatch):
    found = launches_of(op, name, monkeypatch)
    sizes = {(launch.get("d", launch.get("width")), launch["VEC"]) for launch in found}
    assert sizes == {(width // 8, 8) if width == 40 else (width // 2, 2)}


def test_how_long_vectors_are():
    from fastrec.kernels.common.rows import in_vectors

    assert in_vectors(64, 192, 0) == (1, [64, 192, 0])  # Triton sees multiples of 16
    assert in_vectors(24, 72) == (8, [3, 9])
    assert in_vectors(100, 100, 300) == (4, [25, 25, 75])
    assert in_vectors(64, 65) == (1, [64, 65])


@pytest.mark.parametrize("types", TYPES[:1] + TYPES[2:], ids=str)
@pytest.mark.parametrize("name", ["width_300", "width_300_everything", "width_300_extreme"])
def test_triton_wide_table_of_several_chunks(name, types, monkeypatch):
    from fastrec.kernels.common import linear_cross_entropy_wide as wide

    monkeypatch.setattr(wide, "MOST", 7)
    monkeypatch.setattr(wide, "BLOCK", 2)
    monkeypatch.setattr(wide, "TILE", (4, 4))
    assert len(wide._chunks(7, 45)) == 7
    check(linear_cross_entropy.OP, name, "triton", "cpu", types)


@pytest.mark.parametrize("before", [0, 5, 32])
def test_triton_scatter_of_a_row_with_more_events_than_a_step_of_the_carry(before):
    from fastrec.kernels.jagged_embedding import BLOCK_T, jagged_embedding_scatter

    # The events of item 2 fill two steps of 32 programs and begin a third one.
    index = torch.tensor([1] * before + [2] * (70 * BLOCK_T) + [4] * 3)
    grad = torch.ones(len(index), 3)  # sums of ones are exact
    grad[:, 1] = torch.arange(len(index)) % 3
    total = jagged_embedding_scatter(grad, index, 6, torch.float32)
    assert torch.equal(total, torch.zeros(6, 3).index_add(0, index, grad))


def test_triton_scatter_keeps_what_is_not_finite_in_its_row():
    from fastrec.kernels.jagged_embedding import jagged_embedding_scatter

    inf, nan = math.inf, math.nan
    index = torch.tensor([0, 1, 1, 2, 2, 3, 4, 5] + [6] * 40 + [7] * 20 + [8])
    grad = torch.ones(len(index), 4)
    # Of item 1: inf + 1, inf - inf, -inf + 1, NaN + inf. Of 6 and 7: of the next program's part.
    grad[1] = torch.tensor([inf, inf, -inf, nan])
    grad[2, 1:] = torch.tensor([-inf, 1.0, inf])
    grad[45, 0], grad[50, 1], grad[5, 3] = inf, nan, -inf
    total = jagged_embedding_scatter(grad, index, 10, torch.float32)
    expected = torch.zeros(10, 4).index_add(0, index, grad)
    torch.testing.assert_close(total, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "function, width, ids",
    [
        pytest.param(fastrec.linear_cross_entropy, 8, (), id="linear_cross_entropy-triton"),
        pytest.param(fastrec.linear_cross_entropy, 300, (), id="linear_cross_entropy-wide-triton"),
        pytest.param(sampled_linear_cross_entropy, 8, (4, 6), id="sampled-own-triton"),
        pytest.param(sampled_linear_cross_entropy, 8, (6,), id="sampled-shared-triton"),
    ],
)
def test_a_row_that_is_not_scored_may_hold_anything(function, width, ids):
    x, w = torch.randn(4, width), torch.randn(20, width, requires_grad=True)
    target = torch.tensor([3, -100, 5, 19])
    more = [torch.randint(20, ids)] if ids else []
    grads = []
    for value in (0.0, math.nan, math.inf):
        x[1] = value
        loss = function(x, w, target, *more, backend="triton")
        grads += torch.autograd.grad(loss, w)
    assert grads[0].isfinite().all() and all(torch.equal(grad, grads[0]) for grad in grads)


@pytest.mark.parametrize("form", ["own", "shared"])
def test_triton_one_program_does_not_add_all_skipped_pairs(form, monkeypatch):
    found: list[dict] = []
    for module in ("jagged_embedding", "sampled_linear_cross_entropy"):
        kernels = importlib.import_module(f"fastrec.kernels.{module}")
        monkeypatch.setattr(kernels, "carry_kernel", Spied(kernels.carry_kernel, found))
    check(sampled.OP, f"everything_bce_mean_{form}", "triton", "cpu", TYPES[0])
    assert len(found) == 2 and all(launch["spare"] == 45 for launch in found)  # of 45 items


@triton.jit
def _one_program_kernel(out, offsets, events, columns, only):
    if tl.program_id(0) * tl.num_programs(1) + tl.program_id(1) == only:
        zero_rest(out, offsets, events, columns, 4, 16)


def test_triton_programs_share_the_events_of_no_sequence():
    offsets, shares = torch.tensor([0, 2, 3]), []
    for only in range(4, 16):
        out = torch.ones(40, 20)
        _one_program_kernel[(34, 2)](out, offsets, 40, 20, only)
        shares.append(out[:, 0] == 0)
    assert torch.stack(shares).sum(0).tolist() == [0] * 3 + [1] * 37
    assert all(share.sum() <= 4 for share in shares)


def test_a_table_in_columns_beyond_32_bits(tmp_path):
    """The strides of a [D, V] table go to V, and offsets beyond 2^31: a sparse file."""
    v, d = 10_000_000, 256
    file = tmp_path / "table"
    with open(file, "wb") as opened:
        opened.truncate(v * d * 4)
    columns = torch.from_file(str(file), shared=True, size=v * d, dtype=torch.float32).view(d, v)
    columns[:, 5], columns[:, 7] = torch.arange(d) * 0.01, torch.linspace(-1, 1, d)
    x, target, negatives = torch.ones(1, d), torch.tensor([5]), torch.tensor([[7, 7]])
    losses = [
        sampled_linear_cross_entropy(x, table, *ids, backend="triton")
        for table, ids in (
            (columns.t(), (target, negatives)),
            (columns[:, 5:8].t().contiguous(), (target - 5, negatives - 5)),
        )
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("loss", ["bce", "gbce"])
def test_gradients_of_many_easy_shared_negatives_are_not_lost_in_float16(loss):
    """8,192 negatives of probability 3e-4: divided by their number each was 0 in float16."""
    x, w = 0.1 * torch.randn(4, 16), torch.rand(301, 16)
    w[0] = 0.0  # of the targets, whose gradient would hide that of the negatives
    bias, target = torch.full((301,), -8.0), torch.zeros(4, dtype=torch.int64)
    negatives = torch.randint(1, 301, (8192,))

    def gradient(dtype, backend):
        given = x.to(torch.float16).to(dtype).requires_grad_()
        found = sampled_linear_cross_entropy(
            given, w.to(torch.float16).to(dtype), target, negatives,
            linear_bias=bias.to(dtype), loss=loss, num_items=10_000, reduction="sum",
            backend=backend,
        )  # fmt: skip
        found.backward()
        return given.grad.double()

    exact = gradient(torch.float64, "reference")
    assert (exact > 1e-5).all()
    found = gradient(torch.float16, "triton")
    assert ((found - exact).abs() <= 0.01 * exact).all()
