"""Softmax cross-entropy of a linear layer, without the N x V logits.

Legend: N scored rows, V items, D width, T rows of `input` before selection.

The kernels know one function of the logits s_ij = x_i . W_j + b_j and its derivative:

    lse_i = logsumexp_j s_ij,   target_logit_i = s_i,y_i,   p_ij = exp(s_ij - lse_i)
    dx_i = grad_lse_i * sum_j p_ij W_j + grad_target_i * W_y
    dW_j = sum_i grad_lse_i * p_ij * x_i + sum_{i: y_i = j} grad_target_i * x_i,  db_j without x_i

Class weights, smoothing, z-loss and reductions are arithmetic on these [N] vectors. The forward
kernel also returns mean_offset_i = sum_j p_ij (W_j - W_y), so dx needs no second sweep over the
items. As an offset, because W_y cancels in the gradient of the usual loss: kernels that round the
table subtract the row that they multiplied with, which the caller does not have.

A mean or a sum without smoothing and z-loss is known up to the scalar that backward gets. For few
items one cpp kernel computes that loss and its gradients in forward, and backward scales them: the
exponentials of a chunk of rows stay in a cache, so the scores need not be computed twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrec.backend import resolve

OP = "linear_cross_entropy"

# target [N] int64, -1 = row not scored: its outputs are 0 and it contributes no gradient. lse,
# target_logit [N] and mean_offset [N, D] ([0, D] if not asked for) are float32 or float64 with it.
torch.library.define(
    f"fastrec::{OP}_fwd",
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    " bool with_offset) -> (Tensor lse, Tensor target_logit, Tensor mean_offset)",
)
# grad_weight [V, D] and grad_bias [V] ([0] if None) have the dtypes of the table and its bias.
torch.library.define(
    f"fastrec::{OP}_bwd",
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor lse,"
    " Tensor grad_lse, Tensor grad_target_logit) -> (Tensor grad_weight, Tensor grad_bias)",
)
# Beyond this many items the stored exponentials leave the caches: see docs/kernels.
STORED_ITEMS = 32768

# The plain sum or mean of class weight x (lse - target_logit) over the rows with target !=
# ignore_index, and its gradients ([0, D] or [0] for those that are not asked for). cpp only.
torch.library.define(
    f"fastrec::{OP}_value_and_grad",
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight,"
    " int ignore_index, bool mean, bool with_input, bool with_weight)"
    " -> (Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
)


def _accumulate_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(input, linear_weight, linear_bias, target, with_offset):
    rows, width = input.shape
    out = input.new_empty(rows, dtype=_accumulate_dtype(input))
    return out, torch.empty_like(out), out.new_empty(rows if with_offset else 0, width)


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(input, linear_weight, linear_bias, target, lse, grad_lse, grad_target_logit):
    # Contiguous, whatever the strides of the inputs are.
    grad_bias = (
        lse.new_empty(0) if linear_bias is None else linear_bias.new_empty(linear_bias.shape)
    )
    return linear_weight.new_empty(linear_weight.shape), grad_bias


@torch.library.register_fake(f"fastrec::{OP}_value_and_grad")
def _(
    input, linear_weight, linear_bias, target, weight, ignore_index, mean, with_input, with_weight
):
    rows, (items, width) = input.shape[0], linear_weight.shape
    return (
        input.new_empty(()),
        input.new_empty(rows if with_input else 0, width),
        linear_weight.new_empty(items if with_weight else 0, width),
        linear_weight.new_empty(items if with_weight and linear_bias is not None else 0),
    )


@torch.library.impl(f"fastrec::{OP}_fwd", "CUDA")
def _(*args):
    from fastrec.kernels import linear_cross_entropy as kernels

    return kernels.linear_cross_entropy_fwd(*args)


@torch.library.impl(f"fastrec::{OP}_bwd", "CUDA")
def _(*args):
    from fastrec.kernels import linear_cross_entropy as kernels

    return kernels.linear_cross_entropy_bwd(*args)


def _launchers(backend: str, device: torch.device):
    if backend == "triton" and device.type != "cuda":  # the interpreter, see backend.interpreting
        from fastrec.kernels import linear_cross_entropy as kernels

        return kernels.linear_cross_entropy_fwd, kernels.linear_cross_entropy_bwd
    return torch.ops.fastrec.linear_cross_entropy_fwd, torch.ops.fastrec.linear_cross_entropy_bwd


class _LinearCrossEntropy(torch.autograd.Function):
    """(lse, target_logit, class_sum) with class_sum_i = sum_j class_weight_j s_ij (0 if None)."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, rows, class_weight, backend):
        fwd, _ = _launchers(backend, input.device)
        x = input if rows is None else input.index_select(0, rows)
        lse, target_logit, mean_offset = fwd(
            x, linear_weight, linear_bias, target, ctx.needs_input_grad[0]
        )
        class_mean, class_sum = None, torch.zeros_like(lse)
        if class_weight is not None:
            # In pieces: a sum over the items overflows float16, a whole table in float32 is large.
            pieces = zip(class_weight.split(65536), linear_weight.split(65536), strict=True)
            class_mean = sum(a @ w.to(lse.dtype) for a, w in pieces)
            class_sum = (x.to(lse.dtype) @ class_mean).masked_fill(target < 0, 0)
            if linear_bias is not None:
                class_sum = class_sum + (class_weight @ linear_bias.to(lse.dtype)) * (target >= 0)
        ctx.save_for_backward(
            x, linear_weight, linear_bias, target, rows, class_weight, lse, mean_offset, class_mean
        )
        ctx.backend, ctx.input_shape = backend, input.shape
        return lse, target_logit, class_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_lse, grad_target_logit, grad_class_sum):
        (
            x,
            linear_weight,
            linear_bias,
            target,
            rows,
            class_weight,
            lse,
            mean_offset,
            class_mean,
        ) = ctx.saved_tensors
        _, bwd = _launchers(ctx.backend, x.device)
        scored = (target >= 0).to(lse.dtype)
        grad_lse = (grad_lse * scored).contiguous()
        grad_target_logit = (grad_target_logit * scored).contiguous()
        grad_class_sum = grad_class_sum * scored
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad = mean_offset * grad_lse[:, None]
            target_rows = linear_weight.index_select(0, target.clamp_min(0)).to(lse.dtype)
            grad = torch.addcmul(grad, target_rows, (grad_lse + grad_target_logit)[:, None])
            if class_mean is not None:
                grad = torch.addcmul(grad, class_mean, grad_class_sum[:, None])
            grad = grad.to(x.dtype)
            if rows is None:
                grad_input = grad
            elif grad.is_cpu:
                grad_input = grad.new_zeros(ctx.input_shape).index_add_(0, rows, grad)
            else:  # sorts and adds in a fixed order; index_add there is atomic
                grad_input = grad.new_zeros(ctx.input_shape)
                grad_input.index_put_((rows,), grad, accumulate=True)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_bias = bwd(
                x, linear_weight, linear_bias, target, lse, grad_lse, grad_target_logit
            )
            if class_weight is not None:
                # The same rank-1 term for every row: no second [V, D] buffer. Not addr_, whose bits
                # depend on the number of threads.
                direction = (grad_class_sum @ x.to(lse.dtype)).to(grad_weight.dtype)
                grad_weight = grad_weight.addcmul_(
                    class_weight[:, None].to(grad_weight.dtype), direction
                )
                if linear_bias is not None:
                    grad_bias = grad_bias + (class_weight * grad_class_sum.sum()).to(
                        grad_bias.dtype
                    )
        return (
            grad_input,
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
            None,
        )


