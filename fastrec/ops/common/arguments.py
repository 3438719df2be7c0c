"""Checks of arguments that several ops make, and the dtype that they accumulate in.

On a GPU, and under torch.compile, a check of values must not synchronise the host: there it is a
device assertion, as in PyTorch's own losses, that carries the message.
"""

import torch
from torch import Tensor


def accumulate_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def ordered_sum(values: Tensor) -> Tensor:
    """The sum of a vector, with bits that do not depend on the number of threads: torch splits more
    than 32,768 numbers among them."""
    if values.device.type != "cpu" or len(values) <= 32768:
        return values.sum()
    return torch.stack([part.sum() for part in values.split(32768)]).sum()


def split_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b, rounded, and what rounding left out (Knuth's two-sum; 0 where a + b is infinite)."""
    whole = a + b
    part = whole - a
    rest = (a - (whole - part)) + (b - part)
    return whole, torch.where(rest == rest, rest, 0.0)


def check_range(name: str, index: Tensor, size: int, ignored: int | None = None) -> None:
    """Raise IndexError when a value of `index` [.] other than `ignored` is outside [0, size)."""
    on_host = _on_host(index)
    if on_host and index.numel():
        low, high = index.aminmax()
        if low.item() >= 0 and high.item() < size:  # usual, and cheaper than the operations below
            return
    wrong = (index < 0) | (index >= size)
    if ignored is not None:
        wrong = wrong & (index != ignored)
    if not on_host:
        torch._assert_async(~wrong.any(), f"{name} outside [0, {size})")
    elif wrong.any():
        at = int(wrong.nonzero()[0])
        raise IndexError(f"{name}[{at}] is {int(index[at])}, expected a value in [0, {size})")


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError unless `condition`, a bool of no dimensions."""
    if not _on_host(condition):
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_table(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, sharded: bool = False
) -> None:
    """Shapes and dtypes of rows beside the item table that scores them. `sharded`: the table is a
    part of one, and may have no rows."""
    named = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    for name, tensor in named.items():
        if hasattr(tensor, "device_mesh"):
            raise TypeError(
                f"{name} is a DTensor, which only the table of linear_cross_entropy may be, and its"
                " bias and class weights beside it: pass"
                f" {name}.full_tensor(grad_placements=[Partial('avg')]), which averages the"
                " gradients of the ranks as FSDP does"
            )
    if input.dim() != 2 or linear_weight.dim() != 2 or input.shape[1] != linear_weight.shape[1]:
        raise ValueError(
            "input must be [rows, D] and linear_weight [V, D], got"
            f" {list(input.shape)} and {list(linear_weight.shape)}"
        )
    if input.shape[1] == 0:
        raise ValueError("input has no columns: D must be at least 1")
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
    if linear_bias is not None and linear_bias.shape != (items,):
        raise ValueError(f"linear_bias must be [{items}], got {list(linear_bias.shape)}")
