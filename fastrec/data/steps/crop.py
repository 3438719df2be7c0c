# SPDX-License-Identifier: Apache-2.0
"""A run of consecutive items of each sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrec.data.batch import JaggedBatch, offsets_of, spans
from fastrec.data.settings import check_choices
from fastrec.data.side import SideData
from fastrec.data.steps.share import Rounding, Share, check_share, number_of, share_at
from fastrec.random import Rng, draws


@dataclass(frozen=True)
class Crop:
    """Keep a run of floor(keep n) of the n items of a sequence, at least one, that starts anywhere
    (CL4SRec, Xie et al., 2022, section 3.2.1).

    Attributes:
        keep: share of the items, a number or one that moves with the step.
        round: "down", or "up" for ceil(keep n) (AdaptSSR).
    """

    keep: Share = 0.6
    round: Rounding = "down"

    def __post_init__(self):
        check_choices(self)
        check_share("crop.keep", self.keep)

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        start, kept = segment(batch, rng, share_at(self.keep, rng), "crop", self.round)
        offsets = offsets_of(kept)
        index = spans(batch.offsets[:-1] + start, kept, offsets)
        return batch.with_events(index, offsets, int(kept.max()) if len(kept) else 0)


def segment(
    batch: JaggedBatch, rng: Rng, share: float, site: str, rounding: Rounding = "down"
) -> tuple[Tensor, Tensor]:
    """(start, length) int64 [B] of a uniform run of `number_of` the n events; of an empty sequence
    (0, 0)."""
    lengths = batch.lengths
    kept = number_of(share, lengths, rounding).minimum(lengths)
    drawn = draws(rng, batch.keys, 0, torch.zeros_like(kept), site=site)
    return drawn * (lengths - kept + 1) >> 16, kept
