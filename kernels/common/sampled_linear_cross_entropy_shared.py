# SPDX-License-Identifier: Apache-2.0
"""Kernels of `sampled_linear_cross_entropy` for negatives that all rows share: they are gathered
once ([K, D]), and the scores are products of tiles; backward computes them again, a program owns
BLOCK_K negatives and streams a range of rows. Legend: N rows, V items, K negatives, D width.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.sampled_linear_cross_entropy_own import finish
from fastrec.kernels.common.tiles import (
    dot,
    load_rows,
    product_in_chunks,
    round_to,
    softplus_and_sigmoid,
)


@triton.jit(do_not_specialize=["n", "k", "beta"])
def _shared_fwd_kernel(
    x, w, offset, negatives, target, w_target, s_target, loss_out, grad_x, grad_target, lse_out,
    n, k, d, beta, stride_xn, stride_xd, stride_td,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    SOFTMAX: tl.constexpr, WITH_INPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows against w, the gathered [K, D]. With several chunks of D, each program of the
    second axis computes all scores and its own columns of grad_x."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.program_id(1) * BLOCK_D
    live = at < n
    y = tl.load(target + at, mask=live, other=-1)
    s_y = tl.load(s_target + at, mask=live, other=0.0)
    top = tl.full([BLOCK_N], -1e30, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, k, BLOCK_K):
        place = first + tl.arange(0, BLOCK_K)
        real = place < k
        item = tl.load(negatives + place, mask=real, other=-2)
        s = product_in_chunks(
            x, at, live, stride_xn, stride_xd, w, place, real, d, 1, d,
            x.dtype.element_ty, False, BLOCK_D, CHUNKS, PRECISION,
        )  # fmt: skip
        s += tl.load(offset + place, mask=real, other=0.0)[None, :]
        s = tl.where(real[None, :] & (item[None, :] != y[:, None]), s, float("-inf"))
        if SOFTMAX:
            peak = tl.maximum(top, tl.max(s, 1))
            fade = tl.exp(top - peak)
            p = tl.exp(s - peak[:, None])
            total, acc, top = total * fade + tl.sum(p, 1), acc * fade[:, None], peak
        else:
            softplus, p = softplus_and_sigmoid(s)
            total += tl.sum(softplus, 1)  # p is divided behind the sum: in float16 it would be 0
        if WITH_INPUT:
            w_tile = load_rows(w, place, real, d, 1, own, d, BLOCK_D)
            w_tile = round_to(w_tile, x.dtype.element_ty)
            acc = dot(round_to(p, x.dtype.element_ty), w_tile, acc, PRECISION)
    loss, c, lse, left_out, scale = finish(s_y, top, total, k, beta, SOFTMAX)
    if not SOFTMAX:
        scale = scale / (k + 1.0)
    scored = live & (y >= 0)
    c = tl.where(scored, c, 0.0)
    if own == 0:
        tl.store(loss_out + at, tl.where(scored, loss, 0.0), mask=live)
        tl.store(grad_target + at, c, mask=live)
        tl.store(lse_out + at, tl.where(scored, lse, 0.0), mask=live)
        tl.store(lse_out + n + at, tl.where(scored, left_out, 0.0), mask=live)
    if WITH_INPUT:
        row = load_rows(w_target, at, live, stride_td, 1, own, d, BLOCK_D).to(tl.float32)
        grad = tl.where(scored[:, None], acc * scale[:, None] + c[:, None] * row, 0.0)
        col = own + tl.arange(0, BLOCK_D)
        tl.store(
            grad_x + at[:, None] * d + col[None, :], grad, mask=live[:, None] & (col < d)[None, :]
        )


@triton.jit(do_not_specialize=["n", "k", "per_range"])
def _shared_bwd_kernel(
    x, w, offset, negatives, target, lse, grad_loss, scale, grad_w, grad_offset,
    n, k, d, per_range, stride_xn, stride_xd,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_K gathered rows and of their offsets from a range of the N rows:
    [ranges, K, D] and [ranges, K]."""
    blocks = tl.cdiv(k, BLOCK_K)
    place = ((tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    part = tl.program_id(0) // blocks
    own = tl.program_id(1) * BLOCK_D
    real = place < k
    item = tl.load(negatives + place, mask=real, other=-2)
    b = tl.load(offset + place, mask=real, other=0.0)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    acc_offset = tl.zeros([BLOCK_K], tl.float32)
    begin = part * per_range * BLOCK_N
    for first in range(begin, tl.minimum(begin + per_range * BLOCK_N, n), BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        live = at < n
        y = tl.load(target + at, mask=live, other=-1)
        s = product_in_chunks(
            x, at, live, stride_xn, stride_xd, w, place, real, d, 1, d,
            x.dtype.element_ty, True, BLOCK_D, CHUNKS, PRECISION,
        )  # fmt: skip
        s += b[:, None]
        scored = live & (y >= 0)
        out = (item[:, None] == y[None, :]) | (real[:, None] & scored[None, :] == 0)
        s = tl.where(out, float("-inf"), s)
        if SOFTMAX:
            p = tl.exp(s - tl.load(lse + at, mask=live, other=0.0)[None, :])
        else:
            _, p = softplus_and_sigmoid(s)
            p = p / (k + 1.0)
        p *= tl.load(grad_loss + at, mask=scored, other=0.0)[None, :]
        acc_offset += tl.sum(p, 1)
        x_tile = load_rows(x, at, live, stride_xn, stride_xd, own, d, BLOCK_D)
        acc = dot(round_to(p, x.dtype.element_ty), x_tile, acc, PRECISION)
    unit = tl.load(scale)
    col = own + tl.arange(0, BLOCK_D)
    keep = real[:, None] & (col < d)[None, :]
    place += part.to(tl.int64) * k
    tl.store(grad_w + place[:, None] * d + col[None, :], acc * unit, mask=keep)
    if own == 0:
        tl.store(grad_offset + place, acc_offset * unit, mask=real)


def shared_config(
    width: int, dtype: torch.dtype, backward: bool, precision: str, capability: int = 90
) -> dict:
    """Tiles of the products, that spill on none of sm_80, sm_90, sm_100 with Triton 3.9; of wide
    rows in chunks of 64 columns. `precision`: of the products of float32, "ieee" where they are not
    split: below sm_90, where operands are registers and every warp would split all of a tile."""
    full = dtype == torch.float32
    split = full and precision == "bf16x3" and capability >= 90
    widest = 256 if not split else 128 if capability < 100 else 64
    block_d = 64 if width > widest else max(triton.next_power_of_2(width), 16)
    if split and width > widest:
        tile = (32, 64, 4) if backward else (64, 32, 4)
    elif split:
        tile = (32, 128, 8) if backward else (64, 32 if block_d <= 64 else 16, 4)
    elif not full and capability >= 100:
        # Its tensor cores multiply 64 rows of the score's first axis or more; 8 warps of 64 x 64
        # spill where D is 64.
        block = 32 if block_d == 256 else 64
        tile = (block, 64, 8) if backward else (64, block, 4 if block_d <= 64 else 8)
    else:
        block = 32 if full or block_d == 256 else 64
        small = full and width > 64 and not (backward and width > 256)
        tile = (16 if small else block, block, 8)
    block_n, block_k, warps = tile
    return {
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_D": block_d,
        "CHUNKS": triton.cdiv(width, block_d),
        "num_warps": warps,
        "num_stages": 1 if width > widest else 2,
        "PRECISION": "bf16x3" if split else "ieee" if full else "tf32",
    }
