"""Splits of `prepare` other than leave-one-out, as two boundaries a user (`data.splits`).

    last   the last `test` events of a user are test, the `valid` before them validation
    ratio  the same with shares of the user's events, rounded down

Legend: U users, E events.
"""

from dataclasses import dataclass

import numpy as np

from fastrec.data.errors import DataError
from fastrec.data.prepare.raw import RawData

KINDS = ("leave_one_out", "last", "ratio")
_VALUES = {"last": "how many events of a user", "ratio": "shares of a user's events"}


@dataclass(frozen=True)
class Split:
    """kind: of `KINDS`. valid, test: of "last" whole numbers, of "ratio" shares."""

    kind: str = "leave_one_out"
    valid: int | float = 0
    test: int | float = 0


def split_of(kind: str, valid=None, test=None) -> Split:
    """The settings of `prepare`, checked. valid, test: numbers, or text of one.

    Raises ValueError for a setting that is missing, has no effect, or leaves nothing to train on.
    """
    if kind not in KINDS:
        raise ValueError(f"--split must be one of {', '.join(KINDS)}, got {kind!r}")
    given = {"valid": valid, "test": test}
    if kind not in _VALUES:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"--{name} has no effect on --split {kind}")
        return Split(kind)
    for name, value in given.items():
        if value is None:
            raise ValueError(f"--split {kind} needs --valid and --test, {_VALUES[kind]}: no {name}")
    if kind == "last":
        return Split(kind, *(_count(name, value) for name, value in given.items()))
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


def divided(
    split: Split, raw: RawData, user: np.ndarray, item: np.ndarray
) -> tuple[np.ndarray | None, dict | None]:
    """(int64 [U, 2] boundaries, what schema.json says of them); None, None for leave-one-out.

    user, item: int64 [E], sorted by user and in time order inside a user. raw: for errors.

    Raises DataError where nothing is left to train on, or nobody to validate or test on.
    """
    if split.kind == "leave_one_out":
        return None, None
    lengths = np.bincount(user)
    if split.kind == "last":
        rule = (
            f"the last {split.test} events of a user are test, the {split.valid} before them"
            f" validation; of users with at most {split.valid + split.test} all are training"
        )
        short = lengths <= split.valid + split.test
        test = np.where(short, 0, split.test)
        valid = np.where(short, 0, split.valid)
    else:
        rule = (
            f"of each user's events the last {100 * split.test:g} % are test, the"
            f" {100 * split.valid:g} % before them validation, rounded down"
        )
        # 0.29 * 100 is 28.999999999999996.
        test = np.floor(lengths * split.test + 1e-9).astype(np.int64).clip(max=lengths - 1)
        valid = np.floor(lengths * split.valid + 1e-9).astype(np.int64)
        valid = valid.clip(max=lengths - 1 - test)
    ends = np.stack([lengths - test - valid, lengths - test], axis=1)
    parts = _counted(ends, lengths, user, item)
    if parts["train"]["events"] == 0:
        raise DataError(raw.source, f"no event is left to train on: {rule}")
    for name, word in (("valid", "a validation"), ("test", "a test")):
        if parts[name]["users"] == 0:
            raise DataError(raw.source, f"no user has {word} target and an event before it: {rule}")
    values = {"valid": split.valid, "test": split.test}
    return ends, {"kind": split.kind, **values, "rule": rule, "parts": parts}


def _counted(ends: np.ndarray, lengths: np.ndarray, user, item) -> dict[str, dict[str, int]]:
    """Of each part: events, and users who are trained or asked. Of validation and test: targets,
    how many of them are items without a training event, and users who have no event before."""
    place = np.arange(len(user)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    train = place < ends[user, 0]
    known = np.bincount(item[train], minlength=item.max() + 1) > 0
    trained = int((ends[:, 0] > 0).sum())
    parts = {"train": {"events": int(train.sum()), "users": trained}}
    for name, start, end in (("valid", ends[:, 0], ends[:, 1]), ("test", ends[:, 1], lengths)):
        held_out, asked = start < end, (start < end) & (start > 0)
        inside = (place >= start[user]) & (place < end[user])
        targets = inside & asked[user]
        parts[name] = {
            "events": int(inside.sum()),
            "users": int(asked.sum()),
            "targets": int(targets.sum()),
            "targets_without_training": int((~known[item[targets]]).sum()),
            "users_without_input": int((held_out & ~asked).sum()),
        }
    return parts


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
