# SPDX-License-Identifier: Apache-2.0
"""One of several steps for each sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import SideData
from fastrec.data.views import extra, unwrapped
from fastrec.random import Rng, wide_draws


@dataclass(frozen=True)
class OneOf:
    """Each sequence takes one of `steps`, uniformly. Views whose numbers differ by less than the
    number of steps take different ones, as CL4SRec does (Xie et al., 2022, section 3.2), and any
    two of these as likely as two others: a user has the steps in a random order, view by view.

    A step with an attribute `least` is for sequences of at least so many events: a shorter one
    takes one of the others, as in CoSeRec (Liu et al., 2021), or of all if there is none. What
    only some of the steps make, such as targets, the other sequences lack.

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
        fits = batch.lengths.unsqueeze(1) >= self._least()  # [B, steps]
        fits |= ~fits.any(1, keepdim=True)
        keys = batch.keys if self.independent else batch.sample_ids
        number = torch.arange(len(self.steps), device="cpu")
        drawn = wide_draws(rng, keys.unsqueeze(1), number, site="one_of")
        ordered = drawn.masked_fill(~fits, 1 << 32).argsort(dim=1, stable=True)
        view = torch.zeros_like(keys) if self.independent else (batch.keys >> 32) % fits.sum(1)
        choice = ordered.gather(1, view.unsqueeze(1)).squeeze(1)
        order = choice.argsort(stable=True)
        parts = []
        for i, step in enumerate(self.steps):
            part = batch.select((choice == i).nonzero().squeeze(1))
            if (room := side.shard.max_len) is not None:  # what others need more is not for it
                part = part.last(room - extra(self.steps) + extra([step]))
            parts.append(step(part, rng, side))
        if sum(map(len, parts)) != len(batch):
            raise ValueError("one_of: a step that adds sequences, like friend, cannot be chosen")
        made = JaggedBatch.cat(parts).select(order.argsort())
        return replace(made, pairs=batch.pairs)

    def _least(self) -> Tensor:
        least = [getattr(unwrapped(step), "least", 0) for step in self.steps]
        return torch.tensor(least, device="cpu")
