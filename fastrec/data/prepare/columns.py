# SPDX-License-Identifier: Apache-2.0
"""Checked columns: ids, integers and numbers, every problem reported with file, column and row.

An integer has one spelling here: "007", "+7" and "-0" are text.
"""

import numpy as np
import polars as pl

from fastrec.data.errors import DataError

_INTEGER = r"^(0|-?[1-9][0-9]{0,18})$"
_POWERS = 10 ** np.arange(1, 19)
_DIGITS = r"^[+-]?[0-9]+$"
_NUMBER = r"^-?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][+-]?[0-9]+)?$"
_LEADING_ZERO = r"^[+-]?0[0-9]"
# What programs write where a value is missing. It may as well be text: Namibia is "NA".
NA = ("NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "None", "\\N")


def first_row(flags, first: int) -> int | None:
    """The row number of the first set flag of a boolean series or array; None if there is none."""
    where = np.flatnonzero(np.asarray(flags))
    return int(where[0]) + first if where.size else None


def refuse(file, series: pl.Series, first: int, bad: pl.Series, what: str, hint: str = "") -> None:
    """Raise for the first row of a column whose flag is set: it was expected to be `what`."""
    row = first_row(bad.to_numpy(), first)
    if row is not None:
        value = series[row - first]
        value = value.to_list() if isinstance(value, pl.Series) else value
        raise DataError(
            file, f"expected {what}, got {value!r:.200}{hint}",
            column=series.name, row=row,
        )  # fmt: skip


def check_present(file, series: pl.Series, first: int) -> None:
    """Raise for the first null or empty value of a column."""
    missing = series.is_null()
    if series.dtype == pl.String:
        missing |= (series == "").fill_null(True)
    row = first_row(missing.to_numpy(), first)
    if row is not None:
        raise DataError(file, "value is missing", column=series.name, row=row)


def check_unique(file, ids: pl.Series, first: int) -> None:
    """Raise for the first id of a series that occurred before."""
    row = first_row(~ids.is_first_distinct(), first)
    if row is not None:
        raise DataError(file, f"id {ids[row - first]} is listed twice", column=ids.name, row=row)


def integers(series: pl.Series) -> pl.Series:
    """Text as Int64, null where it is no integer of 64 bits in its one spelling."""
    parsed = series.cast(pl.Int64, strict=False)
    if not parsed.has_nulls():
        # As long as its one spelling: a fraction of the time of the expression.
        values = parsed.to_numpy()
        digits = np.searchsorted(_POWERS, np.abs(values), side="right") + 1
        if (series.str.len_bytes().to_numpy() == digits + (values < 0)).all():
            return parsed
    return parsed.set(~series.str.contains(_INTEGER).fill_null(False), None)


def looks_like_a_row(names: pl.Series) -> bool:
    """Whether the names of columns hold a number: a first line that is no header."""
    return bool(names.str.contains(_DIGITS).any())


def int64(file, series: pl.Series, first: int) -> pl.Series:
    """Integers as Int64; raises for one that does not fit."""
    result = series.cast(pl.Int64, strict=False)
    row = first_row((result.is_null() & series.is_not_null()).to_numpy(), first)
    if row is not None:
        raise DataError(
            file, f"{series[row - first]} is beyond 64 bits", column=series.name, row=row
        )
    return result


def id_column(
    file, series: pl.Series, first: int, kind: str = "auto", na_values: str = "ask"
) -> pl.Series:
    """An id column as Int64 or String; `first` is the row number of its start.

    Ids are opaque: an integer may be negative. kind: "int" demands integers, "str" keeps text,
    "auto" takes integers if every value is one. na_values: "text" takes words such as NA for ids;
    they are refused otherwise.
    """
    if kind not in ("auto", "int", "str"):
        raise ValueError(f"ids must be 'auto', 'int' or 'str', got {kind!r}")
    if series.dtype in (pl.Categorical, pl.Enum, pl.Binary):
        try:
            series = series.cast(pl.String)
        except pl.exceptions.PolarsError as error:
            raise DataError(
                file, "cannot be read: ids are bytes that are no text in UTF-8, as those of UUIDs"
                " are: write them as text", column=series.name,
            ) from error  # fmt: skip
    check_present(file, series, first)
    if series.dtype == pl.String:
        return _text_ids(file, series, first, kind, na_values)
    if series.dtype.is_integer():
        return series.cast(pl.String) if kind == "str" else int64(file, series, first)
    # Floats are what pandas makes of integers where one is missing.
    hint = ": write them as integers, in pandas .astype('Int64')" if series.dtype.is_float() else ""
    raise DataError(
        file, f"ids must be integers or text, got {series.dtype}{hint}", column=series.name
    )


def _text_ids(file, series: pl.Series, first: int, kind: str, na_values: str) -> pl.Series:
    if kind != "str":
        parsed = integers(series)
        row = first_row(parsed.is_null().to_numpy(), first)
        if row is None:
            return parsed
        if kind == "int":
            raise DataError(
                file, f"expected an integer id, got {series[row - first]!r}",
                column=series.name, row=row,
            )  # fmt: skip
    row = first_row(series.is_in(list(NA)).to_numpy(), first) if na_values != "text" else None
    if row is not None:
        raise DataError(
            file, f"{series[row - first]!r} looks like a missing id; --na_values text takes it as"
            " an id, missing as none", column=series.name, row=row,
        )  # fmt: skip
    return series


def key_column(
    file, series: pl.Series, first: int, like: pl.Series | None = None, na_values: str = "ask"
) -> pl.Series:
    """The ids of a side file in the type of those that they are compared with.

    like: ids of the interactions, Int64 or String; None takes integers where all are. Text is never
    retyped: only what is written as an integer is compared with integers.
    """
    if like is None:
        return id_column(file, series, first, "auto", na_values)
    if like.dtype == pl.Int64:
        return id_column(file, series, first, "int", na_values)
    if series.dtype.is_integer():
        zeros = like.filter(like.str.contains(_LEADING_ZERO))
        if len(zeros):
            raise DataError(
                file, f"ids are integers, those of the interactions text such as {zeros[0]!r}:"
                " write them as text", column=series.name,
            )  # fmt: skip
    return id_column(file, series, first, "str", na_values)


def float_column(file, series: pl.Series, first: int) -> pl.Series:
    """A column as Float32; raises for null, text that is no number, NaN and infinity."""
    check_present(file, series, first)
    if series.dtype != pl.String and not series.dtype.is_numeric():
        raise DataError(file, f"expected numbers, got {series.dtype}", column=series.name)
    values = series.cast(pl.Float32, strict=False)
    row = first_row((~values.is_finite()).fill_null(True).to_numpy(), first)
    if row is not None:
        raise DataError(
            file, f"expected a finite number, got {series[row - first]!r}",
            column=series.name, row=row,
        )  # fmt: skip
    return values


def attribute_column(
    file, series: pl.Series, first: int, na_values: str = "ask", retype: bool = True
) -> pl.Series:
    """Text that holds nothing but integers (numbers) and nulls as Int64 (Float64); else as it is.

    na_values: words such as NA are refused ("ask"), become null ("missing") or stay ("text").
    Leading zeros keep a column text: a zip code is no number.
    """
    if series.dtype != pl.String:
        return series
    series = series.set((series == "").fill_null(False), None)
    marked = series.is_in(list(NA)).fill_null(False)
    if na_values == "missing":
        series = series.set(marked, None)
    elif na_values == "ask":
        row = first_row(marked.to_numpy(), first)
        if row is not None:
            raise DataError(
                file, f"{series[row - first]!r} may stand for a missing value: --na_values missing"
                " takes it so, --na_values text as a value", column=series.name, row=row,
            )  # fmt: skip
    if not retype:
        return series
    whole = integers(series)
    if whole.null_count() == series.null_count():
        return whole
    number = series.cast(pl.Float64, strict=False)
    # Digits that are no integer by `integers` are codes, or lose their end in 53 bits.
    code = series.str.contains(_DIGITS) & whole.is_null()
    plain = series.str.contains(_NUMBER) & ~code & number.is_finite()
    return number if plain.all() else series
