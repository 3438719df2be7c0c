# SPDX-License-Identifier: Apache-2.0
"""What stands beside the events (attributes, vectors of items, relations, items of another
catalogue), joined to the users and items that are left.

Legend: U users, V items.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from fastrec.data.prepare.catalogue import Catalogue
from fastrec.data.prepare.filters import count_removed
from fastrec.data.prepare.item_features import Vectors
from fastrec.data.prepare.item_features import item_features as read_item_features
from fastrec.data.prepare.join import attribute_table, cold_table, relation_table
from fastrec.data.prepare.load import Loaded


class Beside(NamedTuple):
    """What belongs to users and items: files, frames or None.

    user, item: attributes, and how a file of them is read. na_values: as `prepare` takes it.
    items_of: the folder of a data set whose items come first.
    """

    user: tuple[Any, dict]
    item: tuple[Any, dict]
    item_features: Any
    relations: Any
    cold_items: Any
    na_values: str
    items_of: Path | None


class Joined(NamedTuple):
    """users, items: a row each, the original id and attributes. features: vectors of the items by
    name. relations, cold_items: as `write_dataset` takes them. catalogue: of `items_of`."""

    users: pl.DataFrame
    items: pl.DataFrame
    features: dict[str, Vectors]
    relations: pl.DataFrame | None
    cold_items: pl.DataFrame | None
    catalogue: Catalogue | None


def joined(
    found: Loaded, beside: Beside, users: np.ndarray, items: np.ndarray, removed: dict[str, int]
) -> Joined:
    """The tables of the source and of `beside`.

    users, items: int64 [U], [V], those that are left, places in the ids of `found`. removed: gets
    how many rows went, by reason.

    Raises DataError where a file is not as `side_tables`, `item_features`, `join` and `catalogue`
    take it.
    """
    raw, user_ids, item_ids = found.raw, found.user_ids, found.item_ids
    user_file, options = beside.user
    sources = [(raw.source, raw.users), ("user_attributes", user_file)]
    user_table, lost = attribute_table(user_ids[users], sources, "user_id", user_ids, **options)
    count_removed(removed, "attribute rows of users without interactions", lost)
    item_file, options = beside.item
    sources = [(raw.source, raw.items), ("item_attributes", item_file)]
    listed, catalogue = item_ids[items], None
    if beside.items_of is not None:
        catalogue = Catalogue(beside.items_of, listed)
        listed = catalogue.ids
        item_ids = item_ids.cast(listed.dtype)
    item_table, lost = attribute_table(listed, sources, "item_id", item_ids, **options)
    count_removed(removed, "attribute rows of items without interactions", lost)
    features: dict[str, Vectors] = {}
    if beside.item_features is not None:
        how = {"column": options["column"], "known_as": options["known_as"]}
        features, lost = read_item_features(beside.item_features, listed, item_ids, **how)
        count_removed(removed, "feature rows of items without interactions", lost)
    if catalogue is not None:
        item_table, features = catalogue.joined(item_table), catalogue.features(features)
    name, links = "relations", beside.relations
    if links is None:
        name, links = raw.source, raw.relations
    links, lost = relation_table(name, links, user_table["user_id"], user_ids, beside.na_values)
    count_removed(removed, "relations with an end without interactions", lost)
    cold_items = beside.cold_items
    if cold_items is not None:
        cold_items, lost, twice = cold_table(
            cold_items, user_table["user_id"], user_ids, beside.na_values
        )
        count_removed(removed, "cold-start rows of users without interactions", lost)
        count_removed(removed, "cold-start rows that are there twice", twice)
    return Joined(user_table, item_table, features, links, cold_items, catalogue)
