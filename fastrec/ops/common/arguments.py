# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that the ops share, and the dtype that they accumulate in.

A check of sizes, dtypes and devices reads no values. One of values must not synchronise the host:
on a GPU and under torch.compile it is a device assertion, as in PyTorch's own losses, that carries
the message. Where there are no values (meta and fake tensors) nothing is checked.
"""

import contextlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrec.tensors import INDEX, has_values

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SINGLE = FLOATS[1:]
DOUBLE = FLOATS[:1]
BOOL = (torch.bool,)


def accumulate_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def beside(input: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes of a parameter beside `input`: float64 together or not at all."""
    return DOUBLE if input.dtype == torch.float64 else SINGLE


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast rounds float32 to; None outside it and on a device that has none (meta)."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast_input(input: Tensor) -> Tensor:
    """`input` as autocast hands it to a product: float32 is rounded."""
    low = autocast_dtype(input.device)
    return input if low is None or input.dtype != torch.float32 else input.to(low)


def without_autocast(device: torch.device):
    kind = device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


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


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """TypeError unless `tensor` is a dense tensor of one of `dtypes`, ValueError unless it is on
    `device` and has `shape`: a letter stands for any size, None for any shape."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor: pass its values() and its offsets()")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}")
    if tensor.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        known = " or ".join(known.rsplit(", ", 1))
        raise TypeError(f"{name} must be {known}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device} like the others")
    if shape is None:
        return
    sizes = tensor.shape
    if len(sizes) == len(shape):
        for size, expected in zip(sizes, shape, strict=True):
            if size != expected and not isinstance(expected, str):
                break
        else:
            return
    expected = ", ".join(map(str, shape))
    raise ValueError(f"{name} must be [{expected}], got {list(sizes)}")


def check_number(name: str, number, whole: bool = False, finite: bool = False) -> None:
    """TypeError for what is no number, or with `whole` no whole one; a tensor or array is none: it
    would get no gradient. ValueError for a whole one beyond int64, and with `finite` for one that
    is not."""
    no_number = isinstance(number, (Tensor, str, np.ndarray)) or number is None
    if no_number or (whole and isinstance(number, (float, np.floating))):
        kind = "a whole number" if whole else "a number"
        raise TypeError(f"{name} must be {kind}, got {type(number).__name__} {number!r:.60}")
    if whole and isinstance(number, int) and not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must be a number of 64 bits, got {number}")
    if finite and not -math.inf < number < math.inf:
        raise ValueError(f"{name} must be finite, got {number}")


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


def is_nested(tensor: Tensor | None) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_nested


def jagged_parts(offsets: Tensor | None, **nested: Any) -> tuple[list[Tensor], Tensor]:
    """(values, offsets) of nested tensors in the layout torch.jagged, whose sequences are alike."""
    names = ", ".join(nested)
    for name, tensor in nested.items():
        if not (is_nested(tensor) and tensor.layout is torch.jagged):
            raise TypeError(f"{names} must all be nested tensors of the layout torch.jagged")
        if tensor.lengths() is not None or tensor._ragged_idx != 1:
            raise ValueError(f"{name} must be [B, *, ...] without holes: pass {name}.contiguous()")
    if offsets is not None:
        raise ValueError(f"offsets are those of the nested tensors {names}: pass none")
    first, *others = (tensor.offsets() for tensor in nested.values())
    message = f"{names} must have sequences of the same lengths"
    for other in others:
        if other.shape != first.shape:
            raise ValueError(message)
        if other is not first:
            require((other == first).all(), message)
    return [tensor.values() for tensor in nested.values()], first


def check_width(name: str, tensor: Tensor, shape: tuple) -> None:
    """A floating point matrix of at least one column."""
    check_tensor(name, tensor, shape)
    if tensor.shape[1] == 0:
        raise ValueError(f"{name} has no columns: {shape[1]} must be at least 1")


def check_index(name: str, index: Tensor, shape: tuple, device: torch.device) -> Tensor:
    """`index` as int64, of int64 or int32."""
    check_tensor(name, index, shape, INDEX, device)
    return index if index.dtype == torch.int64 else index.to(torch.int64)


def check_range(name: str, index: Tensor, size: int, ignored: int | None = None) -> None:
    """Raise IndexError when a value of `index` other than `ignored` is outside [0, size)."""
    index = _behind(index)
    readable = has_values(index)
    if readable and index.numel():
        low, high = _extremes(index)
        if low >= 0 and high < size:  # usual, and cheaper than the operations below
            return
    wrong = (index < 0) | (index >= size)
    if ignored is not None:
        wrong = wrong & (index != ignored)
    if not readable:
        # A size in the text of an assertion would make the compiled graph one of that size alone.
        bounds = "its range" if torch.compiler.is_compiling() else f"[0, {size})"
        torch._assert_async(~wrong.any(), f"{name} outside {bounds}")
    elif wrong.any():
        at = wrong.nonzero()[0].tolist()
        value = int(index[tuple(at)])
        place = ", ".join(map(str, at))
        raise IndexError(f"{name}[{place}] is {value}, expected a value in [0, {size})")


def check_offsets(
    name: str, offsets: Tensor, end: int, what: str, max_seq_len: int | None = None
) -> None:
    """Raise ValueError unless `offsets` [B + 1] rise from 0 to `end` in steps of at most
    `max_seq_len`. Elsewhere than on the host nothing is looked at."""
    if offsets.shape[0] == 0:
        raise ValueError(f"{name} must be [B + 1], from 0 to {what}, got []")
    offsets = _behind(offsets)
    if offsets.dim() != 1 or not has_values(offsets):
        return
    first, last = offsets[0].item(), offsets[-1].item()
    low, high = 0.0, 0.0
    if offsets.shape[0] == 2:
        low = high = last - first
    elif offsets.shape[0] > 2:
        low, high = _extremes(offsets.diff())
    # No step above `end`: a difference that runs over 2^63 is one, or negative.
    bound = end if max_seq_len is None else min(end, max_seq_len)
    if first != 0 or last != end or low < 0 or high > bound:
        most = ""
        if max_seq_len is not None:
            most = f" in steps of at most max_seq_len = {max_seq_len}"
        raise ValueError(
            f"{name} must rise from 0 to {what} = {end}{most}, got {first} to {last} in steps of"
            f" {low:.0f} to {high:.0f}"
        )


def check_lists(
    name: str, values: Tensor, offsets_name: str, offsets: Tensor, rule: str, distinct: bool = False
) -> None:
    """Raise ValueError, "{name} {rule}", unless the values of each list rise, `distinct` ones
    strictly. Beside `check_range` and `check_offsets`: offsets that this one does not look at are
    asserted here."""
    if not has_values(offsets):
        rise = (offsets[1:] >= offsets[:-1]).all()  # a difference may run over 2^63
        rise = rise & (offsets[0] == 0) & (offsets[-1] == len(values))
        require(rise, f"{offsets_name} must rise from 0 to E, the number of {name}")
    steps = values.diff()
    rises = steps > 0 if distinct else steps >= 0
    if len(offsets) > 2:  # else no other list begins anywhere
        starts = torch.zeros(len(values) + 1, dtype=torch.bool, device=values.device)
        # A wrong offset was refused above (on a GPU: is about to be).
        starts = starts.index_fill(0, offsets.clamp(0, len(values)), True)
        rises = rises | starts[1 : len(values)]
    require(rises.all(), f"{name} {rule}")


def _extremes(index: Tensor) -> tuple[int, int]:
    """The smallest and the largest value."""
    if index.numel() <= 64:  # of a request for one user: 2 us, not 8
        values = index.flatten().tolist()
        return min(values), max(values)
    low, high = index.aminmax()
    return int(low.item()), int(high.item())


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError unless `condition`, a bool of no dimensions."""
    condition = _behind(condition)
    if condition.dim():  # of the calls of a vmap
        condition = condition.all()
    if not has_values(condition):
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _behind(tensor: Tensor) -> Tensor:
    """Under torch.func: the tensor behind its wrappers, with the values of all calls of a vmap."""
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def check_table(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, sharded: bool = False
) -> None:
    """Rows beside the item table that scores them. `sharded`: the table is a part of one, and may
    have no rows."""
    named = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    for name, tensor in named.items():
        if hasattr(tensor, "device_mesh"):
            raise TypeError(
                f"{name} is a DTensor, which only the table of linear_cross_entropy may be, and its"
                " bias and class weights beside it: pass"
                f" {name}.full_tensor(grad_placements=[Partial('avg')]), which averages the"
                " gradients of the ranks as FSDP does"
            )
    check_width("input", input, ("N", "D"))
    device, width = input.device, input.shape[1]
    low_precision = input.dtype in (torch.bfloat16, torch.float16)
    allowed = (input.dtype, torch.float32) if low_precision else (input.dtype,)
    check_tensor("linear_weight", linear_weight, ("V", width), allowed, device)
    items = linear_weight.shape[0]
    if items == 0 and not sharded:
        raise ValueError("linear_weight has no rows: there is no item to score")
    if linear_bias is not None:
        check_tensor("linear_bias", linear_bias, (items,), FLOATS, device)
