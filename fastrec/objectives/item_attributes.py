# SPDX-License-Identifier: Apache-2.0
"""Item attribute prediction of S3-Rec (Zhou et al., 2020): the state of an event against the
attributes of its item.

Legend: T events, N events that predict, V items, A attributes, D width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastrec.data.batch import NO_TARGET
from fastrec.data.item_categories import CategoryLists, category_lists
from fastrec.data.side import SideData
from fastrec.nn.init import init_bert
from fastrec.nn.pool import Encoded
from fastrec.ops.multilabel_bce import NOT_SCORED, multilabel_bce
from fastrec.random import Rng


@dataclass(frozen=True)
class ItemAttributes:
    """Prediction of the attributes of items, those that are predicted and those that are read.

    Attributes:
        views: whose events predict.
        weight: in the joint loss.
        masked: weight of the attributes of targets (MAP, section 4.2.3); 0 leaves them out.
        unmasked: weight of the attributes of items that stand in the sequence and are no target
            (AAP, section 4.2.1); 0 leaves them out.
        columns: of items.parquet, one category an item (text, integer) or lists of them.
    """

    views: list[str] = field(default_factory=lambda: ["main"])
    weight: float = 1.0
    masked: float = 1.0
    unmasked: float = 0.2
    columns: list[str] = field(default_factory=lambda: ["attributes"])

    def __post_init__(self):
        for name in ("masked", "unmasked"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"item_attributes.{name} must be at least 0 and finite, got"
                    f" {getattr(self, name)}"
                )
        if not self.masked and not self.unmasked:
            raise ValueError("item_attributes: masked and unmasked are both 0: nothing is trained")
        if not self.columns:
            raise ValueError("item_attributes.columns names no column of items.parquet")

    def build(self, model, side: SideData) -> "ItemAttributePrediction":
        lists = category_lists(side.dataset, self.columns)
        return ItemAttributePrediction(self, lists, model.config.width)


class ItemAttributePrediction(nn.Module):
    """Mean over events of sum_a BCE(sigmoid(W h_t . E_a), whether the item has attribute a), with a
    W for targets and one for items that are read, and one table E (eq. 5 and 7 with the state of
    the event in both, as the authors' program does).

    An item without attributes says nothing: its events are left out.

    Args:
        settings: weights of both.
        lists: attributes of each item.
        width: D.
    """

    backend: str | None = None
    values: Tensor
    offsets: Tensor

    def __init__(self, settings: ItemAttributes, lists: CategoryLists, width: int):
        super().__init__()
        self.settings = settings
        self.table = init_bert(nn.Embedding(lists.classes, width))
        self.maps = nn.ModuleDict()
        for name in ("masked", "unmasked"):
            if getattr(settings, name):
                self.maps[name] = init_bert(nn.Linear(width, width))
        # What the rows of E stand for, where it is saved.
        self.scales = [{"name": name, "categories": each} for name, each in lists.digests.items()]
        # Of the data set, not of the model: not saved.
        self.register_buffer("values", lists.values, persistent=False)
        self.register_buffer("offsets", lists.offsets, persistent=False)

    def forward(self, model, rng: Rng, *views: Encoded) -> dict[str, tuple[Tensor, Tensor]]:
        """{"masked": (weighted loss, N), "unmasked": ..}; 0 with a live graph without events."""
        losses = {}
        for name, linear in self.maps.items():
            parts = [
                _masked(view) if name == "masked" else _unmasked(model, view) for view in views
            ]
            states, items = (torch.cat(part) for part in zip(*parts, strict=True))
            loss, count = self.loss(linear(states), items)
            losses[name] = getattr(self.settings, name) * loss, count
        return losses

    def loss(self, query: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """(mean over the events, their number) from W h [N, D] and items int64 [N], -100: none."""
        found = items != NO_TARGET
        found = found & (self.offsets.diff() > 0)[torch.where(found, items, 0)]
        total = multilabel_bce(
            query,
            self.table.weight,
            self.values,
            self.offsets,
            label_rows=torch.where(found, items, NOT_SCORED),
            reduction="sum",
            backend=self.backend,
        )
        count = found.sum()
        return total / count.clamp_min(1), count


def _target(view: Encoded) -> Tensor | None:
    target = view.batch.events.get("target")
    if target is not None and target.dim() > 1:
        raise ValueError("item_attributes reads one target an event, not next_item.ahead of them")
    return target


def _masked(view: Encoded) -> tuple[Tensor, Tensor]:
    """(states [N, D], items [N]) of the events with a target."""
    target = _target(view)
    if target is None:
        raise ValueError(
            "a view of item_attributes has no targets: it needs mask, mask_last or next_item, or"
            " masked: 0"
        )
    scored = view.batch.scored
    if scored is None:
        scored = view.batch.with_scored().scored
    assert scored is not None
    return view.states.index_select(0, scored), target[scored]


def _unmasked(model, view: Encoded) -> tuple[Tensor, Tensor]:
    """(states [T, D], items [T]), -100 where the event holds no item or predicts one."""
    batch, target = view.batch, _target(view)
    read = batch.values < model.num_items
    if target is not None:
        read = read & (target == NO_TARGET)
    return view.states, torch.where(read, batch.values, NO_TARGET)
