# SPDX-License-Identifier: Apache-2.0
"""Files beside the interactions: attributes of users and items, and links between users.

The ids in them are compared with those of the interactions as they are written (`key_column`).
"""

import contextlib
import json
from collections import Counter
from pathlib import Path

import polars as pl

from fastrec.data.errors import DataError, EmptyFile, reading
from fastrec.data.prepare.columns import (
    attribute_column,
    check_unique,
    first_row,
    integers,
    key_column,
    looks_like_a_row,
)
from fastrec.data.prepare.delimited import read_delimited
from fastrec.data.prepare.tables import is_delimited, read_frame, recbole_columns
from fastrec.data.text_files import read_bytes

_DAT_COLUMNS = {
    "users.dat": ["user_id", "gender", "age", "occupation", "zip_code"],
    "movies.dat": ["item_id", "title", "genres"],
}


def read_attributes(
    file,
    key: str,
    id_map=None,
    *,
    like: pl.Series | None = None,
    column: str | None = None,
    known_as: str | None = None,
    na_values: str = "ask",
) -> pl.DataFrame:
    """Attributes: column `key` ("user_id" or "item_id") and one row per id.

    By name or suffix: .json `{"id": [integers]}` as S3-Rec has it (a list column `attributes`, each
    entry once); RecBole .user and .item; MovieLens users.dat and movies.dat (genres as a list);
    csv, tsv, Parquet and JSON lines. Text columns that hold numbers only become numbers. Null
    attributes are allowed; na_values: see `columns.attribute_column`.
    column: the one that holds the ids, of a table; without it the one called `key`, `key` without
    "_id", or `known_as`, as the interactions call it. like: the ids of the interactions.
    id_map: a text file of `id original` lines: the ids of `file` are the originals, the ids of the
    result those of the first column; rows that the map does not know are left out.
    """
    file = Path(file)
    plain = Path(file.name.removesuffix(".gz"))
    wanted = None if id_map is not None else like
    if column is not None and (plain.suffix == ".json" or plain.name in _DAT_COLUMNS):
        raise ValueError(f"{file}: {_flag(key)} is for tables, this file has its own names")
    first = 1
    with reading(file):
        if plain.suffix == ".json":
            frame, name = _read_id_json(file, key), key
        elif plain.name in _DAT_COLUMNS:
            names = _DAT_COLUMNS[plain.name]
            frame, name = read_delimited(file, "::", names, encoding="latin-1"), names[0]
            if "genres" in frame.columns:
                frame = frame.with_columns(pl.col("genres").str.split("|"))
        elif plain.suffix in (".user", ".item"):
            frame, first = recbole_columns(file)
            name = key_name(file, frame, key, column, known_as)
        else:
            frame, first = read_frame(file)
            name = key_name(file, frame, key, column, known_as)
            _check_named(file, frame.columns)
        ids = key_column(file, frame[name], first, wanted, na_values)
        check_unique(file, ids, first)
        retype = plain.suffix not in (".user", ".item")  # their header gives the types
        others = [
            attribute_column(file, series, first, na_values, retype)
            for series in frame.get_columns()
            if series.name != name
        ]
        frame = pl.DataFrame([ids.alias(key), *others])
        return frame if id_map is None else _translated(file, frame, key, id_map, like)


def key_name(file, frame: pl.DataFrame, key: str, column: str | None, known_as: str | None) -> str:
    """The column that holds the ids; never a guess."""
    there = ", ".join(frame.columns)
    if column is not None:
        if column not in frame.columns:
            raise DataError(file, f"column is missing; there are {there}", column=column)
        if column != key and key in frame.columns:
            raise DataError(file, f"holds {key!r} too: rename that", column=column)
        return column
    names = dict.fromkeys((key, key.removesuffix("_id"), known_as or key))
    found = [name for name in names if name in frame.columns]
    if len(found) == 1:
        return found[0]
    what = f"{' and '.join(found)} may both hold" if found else "no column is known to hold"
    header = ""
    if not found and looks_like_a_row(pl.Series(frame.columns)):
        header = "; if the first line is a row, write the names of the columns above it"
    raise DataError(file, f"{what} the ids: say {_flag(key)} (there are {there}){header}")


def _flag(key: str) -> str:
    return "--" + key.replace("_id", "_key")


def _check_named(file, names: list[str]) -> None:
    """An index that a data frame wrote is no attribute."""
    for place, name in enumerate(names, 1):
        if not name.strip() or name.startswith(("Unnamed:", "__index_level_")):
            raise DataError(
                file, f"column {place} of {len(names)} has no name ({name!r}), as the index of a"
                " data frame: name it or leave it out", row=1,
            )  # fmt: skip


