# SPDX-License-Identifier: Apache-2.0
"""How many items of a sequence a share of them is."""

from typing import Literal

from torch import Tensor

Rounding = Literal["down", "up"]


def number_of(share: float, counts: Tensor, rounding: Rounding = "down") -> Tensor:
    """int64 [B]: floor(share n) or ceil(share n) of the counts n, int64 [B], but at least one."""
    # Not share * n in float32: 0.6 of 5 is 3.
    exact = counts.double() * share
    number = (exact + 1e-9).floor() if rounding == "down" else (exact - 1e-9).ceil()
    return number.long().clamp_min(1)
