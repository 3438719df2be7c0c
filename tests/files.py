# SPDX-License-Identifier: Apache-2.0
"""What the tests of readers write and expect."""

import pytest

from fastrec.data.errors import DataError


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def rows(raw):
    return raw.interactions.rows()


def fails(reader, *args, file, column=None, row=None, match=None, **options):
    """The call raises DataError that names exactly this place, in its fields and in its text."""
    with pytest.raises(DataError, match=match) as caught:
        reader(*args, **options)
    error = caught.value
    assert (error.file, error.column, error.row) == (str(file), column, row)
    assert str(error).startswith(str(file))
    if column is not None:
        assert f"column {column!r}" in str(error)
    if row is not None:
        assert f"row {row}" in str(error)
