# SPDX-License-Identifier: Apache-2.0
"""Dropout of whole rows in Triton, by the contract of `fastrec.random`.

Legend: R rows, G groups of 16 consecutive columns.
"""

import triton
import triton.language as tl

from fastrec.kernels.common.philox import draws, philox_key


@triton.jit
def row_mask(
    keys, positions, rng, row, live, first_group, drop, layer,
    SITE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """bool [R, 16 * GROUPS]: what is kept of the rows `row` [R], columns from 16 * first_group."""
    seed, step = philox_key(tl.load(rng), SITE), tl.load(rng + 1)
    position = tl.load(positions + row, mask=live, other=0)
    key = tl.load(keys + row, mask=live, other=0)
    draw = draws(seed, position, first_group, key, layer, 0, step, GROUPS)
    return draw.to(tl.int32) >= drop
