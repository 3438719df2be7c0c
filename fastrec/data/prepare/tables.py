"""Tables of any origin (csv, tsv, Parquet, JSON lines, RecBole) and the events in them."""

import json
from io import BytesIO
from pathlib import Path

from fastrec.data.errors import DataError, reading
from fastrec.data.event_columns import PLACE
from fastrec.data.prepare.columns import first_row, float_column, id_column
from fastrec.data.prepare.text import check_file, read_bytes, read_delimited
from fastrec.data.prepare.times import time_column

_SEPARATORS = {
    ".csv": ",",
    ".tsv": "\t",
    ".inter": "\t",
    ".user": "\t",
    ".item": "\t",
    ".net": "\t",
}
# A file with such a column is not taken in its own order without a word.
_TIME_NAMES = ("timestamp", "time", "date", "datetime", "unix_ts")


def is_delimited(file) -> bool:
    """Whether `read_frame` reads the file as delimited text, by its suffix."""
    return _suffix(file) not in (".parquet", ".pq", ".jsonl", ".ndjson")


def _suffix(file) -> str:
    file = Path(file)
    return Path(file.stem if file.suffix.lower() == ".gz" else file.name).suffix.lower()


def read_frame(file, *, separator: str | None = None, encoding: str = "utf-8", names=None):
    """(polars.DataFrame, row number of its first record) of a table with named columns.

    By suffix: .parquet, .jsonl and .ndjson (an object a line), .csv, .tsv and RecBole's files, with
    .gz behind any text. Delimited columns come as text; quotes are honoured in csv only. names: the
    columns of a delimited file without a header.
    """
    suffix = _suffix(file)
    if suffix in (".parquet", ".pq"):
        return read_parquet(file), 1
    if suffix in (".jsonl", ".ndjson"):
        return _read_json_lines(file), 1
    separator = separator or _SEPARATORS.get(suffix)
    if separator is None:
        raise ValueError(
            f"{file}: its suffix {suffix!r} says no format: .csv, .tsv, .parquet and .jsonl do, or"
            " --separator (of the source)"
        )
    separator = "\t" if separator == "\\t" else separator
    return read_delimited(file, separator, names, encoding), 2 if names is None else 1


def read_parquet(file):
    """polars.DataFrame of a Parquet file with rows; the name is a name, not a pattern."""
    import polars as pl

    file = check_file(file)
    with reading(file, "truncated or corrupt Parquet"):
        frame = pl.read_parquet(BytesIO(file.read_bytes()))
    if frame.height == 0:
        raise DataError(file, "holds no rows")
    return frame


def _read_json_lines(file):
    import polars as pl

    data = read_bytes(file).rstrip()
    count = data.count(b"\n") + 1
    try:
        with reading(file):
            frame = pl.read_ndjson(data, infer_schema_length=None)
        if frame.height != count:
            raise DataError(file, f"{count} lines, but {frame.height} objects")
    except DataError:
        for row, line in enumerate(data.split(b"\n"), 1):
            try:
                if not isinstance(json.loads(line), dict):
                    raise DataError(file, "expected an object {..}", row=row)
            except DataError:
                raise
            except (ValueError, RecursionError) as problem:
                raise DataError(file, f"is not JSON: {problem}", row=row) from None
        raise
    return frame


