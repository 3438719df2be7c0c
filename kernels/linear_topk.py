# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `linear_topk`: the N x V scores exist one tile at a time.

Legend: N rows, V items, D width, k results a row.

1. `_maxima_kernel` writes the largest score of every tile of BLOCK_V items.
2. The k best items of a row lie in the k tiles with the largest maxima, equal ones by position: for
   an item of another tile there are k tiles ahead, each with an item ahead of it.
3. `_select_kernel` computes the scores of these tiles again, by products of the same shapes: the
   same bits, so step 2 holds after rounding too.

Scores travel as integer keys that are all different: order of the scores first, then the lower
index. `torch.topk` of keys has no ties to break.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.in_batch_pairs import leave_out_listed, lists_from, lists_of
from fastrec.kernels.common.linear_scores import load_x, options_of, score_tile, strides_of
from fastrec.kernels.common.tiles import ranges_of

LOW = tl.constexpr(2**32 - 1)
BUDGET = 2**28  # bytes of keys: rows are taken in chunks that need no more


@triton.jit
def _key(score, index):
    """int64: larger for a larger score, and for a lower index (below 2^32) of equal scores."""
    score = tl.where(score == 0.0, 0.0, score)  # -0 and 0 are equal
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats order by falling magnitude
    return (ordered.to(tl.int64) << 32) | (LOW - index.to(tl.int64))


def _values_and_indices(keys):
    ordered = (keys >> 32).to(torch.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values, (LOW.value - (keys & LOW.value)).masked_fill_(values == -torch.inf, -1)


@triton.jit(do_not_specialize=["n", "v", "per_range"])
def _maxima_kernel(
    x, w, bias, listed, offsets, keys, n, v, d, per_range,
    stride_xn, stride_xd, stride_wv, stride_wd, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[N, tiles]: keys of the largest score of each tile, with the tile as the index."""
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
        best = tl.max(s, 1)  # of numbers; NaN, worth -inf, where there is none
        best = tl.where(best == best, best, float("-inf"))
        tl.store(keys + row * tiles + tile, _key(best, row * 0 + tile), mask=live)


@triton.jit(do_not_specialize=["v", "slots"])
def _select_kernel(
    x, w, bias, listed, offsets, chosen, keys, v, d, slots,
    stride_xn, stride_xd, stride_wv, stride_wd, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[N, slots, BLOCK_V]: keys of all items of tile chosen[row, slot]. One row a program; the
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
    tl.store(keys + at * BLOCK_V + tl.arange(0, BLOCK_V), _key(mine, item))


def _chunk(input, linear_weight, linear_bias, k, listed, offsets, config):
    """Keys [N, k] of the best items, best first."""
    (n, d), v = input.shape, linear_weight.shape[0]
    blocks, tiles = triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(v, config["BLOCK_V"])
    ranges, per_range = ranges_of(input.device, blocks, tiles)
    tensors = (input, linear_weight, linear_bias, listed, offsets)
    strides = strides_of(input, linear_weight, linear_bias)
    maxima = torch.empty(n, tiles, dtype=torch.int64, device=input.device)
    _maxima_kernel[(ranges * blocks,)](*tensors, maxima, n, v, d, per_range, *strides, **config)
    slots = min(k, tiles)
    chosen = LOW.value - (maxima.topk(slots).values & LOW.value)
    keys = torch.empty(n, slots * config["BLOCK_V"], dtype=torch.int64, device=input.device)
    _select_kernel[(n * slots,)](*tensors, chosen, keys, v, d, slots, *strides, **config)
    return keys.topk(k).values


def linear_topk_fwd(input, linear_weight, linear_bias, k, exclude_values, exclude_offsets):
    config = options_of("linear_topk", input, linear_weight)
    n, v = input.shape[0], linear_weight.shape[0]
    keys = torch.empty(n, k, dtype=torch.int64, device=input.device)
    listed, offsets = lists_of(exclude_values, exclude_offsets)
    tiles = triton.cdiv(v, config["BLOCK_V"])
    step = max(1, BUDGET // (8 * (tiles + min(k, tiles) * config["BLOCK_V"])))
    with torch.cuda.device_of(input):
        for first in range(0, n, step):
            rows = slice(first, min(first + step, n))
            bounds = None if offsets is None else offsets[first : rows.stop + 1]
            keys[rows] = _chunk(
                input[rows], linear_weight, linear_bias, k, listed, bounds, config
            )  # fmt: skip
    return _values_and_indices(keys)
