# SPDX-License-Identifier: Apache-2.0
"""Rating prediction (Zeng et al., "Knowledge transfer via pre-training for recommendation: a review
and prospect", 2021, section 4).

Legend: T events, V items, D width.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.settings import check_choices
from fastrec.data.side import SideData
from fastrec.data.steps.mask_rating import TARGET
from fastrec.nn.init import init_bert
from fastrec.nn.plain import embedding_table
from fastrec.nn.pool import Encoded
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
    """

    views: list[str] = field(default_factory=lambda: ["main"])
    weight: float = 1.0
    by: Literal["state", "item"] = "state"

    def __post_init__(self):
        check_choices(self)

    def build(self, model, side: SideData) -> "RatingPrediction":
        if "rating" not in model.event_columns:
            raise ValueError(
                "the objective rating needs a model that reads ratings: set model.items.rating, or"
                " the encoder bag"
            )
        items = model.num_items if self.by == "item" else None
        mean = side.mean_rating if self.by == "state" else 0.0
        return RatingPrediction(model.config.width, mean, items)


class RatingPrediction(nn.Module):
    """Ratings of events from their states.

    Args:
        width: D.
        mean: rating that the linear layer starts at.
        num_items: V: a vector for each item in place of the linear layer.
    """

    def __init__(self, width: int, mean: float = 0.0, num_items: int | None = None):
        super().__init__()
        self.linear = init_bert(nn.Linear(width, 1)) if num_items is None else None
        self.items = None if num_items is None else init_bert(nn.Embedding(num_items, width))
        self.scales = [{"by": "state" if num_items is None else "item"}]
        if self.linear is not None:
            nn.init.constant_(self.linear.bias, mean)

    def predict(self, view: Encoded) -> Tensor:
        """[T] in the dtype of the weights: the rating of each event, in the unit of the data. What
        special tokens get means nothing."""
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
        error = (self.predict(view) - target.nan_to_num()).square() * known
        count = known.sum()
        return {"rating": (error.sum() / count.clamp_min(1), count)}
