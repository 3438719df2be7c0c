# SPDX-License-Identifier: Apache-2.0
"""Reading text files so that every problem is reported with file, column and row."""

import codecs
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fastrec.data.errors import DataError, EmptyFile, reading

_NEWLINE, _RETURN, _QUOTE = 10, 13, 34
_MARK = b"\xef\xbb\xbf"  # the byte-order mark
# What str.split() takes for blanks, too: a line that ends in a return alone would go on.
_OTHER_BLANKS = re.compile(r"[^\S \t]")
WHITESPACE = "whitespace"  # the separator that is any run of blanks and tabs
BLOCK = 1 << 24  # bytes of text at a time
_UNIT = "\x1f"  # stands for separators of more than one character


def check_file(file) -> Path:
    """The path of a file that is there."""
    file = Path(file)
    if not file.is_file():
        raise DataError(file, "file is missing" if not file.exists() else "is not a file")
    return file


def read_bytes(file, encoding: str = "utf-8") -> bytes:
    """All of `text_blocks` of a text file."""
    return next(text_blocks(file, encoding, size=-1))[0]


def text_blocks(
    file, encoding: str = "utf-8", *, size: int | None = None, quotes: bool = False
) -> Iterator[tuple[bytes, int]]:
    """The text of a file in UTF-8, gunzipped if its name ends in .gz, in blocks of whole lines with
    the number of their first; there is at least one.

    Lines end in a newline alone, but for the last of a block, which ends without; a byte-order mark
    and empty lines at the end are gone. size: bytes read at a time, `BLOCK` by default, -1 for all.
    quotes: a line break between quotes ends no line.
    """
    file = check_file(file)
    held, line, last = b"", 1, False
    with reading(file), _opened(file) as content:
        decode = _decoder(file, encoding)
        while not last:
            wanted = size or BLOCK
            with _unpacking(file):
                data = content.read(wanted)
            last = wanted < 0 or len(data) < wanted
            data = held + decode(data, last)
            if line == 1 and not held:
                data = data.removeprefix(_MARK)
            data = data.replace(b"\r\n", b"\n")
            # An empty line is one only if another follows.
            block = data[: len(data) if last else _line_end(data, quotes)].rstrip(b"\n")
            if last and line == 1 and not block.strip():
                raise EmptyFile(file, "file is empty")
            if not block:
                held = data
                continue
            held = data[len(block) + 1 :]
            _check_text(file, block, line)
            yield block, line
            line += block.count(b"\n") + 1


def _opened(file: Path):
    return (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb")


@contextmanager
def _unpacking(file) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(file, f"truncated or corrupt gzip: {error}") from error


def _line_end(data: bytes, quotes: bool) -> int:
    """Where the last line ends, behind its newline; 0 if none does."""
    if not quotes or b'"' not in data:
        return data.rfind(b"\n") + 1
    text = np.frombuffer(data, np.uint8)
    outside = ~np.bitwise_xor.accumulate(text == _QUOTE) & (text == _NEWLINE)
    return len(data) - int(outside[::-1].argmax()) if outside.any() else 0


def _check_text(file, data: bytes, line: int) -> None:
    try:
        data.isascii() or data.decode()
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + line
        raise DataError(
            file, f"byte 0x{data[error.start]:02x} is not utf-8 (of a table: --encoding says what"
            " it is, such as latin-1 or utf-16)", row=row,
        ) from None  # fmt: skip
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(file, "holds a NUL byte: corrupt", row=data.count(b"\n", 0, zero) + line)


def gunzip(file, data: bytes) -> bytes:
    """The unpacked contents of a .gz file."""
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise DataError(file, f"truncated or corrupt gzip: {error}") from error


def _decoder(file, encoding: str) -> Callable[[bytes, bool], bytes]:
    """What makes UTF-8 of the bytes of a file, in pieces; the last is said to be it."""
    if encoding == "utf-8":
        return lambda data, last: data
    try:
        b" ".decode(encoding)
    except LookupError:
        raise ValueError(f"--encoding {encoding!r} is not known") from None
    except UnicodeError:
        pass
    decoder = codecs.getincrementaldecoder(encoding)()
    begun = False

    def decode(data: bytes, last: bool) -> bytes:
        nonlocal begun
        data, begun = data if begun else data.removeprefix(_MARK), True
        try:
            return decoder.decode(data, last).encode()
        except UnicodeError as error:
            raise DataError(file, f"is not {encoding}: {error}") from None

    return decode


def read_lines(file, encoding: str = "utf-8") -> list[str]:
    """The lines of a text file without their ends; trailing empty lines are left out."""
    lines = read_bytes(file, encoding).decode().split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_fields(file) -> list[list[str]]:
    """The fields of each line of a text file, between blanks and tabs."""
    return _split(file, read_lines(file))


def _split(file, lines: list[str], first: int = 1) -> list[list[str]]:
    for row, line in enumerate(lines, first):
        odd = _OTHER_BLANKS.search(line)
        if odd is not None:
            raise DataError(file, f"{odd[0]!r} is neither a blank nor a line end", row=row)
    return [line.split() for line in lines]


def read_delimited(file, separator: str, names: list[str] | None = None, encoding: str = "utf-8"):
    """All of `delimited_blocks` as one polars.DataFrame."""
    import polars as pl

    frames = [frame for frame, _ in delimited_blocks(file, separator, names, encoding)]
    return pl.concat(frames, rechunk=True)


def delimited_blocks(
    file,
    separator: str,
    names: list[str] | None = None,
    encoding: str = "utf-8",
    size: int | None = None,
):
    """(polars.DataFrame, number of its first row) of each block of a delimited file, every column
    as text, quotes honoured in csv.

    separator: one character or several ("::"), or "whitespace", any run of blanks and tabs. names:
    the columns of a file without a header (all must be there); None reads the header. Empty fields
    are null. size: as in `text_blocks`. Raises DataError for a row that is empty or has another
    number of fields, for two columns of one name, and for a file without rows.
    """
    import polars as pl

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
    lines = [_UNIT.join(fields) for fields in _split(file, data.decode().split("\n"), row)]
    return "\n".join(lines).encode()


def _check_names(file, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        what = f"two columns are called {twice!r}" if twice else "two columns have no name"
        raise DataError(file, what, row=1)
