# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a source stand: an error names a file and a row that a person can look up."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastrec.data.errors import DataError


@dataclass(frozen=True)
class Rows:
    """The file and the row number of each row of a table. Letters: N rows.

    parts: (file, number of its first row, number of its rows), end to end. kept: int64 [N], which
    of them the table has, ascending; None for all.
    """

    parts: Sequence[tuple[Any, int, int]]
    kept: np.ndarray | None = None

    @classmethod
    def of_blocks(cls, blocks: Iterable[tuple[Any, int, int]]) -> "Rows":
        """The rows of blocks (file, number of the first row, number of rows), end to end."""
        parts: list[tuple[Any, int, int]] = []
        for file, first, count in blocks:
            if parts and parts[-1][0] == file and sum(parts[-1][1:]) == first:
                first, count = parts[-1][1], parts.pop()[2] + count
            parts.append((file, first, count))
        return cls(parts)

    @property
    def first(self) -> int:
        """The number of the first row of the first file: 2 behind a header."""
        return self.parts[0][1]

    @property
    def count(self) -> int:
        """How many rows the table has."""
        return sum(count for *_, count in self.parts) if self.kept is None else len(self.kept)

    def place(self, index: int) -> tuple[Any, int]:
        """(file, row number) of row `index` of the table, from 0."""
        index = index if self.kept is None else int(self.kept[index])
        for file, first, count in self.parts:
            if index < count:
                return file, first + index
            index -= count
        raise IndexError(index)

    def keep(self, flags) -> "Rows":
        """The rows whose flag (bool [N]) is set."""
        where = np.flatnonzero(np.asarray(flags))
        return replace(self, kept=where if self.kept is None else self.kept[where])

    @contextmanager
    def named(self, hint: str = "") -> Iterator[None]:
        """Inside, rows count from 0; an error leaves with its file, its row and the hint."""
        try:
            yield
        except DataError as error:
            file, row = error.file, error.row
            if row is not None:
                file, row = self.place(row)
            raise DataError(file, error.problem + hint, column=error.column, row=row) from error
