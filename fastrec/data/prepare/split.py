# SPDX-License-Identifier: Apache-2.0
"""Splits of `prepare` other than leave-one-out, as two boundaries a user (`data.splits`).

    last   the last `test` events of a user are test, the `valid` before them validation
    ratio  the same with shares of the user's events, rounded down
    time   events from the time `valid` on are validation, those from the time `test` on are test
    files  training, validation and test have files of their own

Legend: U users, E events.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from fastrec.data.errors import DataError
from fastrec.data.event_columns import PER_SECOND
from fastrec.data.prepare.epochs import WORDS, is_number
from fastrec.data.prepare.filters import Kept
from fastrec.data.prepare.raw import RawData
from fastrec.data.prepare.sources import name_of
from fastrec.data.prepare.times import time_column

KINDS = ("leave_one_out", "last", "ratio", "time", "files")
_VALUES = {
    "last": "how many events of a user",
    "ratio": "shares of a user's events",
    "time": "the times that they begin with",
    "files": "files like --source",
}


@dataclass(frozen=True)
class Split:
    """kind: of `KINDS`. valid, test: of "last" whole numbers, of "ratio" shares, of "time" text, of
    "files" what `prepare` reads events from."""

    kind: str = "leave_one_out"
    valid: Any = None
    test: Any = None

    @property
    def files(self) -> list:
        """What is read beside the source."""
        return [self.valid, self.test] if self.kind == "files" else []


def split_of(kind: str, valid=None, test=None, valid_source=None, test_source=None) -> Split:
    """The settings of `prepare`, checked. valid, test: numbers or text; times may be dates.

    Raises ValueError for a setting that is missing, has no effect, or leaves nothing to train on.
    """
    if kind not in KINDS:
        raise ValueError(f"--split must be one of {', '.join(KINDS)}, got {kind!r}")
    files = {"valid_source": valid_source, "test_source": test_source}
    values = {"valid": valid, "test": test}
    given = files if kind == "files" else values if kind in _VALUES else {}
    for name, value in (files | values).items():
        if name in given and value is None:
            first, second = given
            raise ValueError(
                f"--split {kind} needs --{first} and --{second}, {_VALUES[kind]}: no {name}"
            )
        if name not in given and value is not None:
            raise ValueError(f"--{name} has no effect on --split {kind}")
    if kind not in ("last", "ratio", "time"):
        return Split(kind, *given.values())
    if kind == "last":
        return Split(kind, *(_count(name, value) for name, value in given.items()))
    if kind == "time":
        return Split(kind, *(str(value).strip() for value in given.values()))
    valid, test = (_share(name, value) for name, value in given.items())
    if valid + test >= 1:
        raise ValueError(f"--valid {valid:g} and --test {test:g} leave nothing to train on")
    return Split(kind, valid, test)


def _count(name: str, value) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**31):
        raise ValueError(f"--{name} of --split last must be a whole number above 0, got {text!r}")
    return int(text)


def _share(name: str, value) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"--{name} of --split ratio must be between 0 and 1, got {value!r}")
    return share


def divided(split: Split, raw: RawData, events: Kept) -> tuple[np.ndarray | None, dict | None]:
    """(int64 [U, 2] boundaries, what schema.json says of them); None, None for leave-one-out.

    raw: of its interactions, only which columns they have. events: those of the data set.

    Raises DataError where there are no times to split by, nothing is left to train on, or nobody to
    validate or test on; ValueError for times that cannot be read or are in the wrong order.
    """
    if split.kind == "leave_one_out":
        return None, None
    ends, values, rule = _KINDS[split.kind](split, raw, events)
    parts = _counted(ends, events)
    if parts["train"]["events"] == 0:
        raise DataError(raw.source, f"no event is left to train on: {rule}")
    for name, word in (("valid", "a validation"), ("test", "a test")):
        if parts[name]["users"] == 0:
            raise DataError(raw.source, f"no user has {word} target and an event before it: {rule}")
    return ends, {"kind": split.kind, **values, "rule": rule, "parts": parts}


def _last(split: Split, raw: RawData, events: Kept):
    lengths = events.lengths
    rule = (
        f"the last {split.test} events of a user are test, the {split.valid} before them"
        f" validation; of users with at most {split.valid + split.test} all are training"
    )
    short = lengths <= split.valid + split.test
    valid_end = lengths - np.where(short, 0, split.test)
    train_end = valid_end - np.where(short, 0, split.valid)
    ends = np.stack([train_end, valid_end], axis=1)
    return ends, {"valid": split.valid, "test": split.test}, rule


def _ratio(split: Split, raw: RawData, events: Kept):
    lengths = events.lengths
    rule = (
        f"of each user's events the last {100 * split.test:g} % are test, the"
        f" {100 * split.valid:g} % before them validation, rounded down"
    )
    # 0.29 * 100 is 28.999999999999996.
    test = np.floor(lengths * split.test + 1e-9).astype(np.int64).clip(max=lengths - 1)
    valid = np.floor(lengths * split.valid + 1e-9).astype(np.int64)
    valid = valid.clip(max=lengths - 1 - test)
    ends = np.stack([lengths - test - valid, lengths - test], axis=1)
    return ends, {"valid": split.valid, "test": split.test}, rule


def _time(split: Split, raw: RawData, events: Kept):
    if "timestamp" not in raw.interactions.columns:
        raise DataError(raw.source, "--split time needs times (of a table: --timestamp_column)")
    valid = _cut("valid", split.valid, raw)
    test = _cut("test", split.test, raw)
    if valid >= test:
        raise ValueError(f"--valid {split.valid} is not before --test {split.test}")
    counts = np.zeros((len(events.lengths), 2), dtype=np.int64)
    before = {"user": -1, "timestamp": 0}
    for chunk in events.chunks("timestamp"):
        user, times = (np.append(before[name], chunk[name]) for name in before)
        if ((times[1:] < times[:-1]) & (user[1:] == user[:-1])).any():
            raise DataError(raw.source, "times of a user fall: --split time needs them in order")
        before = {"user": user[-1], "timestamp": times[-1]}
        for column, cut in enumerate((valid, test)):
            counts[:, column] += np.bincount(user[1:][times[1:] < cut], minlength=len(counts))
    rule = (
        f"events before {split.valid} are training, those from then on validation, those from"
        f" {split.test} on test"
    )
    return counts, {"valid": valid, "test": test, "time": raw.time}, rule


def _files(split: Split, raw: RawData, events: Kept):
    names = {"valid": source_name(split.valid), "test": source_name(split.test)}
    rule = (
        f"training, validation and test are the events of {raw.source}, {names['valid']} and"
        f" {names['test']}"
    )
    counts = np.zeros((len(events.lengths), 2), dtype=np.int64)
    for chunk in events.chunks("part"):
        for column in range(2):
            user = chunk["user"][chunk["part"] <= column]
            counts[:, column] += np.bincount(user, minlength=len(counts))
    return counts, names, rule


_KINDS = {"last": _last, "ratio": _ratio, "time": _time, "files": _files}


def source_name(source) -> str:
    """What errors and schema.json call what `prepare` reads."""
    return source.source if isinstance(source, RawData) else str(name_of(source))


def _cut(name: str, text: str, raw: RawData) -> int:
    """The first time from `text` on, a whole number as the data set counts or an ISO date."""
    if re.fullmatch("-?[0-9]{1,18}", text):
        return int(text)
    if raw.time not in WORDS.values():
        raise DataError(
            raw.source, f"its times are numbers of unknown unit, and --{name} is {text!r}: give a"
            " whole number that counts alike, or --time_unit",
        )  # fmt: skip
    series = pl.Series(name, [text], dtype=pl.String)
    try:
        if is_number(series):
            raise ValueError("a fraction")
        moments, word, _ = time_column("", series, 0)
    except ValueError as error:
        raise ValueError(
            f"--{name} is {text!r}: expected a whole number, or an ISO time such as 2024-01-31 or"
            " 2024-01-31T10:00:00"
        ) from error
    return -(-int(moments[0]) * PER_SECOND[raw.time] // PER_SECOND[word])


def _counted(ends: np.ndarray, events: Kept) -> dict[str, dict[str, int]]:
    """Of each part: events, and users who are trained or asked. Of validation and test: targets,
    how many of them are items without a training event, and users who have no event before."""
    lengths = events.lengths
    known = np.zeros(int(events.item.max()) + 1, dtype=bool)
    for _, item, place, train_end, _ in _placed(ends, events):
        known[item[place < train_end]] = True
    parts = {"train": {"events": int(ends[:, 0].sum()), "users": int((ends[:, 0] > 0).sum())}}
    asked_of, without = {}, {"valid": 0, "test": 0}
    for name, start, end in (("valid", ends[:, 0], ends[:, 1]), ("test", ends[:, 1], lengths)):
        held_out, asked = start < end, (start < end) & (start > 0)
        asked_of[name] = asked
        parts[name] = {
            "events": int((end - start).sum()),
            "users": int(asked.sum()),
            "targets": int((end - start)[asked].sum()),
            "targets_without_training": 0,
            "users_without_input": int((held_out & ~asked).sum()),
        }
    for user, item, place, train_end, valid_end in _placed(ends, events):
        new = ~known[item] & (place >= train_end)
        for name, inside in (("valid", place < valid_end), ("test", place >= valid_end)):
            without[name] += int((new & inside & asked_of[name][user]).sum())
    for name, count in without.items():
        parts[name]["targets_without_training"] = count
    return parts


def _placed(ends: np.ndarray, events: Kept):
    """user, item, place in the sequence and the two boundaries of chunks of events."""
    first, before = np.cumsum(events.lengths) - events.lengths, 0
    for chunk in events.chunks():
        user = chunk["user"]
        place = np.arange(before, before + len(user)) - first[user]
        yield user, chunk["item"], place, ends[user, 0], ends[user, 1]
        before += len(user)


def report_lines(split: dict) -> list[str]:
    """What `divided` says of a split, for people."""
    parts = split["parts"]
    train = parts["train"]
    lines = [
        f"split: {split['rule']}",
        f"  train {train['events']:,} events of {train['users']:,} users",
    ]
    for name in ("valid", "test"):
        part = parts[name]
        line = f"  {name:<5} {part['targets']:,} targets of {part['users']:,} users"
        if part["targets_without_training"]:
            line += f", {part['targets_without_training']:,} of items without a training event"
        if part["users_without_input"]:
            line += (
                f"; not evaluated: {part['users_without_input']:,} users without an event before"
            )
        lines.append(line)
    return lines
