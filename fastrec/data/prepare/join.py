# SPDX-License-Identifier: Apache-2.0
"""The tables of users, items, relations and cold items: side files joined to the ids of the
interactions."""

from pathlib import Path

import numpy as np
import polars as pl

from fastrec.data.errors import DataError
from fastrec.data.prepare.columns import check_unique, key_column
from fastrec.data.prepare.side_tables import read_attributes, read_cold_items, read_relations


def attribute_table(
    ids: pl.Series, sources, key: str, everyone: pl.Series, **options
) -> tuple[pl.DataFrame, int]:
    """(the table of users or items, number of rows lost): one row per id, with all attributes.

    sources: (name, file or frame or None); a file is its own name.
    everyone: all ids of the source, those that a filter removed too. options: of `read_attributes`.
    Raises DataError where not one row is about any of them: ids are written in another way.
    """
    table, lost = ids.rename(key).to_frame(), 0
    for name, frame in sources:
        if frame is None:
            continue
        if isinstance(frame, (str, Path)):
            name, frame = frame, read_attributes(frame, key, like=everyone, **options)
        if key not in frame.columns:
            raise DataError(name, f"column is missing; there are {frame.columns}", column=key)
        for column in set(frame.columns) & (set(table.columns) | {key.removesuffix("_id")}) - {key}:
            raise DataError(name, "the source has an attribute of that name", column=column)
        frame = frame.with_columns(key_column(name, frame[key], 1, everyone, "text"))
        check_unique(name, frame[key], 1)
        if not frame[key].is_in(everyone.implode()).any():
            raise foreign(name, frame[key], everyone)
        lost += int((~frame[key].is_in(ids.implode())).sum())
        table = table.join(frame, on=key, how="left", maintain_order="left")
    return table, lost


def relation_table(
    name, relations, user_ids: pl.Series, everyone: pl.Series, na_values: str
) -> tuple[pl.DataFrame | None, int]:
    """(user, friend) row numbers of links with both ends in `user_ids`, and how many were lost."""
    if relations is None:
        return None, 0
    if isinstance(relations, (str, Path)):
        name, relations = relations, read_relations(relations, everyone, na_values)
    if relations.width < 2:
        raise DataError(name, f"expected two columns of ids, got {relations.columns}")
    ends = [key_column(name, relations[end], 1, everyone, "text") for end in relations.columns[:2]]
    if relations.height and not any(end.is_in(everyone.implode()).any() for end in ends):
        raise foreign(name, ends[0], everyone)
    table = pl.DataFrame({"id": user_ids, "code": np.arange(len(user_ids))})
    codes = [
        end.to_frame("id").join(table, on="id", how="left", maintain_order="left")["code"]
        for end in ends
    ]
    links = pl.DataFrame({"user": codes[0], "friend": codes[1]}).drop_nulls()
    return links, relations.height - links.height


def cold_table(
    rows, user_ids: pl.Series, everyone: pl.Series, na_values: str
) -> tuple[pl.DataFrame, int, int]:
    """(user row numbers, items from 0 in the order of their ids, and these, sorted by user; rows
    lost because the user has no interactions; rows that were there before)."""
    name: str | Path = "cold_items"
    if isinstance(rows, (str, Path)):
        name, rows = rows, read_cold_items(rows, everyone, na_values)
    if rows.width < 2:
        raise DataError(name, f"expected two columns of ids, got {rows.columns}")
    user, item = rows.columns[:2]
    users = key_column(name, rows[user], 1, everyone, "text").alias("user_id")
    items = key_column(name, rows[item], 1, None, "text").alias("item_id")
    if not users.is_in(everyone.implode()).any():
        raise foreign(name, users, everyone)
    table = pl.DataFrame({"user_id": user_ids, "user": np.arange(len(user_ids))})
    found = pl.DataFrame([users, items]).join(table, on="user_id", maintain_order="left")
    if found.height == 0:
        raise DataError(name, "no row is of a user with interactions", column=user)
    unique = found.unique(["user", "item_id"], keep="first", maintain_order=True)
    ids = unique["item_id"].unique().sort()
    numbers = pl.DataFrame({"item_id": ids, "item": np.arange(len(ids))})
    unique = unique.join(numbers, on="item_id", maintain_order="left")
    unique = unique.sort("user", maintain_order=True).select("user", "item", "item_id")
    return unique, rows.height - found.height, found.height - unique.height


def foreign(file, ids: pl.Series, everyone: pl.Series) -> DataError:
    what = f"none of its {len(ids):,} ids occurs in the interactions"
    return DataError(file, f"{what}: {ids[0]!r} here, {everyone[0]!r} there", column=ids.name)
