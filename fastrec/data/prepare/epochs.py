# SPDX-License-Identifier: Apache-2.0
"""Times that are numbers: seconds, or finer units, since 1970; exact, or refused.

A unit that is not given is inferred where every time lies between 1990 and 2100 in it: these ranges
do not overlap. A fraction is kept in a finer unit, which is said.
"""

from decimal import Decimal

from fastrec.data.errors import DataError
from fastrec.data.event_columns import (
    MICROSECONDS,
    MILLISECONDS,
    NANOSECONDS,
    SECONDS,
    SOURCE,
)
from fastrec.data.prepare.columns import first_row, int64, refuse

UNITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}  # digits behind the second
WORDS = {0: SECONDS, 3: MILLISECONDS, 6: MICROSECONDS, 9: NANOSECONDS}
_FROM, _TO = 631_152_000, 4_102_444_800  # 1990 and 2100
_YEAR_1, _YEAR_10000 = -62_135_596_800, 253_402_300_800
_NUMBER = r"^(?<sign>-?)(?<whole>0|[1-9][0-9]{0,18})(?:\.(?<fraction>[0-9]*))?$"
_WHOLE, _SAY_UNIT = "a whole number such as 7 or 1.5e9", "; --time_unit says what it counts"
_EXPONENT = r"^-?(0|[1-9][0-9]*)(\.[0-9]*)?[eE][+-]?[0-9]{1,9}$"


def is_number(series) -> bool:
    """Whether a column holds times as numbers: typed so, or text that begins with one."""
    if series.dtype.is_numeric():
        return True
    return bool(series.str.contains(r"^[+-]?[0-9]*\.?[0-9]*([eE][+-]?[0-9]+)?$")[0])


def epoch_column(file, series, first: int, unit: str | None = None):
    """(Int64, what it counts, the unit if it was inferred) of a column of numbers.

    series: integers, floats, decimals or text of numbers, without nulls. unit: a key of UNITS.
    """
    if series.dtype.is_integer():
        values, fractions = int64(file, series, first), None
    else:
        values, fractions = _decimals(file, series, first)
    inferred = None
    if unit is None:
        unit = inferred = _unit_of(file, values.rename(series.name), first)
    if unit is None:
        if fractions is not None:
            refuse(file, series, first, fractions != "", _WHOLE, _SAY_UNIT)
        return values, SOURCE, None
    scale = 10 ** UNITS[unit]
    low, high = max(_YEAR_1 * scale, -(2**63) + 1), min(_YEAR_10000 * scale, 2**63 - 1)
    outside = (values < low) | (values >= high)
    refuse(file, series, first, outside, f"a time of the years 1 to 9999 in {unit}")
    digits = UNITS[unit]
    if fractions is not None:
        values, digits = _with_fractions(file, series, first, values, fractions, digits)
    return values, WORDS[digits], inferred


def _unit_of(file, values, first: int) -> str | None:
    """The unit in which all are dates from 1990 to 2100; raises if each is one, in two units."""
    inside = {
        unit: (values >= _FROM * 10**digits) & (values < _TO * 10**digits)
        for unit, digits in UNITS.items()
    }
    found = [unit for unit, flags in inside.items() if flags.any()]
    if sum(int(flags.sum()) for flags in inside.values()) < len(values) or len(found) == 1:
        return found[0] if found and inside[found[0]].all() else None
    row = first_row(~inside[found[0]], first)
    raise DataError(
        file, f"times are dates in {found[0]} or in {found[1]}: bring them to one unit",
        column=values.name, row=row,
    )  # fmt: skip


def _decimals(file, series, first: int):
    """(whole parts as Int64, what is behind the points) of numbers that are no integers.

    The second is text, "25" for 7.25, "-25" for -7.25 and "" for 7.0; None if all are whole.
    """
    import polars as pl

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


def _without_exponents(text):
    """1.5e9 as 1500000000: exact, not through a float."""
    import polars as pl

    places = text.str.contains(_EXPONENT).arg_true()
    if len(places) == 0:
        return text
    plain = []
    for value in text.gather(places).to_list():
        number = Decimal(value)
        near = -19 < number.adjusted() < 19  # the zeros of 1e1000000000 fill no memory
        plain.append("0" if not number else f"{number:f}" if near else None)
    return text.scatter(places, pl.Series(plain, dtype=pl.String))


def _with_fractions(file, series, first: int, values, fractions, digits: int):
    """(Int64, digits behind the second) in the unit that holds every fraction."""
    import polars as pl

    negative = fractions.str.starts_with("-")
    behind = fractions.str.strip_chars_start("-")
    length = behind.str.len_chars().cast(pl.Int64)
    refuse(file, series, first, length + digits > 9, "a time to the nanosecond at most")
    finer = -(-(digits + int(length.max())) // 3) * 3
    factor = 10 ** (finer - digits)
    far = values.abs() >= (2**63 - 1) // factor
    what = f"a time that fits 64 bits in {WORDS[finer].split()[0]}, as others have fractions"
    refuse(file, series, first, far, what)
    part = behind.str.pad_end(finer - digits, "0").cast(pl.Int64)
    return values * factor + part.zip_with(~negative, -part), finer
