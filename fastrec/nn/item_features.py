# SPDX-License-Identifier: Apache-2.0
"""Fixed vectors of items as input: text, image, knowledge graph or social embeddings.

Legend: V items, N items that are read, F numbers of a vector, P width of a part, G experts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrec.nn.plain import apply_linear
from fastrec.ops.common.arguments import accumulate_dtype, without_autocast
from fastrec.ops.jagged_embedding import jagged_embedding
from fastrec.random import Rng, draw_words

MOST_EXPERTS = 1024


@dataclass(frozen=True)
class ItemFeature:
    """Vectors of the items, features.NAME.npy of a data set, that stay as they are and are mapped
    to `width`: "feature-based" transfer of Zeng et al., 2021, section 3.2.

    Attributes:
        width: of what they are mapped to.
        experts: 0 maps them linearly; otherwise the experts of UniSRec's adaptor (Hou et al., 2022,
            section 2.1), a sum of linear maps weighted by a gate.
        noise: of the gate in training; trained, and normal.
        dropout: of the numbers of a vector in training.
    """

    width: int = 64
    experts: int = 0
    noise: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")
        if not 0 <= self.experts <= MOST_EXPERTS:
            raise ValueError(f"experts must be in [0, {MOST_EXPERTS}], got {self.experts}")
        if self.noise and self.experts < 2:
            raise ValueError(f"noise has no effect: a gate needs 2 experts, got {self.experts}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def num_parameters(self, size: int) -> int:
        """How many numbers the map of vectors of `size` numbers has."""
        gates = self.experts * (1 + self.noise) + self.experts
        return size * (max(1, self.experts) * self.width + gates)


class FeatureMap(nn.Module):
    """[N, P] of items. Linear: W x. With G experts (UniSRec, eq. 1-3, parametric whitening and a
    mixture of experts):

        sum over g of a_g W_g (x - b_g)    a = softmax(W_a x + z softplus(W_z x) + 0.01 z)

    z standard normal in training with `noise`, otherwise 0. Dropout is of the x of the experts, not
    of that of the gate; the original draws it for each expert, here all read one. An item without
    a vector has x = 0.

    Args:
        settings: of the map.
        table: float32 [V, F]. It is saved with the model, which then needs no data set.
        number: of this feature among those of the items: its randomness is its own.
    """

    def __init__(self, settings: ItemFeature, table: Tensor, number: int):
        super().__init__()
        self.settings, self.number = settings, number
        size, width, experts = table.shape[1], settings.width, settings.experts
        self.map = nn.Linear(size, width * max(1, experts), bias=False)
        if experts:
            self.shift = nn.Parameter(torch.zeros(experts, size))
            self.gate = nn.Linear(size, experts, bias=False)
        if settings.noise:
            self.spread = nn.Linear(size, experts, bias=False)
        self.register_buffer("table", table.to(self.map.weight.device, torch.float32, copy=True))
        self.table: Tensor

    def reset(self) -> None:
        """All experts alike at first."""
        for name in ("gate", "spread"):
            if hasattr(self, name):
                nn.init.zeros_(getattr(self, name).weight)

    def forward(self, items: Tensor, rng: Rng | None = None) -> Tensor:
        """items: int64 [N] in [0, V). With `rng` dropout and noise are on: a function of seed, step
        and item, whichever others are read."""
        return self._mapped(self.table.index_select(0, items), items, rng)

    def whole(self, rng: Rng | None = None) -> Tensor:
        """[V, P], of all items."""
        items = torch.arange(len(self.table), device=self.table.device)
        return self._mapped(self.table, items, rng)

    def _mapped(self, x: Tensor, items: Tensor, rng: Rng | None) -> Tensor:
        # Also under autocast in the dtype of the table, of which it would make a copy.
        with without_autocast(x.device):
            return self._product(x, items, rng)

    def _product(self, x: Tensor, items: Tensor, rng: Rng | None) -> Tensor:
        how = self.settings
        zeros, whole = torch.zeros_like(items), x
        if rng is not None and how.dropout:
            x = jagged_embedding(
                None, x, positions=zeros, dropout_p=how.dropout, rng=rng, keys=items,
                site="item_features", layer=self.number,
            )  # fmt: skip
        if not how.experts:
            return apply_linear(self.map, x)
        out = apply_linear(self.map, x).unflatten(1, (how.experts, -1))  # [N, G, P]
        # W_g b_g of each expert stands on the diagonal of the maps of all shifts by all experts.
        shifts = apply_linear(self.map, self.shift).unflatten(1, (how.experts, -1))
        out = out - shifts.diagonal().T
        exact = accumulate_dtype(x)
        scores = apply_linear(self.gate, whole).to(exact)
        if rng is not None and how.noise:
            spread = nn.functional.softplus(apply_linear(self.spread, whole).to(exact)) + 0.01
            scores = scores + spread * self._normal(items, zeros, rng).to(exact)
        weights = scores.softmax(1).to(out.dtype)
        return (weights.unsqueeze(1) @ out).squeeze(1)

    def _normal(self, items: Tensor, zeros: Tensor, rng: Rng) -> Tensor:
        """[N, G] by Box and Muller, of two words of 32 bits each."""
        experts = self.settings.experts
        keys = items | self.number << 32
        words = draw_words(rng, keys, zeros, (experts + 1) // 2, site="item_gate")
        one, two = (
            (words[:, : 2 * experts].float() + 0.5).div(2**32).unflatten(1, (-1, 2)).unbind(2)
        )
        return (-2 * one.clamp(1e-10, 1).log()).sqrt() * (2 * math.pi * two).cos()
