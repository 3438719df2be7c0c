"""Tables of any origin (csv, tsv, Parquet, JSON lines, RecBole, .dat) and their checked columns."""

import json
from collections import Counter
from pathlib import Path

from fastrec.data.errors import DataError
from fastrec.data.text import (
    check_unique,
    first_row,
    float_column,
    id_column,
    read_bytes,
    read_delimited,
    time_column,
)

_SEPARATORS = {
    ".csv": ",",
    ".tsv": "\t",
    ".inter": "\t",
    ".user": "\t",
    ".item": "\t",
    ".net": "\t",
}
_DAT_COLUMNS = {
    "users.dat": ["user_id", "gender", "age", "occupation", "zip_code"],
    "movies.dat": ["item_id", "title", "genres"],
}


def read_frame(file, *, separator: str | None = None, encoding: str = "utf-8"):
    """(polars.DataFrame, row number of its first record) of a table with named columns.

    By suffix: .parquet, .jsonl and .ndjson (an object a line), .csv, .tsv and RecBole's files, with
    .gz behind any text. Delimited columns come as text; quotes are honoured in csv only.
    """
    import polars as pl

    file = Path(file)
    suffix = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    if suffix in (".parquet", ".pq"):
        if not file.is_file():
            raise DataError(file, "file is missing")
        try:
            frame = pl.read_parquet(file)
        except (Exception, pl.exceptions.PanicException) as error:
            raise DataError(file, f"truncated or corrupt Parquet: {error}") from error
        if frame.height == 0:
            raise DataError(file, "holds no rows")
        return frame, 1
    if suffix in (".jsonl", ".ndjson"):
        return _read_json_lines(file), 1
    separator = separator or _SEPARATORS.get(suffix)
    if separator is None:
        raise ValueError(f"{file}: pass separator=, it does not follow from the suffix {suffix!r}")
    return read_delimited(file, separator, encoding=encoding), 2


def _read_json_lines(file):
    import polars as pl

    data = read_bytes(file)
    try:
        return pl.read_ndjson(data, infer_schema_length=None)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        for row, line in enumerate(data.split(b"\n"), 1):
            try:
                if line.strip():
                    json.loads(line)
            except ValueError as problem:
                raise DataError(file, f"is not JSON: {problem}", row=row) from None
        raise DataError(file, str(error)) from error


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
    ordered: bool = False,
    on_duplicate: str = "error",
):
    """(canonical interactions, {reason: rows removed}) of a table whose columns are named here.

    ordered: each user's rows are oldest first, and are checked for it where there are timestamps;
    otherwise `timestamp` is needed. on_duplicate ("error", "keep", "drop") is about rows with the
    same user, item and timestamp; "drop" keeps the first. See `text` for the columns.
    """
    import polars as pl

    if on_duplicate not in ("error", "keep", "drop"):
        raise ValueError(f"on_duplicate must be 'error', 'keep' or 'drop', got {on_duplicate!r}")
    names = {"user_id": user, "item_id": item, "timestamp": timestamp, "rating": rating}
    names = {key: name for key, name in (names | {"event_type": event_type}).items() if name}
    if timestamp is None and not ordered:
        raise ValueError(f"{file}: name the timestamp column, or pass ordered=True")
    for name in names.values():
        if name not in frame.columns:
            raise DataError(
                file, f"column is missing; there are {', '.join(frame.columns)}", column=name
            )
    columns = {
        "user_id": id_column(file, frame[user], first, ids),
        "item_id": id_column(file, frame[item], first, ids),
    }
    if timestamp:
        columns["timestamp"] = time_column(file, frame[timestamp], first)
    if rating:
        columns["rating"] = float_column(file, frame[rating], first)
    if event_type:
        columns["event_type"] = frame[event_type]
    table = pl.DataFrame({key: column.alias(key) for key, column in columns.items()})
    if timestamp is None:
        return table, {}
    if ordered:
        _check_order(file, table, first, timestamp)
    return _without_duplicates(file, table, first, on_duplicate)


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
        + f", first in row {first_row(same, first)} (on_duplicate='keep' or 'drop' accepts it)",
        row=place + first,
    )  # fmt: skip


