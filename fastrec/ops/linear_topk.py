# SPDX-License-Identifier: Apache-2.0
"""The k best items of each row, without the N x V scores.

Legend: N rows, V items, D width, E listed exclusions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.common.arguments import accumulate_dtype, check_number, without_autocast
from fastrec.ops.common.in_batch_pairs import Lists
from fastrec.ops.common.linear_scores import allowed_items_ref, check_scores, scores_ref
from fastrec.ops.common.native import kernels_of, register_cuda

OP = "linear_topk"

# values [N, k] float32 or float64 and indices [N, k] int64 of the largest scores input_i .
# linear_weight_j + linear_bias_j, best first, equal ones by index; -inf and -1 where too few are
# above -inf.
torch.library.define(
    f"fastrec::{OP}_fwd",
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, SymInt k,"
    " Tensor? exclude_values, Tensor? exclude_offsets) -> (Tensor values, Tensor indices)",
)


class TopK(NamedTuple):
    """Scores [N, k] and ids [N, k] of the best items, best first."""

    values: Tensor
    indices: Tensor


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(input, linear_weight, linear_bias, k, exclude_values, exclude_offsets):
    values = input.new_empty(input.shape[0], k, dtype=accumulate_dtype(input))
    return values, values.new_empty(values.shape, dtype=torch.int64)


register_cuda(OP, "fwd")


def linear_topk_ref(input, linear_weight, k, *, linear_bias=None, exclude=None):
    """The oracle: plain PyTorch, any dtype, materialises the scores."""
    scores = scores_ref(input, linear_weight, linear_bias)
    out = ~allowed_items_ref(scores, exclude) | scores.isnan()
    scores = scores.masked_fill(out, -torch.inf)
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :k], indices[:, :k]
    return TopK(values, indices.masked_fill(values == -torch.inf, -1))


def linear_topk(
    input: Tensor,
    linear_weight: Tensor,
    k: int,
    *,
    linear_bias: Tensor | None = None,
    exclude: Lists | None = None,
    backend: str | None = None,
) -> TopK:
    """The k best items of each row, best first; the N x V scores never stored.

        s = input @ linear_weight.T + linear_bias
        values_i, indices_i = the first k of a stable descending sort of s_i

    Exact: equal scores in the order of their ids, unlike `torch.topk`, which leaves that order
    open. Items that are excluded, or whose score is -inf or NaN (which `torch.topk` puts first),
    are no result: where fewer than k items are left, the rest has value -inf and index -1.

    Args:
        input: [N, D], float64, float32, bfloat16 or float16.
        linear_weight: item table [V, D], V > 0, same dtype, or float32 beside a low-precision
            input.
        k: from 1 to V.
        linear_bias: [V]. -inf takes an item out.
        exclude: (values [E], offsets [N + 1]): the items values[offsets[i]:offsets[i + 1]], sorted
            within the row, are no result of row i. int64, or int32, which is converted.
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        TopK(values, indices), both [N, k], without a gradient: float32 (float64 for float64 input),
        also under autocast, and int64.

    Raises:
        ValueError, TypeError: a shape, dtype or k is wrong.
        IndexError: a value of `exclude` is out of range (a device assertion on a GPU).
        RuntimeError: `backend` cannot run.
    """
    exclude = check_scores(input, linear_weight, linear_bias, exclude)
    check_number("k", k, whole=True)
    if not 1 <= k <= linear_weight.shape[0]:
        raise ValueError(f"k must be from 1 to {linear_weight.shape[0]}, the items, got {k}")
    backend = resolve(backend, OP, input.device)
    with torch.no_grad(), without_autocast(input.device):
        if backend == "reference":
            return linear_topk_ref(
                input, linear_weight, k, linear_bias=linear_bias, exclude=exclude
            )
        fwd = kernels_of(OP, backend, input.device).linear_topk_fwd
        return TopK(*fwd(input, linear_weight, linear_bias, k, *(exclude or (None, None))))
