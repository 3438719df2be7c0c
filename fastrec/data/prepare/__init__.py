# SPDX-License-Identifier: Apache-2.0
"""From source files to the canonical dataset: read, filter, map ids, sort, write."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastrec.data.errors import DataError, reading
from fastrec.data.event_columns import PLACE
from fastrec.data.prepare import readers
from fastrec.data.prepare.catalogue import Catalogue
from fastrec.data.prepare.filters import Filters, add, kept_events
from fastrec.data.prepare.item_features import item_features as read_item_features
from fastrec.data.prepare.join import attribute_table, cold_table, relation_table
from fastrec.data.prepare.preview import preview
from fastrec.data.prepare.raw import RawData
from fastrec.data.prepare.report import TIE_RULE, PrepareReport
from fastrec.data.prepare.sources import is_frame, polars_frame
from fastrec.data.prepare.split import divided, source_name, split_of
from fastrec.data.prepare.split_files import joined
from fastrec.data.prepare.writer import claim, write_dataset

ORDER_RULE = "order of the source, never sorted"
BY_FILE = ", training before validation before test"


class Beside(NamedTuple):
    """What belongs to users and items: files, frames or None.

    user, item: attributes, and how a file of them is read. na_values: as `prepare` takes it.
    """

    user: tuple[Any, dict]
    item: tuple[Any, dict]
    item_features: Any
    relations: Any
    cold_items: Any
    na_values: str


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
    the source counts, from which on events are validation and test), or "files" with valid_source
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
    with claim(Path(output), overwrite), reading(source_name(source)):
        sources = [source, *chosen.files]
        parts = [
            each if isinstance(each, RawData) else readers.read(each, format, **options)
            for each in sources
        ]
        raw = joined(parts, options.get("on_duplicate", "error"))
        for name, (_, settings) in sides.items():
            settings["known_as"] = options.get(name) or raw.inferred.get(f"{name}_column")
        filters = Filters(k_core, min_rating, max_users)
        beside = Beside(
            sides["user"], sides["item"], item_features, relations, cold_items, na_values
        )
        earlier = None if items_of is None else Path(items_of)
        return _prepare(raw, Path(output), filters, beside, earlier, chosen, overwrite)


def _prepare(
    raw: RawData,
    output: Path,
    filters: Filters,
    beside: Beside,
    items_of: Path | None,
    split,
    overwrite: bool,
) -> PrepareReport:
    frame, removed = raw.interactions, dict(raw.removed)
    user_ids, user = _codes(frame["user_id"])
    item_ids, item = _codes(frame["item_id"])
    before = {"users": len(user_ids), "items": len(item_ids), "interactions": frame.height}
    before["interactions"] += sum(raw.removed.values())

    keep = kept_events(raw, user, item, filters, removed)
    rows = np.flatnonzero(keep)
    used_users, user = np.unique(user[rows], return_inverse=True)
    used_items, item = np.unique(item[rows], return_inverse=True)
    if raw.ordered:
        order = np.argsort(user, kind="stable")  # own files follow each other
    else:
        if "timestamp" not in frame.columns:
            raise DataError(
                raw.source, "events without times need a source that is in order (--ordered true)",
                column="timestamp",
            )  # fmt: skip
        part = np.zeros_like(rows) if raw.part is None else raw.part[rows]
        order = np.lexsort((rows, frame["timestamp"].to_numpy()[rows], part, user))
    user, item, rows = user[order], item[order], rows[order]

    user_file, options = beside.user
    sources = [(raw.source, raw.users), ("user_attributes", user_file)]
    users, lost = attribute_table(user_ids[used_users], sources, "user_id", user_ids, **options)
    add(removed, "attribute rows of users without interactions", lost)
    item_file, options = beside.item
    sources = [(raw.source, raw.items), ("item_attributes", item_file)]
    listed, catalogue = item_ids[used_items], None
    if items_of is not None:
        catalogue = Catalogue(items_of, listed)
        item, listed = catalogue.numbers(item), catalogue.ids
        item_ids = item_ids.cast(listed.dtype)
    items, lost = attribute_table(listed, sources, "item_id", item_ids, **options)
    add(removed, "attribute rows of items without interactions", lost)
    vectors: dict = {}
    if beside.item_features is not None:
        how = {"column": options["column"], "known_as": options["known_as"]}
        vectors, lost = read_item_features(beside.item_features, listed, item_ids, **how)
        add(removed, "feature rows of items without interactions", lost)
    if catalogue is not None:
        items, vectors = catalogue.joined(items), catalogue.features(vectors)
    name, links = "relations", beside.relations
    if links is None:
        name, links = raw.source, raw.relations
    links, lost = relation_table(name, links, users["user_id"], user_ids, beside.na_values)
    add(removed, "relations with an end without interactions", lost)
    cold, cold_items = None, beside.cold_items
    if cold_items is not None:
        cold_items, lost, twice = cold_table(
            cold_items, users["user_id"], user_ids, beside.na_values
        )
        add(removed, "cold-start rows of users without interactions", lost)
        add(removed, "cold-start rows that are there twice", twice)
        sizes = cold_items.height, cold_items["user"].n_unique(), cold_items["item"].n_unique()
        cold = "{:,} rows of {:,} users and {:,} items of another catalogue".format(*sizes)
    time = raw.time if "timestamp" in frame.columns else PLACE
    splits, said = divided(split, raw, user, item, rows)
    schema = write_dataset(
        output,
        interactions=_interactions(frame, rows, user, item),
        users=users,
        items=items,
        relations=links,
        cold_items=cold_items,
        tie_rule=(ORDER_RULE if raw.ordered else TIE_RULE) + ("" if raw.part is None else BY_FILE),
        time=time,
        source=raw.source,
        inferred=raw.inferred,
        filters=filters._asdict() | {"items_of": items_of and str(items_of), "removed": removed},
        splits=splits,
        split=said,
        features=vectors,
        overwrite=overwrite,
    )
    lengths = np.bincount(user)
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
        time=time,
        inferred=raw.inferred,
        preview=preview(frame, time),
        catalogue=None if catalogue is None else str(catalogue),
        split=said,
        attributes={"users": users.columns[1:], "items": items.columns[1:]},
        relations=0 if links is None else links.height,
        item_features=schema.get("item_features", {}),
        cold=cold,
    )


def _codes(ids):
    """(distinct ids in ascending order as a polars.Series, int64 [E] index of each id)."""
    import polars as pl

    distinct = ids.unique().sort()
    if ids.dtype == pl.Int64:
        return distinct, np.searchsorted(distinct.to_numpy(), ids.to_numpy())
    codes = ids.to_frame("id").join(
        distinct.to_frame("id").with_row_index("code"), on="id", how="left", maintain_order="left"
    )
    return distinct, codes["code"].to_numpy().astype(np.int64)


def _interactions(frame, rows: np.ndarray, user: np.ndarray, item: np.ndarray):
    import polars as pl

    columns = {"user": pl.Series(user, dtype=pl.Int64), "item": pl.Series(item, dtype=pl.Int64)}
    if "timestamp" in frame.columns:
        columns["timestamp"] = frame["timestamp"].gather(rows)
    else:
        lengths = np.bincount(user)
        place = np.arange(len(user)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        columns["timestamp"] = pl.Series(place, dtype=pl.Int64)
    for name, dtype in (("rating", pl.Float32), ("event_type", None)):
        if name in frame.columns:
            column = frame[name].gather(rows)
            columns[name] = column if dtype is None else column.cast(dtype)
    return pl.DataFrame(columns)
