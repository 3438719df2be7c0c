"""Readers: each returns a `RawData` with original ids, in the order of the file.

Nothing is dropped silently and nothing is sorted here. Rows of errors are 1-based lines (a header
counts). Files ending in .gz are gunzipped. A file is read whole into memory.

A duplicate is an event with the same user, item and timestamp as an earlier one. Formats without
timestamps have none: there a repeated item is another visit, as in the S3-Rec files.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastrec.data.errors import DataError, reading
from fastrec.data.event_columns import SOURCE
from fastrec.data.prepare import tables
from fastrec.data.prepare.columns import check_unique, first_row, id_column, integers
from fastrec.data.prepare.side_tables import read_attributes, read_relations
from fastrec.data.prepare.text import read_delimited, read_fields

if TYPE_CHECKING:
    import polars as pl


@dataclass
class RawData:
    """What a reader returns.

    interactions: user_id, item_id (Int64 or String), and timestamp (Int64), rating (Float32),
    event_type where the source has them. users: user_id, attributes. items: item_id, attributes.
    relations: user_id, friend_id. ordered: each user's rows are oldest first and must not be
    sorted. time: what a timestamp counts. removed: how many rows an option of the reader dropped,
    by reason.
    """

    source: str
    interactions: "pl.DataFrame"
    users: "pl.DataFrame | None" = None
    items: "pl.DataFrame | None" = None
    relations: "pl.DataFrame | None" = None
    ordered: bool = False
    time: str = SOURCE
    removed: dict[str, int] = field(default_factory=dict)


def read_s3rec(file, item_attributes=None) -> RawData:
    """S3-Rec text: one `user item item ...` a line, oldest first; ids are integers.

    item_attributes: JSON `{"item": [attribute ids]}`; becomes the list column `attributes` of
    `items`, each attribute once, in the order of its first occurrence.
    """
    import polars as pl

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
    import polars as pl

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
    file,
    *,
    user: str = "user_id",
    item: str = "item_id",
    timestamp: str | None = None,
    rating: str | None = None,
    event_type: str | None = None,
    separator: str | None = None,
    ids: str = "auto",
    na_values: str = "ask",
    time_format: str | None = None,
    ordered: bool = False,
    on_duplicate: str = "error",
) -> RawData:
    """A csv, tsv, Parquet or JSON-lines file whose columns are named by the arguments.

    Without a `timestamp` column the file must be in order (ordered=True). ids: "auto" takes ids as
    integers where all are, "int" demands it, "str" keeps text. Times may be integers, dates, ISO
    text or other text by time_format. Covers MovieLens csv, the Yelp open dataset and Amazon
    reviews as JSON lines. Other arguments: `tables.interactions_of`.
    """
    frame, first = tables.read_frame(file, separator=separator)
    interactions, time, removed = tables.interactions_of(
        file, frame, first, user=user, item=item, timestamp=timestamp, rating=rating,
        event_type=event_type, ids=ids, na_values=na_values, time_format=time_format,
        ordered=ordered, on_duplicate=on_duplicate,
    )  # fmt: skip
    return RawData(str(file), interactions, ordered=ordered, time=time, removed=removed)


def read_recbole(
    source,
    *,
    ids: str = "auto",
    na_values: str = "ask",
    time_format: str | None = None,
    ordered: bool = False,
    on_duplicate: str = "error",
) -> RawData:
    """RecBole atomic files: a .inter file, or a directory that holds one.

    The files of the same name ending in .user, .item and .net become users, items and relations.
    Uses the columns user_id, item_id and, where present, rating and timestamp.
    """
    file = _one_file(source, ".inter")
    frame, first = tables.recbole_columns(file, time="timestamp")
    optional = {name: name for name in ("rating", "timestamp") if name in frame.columns}
    interactions, time, removed = tables.interactions_of(
        file, frame, first, user="user_id", item="item_id", ids=ids, na_values=na_values,
        time_format=time_format, ordered=ordered, on_duplicate=on_duplicate, **optional,
    )  # fmt: skip
    stem = file.name.removesuffix(".gz").removesuffix(".inter")
    users, items = interactions["user_id"], interactions["item_id"]
    return RawData(
        str(file),
        interactions,
        users=_beside(file, f"{stem}.user", _attributes("user_id", users, na_values)),
        items=_beside(file, f"{stem}.item", _attributes("item_id", items, na_values)),
        relations=_beside(file, f"{stem}.net", lambda f: read_relations(f, users, na_values)),
        ordered=ordered,
        time=time,
        removed=removed,
    )


def _attributes(key: str, like, na_values: str = "text"):
    return lambda file: read_attributes(file, key, like=like, na_values=na_values)


def read_movielens_1m(source, *, on_duplicate: str = "error") -> RawData:
    """MovieLens-1M: ratings.dat or its directory; users.dat and movies.dat beside it are used."""
    file = _one_file(source, "ratings.dat")
    frame = read_delimited(file, "::", ["user", "item", "rating", "timestamp"], "latin-1")
    raw = _movielens(file, frame, on_duplicate)
    users, items = (raw.interactions[name] for name in ("user_id", "item_id"))
    raw.users = _beside(file, "users.dat", _attributes("user_id", users))
    raw.items = _beside(file, "movies.dat", _attributes("item_id", items))
    return raw


def read_movielens_100k(source, *, on_duplicate: str = "error") -> RawData:
    """MovieLens-100K: u.data or its directory; u.user and u.item beside it are used."""
    file = _one_file(source, "u.data")
    frame = read_delimited(file, "\t", ["user", "item", "rating", "timestamp"])
    raw = _movielens(file, frame, on_duplicate)
    raw.users, raw.items = (
        _beside(file, "u.user", _read_u_user), _beside(file, "u.item", _read_u_item)
    )  # fmt: skip
    return raw


def _movielens(file, frame, on_duplicate: str) -> RawData:
    interactions, time, removed = tables.interactions_of(
        file, frame, 1, user="user", item="item", timestamp="timestamp", rating="rating",
        ids="int", on_duplicate=on_duplicate,
    )  # fmt: skip
    return RawData(str(file), interactions, time=time, removed=removed)


def _read_u_user(file):
    frame = read_delimited(file, "|", ["user_id", "age", "gender", "occupation", "zip_code"])
    frame = frame.with_columns(id_column(file, frame["user_id"], 1, "int"))
    check_unique(file, frame["user_id"], 1)
    return frame.with_columns(_integers_or_null(file, frame["age"]))


def _read_u_item(file):
    import polars as pl

    names = ["item_id", "title", "release_date", "video_release_date", "url"]
    names += [f"genre_{number}" for number in range(19)]
    frame = read_delimited(file, "|", names, "latin-1")
    frame = frame.with_columns(id_column(file, frame["item_id"], 1, "int"))
    check_unique(file, frame["item_id"], 1)
    for name in names[5:]:
        bad = first_row(~frame[name].is_in(["0", "1"]).fill_null(False), 1)
        if bad is not None:
            raise DataError(file, "expected 0 or 1", column=name, row=bad)
    flags = frame.select(names[5:]).to_numpy() == "1"
    genres = [np.flatnonzero(row).tolist() for row in flags]
    return frame.select("item_id", "title", "release_date").with_columns(
        pl.Series("genres", genres, dtype=pl.List(pl.Int64))
    )


def _integers_or_null(file, series):
    numbers = integers(series)
    row = first_row(numbers.is_null() & series.is_not_null(), 1)
    if row is not None:
        raise DataError(
            file, f"expected an integer, got {series[row - 1]!r}", column=series.name, row=row
        )
    return numbers


def _one_file(source, name: str) -> Path:
    source = Path(source)
    if not source.is_dir():
        return source
    found = sorted(f for f in source.iterdir() if f.name.removesuffix(".gz").endswith(name))
    if len(found) != 1:
        raise DataError(source, f"expected one file *{name}, found {len(found)}")
    return found[0]


def _beside(file: Path, name: str, reader):
    found = [f for f in (file.with_name(name), file.with_name(f"{name}.gz")) if f.exists()]
    return reader(found[0]) if found else None


FORMATS: dict[str, Callable[..., RawData]] = {
    "s3rec": read_s3rec,
    "pairs": read_pairs,
    "movielens-1m": read_movielens_1m,
    "movielens-100k": read_movielens_100k,
    "recbole": read_recbole,
    "table": read_table,
}


def read(source, format: str, **options) -> RawData:
    """Read `source` with the reader of FORMATS[format]; `options` are its arguments."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {sorted(FORMATS)}, got {format!r}")
    with reading(source):
        return FORMATS[format](source, **options)
