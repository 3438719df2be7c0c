# SPDX-License-Identifier: Apache-2.0
"""What `prepare` reads tables from: a file, a folder of part files, or a data frame."""

from pathlib import Path

from fastrec.data.errors import DataError, EmptyFile, reading
from fastrec.data.prepare.rows import Rows
from fastrec.data.prepare.tables import read_frame

FRAME = "data frame"


def is_frame(source) -> bool:
    """Whether it is a data frame of polars, or of a library with Arrow's interface: pandas too."""
    import polars as pl

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
):
    """(polars.DataFrame, Rows) of a file, a folder of part files or a data frame.

    separator, columns (of a file without a header), encoding: see `tables.read_frame`.
    """
    if is_frame(source):
        for name, value in (("separator", separator), ("columns", columns), ("encoding", encoding)):
            if value is not None:
                raise ValueError(f"{name} has no effect on a data frame")
        frame = polars_frame(source)
        if frame.height == 0:
            raise EmptyFile(FRAME, "holds no rows")
        return frame, Rows([(FRAME, 1, frame.height)])
    source = Path(source)
    if not source.is_dir():
        frame, first = read_frame(source, separator=separator, names=columns, encoding=encoding)
        return frame, Rows([(source, first, frame.height)])
    return _read_parts(source, separator, columns, encoding)


def polars_frame(frame, name: str = FRAME):
    """polars.DataFrame of a data frame; `name` stands in errors."""
    import polars as pl

    with reading(name):
        if isinstance(frame, pl.LazyFrame):
            return frame.collect()
        try:
            return frame if isinstance(frame, pl.DataFrame) else pl.DataFrame(frame)
        except (TypeError, ValueError, ModuleNotFoundError) as error:
            raise DataError(name, f"cannot be read: {error}") from error


def _read_parts(folder: Path, separator, columns, encoding):
    """The part files of a folder, as Spark writes them, end to end in the order of their names.

    Files beginning with "_" or "." are Spark's own. Parts without a row are left out.
    """
    import polars as pl

    if (folder / "_temporary").exists():
        raise DataError(folder, "holds _temporary: its writer has not finished")
    files = sorted(file for file in folder.iterdir() if not file.name.startswith(("_", ".")))
    other = [file.name for file in files if not (file.is_file() and file.name.startswith("part-"))]
    if other or not files:
        what = f"found {other[0]}" if other else "found none"
        raise DataError(
            folder, f"as a table, a folder holds part files (part-*) alone; {what} (--format"
            " movielens-1m, movielens-100k and recbole read theirs)",
        )  # fmt: skip
    frames: list = []
    parts: list[tuple[Path, int, int]] = []
    for file in files:
        try:
            frame, first = read_frame(file, separator=separator, names=columns, encoding=encoding)
        except EmptyFile:
            continue
        if frames and frame.columns != frames[0].columns:
            raise DataError(
                file, f"columns are {', '.join(frame.columns)}, those of {parts[0][0].name}"
                f" {', '.join(frames[0].columns)}",
            )  # fmt: skip
        frames.append(frame)
        parts.append((file, first, frame.height))
    if not frames:
        raise DataError(folder, "no part file holds a row")
    with reading(folder):
        return pl.concat(frames, how="vertical_relaxed"), Rows(parts)
