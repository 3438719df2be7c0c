"""Reading text files and columns so that every problem is reported with file, column and row."""

import csv
import gzip
import io
import zlib
from pathlib import Path

import numpy as np

from fastrec.data.errors import DataError

# "007" and "+7" parse as integers but are not how an integer is written: such columns stay text.
_CANONICAL_INT = r"^(0|-?[1-9][0-9]{0,18})$"


def read_bytes(file, encoding: str = "utf-8") -> bytes:
    """The contents of a text file in UTF-8, gunzipped if its name ends in .gz; never empty."""
    file = Path(file)
    if not file.is_file():
        raise DataError(file, "file is missing" if not file.exists() else "is not a file")
    data = file.read_bytes()
    if file.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(file, f"truncated or corrupt gzip: {error}") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise DataError(file, "file is empty")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            file, f"byte 0x{data[error.start]:02x} is not {encoding}", row=row
        ) from None
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(file, "holds a NUL byte: corrupt", row=data.count(b"\n", 0, zero) + 1)
    return data if encoding == "utf-8" else text.encode()


def read_lines(file, encoding: str = "utf-8") -> list[str]:
    """The lines of a text file without their ends; trailing empty lines are left out."""
    lines = read_bytes(file, encoding).decode().split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_delimited(file, separator: str, names: list[str] | None = None, encoding: str = "utf-8"):
    """polars.DataFrame of a delimited file with every column as text, quotes honoured.

    names: the columns of a file without a header (all must be there); None reads the header.
    Empty fields are null. Raises DataError for a row with another number of fields.
    """
    import polars as pl

    if len(separator) > 1:
        return _split_lines(file, read_lines(file, encoding), separator, names)
    data = read_bytes(file, encoding)
    try:
        frame = pl.read_csv(
            data,
            separator=separator,
            has_header=names is None,
            infer_schema=False,
            quote_char='"' if separator == "," else None,
        )
    except pl.exceptions.PolarsError as error:
        width = len(names) if names else data.split(b"\n", 1)[0].count(separator.encode()) + 1
        raise DataError(
            file, f"expected {width} fields: {str(error).splitlines()[0]}",
            row=_first_ragged(data, separator, width),
        ) from error  # fmt: skip
    if names is not None:
        if frame.width != len(names):
            raise DataError(file, f"expected {len(names)} fields, got {frame.width}", row=1)
        frame.columns = names
    if frame.height == 0:
        raise DataError(file, "holds a header and no rows")
    if frame[:, -1].null_count():  # polars fills rows that are too short
        row = _first_short(data, separator, frame.width)
        if row is not None:
            raise DataError(file, f"expected {frame.width} fields, the row has fewer", row=row)
    return frame


def _split_lines(file, lines: list[str], separator: str, names: list[str] | None):
    import polars as pl

    rows = [line.split(separator) for line in lines]
    first = 1
    if names is None:
        names, rows, first = rows[0], rows[1:], 2
    for row, fields in enumerate(rows, first):
        if len(fields) != len(names):
            raise DataError(file, f"expected {len(names)} fields, got {len(fields)}", row=row)
    columns = zip(*rows, strict=True)
    return pl.DataFrame(
        {
            name: pl.Series(name, [field or None for field in column], dtype=pl.String)
            for name, column in zip(names, columns, strict=True)
        }
    )


def _first_short(data: bytes, separator: str, width: int) -> int | None:
    if separator == "," and b'"' in data:
        rows = csv.reader(io.StringIO(data.decode()))
        return next((rows.line_num for row in rows if row and len(row) < width), None)
    for row, line in enumerate(data.split(b"\n"), 1):
        if line.strip(b"\r") and line.count(separator.encode()) + 1 < width:
            return row
    return None


def _first_ragged(data: bytes, separator: str, width: int) -> int | None:
    for row, line in enumerate(data.split(b"\n"), 1):
        if line and line.count(separator.encode()) + 1 > width:
            return row
    return None


def first_row(flags, first: int) -> int | None:
    """The row number of the first set flag of a boolean series or array; None if there is none."""
    where = np.flatnonzero(np.asarray(flags))
    return int(where[0]) + first if where.size else None


def check_present(file, series, first: int) -> None:
    """Raise for the first null or empty value of a column."""
    row = first_row(series.is_null().to_numpy(), first)
    if row is not None:
        raise DataError(file, "value is missing", column=series.name, row=row)


