# SPDX-License-Identifier: Apache-2.0
"""What the input of an item is made of beside its id: settings, and how they number what they read.

Legend: V items, T events, P width of a part, K categories of an item at most.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastrec.data.item_categories import Categories

MOST_LEVELS = 10_000


@dataclass(frozen=True)
class ItemAttribute:
    """A column of items.parquet with the categories of an item, one or a list of them: external
    knowledge (Zeng et al., "Knowledge transfer via pre-training for recommendation: a review and
    prospect", 2021).

    Attributes:
        width: of the vector of a category.
        most: categories of an item that are read, the first ones of a longer list. Of a column with
            one category an item, 1 is enough.
    """

    width: int = 16
    most: int = 3

    def __post_init__(self):
        _check_positive(self, "width", "most")


@dataclass(frozen=True)
class Rating:
    """The rating of an event, embedded as in the rating prediction of Zeng et al., 2021. A rating
    between two levels counts as the nearer, the upper one if both are as near.

    Attributes:
        low: the lowest level.
        high: the highest level.
        step: from a level to the next.
        width: of the vector of a level.
    """

    low: float = 1.0
    high: float = 5.0
    step: float = 1.0
    width: int = 16

    def __post_init__(self):
        _check_positive(self, "width")
        if not (self.step > 0 and self.low < self.high):
            raise ValueError(
                f"low must be below high and step above 0, got {self.low}, {self.high}, {self.step}"
            )
        steps = (self.high - self.low) / self.step
        if not (math.isfinite(steps) and abs(steps - round(steps)) < 1e-6):
            raise ValueError(f"step {self.step} does not lead from {self.low} to {self.high}")
        if self.levels > MOST_LEVELS:
            raise ValueError(f"step makes {self.levels} levels, expected at most {MOST_LEVELS}")

    @property
    def levels(self) -> int:
        return round((self.high - self.low) / self.step) + 1

    def level(self, ratings: Tensor) -> Tensor:
        """int64 [T] from ratings [T]: 0 to levels - 1, and `levels` for NaN."""
        place = ((ratings.double() - self.low) / self.step + 0.5).floor()
        place = place.clamp(0, self.levels - 1)
        return place.nan_to_num(self.levels).long()

    def check(self, ratings) -> None:
        """Raise ValueError for ratings, on the host, that are out of range."""
        ratings = np.asarray(ratings)
        wrong = (ratings < self.low - self.step / 2) | (ratings > self.high + self.step / 2)
        if wrong.any():
            raise ValueError(
                f"an event has the rating {float(ratings[wrong][0]):g}, model.items.rating has the"
                f" levels {self.low:g} to {self.high:g}"
            )


@dataclass(frozen=True)
class TimeGap:
    """The time since the user's event before, in levels floor(log2(1 + seconds)) (PTUM, Wu et al.,
    2020).

    Attributes:
        width: of the vector of a level.
    """

    width: int = 16

    levels = 64  # of whole seconds of 64 bits

    def __post_init__(self):
        _check_positive(self, "width")

    def level(self, seconds: Tensor) -> Tensor:
        """int64 [T] from seconds [T]: 0 to levels - 1, and `levels` for NaN."""
        # log2 may round up to the next whole number, and ONNX has no frexp.
        ends = 2.0 ** torch.arange(1, self.levels, dtype=torch.float64, device=seconds.device)
        level = torch.bucketize(1 + seconds.double().nan_to_num(0), ends, right=True)
        return level.masked_fill(seconds.isnan(), self.levels)


@dataclass(frozen=True)
class Segment:
    """Which of two texts, or baskets, an event is in (BERT's segment embedding).

    Attributes:
        width: of the vector of a segment.
    """

    width: int = 16

    levels = 2

    def __post_init__(self):
        _check_positive(self, "width")

    def level(self, segments: Tensor) -> Tensor:
        """int64 [T] from segments [T]: 0, 1, and 2 for -1."""
        return segments.masked_fill(segments < 0, self.levels)


@dataclass(frozen=True)
class ItemPlace:
    """Which item a token is of, counted from the latest, where events are tokens of items
    (Recformer's item position embedding, Li et al., 2023, section 3.1.2).

    Attributes:
        levels: items that are told apart; those further back count as the last.
        width: of the vector of a level.
    """

    levels: int = 50
    width: int = 64

    def __post_init__(self):
        _check_positive(self, "levels", "width")
        if self.levels > MOST_LEVELS:
            raise ValueError(f"levels must be at most {MOST_LEVELS}, got {self.levels}")

    def level(self, places: Tensor) -> Tensor:
        """int64 [T]: 0 to levels - 1, and `levels` for -1."""
        return places.clamp_max(self.levels - 1).masked_fill(places < 0, self.levels)


class CategoryMean(nn.Module):
    """[T, P]: the mean of the vectors of an item's categories, 0 without one."""

    def __init__(self, categories: Categories, width: int):
        super().__init__()
        self.classes = nn.Embedding(categories.classes, width)
        # int32 [V, K], saved with the model, which then needs no data set.
        table = categories.table.to(self.classes.weight.device, copy=True)
        self.register_buffer("table", table)
        self.table: Tensor

    def forward(self, values: Tensor) -> Tensor:
        last = len(self.table) - 1
        index = self.table[values.clamp_max(last)]  # [T, K]
        known = (index >= 0) & (values <= last).unsqueeze(1)
        vectors = self.classes(index.clamp_min(0)) * known.unsqueeze(2)  # [T, K, P]
        return vectors.sum(1) / known.sum(1, keepdim=True).clamp_min(1)


def _check_positive(settings, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
