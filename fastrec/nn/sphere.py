# SPDX-License-Identifier: Apache-2.0
"""How vectors lie on the unit sphere: alignment and uniformity (Wang and Isola, 2020), std.

Legend: B users, D width.
"""

import torch
from torch import Tensor

from fastrec.ops.in_batch_cross_entropy import in_batch_cross_entropy


def alignment(a: Tensor, b: Tensor, real: Tensor | None = None) -> Tensor:
    """A scalar: E |a_i - b_i|^2 over the users, from 0, both views equal, to 4.

    a, b: [B, D] of length 1. real: bool [B], who is not padding.
    """
    return _mean((a - b).square().sum(1), real)


def left_out(who: Tensor) -> Tensor:
    """float32 like `who`, bool: a bias of candidates that leaves those out. Not -inf: their own
    losses, which are multiplied by 0, would be infinite."""
    return torch.zeros_like(who, dtype=torch.float32).masked_fill(who, -1e9)


def uniformity(z: Tensor, real: Tensor | None = None, backend: str | None = None) -> Tensor:
    """A scalar: log E exp(-2 |z_i - z_j|^2) over all pairs of different users, from 0, all vectors
    are one, down to about -4, spread over the sphere. Below 2 users it means nothing.

    z: [B, D] of length 1. real: bool [B], who is not padding. backend: of the op.
    """
    # |z_i - z_j|^2 = 2 - 2 z_i.z_j. With user i itself as the positive, whose score is 4, the
    # cross-entropy of the scores 4 z_i.z_j is log(1 + sum over j != i of exp(4 z_i.z_j - 4)).
    bias = None if real is None else left_out(~real)
    rows = in_batch_cross_entropy(
        z, z, temperature=0.25, candidate_bias=bias, reduction="none", backend=backend
    )
    mean = _mean(rows.expm1(), real)
    mean = mean / (max(len(z) - 1, 1) if real is None else (real.sum() - 1).clamp_min(1))
    return mean.clamp_min(torch.finfo(z.dtype).tiny).log()


def feature_std(z: Tensor, real: Tensor | None = None) -> Tensor:
    """A scalar: the standard deviation over the users of a feature of z, the mean over features:
    near D^-0.5 on a sphere that is filled, 0 where all vectors are one (Chen and He, 2021, fig. 2).

    z: [B, D] of length 1. real: bool [B], who is not padding.
    """
    center = _mean(z, real)
    return _mean((z - center).square(), real).sqrt().mean()


def _mean(rows: Tensor, real: Tensor | None) -> Tensor:
    """The mean over the first dimension, 0 of nothing."""
    if real is None:
        return rows.sum(0) / max(len(rows), 1)
    kept = real.view(-1, *[1] * (rows.dim() - 1))
    return torch.where(kept, rows, 0.0).sum(0) / real.sum().clamp_min(1)
