# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `sampled_linear_cross_entropy`: gathered rows exist one tile at a time.

Legend: N rows, V items, K negatives, D width. Launchers, for negatives of every row or shared ones,
and the gradient of the table: a sum over the pairs sorted by item, as in `jagged_embedding`. No
atomics, and the order of the additions depends on the ids only.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.rows import WIDEST, cut_columns, dense, pad_columns
from fastrec.kernels.common.runs import BLOCK_T, add_runs, carry_kernel
from fastrec.kernels.common.sampled_linear_cross_entropy_own import _own_fwd_kernel, own_config
from fastrec.kernels.common.sampled_linear_cross_entropy_shared import (
    _shared_bwd_kernel,
    _shared_fwd_kernel,
    shared_config,
)
from fastrec.kernels.common.tiles import (
    FUSED,
    capability_of,
    float32_products,
    ranges_of,
    sum_ranges,
)
from fastrec.kernels.jagged_embedding import jagged_embedding_scatter


@triton.jit(do_not_specialize=["t", "per_row", "spare"])
def _sum_kernel(
    x, coefficient, order, index, out, head, tail, t, per_row, d, spare, stride_xn, stride_xd,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of coefficient[pair] x[pair // per_row] over pairs of equal `index`, which is sorted."""
    program = tl.program_id(0).to(tl.int64)
    if tl.load(index + program * BLOCK_T) == spare:
        return  # the highest index: nothing but what is skipped, often most of the pairs
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = program * BLOCK_T + tl.arange(0, BLOCK_T)
    live = at < t
    live &= tl.load(index + at, mask=live, other=spare) != spare
    pair = tl.load(order + at, mask=live, other=0)
    c = tl.load(coefficient + pair, mask=live, other=0.0)
    source = x + (pair // per_row)[:, None] * stride_xn + col[None, :].to(tl.int64) * stride_xd
    values = tl.load(source, mask=live[:, None] & (col < d)[None, :], other=0.0).to(tl.float32)
    add_runs(c[:, None] * values, index, out, head, tail, program, col, t, d, BLOCK_T)


def _check(input, linear_weight):
    if input.dtype == torch.float64 or linear_weight.dtype == torch.float64:
        raise RuntimeError("sampled_linear_cross_entropy has no float64 triton kernel")
    if input.shape[1] > WIDEST:
        raise RuntimeError(
            "the triton kernel of sampled_linear_cross_entropy is for widths up to"
            f" {WIDEST}, got {input.shape[1]}"
        )


def _shared_config(x, backward):
    capability, products = capability_of(x.device), float32_products(x.device)
    return shared_config(x.shape[1], x.dtype, backward, products, capability)


def _shared_operands(input, linear_weight, linear_bias, log_q, negatives):
    """The input [N, D'], and rows [K, D'] and offsets [K] of the shared negatives."""
    operands = pad_columns(input, linear_weight.index_select(0, negatives))
    return *operands, _offsets(linear_bias, log_q, negatives)


def _offsets(linear_bias, log_q, items):
    offset = torch.zeros(items.shape, dtype=torch.float32, device=items.device)
    if linear_bias is not None:
        offset += linear_bias.index_select(0, items).float()
    if log_q is not None:
        offset -= log_q.index_select(0, items).float()
    return offset


def sampled_linear_cross_entropy_fwd(
    input, linear_weight, linear_bias, log_q, target, negatives, beta, with_input, with_weight
):
    _check(input, linear_weight)
    (n, d), k, own = input.shape, negatives.shape[-1], negatives.dim() == 2
    loss, grad_target = torch.empty(2, n, dtype=torch.float32, device=input.device)
    lse = torch.empty(2, n, dtype=torch.float32, device=input.device)
    grad_input = loss.new_empty(n if with_input else 0, d)
    grad_negatives = loss.new_empty(n if own and with_weight else 0, k)
    outputs = (loss, grad_input, grad_target, grad_negatives, lse)
    if n == 0:
        return outputs
    softmax = beta < 0
    linear_bias, log_q, target, negatives = dense(linear_bias, log_q, target, negatives)
    with torch.cuda.device_of(input):
        if own:
            _own_fwd_kernel[(n,)](
                input, linear_weight, linear_bias, log_q, target, negatives, *outputs, k, d, beta,
                *input.stride(), *linear_weight.stride(), SOFTMAX=softmax, WITH_INPUT=with_input,
                WITH_WEIGHT=with_weight, **own_config(d), **FUSED,
            )  # fmt: skip
        else:
            x, rows, offset = _shared_operands(input, linear_weight, linear_bias, log_q, negatives)
            y = target.clamp_min(0)
            target_rows = linear_weight.index_select(0, y)
            score = (target_rows.float() * input.float()).sum(1) + _offsets(linear_bias, log_q, y)
            (target_rows,), wide = pad_columns(target_rows), x.shape[1]
            padded = loss.new_empty(len(grad_input), wide)
            config = _shared_config(x, backward=False)
            grid = (triton.cdiv(n, config["BLOCK_N"]), config["CHUNKS"] if with_input else 1)
            _shared_fwd_kernel[grid](
                x, rows, offset, negatives, target, target_rows, score, loss, padded,
                grad_target, lse, n, k, wide, beta, *x.stride(), target_rows.stride(0),
                SOFTMAX=softmax, WITH_INPUT=with_input, **config, **FUSED,
            )  # fmt: skip
            outputs = (loss, cut_columns(padded, d), grad_target, grad_negatives, lse)
    if softmax and own and with_weight:
        grad_negatives.sub_(lse[0, :, None]).sub_(lse[1, :, None]).exp_().masked_fill_(
            (target < 0)[:, None], 0
        )
    elif own and with_weight:
        grad_negatives.masked_fill_((target < 0)[:, None], 0)
    return outputs


def sum_config(width: int, capability: int) -> dict:
    """Columns and warps of `_sum_kernel`: 8 warps spill 8 bytes on sm_100."""
    block_d = min(max(triton.next_power_of_2(width), 16), 64)
    return {"BLOCK_D": block_d, "num_warps": 8 if capability < 100 else 4}


def _sums(x, coefficient, per_row, ids, rows, dtype):
    """[rows, D] sums of coefficient[pair] x[pair // per_row] by ids[pair]; the last row is spare,
    and not computed."""
    (t,), d, spare = ids.shape, x.shape[1], rows - 1
    out = x.new_zeros(rows, d, dtype=dtype)
    if t == 0 or d == 0:
        return out
    index, order = ids.sort(stable=True)
    config = sum_config(d, capability_of(x.device))
    grid = (triton.cdiv(t, BLOCK_T), triton.cdiv(d, config["BLOCK_D"]))
    head, tail = torch.empty(2, grid[0], d, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _sum_kernel[grid](
            x, coefficient, order, index, out, head, tail, t, per_row, d, spare, *x.stride(),
            BLOCK_T=BLOCK_T, **config, **FUSED,
        )  # fmt: skip
        carry_kernel[grid](
            index, out, head, tail, t, d, spare, BLOCK_T=BLOCK_T, BLOCK_K=32,
            BLOCK_D=config["BLOCK_D"], **FUSED,
        )  # fmt: skip
    return out


def sampled_linear_cross_entropy_bwd(
    input, linear_weight, linear_bias, log_q, target, negatives, grad_target, grad_negatives, lse,
    grad_loss, beta, sparse,
):  # fmt: skip
    (n, d), k, own = input.shape, negatives.shape[-1], negatives.dim() == 2
    linear_bias, log_q, target, negatives = dense(linear_bias, log_q, target, negatives)
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
        x, rows, offset = _shared_operands(input, linear_weight, linear_bias, log_q, negatives)
        # Rows that are not scored have gradients of 0, and 0 times what they hold need not be. A
        # mask of the loads that waits for the target would keep them from being ahead of their use.
        x, wide = x.masked_fill((target < 0)[:, None], 0), x.shape[1]
        config = _shared_config(x, backward=True)
        blocks = triton.cdiv(k, config["BLOCK_K"])
        tiles = triton.cdiv(n, config["BLOCK_N"])
        ranges, per_range = ranges_of(input.device, blocks * config["CHUNKS"], tiles)
        grad_rows = input.new_empty(ranges, k, wide, dtype=torch.float32)
        grad_offset = input.new_empty(ranges, k, dtype=torch.float32)
        scale = torch.ones((), dtype=torch.float32, device=input.device)
        upstream = grad_loss * torch.exp(-lse[1])
        if input.dtype == torch.float16 and n > 0:
            # A power of two that brings the gradients of the rows near 2^8: float16 has 5 bits of
            # exponent.
            exponent = torch.frexp(upstream.abs().amax()).exponent - 8
            scale = torch.ldexp(scale, exponent)
            upstream = upstream / scale
        with torch.cuda.device_of(input):
            _shared_bwd_kernel[(ranges * blocks, config["CHUNKS"])](
                x, rows, offset, negatives, target, lse[0], upstream, scale, grad_rows,
                grad_offset, n, k, wide, per_range, *x.stride(), SOFTMAX=beta < 0, **config,
                **FUSED,
            )  # fmt: skip
        grad_rows, grad_offset = cut_columns(sum_ranges(grad_rows), d), sum_ranges(grad_offset)
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
        grad_weight = jagged_embedding_scatter(
            sources, ids, items + 1, linear_weight.dtype, spare=items
        )
    grad_bias = lse.new_empty(0)
    if linear_bias is not None:
        grad_bias = jagged_embedding_scatter(
            offsets, ids, items + 1, linear_bias.dtype, spare=items
        )
        grad_bias = grad_bias[:-1, 0].contiguous()
    return index, grad_weight[:-1], grad_bias
