# SPDX-License-Identifier: Apache-2.0
"""An autoencoder's encoder over the rated items of a user, in jagged form (DACF).

Legend: B sequences, T events, D width, H width of a layer.
"""

from dataclasses import dataclass, field
from typing import ClassVar

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
class Bag:
    """The rated items of a user without their order: sigmoid(sum of rating x item vector + b),
    then layers with sigmoid, the last one of width D again (Kuchaiev and Ginsburg, "Training deep
    autoencoders for collaborative filtering", 2017; the model DACF of Zeng et al., 2021).

    The item embedding is the first layer of the autoencoder: an item without a rating counts 0. The
    ratings of a user are read once, with no vector of V ratings and no matrix of B x V.

    Attributes:
        hidden: widths of the layers between the first and the last.
    """

    hidden: list[int] = field(default_factory=lambda: [128])
    causal: ClassVar[bool] = False
    event_columns: ClassVar[tuple[str, ...]] = ("rating",)

    def __post_init__(self):
        check_fields(self)
        check_widths(self.hidden)

    def num_parameters(self, width: int, max_positions: int) -> int:
        """How many numbers the encoder has."""
        return width + numbers_of([width, *self.hidden, width])

    def build(self, width: int, max_positions: int, dropout: float) -> "BagEncoder":
        return BagEncoder(self, width, dropout)


class BagEncoder(nn.Module):
    """The state of every event is the vector of its user: a bag has no order and no places.

    Args:
        settings: of the layers.
        width: D.
        dropout: probability on what each layer but the last gives, applied only where `forward`
            receives an `rng`.
    """

    def __init__(self, settings: Bag, width: int, dropout: float):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))
        self.layers = layers_of([width, *settings.hidden, width])
        self.dropout = dropout

    def forward(self, embedded: ItemRows, batch: JaggedBatch, rng: Rng | None = None) -> Tensor:
        """[T, D] states of the events. `rng` turns dropout on and is its key.

        Raises ValueError where the batch has no column `rating`.
        """
        if "rating" not in batch.events:
            raise ValueError("the encoder bag needs the event column 'rating'")
        weight = batch.events["rating"].nan_to_num().to(embedded.table.dtype)
        if embedded.values is not None and not embedded.sparse:
            users = F.embedding_bag(
                embedded.values,
                embedded.table,
                batch.offsets,
                mode="sum",
                per_sample_weights=weight,
                include_last_offset=True,
            )
        else:
            users = weighted_sum(embedded.dense(), weight, batch)
        users = torch.sigmoid(users + self.bias)
        for number, layer in enumerate(self.layers):
            users = dropped(users, batch, self.dropout, rng, number)
            users = torch.sigmoid(apply_linear(layer, users))
        return users.index_select(0, batch.segment_ids())
