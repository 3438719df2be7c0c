# SPDX-License-Identifier: Apache-2.0
"""Click prediction from a user vector and the content of an item, in the manner of BERT4SessRec
(Chen et al., 2019; Zeng et al., 2021, section 3).

Legend: N predicted items, K negatives, D width of an item, P of a user, H of a layer.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import NO_TARGET, JaggedBatch
from fastrec.data.negatives import NegativeSampler
from fastrec.data.settings import check_fields
from fastrec.data.side import SideData
from fastrec.nn.init import init_bert
from fastrec.nn.pool import Encoded
from fastrec.objectives.predicted import places_of, predicted
from fastrec.ops.common.arguments import without_autocast
from fastrec.random import Rng

LABEL = "click"  # column of events, of the step of this name


@dataclass(frozen=True)
class Click:
    """Whether the targets of events, and items that are drawn, are clicked: binary cross-entropy.

    Attributes:
        views: whose targets are predicted. Behind the step `click` a target is a click or is none,
            as it says; without it all are clicks.
        weight: in the joint loss.
        negatives: items drawn beside each target, which count as not clicked; 0 for none, where the
            step `click` gives labels.
        by: "uniform", or "popularity": by number of training events.
        hidden: widths of the layers, with ReLU, between [user; item] and the score.
    """

    views: list[str] = field(default_factory=lambda: ["main"])
    weight: float = 1.0
    negatives: int = 4
    by: Literal["uniform", "popularity"] = "uniform"
    hidden: list[int] = field(default_factory=lambda: [64])

    def __post_init__(self):
        check_fields(self)
        if self.negatives < 0:
            raise ValueError(f"click.negatives must not be negative, got {self.negatives}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"click.hidden must be widths of at least 1, got {self.hidden}")
        if not self.negatives and self.by != "uniform":
            raise ValueError("click.by has no effect: click.negatives is 0")

    def build(self, model, side: SideData) -> "ClickPrediction":
        if model.num_users:
            model.check_users(side.dataset)
            side.user_columns["user"] = torch.arange(model.num_users, device="cpu")
        sampler = None
        if self.negatives:
            sampler = NegativeSampler.of(self.by, side)
        width = model.config.width
        return ClickPrediction(
            width + model.config.user_width, width, self.hidden, self.negatives, sampler
        )


class ClickPrediction(nn.Module):
    """MLP([u; v]): u [P] is the state that is asked for the next item, with the vector of the user
    where there is one, v [D] what the encoder reads of the item: id, attributes and features. The
    first layer is W u + W' v + b, of which W u is computed once a user.

    Args:
        user_width, item_width: P and D.
        hidden: see `Click`.
        negatives, sampler: how many are drawn beside a target, and of what.
    """

    def __init__(
        self,
        user_width: int,
        item_width: int,
        hidden: list[int],
        negatives: int = 0,
        sampler: NegativeSampler | None = None,
    ):
        super().__init__()
        self.negatives, self.sampler = negatives, sampler
        self.user = nn.Linear(user_width, hidden[0])
        self.item = nn.Linear(item_width, hidden[0], bias=False)
        widths = [*hidden, 1]
        self.rest = nn.ModuleList(nn.Linear(inner, outer) for inner, outer in pairwise(widths))
        for layer in (self.user, self.item, *self.rest):
            init_bert(layer)
        self.scales = [{"hidden": list(hidden)}]

    def score(self, users: Tensor, items: Tensor) -> Tensor:
        """Log-odds of a click: [..., P] and [..., D], which broadcast, to [...]; float32 or the
        dtype of the weights, also under autocast."""
        with without_autocast(users.device):
            kind = self.user.weight.dtype
            found = self.user(users.to(kind)) + self.item(items.to(kind))
            for layer in self.rest:
                found = layer(F.relu(found))
            return found.squeeze(-1)

    def forward(self, model, rng: Rng, *views: Encoded) -> dict[str, tuple[Tensor, Tensor]]:
        """(mean loss over targets with a label and drawn items, number of these). An item that is
        drawn and is the target does not count. Over none the loss is 0 with a live graph."""
        losses, counts = [], []
        for view in views:
            states, target = predicted(model, view, "click")
            label = self._labels(view, target)
            known = (label >= 0) & (target != NO_TARGET)
            items, clicked = target.masked_fill(target == NO_TARGET, 0)[:, None], label[:, None]
            counted = known[:, None]
            if self.sampler is not None:
                self.sampler = self.sampler.to(states.device)
                keys, places = places_of(view.batch)
                drawn = self.sampler.own(self.negatives, rng, keys, places, site="negatives_click")
                there = (target != NO_TARGET)[:, None] & (drawn != items)
                items = torch.cat([items, drawn], 1)  # [N, 1 + K]
                clicked = torch.cat([clicked, torch.zeros_like(drawn)], 1)
                counted = torch.cat([counted, there], 1)
            vectors = contents(model, items.flatten(), view.items).unflatten(0, items.shape)
            scores = self.score(states.unsqueeze(1), vectors)
            loss = F.binary_cross_entropy_with_logits(
                scores, clicked.clamp_min(0).to(scores.dtype), reduction="none"
            )
            losses.append((loss * counted).sum())
            counts.append(counted.sum())
        count = torch.stack(counts).sum()
        return {"click": (torch.stack(losses).sum() / count.clamp_min(1), count)}

    def _labels(self, view: Encoded, target: Tensor) -> Tensor:
        """int64 [N]: 1, 0 or -1 of each prediction."""
        batch = view.batch
        if LABEL not in batch.events:
            if self.sampler is None:
                raise ValueError(
                    "the objective click needs negatives, or the step click in its view: all"
                    " targets are clicks"
                )
            return torch.ones_like(target)
        label = batch.events[LABEL]
        if label.shape != batch.events["target"].shape:
            raise ValueError(
                "the labels of the step click are lost: behind it stands a step other than mask,"
                " mask_last, next_item and permute that makes targets"
            )
        scored = batch.scored if batch.scored is not None else batch.with_scored().scored
        assert scored is not None
        return label[scored].flatten()


def contents(model, items: Tensor, summed: Tensor | None = None) -> Tensor:
    """[N, D]: what the encoder reads of items, int64 [N], of which no event is known. summed: see
    `Encoded.items`."""
    none = torch.full(items.shape, torch.nan, dtype=torch.float32, device=items.device)
    events = {name: none for name in model.event_columns}
    offsets = torch.arange(2, device=items.device) * len(items)
    batch = JaggedBatch(items, offsets, items.new_zeros(1), len(items), events)
    return model.item_input(batch, None, summed).dense()
