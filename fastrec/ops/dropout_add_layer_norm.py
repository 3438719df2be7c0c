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
from torch.autograd.function import once_differentiable

from fastrec.backend import resolve
from fastrec.ops.common.arguments import accumulate_dtype
from fastrec.ops.common.native import kernels_of, register_cuda
from fastrec.random import Rng, check_views, dropout_arguments, keep_mask, views_of

OP = "dropout_add_layer_norm"
_DROPOUT = (
    " Tensor? sample_ids, Tensor? positions, Tensor? key, int drop, int site, int layer, int view,"
    " int views"
)

# output and sum [T, D] have the promoted dtype of input and residual; sum is [0, D] where it would
# equal the input. mean and rstd [T] are float32, or float64 with the input.
torch.library.define(
    f"fastrec::{OP}_fwd",
    f"(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, float eps,{_DROPOUT})"
    " -> (Tensor output, Tensor sum, Tensor mean, Tensor rstd)",
)
# grad_residual [T, D] has the dtype of sum, grad_input that of `input_like`; it is [0, D] where
# grad_residual serves for both. grad_weight and grad_bias are [0] without a weight or a bias.
torch.library.define(
    f"fastrec::{OP}_bwd",
    "(Tensor? grad_output, Tensor? grad_sum, Tensor sum, Tensor mean, Tensor rstd, Tensor? weight,"
    f" Tensor? bias, ScalarType input_dtype,{_DROPOUT})"
    " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
)


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(
    input, residual, weight, bias, eps, sample_ids, positions, key, drop, site, layer, view, views
):
    rows, width = input.shape
    dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    output = input.new_empty(rows, width, dtype=dtype)
    mean = input.new_empty(rows, dtype=accumulate_dtype(output))
    plain = residual is None and drop == 0
    return output, output.new_empty(0 if plain else rows, width), mean, torch.empty_like(mean)


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(
    grad_output, grad_sum, sum, mean, rstd, weight, bias, input_dtype,
    sample_ids, positions, key, drop, site, layer, view, views,
):  # fmt: skip
    rows, width = sum.shape
    both = drop == 0 and input_dtype == sum.dtype
    return (
        sum.new_empty(0 if both else rows, width, dtype=input_dtype),
        sum.new_empty(rows, width),
        mean.new_empty(0) if weight is None else weight.new_empty(width),
        mean.new_empty(0) if bias is None else bias.new_empty(width),
    )


register_cuda(OP, "fwd", "bwd")


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, residual, weight, bias, sample_ids, positions, key, numbers, eps, backend
    ):
        fwd = kernels_of(OP, backend, input.device).dropout_add_layer_norm_fwd
        output, sum, mean, rstd = fwd(
            input, residual, weight, bias, eps, sample_ids, positions, key, *numbers
        )
        ctx.numbers = numbers  # drop, site, layer, view, views
        plain = residual is None and numbers[0] == 0
        saved = input if plain else sum
        ctx.save_for_backward(saved, mean, rstd, weight, bias, sample_ids, positions, key)
        ctx.backend, ctx.input_dtype = backend, input.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return output, sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_sum):
        sum, mean, rstd, weight, bias, *dropout = ctx.saved_tensors
        bwd = kernels_of(OP, ctx.backend, sum.device).dropout_add_layer_norm_bwd
        if sum.shape[0] > 0 and grad_sum is not None and grad_sum.shape[0] == 0:
            grad_sum = None  # of the [0, D] that stands for an input that is its own sum
        grad_input, grad_residual, grad_weight, grad_bias = bwd(
            grad_output, grad_sum, sum, mean, rstd, weight, bias, ctx.input_dtype,
            *dropout, *ctx.numbers,
        )  # fmt: skip
        if grad_input.shape[0] != sum.shape[0]:
            grad_input = grad_residual
        needed = ctx.needs_input_grad
        return (
            grad_input if needed[0] else None,
            grad_residual.to(ctx.residual_dtype) if needed[1] else None,
            grad_weight if needed[2] else None,
            grad_bias if needed[3] else None,
            *[None] * 6,
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
    sample_ids=None,
    positions=None,
    site="attention_output",
    layer=0,
    views=1,
):
    """The oracle: plain PyTorch, the mask materialised."""
    sum, width = input, input.shape[1]
    if dropout_p > 0.0:
        view = views_of(rng, input.shape[0], views, input.device)
        keep, scale = keep_mask(
            rng, dropout_p, sample_ids, positions, width, site=site, layer=layer, view=view
        )
        sum = input * (keep.to(input.dtype) * scale)
    if residual is not None:
        sum = residual + sum
    weight, bias = (None if p is None else p.to(sum.dtype) for p in (weight, bias))
    return DropoutAddLayerNorm(F.layer_norm(sum, (width,), weight, bias, eps), sum)


