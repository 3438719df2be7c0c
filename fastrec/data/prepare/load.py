# SPDX-License-Identifier: Apache-2.0
"""The events of the sources of `prepare`, read block by block into a `Store`, checked and sorted.

A table is never in memory as a whole. Other formats are read by their readers first.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from fastrec.data.errors import DataError, reading
from fastrec.data.prepare import store as storage
from fastrec.data.prepare.ahead import ahead
from fastrec.data.prepare.codes import Codes, Kinds
from fastrec.data.prepare.events import Events, duplicate
from fastrec.data.prepare.raw import RawData
from fastrec.data.prepare.rows import Rows
from fastrec.data.prepare.sort import Checks, Found, sorted_by_user
from fastrec.data.prepare.sources import name_of, read_blocks
from fastrec.data.prepare.store import Store

_HEAD = 1000  # events that are kept to show the first ones
_TWICE = ": --on_duplicate keep accepts them, drop removes them from the later file"
_DTYPES = {
    "user": np.int32, "item": np.int32, "timestamp": np.int64, "rating": np.float32,
    "event_type": np.int32, "part": np.uint8, "row": np.int64,
}  # fmt: skip


class Part:
    """One source of `prepare`. `rows`: where the rows that were read stand."""

    def __init__(self, source, options: dict):
        self.raw = source if isinstance(source, RawData) else None
        self.rows = Rows([])
        if self.raw is None:
            text = {"separator", "columns", "encoding"}
            self._source = source
            self._text = {name: options[name] for name in options.keys() & text}
            rest = {name: options[name] for name in options.keys() - text}
            self.table = Events(name_of(source), **rest)

    def blocks(self) -> Iterator[tuple[pl.DataFrame, np.ndarray]]:
        """(events as `RawData.interactions`, int64 places of its rows) of each block."""
        if self.raw is not None:
            events = self.raw.interactions
            for start in range(0, events.height, storage.CHUNK):
                block = events[start : start + storage.CHUNK]
                yield block, np.arange(start, start + block.height)
            return
        read, before = [], 0
        for frame, file, first in ahead(read_blocks(self._source, **self._text)):
            here = Rows([(file, first, frame.height)])
            made = self.table.typed(frame, here, header=first == 2)
            if made is not None:
                events, rows = made
                kept = np.arange(frame.height) if rows.kept is None else rows.kept
                yield events, before + kept
            before += frame.height
            read.append((file, first, frame.height))
        self.rows = Rows.of_blocks(read)

    @property
    def name(self) -> str:
        """What errors call it."""
        return str(name_of(self._source)) if self.raw is None else self.raw.source

    def settled(self) -> bool:
        """Whether the blocks need not be read again, see `Events.settled`."""
        return self.raw is not None or self.table.settled()

    def said(self) -> RawData:
        """What the source is, without its events."""
        if self.raw is not None:
            return self.raw
        table = self.table
        return RawData(
            str(table.source), pl.DataFrame(), ordered=table.ordered, time=table.time,
            removed=table.removed, inferred=table.inferred,
        )  # fmt: skip


@dataclass
class Loaded:
    """events: a `Store` of user and item (places in `user_ids`, `item_ids`), part, and timestamp,
    rating and event_type (places in `kinds`) where there are, in the order of a data set.

    raw: what the source is, its first events alone. user_ids, item_ids: ascending.
    parts: whether there are files of validation and test.
    """

    raw: RawData
    events: Store
    user_ids: pl.Series
    item_ids: pl.Series
    kinds: pl.Series | None
    parts: bool


def load_events(sources: list, options: dict, folder: Path, on_duplicate: str) -> Loaded:
    """Read `sources` (tables and RawData) end to end; `folder` holds the events.

    options: of a table, see `readers.read_table`. on_duplicate: what to do with an event that
    stands in a table before, or in an earlier source.

    Raises DataError for what the readers do not take, for sources whose columns, types of ids or
    times differ, and for duplicates.
    """
    parts = [Part(source, options) for source in sources]
    reader = _Reader(folder / "read")
    said: list[RawData] = []
    for number, part in enumerate(parts):
        with reading(part.name):
            reader.read(part, number, said)
            said.append(part.said())
            schema = reader.schemas[number]
            _check_alike(said[0], said[number], reader.schemas[0], schema)
    first = said[0]
    if reader.store is None:
        raise DataError(first.source, "a dataset needs at least one interaction")
    removed: dict[str, int] = {}
    for each in said:
        for reason, count in each.removed.items():
            removed[reason] = removed.get(reason, 0) + count
    user_ids, user = reader.users.sorted()
    item_ids, item = reader.items.sorted()
    timed, tables = "timestamp" in reader.store.dtypes, any(part.raw is None for part in parts)
    checks = Checks(
        order=timed and tables and first.ordered,
        repeated=timed and (tables or len(parts) > 1) and on_duplicate != "keep",
        drop=on_duplicate == "drop",
    )
    if not (first.ordered or timed):
        raise DataError(
            first.source, "events without times need a source that is in order (--ordered true)",
            column="timestamp",
        )  # fmt: skip
    events = sorted_by_user(reader.store, folder / "sorted", user, item, first.ordered, checks)
    _judge(checks, parts, user_ids, item_ids, removed)
    head = reader.first_events()
    if checks.drop and timed:
        head = head.unique(["user_id", "item_id", "timestamp"], keep="first", maintain_order=True)
    raw = replace(first, interactions=head, removed=removed)
    kinds = reader.kinds.values() if "event_type" in events.dtypes else None
    return Loaded(raw, events, user_ids, item_ids, kinds, len(parts) > 1)


class _Reader:
    """Puts blocks of events into a `Store`. schemas: polars types of the columns, by source."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.store: Store | None = None
        self.users, self.items, self.kinds = Codes(), Codes(), Kinds()
        self.schemas: list[dict] = []
        self._head: list[pl.DataFrame] = []

    def read(self, part: Part, number: int, said: list[RawData]) -> None:
        start, head, settled = (
            0 if self.store is None else self.store.height,
            len(self._head),
            False,
        )
        while not settled:
            schema: dict = {}
            for frame, rows in ahead(part.blocks()):
                schema = _wider(schema, dict(frame.schema))
                if said and schema.keys() != self.schemas[0].keys():
                    _check_alike(said[0], part.said(), self.schemas[0], schema)
                self._append(frame, rows, number)
            settled = part.settled()
            if not settled and self.store is not None:
                self.store.height, self._head = start, self._head[:head]
        self.schemas.append(schema)

    def _append(self, frame: pl.DataFrame, rows: np.ndarray, number: int) -> None:
        columns = {
            "user": self.users.add(frame["user_id"]),
            "item": self.items.add(frame["item_id"]),
            "part": np.full(frame.height, number),
            "row": rows,
        }
        for name in ("timestamp", "rating"):
            if name in frame.columns:
                columns[name] = frame[name].to_numpy()
        if "event_type" in frame.columns:
            columns["event_type"] = self.kinds.add(frame["event_type"])
        if self.store is None:
            self.store = Store(self.folder, {name: _DTYPES[name] for name in columns})
        self.store.append(columns)
        if sum(each.height for each in self._head) < _HEAD:
            self._head.append(frame.head(_HEAD).clone())

    def first_events(self) -> pl.DataFrame:
        """Some of the first events."""
        head = pl.concat(self._head, how="vertical_relaxed")
        texts = {"user_id": self.users.text, "item_id": self.items.text}
        return head.with_columns(pl.col(name).cast(pl.String) for name in texts if texts[name])


