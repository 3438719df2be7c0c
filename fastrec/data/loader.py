# SPDX-License-Identifier: Apache-2.0
"""The training loader: an endless, seekable stream of the views of jagged batches.

No worker processes and no queue: a batch is one gather from the memory map, cheaper than sending
it between processes.
"""

from collections.abc import Iterator

import numpy as np
import torch

from fastrec.data import paging
from fastrec.data.batch import JaggedBatch
from fastrec.data.dataset import SequenceDataset
from fastrec.data.side import Shard
from fastrec.data.views import Views
from fastrec.random import Rng, sort_keys

_CHUNK = 1 << 18
_AHEAD = 4  # batches whose pages are fetched before they are used, where memory is too small


def epoch_order(users: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """int64: `users` (distinct indices) in the order of an epoch.

    Each user has a key drawn from (seed, epoch, user) and the users are sorted by it, so the order
    of a subset is the order of the whole with the others left out.
    """
    users = np.ascontiguousarray(users, dtype=np.int64)
    keys = np.empty(len(users), dtype=np.int64)
    for start in range(0, len(users), _CHUNK):
        part = torch.from_numpy(users[start : start + _CHUNK])
        keys[start : start + _CHUNK] = sort_keys(Rng(seed, epoch), part, site="epoch_order").numpy()
    return users[np.lexsort((users, keys))]


class SequenceLoader:
    """The views of batches of users, each user once per epoch.

    The batch of a global step s depends on (seed, s) only: epoch s // n, batch s % n of it, where n
    = `batches_per_epoch`. `batch_at(s)` computes it directly, so resuming replays nothing.

    `step` is the global step of the next batch; call `set_step` to resume. Iterating yields batches
    from `step` to the end of its pass and leaves `step` there; a pass is an epoch, or
    `steps_per_pass` batches if given. Leaving an iteration early leaves `step` after the last batch
    that was yielded: the next iteration goes on from there.

    views: makes the views of a batch; its side data has the data set and the split.
    batch_size: sequences of a batch, over all ranks.
    shuffle: False gives the users in the order of `users`.
    users: int64, distinct user indices; default all users of the split.
    rank, world_size: this process gets every world_size-th sequence of each batch; the batches of
        all ranks together are those of a single process.
    """

    def __init__(
        self,
        views: Views,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        users=None,
        steps_per_pass: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got {rank} of {world_size}")
        self.views, self.seed, self.shuffle = views, seed, shuffle
        self.side = views.side
        self.users = _checked_users(self.side.dataset, self.side.split, users)
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.batches_per_epoch = -(-len(self.users) // batch_size)
        if steps_per_pass is not None and steps_per_pass < 1:
            raise ValueError(f"steps_per_pass must be at least 1, got {steps_per_pass}")
        self.steps_per_pass = steps_per_pass or self.batches_per_epoch
        self.step = 0
        self._order: tuple[int, np.ndarray] | None = None
        values = getattr(self.side.dataset, "values", None)  # rows of a cold start have none
        self._fetches = isinstance(values, np.memmap) and paging.read_singly(values)
        self._fetched = -1  # the last step whose pages are on their way

    @property
    def smallest(self) -> int:
        """Users of the last, smallest batch of an epoch, over all ranks."""
        return len(self.users) - (self.batches_per_epoch - 1) * self.batch_size

    @property
    def largest(self) -> int:
        """Users of the other batches, over all ranks."""
        return min(self.batch_size, len(self.users))

    def __len__(self) -> int:
        """Batches of a pass."""
        return self.steps_per_pass

    def __iter__(self) -> Iterator[dict[str, JaggedBatch]]:
        end = (self.step // self.steps_per_pass + 1) * self.steps_per_pass
        while self.step < end:
            batch = self.batch_at(self.step)
            self.step += 1
            yield batch

    def set_step(self, step: int) -> None:
        """Go to global step `step`: the next batch is `batch_at(step)`."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        self.step = step

    def batch_at(self, step: int) -> dict[str, JaggedBatch]:
        """The views of global step `step`; does not move the loader."""
        users = self._users_of_all_ranks(step)
        if self._fetches:
            self._fetch_until(step)
        batch = self.side.gather(users[self.rank :: self.world_size], self.views.length)
        shard = Shard(users, self.rank, self.world_size)
        return self.views(batch, Rng(self.seed, step), shard)

    def few(self, number: int) -> dict[str, JaggedBatch]:
        """The views of the first `number` users, at step 0: whether they can be made."""
        users = self.users[:number]
        batch = self.side.gather(users, self.views.length)
        return self.views(batch, Rng(self.seed, 0), Shard(users))

    def _fetch_until(self, step: int) -> None:
        """Have the pages of the batches behind `step` read, inside the epoch."""
        dataset, split, length = self.side.dataset, self.side.split, self.views.length
        last = (step // self.batches_per_epoch + 1) * self.batches_per_epoch - 1
        end = min(step + _AHEAD, last)
        begin = self._fetched + 1 if step <= self._fetched <= end else step
        for number in range(begin, end + 1):
            users = self._users_of_all_ranks(number)[self.rank :: self.world_size]
            ends = dataset.input_ends(users, split)
            starts = np.maximum(dataset.offsets[users], ends - length)
            paging.fetch(dataset.values, starts, ends)
        self._fetched = end

    def _users_of_all_ranks(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.batches_per_epoch)
        if not self.shuffle:
            order = self.users
        elif self._order is not None and self._order[0] == epoch:
            order = self._order[1]
        else:
            order = epoch_order(self.users, self.seed, epoch)
            self._order = (epoch, order)
        return order[index * self.batch_size : (index + 1) * self.batch_size]


def _checked_users(dataset: SequenceDataset, split: str, users) -> np.ndarray:
    eligible = dataset.users(split)
    if users is None:
        return eligible
    users = torch.as_tensor(users, dtype=torch.int64, device="cpu").numpy()
    if len(users) == 0:
        raise ValueError(f"there is no user to load in split {split!r}")
    unique, counts = np.unique(users, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"users must be distinct, {unique[counts > 1][0]} is repeated")
    missing = np.setdiff1d(unique, eligible, assume_unique=True)
    if missing.size:
        raise ValueError(
            f"user {missing[0]} is not in split {split!r} (out of range, or too few events)"
        )
    return users
