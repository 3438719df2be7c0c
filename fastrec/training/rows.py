# SPDX-License-Identifier: Apache-2.0
"""Training by rows: a step reads and updates the rows of a table that it touches and no others.

With sampled negatives a step of 256 users touches some ten thousand rows of a table, whatever the
number of items. Gradients of the tables are sparse tensors of these rows, and the optimizer moves
these rows alone.

Legend: V rows of a table, D width, U rows that a step touches.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastrec.data.settings import check_fields
from fastrec.ops.common.distinct_rows import distinct_rows, sparse_rows, sum_rows
from fastrec.ops.common.linear_cross_entropy_update import Pending, update_rows_
from fastrec.ops.common.move_rows import RowState, move_rows_


@dataclass(frozen=True)
class Tables:
    """How the item table, its biases and the vectors of users are updated.

    Attributes:
        update: "dense", every row in every step, or "rows", those that a step touches: its time
            and its traffic do not grow with the number of items where the loss is over sampled
            negatives. The softmax over all items touches every row, which moves as soon as its
            gradient is known, on one process: no table of gradients. No weight decay of these
            tables.
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
        check_fields(self)
        for name in ("optimizer", "learning_rate"):
            if getattr(self, name) is not None and self.update == "dense":
                raise ValueError(f"tables.{name} has no effect: tables.update is dense")
        if self.learning_rate is not None and not self.learning_rate >= 0:
            raise ValueError(f"tables.learning_rate must not be negative, got {self.learning_rate}")


def check_tables(how: Tables, model, parts: Iterable[nn.Module]) -> None:
    """Raise ValueError for a model or an objective that reads a whole table in every step, but for
    the softmax over all items. parts: the objectives that train the model."""
    if how == Tables():
        return
    config, key = model.config, "update: rows" if how.update == "rows" else "shard"
    if config.head_similarity == "cosine" or config.items.features:
        raise ValueError(
            f"tables.{key} does not work with model.head_similarity: cosine or items.features:"
            " they compute a vector of every item in every step"
        )
    for settings in _item_losses(parts):
        sampled = settings.sampled
        if "bpr" in settings.loss or (sampled is not None and sampled.in_batch):
            raise ValueError(
                f"tables.{key} needs an item loss over all items (softmax) or over sampled"
                " negatives: softmax, bce or gbce, not in_batch; others have a gradient of every"
                " item"
            )
        if sampled is None and how.update == "rows":
            if how.shard:
                raise ValueError(
                    "tables: update: rows with shard needs item losses over sampled negatives"
                    " (item.sampled); over all items shard alone spreads the table"
                )
            if not scoring_table(model).requires_grad:
                raise ValueError(
                    "tables.update: rows needs an item table that is trained: init.freeze holds it"
                )


def _item_losses(parts: Iterable[nn.Module]) -> list[Any]:
    """The settings of the losses over items."""
    found: list[Any] = [getattr(part, "settings", None) for part in parts]
    return [settings for settings in found if hasattr(settings, "sampled")]


def use_rows(model, parts: Iterable[nn.Module]) -> None:
    """Let the tables of `model` have sparse gradients, and losses over all items move every row.
    parts: the objectives that train it, which `check_tables` has passed."""
    if any(settings.sampled is None for settings in _item_losses(parts)):
        model.item_head.pending = []
    for module in (model.item_input.ids, model.item_head.table, model.item_head.users):
        if module is not None:
            module.sparse = True  # torch's own word for it


def tables_of(model) -> list[nn.Parameter]:
    """The parameters whose gradients `use_rows` makes sparse and that are trained."""
    head = model.item_head
    found = [m.weight for m in (model.item_input.ids, head.table, head.users) if m is not None]
    return [p for p in (*found, head.bias) if p.requires_grad]


def scoring_table(model) -> nn.Parameter:
    """[V, D] or, before special tokens, [V + S, D]: what scores items."""
    head = model.item_head
    return (model.item_input.ids if head.table is None else head.table).weight


class Swept(NamedTuple):
    """Of losses over all items: the table [V, D] or, before special tokens, [V + S, D] that scores
    them, the biases [V], and what backward leaves in the place of their gradients."""

    table: nn.Parameter
    bias: nn.Parameter
    pending: list[Pending]


def swept_of(model) -> Swept | None:
    """What `use_rows` has found to be swept."""
    head = model.item_head
    if head.pending is None:
        return None
    return Swept(scoring_table(model), head.bias, head.pending)


