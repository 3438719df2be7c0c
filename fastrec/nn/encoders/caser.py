# SPDX-License-Identifier: Apache-2.0
"""Convolutional encoder on jagged sequences: Caser (Tang and Wang, 2018), any length.

The state of an event is a function of a window, the last L items of its sequence, with zeros before
the first one. An item meets each row of each filter once, in one product for all events, and not
once in every window that it is in; what is left are sums and maxima of shifted rows. L - 1 rows of
zeros before each sequence keep windows inside of it: nothing is padded to the longest one.

Legend: T events of a batch, B sequences, R = T + B (L - 1) + L rows, S = R - L + 1 windows of L
rows, D width, F filters of a height or vertical ones.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import JaggedBatch
from fastrec.data.settings import check_fields
from fastrec.nn.encoders.sublayers import EventDropout
from fastrec.nn.items import ItemRows
from fastrec.nn.plain import apply_linear
from fastrec.ops.common.arguments import without_autocast
from fastrec.ops.jagged_embedding import jagged_embedding
from fastrec.ops.linear import linear
from fastrec.random import Rng

MOST_ROWS = 64  # of a window: the work grows with its square


@dataclass(frozen=True)
class Caser:
    """Horizontal and vertical filters over a window of the latest items: Caser.

    Attributes:
        window: L, the items that a state sees.
        horizontal: filters of each height from 1 to L; the largest value of each over the window
            counts.
        vertical: filters of one column: weighted sums of the items of the window.
    """

    window: int = 5
    horizontal: int = 16
    vertical: int = 4
    causal: ClassVar[bool] = True

    def __post_init__(self):
        check_fields(self)
        for name in ("window", "horizontal", "vertical"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.window > MOST_ROWS:
            raise ValueError(f"window must be at most {MOST_ROWS}, got {self.window}")

    def num_parameters(self, width: int, max_positions: int) -> int:
        """How many numbers the encoder has."""
        length = self.window
        rows = length * (length + 1) // 2 * width  # of one filter of each height
        filters = self.horizontal * (rows + length) + self.vertical * (length + 1)
        return filters + (self.features(width) + 1) * width

    def features(self, width: int) -> int:
        """How many numbers the filters make of a window."""
        return self.horizontal * self.window + self.vertical * width

    def build(self, width: int, max_positions: int, dropout: float) -> "CaserEncoder":
        if self.window > max_positions:
            raise ValueError(
                f"window is {self.window}, the model reads {max_positions} events: filters would"
                " see nothing but zeros there"
            )
        return CaserEncoder(self, width, dropout)


class _Largest(torch.autograd.Function):
    """[S, L F]: the largest value of the filters of each height in every window.

    products [R, (L + .. + 1) F]: of each row of items with a row of the filters: first the lowest
    row of the filters of the heights 1 to L, then the row above it of those of the heights 2 to L,
    and so on. The value of a filter stands at its lowest row; of equal ones the first counts.
    """

    @staticmethod
    def forward(ctx, products, length, number):
        wide = torch.float32 if products.dtype.itemsize < 4 else products.dtype
        parts = products.split([(length - back) * number for back in range(length)], 1)
        sums = parts[0].to(wide, copy=True)
        for back in range(1, length):
            sums[back:, back * number :] += parts[back][:-back]
        top = sums[length - 1 :].clone()
        found = torch.zeros_like(top, dtype=torch.uint8)  # how many rows above the last one
        for back in range(1, length):
            columns = slice((length - back) * number)
            others = sums[length - 1 - back : -back, columns]
            larger = (others >= top[:, columns]).to(torch.uint8)
            found[:, columns] = torch.maximum(found[:, columns], larger * back)
            top[:, columns] = torch.maximum(top[:, columns], others)
        ctx.save_for_backward(found)
        ctx.length, ctx.number, ctx.dtype = length, number, products.dtype
        return top

    @staticmethod
    def backward(ctx, grad):
        (found,), length, number = ctx.saved_tensors, ctx.length, ctx.number
        windows = len(grad)
        sums = grad.new_zeros(windows + length - 1, grad.shape[1])
        for back in range(length):
            columns, first = slice((length - back) * number), length - 1 - back
            sums[first : first + windows, columns] += grad[:, columns] * (found[:, columns] == back)
        parts = [F.pad(sums[b:, b * number :], (0, 0, 0, b)) for b in range(length)]
        return torch.cat(parts, 1).to(ctx.dtype), None, None


class _Columns(torch.autograd.Function):
    """[S, F, D]: weight [F, L] times every window [L, D] of rows [R, D], which is a view of them
    forward and backward."""

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows, weight)
        return _of_each(weight, _windows(rows, weight.shape[1]))

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        each, length = _of_each(weight.T, grad), weight.shape[1]  # [S, L, D]
        grad_rows = torch.zeros_like(rows)
        for row in range(length):
            grad_rows[row : row + len(grad)] += each[:, row]
        with without_autocast(grad.device):
            return grad_rows, torch.bmm(grad, _windows(rows, length).mT).sum(0)


def _of_each(weight: Tensor, x: Tensor) -> Tensor:
    with without_autocast(x.device):  # which would store the windows, rounded
        return torch.bmm(weight.expand(x.shape[0], -1, -1), x)


def _windows(rows: Tensor, length: int) -> Tensor:
    return rows.unfold(0, length, 1).mT


class Filters(nn.Module):
    """`weight` [F, *shape] and `bias` [F] of a `torch.nn.Conv2d` of one channel, which start as
    its own do: its weight has a dimension of 1 after the first."""

    def __init__(self, number: int, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(number, *shape))
        self.bias = nn.Parameter(torch.empty(number))
        bound = self.weight[0].numel() ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Weight and bias: called, so that hooks and parametrisations act."""
        return self.weight, self.bias


