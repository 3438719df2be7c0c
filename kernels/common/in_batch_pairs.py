# SPDX-License-Identifier: Apache-2.0
"""The pairs of the in-batch kernels: exclusions on a tile of scores, and how ranges are cut.

Legend: B queries, C candidates, G id columns.

    ids      one comparison per logit and column
    lists    every row keeps its next entry; tiles without an entry cost one comparison
"""

import torch
import triton
import triton.language as tl

FAR = tl.constexpr(2**62)  # no index


@triton.jit
def leave_out_groups(
    s, row, column, row_live, column_live, row_group, column_group, rows, columns,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """-inf where an id of the row equals the id of the column; negative ids equal none."""
    for g in tl.static_range(COLUMNS):
        i = tl.load(row_group + g * rows + row, mask=row_live, other=-1)
        j = tl.load(column_group + g * columns + column, mask=column_live, other=-1)
        i = tl.where(i < 0, -1, i)
        j = tl.where(j < 0, -2, j)
        s = tl.where(i[:, None] == j[None, :], float("-inf"), s)
    return s


@triton.jit
def seek(values, place, end, first):
    """The first position from `place` on whose value is not below `first`, for every row."""
    high = end
    while tl.max((place < high).to(tl.int32), 0) > 0:
        searching = place < high
        middle = (place + high) // 2
        value = tl.load(values + middle, mask=searching, other=0)
        place = tl.where(searching & (value < first), middle + 1, place)
        high = tl.where(searching & (value >= first), middle, high)
    return place


@triton.jit
def next_listed(values, place, end):
    """What every row lists at `place`, FAR behind the last entry, and the nearest of all rows."""
    value = tl.load(values + place, mask=place < end, other=FAR)
    return value, tl.min(value, 0)


@triton.jit
def leave_out_listed(
    s, column, values, place, end, value, nearest, last, OUT: tl.constexpr = float("-inf")
):  # fmt: skip
    """OUT for the listed columns below `last`; also (place, value, nearest) after them. Tiles
    without an entry cost one comparison: what comes next was loaded when the entry before was
    taken."""
    if nearest < last:  # the compiler pipelines no loop that holds a bare `while`
        while nearest < last:
            s = tl.where(value[:, None] == column[None, :], OUT, s)
            place += (value < last).to(tl.int64)
            value, nearest = next_listed(values, place, end)
    return s, place, value, nearest


@triton.jit
def lists_from(values, offsets, row, live, first):
    """(place, end, value, nearest) of the lists of `row`: their first entries not below `first`."""
    place = tl.load(offsets + row, mask=live, other=0)
    end = tl.load(offsets + row + 1, mask=live, other=0)
    if first > 0:
        place = seek(values, place, end, first)
    value, nearest = next_listed(values, place, end)
    return place, end, value, nearest


def by_column(ids: torch.Tensor | None) -> torch.Tensor | None:
    return None if ids is None else ids.t().contiguous()


def lists_of(exclude_values, exclude_offsets):
    """The excluded items as the kernels read them; (None, None) for none."""
    if exclude_values is None:
        return None, None
    return exclude_values.contiguous(), exclude_offsets.contiguous()
