# SPDX-License-Identifier: Apache-2.0
"""Own files for training, validation and test: their events end to end, and the part of each."""

import numpy as np

from fastrec.data.errors import DataError, reading
from fastrec.data.prepare.raw import RawData

_NOT_TWICE = ": --on_duplicate keep accepts them, drop removes them from the later file"


def joined(parts: list[RawData], on_duplicate: str = "error") -> RawData:
    """The events of the files of training, validation and test, in this order; a single file as it
    is.

    Attributes and relations are those that come with the first. on_duplicate: what to do with an
    event (user, item, time) of two files, as inside one; without times there are no such events.

    Raises DataError for files whose columns, types of ids or times differ.
    """
    import polars as pl

    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        _check_alike(first, other)
    with reading(first.source):
        events = pl.concat([each.interactions for each in parts])
    part = np.repeat(np.arange(len(parts)), [each.interactions.height for each in parts])
    removed: dict[str, int] = {}
    for each in parts:
        for reason, count in each.removed.items():
            removed[reason] = removed.get(reason, 0) + count
    if "timestamp" in events.columns and on_duplicate != "keep":
        keys = events.select(pl.struct("user_id", "item_id", "timestamp")).to_series()
        fresh = keys.is_first_distinct().to_numpy()
        if not fresh.all():
            place = int((~fresh).argmax())
            if on_duplicate == "error":
                event = "user {user_id}, item {item_id}, timestamp {timestamp}".format(
                    **keys[place]
                )
                raise DataError(
                    parts[part[place]].source, f"{int((~fresh).sum()):,} events stand in an earlier"
                    f" file too, the first is {event}{_NOT_TWICE}",
                )  # fmt: skip
            events, part = events.filter(pl.Series(fresh)), part[fresh]
            removed["events that stand in an earlier file"] = int((~fresh).sum())
    return RawData(
        first.source, events, first.users, first.items, first.relations, first.ordered, first.time,
        removed, first.inferred, part,
    )  # fmt: skip


def _check_alike(first: RawData, other: RawData) -> None:
    ours, theirs = first.interactions.schema, other.interactions.schema
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs:
            lacks, has = (other, first) if name in ours else (first, other)
            raise DataError(lacks.source, f"has no {name}, {has.source} has")
        if ours[name] != theirs[name]:
            hint = ": --ids str reads both as text" if name in ("user_id", "item_id") else ""
            raise DataError(
                other.source, f"{name} is {theirs[name]}, that of {first.source} {ours[name]}{hint}"
            )
    if "timestamp" in ours and first.time != other.time:
        raise DataError(
            other.source, f"times are {other.time}, those of {first.source} {first.time}:"
            " --time_unit says what numbers count",
        )  # fmt: skip
    if first.ordered != other.ordered:
        raise ValueError(f"{first.source} and {other.source}: either both are in order, or none")
