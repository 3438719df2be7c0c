# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `jagged_gru`: the recurrence. A program owns some sequences of similar length,
and goes through time with all their features.

Legend: B sequences, T events, H width of a state. A step needs all features of the step before,
which the program has written itself and reads back behind a barrier: from its caches, and at any
width.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.rows import dense, in_vectors, rows_of
from fastrec.kernels.common.tiles import FUSED, LOG2E, allow_tf32, dot, load_rows


@triton.jit
def _sigmoid(x):
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh(x):
    """(1 - e) / (1 + e), and where that cancels the polynomial of csrc/common/gates.h."""
    e = tl.exp2(tl.abs(x) * LOG2E * -2.0)
    large = (1.0 - e) / (1.0 + e)
    small = tl.minimum(tl.abs(x), 0.5)
    s = small * small
    q = ((-0.00664726085960865 * s + 0.021297868341207504) * s - 0.053899168968200684) * s
    q = (q + 0.13332964479923248) * s - 0.333333283662796
    return tl.where(s < 0.25, x + x * s * q, tl.where(x < 0, -large, large))


@triton.jit
def _sequences(offsets, order, sequences, BLOCK_B: tl.constexpr):
    """(first events, lengths) of the sequences of this program; 0 where there is none."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    real = place < sequences
    b = tl.load(order + place, mask=real, other=0)
    start = tl.load(offsets + b, mask=real, other=0)
    return start, tl.where(real, tl.load(offsets + b + 1, mask=real, other=0) - start, 0)


@triton.jit
def _gate(
    rows, row, keep, stride, begin, weight, gate, first, width, acc,
    ACROSS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + rows[row, begin:] W^T, or rows[row, begin:] W if ACROSS, columns from `first`: W is the
    part [H, H] of a gate of the weight."""
    col = first + tl.arange(0, BLOCK_D)
    own = weight + gate * width * width
    for k in range(0, width, BLOCK_D):
        part = load_rows(rows + begin, row, keep, stride, 1, k, width, BLOCK_D)
        if ACROSS:
            inner = k + tl.arange(0, BLOCK_D)
            w = load_rows(own, inner, inner < width, width, 1, first, width, BLOCK_D)
        else:
            w = tl.trans(load_rows(own, col, col < width, width, 1, k, width, BLOCK_D))
        acc = dot(part, w, acc, PRECISION)
    return acc


