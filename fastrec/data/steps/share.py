# SPDX-License-Identifier: Apache-2.0
"""A share of the items of a sequence: how much it is at a step, and how many items that are."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastrec.random import Rng

Rounding = Literal["down", "up"]


@dataclass(frozen=True)
class Schedule:
    """A share that moves in a line from `start` to `end` in the first `steps` steps of a stage, and
    stays there: views become harder as training goes on (a curriculum, as in CCL).

    Attributes:
        start, end: shares.
        steps: optimiser steps.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.start == self.end:
            raise ValueError(f"start and end are both {self.end}: such a share is a number")


Share = float | Schedule


def share_at(share: Share, rng: Rng) -> float:
    """The share at the step of `rng`, which is on the host like all steps of views."""
    if not isinstance(share, Schedule):
        return share
    done = min(1.0, int(rng.step) / share.steps)
    return share.start + (share.end - share.start) * done


def check_share(name: str, share: Share, zero: bool = False) -> None:
    """Raise ValueError for a share, or an end of one that moves, that is not in (0, 1], or with
    `zero` in [0, 1]."""
    ends = (share.start, share.end) if isinstance(share, Schedule) else (share,)
    for end in ends:
        if not (0 < end <= 1 or (zero and end == 0)):
            raise ValueError(f"{name} must be in {'[' if zero else '('}0, 1], got {end}")


def number_of(share: float, counts: Tensor, rounding: Rounding = "down") -> Tensor:
    """int64 [B]: floor(share n) or ceil(share n) of the counts n, int64 [B], but at least one."""
    # Not share * n in float32: 0.6 of 5 is 3.
    exact = counts.double() * share
    number = (exact + 1e-9).floor() if rounding == "down" else (exact - 1e-9).ceil()
    return number.long().clamp_min(1)
