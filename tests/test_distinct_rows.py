# SPDX-License-Identifier: Apache-2.0
"""Distinct rows, and sums of gradients at them: kernels and PyTorch's operations against loops."""

from unittest.mock import patch

import pytest
import torch
from backends import needs

import fastrec
from fastrec.ops.common import distinct_rows as module
from fastrec.ops.common.distinct_rows import (
    distinct_rows,
    distinct_rows_ref,
    sum_rows,
    sum_rows_ref,
)

pytestmark = needs("cpp", "distinct_rows")
# Shapes of ids and rows of the table: none, one word of marks, its edges, several, many rows.
IDS = [(0, 5), (1, 1), (7, 63), (64, 64), (200, 65), ((30, 9), 1000), (9000, 6000), (5, 10_000)]
WIDTHS = [(), (1,), (5,), (64,), (257,)]


def drawn(shape, total, none=False):
    generator = torch.Generator().manual_seed(0)
    size = shape if isinstance(shape, tuple) else (shape,)
    return torch.randint(-1 if none else 0, total, size, generator=generator)


@pytest.mark.parametrize("function", [distinct_rows, lambda ids, _: distinct_rows_ref(ids)])
@pytest.mark.parametrize("none", [False, True])
@pytest.mark.parametrize(("shape", "total"), IDS, ids=str)
def test_rows_and_places_are_those_of_a_set(function, shape, total, none):
    ids = drawn(shape, total, none)
    rows, place = function(ids, total)
    expected = sorted({*ids.flatten().tolist()} - {-1})
    assert rows.tolist() == expected and rows.dtype == place.dtype == torch.int64
    at = {row: i for i, row in enumerate(expected)} | {-1: -1}
    assert place.shape == ids.shape
    assert place.flatten().tolist() == [at[id] for id in ids.flatten().tolist()]


def test_the_first_and_the_last_row_of_words():
    ids = torch.tensor([127, 0, 63, 64, 128, 0, 191])
    rows, place = distinct_rows(ids, 192)
    assert rows.tolist() == [0, 63, 64, 127, 128, 191] and place.tolist() == [3, 0, 1, 2, 4, 0, 5]


def test_a_table_that_is_much_larger_than_the_ids_is_not_marked():
    with patch.object(torch.ops.fastrec, "distinct_rows", None):
        rows, place = distinct_rows(torch.tensor([1 << 40, 3, 1 << 40]), 1 << 41)
    assert rows.tolist() == [3, 1 << 40] and place.tolist() == [1, 0, 1]


def summed(grad, place, count, scale):
    """In the order of the entries."""
    out = grad.new_zeros(count, *grad.shape[1:])
    for entry, at in enumerate(place.tolist()):
        if at >= 0:
            out[at] += scale * grad[entry]
    return out


@pytest.mark.parametrize("function", [sum_rows, sum_rows_ref])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", WIDTHS, ids=str)
@pytest.mark.parametrize(("entries", "count"), [(0, 0), (0, 3), (5, 1), (400, 90), (9000, 5000)])
def test_sums_are_those_of_a_loop(entries, count, width, dtype, function):
    generator = torch.Generator().manual_seed(1)
    place = drawn(entries, max(count, 1), none=True)
    grad = torch.randn(entries, *width, generator=generator, dtype=torch.float64).to(dtype)
    got = function(grad, place, count, 0.25)
    assert torch.equal(got, summed(grad, place, count, 0.25)) and got.dtype == dtype


def test_what_has_no_place_is_not_read():
    grad = torch.ones(4, 3)
    grad[1] = float("nan")
    got = sum_rows(grad, torch.tensor([0, -1, 2, 0]), 3)
    assert torch.equal(got, torch.tensor([2.0, 0, 1])[:, None].expand(3, 3))


def test_half_precision_strided_and_unaligned_gradients():
    place = torch.tensor([1, 0, 1])
    half = torch.tensor([[1.0, 2], [3, 4], [5, 6]], dtype=torch.bfloat16)
    expected = torch.tensor([[3.0, 4], [6, 8]])
    assert torch.equal(sum_rows(half, place, 2), expected.bfloat16())
    for strided in (half.float().repeat_interleave(2, 1)[:, ::2], half.float().T.contiguous().T):
        assert torch.equal(sum_rows(strided, place, 2), expected)
    behind = torch.cat([torch.zeros(1), half.float().flatten()])[1:].view(3, 2)
    assert torch.equal(sum_rows(behind, place, 2), expected)


def test_the_bits_do_not_depend_on_threads():
    generator = torch.Generator().manual_seed(1)
    place, grad = drawn(20_000, 12_000), torch.randn(20_000, 33, generator=generator)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(sum_rows(grad, place, 12_000, 0.3))
    assert torch.equal(*found)


def test_what_is_outside_is_refused():
    for id in (-2, 70):
        with pytest.raises(RuntimeError, match=r"ids must be in \[-1, 70\), got"):
            distinct_rows(torch.tensor([0, id]), 70)
    for place in (-2, 2):
        with pytest.raises(RuntimeError, match=r"places must be in \[-1, 2\), got"):
            sum_rows(torch.ones(2, 3), torch.tensor([0, place]), 2)
    with pytest.raises(RuntimeError, match="a gradient for each of 3 places, got 2"):
        sum_rows(torch.ones(2, 3), torch.zeros(3, dtype=torch.int64), 2)


def test_without_the_kernels_the_results_are_the_same():
    ids, grad = drawn((30, 9), 100, none=True), torch.randn(270, 4)
    there = distinct_rows(ids, 100)
    with patch.object(module, "unavailable_reason", lambda *_: "not here"):
        rows, place = distinct_rows(ids, 100)
        sums = sum_rows(grad, place.flatten(), len(rows), 0.5)
    assert torch.equal(rows, there[0]) and torch.equal(place, there[1])
    assert torch.equal(sums, sum_rows(grad, place.flatten(), len(rows), 0.5))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("events", "total"), [(0, 5), (40, 7), (300, 5000)])
def test_the_sparse_gradient_of_jagged_embedding_is_the_dense_one(backend, dtype, events, total):
    ids = drawn(events, total).to(dtype)
    grad = torch.randn(events, 6, generator=torch.Generator().manual_seed(1))
    found = []
    for sparse in (True, False):
        table = torch.ones(total, 6, requires_grad=True)
        fastrec.jagged_embedding(ids, table, sparse=sparse, backend=backend).backward(grad)
        found.append(table.grad)
    sparse, dense = found
    torch.testing.assert_close(sparse.to_dense(), dense)
    if backend == "cpp":  # each row once, in order
        assert torch.equal(sparse._indices()[0], ids.unique().long())
