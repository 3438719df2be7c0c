# SPDX-License-Identifier: Apache-2.0
"""What a judge is, and what is known of each by its name: the words of `Stage.judge`.

How a judge is made for validation is in `training.stage_data`, what `fastrec evaluate` prints of it
in `training.evaluate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

JudgeName = Literal[
    "next_item", "attributes", "friends", "vectors", "cold_start", "rating", "texts", "click"
]


class Judge(Protocol):
    """Asks a model about its rows, mostly a user each, a slice at a time."""

    @property
    def metric_names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def score(self, model, objective, rows: slice, /) -> Tensor:
        """A tensor whose first dimension is that of a slice of the rows, on the CPU."""

    def metrics(self, scores: Tensor, objective, /) -> dict[str, float]:
        """Numbers by name, from the scores of all rows."""


@dataclass(frozen=True)
class JudgeKind:
    """What settings and commands ask of a judge before there is one.

    Attributes:
        monitor: validation metric that chooses a model where the stage names none.
        errors: metrics that are the better the smaller they are: they choose no model.
        next_item: asks for the next of all items, and reads no parameters of objectives.
        ranks_items: reads how items are ranked, `evaluation.protocol.Protocol`.
        held_out: asks about users whom no training saw; validation asks a tenth of the others.
        rows: asks rows of its own in the place of users.
        side_file: that it reads beside the events.
    """

    monitor: str
    errors: tuple[str, ...] = ()
    next_item: bool = False
    ranks_items: bool = False
    held_out: bool = False
    rows: bool = False
    side_file: str | None = None


JUDGES: dict[str, JudgeKind] = {
    "next_item": JudgeKind("NDCG@10", next_item=True, ranks_items=True),
    "texts": JudgeKind("NDCG@10", next_item=True, ranks_items=True),
    "click": JudgeKind("AUC", ranks_items=True),
    "rating": JudgeKind("score", errors=("RMSE", "MAE")),
    "vectors": JudgeKind("MRR"),
    "cold_start": JudgeKind("MRR@10", rows=True),
    "attributes": JudgeKind("score", held_out=True, side_file="users.parquet"),
    "friends": JudgeKind("accuracy", held_out=True, side_file="relations.parquet"),
}
