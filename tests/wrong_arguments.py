# SPDX-License-Identifier: Apache-2.0
"""Changes of the arguments of a sample of op_db, and what is wrong with how a call took one.

A change may be legal (another row of a table, int32 ids): then the result must be right.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from op_check import FLOAT32, assert_within_budget, on, samples
from op_db.case import Op, Sample, promote, run

DTYPES = (
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32, torch.int64, torch.bool),
    *(torch.complex64, torch.float64, torch.float32, torch.bfloat16, torch.float16),
)
ERRORS = (ValueError, TypeError, IndexError, RuntimeError)
LARGEST = 2**63 - 1
# Every argument that is no tensor, with values that it cannot have.
NO_NUMBER = ("a", torch.tensor(0.5), np.array(0.5))  # a tensor would get no gradient
OPTIONS = {
    **dict.fromkeys(
        ("dropout_p", "label_smoothing", "gbce_t"), (math.nan, -0.1, 1.5, math.inf, *NO_NUMBER)
    ),
    **dict.fromkeys(("scale", "z_loss"), (math.nan, math.inf, *NO_NUMBER)),
    "eps": NO_NUMBER,
    "num_items": (math.nan, *NO_NUMBER),
    "causal": ("yes", 1),
    "fixed_temperature": (math.nan, 0.0, -1.0, math.inf, "a"),
    "ignore_index": (0.5, 2**70, np.float32(-1), *NO_NUMBER),
    "k": (0, -1, 2**40, 2.0, np.float32(2), *NO_NUMBER),
    "max_seq_len": (-1, 0, 4.0, *NO_NUMBER),
    "layer": (-1, 256, 2**40, 0.5, *NO_NUMBER),
    **dict.fromkeys(("site", "similarity", "loss", "reduction"), ("wrong", "")),
    "rng": (7, (1, 2)),
}


@dataclasses.dataclass(frozen=True)
class Change:
    argument: str
    what: str
    value: Any
    # Whether the error may name another argument, whose size is then wrong beside this one.
    shared: bool = False


def changes(sample: Sample) -> Iterator[Change]:
    tensors = [name for name, value in sample.kwargs.items() if isinstance(value, torch.Tensor)]
    for name, value in sample.kwargs.items():
        if isinstance(value, torch.Tensor):
            for change in tensor_changes(name, value):
                if change.what == "meta" and len(tensors) == 1:
                    continue  # all are there
                # The others are compared with the first argument.
                yield dataclasses.replace(change, shared=change.shared or name == tensors[0])
        for wrong in OPTIONS.get(name, ()):
            yield Change(name, repr(wrong), wrong)


def tensor_changes(name: str, tensor: torch.Tensor) -> Iterator[Change]:
    for dtype in DTYPES:
        if dtype != tensor.dtype:
            yield Change(name, str(dtype), tensor.to(dtype))
    yield Change(name, "meta", tensor.to("meta"), True)
    yield Change(name, "one dimension more", tensor[None], True)
    yield Change(name, "one dimension more, last", tensor[..., None], True)
    if tensor.dim() == 0:
        return
    yield Change(name, "a list", tensor.tolist())
    yield Change(name, "sparse", tensor.to_sparse())
    if tensor.is_floating_point():
        yield Change(name, "nested", torch.nested.nested_tensor([tensor], layout=torch.jagged))
    if tensor.shape[0]:
        yield Change(name, "one dimension less", tensor[0], True)
    for axis in {0, tensor.dim() - 1} if tensor.numel() else ():
        last = tensor.narrow(axis, tensor.shape[axis] - 1, 1)
        yield Change(name, f"one more on axis {axis}", torch.cat([tensor, last], axis), True)
        fewer = tensor.narrow(axis, 0, tensor.shape[axis] - 1)
        yield Change(name, f"one less on axis {axis}", fewer, True)
        yield Change(name, f"none on axis {axis}", tensor.narrow(axis, 0, 0), True)
    if tensor.dtype == torch.int64 and tensor.numel():
        for value in (-1, LARGEST, -LARGEST - 1, 2**40, -100):
            for at in (0, tensor.numel() - 1):
                changed = tensor.clone(memory_format=torch.contiguous_format)
                changed.view(-1)[at] = value
                yield Change(name, f"{value} at {at}", changed, name == "exclude_values")
    if name.endswith("offsets"):
        for what, changed in wrong_offsets(tensor):
            yield Change(name, what, changed)


def wrong_offsets(offsets: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    end = int(offsets[-1])
    yield "all shifted up", offsets + 1
    yield "all shifted down", offsets - 1
    yield "reversed", offsets.flip(0)
    yield "beyond the end", torch.where(offsets == end, end + 1, offsets)
    for value in (end + 1, -1, LARGEST, -LARGEST - 1):
        changed = offsets.clone()
        changed[len(offsets) // 2] = value
        yield f"{value} inside", changed
    # Differences modulo 2^64 that are not negative and add up to the end.
    around = torch.linspace(0, 4, len(offsets), dtype=torch.float64).long()
    around = around * (2**62)
    around[-1] = end
    yield "around the integers", around
    if len(offsets) > 4:
        changed = offsets.clone()
        changed[1:4] = torch.tensor([LARGEST, -LARGEST - 1, 0])
        yield "over the largest integer", changed


def verdict(op: Op, backend: str, sample: Sample, change: Change) -> str | None:
    """What is wrong; None if nothing."""
    changed = dataclasses.replace(sample, kwargs=sample.kwargs | {change.argument: change.value})
    try:
        op.function(**changed.kwargs, backend=backend)
    except ERRORS as error:
        names = [change.argument, *(sample.kwargs if change.shared else ())]
        text = str(error).replace(" ", "_")  # "exclude values" is exclude_values
        if any(name.removeprefix("fixed_") in text for name in names):
            return None
        return f"the error names no argument: {type(error).__name__}: {str(error)[:200]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if not can_learn(op, changed):
        return "was accepted"
    try:
        low = run(on(op, "reference"), changed, op.differentiable)
        exact = run(on(op, "reference"), promote(changed), op.differentiable)
        actual = run(on(op, backend), changed, op.differentiable)
        # A float64 parameter beside float32 has a gradient of float32 sums.
        extra = 4 * torch.finfo(torch.float32).eps if change.what == "torch.float64" else 0.0
        assert_within_budget(
            changed, actual, exact, low, op.rounding_band(backend, changed) + extra
        )
    except Exception as error:
        return f"was accepted, then {type(error).__name__}: {str(error)[:200]}"
    return None


def can_learn(op: Op, sample: Sample) -> bool:
    """Whether what has a gradient in op_db can have one here."""
    values = [sample.kwargs.get(name) for name in op.differentiable]
    return all(v is None or (isinstance(v, torch.Tensor) and v.is_floating_point()) for v in values)


def covering(op: Op) -> list[Sample]:
    """Small samples of an operator that have every argument, in every number of dimensions."""
    found, seen = [], set()
    every = samples(op.name, "cpu", FLOAT32, True)
    for name in dict.fromkeys(op.complete + op.representative):
        shown = {
            (key, value.dim(), value.dtype) if isinstance(value, torch.Tensor) else key
            for key, value in every[name].kwargs.items()
        }
        if not shown <= seen:
            seen |= shown
            found.append(every[name])
    return found
