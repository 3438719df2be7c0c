# SPDX-License-Identifier: Apache-2.0
"""Sampled negatives: item ids of a fixed distribution, O(1) a draw, and their log probability.

Legend: V items, N rows, K negatives.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastrec.backend import unavailable_reason
from fastrec.random import Rng, check_keys, check_positions, draw_words, site_number

torch.library.define(
    "fastrec::draw_negatives",
    "(Tensor rng, Tensor keys, Tensor positions, int number, int site, int items,"
    " Tensor? threshold, Tensor? alias) -> Tensor",
)


@torch.library.register_fake("fastrec::draw_negatives")
def _(rng, keys, positions, number, *args):
    return keys.new_empty(len(keys), number)


UNIT = 1 << 32  # probabilities of a slot in 2^-32
MOST_DRAWN = 2 * 65536  # at one place


@dataclass(frozen=True, eq=False)
class NegativeSampler:
    """Draws items with replacement, all with one distribution; make one with `of`, `uniform` or
    `popularity`.

    A draw takes two 32-bit words: the first chooses one of V slots, the second the item of the slot
    or its alias (Walker, 1977). A probability is met to within 2^-32. What is drawn depends on
    (seed, step) and, for negatives of a row, on its key and position only: it is the same in
    any batch, in any order, on any rank, on CPU or GPU. Nothing keeps negatives from being the
    target of a row or each other: `sampled_linear_cross_entropy` removes hits and counts repeats.

    num_items: V.
    log_q: float32 [V], log of the probability of an item. Items that are never drawn have the
        lowest value of the others, so that a correction of their score, as a target, is finite.
    threshold, alias: int64 [V]; None for the uniform distribution.
    """

    num_items: int
    log_q: Tensor
    threshold: Tensor | None = None
    alias: Tensor | None = None

    @classmethod
    def of(
        cls, by: Literal["uniform", "popularity"], side, alpha: float = 1.0
    ) -> "NegativeSampler":
        """By the words of a recipe, of the items of a `SideData`. alpha: see `popularity`."""
        if by == "uniform":
            return cls.uniform(side.num_items)
        return cls.popularity(side.item_counts, alpha)

    @classmethod
    def uniform(cls, num_items: int) -> "NegativeSampler":
        """Every item of [0, V) with probability 1 / V."""
        if not 0 < num_items < 1 << 30:
            raise ValueError(f"num_items must be in [1, 2^30), got {num_items}")
        return cls(
            num_items,
            torch.full((num_items,), -math.log(num_items), dtype=torch.float32, device="cpu"),
        )

    @classmethod
    def popularity(cls, counts: Tensor | np.ndarray, alpha: float = 1.0) -> "NegativeSampler":
        """Item v with a probability proportional to counts[v]^alpha; never one with a count of 0.

        counts: [V], finite and not negative, at least one above 0.
        alpha: 1 follows the popularity, 0 is uniform over the items that occur, 0.75 is word2vec's.
        """
        count = np.asarray(counts, dtype=np.float64)
        if count.ndim != 1 or not 0 < len(count) < 1 << 30:
            raise ValueError(f"counts must be [V] with 0 < V < 2^30, got {list(count.shape)}")
        if not np.isfinite(count).all() or (count < 0).any():
            bad = int(np.flatnonzero(~(count >= 0) | ~np.isfinite(count))[0])
            raise ValueError(f"counts[{bad}] is {count[bad]}, expected a finite number >= 0")
        if not np.isfinite(alpha):
            raise ValueError(f"alpha must be finite, got {alpha}")
        drawn = count > 0
        if not drawn.any():
            raise ValueError("all counts are 0: there is no item to draw")
        # Relative to the largest, so that no power overflows.
        log_weight = np.full(len(count), -np.inf)
        log_weight[drawn] = alpha * np.log(count[drawn])
        weight = np.exp(log_weight - log_weight.max())
        share = np.where(
            drawn, np.maximum(np.floor(weight * (UNIT * len(count) / weight.sum())), 1), 0
        )
        share = share.astype(np.int64)
        share[share.argmax()] += UNIT * len(count) - share.sum()
        threshold, alias = _alias_table(share)
        log_q = np.log(np.maximum(share, share[drawn].min())) - np.log(float(UNIT) * len(count))
        return cls(
            len(count),
            torch.from_numpy(log_q.astype(np.float32)),
            torch.from_numpy(threshold),
            torch.from_numpy(alias),
        )

    def to(self, device: torch.device) -> "NegativeSampler":
        """Itself where it is already there."""
        if self.log_q.device == device:
            return self
        moved = (None if t is None else t.to(device) for t in (self.threshold, self.alias))
        return NegativeSampler(self.num_items, self.log_q.to(device), *moved)

    def shared(self, number: int, rng: Rng) -> Tensor:
        """int64 [K]: negatives that all rows of a step share (site 28)."""
        zero = torch.zeros((), dtype=torch.int64, device=self.log_q.device)
        return self._draw(number, rng, zero, zero, "negatives_shared")

    def own(
        self,
        number: int,
        rng: Rng,
        keys: Tensor,
        positions: Tensor,
        site: str | int = "negatives_own",
    ) -> Tensor:
        """int64 [N, K]: negatives of each row, the event at `positions` [N] of the sequence
        with the key `keys` [N]. Positions must be below 65,536. Two objectives that draw at the
        same places need sites of their own."""
        return self._draw(number, rng, keys, positions, site)

    def _draw(self, number, rng, keys, positions, site) -> Tensor:
        if not 0 < number <= MOST_DRAWN:
            raise ValueError(f"the number of negatives must be in [1, {MOST_DRAWN}], got {number}")
        if unavailable_reason("cpp", "draw_negatives", keys.device) is None:
            return self._drawn(number, rng, keys, positions, site)
        words = draw_words(rng, keys, positions, (number + 1) // 2, site=site)
        pairs = words.unflatten(-1, (-1, 2))[..., :number, :]
        slot = pairs[..., 0] * self.num_items >> 32
        if self.threshold is None or self.alias is None:
            return slot
        return torch.where(pairs[..., 1] < self.threshold[slot], slot, self.alias[slot])

    def _drawn(self, number, rng, keys, positions, site) -> Tensor:
        """The same by the kernel, which keeps no words."""
        check_keys(keys)
        check_positions("positions", positions)
        keys, positions = torch.broadcast_tensors(keys, positions.to(torch.int64))
        words, table = rng.key(keys.device), (self.num_items, self.threshold, self.alias)
        flat = keys.flatten(), positions.flatten()
        out = torch.ops.fastrec.draw_negatives(words, *flat, number, site_number(site), *table)
        return out.view(*keys.shape, number)


def _alias_table(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(threshold, alias) int64 [V] of shares int64 [V] that add up to V UNIT, without a loop.

    The sweep of Huebschle-Schneider and Sanders (2019): items below UNIT take what they lack from
    those above, in order, one giver each. A giver that was overdrawn takes what it then lacks from
    the next giver. Who gives to whom is a search in the running sums of what is lacked and what is
    left over. Integers: the table is exact.
    """
    below = np.flatnonzero(share < UNIT)
    above = np.flatnonzero(share >= UNIT)
    lacked = np.cumsum(UNIT - share[below])
    spare = np.cumsum(share[above] - UNIT)
    threshold, alias = np.full(len(share), UNIT), np.arange(len(share))
    threshold[below] = share[below]
    alias[below] = above[np.searchsorted(spare, lacked - (UNIT - share[below]))]
    taker = np.searchsorted(lacked, spare, side="right")
    overdrawn = np.flatnonzero(taker < len(below))
    threshold[above[overdrawn]] = UNIT + spare[overdrawn] - lacked[taker[overdrawn]]
    alias[above[overdrawn]] = above[overdrawn + 1]
    return threshold, alias
