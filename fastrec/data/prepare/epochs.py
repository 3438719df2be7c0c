# SPDX-License-Identifier: Apache-2.0
"""Times that are numbers: seconds, or finer units, since 1970; exact, or refused.

A unit that is not given is inferred where every time lies between 1990 and 2100 in it: these ranges
do not overlap. A fraction is kept in a finer unit, which is said.
"""

from dataclasses import dataclass, field
from decimal import Decimal

import polars as pl

from fastrec.data.errors import DataError
from fastrec.data.event_columns import (
    MICROSECONDS,
    MILLISECONDS,
    NANOSECONDS,
    SECONDS,
    SOURCE,
)
from fastrec.data.prepare.columns import first_row, int64, integers, refuse

UNITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}  # digits behind the second
WORDS = {0: SECONDS, 3: MILLISECONDS, 6: MICROSECONDS, 9: NANOSECONDS}
_FROM, _TO = 631_152_000, 4_102_444_800  # 1990 and 2100
_YEAR_1, _YEAR_10000 = -62_135_596_800, 253_402_300_800
_NUMBER = r"^(?<sign>-?)(?<whole>0|[1-9][0-9]{0,18})(?:\.(?<fraction>[0-9]*))?$"
_WHOLE, _SAY_UNIT = "a whole number such as 7 or 1.5e9", "; --time_unit says what it counts"
_EXPONENT = r"^-?(0|[1-9][0-9]*)(\.[0-9]*)?[eE][+-]?[0-9]{1,9}$"


@dataclass
class Known:
    """What holds for a whole time column that is read block by block.

    Settled before, from the blocks: numbers: whether it holds numbers. unit: of these, where no
    setting names one; "" is none, None infers it. digits: fractions are kept to as many behind the
    unit at least. offsets: text has them.
    Seen so far: plain: a block of text without offsets, which are refused where the column is read
    again. times: number of them; inside: how many are dates of 1990 to 2100 by unit; outside:
    (file, column, row) of the first that is none.
    """

    numbers: bool | None = None
    unit: str | None = None
    digits: int = 0
    offsets: bool = False
    plain: bool = False
    times: int = 0
    inside: dict[str, int] = field(default_factory=lambda: dict.fromkeys(UNITS, 0))
    outside: dict[str, tuple] = field(default_factory=dict)

    def inferred_unit(self) -> str | None:
        """The unit in which all times seen are dates from 1990 to 2100; raises if each is one, in
        two units."""
        found = [unit for unit, count in self.inside.items() if count]
        if sum(self.inside.values()) < self.times or len(found) == 1:
            return found[0] if found and self.inside[found[0]] == self.times else None
        file, column, row = self.outside[found[0]]
        raise DataError(
            file, f"times are dates in {found[0]} or in {found[1]}: bring them to one unit",
            column=column, row=row,
        )  # fmt: skip

    def see(self, file, values: pl.Series, first: int) -> None:
        """Count whole numbers (Int64 without nulls) of a block."""
        self.times += len(values)
        low, high = values.min(), values.max()
        for unit, digits in UNITS.items():
            if _FROM * 10**digits <= low and high < _TO * 10**digits:  # as it mostly is
                self.inside[unit] += len(values)
                for other in UNITS.keys() - {unit}:
                    self.outside.setdefault(other, (file, values.name, first))
                return
        for unit, digits in UNITS.items():
            inside = (values >= _FROM * 10**digits) & (values < _TO * 10**digits)
            self.inside[unit] += int(inside.sum())
            if unit not in self.outside and not inside.all():
                self.outside[unit] = file, values.name, first_row(~inside, first)


def is_number(series: pl.Series) -> bool:
    """Whether a column holds times as numbers: typed so, or text that begins with one."""
    if series.dtype.is_numeric():
        return True
    return bool(series.str.contains(r"^[+-]?[0-9]*\.?[0-9]*([eE][+-]?[0-9]+)?$")[0])


