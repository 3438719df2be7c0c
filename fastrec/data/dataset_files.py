# SPDX-License-Identifier: Apache-2.0
"""The files of a data set folder: schema.json, the arrays, and whether they belong together."""

import hashlib
import json
from pathlib import Path

import numpy as np

from fastrec.data.errors import DataError, reading
from fastrec.data.splits import SPLITS_FILE, check_splits

FORMAT = "fastrec-dataset"
FORMAT_VERSION = 1
COLD_ITEMS_FILE = "cold_items.parquet"
_MANY = 2**48  # more users, items or events than any machine holds


def features_file(name: str) -> str:
    """The file of the item features of that name."""
    return f"features.{name}.npy"


_TABLES = {"interactions.parquet", "users.parquet", "items.parquet", "relations.parquet"}
_PARTS = {"schema.json", "values.npy", "offsets.npy", SPLITS_FILE, COLD_ITEMS_FILE} | _TABLES


def is_part(name: str) -> bool:
    """Whether a data set may have a file of that name."""
    return name in _PARTS or (name.startswith("features.") and name.endswith(".npy"))


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check_digest(file: Path, found: str, schema: dict) -> None:
    """Raise for a file whose digest is not the one in schema.json."""
    if found != schema["digests"].get(file.name):
        raise DataError(
            file, "is not the file that was written with schema.json: damaged, or of another"
            " data set",
        )  # fmt: skip


def check_digests(folder: Path, schema: dict) -> None:
    """Raise for a file that is not the one that was written with schema.json, and for sizes that
    items.parquet and users.parquet do not have. interactions.parquet is checked when a column of
    it is read."""
    import polars as pl

    digests = schema["digests"]
    names = {"values.npy", "offsets.npy", SPLITS_FILE}
    names |= {"users.parquet", "items.parquet", "relations.parquet", COLD_ITEMS_FILE}
    names |= {features_file(name) for name in schema.get("item_features", {})}
    for name in sorted(names):
        file = folder / name
        if not file.exists() and name in digests:
            raise DataError(file, "file is missing")
        if file.exists():
            check_digest(file, digest(file), schema)
    for name, key in (("users.parquet", "num_users"), ("items.parquet", "num_items")):
        with reading(folder / name):
            rows = pl.scan_parquet(folder / name, glob=False).select(pl.len()).collect().item()
        if rows != schema[key]:
            raise DataError(
                folder / "schema.json", f"{key!r} is {schema[key]}, {name} has {rows} rows"
            )


def check_sizes(dataset) -> None:
    """Raise for an array of a SequenceDataset whose shape is not what schema.json says."""
    users = dataset.num_users
    expected = [
        ("values.npy", dataset.values, (dataset.num_events,)),
        ("offsets.npy", dataset.offsets, (users + 1,)),
    ]
    for name, array, shape in expected:
        if array.shape != shape:
            raise DataError(
                dataset.path / name, f"schema.json says {shape[0]} elements, the file has "
                f"shape {tuple(array.shape)}",
            )  # fmt: skip
    if dataset.splits is not None and dataset.splits.shape != (users, 2):
        raise DataError(
            dataset.path / SPLITS_FILE,
            f"shape must be [{users}, 2], the file has {list(dataset.splits.shape)}",
        )


def check_contents(dataset) -> None:
    """Raise for offsets that fall, boundaries of a split out of order, items out of range."""
    file = dataset.path / "offsets.npy"
    if dataset.offsets[0] != 0 or dataset.offsets[-1] != dataset.num_events:
        raise DataError(
            file, f"must run from 0 to {dataset.num_events}, the number of values; "
            f"runs from {dataset.offsets[0]} to {dataset.offsets[-1]}",
        )  # fmt: skip
    falls = np.flatnonzero(dataset.lengths < 0)
    if falls.size:
        raise DataError(file, f"offsets are not monotone: they fall after index {falls[0]}")
    if dataset.splits is not None:
        check_splits(dataset.path / SPLITS_FILE, dataset.splits, dataset.lengths)
    values = dataset.values
    if values.min() < 0 or values.max() >= dataset.num_items:
        where = np.flatnonzero((values < 0) | (values >= dataset.num_items))[0]
        raise DataError(
            dataset.path / "values.npy",
            f"item {values[where]} at index {where} is out of [0, {dataset.num_items})",
        )


def read_schema(file: Path) -> dict:
    if not file.exists():
        raise DataError(file, "file is missing; is this a dataset directory (fastrec prepare)?")
    try:
        with reading(file):
            schema = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(file, f"is not JSON: {error}") from error
    if not isinstance(schema, dict) or schema.get("format") != FORMAT:
        raise DataError(file, f'"format" must be {FORMAT!r}: not a fastrec dataset')
    version = schema.get("version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise DataError(
            file, f"format version {version!r} is unknown, this library reads "
            f"{FORMAT_VERSION}: prepare the dataset again",
        )  # fmt: skip
    for key in ("num_users", "num_items", "num_interactions"):
        if type(schema.get(key)) is not int or not 0 < schema[key] < _MANY:
            got = str(schema.get(key, "nothing"))[:40]
            raise DataError(file, f"{key!r} must be a positive integer, got {got!r}")
    if not isinstance(schema.get("split", {}), dict):
        raise DataError(file, f"'split' must say how users are split, got {schema['split']!r}")
    if not isinstance(schema.get("item_features", {}), dict):
        raise DataError(file, f"'item_features' must be by name, got {schema['item_features']!r}")
    digests = schema.get("digests")
    if not isinstance(digests, dict) or not all(type(each) is str for each in digests.values()):
        raise DataError(file, "'digests' of the files are missing: prepare the dataset again")
    return schema


def read_array(file: Path, dtypes: tuple[str, ...]) -> np.ndarray:
    if not file.exists():
        raise DataError(file, "file is missing")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header meets a tokenizer and a parser
        raise DataError(file, f"truncated or not a .npy array: {error}") from error
    if array.dtype.name not in dtypes:
        raise DataError(file, f"dtype must be {' or '.join(dtypes)}, got {array.dtype.name}")
    return array
