# SPDX-License-Identifier: Apache-2.0
"""Time columns: numbers (`epochs`), dates and text as a whole count since 1970, never a guess.

A lost fraction would make ties, and ties are broken by the order of the file: what cannot be kept
is refused.
"""

import re

import polars as pl

from fastrec.data.errors import DataError
from fastrec.data.event_columns import SOURCE
from fastrec.data.prepare.columns import check_present, refuse
from fastrec.data.prepare.epochs import UNITS, WORDS, Known, epoch_column, is_number

_ISO = (
    r"^(?<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ](?<time>[0-9]{2}:[0-9]{2}(?::[0-9]{2})?)(?<fraction>\.[0-9]{1,9})?"
    r"(?<zone>Z|[+-](?:0[0-9]|1[0-8]):?[0-5][0-9])?)?$"
)
_YEARS = ("%Y", "%y", "%G", "%g", "%F", "%D", "%x", "%c", "%v", "%s", "%+")
_DIGITS = {word: digits for digits, word in WORDS.items()}
_NANO_LIMIT = 9_214_560_000_000_000  # microseconds from 1970 to 2262-01-01


class Clock:
    """Reads a time column block by block to what `time_column` makes of it at once.

    A block is read by what it says itself. Where all blocks say the same, which is usual, that is
    all; otherwise `settled` is False, and they are to be read again by what holds for all.
    """

    def __init__(self, time_format: str | None = None, time_unit: str | None = None):
        self.settings = time_format, time_unit
        self.word: str = SOURCE  # what a time counts
        self.unit: str | None = None  # if it was inferred
        self._known = Known()
        self._said: set[tuple[str, str | None, bool]] = set()
        self._again = False

    def read(self, file, series: pl.Series, first: int) -> pl.Series:
        """Int64 of a block; raises as `time_column` does."""
        before = self._known.offsets
        values, self.word, self.unit = time_column(
            file, series, first, *self.settings, known=self._known
        )
        self._said.add((self.word, self.unit, self._known.offsets))
        self._known.offsets = before
        return values

    def settled(self, source) -> bool:
        """Whether all blocks were read alike. Raises DataError for times of two kinds."""
        if len(self._said) <= 1:
            return True
        if self._again:
            words = " and ".join(sorted({word for word, *_ in self._said}))
            raise DataError(source, f"times are {words}: bring them to one unit")
        self._again = True
        known = Known(self._known.numbers, offsets=any(offsets for *_, offsets in self._said))
        unit = self.settings[1]
        if known.numbers and unit is None:
            known.unit = unit = self._known.inferred_unit() or ""
        base = UNITS[unit] if unit else 6
        if unit != "":
            finest = max(_DIGITS[word] for word, *_ in self._said if word in _DIGITS)
            known.digits = max(finest - base, 0)
        self._known, self._said = known, set()
        return False


def time_column(
    file,
    series: pl.Series,
    first: int,
    time_format: str | None = None,
    time_unit: str | None = None,
    known: Known | None = None,
) -> tuple[pl.Series, str, str | None]:
    """(Int64, what it counts, the time_unit if it was inferred) of a time column.

    Numbers count `time_unit` ("s", "ms", "us" or "ns") since 1970: see `epochs.epoch_column`.
    Dates, date-times and ISO 8601 text become microseconds since 1970, nanoseconds where one is
    finer. time_format: of other text, as in strptime. Text with an offset is taken at it; without
    one, as UTC. known: of a column of which this is a block.
    """
    known = known or Known()
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
        return *_formatted(file, series, first, time_format, known), None
    if series.dtype != pl.String and not series.dtype.is_numeric():
        if series.dtype not in (pl.Date, pl.Datetime):
            raise DataError(file, f"expected times, got {series.dtype}", column=series.name)
    else:
        if known.numbers is None:
            known.numbers = is_number(series)
        if known.numbers:
            return epoch_column(file, series, first, time_unit, known)
    if time_unit is not None:
        raise DataError(
            file, "--time_unit is for numbers, the column holds dates", column=series.name
        )
    moments = _iso if series.dtype == pl.String else _moments
    return *moments(file, series, first, known), None


def _formatted(
    file, series: pl.Series, first: int, time_format: str, known: Known
) -> tuple[pl.Series, str]:
    if not any(year in time_format for year in _YEARS):
        raise ValueError(f"--time_format {time_format!r} has no year: such as %m/%d/%Y")
    # As strptime reads it: %f of Polars is a whole number of nanoseconds, and it skips %Z.
    time_format = re.sub(r"%%|\.%f", lambda part: "%.f" if part[0] == ".%f" else "%%", time_format)
    codes = re.findall(r"%[-_0]?.", time_format)
    if "%f" in codes:
        raise ValueError("--time_format: %f stands behind a point, as in %S.%f")
    if "%Z" in codes:
        raise ValueError(
            "--time_format: the name of a zone (%Z) does not say how far it is from UTC: write one"
            " name as it stands, such as UTC, for times in it, or use %z for offsets such as +02:00"
        )
    moments = series.str.to_datetime(time_format, strict=False, time_unit="us")
    micro = moments.dt.timestamp("us")
    what = f"a time that follows --time_format {time_format!r}"
    refuse(file, series, first, micro.is_null(), what)
    finer = series.str.to_datetime(time_format, strict=False, time_unit="ns").cast(pl.Int64) % 1000
    # Nanoseconds of 64 bits end in 2262, and wrap around there.
    return _counted(file, series, first, micro, finer.set(micro.abs() > _NANO_LIMIT, 0), known)


def _iso(file, series: pl.Series, first: int, known: Known) -> tuple[pl.Series, str]:
    parts = series.str.extract_groups(_ISO).struct.unnest()
    aware = parts["zone"].is_not_null()
    known.offsets |= bool(aware.any())
    if known.offsets and not known.plain:
        mixed = parts["date"].is_not_null() & ~aware
        refuse(file, series, first, mixed, "a time with an offset, as others have")
    known.plain |= not aware.any()
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
    return _counted(file, series, first, micro, fraction % 1000, known)


def _moments(file, series: pl.Series, first: int, known: Known) -> tuple[pl.Series, str]:
    """Dates and date-times of a typed file."""
    micro = series.cast(pl.Datetime("us"), strict=False).dt.timestamp("us")
    number = series.to_physical()  # far-off dates cannot be printed
    refuse(file, number, first, micro.is_null(), "a time whose microseconds fit 64 bits")
    finer = micro * 0
    if isinstance(series.dtype, pl.Datetime) and series.dtype.time_unit == "ns":
        finer = series.cast(pl.Int64) % 1000
    return _counted(file, series, first, micro, finer, known)


def _counted(
    file, series: pl.Series, first: int, micro: pl.Series, finer: pl.Series, known: Known
) -> tuple[pl.Series, str]:
    """(Int64, unit): microseconds, or nanoseconds where one has a finer fraction (0 to 999)."""
    if not (known.digits or (finer != 0).any()):
        return micro, WORDS[6]
    what = "a time from 1678 to 2261, as others have nanoseconds"
    refuse(file, series, first, micro.abs() > _NANO_LIMIT, what)
    return micro * 1000 + finer, WORDS[9]
