# SPDX-License-Identifier: Apache-2.0
"""Tables with a row per user whose items stand in one column, oldest first."""

import json

import numpy as np
import polars as pl

from fastrec.data.errors import DataError, reading
from fastrec.data.prepare.columns import NA, first_row
from fastrec.data.prepare.events import events_of
from fastrec.data.prepare.names import KNOWN, NONE, find_columns, plain
from fastrec.data.prepare.raw import RawData
from fastrec.data.prepare.rows import Rows
from fastrec.data.prepare.sources import name_of, read_source


def read_histories(
    source,
    *,
    user: str | None = None,
    history: str | None = None,
    separator: str | None = None,
    columns: list[str] | None = None,
    encoding: str | None = None,
    on_duplicate: str = "error",
    **options,
) -> RawData:
    """A row per user with a list of items: text between blanks or commas, JSON, or a list column.

    The items of a row are in order; other columns are not read. A user may occur in several rows:
    the longest history counts, the last of equally long ones. Rows that are equal to it or its
    beginning say nothing new, and are counted; others are an error unless on_duplicate="drop".
    separator, columns, encoding: of the file, see `tables.read_frame`. options: ids, na_values and
    on_missing of `events.events_of`; an empty history lacks its item.
    """
    if on_duplicate not in ("error", "drop"):
        raise ValueError("--on_duplicate keep has no effect on histories: error or drop")
    frame, rows = read_source(source, separator=separator, columns=columns, encoding=encoding)
    name = name_of(source)
    given = {"user": user, "history": history}
    names, inferred = find_columns(name, frame.columns, given, header=rows.first == 2)
    clocks = [each for each in frame.columns if plain(each) in KNOWN["timestamp"].split()]
    if clocks:
        inferred["ignored"] = f"{', '.join(clocks)} (the items of a history are in its order)"
    users = frame[names["user"]]
    with rows.named():
        items, how = _lists(name, frame[names["history"]], options.get("na_values") == "missing")
    if how:
        inferred["history"] = how
    keep, removed = _longest(users, items, rows, on_duplicate)
    users, items, rows = users.filter(keep), items.filter(keep), rows.keep(keep)

    lengths = items.list.len().fill_null(0).to_numpy()
    owner = np.repeat(np.arange(len(users)), np.maximum(lengths, 1))  # no item is a missing one
    kept = np.arange(sum(count for *_, count in rows.parts)) if rows.kept is None else rows.kept
    events = pl.DataFrame([users.gather(owner), items.explode()])
    raw = events_of(
        name, events, Rows(rows.parts, kept[owner]), user=names["user"], item=names["history"],
        timestamp=NONE, rating=NONE, event_type=NONE, ordered=True, **options,
    )  # fmt: skip
    raw.removed, raw.inferred = removed | raw.removed, inferred | raw.inferred
    return raw


def _lists(source, series: pl.Series, na_missing: bool) -> tuple[pl.Series, str]:
    """(the histories as lists, null where one is empty; how text was split). na_missing: a cell of
    a word such as NA is empty too."""
    how = ""
    if isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    if series.dtype == pl.String:
        text = series.fill_null("").str.strip_chars()
        if na_missing:
            text = text.set(text.is_in(list(NA)), "")
        if text.str.starts_with("[").any():
            series, how = _json_lists(source, text.alias(series.name)), "JSON lists"
        elif text.str.contains(",", literal=True).any():
            series, how = text.str.replace_all(r"\s*,\s*", ",").str.split(","), "between commas"
            mixed = series.list.eval(pl.element().str.contains(r"\s")).list.any()
            row = first_row(mixed.fill_null(False), 0)
            if row is not None:
                raise DataError(
                    source, "holds commas and blanks: only one may stand between items",
                    column=series.name, row=row,
                )  # fmt: skip
        else:
            series, how = text.str.replace_all(r"\s+", " ").str.split(" "), "between blanks"
        series = series.set(text == "", None)
    if not isinstance(series.dtype, pl.List):
        raise DataError(source, f"expected lists or text, got {series.dtype}", column=series.name)
    return series.set((series.list.len() == 0).fill_null(False), None), how


def _json_lists(source, series: pl.Series) -> pl.Series:
    decoded = []
    for row, text in enumerate(series.to_list()):
        try:
            items = json.loads(text or "[]")
        except (ValueError, RecursionError) as error:
            raise DataError(source, f"is not JSON: {error}", column=series.name, row=row) from None
        if not isinstance(items, list) or not all(type(each) in (str, int) for each in items):
            raise DataError(
                source, f"expected a list of ids, got {text!r}", column=series.name, row=row
            )
        decoded.append([str(each) for each in items])
    return pl.Series(series.name, decoded, dtype=pl.List(pl.String))


def _longest(
    users: pl.Series, items: pl.Series, rows: Rows, on_duplicate: str
) -> tuple[np.ndarray, dict[str, int]]:
    """(flags of one row a user, how many interactions the others had, by reason)."""
    table = pl.DataFrame({"user": users, "items": items}).with_row_index("row")
    table = table.with_columns(pl.col("items").list.len().fill_null(0).alias("length"))
    best = table.sort("length", "row").unique("user", keep="last")
    others = table.filter(
        ~pl.col("row").is_in(best["row"].implode()) & pl.col("user").is_not_null()
    )
    keep = np.ones(table.height, dtype=bool)
    if others.height == 0:
        return keep, {}
    with reading("histories"):
        pairs = others.join(
            best.drop("row"), on="user", how="left", suffix="_best", maintain_order="left"
        )
        begins = pairs.select(
            pl.col("items").is_null()
            | (pl.col("items") == pl.col("items_best").list.head(pl.col("length")))
        ).to_series()
    odd = pairs.filter(~begins)
    if odd.height and on_duplicate == "error":
        file, row = rows.place(int(odd["row"][0]))
        raise DataError(
            file, f"user {odd['user'][0]!r} has several histories, and this is not the beginning of"
            " the longest: --on_duplicate drop keeps the longest, the last of equals",
            column=users.name, row=row,
        )  # fmt: skip
    keep[others["row"].to_numpy()] = False
    removed = {}
    for part, what in ((pairs.filter(begins), "say nothing new"), (odd, "are not the longest")):
        if part.height:
            reason = f"interactions in {part.height:,} histories of known users that {what}"
            removed[reason] = int(part["length"].sum())
    return keep, removed
