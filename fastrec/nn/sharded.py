# SPDX-License-Identifier: Apache-2.0
"""Item tables whose rows are spread over processes: each holds one block of consecutive rows, and
asks the others for the rows that its batch reads.

Legend: V rows on all processes, R distinct rows that this process asks for, D width, N predicted
items, K negatives, W processes.
"""

import contextlib
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.output import new_folder
from fastrec.ops.common.arguments import accumulate_dtype
from fastrec.ops.common.collectives import gather, gather_rows
from fastrec.ops.common.distinct_rows import distinct_rows
from fastrec.ops.common.second_order import once_differentiable
from fastrec.ops.linear_cross_entropy import linear_cross_entropy

PIECES = "tables"  # where a whole table is put together
_PIECE = 1 << 16  # rows that are sent at a time where a whole table is put together


class Part(NamedTuple):
    """The rows `first` to `last` of `total`, in blocks as `torch.chunk` and DTensor cut them."""

    group: dist.ProcessGroup
    total: int
    size: int  # of a block; the last ones may be shorter

    @property
    def first(self) -> int:
        return min(dist.get_rank(self.group) * self.size, self.total)

    @property
    def last(self) -> int:
        return min(self.first + self.size, self.total)

    def owned(self, ids: Tensor) -> Tensor:
        """int64 [W]: how many of `ids` [R], ascending, are of each process."""
        world = dist.get_world_size(self.group)
        ends = self.size * torch.arange(1, world + 1, device=ids.device)
        return torch.searchsorted(ids, ends).diff(prepend=ends.new_zeros(1))


