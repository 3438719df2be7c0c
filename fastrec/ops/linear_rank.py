# SPDX-License-Identifier: Apache-2.0
"""Rank of the target of each row among all items, without the N x V scores.

Legend: N rows, V items, D width, E listed exclusions.
"""

import torch
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.common.arguments import check_index, check_range, without_autocast
from fastrec.ops.common.in_batch_pairs import Lists
from fastrec.ops.common.linear_scores import allowed_items_ref, check_scores, scores_ref
from fastrec.ops.common.native import kernels_of, register_cuda

OP = "linear_rank"

# Rank [N] int64 of target [N] among the scores input_i . linear_weight_j + linear_bias_j.
torch.library.define(
    f"fastrec::{OP}_fwd",
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    " Tensor? exclude_values, Tensor? exclude_offsets) -> Tensor",
)


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(input, linear_weight, linear_bias, target, exclude_values, exclude_offsets):
    return input.new_empty(input.shape[0], dtype=torch.int64)


register_cuda(OP, "fwd")


def linear_rank_ref(input, linear_weight, target, *, linear_bias=None, exclude=None):
    """The oracle: plain PyTorch, any dtype, materialises the scores."""
    scores = scores_ref(input, linear_weight, linear_bias)
    own = scores.gather(1, target[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    ahead = (scores > own) | ((scores == own) & before)
    rank = 1 + (ahead & allowed_items_ref(scores, exclude)).sum(1)
    return torch.where(own.squeeze(1).isnan(), scores.shape[1], rank)


def linear_rank(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    exclude: Lists | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rank, from 1, of the target of each row among all items; the N x V scores never stored.

        s = input @ linear_weight.T + linear_bias,  y = target
        rank_i = 1 + #{j: s_ij > s_iy} + #{j < y: s_ij = s_iy}    over the items j not excluded

    The position of the target in a stable descending sort: HR@k, NDCG@k and MRR of full-catalogue
    evaluation are functions of it. Items with equal vectors and biases tie exactly (on the
    reference: as far as torch.matmul treats equal columns alike). A NaN score is behind every
    number; a target whose own score is NaN has rank V.

    Args:
        input: [N, D], float64, float32, bfloat16 or float16.
        linear_weight: item table [V, D], V > 0, same dtype, or float32 beside a low-precision
            input.
        target: item ids in [0, V), [N]. Ids are int64, or int32, which is converted.
        linear_bias: [V]. -inf puts an item behind all items of a finite score.
        exclude: (values [E], offsets [N + 1]): the items values[offsets[i]:offsets[i + 1]], sorted
            within the row, are left out of the ranking of row i; the target never is.
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        int64 [N], without a gradient. Scores are compared in float32 (float64 for float64 input),
        also under autocast: coarser ones would tie. On a GPU their products are those of TF32 if
        `torch.set_float32_matmul_precision` allows it.

    Raises:
        ValueError, TypeError: a shape or dtype is wrong.
        IndexError: a target or a value of `exclude` is out of range (a device assertion on a GPU).
        RuntimeError: `backend` cannot run.
    """
    exclude = check_scores(input, linear_weight, linear_bias, exclude)
    target = check_index("target", target, input.shape[:1], input.device)
    check_range("target", target, linear_weight.shape[0])
    backend = resolve(backend, OP, input.device)
    with torch.no_grad(), without_autocast(input.device):
        if backend == "reference":
            return linear_rank_ref(
                input, linear_weight, target, linear_bias=linear_bias, exclude=exclude
            )
        fwd = kernels_of(OP, backend, input.device).linear_rank_fwd
        return fwd(input, linear_weight, linear_bias, target, *(exclude or (None, None)))
