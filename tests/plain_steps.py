# SPDX-License-Identifier: Apache-2.0
"""Steps of a view, one event at a time in plain Python: what the vectorised ones are held to."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from builders import Known, dataset_of, lists_of, same

from fastrec.data.batch import JaggedBatch, from_sequences
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.cut import Cut
from fastrec.data.steps.drop import Drop
from fastrec.data.steps.fill import Fill
from fastrec.data.steps.insert import Insert
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.permute import Permute
from fastrec.data.steps.prefix import Prefix
from fastrec.data.steps.reorder import Reorder
from fastrec.data.steps.share import Schedule
from fastrec.data.steps.substitute import Substitute
from fastrec.data.steps.window import Window
from fastrec.random import Rng, draws, threshold

V = 1_000
MASK, CLS, SEP = V, V + 1, V + 2
LONGEST = 12
RNG = Rng(3, 5)
SIDE = Known(dataset_of([[0, 1, 2]], V))
# A fifth of the items is like no other.
SIDE.similar_items = torch.arange(V).roll(7).masked_fill(torch.arange(V) % 5 == 0, -1)


def candidates(visible: list[int], place: int, among: int) -> list[tuple[int, float]]:
    """(item, score): what stands for a masked-item model, asked for one place of a sequence."""
    first = sum((i + 1) * item for i, item in enumerate(visible)) + 31 * place
    return [((first + 7 * rank) % V, -0.4 * rank) for rank in range(among)]


def fill_in(batch: JaggedBatch, among: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = []
    for items, targets in zip(
        lists_of(batch), lists_of(batch, batch.events["target"]), strict=True
    ):
        for place, target in enumerate(targets):
            if target != -100:
                assert items[place] == MASK
                rows.append(candidates(items, place, among))
    found = torch.tensor(rows, dtype=torch.float64).view(-1, among, 2)
    return found[:, :, 0].long(), found[:, :, 1]


SIDE.filler = fill_in


def random_batch(count: int, seed: int = 0, view: int = 0, special: bool = False) -> JaggedBatch:
    """Random sequences of 0 to LONGEST items, with columns; `special`: tokens around and within."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, LONGEST + 1, count)
    sequences = [generator.integers(0, V, length).tolist() for length in lengths]
    if special:
        sequences = [[CLS, *items, SEP] for items in sequences]
        for items in sequences[::3]:
            items[len(items) // 2] = MASK
    ids = generator.choice(1 << 32, count, replace=False)
    return with_columns(from_sequences(sequences, ids.tolist()).as_view(view))


def with_columns(batch: JaggedBatch) -> JaggedBatch:
    """`place` is the number of an event; `pair` has two values an event."""
    place = torch.arange(len(batch.values))
    events = {"place": place, "pair": torch.stack([place * 2, place * 3], dim=1)}
    return replace(batch, events=events, users={"label": torch.arange(len(batch)) * 7})


# One sequence at a time. An oracle maps (items, key, rng) to (places of the events that stay, None
# for one that is new, items now, targets or None).


@cache
def drawn(rng: Rng, key: int, site: str, row: int) -> list[int]:
    columns = torch.arange(64)
    return draws(rng, torch.full((64,), key), row, columns, site=site).tolist()


def one(rng, key, site, col=0, row=0) -> int:
    return drawn(rng, key, site, row)[col]


def long_draw(rng, key, site, col) -> int:
    """32 bits."""
    return one(rng, key, site, col) << 16 | one(rng, key, site, col, 1)


def share_of(share: float, number: int, rounding: str = "down") -> int:
    exact = Fraction(str(share)) * number
    return math.floor(exact) if rounding == "down" else math.ceil(exact)


def share_now(share, rng: Rng):
    if not isinstance(share, Schedule):
        return share
    done = min(Fraction(1), Fraction(int(rng.step), share.steps))
    return float(Fraction(str(share.start)) * (1 - done) + Fraction(str(share.end)) * done)


def some_of(items, share, key, rng, site, rounding="down", leave=0) -> list[int]:
    real = [place for place, item in enumerate(items) if item < V]
    number = max(1, share_of(share, len(real), rounding))
    number = max(0, min(number, len(real) - leave))
    return sorted(real, key=lambda place: long_draw(rng, key, site, place))[:number]


def mask(step: Mask, items, key, rng):
    real, share = (
        [place for place, item in enumerate(items) if item < V],
        share_now(step.share, rng),
    )
    if step.count:
        ranked = sorted(real, key=lambda place: long_draw(rng, key, "mask_exact", place))
        chosen = ranked[: step.count]
    elif step.exact:
        chosen = some_of(items, share, key, rng, "mask_exact", step.round, step.leave)
    else:
        limit = threshold(share)
        chosen = [place for place in real if one(rng, key, "mask_item", place) < limit]
        if not chosen and real:
            chosen = [real[one(rng, key, "mask_forced") * len(real) // 65536]]
    now, targets = list(items), [-100] * len(items)
    for place in chosen:
        targets[place] = items[place]
        kind = one(rng, key, "mask_replace", place)
        if step.replace == 1 or kind < threshold(step.replace):
            now[place] = MASK
        elif kind < threshold(step.replace + step.random):
            now[place] = long_draw(rng, key, "mask_random_item", place) * V >> 32
    return list(range(len(items))), now, targets


def mask_last(step: MaskLast, items, key, rng):
    now, targets = list(items), [-100] * len(items)
    for place in [place for place, item in enumerate(items) if item < V][-step.number :]:
        now[place], targets[place] = MASK, items[place]
    return list(range(len(items))), now, targets


def next_item(step: NextItem, items, key, rng):
    targets = []
    for place in range(len(items) - 1):
        behind = [*items[place + 1 : place + 1 + step.ahead]]
        behind = [item if item < V else -100 for item in behind]
        behind += [-100] * (step.ahead - len(behind))
        if step.positions == "last" and place != len(items) - 2:
            behind = [-100] * step.ahead
        targets.append(behind if step.ahead > 1 else behind[0])
    return list(range(len(items) - 1)), items[:-1], targets


def cut(step: Cut, items, key, rng):
    taken = min(step.last, max(1, len(items) - 1), len(items))
    left, gone = items[: len(items) - taken], items[len(items) - taken :]
    none = [-100] * step.last
    targets = [none] * len(left)
    if not gone:
        return [], [], targets
    last = [item if item < V else -100 for item in gone]
    places = list(range(len(left) + 1))
    return places, [*left, MASK], [*targets, last + none[len(last) :]]


def permute(step: Permute, items, key, rng):
    places = sorted(range(len(items)), key=lambda place: long_draw(rng, key, "permute", place))
    now = [items[place] for place in places]
    return places[:-1], now[:-1], [item if item < V else -100 for item in now[1:]]


def fill(step: Fill, items, key, rng):
    chosen = some_of(items, share_now(step.share, rng), key, rng, "fill")
    visible = [MASK if place in chosen else item for place, item in enumerate(items)]
    now = list(items)
    for place in chosen:
        found = candidates(visible, place, step.among)
        whole = sum(math.exp(score) for _, score in found)
        drawn = long_draw(rng, key, "fill_item", place) / 2**32
        ends = accumulate(math.exp(score) / whole for _, score in found)
        passed = [item for (item, _), end in zip(found, ends, strict=True) if drawn < end]
        now[place] = passed[0]
    return list(range(len(items))), now, None


def run_of(share, items, key, rng, site, rounding) -> range:
    share = share_now(share, rng)
    number = min(len(items), max(1, share_of(share, len(items), rounding)))
    start = one(rng, key, site) * (len(items) - number + 1) // 65536
    return range(start, start + number)


def crop(step: Crop, items, key, rng):
    if step.drop is not None:
        gone = (
            list(run_of(step.drop, items, key, rng, "crop", step.round)) if len(items) > 1 else []
        )
        places = [place for place in range(len(items)) if place not in gone]
        return places, [items[place] for place in places], None
    run = run_of(step.keep, items, key, rng, "crop", step.round)
    run = range(len(items)) if len(items) < step.least else run
    return list(run), [items[place] for place in run], None


def window(step: Window, items, key, rng):
    if step.count is None:
        kept = min(len(items), max(1, share_of(share_now(step.share, rng), len(items))))
    else:
        kept = min(len(items), step.count)
    starts, user = len(items) - kept + 1, key & 0xFFFFFFFF
    stride = 1 + one(rng, user, "window", row=1) * (starts - 1) // 65536
    start = (one(rng, user, "window") * starts // 65536 + (key >> 32) * stride) % starts
    run = range(start, start + kept)
    return list(run), [items[place] for place in run], None


def prefix(step: Prefix, items, key, rng):
    drawn = one(rng, key & 0xFFFFFFFF, "prefix")
    kept = min(len(items), 1 + drawn * len(items) // 65536)
    return list(range(kept)), items[:kept], None


def reorder(step: Reorder, items, key, rng):
    run = run_of(step.share, items, key, rng, "reorder", step.round)
    run = range(0) if len(items) < step.least else run
    shuffled = sorted(run, key=lambda place: long_draw(rng, key, "reorder_key", place))
    places = list(range(len(items)))
    places[run.start : run.stop] = shuffled
    return places, [items[place] for place in places], None


def drop(step: Drop, items, key, rng):
    bound = round(step.share * 65536)
    places = [p for p in range(len(items)) if one(rng, key, "drop", p) >= bound or items[p] >= V]
    if items and not places:
        places = [one(rng, key, "drop_kept") * len(items) // 65536]
    return places, [items[place] for place in places], None


def substitute(step: Substitute, items, key, rng):
    now = list(items)
    for place in some_of(items, step.share, key, rng, "substitute"):
        if SIDE.similar_items[items[place]] >= 0:
            now[place] = int(SIDE.similar_items[items[place]])
    return list(range(len(items))), now, None


def insert(step: Insert, items, key, rng):
    chosen = some_of(items, step.share, key, rng, "insert")
    places, now = [], []
    for place, item in enumerate(items):
        if place in chosen and SIDE.similar_items[item] >= 0:
            places.append(None)
            now.append(int(SIDE.similar_items[item]))
        places.append(place)
        now.append(item)
    return places, now, None


def one_of(step: OneOf, items, key, rng):
    numbers = range(len(step.steps))
    fit = [i for i in numbers if len(items) >= getattr(step.steps[i], "least", 0)] or numbers
    whose = key if step.independent else key & 0xFFFFFFFF
    fit = sorted(fit, key=lambda i: long_draw(rng, whose, "one_of", i))
    chosen = step.steps[fit[0 if step.independent else (key >> 32) % len(fit)]]
    places, now, targets = ORACLES[type(chosen)](chosen, items, key, rng)
    if not predicts(chosen) and predicts(step):
        targets = [-100] * len(now)
    return places, now, targets


def predicts(step) -> bool:
    if isinstance(step, OneOf):
        return any(map(predicts, step.steps))
    return isinstance(step, Mask | MaskLast | NextItem | Cut | Permute)


ORACLES = {
    Mask: mask,
    MaskLast: mask_last,
    NextItem: next_item,
    Cut: cut,
    Permute: permute,
    Crop: crop,
    Prefix: prefix,
    Reorder: reorder,
    Fill: fill,
    Drop: drop,
    Window: window,
    Substitute: substitute,
    Insert: insert,
    OneOf: one_of,
}


def expected_of(step, batch: JaggedBatch, rng: Rng = RNG) -> tuple[list, list, list]:
    """(places in the whole batch, items, targets) of every sequence after the step."""
    places, items, targets = [], [], []
    for start, sequence, key in zip(
        batch.offsets.tolist(), lists_of(batch), batch.keys.tolist(), strict=False
    ):
        kept, now, target = ORACLES[type(step)](step, sequence, key, rng)
        places.append([None if place is None else start + place for place in kept])
        items.append(now)
        targets.append(target)
    return places, items, targets


def assert_same_events(one: JaggedBatch, other: JaggedBatch) -> None:
    """`max_seq_len` is a bound and may differ."""
    assert same(one, replace(other, max_seq_len=one.max_seq_len))


def copies(items, count: int) -> JaggedBatch:
    return with_columns(from_sequences([items] * count))
