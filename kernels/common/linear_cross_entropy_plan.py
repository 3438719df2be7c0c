# SPDX-License-Identifier: Apache-2.0
"""The order in which `linear_cross_entropy` visits its rows: scored ones first, sorted by target.

Legend: N rows, V items, D width.

A row comes after those with a lower target, or an equal one and a lower number: its place is the
count of these. For some thousand rows N^2 comparisons take less time than the launches of a sort,
and the program that counted a row puts what backward reads of it where it belongs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrec.kernels.common.tiles import FUSED, load_rows

MOST_ROWS, MOST_TILES = 8192, 8192  # beyond them torch sorts
MOST_ITEMS = 2**31 - 1  # targets are compared as int32
BLOCK_R, BLOCK_J, WARPS = 32, 64, 4  # rows of a program, and how many they are compared with


@triton.jit
def _places(target, key, number, n, v, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr):
    """How many rows come before (key, number); rows that are not scored have the key v."""
    place = tl.zeros([BLOCK_R], tl.int32)
    for first in range(0, n, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        other = tl.load(target + j, mask=j < n, other=0).to(tl.int32)
        other = tl.where(other < 0, v, other)
        before = (other[None, :] < key[:, None]) | (
            (other[None, :] == key[:, None]) & (j[None, :] < number[:, None])
        )
        place += tl.sum((before & (j < n)[None, :]).to(tl.int32), 1)
    return place.to(tl.int64)


@triton.jit(do_not_specialize=["n", "v", "tiles"])
def _plan_kernel(
    target, x, vectors, order, by_item, count, offsets, x_out, vectors_out,
    n, v, tiles, d, stride_xn, stride_xd,
    ITEMS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """order [N] and count; with x instead of the order the sorted targets, the first row of every
    tile of ITEMS items [tiles + 1], and x [N, D] and vectors [3, N] in that order."""
    blocks = tl.cdiv(n, BLOCK_R)
    lane = tl.arange(0, BLOCK_R)
    if tl.program_id(0) < blocks:
        row = tl.program_id(0) * BLOCK_R + lane
        live = row < n
        key = tl.load(target + row, mask=live, other=0).to(tl.int32)
        key = tl.where(key < 0, v, key)
        place = _places(target, key, row, n, v, BLOCK_R, BLOCK_J)
        if x is None:
            tl.store(order + place, row.to(tl.int64), mask=live)
        else:
            tl.store(by_item + place, key.to(tl.int64), mask=live)
            for i in tl.static_range(3):
                number = tl.load(vectors + i * n + row, mask=live, other=0.0)
                tl.store(vectors_out + i * n + place, number, mask=live)
            for first in range(0, d, BLOCK_D):
                rows = load_rows(x, row, live, stride_xn, stride_xd, first, d, BLOCK_D)
                col = first + tl.arange(0, BLOCK_D)
                keep = live[:, None] & (col < d)[None, :]
                tl.store(x_out + place[:, None] * d + col[None, :], rows, mask=keep)
    else:  # the number of scored rows, and the first rows of the tiles
        tile = (tl.program_id(0) - blocks) * BLOCK_R + lane
        key = lane * 0 + v
        if x is not None:
            key = tl.minimum(tile.to(tl.int64) * ITEMS, v).to(tl.int32)
        place = _places(target, key, lane * 0, n, v, BLOCK_R, BLOCK_J)
        if x is None:
            tl.store(count + lane * 0, place, mask=lane == 0)
        else:
            tl.store(offsets + tile, place, mask=tile <= tiles)
            tl.store(count + lane * 0, place, mask=tile == tiles)


def _sorted(target, items):
    by_item, order = torch.where(target < 0, items, target).sort(stable=True)
    return by_item, order, (target >= 0).sum()


def forward_plan(target: Tensor, items: int) -> tuple[Tensor, Tensor]:
    """(order, number of scored rows), for N > 0."""
    n = len(target)
    if n > MOST_ROWS or items > MOST_ITEMS:
        return _sorted(target, items)[1:]
    order, count = torch.empty_like(target), target.new_empty(())
    _plan_kernel[(triton.cdiv(n, BLOCK_R) + 1,)](
        target, None, None, order, None, count, None, None, None, n, items, 1, 0, 0, 0,
        ITEMS=None, BLOCK_R=BLOCK_R, BLOCK_J=BLOCK_J, BLOCK_D=16, num_warps=WARPS, **FUSED,
    )  # fmt: skip
    return order, count


def backward_plan(target: Tensor, input: Tensor, vectors: Tensor, items: int, block_v: int):
    """(targets, first rows of the tiles of block_v items, number of scored rows, input, vectors
    [3, N]), all in the order of the plan."""
    (n, d), tiles = input.shape, triton.cdiv(items, block_v)
    if n == 0 or n > MOST_ROWS or tiles > MOST_TILES or items > MOST_ITEMS:
        by_item, order, count = _sorted(target, items)
        bounds = torch.arange(tiles + 1, device=input.device) * block_v
        offsets = torch.searchsorted(by_item, bounds.clamp_max(items))
        return by_item, offsets, count, input.index_select(0, order), vectors.index_select(1, order)
    by_item, offsets = torch.empty_like(target), target.new_empty(tiles + 1)
    count, rows, moved = target.new_empty(()), input.new_empty(n, d), torch.empty_like(vectors)
    grid = (triton.cdiv(n, BLOCK_R) + triton.cdiv(tiles + 1, BLOCK_R),)
    _plan_kernel[grid](
        target, input, vectors, None, by_item, count, offsets, rows, moved, n, items, tiles, d,
        *input.stride(), ITEMS=block_v, BLOCK_R=BLOCK_R, BLOCK_J=BLOCK_J,
        BLOCK_D=min(max(triton.next_power_of_2(d), 16), 64), num_warps=WARPS, **FUSED,
    )  # fmt: skip
    return by_item, offsets, count, rows, moved
