# SPDX-License-Identifier: Apache-2.0
"""The first events as they were understood, for a person to look at."""

import datetime

import polars as pl

from fastrec.data.prepare.epochs import WORDS

_DIGITS = {words: digits for digits, words in WORDS.items()}


def preview(frame: pl.DataFrame, time: str) -> list[str]:
    """A line each of the first three events: user, item, time as a date, rating, type.

    frame: the canonical interactions in original ids. time: what a timestamp counts.
    """
    lines = []
    for event in frame.head(3).iter_rows(named=True):
        parts = [f"user {event['user_id']!r}", f"item {event['item_id']!r}"]
        if "timestamp" in event:
            parts.append(f"time {moment(event['timestamp'], time)}")
        if "rating" in event:
            parts.append(f"rating {event['rating']:g}")
        if "event_type" in event:
            parts.append(f"event {event['event_type']!r}")
        lines.append(", ".join(part if len(part) < 60 else f"{part[:56]} .." for part in parts))
    return lines


def moment(value: int, time: str) -> str:
    """A timestamp as a date (UTC), the number where it counts something else."""
    digits = _DIGITS.get(time)
    if digits is None:
        return str(value)
    second, rest = divmod(value, 10**digits)
    date = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=second)
    text = f"{date.isoformat(sep=' ')}"
    return f"{text}.{rest:0{digits}d}".rstrip("0") if rest else text
