# SPDX-License-Identifier: Apache-2.0
"""Events of a `Store` sorted by user and time, and what can be said of them only then: that one
stands there twice, or that the time of a user goes back.

They are spread over buckets of whole users, `store.BUCKET` events each, which are sorted in memory
one by one. A user with more events is a bucket of that size.

Legend: E events, U users, P parts (files of training, validation and test).
"""

from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np

from fastrec.data.prepare import store as storage
from fastrec.data.prepare.ahead import mapped
from fastrec.data.prepare.store import Store


@dataclass
class Found:
    """Events of one kind in the parts: how many, and of the first its row and another's.

    rows: by part (row, row of the event before, (user, item, time)).
    """

    counts: dict[int, int] = field(default_factory=dict)
    rows: dict[int, tuple[int, int, tuple]] = field(default_factory=dict)

    def add(self, columns, later: np.ndarray, earlier: np.ndarray) -> None:
        """later, earlier: int64, places in `columns`."""
        part = columns["part"][later]
        for number in np.unique(part).tolist():
            where = np.flatnonzero(part == number)
            self.counts[number] = self.counts.get(number, 0) + len(where)
            where = where[columns["row"][later[where]].argmin()]
            at, before = int(later[where]), int(earlier[where])
            event = tuple(int(columns[name][at]) for name in ("user", "item", "timestamp"))
            row = int(columns["row"][at])
            if number not in self.rows or row < self.rows[number][0]:
                self.rows[number] = row, int(columns["row"][before]), event


@dataclass
class Checks:
    """What `sorted_by_user` looks for. order: whether the time of a user must not go back, inside a
    part. repeated: whether it looks for events that stand there before, and drops them if `drop`.

    Found are `falls`, `within` the same part, and in an earlier part (`across`).
    """

    order: bool = False
    repeated: bool = False
    drop: bool = False
    falls: Found = field(default_factory=Found)
    within: Found = field(default_factory=Found)
    across: Found = field(default_factory=Found)


def sorted_by_user(
    events: Store, folder: Path, user: np.ndarray, item: np.ndarray, ordered: bool, checks: Checks
) -> Store:
    """The events, stably sorted by (user, part, timestamp), or by user alone if `ordered`, in a new
    folder; `events` is removed.

    events: user, item, part, row and what else there is, in the order of the source. user, item:
    int32, the number there of each number here.
    """
    buckets, starts = _buckets(events, user)
    made = Store(folder, events.dtypes)
    made.height = events.height
    _spread(events, made, user, item, buckets, starts.copy())
    events.remove()
    lock = Lock()

    def work(bounds: tuple[int, int]) -> dict[str, np.ndarray]:
        columns = made.read(*bounds)
        keys = [] if ordered else [columns["timestamp"], columns["part"]]
        order = stable_order([*keys, columns["user"]])
        order = _checked(columns, order, ordered, checks, lock)
        return {name: values[order] for name, values in columns.items()}

    stops = [*starts.tolist(), made.height][1:]
    end = 0
    for columns in mapped(work, zip(starts.tolist(), stops, strict=True)):
        made.write(end, columns)  # behind what others read
        end += len(columns["user"])
    made.height = end
    return made


