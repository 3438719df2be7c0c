# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `dropout_add_layer_norm`: a program owns whole rows, every tensor is read once.

Legend: N rows, D width. Weight gradients are partial sums of `row_ranges`.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.dropout import row_mask
from fastrec.kernels.common.rows import WIDEST, dense, in_vectors, row_ranges, rows_of
from fastrec.kernels.common.tiles import FUSED, round_to


@triton.jit(do_not_specialize=["n", "drop", "layer"])
def _fwd_kernel(
    input, residual, weight, bias, keys, positions, rng, output, sum_out, mean_out, rstd_out,
    n, d, stride_input, stride_residual, eps, scale, drop, layer,
    SITE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    d, stride_input, stride_residual = d * VEC, stride_input * VEC, stride_residual * VEC
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    live, real = row < n, col < d
    keep = live[:, None] & real[None, :]
    z = tl.load(input + row[:, None] * stride_input + col[None, :], mask=keep, other=0.0)
    z = z.to(tl.float32)
    if keys is not None:
        mask = row_mask(
            keys, positions, rng, row, live, 0, drop, layer, SITE, BLOCK_D // 16
        )  # fmt: skip
        z = tl.where(mask, z * scale, 0.0)
    if residual is not None:
        more = residual + row[:, None] * stride_residual + col[None, :]
        z += tl.load(more, mask=keep, other=0.0).to(tl.float32)
    place = row[:, None] * d + col[None, :]
    if sum_out is not None:
        # Backward sees the rounded sum: statistics of another would not belong to it.
        rounded = round_to(z, sum_out.dtype.element_ty)
        tl.store(sum_out + place, rounded, mask=keep)
        z = rounded.to(tl.float32)
    mean = tl.sum(z, 1) / d
    centered = tl.where(real[None, :], z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / d + eps)
    y = centered * rstd[:, None]
    if weight is not None:
        y *= tl.load(weight + col, mask=real, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + col, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(output + place, round_to(y, output.dtype.element_ty), mask=keep)
    tl.store(mean_out + row, mean, mask=live)
    tl.store(rstd_out + row, rstd, mask=live)


@triton.jit(do_not_specialize=["n", "per_program", "drop", "layer"])
def _bwd_kernel(
    grad_output, grad_sum, sum, mean, rstd, weight, keys, positions, rng,
    grad_input, grad_residual, partials,
    n, d, per_program, stride_output, stride_gsum, stride_sum, scale, drop, layer,
    SITE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    d, stride_output = d * VEC, stride_output * VEC
    stride_gsum, stride_sum = stride_gsum * VEC, stride_sum * VEC
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    real = col < d
    acc_weight = tl.zeros([BLOCK_D], tl.float32)
    acc_bias = tl.zeros([BLOCK_D], tl.float32)
    for block in range(per_program):
        row = (program * per_program + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        live = row < n
        keep = live[:, None] & real[None, :]
        grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if grad_output is not None:
            dy = grad_output + row[:, None] * stride_output + col[None, :]
            dy = tl.load(dy, mask=keep, other=0.0).to(tl.float32)
            z = tl.load(sum + row[:, None] * stride_sum + col[None, :], mask=keep, other=0.0)
            mu = tl.load(mean + row, mask=live, other=0.0)
            s = tl.load(rstd + row, mask=live, other=0.0)
            x = tl.where(keep, (z.to(tl.float32) - mu[:, None]) * s[:, None], 0.0)
            acc_weight += tl.sum(dy * x, 0)
            acc_bias += tl.sum(dy, 0)
            if weight is not None:
                dy *= tl.load(weight + col, mask=real, other=0.0).to(tl.float32)[None, :]
            average, along = tl.sum(dy, 1) / d, tl.sum(dy * x, 1) / d
            grad = s[:, None] * (dy - average[:, None] - x * along[:, None])
        if grad_sum is not None:
            more = grad_sum + row[:, None] * stride_gsum + col[None, :]
            grad += tl.load(more, mask=keep, other=0.0).to(tl.float32)
        place = row[:, None] * d + col[None, :]
        tl.store(grad_residual + place, round_to(grad, grad_residual.dtype.element_ty), mask=keep)
        if grad_input is not None:
            if keys is not None:
                mask = row_mask(
                    keys, positions, rng, row, live, 0, drop, layer, SITE, BLOCK_D // 16
                )  # fmt: skip
                grad = tl.where(mask, grad * scale, 0.0)
            tl.store(grad_input + place, round_to(grad, grad_input.dtype.element_ty), mask=keep)
    tl.store(partials + 2 * program * d + col, acc_weight, mask=real)
    tl.store(partials + (2 * program + 1) * d + col, acc_bias, mask=real)


def _config(width: int) -> dict:
    """About 2,048 elements a program of 4 warps, 16 a thread; at least a group of draws wide."""
    block_d = max(triton.next_power_of_2(width), 16)
    block_n = max(2048 // block_d, 1)
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": 4 if block_d <= 1024 else 8}


def _check(input):
    if input.dtype == torch.float64:
        raise RuntimeError("dropout_add_layer_norm has no float64 triton kernel")
    if input.shape[1] > WIDEST:
        raise RuntimeError(
            f"the triton kernel of dropout_add_layer_norm is for widths up to {WIDEST},"
            f" got {input.shape[1]}"
        )


def dropout_add_layer_norm_fwd(
    input, residual, weight, bias, eps, keys, positions, rng, drop, site, layer
):
    _check(input)
    n, d = input.shape
    dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    output = input.new_empty(n, d, dtype=dtype)
    sum = output.new_empty(0 if residual is None and drop == 0 else n, d)
    mean = input.new_empty(n, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if n == 0 or d == 0:
        return output, sum, mean.fill_(0), rstd.fill_(0)
    input, residual, config = rows_of(input), rows_of(residual), _config(d)
    vector, sizes = in_vectors(d, input.stride(0), 0 if residual is None else residual.stride(0))
    with torch.cuda.device_of(input):
        _fwd_kernel[(triton.cdiv(n, config["BLOCK_N"]),)](
            input, residual, *dense(weight, bias, keys, positions, rng),
            output, sum if sum.shape[0] else None, mean, rstd,
            n, *sizes, eps, 256 / (256 - drop), drop, layer, SITE=site, VEC=vector, **config,
            **FUSED,
        )  # fmt: skip
    return output, sum, mean, rstd


def dropout_add_layer_norm_bwd(
    grad_output, grad_sum, sum, mean, rstd, weight, bias, input_dtype,
    keys, positions, rng, drop, site, layer,
):  # fmt: skip
    _check(sum)
    n, d = sum.shape
    both = drop == 0 and input_dtype == sum.dtype
    grad_input = sum.new_empty(0 if both else n, d, dtype=input_dtype)
    grad_residual = sum.new_empty(n, d)
    config = _config(max(d, 1))
    programs, per_program = row_ranges(n, config["BLOCK_N"])
    partials = mean.new_zeros(programs, 2, d)
    if n > 0 and d > 0:
        grad_output, grad_sum, sum = rows_of(grad_output), rows_of(grad_sum), rows_of(sum)
        strides = (0 if t is None else t.stride(0) for t in (grad_output, grad_sum, sum))
        vector, (columns, *strides) = in_vectors(d, *strides)
        with torch.cuda.device_of(sum):
            _bwd_kernel[(programs,)](
                grad_output, grad_sum, sum, *dense(mean, rstd, weight, keys, positions, rng),
                None if both else grad_input, grad_residual, partials,
                n, columns, per_program, *strides, 256 / (256 - drop), drop, layer,
                SITE=site, VEC=vector, **config, **FUSED,
            )  # fmt: skip
    grad_weight, grad_bias = partials.sum(0)
    return (
        grad_input,
        grad_residual,
        mean.new_empty(0) if weight is None else grad_weight.to(weight.dtype),
        mean.new_empty(0) if bias is None else grad_bias.to(bias.dtype),
    )
