# SPDX-License-Identifier: Apache-2.0
"""Reading text files so that every problem is reported with file and row."""

import codecs
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fastrec.data.errors import DataError, EmptyFile, reading

_NEWLINE, _QUOTE = 10, 34
_MARK = b"\xef\xbb\xbf"  # the byte-order mark
# What str.split() takes for blanks, too: a line that ends in a return alone would go on.
_OTHER_BLANKS = re.compile(r"[^\S \t]")
BLOCK = 1 << 24  # bytes of text at a time


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
    return split_lines(file, read_lines(file))


def split_lines(file, lines: list[str], first: int = 1) -> list[list[str]]:
    """The fields of each line, between blanks and tabs; `first` is the number of the first line."""
    for row, line in enumerate(lines, first):
        odd = _OTHER_BLANKS.search(line)
        if odd is not None:
            raise DataError(file, f"{odd[0]!r} is neither a blank nor a line end", row=row)
    return [line.split() for line in lines]