def _wider(schema: dict, other: dict) -> dict:
    """The types of two blocks: ids are text where one has text."""
    texts = {
        name: pl.String for name in ("user_id", "item_id") if pl.String in
        (schema.get(name), other.get(name))
    }  # fmt: skip
    return other | texts


def _judge(
    checks: Checks, parts: list[Part], user_ids: pl.Series, item_ids: pl.Series, removed: dict
) -> None:
    """Raise for what `sorted_by_user` found, or count what it dropped."""

    def event(found: Found, number: int) -> tuple:
        user, item, time = found.rows[number][2]
        return user_ids[user], item_ids[item], time

    within, across = checks.within, checks.across
    for number, part in enumerate(parts):
        if part.raw is not None:  # its reader has looked at it: here it counts like another file
            if number in within.counts:
                across.counts[number] = across.counts.get(number, 0) + within.counts.pop(number)
                mine = within.rows.pop(number)
                across.rows[number] = min(across.rows.get(number, mine), mine)
            continue
        if number in checks.falls.rows:
            row, *_ = checks.falls.rows[number]
            user, _, time = event(checks.falls, number)
            raise part.table.falls(part.rows, row, user, time)
        if number in within.rows and not checks.drop:
            row, first, _ = within.rows[number]
            raise duplicate(part.rows, row, first, event(within, number), within.counts[number])
    counts = {"duplicate events": within, "events that stand in an earlier file": across}
    if checks.drop:
        for reason, found in counts.items():
            if found.counts:
                removed[reason] = removed.get(reason, 0) + sum(found.counts.values())
    elif across.rows:
        number = min(across.rows)
        said = "user {}, item {}, timestamp {}".format(*event(across, number))
        raise DataError(
            parts[number].name, f"{sum(across.counts.values()):,} events stand in an earlier file"
            f" too, the first is {said}{_TWICE}",
        )  # fmt: skip


def _check_alike(first: RawData, other: RawData, ours: dict, theirs: dict) -> None:
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs:
            lacks, has = (other, first) if name in ours else (first, other)
            raise DataError(lacks.source, f"has no {name}, {has.source} has")
        if ours[name] != theirs[name]:
            hint = ": --ids str reads both as text" if name in ("user_id", "item_id") else ""
            raise DataError(
                other.source, f"{name} is {theirs[name]}, that of {first.source} {ours[name]}{hint}"
            )
    if "timestamp" in ours and first.time != other.time:
        raise DataError(
            other.source, f"times are {other.time}, those of {first.source} {first.time}:"
            " --time_unit says what numbers count, and one fraction of a second in a file makes"
            " all of its times finer: write those of all files with as many digits",
        )  # fmt: skip
    if first.ordered != other.ordered:
        raise ValueError(f"{first.source} and {other.source}: either both are in order, or none")