def interactions_of(
    file,
    frame,
    first: int,
    *,
    user: str,
    item: str,
    timestamp: str | None = None,
    rating: str | None = None,
    event_type: str | None = None,
    ids: str = "auto",
    na_values: str = "ask",
    time_format: str | None = None,
    ordered: bool = False,
    on_duplicate: str = "error",
):
    """(canonical interactions, what a timestamp is, {reason: rows removed}) of a table whose
    columns are named here.

    ordered: each user's rows are oldest first, and are checked for it where there are timestamps;
    otherwise `timestamp` is needed. on_duplicate ("error", "keep", "drop") is about rows with the
    same user, item and timestamp; "drop" keeps the first. See `columns` and `times`.
    """
    import polars as pl

    if on_duplicate not in ("error", "keep", "drop"):
        raise ValueError(f"on_duplicate must be 'error', 'keep' or 'drop', got {on_duplicate!r}")
    names = {"user_id": user, "item_id": item, "timestamp": timestamp, "rating": rating}
    names = {key: name for key, name in (names | {"event_type": event_type}).items() if name}
    if timestamp is None and not ordered:
        clocks = [name for name in frame.columns if name.lower() in _TIME_NAMES]
        there = f" (there is {', '.join(clocks)})" if clocks else ""
        raise DataError(
            file, f"events have no time: name its column by --timestamp_column{there}, or say"
            " --ordered true if each user's rows are oldest first",
        )  # fmt: skip
    if timestamp is None and time_format is not None:
        raise ValueError("--time_format has no effect without --timestamp_column")
    for name in names.values():
        if name not in frame.columns:
            there = ", ".join(frame.columns)
            hint = " (--separator says what stands between columns)" if frame.width == 1 else ""
            raise DataError(file, f"column is missing; there are {there}{hint}", column=name)
    columns = {
        "user_id": id_column(file, frame[user], first, ids, na_values),
        "item_id": id_column(file, frame[item], first, ids, na_values),
    }
    time = PLACE
    if timestamp:
        columns["timestamp"], time = time_column(file, frame[timestamp], first, time_format)
    if rating:
        columns["rating"] = float_column(file, frame[rating], first)
    if event_type:
        columns["event_type"] = frame[event_type]
    table = pl.DataFrame({key: column.alias(key) for key, column in columns.items()})
    if timestamp is None:
        return table, time, {}
    if ordered:
        _check_order(file, table, first, timestamp)
    table, removed = _without_duplicates(file, table, first, on_duplicate)
    return table, time, removed


def _check_order(file, table, first: int, column: str) -> None:
    import polars as pl

    earlier = pl.col("timestamp") < pl.col("timestamp").shift(1).over("user_id")
    before = table.select(earlier).to_series()
    row = first_row(before.fill_null(False).to_numpy(), first)
    if row is not None:
        raise DataError(
            file, f"user {table['user_id'][row - first]}: time goes back to "
            f"{table['timestamp'][row - first]} in a file that is said to be in order",
            column=column, row=row,
        )  # fmt: skip


def _without_duplicates(file, table, first: int, on_duplicate: str):
    import polars as pl

    if on_duplicate == "keep":
        return table, {}
    event = pl.struct("user_id", "item_id", "timestamp")
    keep = table.select(event.is_first_distinct()).to_series()
    if keep.all():
        return table, {}
    if on_duplicate == "drop":
        return table.filter(keep), {"duplicate events": int((~keep).sum())}
    place = int((~keep).to_numpy().argmax())
    keys = table.select("user_id", "item_id", "timestamp")
    values = keys.row(place)
    same = [keys[name] == value for name, value in zip(keys.columns, values, strict=True)]
    same = same[0] & same[1] & same[2]
    raise DataError(
        file, "duplicate event: user {}, item {}, timestamp {}".format(*values)
        + f", first in row {first_row(same, first)} (--on_duplicate keep or drop accepts it)",
        row=place + first,
    )  # fmt: skip


def recbole_columns(file, time: str | None = None):
    """(polars.DataFrame, first row) of a RecBole atomic file, its columns typed by the header.

    token: text; float: Float64, but text for the column `time`; token_seq, float_seq: lists,
    separated by blanks. Empty is null.
    """
    import polars as pl

    frame, first = read_delimited(file, "\t"), 2
    columns = []
    for header in frame.columns:
        name, _, kind = header.rpartition(":")
        if kind not in ("token", "float", "token_seq", "float_seq") or not name:
            raise DataError(file, f"header {header!r} is not name:type", column=header, row=1)
        series = frame[header].alias(name)
        if kind == "float":
            # As text: a time is exact only as it is written.
            parsed = series.cast(pl.Float64, strict=False)
            _numbers(file, series, parsed.is_null() & series.is_not_null(), first)
            series = series if name == time else parsed
        elif kind.endswith("_seq"):
            series, texts = series.str.split(" "), series
            if kind == "float_seq":
                series = series.cast(pl.List(pl.Float64), strict=False)
                lost = series.list.eval(pl.element().is_null()).list.any().fill_null(False)
                _numbers(file, texts, lost, first)
        columns.append(series)
    names = [series.name for series in columns]
    if len(set(names)) < len(names):
        raise DataError(file, f"two columns have one name: {', '.join(names)}", row=1)
    return pl.DataFrame(columns), first


def _numbers(file, series, bad, first: int) -> None:
    row = first_row(bad.to_numpy(), first)
    if row is not None:
        raise DataError(
            file, f"expected numbers, got {series[row - first]!r}", column=series.name, row=row
        )
