# SPDX-License-Identifier: Apache-2.0
"""The target above drawn items, one pair at a time (BPR, Rendle et al., 2009). Plain PyTorch: the
rows of the N x K negatives are gathered, which is for few negatives.

Legend: N predicted items, V items, D width, K negatives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.data.batch import NO_TARGET
from fastrec.ops.common.item_losses import select_rows


def bpr(
    query: Tensor,
    item_table: Tensor,
    item_bias: Tensor,
    target: Tensor,
    negatives: Tensor,
    squash: bool = False,
) -> tuple[Tensor, Tensor]:
    """(mean, number) of the pairs of a row with a target y and a negative j that is not y of

        -log sigmoid(s_y - s_j),   s_v = query . item_table_v + item_bias_v

    0 with a live graph where there is no pair.

    Args:
        query: [N, D].
        item_table: [V or more, D]; rows after the items are not read.
        item_bias: [V].
        target: int64 [N], -100 where none.
        negatives: int64 [N, K].
        squash: sigmoid(s) in the place of s: differences stay in (-1, 1), as in the program of
            S3-Rec.
    """
    known = target != NO_TARGET
    items = torch.cat([torch.where(known, target, 0)[:, None], negatives], 1)
    rows = select_rows(item_table, items.flatten()).view(*items.shape, item_table.shape[1])
    # float32 sums, also where autocast has made the products.
    scores = (query[:, None] * rows).sum(2).float() + item_bias[items]
    real = known[:, None] & (negatives != items[:, :1])
    return pairwise(scores[:, :1], scores[:, 1:], real, squash)


def pairwise(own: Tensor, others: Tensor, real: Tensor, squash: bool) -> tuple[Tensor, Tensor]:
    """(mean, number) of the pairs that are `real` of -log sigmoid(own - others)."""
    if squash:
        own, others = own.sigmoid(), others.sigmoid()
    count = real.sum()
    return (-F.logsigmoid(own - others) * real).sum() / count.clamp_min(1), count
