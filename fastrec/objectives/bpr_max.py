# SPDX-License-Identifier: Apache-2.0
"""BPR-max: the target against the negatives that score highest (Hidasi and Karatzoglou, 2018,
section 3.3). Plain PyTorch: the N x K scores are stored, seven times with what backward needs: the
1,500 predicted items of a step against themselves and 2,048 drawn ones take 150 MB.

Legend: N predicted items, V items, D width, K negatives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.data.batch import NO_TARGET


def bpr_max(
    query: Tensor,
    item_table: Tensor,
    item_bias: Tensor,
    target: Tensor,
    negatives: Tensor,
    regularization: float,
) -> Tensor:
    """Mean over the rows with a target y of

        -log sum_j a_j sigmoid(s_y - s_j) + regularization sum_j a_j s_j^2,   a = softmax_j(s)

    with s_v = query . item_table_v + item_bias_v, over the negatives j that are not y. A row whose
    negatives are all y has a loss of 0.

    Args:
        query: [N, D].
        item_table, item_bias: [V, D], [V].
        target: int64 [N], -100 where none.
        negatives: int64 [K], the same for all rows; -100 is none.
        regularization: of the scores of negatives.
    """
    known = target != NO_TARGET
    y = torch.where(known, target, 0)
    # float32 sums, also where autocast has made the products.
    own = (query * item_table[y]).sum(1).float() + item_bias[y]
    none = negatives == NO_TARGET
    items = negatives.masked_fill(none, 0)
    scores = (query @ item_table[items].T).float() + item_bias[items]
    hit = (negatives == y[:, None]) | none
    known = known & ~hit.all(1)
    log_a = scores.masked_fill(hit & known[:, None], -torch.inf).log_softmax(1)
    a = log_a.exp()
    # -inf + a finite number: a hit adds nothing to the sum and gets no gradient.
    loss = -torch.logsumexp(log_a + F.logsigmoid(own[:, None] - scores), 1)
    loss = loss + regularization * (a * scores.square()).sum(1)
    return torch.where(known, loss, 0).sum() / known.sum().clamp_min(1)
