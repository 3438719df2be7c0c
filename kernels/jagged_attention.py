# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `jagged_attention`: a program owns a block of events of one sequence.

Legend: B sequences, T events, H heads, D head width. S and P are [queries, keys] tiles of
BLOCK x BLOCK; a sequence of at most BLOCK events is one tile, and nothing of it is computed twice.

Where dK and dV are made, S and P are [keys, queries]: the products with Q and dO then read them as
they are. As [queries, keys] they would have to be transposed as 16-bit copies of a product, which
ptxas up to 13.0 compiles to wrong numbers on sm_90 (a 64 x 64 tile, D = 32, 4 warps:
flash-linear-attention 640 and 1262, triton 10486).

Forward: queries stay, keys stream, softmax with a running maximum. Backward of one tile: everything
on chip. Backward of longer sequences: the block's dK and dV from all queries, then its dQ from all
keys, so every output is written once by one program. No atomics: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.philox import draws, philox_key
from fastrec.kernels.common.rows import dense, in_vectors
from fastrec.kernels.common.tiles import (
    FUSED,
    LOG2E,
    REST,
    capability_of,
    dot,
    dot_t,
    float32_products,
    round_to,
    split_lse,
    zero_rest,
)


@triton.jit
def _load_tile(base, t, h, row, length, stride_t, stride_h, d, BLOCK_D: tl.constexpr):
    """[len(row), BLOCK_D] features of the events t + row; 0 beyond the sequence and the width.

    t is int64, and so is every product with it: heads and widths may be constants or 32-bit.
    """
    col = tl.arange(0, BLOCK_D)
    offset = (t + row)[:, None] * stride_t + (t * 0 + h) * stride_h + col[None, :]
    return tl.load(base + offset, mask=(row < length)[:, None] & (col < d)[None, :], other=0.0)


@triton.jit
def _store_tile(
    base, value, t, h, row, length, stride_t, stride_h, d, BLOCK_D: tl.constexpr
):  # fmt: skip
    col = tl.arange(0, BLOCK_D)
    offset = (t + row)[:, None] * stride_t + (t * 0 + h) * stride_h + col[None, :]
    keep = (row < length)[:, None] & (col < d)[None, :]
    tl.store(base + offset, round_to(value, base.dtype.element_ty), mask=keep)


