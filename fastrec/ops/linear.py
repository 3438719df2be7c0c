# SPDX-License-Identifier: Apache-2.0
"""input @ weight.T + bias for many rows and a small matrix: the linear layers of an encoder.

Legend: T rows, K input width, N output width. With G = grad_output [T, N]:

    grad_input = G weight        grad_weight = G^T input        grad_bias = sum over the rows of G

The C++ kernels compute a row from this row alone and in one order, so its bits depend on neither
the other rows nor their number, and a matrix of a few hundred columns keeps the widest vectors of
the processor busy, whoever made it. On a GPU, and for 16-bit types, the library that PyTorch calls
is the right one: there is no Triton kernel. Under autocast on a CPU that library prepares a product
anew for every number of rows, and jagged batches seldom have the same one twice: small matrices are
multiplied in float32 there (docs/kernels/linear.md).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.backend import resolve, unavailable_reason
from fastrec.ops.common.arguments import FLOATS, autocast_dtype, check_tensor, without_autocast
from fastrec.ops.common.native import applied
from fastrec.ops.common.second_order import leaf, twice_differentiable

OP = "linear"
SMALL = 1 << 16  # elements of a matrix that is multiplied in float32 under autocast

torch.library.define(
    f"fastrec::{OP}_fwd", "(Tensor input, Tensor weight, Tensor? bias) -> Tensor output"
)
# A gradient that is not needed is empty.
torch.library.define(
    f"fastrec::{OP}_bwd",
    "(Tensor grad_output, Tensor input, Tensor weight, bool input_needed, bool weight_needed,"
    " bool bias_needed) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
)


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(input, weight, bias):
    return input.new_empty(input.shape[0], weight.shape[0])


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(grad_output, input, weight, input_needed, weight_needed, bias_needed):
    return (
        input.new_empty(input.shape if input_needed else (0, input.shape[1])),
        weight.new_empty(weight.shape if weight_needed else (0, weight.shape[1])),
        weight.new_empty(weight.shape[0] if bias_needed else 0),
    )


def _recompute(ctx, input, weight):
    bias = leaf(weight.shape[0], weight) if ctx.needs_input_grad[2] else None
    return (input, weight, bias), (F.linear(input, weight, bias),)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias):
        ctx.save_for_backward(input, weight)
        return torch.ops.fastrec.linear_fwd(input, weight, bias)

    @staticmethod
    @twice_differentiable(_recompute)
    def backward(ctx, grad_output):
        needed = ctx.needs_input_grad
        grads = torch.ops.fastrec.linear_bwd(grad_output, *ctx.saved_tensors, *needed)
        return tuple(grad if asked else None for grad, asked in zip(grads, needed, strict=True))


def widened(function, tensors, *weights: Tensor) -> Tensor | None:
    """function(*tensors) in float32, rounded to what autocast rounds to; None where PyTorch's
    autocast is to do it. float64 is left as it is, as there."""
    device = weights[0].device
    low = autocast_dtype(device)
    if device.type != "cpu" or low is None or unavailable_reason("cpp", OP, device):
        return None
    if any(weight.numel() > SMALL for weight in weights):
        return None
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return None
    with without_autocast(device):
        return function(*(None if t is None else t.float() for t in tensors)).to(low)


def linear_ref(input, weight, bias=None):
    """The oracle."""
    return F.linear(input, weight, bias)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """`torch.nn.functional.linear` of the rows of a matrix.

    Args:
        input: [T, K] or [..., K]: float64, float32, bfloat16 or float16.
        weight: [N, K], same dtype, but for autocast.
        bias: [N], same dtype, but for autocast; None adds nothing.
        backend: None ("cpp" for float32 and float64 on a CPU, and under autocast for matrices of up
            to 65,536 elements, else PyTorch's own product, which is "reference"), "reference" or
            "cpp".

    Returns:
        [T, N] or [..., N] in the dtype of `input`, under autocast in that of autocast. On cpp a row
        of the output or of the gradient of `input` has the same bits in any batch, and all
        gradients have for any number of threads.

    Raises:
        ValueError, TypeError: a shape or dtype is wrong.
        RuntimeError: `backend` cannot run.
    """
    check_tensor("input", input)
    if input.dim() == 0:
        raise ValueError("input must be [..., K], got []")
    device, low = input.device, autocast_dtype(input.device)
    dtypes = (input.dtype,) if low is None else FLOATS
    check_tensor("weight", weight, ("N", input.shape[-1]), dtypes, device)
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], dtypes, device)
    if backend is None:
        rounded = widened(linear, (input, weight, bias), weight)
        if rounded is not None:
            return rounded
    wide = input.dtype in (torch.float32, torch.float64)
    own = device.type == "cpu" and wide and low is None
    if backend is None and not own:
        backend = "reference"
    if resolve(backend, OP, device) == "reference":
        return linear_ref(input, weight, bias)
    if not wide or weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype):
        raise TypeError(
            "the cpp kernel of linear takes float32 or float64 tensors of one dtype, got input of"
            f" {input.dtype} and weight of {weight.dtype}"
        )
    if input.dim() == 2:
        return applied(_Linear, input, weight, bias)
    rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    return applied(_Linear, rows, weight, bias).view(*input.shape[:-1], weight.shape[0])
