# SPDX-License-Identifier: Apache-2.0
"""What `prepare` reads tables from: a file, a folder of part files, or a data frame."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from fastrec.data.errors import DataError, EmptyFile, reading
from fastrec.data.prepare.rows import Rows
from fastrec.data.prepare.tables import frame_blocks, rows_of

FRAME = "data frame"


def is_frame(source) -> bool:
    """Whether it is a data frame of polars, or of a library with Arrow's interface: pandas too."""
    return isinstance(source, pl.LazyFrame) or hasattr(source, "__arrow_c_stream__")


def name_of(source):
    """What errors and schema.json call the source."""
    return FRAME if is_frame(source) else source


def read_source(
    source,
    *,
    separator: str | None = None,
    columns: list[str] | None = None,
    encoding: str | None = None,
) -> tuple[pl.DataFrame, Rows]:
    """(frame, its rows) of a file, a folder of part files or a data frame: all of `read_blocks`."""
    blocks = list(read_blocks(source, separator=separator, columns=columns, encoding=encoding))
    rows = Rows.of_blocks((file, first, frame.height) for frame, file, first in blocks)
    if len(blocks) == 1:
        return blocks[0][0], rows
    with reading(name_of(source)):
        frames = [frame for frame, *_ in blocks]
        return pl.concat(frames, how="vertical_relaxed", rechunk=True), rows


def read_blocks(
    source,
    *,
    separator: str | None = None,
    columns: list[str] | None = None,
    encoding: str | None = None,
    size: int | None = None,
) -> Iterator[tuple[pl.DataFrame, Any, int]]:
    """(frame, file, number of its first row) of each block of a file, a folder of part files or a
    data frame.

    separator, columns (of a file without a header), encoding, size: see `tables.frame_blocks`.
    """
    if is_frame(source):
        for name, value in (("separator", separator), ("columns", columns), ("encoding", encoding)):
            if value is not None:
                raise ValueError(f"{name} has no effect on a data frame")
        frame = polars_frame(source)
        if frame.height == 0:
            raise EmptyFile(FRAME, "holds no rows")
        rows = rows_of(size)
        for start in range(0, frame.height, rows):
            yield frame[start : start + rows], FRAME, start + 1
        return
    options: dict = {"separator": separator, "names": columns, "encoding": encoding, "size": size}
    source = Path(source)
    if not source.is_dir():
        for frame, first in frame_blocks(source, **options):
            yield frame, source, first
        return
    begun = source
    names: list[str] = []
    for file in _parts(source):
        try:
            for frame, first in frame_blocks(file, **options):
                if not names:
                    begun, names = file, frame.columns
                if frame.columns != names:
                    raise DataError(
                        file, f"columns are {', '.join(frame.columns)}, those of {begun.name}"
                        f" {', '.join(names)}",
                    )  # fmt: skip
                yield frame, file, first
        except EmptyFile:
            continue
    if not names:
        raise DataError(source, "no part file holds a row")


def polars_frame(frame, name: str = FRAME) -> pl.DataFrame:
    """A data frame as one of polars; `name` stands in errors."""
    with reading(name):
        if isinstance(frame, pl.LazyFrame):
            return frame.collect()
        try:
            return frame if isinstance(frame, pl.DataFrame) else pl.DataFrame(frame)
        except (TypeError, ValueError, ModuleNotFoundError) as error:
            raise DataError(name, f"cannot be read: {error}", column=_unreadable(frame)) from error


def _unreadable(frame) -> str | None:
    """The first column that polars cannot read, of integers and texts for one."""
    for column in getattr(frame, "columns", []):
        try:
            pl.DataFrame(frame[[column]])
        except (TypeError, ValueError, KeyError):
            return str(column)
    return None


def _parts(folder: Path) -> list[Path]:
    """The part files of a folder, as Spark and Ray write them, in the order of their names.

    Files beginning with "_" or "." are Spark's own.
    """
    if (folder / "_temporary").exists():
        raise DataError(folder, "holds _temporary: its writer has not finished")
    files = sorted(file for file in folder.iterdir() if not file.name.startswith(("_", ".")))
    other = [file.name for file in files if not (file.is_file() and _is_part(file))]
    if other or not files:
        what = f"found {other[0]}" if other else "found none"
        raise DataError(
            folder, f"as a table, a folder holds part files (part-*, or *.parquet) alone; {what}"
            " (--format movielens-1m, movielens-100k and recbole read theirs)",
        )  # fmt: skip
    return files


def _is_part(file: Path) -> bool:
    # Ray calls its files by the number of the job, polars and DuckDB by their own.
    return file.name.startswith("part-") or file.suffix == ".parquet"
