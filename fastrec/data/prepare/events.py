# SPDX-License-Identifier: Apache-2.0
"""The events of a table: which rows are kept, and their columns checked and typed."""

from typing import Any

import numpy as np
import polars as pl

from fastrec.data.errors import DataError
from fastrec.data.prepare.codes import Codes
from fastrec.data.prepare.columns import NA, float_column, id_column
from fastrec.data.prepare.names import FLAGS, NONE, find_columns
from fastrec.data.prepare.raw import RawData
from fastrec.data.prepare.rows import Rows
from fastrec.data.prepare.sort import repeated, stable_order
from fastrec.data.prepare.times import Clock


class Events:
    """The events of a table that is read block by block.

    source: what errors call it. user, item, timestamp, rating, event_type: its columns; None
    recognises one by its name (`names`), "none" leaves out one of the last three. keep_events: only
    events of these types. ordered: each user's rows are oldest first; otherwise a timestamp is
    needed. on_missing ("error", "drop") is about rows without a user, item, timestamp or rating,
    on_duplicate ("error", "keep", "drop") about rows with the same user, item and timestamp; "drop"
    keeps the first. See `columns`, `times` and `epochs`.
    """

    def __init__(
        self,
        source,
        *,
        user: str | None = None,
        item: str | None = None,
        timestamp: str | None = None,
        rating: str | None = None,
        event_type: str | None = None,
        keep_events: list[str] | None = None,
        ids: str = "auto",
        na_values: str = "ask",
        time_format: str | None = None,
        time_unit: str | None = None,
        ordered: bool = False,
        on_missing: str = "error",
        on_duplicate: str = "error",
    ):
        if on_duplicate not in ("error", "keep", "drop"):
            raise ValueError(
                f"on_duplicate must be 'error', 'keep' or 'drop', got {on_duplicate!r}"
            )
        if on_missing not in ("error", "drop"):
            raise ValueError(f"on_missing must be 'error' or 'drop', got {on_missing!r}")
        self.source, self.ordered, self.on_duplicate = source, ordered, on_duplicate
        self._given = {"user": user, "item": item, "timestamp": timestamp, "rating": rating}
        self._given["event_type"] = event_type
        self._types = None if keep_events is None else [str(name) for name in keep_events]
        self._ids, self._na_values = ids, na_values
        self._on_missing = on_missing
        self._clock = Clock(time_format, time_unit)
        self._names: dict[str, str] = {}
        self._begin()

    def _begin(self) -> None:
        self._kinds = dict.fromkeys(("user", "item"), self._ids)  # of ids; "str" once one is text
        self._kept, self._of_other_types = 0, 0
        self._types_there: set[str] = set()
        self._lacking: dict[str, int] = {}  # rows without, by role
        self._first_lacking: tuple[str, Any, int] | None = None
        self._refused: DataError | None = None

    def typed(
        self, frame: pl.DataFrame, rows: Rows, header: bool = False
    ) -> tuple[pl.DataFrame, Rows] | None:
        """(user_id, item_id, and timestamp, rating, event_type where there are; `rows` of these) of
        a block; None where nothing of it is left. header: the names are the first line of a text
        file, for what an error suggests."""
        if not self._names:
            self._find(frame.columns, header)
        columns = {role: frame[name] for role, name in self._names.items()}
        if "event_type" in columns and columns["event_type"].dtype.is_nested():
            raise DataError(
                self.source, "types of events must be text or numbers, got"
                f" {columns['event_type'].dtype}: --event_type_column {NONE} leaves it out",
                column=self._names["event_type"],
            )  # fmt: skip
        columns, rows = _kept(columns, rows, self._of_types(columns.get("event_type")))
        if rows.count:
            columns, rows = _kept(columns, rows, self._present(columns, rows))
        self._kept += rows.count
        if rows.count == 0 or self._first_lacking or self._refused:
            return None
        try:
            return self._table(columns, rows), rows
        except DataError as error:
            if self._types is None:
                raise
            self._refused = error  # it may be that a type is wrong, which is said first
            return None

    def _find(self, there: list[str], header: bool) -> None:
        names, self.inferred = find_columns(self.source, there, self._given, header)
        time_format, time_unit = self._clock.settings
        if "timestamp" not in names:
            if not self.ordered:
                raise DataError(
                    self.source, "events have no time: name its column by --timestamp_column (there"
                    f" are {', '.join(there)}), or say --ordered true if each user's rows are"
                    " oldest first",
                )  # fmt: skip
            if time_format is not None or time_unit is not None:
                raise ValueError(
                    "--time_format and --time_unit have no effect without --timestamp_column"
                )
        self._hints = {
            role: f"; --{FLAGS[role]} {NONE} leaves it out"
            for role in ("timestamp", "rating")
            if FLAGS[role] in self.inferred and (role == "rating" or self.ordered)
        }
        self._names = names

    def _of_types(self, column: pl.Series | None) -> pl.Series | None:
        """Flags of the events of the types that are asked for; None for all."""
        if self._types is None:
            return None
        if column is None:
            raise ValueError("--keep_events has no effect without --event_type_column")
        text = column.cast(pl.String)
        self._types_there |= set(text.unique().drop_nulls().to_list())
        keep = text.is_in(self._types).fill_null(False)
        self._of_other_types += int((~keep).sum())
        return keep

    def _present(self, columns: dict[str, pl.Series], rows: Rows) -> pl.Series | None:
        """Flags of the rows that lack nothing; None if no row does."""
        present = None
        for role, series in columns.items():
            if series.dtype in (pl.Categorical, pl.Enum):
                series = series.cast(pl.String)
            missing = series.is_null()
            if series.dtype == pl.String:
                words = ["", *NA] if self._na_values == "missing" else [""]
                missing |= series.is_in(words).fill_null(False)
            elif series.dtype.is_float() and self._na_values == "missing":
                missing |= series.is_nan().fill_null(False)
            if role == "event_type" or not missing.any():
                continue
            if self._on_missing == "error" and self._first_lacking is None:
                self._first_lacking = role, *rows.place(int(missing.to_numpy().argmax()))
            fresh = missing if present is None else missing & present
            counted = missing if self._on_missing == "error" else fresh
            self._lacking[role] = self._lacking.get(role, 0) + int(counted.sum())
            present = ~missing if present is None else present & ~missing
        return present

    def _table(self, columns: dict[str, pl.Series], rows: Rows) -> pl.DataFrame:
        table, source = {}, self.source
        for role, kind in self._kinds.items():
            with rows.named():
                ids = id_column(source, columns[role], 0, kind, self._na_values)
            if kind == "auto" and ids.dtype == pl.String:
                self._kinds[role] = "str"
            table[f"{role}_id"] = ids
        if "timestamp" in columns:
            with rows.named(self._hints.get("timestamp", "")):
                table["timestamp"] = self._clock.read(source, columns["timestamp"], 0)
        if "rating" in columns:
            with rows.named(self._hints.get("rating", "")):
                table["rating"] = float_column(source, columns["rating"], 0)
        if "event_type" in columns:
            table["event_type"] = columns["event_type"]
        return pl.DataFrame({key: column.alias(key) for key, column in table.items()})

    def settled(self) -> bool:
        """Whether the blocks that were read are the events; False: they are to be read again.

        Raises DataError for what only all of them show.
        """
        unknown = [kind for kind in self._types or [] if kind not in self._types_there]
        if self._types is not None and (unknown or not self._types):
            there = sorted(self._types_there)
            raise DataError(
                self.source, f"no event is of type {', '.join(map(repr, unknown))}; there are "
                f"{', '.join(there[:20])}{' ..' if len(there) > 20 else ''}",
                column=self._names["event_type"],
            )  # fmt: skip
        if self._first_lacking is not None:
            role, file, row = self._first_lacking
            count = self._lacking[role]
            where = "here alone" if count == 1 else f"in {count:,} rows"
            raise DataError(
                file, f"value is missing, {where}: --on_missing drop removes such rows",
                column=self._names[role], row=row,
            )  # fmt: skip
        if self._refused is not None:
            raise self._refused
        if self._kept == 0:
            raise DataError(
                self.source, "no row is left that has a user, an item and what else is read"
            )
        if "timestamp" not in self._names:
            if self.on_duplicate != "error":
                raise ValueError(
                    "--on_duplicate has no effect without times: a repeated item is another visit"
                )
        elif not self._clock.settled(self.source):
            self._begin()
            return False
        elif self._clock.unit is not None:
            self.inferred |= {"time_unit": self._clock.unit}
        return True

    @property
    def time(self) -> str:
        """What a timestamp counts."""
        return self._clock.word

    @property
    def removed(self) -> dict[str, int]:
        """How many rows an option dropped, by reason."""
        removed = {}
        if self._of_other_types:
            what = f"{self._names['event_type']} is not {' or '.join(self._types or [])}"
            removed[f"interactions whose {what}"] = self._of_other_types
        for role in self._names:
            if self._lacking.get(role):
                removed[f"interactions without {self._names[role]}"] = self._lacking[role]
        return removed

    def falls(self, rows: Rows, place: int, user, time: int) -> DataError:
        """The error for the first event of a user that is earlier than the one before."""
        file, row = rows.place(place)
        return DataError(
            file, f"user {user}: time goes back to {time} in a file that is said to be in order"
            + self._hints.get("timestamp", ""), column=self._names["timestamp"], row=row,
        )  # fmt: skip


