"""Scores of rows against an item table: what linear_rank and linear_topk share.

Legend: N rows, V items, D width, E listed exclusions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.ops.in_batch_pairs import Lists, allowed_ref, check_exclude


def accumulate_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def scores_ref(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """[N, V] scores in the accumulation dtype."""
    dtype = accumulate_dtype(input)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    return F.linear(input.to(dtype), linear_weight.to(dtype), bias)


def allowed_items_ref(scores: Tensor, exclude: Lists | None) -> Tensor:
    return allowed_ref(scores.shape, None, None, None, exclude, scores.device)


def check_scores(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, exclude: Lists | None
) -> None:
    if input.dim() != 2 or linear_weight.dim() != 2 or input.shape[1] != linear_weight.shape[1]:
        raise ValueError(
            "input must be [N, D] and linear_weight [V, D], got"
            f" {list(input.shape)} and {list(linear_weight.shape)}"
        )
    items = linear_weight.shape[0]
    if items == 0:
        raise ValueError("linear_weight has no rows: there is no item to score")
    for name, tensor in (("input", input), ("linear_bias", linear_bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {tensor.dtype}")
    low_precision = input.dtype in (torch.bfloat16, torch.float16)
    expected = (input.dtype, torch.float32) if low_precision else (input.dtype,)
    if linear_weight.dtype not in expected:
        names = " or ".join(map(str, expected))
        raise TypeError(f"linear_weight must be {names}, got {linear_weight.dtype}")
    if linear_bias is not None and linear_bias.shape != (items,):
        raise ValueError(f"linear_bias must be [{items}], got {list(linear_bias.shape)}")
    if exclude is not None:
        check_exclude(exclude, input.shape[0], items)
