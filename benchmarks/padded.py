# SPDX-License-Identifier: Apache-2.0
"""The encoder of a user model in plain PyTorch on a padded batch, as BERT4Rec code does it.

Legend: S sequences, L padded length, D width.
"""

import torch.nn.functional as F
from torch import Tensor

from fastrec.nn.user_model import UserModel


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