def _translated(
    file, frame: pl.DataFrame, key: str, id_map, like: pl.Series | None
) -> pl.DataFrame:
    pairs = read_delimited(id_map, " ", ["id", "original"])
    originals = key_column(id_map, pairs["original"], 1, frame[key])
    check_unique(id_map, originals, 1)
    fresh = max(frame.columns, key=len) + "_"
    pairs = pl.DataFrame(
        [key_column(id_map, pairs["id"], 1, like).alias(fresh), originals.alias(key)]
    )
    frame = frame.join(pairs, on=key, maintain_order="left")
    if frame.height == 0:
        raise DataError(file, f"none of its ids is among the originals of {id_map}", column=key)
    return frame.with_columns(frame[fresh].alias(key)).drop(fresh)


def _read_id_json(file, key: str) -> pl.DataFrame:
    data = read_bytes(file)
    try:
        pairs = json.loads(data, object_pairs_hook=lambda pairs: pairs)
    except (ValueError, RecursionError) as error:
        raise DataError(
            file, f"is not one value of JSON: {error} (an object a line is a .jsonl file)",
            row=getattr(error, "lineno", None),
        ) from error  # fmt: skip
    if not data.lstrip().startswith(b"{"):
        raise DataError(file, 'expected an object {"id": [attributes]}')
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(
            name for name, times in Counter(name for name, _ in pairs).items() if times > 1
        )
        raise DataError(file, f"id {twice} is listed twice", column=key)
    ids = pl.Series(key, list(table), dtype=pl.String)
    place = first_row(integers(ids).is_null().to_numpy(), 0)
    if place is not None:
        raise DataError(file, f"expected an integer id, got {ids[place]!r}", column=key)
    for name, attributes in table.items():
        if not isinstance(attributes, list) or not all(
            type(a) is int and -(2**63) <= a < 2**63 for a in attributes
        ):
            raise DataError(
                file, f"{name}: expected a list of integers, got {str(attributes)[:40]}",
                column="attributes",
            )  # fmt: skip
    distinct = [list(dict.fromkeys(attributes)) for attributes in table.values()]
    return pl.DataFrame([ids, pl.Series("attributes", distinct, dtype=pl.List(pl.Int64))])


def read_relations(file, like: pl.Series | None = None, na_values: str = "ask") -> pl.DataFrame:
    """(user_id, friend_id): the first two columns of a table, one link a row.

    like: the ids of the interactions. A first line with a number is a link, not a header; one of
    text that names a user of `like` may be either, and is refused.
    """
    return _read_pairs(file, "friend_id", like, like, na_values)


def read_cold_items(file, like: pl.Series | None = None, na_values: str = "ask") -> pl.DataFrame:
    """(user_id, item_id): the first two columns of a table, one item of another catalogue a row,
    read as `read_relations` reads links; ids of items are integers where all are."""
    return _read_pairs(file, "item_id", like, None, na_values)


def _links(file: Path) -> tuple[pl.DataFrame, int]:
    """`read_frame` of a file whose only line may be a link, in the place of a header."""
    try:
        return read_frame(file)
    except EmptyFile as empty:
        if is_delimited(file):
            with contextlib.suppress(DataError):
                found = read_frame(file, names=["column 1", "column 2"])
                if looks_like_a_row(pl.Series(found[0].row(0))):
                    return found
        raise empty


def _read_pairs(
    file, second: str, like: pl.Series | None, like_second: pl.Series | None, na_values: str
) -> pl.DataFrame:
    file = Path(file)
    with reading(file):
        if file.name.removesuffix(".gz").endswith(".net"):
            frame, first = recbole_columns(file)
        else:
            frame, first = _links(file)
            names = pl.Series(frame.columns[:2])
            if is_delimited(file) and looks_like_a_row(names):
                places = [f"column {place}" for place in range(1, frame.width + 1)]
                frame, first = read_frame(file, names=places)
            elif is_delimited(file) and like is not None and like.dtype == pl.String:
                known = names.filter(names.is_in(like.implode()))
                if len(known):
                    raise DataError(
                        file, f"{known[0]!r} is a user: write the names of the columns above it if"
                        " the line is a link", row=1,
                    )  # fmt: skip
        if frame.width < 2:
            raise DataError(file, f"expected two columns of ids, got {frame.columns}")
        ends = [
            key_column(file, frame[name], first, known, na_values)
            for name, known in zip(frame.columns[:2], (like, like_second), strict=True)
        ]
        return pl.DataFrame([ends[0].alias("user_id"), ends[1].alias(second)])
