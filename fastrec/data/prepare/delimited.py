# SPDX-License-Identifier: Apache-2.0
"""Delimited text as data frames of text, every problem reported with file, column and row."""

from collections.abc import Iterator

import numpy as np
import polars as pl

from fastrec.data.errors import DataError, EmptyFile, reading
from fastrec.data.text_files import split_lines, text_blocks

_NEWLINE, _RETURN, _QUOTE = 10, 13, 34
WHITESPACE = "whitespace"  # the separator that is any run of blanks and tabs
_UNIT = "\x1f"  # stands for separators of more than one character


def read_delimited(
    file, separator: str, names: list[str] | None = None, encoding: str = "utf-8"
) -> pl.DataFrame:
    """All of `delimited_blocks`."""
    frames = [frame for frame, _ in delimited_blocks(file, separator, names, encoding)]
    return pl.concat(frames, rechunk=True)


def delimited_blocks(
    file,
    separator: str,
    names: list[str] | None = None,
    encoding: str = "utf-8",
    size: int | None = None,
) -> Iterator[tuple[pl.DataFrame, int]]:
    """(frame, number of its first row) of each block of a delimited file, every column as text,
    quotes honoured in csv.

    separator: one character or several ("::"), or "whitespace", any run of blanks and tabs. names:
    the columns of a file without a header (all must be there); None reads the header. Empty fields
    are null. size: as in `text_blocks`. Raises DataError for a row that is empty or has another
    number of fields, for two columns of one name, and for a file without rows.
    """
    if {'"', "\n", "\r", ""} & {separator, *separator}:
        raise ValueError(f"--separator cannot be {separator!r}")
    quotes = separator in (",", ";")
    several = separator if len(separator) > 1 or not separator.isascii() else None
    row, some, width, blank = 1, False, None if names is None else len(names), False
    for data, line in text_blocks(file, encoding, size=size, quotes=quotes):
        if blank:  # a last line of blanks is none, but here another follows
            raise DataError(file, f"expected {width} fields, got an empty line", row=row)
        if several is not None:
            separated, separator = _unit_separated(file, data, several, line), _UNIT
            data = separated.rstrip(b"\n")
            blank = len(data) < len(separated)
        count, width = _check_rows(file, data, separator, width, quotes, row)
        with reading(file):
            frame = pl.read_csv(
                data,
                separator=separator,
                has_header=False,
                infer_schema=False,
                quote_char='"' if quotes else None,
            )
        if frame.height != count:
            raise DataError(file, f"quotes do not pair: {count} lines, but {frame.height} rows")
        first, row = row, row + count
        if names is None:
            names, frame, first = [name or "" for name in frame.row(0)], frame[1:], 2
            _check_names(file, names)
        if frame.height:
            some, frame.columns = True, names
            yield frame, first
    if not some:
        raise EmptyFile(file, "holds a header and no rows")


def _check_rows(
    file, data: bytes, separator: str, width: int | None, quotes: bool, row: int
) -> tuple[int, int]:
    """(number of rows, number of their fields), `width` or, where it is None, that of the first.

    row: the number of the first. A line break or a separator between quotes is text.
    """
    text = np.frombuffer(data, np.uint8)
    ends, splits = text == _NEWLINE, text == ord(separator)
    returns = text == _RETURN if _RETURN in data else ends[:0]
    if quotes and _QUOTE in data:
        inside = np.bitwise_xor.accumulate(text == _QUOTE)
        if inside[-1]:
            at = int((ends & ~inside)[: data.rfind(b'"')].sum()) + row
            raise DataError(file, "a quote is not closed", row=at)
        ends, splits, returns = ends & ~inside, splits & ~inside, returns & ~inside[: len(returns)]
        # A quoted field is all of a field; a doubled quote in it closes and opens again.
        edges = np.flatnonzero(text == _QUOTE)
        beside = np.where(inside[edges], edges - 1, edges + 1)
        within = (beside >= 0) & (beside < len(data))
        beside = text[beside[within]]
        bad = (beside != ord(separator)) & (beside != _NEWLINE) & (beside != _QUOTE)
        if bad.any():
            at = int(ends[: edges[within][bad][0]].sum()) + row
            hint = " (--separator says what stands between columns)" if at == 1 else ""
            raise DataError(file, f"a quote stands in the middle of a field{hint}", row=at)
    if returns.any():
        at = int(ends[: returns.argmax()].sum()) + row
        raise DataError(file, "holds a carriage return that ends no line", row=at)
    starts = np.concatenate(([0], np.flatnonzero(ends) + 1))
    stops = np.append(starts[1:], len(data) + 1)
    places = np.flatnonzero(splits)
    width = width or int(np.searchsorted(places, stops[0])) + 1
    between = width - 1
    # The first and the last separator that each row must hold: a few times faster than to count.
    if between and len(places) == between * len(starts):
        begins, ends_before = places[::between] >= starts, places[between - 1 :: between] < stops
        if begins.all() and ends_before.all():
            return len(starts), width
    fields = np.diff(np.searchsorted(places, stops), prepend=0) + 1
    bad = np.flatnonzero(fields != width)
    if bad.size:
        begin = starts[bad[0]]
        empty = begin == len(data) or data[begin] == _NEWLINE
        got = "an empty line" if empty else int(fields[bad[0]])
        raise DataError(file, f"expected {width} fields, got {got}", row=int(bad[0]) + row)
    return len(starts), width


def _unit_separated(file, data: bytes, separator: str, row: int) -> bytes:
    """The text with one character in place of a separator of several. row: of its first line."""
    unit = data.find(_UNIT.encode())
    if unit >= 0:
        raise DataError(file, "holds a byte 0x1f: corrupt", row=data.count(b"\n", 0, unit) + row)
    if separator != WHITESPACE:
        return data.replace(separator.encode(), _UNIT.encode())
    lines = [_UNIT.join(fields) for fields in split_lines(file, data.decode().split("\n"), row)]
    return "\n".join(lines).encode()


def _check_names(file, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        what = f"two columns are called {twice!r}" if twice else "two columns have no name"
        raise DataError(file, what, row=1)
