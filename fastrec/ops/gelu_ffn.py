# SPDX-License-Identifier: Apache-2.0
"""The feed-forward network of a transformer layer: two linear layers with a GELU between them.

Legend: T rows, D input width, F inner width, E output width. With z = input W_in^T + b_in, h =
GELU(z), G = grad_output and dz = (G W_out) GELU'(z):

    output = h W_out^T + b_out      grad_input = dz W_in      grad_W_in = dz^T input
    grad_W_out = G^T h              grad_b_in, grad_b_out = sums over the rows of dz and G

F is usually 4 D, so z, h and their gradients are most of what a layer writes and reads. The C++
kernels take a block of rows through both products while it lies in the caches, save the input alone
and compute z again in backward: a seventh product of T D F where there were six. Elsewhere (GPU,
16-bit types, autocast of large matrices) the parts are called one after the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.bias_gelu_dropout import bias_gelu_dropout
from fastrec.ops.common.arguments import FLOATS, autocast_dtype, check_tensor, check_width
from fastrec.ops.common.native import applied
from fastrec.ops.common.second_order import leaf, twice_differentiable
from fastrec.ops.linear import linear, widened

OP = "gelu_ffn"
_LAYER = "Tensor input, Tensor weight_in, Tensor bias_in, Tensor weight_out"

torch.library.define(f"fastrec::{OP}_fwd", f"({_LAYER}, Tensor bias_out) -> Tensor output")
# Gradients that are not needed have no rows; the weights and biases have theirs together.
torch.library.define(
    f"fastrec::{OP}_bwd",
    f"(Tensor grad_output, {_LAYER}, bool input_needed, bool weights_needed) -> (Tensor grad_input,"
    " Tensor grad_weight_in, Tensor grad_bias_in, Tensor grad_weight_out, Tensor grad_bias_out)",
)


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(input, weight_in, bias_in, weight_out, bias_out):
    return input.new_empty(input.shape[0], weight_out.shape[0])


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(grad_output, input, weight_in, bias_in, weight_out, input_needed, weights_needed):
    def like(rows, columns):
        return input.new_empty(rows if weights_needed else 0, columns)

    inner, width = weight_in.shape
    out = weight_out.shape[0]
    grad_input = input.new_empty(input.shape if input_needed else (0, width))
    return grad_input, like(inner, width), like(1, inner), like(out, inner), like(1, out)


def _recompute(ctx, input, weight_in, bias_in, weight_out):
    inputs = input, weight_in, bias_in, weight_out, leaf(weight_out.shape[0], weight_out)
    return inputs, (gelu_ffn_ref(*inputs),)


class _GeluFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight_in, bias_in, weight_out, bias_out):
        ctx.save_for_backward(input, weight_in, bias_in, weight_out)
        return torch.ops.fastrec.gelu_ffn_fwd(input, weight_in, bias_in, weight_out, bias_out)

    @staticmethod
    @twice_differentiable(_recompute)
    def backward(ctx, grad_output):
        needed = ctx.needs_input_grad
        grad_input, w_in, b_in, w_out, b_out = torch.ops.fastrec.gelu_ffn_bwd(
            grad_output, *ctx.saved_tensors, needed[0], any(needed[1:])
        )
        grads = (grad_input, w_in, b_in.squeeze(0), w_out, b_out.squeeze(0))
        return tuple(grad if asked else None for grad, asked in zip(grads, needed, strict=True))


def gelu_ffn_ref(input, weight_in, bias_in, weight_out, bias_out):
    """The oracle."""
    return F.linear(F.gelu(F.linear(input, weight_in, bias_in)), weight_out, bias_out)


def gelu_ffn(
    input: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *,
    backend: str | None = None,
) -> Tensor:
    """GELU(input W_in^T + b_in) W_out^T + b_out with the exact GELU (Vaswani et al., 2017, eq. 2;
    Hendrycks and Gimpel, 2016).

    Args:
        input: [T, D], D > 0: float64, float32, bfloat16 or float16.
        weight_in: [F, D], F > 0. All parameters have the dtype of `input`, but for autocast.
        bias_in: [F]; None adds nothing, as for bias_out.
        weight_out: [E, F], E > 0.
        bias_out: [E].
        backend: None ("cpp" for float32 and float64 on a CPU, and under autocast where `linear` is,
            else `linear`, `bias_gelu_dropout` and `linear`), "reference" or "cpp".

    Returns:
        [T, E] in the dtype of `input`, under autocast in that of autocast. On cpp a row of the
        output or of the gradient of `input` has the same bits in any batch, and all gradients have
        for any number of threads.

    Raises:
        ValueError, TypeError: a shape or dtype is wrong.
        RuntimeError: `backend` cannot run.
    """
    check_width("input", input, ("T", "D"))
    device, low = input.device, autocast_dtype(input.device)
    dtypes = (input.dtype,) if low is None else FLOATS
    check_tensor("weight_in", weight_in, ("F", input.shape[1]), dtypes, device)
    inner = weight_in.shape[0]
    check_tensor("weight_out", weight_out, ("E", inner), dtypes, device)
    out = weight_out.shape[0]
    for name, rows in (("weight_in", inner), ("weight_out", out)):
        if rows == 0:
            raise ValueError(f"{name} has no rows")
    for name, bias, size in (("bias_in", bias_in, inner), ("bias_out", bias_out, out)):
        if bias is not None:
            check_tensor(name, bias, (size,), dtypes, device)
    tensors = (input, weight_in, bias_in, weight_out, bias_out)
    if backend is None:
        rounded = widened(gelu_ffn, tensors, weight_in, weight_out)
        if rounded is not None:
            return rounded
    wide = input.dtype in (torch.float32, torch.float64)
    wide = wide and all(t is None or t.dtype == input.dtype for t in tensors)
    if backend is None and (device.type != "cpu" or not wide or low is not None):
        hidden = bias_gelu_dropout(linear(input, weight_in), bias_in)
        return linear(hidden, weight_out, bias_out)
    if resolve(backend, OP, device) == "reference":
        return gelu_ffn_ref(*tensors)
    if not wide:
        raise TypeError(
            "the cpp kernel of gelu_ffn takes float32 or float64 tensors of one dtype, got input of"
            f" {input.dtype} and weight_in of {weight_in.dtype}"
        )
    # The kernel adds a bias in any case, for which zeros are as fast as nothing.
    bias_in = weight_in.new_zeros(inner) if bias_in is None else bias_in
    bias_out = weight_out.new_zeros(out) if bias_out is None else bias_out
    return applied(_GeluFfn, input, weight_in, bias_in, weight_out, bias_out)