def check_unique(file, ids, first: int, column: str | None = None) -> None:
    """Raise for the first id of a series that occurred before."""
    row = first_row(~ids.is_first_distinct(), first)
    if row is not None:
        raise DataError(
            file, f"id {ids[row - first]} is listed twice", column=column or ids.name, row=row
        )


def id_column(file, series, first: int, kind: str = "auto"):
    """An id column as Int64 (not negative) or String; `first` is the row number of its start.

    kind: "int" demands integers, "str" keeps text, "auto" takes integers if every value is one.
    """
    import polars as pl

    check_present(file, series, first)
    if kind not in ("auto", "int", "str"):
        raise ValueError(f"ids must be 'auto', 'int' or 'str', got {kind!r}")
    if series.dtype in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
    if series.dtype == pl.String and kind != "str":
        parsed = series.cast(pl.Int64, strict=False)
        bad = (parsed.is_null() | ~series.str.contains(_CANONICAL_INT)).to_numpy()
        if bad.any() and kind == "int":
            place = int(bad.argmax())
            raise DataError(
                file, f"expected an integer id, got {series[place]!r}",
                column=series.name, row=place + first,
            )  # fmt: skip
        series = series if bad.any() else parsed
    elif series.dtype.is_integer():
        series = series.cast(pl.String) if kind == "str" else _int64(file, series, first)
    elif series.dtype != pl.String:
        raise DataError(
            file, f"ids must be integers or text, got {series.dtype}", column=series.name
        )
    if series.dtype == pl.Int64:
        row = first_row((series < 0).to_numpy(), first)
        if row is not None:
            raise DataError(file, f"negative id {series[row - first]}", column=series.name, row=row)
    return series


def _int64(file, series, first: int):
    """Integers as Int64; raises for one that does not fit."""
    import polars as pl

    result = series.cast(pl.Int64, strict=False)
    row = first_row(result.is_null().to_numpy(), first)
    if row is not None:
        raise DataError(
            file, f"{series[row - first]} is beyond 64 bits", column=series.name, row=row
        )
    return result


def float_column(file, series, first: int):
    """A column as Float32; raises for null, text that is no number, NaN and infinity."""
    import polars as pl

    check_present(file, series, first)
    values = series.cast(pl.Float32, strict=False) if _castable(series) else None
    if values is None:
        raise DataError(file, f"expected numbers, got {series.dtype}", column=series.name)
    row = first_row((~values.is_finite()).fill_null(True).to_numpy(), first)
    if row is not None:
        raise DataError(
            file, f"expected a finite number, got {series[row - first]!r}",
            column=series.name, row=row,
        )  # fmt: skip
    return values


def time_column(file, series, first: int):
    """A time column as Int64: integers as they are, dates and ISO text as microseconds since 1970.

    Numbers written as floats must be whole (a lost fraction would make ties).
    """
    import polars as pl

    check_present(file, series, first)
    if series.dtype.is_integer():
        return _int64(file, series, first)
    if series.dtype.is_temporal() and series.dtype not in (pl.Duration, pl.Time):
        return series.cast(pl.Datetime("us")).cast(pl.Int64)
    if not _castable(series):
        raise DataError(file, f"expected times, got {series.dtype}", column=series.name)
    whole = series.cast(pl.Int64, strict=False) if series.dtype == pl.String else None
    if whole is not None and whole.null_count() == 0:
        return whole
    number = series.cast(pl.Float64, strict=False)
    if series.dtype == pl.String and number.is_null()[0]:
        parsed = series.str.to_datetime(strict=False, time_unit="us", ambiguous="null")
        if parsed.is_null()[0]:
            parsed = series.str.to_date(strict=False).cast(pl.Datetime("us"))
        bad, what = parsed.is_null(), "a time"
        result = parsed.cast(pl.Int64)
    else:
        bad = (~number.is_finite()).fill_null(True) | (number.round() != number).fill_null(True)
        result, what = number.fill_nan(None).cast(pl.Int64, strict=False), "a whole number"
        bad |= result.is_null()  # beyond 64 bits
    row = first_row(bad.to_numpy(), first)
    if row is not None:
        raise DataError(
            file, f"expected {what}, got {series[row - first]!r}", column=series.name, row=row
        )
    return result


def _castable(series) -> bool:
    import polars as pl

    return series.dtype == pl.String or series.dtype.is_numeric()
