# SPDX-License-Identifier: Apache-2.0
"""The events of a table: which rows are kept, and their columns checked and typed."""

import numpy as np

from fastrec.data.errors import DataError
from fastrec.data.event_columns import SOURCE
from fastrec.data.prepare.columns import NA, float_column, id_column
from fastrec.data.prepare.names import FLAGS, NONE, find_columns
from fastrec.data.prepare.raw import RawData
from fastrec.data.prepare.rows import Rows
from fastrec.data.prepare.times import time_column


def events_of(
    source,
    frame,
    rows: Rows,
    *,
    user: str | None = None,
    item: str | None = None,
    timestamp: str | None = None,
    rating: str | None = None,
    event_type: str | None = None,
    keep_events: list[str] | None = None,
    ids: str = "auto",
    na_values: str = "ask",
    time_format: str | None = None,
    time_unit: str | None = None,
    ordered: bool = False,
    on_missing: str = "error",
    on_duplicate: str = "error",
    header: bool = False,
) -> RawData:
    """The events of a table, in its order.

    user, item, timestamp, rating, event_type: its columns; None recognises one by its name
    (`names`), "none" leaves out one of the last three. keep_events: only events of these types.
    ordered: each user's rows are oldest first, and are checked for it where there are timestamps;
    otherwise a timestamp is needed. on_missing ("error", "drop") is about rows without a user,
    item, timestamp or rating, on_duplicate ("error", "keep", "drop") about rows with the same user,
    item and timestamp; "drop" keeps the first. header: the names are the first line of a text file,
    for what an error suggests. See `columns`, `times` and `epochs`.
    """
    import polars as pl

    if on_duplicate not in ("error", "keep", "drop"):
        raise ValueError(f"on_duplicate must be 'error', 'keep' or 'drop', got {on_duplicate!r}")
    if on_missing not in ("error", "drop"):
        raise ValueError(f"on_missing must be 'error' or 'drop', got {on_missing!r}")
    given = {"user": user, "item": item, "timestamp": timestamp, "rating": rating}
    given["event_type"] = event_type
    names, inferred = find_columns(source, frame.columns, given, header)
    if "timestamp" not in names:
        if not ordered:
            raise DataError(
                source, "events have no time: name its column by --timestamp_column (there are "
                f"{', '.join(frame.columns)}), or say --ordered true if each user's rows are oldest"
                " first",
            )  # fmt: skip
        if time_format is not None or time_unit is not None:
            raise ValueError(
                "--time_format and --time_unit have no effect without --timestamp_column"
            )
    columns = {role: frame[name] for role, name in names.items()}
    if "event_type" in columns and columns["event_type"].dtype.is_nested():
        raise DataError(
            source, f"types of events must be text or numbers, got {columns['event_type'].dtype}:"
            f" --event_type_column {NONE} leaves it out", column=names["event_type"],
        )  # fmt: skip
    removed: dict[str, int] = {}
    keep = _of_types(source, columns.get("event_type"), keep_events, removed)
    columns, rows = _kept(source, columns, rows, keep)
    present = _present(columns, rows, na_values, on_missing, removed)
    columns, rows = _kept(source, columns, rows, present)

    hints = {
        role: f"; --{FLAGS[role]} {NONE} leaves it out"
        for role in ("timestamp", "rating")
        if FLAGS[role] in inferred and (role == "rating" or ordered)
    }
    table, time = {}, SOURCE
    with rows.named():
        table["user_id"] = id_column(source, columns["user"], 0, ids, na_values)
        table["item_id"] = id_column(source, columns["item"], 0, ids, na_values)
    if "timestamp" in columns:
        with rows.named(hints.get("timestamp", "")):
            table["timestamp"], time, unit = time_column(
                source, columns["timestamp"], 0, time_format, time_unit
            )
        inferred |= {} if unit is None else {"time_unit": unit}
    if "rating" in columns:
        with rows.named(hints.get("rating", "")):
            table["rating"] = float_column(source, columns["rating"], 0)
    if "event_type" in columns:
        table["event_type"] = columns["event_type"]
    events = pl.DataFrame({key: column.alias(key) for key, column in table.items()})
    if "timestamp" in columns:
        if ordered:
            _check_order(events, rows, names["timestamp"], hints.get("timestamp", ""))
        events = _without_duplicates(events, rows, on_duplicate, removed)
    elif on_duplicate != "error":
        raise ValueError(
            "--on_duplicate has no effect without times: a repeated item is another visit"
        )
    return RawData(
        str(source), events, ordered=ordered, time=time, removed=removed, inferred=inferred
    )