class CaserEncoder(nn.Module):
    """ReLU(W [o_h; o_v] + b) of every event (sections 3.2 and 3.3 of the paper): o_h the horizontal
    filters, ReLU and the maximum over the window, o_v the vertical ones. Jagged in and out.

    Args:
        settings: of the filters.
        width: D.
        dropout: probability on [o_h; o_v], applied only where `forward` receives an `rng`.
    """

    def __init__(self, settings: Caser, width: int, dropout: float):
        super().__init__()
        self.window, self.dropout = settings.window, dropout
        self.horizontal = nn.ModuleList(
            Filters(settings.horizontal, height, width) for height in range(1, self.window + 1)
        )
        self.vertical = Filters(settings.vertical, self.window, 1)
        self.output = nn.Linear(settings.features(width), width)

    def forward(self, embedded: ItemRows, batch: JaggedBatch, rng: Rng | None = None) -> Tensor:
        """[T, D] states of the events. `rng` turns dropout on and is its key."""
        x = jagged_embedding(embedded.values, embedded.table, sparse=embedded.sparse)
        before = self.window - 1
        window = torch.arange(x.shape[0], device=x.device) + before * batch.segment_ids()
        # Two windows more than events: torch.export keeps no program for zero or one.
        rows = x.new_zeros(x.shape[0] + before * batch.keys.shape[0] + self.window + 1, x.shape[1])
        rows = rows.index_copy(0, window + before, x)
        features = torch.cat([self.largest(rows), self.columns(rows)], 1)
        dropout = EventDropout(batch, self.dropout, rng)
        features = dropout(features.index_select(0, window), "ffn_inner", 0)
        return F.relu(apply_linear(self.output, features))

    def largest(self, rows: Tensor) -> Tensor:
        """[S, L F]: o_h of each window of rows [R, D]."""
        weights, biases = zip(*(filters() for filters in self.horizontal), strict=True)
        weight = torch.cat(
            [each[:, -1 - back] for back in range(self.window) for each in weights[back:]]
        )
        bias = torch.cat(biases)
        top = _Largest.apply(linear(rows, weight), self.window, len(bias) // self.window)
        # The bias and the ReLU change no maximum's place; sums of 16-bit products are float32.
        return F.relu(top + bias).to(rows.dtype)

    def columns(self, rows: Tensor) -> Tensor:
        """[S, F D]: o_v of each window of rows [R, D], filter by filter."""
        weight, bias = self.vertical()
        return (_Columns.apply(rows, weight.squeeze(2)) + bias[:, None]).flatten(1)
