# SPDX-License-Identifier: Apache-2.0
"""Vectors of items from a file: text, image, knowledge graph or social embeddings.

Legend: V items, F numbers of a vector.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from fastrec.data.errors import DataError, reading
from fastrec.data.prepare.columns import check_unique, float_column, key_column, refuse
from fastrec.data.prepare.join import foreign
from fastrec.data.prepare.side_tables import key_name
from fastrec.data.prepare.sources import is_frame, polars_frame
from fastrec.data.prepare.tables import read_frame

_NAME = re.compile(r"[A-Za-z0-9_]+")  # it is part of the name of a file


@dataclass(frozen=True)
class Vectors:
    """numbers: float32 [V, F], 0 for items without a vector. known: bool [V]."""

    numbers: np.ndarray
    known: np.ndarray


def item_features(
    source, ids: pl.Series, everyone: pl.Series, *, column: str | None, known_as: str | None
) -> tuple[dict[str, Vectors], int]:
    """(the vectors of items by name, number of rows that were left out): those of ids that a filter
    removed, or that have no events.

    A table with a column of item ids, named as in `side_tables.read_attributes`. Each other column
    holds a list or an array of numbers, a vector by the name of the column; or all of them hold a
    number, and are one vector together by the name of the file, "features" of a frame. A null is no
    vector.

    Raises DataError that names the column and the row: a list of another length, NaN, infinity or
    nothing inside of a list, an id twice; or a file without an id of `everyone`.
    """
    file, first = "item_features", 1
    if is_frame(source):
        frame, name, stem = polars_frame(source, file), "item_id", "features"
        if name not in frame.columns:
            raise DataError(file, f"column is missing; there are {frame.columns}", column=name)
    else:
        file, stem = source, Path(source).name.split(".")[0]
        with reading(file):
            frame, first = read_frame(file)
            name = key_name(file, frame, "item_id", column, known_as)
    key = key_column(file, frame[name], first, everyone, "text")
    check_unique(file, key, first)
    if not key.is_in(everyone.implode()).any():
        raise foreign(file, key, everyone)
    rows = pl.DataFrame({"id": key, "row": np.arange(len(key))})
    rows = ids.to_frame("id").join(rows, on="id", how="left", maintain_order="left")
    place = rows["row"].fill_null(-1).to_numpy()
    others = [series for series in frame.get_columns() if series.name != name]
    if not others:
        raise DataError(file, "has no column beside the ids")
    lists = [series for series in others if isinstance(series.dtype, pl.List | pl.Array)]
    if lists and len(lists) < len(others):
        single = next(s.name for s in others if s.name not in [part.name for part in lists])
        raise DataError(
            file, "is no list, as other columns are: a file has lists, or numbers in columns",
            column=single,
        )  # fmt: skip
    found = {series.name: _of_lists(file, series, first) for series in lists}
    if not lists:
        columns = [float_column(file, series, first).to_numpy() for series in others]
        found = {stem: Vectors(np.stack(columns, 1), np.ones(len(key), dtype=bool))}
    for each in found:
        if not _NAME.fullmatch(each):
            raise DataError(file, "a name must be made of letters, digits and _", column=each)
    return {each: _for_items(part, place) for each, part in found.items()}, int(
        (~key.is_in(ids.implode())).sum()
    )


def _of_lists(file, series: pl.Series, first: int) -> Vectors:
    """A column of lists, a row each."""
    if isinstance(series.dtype, pl.Array):
        series = series.cast(pl.List(series.dtype.inner))
    kind = series.dtype
    if not (isinstance(kind, pl.List) and (kind.inner.is_numeric() or kind.inner == pl.Null)):
        raise DataError(file, f"expected lists of numbers, got {kind}", column=series.name)
    known = series.is_not_null()
    lengths = series.list.len()
    if not known.any() or (width := lengths.filter(known)[0]) == 0:
        raise DataError(file, "holds no vector", column=series.name)
    refuse(file, series, first, known & (lengths != width), f"a list of {width} numbers")
    numbers = series.cast(pl.List(pl.Float32))
    # Null for null, of which nothing is expected.
    wrong = numbers.list.eval(pl.element().is_finite().fill_null(False)).list.all()
    refuse(file, series, first, ~wrong.fill_null(True), "finite numbers")
    flat = numbers.filter(known).explode().to_numpy().reshape(-1, width)
    made = np.zeros((len(series), width), dtype=np.float32)
    made[known.to_numpy()] = flat
    return Vectors(made, known.to_numpy())


def _for_items(part: Vectors, place: np.ndarray) -> Vectors:
    """The rows at `place` int64 [V], none for -1."""
    known = (place >= 0) & part.known[place]
    return Vectors(np.where(known[:, None], part.numbers[place], np.float32(0)), known)
