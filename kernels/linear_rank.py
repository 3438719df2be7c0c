# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `linear_rank`: the N x V scores exist one tile at a time.

Legend: N rows, V items, D width.

A program owns BLOCK_N rows and a range of items, and counts the items of the range that are ahead
of the target of each row. The counts of the ranges are integers: their sum has no order. Rows come
sorted by target, so most tiles lie before or behind all targets of a program, and one comparison
per score decides.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.in_batch_pairs import leave_out_listed, lists_from, lists_of
from fastrec.kernels.common.linear_scores import load_x, options_of, score_tile
from fastrec.kernels.common.rows import pad_columns, strides_of
from fastrec.kernels.common.tiles import FUSED, ranges_of


@triton.jit(do_not_specialize=["n", "v", "per_range"])
def _fwd_kernel(
    x, w, bias, order, target, listed, offsets, ahead_out, n, v, d, per_range,
    stride_xn, stride_xd, stride_wv, stride_wd, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[ranges, N], at the place of the row in `input`; `target` is sorted, `order` its rows."""
    # Neighbouring programs read the same items.
    blocks = tl.cdiv(n, BLOCK_N)
    slot = tl.program_id(0)
    block = (slot % blocks) * BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    live = block + lane < n
    row = tl.load(order + block + lane, mask=live, other=0)
    y = tl.load(target + block + lane, mask=live, other=0)
    lowest = tl.min(tl.where(live, y, v), 0)
    highest = tl.max(tl.where(live, y, -1), 0)
    x_tile = load_x(x, row, live, d, stride_xn, stride_xd, w.dtype.element_ty, BLOCK_D)

    # The scores of the targets, by the arithmetic of the other tiles: lane i against target i.
    column = tl.arange(0, BLOCK_V)
    mine = (column < BLOCK_N) & (block + column < n)
    own_item = tl.load(target + block + column, mask=mine, other=0)
    s = score_tile(
        x_tile, x, w, bias, row, live, own_item, mine, d, stride_xn, stride_xd, stride_wv,
        stride_wd, stride_b, BLOCK_D, CHUNKS, PRECISION,
    )  # fmt: skip
    own = tl.sum(tl.where(lane[:, None] == column[None, :], s, 0.0), 1)

    begin = (slot // blocks) * per_range * BLOCK_V
    if listed is not None:
        place, end, value, nearest = lists_from(listed, offsets, row, live, begin)
    count = tl.zeros([BLOCK_N], tl.int32)
    for first in range(begin, tl.minimum(begin + per_range * BLOCK_V, v), BLOCK_V):
        item = first + column
        real = item < v
        s = score_tile(
            x_tile, x, w, bias, row, live, item, real, d, stride_xn, stride_xd, stride_wv,
            stride_wd, stride_b, BLOCK_D, CHUNKS, PRECISION,
        )  # fmt: skip
        # What is left out is NaN: not even a target of score -inf equals it. Of every tile that is
        # one product: in a branch of the last one, beside those below, Triton 3.6 cannot pipeline
        # the loop on sm_90. Products in chunks are not pipelined, and would spill 16 bytes.
        if CHUNKS == 1 or first + BLOCK_V > v:
            s = tl.where(real[None, :], s, float("nan"))
        if listed is not None:
            s, place, value, nearest = leave_out_listed(
                s, item, listed, place, end, value, nearest, first + BLOCK_V, float("nan")
            )  # fmt: skip
        if first + BLOCK_V <= lowest:
            count += tl.sum((s >= own[:, None]).to(tl.int32), 1)
        elif first > highest:
            count += tl.sum((s > own[:, None]).to(tl.int32), 1)
        else:
            equal = (s == own[:, None]) & (item[None, :] < y[:, None])
            greater = (s > own[:, None]) & (item[None, :] != y[:, None])
            count += tl.sum((equal | greater).to(tl.int32), 1)
    # A NaN target: behind all other items, said by the range that starts at 0.
    count = tl.where(own == own, count, tl.where(begin == 0, v - 1, 0))
    out = (slot // blocks).to(tl.int64) * n + row
    tl.store(ahead_out + out, count, mask=live)


def linear_rank_fwd(input, linear_weight, linear_bias, target, exclude_values, exclude_offsets):
    input, linear_weight = pad_columns(input, linear_weight)
    config = options_of("linear_rank", input, linear_weight)
    (n, d), v = input.shape, linear_weight.shape[0]
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=input.device)
    blocks = triton.cdiv(n, config["BLOCK_N"])
    ranges, per_range = ranges_of(input.device, blocks, triton.cdiv(v, config["BLOCK_V"]))
    by_item, order = target.sort(stable=True)
    ahead = torch.empty(ranges, n, dtype=torch.int32, device=input.device)
    with torch.cuda.device_of(input):
        _fwd_kernel[(ranges * blocks,)](
            input, linear_weight, linear_bias, order, by_item,
            *lists_of(exclude_values, exclude_offsets), ahead, n, v, d, per_range,
            *strides_of(input, linear_weight, linear_bias), **config, **FUSED,
        )  # fmt: skip
    return ahead.sum(0) + 1
