# SPDX-License-Identifier: Apache-2.0
"""Rows of a table that are moved in the sweep which would compute their gradient, against autograd
in float64 and the same optimizer one row at a time."""

import pytest
import torch
import torch.nn.functional as F
from backends import needs

from fastrec.ops.common.linear_cross_entropy_update import pending_loss, update_rows_
from fastrec.ops.common.move_rows import RowState

pytestmark = needs("cpp", "linear_cross_entropy")
EPS, BETAS, RATE = 1e-3, (0.9, 0.99), 0.05
# Below and above the blocks of 96 items, of 48 where there are few, and the tiles of 192 rows.
SIZES = [(7, 5, 3), (200, 100, 50), (300, 4001, 64), (0, 50, 8)]


def problem(n, v, d, dtype=torch.float32, bias=True):
    """Two losses with rows that are not scored; rows of the table with more gradient."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    def drawn():
        target = torch.randint(v, (n,), generator=generator)
        return randn(n, d), target.masked_fill(torch.arange(n) % 5 == 3, -100)

    table, biases = randn(v, d) / 4, randn(v) if bias else None
    rows = torch.randperm(v, generator=generator)[: min(v, 9)].sort().values
    return table, biases, [drawn(), drawn()], rows, randn(len(rows), d)


def states(how, v, d, dtype):
    if how == "sgd":
        return RowState(RATE), RowState(RATE / 2)
    if how == "adagrad":
        return RowState(RATE, torch.ones(v, dtype=dtype)), RowState(
            RATE / 2, torch.ones(v).to(dtype)
        )
    start = torch.full((v, d), 0.5, dtype=dtype), torch.full((v, d), 0.2, dtype=dtype)
    return RowState(RATE, *start), RowState(RATE / 2, *(part[:, 0].clone() for part in start))


def moved(value, grad, state):
    """One tensor in float64, the definition."""
    value, grad = value.double(), grad.double()
    if state.square is None:
        return value - state.rate * grad
    if state.mean is None:
        total = state.square.double() + grad.view(len(grad), -1).square().mean(1)
        scale = state.rate / (total.sqrt() + EPS)
        return value - grad * (scale[:, None] if grad.dim() == 2 else scale)
    mean = BETAS[0] * state.mean.double() + (1 - BETAS[0]) * grad
    square = BETAS[1] * state.square.double() + (1 - BETAS[1]) * grad.square()
    return value - state.rate * mean / (square.sqrt() + EPS)


def swept(table, bias, losses, rows, grad_rows, how):
    table, pending, total = table.clone(), [], 0.0
    bias = None if bias is None else bias.clone()
    for number, (x, target) in enumerate(losses):
        x = x.clone().requires_grad_()
        loss = pending_loss(x, table, target, linear_bias=bias, pending=pending)
        ((number + 1) * loss).backward()
        total += (number + 1) * loss.item()
    state = states(how, *table.shape, table.dtype)
    update_rows_(table, bias, pending, rows, grad_rows, *state, eps=EPS, betas=BETAS)
    return total, table, bias, state


@pytest.mark.parametrize("how", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_row_is_moved_by_its_whole_gradient(size, how, dtype):
    bias = size[1] != 100
    table, biases, losses, rows, grad_rows = problem(*size, dtype, bias)
    total, got, got_bias, state = swept(table, biases, losses, rows, grad_rows, how)
    w = table.double().requires_grad_()
    b = None if biases is None else biases.double().requires_grad_()
    loss = w.sum() * 0 + (0 if b is None else b.sum() * 0)
    for number, (x, target) in enumerate(losses):
        if (target >= 0).any():
            loss = loss + (number + 1) * F.cross_entropy(F.linear(x.double(), w, b), target)
    loss.backward()
    grad = w.grad.index_add(0, rows, grad_rows.double())
    start = states(how, *table.shape, dtype)
    budget = dict(rtol=1e-5, atol=2e-6) if dtype == torch.float32 else dict(rtol=1e-10, atol=1e-12)
    assert total == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(got.double(), moved(table, grad, start[0]), **budget)
    if bias:
        torch.testing.assert_close(got_bias.double(), moved(biases, b.grad, start[1]), **budget)
    if how == "adagrad":
        square = start[0].square.double() + grad.square().mean(1)
        torch.testing.assert_close(state[0].square.double(), square, **budget)
    if how == "adam":
        mean = BETAS[0] * start[0].mean.double() + (1 - BETAS[0]) * grad
        torch.testing.assert_close(state[0].mean.double(), mean, **budget)


def test_the_bits_do_not_depend_on_threads():
    case, found = problem(300, 4001, 64), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(swept(*case, "adam")[1:3])
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_the_op_is_what_its_schema_says():
    table, bias, losses, rows, grad_rows = problem(7, 5, 3)
    pending = []
    x = losses[0][0].requires_grad_()
    pending_loss(x, table, losses[0][1], linear_bias=bias, pending=pending).backward()
    weight_state, bias_state = states("adam", 5, 3, torch.float32)
    arguments = (
        table, bias, *pending[0], rows, grad_rows, weight_state.square, weight_state.mean,
        bias_state.square, bias_state.mean, 0.1, 0.1, EPS, *BETAS,
    )  # fmt: skip
    op = torch.ops.fastrec.linear_cross_entropy_update_.default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_wrong_arguments():
    table, bias, [(x, target), _], rows, grad_rows = problem(7, 5, 3)
    pending, how = [], dict(linear_bias=bias)
    x.requires_grad_()
    with pytest.raises(IndexError, match="target"):
        pending_loss(x, table, target.fill_(5), pending=pending, **how)
    target.fill_(1)
    with pytest.raises(RuntimeError, match="by the kernels alone"):
        pending_loss(x, table, target, pending=pending, backend="reference", **how)
    with pytest.raises(TypeError, match="float32 or float64, got an input of torch.bfloat16"):
        pending_loss(x.bfloat16(), table, target, pending=pending, **how)
    pending_loss(x, table, target, pending=pending, **how).backward()
    state = states("sgd", 5, 3, torch.float32)
    before = table.clone()
    with pytest.raises(IndexError, match=r"rows\[4\] is 5"):
        update_rows_(table, bias, pending, torch.arange(1, 6), grad_rows, *state)
    with pytest.raises(ValueError, match="linear_weight must be contiguous"):
        update_rows_(table.T.contiguous().T, bias, pending, rows, grad_rows, *state)
    with pytest.raises(ValueError, match="grad_rows must be"):
        update_rows_(table, bias, pending, rows, grad_rows[:, :2], *state)
    assert torch.equal(table, before)
