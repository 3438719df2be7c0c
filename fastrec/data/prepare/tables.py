# SPDX-License-Identifier: Apache-2.0
"""Tables of any origin: delimited text, Parquet, JSON and RecBole's files."""

import ast
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import polars as pl

from fastrec.data import text_files
from fastrec.data.errors import DataError, EmptyFile, reading
from fastrec.data.prepare.columns import first_row
from fastrec.data.prepare.delimited import delimited_blocks, read_delimited
from fastrec.data.text_files import check_file, read_bytes, read_lines

_SEPARATORS = {
    ".csv": ",",
    ".tsv": "\t",
    ".inter": "\t",
    ".user": "\t",
    ".item": "\t",
    ".net": "\t",
}
_OTHER = {
    **dict.fromkeys((".zip", ".7z", ".tar", ".tgz", ".rar"), "unpack it"),
    **dict.fromkeys((".bz2", ".xz", ".zst"), "unpack it, or pack it as .gz"),
    **dict.fromkeys((".xls", ".xlsx"), "save it as .csv"),
}
_PARQUET, _JSON = (".parquet", ".pq"), (".json", ".jsonl", ".ndjson")
_HOURS = re.compile(r"[+-](0\d|1[0-4]):00")


def is_delimited(file) -> bool:
    """Whether `read_frame` reads the file as delimited text, by its suffix."""
    return _suffix(file) not in (*_PARQUET, *_JSON)


def _suffix(file) -> str:
    file = Path(file)
    return Path(file.stem if file.suffix.lower() == ".gz" else file.name).suffix.lower()


def read_frame(
    file, *, separator: str | None = None, names: list[str] | None = None,
    encoding: str | None = None,
) -> tuple[pl.DataFrame, int]:  # fmt: skip
    """(frame, row number of its first record) of a table: all of `frame_blocks`."""
    blocks = list(frame_blocks(file, separator=separator, names=names, encoding=encoding))
    if len(blocks) == 1:
        return blocks[0]
    with reading(file):
        return pl.concat([frame for frame, _ in blocks], rechunk=True), blocks[0][1]


def frame_blocks(
    file, *, separator: str | None = None, names: list[str] | None = None,
    encoding: str | None = None, size: int | None = None,
) -> Iterator[tuple[pl.DataFrame, int]]:  # fmt: skip
    """(frame, row number of its first record) of each block of a table with named columns.
    Delimited text and Parquet come in several, other files in one.

    By suffix: .parquet; .jsonl, .ndjson and .json (an object or a Python dictionary a line, .json
    also one array); .csv, .tsv and RecBole's files; each also .gz. Other suffixes are delimited
    text if `separator` (`delimited.read_delimited`) says how. Delimited columns come as text;
    quotes are honoured between commas and semicolons. names: the columns of a delimited file
    without a header. encoding: of text; UTF-8. size: of a block, bytes of text and a 16th of it in
    rows of Parquet.
    """
    suffix = _suffix(file)
    if not is_delimited(file):
        given = {"separator": separator, "columns": names}
        given |= {"encoding": encoding} if suffix in _PARQUET else {}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{file}: --{name} has no effect on a {suffix} file")
        if suffix in _PARQUET:
            yield from _parquet_blocks(file, rows_of(size))
        else:
            yield _read_json(file, encoding or "utf-8", array=suffix == ".json"), 1
        return
    if suffix in _OTHER:
        raise DataError(file, f"a {suffix} file is not read: {_OTHER[suffix]}")
    separator = separator or _SEPARATORS.get(suffix)
    if separator is None:
        line = read_lines(file, encoding or "utf-8")[0][:80]
        raise ValueError(
            f"{file}: its suffix {suffix!r} says no format: .csv, .tsv, .parquet, .json and .jsonl"
            " do, or --separator (of the source; ',', '\\t', '::' or whitespace), or another"
            f" --format. It begins with {line!r}"
        )
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"--columns holds a name twice: {', '.join(names)}")
    separator = "\t" if separator == "\\t" else separator
    yield from delimited_blocks(file, separator, names, encoding or "utf-8", size)


