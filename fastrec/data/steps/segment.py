# SPDX-License-Identifier: Apache-2.0
"""A run of items, and what is around it: the two views of segment prediction."""

from dataclasses import dataclass

import torch

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import SideData
from fastrec.data.steps.crop import within
from fastrec.data.steps.share import check_share, number_of
from fastrec.random import Rng, draws


@dataclass(frozen=True)
class Segment:
    """Put [MASK] in the place of a run of items, or of all others (S3-Rec, Zhou et al., 2020,
    section 4.2.4). The sequence keeps its length.

    The run has 1 to floor(share n) of the n items, uniformly, at least one, and starts anywhere. It
    is a function of (seed, step, sample id), not of the view: a view with the run and one without
    it speak of the same run, where what stands before this step leaves both as long.

    Attributes:
        keep: the run stays and the others are masked; otherwise the run is masked.
        share: of the items, the longest run.
    """

    keep: bool = False
    share: float = 0.5

    def __post_init__(self):
        check_share("segment.share", self.share)

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        lengths = batch.lengths
        most = number_of(self.share, lengths)
        size, place = (
            draws(rng, batch.sample_ids, row, torch.zeros_like(lengths), site="segment")
            for row in (0, 1)
        )
        size = (1 + (size * most >> 16)).minimum(lengths)
        start = place * (lengths - size + 1) >> 16
        hidden = within(batch, start, size) != self.keep
        return batch.with_items(batch.values.masked_fill(hidden, side.mask_id), hidden)
