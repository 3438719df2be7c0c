# SPDX-License-Identifier: Apache-2.0
"""Factorization machines over a bag of behaviours, in jagged form (NFM, DeepFM).

Legend: B sequences, T events, D width.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import JaggedBatch
from fastrec.data.settings import check_fields
from fastrec.nn.encoders.mlp import check_widths, dropped, layers_of, numbers_of
from fastrec.nn.items import ItemRows
from fastrec.nn.plain import apply_linear
from fastrec.nn.pool import weighted_sum
from fastrec.random import Rng


@dataclass(frozen=True)
class Fm:
    """The items of a user without their order, as features of value 1: v their vectors,
    f = ((sum v)^2 - sum v^2) / 2 the sum of the products of all pairs, feature by feature. Special
    tokens, [MASK] among them, are no features.

    Attributes:
        hidden: widths of the layers with ReLU in front of the last one, whose width is D.
        deep: what they read: "interactions", f (NFM, He and Chua, 2017, eq. 3 and 4), or "items",
            the mean of v, beside a linear map of f (DeepFM, Guo et al., 2017, eq. 1 to 4).
    """

    hidden: list[int] = field(default_factory=lambda: [64])
    deep: Literal["interactions", "items"] = "interactions"
    causal: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        check_widths(self.hidden)

    def num_parameters(self, width: int, max_positions: int) -> int:
        """How many numbers the encoder has."""
        linear = width * width * (1 + (self.deep == "items"))
        return linear + 2 * width + numbers_of([width, *self.hidden, width])

    def build(self, width: int, max_positions: int, dropout: float) -> "FmEncoder":
        return FmEncoder(self, width, dropout)


class FmEncoder(nn.Module):
    """The state of every event is the vector of its user,

        A sum v + MLP(LN(f))                 interactions
        A sum v + C LN(f) + MLP(mean v)      items

    A head on it gives class c the score w_c of the state + b_c. So w_0 is b_c, and the first-order
    weight of item i is w_c A v_i: a table of its own would be V x classes, and V x V for next
    items. The LayerNorm stands where NFM has a batch normalisation: f grows with the square of the
    number of items.

    Args:
        settings: of the layers.
        width: D.
        dropout: probability on what the layers read, applied only where `forward` receives an
            `rng`.
    """

    def __init__(self, settings: Fm, width: int, dropout: float):
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        deep = settings.deep == "items"
        self.second = nn.Linear(width, width, bias=False) if deep else None
        self.layers = layers_of([width, *settings.hidden, width])
        self.dropout = dropout

    def forward(self, embedded: ItemRows, batch: JaggedBatch, rng: Rng | None = None) -> Tensor:
        """[T, D] states of the events. `rng` turns dropout on and is its key."""
        x = embedded.dense()
        real = torch.ones_like(batch.values, dtype=x.dtype)
        if embedded.num_items is not None:
            real = (batch.values < embedded.num_items).to(x.dtype)
        parts = torch.cat([x, x.square(), torch.ones_like(x[:, :1])], 1)
        width = x.shape[1]
        total, squares, count = weighted_sum(parts, real, batch).split([width, width, 1], 1)
        pairs = self.norm((total.square() - squares) / 2)
        out = apply_linear(self.first, total)
        if self.second is not None:
            out, deep = out + apply_linear(self.second, pairs), total / count.clamp_min(1)
        else:
            deep = pairs
        for number, layer in enumerate(self.layers):
            deep = F.relu(deep) if number else deep
            deep = apply_linear(layer, dropped(deep, batch, self.dropout, rng, number))
        return (out + deep).index_select(0, batch.segment_ids())
