# SPDX-License-Identifier: Apache-2.0
"""Reading text files so that every problem is reported with file, column and row."""

import codecs
import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from fastrec.data.errors import DataError, EmptyFile, reading

_NEWLINE, _RETURN, _QUOTE = 10, 13, 34
_MARK = b"\xef\xbb\xbf"  # the byte-order mark
# What str.split() takes for blanks, too: a line that ends in a return alone would go on.
_OTHER_BLANKS = re.compile(r"[^\S \t]")
WHITESPACE = "whitespace"  # the separator that is any run of blanks and tabs
_UNIT = "\x1f"  # stands for separators of more than one character


def check_file(file) -> Path:
    """The path of a file that is there."""
    file = Path(file)
    if not file.is_file():
        raise DataError(file, "file is missing" if not file.exists() else "is not a file")
    return file


def read_bytes(file, encoding: str = "utf-8") -> bytes:
    """The contents of a text file in UTF-8, gunzipped if its name ends in .gz; never empty.

    Lines end in a newline alone, and a byte-order mark is gone.
    """
    file = check_file(file)
    with reading(file):
        data = file.read_bytes()
    if file.suffix.lower() == ".gz":
        data = gunzip(file, data)
    data = data.removeprefix(_MARK)
    if encoding != "utf-8":
        data = _utf8(file, data, encoding).removeprefix(_MARK)
    data = data.replace(b"\r\n", b"\n")
    if not data.strip():
        raise EmptyFile(file, "file is empty")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            file, f"byte 0x{data[error.start]:02x} is not utf-8 (of a table: --encoding says what"
            " it is, such as latin-1 or utf-16)", row=row,
        ) from None  # fmt: skip
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(file, "holds a NUL byte: corrupt", row=data.count(b"\n", 0, zero) + 1)
    return data


def gunzip(file, data: bytes) -> bytes:
    """The unpacked contents of a .gz file."""
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise DataError(file, f"truncated or corrupt gzip: {error}") from error


def _utf8(file, data: bytes, encoding: str) -> bytes:
    try:
        codecs.lookup(encoding)
        return data.decode(encoding).encode()
    except LookupError:
        raise ValueError(f"--encoding {encoding!r} is not known") from None
    except UnicodeError as error:
        raise DataError(file, f"is not {encoding}: {error}") from None


def read_lines(file, encoding: str = "utf-8") -> list[str]:
    """The lines of a text file without their ends; trailing empty lines are left out."""
    lines = read_bytes(file, encoding).decode().split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_fields(file) -> list[list[str]]:
    """The fields of each line of a text file, between blanks and tabs."""
    return _split(file, read_lines(file))


def _split(file, lines: list[str]) -> list[list[str]]:
    for row, line in enumerate(lines, 1):
        odd = _OTHER_BLANKS.search(line)
        if odd is not None:
            raise DataError(file, f"{odd[0]!r} is neither a blank nor a line end", row=row)
    return [line.split() for line in lines]


def read_delimited(file, separator: str, names: list[str] | None = None, encoding: str = "utf-8"):
    """polars.DataFrame of a delimited file with every column as text, quotes honoured in csv.

    separator: one character or several ("::"), or "whitespace", any run of blanks and tabs. names:
    the columns of a file without a header (all must be there); None reads the header. Empty fields
    are null. Raises DataError for a row that is empty or has another number of fields,
    and for two columns of one name.
    """
    import polars as pl

    if {'"', "\n", "\r", ""} & {separator, *separator}:
        raise ValueError(f"--separator cannot be {separator!r}")
    data = read_bytes(file, encoding).rstrip(b"\n")
    if len(separator) > 1 or not separator.isascii():
        data, separator = _unit_separated(file, data, separator), _UNIT
    quotes = separator in (",", ";")
    count = _check_rows(file, data, separator, None if names is None else len(names), quotes)
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
    if names is None:
        names, frame = [name or "" for name in frame.row(0)], frame[1:]
        _check_names(file, names)
    if frame.height == 0:
        raise EmptyFile(file, "holds a header and no rows")
    frame.columns = names
    return frame


def _check_rows(file, data: bytes, separator: str, width: int | None, quotes: bool) -> int:
    """The number of rows, all of which have `width` fields (those of the first where it is None).

    A line break or a separator between quotes is text.
    """
    text = np.frombuffer(data, np.uint8)
    ends, splits = text == _NEWLINE, text == ord(separator)
    returns = text == _RETURN if _RETURN in data else ends[:0]
    if quotes and _QUOTE in data:
        inside = np.bitwise_xor.accumulate(text == _QUOTE)
        if inside[-1]:
            row = int((ends & ~inside)[: data.rfind(b'"')].sum()) + 1
            raise DataError(file, "a quote is not closed", row=row)
        ends, splits, returns = ends & ~inside, splits & ~inside, returns & ~inside[: len(returns)]
        # A quoted field is all of a field; a doubled quote in it closes and opens again.
        edges = np.flatnonzero(text == _QUOTE)
        beside = np.where(inside[edges], edges - 1, edges + 1)
        within = (beside >= 0) & (beside < len(data))
        beside = text[beside[within]]
        bad = (beside != ord(separator)) & (beside != _NEWLINE) & (beside != _QUOTE)
        if bad.any():
            row = int(ends[: edges[within][bad][0]].sum()) + 1
            hint = " (--separator says what stands between columns)" if row == 1 else ""
            raise DataError(file, f"a quote stands in the middle of a field{hint}", row=row)
    if returns.any():
        row = int(ends[: returns.argmax()].sum()) + 1
        raise DataError(file, "holds a carriage return that ends no line", row=row)
    starts = np.concatenate(([0], np.flatnonzero(ends) + 1))
    fields = np.add.reduceat(splits.view(np.uint8), starts, dtype=np.uint32) + 1
    width = width or int(fields[0])
    bad = np.flatnonzero(fields != width)
    if bad.size:
        begin = starts[bad[0]]
        empty = begin == len(data) or data[begin] == _NEWLINE
        got = "an empty line" if empty else int(fields[bad[0]])
        raise DataError(file, f"expected {width} fields, got {got}", row=int(bad[0]) + 1)
    return len(starts)


def _unit_separated(file, data: bytes, separator: str) -> bytes:
    """The text with one character in place of a separator of several."""
    unit = data.find(_UNIT.encode())
    if unit >= 0:
        raise DataError(file, "holds a byte 0x1f: corrupt", row=data.count(b"\n", 0, unit) + 1)
    if separator != WHITESPACE:
        return data.replace(separator.encode(), _UNIT.encode())
    lines = [_UNIT.join(fields) for fields in _split(file, data.decode().split("\n"))]
    return "\n".join(lines).rstrip("\n").encode()


def _check_names(file, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        what = f"two columns are called {twice!r}" if twice else "two columns have no name"
        raise DataError(file, what, row=1)
