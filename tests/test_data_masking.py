"""Corruptions: the masks of the Philox contract, alone, in any batch, padded or jagged."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.data.batch import JaggedBatch
from fastrec.data.corruptions import mask_items, mask_last
from fastrec.random import Rng, draws, threshold

V = 1_000
MASK, CLS, SEP = V, V + 1, V + 2


def batch_of(sequences, keys=None):
    offsets = torch.tensor([0, *np.cumsum([len(s) for s in sequences])])
    values = torch.tensor([item for s in sequences for item in s], dtype=torch.int64)
    if keys is None:
        keys = range(len(sequences))
    longest = max((len(s) for s in sequences), default=0)
    return JaggedBatch(values, offsets, torch.tensor(list(keys), dtype=torch.int64), longest)


def split(batch):
    a = batch.offsets.tolist()
    return [batch.values[i:j].tolist() for i, j in pairwise(a)]


def random_sequences(count, longest=12, special=True, seed=0):
    rng = np.random.default_rng(seed)
    items = [rng.integers(0, V, rng.integers(0, longest + 1)).tolist() for _ in range(count)]
    return [[CLS, *s, SEP] for s in items] if special else items


def mask(batch, probability=0.2, **options):
    options = {"seed": 3, "step": 5, "num_items": V, "mask_id": MASK} | options
    return mask_items(batch, probability=probability, **options)


def naive_mask(sequence, key, *, seed, step, probability, force_one):
    """Positions to mask, one event at a time."""

    def draw(site, position):
        args = (torch.tensor([key]), 0, torch.tensor([position]))
        return int(draws(Rng(seed, step), *args, site=site))

    real = [place for place, item in enumerate(sequence) if item < V]
    chosen = [place for place in real if draw("mask_item", place) < threshold(probability)]
    if not chosen and real and force_one:
        chosen = [real[draw("mask_forced", 0) * len(real) // 65536]]
    return chosen


@pytest.mark.parametrize("force_one", [True, False])
@pytest.mark.parametrize("view", [0, 3])
def test_mask_items_against_one_event_at_a_time(view, force_one):
    sequences = [*random_sequences(60), [], [CLS, SEP], [7]]
    ids = [11 * number + (view << 32) for number in range(len(sequences))]
    batch = batch_of(sequences, ids)
    masked, rows, targets = mask(batch, force_one=force_one)
    expected, places, items = [], [], []
    for start, sequence, sample in zip(batch.offsets.tolist(), sequences, ids, strict=False):
        chosen = naive_mask(sequence, sample, seed=3, step=5, probability=0.2, force_one=force_one)
        expected.append([MASK if p in chosen else item for p, item in enumerate(sequence)])
        places += [start + p for p in chosen]
        items += [sequence[p] for p in chosen]
    assert split(masked) == expected
    assert rows.tolist() == places and targets.tolist() == items
    assert rows.dtype == targets.dtype == torch.int64
    assert masked.offsets is batch.offsets and masked.keys is batch.keys
    assert split(batch) == sequences, "the input is not changed"


def test_the_exact_mask_of_a_small_batch():
    """Pins the contract: these rows must not move with a new version of anything."""
    sequences = [list(range(8)), list(range(8)), list(range(5))]
    batches = {view: batch_of(sequences, [view << 32 | i for i in range(3)]) for view in (0, 1)}
    got = {view: mask(batch)[1].tolist() for view, batch in batches.items()}
    assert got == {0: [2, 7, 8, 11, 17], 1: [2, 12, 18, 19, 20]}


@settings(deadline=None, max_examples=40)
@given(st.permutations(list(range(12))), st.integers(1, 12))
def test_the_mask_of_a_sample_is_the_same_in_any_batch(order, size):
    sequences = random_sequences(12, seed=1)
    whole = split(mask(batch_of(sequences))[0])
    some = order[:size]
    part = mask(batch_of([sequences[i] for i in some], some))[0]
    assert split(part) == [whole[i] for i in some]


def test_the_mask_of_a_padded_batch():
    """Draws of the whole [B, L] grid, as a padded implementation makes them, give the same mask."""
    sequences = random_sequences(40, special=False, seed=2)
    batch = batch_of(sequences)
    length = 16
    samples, columns = torch.arange(40)[:, None], torch.arange(length)[None, :]
    grid = draws(Rng(3, 5), samples.expand(40, length), 0, columns, site="mask_item")
    hit = (grid < threshold(0.2)) & (columns < batch.lengths[:, None])
    rows = mask(batch, force_one=False)[1]
    found = torch.stack((batch.segment_ids()[rows], batch.positions()[rows]), dim=1)
    assert torch.equal(found, hit.nonzero())


def test_masks_depend_on_seed_step_and_view():
    batch = batch_of(random_sequences(200))
    rows = mask(batch)[1]
    assert torch.equal(rows, mask(batch)[1])
    assert torch.equal(rows, mask(batch, seed=torch.tensor(3), step=torch.tensor(5))[1])
    for other in ({"seed": 4}, {"step": 6}, {"seed": 3 + (1 << 32)}):
        assert not torch.equal(rows, mask(batch, **other)[1]), other
    assert not torch.equal(rows, mask(dataclasses.replace(batch, keys=batch.keys + (1 << 32)))[1])


def chi_square(counts, expected):
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    return ((counts - expected) ** 2 / expected).sum()


def test_mask_rate():
    count, length, p = 4_000, 10, 0.2
    batch = batch_of([list(range(length))] * count)
    hit = torch.zeros(count * length)
    hit[mask(batch, p, force_one=False)[1]] = 1
    hit = hit.view(count, length)
    # Per position, and the number of masks of a sequence: binomial. 0.1 % critical values.
    place = hit.sum(0).numpy()
    variance = count * p * (1 - p)
    assert ((place - count * p) ** 2 / variance).sum() < 29.6  # 10 degrees of freedom
    # binomial(10, 0.2), 5 and more together
    chance = np.array([0.1073742, 0.2684355, 0.3019899, 0.2013266, 0.0880804, 0.0327935])
    seen = np.bincount(hit.sum(1).long().clamp(max=5).numpy(), minlength=6)
    assert chi_square(seen, count * chance / chance.sum()) < 20.5  # 5 degrees of freedom


def test_forced_masks_are_uniform_and_only_where_needed():
    count, length, p = 6_000, 5, 0.2
    batch = batch_of([[CLS, 1, 2, 3, 4, 5, SEP]] * count)
    free, forced = (mask(batch, p, force_one=force)[1] for force in (False, True))
    free, forced = (set(rows.tolist()) for rows in (free, forced))
    assert free < forced
    added = np.array(sorted(forced - free))
    served = {row // 7 for row in free}
    assert {row // 7 for row in added} == set(range(count)) - served
    assert len(added) == count - len(served), "one each"
    rate = (1 - p) ** length
    assert abs(len(added) / count - rate) < 4 * (rate * (1 - rate) / count) ** 0.5
    places = np.bincount(added % 7, minlength=7)
    assert places[0] == places[6] == 0
    assert chi_square(places[1:6], np.full(5, len(added) / 5)) < 18.5  # 4 degrees of freedom


def test_probability_zero_and_one():
    batch = batch_of(random_sequences(50))
    real = (batch.values < V).nonzero().squeeze(1)
    assert torch.equal(mask(batch, 1.0)[1], real)
    assert len(mask(batch, 0.0, force_one=False)[1]) == 0
    rows = mask(batch, 0.0)[1]
    owners = batch.segment_ids()[rows]
    assert torch.equal(owners, batch.segment_ids()[real].unique()), "one per sequence with items"


def test_80_10_10():
    batch = batch_of([list(range(20))] * 3_000)
    options = {"replace_probability": 0.8, "random_probability": 0.1}
    masked, rows, targets = mask(batch, 0.5, **options)
    plain, plain_rows, _ = mask(batch, 0.5)
    assert torch.equal(rows, plain_rows), "the same positions are predicted"
    assert torch.equal(targets, batch.values[rows])
    untouched = torch.ones(len(batch.values), dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(masked.values[untouched], batch.values[untouched])
    now = masked.values[rows]
    n = len(rows)
    shares = [(now == MASK).sum(), (now == targets).sum()]
    shares.append(n - sum(shares))
    kept = 0.1 + 0.1 / V  # a random item may be the original one
    assert chi_square([int(s) for s in shares], n * np.array([0.8, kept, 0.2 - kept])) < 13.8
    assert plain.values[rows].eq(MASK).all()


def test_random_items_are_uniform_over_the_vocabulary():
    batch = batch_of([[1] * 50] * 1_000)
    for num_items, bins in ((7, 7), (10_000_000, 100)):
        masked, _, _ = mask_items(
            batch, seed=1, step=2, probability=1.0, num_items=num_items, mask_id=num_items,
            replace_probability=0.0, random_probability=1.0,
        )  # fmt: skip
        values = masked.values.numpy()
        assert values.min() >= 0 and values.max() < num_items
        counts = np.bincount(values * bins // num_items, minlength=bins)
        limit = {7: 22.5, 100: 148.2}[bins]  # 0.1 %, bins - 1 degrees of freedom
        assert chi_square(counts, np.full(bins, len(values) / bins)) < limit
    assert len(np.unique(values)) > 49_700, "32 bits, not 16"


def test_mask_items_of_nothing():
    for sequences in ([], [[]], [[], [CLS, SEP]]):
        batch = batch_of(sequences)
        masked, rows, targets = mask(batch)
        assert split(masked) == sequences and len(rows) == len(targets) == 0
        masked, rows, targets = mask_last(batch, num_items=V, mask_id=MASK)
        assert split(masked) == sequences and len(rows) == len(targets) == 0


def test_mask_items_arguments():
    batch = batch_of([[1, 2]])
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 1.5"):
        mask(batch, 1.5)
    with pytest.raises(ValueError, match=r"at most 1, got 0\.9"):
        mask(batch, replace_probability=0.9, random_probability=0.2)
    with pytest.raises(ValueError, match="negative"):
        mask(batch, replace_probability=-0.1)
    long = JaggedBatch(batch.values, batch.offsets, batch.keys, 65_537)
    with pytest.raises(ValueError, match="65536 events, got 65537"):
        mask(long)


def test_mask_last():
    sequences = [[CLS, 4, 5, SEP], [6], [CLS, SEP], [], [CLS, 7, MASK, 8], [9, 9, SEP, SEP]]
    batch = batch_of(sequences)
    masked, rows, targets = mask_last(batch, num_items=V, mask_id=MASK)
    expected = [
        [CLS, 4, MASK, SEP], [MASK], [CLS, SEP], [], [CLS, 7, MASK, MASK], [9, MASK, SEP, SEP],
    ]  # fmt: skip
    assert split(masked) == expected and split(batch) == sequences
    assert (rows.tolist(), targets.tolist()) == ([2, 4, 10, 12], [5, 6, 8, 9])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda device")
def test_the_same_masks_on_cuda():
    batch = batch_of(random_sequences(300))
    for options in ({}, {"replace_probability": 0.8, "random_probability": 0.1}):
        here, there = mask(batch, **options), mask(batch.to("cuda"), **options)
        assert torch.equal(here[0].values, there[0].values.cpu())
        assert torch.equal(here[1], there[1].cpu()) and torch.equal(here[2], there[2].cpu())
