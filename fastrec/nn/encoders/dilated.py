# SPDX-License-Identifier: Apache-2.0
"""Dilated convolutions on jagged sequences: NextItNet (Yuan et al., 2019), the encoder of PeterRec.

A convolution is one product: the K events that an event sees are laid side by side, [T, K D], those
outside of its sequence as zeros. No sequence is padded, and none sees into another.

Legend: T events of a batch, D width, K taps of a convolution.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import JaggedBatch
from fastrec.data.settings import check_fields
from fastrec.nn.encoders.sublayers import (
    EventDropout,
    PatchForm,
    check_patch,
    join,
    patched,
    patches_of,
)
from fastrec.nn.items import ItemRows
from fastrec.nn.plain import apply_linear
from fastrec.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastrec.ops.jagged_embedding import jagged_embedding
from fastrec.random import Rng

MOST_BLOCKS = 500


@dataclass(frozen=True)
class Dilated:
    """Residual blocks of two dilated convolutions.

    Attributes:
        dilations: of the first convolution of each block; the second one has twice as much. An
            event sees 3 (kernel - 1) times their sum back, and itself.
        kernel: taps of a convolution.
        causal: an event sees itself and earlier ones; otherwise as many on both sides, for which
            `kernel` is odd.
        norm_eps: added to the variance in the LayerNorms.
        patch: width of a bottleneck at each convolution, 0 for none: what is trained beside a
            frozen encoder (PeterRec, Yuan et al., 2020, section 3.3).
        patch_form: "serial", behind the convolution, or "parallel", of its input and added to what
            it gives, the input itself too.
    """

    dilations: list[int] = field(default_factory=lambda: [1, 4, 1, 4])
    kernel: int = 3
    causal: bool = True
    norm_eps: float = 1e-5
    patch: int = 0
    patch_form: PatchForm = "serial"

    def __post_init__(self):
        check_fields(self)
        if not 1 <= len(self.dilations) <= MOST_BLOCKS:
            raise ValueError(
                f"dilations must be 1 to {MOST_BLOCKS} numbers, got {len(self.dilations)}"
            )
        if not all(1 <= dilation <= 1_000_000 for dilation in self.dilations):
            raise ValueError(f"dilations must be in [1, 1000000], got {self.dilations}")
        if not 1 <= self.kernel <= 1000:
            raise ValueError(f"kernel must be in [1, 1000], got {self.kernel}")
        if not self.causal and self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd where causal is false, got {self.kernel}")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be positive and finite, got {self.norm_eps}")
        check_patch(self.patch, self.patch_form)

    def num_parameters(self, width: int, max_positions: int) -> int:
        """How many numbers the encoder has."""
        layer = self.kernel * width * width + 3 * width
        if self.patch:
            layer += 2 * width * self.patch + self.patch + width
        return 2 * len(self.dilations) * layer

    def build(self, width: int, max_positions: int, dropout: float) -> "DilatedEncoder":
        return DilatedEncoder(self, width, dropout)


class _Taps(torch.autograd.Function):
    """[T, K D]: the rows of x [T, D] at `seen` [T, K], 0 where that is T. `seen_by` [T, K] are the
    places in [T K] that a row went to, T K for none: forward and backward are gathers."""

    @staticmethod
    def forward(ctx, x, seen, seen_by):
        ctx.save_for_backward(seen, seen_by)
        return _rows_or_zero(x, seen).flatten(1)

    @staticmethod
    def backward(ctx, grad):
        seen, seen_by = ctx.saved_tensors
        grads = grad.reshape(seen.numel(), grad.shape[1] // seen.shape[1])
        return _rows_or_zero(grads, seen_by).sum(1), None, None


def _rows_or_zero(x: Tensor, at: Tensor) -> Tensor:
    rows = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return rows.index_select(0, at.flatten()).view(*at.shape, x.shape[1])


class Places:
    """Which events of a batch a convolution sees, found once for all convolutions alike."""

    def __init__(self, batch: JaggedBatch, positions: Tensor):
        self.before = positions
        self.after = batch.lengths[batch.segment_ids()] - 1 - positions
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def taps(self, x: Tensor, back: tuple[int, ...]) -> Tensor:
        """[T, K D]: side by side what stands `back` places before an event, 0 for nothing."""
        if back not in self.known:
            steps = torch.tensor(back, device=x.device)
            self.known[back] = self._shifted(steps), self._shifted(-steps, spread=True)
        return _Taps.apply(x, *self.known[back])

    def _shifted(self, back: Tensor, spread: bool = False) -> Tensor:
        events, taps = self.before.shape[0], len(back)
        event = torch.arange(events, device=back.device)[:, None] - back
        inside = (back <= self.before[:, None]) & (-back <= self.after[:, None])
        if spread:
            event, events = event * taps + torch.arange(taps, device=back.device), events * taps
        return torch.where(inside, event, events)


class DilatedConvolution(nn.Module):
    """`torch.nn.Conv1d` of each sequence: its weight [D, D, K] is weight.view(D, K, D) of `taps`
    with the last two dimensions exchanged, the earliest tap first."""

    def __init__(self, width: int, kernel: int, dilation: int, causal: bool):
        super().__init__()
        self.taps = nn.Linear(kernel * width, width)
        last = 0 if causal else -(kernel // 2) * dilation
        self.back = tuple(last + (kernel - 1 - tap) * dilation for tap in range(kernel))

    def forward(self, x: Tensor, places: Places) -> Tensor:
        return apply_linear(self.taps, places.taps(x, self.back))


class DilatedBlock(nn.Module):
    """x + f(x), f: twice convolution, LayerNorm, ReLU."""

    def __init__(self, settings: Dilated, width: int, dilation: int):
        super().__init__()
        self.convolutions = nn.ModuleList(
            DilatedConvolution(width, settings.kernel, times * dilation, settings.causal)
            for times in (1, 2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width, settings.norm_eps) for _ in range(2))
        self.patches = patches_of(width, settings.patch, settings.patch_form)

    @property
    def second_norm(self) -> nn.Module:
        """What `init.second_norm` trains."""
        return self.norms[1]

    def forward(self, x: Tensor, places: Places, dropout: dict) -> Tensor:
        out = x
        for index, (convolution, norm) in enumerate(
            zip(self.convolutions, self.norms, strict=True)
        ):
            out = patched(self.patches, index, out, convolution(out, places))
            out = F.relu(join(out, None, norm, {}).output)
        return dropout_add_layer_norm(out, x, None, None, **dropout).sum


class DilatedEncoder(nn.Module):
    """Blocks of dilated convolutions over the item vectors, jagged in and out, any length.

    Args:
        settings: of the blocks.
        width: D.
        dropout: probability on the item vectors and on what a block adds, applied only where
            `forward` receives an `rng`.
    """

    def __init__(self, settings: Dilated, width: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.blocks = nn.ModuleList(
            DilatedBlock(settings, width, dilation) for dilation in settings.dilations
        )

    def forward(self, embedded: ItemRows, batch: JaggedBatch, rng: Rng | None = None) -> Tensor:
        """[T, D] states of the events. `rng` turns dropout on and is its key."""
        dropout = EventDropout(batch, self.dropout, rng)
        places = Places(batch, dropout.positions)
        x = jagged_embedding(
            embedded.values, embedded.table, sparse=embedded.sparse, **dropout.at("embedding")
        )
        for index, block in enumerate(self.blocks):
            x = block(x, places, dropout.at("ffn_output", index))
        return x
