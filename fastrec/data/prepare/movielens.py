# SPDX-License-Identifier: Apache-2.0
"""MovieLens-1M and -100K as they are published, and what readers of several files share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from fastrec.data.errors import DataError
from fastrec.data.prepare.columns import check_unique, first_row, id_column, integers
from fastrec.data.prepare.delimited import read_delimited
from fastrec.data.prepare.events import events_of
from fastrec.data.prepare.raw import RawData
from fastrec.data.prepare.rows import Rows
from fastrec.data.prepare.side_tables import read_attributes


def read_movielens_1m(source, *, on_duplicate: str = "error") -> RawData:
    """MovieLens-1M: ratings.dat or its directory; users.dat and movies.dat beside it are used."""
    file = one_file(source, "ratings.dat")
    frame = read_delimited(file, "::", ["user", "item", "rating", "timestamp"], "latin-1")
    raw = _movielens(file, frame, on_duplicate)
    users, items = (raw.interactions[name] for name in ("user_id", "item_id"))
    raw.users = beside(file, "users.dat", attributes("user_id", users))
    raw.items = beside(file, "movies.dat", attributes("item_id", items))
    return raw


def read_movielens_100k(source, *, on_duplicate: str = "error") -> RawData:
    """MovieLens-100K: u.data or its directory; u.user and u.item beside it are used."""
    file = one_file(source, "u.data")
    frame = read_delimited(file, "\t", ["user", "item", "rating", "timestamp"])
    raw = _movielens(file, frame, on_duplicate)
    raw.users, raw.items = (
        beside(file, "u.user", _read_u_user), beside(file, "u.item", _read_u_item)
    )  # fmt: skip
    return raw


def _movielens(file, frame: pl.DataFrame, on_duplicate: str) -> RawData:
    rows = Rows([(file, 1, frame.height)])
    return events_of(
        file, frame, rows, user="user", item="item", timestamp="timestamp", rating="rating",
        ids="int", on_duplicate=on_duplicate,
    )  # fmt: skip


def _read_u_user(file) -> pl.DataFrame:
    frame = read_delimited(file, "|", ["user_id", "age", "gender", "occupation", "zip_code"])
    frame = frame.with_columns(id_column(file, frame["user_id"], 1, "int"))
    check_unique(file, frame["user_id"], 1)
    return frame.with_columns(_integers_or_null(file, frame["age"]))


def _read_u_item(file) -> pl.DataFrame:
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


def _integers_or_null(file, series: pl.Series) -> pl.Series:
    numbers = integers(series)
    row = first_row(numbers.is_null() & series.is_not_null(), 1)
    if row is not None:
        raise DataError(
            file, f"expected an integer, got {series[row - 1]!r}", column=series.name, row=row
        )
    return numbers


def attributes(
    key: str, like: pl.Series, na_values: str = "text"
) -> Callable[[Path], pl.DataFrame]:
    """A reader of a file of attributes whose ids are compared with `like`."""
    return lambda file: read_attributes(file, key, like=like, na_values=na_values)


def one_file(source, name: str) -> Path:
    """The file, or the one of a folder whose name ends so, a .gz behind it left aside."""
    source = Path(source)
    if not source.is_dir():
        return source
    found = sorted(f for f in source.iterdir() if f.name.removesuffix(".gz").endswith(name))
    if len(found) != 1:
        raise DataError(source, f"expected one file *{name}, found {len(found)}")
    return found[0]


def beside(file: Path, name: str, reader: Callable[[Path], pl.DataFrame]) -> pl.DataFrame | None:
    """What the reader makes of a file beside another, gzipped or not; None if it is not there."""
    found = [f for f in (file.with_name(name), file.with_name(f"{name}.gz")) if f.exists()]
    return reader(found[0]) if found else None
