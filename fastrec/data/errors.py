# SPDX-License-Identifier: Apache-2.0
"""What bad input meets: the one error of the data path names the file, the column and the row."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager


class DataError(ValueError):
    """Bad input. The message reads `file: column 'x', row n: problem` and is one line.

    file: the file (or directory) at fault. column: its column, or None.
    row: 1-based line of a text file (the header counts), 1-based row of a Parquet file, or None.
    """

    def __init__(self, file, problem: str, *, column: str | None = None, row: int | None = None):
        where = [f"column {_short(repr(column))}"] if column is not None else []
        where += [f"row {row}"] if row is not None else []
        problem = _short(" ".join(problem.split()))
        super().__init__(f"{file}: " + (", ".join(where) + ": " if where else "") + problem)
        self.file, self.column, self.row, self.problem = str(file), column, row, problem

    def __reduce__(self):
        return _rebuild, (self.file, self.problem, self.column, self.row)


class EmptyFile(DataError):
    """A file that holds no row."""


def _short(text: str) -> str:
    """A field of a file may be as long as the file."""
    return text if len(text) <= 600 else f"{text[:300]} .. {text[-300:]}"


def _rebuild(file, problem, column, row):
    return DataError(file, problem, column=column, row=row)


def input_errors() -> tuple[type[BaseException], ...]:
    """What bad input, or too much of it, meets here and in the libraries that read files."""
    import csv

    import polars as pl
    import safetensors
    import yaml

    return (
        ValueError, OSError,
        pl.exceptions.PolarsError, pl.exceptions.PanicException, safetensors.SafetensorError,
        yaml.YAMLError, csv.Error, zlib.error, MemoryError, RecursionError, OverflowError, EOFError,
    )  # fmt: skip


@contextmanager
def reading(file, what: str = "cannot be read") -> Iterator[None]:
    """Errors of polars, zlib, memory and recursion inside become a DataError about `file`."""
    import polars as pl

    foreign = (
        pl.exceptions.PolarsError, pl.exceptions.PanicException, MemoryError, RecursionError,
        OverflowError, EOFError, zlib.error,
    )  # fmt: skip
    try:
        yield
    except foreign as error:
        said = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(file, f"{what}: {said[:300]}") from error
