# SPDX-License-Identifier: Apache-2.0
"""Steps of a view: each against one event at a time in plain Python, alone and in any batch."""

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import cache, partial
from itertools import accumulate, pairwise, permutations, product

import numpy as np
import pytest
import torch
from builders import GRAPH, Known, dataset_of, lists_of, same, six_users, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.data.batch import JaggedBatch, from_sequences
from fastrec.data.graph import FriendSampler
from fastrec.data.side import Shard
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.cut import Cut
from fastrec.data.steps.drop import Drop
from fastrec.data.steps.fill import Fill
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.insert import Insert
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.parts import Step
from fastrec.data.steps.permute import Permute
from fastrec.data.steps.prefix import Prefix
from fastrec.data.steps.reorder import Reorder
from fastrec.data.steps.share import Schedule, number_of
from fastrec.data.steps.substitute import Substitute
from fastrec.data.steps.window import Window
from fastrec.data.views import Again
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
    fit = [each for each in step.steps if len(items) >= getattr(each, "least", 0)] or step.steps
    if step.independent:
        chosen = fit[one(rng, key, "one_of") * len(fit) // 65536]
    else:
        first = one(rng, key & 0xFFFFFFFF, "one_of") * len(fit) // 65536
        chosen = fit[(first + (key >> 32)) % len(fit)]
    places, now, targets = ORACLES[type(chosen)](chosen, items, key, rng)
    return places, now, targets if predicts(step) else None


def predicts(step) -> bool:
    if isinstance(step, OneOf):
        return all(map(predicts, step.steps))
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
STEPS = {
    "mask": Mask(),
    "mask nothing but one": Mask(0.0),
    "mask all": Mask(1.0),
    "mask 80/10/10": Mask(0.5, replace=0.8, random=0.1),
    "mask exact": Mask(0.3, exact=True),
    "mask exact up": Mask(0.3, exact=True, round="up"),
    "mask exact, some left": Mask(0.6, exact=True, round="up", leave=2),
    "mask exact 80/10/10": Mask(0.6, exact=True, replace=0.8, random=0.1),
    "mask count": Mask(count=2),
    "mask_last": MaskLast(),
    "mask_last 3": MaskLast(3),
    "next_item": NextItem(),
    "next_item last": NextItem("last"),
    "next_item 3 ahead": NextItem(ahead=3),
    "next_item last 3 ahead": NextItem("last", ahead=3),
    "cut": Cut(),
    "cut 1": Cut(1),
    "permute": Permute(),
    "crop": Crop(),
    "crop little": Crop(0.05),
    "crop up": Crop(0.4, round="up"),
    "crop nothing": Crop(1.0),
    "crop drop": Crop(drop=0.3),
    "crop drop nearly all": Crop(drop=0.999),
    "prefix": Prefix(),
    "reorder": Reorder(),
    "reorder all": Reorder(1.0),
    "reorder up": Reorder(0.6, round="up"),
    "drop": Drop(),
    "drop most": Drop(0.95),
    "one_of": OneOf([Crop(0.6), Mask(0.3), Reorder(0.6)]),
    "reorder more and more": Reorder(Schedule(0.3, 1.0, 50)),
    "crop more and more": Crop(Schedule(0.9, 0.1, 10)),
    "mask more and more": Mask(Schedule(0.0, 1.0, 20)),
    "mask exact more and more": Mask(Schedule(0.2, 0.7, 5), exact=True),
    "fill": Fill(),
    "fill many by few": Fill(0.7, among=3),
    "fill by the first": Fill(0.4, among=1),
    "fill more and more": Fill(Schedule(0.1, 0.9, 10)),
    "window": Window(share=0.5),
    "window by count": Window(count=4),
    "window more and more": Window(share=Schedule(0.2, 0.9, 10)),
    "any_of": OneOf([Crop(0.6), Mask(0.3), Reorder(0.6)], independent=True),
    "crop long ones": Crop(0.2, least=5),
    "reorder long ones": Reorder(0.8, least=5),
    "one_of by length": OneOf(
        [Crop(0.2, least=5), Mask(0.7), Reorder(0.5, least=9), Insert(), Substitute()]
    ),
    "one_of for long ones": OneOf([Crop(0.2, least=5), Reorder(0.5, least=7)]),
    "one_of with targets": OneOf([Mask(0.3), MaskLast()]),
    "substitute": Substitute(),
    "substitute many": Substitute(0.7),
    "insert": Insert(),
    "insert everywhere": Insert(1.0),
}
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
NOT_RANDOM = ("mask all", "mask_last", "mask_last 3", "crop nothing", "cut", "cut 1")
NOT_RANDOM += ("insert everywhere",)
random_steps = pytest.mark.parametrize(
    "step", [STEPS[n] for n in STEPS if n not in NOT_RANDOM and not n.startswith("next")]
)


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


def check(step, batch: JaggedBatch, rng: Rng = RNG) -> None:
    made = step(batch, rng, SIDE)
    places, items, targets = expected_of(step, batch, rng)
    assert lists_of(made) == items
    places = [[place or 0 for place in row] for row in places]  # a new event has 0 in a column
    assert lists_of(made, made.events["place"]) == places
    pair = [[[2 * place, 3 * place] for place in row] for row in places]
    assert lists_of(made, made.events["pair"]) == pair, "columns of any shape follow"
    if predicts(step):
        assert lists_of(made, made.events["target"]) == targets
        assert made.events["target"].dtype == torch.int64
    else:
        assert "target" not in made.events
    assert torch.equal(made.keys, batch.keys)
    assert torch.equal(made.users["label"], batch.users["label"])
    assert made.offsets.dtype == made.values.dtype == torch.int64
    longest = max((len(row) for row in items), default=0)
    assert longest <= made.max_seq_len <= max(batch.max_seq_len, longest)


@every_step
@pytest.mark.parametrize("view", [0, 3])
def test_against_one_event_at_a_time(step, view):
    check(step, random_batch(60, view=view))
    short = from_sequences([[], [5], [], [], [6, 7], []], range(6))
    check(step, with_columns(short.as_view(view)))
    check(step, with_columns(from_sequences([[]])))
    check(step, with_columns(from_sequences([])))


@every_step
def test_the_seed_and_the_step_are_numbers_or_tensors(step):
    batch = random_batch(30)
    words = Rng(torch.tensor(RNG.seed), torch.tensor(RNG.step))
    assert same(step(batch, words, SIDE), step(batch, RNG, SIDE))


@pytest.mark.parametrize("name", [n for n in STEPS if n.startswith(("mask", "next"))])
def test_special_tokens_are_never_masked_nor_predicted(name):
    batch = random_batch(60, special=True)
    check(STEPS[name], batch)
    made = STEPS[name](batch, RNG, SIDE)
    target = made.events["target"]
    assert ((target == -100) | ((target >= 0) & (target < V))).all()
    if not name.startswith("next"):
        before = batch.values >= V
        assert torch.equal(made.values[before], batch.values[before])
        assert (target[before] == -100).all()
    nothing = with_columns(from_sequences([[CLS, SEP], [], [MASK]]))
    check(STEPS[name], nothing)
    assert (STEPS[name](nothing, RNG, SIDE).events["target"] == -100).all()


@pytest.mark.parametrize("name", [n for n in STEPS if n.startswith("fill")])
def test_special_tokens_are_not_filled(name):
    batch = random_batch(60, special=True)
    check(STEPS[name], batch)
    made = STEPS[name](batch, RNG, SIDE)
    assert torch.equal(made.values >= V, batch.values >= V)
    nothing = with_columns(from_sequences([[CLS, SEP], [], [MASK]]))
    assert same(STEPS[name](nothing, RNG, SIDE), nothing)


def test_a_filled_item_has_no_rating_and_targets_stay():
    batch = MaskLast()(random_batch(60), RNG, SIDE)
    columns = {"rating": torch.arange(len(batch.values)).float(), **batch.events}
    made = Fill(0.5)(replace(batch, events=columns), RNG, SIDE)
    assert torch.equal(made.events["target"], batch.events["target"])
    kept = some_left = 0
    for start, items, key in zip(
        batch.offsets.tolist(), lists_of(batch), batch.keys.tolist(), strict=False
    ):
        chosen = some_of(items, 0.5, key, RNG, "fill")
        for place in range(len(items)):
            rating = made.events["rating"][start + place]
            assert rating.isnan() if place in chosen else rating == start + place
        kept, some_left = kept + len(chosen), some_left + len(items) - len(chosen)
    assert kept > 50 and some_left > 50


def test_what_is_filled_follows_the_softmax_of_the_scores():
    side = Known(dataset_of([[0, 1, 2]], V))
    items, scores = torch.tensor([5, 900, 17, 3]), torch.tensor([1.0, 0.5, -0.5, -3.0])
    side.filler = lambda batch, among: (
        items[:among].expand(int((batch.events["target"] != -100).sum()), among),
        scores[:among].expand(int((batch.events["target"] != -100).sum()), among),
    )
    count = 8_000
    made = Fill(1.0, among=4)(copies([1], count), RNG, side).values
    seen = [int((made == item).sum()) for item in items.tolist()]
    assert sum(seen) == count
    assert chi_square(seen, count * scores.double().softmax(0).numpy()) < 16.3  # 3 of freedom


def test_a_share_that_moves_is_that_of_its_step():
    share, batch = Schedule(0.9, 0.3, 6), copies(list(range(10)), 20)
    kept = [Crop(share)(batch, Rng(3, step), SIDE).max_seq_len for step in range(9)]
    assert kept == [9, 8, 7, 6, 5, 4, 3, 3, 3]
    grown = [
        int((Mask(Schedule(0.2, 0.8, 3), exact=True)(batch, Rng(3, s), SIDE).values == MASK).sum())
        for s in range(5)
    ]
    assert grown == [40, 80, 120, 160, 160]


@every_step
def test_the_input_is_left_as_it_is(step):
    batch = random_batch(40)
    before = {name: value.clone() for name, value in tensors_of(batch).items()}
    columns = list(batch.events), list(batch.users)
    step(batch, RNG, SIDE)
    after = tensors_of(batch)
    assert before.keys() == after.keys() and (list(batch.events), list(batch.users)) == columns
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@every_step
@settings(deadline=None, max_examples=15)
@given(order=st.permutations(list(range(12))), size=st.integers(1, 12))
def test_a_sequence_is_made_the_same_in_any_batch_and_alone(step, order, size):
    batch = random_batch(12, seed=1, view=2)
    rows = torch.tensor(order[:size])
    assert_same_events(step(batch.select(rows), RNG, SIDE), step(batch, RNG, SIDE).select(rows))


def assert_same_events(one: JaggedBatch, other: JaggedBatch) -> None:
    """`max_seq_len` is a bound and may differ."""
    assert same(one, replace(other, max_seq_len=one.max_seq_len))


@random_steps
def test_views_seeds_and_steps_differ(step):
    batch = random_batch(200)
    made = step(batch, RNG, SIDE)
    view = step(batch.as_view(1), RNG, SIDE)
    assert (lists_of(view) == lists_of(made)) == isinstance(step, Prefix), "view"
    others = {
        "seed": step(batch, Rng(4, 5), SIDE),
        "high word of the seed": step(batch, Rng(3 + (1 << 32), 5), SIDE),
        "step": step(batch, Rng(3, 6), SIDE),
    }
    for what, other in others.items():
        assert lists_of(other) != lists_of(made), what


# What is drawn is drawn with the right chances: 0.1 % critical values of chi-square.


def chi_square(counts, expected) -> float:
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    return ((counts - expected) ** 2 / expected).sum()


def copies(items, count: int) -> JaggedBatch:
    return with_columns(from_sequences([items] * count))


def chosen_of(batch: JaggedBatch, step, rng: Rng = RNG) -> torch.Tensor:
    """bool [T]: which events are predicted."""
    return step(batch, rng, SIDE).events["target"] != -100


@pytest.mark.parametrize("step", [Substitute(0.4), Insert(0.4)])
def test_special_tokens_are_like_no_item(step):
    batch = random_batch(60, special=True)
    check(step, batch)
    made, tokens = step(batch, RNG, SIDE), [[v for v in row if v >= V] for row in lists_of(batch)]
    assert [[v for v in row if v >= V] for row in lists_of(made)] == tokens
    nothing = with_columns(from_sequences([[CLS, SEP], [], [MASK]]))
    assert same(step(nothing, RNG, SIDE), nothing)


def test_items_that_are_like_no_other_stay():
    batch = with_columns(from_sequences([[0, 5, 10, 995], [15]]))
    assert same(Substitute(1.0)(batch, RNG, SIDE), batch)
    assert same(Insert(1.0)(batch, RNG, SIDE), batch)


def test_columns_of_similar_items():
    """A rating says something of its item, a time of its event."""
    batch = from_sequences([[1, 5, 2]])
    columns = {
        "target": torch.tensor([5, 2, 8]),
        "rating": torch.tensor([1.0, 2.0, 3.0]),
        "time_gap": torch.tensor([10.0, 20.0, 30.0]),
    }
    batch = replace(batch, events=columns)
    now = Substitute(1.0)(batch, RNG, SIDE)
    assert lists_of(now) == [[994, 5, 995]]
    assert now.events["rating"].nan_to_num(-1).tolist() == [-1, 2, -1]
    assert torch.equal(now.events["time_gap"], columns["time_gap"])
    assert torch.equal(now.events["target"], columns["target"])
    now = Insert(1.0)(batch, RNG, SIDE)
    assert lists_of(now) == [[994, 1, 5, 995, 2]]
    assert now.events["target"].tolist() == [-100, 5, 2, -100, 8]
    assert now.events["rating"].nan_to_num(-1).tolist() == [-1, 1, 2, -1, 3]
    assert now.events["time_gap"].nan_to_num(-1).tolist() == [-1, 10, 20, -1, 30]


@pytest.mark.parametrize("room", [1, 4, 6, 20])
def test_of_an_inserted_sequence_the_latest_items_stay(room):
    batch = random_batch(60).last(room)
    whole = Insert(0.5)(batch, RNG, SIDE)
    side = Known(SIDE.dataset)
    side.similar_items = SIDE.similar_items
    side.shard = Shard(np.empty(0, np.int64), max_len=room)
    made = Insert(0.5)(batch, RNG, side)
    assert lists_of(made) == [row[-room:] for row in lists_of(whole)]
    assert made.max_seq_len <= room and max(map(len, lists_of(whole))) > min(room, 12)


def test_the_exact_mask_of_a_small_batch():
    """Pins the contract: these rows must not move with a new version of anything."""
    batch = from_sequences([range(8), range(8), range(5)])
    got = {v: chosen_of(batch.as_view(v), Mask()).nonzero().flatten().tolist() for v in (0, 1)}
    assert got == {0: [2, 7, 8, 11, 17], 1: [2, 12, 18, 19, 20]}


def test_the_mask_of_a_padded_batch():
    """Draws of the whole [B, L] grid, as a padded implementation makes them, give the same mask."""
    batch = random_batch(40, seed=2)
    columns = torch.arange(16)[None, :]
    grid = draws(RNG, batch.keys[:, None].expand(40, 16), 0, columns, site="mask_item")
    hit = (grid < threshold(0.2)) & (columns < batch.lengths[:, None])
    rows = chosen_of(batch, Mask()).nonzero().squeeze(1)
    found = torch.zeros_like(hit)
    found[batch.segment_ids()[rows], batch.positions()[rows]] = True
    some = hit.any(1)
    assert torch.equal(found[some], hit[some]) and (found[~some].sum(1) <= 1).all()


def test_mask_rate():
    count, length, p = 4_000, 10, 0.2
    hit = chosen_of(copies(list(range(length)), count), Mask(p)).view(count, length)
    # The number of masks of a sequence: binomial(10, 0.2) with 0 moved to 1; 5 and more together.
    chance = np.array([0.1073742 + 0.2684355, 0.3019899, 0.2013266, 0.0880804, 0.0327935])
    seen = np.bincount(hit.sum(1).clamp(max=5).numpy(), minlength=6)
    assert seen[0] == 0
    assert chi_square(seen[1:], count * chance / chance.sum()) < 18.5  # 4 degrees of freedom
    # Every position alike; those of one sequence are all but independent.
    rate = p + (1 - p) ** length / length
    variance = count * rate * (1 - rate)
    assert ((hit.sum(0).numpy() - count * rate) ** 2 / variance).sum() < 29.6  # 10 of freedom


def test_forced_masks_are_uniform_and_only_where_needed():
    count, length, p = 6_000, 5, 0.2
    batch = copies([CLS, 1, 2, 3, 4, 5, SEP], count)
    keys, columns = batch.keys[batch.segment_ids()], batch.positions()
    free = draws(RNG, keys, 0, columns, site="mask_item") < threshold(p)
    free = (free & (batch.values < V)).view(count, 7)
    found = chosen_of(batch, Mask(p)).view(count, 7)
    served = free.any(1)
    assert torch.equal(found[served], free[served])
    added = found[~served]
    assert (added.sum(1) == 1).all(), "one each"
    rate = (1 - p) ** length
    assert abs(len(added) / count - rate) < 4 * (rate * (1 - rate) / count) ** 0.5
    places = added.sum(0).numpy()
    assert places[0] == places[6] == 0
    assert chi_square(places[1:6], np.full(5, len(added) / 5)) < 18.5  # 4 degrees of freedom


def test_exact_masks_are_uniform_subsets():
    count = 5_000
    hit = chosen_of(copies([1, 2, 3, 4, 5], count), Mask(0.4, exact=True)).view(count, 5)
    assert (hit.sum(1) == 2).all()
    code = (hit * torch.tensor([1, 2, 4, 8, 16])).sum(1).numpy()
    seen = [n for n in np.bincount(code, minlength=32) if n]
    assert len(seen) == 10 and chi_square(seen, np.full(10, count / 10)) < 27.9  # 9 of freedom


def test_80_10_10():
    batch = copies(list(range(20)), 3_000)
    step = Mask(0.5, replace=0.8, random=0.1)
    made, plain = step(batch, RNG, SIDE), Mask(0.5)(batch, RNG, SIDE)
    assert torch.equal(made.events["target"], plain.events["target"]), "the same are predicted"
    chosen = made.events["target"] != -100
    assert torch.equal(made.events["target"][chosen], batch.values[chosen])
    assert torch.equal(made.values[~chosen], batch.values[~chosen])
    assert plain.values[chosen].eq(MASK).all()
    now, targets = made.values[chosen], batch.values[chosen]
    shares = [int((now == MASK).sum()), int((now == targets).sum())]
    shares.append(len(now) - sum(shares))
    kept = 0.1 + 0.1 / V  # a random item may be the original one
    assert chi_square(shares, len(now) * np.array([0.8, kept, 0.2 - kept])) < 13.8


@pytest.mark.parametrize(("num_items", "bins", "limit"), [(7, 7, 22.5), (10_000_000, 100, 148.2)])
def test_random_items_are_uniform_over_the_vocabulary(num_items, bins, limit):
    side = Known(dataset_of([[0, 1, 2]], num_items))
    step = Mask(1.0, replace=0.0, random=1.0)
    values = step(from_sequences([[1] * 50] * 1_000), Rng(1, 2), side).values.numpy()
    assert values.min() >= 0 and values.max() < num_items
    counts = np.bincount(values * bins // num_items, minlength=bins)
    assert chi_square(counts, np.full(bins, len(values) / bins)) < limit  # bins - 1 of freedom
    assert num_items < 100 or len(np.unique(values)) > 49_700, "32 bits, not 16"


def test_targets_of_steps_that_follow_each_other():
    batch = from_sequences([[1, 2, 3, 4, 5, 6]])
    twice = MaskLast(2)(MaskLast()(batch, RNG, SIDE), RNG, SIDE)
    assert lists_of(twice) == [[1, 2, 3, MASK, MASK, MASK]]
    assert twice.events["target"].tolist() == [-100, -100, -100, 4, 5, 6], "a [MASK] is no item"
    ahead = MaskLast()(NextItem()(batch, RNG, SIDE), RNG, SIDE)
    assert lists_of(ahead) == [[1, 2, 3, 4, MASK]]
    assert ahead.events["target"].tolist() == [2, 3, 4, 5, 5], "a masked event predicts itself"
    cropped = Crop(0.5)(MaskLast(6)(batch, RNG, SIDE), RNG, SIDE)
    assert (cropped.values == MASK).all() and len(cropped.values) == 3
    start = int(cropped.events["target"][0])
    assert cropped.events["target"].tolist() == [start, start + 1, start + 2], "targets move along"


def test_a_dropped_run_is_what_another_keeps():
    """CLUE drops the run that CL4SRec keeps; a single item is left, and a pair loses one."""
    batch = random_batch(40)
    kept, rest = (Crop(**{how: 0.4})(batch, RNG, SIDE) for how in ("keep", "drop"))
    for whole, run, others in zip(*map(lists_of, (batch, kept, rest)), strict=True):
        if len(whole) > 1:
            assert sorted(run + others) == sorted(whole)
        else:
            assert others == whole
    assert Crop() == Crop(0.6) and Crop(drop=0.4).keep is None


def test_crops_start_anywhere():
    count = 6_000
    made = Crop(0.6)(copies(list(range(10)), count), RNG, SIDE)
    assert (made.lengths == 6).all()
    runs = made.values.view(count, 6)
    assert torch.equal(runs, runs[:, :1] + torch.arange(6)), "consecutive"
    assert chi_square(np.bincount(runs[:, 0], minlength=5), np.full(5, count / 5)) < 18.5


def test_every_prefix_is_as_likely_and_the_views_of_a_step_have_the_same_one():
    count = 6_000
    batch = copies(list(range(5)), count)
    made = Prefix()(batch, RNG, SIDE)
    assert chi_square(np.bincount(made.lengths)[1:], np.full(5, count / 5)) < 18.5
    assert torch.equal(made.values, made.positions()), "the oldest events"
    assert torch.equal(Prefix()(batch.as_view(2), RNG, SIDE).lengths, made.lengths)


@pytest.mark.parametrize("step", [Window(share=0.6), Window(count=6)])
def test_windows_start_anywhere_and_neighbouring_views_have_others(step):
    count = 6_000
    batch = copies(list(range(10)), count)
    starts = []
    for view in range(3):
        made = step(batch.as_view(view), RNG, SIDE)
        assert (made.lengths == 6).all()
        starts.append(made.values.view(count, 6)[:, 0])
        assert chi_square(np.bincount(starts[-1], minlength=5), np.full(5, count / 5)) < 18.5
    for one_view, next_view in pairwise(starts):
        assert (one_view != next_view).all()
        steps = np.bincount((next_view - one_view) % 5, minlength=5)
        assert steps[0] == 0 and chi_square(steps[1:], np.full(4, count / 4)) < 16.3  # 3 of freedom
    short = step(copies([1, 2], 9), RNG, SIDE)
    assert short.lengths.tolist() == [1 if step.count is None else 2] * 9


def test_reorders_are_uniform_and_start_anywhere():
    count = 9_000
    made = Reorder(0.6)(copies(list(range(5)), count), RNG, SIDE).values.view(count, 5).numpy()
    # 3 of 5 items from place 0, 1 or 2 in one of 6 orders; a row may come from several of them.
    chance: dict[tuple, float] = {}
    for start, order in product(range(3), permutations(range(3))):
        row = list(range(5))
        row[start : start + 3] = [start + place for place in order]
        chance[tuple(row)] = chance.get(tuple(row), 0) + 1 / 18
    rows = [tuple(row) for row in made.tolist()]
    assert set(rows) == set(chance)
    counts = [rows.count(row) for row in chance]
    # 13 degrees of freedom
    assert len(chance) == 14 and chi_square(counts, count * np.array([*chance.values()])) < 34.5


def test_one_of_is_uniform_and_two_views_take_different_steps():
    count = 6_000
    batch = copies([1, 2, 3, 4], count)
    steps = [MaskLast(1), MaskLast(2), MaskLast(3)]
    taken = [
        OneOf(steps)(batch.as_view(view), RNG, SIDE).values.view(count, 4).eq(MASK).sum(1)
        for view in range(4)
    ]
    counts = np.bincount(taken[0].numpy(), minlength=4)
    assert counts[0] == 0 and chi_square(counts[1:], np.full(3, count / 3)) < 13.8
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (taken[a] != taken[b]).all()
    assert torch.equal(taken[0], taken[3])
    later = OneOf(steps)(batch, Rng(3, 6), SIDE).values.view(count, 4).eq(MASK).sum(1)
    assert abs((later == taken[0]).double().mean().item() - 1 / 3) < 0.03, "of every step"


def test_any_of_is_uniform_and_every_view_chooses_for_itself():
    count = 6_000
    batch, step = copies([1, 2, 3, 4], count), OneOf([MaskLast(1), MaskLast(2)], independent=True)
    taken = [
        step(batch.as_view(view), RNG, SIDE).values.view(count, 4).eq(MASK).sum(1)
        for view in range(2)
    ]
    pairs = np.bincount((2 * taken[0] + taken[1] - 3).numpy())
    assert chi_square(pairs, np.full(4, count / 4)) < 16.3  # 3 degrees of freedom


@pytest.mark.parametrize(("length", "fit"), [(2, 2), (5, 3), (6, 4)])
def test_one_of_is_uniform_over_the_steps_for_the_length(length, fit):
    """MaskLast has no `least`: it is for all sequences."""
    steps = [Crop(0.01, least=6), MaskLast(1), Crop(0.5, least=5), MaskLast(2)]
    count = 6_000
    batch = copies(list(range(length)), count)
    made = [OneOf([Step(crop=steps[0]), *steps[1:]])(batch.as_view(v), RNG, SIDE) for v in (0, 1)]
    seen = [[(len(row), row.count(MASK)) for row in lists_of(view)] for view in made]
    counts = Counter(seen[0])
    assert len(counts) == fit and chi_square([*counts.values()], np.full(fit, count / fit)) < 16.3
    assert all(a != b for a, b in zip(*seen, strict=True)), "views take different ones"


def test_one_of_keeps_who_belongs_to_whom():
    users, view = Friend()(*six_of(0)), OneOf([Crop(), Mask()])
    made = view(users, RNG, social())
    assert made.pairs is users.pairs and torch.equal(made.keys, users.keys)


def test_one_of_steps_that_add_sequences():
    step = OneOf([Friend(), Mask()])
    with pytest.raises(ValueError, match="one_of: a step that adds sequences"):
        step(*six_of(0))


@pytest.mark.parametrize("rounding", ["down", "up"])
def test_a_share_of_a_number_is_that_of_its_decimals(rounding):
    """0.28 of 25 is 7, and 0.29 of 100 is 29, whatever their product is in binary."""
    numbers = torch.arange(301)
    for percent in range(101):
        expected = [max(1, share_of(percent / 100, n, rounding)) for n in numbers.tolist()]
        assert number_of(percent / 100, numbers, rounding).tolist() == expected


# Friends


def social(profiles=None) -> Known:
    side = Known(six_users(), graph=GRAPH, profiles=profiles)
    side.user_columns["age"] = torch.arange(6) * 10.0
    return side


def six_of(view: int, users=(4, 0, 5, 1), rank=0, world_size=1, rng=RNG, profiles=None):
    """The arguments of the step for these users."""
    side = social(profiles)
    side.shard = Shard(np.array(users), rank, world_size, view)
    return side.gather(list(users[rank::world_size])).as_view(view), rng, side


@pytest.mark.parametrize("view", [0, 2])
@pytest.mark.parametrize("step_number", range(5))
def test_friend_adds_the_drawn_friends_with_their_columns(view, step_number):
    batch, rng, side = six_of(view, rng=Rng(3, step_number))
    made = Friend()(batch, rng, side)
    friends = {0: {1}, 1: {0, 2}, 2: {1}, 3: {4}, 4: {3}, 5: set()}
    sequences, pairs = made.sample_ids.tolist(), made.pairs
    assert sequences[:4] == [4, 0, 5, 1] and same(made.select(torch.arange(4)), batch)
    drawn = {}
    for query, place in zip(pairs.query_rows.tolist(), pairs.positive.tolist(), strict=True):
        drawn[sequences[query]] = sequences[pairs.candidate_rows[place]]
    assert sorted(drawn) == [0, 1, 4] and all(f in friends[u] for u, f in drawn.items())
    assert sequences[4:] == sorted(set(drawn.values()) - {4, 0, 5, 1})
    assert (made.keys >> 32 == view).all()
    inputs = [side.dataset.gather([user], "train").values.tolist() for user in sequences]
    assert lists_of(made) == inputs
    assert made.users["age"].tolist() == [10.0 * user for user in sequences]


def test_friends_are_drawn_from_all_of_them():
    seen = set()
    for step in range(20):
        made = Friend()(*six_of(0, users=(1,), rng=Rng(0, step)))
        seen.add(made.sample_ids.tolist()[1])
    assert seen == {0, 2}


def test_the_friends_of_a_view_are_masked_like_its_users():
    """The friend 3 of user 4 has the mask that he has as a user of that view."""
    batch, rng, side = six_of(2)
    both = Mask(0.5)(Friend()(batch, rng, side), rng, side)
    row = both.sample_ids.tolist().index(3)
    alone = Mask(0.5)(side.gather([3]).as_view(2), rng, side)
    assert lists_of(both)[row] == lists_of(alone)[0] and MASK not in lists_of(batch)[0]
    assert 20 in lists_of(alone)[0]


@pytest.mark.parametrize("hops", [0, 1, 2])
@pytest.mark.parametrize("same_profile", [True, False])
def test_friend_leaves_out_who_is_no_negative(hops, same_profile):
    profiles = np.array([0, 1, 0, 1, -1, 0])
    sampler = FriendSampler(GRAPH, hops, profiles if same_profile else None)
    for step in range(5):  # in one of them user 2 is drawn, two links away from user 0
        batch, rng, side = six_of(0, rng=Rng(3, step), profiles=profiles)
        pairs = Friend(hops, same_profile)(batch, rng, side).pairs
        _, expected = sampler.pairs_at(np.array([4, 0, 5, 1]), rng)
        assert all(torch.equal(a, b) for a, b in zip(pairs.exclude, expected.exclude, strict=True))
        assert pairs.negatives == expected.negatives
    if same_profile:
        assert pairs.query_profile.tolist() == [-1, 0, 1]
    else:
        assert pairs.query_profile is None


@pytest.mark.parametrize("users", [(4, 0, 5, 1), (3,), (2, 5)])
def test_the_ranks_hold_the_sequences_of_one_process(users):
    """Also a rank that has friends and no user."""
    whole = Friend()(*six_of(2, users))
    parts = [Friend()(*six_of(2, users, rank, 3)) for rank in range(3)]
    merged = JaggedBatch.cat(parts)
    order = merged.sample_ids.argsort()
    assert_same_events(
        merged.select(order), replace(whole, pairs=None).select(whole.sample_ids.argsort())
    )
    positives = sum(len(part.pairs.positive) for part in parts)
    assert positives == len(whole.pairs.positive)


# Settings


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Mask(1.5), r"mask.share must be in \[0, 1\], got 1.5"),
        (lambda: Mask(replace=0.9, random=0.2), r"mask.replace \+ mask.random .* got 0.9 \+ 0.2"),
        (lambda: Mask(replace=-0.1), r"mask.replace must be in \[0, 1\], got -0.1"),
        (lambda: MaskLast(0), "mask_last.number must be at least 1, got 0"),
        (lambda: NextItem("first"), r"positions must be one of \['all', 'last'\], got 'first'"),
        (lambda: NextItem(ahead=0), "next_item.ahead must be at least 1, got 0"),
        (lambda: Crop(0.0), r"crop.keep must be in \(0, 1\], got 0"),
        (lambda: Crop(drop=0.0), r"crop.drop must be in \(0, 1\], got 0"),
        (lambda: Crop(drop=1.1), r"crop.drop must be in \(0, 1\], got 1.1"),
        (lambda: Crop(0.6, 0.3), r"crop has keep, 0.6, and drop, 0.3: it takes one"),
        (lambda: Crop(1.1), r"crop.keep must be in \(0, 1\], got 1.1"),
        (lambda: Crop(round="near"), r"round must be one of \['down', 'up'\], got 'near'"),
        (lambda: Crop(Schedule(0.0, 0.5, 9)), r"crop.keep must be in \(0, 1\], got 0"),
        (lambda: Reorder(Schedule(0.5, 1.5, 9)), r"reorder.share must be in \(0, 1\], got 1.5"),
        (lambda: Mask(Schedule(0.5, -1.0, 9)), r"mask.share must be in \[0, 1\], got -1"),
        (lambda: Fill(0.0), r"fill.share must be in \(0, 1\], got 0"),
        (lambda: Fill(among=0), "fill.among must be at least 1, got 0"),
        (lambda: Schedule(0.1, 0.5, 0), "steps must be at least 1, got 0"),
        (lambda: Schedule(0.5, 0.5, 9), "start and end are both 0.5: such a share is a number"),
        (lambda: Window(), "window.share and window.count: exactly one of them is set"),
        (lambda: Window(0.5, 3), "window.share and window.count: exactly one of them is set"),
        (lambda: Window(0.0), r"window.share must be in \(0, 1\], got 0"),
        (lambda: Window(count=0), "window.count must be at least 1, got 0"),
        (lambda: Mask(leave=1), "mask.leave has no effect: mask.exact is false"),
        (lambda: Mask(round="up"), "mask.round has no effect: mask.exact is false"),
        (lambda: Mask(exact=True, leave=-1), "mask.leave must not be negative, got -1"),
        (lambda: OneOf([Mask()], independent=True), "any_of has 1 steps, expected at least 2"),
        (lambda: Drop(1.0), r"drop.share must be in \(0, 1\), got 1"),
        (lambda: Reorder(0.0), r"reorder.share must be in \(0, 1\], got 0"),
        (lambda: OneOf([Mask()]), "one_of has 1 steps, expected at least 2"),
        (lambda: Crop(least=0), "crop.least must be at least 1, got 0"),
        (lambda: Reorder(least=0), "reorder.least must be at least 1, got 0"),
        (lambda: Substitute(0.0), r"substitute.share must be in \(0, 1\], got 0"),
        (lambda: Insert(1.5), r"insert.share must be in \(0, 1\], got 1.5"),
        (lambda: Friend(3), r"hops must be one of \[0, 1, 2\], got 3"),
        (lambda: Step(), "step names none: one of"),
        (lambda: Step(mask=Mask(), crop=Crop()), "step names mask and crop: one of"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_calls_that_cannot_work_say_why():
    batch = random_batch(3)
    with pytest.raises(ValueError, match="65536 events, got 65537"):
        Mask()(replace(batch, max_seq_len=65_537), RNG, SIDE)
    with pytest.raises(ValueError, match="fill needs a masked-item model: the key filler of the s"):
        Fill()(batch, RNG, Known(dataset_of([[0, 1, 2]], V)))
    with pytest.raises(ValueError, match="again .of a. must be the first one of its view"):
        Again("a")(batch, RNG, SIDE)


def test_a_step_of_a_recipe_is_the_part_that_it_names():
    batch = random_batch(30)
    inner = [Step(crop=Crop()), Step(mask=Mask(0.3))]
    for step, part in (
        (Step(mask=Mask(0.4)), Mask(0.4)),
        (Step(mask_last=MaskLast()), MaskLast()),
        (Step(next_item=NextItem(ahead=3)), NextItem(ahead=3)),
        (Step(one_of=inner), OneOf([Crop(), Mask(0.3)])),
        (Step(any_of=inner), OneOf([Crop(), Mask(0.3)], independent=True)),
        (Step(substitute=Substitute(0.4)), Substitute(0.4)),
        (Step(insert=Insert()), Insert()),
    ):
        assert same(step(batch, RNG, SIDE), part(batch, RNG, SIDE))
        assert step.extra == isinstance(part, NextItem)
    assert isinstance(Step(again=Again("a")).part, Again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda device")
@pytest.mark.parametrize("name", [n for n in STEPS if n.startswith("mask")])
def test_the_same_masks_on_cuda(name):
    batch = random_batch(300)
    made = partial(STEPS[name], rng=RNG, side=SIDE)
    assert same(made(batch), made(batch.to("cuda")).to("cpu"))
