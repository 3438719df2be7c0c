# SPDX-License-Identifier: Apache-2.0
"""One of several steps for each sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import SideData
from fastrec.random import Rng, draws


@dataclass(frozen=True)
class OneOf:
    """Each sequence takes one of `steps`, uniformly. Views whose numbers differ by less than the
    number of steps take different ones, as CL4SRec does (Xie et al., 2022, section 3.2).

    Event columns that only some of the steps make are left out.

    Attributes:
        steps: to choose from.
        independent: every view chooses for itself, and two may take the same step (AdaptSSR):
            `any_of` of a recipe.
    """

    steps: Sequence
    independent: bool = False

    def __post_init__(self):
        if len(self.steps) < 2:
            name = "any_of" if self.independent else "one_of"
            raise ValueError(f"{name} has {len(self.steps)} steps, expected at least 2")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        zero = torch.zeros_like(batch.keys)
        keys = batch.keys if self.independent else batch.sample_ids
        choice = draws(rng, keys, 0, zero, site="one_of") * len(self.steps) >> 16
        if not self.independent:
            choice = (choice + (batch.keys >> 32)) % len(self.steps)
        order = choice.argsort(stable=True)
        parts = [
            step(batch.select((choice == i).nonzero().squeeze(1)), rng, side)
            for i, step in enumerate(self.steps)
        ]
        if sum(map(len, parts)) != len(batch):
            raise ValueError("one_of: a step that adds sequences, like friend, cannot be chosen")
        made = JaggedBatch.cat(parts).select(order.argsort())
        return replace(made, pairs=batch.pairs)
