# SPDX-License-Identifier: Apache-2.0
"""dropout(GELU(input + bias)) in one pass, the mask never stored.

Legend: T rows, D width. With z = input + bias, P the normal distribution function, p its density:

    output = mask * z P(z)          grad_input = mask * grad_output * (P(z) + z p(z))

and grad_bias is the column sum of grad_input. Backward recomputes z from input and bias.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.common.arguments import beside, check_tensor, check_width
from fastrec.ops.common.dropout import SCHEMA, Mask, mask_of_rows
from fastrec.ops.common.native import kernels_of, register_cuda
from fastrec.ops.common.second_order import twice_differentiable
from fastrec.random import Rng, keep_mask

OP = "bias_gelu_dropout"

# output and grad_input [T, D] have the dtype of input, grad_bias [D] ([0] if None) that of bias.
torch.library.define(
    f"fastrec::{OP}_fwd", f"(Tensor input, Tensor? bias, {SCHEMA}) -> Tensor output"
)
torch.library.define(
    f"fastrec::{OP}_bwd",
    f"(Tensor grad_output, Tensor input, Tensor? bias, {SCHEMA})"
    " -> (Tensor grad_input, Tensor grad_bias)",
)


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(input, bias, *mask):
    return input.new_empty(input.shape)


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(grad_output, input, bias, *mask):
    grad_bias = input.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return input.new_empty(input.shape), grad_bias


register_cuda(OP, "fwd", "bwd")


def _recompute(ctx, input, bias, *tensors):
    options = Mask(*tensors, *ctx.numbers).options
    return (input, bias), (bias_gelu_dropout_ref(input, bias, **options),)


class _BiasGeluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, bias, backend, *arguments):
        fwd = kernels_of(OP, backend, input.device).bias_gelu_dropout_fwd
        mask = Mask(*arguments)
        ctx.save_for_backward(input, bias, *mask.tensors)
        ctx.numbers, ctx.backend = mask.numbers, backend
        return fwd(input, bias, *mask)

    @staticmethod
    @twice_differentiable(_recompute)
    def backward(ctx, grad_output):
        input, bias, *tensors = ctx.saved_tensors
        bwd = kernels_of(OP, ctx.backend, input.device).bias_gelu_dropout_bwd
        grad_input, grad_bias = bwd(grad_output, input, bias, *tensors, *ctx.numbers)
        return (
            grad_input if ctx.needs_input_grad[0] else None,
            grad_bias if ctx.needs_input_grad[1] else None,
            *[None] * (1 + len(Mask._fields)),
        )


def bias_gelu_dropout_ref(
    input,
    bias,
    *,
    dropout_p=0.0,
    rng=None,
    keys=None,
    positions=None,
    site="ffn_inner",
    layer=0,
):
    """The oracle: plain PyTorch, the mask materialised."""
    output = F.gelu(input if bias is None else input + bias.to(input.dtype))
    if dropout_p > 0.0:
        width = input.shape[1]
        keep, scale = keep_mask(rng, dropout_p, keys, positions, width, site=site, layer=layer)
        output = output * (keep.to(output.dtype) * scale)
    return output


def bias_gelu_dropout(
    input: Tensor,
    bias: Tensor | None,
    *,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    keys: Tensor | None = None,
    positions: Tensor | None = None,
    site: str | int = "ffn_inner",
    layer: int = 0,
    backend: str | None = None,
) -> Tensor:
    """dropout(GELU(input + bias)) with the exact GELU, z P(z) (Hendrycks and Gimpel, 2016).

    What follows the first product of a feed-forward network; `input` is that product without bias.

    Args:
        input: [T, D], D > 0: float64, float32, bfloat16 or float16.
        bias: [D], float64 with the input or not at all; None adds nothing.
        dropout_p: probability, quantised to 1/256. 0 needs none of the following arguments.
        rng, site, layer: the key of the mask, see `fastrec.random`.
        keys: [T], int64 or int32, the key of the sequence that each row belongs to.
        positions: [T], int64 or int32, the place of each row in its sequence, below 65,536.
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        [T, D] in the dtype of `input`, computed in float32 (float64 for float64). A gradient has
        the dtype of its tensor.

    Raises:
        ValueError, TypeError: a shape, dtype or option is wrong.
        RuntimeError: `backend` cannot run.
    """
    check_width("input", input, ("T", "D"))
    rows, device = input.shape[0], input.device
    if bias is not None:
        check_tensor("bias", bias, input.shape[1:], beside(input), device)
    mask = mask_of_rows(rng, dropout_p, keys, positions, rows, device, site=site, layer=layer)
    backend = resolve(backend, OP, device)
    if backend == "reference":
        return bias_gelu_dropout_ref(input, bias, **mask.options)
    return _BiasGeluDropout.apply(input, bias, backend, *mask)
