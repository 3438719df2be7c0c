# SPDX-License-Identifier: Apache-2.0
"""A run of consecutive items of each sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrec.data.batch import JaggedBatch, offsets_of, spans
from fastrec.data.side import SideData
from fastrec.random import Rng, draws


@dataclass(frozen=True)
class Crop:
    """Keep a run of floor(keep n) of the n items of a sequence, at least one, that starts anywhere
    (CL4SRec, Xie et al., 2022, section 3.2.1).

    Attributes:
        keep: share of the items.
        least: items of the shortest sequence that is cropped.
    """

    keep: float = 0.6
    least: int = 1

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise ValueError(f"crop.keep must be in (0, 1], got {self.keep}")
        if self.least < 1:
            raise ValueError(f"crop.least must be at least 1, got {self.least}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        start, kept = segment(batch, rng, self.keep, "crop")
        short = batch.lengths < self.least
        start, kept = start.masked_fill(short, 0), batch.lengths.where(short, kept)
        offsets = offsets_of(kept)
        index = spans(batch.offsets[:-1] + start, kept, offsets)
        return batch.with_events(index, offsets, int(kept.max()) if len(kept) else 0)


def segment(batch: JaggedBatch, rng: Rng, share: float, site: str) -> tuple[Tensor, Tensor]:
    """(start, length) int64 [B] of a uniform run of floor(share n) of n events, at least one; of an
    empty sequence (0, 0)."""
    lengths = batch.lengths
    # Not share * n in float32: 0.6 of 5 is 3.
    kept = (lengths.double() * share + 1e-9).floor().long().clamp_min(1).minimum(lengths)
    drawn = draws(rng, batch.keys, 0, torch.zeros_like(kept), site=site)
    return drawn * (lengths - kept + 1) >> 16, kept
