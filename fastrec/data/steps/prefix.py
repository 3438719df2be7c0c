# SPDX-License-Identifier: Apache-2.0
"""The oldest events of each sequence, up to a drawn one."""

from dataclasses import dataclass

import torch

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import SideData
from fastrec.random import Rng, draws


@dataclass(frozen=True)
class Prefix:
    """Keep the first k of the n events of a sequence, k uniform in 1 .. n. Over the steps every
    prefix of a user is a sequence, as in the pre-training of S3-Rec's program (Zhou et al., 2020).

    k is a function of (seed, step, sample id), not of the view: the views of a step have the same
    prefix of a user. (Where a sequence is longer than the model reads, views that keep another
    number of its events begin elsewhere.)
    """

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        lengths = batch.lengths
        zero = torch.zeros_like(lengths)
        drawn = draws(rng, batch.sample_ids, 0, zero, site="prefix")
        return batch.runs(zero, (1 + (drawn * lengths >> 16)).minimum(lengths))