class _PlainLoss(torch.autograd.Function):
    """The sum or mean of the losses; float32 or float64 throughout, so that scaling the gradients
    in backward neither overflows nor underflows."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, ignore_index, mean):
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        loss, *grads = torch.ops.fastrec.linear_cross_entropy_value_and_grad(
            input,
            linear_weight,
            linear_bias,
            target,
            weight,
            ignore_index,
            mean,
            needs_input,
            needs_weight or needs_bias,
        )
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grads = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(grad * grad_loss if needed else None for grad, needed in grads), *[None] * 4


def linear_cross_entropy_ref(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
    rows=None,
    z_loss=0.0,
):
    """The oracle: plain PyTorch, any dtype, materialises the logits."""
    if rows is not None and rows.dtype == torch.bool:
        target = torch.where(rows, target, ignore_index)
    elif rows is not None:
        input = input[rows]
    bias = None if linear_bias is None else linear_bias.to(input.dtype)
    logits = F.linear(input, linear_weight.to(input.dtype), bias)
    logits = logits.to(_accumulate_dtype(input))
    kept = target != ignore_index
    y = torch.where(kept, target, 0)
    class_weight = logits.new_ones(logits.shape[1]) if weight is None else weight.to(logits.dtype)
    lse = torch.logsumexp(logits, dim=1)
    log_p = torch.log_softmax(logits, dim=1)
    row_weight = class_weight[y] * kept
    loss = -(1 - label_smoothing) * row_weight * log_p.gather(1, y[:, None]).squeeze(1)
    if label_smoothing:
        loss = loss - kept * (log_p @ class_weight) * (label_smoothing / logits.shape[1])
    loss = loss + z_loss * row_weight * lse.square()
    loss = torch.where(kept, loss, 0)
    return _reduce(loss, row_weight, reduction)


def _reduce(loss: Tensor, row_weight: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    # No scored row, or only rows of weight 0: the mean is 0 with a live graph, not NaN.
    total = row_weight.sum()
    return loss.sum() / torch.where(total == 0, 1, total)


def _check(input, linear_weight, target, linear_bias, weight, reduction, label_smoothing, rows):
    if input.dim() != 2 or linear_weight.dim() != 2 or input.shape[1] != linear_weight.shape[1]:
        raise ValueError(
            "input must be [T, D] and linear_weight [V, D], got"
            f" {list(input.shape)} and {list(linear_weight.shape)}"
        )
    items = linear_weight.shape[0]
    if items == 0:
        raise ValueError("linear_weight has no rows: there is no item to score")
    for name, tensor in (("input", input), ("linear_bias", linear_bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {tensor.dtype}")
    low_precision = input.dtype in (torch.bfloat16, torch.float16)
    allowed = (input.dtype, torch.float32) if low_precision else (input.dtype,)
    if linear_weight.dtype not in allowed:
        expected = " or ".join(map(str, allowed))
        raise TypeError(f"linear_weight must be {expected}, got {linear_weight.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 item ids, got {target.dtype}")
    for name, vector in (("linear_bias", linear_bias), ("weight", weight)):
        if vector is not None and vector.shape != (items,):
            raise ValueError(f"{name} must be [{items}], got {list(vector.shape)}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if rows is not None and rows.dtype not in (torch.int64, torch.bool):
        raise TypeError(f"rows must be int64 positions or a bool mask, got {rows.dtype}")
    scored = input.shape[0] if rows is None or rows.dtype == torch.bool else rows.shape[0]
    if target.shape != (scored,):
        raise ValueError(f"target must be [{scored}], one per scored row, got {list(target.shape)}")
    if rows is not None and rows.dtype == torch.bool and rows.shape != (scored,):
        raise ValueError(f"rows as a mask must be [{scored}], got {list(rows.shape)}")


def _check_range(name: str, index: Tensor, size: int, ignored: int | None = None) -> None:
    """Raise when an index is outside [0, size). No host synchronisation on a GPU: there, as in
    PyTorch's own losses, the failure is a device assertion."""
    on_host = index.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and index.numel():
        low, high = index.aminmax()
        if low.item() >= 0 and high.item() < size:  # usual, and cheaper than the operations below
            return
    wrong = (index < 0) | (index >= size)
    if ignored is not None:
        wrong = wrong & (index != ignored)
    if not on_host:
        torch._assert_async(~wrong.any(), f"linear_cross_entropy: {name} outside [0, {size})")
    elif wrong.any():
        at = int(wrong.nonzero()[0])
        raise IndexError(f"{name}[{at}] is {int(index[at])}, expected a value in [0, {size})")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    rows: Tensor | None = None,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of `input[rows] @ linear_weight.T + linear_bias`, logits never stored.

    Arguments and semantics are those of `torch.nn.functional.linear_cross_entropy`, plus `rows`
    and `z_loss`. With a_i = weight[target_i] (1 without `weight`), and 0 for ignored rows:

        loss_i = (1 - label_smoothing) a_i (lse_i - s_i,y) + z_loss a_i lse_i^2
                 + label_smoothing / V * sum_j weight_j (lse_i - s_ij)

    This is the softmax of masked item prediction (UPRec, eq. 6-7) with the item table as W.

    Args:
        input: [T, D], float64, float32, bfloat16 or float16.
        linear_weight: item table [V, D], same dtype, or float32 beside a low-precision input.
        target: int64 item ids in [0, V), one per scored row: [N] for index `rows`, else [T].
        linear_bias: [V]. -inf takes an item out of the softmax.
        weight: class weights [V], not differentiated.
        reduction: "mean" (divided by sum of a_i; 0 when that is 0), "sum" or "none".
        ignore_index: target value of rows that are not scored: loss 0, no gradient.
        label_smoothing: in [0, 1].
        rows: positions of `input` to score: int64 [N] (repeats allowed) or a bool mask [T].
        z_loss: weight of the squared log-partition term.
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        float32 (float64 for float64 input): a scalar, or per scored row for "none" ([T] for a mask,
        0 where it is False). Gradients have the dtype of their tensor; products accumulate in
        float32. Not twice differentiable, except on the reference backend.

    Raises:
        ValueError, TypeError: a shape, dtype or option is wrong. IndexError: a target or a row is
        out of range (a device assertion on a GPU). RuntimeError: `backend` cannot run.
    """
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype == torch.float32:
        input = input.to(torch.get_autocast_dtype(device))
    _check(input, linear_weight, target, linear_bias, weight, reduction, label_smoothing, rows)
    _check_range("target", target, linear_weight.shape[0], ignore_index)
    if rows is not None and rows.dtype == torch.int64:
        _check_range("rows", rows, input.shape[0])
    backend = resolve(backend, OP, input.device)
    if backend == "reference":
        return linear_cross_entropy_ref(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            rows=rows,
            z_loss=z_loss,
        )
    if rows is not None and rows.dtype == torch.bool:
        target, rows = torch.where(rows, target, ignore_index), None
    plain = reduction != "none" and not label_smoothing and not z_loss
    full = input.dtype in (torch.float32, torch.float64)
    # Under no_grad a Function is still told that its inputs need gradients.
    learns = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (input, linear_weight, linear_bias)
    )
    if backend == "cpp" and plain and full and learns and linear_weight.shape[0] <= STORED_ITEMS:
        scored = input if rows is None else input.index_select(0, rows)
        class_weight = None if weight is None else weight.detach().to(input.dtype).contiguous()
        return _PlainLoss.apply(
            scored,
            linear_weight,
            linear_bias,
            target,
            class_weight,
            ignore_index,
            reduction == "mean",
        )
    kept = target != ignore_index
    y = torch.where(kept, target, -1)
    accumulate = _accumulate_dtype(input)
    class_weight = None if weight is None else weight.detach().to(accumulate)
    smoothed = None
    if label_smoothing:
        smoothed = class_weight
        if smoothed is None:
            smoothed = input.new_ones(linear_weight.shape[0], dtype=accumulate)
    lse, target_logit, class_sum = _LinearCrossEntropy.apply(
        input, linear_weight, linear_bias, y, rows, smoothed, backend
    )
    row_weight = kept.to(accumulate)
    if class_weight is not None:
        row_weight = row_weight * class_weight[y.clamp_min(0)]
    loss = (1 - label_smoothing) * row_weight * (lse - target_logit)
    if smoothed is not None:
        smoothing = smoothed.sum() * lse - class_sum
        loss = loss + (label_smoothing / linear_weight.shape[0]) * (kept * smoothing)
    if z_loss:
        loss = loss + z_loss * row_weight * lse.square()
    return _reduce(loss, row_weight, reduction)
