# SPDX-License-Identifier: Apache-2.0
"""Events on disk while `prepare` works: a file per column, read and written in chunks.

Memory stays the same whatever the number of events. Legend: E events.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from weakref import finalize

import numpy as np

CHUNK = 1 << 20  # events in memory at a time where they are passed through
BUCKET = 1 << 20  # events in memory at a time where they are sorted


class Store:
    """Columns of E events in the new folder `folder`. dtypes: by column."""

    def __init__(self, folder: Path, dtypes: Mapping[str, np.dtype | type]):
        folder.mkdir()
        self.folder, self.dtypes = folder, {name: np.dtype(dtypes[name]) for name in dtypes}
        self.height = 0
        self._files = {
            name: os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600) for name in dtypes
        }
        self._close = finalize(self, _close, list(self._files.values()))

    def write(self, start: int, columns: Mapping[str, np.ndarray]) -> None:
        """Write events at places from `start` on."""
        for name, values in columns.items():
            dtype = self.dtypes[name]
            data = np.ascontiguousarray(values, dtype).data.cast("B")
            at = start * dtype.itemsize
            while data:  # the system may write less
                try:
                    done = os.pwrite(self._files[name], data, at)
                except OSError as error:  # which names no file
                    raise OSError(f"{self.folder} cannot be written: {error}") from error
                data, at = data[done:], at + done

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Write events behind the last ones: all columns."""
        self.write(self.height, columns)
        self.height += len(next(iter(columns.values())))

    def read(self, start: int, stop: int, *names: str) -> dict[str, np.ndarray]:
        """Columns of the events from `start` to `stop`; all columns without names."""
        made = {}
        for name in names or self.dtypes:
            values = np.empty(stop - start, self.dtypes[name])
            data, at = values.data.cast("B"), start * values.itemsize
            while data:
                done = os.preadv(self._files[name], [data], at)
                if done == 0:
                    raise OSError(f"{self.folder / name} is shorter than it was written")
                data, at = data[done:], at + done
            made[name] = values
        return made

    def chunks(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """All events in their order, as `read` gives them, `CHUNK` at a time."""
        for start in range(0, self.height, CHUNK):
            yield self.read(start, min(start + CHUNK, self.height), *names)

    def remove(self) -> None:
        """Take the files away."""
        self._close()
        for name in self.dtypes:
            (self.folder / name).unlink()
        self.folder.rmdir()


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
