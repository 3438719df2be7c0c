# SPDX-License-Identifier: Apache-2.0
"""Segment prediction of S3-Rec (Zhou et al., 2020, section 4.2.4): the state of a sequence without
a run of items is near that of the run.

Legend: B users, D width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastrec.data.settings import check_fields, check_pair
from fastrec.data.side import SideData
from fastrec.nn.init import init_bert
from fastrec.nn.pool import Encoded, Pool, Pooling, real_in
from fastrec.objectives.bpr import pairwise
from fastrec.objectives.contrast import partner_loss
from fastrec.random import Rng


@dataclass(frozen=True)
class Segments:
    """The run that a sequence lacks, among the runs of other users.

    Attributes:
        views: the sequences without their runs (`segment: {}`), and the runs (`segment: {keep:
            true}`).
        weight: in the joint loss.
        pool: the vector of a sequence.
        negatives: "batch": the softmax over the runs of all users of a step, the bound of the
            paper; "next": one, the run of the next user of the process, as in the authors' program,
            whose one negative is a slice of all users' items.
        squash: of "next", sigmoid(s) in the place of a score s, as in the authors' program.
    """

    views: list[str]
    weight: float = 1.0
    pool: Pooling = "last"
    negatives: Literal["batch", "next"] = "batch"
    squash: bool = False

    def __post_init__(self):
        check_fields(self)
        check_pair("segments", self.views)
        if self.squash and self.negatives != "next":
            raise ValueError("segments.squash has no effect on the softmax of negatives: batch")

    def build(self, model, side: SideData) -> "SegmentPrediction":
        model.check_pool(self.pool)
        return SegmentPrediction(self, model.config.width)


class SegmentPrediction(nn.Module):
    """With a_i the vector of sequence i without its run, c_i that of the run and s_ij = W a_i . c_j
    the mean over the users of

        -log exp(s_ii) / sum over j of exp(s_ij)    or, with the next user j,
        -log sigmoid(s_ii - s_ij)

    (eq. 9). Runs of the same user are no negatives of each other.
    """

    backend: str | None = None
    tells_apart = True

    def __init__(self, settings: Segments, width: int):
        super().__init__()
        self.settings = settings
        self.pool = Pool(settings.pool, width)
        self.linear = init_bert(nn.Linear(width, width))

    def forward(self, model, rng: Rng, context: Encoded, run: Encoded) -> dict[str, tuple]:
        """{"segments": (loss, number of users)}; 0 for a user alone."""
        a, c = self.linear(self.pool(model, context)), self.pool(model, run)
        return {"segments": self.loss(a, c, context.batch.sample_ids, real_in(context, run))}

    def loss(
        self, query: Tensor, run: Tensor, ids: Tensor, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor | int]:
        """(loss, number of users) from vectors [B, D]; ids: int64 [B], of the users; real: bool
        [B], who is not padding."""
        if self.settings.negatives == "next":
            return self._next(query, run, ids, real)
        return partner_loss(
            query, run, real, query_group=ids, candidate_group=ids, backend=self.backend
        )

    def _next(self, query, run, ids, real) -> tuple[Tensor, Tensor]:
        there = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        order = (~there).sort(stable=True).indices  # those that count come first
        place = there.cumsum(0)  # of the next one among them
        after = order[torch.where(place < there.sum(), place, 0)]
        pair = there & (ids[after] != ids)
        own = (query * run).sum(1).float()
        other = (query * run.index_select(0, after)).sum(1).float()
        return pairwise(own, other, pair, self.settings.squash)
