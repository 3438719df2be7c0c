# SPDX-License-Identifier: Apache-2.0
"""The random number contract of `fastrec.random` (version 2) in Triton.

Legend: R rows, G groups of 16 consecutive columns. One call of Philox4x32-7 serves one row and one
group with 16 draws of 8 bits.
"""

import triton
import triton.language as tl


@triton.jit
def philox_key(seed, site: tl.constexpr):
    """k0 and k1 as one int64, from the int64 seed."""
    return seed ^ ((site << 24) | (8 << 16))


@triton.jit
def draws(seed, row, first_group, key, layer, head, step, GROUPS: tl.constexpr):
    """uint8 draws [R, 16 * GROUPS] of the rows `row` [R], columns from 16 * first_group.

    `seed` is from `philox_key`. `key` and `step` are int64; `key` is a scalar or [R].
    """
    row = row.to(tl.uint32)
    none = row * 0
    zero = tl.zeros([1, GROUPS], tl.uint32)
    group = (first_group + tl.arange(0, GROUPS)).to(tl.uint32)
    c0 = (row << 16)[:, None] | group[None, :]
    view = (key >> 32).to(tl.uint32)
    c1 = ((none + (view << 16)) | (layer << 8) | head)[:, None] + zero
    c2 = (none + key.to(tl.uint32))[:, None] + zero
    c3 = (none + step.to(tl.uint32))[:, None] + zero
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, c3, n_rounds=7)
    # Joining adds an innermost dimension: the words of a call, then the bytes of a word, in order.
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    words = tl.reshape(words, [row.shape[0], 4 * GROUPS])
    parts = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    return tl.reshape(parts, [row.shape[0], 16 * GROUPS]).to(tl.uint8)
