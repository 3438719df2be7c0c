# SPDX-License-Identifier: Apache-2.0
"""The encoders that a recipe can name: a field each."""

from dataclasses import dataclass
from typing import get_args, get_type_hints

from fastrec.data.settings import part_of
from fastrec.nn.encoders.bag import Bag
from fastrec.nn.encoders.caser import Caser
from fastrec.nn.encoders.dilated import Dilated
from fastrec.nn.encoders.fm import Fm
from fastrec.nn.encoders.gru import Gru
from fastrec.nn.encoders.transformer import Transformer


@dataclass(frozen=True)
class Encoders:
    """The encoder of a model: exactly one of these.

    Its module maps (`ItemRows`, batch, rng) to states [T, D], and with `takes_rows` can give those
    of some events alone. Its settings have `build(width, max_positions, dropout)`,
    `num_parameters(width, positions)`, and where it is so `causal` (the states of an event depend
    on earlier events alone), `event_columns`, which it reads, and `reads_positions`.

    Attributes:
        transformer: self-attention.
        dilated: dilated convolutions.
        gru: a recurrent network, causal.
        caser: convolutions over a window of the latest items, causal.
        bag: an autoencoder over the rated items, without their order.
        fm: a factorization machine over the items, without their order.
    """

    transformer: Transformer | None = None
    dilated: Dilated | None = None
    gru: Gru | None = None
    caser: Caser | None = None
    bag: Bag | None = None
    fm: Fm | None = None

    def __post_init__(self):
        part_of(self)


def wrapped(encoder):
    """Settings of an encoder as they stand in a recipe; those of somebody else stay as they are."""
    for name, hint in get_type_hints(Encoders).items():
        if type(encoder) in get_args(hint):
            return Encoders(**{name: encoder})
    return encoder


def settings_of(encoder):
    """The settings of the one encoder that is named."""
    return part_of(encoder) if isinstance(encoder, Encoders) else encoder
