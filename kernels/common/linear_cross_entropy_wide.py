# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `linear_cross_entropy` for large widths: stored scores.

A program that owned rows of such a width could not hold their sums in registers, and one that took
64 columns of them would compute every score again for every 64 columns. So the products are those
of cuBLAS, and the scores of all rows and of a chunk of items lie in memory between them: forward
and backward multiply twice each, whatever the width.

Legend: N rows, V items, D width, C items of a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrec.kernels.common.tiles import FUSED, LOG2E, exp_shifted, round_to
from fastrec.ops.common.arguments import split_sum

# Scores of a chunk: 64 MiB in float32, and 32 MiB of their exponentials in 16 bits. Fewer items
# than FEWEST are less than a tile of cuBLAS, and [N, FEWEST] is smaller than the rows themselves;
# a forward program reads its items one block after the other: few rows do not get more than MOST.
CELLS, FEWEST, MOST = 2**24, 256, 2**16
BLOCK = 1024  # scores of a row that a forward program holds at a time
TILE = 64, 128  # rows and items of a backward program
WARPS = {"softmax": 4, "gradient": 8}


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as a sum of two bfloat16, exact to 2^-17."""
    high = x.bfloat16()
    return high, (x - high.float()).bfloat16()


def product(a: Tensor, b: Tensor, precision: str = "ieee") -> Tensor:
    """a @ b, summed and returned in float32. "bf16x3": the three products of the halves of float32
    that count, as one of three times the inner size; copies take 1.5 times the operands."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32 and precision == "bf16x3":
            (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
            a = torch.cat([a_low, a_high, a_high], 1)
            b = torch.cat([b_high, b_low, b_high], 0)
        if a.dtype == torch.float32 or not a.is_cuda:
            return a.float() @ b.float()
        return torch.mm(a, b, out_dtype=torch.float32)


def _chunks(rows: int, items: int) -> list[slice]:
    size = min(max(CELLS // rows, FEWEST), MOST)
    return [slice(first, min(first + size, items)) for first in range(0, items, size)]


@triton.jit
def _scores_at(scores, bias, column, keep, stride_b):
    s = tl.load(scores + column, mask=keep, other=float("-inf"))
    if bias is not None:
        s += tl.load(bias + column.to(tl.int64) * stride_b, mask=keep, other=0.0).to(tl.float32)
    return s


@triton.jit(do_not_specialize=["first"])
def _softmax_kernel(
    scores, bias, target, shift, sums, fade, logit, p_out, first, items, stride_b,
    BLOCK: tl.constexpr, WITH_MEAN: tl.constexpr, HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the scores [N, items] of a row, which are those of the items from `first` on, to its
    sums: of p = exp(score - shift) and of p_out, p rounded. What was added before counts `fade`."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    if y < 0:
        return
    scores += row * items
    old = tl.load(shift + row)
    peak = tl.full([BLOCK], -1e30, tl.float32)
    for at in range(0, items, BLOCK):
        column = at + tl.arange(0, BLOCK)
        peak = tl.maximum(peak, _scores_at(scores, bias, column, column < items, stride_b))
    new = tl.maximum(old, tl.max(peak, 0) - HEADROOM)

    total = tl.zeros([BLOCK], tl.float32)
    rounded = tl.zeros([BLOCK], tl.float32)
    for at in range(0, items, BLOCK):
        column = at + tl.arange(0, BLOCK)
        s = _scores_at(scores, bias, column, column < items, stride_b)
        p = exp_shifted(s, new, PRECISION)
        total += p
        if WITH_MEAN:
            q = round_to(p, p_out.dtype.element_ty)
            rounded += q.to(tl.float32)
            tl.store(p_out + row * items + column, q, mask=column < items)

    factor = tl.exp2((old - new) * LOG2E)
    tl.store(shift + row, new)
    tl.store(fade + row, factor)
    tl.store(sums + 2 * row, factor * tl.load(sums + 2 * row) + tl.sum(total, 0))
    tl.store(sums + 2 * row + 1, factor * tl.load(sums + 2 * row + 1) + tl.sum(rounded, 0))
    if (y >= first) & (y < first + items):
        tl.store(logit + row, _scores_at(scores, bias, y - first, True, stride_b))


@triton.jit(do_not_specialize=["n", "first"])
def _gradient_kernel(
    scores, bias, target, lse, grad_lse, grad_logit, p_out, bias_out, n, first, items, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p_out: gradients of the scores [N, items], rounded; bias_out [row blocks, items]: their sums
    before they are rounded."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    y = tl.load(target + row, mask=row < n, other=-1)
    live, real = y >= 0, column < items
    at = row[:, None] * items + column[None, :]
    s = tl.load(scores + at, mask=live[:, None] & real[None, :], other=float("-inf"))
    if bias is not None:
        b = tl.load(bias + column.to(tl.int64) * stride_b, mask=real, other=0.0)
        s += b.to(tl.float32)[None, :]
    shift = tl.load(lse + row, mask=live, other=0.0) - HEADROOM
    p = exp_shifted(s, shift[:, None], PRECISION)
    p *= tl.load(grad_lse + row, mask=live, other=0.0)[:, None]
    # Before p is rounded: at p_y near 1 the sum is smaller than the rounding of p_y.
    grad = tl.load(grad_logit + row, mask=live, other=0.0)
    p += tl.where((first + column)[None, :] == y[:, None], grad[:, None], 0.0)
    keep = (row < n)[:, None] & real[None, :]
    tl.store(p_out + at, round_to(p, p_out.dtype.element_ty), mask=keep)
    if bias is not None:
        tl.store(bias_out + tl.program_id(0) * items + column, tl.sum(p, 0), mask=real)


def forward(input, linear_weight, linear_bias, target, with_offset, options):
    """As `linear_cross_entropy_fwd`, N > 0."""
    (n, d), v = input.shape, linear_weight.shape[0]
    vector = {"dtype": torch.float32, "device": input.device}
    shift, logit = torch.full((n,), -1e30, **vector), torch.zeros(n, **vector)
    sums, fade = torch.zeros(n, 2, **vector), torch.ones(n, **vector)
    mean = torch.zeros(n if with_offset else 0, d, **vector)
    for part in _chunks(n, v):
        w = linear_weight[part].to(input.dtype)
        bias = None if linear_bias is None else linear_bias[part]
        items = len(w)
        p = input.new_empty(n if with_offset else 0, items)
        _softmax_kernel[(n,)](
            product(input, w.t(), options["PRECISION"]), bias, target, shift, sums, fade, logit, p,
            part.start, items,
            0 if bias is None else bias.stride(0),
            BLOCK=BLOCK, WITH_MEAN=with_offset, num_warps=WARPS["softmax"], **options, **FUSED,
        )  # fmt: skip
        if with_offset:
            mean.mul_(fade[:, None]).add_(product(p, w, options["PRECISION"]))
    live = target >= 0
    total, rounded = sums.unbind(1)
    lse, rest = split_sum(shift, total.log())
    low = lse < logit  # p_y <= 1 and loss >= 0 in spite of rounding
    rest = torch.where(low, 0.0, torch.maximum(rest, logit - lse))
    lse = torch.stack([torch.where(low, logit, lse), rest])
    if with_offset:
        target_rows = linear_weight.index_select(0, target.clamp_min(0)).to(input.dtype)
        if target_rows.dtype == torch.float32 and options["PRECISION"] == "bf16x3":
            target_rows = sum(half.float() for half in halves(target_rows))  # as it was multiplied
        mean = mean / rounded[:, None] - target_rows.float()
        mean = torch.where(live[:, None], mean, 0.0)
    return torch.where(live, lse, 0.0), logit, mean


def backward(input, linear_weight, linear_bias, target, vectors, scale, options):
    """As `linear_cross_entropy_bwd`, the gradients of the rows in `vectors` divided by `scale`."""
    (n, d), v = input.shape, linear_weight.shape[0]
    grad_weight = linear_weight.new_empty(v, d)
    grad_bias = vectors.new_empty(0) if linear_bias is None else linear_bias.new_empty(v)
    if n == 0:
        return grad_weight.zero_(), grad_bias.zero_()
    # Rows that are not scored have gradients of 0, and 0 times what they hold need not be.
    input = input.masked_fill((target < 0)[:, None], 0)
    block_n, block_v = TILE
    blocks = triton.cdiv(n, block_n)
    for part in _chunks(n, v):
        w = linear_weight[part].to(input.dtype)
        bias = None if linear_bias is None else linear_bias[part]
        items = len(w)
        p = input.new_empty(n, items)
        sums = vectors.new_empty(0 if bias is None else blocks, items)
        _gradient_kernel[(blocks, triton.cdiv(items, block_v))](
            product(input, w.t(), options["PRECISION"]), bias, target, *vectors, p, sums, n,
            part.start, items,
            0 if bias is None else bias.stride(0),
            BLOCK_N=block_n, BLOCK_V=block_v, num_warps=WARPS["gradient"], **options, **FUSED,
        )  # fmt: skip
        grad_weight[part] = product(p.t(), input, options["PRECISION"]).mul_(scale)
        if bias is not None:
            grad_bias[part] = sums.sum(0) * scale
    return grad_weight, grad_bias
