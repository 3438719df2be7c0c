# SPDX-License-Identifier: Apache-2.0
"""The distinct rows of a table that some ids name, sums of the gradients of equal ones, and the
sparse gradient that these are.

Legend: E ids, U distinct rows, D width, V rows of the table.

The kernels mark rows in V bits, and the place of a row is the number of marks in front of it: no
sort (docs/log/processes.md).
"""

import torch
from torch import Tensor

from fastrec.backend import unavailable_reason

torch.library.define("fastrec::distinct_rows", "(Tensor ids, int total) -> (Tensor, Tensor)")
torch.library.define(
    "fastrec::sum_rows", "(Tensor grad, Tensor place, int count, float scale) -> Tensor"
)

_BITS = 2048  # rows of the table an id: where there are more, marks take longer than a sort


def distinct_rows(ids: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(rows int64 [U], ascending, the place of each id among them, like `ids`). ids: int64, any
    shape, in [0, total) or -1 for none, whose place is -1."""
    here = unavailable_reason("cpp", "distinct_rows", ids.device) is None
    if here and total <= _BITS * ids.numel():
        return torch.ops.fastrec.distinct_rows(ids, total)
    return distinct_rows_ref(ids)


def sum_rows(grad: Tensor, place: Tensor, count: int, scale: float = 1.0) -> Tensor:
    """[count, D] or [count]: sums of `scale` times the rows of `grad` [E, D] or [E] at the same
    place, added in their order. place: int64 [E], in [0, count) or -1 for none."""
    wide = grad.dtype in (torch.float32, torch.float64)
    if wide and unavailable_reason("cpp", "sum_rows", grad.device) is None:
        return torch.ops.fastrec.sum_rows(grad, place, count, scale)
    return sum_rows_ref(grad, place, count, scale)


def sparse_rows(rows: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The sparse tensor of `shape` whose `rows`, int64 [U], distinct and ascending, are `values`
    [U, D] or [U]: coalesced, which nothing checks, because that would wait for a GPU."""
    return torch.sparse_coo_tensor(
        rows[None], values, shape, device=values.device, is_coalesced=True, check_invariants=False
    )


def distinct_rows_ref(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: plain PyTorch, any device."""
    rows, place = ids.unique(return_inverse=True)
    none = int(len(rows) > 0 and rows[0] < 0)
    return rows[none:], place - none


def sum_rows_ref(grad, place, count, scale) -> Tensor:
    """The oracle: plain PyTorch, any dtype and device."""
    kept = place >= 0
    place, grad = place[kept], grad[kept] * scale
    shape = (count, *grad.shape[1:])
    if grad.is_cuda:  # this one sorts, and adds in order; what the other one does there is atomic
        return grad.new_zeros(shape).index_put_((place,), grad, accumulate=True)
    entries = torch.sparse_coo_tensor(
        place[None], grad, shape, device=grad.device, check_invariants=False
    )
    return entries.to_dense()  # adds in order
