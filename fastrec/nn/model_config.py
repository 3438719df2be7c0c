# SPDX-License-Identifier: Apache-2.0
"""Settings of a user model, as Python, YAML and config.json have them. Legend: V items, D width."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from fastrec.data.settings import check_fields, from_values
from fastrec.nn.encoders.parts import Encoders, settings_of, wrapped
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.items import Items


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a user model.

    Attributes:
        width: D, the width of states and item vectors.
        max_len: the most recent items of a user that are read, special tokens not counted.
        dropout: probability at every dropout site.
        items: what an item is to the encoder.
        encoder: what maps item vectors to states. In Python also settings of your own with
            `build(width, max_positions, dropout)`.
        tokens: special tokens around the items: cls before, sep and ur after.
        head_transform: dense-GELU-LayerNorm between state and item scores (BERT).
        head_bias: a trained bias of each item in its score; the original SASRec and eSASRec have
            none.
        head_bias_start: of these biases. With bce or gbce and K negatives -log(K / beta), where a
            target pulls as hard as its negatives push.
        head_table: "tied", the item embedding scores items, "own", a table of the head does, or
            "features", the sum of the embedding and of the mapped features of the items.
        head_similarity: of state and item vector, "dot" or "cosine".
        head_temperature: scores are divided by it.
        user_width: width of a trained vector of each user, which stands behind the state where
            items are scored; 0 for none. The head's own table is as much wider; the tied one is
            not, so that it needs head_transform.
    """

    width: int = 64
    max_len: int = 30
    dropout: float = 0.5
    items: Items = field(default_factory=Items)
    encoder: Encoders = field(default_factory=lambda: Encoders(transformer=Transformer()))
    tokens: list[Literal["cls", "sep", "ur"]] = field(default_factory=list)
    head_transform: bool = True
    head_bias: bool = True
    head_bias_start: float = 0.0
    head_table: Literal["tied", "own", "features"] = "tied"
    head_similarity: Literal["dot", "cosine"] = "dot"
    head_temperature: float = 1.0
    user_width: int = 0

    def __post_init__(self):
        check_fields(self)
        if not 0 < self.head_temperature < math.inf:
            raise ValueError(
                f"model.head_temperature must be positive and finite, got {self.head_temperature}"
            )
        if self.head_table == "features" and not (
            self.items.features and self.items.combine == "sum"
        ):
            raise ValueError("model.head_table: features needs items.features, and combine: sum")
        if self.head_table == "tied" and not self.items.ids:
            raise ValueError(
                "model.head_table tied: items.ids is false, so no id scores: set features or own"
            )
        for name in ("width", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must be in [0, 1), got {self.dropout}")
        if not math.isfinite(self.head_bias_start):
            raise ValueError(f"model.head_bias_start must be finite, got {self.head_bias_start}")
        if self.head_bias_start and not self.head_bias:
            raise ValueError("model.head_bias_start has no effect: head_bias is false")
        if self.user_width < 0:
            raise ValueError(f"model.user_width must not be negative, got {self.user_width}")
        if self.user_width and self.head_table != "own" and not self.head_transform:
            raise ValueError(
                "model.user_width: the item embedding has no columns for user vectors: set"
                " head_table: own, or head_transform: true"
            )
        self.items.check_width(self.width)
        if isinstance(self.encoder, type) or not hasattr(settings_of(self.encoder), "build"):
            raise TypeError(
                f"model.encoder must be settings like Transformer(), got {self.encoder!r:.60}"
            )
        object.__setattr__(self, "encoder", wrapped(self.encoder))
        order = [token for token in ("cls", "sep", "ur") if token in self.tokens]
        if sorted(self.tokens) != sorted(order):
            raise ValueError(f"model.tokens must be some of cls, sep and ur, got {self.tokens}")
        object.__setattr__(self, "tokens", order)
        if self.causal and "cls" in order:
            raise ValueError(
                "model.tokens: [CLS] stands first and sees nothing under causal attention"
            )
        if self.causal and "sep" in order:
            raise ValueError(
                "model.tokens: [SEP] stands last and no item sees it under causal attention"
            )

    @property
    def causal(self) -> bool:
        """Whether an event sees earlier events alone: such a model is asked for the next item at
        its last state, others at a [MASK] behind the items."""
        return bool(getattr(settings_of(self.encoder), "causal", False))

    @property
    def event_columns(self) -> list[str]:
        """Columns of events that the input of items, or the encoder, reads."""
        own, read = (
            self.items.event_columns,
            getattr(settings_of(self.encoder), "event_columns", ()),
        )
        return [*own, *(name for name in read if name not in own)]


def num_parameters(
    num_items: int,
    config: ModelConfig,
    num_users: int = 0,
    item_sizes: Mapping[str, int] | None = None,
) -> int | None:
    """How many numbers a model has, known before memory is allocated for them; None where that of
    somebody else's encoder is not known. item_sizes: by name, categories of each attribute of
    items, and numbers of a vector of each feature."""
    width, encoder = config.width, settings_of(config.encoder)
    if not hasattr(encoder, "num_parameters"):
        return None
    positions = config.max_len + len(config.tokens)
    whole, own = width + config.user_width, config.head_table == "own"
    scored = whole if own else width
    head = num_items + (whole * scored + 3 * scored) * config.head_transform
    head += num_items * scored * own + num_users * config.user_width
    items = config.items.num_parameters(num_items, width, item_sizes or {})
    return items + head + encoder.num_parameters(width, positions)


def described(config: ModelConfig) -> dict:
    """The settings as JSON has them; an encoder of somebody else by the name of its class."""
    if isinstance(config.encoder, Encoders):
        return asdict(config)
    kind = type(config.encoder)
    values = asdict(replace(config, encoder=Transformer()))
    return values | {"encoder": {"class": f"{kind.__module__}.{kind.__qualname__}"}}


def config_of(values: dict, encoder: Any) -> ModelConfig:
    saved = values.get("encoder")
    if encoder is None and isinstance(saved, dict) and "class" in saved:
        raise ValueError(f"the encoder is {saved['class']}: give from_pretrained its settings")
    if encoder is None:
        config = from_values(ModelConfig, values, "model")
    else:
        plain = {name: part for name, part in values.items() if name != "encoder"}
        config = replace(from_values(ModelConfig, plain, "model"), encoder=encoder)
    for name, value in described(config).items():
        if name in values and not _agrees(values[name], value):
            raise ValueError(f"model.{name} is {values[name]!r}, expected {value!r}")
    return config


def check_sizes(config: ModelConfig, classes: Any, vectors: Any) -> None:
    """Raise ValueError unless these are the numbers of categories of the attributes of items, and
    those of a vector of their features."""
    items = config.items
    for key, names, given, what in (
        ("item_classes", list(items.attributes), classes, "categories"),
        ("item_vectors", list(items.features), vectors, "widths"),
    ):
        sizes = given if isinstance(given, dict) else {}
        if list(sizes) != names or not all(type(n) is int and n > 0 for n in sizes.values()):
            raise ValueError(f"{key} must be the {what} of {names}, got {given!r}")


def _agrees(said: Any, read: Any) -> bool:
    """Whether a file says what was read of it. A setting that is missing there has its default: the
    model was saved before fastrec had the setting, and is what the default makes."""
    if isinstance(said, dict) and isinstance(read, dict):
        return all(name in read and _agrees(part, read[name]) for name, part in said.items())
    return said == read
