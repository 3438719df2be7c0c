# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `in_batch_cross_entropy`: the B x C logits exist one tile at a time.

Legend: B queries, C candidates, D width, G id columns.

Forward: a program owns BLOCK_B queries and a range of candidates, and keeps sum_j p_ij and
sum_j p_ij c_j without the positive, relative to a shift of the row; `_combine_kernel` adds the
ranges in a fixed order and puts the positive in. Backward: a program owns BLOCK_C candidates and a
range of queries; the ranges are added by torch. No atomics and no locks: equal inputs give equal
bits. The tiles are those of `linear_cross_entropy`, with the exclusions applied to the scores:

    ids      one comparison per logit and column
    lists    every row keeps its next entry; tiles without an entry cost one comparison
    positive in the few tiles that hold one
"""

import triton
import triton.language as tl

from fastrec.kernels.common.in_batch_pairs import (
    leave_out_groups,
    leave_out_listed,
    lists_from,
)
from fastrec.kernels.common.tiles import (
    dot,
    dot_t,
    exp_shifted,
    join_means,
    join_sums,
    load_rows,
    log1p,
    outgrown,
    product_in_chunks,
    round_to,
    softmax_step,
    split_lse,
    store_sums,
)


@triton.jit
def _sweep(
    x, c, bias, row_group, item_group, listed, offsets, row, live, y, begin, end, own, n, v, d,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr, RUNNING: tl.constexpr, STAGES: tl.constexpr, WITH_MEAN: tl.constexpr,
    HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(shift, total, rounded, mean) of the queries `row` over the candidates [begin, end)."""
    lowest = tl.min(tl.where(y < 0, v, y), 0)  # of the positives, which the tiles between hold
    highest = tl.max(y, 0)
    if listed is not None:
        place, stop, value, nearest = lists_from(listed, offsets, row, live, begin)
    if CHUNKS == 1:
        x_tile = load_rows(x, row, live, d, 1, 0, d, BLOCK_D)
    shift = tl.full([BLOCK_B], -1e30, tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    rounded = tl.zeros([BLOCK_B, 8], tl.float32)
    mean = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for first in tl.range(begin, end, BLOCK_C, num_stages=STAGES):
        item = first + tl.arange(0, BLOCK_C)
        real = item < v
        c_tile = load_rows(c, item, real, d, 1, own, d, BLOCK_D)
        if CHUNKS == 1:
            s = dot_t(x_tile, c_tile, None, PRECISION)
        else:
            s = product_in_chunks(
                x, row, live, d, 1, c, item, real, d, 1, d,
                x.dtype.element_ty, False, BLOCK_D, CHUNKS, PRECISION,
            )  # fmt: skip
        if bias is not None:
            s += tl.load(bias + item, mask=real, other=float("-inf"))[None, :]
        elif first + BLOCK_C > v:
            s = tl.where(real[None, :], s, float("-inf"))
        s = leave_out_groups(s, row, item, live, real, row_group, item_group, n, v, COLUMNS)
        if listed is not None:
            s, place, value, nearest = leave_out_listed(
                s, item, listed, place, stop, value, nearest, first + BLOCK_C
            )  # fmt: skip
        if (first <= highest) & (first + BLOCK_C > lowest):
            s = tl.where(y[:, None] == item[None, :], float("-inf"), s)
        shift, total, rounded, mean = softmax_step(
            s, c_tile, first == begin, shift, total, rounded, mean,
            RUNNING, WITH_MEAN, HEADROOM, PRECISION,
        )  # fmt: skip
    return shift, total, rounded, mean


@triton.jit(do_not_specialize=["n", "v", "per_range"])
def _fwd_kernel(
    x, c, bias, positive, row_group, item_group, listed, offsets, shift_out, sum_out, mean_out,
    n, v, d, per_range,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr, RUNNING: tl.constexpr, WITH_MEAN: tl.constexpr, HEADROOM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read the same candidates.
    blocks = tl.cdiv(n, BLOCK_B)
    slot = tl.program_id(0)
    own = tl.program_id(1) * BLOCK_D  # columns of c whose mean this program accumulates
    row = ((slot % blocks) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    live = row < n
    begin = (slot // blocks) * per_range * BLOCK_C
    end = tl.minimum(begin + per_range * BLOCK_C, v)
    y = tl.load(positive + row, mask=live, other=-1)
    shift, total, rounded, mean = _sweep(
        x, c, bias, row_group, item_group, listed, offsets, row, live, y, begin, end, own, n, v, d,
        BLOCK_B, BLOCK_C, BLOCK_D, CHUNKS, COLUMNS, RUNNING, None, WITH_MEAN, HEADROOM, PRECISION,
    )  # fmt: skip
    if not RUNNING:  # noqa: SIM102, what is known to the compiler alone
        if outgrown(total):  # small tiles: it happens seldom, and must not cost registers
            shift, total, rounded, mean = _sweep(
                x, c, bias, row_group, item_group, listed, offsets, row, live, y, begin, end, own,
                n, v, d, BLOCK_B, 16, BLOCK_D, CHUNKS, COLUMNS, True, 1, WITH_MEAN, HEADROOM,
                PRECISION,
            )  # fmt: skip
    at = slot.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    store_sums(
        shift_out, sum_out, mean_out, at, own, shift, total, rounded, mean, d,
        WITH_MEAN, x.dtype.element_ty, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "ranges"])
def _combine_kernel(
    x, c, bias, positive, shift_in, sum_in, mean_in, loss_out, lse_out, direction_out, n, d, ranges,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    WITH_MEAN: tl.constexpr,
):  # fmt: skip
    """loss, lse and direction of BLOCK_R queries; 0 for those without a positive."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    y = tl.load(positive + row, mask=row < n, other=-1)
    live = y >= 0
    y = tl.where(live, y, 0)
    step = tl.cdiv(n, BLOCK_B).to(tl.int64) * BLOCK_B  # places of one range

    shift, total, rounded = join_sums(shift_in, sum_in, row, step, ranges, live, BLOCK_R)

    logit = tl.zeros([BLOCK_R], tl.float32)
    for k in range(CHUNKS):
        x_tile = load_rows(x, row, live, d, 1, k * BLOCK_D, d, BLOCK_D).to(tl.float32)
        logit += tl.sum(x_tile * load_rows(c, y, live, d, 1, k * BLOCK_D, d, BLOCK_D), 1)
    if bias is not None:
        logit += tl.load(bias + y, mask=live, other=0.0)

    # others = log(sum of the others / exp(logit)), -inf when all are left out.
    alone = total == 0.0
    log_sum = tl.log(tl.where(alone, 1.0, total))
    others = tl.where(alone, float("-inf"), (shift - logit) + log_sum)
    above = others > 0
    small = tl.exp(-tl.abs(others))
    extra = log1p(small)
    tl.store(
        loss_out + row, tl.where(live, tl.where(above, others, 0.0) + extra, 0.0), mask=row < n
    )
    lse, left_out = split_lse(
        tl.where(above, shift, logit), tl.where(above, log_sum, 0.0) + extra, logit
    )
    tl.store(lse_out + row, tl.where(live, lse, 0.0), mask=row < n)
    tl.store(lse_out + n + row, tl.where(live, left_out, 0.0), mask=row < n)

    if WITH_MEAN:
        rest = tl.where(above, 1.0, small) / (1.0 + small)  # 1 - p of the positive
        share = tl.where(rounded > 0, rest / tl.where(rounded > 0, rounded, 1.0), 0.0)
        for k in range(CHUNKS):
            col = k * BLOCK_D + tl.arange(0, BLOCK_D)
            mean = join_means(
                shift_in, mean_in, shift, row, step, ranges, live, k * BLOCK_D, d, BLOCK_R, BLOCK_D
            )  # fmt: skip
            c_tile = load_rows(c, y, live, d, 1, k * BLOCK_D, d, BLOCK_D).to(tl.float32)
            direction = mean * share[:, None] - c_tile * rest[:, None]
            direction = tl.where(live[:, None], direction, 0.0)
            keep = (row < n)[:, None] & (col < d)[None, :]
            tl.store(direction_out + row[:, None] * d + col[None, :], direction, mask=keep)


@triton.jit(do_not_specialize=["n", "v", "per_range"])
def _bwd_kernel(
    x, c, bias, positive, row_group, item_group, listed, offsets, lse, grad, grad_positive, scale,
    grad_c, grad_bias, n, v, d, per_range,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr, HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dc and db of BLOCK_C candidates from a range of queries: [ranges, C, D] and [ranges, C].
    `listed` holds the queries that leave a candidate out, `offsets` [C + 1]."""
    blocks = tl.cdiv(v, BLOCK_C)
    slot = tl.program_id(0)
    own = tl.program_id(1) * BLOCK_D
    lowest = (slot % blocks) * BLOCK_C
    item = (lowest + tl.arange(0, BLOCK_C)).to(tl.int64)
    real = item < v
    begin = (slot // blocks) * per_range * BLOCK_B
    if listed is not None:
        place, end, value, nearest = lists_from(listed, offsets, item, real, begin)
    if CHUNKS == 1:
        c_tile = load_rows(c, item, real, d, 1, 0, d, BLOCK_D)
    if bias is not None:
        b = tl.load(bias + item, mask=real, other=0.0)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    acc_bias = tl.zeros([BLOCK_C], tl.float32)

    for first in range(begin, tl.minimum(begin + per_range * BLOCK_B, n), BLOCK_B):
        row = first + tl.arange(0, BLOCK_B)
        live = row < n
        x_tile = load_rows(x, row, live, d, 1, own, d, BLOCK_D)
        if CHUNKS == 1:
            s = dot_t(c_tile, x_tile, None, PRECISION)
        else:
            s = product_in_chunks(
                x, row, live, d, 1, c, item, real, d, 1, d,
                x.dtype.element_ty, True, BLOCK_D, CHUNKS, PRECISION,
            )  # fmt: skip
        if bias is not None:
            s += b[:, None]
        s = leave_out_groups(s, item, row, real, live, item_group, row_group, v, n, COLUMNS)
        if listed is not None:
            s, place, value, nearest = leave_out_listed(
                s, row, listed, place, end, value, nearest, first + BLOCK_B
            )  # fmt: skip
        shift = tl.load(lse + row, mask=live, other=float("inf")) - HEADROOM
        p = exp_shifted(s, shift[None, :], PRECISION)
        p *= tl.load(grad + row, mask=live, other=0.0)[None, :]
        y = tl.load(positive + row, mask=live, other=-1)
        inside = (y >= lowest) & (y < lowest + BLOCK_C)
        if tl.max(inside.to(tl.int32), 0) > 0:
            g = tl.load(grad_positive + row, mask=live, other=0.0)
            p = tl.where(item[:, None] == y[None, :], g[None, :], p)
        if bias is not None:
            acc_bias += tl.sum(p, 1)
        acc = dot(round_to(p, x.dtype.element_ty), x_tile, acc, PRECISION)

    unit = tl.load(scale)
    at = (slot // blocks).to(tl.int64) * v + item
    col = own + tl.arange(0, BLOCK_D)
    keep = real[:, None] & (col < d)[None, :]
    tl.store(grad_c + at[:, None] * d + col[None, :], acc * unit, mask=keep)
    if bias is not None and own == 0:
        tl.store(grad_bias + at, acc_bias * unit, mask=real)