def rows_of(size: int | None) -> int:
    """How many rows of a typed table are a block where `size` bytes of text are one."""
    return max((size or text_files.BLOCK) // 16, 1)


def _parquet_blocks(file, rows: int) -> Iterator[tuple[pl.DataFrame, int]]:
    """Blocks of a Parquet file with rows; the name is a name, not a pattern."""
    file = check_file(file)
    with reading(file, "truncated or corrupt Parquet"):
        packed = file.suffix.lower() == ".gz"
        content = _gunzip(file, file.read_bytes()) if packed else file
        _check_zones(file, BytesIO(content) if packed else content)
        table = pl.scan_parquet(content, glob=False)
        count = table.select(pl.len()).collect().item()
        for start in range(0, count, rows):
            yield table.slice(start, rows).collect(engine="streaming"), start + 1
    if count == 0:
        raise EmptyFile(file, "holds no rows")


def _check_zones(file: Path, content) -> None:
    """Raise DataError for a time zone like +05:30: Polars reads names and whole hours."""
    from pyarrow import ArrowException, parquet

    try:
        schema = parquet.read_schema(content)
    except (ArrowException, OSError):  # damage, which Polars names
        return
    for column in schema:
        zone = getattr(column.type, "tz", None)
        if zone is not None and zone[:1] in "+-" and not _HOURS.fullmatch(zone):
            raise DataError(
                file, f"the time zone {zone} has no name: write the column in UTC",
                column=column.name,
            )  # fmt: skip


def _gunzip(file, data: bytes) -> bytes:
    """The unpacked contents of a .gz file."""
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise DataError(file, f"truncated or corrupt gzip: {error}") from error


def _read_json(file, encoding: str, array: bool) -> pl.DataFrame:
    data = read_bytes(file, encoding).strip()
    if array and data.startswith(b"["):
        return _read_json_array(file, data)
    if data.startswith((b"{'", b"{u'")):
        data = _json_of_literals(file, data)
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


def _json_of_literals(file, data: bytes) -> bytes:
    """JSON of a Python dictionary a line, which older data sets call JSON. Nothing in it is run."""
    lines = []
    for row, line in enumerate(data.split(b"\n"), 1):
        try:
            value = ast.literal_eval(line.decode())
            lines.append(json.dumps(value if isinstance(value, dict) else None).encode())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as problem:
            raise DataError(
                file, f"is neither JSON nor a Python dictionary: {problem}", row=row
            ) from None
        if not isinstance(value, dict):
            raise DataError(file, "expected an object {..}", row=row)
    return b"\n".join(lines)


def _read_json_array(file, data: bytes) -> pl.DataFrame:
    try:
        objects = json.loads(data)
    except (ValueError, RecursionError) as problem:
        row = getattr(problem, "lineno", None)
        raise DataError(file, f"is not JSON: {problem}", row=row) from None
    if not objects:
        raise EmptyFile(file, "holds no rows")
    row = first_row([not isinstance(each, dict) for each in objects], 1)
    if row is not None:
        raise DataError(file, "expected an array of objects {..}", row=row)
    with reading(file):
        frame = pl.read_json(data, infer_schema_length=None)
    if frame.height != len(objects):
        raise DataError(file, f"{len(objects)} objects, but {frame.height} rows")
    return frame


def recbole_columns(file, time: str | None = None) -> tuple[pl.DataFrame, int]:
    """(frame, first row) of a RecBole atomic file, its columns typed by the header.

    token: text; float: Float64, but text for the column `time`; token_seq, float_seq: lists,
    separated by blanks. Empty is null.
    """
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


def _numbers(file, series: pl.Series, bad: pl.Series, first: int) -> None:
    row = first_row(bad.to_numpy(), first)
    if row is not None:
        raise DataError(
            file, f"expected numbers, got {series[row - first]!r}", column=series.name, row=row
        )
