"""Dropout of whole rows in Triton, by the contract of `fastrec.random`.

Legend: R rows, G groups of 16 consecutive columns.
"""

import triton
import triton.language as tl

from fastrec.kernels.common.philox import draws, philox_key


@triton.jit
def row_mask(
    sample_ids, positions, key, row, live, first_group, drop, layer, view, per_view,
    SITE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """bool [R, 16 * GROUPS]: what is kept of the rows `row` [R], columns from 16 * first_group.

    `per_view`: rows of one view; the first ones have the number `view`."""
    seed, step = tl.load(key), tl.load(key + 1)
    position = tl.load(positions + row, mask=live, other=0)
    sample_id = tl.load(sample_ids + row, mask=live, other=0)
    of_row = (row // per_view + view).to(tl.uint32)
    draw = draws(
        philox_key(seed, SITE), position, first_group, of_row, layer, 0, sample_id, step, GROUPS
    )
    return draw.to(tl.int32) >= drop
