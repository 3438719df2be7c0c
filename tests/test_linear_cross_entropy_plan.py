# SPDX-License-Identifier: Apache-2.0
"""How the Triton kernels of linear_cross_entropy are launched: the plan of the rows, the number of
launches, the copy of the table."""

import collections

import pytest
import torch
from op_check import need
from op_db import linear_cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from fastrec import backend

planned = pytest.importorskip("fastrec.kernels.common.linear_cross_entropy_plan")
kernels = pytest.importorskip("fastrec.kernels.linear_cross_entropy")


@pytest.mark.triton
@pytest.mark.parametrize(
    "rows, items, block_v, width", [(1, 3, 128, 5), (100, 1000, 64, 64), (77, 5, 16, 70)]
)
def test_a_counted_plan_is_a_sorted_one(rows, items, block_v, width, monkeypatch):
    need(linear_cross_entropy.OP, "triton", "cpu")
    target = torch.randint(-3, items, (rows,)).clamp_min(-1)
    x, vectors = torch.randn(width, rows).t(), torch.randn(3, rows)

    def plans():
        forward = planned.forward_plan(target, items)
        return *forward, *planned.backward_plan(target, x, vectors, items, block_v)

    counted = plans()
    monkeypatch.setattr(planned, "MOST_ROWS", 0)
    for ours, expected in zip(counted, plans(), strict=True):
        assert ours.shape == expected.shape and ours.equal(expected)
    assert counted[1] == (target >= 0).sum()


def test_plans_of_any_number_of_items_are_one_program(monkeypatch):
    """What is compiled in does not depend on it."""
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: seen.append(constants)

    monkeypatch.setattr(planned, "_plan_kernel", Kernel())
    target, x, vectors = torch.zeros(5, dtype=torch.int64), torch.ones(5, 64), torch.ones(3, 5)
    for items in (3, 20033):
        planned.forward_plan(target, items)
        planned.backward_plan(target, x, vectors, items, 128)
    assert seen[:2] == seen[2:]


class Counted(TorchDispatchMode):
    """Calls of what launches a kernel or more, by name."""

    FREE = ("empty", "new_empty", "empty_like", "select", "unbind", "view", "detach")

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name not in self.FREE:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("copied", [False, True])
def test_few_launches(copied, launches, monkeypatch):
    monkeypatch.setattr(backend, "copy_tables", copied)
    x, w = meta(1317, 64, dtype=torch.bfloat16), meta(20033, 64)
    y, grad = meta(1317, dtype=torch.int64), meta(1317)
    with Counted() as counted:
        kernels.linear_cross_entropy_fwd(x, w, None, y, True)
    assert launches == ["_plan_kernel", "_fwd_kernel", "_combine_kernel"]
    assert counted.calls == ({"_to_copy": 1} if copied else {})
    launches.clear()
    with Counted() as counted:
        grad_weight, _ = kernels.linear_cross_entropy_bwd(x, w, None, y, meta(2, 1317), grad, grad)
    assert launches == ["_plan_kernel", "_bwd_kernel"]
    assert counted.calls.total() == 5 + copied and "sort" not in counted.calls
    assert grad_weight.dtype == torch.float32


@pytest.mark.triton
def test_a_copied_table_gives_the_same_products(monkeypatch):
    need(linear_cross_entropy.OP, "triton", "cpu")
    x = torch.randn(9, 24).bfloat16()
    w, y = torch.randn(150, 24), torch.randint(150, (9,))
    bits = {}
    for copied in (False, True):
        monkeypatch.setattr(backend, "copy_tables", copied)
        lse, logit, offset = kernels.linear_cross_entropy_fwd(x, w, None, y, True)
        ones = torch.ones(9)
        grad, _ = kernels.linear_cross_entropy_bwd(x, w, None, y, lse, ones, -ones)
        assert grad.dtype == torch.float32
        bits[copied] = logit, lse, offset, grad
    assert bits[False][0].equal(bits[True][0])  # of the target: one product of the same numbers
    torch.testing.assert_close(bits[True][1], bits[False][1], rtol=1e-5, atol=1e-5)
    for ours, expected in zip(bits[True][2:], bits[False][2:], strict=True):
        # Other tiles: p is rounded relative to another maximum.
        assert (ours - expected).abs().max() < 2.0**-7 * expected.abs().max()