@triton.jit
def _scores(x, y, query, key, length, scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """scale * x y^T, of queries and keys or keys and queries, -inf where a query does not see a
    key. query, key: their places, one [R, 1] and the other [1, C]."""
    s = dot_t(x, y, None, PRECISION) * scale
    seen = key < length
    if CAUSAL:
        seen = seen & (key <= query)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _kept(
    rng, keys, b, row, first, layer, h, drop,
    SITE: tl.constexpr, BLOCK: tl.constexpr, BY_KEYS: tl.constexpr,
):  # fmt: skip
    """Keep mask [queries, keys], BY_KEYS [keys, queries], of the queries `row` and the keys first
    to first + BLOCK - 1 of sequence b."""
    seed, step = philox_key(tl.load(rng), SITE), tl.load(rng + 1)
    drawn = draws(seed, row, first // 16, tl.load(keys + b), layer, h, step, BLOCK // 16)
    if BY_KEYS:
        drawn = tl.trans(drawn)
    return drawn.to(tl.int32) >= drop


@triton.jit
def _load_lse(lse, events, heads, t, h, row, length):
    """The log-sum-exp of the events t + row, rounded, and what rounding left out."""
    at = lse + (t + row) * heads + h
    whole = tl.load(at, mask=row < length, other=0.0)
    return whole, tl.load(at + events.to(tl.int64) * heads, mask=row < length, other=0.0)


@triton.jit
def _probabilities(s, lse, left_out, PRECISION: tl.constexpr):
    """exp(s - lse), for float32 inputs with both parts of lse, [R, 1] or [1, C] both."""
    if PRECISION == "ieee":
        return tl.exp2((s - lse - left_out) * LOG2E)
    return tl.exp2((s - lse) * LOG2E)


@triton.jit(do_not_specialize=["events", "drop", "layer"])
def _fwd_kernel(
    q, k, v, offsets, keys, rng, out, lse,
    events, heads, d, scale, keep_scale, drop, layer,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    SITE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    VEC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d, stride_qt, stride_qh = d * VEC, stride_qt * VEC, stride_qh * VEC
    stride_kt, stride_kh = stride_kt * VEC, stride_kh * VEC
    stride_vt, stride_vh = stride_vt * VEC, stride_vh * VEC
    first = tl.program_id(1) * BLOCK
    if b >= tl.num_programs(0) - REST:
        zero_rest(out, offsets, events, heads * d, BLOCK, BLOCK_D)
        return
    t = tl.load(offsets + b)
    length = (tl.load(offsets + b + 1) - t).to(tl.int32)
    if first >= length:
        return
    row = first + tl.arange(0, BLOCK)
    end = length
    if CAUSAL:
        end = tl.minimum(length, first + BLOCK)
    for h in range(heads):
        q_tile = _load_tile(q, t, h, row, length, stride_qt, stride_qh, d, BLOCK_D)
        peak = tl.full([BLOCK], -1e30, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for start in range(0, end, BLOCK):
            col = start + tl.arange(0, BLOCK)
            k_tile = _load_tile(k, t, h, col, length, stride_kt, stride_kh, d, BLOCK_D)
            v_tile = _load_tile(v, t, h, col, length, stride_vt, stride_vh, d, BLOCK_D)
            s = _scores(
                q_tile, k_tile, row[:, None], col[None, :], length, scale, CAUSAL, PRECISION
            )  # fmt: skip
            new = tl.maximum(peak, tl.max(s, 1))
            p = tl.exp2((s - new[:, None]) * LOG2E)
            fade = tl.exp2((peak - new) * LOG2E)
            peak = new
            total = total * fade + tl.sum(p, 1)
            if keys is not None:
                kept = _kept(rng, keys, b, row, start, layer, h, drop, SITE, BLOCK, False)
                p = tl.where(kept, p, 0.0)
            acc = dot(round_to(p, q.dtype.element_ty), v_tile, acc * fade[:, None], PRECISION)
        acc *= (keep_scale / total)[:, None]
        _store_tile(out, acc, t, h, row, length, (t * 0 + heads) * d, d, d, BLOCK_D)
        whole, left_out = split_lse(peak, tl.log(total), peak)
        at = lse + (t + row) * heads + h
        tl.store(at, whole, mask=row < length)
        tl.store(at + events.to(tl.int64) * heads, left_out, mask=row < length)


@triton.jit(do_not_specialize=["events", "drop", "layer"])
def _bwd_kernel(
    g, q, k, v, out, lse, offsets, keys, rng, grad,
    events, heads, d, scale, keep_scale, drop, layer,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    SITE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    ONE_TILE: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d, stride_gt, stride_gh = d * VEC, stride_gt * VEC, stride_gh * VEC
    stride_qt, stride_qh = stride_qt * VEC, stride_qh * VEC
    stride_kt, stride_kh = stride_kt * VEC, stride_kh * VEC
    stride_vt, stride_vh = stride_vt * VEC, stride_vh * VEC
    first = tl.program_id(1) * BLOCK
    if b >= tl.num_programs(0) - REST:
        zero_rest(grad, offsets, events, 3 * heads * d, BLOCK, BLOCK_D)
        return
    t = tl.load(offsets + b)
    length = (tl.load(offsets + b + 1) - t).to(tl.int32)
    if first >= length:
        return
    own = first + tl.arange(0, BLOCK)
    third = (t * 0 + heads) * d
    dtype: tl.constexpr = q.dtype.element_ty
    for h in range(heads):
        k_own = _load_tile(k, t, h, own, length, stride_kt, stride_kh, d, BLOCK_D)
        v_own = _load_tile(v, t, h, own, length, stride_vt, stride_vh, d, BLOCK_D)
        q_own = _load_tile(q, t, h, own, length, stride_qt, stride_qh, d, BLOCK_D)
        g_own = _load_tile(g, t, h, own, length, stride_gt, stride_gh, d, BLOCK_D)
        if ONE_TILE:
            s = _scores(
                k_own, q_own, own[None, :], own[:, None], length, scale, CAUSAL, PRECISION
            )  # fmt: skip
            p = tl.exp2((s - tl.max(s, 0)[None, :]) * LOG2E)
            p = p / tl.sum(p, 0)[None, :]
            dp = dot(v_own, tl.trans(g_own), None, PRECISION) * keep_scale
            a = p
            if keys is not None:
                kept = _kept(rng, keys, b, own, first, layer, h, drop, SITE, BLOCK, True)
                a, dp = tl.where(kept, p, 0.0), tl.where(kept, dp, 0.0)
            ds = round_to(p * (dp - tl.sum(p * dp, 0)[None, :]), dtype)
            dv = dot(round_to(a, dtype), g_own, None, PRECISION)
            dk = dot(ds, q_own, None, PRECISION)
            dq = tl.trans(dot(tl.trans(k_own), ds, None, PRECISION))  # dQ^T = K^T dS^T
        else:
            dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
            dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
            dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
            begin = 0
            end = length
            if CAUSAL:
                begin = first
                end = tl.minimum(length, first + BLOCK)
            for start in range(begin, length, BLOCK):  # blocks of queries against the own keys
                row = start + tl.arange(0, BLOCK)
                q_tile = _load_tile(q, t, h, row, length, stride_qt, stride_qh, d, BLOCK_D)
                g_tile = _load_tile(g, t, h, row, length, stride_gt, stride_gh, d, BLOCK_D)
                o_tile = _load_tile(out, t, h, row, length, third, d, d, BLOCK_D)
                delta = tl.sum(g_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
                shift, left_out = _load_lse(lse, events, heads, t, h, row, length)
                s = _scores(
                    k_own, q_tile, row[None, :], own[:, None], length, scale, CAUSAL, PRECISION
                )  # fmt: skip
                p = _probabilities(s, shift[None, :], left_out[None, :], PRECISION)
                dp = dot(v_own, tl.trans(g_tile), None, PRECISION) * keep_scale
                a = p
                if keys is not None:
                    kept = _kept(rng, keys, b, row, first, layer, h, drop, SITE, BLOCK, True)
                    a, dp = tl.where(kept, p, 0.0), tl.where(kept, dp, 0.0)
                ds = round_to(p * (dp - delta[None, :]), dtype)
                dv = dot(round_to(a, dtype), g_tile, dv, PRECISION)
                dk = dot(ds, q_tile, dk, PRECISION)
            o_own = _load_tile(out, t, h, own, length, third, d, d, BLOCK_D)
            delta = tl.sum(g_own.to(tl.float32) * o_own.to(tl.float32), 1)
            shift, left_out = _load_lse(lse, events, heads, t, h, own, length)
            for start in range(0, end, BLOCK):  # the own queries against blocks of keys
                col = start + tl.arange(0, BLOCK)
                k_tile = _load_tile(k, t, h, col, length, stride_kt, stride_kh, d, BLOCK_D)
                v_tile = _load_tile(v, t, h, col, length, stride_vt, stride_vh, d, BLOCK_D)
                s = _scores(
                    q_own, k_tile, own[:, None], col[None, :], length, scale, CAUSAL, PRECISION
                )  # fmt: skip
                p = _probabilities(s, shift[:, None], left_out[:, None], PRECISION)
                dp = dot(g_own, tl.trans(v_tile), None, PRECISION) * keep_scale
                if keys is not None:
                    kept = _kept(rng, keys, b, own, start, layer, h, drop, SITE, BLOCK, False)
                    dp = tl.where(kept, dp, 0.0)
                ds = round_to(p * (dp - delta[:, None]), dtype)
                dq = dot(ds, k_tile, dq, PRECISION)
        _store_tile(grad, dq * scale, t, h, own, length, 3 * third, d, d, BLOCK_D)
        _store_tile(grad + third, dk * scale, t, h, own, length, 3 * third, d, d, BLOCK_D)
        _store_tile(
            grad + 2 * third, dv * keep_scale, t, h, own, length, 3 * third, d, d, BLOCK_D
        )  # fmt: skip


def _config(
    kernel: str,
    width: int,
    dtype: torch.dtype,
    max_seq_len: int,
    precision: str = "bf16x3",
    capability: int = 90,
) -> dict:
    """Tile shape and launch options of the "fwd" or "bwd" kernel, as large as no target spills
    (Triton 3.9; but 8 bytes on sm_100 at D = 32, forward).
    `precision`: of the products of float32, "ieee" where they are not split."""
    block_d, full = max(triton.next_power_of_2(width), 16), dtype == torch.float32
    longest = max(triton.next_power_of_2(max_seq_len), 16)
    # Backward spills with split products, and tiles of 16 gain little. Below sm_90 operands are
    # registers, and every warp would split all of a tile.
    split = full and kernel == "fwd" and precision == "bf16x3" and capability >= 90
    if split and longest > 16 and block_d <= 128:
        block = min(longest, 64 if block_d <= 64 else 32)
        return {
            "BLOCK": block,
            "BLOCK_D": block_d,
            "PRECISION": "bf16x3",
            "num_warps": 4 if block == 64 or block_d == 128 else 2,
            "num_stages": 1,
        }
    # float32 has no tensor cores, its operands are registers. Backward has three accumulators, and
    # two loops of products above one tile.
    if kernel == "fwd":
        largest = (32 if block_d <= 128 else 16) if full else (64 if block_d <= 128 else 32)
    elif full:
        largest = 32 if block_d <= 32 else 16
    else:
        largest = 64 if block_d <= 64 and longest <= 64 else 32 if block_d <= 128 else 16
    block = min(longest, largest)
    if kernel == "fwd" and not full and block_d == 128:
        block = largest  # 32 x 128 spills 8 bytes on sm_80 (4 warps) or sm_100 (8 warps)
    if block * max(block, block_d) <= 512:
        warps = 1
    elif kernel == "fwd":
        warps = 8 if block_d >= 128 else 4
    else:
        warps = 4 if not full and block_d <= (32 if block == 64 else 64) else 8
    return {
        "BLOCK": block,
        "BLOCK_D": block_d,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": warps,
        "num_stages": 1,
    }


def _features_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Of events and heads."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def _launch(kernel, query, offsets, max_seq_len):
    """(grid, options) of a kernel."""
    if query.dtype == torch.float64:
        raise RuntimeError("jagged_attention has no float64 triton kernel, query is float64")
    options = _config(
        kernel, query.shape[2], query.dtype, max_seq_len, float32_products(query.device),
        capability_of(query.device),
    )  # fmt: skip
    # Sequences on x: the other axes end at 65,535. max_seq_len is a bound, of any height; at 0 the
    # programs of the rest still write zeros.
    blocks = triton.cdiv(max(1, min(max_seq_len, query.shape[0])), options["BLOCK"])
    return (offsets.shape[0] - 1 + REST.value, blocks), options


def jagged_attention_fwd(
    query, key, value, offsets, max_seq_len, causal, scale,
    keys, positions, rng, drop, site, layer,
):  # fmt: skip
    grid, options = _launch("fwd", query, offsets, max_seq_len)
    query, key, value = map(_features_contiguous, (query, key, value))
    events, heads, width = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty(2, events, heads, dtype=torch.float32)
    if events == 0:
        return out, lse
    vector, sizes = in_vectors(width, *_strides(query, key, value))
    with torch.cuda.device_of(query):
        _fwd_kernel[grid](
            query, key, value, *dense(offsets, keys, rng), out, lse,
            events, heads, sizes[0], scale, 256 / (256 - drop), drop, layer, *sizes[1:],
            SITE=site, CAUSAL=causal, VEC=vector, **options, **FUSED,
        )  # fmt: skip
    return out, lse


def jagged_attention_bwd(
    grad_out, query, key, value, out, lse, offsets, max_seq_len, causal, scale,
    keys, positions, rng, drop, site, layer,
):  # fmt: skip
    grid, options = _launch("bwd", query, offsets, max_seq_len)
    grad_out, query, key, value = map(_features_contiguous, (grad_out, query, key, value))
    events, heads, width = query.shape
    grad = query.new_empty(events, 3, heads, width)
    if events == 0:
        return grad
    vector, sizes = in_vectors(width, *_strides(grad_out, query, key, value))
    with torch.cuda.device_of(query):
        _bwd_kernel[grid](
            grad_out, query, key, value, out, lse, *dense(offsets, keys, rng), grad,
            events, heads, sizes[0], scale, 256 / (256 - drop), drop, layer, *sizes[1:],
            SITE=site, CAUSAL=causal, ONE_TILE=max_seq_len <= options["BLOCK"], VEC=vector,
            **options, **FUSED,
        )  # fmt: skip
    return grad
