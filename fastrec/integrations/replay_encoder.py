# SPDX-License-Identifier: Apache-2.0
"""The transformer of SasRec and of the query tower of TwoTower, without padding.

Legend: B sequences of padded length L, T places that are computed, N of them asked for, D width.

RePlay pads on the left. A place of padding in front of the first item predicts that item, and so is
computed too: in training it attends to nothing, since all that it may see is masked. Here it is a
sequence of its own, of length 1. In evaluation the last place alone is asked for: padding there is
an empty sequence, which attends to itself.
"""

from typing import NamedTuple

import torch
from replay.nn import agg, embedding, ffn, mask
from replay.nn.sequential import (
    PositionAwareAggregator,
    QueryTower,
    SasRecBody,
    SasRecTransformerLayer,
)
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastrec.data.batch import JaggedBatch
from fastrec.integrations.patching import rng_of, unserved_part
from fastrec.nn.encoders.sublayers import EventDropout, attend, attend_at, join
from fastrec.nn.plain import is_plain
from fastrec.ops.linear import linear

# What the tower of a model may be made of: others would be passed by.
MODULES = {
    *(embedding.SequenceEmbedding, embedding.CategoricalEmbedding, embedding.NumericalEmbedding),
    *(embedding.IdentityEmbedding, agg.SumAggregator, agg.ConcatAggregator),
    *(PositionAwareAggregator, SasRecTransformerLayer, mask.DefaultAttentionMask),
    *(ffn.PointWiseFeedForward, nn.MultiheadAttention, NonDynamicallyQuantizableLinear),
    *(nn.ModuleList, nn.ModuleDict, nn.Embedding, nn.EmbeddingBag, nn.Linear, nn.Conv1d),
    *(nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.ReLU, nn.GELU, nn.Sigmoid),
}


class Places(NamedTuple):
    """The places that are computed, in the order of the sequences.

    real: bool [T], whether a place holds an item.
    flat: int64 [T], the place in [B L]. columns: int64 [T], that in [L].
    batch: them as sequences, without items.
    """

    real: Tensor
    flat: Tensor
    columns: Tensor
    batch: JaggedBatch


def unserved_tower(tower) -> str | None:
    """Why the encoder of a SasRecBody or QueryTower is not served. None: it is."""
    if not (is_plain(tower, SasRecBody) or is_plain(tower, QueryTower)):
        return f"its {type(tower).__name__} has a forward of its own, or hooks wait for its calls"
    parts = (
        ("embedding_aggregator", PositionAwareAggregator),
        ("encoder", SasRecTransformerLayer),
        ("attn_mask_builder", mask.DefaultAttentionMask),
        ("embedder", embedding.SequenceEmbedding),
    )
    for name, kind in parts:
        if type(getattr(tower, name)) is not kind:
            return f"its {name} is a {type(getattr(tower, name)).__name__}"
    if why := unserved_part(tower, MODULES):
        return why
    layer = tower.encoder
    found = {attention.dropout for attention in layer.attention_layers}
    found |= {module.p for module in layer.modules() if isinstance(module, nn.Dropout)}
    if len(found) != 1:
        return f"the dropouts of its encoder differ: {sorted(found)}"
    return None


def places_of(padding_mask: Tensor, asked: Tensor) -> Places | None:
    """The places of items, and those asked for, bool [B, L] both. None: one that is asked for is
    padding behind an item, which would see items.

    On a GPU this waits for T.
    """
    lone = asked & ~padding_mask
    number = padding_mask.cumsum(1)  # of the items up to each place
    if (lone & (number > 0)).any():
        return None
    kept = padding_mask | asked
    flat = kept.flatten().nonzero().squeeze(1)
    starts = (lone | (padding_mask & (number == 1))).flatten()[flat]
    starts = starts.nonzero().squeeze(1)
    offsets = torch.cat([starts, starts.new_full((1,), len(flat))])
    keys = torch.arange(len(starts), device=flat.device)
    length = padding_mask.shape[1]
    batch = JaggedBatch(flat, offsets, keys, length)
    return Places(padding_mask.flatten()[flat], flat, flat % length, batch)


def encode(
    tower,
    features: dict[str, Tensor],
    places: Places,
    rows: Tensor | None = None,
) -> Tensor:
    """States [T, D] at the places, as `tower.forward` computes them, or [B, D] at the places
    `rows`, one of each sequence, in evaluation and without gradients.

    Args:
        features: [B, L, ...], by name.
    """
    layer, batch = tower.encoder, places.batch
    dropout = EventDropout(batch, layer.attention_layers[0].dropout, rng_of(tower))
    x = _embedded(tower, features, places)
    normed, last = join(x, None, layer.attention_layernorms[0], {}).output, layer.num_blocks - 1
    for number in range(layer.num_blocks):
        attention, inner = layer.attention_layers[number], layer.forward_layers[number]
        if rows is not None and number == last:
            normed = normed.index_select(0, rows)
            out = _attention_at(attention, normed, x, rows, batch)
        else:
            out = _attention(attention, normed, x, dropout, number, batch)
            out = out * places.real[:, None] if layer.training else out
        out = linear(out, attention.out_proj.weight, attention.out_proj.bias)
        x = join(out, normed, layer.forward_layernorms[number], {}).output
        out = inner.activation(linear(x, inner.conv1.weight.squeeze(2), inner.conv1.bias))
        out = dropout(out, "ffn_inner", number)
        out = linear(out, inner.conv2.weight.squeeze(2), inner.conv2.bias)
        norms = layer.attention_layernorms
        norm = tower.output_normalization if number == last else norms[number + 1]
        normed, x = join(out, x, norm, dropout.at("ffn_output", number) if dropout.p else {})
    return normed


def _embedded(tower, features: dict[str, Tensor], places: Places) -> Tensor:
    """[T, D], what PositionAwareAggregator gives, the positions counted from the right."""
    aggregator, names = tower.embedding_aggregator, tower.embedder.feature_names
    if isinstance(tower, QueryTower):
        names = tower.feature_names
    here = {name: features[name].flatten(0, 1).index_select(0, places.flat) for name in names}
    x = aggregator.embedding_aggregator(tower.embedder(here, names))
    first = aggregator.pe.num_embeddings - places.batch.max_seq_len
    return aggregator.dropout(x * x.shape[1] ** 0.5 + aggregator.pe(places.columns + first))


def _attention(module, normed, x, dropout, number: int, batch: JaggedBatch) -> Tensor:
    """Heads [T, D]: queries of the normalised stream, keys and values of the stream itself."""
    width, heads = x.shape[1], module.num_heads
    weight, bias = module.in_proj_weight, module.in_proj_bias
    query = linear(normed, weight[:width], bias[:width]).unflatten(1, (heads, -1))
    key, value = linear(x, weight[width:], bias[width:]).unflatten(1, (2, heads, -1)).unbind(1)
    return attend(query, key, value, batch, True, dropout, number)


def _attention_at(module, normed, x, rows: Tensor, batch: JaggedBatch) -> Tensor:
    """[B, D] of `_attention` in evaluation, for one place of each sequence."""
    weight = module.in_proj_weight.chunk(3)
    bias = module.in_proj_bias.chunk(3)
    query = linear(normed, weight[0], bias[0]).unflatten(1, (module.num_heads, -1))
    return attend_at(rows, query, x, weight[1], weight[2], bias[2], batch, True)
