# SPDX-License-Identifier: Apache-2.0
"""The user model: item input, encoder and item head. Legend: B sequences, T events, V items,
D width."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastrec.data.batch import SPECIAL_TOKENS, JaggedBatch, framed, from_sequences
from fastrec.data.item_texts import Texts
from fastrec.nn.encoders.parts import settings_of
from fastrec.nn.encoders.sublayers import Patch
from fastrec.nn.heads import ItemHead
from fastrec.nn.init import init_bert
from fastrec.nn.items import ItemFeatures, ItemInput
from fastrec.nn.model_config import ModelConfig, described
from fastrec.nn.model_files import ITEMS, RECIPE, TOKENIZER, TRAINED_ON, USERS, write_model
from fastrec.nn.model_reading import check_built, read_model
from fastrec.nn.plain import embedding_table, first_rows
from fastrec.nn.pool import Encoded, Pooling, last_pool, max_pool, mean_pool
from fastrec.random import Rng

if TYPE_CHECKING:
    from fastrec.nn.sharded import ShardedTable


class UserModel(nn.Module):
    """Item input + encoder + item head.

    `inputs` makes its input, `encode` the states of a batch, `pool` user vectors of them and
    `next_item_query` what is compared with `item_table`. Dropout is on exactly where an `rng` is
    given, whatever train()/eval() say.

    Args:
        num_items: V.
        config: sizes.
        num_users: of the data set; read where `config.user_width` gives users a vector.
        item_features: the categories and vectors of the items where `config.items` has attributes
            or features: `item_features(dataset, config.items)`. They are saved with the model.
    """

    def __init__(
        self,
        num_items: int,
        config: ModelConfig,
        num_users: int = 0,
        item_features: ItemFeatures | None = None,
    ):
        super().__init__()
        if config.user_width and num_users < 1:
            raise ValueError(
                f"model.user_width is {config.user_width}: num_users must be at least 1, got"
                f" {num_users}"
            )
        self.num_items, self.config = num_items, config
        # Of a model that `fit` has trained: what it was trained on and by, and hashes of the ids of
        # its items and of the users that it has seen.
        self.trained_on: dict[str, Any] = {}
        self.recipe: dict[str, Any] | None = None
        self.known_items: np.ndarray | None = None
        self.seen_users: np.ndarray | None = None
        # Of one whose items are tokens of texts, see `data.item_texts`: how these are made, and
        # JSON of `tokenizers`.
        self.texts: Texts | None = None
        self.tokenizer: str | None = None
        self.num_users = num_users if config.user_width else 0
        self.item_input = ItemInput(config.items, num_items, config.width, item_features)
        self.encoder = settings_of(config.encoder).build(
            config.width, self.max_positions, config.dropout
        )
        self.item_head = ItemHead(
            config.width,
            num_items,
            transform=config.head_transform,
            bias=config.head_bias_start if config.head_bias else None,
            own=config.head_table == "own",
            num_users=self.num_users,
            user_width=config.user_width,
            similarity=config.head_similarity,
            temperature=config.head_temperature,
        )
        self.apply(_started)

    def token(self, name: str) -> int:
        """Row of a special token in the embedding table: "mask", "cls", "sep" or "ur"."""
        return self.num_items + SPECIAL_TOKENS.index(name)

    @property
    def max_positions(self) -> int:
        """Events of the longest input."""
        return self.config.max_len + len(self.config.tokens)

    @property
    def item_embedding(self) -> nn.Embedding:
        """[V + 4, D], items and special tokens; without embedded ids [4, D]."""
        return self.item_input.ids

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.parameters()).device

    @property
    def output_table(self) -> Tensor:
        """What scores items by its first V rows: the embedding [V + 4, D], the sum of it and of the
        mapped features of items, or the head's own table [V, D + user_width]; of unit length where
        they are compared by cosines. Without dropout. What is not a parameter is computed in
        every call: keep it for several."""
        return self._scoring(None)

    def scoring(self, encoded: Encoded) -> Tensor:
        """`output_table` as the pass that made `encoded` has computed it, with its dropout."""
        return self._scoring(encoded.items)

    def _scoring(self, items: Tensor | None) -> Tensor:
        own = self.item_head.table
        if own is not None:
            return self.item_head.compared(embedding_table(own, self.num_items))
        if items is None and self.config.head_table == "features":
            items = self.item_input.summed()
        return self.item_head.compared(self.item_input.table if items is None else items)

    @property
    def item_table(self) -> Tensor:
        """[V, D] or, of the head, [V, D + user_width]: the vectors that score items."""
        return first_rows(self.output_table, self.num_items, self.sparse_tables)

    @property
    def sparse_tables(self) -> bool:
        """Whether gradients of item vectors are sparse tensors of the rows that a step reads, see
        `training.rows`."""
        return getattr(self.item_input.ids, "sparse", False)  # it may be wrapped

    @property
    def sharded_table(self) -> "ShardedTable | None":
        """What scores items where it is spread over processes, see `nn.sharded`."""
        table: Any = self.item_head.table or self.item_input.ids
        if not hasattr(table, "part"):
            return None
        from fastrec.nn.sharded import ShardedTable

        return ShardedTable(table, self.item_head.bias)

    def has_items_of(self, dataset) -> bool:
        """Whether the items of a data set can be those of this model, in its order. What is known
        of a model that was not trained by `fit` is how many they are."""
        known = self.trained_on.get("items")
        alike = known is None or known == dataset.items_hash
        return alike and self.num_items == dataset.num_items

    def check_items(self, dataset) -> None:
        """Raise ValueError unless `has_items_of`."""
        if not self.has_items_of(dataset):
            raise ValueError(
                f"the model scores {self.num_items:,} items, and the {dataset.num_items:,} of"
                f" {dataset.path} are others or in another order: fastrec.load_model(FOLDER,"
                " dataset) finds them by their ids"
            )

    def check_users(self, dataset) -> None:
        """Raise ValueError for a data set that cannot be that of this model's user vectors."""
        if not self.num_users:
            return
        if dataset.num_users != self.num_users:
            raise ValueError(
                f"the model has vectors of {self.num_users} users, {dataset.path} has"
                f" {dataset.num_users}: they are of other users"
            )
        known = self.trained_on.get("users")
        if known is not None and known != dataset.users_hash:
            raise ValueError(
                "the model has vectors of other users, or in another order, than"
                f" {dataset.path} has"
            )

    @property
    def event_columns(self) -> list[str]:
        """Columns of events that the model reads beside the items."""
        return self.config.event_columns

    def inputs(self, dataset, users, split: str, ask: bool = False) -> JaggedBatch:
        """The input of `users` in a split of a data set. `ask`: for their next item, and with the
        column "user" where the model has vectors of users.

        Raises ValueError if these cannot be the users of the data set.
        """
        batch = dataset.gather(users, split, self.room(ask), self.event_columns)
        self.config.items.check_events(batch.events)
        if ask and self.num_users:
            self.check_users(dataset)
            batch.users["user"] = batch.sample_ids
        return self.frame(batch, ask)

    def inputs_of(self, histories: Sequence[Sequence[int]], ask: bool = False) -> JaggedBatch:
        """The input of histories given as lists of item indices, oldest first, of unknown users.
        Their events have no ratings and no times.

        Raises TypeError for what is no whole number, IndexError for an index out of [0, V).
        """
        batch = histories_of(histories, self.num_items)
        if self.event_columns:
            none = torch.full(batch.values.shape, math.nan, dtype=torch.float32, device="cpu")
            batch = replace(batch, events=dict.fromkeys(self.event_columns, none))
        return self.frame(batch, ask)

    def frame(self, batch: JaggedBatch, ask: bool = False) -> JaggedBatch:
        """Sequences of items as the encoder reads them: the most recent ones, special tokens around
        them, and with `ask` what asks for the next item: a [MASK], which takes the place of an
        item; a causal model needs none, and is asked at its last item."""
        batch = batch.last(self.room(ask))
        if ask and self.config.causal and len(batch) and int(batch.lengths.min()) == 0:
            empty = int(batch.sample_ids[batch.lengths == 0][0])
            raise ValueError(f"sequence {empty} is empty: a causal model has nothing to go on")
        return framed(batch, *self.around(ask))

    def around(self, ask: bool) -> tuple[list[int], list[int]]:
        """Rows of the special tokens before the items, and behind them: see `frame`."""
        before = [self.token(name) for name in self.config.tokens if name == "cls"]
        after = [self.token(name) for name in self.config.tokens if name != "cls"]
        asks = [self.token("mask")] if ask and not self.config.causal else []
        return before, [*asks, *after]

    def room(self, ask: bool) -> int:
        """Items of a sequence that are read: see `frame`."""
        return self.config.max_len - (ask and not self.config.causal)

    def encode(self, batch: JaggedBatch, rng: Rng | None = None) -> Encoded:
        """States [T, D] of a batch. `rng` turns dropout on and is its key."""
        items = self._items(rng)
        states = self.encoder(self.item_input(batch, rng, items), batch, rng)
        return Encoded(batch, states, items=items)

    def _items(self, rng: Rng | None) -> Tensor | None:
        """Ids and features of all items, where these score and are trained: computed once for both
        sides."""
        if self.config.head_table == "features" and torch.is_grad_enabled():
            return self.item_input.summed(rng)
        return None

    forward = encode  # what a wrapper like DistributedDataParallel calls

    def encode_views(
        self, views: dict[str, JaggedBatch], rng: Rng | None = None
    ) -> dict[str, Encoded]:
        """Every view, encoded end to end in one pass."""
        whole = self.encode(JaggedBatch.cat(_read(list(views.values()))), rng)
        states, items = whole.states, whole.items
        if len(views) == 1:
            return {name: Encoded(view, states, items=items) for name, view in views.items()}
        parts = states.split([view.values.shape[0] for view in views.values()])
        return {
            name: Encoded(view, part, items=items)
            for (name, view), part in zip(views.items(), parts, strict=True)
        }

    def check_pool(self, how: Pooling) -> None:
        """Raise ValueError for a pool of a token that this model's input does not have."""
        if how in ("cls", "ur") and how not in self.config.tokens:
            raise ValueError(f"pool {how!r} needs {how} in model.tokens, {self.config.tokens}")

    def pool(self, encoded: Encoded, how: Pooling) -> Tensor:
        """User vectors [B, D]: "max" or "mean" over the items, the state of [CLS] or [UR], or that
        of the last item. Pools with parameters, "attention" and interests, are a module:
        `nn.pool.Pool`."""
        if how not in encoded.pooled:
            encoded.pooled[how] = self._pool(encoded, how)
        return encoded.pooled[how]

    def _pool(self, encoded: Encoded, how: Pooling) -> Tensor:
        batch, states = encoded.batch, encoded.states
        self.check_pool(how)
        if how == "cls":
            return states[batch.offsets[:-1]]
        if how == "ur":
            return states[batch.offsets[1:] - 1]
        if how == "last":
            return last_pool(states, batch, self.num_items)
        if how == "max":
            return max_pool(states, batch, self.num_items)
        if how == "mean":
            return mean_pool(states, batch, self.num_items)
        raise ValueError(f"pool {how!r} has parameters, or is none")

    def next_item_query(self, encoded: Encoded) -> Tensor:
        """[B, D_out] vectors whose products with `item_table` score the item that follows each
        sequence of `inputs(..., ask=True)`: from the state of its [MASK] (UPRec, section 3.5), or
        of a causal model from that of its last item. `ask` does the same without other states."""
        return self._query(self.output(encoded, self.asked(encoded.batch)))

    def ask(self, batch: JaggedBatch) -> Tensor:
        """`next_item_query(encode(batch))`, of which the encoder computes what it needs: the last
        layer of a transformer is that of one event of each sequence."""
        if not getattr(self.encoder, "takes_rows", False):
            return self.next_item_query(self.encode(batch))
        states = self.encoder(self.item_input(batch), batch, rows=self.asked(batch))
        return self._query(self.item_head.with_users(states, batch.users.get("user")))

    def asked(self, batch: JaggedBatch) -> Tensor:
        """int64 [B]: the events of `inputs(..., ask=True)` whose states are asked for the next
        item."""
        after = sum(name != "cls" for name in self.config.tokens)
        return (batch.offsets[1:] - 1 - after).clamp_min(0)  # of a program: see `export.Query`

    def _query(self, states: Tensor) -> Tensor:
        # In the table's dtype also under autocast, where the states may be bfloat16.
        return self.item_head.query(states).to(next(self.item_embedding.parameters()).dtype)

    def output(self, encoded: Encoded, events: Tensor) -> Tensor:
        """[N, D + user_width]: what the item head receives of `events`, int64 [N]: the states, and
        beside them the vectors of their users by the column "user", 0 where it is -1 or missing."""
        states, users = encoded.states.index_select(0, events), encoded.batch.users.get("user")
        if users is not None and self.num_users:
            users = users[encoded.batch.segment_ids()[events]]
        return self.item_head.with_users(states, users)

    def save_pretrained(self, path: Path | str, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the model into the folder `path`, with what it knows of its training, but not the
        parameters of its objectives: see `nn.model_files`. state: the weights, of a model whose
        own are spread over processes. Raises ValueError for a model that could not be read again,
        whose parts are wrapped."""
        if state is None:
            check_built(self)
        config: dict[str, Any] = {"num_items": self.num_items, **described(self.config)}
        if self.num_users:
            config["num_users"] = self.num_users
        if classes := self.item_input.classes:
            config["item_classes"] = classes
        if sizes := self.item_input.sizes:
            config["item_vectors"] = sizes
        if self.texts is not None:
            config["texts"] = asdict(self.texts)
        told = {
            TOKENIZER: self.tokenizer,
            TRAINED_ON: self.trained_on or None,
            RECIPE: self.recipe,
            ITEMS: self.known_items,
            USERS: self.seen_users,
        }
        write_model(Path(path), config, self.state_dict() if state is None else state, told)

    @classmethod
    def from_pretrained(cls, path: Path | str, encoder: Any = None) -> "UserModel":
        """Read what `save_pretrained` wrote. Nothing is unpickled.

        encoder: settings of the encoder, where they are not fastrec's own.

        Raises FileNotFoundError or ValueError that names the file and what is wrong with it: it is
        missing, damaged or of another model, or the weights are not finite.
        """
        return read_model(cls, Path(path), encoder)


def histories_of(histories: Sequence[Sequence[int]], num_items: int) -> JaggedBatch:
    """A batch of lists of item indices. Raises TypeError for what is no whole number, IndexError
    for one out of [0, num_items)."""
    for history in histories:
        if isinstance(history, Integral):
            raise TypeError(f"histories are lists of item indices, one of each user: got {history}")
        for item in history:
            if not isinstance(item, Integral):
                raise TypeError(f"item {item!r:.60} of a history is no index")
            if not 0 <= item < num_items:
                raise IndexError(f"item {item} of a history is out of [0, {num_items})")
    return from_sequences(histories)


def _read(views: list[JaggedBatch]) -> list[JaggedBatch]:
    """Views with the columns that an encoder reads: targets may differ in shape."""
    return [
        replace(view, events={n: c for n, c in view.events.items() if n not in ("target", "click")})
        for view in views
    ]


def _started(module: nn.Module) -> None:
    init_bert(module)
    if isinstance(module, Patch | ItemInput | ItemHead):
        module.reset()
