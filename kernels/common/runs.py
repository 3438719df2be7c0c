# SPDX-License-Identifier: Apache-2.0
"""Sums of vectors by index, for gradients of tables: terms come sorted, equal indices are runs.

Legend: T terms, D width. A program owns BLOCK_T terms and adds those of one index with a product by
a 0/1 matrix; rows of the result that no other program has are written at once, the first and the
last one may go on next door and are joined by `carry_kernel`. No atomics, and the order of the
additions depends on the indices only. What is not finite stays in its row.
"""

import triton
import triton.language as tl

from fastrec.kernels.common.tiles import round_to

BLOCK_T = 32  # terms of a program: as many products per term and column


@triton.jit
def add_runs(x, index, out, head, tail, program, col, t, d, BLOCK_T: tl.constexpr):
    """Adds x [BLOCK_T, len(col)], the terms of a program (0 beyond t); `index` [T] is sorted. head
    and tail [programs, D]: sums of the first row where it began before, and of the last one where
    it begins here and goes on."""
    lane = tl.arange(0, BLOCK_T)
    at = program * BLOCK_T + lane
    live, real = at < t, col < d
    row = tl.load(index + at, mask=live, other=-1)
    before = tl.load(index + at - 1, mask=live & (at > 0), other=-1)
    starts = live & ((lane == 0) | (row != before))
    run = tl.cumsum(starts.to(tl.int32), 0) - 1  # rank of the row among those of this program
    runs = tl.max(run, 0) + 1
    member = (run[None, :] == lane[:, None]) & live[None, :]  # [run, term]
    finite = tl.max(((x != x) | (tl.abs(x) == float("inf"))).to(tl.int32)) == 0
    if finite:
        sums = tl.dot(member.to(tl.float32), x, input_precision="ieee")
    else:  # 0 times the rest is NaN: it stays in its own row
        sums = tl.zeros(x.shape, tl.float32)
        for i in range(runs):
            total = tl.sum(tl.where((run == i)[:, None], x, 0.0), 0)
            sums = tl.where((lane == i)[:, None], total[None, :], sums)

    target = tl.sum(tl.where(member & starts[None, :], row[None, :], 0), 1)
    after = program * BLOCK_T + BLOCK_T
    following = tl.load(index + after, mask=after < t, other=-1)
    is_head = (lane == 0) & live & (row == before)
    is_tail = (lane == runs - 1) & (target == following) & (is_head == 0)
    whole = (lane < runs) & (is_head == 0) & (is_tail == 0)
    place = target[:, None] * d + col[None, :]
    tl.store(out + place, round_to(sums, out.dtype.element_ty), mask=whole[:, None] & real[None, :])
    edge = program * d + col[None, :] + lane[:, None] * 0
    tl.store(head + edge, sums, mask=is_head[:, None] & real[None, :])
    tl.store(tail + edge, sums, mask=is_tail[:, None] & real[None, :])


@triton.jit(do_not_specialize=["t", "spare"])
def carry_kernel(
    index, out, head, tail, t, d, spare,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The row that begins as the last one of this program of `add_runs` and ends in another; that
    of index `spare` is not needed."""
    program = tl.program_id(0).to(tl.int64)
    first = program * BLOCK_T
    after = first + BLOCK_T
    if after >= t:
        return
    row = tl.load(index + after - 1)
    if tl.load(index + after) != row or row == spare:
        return
    if first > 0 and tl.load(index + first - 1, mask=first > 0, other=-1) == row:
        return  # it began before; all events of this program have it
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = col < d
    total = tl.load(tail + program * d + col, mask=real, other=0.0)
    at = program + 1
    found = BLOCK_K
    while found == BLOCK_K:
        k = at + tl.arange(0, BLOCK_K)
        inside = k * BLOCK_T < t
        same = inside & (tl.load(index + k * BLOCK_T, mask=inside, other=-1) == row)
        parts = head + k[:, None] * d + col[None, :]
        total += tl.sum(tl.load(parts, mask=same[:, None] & real[None, :], other=0.0), 0)
        found = tl.sum(same.to(tl.int32), 0)
        at += BLOCK_K
    tl.store(out + row * d + col, round_to(total, out.dtype.element_ty), mask=real)
