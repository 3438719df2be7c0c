# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `linear_topk`: the N x V scores exist one tile at a time.

Legend: N rows, V items, D width, k results a row.

1. `_maxima_kernel` writes the largest score of every tile of BLOCK_V items.
2. The k best items of a row lie in the k tiles with the largest maxima, equal ones by position: for
   an item of another tile there are k tiles ahead, each with an item ahead of it.
3. `_select_kernel` computes the scores of these tiles again, by products of the same shapes: the
   same bits, so step 2 holds after rounding too.

`torch.topk` does not say which of equal scores it takes, but the k-th largest of them is one
number: `_take_kernel` takes what is above it, and of what equals it the first. It keeps the order
of the ids, so that a stable sort of k scores ends it.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.in_batch_pairs import leave_out_listed, lists_from, lists_of
from fastrec.kernels.common.linear_scores import load_x, options_of, score_tile
from fastrec.kernels.common.rows import pad_columns, strides_of
from fastrec.kernels.common.tiles import FUSED, ranges_of

BUDGET = 2**28  # bytes of scores: rows are taken in chunks that need no more
BLOCK_TAKE = 512  # of one warp, in which nothing waits for another one


@triton.jit
def _worth(score):
    """The score as it is compared: -inf for NaN; 0 for -0, which radix selection puts below it."""
    score = tl.where(score == score, score, float("-inf"))
    return tl.where(score == 0.0, 0.0, score)


@triton.jit(do_not_specialize=["n", "v", "per_range"])
def _maxima_kernel(
    x, w, bias, listed, offsets, maxima, n, v, d, per_range,
    stride_xn, stride_xd, stride_wv, stride_wd, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[N, tiles]: the largest score of each tile."""
    # Neighbouring programs read the same items.
    blocks = tl.cdiv(n, BLOCK_N)
    slot = tl.program_id(0)
    row = ((slot % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    live = row < n
    column = tl.arange(0, BLOCK_V)
    tiles = tl.cdiv(v, BLOCK_V)
    x_tile = load_x(x, row, live, d, stride_xn, stride_xd, w.dtype.element_ty, BLOCK_D)
    begin = (slot // blocks) * per_range * BLOCK_V
    if listed is not None:
        place, end, value, nearest = lists_from(listed, offsets, row, live, begin)
    for first in range(begin, tl.minimum(begin + per_range * BLOCK_V, v), BLOCK_V):
        item = first + column
        real = item < v
        s = score_tile(
            x_tile, x, w, bias, row, live, item, real, d, stride_xn, stride_xd, stride_wv,
            stride_wd, stride_b, BLOCK_D, CHUNKS, PRECISION,
        )  # fmt: skip
        if first + BLOCK_V > v:
            s = tl.where(real[None, :], s, float("-inf"))
        if listed is not None:
            s, place, value, nearest = leave_out_listed(
                s, item, listed, place, end, value, nearest, first + BLOCK_V
            )  # fmt: skip
        tile = first // BLOCK_V
        best = _worth(tl.max(s, 1))  # of numbers; NaN where there is none
        tl.store(maxima + row * tiles + tile, best, mask=live)


@triton.jit(do_not_specialize=["v", "slots"])
def _select_kernel(
    x, w, bias, listed, offsets, chosen, scores, v, d, slots,
    stride_xn, stride_xd, stride_wv, stride_wd, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[N, slots, BLOCK_V]: scores of all items of tile chosen[row, slot]. One row a program; the
    other lanes only give the product the shape that it has in `_maxima_kernel`."""
    at = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_N)
    live = lane == 0
    row = at // slots + 0 * lane
    first = tl.load(chosen + at) * BLOCK_V
    item = first + tl.arange(0, BLOCK_V)
    real = item < v
    x_tile = load_x(x, row, live, d, stride_xn, stride_xd, w.dtype.element_ty, BLOCK_D)
    s = score_tile(
        x_tile, x, w, bias, row, live, item, real, d, stride_xn, stride_xd, stride_wv, stride_wd,
        stride_b, BLOCK_D, CHUNKS, PRECISION,
    )  # fmt: skip
    s = tl.where((s == s) & real[None, :], s, float("-inf"))  # NaN is worth -inf
    if listed is not None:
        place, end, value, nearest = lists_from(listed, offsets, row, live, first)
        s, place, value, nearest = leave_out_listed(
            s, item, listed, place, end, value, nearest, first + BLOCK_V
        )  # fmt: skip
    mine = tl.max(tl.where(live[:, None], s, float("-inf")), 0)
    tl.store(scores + at * BLOCK_V + tl.arange(0, BLOCK_V), _worth(mine))


