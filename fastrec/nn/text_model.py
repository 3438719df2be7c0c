# SPDX-License-Identifier: Apache-2.0
"""A model of the tokens of items as a model of items: the vector of a history, and of an item, is
the state of [CLS] in front of its tokens, and a score their cosine (Recformer, Li et al., 2023).

Legend: V items, D width, B sequences.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrec.data.batch import JaggedBatch, from_sequences
from fastrec.data.item_texts import TextData
from fastrec.nn.pool import Encoded, Pooling
from fastrec.nn.user_model import UserModel, histories_of

_ITEMS = 1024  # that are encoded at a time


class TextModel:
    """What `evaluate`, `Recommender` and `NextItemJudge` ask, of a `UserModel` that reads tokens.

    The vectors of items are computed in every reading of `item_table`, from the texts: keep it for
    several. A `Recommender` does.

    Args:
        model: with cls in its tokens.
        texts: of the data set that is asked about, cut into tokens by the tokenizer of the model.
    """

    num_users = 0
    event_columns: tuple[str, ...] = ()
    sharded_table = None

    def __init__(self, model: UserModel, texts: TextData):
        model.check_pool("cls")
        model.check_items(texts)
        self.model, self.texts = model, texts
        self.num_items, self.config = texts.dataset.num_items, model.config
        self.trained_on, self.recipe = model.trained_on, model.recipe
        self.seen_users = model.seen_users

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def item_head(self) -> SimpleNamespace:
        """`bias` [V], 0."""
        return SimpleNamespace(
            bias=torch.zeros(self.num_items, dtype=torch.float32, device=self.device)
        )

    @property
    def item_table(self) -> Tensor:
        """float32 [V, D], of unit length, without dropout and without a gradient."""
        parts = []
        with torch.no_grad():
            for start in range(0, self.num_items, _ITEMS):
                items = range(start, min(start + _ITEMS, self.num_items))
                batch = self._framed(from_sequences([[item] for item in items]))
                parts.append(self.ask(batch.to(self.device)))
        return torch.cat(parts)

    def to(self, device) -> "TextModel":
        self.model.to(device)
        return self

    def check_items(self, dataset) -> None:
        """Raise ValueError for a data set with other items than the texts are of."""
        if dataset.items_hash != self.texts.dataset.items_hash:
            raise ValueError(f"the texts are those of {self.texts.path}, not of {dataset.path}")

    def check_users(self, dataset) -> None:
        """Users have no vectors."""

    def inputs(self, dataset, users, split: str, ask: bool = False) -> JaggedBatch:
        """As `UserModel.inputs`; asked for the next item or not, it is the same."""
        return self._framed(dataset.gather(users, split, self.config.max_len))

    def inputs_of(self, histories, ask: bool = False) -> JaggedBatch:
        """As `UserModel.inputs_of`: lists of item indices in [0, V), oldest first."""
        batch = histories_of(histories, self.num_items)
        return self._framed(batch.last(self.config.max_len))

    def encode(self, batch: JaggedBatch, rng=None) -> Encoded:
        """States of the tokens."""
        return self.model.encode(batch, rng)

    def pool(self, encoded: Encoded, how: Pooling) -> Tensor:
        return self.model.pool(encoded, how)

    def ask(self, batch: JaggedBatch) -> Tensor:
        """float32 [B, D], of unit length: the vectors of histories, or of items."""
        return F.normalize(self.model.pool(self.model.encode(batch), "cls").float(), dim=1)

    def save_pretrained(self, path: Path | str) -> None:
        """As `UserModel.save_pretrained`, the tokenizer too."""
        self.model.save_pretrained(path)

    def _framed(self, batch: JaggedBatch) -> JaggedBatch:
        return self.model.frame(self.texts.expand(batch, self.config.max_len))
