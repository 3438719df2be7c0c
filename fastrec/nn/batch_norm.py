# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation over the users of all processes. Legend: B users of this process, D width."""

import torch
from torch import Tensor, nn

from fastrec.ops.common.arguments import accumulate_dtype


class BatchNorm(nn.Module):
    """(x - E x) / sqrt(Var x + eps) * weight + bias of each feature (Ioffe and Szegedy, 2015).

    In training, E and Var are those of the users of a step on all processes, on any device: torch's
    SyncBatchNorm is for CUDA alone. Padding has no part in them. `running_mean` and `running_var`,
    unbiased, are averages of them over the calls, as in torch.nn.BatchNorm1d, and what is used in
    evaluation.

    Raises ValueError in training for fewer than 2 users, whose variance is none; on a GPU, where
    the host does not know how many are no padding, a device assertion fails.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", self.bias.detach().clone())
        self.register_buffer("running_var", self.weight.detach().clone())

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """[B, D] to [B, D], float32 also from 16-bit numbers. real: bool [B], who is no padding."""
        x = x.to(accumulate_dtype(x))
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self._statistics(x, real)
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias

    def _statistics(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [D] of the users of all processes."""
        kept = x.new_ones(len(x), 1) if real is None else real.unsqueeze(1).to(x.dtype)
        several = torch.distributed.is_initialized()
        sums = torch.cat([(x * kept).sum(0), kept.sum(0)])
        sums = _summed(sums) if several else sums
        count = sums[-1].detach()
        self._check(count, len(x) if real is None and not several else None)
        mean = sums[:-1] / count
        squares = ((x - mean) * kept).square().sum(0)
        var = (_summed(squares) if several else squares) / count
        with torch.no_grad():
            unbiased = var * (count / (count - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, var

    def _check(self, count: Tensor, known: int | None) -> None:
        said = "batch normalisation needs at least 2 users a step"
        if known is None and count.device.type == "cpu" and not torch.compiler.is_compiling():
            known = int(count)
        if known is None:
            torch._assert_async(count > 1, said)
        elif known < 2:
            raise ValueError(f"{said}, got {known}: choose another batch_size")


def _summed(tensor: Tensor) -> Tensor:
    from fastrec.ops.common.collectives import process_group, summed_over

    return summed_over(tensor, process_group(torch.distributed.group.WORLD))
