# SPDX-License-Identifier: Apache-2.0
"""The social graph: who is whose friend, one drawn friend per user, and who must not be a negative.

Legend: U users, R directed links, B queries, C candidates, E excluded pairs.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from fastrec.data.batch import np_spans
from fastrec.data.pairs import Pairs
from fastrec.random import Rng, wide_draws

HOPS = (0, 1, 2)
_BLOCK = 1 << 18  # flags of a block of queries: they stay in the cache


@dataclass(frozen=True, eq=False)
class SocialGraph:
    """Symmetric friendships as CSR; the friends of u are values[offsets[u]:offsets[u + 1]].

    values: int32 or int64 [R], ascending and distinct within a user, never the user itself.
    offsets: int64 [U + 1].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_pairs(cls, pairs: np.ndarray, num_users: int) -> "SocialGraph":
        """The symmetric closure of (user, friend) pairs, int [R, 2]: a pair makes both of them a
        friend of the other. Repeated pairs count once, a user is never its own friend.

        Raises ValueError for a shape or a user out of range.
        """
        pairs = np.asarray(pairs, dtype=np.int64)
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(f"pairs must be [R, 2], got {list(pairs.shape)}")
        if pairs.size and (pairs.min() < 0 or pairs.max() >= num_users):
            bad = pairs[(pairs < 0) | (pairs >= num_users)][0]
            raise ValueError(f"user {bad} of a pair is out of [0, {num_users})")
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        # One sort of one integer a link; sorting rows of two columns is 30 times slower.
        keys = np.concatenate((pairs @ [num_users, 1], pairs @ [1, num_users]))
        keys.sort()
        if len(keys):
            keys = keys[np.concatenate(([True], keys[1:] != keys[:-1]))]
        small = np.int32 if num_users < 2**31 else np.int64
        offsets = np.searchsorted(keys, np.arange(num_users + 1) * num_users)
        return cls((keys % num_users).astype(small), offsets)

    @classmethod
    def from_dataset(cls, dataset, users=None) -> "SocialGraph":
        """The graph of a dataset's relations; with `users`, of the links that have both ends there.

        Raises ValueError for a dataset without relations.
        """
        pairs = dataset.relations()
        if pairs is None:
            raise ValueError(
                f"{dataset.path} has no relations: prepare it with --relations, or leave out the"
                " step friend"
            )
        if users is not None:
            inside = np.zeros(dataset.num_users, dtype=bool)
            inside[np.asarray(users)] = True
            pairs = pairs[inside[pairs].all(axis=1)]
        return cls.from_pairs(pairs, dataset.num_users)

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    def degrees(self, users: np.ndarray) -> np.ndarray:
        """int64: number of friends of each user."""
        return self.offsets[users + 1] - self.offsets[users]

    def draw_friends(self, users: np.ndarray, rng: Rng) -> tuple:
        """(rows, friends) int64 [N]: one friend, uniform, of each of `users` who has any.

        `rows` are the ascending positions in `users`. The friend of a user depends on (seed, step,
        user) only: it is the same in any batch, in any order, on any rank. Its probability is
        1 / degree to within 2^-32.
        """
        users = np.asarray(users, dtype=np.int64)
        degree = self.degrees(users)
        rows = np.flatnonzero(degree)
        sample, zero = (
            torch.from_numpy(users[rows]),
            torch.zeros(len(rows), dtype=torch.int64, device="cpu"),
        )
        drawn = wide_draws(rng, sample, zero, site="draw_friend").numpy()
        pick = drawn * degree[rows] >> 32
        return rows, self.values[self.offsets[users[rows]] + pick].astype(np.int64)

    def exclusions(
        self, queries: np.ndarray, positives: np.ndarray, candidates: np.ndarray, hops: int = 2
    ) -> tuple[np.ndarray, np.ndarray]:
        """(values int64 [E], offsets int64 [B + 1]): the candidates that are no negatives of each
        query, ascending positions in `candidates`.

        queries: int64 [B] users; positives: int64 [B], a friend of each; candidates: int64 [C]
        users, repeated ones allowed. A candidate is listed for a query if it is the same user, if
        it is the user of the positive (the positive itself is listed too), or if it is at most
        `hops` links away: 1 for friends, 2 for friends of friends as well, 0 for neither.

        Two users are at most two links away if their neighbourhoods, themselves included, meet: a
        join of the two lists, in blocks of queries. Neither the two-hop graph nor B x C is stored;
        extra memory is O(sum of the degrees of the batch + E).

        Raises ValueError for another number of hops.
        """
        if hops not in HOPS:
            raise ValueError(f"hops must be one of {HOPS}, got {hops}")
        queries, positives, candidates = (
            np.asarray(users, dtype=np.int64) for users in (queries, positives, candidates)
        )
        if len(queries) == 0 or len(candidates) == 0:
            return np.empty(0, np.int64), np.zeros(len(queries) + 1, np.int64)
        users, column, inverse = np.unique(candidates, return_index=True, return_inverse=True)
        again = np.flatnonzero(column[inverse] != np.arange(len(candidates)))
        middle, start, count, owner = self._index(users, hops == 2, queries, hops >= 1)
        owner = column[owner].astype(np.int32)
        meets = np.zeros(self.num_users, dtype=bool)
        meets[middle] = True
        slot = np.empty(self.num_users, dtype=np.int32)  # only the entries of `middle` are touched
        slot[middle] = np.arange(len(middle), dtype=np.int32)
        entries, row = self._neighbourhoods(queries, hops >= 1, positives)
        kept = np.flatnonzero(meets[entries])
        entries, row = slot[entries[kept]], row[kept]
        first, pairs = start[entries], count[entries]
        entry_of_row = np.searchsorted(row, np.arange(len(queries) + 1))
        # A block of queries x candidates is flagged and read out; repeated candidates copy the
        # flags of their first column.
        found, totals = [], np.zeros(len(queries) + 1, dtype=np.int64)
        width = len(candidates)
        step = max(1, _BLOCK // width)
        for begin in range(0, len(queries), step):
            end = min(begin + step, len(queries))
            part = slice(entry_of_row[begin], entry_of_row[end])
            near = np.zeros((end - begin, width), dtype=bool)
            # The place in `near` of each joined pair: the start of its row plus its candidate.
            # int64, because numpy converts any other index first.
            place = np.repeat((row[part] - begin) * np.int64(width), pairs[part])
            place += owner.take(np_spans(first[part], pairs[part]))
            near.reshape(-1)[place] = True
            near[:, again] = near[:, column[inverse[again]]]
            flat = np.flatnonzero(near)
            ends = np.searchsorted(flat, np.arange(1, end - begin + 1) * width)
            totals[begin + 1 : end + 1] = np.diff(ends, prepend=0)
            flat -= np.repeat(np.arange(end - begin) * width, np.diff(ends, prepend=0))
            found.append(flat)
        return np.concatenate(found), totals.cumsum()

    def _neighbourhoods(self, users: np.ndarray, friends: bool, others: np.ndarray) -> tuple:
        """(members, row of each int32) of {user, other} and, with `friends`, the user's friends."""
        degree = self.degrees(users) if friends else np.zeros(len(users), dtype=np.int64)
        ends = (degree + 2).cumsum()
        members = np.empty(ends[-1], dtype=self.values.dtype)
        members[ends - 1], members[ends - 2] = users, others
        links = np_spans(self.offsets[users], degree)
        members[np_spans(ends - 2 - degree, degree)] = self.values[links]
        return members, np.repeat(np.arange(len(users), dtype=np.int32), degree + 2)

    def _index(self, users: np.ndarray, friends: bool, queries: np.ndarray, wide: bool) -> tuple:
        """The candidates by the user through which they are met: (middle users, start and count in
        `owner`, owner), where owner holds positions in `users`. Only middles that can be a member
        of a query's neighbourhood are kept."""
        owner = np.arange(len(users), dtype=np.int32)
        if not friends:
            return users, owner, np.ones(len(users), dtype=np.int32), owner
        reached = np.zeros(self.num_users, dtype=bool)
        reached[queries] = True
        if wide:
            reached[self.values[np_spans(self.offsets[queries], self.degrees(queries))]] = True
        starts, degree = self.offsets[users], self.degrees(users)
        ends = degree.cumsum()
        cuts = np.searchsorted(ends, np.arange(_BLOCK, ends[-1], _BLOCK), side="right")
        parts = [users << 32 | owner]
        for begin, end in pairwise((0, *cuts, len(users))):
            part = slice(begin, end)
            members = self.values.take(np_spans(starts[part], degree[part]))
            kept = np.flatnonzero(reached.take(members))
            who = np.repeat(owner[part], degree[part]).take(kept)
            parts.append(members.take(kept).astype(np.int64) << 32 | who)
        keys = np.concatenate(parts)
        keys.sort()
        member = keys >> 32
        start = np.flatnonzero(np.concatenate(([True], member[1:] != member[:-1])))
        count = np.diff(start, append=len(member)).astype(np.int32)
        return member[start], start.astype(np.int32), count, keys.astype(np.int32)


@dataclass(frozen=True, eq=False)
class FriendSampler:
    """Adds one drawn friend per user to a batch, and who is a negative of whom.

    graph: the friendships that may be drawn; every friend must have a sequence in the split.
    hops: as in `SocialGraph.exclusions`.
    profile: int64 [U], equal for users with the same discrete attributes, -1 where one is missing:
        such users are no negatives of each other. None: they are.
    """

    graph: SocialGraph
    hops: int = 2
    profile: np.ndarray | None = None

    def __post_init__(self):
        if self.hops not in HOPS:
            raise ValueError(f"hops must be one of {HOPS}, got {self.hops}")

    def pairs_at(
        self, users: np.ndarray, rng: Rng, rank: int = 0, world_size: int = 1
    ) -> tuple[np.ndarray, Pairs]:
        """(users of this rank's sequences int64 [S], their pairs) for a batch of distinct users.

        The sequences of all ranks together are the users and then the drawn friends who are not
        among them, ascending; every user has one sequence, so it is encoded once. Rank r holds
        every world_size-th one, the users first.
        """
        rows, friends = self.graph.draw_friends(users, rng)
        sequences = np.concatenate((users, np.setdiff1d(friends, users)))
        by_user = np.argsort(sequences, kind="stable")
        place = by_user[np.searchsorted(sequences, friends, sorter=by_user)]
        # Candidates stand in the order of the ranks that hold them, pairs in order within a rank.
        order = np.argsort(place % world_size, kind="stable")
        column = np.empty(len(order), dtype=np.int64)
        column[order] = np.arange(len(order))
        mine = rows % world_size == rank
        queries, candidates = users[rows[mine]], friends[order]
        values, offsets = self.graph.exclusions(queries, friends[mine], candidates, self.hops)
        remaining = len(candidates) - np.diff(offsets)
        groups = (None, None)
        if self.profile is not None:
            groups = self.profile[queries], self.profile[candidates]
            remaining = remaining - _same_profile(*groups, values, offsets)
        return sequences[rank::world_size], Pairs(
            query_rows=torch.from_numpy(rows[mine] // world_size),
            candidate_rows=torch.from_numpy(place[place % world_size == rank] // world_size),
            positive=torch.from_numpy(column[mine]),
            candidates_per_rank=tuple(np.bincount(place % world_size, minlength=world_size)),
            query_profile=None if groups[0] is None else torch.from_numpy(groups[0]),
            candidate_profile=None if groups[1] is None else torch.from_numpy(groups[1]),
            exclude=(torch.from_numpy(values), torch.from_numpy(offsets)),
            negatives=float(remaining.mean()) if len(remaining) else 0.0,
        )


def _same_profile(query, candidate, values, offsets) -> np.ndarray:
    """int64 [B]: candidates with the profile of the query that `exclude` does not list already."""
    known = np.maximum(query, 0)
    counts = np.bincount(candidate[candidate >= 0], minlength=int(known.max(initial=0)) + 1)
    row = np.repeat(np.arange(len(query)), np.diff(offsets))
    listed = np.bincount(row[candidate[values] == query[row]], minlength=len(query))
    return np.where(query >= 0, counts[known] - listed, 0)
