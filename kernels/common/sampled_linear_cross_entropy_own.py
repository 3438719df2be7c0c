# SPDX-License-Identifier: Apache-2.0
"""The forward kernel of `sampled_linear_cross_entropy` for negatives of every row: a program owns
one row and gathers its negatives in tiles. Legend: N rows, V items, K negatives, D width.
"""

import triton
import triton.language as tl

from fastrec.kernels.common.tiles import load_rows, log1p, softplus_and_sigmoid, split_lse


@triton.jit
def finish(s_y, top, total, k, beta, SOFTMAX: tl.constexpr):
    """(loss, c_iy, lse, what its rounding left out, factor of the terms exp(s - top)) of rows from
    their negatives."""
    if SOFTMAX:
        # Relative to the larger of target and negatives. c_iy = -sum_j p_ij, which does not cancel.
        peak = tl.maximum(s_y, top)
        scale = tl.exp(top - peak)
        others, own = total * scale, tl.exp(s_y - peak)
        near = tl.where(s_y >= top, log1p(others), tl.log(others + own))
        loss = near + (peak - s_y)  # inf - inf: NaN
        whole = others + own
        lse, left_out = split_lse(peak, tl.log(whole), peak)
        return loss, -others / whole, lse, left_out, scale / whole
    else:
        softplus, sigmoid = softplus_and_sigmoid(-s_y)
        count = k + 1.0
        loss = (beta * softplus + total) / count
        return loss, -beta * sigmoid / count, s_y * 0.0, s_y * 0.0, s_y * 0.0 + 1.0


@triton.jit
def _offset(bias, log_q, item, live):
    value = tl.zeros(item.shape, tl.float32)
    if bias is not None:
        value += tl.load(bias + item, mask=live, other=0.0).to(tl.float32)
    if log_q is not None:
        value -= tl.load(log_q + item, mask=live, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["beta"])
def _own_fwd_kernel(
    x, w, bias, log_q, target, negatives, loss_out, grad_x, grad_target, grad_negatives, lse_out,
    k, d, beta, stride_xn, stride_xd, stride_wv, stride_wd,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, SOFTMAX: tl.constexpr,
    WITH_INPUT: tl.constexpr, WITH_WEIGHT: tl.constexpr,
):  # fmt: skip
    """One row. For the softmax `grad_negatives` receives the scores, -inf for hits."""
    i = tl.program_id(0).to(tl.int64)
    y = tl.load(target + i)
    lane, col = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    real, far = col < d, col.to(tl.int64)  # of a table [D, V] stride_wd is V
    scored = y >= 0
    y = tl.maximum(y, 0)
    x_row = tl.load(x + i * stride_xn + far * stride_xd, mask=real, other=0.0).to(tl.float32)
    w_row = tl.load(w + y * stride_wv + far * stride_wd, mask=real, other=0.0).to(tl.float32)
    s_y = tl.sum(x_row * w_row, 0)
    if bias is not None:
        s_y += tl.load(bias + y).to(tl.float32)
    if log_q is not None:
        s_y -= tl.load(log_q + y).to(tl.float32)
    top, total = tl.full([], -1e30, tl.float32), tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, tl.where(scored, k, 0), BLOCK_K):
        at = first + lane
        live = at < k
        item = tl.load(negatives + i * k + at, mask=live, other=0)
        w_tile = load_rows(w, item, live, stride_wv, stride_wd, 0, d, BLOCK_D).to(tl.float32)
        s = tl.sum(x_row[None, :] * w_tile, 1) + _offset(bias, log_q, item, live)
        s = tl.where(live & (item != y), s, float("-inf"))
        if SOFTMAX:
            kept = s
            peak = tl.maximum(top, tl.max(s, 0))
            fade = tl.exp(top - peak)
            p = tl.exp(s - peak)
            total, acc, top = total * fade + tl.sum(p, 0), acc * fade, peak
        else:
            softplus, sigmoid = softplus_and_sigmoid(s)
            total += tl.sum(softplus, 0)
            p = sigmoid / (k + 1.0)
            kept = p
        if WITH_INPUT:
            acc += tl.sum(p[:, None] * w_tile, 0)
        if WITH_WEIGHT:
            tl.store(grad_negatives + i * k + at, kept, mask=live)
    loss, c, lse, left_out, scale = finish(s_y, top, total, k, beta, SOFTMAX)
    c = tl.where(scored, c, 0.0)
    tl.store(loss_out + i, tl.where(scored, loss, 0.0))
    tl.store(grad_target + i, c)
    tl.store(lse_out + i, tl.where(scored, lse, 0.0))
    tl.store(lse_out + tl.num_programs(0) + i, tl.where(scored, left_out, 0.0))
    if WITH_INPUT:
        # A row that is not scored was compared with item 0, which need not be finite.
        grad = tl.where(scored, acc * scale + c * w_row, 0.0)
        tl.store(grad_x + i * d + col, grad, mask=real)


def own_config(width: int) -> dict:
    """A tile of about 2,048 gathered elements a program of 4 warps."""
    block_d = max(triton.next_power_of_2(width), 16)
    return {"BLOCK_K": max(2048 // block_d, 1), "BLOCK_D": block_d, "num_warps": 4}
