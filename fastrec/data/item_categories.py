# SPDX-License-Identifier: Apache-2.0
"""Item attributes as model input: the categories of every item, numbered.

Legend: V items, K categories of an item at most, C categories of a column, E categories in lists.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrec.data.batch import offsets_of
from fastrec.data.errors import DataError


class Categories(NamedTuple):
    """table: int32 [V, K], the categories of each item in [0, C), -1 where it has fewer than K.
    classes: C. digest: of what the numbers stand for, the categories in their order."""

    table: Tensor
    classes: int
    digest: str = ""

    @classmethod
    def unknown(cls, num_items: int, most: int, classes: int) -> "Categories":
        """Of items without a category."""
        return cls(torch.full((num_items, most), -1, dtype=torch.int32, device="cpu"), classes)


def item_categories(dataset, most: Mapping[str, int]) -> dict[str, Categories]:
    """Columns of items.parquet as `Categories`, by name.

    most: by column, K: of a list that is longer the first K are kept. A column holds one category
    (text, integer, boolean) or a list of them; null, and an empty list, are unknown. A category
    counts once an item, and categories are numbered in ascending order over all items.

    Raises DataError that names the column: missing, of numbers with a fraction or another type, or
    without any category.
    """
    import polars as pl

    if not most:
        return {}
    frame, file = dataset.item_attributes(), dataset.path / "items.parquet"
    there = [name for name in frame.columns if name not in ("item", "item_id")]
    found = {}
    for name, number in most.items():
        if name not in there:
            raise DataError(file, f"column is missing; the attributes are {there}", column=name)
        column = frame[name].alias("category")
        if not isinstance(column.dtype, pl.List):
            column = column.reshape((-1, 1)).cast(pl.List(column.dtype))
        kind = column.dtype.inner  # type: ignore[attr-defined]
        if not (kind.is_integer() or kind in (pl.String, pl.Boolean, pl.Categorical, pl.Enum)):
            raise DataError(
                file, f"{frame[name].dtype} holds no categories (text, integers or lists of these)",
                column=name,
            )  # fmt: skip
        kept = column.list.drop_nulls().list.unique(maintain_order=True).list.head(number)
        rows = kept.to_frame().with_row_index("item").explode("category").drop_nulls("category")
        if rows.height == 0:
            raise DataError(file, "no item has a category", column=name)
        if kind in (pl.Categorical, pl.Enum):
            rows = rows.with_columns(pl.col("category").cast(pl.String))
        rows = rows.with_columns(
            pl.col("category").rank("dense").alias("class") - 1,
            pl.int_range(pl.len()).over("item").alias("place"),
        )
        table = Categories.unknown(frame.height, number, 0).table
        item, place, index = (
            torch.from_numpy(rows[each].cast(pl.Int64).to_numpy().copy())
            for each in ("item", "place", "class")
        )
        table[item, place] = index.to(torch.int32)
        labels = rows["category"].unique().sort().cast(pl.String)
        digest = hashlib.sha256("\0".join(labels).encode()).hexdigest()[:16]
        found[name] = Categories(table, int(index.max()) + 1, digest)
    return found


class CategoryLists(NamedTuple):
    """values: int64 [E], the categories in [0, classes) of item v, rising, are those from
    offsets[v] to offsets[v + 1]; offsets: int64 [V + 1]. digests: by column, see `Categories`."""

    values: Tensor
    offsets: Tensor
    classes: int
    digests: Mapping[str, str] = {}


def category_lists(dataset, columns: Sequence[str]) -> CategoryLists:
    """All categories of every item in these columns of items.parquet; those of a column are
    numbered after those of the columns before it. Raises what `item_categories` does."""
    import polars as pl

    frame, most = dataset.item_attributes(), {}
    for name in columns:
        most[name] = 1
        if name in frame.columns and isinstance(frame[name].dtype, pl.List):
            most[name] = max(1, frame[name].list.len().max() or 1)
    tables, classes, digests = [], 0, {}
    for name, found in item_categories(dataset, most).items():
        digests[name] = found.digest
        tables.append(torch.where(found.table >= 0, found.table.long() + classes, -1))
        classes += found.classes
    whole = torch.cat(tables, 1)
    table = whole.masked_fill(whole < 0, classes).sort(1).values  # those that are none come last
    known = table < classes
    return CategoryLists(table[known], offsets_of(known.sum(1)), classes, digests)
