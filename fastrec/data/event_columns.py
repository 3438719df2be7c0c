# SPDX-License-Identifier: Apache-2.0
"""Columns of events beside their items, read from interactions.parquet when they are asked for.

    rating    float32 [E], as it was given; NaN: none
    time_gap  float64 [E], seconds since the user's event before; NaN: the first event of a user

Legend: E events, T events of a batch.
"""

import numpy as np

from fastrec.data.dataset_files import check_digest, digest
from fastrec.data.errors import DataError, reading

NAMES = ("rating", "time_gap")
# What schema.json says of the timestamps, and how many of them make a second.
SOURCE = "timestamp of the source"
SECONDS = "seconds since 1970"
MILLISECONDS = "milliseconds since 1970"
MICROSECONDS = "microseconds since 1970"
NANOSECONDS = "nanoseconds since 1970"
PLACE = "place in the sequence, from 0"
PER_SECOND = {
    SOURCE: 1,
    SECONDS: 1,
    MILLISECONDS: 10**3,
    MICROSECONDS: 10**6,
    NANOSECONDS: 10**9,
}


def read_event_column(dataset, name: str) -> np.ndarray:
    """[E]: the column `name`, one of `NAMES`, of all events of a SequenceDataset in their order.

    Integers that the source calls timestamps count as seconds. Gaps are those of the whole
    sequence: the first event that a cut leaves keeps its own.

    Raises ValueError for another name, DataError that names the file: it is missing, is not the one
    that was written with schema.json, has no ratings, or has no times or times of unknown unit.
    """
    if name not in NAMES:
        raise ValueError(f"events have the columns {list(NAMES)}, got {name!r}")
    file = dataset.path / "interactions.parquet"
    if not file.exists():
        raise DataError(file, f"file is missing: the events have no {name}")
    if name == "rating":
        if "rating" not in _columns(file):
            raise DataError(
                file, "the data set has no ratings: prepare it from a source that has them (of a"
                " table: --rating_column)",
            )  # fmt: skip
        return _read(dataset, file, "rating")
    unit = dataset.schema.get("time")
    if unit not in PER_SECOND:
        what = "has no times" if unit == PLACE else f"has times of unknown unit ({unit!r})"
        raise DataError(
            dataset.path / "schema.json", f"the data set {what}: a time gap needs a source with"
            " times (of a table: --timestamp_column)",
        )  # fmt: skip
    times = _read(dataset, file, "timestamp")
    gaps = np.full(dataset.num_events, np.nan)
    gaps[1:] = np.diff(times) / PER_SECOND[unit]
    starts = dataset.offsets[:-1]
    gaps[starts[starts < dataset.num_events]] = np.nan  # a user without events begins elsewhere
    if (falls := np.flatnonzero(gaps < 0)).size:
        raise DataError(file, "times of a user fall", column="timestamp", row=int(falls[0]) + 1)
    return gaps


def _columns(file) -> list[str]:
    import polars as pl

    with reading(file, "cannot be read as Parquet"):
        return pl.scan_parquet(file, glob=False).collect_schema().names()


def _read(dataset, file, column: str) -> np.ndarray:
    import polars as pl

    check_digest(file, digest(file), dataset.schema)
    with reading(file, "cannot be read as Parquet"):
        series = pl.scan_parquet(file, glob=False).select(column).collect()[column]
    if len(series) != dataset.num_events:
        raise DataError(
            file, f"schema.json says {dataset.num_events} rows, the file has {len(series)}"
        )
    if column == "rating":
        return series.cast(pl.Float32).fill_null(float("nan")).to_numpy()
    return series.cast(pl.Int64).to_numpy()