@triton.jit
def _bias_of(bias, gate, first, width, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_B, BLOCK_D]: every row the bias of a gate, columns from `first`; 0 without one."""
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    if bias is not None:
        col = first + tl.arange(0, BLOCK_D)
        acc += tl.load(bias + gate * width + col, mask=col < width, other=0.0)[None, :]
    return acc


@triton.jit(do_not_specialize=["sequences"])
def _fwd_kernel(
    projected, offsets, order, weight, bias, states, gates, sequences, width,
    VEC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    width = width * VEC
    start, length = _sequences(offsets, order, sequences, BLOCK_B)
    for t in range(tl.max(length, 0)):
        event, live = start + t, t < length
        before = live & (event > start)
        for first in range(0, width, BLOCK_D):
            col = first + tl.arange(0, BLOCK_D)
            keep = live[:, None] & (col < width)[None, :]
            r = _bias_of(bias, 0, first, width, BLOCK_B, BLOCK_D)
            z = _bias_of(bias, 1, first, width, BLOCK_B, BLOCK_D)
            q = _bias_of(bias, 2, first, width, BLOCK_B, BLOCK_D)
            args = states, event - 1, before, width, 0, weight
            r = _gate(*args, 0, first, width, r, False, BLOCK_D, PRECISION)
            z = _gate(*args, 1, first, width, z, False, BLOCK_D, PRECISION)
            q = _gate(*args, 2, first, width, q, False, BLOCK_D, PRECISION)
            x = projected + first
            left = width - first
            r = _sigmoid(r + load_rows(x, event, live, 3 * width, 1, 0, left, BLOCK_D))
            z = _sigmoid(z + load_rows(x + width, event, live, 3 * width, 1, 0, left, BLOCK_D))
            n = load_rows(x + 2 * width, event, live, 3 * width, 1, 0, left, BLOCK_D)
            n = _tanh(n + r * q)
            h = load_rows(states, event - 1, before, width, 1, first, width, BLOCK_D)
            tl.store(states + event[:, None] * width + col[None, :], n + z * (h - n), mask=keep)
            if gates is not None:
                at = gates + event[:, None] * 4 * width + col[None, :]
                tl.store(at, q, mask=keep)
                tl.store(at + width, r, mask=keep)
                tl.store(at + 2 * width, z, mask=keep)
                tl.store(at + 3 * width, n, mask=keep)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["sequences"])
def _bwd_kernel(
    grad_states, states, gates, offsets, order, weight, grads, previous, carry, sequences, width,
    stride, VEC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    width, stride = width * VEC, stride * VEC
    start, length = _sequences(offsets, order, sequences, BLOCK_B)
    longest = tl.max(length, 0)
    for step in range(longest):
        t = longest - 1 - step
        event, live, later = start + t, t < length, t + 1 < length
        for first in range(0, width, BLOCK_D):
            col = first + tl.arange(0, BLOCK_D)
            keep = live[:, None] & (col < width)[None, :]
            g = load_rows(grad_states, event, live, stride, 1, first, width, BLOCK_D)
            g += load_rows(carry, event + 1, later, width, 1, first, width, BLOCK_D)
            # q comes first in grads and last in the weight.
            args = grads, event + 1, later, 4 * width
            g = _gate(*args, 0, weight, 2, first, width, g, True, BLOCK_D, PRECISION)
            g = _gate(*args, width, weight, 0, first, width, g, True, BLOCK_D, PRECISION)
            g = _gate(*args, 2 * width, weight, 1, first, width, g, True, BLOCK_D, PRECISION)
            saved, left = gates + first, width - first
            q = load_rows(saved, event, live, 4 * width, 1, 0, left, BLOCK_D)
            r = load_rows(saved + width, event, live, 4 * width, 1, 0, left, BLOCK_D)
            z = load_rows(saved + 2 * width, event, live, 4 * width, 1, 0, left, BLOCK_D)
            n = load_rows(saved + 3 * width, event, live, 4 * width, 1, 0, left, BLOCK_D)
            h = load_rows(
                states, event - 1, live & (event > start), width, 1, first, width, BLOCK_D
            )
            grad_n = g * (1 - z) * (1 - n * n)
            at = grads + event[:, None] * 4 * width + col[None, :]
            tl.store(at, grad_n * r, mask=keep)
            tl.store(at + width, grad_n * q * r * (1 - r), mask=keep)
            tl.store(at + 2 * width, g * (h - n) * z * (1 - z), mask=keep)
            tl.store(at + 3 * width, grad_n, mask=keep)
            row = event[:, None] * width + col[None, :]
            tl.store(previous + row, h, mask=keep)
            tl.store(carry + row, g * z, mask=keep)
        tl.debug_barrier()


# 16 sequences, which a product needs; with 64 columns three accumulators spill on sm_80. No
# pipeline: a load must not be moved before the barrier that it waits for.
CONFIG = {"BLOCK_B": 16, "BLOCK_D": 32, "PRECISION": "ieee", "num_warps": 4, "num_stages": 1}


def _launch(kernel, tensors, offsets, rest, width, *strides):
    """`rest`: what stands between the order of the sequences, longest first, and their number."""
    sequences, config = offsets.shape[0] - 1, dict(CONFIG)
    allow_tf32(config)
    if sequences == 0:
        return
    order = offsets.diff().argsort(descending=True, stable=True)
    vector, sizes = in_vectors(width, *strides)
    with torch.cuda.device_of(offsets):
        kernel[(triton.cdiv(sequences, config["BLOCK_B"]),)](
            *tensors, offsets, order, *rest, sequences, *sizes, VEC=vector, **config, **FUSED,
        )  # fmt: skip


def _check(tensor):
    if tensor.dtype == torch.float64:
        raise RuntimeError("jagged_gru has no float64 triton kernel")


def jagged_gru_fwd(projected, offsets, weight_hh, bias_hh, gates_needed):
    _check(projected)
    events, width = projected.shape[0], weight_hh.shape[1]
    projected, offsets, weight, bias = dense(projected, offsets, weight_hh, bias_hh)
    # Zeros for the events that belong to no sequence.
    states = projected.new_zeros(events, width)
    gates = projected.new_zeros(events if gates_needed else 0, 4 * width)
    saved = gates if gates_needed else None
    _launch(_fwd_kernel, (projected,), offsets, (weight, bias, states, saved), width)
    return states, gates


def jagged_gru_bwd(grad_states, states, gates, offsets, weight_hh):
    events, width = states.shape
    states, gates, offsets, weight = dense(states, gates, offsets, weight_hh)
    grad_states = rows_of(grad_states)
    grads, previous = states.new_zeros(events, 4 * width), states.new_zeros(events, width)
    rest = weight, grads, previous, torch.empty_like(states)
    tensors = grad_states, states, gates
    _launch(_bwd_kernel, tensors, offsets, rest, width, grad_states.stride(0))
    return grads, previous