def _check(input, residual, weight, bias):
    if input.dim() != 2 or not input.is_floating_point():
        raise ValueError(
            f"input must be floating point [T, D], got {input.dtype} {list(input.shape)}"
        )
    if residual is not None and residual.shape != input.shape:
        raise ValueError(f"residual must be {list(input.shape)}, got {list(residual.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != input.shape[1:]:
            raise ValueError(f"{name} must be [{input.shape[1]}], got {list(vector.shape)}")
    doubles = [t.dtype == torch.float64 for t in (input, residual, weight, bias) if t is not None]
    if any(doubles) and not all(doubles):
        raise TypeError("input, residual, weight and bias must be float64 together or not at all")


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    sample_ids: Tensor | None = None,
    positions: Tensor | None = None,
    site: str = "attention_output",
    layer: int = 0,
    views: int = 1,
    backend: str | None = None,
) -> DropoutAddLayerNorm:
    """LayerNorm(residual + dropout(input)) over the last dimension, and the sum itself.

    The sublayer joint of a transformer: a post-norm encoder (Vaswani et al., 2017, section 5.4)
    goes on with `output`, a pre-norm one with both.

    Args:
        input: [T, D], the output of a sublayer.
        residual: [T, D]; None adds nothing.
        weight, bias: [D]; None is 1 and 0.
        eps: added to the variance.
        dropout_p: probability, quantised to 1/256. 0 needs none of the following arguments.
        rng, site, layer: the key of the mask, see `fastrec.random`.
        sample_ids: int64 [T], the sample that each row belongs to.
        positions: int64 [T], the place of each row in its sample, below 65,536.
        views: the rows are that many blocks of equal size, and block i is dropped as view
            `rng.view` + i.
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        (output, sum), both in the promoted dtype of input and residual; `sum` is `input` itself
        without dropout and residual. Statistics and sums are float32 (float64 for float64), a
        gradient has the dtype of its tensor. Not twice differentiable, except on the reference.

    Raises:
        ValueError, TypeError: a shape, dtype or option is wrong.
        RuntimeError: `backend` cannot run.
    """
    _check(input, residual, weight, bias)
    check_views(input.shape[0], views, "rows")
    dropout = dropout_arguments(
        rng, dropout_p, sample_ids, positions, input.shape[0], site=site, layer=layer, views=views
    )
    backend = resolve(backend, OP, input.device)
    if backend == "reference":
        dropout_p = dropout_p if dropout[3] else 0.0  # p rounds to 0: rng may be missing
        return dropout_add_layer_norm_ref(
            input,
            residual,
            weight,
            bias,
            eps=eps,
            dropout_p=dropout_p,
            rng=rng,
            sample_ids=sample_ids,
            positions=positions,
            site=site,
            layer=layer,
            views=views,
        )
    key, numbers = dropout[:3], dropout[3:]
    output, sum = _DropoutAddLayerNorm.apply(
        input, residual, weight, bias, *key, numbers, eps, backend
    )
    plain = residual is None and dropout[3] == 0
    return DropoutAddLayerNorm(output, input if plain else sum)