def epoch_column(
    file, series: pl.Series, first: int, unit: str | None = None, known: Known | None = None
) -> tuple[pl.Series, str, str | None]:
    """(Int64, what it counts, the unit if it was inferred) of a column of numbers.

    series: integers, floats, decimals or text of numbers, without nulls. unit: a key of UNITS.
    known: of a column of which this is a block.
    """
    known = known or Known()
    values: pl.Series | None
    fractions = None
    if series.dtype.is_integer():
        values = int64(file, series, first)
    else:
        values = integers(series) if series.dtype == pl.String else None
        if values is None or values.has_nulls():
            values, fractions = _decimals(file, series, first)
    inferred = None
    if unit is None and known.unit is not None:
        unit = inferred = known.unit or None
    elif unit is None:
        block = Known()
        for each in (known, block):
            each.see(file, values.rename(series.name), first)
        unit = inferred = block.inferred_unit()
    if unit is None:
        if fractions is not None:
            refuse(file, series, first, fractions != "", _WHOLE, _SAY_UNIT)
        return values, SOURCE, None
    scale = 10 ** UNITS[unit]
    low, high = max(_YEAR_1 * scale, -(2**63) + 1), min(_YEAR_10000 * scale, 2**63 - 1)
    outside = (values < low) | (values >= high)
    refuse(file, series, first, outside, f"a time of the years 1 to 9999 in {unit}")
    digits = UNITS[unit]
    if fractions is not None or known.digits:
        values, digits = _with_fractions(
            file, series, first, values, fractions, digits, known.digits
        )
    return values, WORDS[digits], inferred


def _decimals(file, series: pl.Series, first: int) -> tuple[pl.Series, pl.Series | None]:
    """(whole parts as Int64, what is behind the points) of numbers that are no integers.

    The second is text, "25" for 7.25, "-25" for -7.25 and "" for 7.0; None if all are whole.
    """
    if series.dtype.is_float():
        # Beyond the mantissa neighbours are equal: 1.7e18 ns are 256 ns apart as a double.
        limit = 2.0 ** (53 if series.dtype == pl.Float64 else 24)
        number = series.cast(pl.Float64)
        refuse(file, series, first, ~number.is_finite(), "a whole number")
        what = f"a float up to {limit:.0f}, beyond it times are rounded: write integers"
        refuse(file, series, first, number.abs() > limit, what)
        if (number.round() == number).all():
            return number.cast(pl.Int64), None
    text = _without_exponents(series.cast(pl.String))  # a float as the shortest text that is it
    parts = text.str.extract_groups(_NUMBER).struct.unnest()
    values = (parts["sign"] + parts["whole"]).cast(pl.Int64, strict=False)
    refuse(file, series, first, values.is_null(), _WHOLE)
    behind = parts["fraction"].fill_null("").str.strip_chars_end("0")
    if (behind == "").all():
        return values, None
    return values, (parts["sign"] + behind).set(behind == "", "")


def _without_exponents(text: pl.Series) -> pl.Series:
    """1.5e9 as 1500000000: exact, not through a float."""
    places = text.str.contains(_EXPONENT).arg_true()
    if len(places) == 0:
        return text
    plain = []
    for value in text.gather(places).to_list():
        number = Decimal(value)
        near = -19 < number.adjusted() < 19  # the zeros of 1e1000000000 fill no memory
        plain.append("0" if not number else f"{number:f}" if near else None)
    return text.scatter(places, pl.Series(plain, dtype=pl.String))


def _with_fractions(
    file,
    series: pl.Series,
    first: int,
    values: pl.Series,
    fractions: pl.Series | None,
    digits: int,
    least: int,
) -> tuple[pl.Series, int]:
    """(Int64, digits behind the second) in the unit that holds every fraction, and `least` more
    digits than `digits`."""
    if fractions is None:
        fractions = pl.repeat("", len(values), dtype=pl.String, eager=True)
    negative = fractions.str.starts_with("-")
    behind = fractions.str.strip_chars_start("-")
    length = behind.str.len_chars().cast(pl.Int64)
    refuse(file, series, first, length + digits > 9, "a time to the nanosecond at most")
    finer = max(-(-(digits + int(length.to_numpy().max())) // 3) * 3, digits + least)
    factor = 10 ** (finer - digits)
    far = values.abs() >= (2**63 - 1) // factor
    what = f"a time that fits 64 bits in {WORDS[finer].split()[0]}, as others have fractions"
    refuse(file, series, first, far, what)
    part = behind.str.pad_end(finer - digits, "0").cast(pl.Int64)
    return values * factor + part.zip_with(~negative, -part), finer
