# SPDX-License-Identifier: Apache-2.0
"""The input of an item: what stands for it before the encoder.

Legend: V items, S special tokens, T events, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import FILL, SPECIAL_TOKENS, JaggedBatch
from fastrec.data.item_categories import Categories
from fastrec.data.settings import check_choices
from fastrec.nn.item_parts import CategoryMean, ItemAttribute, Rating, Segment, TimeGap
from fastrec.nn.plain import apply_linear, embedding_table, is_plain


class ItemRows(NamedTuple):
    """Vectors of the events of a batch: rows `values` [T] of `table` [V + S, D], or `table` [T, D]
    itself where `values` is None. An encoder may gather the rows inside of its first op."""

    table: Tensor
    values: Tensor | None

    def dense(self) -> Tensor:
        """[T, D]."""
        return self.table if self.values is None else F.embedding(self.values, self.table)


@dataclass(frozen=True)
class Items:
    """What an item is to the encoder: the embedding of its id, and of what else a recipe names.
    Scores of items read the embedding of ids alone, whatever the input is made of.

    Attributes:
        scale: multiply the input by sqrt(D) (the original SASRec); the scores of items read ids
            unscaled.
        attributes: columns of items.parquet by name. An item has the mean of the vectors of its
            categories, 0 where none is known; special tokens have 0.
        rating: of the event, a level of its own where there is none: special tokens, items that are
            masked, histories without a data set.
        time_gap: since the event before, a level of its own where there is none: the first event of
            a user, special tokens, histories without a data set.
        segment: of the step `baskets`, a level of its own elsewhere.
        combine: "concat" maps [id; attributes; rating; time gap] to D linearly, at first to the id
            plus small multiples of the rest; "sum" adds them, each of width D.
    """

    scale: bool = False
    attributes: dict[str, ItemAttribute] = field(default_factory=dict)
    rating: Rating | None = None
    time_gap: TimeGap | None = None
    segment: Segment | None = None
    combine: Literal["concat", "sum"] = "concat"

    def __post_init__(self):
        check_choices(self)
        if self.combine != "concat" and not self.widths:
            raise ValueError("combine has no effect: items have neither attributes nor others")

    @property
    def event_columns(self) -> list[str]:
        """Columns of events that the input reads."""
        return [name for name in ("rating", "time_gap") if getattr(self, name) is not None]

    @property
    def leveled(self) -> list[str]:
        """The parts that are embedded by level: columns of the data set, and of a step."""
        return self.event_columns + ["segment"] * (self.segment is not None)

    @property
    def most(self) -> dict[str, int]:
        """`most` of each attribute, as `item_categories` reads it."""
        return {name: attribute.most for name, attribute in self.attributes.items()}

    @property
    def widths(self) -> dict[str, int]:
        """Width of each part beside the id."""
        parts = {f"attributes.{name}": part for name, part in self.attributes.items()}
        parts |= {name: getattr(self, name) for name in self.leveled}
        return {name: part.width for name, part in parts.items()}

    def check_width(self, width: int) -> None:
        """Raise ValueError for parts that cannot be added to ids of this width."""
        for name, part in self.widths.items():
            if self.combine == "sum" and part != width:
                raise ValueError(
                    f"model.items.{name}.width is {part}: combine: sum adds vectors of"
                    f" model.width, {width}"
                )

    def check_events(self, columns: Mapping[str, Any]) -> None:
        """Raise ValueError for columns of events, on the host, that have no levels here."""
        if self.rating is not None:
            self.rating.check(columns["rating"])

    def parameters(self, num_items: int, width: int, classes: Mapping[str, int]) -> int:
        """How many numbers the input has, tables of categories among them. classes: by attribute,
        how many categories there are."""
        total = (num_items + len(SPECIAL_TOKENS)) * width
        for name, attribute in self.attributes.items():
            total += num_items * attribute.most + classes[name] * attribute.width
        for name in self.leveled:
            part = getattr(self, name)
            total += (part.levels + 1) * part.width
        if self.widths and self.combine == "concat":
            total += (width + sum(self.widths.values()) + 1) * width
        return total


class ItemInput(nn.Module):
    """`ids` is the embedding table: items, then special tokens. Its first V rows score items.
    `classes`: how many categories each attribute has.

    Args:
        settings: of the input.
        num_items, width: V and D.
        features: the categories of the items, for the attributes of `settings`.
    """

    def __init__(
        self,
        settings: Items,
        num_items: int,
        width: int,
        features: Mapping[str, Categories] | None = None,
    ):
        super().__init__()
        self.settings = settings
        self.factor = width**0.5 if settings.scale else 1.0
        self.rows = num_items + len(SPECIAL_TOKENS)
        self.ids = nn.Embedding(self.rows, width)
        features = features or {}
        _check_features(settings, num_items, features)
        self.classes = {name: features[name].classes for name in settings.attributes}
        self.attributes = nn.ModuleList(
            CategoryMean(features[name], attribute.width)
            for name, attribute in settings.attributes.items()
        )
        # A level more than there are: none.
        self.levels = nn.ModuleDict(
            {
                name: nn.Embedding(getattr(settings, name).levels + 1, settings.widths[name])
                for name in settings.leveled
            }
        )
        joined = width + sum(settings.widths.values())
        concat = bool(settings.widths) and settings.combine == "concat"
        self.join = nn.Linear(joined, width) if concat else None

    def reset(self) -> None:
        """Let a concatenation begin as the id: the encoder is tuned to vectors of its size."""
        if self.join is not None:
            nn.init.eye_(self.join.weight[:, : self.join.out_features])

    def forward(self, batch: JaggedBatch) -> ItemRows:
        if self.settings.widths:
            return ItemRows(self._combined(batch) * self.factor, None)
        if not is_plain(self.ids, nn.Embedding):
            return ItemRows(self.ids(batch.values) * self.factor, None)
        rows = ItemRows(self.ids.weight, batch.values)
        return rows if self.factor == 1.0 else ItemRows(rows.dense() * self.factor, None)

    def _combined(self, batch: JaggedBatch) -> Tensor:
        """[T, D]."""
        vectors = [self.ids(batch.values), *(part(batch.values) for part in self.attributes)]
        events = batch.events
        if self.settings.segment is not None and "segment" not in events:  # no step has made it
            events = {**events, "segment": torch.full_like(batch.values, FILL["segment"])}
        for name, embedding in self.levels.items():
            if name not in events:
                raise ValueError(
                    f"the batch has no event column {name!r}, which the model reads: gather it with"
                    " columns=model.event_columns"
                )
            vectors.append(embedding(getattr(self.settings, name).level(events[name])))
        if self.join is None:
            return torch.stack(vectors).sum(0)
        # In the dtype of the ids also under autocast, as rows of a table are.
        return apply_linear(self.join, torch.cat(vectors, dim=1)).to(vectors[0].dtype)

    @property
    def table(self) -> Tensor:
        """[V + S, D]: the vectors that score items, unscaled."""
        return embedding_table(self.ids, self.rows)

    def check_tables(self) -> None:
        """Raise ValueError for a table with categories that have no vector."""
        for (name, classes), part in zip(self.classes.items(), self.attributes, strict=True):
            table: Any = part.table
            if table.min() < -1 or table.max() >= classes:
                raise ValueError(f"the table of {name!r} has categories out of [-1, {classes})")


def _check_features(settings: Items, num_items: int, features: Mapping[str, Categories]) -> None:
    if set(features) != set(settings.attributes):
        raise ValueError(
            f"model.items.attributes are {list(settings.attributes)}, the item features"
            f" {list(features)}: give UserModel item_categories(dataset, config.items.most)"
        )
    for name, categories in features.items():
        expected = [num_items, settings.attributes[name].most]
        if list(categories.table.shape) != expected or categories.classes < 1:
            raise ValueError(
                f"the categories of {name!r} must be a table {expected} of at least one class, got"
                f" {list(categories.table.shape)} and {categories.classes}"
            )
