"""Time columns: integers as they are, everything else as a whole count since 1970, never a guess.

A lost fraction would make ties, and ties are broken by the order of the file: what cannot be kept
is refused.
"""

import re
from decimal import Decimal

from fastrec.data.errors import DataError
from fastrec.data.event_columns import MICROSECONDS, NANOSECONDS, SOURCE
from fastrec.data.prepare.columns import check_present, first_row, int64, integers

_ISO = (
    r"^(?<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ](?<time>[0-9]{2}:[0-9]{2}(?::[0-9]{2})?)(?<fraction>\.[0-9]{1,9})?"
    r"(?<zone>Z|[+-][0-9]{2}:?[0-9]{2})?)?$"
)
_NUMBER = r"^[+-]?[0-9]*\.?[0-9]*([eE][+-]?[0-9]+)?$"
_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]{1,9})?")
_YEARS = ("%Y", "%y", "%G", "%g", "%F", "%D", "%x", "%c", "%v", "%s", "%+")
_NANO_LIMIT = 9_214_560_000_000_000  # microseconds from 1970 to 2262-01-01


def time_column(file, series, first: int, time_format: str | None = None):
    """(Int64, what it counts) of a time column.

    Integers stay; numbers written with a point or an exponent must be whole. Dates, date-times and
    ISO 8601 text become microseconds since 1970, nanoseconds where one is finer. time_format: of
    other text, as in strptime. Text with an offset is taken at it; without one, as UTC.
    """
    import polars as pl

    check_present(file, series, first)
    if series.dtype in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
    if time_format is not None:
        if series.dtype != pl.String:
            raise DataError(
                file, f"--time_format is for text, the column is {series.dtype}", column=series.name
            )
        return _formatted(file, series, first, time_format)
    if series.dtype.is_integer():
        return int64(file, series, first), SOURCE
    if series.dtype in (pl.Date, pl.Datetime):
        return _moments(file, series, first)
    if series.dtype.is_float():
        return _whole_floats(file, series, first), SOURCE
    if series.dtype.is_decimal():
        series = series.cast(pl.String)
    if series.dtype != pl.String:
        raise DataError(file, f"expected times, got {series.dtype}", column=series.name)
    whole = integers(series)
    if whole.null_count() == 0:
        return whole, SOURCE
    if series.str.contains(_NUMBER)[0]:
        return _whole_text(file, series, first, whole), SOURCE
    return _iso(file, series, first)


def _whole_floats(file, series, first: int):
    import polars as pl

    # Beyond the mantissa neighbours are equal: 1.7e18 ns are 256 ns apart as a double.
    limit = 2.0 ** (53 if series.dtype == pl.Float64 else 24)
    number = series.cast(pl.Float64)
    _refuse(file, series, first, ~number.is_finite() | (number.round() != number), "a whole number")
    what = f"a float up to {limit:.0f}, beyond it times are rounded: write integers"
    _refuse(file, series, first, number.abs() > limit, what)
    return number.cast(pl.Int64)


def _whole_text(file, series, first: int, whole):
    """Numbers in text, beside integers: exact, not through a float."""
    import polars as pl

    places = whole.is_null().arg_true()
    values = [_exact(text) for text in series.gather(places).to_list()]
    bad = pl.Series([value is None for value in values], dtype=pl.Boolean)
    if bad.any():
        row = int(places[int(bad.to_numpy().argmax())])
        raise DataError(
            file, f"expected a whole number such as 7 or 1.5e9, got {series[row]!r}",
            column=series.name, row=row + first,
        )  # fmt: skip
    return whole.scatter(places, values)


def _exact(text: str) -> int | None:
    """The integer of 64 bits that the text is; None for a fraction or another spelling."""
    if not _WHOLE.fullmatch(text):
        return None
    number = Decimal(text)
    if number.adjusted() > 18:  # int() of 1e1000000000 takes for ever
        return None
    value = int(number)
    return value if value == number and -(2**63) <= value < 2**63 else None


def _formatted(file, series, first: int, time_format: str):
    import polars as pl

    if not any(year in time_format for year in _YEARS):
        raise ValueError(f"--time_format {time_format!r} has no year: such as %m/%d/%Y")
    moments = series.str.to_datetime(time_format, strict=False, time_unit="us")
    micro = moments.dt.timestamp("us")
    what = f"a time that follows --time_format {time_format!r}"
    _refuse(file, series, first, micro.is_null(), what)
    finer = series.str.to_datetime(time_format, strict=False, time_unit="ns").cast(pl.Int64) % 1000
    # Nanoseconds of 64 bits end in 2262, and wrap around there.
    return _counted(file, series, first, micro, finer.set(micro.abs() > _NANO_LIMIT, 0))


def _iso(file, series, first: int):
    import polars as pl

    parts = series.str.extract_groups(_ISO).struct.unnest()
    aware = parts["zone"].is_not_null()
    if aware.any():
        mixed = parts["date"].is_not_null() & ~aware
        _refuse(file, series, first, mixed, "a time with an offset, as others have")
    clock = parts["time"].fill_null("00:00").str.replace("^(.....)$", "${1}:00")
    text = parts["date"] + "T" + clock
    moments = text.str.to_datetime("%Y-%m-%dT%H:%M:%S", strict=False, time_unit="us")
    fraction = parts["fraction"].fill_null("").str.strip_chars_start(".").str.pad_end(9, "0")
    fraction = fraction.cast(pl.Int64)
    zone = parts["zone"].str.replace("Z", "+0000").str.replace(":", "").fill_null("+0000")
    minutes = zone.str.slice(1, 2).cast(pl.Int64) * 60 + zone.str.slice(3, 2).cast(pl.Int64)
    minutes *= zone.str.starts_with("+").cast(pl.Int64) * 2 - 1
    micro = moments.dt.timestamp("us") + fraction // 1000 - minutes * 60_000_000
    _refuse(
        file, series, first, micro.is_null(),
        "an integer or an ISO time such as 2024-01-31 or 2024-01-31T10:00:00",
        "; --time_format says how it is written, such as %m/%d/%Y or %d.%m.%Y %H:%M:%S",
    )  # fmt: skip
    return _counted(file, series, first, micro, fraction % 1000)


def _moments(file, series, first: int):
    """Dates and date-times of a typed file."""
    import polars as pl

    micro = series.cast(pl.Datetime("us"), strict=False).dt.timestamp("us")
    number = series.to_physical()  # far-off dates cannot be printed
    _refuse(file, number, first, micro.is_null(), "a time whose microseconds fit 64 bits")
    finer = micro * 0
    if series.dtype == pl.Datetime and series.dtype.time_unit == "ns":
        finer = series.cast(pl.Int64) % 1000
    return _counted(file, series, first, micro, finer)


def _counted(file, series, first: int, micro, finer):
    """(Int64, unit): microseconds, or nanoseconds where one has a finer fraction (0 to 999)."""
    if not (finer != 0).any():
        return micro, MICROSECONDS
    what = "a time from 1678 to 2261, as others have nanoseconds"
    _refuse(file, series, first, micro.abs() > _NANO_LIMIT, what)
    return micro * 1000 + finer, NANOSECONDS


def _refuse(file, series, first: int, bad, what: str, hint: str = "") -> None:
    row = first_row(bad.to_numpy(), first)
    if row is not None:
        raise DataError(
            file, f"expected {what}, got {series[row - first]!r}{hint}",
            column=series.name, row=row,
        )  # fmt: skip
