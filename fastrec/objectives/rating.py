# SPDX-License-Identifier: Apache-2.0
"""Rating prediction (Zeng et al., "Knowledge transfer via pre-training for recommendation: a review
and prospect", 2021, section 4).

Legend: T events, V items, D width.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import JaggedBatch
from fastrec.data.settings import check_fields, check_one
from fastrec.data.side import SideData
from fastrec.data.steps.mask_rating import TARGET
from fastrec.nn.init import init_bert
from fastrec.nn.plain import embedding_table
from fastrec.nn.pool import Encoded, weighted_sum
from fastrec.ops.common.arguments import without_autocast
from fastrec.random import Rng


@dataclass(frozen=True)
class Rating:
    """Regression to the ratings that the step `mask_rating` has chosen, squared error.

    Attributes:
        views: whose events are predicted.
        weight: in the joint loss.
        by: "state", a linear layer from the state of an event to its rating, which starts at the
            mean rating of training; or "item", the product of the state and a vector of the event's
            item, without a bias: the output layer of an autoencoder (DACF), of which only the items
            that are asked about are computed.
        biases: add mean + bias of the item + bias of the user to what the state says:
            `RatingBiases`, with this shrinkage. A linear layer then starts at 0, and so the
            prediction on that line. None: no such line.
    """

    views: list[str] = field(default_factory=lambda: ["main"])
    weight: float = 1.0
    by: Literal["state", "item"] = "state"
    biases: float | None = None

    def __post_init__(self):
        check_fields(self)
        check_one("rating", self.views)
        if self.biases is not None and not 0 < self.biases < math.inf:
            raise ValueError(f"rating.biases must be above 0, got {self.biases}")

    def build(self, model, side: SideData) -> "RatingPrediction":
        if "rating" not in model.event_columns:
            raise ValueError(
                "the objective rating needs a model that reads ratings: set model.items.rating, or"
                " the encoder bag"
            )
        width, biases = model.config.width, None
        if self.by == "state" and self.biases is None:
            return RatingPrediction(width, side.mean_rating)
        if self.biases is not None:
            biases = RatingBiases(self.biases, side.mean_rating, *side.rating_deviations)
        items = model.num_items if self.by == "item" else None
        return RatingPrediction(width, 0.0, items, biases, side.dataset.items_hash)


class RatingBiases(nn.Module):
    """mean + bias of the item + bias of the user, the line that the judge `rating` prints, of a
    batch. The bias of an item is sum / (number + shrinkage) of the deviations of its training
    ratings from their mean; that of a user is made in the same way of what this leaves of the
    ratings that are visible in its sequence. No rating is a part of its own prediction, but for the
    part that another rating of the same item by the same user has in it.

    Nothing here is trained. What a model predicts is saved with it: `mean` and, by item, `totals`
    and `counts` of the deviations.

    Args:
        shrinkage: K: ratings without a deviation that every item and user has beside its own.
        mean: of the training ratings.
        totals, counts: [V] each.
    """

    def __init__(self, shrinkage: float, mean: float, totals: Tensor, counts: Tensor):
        super().__init__()
        self.shrinkage = shrinkage
        self.mean: Tensor
        self.totals: Tensor
        self.counts: Tensor
        self.register_buffer("mean", totals.new_tensor(mean).float())
        self.register_buffer("totals", totals.float())
        self.register_buffer("counts", counts.float())

    def forward(self, batch: JaggedBatch, target: Tensor | None = None) -> Tensor:
        """float32 [T]; 0 as the bias of the item for special tokens. target: [T], NaN for none,
        training ratings that the biases of their items are made without."""
        index = batch.values.clamp_max(len(self.totals) - 1)
        real = (batch.values < len(self.totals)).to(self.totals.dtype)
        totals, counts = self.totals[index] * real, self.counts[index] * real
        rating = batch.events["rating"]
        left = rating - self.mean - totals / (counts + self.shrinkage)
        seen, left = (~rating.isnan()).to(left.dtype), left.nan_to_num()
        sums = weighted_sum(torch.stack([left, seen], 1), seen, batch)  # [B, 2]
        others, number = sums.index_select(0, batch.segment_ids()).unbind(1)
        user = (others - left) / (number - seen + self.shrinkage)
        if target is not None:
            own = ~target.isnan()
            totals = totals - (target - self.mean).nan_to_num()
            counts = (counts - own.to(counts.dtype)).clamp_min(0)
        return self.mean + totals / (counts + self.shrinkage) + user


class RatingPrediction(nn.Module):
    """Ratings of events from their states.

    Args:
        width: D.
        mean: rating that the linear layer starts at.
        num_items: V: a vector for each item in place of the linear layer.
        biases: what the states are added to; the linear layer then starts at 0.
        items_hash: of the original ids, which says whose vectors and counts are saved.
    """

    def __init__(
        self,
        width: int,
        mean: float = 0.0,
        num_items: int | None = None,
        biases: RatingBiases | None = None,
        items_hash: str = "",
    ):
        super().__init__()
        self.biases = biases
        self.linear = init_bert(nn.Linear(width, 1)) if num_items is None else None
        self.items = None if num_items is None else init_bert(nn.Embedding(num_items, width))
        scale: dict[str, str | float] = {"by": "state"}
        if num_items is not None:
            scale = {"by": "item", "items": items_hash}
        if biases is not None:
            scale |= {"biases": biases.shrinkage, "counted": items_hash}
        self.scales = [scale]
        if self.linear is not None:
            nn.init.constant_(self.linear.bias, mean)
            if biases is not None:  # random ones put items that are seldom asked about off the line
                nn.init.zeros_(self.linear.weight)

    @property
    def of_data(self) -> list[str]:
        """Names of the tensors that are counted in the data: of another catalogue they are its
        own."""
        return [] if self.biases is None else [f"biases.{n}" for n in self.biases.state_dict()]

    def predict(
        self, view: Encoded, target: Tensor | None = None, biases: RatingBiases | None = None
    ) -> Tensor:
        """[T] in the dtype of the weights: the rating of each event, in the unit of the data. What
        special tokens get means nothing. target: of training, see `RatingBiases`. biases: in the
        place of those that were counted in training."""
        found, line = self._of_states(view), biases or self.biases
        return found if line is None else found + line(view.batch, target)

    def _of_states(self, view: Encoded) -> Tensor:
        """[T]."""
        states = view.states
        if self.linear is not None:
            with without_autocast(states.device):  # ratings in bfloat16 would be on a coarse grid
                return self.linear(states.to(self.linear.weight.dtype)).squeeze(1)
        assert self.items is not None
        table = embedding_table(self.items, self.items.num_embeddings)
        vectors = F.embedding(view.batch.values.clamp_max(len(table) - 1), table)
        return (states.to(table.dtype) * vectors).sum(1)

    def forward(self, model, rng: Rng, view: Encoded) -> dict[str, tuple[Tensor, Tensor]]:
        """(mean squared error, number of events with a target). Over none it is 0 with a live
        graph."""
        if TARGET not in view.batch.events:
            raise ValueError("the objective rating reads a view without the step mask_rating")
        target = view.batch.events[TARGET]
        known = ~target.isnan()
        error = (self.predict(view, target) - target.nan_to_num()).square() * known
        count = known.sum()
        return {"rating": (error.sum() / count.clamp_min(1), count)}
