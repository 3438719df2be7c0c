# SPDX-License-Identifier: Apache-2.0
"""Negative samplers: the exact distribution, and that a draw depends on its key only."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from backends import needs

from fastrec.data.negatives import MOST_DRAWN, UNIT, NegativeSampler
from fastrec.random import Rng, draws


def probabilities(sampler: NegativeSampler) -> np.ndarray:
    """What the table gives every item, exactly (in units of 2^-32 / V)."""
    got = sampler.threshold.numpy().astype(object)
    total = [int(value) for value in got]
    for threshold, alias in zip(got, sampler.alias.tolist(), strict=True):
        total[alias] += UNIT - int(threshold)
    assert sum(total) == UNIT * sampler.num_items
    return np.array([value / (UNIT * sampler.num_items) for value in total])


def zipf(items: int) -> torch.Tensor:
    counts = (1e6 / torch.arange(1, items + 1).double() ** 1.1).long()
    return counts[torch.randperm(items, generator=torch.Generator().manual_seed(items))]


@pytest.mark.parametrize("alpha", [1.0, 0.75, 0.0, -0.5])
@pytest.mark.parametrize(
    "counts",
    [
        zipf(5000),
        torch.tensor([1]),
        torch.tensor([0, 7]),
        torch.tensor([3, 3, 3, 3]),
        torch.tensor([0, 0, 1, 10**12, 0, 5, 1]),
        torch.tensor([1000, 1, 1, 1, 1, 999, 998, 0, 0, 0]),
        torch.randint(2, (257,), generator=torch.Generator().manual_seed(1)),
    ],
)
def test_table_has_the_exact_distribution(counts, alpha):
    sampler = NegativeSampler.popularity(counts, alpha)
    count = counts.numpy().astype(float)
    weight = np.where(count > 0, np.maximum(count, 1.0) ** alpha, 0.0)
    expected = weight / weight.sum()
    got = probabilities(sampler)
    assert sampler.threshold.min() >= 0 and sampler.threshold.max() <= UNIT
    assert np.abs(got - expected).max() < 2.0**-31
    assert (got[count == 0] == 0).all() and (got[count > 0] > 0).all()
    occurs = counts > 0
    np.testing.assert_allclose(sampler.log_q[occurs].numpy(), np.log(got[count > 0]), atol=2e-6)
    if (~occurs).any():
        assert (sampler.log_q[~occurs] == sampler.log_q[occurs].min()).all()


def chi_square(ids: torch.Tensor, expected: np.ndarray) -> float:
    """In standard deviations from its mean, over the items expected at least ten times."""
    observed = np.bincount(ids.flatten().numpy(), minlength=len(expected))
    expected = expected * ids.numel()
    assert (observed[expected == 0] == 0).all()
    often = expected >= 10
    cells = np.append(observed[often], observed[~often].sum())
    mean = np.append(expected[often], expected[~often].sum())
    cells, mean = cells[mean > 0], mean[mean > 0]
    freedom = len(cells) - 1
    return (((cells - mean) ** 2 / mean).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_draws_follow_the_distribution(kind):
    counts = zipf(400)
    counts[::7] = 0
    if kind == "uniform":
        sampler, expected = NegativeSampler.uniform(400), np.full(400, 1 / 400)
    else:
        sampler = NegativeSampler.popularity(counts, 0.75)
        expected = probabilities(sampler)
    samples, positions = torch.arange(300), torch.arange(300) % 50
    own = sampler.own(501, Rng(3, 9), samples, positions)
    assert own.shape == (300, 501) and own.min() >= 0 and own.max() < 400
    assert abs(chi_square(own, expected)) < 5
    # The same place of many rows, and the shared draws of many steps.
    assert (
        abs(chi_square(sampler.own(2, Rng(3, 9), torch.arange(50000), torch.tensor(4)), expected))
        < 5
    )
    shared = torch.stack([sampler.shared(99, Rng(3, step)) for step in range(1000)])
    assert abs(chi_square(shared, expected)) < 5


def test_draws_depend_on_their_key_only():
    sampler = NegativeSampler.popularity(zipf(1000))
    samples, positions = torch.tensor([5, 2**32 - 1, 7, 5]), torch.tensor([3, 0, 65535, 4])
    whole = sampler.own(33, Rng(11, 2), samples, positions)
    order = torch.tensor([2, 0])
    assert torch.equal(sampler.own(33, Rng(11, 2), samples[order], positions[order]), whole[order])
    assert torch.equal(sampler.own(10, Rng(11, 2), samples, positions), whole[:, :10])
    assert torch.equal(sampler.shared(10, Rng(11, 2)), sampler.shared(33, Rng(11, 2))[:10])
    others = [
        sampler.own(33, Rng(12, 2), samples, positions),
        sampler.own(33, Rng(11, 3), samples, positions),
        sampler.own(33, Rng(11, 2), samples + 1, positions),
        sampler.own(33, Rng(11, 2), samples | 1 << 32, positions),  # another view
        sampler.own(33, Rng(11, 2), samples, positions ^ 1),
        sampler.shared(33, Rng(11, 2)).expand(4, -1),
    ]
    for other in others:
        assert not (other == whole).all(1).any()
    assert not torch.equal(whole[0], whole[3])


def test_words_are_those_of_the_contract():
    sampler = NegativeSampler.uniform(1 << 20)
    sample, position = torch.tensor([77]), torch.tensor([6])
    got = sampler.own(5, Rng(3, 8), sample, position)[0]
    col = torch.arange(20)
    half = draws(Rng(3, 8), sample, position, col, site="negatives_own")
    word = half[0::2] | half[1::2] << 16
    assert got.tolist() == (word[0::2] * (1 << 20) >> 32).tolist()


def test_boundaries():
    for sampler in (NegativeSampler.uniform(1), NegativeSampler.popularity(torch.tensor([4]))):
        assert sampler.shared(7, Rng(0, 0)).tolist() == [0] * 7 and sampler.log_q.tolist() == [0.0]
    nobody = torch.empty(0, dtype=torch.int64)
    assert NegativeSampler.uniform(5).own(1, Rng(0, 0), nobody, nobody).shape == (0, 1)
    most = NegativeSampler.uniform(5).shared(MOST_DRAWN, Rng(0, 0))
    assert most.shape == (MOST_DRAWN,) and most.min() >= 0 and most.max() < 5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: NegativeSampler.uniform(0), r"num_items must be in \[1, 2\^30\), got 0"),
        (lambda: NegativeSampler.popularity(torch.zeros(3)), "all counts are 0"),
        (lambda: NegativeSampler.popularity(torch.tensor([1.0, -2])), r"counts\[1\] is -2.0"),
        (lambda: NegativeSampler.popularity(torch.tensor([1, math.nan])), r"counts\[1\] is nan"),
        (lambda: NegativeSampler.popularity(torch.ones(2, 2)), r"counts must be \[V\]"),
        (lambda: NegativeSampler.popularity(torch.ones(2), math.inf), "alpha must be finite"),
        (lambda: NegativeSampler.uniform(3).shared(0, Rng(0, 0)), "number of negatives must be in"),
        (
            lambda: NegativeSampler.uniform(3).shared(MOST_DRAWN + 1, Rng(0, 0)),
            r"number of negatives must be in \[1, 131072\], got 131073",
        ),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def by_hand(sampler: NegativeSampler, rng: Rng, key: int, place: int, number: int, site: str):
    """The contract, a draw at a time: two words of two 16-bit draws each."""
    half = draws(rng, torch.tensor(key), place, torch.arange(4 * number), site=site).tolist()
    words = [low | high << 16 for low, high in zip(half[::2], half[1::2], strict=True)]
    found = []
    for slot, which in zip(words[::2], words[1::2], strict=True):
        slot = slot * sampler.num_items >> 32
        alias = sampler.alias is not None and which >= int(sampler.threshold[slot])
        found.append(int(sampler.alias[slot]) if alias else slot)
    return found


@needs("cpp", "draw_negatives")
@pytest.mark.parametrize("number", [1, 2, 7, 64, 255])
@pytest.mark.parametrize("items", [1, 2, 5000, (1 << 30) - 1])
def test_the_kernel_draws_what_the_contract_says(items, number, monkeypatch):
    uniform = items > 5000
    sampler = NegativeSampler.uniform(5) if uniform else NegativeSampler.popularity(zipf(items))
    if uniform:
        sampler = dataclasses.replace(sampler, num_items=items)
    rng = Rng(-3, 2**33 + 5)
    keys = torch.tensor([0, 7, (3 << 32) + 0xFFFFFFFF, 9])
    places = torch.tensor([0, 65535, 1, 300], dtype=torch.int32)
    own = sampler.own(number, rng, keys, places)
    shared = sampler.shared(number, rng)
    assert own.shape == (4, number) and shared.shape == (number,) and own.dtype == torch.int64
    for row, (key, place) in enumerate(zip(keys.tolist(), places.tolist(), strict=True)):
        assert own[row].tolist() == by_hand(sampler, rng, key, place, number, "negatives_own")
    assert shared.tolist() == by_hand(sampler, rng, 0, 0, number, "negatives_shared")
    strided = sampler.own(number, rng, torch.stack([keys, keys], 1)[:, 0], places)
    assert torch.equal(strided, own)
    none = torch.empty(0, dtype=torch.int64)
    assert sampler.own(number, rng, none, none).shape == (0, number)
    monkeypatch.setattr("fastrec.data.negatives.unavailable_reason", lambda *_: "it is not asked")
    assert torch.equal(sampler.own(number, rng, keys, places), own)
    assert torch.equal(sampler.shared(number, rng), shared)


@pytest.mark.parametrize("native", [True, False])
def test_a_word_that_is_the_threshold_gives_the_alias(native, monkeypatch):
    if not native:
        monkeypatch.setattr("fastrec.data.negatives.unavailable_reason", lambda *_: "not asked")
    half = draws(Rng(1, 2), torch.tensor(5), 6, torch.arange(4), site="negatives_own").tolist()
    word = half[2] | half[3] << 16
    for threshold, expected in ((word, 7), (word + 1, 0)):
        table = torch.tensor([threshold]), torch.tensor([7])
        sampler = NegativeSampler(1, torch.zeros(1), *table)
        assert sampler.own(1, Rng(1, 2), torch.tensor([5]), torch.tensor([6])).item() == expected


@needs("cpp", "draw_negatives")
def test_the_kernel_draws_the_same_on_any_number_of_threads(monkeypatch):
    sampler, keys = NegativeSampler.popularity(zipf(5000)), torch.arange(3000)
    own = sampler.own(33, Rng(1, 2), keys, keys % 50)
    count = torch.get_num_threads()
    torch.set_num_threads(count + 3)
    try:
        assert torch.equal(sampler.own(33, Rng(1, 2), keys, keys % 50), own)
    finally:
        torch.set_num_threads(count)
    monkeypatch.setattr("fastrec.data.negatives.unavailable_reason", lambda *_: "it is not asked")
    assert torch.equal(sampler.own(33, Rng(1, 2), keys, keys % 50), own)


@pytest.mark.parametrize("native", [True, False])
def test_what_no_draw_can_be_of(native, monkeypatch):
    if not native:
        monkeypatch.setattr("fastrec.data.negatives.unavailable_reason", lambda *_: "not asked")
    sampler, keys = NegativeSampler.uniform(9), torch.arange(3)
    with pytest.raises(TypeError, match="keys must be int64, got torch.int32"):
        sampler.own(4, Rng(0, 0), keys.int(), keys)
    with pytest.raises(ValueError, match=r"\[0, 65536\), got 65536"):
        sampler.own(4, Rng(0, 0), keys, keys + 65534)
