# SPDX-License-Identifier: Apache-2.0
"""The dropout arguments of an op: what its kernels need to draw the mask of `random.keep_mask`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrec.ops.common.arguments import check_index, check_number
from fastrec.random import SITES, Rng, check_positions, site_number, threshold

SCHEMA = "Tensor? keys, Tensor? positions, Tensor? rng, int drop, int site, int layer"


class Mask(NamedTuple):
    """`SCHEMA` as a value; without dropout as it is by default.

    keys: int64, one per row or sequence.
    positions: int64, one per row; None where a kernel counts the events of a sequence itself.
    rng: int64 [2], seed and step.
    drop: an element is dropped where its 8-bit draw is below.
    site, layer: numbers of the contract.
    """

    keys: Tensor | None = None
    positions: Tensor | None = None
    rng: Tensor | None = None
    drop: int = 0
    site: int = 0
    layer: int = 0

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What autograd saves; `numbers` is the rest, and Mask(*tensors, *numbers) the whole."""
        return self.keys, self.positions, self.rng

    @property
    def options(self) -> dict[str, Any]:
        """As arguments of a reference; none where p rounds to 0, and rng may be missing."""
        if not self.drop:
            return {}
        assert self.rng is not None
        names = {number: name for name, number in SITES.items()}
        site = names.get(self.site, self.site)
        options = dict(dropout_p=self.drop / 256, rng=Rng(*self.rng), site=site, layer=self.layer)
        return options | dict(keys=self.keys, positions=self.positions)

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.drop, self.site, self.layer


def mask_of_sequences(
    rng: Rng | None,
    p: float,
    keys: Tensor | None,
    count: int,
    device: torch.device,
    *,
    site: str | int,
    layer: int,
) -> Mask:
    """The mask of `count` sequences of tensors on `device`; none where p rounds to 0. ValueError or
    TypeError for a wrong argument."""
    number = site_number(site)
    check_number("dropout_p", p)
    drop = threshold(p, 8, "dropout_p")
    if drop == 256:
        raise ValueError(f"dropout_p {p} leaves nothing to keep")
    if drop == 0:
        return Mask()
    if rng is None or keys is None:
        raise ValueError("dropout_p > 0 needs rng and keys: the mask is a function of them")
    if not isinstance(rng, Rng):
        raise TypeError(f"rng must be a fastrec.random.Rng, got {type(rng).__name__}")
    keys = check_index("keys", keys, (count,), device)
    check_number("layer", layer, whole=True)
    if not 0 <= layer < 256:
        raise ValueError(f"layer must be in [0, 256), got {layer}")
    return Mask(keys, None, rng.key(device), drop, number, layer)


def mask_of_rows(
    rng: Rng | None,
    p: float,
    keys: Tensor | None,
    positions: Tensor | None,
    rows: int,
    device: torch.device,
    *,
    site: str | int,
    layer: int,
) -> Mask:
    """The same for rows [rows, D], each with the key of its sequence and its position there."""
    mask = mask_of_sequences(rng, p, keys, rows, device, site=site, layer=layer)
    if not mask.drop:
        return mask
    if positions is None:
        raise ValueError("dropout_p > 0 needs positions: the mask is a function of them")
    positions = check_index("positions", positions, (rows,), device)
    check_positions("positions", positions)
    return mask._replace(positions=positions)
