# SPDX-License-Identifier: Apache-2.0
"""The input of an item: what stands for it before the encoder.

Legend: V items, S special tokens, T events, D width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import FILL, SPECIAL_TOKENS, JaggedBatch
from fastrec.data.item_categories import Categories, item_categories
from fastrec.data.item_vectors import item_vectors
from fastrec.data.settings import check_fields
from fastrec.nn.item_features import FeatureMap, ItemFeature
from fastrec.nn.item_parts import (
    CategoryMean,
    ItemAttribute,
    ItemPlace,
    Rating,
    Segment,
    TimeGap,
)
from fastrec.nn.plain import apply_linear, embedding_table, is_plain
from fastrec.random import Rng


class ItemRows(NamedTuple):
    """Vectors of the events of a batch: rows `values` [T] of `table` [V + S, D], or `table` [T, D]
    itself where `values` is None. An encoder may gather the rows inside of its first op."""

    table: Tensor
    values: Tensor | None
    sparse: bool = False  # the gradient of `table`, where `values` are its rows
    num_items: int | None = None  # V; values from there on are special tokens; None: not said

    def dense(self) -> Tensor:
        """[T, D]."""
        if self.values is None:
            return self.table
        return F.embedding(self.values, self.table, sparse=self.sparse)


# Columns of events that no data set has: a step makes them, or the texts of items.
STEP_COLUMNS = ("segment", "item_place")

# By name, the categories of an attribute or the vectors [V, F] of a feature.
ItemFeatures = Mapping[str, Categories | Tensor]


@dataclass(frozen=True)
class Items:
    """What an item is to the encoder: the embedding of its id, and of what else a recipe names.
    Scores of items read the embedding of ids, whatever the input is made of, or with
    `model.head_table: features` the sum of it and the features.

    Attributes:
        scale: multiply the input by sqrt(D) (the original SASRec); the scores of items read ids
            unscaled.
        ids: embed the ids; false where an item is its features alone, so that a model goes to other
            items. Special tokens are embedded all the same.
        features: vectors of the data set by name, see `prepare --item_features`; special tokens
            have 0.
        attributes: columns of items.parquet by name. An item has the mean of the vectors of its
            categories, 0 where none is known; special tokens have 0.
        rating: of the event, a level of its own where there is none: special tokens, items that are
            masked, histories without a data set.
        time_gap: since the event before, a level of its own where there is none: the first event of
            a user, special tokens, histories without a data set.
        segment: of the step `baskets`, or key and value of a token of `texts`; a level of its own
            elsewhere.
        item_place: which item a token of `texts` is of; special tokens have a level of their own.
        combine: "concat" maps [id; the other parts] to D linearly, at first to the id plus small
            multiples of the rest; "sum" adds them, each of width D.
    """

    scale: bool = False
    ids: bool = True
    features: dict[str, ItemFeature] = field(default_factory=dict)
    attributes: dict[str, ItemAttribute] = field(default_factory=dict)
    rating: Rating | None = None
    time_gap: TimeGap | None = None
    segment: Segment | None = None
    item_place: ItemPlace | None = None
    combine: Literal["concat", "sum"] = "concat"

    def __post_init__(self):
        check_fields(self)
        if self.combine != "concat" and not self.widths:
            raise ValueError("combine has no effect: items have neither attributes nor others")
        if not self.ids and not self.features:
            raise ValueError("ids false leaves nothing of an item: it needs features")
        if not self.ids and self.combine != "sum":
            raise ValueError("ids false needs combine: sum: a concatenation begins as the id")
        if both := set(self.features) & set(self.attributes):
            raise ValueError(f"{both.pop()!r} names an attribute and a feature")

    @property
    def event_columns(self) -> list[str]:
        """Columns of events that the input reads."""
        return [name for name in ("rating", "time_gap") if getattr(self, name) is not None]

    @property
    def leveled(self) -> list[str]:
        """The parts that are embedded by level: columns of the data set, and of a step."""
        made = [name for name in STEP_COLUMNS if getattr(self, name) is not None]
        return self.event_columns + made

    @property
    def most(self) -> dict[str, int]:
        """`most` of each attribute, as `item_categories` reads it."""
        return {name: attribute.most for name, attribute in self.attributes.items()}

    @property
    def widths(self) -> dict[str, int]:
        """Width of each part beside the id."""
        parts: dict[str, Any] = {f"attributes.{name}": p for name, p in self.attributes.items()}
        parts |= {f"features.{name}": part for name, part in self.features.items()}
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

    def num_parameters(self, num_items: int, width: int, sizes: Mapping[str, int]) -> int:
        """How many numbers the input has, tables of categories and of features among them. sizes:
        by attribute how many categories there are, by feature how many numbers a vector has."""
        total = (num_items * self.ids + len(SPECIAL_TOKENS)) * width
        for name, attribute in self.attributes.items():
            total += num_items * attribute.most + sizes[name] * attribute.width
        for name, feature in self.features.items():
            total += num_items * sizes[name] + feature.num_parameters(sizes[name])
        for name in self.leveled:
            part = getattr(self, name)
            total += (part.levels + 1) * part.width
        if self.widths and self.combine == "concat":
            total += (width + sum(self.widths.values()) + 1) * width
        return total


class ItemInput(nn.Module):
    """`ids` is the embedding table: items, then special tokens; without `settings.ids` the latter
    alone. Its first V rows score items. `classes`: how many categories each attribute has; `sizes`:
    how many numbers a vector of each feature has.

    Args:
        settings: of the input.
        num_items, width: V and D.
        features: the categories of the items for the attributes of `settings`, and their vectors
            float32 [V, F] for its features.
    """

    def __init__(
        self,
        settings: Items,
        num_items: int,
        width: int,
        features: ItemFeatures | None = None,
    ):
        super().__init__()
        self.settings = settings
        self.factor = width**0.5 if settings.scale else 1.0
        self.rows = num_items + len(SPECIAL_TOKENS)
        self.num_items = num_items
        self.ids = nn.Embedding(self.rows if settings.ids else len(SPECIAL_TOKENS), width)
        categories, vectors = _checked(settings, num_items, features or {})
        self.classes = {name: categories[name].classes for name in settings.attributes}
        self.attributes = nn.ModuleList(
            CategoryMean(categories[name], attribute.width)
            for name, attribute in settings.attributes.items()
        )
        self.sizes = {name: vectors[name].shape[1] for name in settings.features}
        self.features = nn.ModuleList(
            FeatureMap(feature, vectors[name], number)
            for number, (name, feature) in enumerate(settings.features.items())
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
        maps: Iterable[Any] = self.features
        for part in maps:
            part.reset()

    def forward(
        self, batch: JaggedBatch, rng: Rng | None = None, summed: Tensor | None = None
    ) -> ItemRows:
        """rng: turns the randomness of features on. summed: `summed(rng)`, which is then read for
        ids and features."""
        values, items = batch.values, self.num_items
        if summed is not None and len(self.settings.widths) == len(self.features):
            rows = ItemRows(summed, values, num_items=items)
        elif self.settings.widths:
            dense = self._combined(batch, rng, summed) * self.factor
            return ItemRows(dense, None, num_items=items)
        elif not is_plain(self.ids, nn.Embedding):
            return ItemRows(self.ids(values) * self.factor, None, num_items=items)
        else:
            rows = ItemRows(self.ids.weight, values, self.ids.sparse, items)
        if self.factor == 1.0:
            return rows
        return ItemRows(rows.dense() * self.factor, None, num_items=items)

    def summed(self, rng: Rng | None = None) -> Tensor:
        """[V + S, D]: ids and features of every item, and the special tokens."""
        maps: Iterable[Any] = self.features
        features = torch.stack([part.whole(rng) for part in maps]).sum(0)
        if self.settings.ids:
            ids = embedding_table(self.ids, self.rows)
            special = len(ids) - self.num_items
            return ids + F.pad(features, (0, 0, 0, special)).to(ids.dtype)
        ids = embedding_table(self.ids, len(SPECIAL_TOKENS))
        return torch.cat([features.to(ids.dtype), ids])

    def _combined(self, batch: JaggedBatch, rng: Rng | None, summed: Tensor | None) -> Tensor:
        """[T, D]."""
        if summed is not None:
            vectors = [F.embedding(batch.values, summed)]
        else:
            vectors = [self._ids(batch.values), *self._features(batch.values, rng)]
        vectors[1:1] = [part(batch.values) for part in self.attributes]
        events = batch.events
        for name in STEP_COLUMNS:
            if getattr(self.settings, name) is not None and name not in events:  # no step made it
                events = {**events, name: torch.full_like(batch.values, int(FILL[name]))}
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

    def _ids(self, values: Tensor) -> Tensor:
        """[T, D]; without embedded ids 0 for items."""
        if self.settings.ids:
            return self.ids(values)
        special = values >= self.num_items
        return self.ids((values - self.num_items).clamp_min(0)) * special.unsqueeze(1)

    def _features(self, values: Tensor, rng: Rng | None) -> list[Tensor]:
        """[T, P] of each feature, 0 for special tokens."""
        items, real = values.clamp_max(self.num_items - 1), (values < self.num_items).unsqueeze(1)
        return [(part(items, rng) * real).to(self.ids.weight.dtype) for part in self.features]

    @property
    def table(self) -> Tensor:
        """[V + S, D]: the vectors of ids, unscaled."""
        return embedding_table(self.ids, self.rows)

    def check_tables(self) -> None:
        """Raise ValueError for a table with categories that have no vector."""
        for (name, classes), part in zip(self.classes.items(), self.attributes, strict=True):
            table: Any = part.table
            if table.min() < -1 or table.max() >= classes:
                raise ValueError(f"the table of {name!r} has categories out of [-1, {classes})")


def item_features(dataset, settings: Items) -> dict[str, Categories | Tensor]:
    """What `UserModel` needs to know of the items of a data set: see `item_categories` and
    `item_vectors`."""
    return {
        **item_categories(dataset, settings.most),
        **item_vectors(dataset, settings.features),
    }


def unknown_features(
    settings: Items, num_items: int, sizes: Mapping[str, int]
) -> dict[str, Categories | Tensor]:
    """Of items of which nothing is known. sizes: see `Items.num_parameters`."""
    found: dict[str, Categories | Tensor] = {
        name: torch.zeros(num_items, sizes[name], dtype=torch.float32, device="cpu")
        for name in settings.features
    }
    for name, most in settings.most.items():
        found[name] = Categories.unknown(num_items, most, sizes[name])
    return found


def _checked(
    settings: Items, num_items: int, given: ItemFeatures
) -> tuple[dict[str, Categories], dict[str, Tensor]]:
    """(categories of the attributes, vectors of the features)."""
    names = [*settings.attributes, *settings.features]
    if set(given) != set(names):
        raise ValueError(
            f"model.items has the attributes and features {names}, the item features are"
            f" {list(given)}: give UserModel item_features(dataset, config.items)"
        )
    for name, attribute in settings.attributes.items():
        expected, found = [num_items, attribute.most], given[name]
        shape = list(found.table.shape) if isinstance(found, Categories) else "none"
        if not isinstance(found, Categories) or shape != expected or found.classes < 1:
            raise ValueError(
                f"the categories of {name!r} must be a table {expected} of at least one class, got"
                f" {shape} and {getattr(found, 'classes', 'none')}"
            )
    for name in settings.features:
        found = given[name]
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != num_items:
            raise ValueError(f"the vectors of {name!r} must be [{num_items}, F], got {shape}")
    categories = {name: part for name, part in given.items() if isinstance(part, Categories)}
    return categories, {name: part for name, part in given.items() if isinstance(part, Tensor)}
