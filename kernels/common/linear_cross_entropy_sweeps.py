# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `linear_cross_entropy`: the N x V logits exist one tile at a time.

Legend: N rows, V items, D width. Rows are visited in the order of `linear_cross_entropy_plan`: the
scored ones first, sorted by target.

Forward: a program owns BLOCK_N rows and a range of items. It streams tiles of W and keeps
sum_j p_ij and sum_j p_ij W_j relative to a shift of the row; `_combine_kernel` adds the ranges in a
fixed order. The shift is the maximum of the first tile: in bfloat16 and float32 p may be far above
1. Where a sum gets too large (and always in float16) the shift follows the maximum.

Backward: a program owns BLOCK_V items and a range of rows (all of them where there are many items)
and writes its rows of dW once. No atomics and no locks: equal inputs give equal bits.

The number of scored rows stays on the device, so the host never waits; programs without work exit.
"""

import triton
import triton.language as tl

from fastrec.kernels.common.tiles import (
    dot,
    dot_t,
    exp_shifted,
    join_means,
    join_sums,
    load_rows,
    outgrown,
    round_to,
    softmax_step,
    split,
    split_lse,
    store_sums,
)


@triton.jit
def _schedule(count, v, slots, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """(row blocks, item ranges, tiles per range) that spread the scored rows over `slots`."""
    blocks = tl.cdiv(tl.load(count).to(tl.int32), BLOCK_N)
    tiles = tl.cdiv(v, BLOCK_V)
    ranges = tl.maximum(tl.minimum(slots // tl.maximum(blocks, 1), tl.minimum(tiles, 128)), 1)
    per_range = tl.cdiv(tiles, ranges)
    return blocks, tl.cdiv(tiles, per_range), per_range


@triton.jit
def _sweep(
    x_tile, w, bias, begin, end, v, d, stride_wv, stride_wd, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, RUNNING: tl.constexpr,
    STAGES: tl.constexpr, WITH_MEAN: tl.constexpr, HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(shift, total, rounded, mean) of the rows of x_tile over the items [begin, end)."""
    shift = tl.full([BLOCK_N], -1e30, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    rounded = tl.zeros([BLOCK_N, 8], tl.float32)
    mean = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in tl.range(begin, end, BLOCK_V, num_stages=STAGES):
        item = first + tl.arange(0, BLOCK_V)
        real = item < v
        w_tile = load_rows(w, item, real, stride_wv, stride_wd, 0, d, BLOCK_D)
        w_tile = round_to(w_tile, x_tile.dtype)
        s = dot_t(x_tile, w_tile, None, PRECISION)
        if bias is not None:
            b = tl.load(bias + item.to(tl.int64) * stride_b, mask=real, other=float("-inf"))
            s += b.to(tl.float32)[None, :]
        elif first + BLOCK_V > v:
            s = tl.where(real[None, :], s, float("-inf"))
        shift, total, rounded, mean = softmax_step(
            s, w_tile, first == begin, shift, total, rounded, mean,
            RUNNING, WITH_MEAN, HEADROOM, PRECISION,
        )  # fmt: skip
    return shift, total, rounded, mean


@triton.jit(do_not_specialize=["v", "slots"])
def _fwd_kernel(
    x, w, bias, order, count, shift_out, sum_out, mean_out,
    v, d, slots, stride_xn, stride_xd, stride_wv, stride_wd, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, RUNNING: tl.constexpr,
    WITH_MEAN: tl.constexpr, HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read the same items, so that a W tile comes from HBM once.
    blocks, ranges, per_range = _schedule(count, v, slots, BLOCK_N, BLOCK_V)
    slot = tl.program_id(0)
    if slot >= blocks * ranges:
        return
    at = (slot % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = at < tl.load(count)
    row = tl.load(order + at, mask=live, other=0)
    x_tile = load_rows(x, row, live, stride_xn, stride_xd, 0, d, BLOCK_D)
    begin = (slot // blocks) * per_range * BLOCK_V
    end = tl.minimum(begin + per_range * BLOCK_V, v)
    shift, total, rounded, mean = _sweep(
        x_tile, w, bias, begin, end, v, d, stride_wv, stride_wd, stride_b,
        BLOCK_N, BLOCK_V, BLOCK_D, RUNNING, None, WITH_MEAN, HEADROOM, PRECISION,
    )  # fmt: skip
    if not RUNNING:  # noqa: SIM102, what is known to the compiler alone
        if outgrown(total):  # small tiles: it happens seldom, and must not cost registers
            shift, total, rounded, mean = _sweep(
                x_tile, w, bias, begin, end, v, d, stride_wv, stride_wd, stride_b,
                BLOCK_N, 16, BLOCK_D, True, 1, WITH_MEAN, HEADROOM, PRECISION,
            )  # fmt: skip
    place = slot.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    store_sums(
        shift_out, sum_out, mean_out, place, 0, shift, total, rounded, mean, d,
        WITH_MEAN, x.dtype.element_ty, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "v", "slots"])
def _combine_kernel(
    x, w, bias, target, order, count, shift_in, sum_in, mean_in, lse_out, logit_out, offset_out,
    n, v, d, slots, stride_xn, stride_xd, stride_wv, stride_wd, stride_b,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    WITH_MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse, target_logit and mean_offset of BLOCK_R rows; 0 for rows that are not scored."""
    blocks, ranges, _ = _schedule(count, v, slots, BLOCK_N, BLOCK_V)
    at = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.load(order + at, mask=at < n, other=0)
    live = at < tl.load(count)
    place = (at // BLOCK_N).to(tl.int64) * BLOCK_N + at % BLOCK_N
    step = blocks.to(tl.int64) * BLOCK_N

    shift, total, rounded = join_sums(shift_in, sum_in, place, step, ranges, live, BLOCK_R)

    y = tl.load(target + row, mask=live, other=0)
    x_tile = load_rows(x, row, live, stride_xn, stride_xd, 0, d, BLOCK_D)
    w_tile = load_rows(w, y, live, stride_wv, stride_wd, 0, d, BLOCK_D)
    w_tile = round_to(w_tile, x.dtype.element_ty)  # the value that forward multiplies
    if PRECISION == "bf16x3":  # the product that forward computes, to the last digits
        x_high, x_low = split(x_tile)
        w_high, w_low = split(w_tile)
        x_tile = x_high.to(tl.float32) + x_low.to(tl.float32)
        w_tile = w_high.to(tl.float32) + w_low.to(tl.float32)
        logit = tl.sum(x_tile * w_tile - x_low.to(tl.float32) * w_low.to(tl.float32), 1)
    else:
        logit = tl.sum(x_tile.to(tl.float32) * w_tile.to(tl.float32), 1)
    if WITH_MEAN:
        col = tl.arange(0, BLOCK_D)
        mean = join_means(
            shift_in, mean_in, shift, place, step, ranges, live, 0, d, BLOCK_R, BLOCK_D
        )  # fmt: skip
        offset = mean / rounded[:, None] - w_tile.to(tl.float32)
        offset = tl.where(live[:, None], offset, 0.0)
        keep = (at < n)[:, None] & (col < d)[None, :]
        tl.store(offset_out + row[:, None] * d + col[None, :], offset, mask=keep)
    if bias is not None:
        logit += tl.load(bias + y * stride_b, mask=live, other=0.0).to(tl.float32)

    lse, rest = split_lse(shift, tl.log(total), logit)
    tl.store(lse_out + row, tl.where(live, lse, 0.0), mask=at < n)
    tl.store(lse_out + n + row, tl.where(live, rest, 0.0), mask=at < n)
    tl.store(logit_out + row, tl.where(live, logit, 0.0), mask=at < n)


@triton.jit(do_not_specialize=["v", "ranges"])
def _bwd_kernel(
    x, w, bias, target, lse, grad_lse, grad_logit, offsets, count, scale, grad_w, grad_bias,
    v, d, ranges, stride_wv, stride_wd, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW and db of BLOCK_V items from a range of rows: [ranges, V, D] and [ranges, V]. x and the
    [N] vectors are contiguous, in the order of `linear_cross_entropy_plan`."""
    tiles = tl.cdiv(v, BLOCK_V)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    part = (tl.program_id(0) // tiles).to(tl.int64)
    item = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    real = item < v
    w_tile = load_rows(w, item, real, stride_wv, stride_wd, 0, d, BLOCK_D)
    w_tile = round_to(w_tile, x.dtype.element_ty)
    if bias is not None:
        b = tl.load(bias + item * stride_b, mask=real, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    acc_bias = tl.zeros([BLOCK_V], tl.float32)

    # Rows are sorted by target: those of this tile are neighbours.
    hit = tl.load(offsets + tile).to(tl.int32)
    end = tl.load(offsets + tile + 1).to(tl.int32)
    rows = tl.load(count).to(tl.int32)
    per_range = tl.cdiv(tl.cdiv(rows, BLOCK_N), ranges) * BLOCK_N
    begin = (part * per_range).to(tl.int32)
    for first in range(begin, tl.minimum(begin + per_range, rows), BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        live = at < rows
        x_tile = load_rows(x, at, live, d, 1, 0, d, BLOCK_D)
        s = dot_t(w_tile, x_tile, None, PRECISION)
        shift = tl.load(lse + at, mask=live, other=float("inf")) - HEADROOM
        if bias is not None:
            s += b[:, None]
        p = exp_shifted(s, shift[None, :], PRECISION)
        p *= tl.load(grad_lse + at, mask=live, other=0.0)[None, :]
        if (first < end) & (first + BLOCK_N > hit):
            # Before p is rounded: at p_y near 1 the sum is smaller than the rounding of p_y.
            y = tl.load(target + at, mask=live, other=-1)
            grad = tl.load(grad_logit + at, mask=live, other=0.0)
            p += tl.where(item[:, None] == y[None, :], grad[None, :], 0.0)
        if bias is not None:
            acc_bias += tl.sum(p, 1)
        acc = dot(round_to(p, x.dtype.element_ty), x_tile, acc, PRECISION)

    unit = tl.load(scale)
    col = tl.arange(0, BLOCK_D)
    keep = real[:, None] & (col < d)[None, :]
    tl.store(
        grad_w + (part * v + item)[:, None] * d + col[None, :],
        round_to(acc * unit, grad_w.dtype.element_ty),
        mask=keep,
    )
    if bias is not None:
        grad_b = round_to(acc_bias * unit, grad_bias.dtype.element_ty)
        tl.store(grad_bias + part * v + item, grad_b, mask=real)
