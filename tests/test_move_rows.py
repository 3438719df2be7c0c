# SPDX-License-Identifier: Apache-2.0
"""Rows of a table that a row-wise optimizer moves: the kernel against PyTorch's operations in
float64, in whatever shape, dtype and company."""

import pytest
import torch
from backends import needs

from fastrec.ops.common import move_rows
from fastrec.ops.common.move_rows import RowState, move_rows_, move_rows_ref_

pytestmark = needs("cpp", "move_rows_")
EPS, BETAS, RATE = 1e-3, (0.9, 0.99), 0.05
# Rows of one number, below and above a vector, of several cache lines; more rows than a task has.
SHAPES = [(60,), (60, 1), (60, 5), (60, 16), (61, 64), (3000, 50), (40, 257)]
HOW = ["adam", "adagrad", "sgd"]


def problem(shape, how, dtype=torch.float32, share=0.4):
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    rows = (torch.rand(shape[0], generator=generator) < share).nonzero()[:, 0]
    table, grad = randn(*shape), randn(len(rows), *shape[1:])
    if how == "sgd":
        return table, rows, grad, RowState(RATE)
    if how == "adagrad":
        return table, rows, grad, RowState(RATE, randn(shape[0]).square())
    return table, rows, grad, RowState(RATE, randn(*shape).square(), randn(*shape))


def changed(function, table, rows, grad, state, dtype=None):
    """(table, square, mean) afterwards; what was given stays."""
    parts = [None if x is None else x.clone().to(dtype or x.dtype) for x in (table, *state[1:])]
    function(parts[0], rows, grad.to(dtype or grad.dtype), RowState(state.rate, *parts[1:]), EPS,
             BETAS)  # fmt: skip
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(shape, how, dtype):
    given = problem(shape, how, dtype)
    exact = changed(move_rows_ref_, *given, dtype=torch.float64)
    got = changed(move_rows_, *given)
    wide = dtype == torch.float64
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if wide else {"rtol": 3e-6, "atol": 2e-6}
    rest = torch.ones(shape[0], dtype=torch.bool).index_fill_(0, given[1], False)
    for one, other, before in zip(got, exact, (given[0], *given[3][1:]), strict=True):
        if one is not None:
            torch.testing.assert_close(one.double(), other, **tolerance)
            assert torch.equal(one[rest], before[rest]), "a row that is not touched stays"


@pytest.mark.parametrize("how", HOW)
def test_the_bits_depend_neither_on_threads_nor_on_company(how):
    table, rows, grad, state = problem((3000, 50), how)
    torch.set_num_threads(3)
    whole = changed(move_rows_, table, rows, grad, state)
    torch.set_num_threads(1)
    alone = changed(move_rows_, table, rows, grad, state)
    half = changed(move_rows_, table, rows[::2], grad[::2], state)
    for one, other, part in zip(whole, alone, half, strict=True):
        if one is not None:
            assert torch.equal(one, other) and torch.equal(one[rows[::2]], part[rows[::2]])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(how, value):
    table, rows, grad, state = problem((60, 5), how)
    grad[3, 2] = value
    got = changed(move_rows_, table, rows, grad, state)
    exact = changed(move_rows_ref_, table, rows, grad, state)
    for one, other in zip(got, exact, strict=True):
        if one is not None:
            assert torch.equal(one.isfinite(), other.isfinite())
    assert not got[0][rows[3]].isfinite().all()


def test_rows_and_gradients_with_strides():
    table, rows, grad, state = problem((60, 5), "adam")
    plain = changed(move_rows_, table, rows, grad, state)
    strided = torch.stack([rows, rows], 1)[:, 0], grad.T.contiguous().T
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    for one, other in zip(changed(move_rows_, table, *strided, state), plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("how", HOW)
def test_gradients_of_another_dtype_are_moved_by_operations(how):
    table, rows, grad, state = problem((3000, 50), how)
    low = grad.bfloat16()
    exact = changed(move_rows_ref_, table, rows, low.float(), state)
    for one, other in zip(changed(move_rows_, table, rows, low, state), exact, strict=True):
        assert other is None or torch.equal(one, other)


@pytest.mark.parametrize("how", HOW)
def test_tables_that_the_kernel_does_not_take_are_moved_by_operations(how, monkeypatch):
    table, rows, grad, state = problem((60, 5), how)
    exact = changed(move_rows_ref_, table, rows, grad, state)
    monkeypatch.setattr(torch.ops.fastrec, "move_rows_", None)
    transposed = table.T.contiguous().T
    move_rows_(transposed, rows, grad, RowState(state.rate, *(
        None if part is None else part.clone() for part in state[1:])), EPS, BETAS)  # fmt: skip
    torch.testing.assert_close(transposed, exact[0])
    monkeypatch.setattr(move_rows, "unavailable_reason", lambda *_: "there is none")
    assert torch.equal(changed(move_rows_, table, rows, grad, state)[0], exact[0])


def test_no_rows_and_wrong_rows():
    table, rows, grad, state = problem((60, 5), "adam")
    before = [part.clone() for part in (table, *state[1:])]
    move_rows_(table, rows[:0], grad[:0], state, EPS, BETAS)
    for wrong in ([3, 3], [4, 2], [-1, 4], [2, 60]):
        with pytest.raises(RuntimeError, match="ascending, different"):
            move_rows_(table, torch.tensor(wrong), grad[:2], state, EPS, BETAS)
    for one, other in zip((table, *state[1:]), before, strict=True):
        assert torch.equal(one, other)
