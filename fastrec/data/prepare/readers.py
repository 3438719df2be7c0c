# SPDX-License-Identifier: Apache-2.0
"""Readers: each returns a `RawData` with original ids, in the order of the file.

Nothing is dropped silently and nothing is sorted here. Rows of errors are 1-based lines (a header
counts). Files ending in .gz are gunzipped. What a reader returns is in memory; `prepare` reads
tables block by block instead (`load`).

A duplicate is an event with the same user, item and timestamp as an earlier one. Formats without
timestamps have none: there a repeated item is another visit, as in the S3-Rec files.
"""

from collections.abc import Callable
from itertools import chain

import numpy as np
import polars as pl

from fastrec.data.errors import DataError, reading
from fastrec.data.prepare import tables
from fastrec.data.prepare.columns import check_unique, first_row, id_column, integers
from fastrec.data.prepare.events import events_of
from fastrec.data.prepare.histories import read_histories
from fastrec.data.prepare.movielens import (
    attributes,
    beside,
    one_file,
    read_movielens_1m,
    read_movielens_100k,
)
from fastrec.data.prepare.names import FLAGS, NONE
from fastrec.data.prepare.raw import RawData
from fastrec.data.prepare.rows import Rows
from fastrec.data.prepare.side_tables import read_attributes, read_relations
from fastrec.data.prepare.sources import is_frame, name_of, read_source
from fastrec.data.text_files import read_fields


def read_s3rec(file, item_attributes=None) -> RawData:
    """S3-Rec text: one `user item item ...` a line, oldest first; ids are integers.

    item_attributes: JSON `{"item": [attribute ids]}`; becomes the list column `attributes` of
    `items`, each attribute once, in the order of its first occurrence.
    """
    lines = read_fields(file)
    lengths = np.fromiter(map(len, lines), dtype=np.int64, count=len(lines))
    row = first_row(lengths < 2, 1)
    if row is not None:
        raise DataError(file, "expected `user item item ...`", row=row)
    tokens = pl.Series("item", list(chain.from_iterable(lines)), dtype=pl.String)
    line_of = np.repeat(np.arange(len(lines)), lengths)
    ids = integers(tokens)
    bad = first_row((ids.is_null() | (ids < 0).fill_null(False)).to_numpy(), 0)
    starts = np.cumsum(lengths) - lengths
    if bad is not None:
        row = int(line_of[bad])
        column = "user" if bad == starts[row] else "item"
        raise DataError(
            file, f"expected an id (an integer, not negative), got {tokens[bad]!r}",
            column=column, row=row + 1,
        )  # fmt: skip
    numbers = ids.to_numpy()
    users = numbers[starts]
    check_unique(file, pl.Series("user", users), 1)
    interactions = pl.DataFrame(
        {"user_id": np.repeat(users, lengths - 1), "item_id": np.delete(numbers, starts)}
    )
    items = None if item_attributes is None else read_attributes(item_attributes, "item_id")
    return RawData(str(file), interactions, items=items, ordered=True)


def read_pairs(file) -> RawData:
    """One `user item` pair a line, each user's oldest first (the ml-1m.txt of SASRec)."""
    lines = read_fields(file)
    for row, fields in enumerate(lines, 1):
        if len(fields) != 2:
            raise DataError(file, f"expected `user item`, got {' '.join(fields)!r}", row=row)
    columns = [
        id_column(file, pl.Series(name, ids, dtype=pl.String), 1, "int").alias(f"{name}_id")
        for name, ids in zip(("user", "item"), zip(*lines, strict=True), strict=True)
    ]
    return RawData(str(file), pl.DataFrame(columns), ordered=True)


def read_table(
    source,
    *,
    separator: str | None = None,
    columns: list[str] | None = None,
    encoding: str | None = None,
    **options,
) -> RawData:
    """Delimited text, Parquet or JSON, a folder of part files, or a data frame.

    separator, columns, encoding: how text is written, see `tables.read_frame`. options: which
    columns hold what and how they are read, see `events.events_of`. Without a column of times the
    source must be in order (ordered=True).
    """
    frame, rows = read_source(source, separator=separator, columns=columns, encoding=encoding)
    return events_of(name_of(source), frame, rows, header=rows.first == 2, **options)


def read_recbole(source, **options) -> RawData:
    """RecBole atomic files: a .inter file, or a directory that holds one.

    The files of the same name ending in .user, .item and .net become users, items and relations.
    Uses the columns user_id, item_id and, where present, rating and timestamp. options: of
    `events.events_of`, but for the names of columns.
    """
    file = one_file(source, ".inter")
    frame, first = tables.recbole_columns(file, time="timestamp")
    rating, timestamp = (
        name if name in frame.columns else NONE for name in ("rating", "timestamp")
    )
    raw = events_of(
        file, frame, Rows([(file, first, frame.height)]), user="user_id", item="item_id",
        timestamp=timestamp, rating=rating, event_type=NONE, **options,
    )  # fmt: skip
    stem = file.name.removesuffix(".gz").removesuffix(".inter")
    users, items = raw.interactions["user_id"], raw.interactions["item_id"]
    na_values = options.get("na_values", "ask")
    raw.users = beside(file, f"{stem}.user", attributes("user_id", users, na_values))
    raw.items = beside(file, f"{stem}.item", attributes("item_id", items, na_values))
    raw.relations = beside(file, f"{stem}.net", lambda f: read_relations(f, users, na_values))
    return raw


EVENTS = {"ids", "na_values", "time_format", "time_unit", "ordered", "on_missing", "on_duplicate"}
TEXT = {"separator", "columns", "encoding"}
NAMES = {"user", "item", "timestamp", "rating", "event_type", "keep_events"}
FORMATS: dict[str, Callable[..., RawData]] = {
    "s3rec": read_s3rec,
    "pairs": read_pairs,
    "movielens-1m": read_movielens_1m,
    "movielens-100k": read_movielens_100k,
    "recbole": read_recbole,
    "table": read_table,
    "histories": read_histories,
}
# The settings that each takes: another one would have no effect, and is an error.
OPTIONS: dict[str, set[str]] = {
    "s3rec": {"item_attributes"},
    "pairs": set(),
    "movielens-1m": {"on_duplicate"},
    "movielens-100k": {"on_duplicate"},
    "recbole": EVENTS,
    "table": EVENTS | TEXT | NAMES,
    "histories": TEXT | {"user", "history", "ids", "na_values", "on_missing", "on_duplicate"},
}


def read(source, format: str, **options) -> RawData:
    """Read `source` with the reader of FORMATS[format]; `options` are its arguments."""
    check_options(source, format, options)
    with reading(name_of(source)):
        return FORMATS[format](source, **options)


def check_options(source, format: str, options: dict) -> None:
    """Raise ValueError for a setting that has no effect on the format."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {sorted(FORMATS)}, got {format!r}")
    for name in sorted(options.keys() - OPTIONS[format]):
        raise ValueError(f"--{FLAGS.get(name, name)} has no effect on --format {format}")
    for name in ("columns", "keep_events"):
        if isinstance(options.get(name), str):
            raise ValueError(f"{name} must be a list of names, got {options[name]!r}")
    if is_frame(source) and format not in ("table", "histories"):
        raise ValueError(f"--format {format} is a kind of file, not of a data frame")
