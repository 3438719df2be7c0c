# SPDX-License-Identifier: Apache-2.0
"""jagged_max_pool: what the generated tests cannot say: hand-computed ties and NaN, many sequences,
errors."""

import math
import sys

import pytest
import torch
from backends import params

from fastrec import jagged_max_pool


@pytest.fixture(params=params("jagged_max_pool", "reference", "cpp", "triton"))
def backend(request):
    return request.param


def test_first_of_equal_values_gets_the_gradient(backend):
    values = torch.tensor(
        [[1.0, 5, 0, -0.0], [3, 5, -1, 0], [3, 2, 0, -1], [7, 7, 7, 7], [8, 8, 8, 8]],
        requires_grad=True,
    )
    offsets, mask = torch.tensor([0, 3, 3, 5]), torch.tensor([True, True, True, True, False])
    pooled = jagged_max_pool(values, offsets, mask=mask, backend=backend)
    assert pooled.tolist() == [[3, 5, 0, 0], [0, 0, 0, 0], [7, 7, 7, 7]]
    pooled.backward(torch.arange(1.0, 13).view(3, 4))
    assert values.grad.tolist() == [
        [0, 2, 3, 4], [1, 0, 0, 0], [0, 0, 0, 0], [9, 10, 11, 12], [0, 0, 0, 0]
    ]  # fmt: skip


@pytest.mark.parametrize("width", [1, 40])
def test_nan_and_infinities(backend, width):
    nan, inf = math.nan, math.inf
    column = torch.tensor([1.0, nan, inf, nan, -inf, -inf, nan, 2.0])
    values = column.unsqueeze(1).repeat(1, width).requires_grad_()
    mask = torch.tensor([True, True, True, True, True, True, False, True])
    pooled = jagged_max_pool(values, torch.tensor([0, 4, 6, 8]), mask=mask, backend=backend)
    assert pooled[0].isnan().all()
    assert (pooled[1] == -inf).all() and (pooled[2] == 2).all()
    pooled.sum().backward()
    assert values.grad[:, 0].tolist() == [0, 1, 0, 0, 1, 0, 0, 1]
    assert (values.grad == values.grad[:, :1]).all()


def test_more_sequences_than_an_axis_of_a_grid():
    lengths = torch.randint(0, 4, (70_000,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    leaves = [torch.randn(int(offsets[-1]), 5).requires_grad_()] * 2
    leaves[1] = leaves[0].detach().clone().requires_grad_()
    pooled = [
        jagged_max_pool(leaf, offsets, backend=backend)
        for leaf, backend in zip(leaves, (None, "reference"), strict=True)
    ]
    assert torch.equal(*pooled)
    for output in pooled:
        output.square().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_grid_of_many_sequences(launches):
    """The recorder refuses a grid with more than 65,535 programs on its second axis."""
    values = torch.zeros(300_000, 130, device="meta", requires_grad=True)
    offsets = torch.zeros(100_001, dtype=torch.int64, device="meta")
    jagged_max_pool(values, offsets, backend="triton").sum().backward()
    assert launches == ["_fwd_kernel", "_bwd_kernel"]


def test_events_of_no_sequence_get_a_gradient_of_zero(backend, poisoned_memory, monkeypatch):
    """Where the values of offsets are not looked at: behind the last one."""
    module = sys.modules["fastrec.ops.jagged_max_pool"]
    monkeypatch.setattr(module, "_check", lambda values, offsets, mask: offsets)
    values = torch.randn(50, 20, requires_grad=True)
    pooled = jagged_max_pool(values, torch.tensor([0, 9, 9, 12]), backend=backend)
    pooled.sum().backward()
    top = torch.stack([values[:9].amax(0), torch.zeros(20), values[9:12].amax(0)])
    assert torch.equal(pooled, top)
    assert torch.equal(values.grad[12:], torch.zeros(38, 20))
    assert values.grad.sum() == 40
