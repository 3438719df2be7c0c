"""What the losses of rows over a table of items share: argument checks and the reduction.

Legend: N scored rows, V items, D width, T rows of `input` before selection.
"""

import torch
from torch import Tensor


def accumulate_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def reduce_loss(loss: Tensor, row_weight: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    # No scored row, or only rows of weight 0: the mean is 0 with a live graph, not NaN.
    total = row_weight.sum()
    return loss.sum() / torch.where(total == 0, 1, total)


def check_arguments(
    input,
    linear_weight,
    target,
    linear_bias,
    weight,
    reduction,
    label_smoothing,
    rows,
    sharded=False,
):
    """`sharded`: the table is a part of one, and may have no rows."""
    if input.dim() != 2 or linear_weight.dim() != 2 or input.shape[1] != linear_weight.shape[1]:
        raise ValueError(
            "input must be [T, D] and linear_weight [V, D], got"
            f" {list(input.shape)} and {list(linear_weight.shape)}"
        )
    items = linear_weight.shape[0]
    if items == 0 and not sharded:
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


def check_range(name: str, index: Tensor, size: int, ignored: int | None = None) -> None:
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
