# SPDX-License-Identifier: Apache-2.0
"""SASRec and BERT4Rec of RecBole: sequences without padding, losses and full ranking without the
scores of all items.

The parameters stay in RecBole's modules; what is computed with them is not. Legend: B sequences of
padded length L, T items in them, D width, H heads, V items with the padding item 0, N masked items.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from recbole.evaluator.collector import Collector
from recbole.model import layers
from recbole.model.loss import BPRLoss
from recbole.model.sequential_recommender.bert4rec import BERT4Rec
from recbole.model.sequential_recommender.sasrec import SASRec
from recbole.trainer import Trainer
from torch import Tensor, nn

from fastrec.data.batch import JaggedBatch, offsets_of
from fastrec.integrations import recbole_mask
from fastrec.integrations.patching import (
    Replacement,
    check_parity,
    is_default_loss,
    keep_original,
    own_method,
    rng_of,
    unserved_part,
)
from fastrec.nn.encoders.sublayers import EventDropout, attend, attend_at, join
from fastrec.ops.gelu_ffn import gelu_ffn
from fastrec.ops.jagged_attention import split_packed
from fastrec.ops.jagged_embedding import jagged_embedding
from fastrec.ops.linear import linear
from fastrec.ops.linear_cross_entropy import linear_cross_entropy
from fastrec.ops.linear_topk import linear_topk

SERVED = (SASRec, BERT4Rec)
# The methods of a model whose work the fused functions do.
METHODS = ("forward", "full_sort_predict", "gather_indexes", "get_attention_mask")
# What a model may be made of: adapters and the like would be passed by.
MODULES = {
    *(layers.TransformerEncoder, layers.TransformerLayer, layers.MultiHeadAttention),
    *(layers.FeedForward, nn.ModuleList, nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout),
    *(nn.Softmax, nn.GELU, nn.CrossEntropyLoss, BPRLoss),
}
# What metrics may ask a collector for where no score is kept.
FROM_TOP = {"rec.items", "rec.topk"}
NEEDS = ("rec.items", "rec.topk", "rec.meanrank", "rec.score", "data.label")


class TopItems(NamedTuple):
    """In place of the scores [B, V]: int64 [B, k], the best items of each row, best first."""

    indices: Tensor


def replacements() -> list[Replacement]:
    return [
        Replacement(SASRec, "calculate_loss", _loss(SASRec, sasrec_loss)),
        Replacement(BERT4Rec, "calculate_loss", _loss(BERT4Rec, bert4rec_loss)),
        Replacement(BERT4Rec, "reconstruct_test_data", reconstruct_test_data),
        Replacement(Trainer, "_full_sort_batch_eval", _full_sort_batch_eval()),
        Replacement(Collector, "eval_batch_collect", _eval_batch_collect()),
        *recbole_mask.replacements(),
    ]


def _loss(owner: type, fused: Callable[..., Tensor]) -> Callable[..., Tensor]:
    original = owner.calculate_loss  # type: ignore[attr-defined]

    @functools.wraps(original)
    def calculate_loss(self, interaction):
        why = _unserved(self)
        if why is None and self.loss_type != "CE":
            why = f"loss_type is {self.loss_type}, served is CE"
        if why is None and owner is SASRec and not is_default_loss(self.loss_fct):
            why = "its loss_fct is no plain CrossEntropyLoss()"
        if why:
            keep_original(f"{type(self).__qualname__}.calculate_loss", why)
            return original(self, interaction)
        check_parity(
            "recbole", self, lambda: original(self, interaction), lambda: fused(self, interaction)
        )
        return fused(self, interaction)

    return calculate_loss


def _unserved(model: nn.Module) -> str | None:
    owner = next((owner for owner in SERVED if isinstance(model, owner)), None)
    if owner is None:
        return "it is no SASRec or BERT4Rec"
    return own_method(model, owner, METHODS) or unserved_part(model, MODULES)


def _batch_of(items: Tensor) -> tuple[JaggedBatch, Tensor, Tensor]:
    """The items of item_seq [B, L] that are no padding; their columns [T], which are the positions
    that the original adds; and [B, L], the row of each place of item_seq in them.

    On a GPU this waits for T.
    """
    real = items != 0
    columns = real.nonzero()[:, 1]
    offsets = offsets_of(real.sum(1))
    place = offsets[:-1, None] + real.cumsum(1) - 1
    keys = torch.arange(items.shape[0], device=items.device)
    return JaggedBatch(items[real], offsets, keys, items.shape[1]), columns, place


def encode(model, items: Tensor, causal: bool, asked: Tensor, kept: Tensor | None = None) -> Tensor:
    """States at some places of item_seq [B, L], as `forward` of SASRec and BERT4Rec computes them.

    Args:
        asked: int64 [B, M], places in the sequences that hold items.
        kept: bool [B, M], which of them count; None: all.

    Returns:
        [N, D]. The last layer computes no others beyond attention.
    """
    batch, columns, place = _batch_of(items)
    rows = place.gather(1, asked)
    rows = rows.flatten() if kept is None else rows[kept]
    rng = rng_of(model)
    alone = rng is None and not torch.is_grad_enabled() and kept is None and asked.shape[1] == 1
    dropout = EventDropout(batch, model.dropout.p, rng)
    tables, norm = (model.item_embedding.weight, model.position_embedding.weight), model.LayerNorm
    key = dropout.at("embedding") | {"positions": columns}
    x = jagged_embedding(
        batch.values, *tables, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, **key
    )
    last = len(model.trm_encoder.layer) - 1
    for number, layer in enumerate(model.trm_encoder.layer):
        here = rows if number == last else None
        attended = _attention(
            layer.multi_head_attention, x, batch, causal, rng, number, here, alone
        )
        x = x if here is None else x.index_select(0, here)
        x = _sublayers(layer, attended, x, dropout, number, here, model.hidden_act)
    return x


def _attention(module, x, batch, causal, rng, number: int, rows, alone: bool) -> Tensor:
    """Heads of all events, or of `rows`. alone: one of each sequence, without dropout and
    gradients."""
    heads = module.num_attention_heads
    query, key, value = module.query, module.key, module.value
    if alone and rows is not None:
        asked = linear(x.index_select(0, rows), query.weight, query.bias).unflatten(1, (heads, -1))
        return attend_at(rows, asked, x, key.weight, value.weight, value.bias, batch, causal)
    weight = torch.cat([query.weight, key.weight, value.weight])
    bias = torch.cat([query.bias, key.bias, value.bias])
    packed = linear(x, weight, bias).unflatten(1, (3, heads, -1))
    dropout = EventDropout(batch, module.attn_dropout.p, rng)
    out = attend(*split_packed(packed), batch, causal, dropout, number)
    return out if rows is None else out.index_select(0, rows)


def _sublayers(layer, attended, x, dropout: EventDropout, number: int, rows, act: str) -> Tensor:
    """What follows attention in a post-norm layer. rows: the events that x is of; None: all."""

    def at(site: str) -> dict:
        key = dropout.at(site, number)
        if rows is None:
            return key
        return {
            name: value.index_select(0, rows) if isinstance(value, Tensor) else value
            for name, value in key.items()
        }

    attention, ffn = layer.multi_head_attention, layer.feed_forward
    out = linear(attended, attention.dense.weight, attention.dense.bias)
    x = join(out, x, attention.LayerNorm, at("attention_output")).output
    inner, outer = ffn.dense_1, ffn.dense_2
    if act == "gelu":
        out = gelu_ffn(x, inner.weight, inner.bias, outer.weight, outer.bias)
    else:
        out = ffn.intermediate_act_fn(linear(x, inner.weight, inner.bias))
        out = linear(out, outer.weight, outer.bias)
    return join(out, x, ffn.LayerNorm, at("ffn_output")).output


def sasrec_query(model: SASRec, interaction) -> Tensor:
    """[B, D], the state of each last item."""
    last = interaction[model.ITEM_SEQ_LEN][:, None] - 1
    return encode(model, interaction[model.ITEM_SEQ], True, last)


def sasrec_loss(model: SASRec, interaction) -> Tensor:
    """The mean softmax loss over all items, the padding item among them as in RecBole."""
    query = sasrec_query(model, interaction)
    return linear_cross_entropy(query, model.item_embedding.weight, interaction[model.POS_ITEM_ID])


def _head(model: BERT4Rec, states: Tensor) -> Tensor:
    out = linear(states, model.output_ffn.weight, model.output_ffn.bias)
    return join(model.output_gelu(out), None, model.output_ln, {}).output


def bert4rec_loss(model: BERT4Rec, interaction) -> Tensor:
    """The mean softmax loss over the masked items. As in RecBole an item that is masked at place 0
    has none; 0, not NaN, where no item has any."""
    index = interaction[model.MASK_INDEX]  # [B, masks], 0: none
    scored = index > 0
    states = encode(model, interaction[model.MASK_ITEM_SEQ], False, index, scored)
    return linear_cross_entropy(
        _head(model, states),
        model.item_embedding.weight[: model.n_items],
        interaction[model.POS_ITEMS][scored],
        linear_bias=model.output_bias,
    )


def reconstruct_test_data(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
    """item_seq [B, L] with the mask behind the last item, and without the first place."""
    wider = nn.functional.pad(item_seq, (0, 1))
    return wider.scatter(1, item_seq_len[:, None].to(item_seq.device), self.mask_token)[:, 1:]


def bert4rec_query(model: BERT4Rec, interaction) -> Tensor:
    """[B, D], what the mask behind each last item is compared with."""
    length = interaction[model.ITEM_SEQ_LEN]
    items = model.reconstruct_test_data(interaction[model.ITEM_SEQ], length)
    return _head(model, encode(model, items, False, length[:, None] - 1))


def best_items(model, interaction, k: int) -> Tensor:
    """int64 [B, k]: the best items, best first, without the padding item."""
    items = model.n_items
    table = model.item_embedding.weight[:items]
    if isinstance(model, BERT4Rec):
        query, bias = bert4rec_query(model, interaction), model.output_bias.detach().clone()
    else:
        query, bias = sasrec_query(model, interaction), table.new_zeros(items)
    bias[0] = -torch.inf
    return linear_topk(query, table, k, linear_bias=bias).indices


def _full_sort_batch_eval() -> Callable:
    original = Trainer._full_sort_batch_eval

    @functools.wraps(original)
    def _full_sort_batch_eval(self, batched_data):
        interaction, history, positive_u, positive_i = batched_data
        if why := _unserved_ranking(self, history):
            keep_original(f"the ranking of {type(self.model).__qualname__}", why)
            return original(self, batched_data)
        asked = interaction.to(self.device)
        best = best_items(self.model, asked, max(self.eval_collector.topk))
        return interaction, TopItems(best), positive_u, positive_i

    return _full_sort_batch_eval


def _unserved_ranking(trainer: Trainer, history) -> str | None:
    collector = trainer.eval_collector
    if why := _unserved(trainer.model):
        return why
    if own_method(trainer, Trainer, ("evaluate",)) or type(collector) is not Collector:
        return "its trainer or collector is another"
    asked = {need for need in NEEDS if collector.register.need(need)} - FROM_TOP
    if asked:
        return f"a metric needs {', '.join(sorted(asked))}"
    if history is not None:
        return "items of the history are left out"
    if max(collector.topk) >= trainer.model.n_items:
        return f"topk is {max(collector.topk)} of {trainer.model.n_items} items"
    return None


def _eval_batch_collect() -> Callable:
    original = Collector.eval_batch_collect

    @functools.wraps(original)
    def eval_batch_collect(self, scores_tensor, interaction, positive_u, positive_i):
        if not isinstance(scores_tensor, TopItems):
            return original(self, scores_tensor, interaction, positive_u, positive_i)
        best = scores_tensor.indices
        positive_u, positive_i = positive_u.to(best.device), positive_i.to(best.device)
        if self.register.need("rec.items"):
            self.data_struct.update_tensor("rec.items", best)
        if self.register.need("rec.topk"):
            found = (best.index_select(0, positive_u) == positive_i[:, None]).long()
            hits = torch.zeros_like(best).index_add(0, positive_u, found)
            number = torch.zeros_like(best[:, :1])
            number = number.index_add(0, positive_u, torch.ones_like(found[:, :1]))
            self.data_struct.update_tensor("rec.topk", torch.cat([hits, number], 1))

    return eval_batch_collect
