# SPDX-License-Identifier: Apache-2.0
"""Scores of rows against an item table: what linear_rank and linear_topk share.

Legend: N rows, V items, D width, E listed exclusions.
"""

import torch.nn.functional as F
from torch import Tensor

from fastrec.ops.common.arguments import accumulate_dtype, check_table
from fastrec.ops.common.in_batch_pairs import Lists, allowed_ref, check_exclude, int64_lists


def scores_ref(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """[N, V] scores in the accumulation dtype."""
    dtype = accumulate_dtype(input)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    return F.linear(input.to(dtype), linear_weight.to(dtype), bias)


def allowed_items_ref(scores: Tensor, exclude: Lists | None) -> Tensor:
    return allowed_ref(scores.shape, None, None, None, exclude, scores.device)


def check_scores(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, exclude: Lists | None
) -> Lists | None:
    """`exclude` as int64."""
    check_table(input, linear_weight, linear_bias)
    exclude = int64_lists(exclude, input.device)
    if exclude is not None:
        check_exclude(exclude, input.shape[0], linear_weight.shape[0])
    return exclude
