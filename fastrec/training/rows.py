# SPDX-License-Identifier: Apache-2.0
"""Training by rows: a step reads and updates the rows of a table that it touches and no others.

With sampled negatives a step of 256 users touches some ten thousand rows of a table, whatever the
number of items. Gradients of the tables are sparse tensors of these rows, and the optimizer moves
these rows alone.

Legend: V rows of a table, D width, U rows that a step touches.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastrec.data.settings import check_choices


@dataclass(frozen=True)
class Tables:
    """How the item table, its biases and the vectors of users are updated.

    Attributes:
        update: "dense", every row in every step, or "rows", those that a step touches: its time
            and its traffic do not grow with the number of items. Losses over sampled negatives
            only; no weight decay of these tables.
        optimizer: of "rows": "adam" (if None), whose averages move where a row is touched (lazy
            Adam, `torch.optim.SparseAdam`) and take two more tables, "adagrad" with one number a
            row beside the table (Mudigere et al., 2022), or "sgd" with nothing beside it.
        learning_rate: of "rows", the peak of the schedule; that of the stage if None.
        shard: spread the rows of the item table and its biases, their gradients and averages, over
            the processes. With "dense" the softmax over all items is that of every process over
            its rows; with "rows" those that a step touches travel between the processes.
    """

    update: Literal["dense", "rows"] = "dense"
    optimizer: Literal["adam", "adagrad", "sgd"] | None = None
    learning_rate: float | None = None
    shard: bool = False

    def __post_init__(self):
        check_choices(self)
        for name in ("optimizer", "learning_rate"):
            if getattr(self, name) is not None and self.update == "dense":
                raise ValueError(f"tables.{name} has no effect: tables.update is dense")
        if self.learning_rate is not None and not self.learning_rate >= 0:
            raise ValueError(f"tables.learning_rate must not be negative, got {self.learning_rate}")


def check_tables(how: Tables, model, parts: Iterable[nn.Module]) -> None:
    """Raise ValueError for a model or an objective that reads a whole table in every step. parts:
    the objectives that train the model."""
    if how == Tables():
        return
    config, key = model.config, "update: rows" if how.update == "rows" else "shard"
    if config.head_similarity == "cosine" or config.items.features:
        raise ValueError(
            f"tables.{key} cannot train a model that computes a vector of every item in every"
            " step: cosines, features of items"
        )
    for part in parts:
        settings: Any = getattr(part, "settings", None)
        if not hasattr(settings, "sampled"):
            continue
        sampled = settings.sampled
        whole = sampled is None and how.update == "rows"
        if whole or (sampled is not None and sampled.in_batch) or "bpr" in settings.loss:
            raise ValueError(
                f"tables.{key} needs item losses over sampled negatives (item.sampled):"
                " softmax, bce or gbce, not in_batch; others have a gradient of every item"
                + ("" if how.update == "rows" else ", of which the softmax over all items is one")
            )


def use_rows(model) -> None:
    """Let the tables of `model` have sparse gradients."""
    for module in (model.item_input.ids, model.item_head.table, model.item_head.users):
        if module is not None:
            module.sparse = True  # torch's own word for it


def tables_of(model) -> list[nn.Parameter]:
    """The parameters whose gradients `use_rows` makes sparse and that are trained."""
    head = model.item_head
    found = [m.weight for m in (model.item_input.ids, head.table, head.users) if m is not None]
    return [p for p in (*found, head.bias) if p.requires_grad]


class RowAdamW(torch.optim.AdamW):
    """AdamW, and row-wise updates of the parameters `tables`, whose gradients are sparse. One
    optimizer, so that schedules, checkpoints and the trainer need not know.

    Args:
        parameters: of AdamW.
        tables: [V, D] or [V].
        how, table_lr: of the tables.
        settings: of AdamW, lr and others.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        tables: Iterable[nn.Parameter],
        how: Literal["adam", "adagrad", "sgd"],
        table_lr: float,
        settings: dict,
    ):
        rows: dict[str, Any] = {"params": list(tables), "lr": table_lr, "weight_decay": 0.0}
        super().__init__([{"params": list(parameters)}, rows], **settings)
        self.how = how

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[1]
        for table in group["params"]:
            if table.grad is not None:
                grad, table.grad = table.grad.coalesce(), None  # AdamW passes it by
                if len(grad.values()):
                    self._update(table, grad.indices()[0], grad.values(), group)
        super().step()
        return loss

    def _update(self, table: Tensor, rows: Tensor, grad: Tensor, group: dict) -> None:
        """rows: int64 [U], distinct. grad: [U, D] or [U]."""
        state, rate = self.state[table], group["lr"]
        if self.how == "sgd":
            table.index_add_(0, rows, grad, alpha=-rate)
            return
        if self.how == "adagrad":
            if not state:
                state["step"] = torch.zeros((), device="cpu")  # AdamW looks for it when it loads
                state["sum"] = torch.zeros(len(table), device=table.device)
            square = grad.square().mean(1) if grad.dim() == 2 else grad.square()
            total = state["sum"][rows] + square
            state["sum"][rows] = total
            scale = (rate / (total.sqrt() + group["eps"])).view(-1, *[1] * (grad.dim() - 1))
            table.index_add_(0, rows, grad * scale, alpha=-1)
            return
        if not state:
            state["step"] = torch.zeros((), device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        state["step"] += 1
        (first, second), step = group["betas"], float(state["step"])
        mean = torch.lerp(grad, state["exp_avg"][rows], first)
        square = torch.lerp(grad.square(), state["exp_avg_sq"][rows], second)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        rate *= (1 - second**step) ** 0.5 / (1 - first**step)
        table.index_add_(0, rows, mean / (square.sqrt() + group["eps"]), alpha=-rate)


def share_gradients(tables: Iterable[nn.Parameter]) -> None:
    """Give every process the mean of the sparse gradients of all: each then makes the same step.
    What is sent are the touched rows. Sums are in the order of the processes."""
    from fastrec.ops.common.collectives import gather, gather_rows

    group = torch.distributed.group.WORLD
    assert group is not None
    world = torch.distributed.get_world_size(group)
    for table in tables:
        rows = torch.empty(0, dtype=torch.int64, device=table.device)
        values = table.new_empty(0, *table.shape[1:])
        if table.grad is not None:
            grad = table.grad.coalesce()
            rows, values = grad.indices()[0], grad.values()
        sizes = gather(torch.tensor([len(rows)], device=table.device), group).flatten().tolist()
        rows, values = (gather_rows(part, sizes, group) for part in (rows, values))
        table.grad = torch.sparse_coo_tensor(
            rows[None], values / world, table.shape, check_invariants=False
        )


def clip_(parameters: Iterable[nn.Parameter], norm: float, spread: Iterable = ()) -> None:
    """Scale the gradients, some of them sparse, to a total norm of `norm` where it is larger.
    spread: parameters of which every process has other rows."""
    grads: list[Tensor] = []
    parts: list[Tensor] = []
    known = set(map(id, spread))
    for parameter in parameters:
        if parameter.grad is not None:
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
            grad = parameter.grad.values() if parameter.grad.is_sparse else parameter.grad
            (parts if id(parameter) in known else grads).append(grad)
    total = torch.nn.utils.get_total_norm(grads)
    if known:
        square = torch.nn.utils.get_total_norm(parts).square().to(total.device)
        torch.distributed.all_reduce(square)
        total = (total.square() + square).sqrt()
    scale = (norm / (total + 1e-6)).clamp(max=1.0)
    for grad in (*grads, *parts):
        grad.mul_(scale)
