# SPDX-License-Identifier: Apache-2.0
"""A run of items, and what is around it: the two views of segment prediction."""

from dataclasses import dataclass, replace

import torch

from fastrec.data.batch import FILL, JaggedBatch
from fastrec.data.side import SideData
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
        if not 0 < self.share <= 1:
            raise ValueError(f"segment.share must be in (0, 1], got {self.share}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        lengths, owner = batch.lengths, batch.segment_ids()
        most = (lengths.double() * self.share + 1e-9).floor().long().clamp_min(1)
        size, place = (
            draws(rng, batch.sample_ids, row, torch.zeros_like(lengths), site="segment")
            for row in (0, 1)
        )
        size = (1 + (size * most >> 16)).minimum(lengths)
        start = place * (lengths - size + 1) >> 16
        position = batch.positions()
        inside = (position >= start[owner]) & (position < (start + size)[owner])
        hidden = inside != self.keep
        events = dict(batch.events)
        if "rating" in events:
            events["rating"] = events["rating"].masked_fill(hidden, FILL["rating"])
        return replace(batch, values=batch.values.masked_fill(hidden, side.mask_id), events=events)
