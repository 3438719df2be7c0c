# SPDX-License-Identifier: Apache-2.0
"""The other design of the softmax over a table, to be measured beside the kernels: exponentials are
computed once, stored in bfloat16 for a chunk of rows, and multiplied by cuBLAS.

Three products and one exponential a logit instead of four and two, for a buffer of 2 bytes a logit
of the chunk. A row is shifted by a bound of its logits, |x_i| max_j |w_j|, so there is no maximum
to look for; where the bound is 80 or more above the logits, exp underflows: a measurement, no op.

Legend: N rows, V items, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrec.kernels.common.linear_cross_entropy_wide import product
from fastrec.kernels.common.tiles import LOG2E, dot, load_rows, round_to

BUFFER_BYTES = 9 * 2**30
# (BLOCK_N, BLOCK_V, num_warps, num_stages) by BLOCK_D; no spills on sm_90 (Triton 3.6, 3.9).
TILES = {64: (128, 128, 8, 3), 128: (128, 128, 8, 3), 256: (128, 128, 8, 2)}


@triton.jit(do_not_specialize=["n"])  # v is the stride of the rows: aligned, the stores are wide
def _exp_kernel(
    x, w, shift, out, sums, n, v, d,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [N, V] = exp(x_i . w_j - shift_i); sums [tiles of items, N] of the rounded values."""
    blocks = tl.cdiv(n, BLOCK_N)
    tile = (tl.program_id(0) // blocks).to(tl.int64)  # neighbours read the same items
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    item = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    live, real = row < n, item < v
    x_tile = load_rows(x, row, live, d, 1, 0, d, BLOCK_D)
    w_tile = load_rows(w, item, real, d, 1, 0, d, BLOCK_D)
    s = dot(x_tile, tl.trans(w_tile), None, "tf32")
    bound = tl.load(shift + row, mask=live, other=float("inf"))
    p = tl.exp2(tl.fma(s, LOG2E, -(bound * LOG2E)[:, None]))
    q = round_to(tl.where(real[None, :], p, 0.0), out.dtype.element_ty)
    place = row.to(tl.int64)[:, None] * v + item[None, :]
    tl.store(out + place, q, mask=live[:, None] & real[None, :])
    tl.store(sums + tile * n + row, tl.sum(q.to(tl.float32), 1), mask=live)


def _exponentials(x: Tensor, w: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """(exp(x w^T - shift) [N, V] in bfloat16, its row sums in float32)."""
    (n, d), v = x.shape, w.shape[0]
    block_d = max(triton.next_power_of_2(d), 16)
    block_n, block_v, warps, stages = TILES[max(block_d, 64)]
    tiles = triton.cdiv(v, block_v)
    out, sums = x.new_empty(n, v), shift.new_empty(tiles, n)
    with torch.cuda.device_of(x):
        _exp_kernel[(tiles * triton.cdiv(n, block_n),)](
            x, w, shift, out, sums, n, v, d, BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_D=block_d,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, sums.sum(0)


class _Stored(torch.autograd.Function):
    """Mean loss; its gradients are computed with it, one chunk of rows at a time."""

    @staticmethod
    def forward(ctx, x, w, y):
        n, v = x.shape[0], w.shape[0]
        rows = max(16, min(n, BUFFER_BYTES // (2 * v)))
        wide = x.float()
        longest = torch.linalg.vector_norm(w, dim=1, dtype=torch.float32).amax()
        shift = torch.linalg.vector_norm(wide, dim=1) * longest
        target_rows = w.index_select(0, y).float()
        total = x.new_zeros((), dtype=torch.float32)
        learns = ctx.needs_input_grad[0]
        grad_x = torch.empty_like(wide) if learns else None
        grad_w = None
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            e, sums = _exponentials(x[part], w, shift[part])
            total += (shift[part] + sums.log() - (wide[part] * target_rows[part]).sum(1)).sum()
            if grad_x is not None:
                share = (1 / (n * sums))[:, None]
                grad_x[part] = share * product(e, w) - target_rows[part] / n
                more = product(e.t(), (share * wide[part]).to(x.dtype))
                grad_w = more if grad_w is None else grad_w.add_(more)
        if grad_w is not None and grad_x is not None:
            grad_w.index_add_(0, y, wide, alpha=-1 / n)
            ctx.save_for_backward(grad_x.to(x.dtype), grad_w.to(w.dtype))
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, grad_w * grad, None


def stored(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Mean softmax cross-entropy; bfloat16 x [N, D] and w [V, D], D up to 256."""
    return _Stored.apply(x, w, y)
