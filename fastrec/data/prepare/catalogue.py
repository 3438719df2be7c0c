# SPDX-License-Identifier: Apache-2.0
"""The items of an earlier data set, continued: a model that was trained on it keeps its rows."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.item_vectors import item_vectors
from fastrec.data.prepare.item_features import Vectors


class Catalogue:
    """`ids`: the items of the data set `folder` in their order, then those of `used` that are new,
    in ascending order. Where one side has text and the other integers, all are text.

    Args:
        folder: of a data set.
        used: the distinct items of the events.
    """

    def __init__(self, folder: Path, used: pl.Series):
        self.dataset = SequenceDataset.load(folder)
        self.table = self.dataset.item_attributes().drop("item")
        self.folder = folder
        known = self.table["item_id"]
        if known.dtype != used.dtype:
            known, used = known.cast(pl.String), used.cast(pl.String)
            self.table = self.table.with_columns(known)
        new = used.filter(~used.is_in(known.implode()))
        self.ids = pl.concat([known, new]).alias("item_id")
        self.known, self.new, self._used = len(known), len(new), used

    def __str__(self) -> str:
        return f"{self.known:,} of {self.folder}, and {self.new:,} new ones behind them"

    def numbers(self, item: np.ndarray) -> np.ndarray:
        """int64 [E]: places in `ids` of items that are places in `used`."""
        places = pl.DataFrame({"id": self.ids, "place": np.arange(len(self.ids))})
        found = self._used.alias("id").to_frame().join(places, "id", maintain_order="left")
        return found["place"].to_numpy()[item]

    def features(self, found: Mapping[str, Vectors]) -> dict[str, Vectors]:
        """The vectors of the items with those that the earlier data set has and `found`, vectors of
        this source, has not. DataError for vectors of another width there."""
        made = dict(found)
        for name in self.dataset.schema.get("item_features", {}):
            before = item_vectors(self.dataset, [name])[name].numpy()
            part, width = made.get(name), before.shape[1]
            if part is None:
                shape = len(self.ids), width
                part = Vectors(np.zeros(shape, np.float32), np.zeros(shape[0], dtype=bool))
            if part.numbers.shape[1] != width:
                raise DataError(
                    self.folder, f"item features {name!r} have {width} numbers there,"
                    f" {part.numbers.shape[1]} here",
                )  # fmt: skip
            numbers, known = part.numbers.copy(), part.known.copy()
            old = np.flatnonzero(~known[: self.known] & before.any(1))
            numbers[old], known[old] = before[old], True
            made[name] = Vectors(numbers, known)
        return made

    def joined(self, items: pl.DataFrame) -> pl.DataFrame:
        """The table of the items with what the earlier data set says of those that `items`, the
        table of this source, says nothing of. DataError for a column that has another type here."""
        before = self.table.rename(
            {name: f"{name} " for name in self.table.columns if name != "item_id"}
        )
        both = items.join(before, "item_id", how="left", maintain_order="left")
        for name in self.table.columns[1:]:
            if name not in items.columns:
                both = both.rename({f"{name} ": name})
                continue
            if both[name].dtype not in (both[f"{name} "].dtype, pl.Null):
                kinds = f"is {both[f'{name} '].dtype} there, {both[name].dtype} here"
                raise DataError(self.folder / "items.parquet", kinds, column=name)
            both = both.with_columns(pl.coalesce(name, f"{name} ").alias(name)).drop(f"{name} ")
        return both