class RowAdamW(torch.optim.AdamW):
    """AdamW, and row-wise updates of the parameters `tables`, whose gradients are sparse. One
    optimizer, so that schedules, checkpoints and the trainer need not know.

    Args:
        parameters: of AdamW.
        tables: [V, D] or [V].
        how, table_lr: of the tables.
        settings: of AdamW, lr and others.
        swept: of losses over all items.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        tables: Iterable[nn.Parameter],
        how: Literal["adam", "adagrad", "sgd"],
        table_lr: float,
        settings: dict,
        swept: Swept | None = None,
    ):
        rows: dict[str, Any] = {"params": list(tables), "lr": table_lr, "weight_decay": 0.0}
        super().__init__([{"params": list(parameters)}, rows], **settings)
        self.how, self.swept = how, swept

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[1]
        if self.swept is not None and self.swept.pending:
            self._sweep(self.swept, group)
        for table in group["params"]:
            if table.grad is not None:
                rows, grad = _taken(table)  # AdamW passes it by
                # Steps are those of all processes, also of one whose rows nobody has touched.
                state = self._started(table, group)
                if len(rows):
                    move_rows_(table, rows, grad, state, **_constants(group))
        super().step()
        return loss

    def _sweep(self, swept: Swept, group: dict) -> None:
        """Every item, by the gradient of the losses over all items and that of its embedding."""
        table, bias, pending = swept
        items, how = len(bias), _constants(group)
        rows, grad = _taken(table)
        of_items = rows < items
        state, bias_state = self._started(table, group), RowState(0.0)
        if bias.requires_grad:
            bias_state = self._started(bias, group)
        update_rows_(
            table[:items], bias, pending, rows[of_items], grad[of_items], state.first(items),
            bias_state, **how,
        )  # fmt: skip
        move_rows_(table, rows[~of_items], grad[~of_items], state, **how)
        pending.clear()

    def _started(self, table: Tensor, group: dict) -> RowState:
        """The state of one more step."""
        state, rate = self.state[table], group["lr"]
        if self.how == "sgd":
            return RowState(rate)
        if not state:
            # AdamW looks for it when it loads.
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        if self.how == "adagrad":
            if "sum" not in state:
                state["sum"] = torch.zeros(len(table), dtype=torch.float32, device=table.device)
            return RowState(rate, state["sum"])
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        state["step"] += 1
        (first, second), step = group["betas"], float(state["step"])
        rate *= (1 - second**step) ** 0.5 / (1 - first**step)
        return RowState(rate, state["exp_avg_sq"], state["exp_avg"])


def _constants(group: dict) -> dict[str, Any]:
    return {"eps": group["eps"], "betas": group["betas"]}


def _taken(table: Tensor) -> tuple[Tensor, Tensor]:
    """(rows int64 [U], ascending, gradients [U, D] or [U]) of the sparse gradient of a table, which
    has none from here on."""
    if table.grad is None:
        none = torch.arange(0, device=table.device)
        return none, table.detach()[none]
    grad, table.grad = _merged(table.grad), None
    return grad.indices()[0], grad.values()


def _merged(grad: Tensor) -> Tensor:
    """`grad`, coalesced: backward leaves the gradients of inputs and candidates end to end."""
    if grad.is_coalesced():
        return grad
    rows, place = distinct_rows(grad._indices()[0], len(grad))
    return sparse_rows(rows, sum_rows(grad._values(), place, len(rows)), grad.shape)


def share_gradients(tables: Iterable[nn.Parameter]) -> None:
    """Give every process the mean of the sparse gradients of all: each then makes the same step.
    What is sent are the touched rows. Sums are in the order of the processes."""
    from fastrec.ops.common.collectives import gather, gather_padded

    group = torch.distributed.group.WORLD
    assert group is not None
    world = torch.distributed.get_world_size(group)
    for table in tables:
        rows, values = _taken(table)
        sizes = gather(torch.tensor([len(rows)], device=table.device), group)
        lists = sizes.flatten().tolist()
        rows = gather_padded(rows, lists, group, -1).flatten()
        values = gather_padded(values, lists, group).flatten(0, 1)
        rows, place = distinct_rows(rows, len(table))
        table.grad = sparse_rows(rows, sum_rows(values, place, len(rows), 1 / world), table.shape)


def clip_(parameters: Iterable[nn.Parameter], norm: float, sharded: Iterable = ()) -> None:
    """Scale the gradients, some of them sparse, to a total norm of `norm` where it is larger.
    sharded: parameters of which every process has other rows."""
    grads: list[Tensor] = []
    parts: list[Tensor] = []
    known = set(map(id, sharded))
    for parameter in parameters:
        if parameter.grad is not None:
            if parameter.grad.is_sparse:
                parameter.grad = _merged(parameter.grad)
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