def read_attributes(file, key: str, id_map=None):
    """polars.DataFrame of attributes: column `key` ("user_id" or "item_id") and one row per id.

    By name or suffix: .json `{"id": [integers]}` as S3-Rec has it (a list column `attributes`, each
    entry once); RecBole .user and .item; MovieLens users.dat and movies.dat (genres as a list);
    csv, tsv, Parquet and JSON lines whose first column, or the one called `key`, is the id. Text
    columns that hold numbers only become numbers. Null attributes are allowed.
    id_map: a text file of `id original` lines: the ids of `file` are the originals, the ids of the
    result those of the first column; rows that the map does not know are left out.
    """
    import polars as pl

    file = Path(file)
    plain = Path(file.name.removesuffix(".gz"))
    if plain.suffix == ".json":
        frame = _read_id_json(file, key)
    elif plain.name in _DAT_COLUMNS:
        frame = read_delimited(file, "::", _DAT_COLUMNS[plain.name], encoding="latin-1")
        if "genres" in frame.columns:
            frame = frame.with_columns(pl.col("genres").str.split("|"))
        frame = _typed(frame.with_columns(id_column(file, frame[key], 1)))
        check_unique(file, frame[key], 1)
    elif plain.suffix in (".user", ".item"):
        frame, first = recbole_columns(file)
        frame = frame.with_columns(id_column(file, frame[key], first))
        check_unique(file, frame[key], first)
    else:
        frame, first = read_frame(file)
        name = key if key in frame.columns else frame.columns[0]
        frame = frame.with_columns(id_column(file, frame[name], first))
        check_unique(file, frame[name], first)
        frame = _typed(frame.select(pl.col(name).alias(key), pl.exclude(name)))
    if id_map is None:
        return frame
    pairs = read_delimited(id_map, " ", ["id", "original"])
    pairs = pl.DataFrame([id_column(id_map, pairs[name], 1) for name in pairs.columns])
    frame = frame.join(pairs, left_on=key, right_on="original", maintain_order="left")
    return frame.select(pl.col("id").alias(key), pl.exclude(key, "id"))


def _typed(frame):
    """Text columns that hold nothing but integers (numbers) and nulls become Int64 (Float64)."""
    import polars as pl

    for series in frame.get_columns():
        if series.dtype != pl.String:
            continue
        for dtype in (pl.Int64, pl.Float64):
            parsed = series.cast(dtype, strict=False)
            if parsed.null_count() == series.null_count():
                frame = frame.with_columns(parsed)
                break
    return frame


def _read_id_json(file, key: str):
    import polars as pl

    data = read_bytes(file)
    try:
        pairs = json.loads(data, object_pairs_hook=lambda pairs: pairs)
    except ValueError as error:
        raise DataError(
            file, f"is not JSON: {error}", row=getattr(error, "lineno", None)
        ) from error
    if not data.lstrip().startswith(b"{"):
        raise DataError(file, 'expected an object {"id": [attributes]}')
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(
            name for name, times in Counter(name for name, _ in pairs).items() if times > 1
        )
        raise DataError(file, f"id {twice} is listed twice", column=key)
    for name, attributes in table.items():
        if not name.isdecimal():
            raise DataError(file, f"expected an integer id, got {name!r}", column=key)
        if not isinstance(attributes, list) or not all(type(a) is int for a in attributes):
            raise DataError(
                file, f"{name}: expected a list of integers, got {str(attributes)[:40]}",
                column="attributes",
            )  # fmt: skip
    distinct = [list(dict.fromkeys(attributes)) for attributes in table.values()]
    return pl.DataFrame(
        {
            key: pl.Series([int(name) for name in table], dtype=pl.Int64),
            "attributes": pl.Series(distinct, dtype=pl.List(pl.Int64)),
        }
    )


def recbole_columns(file):
    """(polars.DataFrame, first row) of a RecBole atomic file, its columns typed by the header.

    token: text; float: Float64; token_seq, float_seq: lists, separated by blanks. Empty is null.
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
            parsed = series.cast(pl.Float64, strict=False)
            row = first_row((parsed.is_null() & series.is_not_null()).to_numpy(), first)
            if row is not None:
                raise DataError(
                    file, f"expected a number, got {series[row - first]!r}", column=name, row=row
                )
            series = parsed
        elif kind.endswith("_seq"):
            series = series.str.split(" ")
            if kind == "float_seq":
                series = series.cast(pl.List(pl.Float64), strict=False)
        columns.append(series)
    return pl.DataFrame(columns), first


def read_relations(file):
    """polars.DataFrame (user_id, friend_id): the first two columns of a table, one link a row."""
    import polars as pl

    file = Path(file)
    recbole = file.name.removesuffix(".gz").endswith(".net")
    frame, first = recbole_columns(file) if recbole else read_frame(file)
    if frame.width < 2:
        raise DataError(file, f"expected two columns of ids, got {frame.columns}")
    ends = [id_column(file, frame[name], first) for name in frame.columns[:2]]
    return pl.DataFrame(
        [end.alias(n) for end, n in zip(ends, ("user_id", "friend_id"), strict=True)]
    )
