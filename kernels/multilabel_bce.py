# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `multilabel_bce`: logits and labels exist one tile at a time.

Legend: N rows, A labels (v in the kernels, as items elsewhere), D width.

Forward: a program owns BLOCK_N rows and a range of labels, and sums the losses and p_na W_a.
Backward: a program owns BLOCK_V labels and a range of rows. The sums of the ranges are added in
order: no atomics, equal inputs give equal bits. The score of a row and its label is turned around
before the sigmoid, and the sigmoid after it. Rows that are not scored come last; their number stays
on the device.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.in_batch_pairs import leave_out_listed, lists_from, seek
from fastrec.kernels.common.rows import cut_columns, pad_columns, strides_of
from fastrec.kernels.common.tiles import (
    FUSED,
    capability_of,
    dot,
    dot_t,
    float32_products,
    load_rows,
    ranges_of,
    round_to,
    softplus_and_sigmoid,
    sum_ranges,
)


@triton.jit(do_not_specialize=["n", "v", "per_range"])
def _fwd_kernel(
    x, w, bias, order, count, lists, listed, offsets, loss_out, grad_out, n, v, d, per_range,
    stride_xn, stride_xd, stride_wv, stride_wd, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    WITH_INPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """loss_out [ranges, N] and grad_out [ranges, N, D], 0 for rows that are not scored."""
    # Neighbouring programs read the same labels.
    blocks = tl.cdiv(n, BLOCK_N)
    slot = tl.program_id(0)
    at = (slot % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    scored = tl.load(count)
    live = at < scored
    row = tl.load(order + at, mask=at < n, other=0)
    x_tile = load_rows(x, row, live, stride_xn, stride_xd, 0, d, BLOCK_D)
    begin = (slot // blocks) * per_range * BLOCK_V
    stop = tl.minimum(begin + per_range * BLOCK_V, v)
    stop = tl.where((slot % blocks) * BLOCK_N < scored, stop, begin)
    own = tl.load(lists + row, mask=live, other=0)
    place, end, value, nearest = lists_from(listed, offsets, own, live, begin)
    total = tl.zeros([BLOCK_N], tl.float32)
    grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(begin, stop, BLOCK_V):
        label = first + tl.arange(0, BLOCK_V)
        real = label < v
        w_tile = load_rows(w, label, real, stride_wv, stride_wd, 0, d, BLOCK_D)
        w_tile = round_to(w_tile, x.dtype.element_ty)
        s = dot_t(x_tile, w_tile, None, PRECISION)
        if bias is not None:
            b = tl.load(bias + label.to(tl.int64) * stride_b, mask=real, other=0.0)
            s += b.to(tl.float32)[None, :]
        sign = tl.full([BLOCK_N, BLOCK_V], 1.0, tl.float32)
        sign, place, value, nearest = leave_out_listed(
            sign, label, listed, place, end, value, nearest, first + BLOCK_V, -1.0
        )  # fmt: skip
        loss, p = softplus_and_sigmoid(s * sign)
        total += tl.sum(tl.where(real[None, :], loss, 0.0), 1)
        if WITH_INPUT:  # rows of w_tile that are no label are 0
            grad = dot(round_to(p * sign, x.dtype.element_ty), w_tile, grad, PRECISION)
    out = (slot // blocks).to(tl.int64) * n + row
    tl.store(loss_out + out, tl.where(live, total, 0.0), mask=at < n)
    if WITH_INPUT:
        col = tl.arange(0, BLOCK_D)
        keep = (at < n)[:, None] & (col < d)[None, :]
        grad = tl.where(live[:, None], grad, 0.0)
        tl.store(grad_out + out[:, None] * d + col[None, :], grad, mask=keep)


@triton.jit
def _turned(sign, label, listed, place, end, last):
    """-1 in `sign` [labels, rows] at the listed labels below `last`."""
    value = tl.load(listed + place, mask=place < end, other=last)
    if tl.min(value, 0) < last:  # the compiler pipelines no loop that holds a bare `while`
        while tl.min(value, 0) < last:
            sign = tl.where(value[None, :] == label[:, None], -1.0, sign)
            place += (value < last).to(tl.int64)
            value = tl.load(listed + place, mask=place < end, other=last)
    return sign


@triton.jit(do_not_specialize=["v", "per_range"])
def _bwd_kernel(
    x, w, bias, order, count, lists, listed, offsets, grad_loss, scale, grad_w, grad_bias,
    v, d, per_range, stride_xn, stride_xd, stride_wv, stride_wd, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW and db of BLOCK_V labels from a range of rows: [ranges, A, D] and [ranges, A]."""
    tiles = tl.cdiv(v, BLOCK_V)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    part = (tl.program_id(0) // tiles).to(tl.int64)
    label = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    real = label < v
    w_tile = load_rows(w, label, real, stride_wv, stride_wd, 0, d, BLOCK_D)
    w_tile = round_to(w_tile, x.dtype.element_ty)
    if bias is not None:
        b = tl.load(bias + label * stride_b, mask=real, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    acc_bias = tl.zeros([BLOCK_V], tl.float32)
    scored = tl.load(count).to(tl.int32)
    begin = (part * per_range * BLOCK_N).to(tl.int32)
    for first in range(begin, tl.minimum(begin + per_range * BLOCK_N, scored), BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        live = at < scored
        row = tl.load(order + at, mask=live, other=0)
        x_tile = load_rows(x, row, live, stride_xn, stride_xd, 0, d, BLOCK_D)
        s = dot_t(w_tile, x_tile, None, PRECISION)
        if bias is not None:
            s += b[:, None]
        own = tl.load(lists + row, mask=live, other=0)
        place = tl.load(offsets + own, mask=live, other=0)
        end = tl.load(offsets + own + 1, mask=live, other=0)
        sign = tl.full([BLOCK_V, BLOCK_N], 1.0, tl.float32)
        if tl.max((place < end).to(tl.int32), 0) > 0:
            place = seek(listed, place, end, tile * BLOCK_V)
            sign = _turned(sign, label, listed, place, end, tile * BLOCK_V + BLOCK_V)
        _, p = softplus_and_sigmoid(s * sign)
        p *= sign * tl.load(grad_loss + row, mask=live, other=0.0)[None, :]
        if bias is not None:
            acc_bias += tl.sum(p, 1)
        acc = dot(round_to(p, x.dtype.element_ty), x_tile, acc, PRECISION)
    unit = tl.load(scale)
    col = tl.arange(0, BLOCK_D)
    keep = real[:, None] & (col < d)[None, :]
    tl.store(
        grad_w + (part * v + label)[:, None] * d + col[None, :],
        round_to(acc * unit, grad_w.dtype.element_ty),
        mask=keep,
    )
    if bias is not None:
        grad_b = round_to(acc_bias * unit, grad_bias.dtype.element_ty)
        tl.store(grad_bias + part * v + label, grad_b, mask=real)


# (BLOCK_N, BLOCK_V, num_warps, num_stages) of the forward and of the backward kernel by BLOCK_D,
# which spill on none of sm_80, sm_90, sm_100 with Triton 3.9.
TILES = {
    "half": {
        64: ((64, 32, 4, 3), (64, 64, 8, 3)),
        128: ((64, 64, 8, 3), (64, 64, 8, 3)),
        256: ((64, 16, 8, 2), (32, 64, 8, 2)),
    },
    "split": {  # float32 as sums of two bfloat16
        64: ((64, 32, 4, 2), (32, 128, 8, 2)),
        128: ((128, 32, 8, 2), (32, 128, 8, 2)),
    },
    "float32": {  # no tensor cores
        64: ((32, 32, 4, 2), (32, 32, 4, 2)),
        128: ((32, 32, 8, 2), (32, 16, 8, 2)),
        256: ((16, 16, 4, 2), (16, 32, 8, 2)),
    },
}
WIDEST = max(TILES["half"])


def _config(width: int, dtype: torch.dtype, precision: str, capability: int = 90) -> dict:
    """Tile shapes and launch options of both kernels, for `capability` 10 * major + minor.
    `precision`: of the products of float32, "ieee" where they are not split: where that spills, and
    below sm_90, where operands are registers and every warp would split all of a tile."""
    block_d, kind = max(triton.next_power_of_2(width), 16), "half"
    if dtype == torch.float32:
        widest = 0 if capability < 90 else 128 if capability < 100 else 64
        kind = "split" if precision == "bf16x3" and width <= widest else "float32"
    tiles = TILES[kind][max(block_d, 64)]
    if capability >= 100 and kind == "half" and block_d <= 64:
        tiles = ((64, 64, 8, 3), tiles[1])  # 32 labels spill 8 bytes there, 64 spill 48 on sm_80
    return {
        name: {
            "BLOCK_N": block_n,
            "BLOCK_V": block_v,
            "BLOCK_D": block_d,
            "PRECISION": {"half": "tf32", "split": "bf16x3", "float32": "ieee"}[kind],
            "num_warps": warps,
            "num_stages": stages,
        }
        for name, (block_n, block_v, warps, stages) in zip(("fwd", "bwd"), tiles, strict=True)
    }


def _options(input: torch.Tensor) -> dict:
    if input.dtype == torch.float64:
        raise RuntimeError("multilabel_bce has no float64 triton kernel, input is float64")
    if input.shape[1] > WIDEST:
        raise RuntimeError(
            f"multilabel_bce has triton kernels of widths up to {WIDEST}, input has"
            f" {input.shape[1]} columns: backend='reference' stores the logits"
        )
    return _config(
        input.shape[1], input.dtype, float32_products(input.device), capability_of(input.device)
    )  # fmt: skip


def _plan(label_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, those that are not scored last, number of scored rows)."""
    out = label_rows < 0
    return out.sort(stable=True).indices, (~out).sum()


def multilabel_bce_fwd(
    input, linear_weight, linear_bias, label_values, label_offsets, label_rows, with_input
):
    width = input.shape[1]
    input, linear_weight = pad_columns(input, linear_weight)
    config = _options(input)["fwd"]
    (n, d), v = input.shape, linear_weight.shape[0]
    blocks = triton.cdiv(n, config["BLOCK_N"])
    ranges, per_range = ranges_of(input.device, blocks, triton.cdiv(v, config["BLOCK_V"]))
    loss = torch.empty(ranges, n, dtype=torch.float32, device=input.device)
    grad = torch.empty(ranges, n if with_input else 0, d, dtype=torch.float32, device=input.device)
    if n > 0:
        order, count = _plan(label_rows)
        with torch.cuda.device_of(input):
            _fwd_kernel[(ranges * blocks,)](
                input, linear_weight, linear_bias, order, count, label_rows,
                label_values.contiguous(), label_offsets.contiguous(), loss, grad,
                n, v, d, per_range, *strides_of(input, linear_weight, linear_bias),
                WITH_INPUT=with_input, **config, **FUSED,
            )  # fmt: skip
    return sum_ranges(loss), cut_columns(sum_ranges(grad), width)


def multilabel_bce_bwd(
    input, linear_weight, linear_bias, label_values, label_offsets, label_rows, grad_loss
):
    width = input.shape[1]
    input, linear_weight = pad_columns(input, linear_weight)
    config = _options(input)["bwd"]
    (n, d), v = input.shape, linear_weight.shape[0]
    order, count = _plan(label_rows)
    scale = torch.ones((), dtype=torch.float32, device=input.device)
    if input.dtype == torch.float16 and n > 0:
        # A power of two that brings the gradients of the rows to at most 1 (and back in the end).
        largest = grad_loss.masked_fill(label_rows < 0, 0).abs().amax()
        scale = torch.ldexp(scale, torch.frexp(largest).exponent)
        grad_loss = grad_loss / scale
    tiles = triton.cdiv(v, config["BLOCK_V"])
    # Few labels are too few programs: rows in ranges as well, whose sums are added in order.
    ranges, per_range = ranges_of(input.device, tiles, triton.cdiv(n, config["BLOCK_N"]))
    dtype = linear_weight.dtype
    bias_dtype = (grad_loss if linear_bias is None else linear_bias).dtype
    partial = torch.float32 if ranges > 1 else None
    grad_weight = grad_loss.new_empty(ranges, v, d, dtype=partial or dtype)
    biases = 0 if linear_bias is None else v
    grad_bias = grad_loss.new_empty(ranges, biases, dtype=partial or bias_dtype)
    with torch.cuda.device_of(input):
        _bwd_kernel[(ranges * tiles,)](
            input, linear_weight, linear_bias, order, count, label_rows,
            label_values.contiguous(), label_offsets.contiguous(), grad_loss.contiguous(), scale,
            grad_weight, grad_bias, v, d, per_range, *strides_of(input, linear_weight, linear_bias),
            **config, **FUSED,
        )  # fmt: skip
    grad_weight = cut_columns(sum_ranges(grad_weight), width).to(dtype)
    return grad_weight, sum_ranges(grad_bias).to(bias_dtype)
