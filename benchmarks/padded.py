# SPDX-License-Identifier: Apache-2.0
"""The encoder of a user model in plain PyTorch on a padded batch, as BERT4Rec code does it.

Legend: S sequences, L padded length, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.data.batch import JaggedBatch
from fastrec.data.steps.mask_rating import TARGET
from fastrec.nn.layouts import torch_encoder_state
from fastrec.nn.user_model import UserModel
from fastrec.objectives.rating import RatingPrediction


def padded_states(model: UserModel, values: Tensor, mask: Tensor, p: float) -> Tensor:
    """States [S, L, D] of post-norm layers: tokens [S, L], events where the bool `mask` is set,
    dropout with the probability p from PyTorch's generator."""
    encoder = model.encoder
    x = F.embedding(values, model.item_embedding.weight)
    x = encoder.embedding_norm(x + encoder.positions.weight[: values.shape[1]])
    x = F.dropout(x, p)
    allowed = mask[:, None, None, :]
    for block in encoder.layers:
        packed = block.query_key_value(x).unflatten(-1, (3, block.heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, allowed, p)
        out = block.attention_output(out.transpose(1, 2).flatten(2))
        x = block.attention_norm(x + F.dropout(out, p))
        inner = F.gelu(block.ffn_inner(x))
        x = block.ffn_norm(x + F.dropout(block.ffn_output(inner), p))
    return x


def item_loss(model: UserModel, states: Tensor, targets: Tensor) -> Tensor:
    """Softmax over logits that are stored, at the masked positions only: states [N, D]."""
    logits = F.linear(model.item_head.query(states), model.item_table, model.item_head.bias)
    return F.cross_entropy(logits.float(), targets)


class PaddedRating(nn.Module):
    """The loss of `bert4rec-rating` without `biases` on a padded view: `nn.TransformerEncoder` with
    a padding mask and the weights of the model, item and rating vectors joined beside each other.

    Args:
        model, head: with an encoder of the form `standard`, post-norm.
        view: on the host, with the columns `rating` and `rating_target`.
        p: dropout.
    """

    def __init__(self, model: UserModel, head: RatingPrediction, view: JaggedBatch, p: float):
        super().__init__()
        width, blocks = model.config.width, model.encoder.layers
        layer = nn.TransformerEncoderLayer(
            width, blocks[0].heads, blocks[0].ffn_inner.out_features, p, F.gelu, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, len(blocks), enable_nested_tensor=False)
        self.layers.load_state_dict(torch_encoder_state(model.encoder))
        self.items, self.head, self.p = model.item_input, head, p
        self.positions, self.norm = model.encoder.positions, model.encoder.embedding_norm
        self.mask = torch.arange(int(view.lengths.max())) < view.lengths[:, None]
        self.values, self.target = self._spread(view.values, 0), self._spread(view.events[TARGET])
        rating = model.config.items.rating
        self.levels = self._spread(rating.level(view.events["rating"]), rating.levels)

    def _spread(self, column: Tensor, fill: float = math.nan) -> Tensor:
        out = column.new_full(self.mask.shape, fill)
        out[self.mask] = column
        return out

    def forward(self) -> Tensor:
        parts = [self.items.ids(self.values), self.items.levels["rating"](self.levels)]
        x = self.items.join(torch.cat(parts, 2)) + self.positions.weight[: self.mask.shape[1]]
        x = F.dropout(self.norm(x), self.p, self.training)
        states = self.layers(x, src_key_padding_mask=~self.mask)
        known = ~self.target.isnan()
        return F.mse_loss(self.head.linear(states[known]).squeeze(1), self.target[known])
