# SPDX-License-Identifier: Apache-2.0
"""Where the models of RePlay have what the fused functions read. Legend: D width, V items."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from replay.nn.embedding import CategoricalEmbedding, SequenceEmbedding
from replay.nn.head import EmbeddingTyingHead
from replay.nn.sequential import ItemTower, SasRec, TwoTower
from torch import Tensor, nn

from fastrec.nn.plain import is_plain

MODELS = (SasRec, TwoTower)


def tower_of(model) -> Any:
    """The module that makes states of sequences: a SasRecBody or a QueryTower."""
    return model.body.query_tower if isinstance(model, TwoTower) else model.body


@contextlib.contextmanager
def as_in_training(model) -> Iterator[None]:
    """Masks and item vectors of training, without its dropout: in evaluation a place of padding in
    front of the first item sees the items behind it, and an item tower keeps its vectors."""
    tower = tower_of(model)
    names = ("attn_mask_builder", "encoder")
    modules = [getattr(tower, name) for name in names if hasattr(tower, name)]
    if isinstance(model, TwoTower):
        modules.append(model.body.item_tower)
    before = [module.training for module in modules]
    for module in modules:
        module.training = True  # not that of its parts
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def unserved_head(scores: Callable) -> str | None:
    """Why a `get_logits` is not the product of states and item vectors. None: it is."""
    model: Any = getattr(scores, "__self__", None)  # of a plain function: None
    owner = next((kind for kind in MODELS if isinstance(model, kind)), None)
    if owner is None or getattr(scores, "__func__", None) is not owner.get_logits:
        return "its logits_callback is not get_logits of SasRec or TwoTower"
    if not is_plain(model.head, EmbeddingTyingHead):
        return "the head of its model is no plain EmbeddingTyingHead"
    return None


def item_embedding(model) -> nn.Embedding | None:
    """That of the ids of items, None where something else makes the vectors."""
    embedder = model.body.embedder
    if not is_plain(embedder, SequenceEmbedding):
        return None
    items = embedder.feature_embedders[embedder._item_feature_name]
    if is_plain(items, CategoricalEmbedding) and is_plain(items.emb, nn.Embedding):
        return items.emb
    return None


def item_vectors(model) -> Tensor:
    """[V, D], without the row of padding."""
    if isinstance(model, TwoTower):
        return model.body.item_tower(None)
    table = item_embedding(model)
    if table is not None and table.padding_idx == table.num_embeddings - 1:
        return table.weight[:-1]  # not the copy that `get_item_weights` makes
    return model.body.embedder.get_item_weights()


def number_of_items(model) -> int:
    """V, without the vectors that the item tower of a TwoTower would compute."""
    if isinstance(model, TwoTower) and isinstance(model.body.item_tower, ItemTower):
        return len(model.body.item_tower._get_any_feature_buffer())
    return len(item_vectors(model))
