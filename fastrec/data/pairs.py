# SPDX-License-Identifier: Apache-2.0
"""Who belongs to whom among the sequences of a batch: the input of social relation detection.

Legend: B queries, C candidates, E excluded pairs.
"""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """(user, friend) pairs among the sequences of a batch.

    query_rows: int64 [B], the sequence of each query in this process's batch.
    candidate_rows: int64 [C], the sequence of each candidate of this process.
    positive: int64 [B], the candidate that is the friend of each query. With several processes it
        counts in the candidates of all of them, end to end in the order of rank.
    candidates_per_rank: number of candidates of each process; [C] with one process.
    query_profile, candidate_profile: int64 [B] and [all C], equal for users whose discrete
        attributes are the same, -1 where one is missing; None leaves such users in.
    exclude: (values int64 [E], offsets int64 [B + 1]), ascending positions of the candidates (of
        all processes) that are left out for each query.
    negatives: mean number of candidates that remain as negatives of a query.
    real: (bool [B], bool [C]), the queries and candidates that are not padding; None: all.
    """

    query_rows: Tensor
    candidate_rows: Tensor
    positive: Tensor
    candidates_per_rank: tuple[int, ...]
    query_profile: Tensor | None
    candidate_profile: Tensor | None
    exclude: tuple[Tensor, Tensor]
    negatives: float
    real: tuple[Tensor, Tensor] | None = None

    def to(self, device) -> "Pairs":
        def move(part):
            if isinstance(part, Tensor):
                return part.to(device, non_blocking=True)
            return tuple(map(move, part)) if isinstance(part, tuple) else part

        return replace(self, **{name: move(part) for name, part in vars(self).items()})
