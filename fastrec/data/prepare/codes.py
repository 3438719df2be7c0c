# SPDX-License-Identifier: Apache-2.0
"""Numbers of values that come block by block, in the order of their first occurrence."""

import numpy as np
import polars as pl

_WIDE = 1 << 26  # the widest range of integers whose numbers stand in a table


class Codes:
    """int32 numbers from 0 of ids, Int64 or text. Integers are in a table by their value; text, and
    integers far apart, are joined with those that are known.

    Where text comes behind integers, these are text too: an integer has one spelling (`columns`).
    """

    def __init__(self) -> None:
        self.text = False
        self._low = 0
        self._table: np.ndarray | None = np.empty(0, dtype=np.int32)
        self._ids: list[pl.Series] = []  # end to end in the order of their numbers
        self._known: pl.DataFrame | None = None  # id, code, once there is no table
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, series: pl.Series) -> np.ndarray:
        """int32: the number of each value; there are no nulls."""
        if len(series) == 0:
            return np.empty(0, dtype=np.int32)
        if series.dtype == pl.String and not self.text:
            self.text, self._table = True, None
            self._ids = [part.cast(pl.String) for part in self._ids]
        series = series.cast(pl.String) if self.text else series
        if self._table is not None:
            values = series.to_numpy()
            low, high = int(values.min()), int(values.max())
            if self._count:
                low, high = min(low, self._low), max(high, self._low + len(self._table) - 1)
            if high - low < _WIDE:
                return self._looked_up(self._table, values, low, high)
            self._table = None
        return self._joined(series)

    def sorted(self) -> tuple[pl.Series, np.ndarray]:
        """(the ids in ascending order, int32 [N]: the place there of each number)."""
        ids = pl.concat(self._ids)
        order = ids.arg_sort().to_numpy()
        rank = np.empty(len(ids), dtype=np.int32)
        rank[order] = np.arange(len(ids), dtype=np.int32)
        return ids[order], rank

    def _looked_up(self, table: np.ndarray, values: np.ndarray, low: int, high: int) -> np.ndarray:
        if self._count == 0 or low < self._low or high >= self._low + len(table):
            grown = np.full(high - low + 1, -1, dtype=np.int32)
            if self._count:
                grown[self._low - low :][: len(table)] = table
            self._low, self._table, table = low, grown, grown
        codes = table[values - self._low]
        if (codes < 0).any():
            fresh = np.unique(values[codes < 0])
            table[fresh - self._low] = np.arange(len(fresh)) + self._count
            self._learn(pl.Series("id", fresh))
            codes = table[values - self._low]
        return codes

    def _joined(self, series: pl.Series) -> np.ndarray:
        if self._known is None or self._known.height < self._count:
            ids = pl.concat(self._ids) if self._ids else series.clear()
            self._known = pl.DataFrame({"id": ids, "code": np.arange(len(ids), dtype=np.int32)})
        if self._known["id"].dtype != series.dtype:
            self._known = self._known.with_columns(pl.col("id").cast(series.dtype))
        asked = series.to_frame("id")
        codes = asked.join(self._known, "id", "left", maintain_order="left")["code"]
        if codes.null_count():
            fresh = series.filter(codes.is_null()).unique().alias("id")
            numbers = np.arange(self._count, self._count + len(fresh), dtype=np.int32)
            self._learn(fresh)
            self._known = pl.concat([self._known, pl.DataFrame({"id": fresh, "code": numbers})])
            codes = asked.join(self._known, "id", "left", maintain_order="left")["code"]
        return codes.to_numpy()

    def _learn(self, fresh: pl.Series) -> None:
        self._ids.append(fresh.alias("id"))
        self._count += len(fresh)
        if self._count > np.iinfo(np.int32).max:
            raise OverflowError(f"{self._count:,} users or items: more than 2**31")


class Kinds:
    """int32 numbers of event types of any kind that is not nested; -1 for null."""

    def __init__(self) -> None:
        self._codes = Codes()
        self._values: list[pl.DataFrame] = []  # of each number, end to end

    def add(self, series: pl.Series) -> np.ndarray:
        """int32: the number of each value."""
        there = series.is_not_null().to_numpy()
        known = series.drop_nulls()
        text = known.bin.encode("hex") if known.dtype == pl.Binary else known.cast(pl.String)
        before = len(self._codes)
        codes = self._codes.add(text)
        fresh, where = np.unique(codes, return_index=True)
        self._values.append(known[where[fresh >= before]].to_frame("event_type"))
        made = np.full(len(series), -1, dtype=np.int32)
        made[there] = codes
        return made

    def values(self) -> pl.Series:
        """The value of each number."""
        return pl.concat(self._values, how="vertical_relaxed")["event_type"]
