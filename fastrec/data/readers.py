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

from fastrec.data import tables
from fastrec.data.errors import DataError
from fastrec.data.text import check_unique, first_row, id_column, read_delimited, read_lines

if TYPE_CHECKING:
    import polars as pl


@dataclass
class RawData:
    """What a reader returns.

    interactions: user_id, item_id (Int64 or String), and timestamp (Int64), rating (Float32),
    event_type where the source has them. users: user_id, attributes. items: item_id, attributes.
    relations: user_id, friend_id. ordered: each user's rows are oldest first and must not be
    sorted. removed: how many rows an option of the reader dropped, by reason.
    """

    source: str
    interactions: "pl.DataFrame"
    users: "pl.DataFrame | None" = None
    items: "pl.DataFrame | None" = None
    relations: "pl.DataFrame | None" = None
    ordered: bool = False
    removed: dict[str, int] = field(default_factory=dict)


def read_s3rec(file, item_attributes=None) -> RawData:
    """S3-Rec text: one `user item item ...` a line, oldest first; ids are integers.

    item_attributes: JSON `{"item": [attribute ids]}`; becomes the list column `attributes` of
    `items`, each attribute once, in the order of its first occurrence.
    """
    import polars as pl

    lines = [line.split() for line in read_lines(file)]
    lengths = np.fromiter(map(len, lines), dtype=np.int64, count=len(lines))
    row = first_row(lengths < 2, 1)
    if row is not None:
        raise DataError(file, "expected `user item item ...`", row=row)
    tokens = pl.Series("item", list(chain.from_iterable(lines)), dtype=pl.String)
    line_of = np.repeat(np.arange(len(lines)), lengths)
    ids = tokens.cast(pl.Int64, strict=False)
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
    items = None if item_attributes is None else tables.read_attributes(item_attributes, "item_id")
    return RawData(str(file), interactions, items=items, ordered=True)


def read_pairs(file) -> RawData:
    """One `user item` pair a line, each user's oldest first (the ml-1m.txt of SASRec)."""
    import polars as pl

    lines = read_lines(file)
    fields = pl.Series("line", lines).str.strip_chars().str.extract_all(r"\S+")
    row = first_row((fields.list.len() != 2).to_numpy(), 1)
    if row is not None:
        raise DataError(file, f"expected `user item`, got {lines[row - 1]!r}", row=row)
    columns = [
        id_column(file, fields.list.get(place).alias(name), 1, "int").alias(f"{name}_id")
        for place, name in enumerate(("user", "item"))
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
    ordered: bool = False,
    on_duplicate: str = "error",
) -> RawData:
    """A csv, tsv, Parquet or JSON-lines file whose columns are named by the arguments.

    Without a `timestamp` column the file must be in order (ordered=True). ids: "auto" takes ids as
    integers where all are, "int" demands it, "str" keeps text. Times may be integers, dates or ISO
    text. Covers MovieLens csv, the Yelp open dataset and Amazon reviews as JSON lines. Other
    arguments: `tables.interactions_of`.
    """
    frame, first = tables.read_frame(file, separator=separator)
    interactions, removed = tables.interactions_of(
        file, frame, first, user=user, item=item, timestamp=timestamp, rating=rating,
        event_type=event_type, ids=ids, ordered=ordered, on_duplicate=on_duplicate,
    )  # fmt: skip
    return RawData(str(file), interactions, ordered=ordered, removed=removed)


def read_recbole(
    source, *, ids: str = "auto", ordered: bool = False, on_duplicate: str = "error"
) -> RawData:
    """RecBole atomic files: a .inter file, or a directory that holds one.

    The files of the same name ending in .user, .item and .net become users, items and relations.
    Uses the columns user_id, item_id and, where present, rating and timestamp.
    """
    file = _one_file(source, ".inter")
    frame, first = tables.recbole_columns(file)
    optional = {name: name for name in ("rating", "timestamp") if name in frame.columns}
    if "timestamp" not in optional and not ordered:
        raise DataError(
            file, "column is missing and ordered=True was not given", column="timestamp"
        )
    interactions, removed = tables.interactions_of(
        file, frame, first, user="user_id", item="item_id", ids=ids, ordered=ordered,
        on_duplicate=on_duplicate, **optional,
    )  # fmt: skip
    stem = file.name.removesuffix(".gz").removesuffix(".inter")
    return RawData(
        str(file),
        interactions,
        users=_beside(file, f"{stem}.user", lambda f: tables.read_attributes(f, "user_id")),
        items=_beside(file, f"{stem}.item", lambda f: tables.read_attributes(f, "item_id")),
        relations=_beside(file, f"{stem}.net", tables.read_relations),
        ordered=ordered,
        removed=removed,
    )


def read_movielens_1m(source, *, on_duplicate: str = "error") -> RawData:
    """MovieLens-1M: ratings.dat or its directory; users.dat and movies.dat beside it are used."""
    file = _one_file(source, "ratings.dat")
    frame = read_delimited(file, "::", ["user", "item", "rating", "timestamp"], "latin-1")
    return _movielens(
        file, frame, on_duplicate,
        users=_beside(file, "users.dat", lambda f: tables.read_attributes(f, "user_id")),
        items=_beside(file, "movies.dat", lambda f: tables.read_attributes(f, "item_id")),
    )  # fmt: skip


def read_movielens_100k(source, *, on_duplicate: str = "error") -> RawData:
    """MovieLens-100K: u.data or its directory; u.user and u.item beside it are used."""
    file = _one_file(source, "u.data")
    frame = read_delimited(file, "\t", ["user", "item", "rating", "timestamp"])
    return _movielens(
        file, frame, on_duplicate,
        users=_beside(file, "u.user", _read_u_user), items=_beside(file, "u.item", _read_u_item),
    )  # fmt: skip


def _movielens(file, frame, on_duplicate: str, users, items) -> RawData:
    interactions, removed = tables.interactions_of(
        file, frame, 1, user="user", item="item", timestamp="timestamp", rating="rating",
        ids="int", on_duplicate=on_duplicate,
    )  # fmt: skip
    return RawData(str(file), interactions, users=users, items=items, removed=removed)


def _read_u_user(file):
    frame = read_delimited(file, "|", ["user_id", "age", "gender", "occupation", "zip_code"])
    frame = frame.with_columns(id_column(file, frame["user_id"], 1, "int"))
    check_unique(file, frame["user_id"], 1)
    return frame.with_columns(frame["age"].cast(int, strict=False))


def _read_u_item(file):
    import polars as pl

    names = ["item_id", "title", "release_date", "video_release_date", "url"]
    names += [f"genre_{number}" for number in range(19)]
    frame = read_delimited(file, "|", names, "latin-1")
    frame = frame.with_columns(id_column(file, frame["item_id"], 1, "int"))
    check_unique(file, frame["item_id"], 1)
    flags = frame.select(names[5:]).to_numpy() == "1"
    genres = [np.flatnonzero(row).tolist() for row in flags]
    return frame.select("item_id", "title", "release_date").with_columns(
        pl.Series("genres", genres, dtype=pl.List(pl.Int64))
    )


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
    return FORMATS[format](source, **options)
