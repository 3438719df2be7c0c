# SPDX-License-Identifier: Apache-2.0
"""Writing the canonical dataset directory: all of it or nothing."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from fastrec.data.dataset_files import (
    FORMAT,
    FORMAT_VERSION,
    digest,
    features_file,
    is_part,
)
from fastrec.data.errors import DataError
from fastrec.data.output import check_only, locked, replaced_folder
from fastrec.data.prepare import store
from fastrec.data.prepare.item_features import Vectors
from fastrec.data.splits import SPLITS_FILE, boundaries, check_splits

_ROW_GROUP = 1 << 18  # rows of interactions.parquet, whatever the blocks


class Interactions(NamedTuple):
    """The events of a data set, block by block. schema: polars types by column; height: events;
    blocks: gives some of them at a time, none empty, each time it is called."""

    schema: dict[str, Any]
    height: int
    blocks: Callable[[], Iterable[pl.DataFrame]]

    @classmethod
    def of(cls, frame: pl.DataFrame) -> "Interactions":
        return cls(dict(frame.schema), frame.height, lambda: frame.iter_slices(store.CHUNK))


def write_dataset(
    output,
    *,
    interactions: pl.DataFrame | Interactions,
    users: pl.DataFrame,
    items: pl.DataFrame,
    relations: pl.DataFrame | None = None,
    cold_items: pl.DataFrame | None = None,
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

    interactions: a frame, or `Interactions` that come block by block: user, item, timestamp
    (int64), optional rating (float32) and event_type; sorted by user, and in time order inside a
    user.
    users, items: row i describes user (item) i: the original id in user_id (item_id) and
    attributes. relations: user, friend, or None.
    cold_items: user, item, item_id of another catalogue, or None.
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
    if not isinstance(interactions, Interactions):
        interactions = Interactions.of(interactions)
    if interactions.height == 0:
        raise DataError(output, "a dataset needs at least one interaction")
    users = _indexed(users, "user")
    items = _indexed(items, "item")
    if (splits is None) != (split is None):
        raise ValueError("splits and what schema.json says of them belong together")
    tables = {"users": users, "items": items}
    if relations is not None:
        tables["relations"] = relations
    if cold_items is not None:
        tables["cold_items"] = cold_items
    schemas = {"interactions": interactions.schema}
    schemas |= {name: dict(table.schema) for name, table in tables.items()}
    schema = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "num_users": users.height,
        "num_items": items.height,
        "num_interactions": interactions.height,
        "num_relations": 0 if relations is None else relations.height,
        "num_short_users": 0,
        "time": time,
        "tie_rule": tie_rule,
        "source": source,
        "inferred": inferred or {},
        "filters": filters or {},
        "columns": {
            name: {column: str(dtype) for column, dtype in types.items()}
            for name, types in schemas.items()
        },
    }

    if split is not None:
        schema["split"] = split
    if features:
        schema["item_features"] = {
            name: {"width": part.numbers.shape[1], "missing": int((~part.known).sum())}
            for name, part in features.items()
        }

    with replaced_folder(output) as work:
        for name, table in tables.items():
            table.write_parquet(work / f"{name}.parquet")
        lengths = _write_events(work, interactions, users.height, items.height)
        if splits is not None:
            check_splits(output, splits, lengths)
        short = boundaries("train", lengths, splits)[0] == lengths
        schema["num_short_users"] = int(short.sum())
        np.save(work / "offsets.npy", np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))
        for name, part in (features or {}).items():
            np.save(work / features_file(name), part.numbers)
        if splits is not None:
            np.save(work / SPLITS_FILE, splits.astype(np.int64))
        schema["digests"] = {file.name: digest(file) for file in sorted(work.iterdir())}
        text = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        (work / "schema.json").write_text(text, encoding="utf-8")
    return schema


def _write_events(work: Path, events: Interactions, users: int, items: int) -> np.ndarray:
    """Write interactions.parquet and values.npy; int64 [U], how many events each user has."""
    lengths = np.zeros(users, dtype=np.int64)
    dtype = np.dtype(np.int32 if items <= np.iinfo(np.int32).max else np.int64)

    def blocks(with_columns, predicate, n_rows, batch_size):
        last = 0
        for block in events.blocks():
            user, item = block["user"].to_numpy(), block["item"].to_numpy()
            if (np.diff(user, prepend=last) < 0).any():
                raise ValueError("interactions must be sorted by user")
            for name, ids, count in (("user", user, users), ("item", item, items)):
                if ids.min() < 0 or ids.max() >= count:
                    raise ValueError(f"interactions: {name} out of [0, {count})")
            last = int(user[-1])
            counts = np.bincount(user - user[0])
            lengths[user[0] : user[0] + len(counts)] += counts
            values.write(item.astype(dtype).data)
            yield block if with_columns is None else block.select(with_columns)

    # Polars opens a path in a thread of its own: in 15 of 300 runs that ended with an error of
    # `blocks` it did so behind that, and a file stood where the folder had gone.
    with (
        (work / "values.npy").open("wb") as values,
        (work / "interactions.parquet").open("wb") as file,
    ):
        header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype))
        np.lib.format.write_array_header_1_0(values, header | {"shape": (events.height,)})
        source = register_io_source(blocks, schema=events.schema)
        source.sink_parquet(file, row_group_size=_ROW_GROUP, engine="streaming")
    return lengths


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
    check_only(output, is_part)


def _indexed(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    return frame.select(pl.int_range(pl.len(), dtype=pl.Int64).alias(name), pl.exclude(name))
