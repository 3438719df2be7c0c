# SPDX-License-Identifier: Apache-2.0
"""The rows of a judge block by block, shared by the processes of a group, and whether what is found
for them is finite.

A block has the same rows whatever the number of processes, so that scores keep their bits.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Rows `start` to `stop`. Of several processes, all are asked for as many blocks, because a
    model may be spread over them: what `counts` not is asked twice."""

    start: int
    stop: int
    counts: bool = True

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def row_blocks(count: int, size: int = 512) -> list[slice]:
    """Consecutive slices of `size` rows, the last one shorter: what a model evaluates at a time."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def own_blocks(count: int, rank: int = 0, world_size: int = 1) -> list[Block]:
    """Every world_size-th of `row_blocks` from `rank` on: those of process `rank`."""
    blocks, found = row_blocks(count), []
    for first in range(0, len(blocks), world_size):
        place = first + rank
        rows = blocks[min(place, len(blocks) - 1)]
        found.append(Block(rows.start, rows.stop, place < len(blocks)))
    return found


def gathered(parts: Sequence[Tensor], group=None) -> Tensor:
    """[all rows, ...] on every process, from what each found for its `own_blocks` that count, on
    the CPU."""
    if group is None:
        return torch.cat(list(parts))
    import torch.distributed as dist

    found: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, list(parts), group=group)
    rounds = range(max(map(len, found)))
    return torch.cat([each[k] for k in rounds for each in found if k < len(each)])


def scores_of(count: int, score: Callable[[slice], Tensor], group=None) -> Tensor:
    """What `score` gives for all rows, in their order, on every process of `group`."""
    rank, world_size = 0, 1
    if group is not None:
        import torch.distributed as dist

        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    blocks = own_blocks(count, rank, world_size)
    return gathered([score(each.rows) for each in blocks if each.counts], group)


def finite(numbers: Tensor, what: str) -> Tensor:
    """Raises ValueError where finite weights have led beyond what a number can be."""
    if numbers.numel() and not all(math.isfinite(end.item()) for end in numbers.aminmax()):
        raise ValueError(f"{what} of the model are not finite: has its training diverged?")
    return numbers
