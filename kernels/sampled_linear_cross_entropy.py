"""Triton kernels of `sampled_linear_cross_entropy`: gathered rows exist one tile at a time.

Legend: N rows, V items, K negatives, D width. Negatives of every row: a program owns one row and
gathers its negatives in tiles. Shared ones are gathered once ([K, D]), and the scores are products
of tiles; backward computes them again, a program owns BLOCK_K negatives and streams all rows.
The gradient of the table is a sum over the pairs sorted by item, as in `jagged_embedding`: no
atomics, and the order of the additions depends on the ids only.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.dropout_add_layer_norm import WIDEST
from fastrec.kernels.jagged_embedding import BLOCK_T, _carry_kernel, jagged_embedding_scatter
from fastrec.kernels.tiles import dot as _dot
from fastrec.kernels.tiles import load_rows as _load_rows
from fastrec.kernels.tiles import round_to as _round


@triton.jit
def _binary(s):
    """(softplus(s), sigmoid(s))"""
    e = tl.exp(-tl.abs(s))
    # log1p(e) is e where 1 + e loses the digits of a small e.
    softplus = tl.maximum(s, 0.0) + tl.where(e < 1e-4, e * (1.0 - 0.5 * e), tl.log(1.0 + e))
    return softplus, tl.where(s < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _offset(bias, log_q, item, live):
    value = tl.zeros(item.shape, tl.float32)
    if bias is not None:
        value += tl.load(bias + item, mask=live, other=0.0).to(tl.float32)
    if log_q is not None:
        value -= tl.load(log_q + item, mask=live, other=0.0).to(tl.float32)
    return value


@triton.jit
def _finish(s_y, top, total, k, beta, SOFTMAX: tl.constexpr):
    """(loss, c_iy, lse, factor of the terms exp(s - top)) of rows from their negatives."""
    if SOFTMAX:
        # Relative to the larger of target and negatives. c_iy = -sum_j p_ij, which does not cancel.
        peak = tl.maximum(s_y, top)
        scale = tl.exp(top - peak)
        others, own = total * scale, tl.exp(s_y - peak)
        small = others < 1e-4
        near = tl.where(small, others * (1.0 - 0.5 * others), tl.log(1.0 + others))
        loss = tl.where(s_y >= top, near, tl.log(others + own) + (peak - s_y))
        whole = others + own
        return loss, -others / whole, peak + tl.log(whole), scale / whole
    else:
        softplus, sigmoid = _binary(-s_y)
        count = k + 1.0
        loss = (beta * softplus + total) / count
        return loss, -beta * sigmoid / count, s_y * 0.0, s_y * 0.0 + 1.0


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
    real = col < d
    scored = y >= 0
    y = tl.maximum(y, 0)
    x_row = tl.load(x + i * stride_xn + col * stride_xd, mask=real, other=0.0).to(tl.float32)
    w_row = tl.load(w + y * stride_wv + col * stride_wd, mask=real, other=0.0).to(tl.float32)
    s_y = tl.sum(x_row * w_row, 0)
    if bias is not None:
        s_y += tl.load(bias + y).to(tl.float32)
    if log_q is not None:
        s_y -= tl.load(log_q + y).to(tl.float32)
    top, total = s_y * 0.0 - 1e30, s_y * 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, tl.where(scored, k, 0), BLOCK_K):
        at = first + lane
        live = at < k
        item = tl.load(negatives + i * k + at, mask=live, other=0)
        w_tile = _load_rows(w, item, live, stride_wv, stride_wd, 0, d, BLOCK_D).to(tl.float32)
        s = tl.sum(x_row[None, :] * w_tile, 1) + _offset(bias, log_q, item, live)
        s = tl.where(live & (item != y), s, float("-inf"))
        if SOFTMAX:
            kept = s
            peak = tl.maximum(top, tl.max(s, 0))
            fade = tl.exp(top - peak)
            p = tl.exp(s - peak)
            total, acc, top = total * fade + tl.sum(p, 0), acc * fade, peak
        else:
            softplus, sigmoid = _binary(s)
            total += tl.sum(softplus, 0)
            p = sigmoid / (k + 1.0)
            kept = p
        if WITH_INPUT:
            acc += tl.sum(p[:, None] * w_tile, 0)
        if WITH_WEIGHT:
            tl.store(grad_negatives + i * k + at, kept, mask=live)
    loss, c, lse, scale = _finish(s_y, top, total, k, beta, SOFTMAX)
    c = tl.where(scored, c, 0.0)
    tl.store(loss_out + i, tl.where(scored, loss, 0.0))
    tl.store(grad_target + i, c)
    tl.store(lse_out + i, tl.where(scored, lse, 0.0))
    if WITH_INPUT:
        tl.store(grad_x + i * d + col, acc * scale + c * w_row, mask=real)


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
        s = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for c in range(CHUNKS):
            x_part = _load_rows(x, at, live, stride_xn, stride_xd, c * BLOCK_D, d, BLOCK_D)
            w_part = _load_rows(w, place, real, d, 1, c * BLOCK_D, d, BLOCK_D)
            s = _dot(x_part, tl.trans(_round(w_part, x.dtype.element_ty)), s, PRECISION)
        s += tl.load(offset + place, mask=real, other=0.0)[None, :]
        s = tl.where(real[None, :] & (item[None, :] != y[:, None]), s, float("-inf"))
        if SOFTMAX:
            peak = tl.maximum(top, tl.max(s, 1))
            fade = tl.exp(top - peak)
            p = tl.exp(s - peak[:, None])
            total, acc, top = total * fade + tl.sum(p, 1), acc * fade[:, None], peak
        else:
            softplus, p = _binary(s)
            total += tl.sum(softplus, 1)
            p = p / (k + 1.0)
        if WITH_INPUT:
            w_tile = _load_rows(w, place, real, d, 1, own, d, BLOCK_D)
            w_tile = _round(w_tile, x.dtype.element_ty)
            acc = _dot(_round(p, x.dtype.element_ty), w_tile, acc, PRECISION)
    loss, c, lse, scale = _finish(s_y, top, total, k, beta, SOFTMAX)
    scored = live & (y >= 0)
    c = tl.where(scored, c, 0.0)
    if own == 0:
        tl.store(loss_out + at, tl.where(scored, loss, 0.0), mask=live)
        tl.store(grad_target + at, c, mask=live)
        tl.store(lse_out + at, tl.where(scored, lse, 0.0), mask=live)
    if WITH_INPUT:
        row = _load_rows(w_target, at, live, stride_td, 1, own, d, BLOCK_D).to(tl.float32)
        grad = tl.where(scored[:, None], acc * scale[:, None] + c[:, None] * row, 0.0)
        col = own + tl.arange(0, BLOCK_D)
        tl.store(
            grad_x + at[:, None] * d + col[None, :], grad, mask=live[:, None] & (col < d)[None, :]
        )


@triton.jit(do_not_specialize=["n", "k"])
def _shared_bwd_kernel(
    x, w, offset, negatives, target, lse, grad_loss, scale, grad_w, grad_offset,
    n, k, d, stride_xn, stride_xd,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_K gathered rows and of their offsets, from all N rows."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    own = tl.program_id(1) * BLOCK_D
    real = place < k
    item = tl.load(negatives + place, mask=real, other=-2)
    b = tl.load(offset + place, mask=real, other=0.0)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    acc_offset = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, n, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        live = at < n
        y = tl.load(target + at, mask=live, other=-1)
        s = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
        for c in range(CHUNKS):
            x_part = _load_rows(x, at, live, stride_xn, stride_xd, c * BLOCK_D, d, BLOCK_D)
            w_part = _load_rows(w, place, real, d, 1, c * BLOCK_D, d, BLOCK_D)
            s = _dot(_round(w_part, x.dtype.element_ty), tl.trans(x_part), s, PRECISION)
        s += b[:, None]
        scored = live & (y >= 0)
        out = (item[:, None] == y[None, :]) | (real[:, None] & scored[None, :] == 0)
        s = tl.where(out, float("-inf"), s)
        if SOFTMAX:
            p = tl.exp(s - tl.load(lse + at, mask=live, other=0.0)[None, :])
        else:
            _, p = _binary(s)
            p = p / (k + 1.0)
        p *= tl.load(grad_loss + at, mask=scored, other=0.0)[None, :]
        acc_offset += tl.sum(p, 1)
        x_tile = _load_rows(x, at, live, stride_xn, stride_xd, own, d, BLOCK_D)
        acc = _dot(_round(p, x.dtype.element_ty), x_tile, acc, PRECISION)
    unit = tl.load(scale)
    col = own + tl.arange(0, BLOCK_D)
    keep = real[:, None] & (col < d)[None, :]
    tl.store(grad_w + place[:, None] * d + col[None, :], acc * unit, mask=keep)
    if own == 0:
        tl.store(grad_offset + place, acc_offset * unit, mask=real)


@triton.jit(do_not_specialize=["t", "per_row"])
def _sum_kernel(
    x, coefficient, order, index, out, head, tail, t, per_row, d, stride_xn, stride_xd,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of coefficient[pair] x[pair // per_row] over BLOCK_T pairs of sorted `index`; head and
    tail as in `jagged_embedding`, whose _carry_kernel joins them."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = col < d
    lane = tl.arange(0, BLOCK_T)
    at = program * BLOCK_T + lane
    live = at < t
    row = tl.load(index + at, mask=live, other=-1)
    before = tl.load(index + at - 1, mask=live & (at > 0), other=-1)
    starts = live & ((lane == 0) | (row != before))
    run = tl.cumsum(starts.to(tl.int32), 0) - 1  # rank of the row among those of this program
    runs = tl.max(run, 0) + 1
    member = (run[None, :] == lane[:, None]) & live[None, :]  # [run, pair]

    pair = tl.load(order + at, mask=live, other=0)
    c = tl.load(coefficient + pair, mask=live, other=0.0)
    source = x + (pair // per_row)[:, None] * stride_xn + col[None, :] * stride_xd
    values = tl.load(source, mask=live[:, None] & real[None, :], other=0.0).to(tl.float32)
    sums = tl.dot(member.to(tl.float32), c[:, None] * values, input_precision="ieee")

    place = tl.sum(tl.where(member & starts[None, :], row[None, :], 0), 1)
    after = program * BLOCK_T + BLOCK_T
    following = tl.load(index + after, mask=after < t, other=-1)
    is_head = (lane == 0) & live & (row == before)
    is_tail = (lane == runs - 1) & (place == following) & (is_head == 0)
    whole = (lane < runs) & (is_head == 0) & (is_tail == 0)
    target = out + place[:, None] * d + col[None, :]
    tl.store(target, _round(sums, out.dtype.element_ty), mask=whole[:, None] & real[None, :])
    edge = program * d + col[None, :] + lane[:, None] * 0
    tl.store(head + edge, sums, mask=is_head[:, None] & real[None, :])
    tl.store(tail + edge, sums, mask=is_tail[:, None] & real[None, :])


def _own_config(width: int) -> dict:
    """A tile of about 2,048 gathered elements a program of 4 warps."""
    block_d = max(triton.next_power_of_2(width), 16)
    return {"BLOCK_K": max(2048 // block_d, 1), "BLOCK_D": block_d, "num_warps": 4}


def _shared_config(width: int, dtype: torch.dtype, backward: bool) -> dict:
    """Tiles of the products, that spill on none of sm_80, sm_90, sm_100; above 256 columns in
    chunks of 64."""
    block_d = 64 if width > 256 else max(triton.next_power_of_2(width), 16)
    full = dtype == torch.float32
    block = 32 if full or block_d == 256 else 64
    small = full and width > 64 and not (backward and width > 256)
    return {
        "BLOCK_N": 16 if small else block,
        "BLOCK_K": block,
        "BLOCK_D": block_d,
        "CHUNKS": triton.cdiv(width, block_d),
        "num_warps": 8,
        "num_stages": 1 if width > 256 else 2,
        "PRECISION": "ieee" if full else "tf32",
    }


def _check(input, linear_weight):
    if input.dtype == torch.float64 or linear_weight.dtype == torch.float64:
        raise RuntimeError("sampled_linear_cross_entropy has no float64 triton kernel")
    if input.shape[1] > WIDEST:
        raise RuntimeError(
            "the triton kernel of sampled_linear_cross_entropy is for widths up to"
            f" {WIDEST}, got {input.shape[1]}"
        )


def _shared_operands(linear_weight, linear_bias, log_q, negatives):
    """Rows [K, D] and offsets [K] of the shared negatives."""
    return linear_weight.index_select(0, negatives), _offsets(linear_bias, log_q, negatives)


def _offsets(linear_bias, log_q, items):
    offset = torch.zeros(items.shape, dtype=torch.float32, device=items.device)
    if linear_bias is not None:
        offset += linear_bias.index_select(0, items).float()
    if log_q is not None:
        offset -= log_q.index_select(0, items).float()
    return offset


def _dense(*vectors):
    return (None if vector is None else vector.contiguous() for vector in vectors)


def sampled_linear_cross_entropy_fwd(
    input, linear_weight, linear_bias, log_q, target, negatives, beta, with_input, with_weight
):
    _check(input, linear_weight)
    (n, d), k, own = input.shape, negatives.shape[-1], negatives.dim() == 2
    loss, grad_target, lse = (
        torch.empty(n, dtype=torch.float32, device=input.device) for _ in range(3)
    )
    grad_input = loss.new_empty(n if with_input else 0, d)
    grad_negatives = loss.new_empty(n if own and with_weight else 0, k)
    outputs = (loss, grad_input, grad_target, grad_negatives, lse)
    if n == 0:
        return outputs
    softmax = beta < 0
    linear_bias, log_q, target, negatives = _dense(linear_bias, log_q, target, negatives)
    with torch.cuda.device_of(input):
        if own:
            _own_fwd_kernel[(n,)](
                input, linear_weight, linear_bias, log_q, target, negatives, *outputs, k, d, beta,
                *input.stride(), *linear_weight.stride(), SOFTMAX=softmax, WITH_INPUT=with_input,
                WITH_WEIGHT=with_weight, **_own_config(d),
            )  # fmt: skip
        else:
            rows, offset = _shared_operands(linear_weight, linear_bias, log_q, negatives)
            y = target.clamp_min(0)
            target_rows = linear_weight.index_select(0, y)
            score = (target_rows.float() * input.float()).sum(1) + _offsets(linear_bias, log_q, y)
            config = _shared_config(d, input.dtype, backward=False)
            grid = (triton.cdiv(n, config["BLOCK_N"]), config["CHUNKS"] if with_input else 1)
            _shared_fwd_kernel[grid](
                input, rows, offset, negatives, target, target_rows, score, loss, grad_input,
                grad_target, lse, n, k, d, beta, *input.stride(), target_rows.stride(0),
                SOFTMAX=softmax, WITH_INPUT=with_input, **config,
            )  # fmt: skip
    if softmax and own and with_weight:
        grad_negatives.sub_(lse[:, None]).exp_().masked_fill_((target < 0)[:, None], 0)
    elif own and with_weight:
        grad_negatives.masked_fill_((target < 0)[:, None], 0)
    return outputs


def _sums(x, coefficient, per_row, ids, rows, dtype):
    """[rows, D] sums of coefficient[pair] x[pair // per_row] by ids[pair]."""
    (t,), d = ids.shape, x.shape[1]
    out = x.new_zeros(rows, d, dtype=dtype)
    if t == 0 or d == 0:
        return out
    index, order = ids.sort(stable=True)
    block_d = min(max(triton.next_power_of_2(d), 16), 64)
    grid = (triton.cdiv(t, BLOCK_T), triton.cdiv(d, block_d))
    head, tail = torch.empty(2, grid[0], d, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _sum_kernel[grid](
            x, coefficient, order, index, out, head, tail, t, per_row, d, *x.stride(),
            BLOCK_T=BLOCK_T, BLOCK_D=block_d, num_warps=8,
        )  # fmt: skip
        _carry_kernel[grid](
            index, out, head, tail, t, d, BLOCK_T=BLOCK_T, BLOCK_K=32, BLOCK_D=block_d
        )
    return out


def sampled_linear_cross_entropy_bwd(
    input, linear_weight, linear_bias, log_q, target, negatives, grad_target, grad_negatives, lse,
    grad_loss, beta, sparse,
):  # fmt: skip
    (n, d), k, own = input.shape, negatives.shape[-1], negatives.dim() == 2
    linear_bias, log_q, target, negatives = _dense(linear_bias, log_q, target, negatives)
    y = target.clamp_min(0)  # rows that are not scored have coefficients of 0
    c_target = torch.where(target < 0, 0, grad_target * grad_loss)
    if own:
        ids = torch.cat([negatives, y[:, None]], 1).flatten()
        coefficient = torch.cat([grad_negatives * grad_loss[:, None], c_target[:, None]], 1)
        coefficient = coefficient.flatten()
        # Hits and rows that are not scored are no pairs: they go to the row after the last one.
        skipped = torch.cat([(negatives == y[:, None]) | (target < 0)[:, None],
                             (target < 0)[:, None]], 1).flatten()  # fmt: skip
        offsets = coefficient[:, None]
    else:
        rows, offset = _shared_operands(linear_weight, linear_bias, log_q, negatives)
        config = _shared_config(d, input.dtype, backward=True)
        grad_rows = input.new_empty(k, d, dtype=torch.float32)
        grad_offset = input.new_empty(k, dtype=torch.float32)
        scale, upstream = torch.ones((), device=input.device), grad_loss
        if input.dtype == torch.float16 and n > 0:
            # A power of two that brings the gradients of the rows near 2^8: float16 has 5 bits of
            # exponent.
            exponent = torch.frexp(grad_loss.abs().amax()).exponent - 8
            scale = torch.ldexp(scale, exponent)
            upstream = grad_loss / scale
        with torch.cuda.device_of(input):
            _shared_bwd_kernel[(triton.cdiv(k, config["BLOCK_K"]), config["CHUNKS"])](
                input, rows, offset, negatives, target, lse, upstream, scale, grad_rows,
                grad_offset, n, k, d, *input.stride(), SOFTMAX=beta < 0, **config,
            )  # fmt: skip
        ids = torch.cat([negatives, y])
        coefficient = torch.cat([torch.ones_like(grad_offset), c_target])
        skipped = torch.cat([torch.zeros_like(negatives, dtype=torch.bool), target < 0])
        offsets = torch.cat([grad_offset, c_target])[:, None]
    items, index = linear_weight.shape[0], ids.new_empty(0)
    ids = torch.where(skipped, items, ids)
    if sparse:
        index, ids = torch.unique(ids, return_inverse=True)
        items = index.shape[0]
        if items and int(index[-1]) == linear_weight.shape[0]:
            index, items = index[:-1], items - 1
    # One row more takes what is skipped.
    if own:
        grad_weight = _sums(input, coefficient, k + 1, ids, items + 1, linear_weight.dtype)
    else:
        sources = torch.cat([grad_rows, input.float() * c_target[:, None]])
        grad_weight = jagged_embedding_scatter(sources, ids, items + 1, linear_weight.dtype)
    grad_bias = lse.new_empty(0)
    if linear_bias is not None:
        grad_bias = jagged_embedding_scatter(offsets, ids, items + 1, linear_bias.dtype)[:-1, 0]
        grad_bias = grad_bias.contiguous()
    return index, grad_weight[:-1], grad_bias
