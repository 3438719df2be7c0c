# SPDX-License-Identifier: Apache-2.0
"""LayerNorm(residual + dropout(input)) in one pass over the rows, the mask never stored.

Legend: T rows, D width. With z = residual + dropout(input), m and s the mean and 1 / standard
deviation of a row, x = (z - m) s and g = grad_output * weight:

    output = x weight + bias        grad_z = s (g - mean(g) - x mean(g x)) + grad_sum
    grad_weight = sum_rows grad_output x        grad_input = mask * grad_z

The residual stream of a pre-norm encoder is z itself, so z is the second result.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.common.arguments import (
    accumulate_dtype,
    beside,
    check_number,
    check_tensor,
    check_width,
)
from fastrec.ops.common.dropout import SCHEMA, Mask, mask_of_rows
from fastrec.ops.common.native import applied, kernels_of, register_cuda
from fastrec.ops.common.second_order import leaf, twice_differentiable
from fastrec.random import Rng, keep_mask

OP = "dropout_add_layer_norm"

# output and sum [T, D] have the promoted dtype of input and residual; sum is [0, D] where it would
# equal the input. mean and rstd [T] are float32, or float64 with the input.
torch.library.define(
    f"fastrec::{OP}_fwd",
    f"(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, float eps, {SCHEMA})"
    " -> (Tensor output, Tensor sum, Tensor mean, Tensor rstd)",
)
# grad_residual [T, D] has the dtype of sum, grad_input that of `input_dtype`; it is [0, D] where
# grad_residual serves for both. grad_weight and grad_bias are [0] without a weight or a bias.
torch.library.define(
    f"fastrec::{OP}_bwd",
    "(Tensor? grad_output, Tensor? grad_sum, Tensor sum, Tensor mean, Tensor rstd, Tensor? weight,"
    f" Tensor? bias, ScalarType input_dtype, {SCHEMA})"
    " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
)


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(input, residual, weight, bias, eps, *arguments):
    rows, width = input.shape
    dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    output = input.new_empty(rows, width, dtype=dtype)
    mean = input.new_empty(rows, dtype=accumulate_dtype(output))
    plain = residual is None and Mask(*arguments).drop == 0
    return output, output.new_empty(0 if plain else rows, width), mean, torch.empty_like(mean)


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(grad_output, grad_sum, sum, mean, rstd, weight, bias, input_dtype, *arguments):
    rows, width = sum.shape
    both = Mask(*arguments).drop == 0 and input_dtype == sum.dtype
    return (
        sum.new_empty(0 if both else rows, width, dtype=input_dtype),
        sum.new_empty(rows, width),
        mean.new_empty(0) if weight is None else weight.new_empty(width),
        mean.new_empty(0) if bias is None else bias.new_empty(width),
    )


register_cuda(OP, "fwd", "bwd")


def _recompute(ctx, sum, mean, rstd, weight, bias, *tensors):
    # The derivative depends on the sum alone: nothing is added to it, in both ways.
    mask = Mask(*tensors, *ctx.numbers)
    input, residual = leaf(sum.shape, sum, ctx.input_dtype), None
    if ctx.residual_dtype is not None:
        residual = leaf(sum.shape, sum, ctx.residual_dtype)
    added = dropout_add_layer_norm_ref(input, residual, None, None, **mask.options).sum
    whole = sum + added
    output = dropout_add_layer_norm_ref(whole, None, weight, bias, eps=ctx.eps).output
    plain = residual is None and mask.drop == 0
    return (input, residual, weight, bias), (output, whole[:0] if plain else whole)


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, residual, weight, bias, eps, backend, *arguments):
        fwd = kernels_of(OP, backend, input.device).dropout_add_layer_norm_fwd
        mask = Mask(*arguments)
        output, sum, mean, rstd = fwd(input, residual, weight, bias, eps, *mask)
        plain = residual is None and mask.drop == 0
        saved = input if plain else sum
        ctx.save_for_backward(saved, mean, rstd, weight, bias, *mask.tensors)
        ctx.numbers, ctx.backend, ctx.input_dtype = mask.numbers, backend, input.dtype
        ctx.eps = eps
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return output, sum

    @staticmethod
    @twice_differentiable(_recompute)
    def backward(ctx, grad_output, grad_sum):
        sum, mean, rstd, weight, bias, *tensors = ctx.saved_tensors
        bwd = kernels_of(OP, ctx.backend, sum.device).dropout_add_layer_norm_bwd
        if sum.shape[0] > 0 and grad_sum is not None and grad_sum.shape[0] == 0:
            grad_sum = None  # of the [0, D] that stands for an input that is its own sum
        grad_input, grad_residual, grad_weight, grad_bias = bwd(
            grad_output, grad_sum, sum, mean, rstd, weight, bias, ctx.input_dtype,
            *tensors, *ctx.numbers,
        )  # fmt: skip
        if grad_input.shape[0] != sum.shape[0]:
            grad_input = grad_residual
        needed = ctx.needs_input_grad
        return (
            grad_input if needed[0] else None,
            grad_residual.to(ctx.residual_dtype) if needed[1] else None,
            grad_weight if needed[2] else None,
            grad_bias if needed[3] else None,
            *[None] * (2 + len(Mask._fields)),
        )


class DropoutAddLayerNorm(NamedTuple):
    """output = LayerNorm(sum), sum = residual + dropout(input); both [T, D]."""

    output: Tensor
    sum: Tensor


def dropout_add_layer_norm_ref(
    input,
    residual,
    weight,
    bias,
    *,
    eps=1e-5,
    dropout_p=0.0,
    rng=None,
    keys=None,
    positions=None,
    site="attention_output",
    layer=0,
):
    """The oracle: plain PyTorch, the mask materialised."""
    sum, width = input, input.shape[1]
    if dropout_p > 0.0:
        keep, scale = keep_mask(rng, dropout_p, keys, positions, width, site=site, layer=layer)
        sum = input * (keep.to(input.dtype) * scale)
    if residual is not None:
        sum = residual + sum
    weight, bias = (None if p is None else p.to(sum.dtype) for p in (weight, bias))
    return DropoutAddLayerNorm(F.layer_norm(sum, (width,), weight, bias, eps), sum)


def _check(input, residual, weight, bias):
    check_width("input", input, ("T", "D"))
    dtypes, device = beside(input), input.device
    if residual is not None:
        check_tensor("residual", residual, input.shape, dtypes, device)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_tensor(name, vector, input.shape[1:], dtypes, device)


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    keys: Tensor | None = None,
    positions: Tensor | None = None,
    site: str | int = "attention_output",
    layer: int = 0,
    backend: str | None = None,
) -> DropoutAddLayerNorm:
    """LayerNorm(residual + dropout(input)) over the last dimension, and the sum itself.

    The sublayer joint of a transformer: a post-norm encoder (Vaswani et al., 2017, section 5.4)
    goes on with `output`, a pre-norm one with both.

    Args:
        input: [T, D], D > 0, the output of a sublayer: float64, float32, bfloat16 or float16.
        residual: [T, D]; None adds nothing.
        weight, bias: [D]; None is 1 and 0. They and residual are float64 with the input or not at
            all.
        eps: added to the variance.
        dropout_p: probability, quantised to 1/256. 0 needs none of the following arguments.
        rng, site, layer: the key of the mask, see `fastrec.random`.
        keys: [T], int64 or int32, the key of the sequence that each row belongs to.
        positions: [T], int64 or int32, the place of each row in its sequence, below 65,536.
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        (output, sum), both in the promoted dtype of input and residual; `sum` is `input` itself
        without dropout and residual. Statistics and sums are float32 (float64 for float64), a
        gradient has the dtype of its tensor.

    Raises:
        ValueError, TypeError: a shape, dtype or option is wrong.
        RuntimeError: `backend` cannot run.
    """
    _check(input, residual, weight, bias)
    check_number("eps", eps)
    rows, device = input.shape[0], input.device
    mask = mask_of_rows(rng, dropout_p, keys, positions, rows, device, site=site, layer=layer)
    backend = resolve(backend, OP, device)
    if backend == "reference":
        return dropout_add_layer_norm_ref(input, residual, weight, bias, eps=eps, **mask.options)
    output, sum = applied(_DropoutAddLayerNorm, input, residual, weight, bias, eps, backend, *mask)
    plain = residual is None and mask.drop == 0
    return DropoutAddLayerNorm(output, input if plain else sum)
