# SPDX-License-Identifier: Apache-2.0
"""Which training prefixes end with an item: where the partners of `same_target` are drawn from.

Legend: U users, V items, E events, P prefixes, B sequences.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastrec.random import Rng, wide_draws


@dataclass(frozen=True, eq=False)
class TargetIndex:
    """The prefixes of the training sequences by their last item. A prefix is an event with at least
    one event before it, and all of these: every event of a user but the first is one.

    places: int32 or int64 [P], their last events, places among all events of the data set,
        ascending for each item. With fewer than 2^31 events that is 4 bytes an event.
    offsets: int64 [V + 1]; those that end with item i are places[offsets[i]:offsets[i + 1]].
    users: bool [U], whose prefixes these are.
    """

    places: np.ndarray
    offsets: np.ndarray
    users: np.ndarray

    @classmethod
    def from_dataset(cls, dataset, split: str = "train", users=None) -> "TargetIndex":
        """Of the inputs of `split`. users: int64, whose prefixes; default all.

        One stable sort of the items, with about 30 bytes an event meanwhile.
        """
        inside = np.zeros(dataset.num_users, dtype=bool)
        inside[slice(None) if users is None else np.asarray(users)] = True
        kept = np.where(inside, dataset.split_lengths(split), 0)
        first = dataset.offsets[:-1]
        places = np.flatnonzero(dataset.events_between(first + 1, first + kept))
        items = dataset.values[places]
        counts = np.bincount(items, minlength=dataset.num_items)
        small = np.int32 if dataset.num_events < 2**31 else np.int64
        order = items.argsort(kind="stable")
        return cls(places[order].astype(small), np.concatenate(([0], counts.cumsum())), inside)

    def draw(
        self, users: np.ndarray, own: np.ndarray, items: np.ndarray, keys: Tensor, rng: Rng
    ) -> np.ndarray:
        """int64 [B]: the last event of another prefix that ends with the same item as the one that
        ends at `own`, uniform; `own` itself where there is none.

        users, own, items: int64 [B], whose prefix, its last event among all events, and its item.
        Depends on (seed, step, key) only; chances are equal to within 2^-32.
        """
        first = self.offsets[items]
        others = self.offsets[items + 1] - first - self.users[users]
        drawn = wide_draws(rng, keys, torch.zeros_like(keys), site="same_target").numpy()
        pick = first + (drawn * others >> 32)
        # The places of an item ascend: leaving `own` out moves those from it on up by one.
        pick += self.users[users] & (self._at(pick) >= own)
        return np.where(others > 0, self._at(pick), own)

    def _at(self, index: np.ndarray) -> np.ndarray:
        """int64 [B]: places, anything where an index is out of range."""
        padded = self.places if len(self.places) else np.zeros(1, np.int32)
        return padded[np.minimum(index, len(padded) - 1)].astype(np.int64)