def duplicate(rows: Rows, place: int, first: int, event: tuple, count: int) -> DataError:
    """The error for the first of `count` events that stand there before, at `first`. event: user,
    item and timestamp."""
    file, row = rows.place(place)
    before, earlier = rows.place(first)
    where = f"row {earlier}" if before == file else f"row {earlier} of {before}"
    return DataError(
        file, "duplicate event: user {}, item {}, timestamp {}".format(*event)
        + f", first in {where}; {count:,} in all (--on_duplicate keep or drop accepts them)",
        row=row,
    )  # fmt: skip


def events_of(
    source, frame: pl.DataFrame, rows: Rows, *, header: bool = False, **options
) -> RawData:
    """The events of a table in memory, in its order. header, options: see `Events`.

    Events are checked for `ordered` and for duplicates, by their timestamps.
    """
    reader = Events(source, **options)
    made = reader.typed(frame, rows, header)
    reader.settled()  # a single block always is, or it raises, also where nothing of it is left
    assert made is not None
    events, rows = made
    removed = reader.removed
    if "timestamp" in events.columns:
        if reader.ordered:
            _check_order(events, rows, reader)
        events = _without_duplicates(events, rows, reader.on_duplicate, removed)
    return RawData(
        str(source), events, ordered=reader.ordered, time=reader.time, removed=removed,
        inferred=reader.inferred,
    )  # fmt: skip


