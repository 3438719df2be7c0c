# SPDX-License-Identifier: Apache-2.0
"""From source files to the canonical dataset: read, filter, map ids, sort, write."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fastrec.data.errors import reading
from fastrec.data.event_columns import PLACE
from fastrec.data.output import scratch_folder
from fastrec.data.prepare import readers
from fastrec.data.prepare.beside import Beside, joined
from fastrec.data.prepare.filters import Filters, Kept, kept_events
from fastrec.data.prepare.load import Loaded, load_events
from fastrec.data.prepare.preview import preview
from fastrec.data.prepare.raw import RawData
from fastrec.data.prepare.report import TIE_RULE, PrepareReport, peak_memory
from fastrec.data.prepare.sources import is_frame, polars_frame
from fastrec.data.prepare.split import Split, divided, source_name, split_of
from fastrec.data.prepare.writer import Interactions, claim, write_dataset

ORDER_RULE = "order of the source, never sorted"
BY_FILE = ", training before validation before test"


def prepare(
    source,
    output,
    *,
    format: str = "table",
    k_core: int = 0,
    min_rating: float | None = None,
    max_users: int | None = None,
    user_attributes=None,
    item_attributes=None,
    item_features=None,
    relations=None,
    cold_items=None,
    user_key: str | None = None,
    item_key: str | None = None,
    items_of: Path | str | None = None,
    na_values: str = "ask",
    split: str = "leave_one_out",
    valid=None,
    test=None,
    valid_source=None,
    test_source=None,
    overwrite: bool = False,
    **options,
) -> PrepareReport:
    """Read `source`, filter it and write the canonical dataset directory `output`.

    source: a path, a data frame (polars, pandas, Arrow), or a `RawData`. format: a key of
    `readers.FORMATS`; `options` go to that reader: for a table see `readers.read_table` and
    `events.events_of`.
    min_rating: events rated below are removed. max_users: the first users in order of their id are
    kept. k_core: then every user and item with fewer than k events goes, again and again.
    user_attributes, item_attributes: a file (see `side_tables.read_attributes`; for s3rec items the
    attribute JSON) or a data frame with user_id (item_id) and attributes, one row per id. Ids
    without events are left out and counted; ids without a row have nulls; a file without any id of
    the source is an error. user_key, item_key: the column of such a file that holds the ids.
    item_features: a file or frame with vectors of items, see `item_features`; items without one
    have zeros and are counted.
    relations: a file or frame whose first two columns are user and friend; links with an end that
    has no events are left out and counted.
    cold_items: a file or frame whose first two columns are user and item of another catalogue, what
    cold-start recommendation predicts from the events here; rows of users without events, and those
    that are there twice, are left out and counted.
    items_of: a data set whose items come first, in their order and with their attributes, also
    those without events here: models that were trained on it go on, and new items come behind.
    na_values: what words such as NA are: "ask" refuses them, "missing", or "text".
    split: which events are held out, "leave_one_out", or with valid and test "last" (how many
    events of a user), "ratio" (which share of them) or "time" (the times, dates or whole numbers as
    the data set counts, from which on events are validation and test), or "files" with valid_source
    and test_source, which are read as `source` is, whose events are those of training.

    Ids become 0..U-1 and 0..V-1 in ascending order of the original ids, so that files that count
    from 1 without gaps just lose 1. Events are sorted stably by (timestamp, row), unless the source
    is in order already; schema.json states which. The output appears complete or not at all.

    Raises DataError for bad input and where a filter leaves nothing, FileExistsError if `output`
    is not empty and may not be replaced, or is being written by another process.
    """
    if k_core < 0 or (max_users is not None and max_users < 1):
        raise ValueError(f"k_core must not be negative, max_users positive: {k_core}, {max_users}")
    if na_values not in ("ask", "missing", "text"):
        raise ValueError(f"na_values must be 'ask', 'missing' or 'text', got {na_values!r}")
    is_raw = isinstance(source, RawData)
    if is_raw and options:
        raise ValueError(f"{', '.join(options)} have no effect on events that have been read")
    if not is_raw and "na_values" in readers.OPTIONS.get(format, ()):
        options["na_values"] = na_values
    elif (
        na_values != "ask" and user_attributes is item_attributes is relations is cold_items is None
    ):
        raise ValueError(f"--na_values has no effect on --format {format} without side files")
    chosen = split_of(split, valid, test, valid_source, test_source)
    frames = {"user_attributes": user_attributes, "item_attributes": item_attributes}
    frames |= {"relations": relations, "cold_items": cold_items}
    user_attributes, item_attributes, relations, cold_items = (
        polars_frame(frame, name) if is_frame(frame) else frame for name, frame in frames.items()
    )
    sides = {
        "user": (user_attributes, {"column": user_key}),
        "item": (item_attributes, {"column": item_key}),
    }
    for name, (file, settings) in sides.items():
        vectors = item_features if name == "item" else None
        if settings["column"] is not None and not any(
            isinstance(each, (str, Path)) for each in (file, vectors)
        ):
            raise ValueError(f"{name}_key has no effect: {name}_attributes is no file")
        settings["na_values"] = na_values
    output, start = Path(output), time.perf_counter()
    with claim(output, overwrite), scratch_folder(output) as folder, reading(source_name(source)):
        sources = []
        for each in [source, *chosen.files]:
            if format == "table" and not isinstance(each, RawData):
                readers.check_options(each, format, options)
            elif not isinstance(each, RawData):
                each = readers.read(each, format, **options)
            sources.append(each)
        found = load_events(sources, options, folder, options.get("on_duplicate", "error"))
        for name, (_, settings) in sides.items():
            settings["known_as"] = options.get(name) or found.raw.inferred.get(f"{name}_column")
        least = None if min_rating is None else float(min_rating)  # a number for JSON
        filters = Filters(k_core, least, max_users)
        beside = Beside(
            sides["user"], sides["item"], item_features, relations, cold_items, na_values,
            items_of=None if items_of is None else Path(items_of),
        )  # fmt: skip
        report = _prepare(found, output, filters, beside, chosen, overwrite)
    return replace(report, seconds=time.perf_counter() - start, peak_memory=peak_memory())


def _prepare(
    found: Loaded, output: Path, filters: Filters, beside: Beside, split: Split, overwrite: bool
) -> PrepareReport:
    raw, removed = found.raw, dict(found.raw.removed)
    sizes = {"users": len(found.user_ids), "items": len(found.item_ids)}
    before = sizes | {"interactions": found.events.height + sum(removed.values())}
    used_users, used_items, events = kept_events(
        raw.source, found.events, sizes["users"], sizes["items"], filters, removed
    )
    users, items, features, relations, cold_items, catalogue = joined(
        found, beside, used_users, used_items, removed
    )
    if catalogue is not None:
        events.item = np.where(events.item < 0, -1, catalogue.numbers(events.item.clip(0)))
    when = raw.time if "timestamp" in found.events.dtypes else PLACE
    splits, said = divided(split, raw, events)
    schema = write_dataset(
        output,
        interactions=_interactions(found, events),
        users=users,
        items=items,
        relations=relations,
        cold_items=cold_items,
        tie_rule=(ORDER_RULE if raw.ordered else TIE_RULE) + (BY_FILE if found.parts else ""),
        time=when,
        source=raw.source,
        inferred=raw.inferred,
        filters=filters._asdict()
        | {"items_of": beside.items_of and str(beside.items_of), "removed": removed},
        splits=splits,
        split=said,
        features=features,
        overwrite=overwrite,
    )
    lengths = events.lengths
    return PrepareReport(
        output=output,
        source=raw.source,
        before=before,
        after={name: schema[f"num_{name}"] for name in before},
        removed=removed,
        lengths={
            "min": float(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": float(lengths.max()),
        },
        num_short_users=schema["num_short_users"],
        tie_rule=schema["tie_rule"],
        time=when,
        inferred=raw.inferred,
        preview=preview(raw.interactions, when),
        catalogue=None if catalogue is None else str(catalogue),
        split=said,
        attributes={"users": users.columns[1:], "items": items.columns[1:]},
        relations=0 if relations is None else relations.height,
        item_features=schema.get("item_features", {}),
        cold=None if cold_items is None else _cold_items(cold_items),
    )


def _cold_items(table: pl.DataFrame) -> str:
    counts = table.height, table["user"].n_unique(), table["item"].n_unique()
    return "{:,} rows of {:,} users and {:,} items of another catalogue".format(*counts)


def _interactions(found: Loaded, events: Kept) -> Interactions:
    names = [name for name in ("timestamp", "rating", "event_type") if name in found.events.dtypes]
    schema: dict = {"user": pl.Int64, "item": pl.Int64, "timestamp": pl.Int64}
    if "rating" in names:
        schema["rating"] = pl.Float32
    if found.kinds is not None:
        schema["event_type"] = found.kinds.dtype

    def blocks():
        first, before = np.cumsum(events.lengths) - events.lengths, 0
        for chunk in events.chunks(*names):
            height = len(chunk["user"])
            if height == 0:
                continue
            place = np.arange(before, before + height)
            before += height
            columns: dict[str, Any] = {**chunk}
            if "timestamp" not in names:
                columns["timestamp"] = place - first[chunk["user"]]
            if found.kinds is not None:
                kind = pl.Series(chunk["event_type"])
                columns["event_type"] = found.kinds.gather(kind.set(kind < 0, None))
            yield pl.DataFrame({name: columns[name] for name in schema}, schema=schema)

    return Interactions(schema, events.height, blocks)
