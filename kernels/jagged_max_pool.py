# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `jagged_max_pool`. A program owns some features of one sequence, forward and
backward: no element is written twice.

Legend: B sequences, T events, D width.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.rows import rows_of
from fastrec.kernels.common.tiles import FUSED, REST, zero_rest

BLOCK_T = 16  # events at a time: most sequences of a recommender are shorter
NONE: tl.constexpr = tl.constexpr(2**31 - 1)  # above every place


@triton.jit
def _larger(value, place, other, other_place):
    """Of two candidates the larger value, NaN above all; of equals the earlier place."""
    nan, other_nan = value != value, other != other
    equal = (value == other) | (nan & other_nan)
    first = (value > other) | (nan & (other_nan == 0)) | (equal & (place < other_place))
    return tl.where(first, value, other), tl.where(first, place, other_place)


@triton.jit
def _fwd_kernel(
    values, offsets, counted, output, index, d, stride,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + b)
    length = (tl.load(offsets + b + 1) - start).to(tl.int32)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = col < d
    DTYPE: tl.constexpr = tl.float64 if values.dtype.element_ty == tl.float64 else tl.float32
    best = tl.full([BLOCK_T, BLOCK_D], float("-inf"), DTYPE)
    best_place = tl.full([BLOCK_T, BLOCK_D], NONE, tl.int32)
    for first in range(0, length, BLOCK_T):
        place = first + tl.arange(0, BLOCK_T)
        row = start + place
        counts = place < length
        if counted is not None:
            counts &= tl.load(counted + row, mask=counts, other=0) != 0
        at = values + row[:, None] * stride + col[None, :]
        x = tl.load(at, mask=counts[:, None] & real[None, :], other=float("-inf")).to(DTYPE)
        here = tl.where(counts, place, NONE)[:, None] + tl.zeros([1, BLOCK_D], tl.int32)
        best, best_place = _larger(x, here, best, best_place)
    top, top_place = tl.reduce((best, best_place), 0, _larger)
    found = top_place != NONE
    out = b * d + col
    tl.store(output + out, tl.where(found, top, 0.0).to(output.dtype.element_ty), mask=real)
    tl.store(index + out, tl.where(found, top_place, -1), mask=real)


@triton.jit(do_not_specialize=["events"])
def _bwd_kernel(
    grad_output, index, offsets, grad, events, d, stride,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    if b >= tl.num_programs(0) - REST:
        zero_rest(grad, offsets, events, d, BLOCK_T, BLOCK_D)
        return
    start = tl.load(offsets + b)
    length = (tl.load(offsets + b + 1) - start).to(tl.int32)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = col < d
    top_place = tl.load(index + b * d + col, mask=real, other=-1)
    g = tl.load(grad_output + b * stride + col, mask=real, other=0.0)
    for first in range(0, length, BLOCK_T):
        place = first + tl.arange(0, BLOCK_T)
        x = tl.where(place[:, None] == top_place[None, :], g[None, :], 0.0)
        at = grad + (start + place)[:, None] * d + col[None, :]
        tl.store(at, x.to(grad.dtype.element_ty), mask=(place < length)[:, None] & real[None, :])


def _config(width: int) -> dict:
    """At most 16 x 64 elements a program of one or two warps: a sequence is little work."""
    block_d = min(max(triton.next_power_of_2(width), 16), 64)
    return {"BLOCK_T": BLOCK_T, "BLOCK_D": block_d, "num_warps": 1 if block_d <= 32 else 2}


def _grid(sequences: int, width: int, block_d: int) -> tuple[int, int]:
    return sequences, triton.cdiv(width, block_d)


def jagged_max_pool_fwd(values, offsets, mask):
    sequences, width = offsets.shape[0] - 1, values.shape[1]
    output = values.new_empty(sequences, width)
    index = values.new_empty(sequences, width, dtype=torch.int32)
    if sequences == 0 or width == 0:
        return output, index
    values, config = rows_of(values), _config(width)
    counted = None if mask is None else mask.contiguous().view(torch.uint8)
    with torch.cuda.device_of(values):
        _fwd_kernel[_grid(sequences, width, config["BLOCK_D"])](
            values, offsets.contiguous(), counted, output, index, width, values.stride(0),
            **config, **FUSED,
        )  # fmt: skip
    return output, index


def jagged_max_pool_bwd(grad_output, index, offsets, events):
    sequences, width = grad_output.shape
    grad = grad_output.new_empty(events, width)
    if width == 0 or events == 0:
        return grad
    grad_output, config = rows_of(grad_output), _config(width)
    with torch.cuda.device_of(grad):
        _bwd_kernel[_grid(sequences + REST.value, width, config["BLOCK_D"])](
            grad_output, index.contiguous(), offsets.contiguous(), grad, events, width,
            grad_output.stride(0), **config, **FUSED,
        )  # fmt: skip
    return grad