def _kept(
    columns: dict[str, pl.Series], rows: Rows, keep: pl.Series | None
) -> tuple[dict[str, pl.Series], Rows]:
    if keep is None or keep.all():
        return columns, rows
    return {role: series.filter(keep) for role, series in columns.items()}, rows.keep(keep)


def _check_order(events: pl.DataFrame, rows: Rows, reader: Events) -> None:
    earlier = pl.col("timestamp") < pl.col("timestamp").shift(1).over("user_id")
    back = events.select(earlier).to_series().fill_null(False).to_numpy()
    if back.any():
        place = int(back.argmax())
        raise reader.falls(rows, place, events["user_id"][place], events["timestamp"][place])


def _without_duplicates(
    events: pl.DataFrame, rows: Rows, on_duplicate: str, removed: dict[str, int]
) -> pl.DataFrame:
    if on_duplicate == "keep":
        return events
    user, item = (
        events[name].to_numpy() if events[name].dtype == pl.Int64 else Codes().add(events[name])
        for name in ("user_id", "item_id")
    )
    time = events["timestamp"].to_numpy()
    later, _, first = repeated(user, item, time, stable_order([time, user]))
    if len(later) == 0:
        return events
    if on_duplicate == "drop":
        removed["duplicate events"] = len(later)
        keep = np.ones(events.height, dtype=bool)
        keep[later] = False
        return events.filter(pl.Series(keep))
    place = int(later.min())
    before = int(first[later.argmin()])
    event = events.select("user_id", "item_id", "timestamp").row(place)
    raise duplicate(rows, place, before, event, len(later))
