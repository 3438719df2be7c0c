# SPDX-License-Identifier: Apache-2.0
"""Time columns: numbers (`epochs`), dates and text as a whole count since 1970, never a guess.

A lost fraction would make ties, and ties are broken by the order of the file: what cannot be kept
is refused.
"""

from fastrec.data.errors import DataError
from fastrec.data.prepare.columns import check_present, refuse
from fastrec.data.prepare.epochs import UNITS, WORDS, epoch_column, is_number

_ISO = (
    r"^(?<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ](?<time>[0-9]{2}:[0-9]{2}(?::[0-9]{2})?)(?<fraction>\.[0-9]{1,9})?"
    r"(?<zone>Z|[+-][0-9]{2}:?[0-9]{2})?)?$"
)
_YEARS = ("%Y", "%y", "%G", "%g", "%F", "%D", "%x", "%c", "%v", "%s", "%+")
_NANO_LIMIT = 9_214_560_000_000_000  # microseconds from 1970 to 2262-01-01


def time_column(
    file, series, first: int, time_format: str | None = None, time_unit: str | None = None
):
    """(Int64, what it counts, the time_unit if it was inferred) of a time column.

    Numbers count `time_unit` ("s", "ms", "us" or "ns") since 1970: see `epochs.epoch_column`.
    Dates, date-times and ISO 8601 text become microseconds since 1970, nanoseconds where one is
    finer. time_format: of other text, as in strptime. Text with an offset is taken at it; without
    one, as UTC.
    """
    import polars as pl

    check_present(file, series, first)
    if time_unit is not None and time_unit not in UNITS:
        raise ValueError(f"time_unit must be one of {', '.join(UNITS)}, got {time_unit!r}")
    if series.dtype in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
    if time_format is not None:
        if time_unit is not None:
            raise ValueError("--time_unit is for numbers, --time_format for text: not both")
        if series.dtype != pl.String:
            raise DataError(
                file, f"--time_format is for text, the column is {series.dtype}", column=series.name
            )
        return *_formatted(file, series, first, time_format), None
    if series.dtype != pl.String and not series.dtype.is_numeric():
        if series.dtype not in (pl.Date, pl.Datetime):
            raise DataError(file, f"expected times, got {series.dtype}", column=series.name)
    elif is_number(series):
        return epoch_column(file, series, first, time_unit)
    if time_unit is not None:
        raise DataError(
            file, "--time_unit is for numbers, the column holds dates", column=series.name
        )
    moments = _iso if series.dtype == pl.String else _moments
    return *moments(file, series, first), None


def _formatted(file, series, first: int, time_format: str):
    import polars as pl

    if not any(year in time_format for year in _YEARS):
        raise ValueError(f"--time_format {time_format!r} has no year: such as %m/%d/%Y")
    moments = series.str.to_datetime(time_format, strict=False, time_unit="us")
    micro = moments.dt.timestamp("us")
    what = f"a time that follows --time_format {time_format!r}"
    refuse(file, series, first, micro.is_null(), what)
    finer = series.str.to_datetime(time_format, strict=False, time_unit="ns").cast(pl.Int64) % 1000
    # Nanoseconds of 64 bits end in 2262, and wrap around there.
    return _counted(file, series, first, micro, finer.set(micro.abs() > _NANO_LIMIT, 0))


def _iso(file, series, first: int):
    import polars as pl

    parts = series.str.extract_groups(_ISO).struct.unnest()
    aware = parts["zone"].is_not_null()
    if aware.any():
        mixed = parts["date"].is_not_null() & ~aware
        refuse(file, series, first, mixed, "a time with an offset, as others have")
    clock = parts["time"].fill_null("00:00").str.replace("^(.....)$", "${1}:00")
    text = parts["date"] + "T" + clock
    moments = text.str.to_datetime("%Y-%m-%dT%H:%M:%S", strict=False, time_unit="us")
    fraction = parts["fraction"].fill_null("").str.strip_chars_start(".").str.pad_end(9, "0")
    fraction = fraction.cast(pl.Int64)
    zone = parts["zone"].str.replace("Z", "+0000").str.replace(":", "").fill_null("+0000")
    minutes = zone.str.slice(1, 2).cast(pl.Int64) * 60 + zone.str.slice(3, 2).cast(pl.Int64)
    minutes *= zone.str.starts_with("+").cast(pl.Int64) * 2 - 1
    micro = moments.dt.timestamp("us") + fraction // 1000 - minutes * 60_000_000
    refuse(
        file, series, first, micro.is_null(),
        "a number or an ISO time such as 2024-01-31 or 2024-01-31T10:00:00",
        "; --time_format says how it is written, such as %m/%d/%Y or %d.%m.%Y %H:%M:%S",
    )  # fmt: skip
    return _counted(file, series, first, micro, fraction % 1000)


def _moments(file, series, first: int):
    """Dates and date-times of a typed file."""
    import polars as pl

    micro = series.cast(pl.Datetime("us"), strict=False).dt.timestamp("us")
    number = series.to_physical()  # far-off dates cannot be printed
    refuse(file, number, first, micro.is_null(), "a time whose microseconds fit 64 bits")
    finer = micro * 0
    if series.dtype == pl.Datetime and series.dtype.time_unit == "ns":
        finer = series.cast(pl.Int64) % 1000
    return _counted(file, series, first, micro, finer)


def _counted(file, series, first: int, micro, finer):
    """(Int64, unit): microseconds, or nanoseconds where one has a finer fraction (0 to 999)."""
    if not (finer != 0).any():
        return micro, WORDS[6]
    what = "a time from 1678 to 2261, as others have nanoseconds"
    refuse(file, series, first, micro.abs() > _NANO_LIMIT, what)
    return micro * 1000 + finer, WORDS[9]
