# SPDX-License-Identifier: Apache-2.0
"""Writing the canonical dataset directory: all of it or nothing."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fastrec.data.dataset_files import FORMAT, FORMAT_VERSION, digest, features_file
from fastrec.data.errors import DataError
from fastrec.data.output import locked, new_folder, put
from fastrec.data.prepare.item_features import Vectors
from fastrec.data.splits import FILE, boundaries, check_splits


def write_dataset(
    output,
    *,
    interactions,
    users,
    items,
    relations=None,
    cold_items=None,
    tie_rule: str,
    time: str,
    source: str,
    filters: dict | None = None,
    inferred: dict | None = None,
    splits: np.ndarray | None = None,
    split: dict | None = None,
    features: Mapping[str, Vectors] | None = None,
    overwrite: bool = False,
) -> dict:
    """Write a dataset that `SequenceDataset.load` opens; returns its schema.

    interactions: polars.DataFrame, user, item, timestamp (int64), optional rating (float32) and
    event_type; sorted by user, and in time order inside a user.
    users, items: polars.DataFrames whose row i describes user (item) i: the original id in user_id
    (item_id) and attributes. relations: polars.DataFrame user, friend, or None.
    cold_items: polars.DataFrame user, item, item_id of another catalogue, or None.
    time: what a timestamp is; tie_rule: the order of events with equal timestamps. inferred: the
    settings of the reader that were recognised, not given. splits: int64 [U, 2] of a split that is
    not leave-one-out, see `data.splits`; split: what it is, in words and numbers. features: vectors
    of the items by name.

    The files are written to a folder beside `output`, which then takes its place; schema.json holds
    a digest of each. Callers hold `claim`. A folder that is not empty raises FileExistsError; with
    `overwrite` it is replaced if it is a fastrec dataset, and still raises if it holds anything
    else.
    """
    output = Path(output)
    check_output(output, overwrite)
    user, item = interactions["user"].to_numpy(), interactions["item"].to_numpy()
    if user.size == 0:
        raise DataError(output, "a dataset needs at least one interaction")
    if (np.diff(user) < 0).any():
        raise ValueError("interactions must be sorted by user")
    for name, ids, count in (("user", user, users.height), ("item", item, items.height)):
        if ids.min() < 0 or ids.max() >= count:
            raise ValueError(f"interactions: {name} out of [0, {count})")
    users = _indexed(users, "user")
    items = _indexed(items, "item")
    lengths = np.bincount(user, minlength=users.height)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    if (splits is None) != (split is None):
        raise ValueError("splits and what schema.json says of them belong together")
    if splits is not None:
        check_splits(output, splits, lengths)
    tables = {"interactions": interactions, "users": users, "items": items}
    if relations is not None:
        tables["relations"] = relations
    if cold_items is not None:
        tables["cold_items"] = cold_items
    schema = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "num_users": users.height,
        "num_items": items.height,
        "num_interactions": interactions.height,
        "num_relations": 0 if relations is None else relations.height,
        "num_short_users": int((boundaries("train", lengths, splits)[0] == lengths).sum()),
        "time": time,
        "tie_rule": tie_rule,
        "source": source,
        "inferred": inferred or {},
        "filters": filters or {},
        "columns": {
            name: {column: str(dtype) for column, dtype in table.schema.items()}
            for name, table in tables.items()
        },
    }

    if split is not None:
        schema["split"] = split
    if features:
        schema["item_features"] = {
            name: {"width": part.numbers.shape[1], "missing": int((~part.known).sum())}
            for name, part in features.items()
        }

    work = new_folder(output)
    try:
        for name, table in tables.items():
            table.write_parquet(work / f"{name}.parquet")
        dtype = np.int32 if items.height <= np.iinfo(np.int32).max else np.int64
        np.save(work / "values.npy", item.astype(dtype))
        np.save(work / "offsets.npy", offsets)
        for name, part in (features or {}).items():
            np.save(work / features_file(name), part.numbers)
        if splits is not None:
            np.save(work / FILE, splits.astype(np.int64))
        schema["digests"] = {file.name: digest(file) for file in sorted(work.iterdir())}
        text = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        (work / "schema.json").write_text(text, encoding="utf-8")
        put(work, output)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return schema


@contextmanager
def claim(output: Path, overwrite: bool) -> Iterator[None]:
    """Hold `output` for this process, from before the first file is read until it is written.

    Raises FileExistsError if it must not be written, or another process holds it.
    """
    with locked(output):
        check_output(output, overwrite)
        yield


def check_output(output: Path, overwrite: bool) -> None:
    """Raise if `output` must not be written."""
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"{output} is a file")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{output} is not empty; --overwrite true replaces it")
    schema = output / "schema.json"
    if not schema.is_file() or FORMAT not in schema.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(f"{output} is not a fastrec dataset: it will not be replaced")


def _indexed(frame, name: str):
    import polars as pl

    return frame.select(pl.int_range(pl.len(), dtype=pl.Int64).alias(name), pl.exclude(name))
