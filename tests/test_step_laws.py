# SPDX-License-Identifier: Apache-2.0
"""Steps of a view that draw: what they draw follows the law that they name."""

from collections import Counter
from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch
from builders import Known, dataset_of, lists_of
from plain_steps import CLS, MASK, RNG, SEP, SIDE, V, copies, random_batch

from fastrec.data.batch import JaggedBatch, from_sequences
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.fill import Fill
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.parts import Step
from fastrec.data.steps.prefix import Prefix
from fastrec.data.steps.reorder import Reorder
from fastrec.data.steps.window import Window
from fastrec.random import Rng, draws, threshold
from fastrec.training.config import Recipe


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


# What is drawn is drawn with the right chances: 0.1 % critical values of chi-square.


def chi_square(counts, expected) -> float:
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    return ((counts - expected) ** 2 / expected).sum()


def chosen_of(batch: JaggedBatch, step, rng: Rng = RNG) -> torch.Tensor:
    """bool [T]: which events are predicted."""
    return step(batch, rng, SIDE).events["target"] != -100


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
    pairs = np.bincount((4 * taken[0] + taken[1]).numpy(), minlength=16).reshape(4, 4)[1:, 1:]
    assert chi_square(pairs[~np.eye(3, dtype=bool)], np.full(6, count / 6)) < 20.5  # 5 of freedom
    later = OneOf(steps)(batch, Rng(3, 6), SIDE).values.view(count, 4).eq(MASK).sum(1)
    assert abs((later == taken[0]).double().mean().item() - 1 / 3) < 0.03, "of every step"


def test_two_views_take_any_two_of_five_steps():
    """CL4SRec's changes and two more: those of neighbours in the list are no likelier together."""
    count = 9_000
    batch, steps = copies(list(range(6)), count), [MaskLast(number) for number in range(1, 6)]
    one, other = (
        OneOf(steps)(batch.as_view(view), RNG, SIDE).values.view(count, 6).eq(MASK).sum(1).numpy()
        for view in range(2)
    )
    pairs = np.bincount(6 * one + other, minlength=36).reshape(6, 6)[1:, 1:]
    assert not pairs.diagonal().any()
    apart = pairs[~np.eye(5, dtype=bool)]
    assert chi_square(apart, np.full(20, count / 20)) < 43.8  # 19 degrees of freedom


def test_any_of_is_uniform_and_every_view_chooses_for_itself():
    count = 6_000
    batch, step = copies([1, 2, 3, 4], count), OneOf([MaskLast(1), MaskLast(2)], independent=True)
    taken = [
        step(batch.as_view(view), RNG, SIDE).values.view(count, 4).eq(MASK).sum(1)
        for view in range(2)
    ]
    pairs = np.bincount((2 * taken[0] + taken[1] - 3).numpy())
    assert chi_square(pairs, np.full(4, count / 4)) < 16.3  # 3 degrees of freedom


@pytest.mark.parametrize("name", ["cl4srec", "coserec", "adaptssr"])
def test_a_contrast_masks_no_only_item(name):
    """Two users with one item each would be the same [MASK]."""
    stages = Recipe.load(name).stages.values()
    masks = [step for stage in stages for step in stage.steps_of_views if isinstance(step, Mask)]
    masks = [mask for mask in masks if mask.exact]
    assert masks and all(mask(copies([5], 9), RNG, SIDE).values.eq(5).all() for mask in masks)


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