def part_of(total: int, group: dist.ProcessGroup) -> Part:
    return Part(group, total, -(-total // dist.get_world_size(group)))


def _exchange(rows: Tensor, sent: list[int], received: list[int], group) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class _Pull(torch.autograd.Function):
    """The rows `ids` [R], ascending and distinct, of each of `tables`, blocks [n, D] or [n]. Their
    gradients are sparse tensors: the mean over the processes, as DDP makes it of the others."""

    @staticmethod
    def forward(ctx, ids, part, *tables):
        counts = part.owned(ids)
        each = [1] * len(counts)
        asked = _exchange(counts, each, each, part.group).tolist()
        own = counts.tolist()
        wanted = _exchange(ids, own, asked, part.group) - part.first
        ctx.part, ctx.wanted, ctx.own, ctx.asked = part, wanted, own, asked
        ctx.shapes = [table.shape for table in tables]
        rows = (table.index_select(0, wanted) for table in tables)
        return tuple(_exchange(each, asked, own, part.group) for each in rows)

    @staticmethod
    @once_differentiable("an item table that is spread over processes")
    def backward(ctx, *grads):
        world = dist.get_world_size(ctx.part.group)
        rows = (_exchange(grad, ctx.own, ctx.asked, ctx.part.group) for grad in grads)
        return None, None, *(
            torch.sparse_coo_tensor(
                ctx.wanted[None], values.div_(world), shape, device=values.device,
                check_invariants=False,
            )
            for values, shape in zip(rows, ctx.shapes, strict=True)
        )  # fmt: skip


class ShardedEmbedding(nn.Module):
    """What `table`, an nn.Embedding [V, D], gives for ids, of which this process keeps a block.
    Every process of the group must call it, and backward, as often as the others."""

    def __init__(self, table: nn.Embedding, group: dist.ProcessGroup):
        super().__init__()
        self.part, self.embedding_dim = part_of(table.num_embeddings, group), table.embedding_dim
        self.weight = _block(table.weight, self.part)

    def forward(self, ids: Tensor) -> Tensor:
        """[*, D] of int64 [*]."""
        distinct, place = distinct_rows(ids, self.part.total)
        (rows,) = _Pull.apply(distinct, self.part, self.weight)
        return F.embedding(place, rows)


class Candidates(NamedTuple):
    """The rows that some items have in common: vectors [R, D], biases [R], their ids [R]; and the
    `targets` [N] and `negatives` [K] or [N, K] among these rows."""

    table: Tensor
    bias: Tensor
    ids: Tensor
    targets: Tensor
    negatives: Tensor


class ShardedTable:
    """The vectors [V, D] and biases [V] that score items, of which this process has a block."""

    def __init__(self, table: ShardedEmbedding, bias: nn.Parameter):
        self.table, self.bias, self.part = table, bias, table.part

    def rows(self, targets: Tensor, negatives: Tensor) -> Candidates:
        """targets: int64 [N], -100 where there is none."""
        # Only rows that are read are asked for: a step moves those.
        drawn = negatives.flatten()
        known = torch.where(targets < 0, drawn[0], targets) if len(drawn) else targets
        ids, place = distinct_rows(torch.cat([known, drawn]), self.part.total)
        table, bias = _Pull.apply(ids, self.part, self.table.weight, self.bias)
        if len(ids) == 0:  # nothing is predicted here: a row at least, of nobody
            table, bias, ids = F.pad(table, (0, 0, 0, 1)), F.pad(bias, (0, 1)), F.pad(ids, (0, 1))
        own, others = place[: len(targets)], place[len(targets) :]
        own = torch.where(targets < 0, targets, own)
        return Candidates(table, bias, ids, own, others.view(negatives.shape))

    def cross_entropy(self, query: Tensor, targets: Tensor, backend=None) -> tuple[Tensor, Tensor]:
        """(mean over the predicted items of all processes, their number), the same on all. query:
        [N, D] of this process. The gradient of the block is whole; that of `query` is W times that
        of the mean, which DDP then divides by W."""
        group = self.part.group
        own = torch.tensor([len(targets)], device=targets.device)
        sizes = gather(own, group).flatten().tolist()
        special = len(self.table.weight) - len(self.bias)
        loss = linear_cross_entropy(
            gather_rows(query, sizes, group, accumulate_dtype(query)),  # gradients are added
            self.table.weight,
            gather_rows(targets, sizes, group),
            linear_bias=F.pad(self.bias, (0, special), value=-torch.inf),
            group=group,
            backend=backend,
        )
        return loss, torch.tensor(sum(sizes), device=targets.device)


def shard_tables(model, group: dist.ProcessGroup) -> None:
    """Let this process keep its block of the item tables of `model`, which is the same on all, and
    has no vectors that are computed of all items in every step (cosines, features of items)."""
    head = model.item_head
    model.item_input.ids = ShardedEmbedding(model.item_input.ids, group)
    if head.table is not None:
        head.table = ShardedEmbedding(head.table, group)
    head.bias = _block(head.bias, (head.table or model.item_input.ids).part)


def sharded_parameters(model) -> dict[str, tuple[nn.Parameter, Part]]:
    """The blocks by the name of their parameter; empty where nothing is spread."""
    head, found = model.item_head, {}
    for name, module in (("item_input.ids", model.item_input.ids), ("item_head.table", head.table)):
        if isinstance(module, ShardedEmbedding):
            found[f"{name}.weight"] = (module.weight, module.part)
            part = module.part  # the last one scores
    if found:
        found["item_head.bias"] = (head.bias, part._replace(total=model.num_items))
    return found


@contextlib.contextmanager
def whole_state(model, folder: Path) -> Iterator[dict[str, Tensor] | None]:
    """The state of a model with whole tables, on the first process; None on the others. Every
    process must ask. Tables come in pieces into files of `folder`, which are mapped to memory."""
    blocks, state = sharded_parameters(model), model.state_dict()
    first = all(dist.get_rank(part.group) == 0 for _, part in blocks.values())
    work = new_folder(folder / PIECES) if first and blocks else None
    try:
        for name, (block, part) in blocks.items():
            shape, into = (part.total, *block.shape[1:]), None
            if work is not None:
                into = torch.from_file(
                    str(work / name), shared=True, size=prod(shape), dtype=block.dtype
                ).view(shape)
                state[name] = into
            _put_together(block.detach(), part, into)
        yield state if first else None
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _put_together(block: Tensor, part: Part, into: Tensor | None) -> None:
    """Blocks of all processes into `into` of the first one, a piece of each at a time."""
    for start in range(0, part.size, _PIECE):
        size = min(_PIECE, part.size - start)
        piece = block.new_zeros(size, *block.shape[1:])
        own = block[start : start + size]
        piece[: len(own)] = own
        for rank, rows in enumerate(gather(piece, part.group)):
            place = rank * part.size + start
            kept = max(0, min(size, min((rank + 1) * part.size, part.total) - place))
            if into is not None and kept:
                into[place : place + kept] = rows[:kept].cpu()


def _block(table: Tensor, part: Part) -> nn.Parameter:
    rows = table[part.first : part.last].detach().clone()
    return nn.Parameter(rows, requires_grad=table.requires_grad)