@triton.jit(do_not_specialize=["count", "k"])
def _take_kernel(
    scores, best, chosen, value_out, place_out, count, k,
    BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """place_out [N, k]: where the k largest of scores [N, count] are, in ascending order; of equal
    ones the first. best [N, k]: their values in falling order.

    With `chosen` [N, count / BLOCK_V], whose tiles `scores` holds: the items, -1 for -inf, and
    their scores in value_out."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    least = tl.load(best + row * k + k - 1)
    spare = k  # of those that equal the least
    for first in range(0, k, BLOCK):
        value = tl.load(best + row * k + first + lane, mask=first + lane < k, other=float("-inf"))
        spare -= tl.sum((value > least).to(tl.int32), 0)
    taken = 0
    for first in range(0, count, BLOCK):
        at = first + lane
        value = tl.load(scores + row * count + at, mask=at < count, other=float("nan"))
        if tl.max((value >= least).to(tl.int32), 0) > 0:
            equal = (value == least).to(tl.int32)
            take = (value > least) | ((equal > 0) & (tl.cumsum(equal, 0) <= spare))
            out = row * k + taken + tl.cumsum(take.to(tl.int32), 0) - 1
            if chosen is None:
                tl.store(place_out + out, at.to(tl.int64), mask=take)
            else:
                slot = row * (count // BLOCK_V) + at // BLOCK_V
                tile = tl.load(chosen + slot, mask=take, other=0)
                item = tl.where(value == float("-inf"), -1, tile * BLOCK_V + at % BLOCK_V)
                tl.store(place_out + out, item, mask=take)
                tl.store(value_out + out, value, mask=take)
            taken += tl.sum(take.to(tl.int32), 0)
            spare -= tl.minimum(spare, tl.sum(equal, 0))


def _take(scores, k, chosen, value_out, place_out, block_v):
    best = scores.topk(k).values
    _take_kernel[(len(scores),)](
        scores, best, chosen, value_out, place_out, scores.shape[1], k,
        BLOCK=BLOCK_TAKE, BLOCK_V=block_v, num_warps=1, **FUSED,
    )  # fmt: skip


def _chunk(input, linear_weight, linear_bias, listed, offsets, values, indices, config):
    """The best items of the rows and their scores, in the order of the ids."""
    (n, d), v, block_v = input.shape, linear_weight.shape[0], config["BLOCK_V"]
    blocks, tiles = triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(v, block_v)
    ranges, per_range = ranges_of(input.device, blocks, tiles)
    tensors = (input, linear_weight, linear_bias, listed, offsets)
    strides = strides_of(input, linear_weight, linear_bias)
    vector = {"dtype": torch.float32, "device": input.device}
    k = values.shape[1]
    slots = min(k, tiles)
    maxima, chosen = torch.empty(n, tiles, **vector), indices.new_empty(n, slots)
    _maxima_kernel[(ranges * blocks,)](
        *tensors, maxima, n, v, d, per_range, *strides, **config, **FUSED
    )
    _take(maxima, slots, None, None, chosen, block_v)
    scores = torch.empty(n, slots * block_v, **vector)
    _select_kernel[(n * slots,)](*tensors, chosen, scores, v, d, slots, *strides, **config, **FUSED)
    _take(scores, k, chosen, values, indices, block_v)


def linear_topk_fwd(input, linear_weight, linear_bias, k, exclude_values, exclude_offsets):
    input, linear_weight = pad_columns(input, linear_weight)
    config = options_of("linear_topk", input, linear_weight)
    n, v = input.shape[0], linear_weight.shape[0]
    values = torch.empty(n, k, dtype=torch.float32, device=input.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=input.device)
    listed, offsets = lists_of(exclude_values, exclude_offsets)
    tiles = triton.cdiv(v, config["BLOCK_V"])
    step = max(1, BUDGET // (4 * (tiles + min(k, tiles) * config["BLOCK_V"])))
    with torch.cuda.device_of(input):
        for first in range(0, n, step):
            rows = slice(first, min(first + step, n))
            bounds = None if offsets is None else offsets[first : rows.stop + 1]
            _chunk(
                input[rows], linear_weight, linear_bias, listed, bounds, values[rows],
                indices[rows], config,
            )  # fmt: skip
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)