def _buckets(events: Store, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint16 [U] the bucket of each user, the place of the first event of each bucket)."""
    counts = np.zeros(len(user), dtype=np.int64)
    for chunk in events.chunks("user"):
        counts += np.bincount(user[chunk["user"]], minlength=len(counts))
    first = np.cumsum(counts) - counts
    _, where, buckets = np.unique(first // storage.BUCKET, return_index=True, return_inverse=True)
    return buckets.astype(np.uint16 if len(where) <= 1 << 16 else np.int64), first[where]


def _spread(events: Store, made: Store, user, item, buckets, places) -> None:
    for columns in events.chunks():
        columns |= {"user": user[columns["user"]], "item": item[columns["item"]]}
        bucket = buckets[columns["user"]]
        order = np.argsort(bucket, kind="stable")
        counts = np.bincount(bucket, minlength=len(places))
        columns = {name: values[order] for name, values in columns.items()}
        ends = np.cumsum(counts)
        for number in np.flatnonzero(counts).tolist():
            some = slice(int(ends[number] - counts[number]), int(ends[number]))
            part = {name: values[some] for name, values in columns.items()}
            made.write(int(places[number]), part)
        places += counts


def stable_order(keys: list[np.ndarray]) -> np.ndarray:
    """int64 [E]: the places of the events in the order of their keys, integers [E], the last of
    which comes first; equal ones as they are.

    Keys are sorted with the places in their last bits, as plain integers: several times as fast as
    an indirect sort. What does not fit 63 bits takes another pass.
    """
    count = len(keys[0])
    places, width = np.arange(count), max(count - 1, 0).bit_length()
    order, digit, used = places, np.zeros(count, dtype=np.int64), 0
    for key in keys if count else []:
        low, high = int(key.min()), int(key.max())
        bits = (high - low).bit_length()
        if 0 < bits <= 63 - width - used:
            digit |= (key - low).astype(np.int64) << used
            used += bits
            continue
        rest = (key - low).astype(np.uint64)  # right where the difference is beyond 63 bits
        while bits:
            some = min(bits, 63 - width - used)
            digit |= (rest & np.uint64((1 << some) - 1)).astype(np.int64) << used
            rest, bits, used = rest >> np.uint64(some), bits - some, used + some
            if bits:
                order, digit, used = _passed(order, digit, places, width), 0 * digit, 0
    return _passed(order, digit, places, width) if used else order


def _passed(order, digit, places, width: int) -> np.ndarray:
    """`order` sorted by `digit` of its events."""
    packed = (digit if order is places else digit[order]) << width
    packed |= places
    packed.sort()
    packed &= (1 << width) - 1
    return packed if order is places else order[packed]


def _checked(columns, order: np.ndarray, ordered: bool, checks: Checks, lock) -> np.ndarray:
    """`order` without the events that `checks` drops."""
    if checks.order:
        user, part, time = (columns[name][order] for name in ("user", "part", "timestamp"))
        back = (time[1:] < time[:-1]) & (user[1:] == user[:-1]) & (part[1:] == part[:-1])
        where = np.flatnonzero(back) + 1
        with lock:
            checks.falls.add(columns, order[where], order[where - 1])
    if not checks.repeated:
        return order
    own = order
    if ordered or np.ptp(columns["part"]):
        own = stable_order([columns["timestamp"], columns["user"]])
    later, before, first = repeated(columns["user"], columns["item"], columns["timestamp"], own)
    within = columns["part"][later] == columns["part"][before]
    with lock:
        checks.within.add(columns, later[within], first[within])
        checks.across.add(columns, later[~within], first[~within])
    if not checks.drop or len(later) == 0:
        return order
    keep = np.ones(len(order), dtype=bool)
    keep[later] = False
    return order[keep[order]]


def repeated(
    user: np.ndarray, item: np.ndarray, time: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places of the events that were there before, of the ones before them, of the first ones):
    those with equal user, item and time.

    user, item, time: integers [E]. order: int64 [E], by user and time, equal ones as they come.
    """
    ties = (user[order[1:]] == user[order[:-1]]) & (time[order[1:]] == time[order[:-1]])
    tied = np.append(ties, False) | np.append(False, ties)
    run = np.cumsum(np.append(False, ~ties))[tied]
    places = order[tied]
    # Few events share user and time with another: only these are sorted by their item.
    by_item = np.lexsort((item[places], run))
    run, places = run[by_item], places[by_item]
    same = np.append(False, (run[1:] == run[:-1]) & (item[places[1:]] == item[places[:-1]]))
    where = np.flatnonzero(same)
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(places))))
    return places[where], places[where - 1], places[first[where]]
