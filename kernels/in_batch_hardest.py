# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `in_batch_hardest`: the sweep of `in_batch_cross_entropy` with a maximum in
place of the softmax.

Legend: B queries, C candidates, D width, G id columns.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.in_batch_pairs import (
    by_column,
    leave_out_groups,
    leave_out_listed,
    lists_from,
    lists_of,
)
from fastrec.kernels.common.rows import pad_columns
from fastrec.kernels.common.tiles import (
    FUSED,
    allow_tf32,
    dot_t,
    load_rows,
    product_in_chunks,
    ranges_of,
)
from fastrec.kernels.in_batch_cross_entropy import options_of


@triton.jit(do_not_specialize=["n", "v", "per_range"])
def _fwd_kernel(
    x, c, bias, row_group, item_group, listed, offsets, best_out, index_out, n, v, d, per_range,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maximum and its position of BLOCK_B queries over a range of candidates: [ranges, B]."""
    blocks = tl.cdiv(n, BLOCK_B)
    slot = tl.program_id(0)
    row = ((slot % blocks) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    live = row < n
    begin = (slot // blocks) * per_range * BLOCK_C
    if listed is not None:
        place, end, value, nearest = lists_from(listed, offsets, row, live, begin)
    if CHUNKS == 1:
        x_tile = load_rows(x, row, live, d, 1, 0, d, BLOCK_D)
    best = tl.full([BLOCK_B], float("-inf"), tl.float32)
    index = tl.full([BLOCK_B], -1, tl.int32)
    for first in range(begin, tl.minimum(begin + per_range * BLOCK_C, v), BLOCK_C):
        item = first + tl.arange(0, BLOCK_C)
        real = item < v
        if CHUNKS == 1:
            c_tile = load_rows(c, item, real, d, 1, 0, d, BLOCK_D)
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
                s, item, listed, place, end, value, nearest, first + BLOCK_C
            )  # fmt: skip
        # On a GPU a NaN takes the place of the largest so far, and the next number its.
        s = tl.where(s == s, s, float("-inf"))
        peak, at = tl.max(s, 1, return_indices=True)  # the lowest of equals
        greater = peak > best
        best = tl.where(greater, peak, best)
        index = tl.where(greater, first + at, index)
    out = (slot // blocks).to(tl.int64) * n + row
    tl.store(best_out + out, best, mask=live)
    tl.store(index_out + out, index, mask=live)


def in_batch_hardest_fwd(
    query, candidate, bias, query_group, candidate_group, exclude_values, exclude_offsets
):
    query, candidate = pad_columns(query, candidate)
    config = options_of(query, "ieee")["fwd"]
    allow_tf32(config)
    del config["HEADROOM"], config["RUNNING"]
    query, candidate = query.contiguous(), candidate.contiguous()
    (n, d), v = query.shape, candidate.shape[0]
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=query.device)
    blocks = triton.cdiv(n, config["BLOCK_B"])
    ranges, per_range = ranges_of(query.device, blocks, triton.cdiv(v, config["BLOCK_C"]))
    best = torch.empty(ranges, n, dtype=torch.float32, device=query.device)
    index = torch.empty(ranges, n, dtype=torch.int32, device=query.device)
    with torch.cuda.device_of(query):
        _fwd_kernel[(ranges * blocks,)](
            query, candidate, None if bias is None else bias.contiguous(), by_column(query_group),
            by_column(candidate_group), *lists_of(exclude_values, exclude_offsets), best, index,
            n, v, d, per_range,
            COLUMNS=0 if query_group is None else query_group.shape[1], **config, **FUSED,
        )  # fmt: skip
    chosen = best.max(0).indices  # the first of equal maxima: the range of lower indices
    return index.gather(0, chosen[None])[0].long()


def in_batch_hardest_bwd(grad, index, candidates):
    # index_put sorts on a GPU and adds in a fixed order, unlike index_add; -1 goes to a spare row.
    out = grad.new_zeros(candidates + 1, grad.shape[1])
    where = torch.where(index < 0, candidates, index)
    return out.index_put_((where,), grad, accumulate=True)[:candidates]
