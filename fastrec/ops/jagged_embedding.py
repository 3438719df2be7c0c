# SPDX-License-Identifier: Apache-2.0
"""Item embedding + position embedding, LayerNorm and dropout in one pass over the events.

Legend: T events, V rows of the item table, P rows of the position table, D width.

    z_t = weight[values_t] + position_weight[positions_t]      output = dropout(LayerNorm(z))

Backward gathers z again, turns grad_output into grad_z [T, D], and sums its rows by item and by
position in the order of the events: sorted by index, no atomics on floats.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.common.arguments import (
    accumulate_dtype,
    beside,
    check_index,
    check_number,
    check_range,
    check_tensor,
    check_width,
)
from fastrec.ops.common.distinct_rows import distinct_rows, sparse_rows
from fastrec.ops.common.dropout import SCHEMA, Mask, mask_of_rows
from fastrec.ops.common.native import applied, kernels_of, register_cuda
from fastrec.ops.common.second_order import twice_differentiable
from fastrec.random import Rng, keep_mask

OP = "jagged_embedding"
_INPUTS = (
    "Tensor? values, Tensor weight, Tensor? position_weight, Tensor? norm_weight, Tensor? norm_bias"
)

# output [T, D] has the dtype of weight; mean and rstd [T] ([0] without norm_weight) are float32, or
# float64 with it. Without norm_weight there is no LayerNorm; without values event t has row t. The
# positions of the mask are the rows of position_weight too.
torch.library.define(
    f"fastrec::{OP}_fwd",
    f"({_INPUTS}, float eps, {SCHEMA}) -> (Tensor output, Tensor mean, Tensor rstd)",
)
# grad_z [T, D] has the dtype of mean; the others are [0] without norm_weight or norm_bias.
torch.library.define(
    f"fastrec::{OP}_bwd",
    f"(Tensor grad_output, {_INPUTS}, Tensor mean, Tensor rstd, {SCHEMA})"
    " -> (Tensor grad_z, Tensor grad_norm_weight, Tensor grad_norm_bias)",
)
# out[i] = sum of the rows t of grad [T, D] with index_t = i, 0 where there is none.
torch.library.define(
    f"fastrec::{OP}_scatter",
    "(Tensor grad, Tensor index, int rows, ScalarType dtype) -> Tensor",
)


def _events(values: Tensor | None, weight: Tensor) -> int:
    return weight.shape[0] if values is None else values.shape[0]


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(values, weight, position_weight, norm_weight, norm_bias, eps, *mask):
    events = _events(values, weight)
    mean = weight.new_empty(0 if norm_weight is None else events, dtype=accumulate_dtype(weight))
    return weight.new_empty(events, weight.shape[1]), mean, torch.empty_like(mean)


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(grad_output, values, weight, position_weight, norm_weight, norm_bias, mean, rstd, *mask):
    def like(vector):
        return mean.new_empty(0) if vector is None else vector.new_empty(vector.shape)

    size = (_events(values, weight), grad_output.shape[1])
    return mean.new_empty(size), like(norm_weight), like(norm_bias)


@torch.library.register_fake(f"fastrec::{OP}_scatter")
def _(grad, index, rows, dtype):
    return grad.new_empty(rows, grad.shape[1], dtype=dtype)


register_cuda(OP, "fwd", "bwd", "scatter")


def _recompute(
    ctx, values, weight, position_weight, norm_weight, norm_bias, mean, rstd, keys, positions, rng
):  # fmt: skip
    mask = Mask(keys, positions, rng, *ctx.numbers)
    output = jagged_embedding_ref(
        values, weight, position_weight, norm_weight=norm_weight, norm_bias=norm_bias, eps=ctx.eps,
        **{"positions": positions} | mask.options,
    )  # fmt: skip
    return (weight, position_weight, norm_weight, norm_bias), (output,)


class _JaggedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, weight, position_weight, norm_weight, norm_bias, values, eps, sparse, backend,
        *arguments,
    ):  # fmt: skip
        fwd = kernels_of(OP, backend, weight.device).jagged_embedding_fwd
        mask, inputs = Mask(*arguments), (values, weight, position_weight, norm_weight, norm_bias)
        output, mean, rstd = fwd(*inputs, eps, *mask)
        ctx.save_for_backward(*inputs, mean, rstd, *mask.tensors)
        ctx.numbers, ctx.sparse, ctx.backend, ctx.eps = mask.numbers, sparse, backend, eps
        return output

    @staticmethod
    @twice_differentiable(_recompute)
    def backward(ctx, grad_output):
        *saved, keys, positions, rng = ctx.saved_tensors
        values, weight, position_weight, norm_weight, *_ = saved
        mask = Mask(keys, positions, rng, *ctx.numbers)
        kernels = kernels_of(OP, ctx.backend, weight.device)
        bwd = kernels.jagged_embedding_bwd
        scatter = kernels.jagged_embedding_scatter
        grad_z, grad_norm_weight, grad_norm_bias = grad_output, None, None
        if norm_weight is not None or mask.drop:
            grad_z, grad_norm_weight, grad_norm_bias = bwd(grad_output, *saved, *mask)
        needed = ctx.needs_input_grad
        grad_weight = grad_position = None
        if needed[0] and values is None:
            grad_weight = grad_z.to(weight.dtype)
        elif needed[0] and ctx.sparse:
            rows, index = distinct_rows(values.long(), weight.shape[0])
            sums = scatter(grad_z, index, rows.shape[0], weight.dtype)
            grad_weight = sparse_rows(rows, sums, weight.shape)
        elif needed[0]:
            grad_weight = scatter(grad_z, values, weight.shape[0], weight.dtype)
        if needed[1]:
            grad_position = scatter(
                grad_z, mask.positions, position_weight.shape[0], position_weight.dtype
            )
        return (
            grad_weight,
            grad_position,
            grad_norm_weight if needed[2] else None,
            grad_norm_bias if needed[3] else None,
            *[None] * (4 + len(Mask._fields)),
        )


def jagged_embedding_ref(
    values,
    weight,
    position_weight=None,
    positions=None,
    *,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    dropout_p=0.0,
    rng=None,
    keys=None,
    site="embedding",
    layer=0,
    sparse=False,
):
    """The oracle: plain PyTorch, the mask materialised."""
    z = weight if values is None else F.embedding(values, weight, sparse=sparse)
    if position_weight is not None:
        z = z + F.embedding(positions, position_weight).to(z.dtype)
    if norm_weight is not None:
        bias = None if norm_bias is None else norm_bias.to(z.dtype)
        z = F.layer_norm(z, z.shape[1:], norm_weight.to(z.dtype), bias, eps)
    if dropout_p > 0.0:
        width = z.shape[1]
        keep, scale = keep_mask(rng, dropout_p, keys, positions, width, site=site, layer=layer)
        z = z * (keep.to(z.dtype) * scale)
    return z


def _check(values, weight, position_weight, positions, norm_weight, norm_bias):
    """values and positions as int64."""
    check_width("weight", weight, ("V", "D"))
    device, width, dtypes = weight.device, weight.shape[1], beside(weight)
    if values is not None:
        values = check_index("values", values, ("T",), device)
        check_range("values", values, weight.shape[0])
    if positions is not None:
        positions = check_index("positions", positions, (_events(values, weight),), device)
    if position_weight is not None:
        check_tensor("position_weight", position_weight, ("P", width), dtypes, device)
        if positions is None:
            raise ValueError("position_weight needs positions")
        check_range("positions", positions, position_weight.shape[0])
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None:
            check_tensor(name, vector, (width,), dtypes, device)
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias needs norm_weight: without a weight there is no LayerNorm")
    return values, positions


def jagged_embedding(
    values: Tensor | None,
    weight: Tensor,
    position_weight: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    keys: Tensor | None = None,
    site: str | int = "embedding",
    layer: int = 0,
    sparse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """dropout(LayerNorm(weight[values] + position_weight[positions])) of a jagged batch.

    The input of a transformer without padding, as in BERT4Rec (Sun et al., 2019, eq. 7) with the
    LayerNorm and dropout of BERT. Special tokens are rows of `weight` like items.

    Args:
        values: [T], rows of `weight`; None: event t has row t, for vectors made elsewhere.
        weight: [V, D], D > 0: float64, float32, bfloat16 or float16.
        position_weight: [P, D]; None adds nothing.
        positions: [T], the place of each event in its sequence. Like `values` and `keys` int64, or
            int32, which is converted.
        norm_weight, norm_bias: [D]; without a weight there is no LayerNorm. They and
            position_weight are float64 with `weight` or not at all.
        eps: added to the variance.
        dropout_p: probability, quantised to 1/256; needs `rng`, `keys` and `positions`.
        rng, site, layer: the key of the mask, see `fastrec.random`.
        keys: [T], the key of the sequence that each event belongs to.
        sparse: the gradient of `weight` is a sparse tensor of the rows that occur, each once, as
            that of `torch.nn.functional.embedding`: for tables much larger than a batch. On a GPU
            backward waits for the number of these rows.
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        [T, D] in the dtype of `weight`, computed in float32 (float64 for float64). A gradient
        has the dtype of its tensor; its rows are summed in float32 in the order of the events, the
        same bits on every call.

    Raises:
        ValueError, TypeError: a shape, dtype or option is wrong.
        IndexError: a value or a position is out of range (a device assertion on a GPU).
        RuntimeError: `backend` cannot run.
    """
    values, positions = _check(values, weight, position_weight, positions, norm_weight, norm_bias)
    check_number("eps", eps)
    events, device = _events(values, weight), weight.device
    mask = mask_of_rows(rng, dropout_p, keys, positions, events, device, site=site, layer=layer)
    if mask.positions is None:
        mask = Mask(positions=positions)
    backend = resolve(backend, OP, device)
    if backend == "reference":
        return jagged_embedding_ref(
            values, weight, position_weight, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
            sparse=sparse, **{"positions": positions} | mask.options,
        )  # fmt: skip
    inputs = weight, position_weight, norm_weight, norm_bias, values
    return applied(_JaggedEmbedding, *inputs, eps, sparse, backend, *mask)
