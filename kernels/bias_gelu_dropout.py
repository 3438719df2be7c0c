# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `bias_gelu_dropout`.

Legend: N rows, D width. A program owns a tile of columns and one block of rows (forward) or a range
of them (backward). The bias gradient is a sum of partial sums of row ranges, added in order: no
atomics, and the ranges depend on the shape only.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.dropout import row_mask
from fastrec.kernels.common.rows import dense, in_vectors, row_ranges, rows_of
from fastrec.kernels.common.tiles import FUSED, round_to

INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _load_biased(input, bias, row, col, keep, d, stride_input):
    z = tl.load(input + row[:, None] * stride_input + col[None, :], mask=keep, other=0.0)
    z = z.to(tl.float32)
    if bias is not None:
        z += tl.load(bias + col, mask=col < d, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit(do_not_specialize=["n", "drop", "layer"])
def _fwd_kernel(
    input, bias, keys, positions, rng, output,
    n, d, stride_input, scale, drop, layer,
    SITE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    d, stride_input = d * VEC, stride_input * VEC
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    col = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    live = row < n
    keep = live[:, None] & (col < d)[None, :]
    z = _load_biased(input, bias, row, col, keep, d, stride_input)
    y = 0.5 * z * (1.0 + tl.erf(z * INVERSE_SQRT_2))
    if keys is not None:
        mask = row_mask(
            keys, positions, rng, row, live, tile * (BLOCK_D // 16), drop, layer,
            SITE, BLOCK_D // 16,
        )  # fmt: skip
        y = tl.where(mask, y * scale, 0.0)
    place = row[:, None] * d + col[None, :]
    tl.store(output + place, round_to(y, output.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["n", "per_program", "drop", "layer"])
def _bwd_kernel(
    grad_output, input, bias, keys, positions, rng, grad_input, partials,
    n, d, per_program, stride_output, stride_input, scale, drop, layer,
    SITE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    d, stride_output, stride_input = d * VEC, stride_output * VEC, stride_input * VEC
    program = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    col = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for block in range(per_program):
        row = (program * per_program + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        live = row < n
        keep = live[:, None] & (col < d)[None, :]
        grad = grad_output + row[:, None] * stride_output + col[None, :]
        grad = tl.load(grad, mask=keep, other=0.0).to(tl.float32)
        if keys is not None:
            mask = row_mask(
                keys, positions, rng, row, live, tile * (BLOCK_D // 16), drop, layer,
                SITE, BLOCK_D // 16,
            )  # fmt: skip
            grad = tl.where(mask, grad * scale, 0.0)
        z = _load_biased(input, bias, row, col, keep, d, stride_input)
        cdf = 0.5 * (1.0 + tl.erf(z * INVERSE_SQRT_2))
        grad *= cdf + z * tl.exp(-0.5 * z * z) * INVERSE_SQRT_2PI
        acc += tl.sum(grad, 0)
        place = row[:, None] * d + col[None, :]
        tl.store(grad_input + place, round_to(grad, grad_input.dtype.element_ty), mask=keep)
    tl.store(partials + program * d + col, acc, mask=col < d)


def _config(width: int) -> dict:
    """Tiles of 2,048 elements, 16 a thread; at least a group of draws wide."""
    block_d = min(max(triton.next_power_of_2(width), 16), 128)
    return {"BLOCK_N": 2048 // block_d, "BLOCK_D": block_d, "num_warps": 4}


def _check(input):
    if input.dtype == torch.float64:
        raise RuntimeError("bias_gelu_dropout has no float64 triton kernel")


def bias_gelu_dropout_fwd(input, bias, keys, positions, rng, drop, site, layer):
    _check(input)
    n, d = input.shape
    output = input.new_empty(n, d)
    if n == 0 or d == 0:
        return output
    input, config = rows_of(input), _config(d)
    vector, sizes = in_vectors(d, input.stride(0))
    with torch.cuda.device_of(input):
        _fwd_kernel[(triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(d, config["BLOCK_D"]))](
            input, *dense(bias, keys, positions, rng), output,
            n, *sizes, 256 / (256 - drop), drop, layer, SITE=site, VEC=vector, **config, **FUSED,
        )  # fmt: skip
    return output


def bias_gelu_dropout_bwd(grad_output, input, bias, keys, positions, rng, drop, site, layer):
    _check(input)
    n, d = input.shape
    grad_input, config = input.new_empty(n, d), _config(max(d, 1))
    programs, per_program = row_ranges(n, config["BLOCK_N"])
    partials = input.new_zeros(programs, d, dtype=torch.float32)
    if n > 0 and d > 0:
        grad_output, input = rows_of(grad_output), rows_of(input)
        vector, sizes = in_vectors(d, grad_output.stride(0), input.stride(0))
        with torch.cuda.device_of(input):
            _bwd_kernel[(programs, triton.cdiv(d, config["BLOCK_D"]))](
                grad_output, input, *dense(bias, keys, positions, rng), grad_input, partials,
                n, sizes[0], per_program, *sizes[1:], 256 / (256 - drop), drop, layer,
                SITE=site, VEC=vector, **config, **FUSED,
            )  # fmt: skip
    grad_bias = input.new_empty(0) if bias is None else partials.sum(0).to(bias.dtype)
    return grad_input, grad_bias
