# SPDX-License-Identifier: Apache-2.0
"""Gated recurrent encoder on jagged sequences (GRU4Rec, Hidasi et al., 2016), any length.

Legend: T events of a batch, D width, H width of a state.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastrec.data.batch import JaggedBatch
from fastrec.data.settings import check_fields
from fastrec.nn.encoders.sublayers import MOST_LAYERS, EventDropout
from fastrec.nn.items import ItemRows
from fastrec.nn.plain import apply_linear
from fastrec.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastrec.ops.jagged_embedding import jagged_embedding
from fastrec.ops.jagged_gru import jagged_gru
from fastrec.random import Rng


@dataclass(frozen=True)
class Gru:
    """Recurrent layers: GRU4Rec.

    Attributes:
        layers: how many.
        hidden: width of their states; D if None. Another width is projected back to D.
    """

    layers: int = 1
    hidden: int | None = None
    causal: ClassVar[bool] = True

    def __post_init__(self):
        check_fields(self)
        for name, value in (("layers", self.layers), ("hidden", self.hidden)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.layers > MOST_LAYERS:
            raise ValueError(f"layers must be at most {MOST_LAYERS}, got {self.layers}")

    def num_parameters(self, width: int, max_positions: int) -> int:
        """How many numbers the encoder has."""
        hidden = self.hidden or width
        inputs = width + (self.layers - 1) * hidden
        layers = 3 * hidden * (inputs + self.layers * (hidden + 2))
        return layers + (width * hidden + width) * (hidden != width)

    def build(self, width: int, max_positions: int, dropout: float) -> "GruEncoder":
        return GruEncoder(self, width, dropout)


class GruLayer(nn.Module):
    """A layer of `torch.nn.GRU`, which starts as one: parameter `weight_ih` of layer k is its
    `weight_ih_lk`, and so on."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden, width))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden, hidden))
        self.bias_ih = nn.Parameter(torch.empty(3 * hidden))
        self.bias_hh = nn.Parameter(torch.empty(3 * hidden))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return jagged_gru(x, offsets, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class GruEncoder(nn.Module):
    """`layers` recurrent layers over the item vectors, jagged in and out. No positions: a state
    has seen what came before it in its order.

    Args:
        settings: of the layers.
        width: D.
        dropout: probability on the item vectors and between layers, applied only where `forward`
            receives an `rng`.
    """

    def __init__(self, settings: Gru, width: int, dropout: float):
        super().__init__()
        hidden = settings.hidden or width
        self.dropout = dropout
        self.layers = nn.ModuleList(
            GruLayer(hidden if layer else width, hidden) for layer in range(settings.layers)
        )
        self.output = nn.Linear(hidden, width) if hidden != width else None

    def forward(self, embedded: ItemRows, batch: JaggedBatch, rng: Rng | None = None) -> Tensor:
        """[T, D] states of the events. `rng` turns dropout on and is its key."""
        dropout = EventDropout(batch, self.dropout, rng)
        x = jagged_embedding(
            embedded.values, embedded.table, sparse=embedded.sparse, **dropout.at("embedding")
        )
        for index, layer in enumerate(self.layers):
            if index:  # the site of what a layer hands to the next one
                site = dropout.at("ffn_output", index - 1)
                x = dropout_add_layer_norm(x, None, None, None, **site).sum
            x = layer(x, batch.offsets)
        return x if self.output is None else apply_linear(self.output, x)
