# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `jagged_embedding`.

Legend: T events, V rows of a table, D width. Forward and backward own whole rows, as the kernels of
`dropout_add_layer_norm` do. `scatter` sorts the events by row and adds those of one row (`runs`).
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.dropout import row_mask
from fastrec.kernels.common.rows import WIDEST, dense, in_vectors, row_ranges, rows_of
from fastrec.kernels.common.runs import BLOCK_T, add_runs, carry_kernel
from fastrec.kernels.common.tiles import FUSED, round_to


@triton.jit
def _gather(
    values, weight, position_weight, positions, row, live, real, col,
    stride_weight, stride_position,
):  # fmt: skip
    """z of the events `row`, float32; 0 where not live and real."""
    keep = live[:, None] & real[None, :]
    item = row
    if values is not None:
        item = tl.load(values + row, mask=live, other=0)
    z = tl.load(weight + item[:, None] * stride_weight + col[None, :], mask=keep, other=0.0)
    z = z.to(tl.float32)
    if position_weight is not None:
        place = tl.load(positions + row, mask=live, other=0)
        more = position_weight + place[:, None] * stride_position + col[None, :]
        z += tl.load(more, mask=keep, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["t", "drop", "layer"])
def _fwd_kernel(
    values, weight, position_weight, norm_weight, norm_bias, keys, positions, rng,
    output, mean_out, rstd_out,
    t, d, stride_weight, stride_position, eps, scale, drop, layer,
    SITE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    d, stride_weight, stride_position = d * VEC, stride_weight * VEC, stride_position * VEC
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    live, real = row < t, col < d
    z = _gather(
        values, weight, position_weight, positions, row, live, real, col,
        stride_weight, stride_position,
    )  # fmt: skip
    if norm_weight is not None:
        mean = tl.sum(z, 1) / d
        centered = tl.where(real[None, :], z - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / d + eps)
        z = centered * rstd[:, None]
        z *= tl.load(norm_weight + col, mask=real, other=0.0).to(tl.float32)[None, :]
        if norm_bias is not None:
            z += tl.load(norm_bias + col, mask=real, other=0.0).to(tl.float32)[None, :]
        tl.store(mean_out + row, mean, mask=live)
        tl.store(rstd_out + row, rstd, mask=live)
    if keys is not None:
        mask = row_mask(keys, positions, rng, row, live, 0, drop, layer, SITE, BLOCK_D // 16)
        z = tl.where(mask, z * scale, 0.0)
    place = output + row[:, None] * d + col[None, :]
    tl.store(place, round_to(z, output.dtype.element_ty), mask=live[:, None] & real[None, :])


@triton.jit(do_not_specialize=["t", "per_program", "drop", "layer"])
def _bwd_kernel(
    grad_output, values, weight, position_weight, norm_weight, mean, rstd, keys, positions, rng,
    grad_z, partials,
    t, d, per_program, stride_output, stride_weight, stride_position, scale, drop, layer,
    SITE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    d, stride_output = d * VEC, stride_output * VEC
    stride_weight, stride_position = stride_weight * VEC, stride_position * VEC
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    real = col < d
    acc_weight = tl.zeros([BLOCK_D], tl.float32)
    acc_bias = tl.zeros([BLOCK_D], tl.float32)
    for block in range(per_program):
        row = (program * per_program + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        live = row < t
        keep = live[:, None] & real[None, :]
        grad = grad_output + row[:, None] * stride_output + col[None, :]
        grad = tl.load(grad, mask=keep, other=0.0).to(tl.float32)
        if keys is not None:
            mask = row_mask(keys, positions, rng, row, live, 0, drop, layer, SITE, BLOCK_D // 16)
            grad = tl.where(mask, grad * scale, 0.0)
        if norm_weight is not None:
            z = _gather(
                values, weight, position_weight, positions, row, live, real, col,
                stride_weight, stride_position,
            )  # fmt: skip
            mu = tl.load(mean + row, mask=live, other=0.0)
            s = tl.load(rstd + row, mask=live, other=0.0)
            x = tl.where(keep, (z - mu[:, None]) * s[:, None], 0.0)
            acc_weight += tl.sum(grad * x, 0)
            acc_bias += tl.sum(grad, 0)
            grad *= tl.load(norm_weight + col, mask=real, other=0.0).to(tl.float32)[None, :]
            average, along = tl.sum(grad, 1) / d, tl.sum(grad * x, 1) / d
            grad = s[:, None] * (grad - average[:, None] - x * along[:, None])
        tl.store(grad_z + row[:, None] * d + col[None, :], grad, mask=keep)
    if norm_weight is not None:
        tl.store(partials + 2 * program * d + col, acc_weight, mask=real)
        tl.store(partials + (2 * program + 1) * d + col, acc_bias, mask=real)


@triton.jit(do_not_specialize=["t"])
def _scatter_kernel(
    grad, order, index, out, head, tail, t, d, stride_grad,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums of the events of equal `index`, which is sorted; `order` their rows of grad."""
    d, stride_grad = d * VEC, stride_grad * VEC
    program = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = program * BLOCK_T + tl.arange(0, BLOCK_T)
    live = at < t
    event = tl.load(order + at, mask=live, other=0)
    source = grad + event[:, None] * stride_grad + col[None, :]
    x = tl.load(source, mask=live[:, None] & (col < d)[None, :], other=0.0).to(tl.float32)
    add_runs(x, index, out, head, tail, program, col, t, d, BLOCK_T)


def _check(weight):
    if weight.dtype == torch.float64:
        raise RuntimeError("jagged_embedding has no float64 triton kernel")
    if weight.shape[1] > WIDEST:
        raise RuntimeError(
            f"the triton kernel of jagged_embedding is for widths up to {WIDEST},"
            f" got {weight.shape[1]}"
        )


def _config(width: int) -> dict:
    """About 1,024 elements a program of 4 warps; 2,048 spill 8 bytes on sm_90 in float32."""
    block_d = max(triton.next_power_of_2(width), 16)
    block_n = max(1024 // block_d, 1)
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": 4 if block_d <= 1024 else 8}


def _strides(weight, position_weight):
    return weight.stride(0), 0 if position_weight is None else position_weight.stride(0)


def jagged_embedding_fwd(
    values, weight, position_weight, norm_weight, norm_bias, eps,
    keys, positions, rng, drop, site, layer,
):  # fmt: skip
    _check(weight)
    t, d = weight.shape[0] if values is None else values.shape[0], weight.shape[1]
    output = weight.new_empty(t, d)
    mean = weight.new_empty(0 if norm_weight is None else t, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if t == 0 or d == 0:
        return output, mean.fill_(0), rstd.fill_(0)
    config = _config(d)
    weight = rows_of(weight)
    position_weight = rows_of(position_weight)
    vectors = dense(norm_weight, norm_bias, keys, positions, rng)
    vector, sizes = in_vectors(d, *_strides(weight, position_weight))
    with torch.cuda.device_of(weight):
        _fwd_kernel[(triton.cdiv(t, config["BLOCK_N"]),)](
            *dense(values), weight, position_weight, *vectors,
            output, mean, rstd,
            t, *sizes, eps, 256 / (256 - drop), drop, layer, SITE=site, VEC=vector, **config,
            **FUSED,
        )  # fmt: skip
    return output, mean, rstd


def jagged_embedding_bwd(
    grad_output, values, weight, position_weight, norm_weight, norm_bias, mean, rstd,
    keys, positions, rng, drop, site, layer,
):  # fmt: skip
    _check(weight)
    t, d = grad_output.shape
    config = _config(max(d, 1))
    programs, per_program = row_ranges(t, config["BLOCK_N"])
    grad_z = mean.new_empty(t, d)
    partials = mean.new_zeros(programs, 2, d)
    if t > 0 and d > 0:
        grad_output, weight = rows_of(grad_output), rows_of(weight)
        position_weight = rows_of(position_weight)
        vectors = dense(norm_weight, mean, rstd, keys, positions, rng)
        strides = grad_output.stride(0), *_strides(weight, position_weight)
        vector, (columns, *strides) = in_vectors(d, *strides)
        with torch.cuda.device_of(weight):
            _bwd_kernel[(programs,)](
                grad_output, *dense(values), weight, position_weight, *vectors, grad_z, partials,
                t, columns, per_program, *strides, 256 / (256 - drop), drop, layer,
                SITE=site, VEC=vector, **config, **FUSED,
            )  # fmt: skip
    grad_weight, grad_bias = partials.sum(0)
    return (
        grad_z,
        mean.new_empty(0) if norm_weight is None else grad_weight.to(norm_weight.dtype),
        mean.new_empty(0) if norm_bias is None else grad_bias.to(norm_bias.dtype),
    )


def jagged_embedding_scatter(grad, index, rows, dtype, spare=-1):
    """spare: an index whose sum is not needed and of which there may be many."""
    (t, d), out = grad.shape, grad.new_zeros(rows, grad.shape[1], dtype=dtype)
    if t == 0 or d == 0:
        return out
    grad = rows_of(grad)
    index, order = index.sort(stable=True)
    block_d = min(max(triton.next_power_of_2(d), 16), 64)
    grid = (triton.cdiv(t, BLOCK_T), triton.cdiv(d, block_d))
    head, tail = torch.empty(2, grid[0], d, dtype=torch.float32, device=grad.device)
    vector, sizes = in_vectors(d, grad.stride(0))
    with torch.cuda.device_of(grad):
        _scatter_kernel[grid](
            grad, order, index, out, head, tail, t, *sizes,
            BLOCK_T=BLOCK_T, BLOCK_D=block_d, VEC=vector, **FUSED,
        )  # fmt: skip
        carry_kernel[grid](
            index, out, head, tail, t, d, spare,
            BLOCK_T=BLOCK_T, BLOCK_K=32, BLOCK_D=block_d, **FUSED,
        )  # fmt: skip
    return out
