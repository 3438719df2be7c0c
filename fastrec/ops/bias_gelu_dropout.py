"""dropout(GELU(input + bias)) in one pass, the mask never stored.

Legend: T rows, D width. With z = input + bias, P the normal distribution function, p its density:

    output = mask * z P(z)          grad_input = mask * grad_output * (P(z) + z p(z))

and grad_bias is the column sum of grad_input. Backward recomputes z from input and bias.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrec.backend import resolve
from fastrec.ops.common.native import kernels_of, register_cuda
from fastrec.random import Rng, check_views, dropout_arguments, keep_mask, views_of

OP = "bias_gelu_dropout"
_DROPOUT = (
    " Tensor? sample_ids, Tensor? positions, Tensor? key, int drop, int site, int layer, int view,"
    " int views"
)

# output and grad_input [T, D] have the dtype of input, grad_bias [D] ([0] if None) that of bias.
torch.library.define(
    f"fastrec::{OP}_fwd", f"(Tensor input, Tensor? bias,{_DROPOUT}) -> Tensor output"
)
torch.library.define(
    f"fastrec::{OP}_bwd",
    f"(Tensor grad_output, Tensor input, Tensor? bias,{_DROPOUT})"
    " -> (Tensor grad_input, Tensor grad_bias)",
)


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(input, bias, *dropout):
    return input.new_empty(input.shape)


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(grad_output, input, bias, *dropout):
    grad_bias = input.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return input.new_empty(input.shape), grad_bias


register_cuda(OP, "fwd", "bwd")


class _BiasGeluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, bias, sample_ids, positions, key, numbers, backend):
        fwd = kernels_of(OP, backend, input.device).bias_gelu_dropout_fwd
        ctx.save_for_backward(input, bias, sample_ids, positions, key)
        ctx.numbers, ctx.backend = numbers, backend  # drop, site, layer, view, views
        return fwd(input, bias, sample_ids, positions, key, *numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        input, bias, *key = ctx.saved_tensors
        bwd = kernels_of(OP, ctx.backend, input.device).bias_gelu_dropout_bwd
        grad_input, grad_bias = bwd(grad_output, input, bias, *key, *ctx.numbers)
        return (
            grad_input if ctx.needs_input_grad[0] else None,
            grad_bias if ctx.needs_input_grad[1] else None,
            *[None] * 5,
        )


def bias_gelu_dropout_ref(
    input,
    bias,
    *,
    dropout_p=0.0,
    rng=None,
    sample_ids=None,
    positions=None,
    site="ffn_inner",
    layer=0,
    views=1,
):
    """The oracle: plain PyTorch, the mask materialised."""
    output = F.gelu(input if bias is None else input + bias.to(input.dtype))
    if dropout_p > 0.0:
        width = input.shape[1]
        view = views_of(rng, input.shape[0], views, input.device)
        keep, scale = keep_mask(
            rng, dropout_p, sample_ids, positions, width, site=site, layer=layer, view=view
        )
        output = output * (keep.to(output.dtype) * scale)
    return output


def bias_gelu_dropout(
    input: Tensor,
    bias: Tensor | None,
    *,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    sample_ids: Tensor | None = None,
    positions: Tensor | None = None,
    site: str = "ffn_inner",
    layer: int = 0,
    views: int = 1,
    backend: str | None = None,
) -> Tensor:
    """dropout(GELU(input + bias)) with the exact GELU, z P(z) (Hendrycks and Gimpel, 2016).

    What follows the first product of a feed-forward network; `input` is that product without bias.

    Args:
        input: [T, D].
        bias: [D]; None adds nothing.
        dropout_p: probability, quantised to 1/256. 0 needs none of the following arguments.
        rng, site, layer: the key of the mask, see `fastrec.random`.
        sample_ids: int64 [T], the sample that each row belongs to.
        positions: int64 [T], the place of each row in its sample, below 65,536.
        views: the rows are that many blocks of equal size, and block i is dropped as view
            `rng.view` + i.
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        [T, D] in the dtype of `input`, computed in float32 (float64 for float64). A gradient has
        the dtype of its tensor. Not twice differentiable, except on the reference backend.

    Raises:
        ValueError, TypeError: a shape, dtype or option is wrong.
        RuntimeError: `backend` cannot run.
    """
    if input.dim() != 2 or not input.is_floating_point():
        raise ValueError(
            f"input must be floating point [T, D], got {input.dtype} {list(input.shape)}"
        )
    if bias is not None and bias.shape != input.shape[1:]:
        raise ValueError(f"bias must be [{input.shape[1]}], got {list(bias.shape)}")
    if bias is not None and (bias.dtype == torch.float64) != (input.dtype == torch.float64):
        raise TypeError(f"input and bias must both be float64, got {input.dtype} and {bias.dtype}")
    check_views(input.shape[0], views, "rows")
    dropout = dropout_arguments(
        rng, dropout_p, sample_ids, positions, input.shape[0], site=site, layer=layer, views=views
    )
    backend = resolve(backend, OP, input.device)
    if backend == "reference":
        dropout_p = dropout_p if dropout[3] else 0.0  # p rounds to 0: rng may be missing
        return bias_gelu_dropout_ref(
            input,
            bias,
            dropout_p=dropout_p,
            rng=rng,
            sample_ids=sample_ids,
            positions=positions,
            site=site,
            layer=layer,
            views=views,
        )
    return _BiasGeluDropout.apply(input, bias, *dropout[:3], dropout[3:], backend)
