# SPDX-License-Identifier: Apache-2.0
"""Original ids and the rows that they have in a table of users or items."""

from collections.abc import Iterable, Sequence

import numpy as np


class Ids:
    """The ids of a table in the order of its rows, found in constant time. Two ids are one where
    their texts are: "7", as it is read from a file, is the integer 7 of a data set.

    ids: [N], int64 or text, all different.
    """

    def __init__(self, ids: np.ndarray):
        self.ids = ids
        self._row = {str(each): row for row, each in enumerate(ids.tolist())}

    def __len__(self) -> int:
        return len(self._row)

    def find(self, asked: Sequence) -> list[int]:
        """The row of each id, -1 for one that is not known. Raises TypeError as `listed` does."""
        row = self._row
        return [row.get(str(each), -1) for each in listed(asked)]

    def rows(self, asked: Sequence, what: str) -> np.ndarray:
        """int64 [len(asked)]: the row of each id; `what` they are is for messages.

        Raises ValueError for ids that are not known: how many, and the first.
        """
        asked = listed(asked)
        rows = self.find(asked)
        unknown = [each for each, row in zip(asked, rows, strict=True) if row < 0]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(rows)} {what} are not in the data set, the first is"
                f" {unknown[0]!r}"
            )
        return np.array(rows, dtype=np.int64)

    def take(self, rows: np.ndarray):
        """polars.Series of the ids of rows, of their type also where there is no row."""
        import polars

        kind = polars.Int64 if self.ids.dtype.kind == "i" else polars.String
        return polars.Series(self.ids[rows].tolist(), dtype=kind)


def listed(asked) -> list:
    """Ids as a list, numbers of an array or tensor as Python has them: the text of a tensor is no
    id. Raises TypeError for what is no list, and for a text, whose letters would be ids."""
    given = asked.tolist() if hasattr(asked, "tolist") else asked
    if isinstance(given, str | bytes):
        raise TypeError(f"expected a list of ids, got the text {given!r}")
    if not isinstance(given, Iterable):
        raise TypeError(f"expected a list of ids, got {asked!r}")
    return list(given)