def _of_types(source, column, types: list[str] | None, removed: dict):
    """Flags of the events of these types; None for all."""
    import polars as pl

    if types is None:
        return None
    if column is None:
        raise ValueError("--keep_events has no effect without --event_type_column")
    text = column.cast(pl.String)
    there = text.unique().drop_nulls().sort().to_list()
    unknown = [name for name in types if name not in there]
    if unknown or not types:
        raise DataError(
            source, f"no event is of type {', '.join(map(repr, unknown))}; there are "
            f"{', '.join(there[:20])}{' ..' if len(there) > 20 else ''}", column=column.name,
        )  # fmt: skip
    keep = text.is_in(types).fill_null(False)
    if not keep.all():
        removed[f"interactions whose {column.name} is not {' or '.join(types)}"] = int(
            (~keep).sum()
        )
    return keep


def _present(columns: dict, rows: Rows, na_values: str, on_missing: str, removed: dict):
    """Flags of the rows that lack nothing; None if no row does."""
    import polars as pl

    present = None
    for role, series in columns.items():
        missing = series.is_null()
        if series.dtype == pl.String:
            words = ["", *NA] if na_values == "missing" else [""]
            missing |= series.is_in(words).fill_null(False)
        elif series.dtype.is_float() and na_values == "missing":
            missing |= series.is_nan().fill_null(False)
        if role == "event_type" or not missing.any():
            continue
        if on_missing == "error":
            file, row = rows.place(int(missing.to_numpy().argmax()))
            count = int(missing.sum())
            where = "here alone" if count == 1 else f"in {count:,} rows"
            raise DataError(
                file, f"value is missing, {where}: --on_missing drop removes such rows",
                column=series.name, row=row,
            )  # fmt: skip
        fresh = missing if present is None else missing & present
        if fresh.any():
            removed[f"interactions without {series.name}"] = int(fresh.sum())
        present = ~missing if present is None else present & ~missing
    return present


def _kept(source, columns: dict, rows: Rows, keep):
    if keep is None or keep.all():
        return columns, rows
    if not keep.any():
        raise DataError(source, "no row is left that has a user, an item and what else is read")
    return {role: series.filter(keep) for role, series in columns.items()}, rows.keep(keep)


def _check_order(events, rows: Rows, column: str, hint: str) -> None:
    import polars as pl

    earlier = pl.col("timestamp") < pl.col("timestamp").shift(1).over("user_id")
    back = events.select(earlier).to_series().fill_null(False).to_numpy()
    if back.any():
        place = int(back.argmax())
        file, row = rows.place(place)
        raise DataError(
            file, f"user {events['user_id'][place]}: time goes back to "
            f"{events['timestamp'][place]} in a file that is said to be in order{hint}",
            column=column, row=row,
        )  # fmt: skip


def _without_duplicates(events, rows: Rows, on_duplicate: str, removed: dict):
    import polars as pl

    if on_duplicate == "keep":
        return events
    keys = events.select("user_id", "item_id", "timestamp")
    keep = keys.select(pl.struct(pl.all()).is_first_distinct()).to_series()
    if keep.all():
        return events
    if on_duplicate == "drop":
        removed["duplicate events"] = int((~keep).sum())
        return events.filter(keep)
    place = int((~keep).to_numpy().argmax())
    values = keys.row(place)
    same = [keys[name] == value for name, value in zip(keys.columns, values, strict=True)]
    file, row = rows.place(place)
    before, earlier = rows.place(int(np.argmax((same[0] & same[1] & same[2]).to_numpy())))
    where = f"row {earlier}" if before == file else f"row {earlier} of {before}"
    raise DataError(
        file, "duplicate event: user {}, item {}, timestamp {}".format(*values)
        + f", first in {where}; {int((~keep).sum()):,} in all (--on_duplicate keep or drop accepts"
        " them)", row=row,
    )  # fmt: skip
