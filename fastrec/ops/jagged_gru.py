# SPDX-License-Identifier: Apache-2.0
"""A gated recurrent unit (Cho et al., 2014) over each sequence of a jagged batch: one layer.

Legend: B sequences, T events, D input width, H width of a state. The cell is that of torch.nn.GRU;
with h the state before an event, or 0:

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      q = W_hn h + b_hn
    z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)      n = tanh(W_in x + b_in + r q)
    state = (1 - z) n + z h

    dn = g (1 - z) (1 - n^2),  dq = dn r,  dr = dn q r (1 - r),  dz = g (h - n) z (1 - z),
    g of the event before += g z + W_hh^T (dr, dz, dq)

The kernels make the recurrence alone. W_ih x of all events is one product before it, and the
gradients of both weights and of the input are products of all events after it: by the kernel of
`linear` or, on a GPU, by PyTorch. r, z, n and q are saved: computing them again would take a third
product where there are two, and needs the 3 H numbers of W_ih x, which are not kept where these 4 H
are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.common.arguments import (
    FLOATS,
    accumulate_dtype,
    autocast_dtype,
    check_index,
    check_offsets,
    check_tensor,
    without_autocast,
)
from fastrec.ops.common.native import kernels_of, register_cuda
from fastrec.ops.common.second_order import twice_differentiable

OP = "jagged_gru"

# projected [T, 3 H]: W_ih x + b_ih. gates [T, 4 H]: q, r, z, n; no rows if not needed. Events
# behind the last offset belong to no sequence: 0 everywhere.
torch.library.define(
    f"fastrec::{OP}_fwd",
    "(Tensor projected, Tensor offsets, Tensor weight_hh, Tensor? bias_hh, bool gates_needed)"
    " -> (Tensor states, Tensor gates)",
)
# grads [T, 4 H]: dq, dr, dz, dn; previous [T, H]: the state before each event.
torch.library.define(
    f"fastrec::{OP}_bwd",
    "(Tensor grad_states, Tensor states, Tensor gates, Tensor offsets, Tensor weight_hh)"
    " -> (Tensor grads, Tensor previous)",
)


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(projected, offsets, weight_hh, bias_hh, gates_needed):
    events, width = projected.shape[0], weight_hh.shape[1]
    gates = projected.new_empty(events if gates_needed else 0, 4 * width)
    return projected.new_empty(events, width), gates


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(grad_states, states, gates, offsets, weight_hh):
    return states.new_empty(gates.shape), states.new_empty(states.shape)


register_cuda(OP, "fwd", "bwd")


def _recompute(ctx, input, weight_ih, weight_hh, bias_ih, bias_hh, offsets, states, gates):
    parameters = weight_ih, weight_hh, bias_ih, bias_hh
    return (input, *parameters), (jagged_gru_ref(input, offsets, *parameters),)


def _linear_bwd(backend, grad, input, weight, *needed):
    """(grad_input, grad_weight, grad_bias) of a product with the transposed weight."""
    if backend == "cpp":
        return torch.ops.fastrec.linear_bwd(grad, input, weight, *needed)
    grad_input = grad @ weight if needed[0] else None
    return grad_input, grad.T @ input if needed[1] else None, grad.sum(0) if needed[2] else None


class _JaggedGru(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight_ih, weight_hh, bias_ih, bias_hh, offsets, gates_needed, backend):
        product = torch.ops.fastrec.linear_fwd if backend == "cpp" else F.linear
        fwd = kernels_of(OP, backend, input.device).jagged_gru_fwd
        projected = product(input, weight_ih, bias_ih)
        states, gates = fwd(projected, offsets, weight_hh, bias_hh, gates_needed)
        ctx.save_for_backward(input, weight_ih, weight_hh, bias_ih, bias_hh, offsets, states, gates)
        ctx.backend = backend
        return states

    @staticmethod
    @twice_differentiable(_recompute)
    def backward(ctx, grad_states):
        input, weight_ih, weight_hh, _, _, offsets, states, gates = ctx.saved_tensors
        bwd = kernels_of(OP, ctx.backend, input.device).jagged_gru_bwd
        grads, previous = bwd(grad_states, states, gates, offsets, weight_hh)
        width, needed = states.shape[1], ctx.needs_input_grad
        grad_input, grad_weight_ih, grad_bias_ih = _linear_bwd(
            ctx.backend, grads[:, width:], input, weight_ih, needed[0], needed[1], needed[3]
        )
        _, weight, bias = _linear_bwd(
            ctx.backend, grads[:, : 3 * width], previous, weight_hh, False, needed[2], needed[4]
        )
        # Those of q came first, and are the last gate of the parameters.
        grad_weight_hh = weight.roll(-width, 0) if needed[2] else None
        grad_bias_hh = bias.roll(-width, 0) if needed[4] else None
        found = grad_input, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh
        own = (grad if asked else None for grad, asked in zip(found, needed[:5], strict=True))
        return *own, None, None, None


def jagged_gru_ref(input, offsets, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    """The oracle: plain PyTorch, one step of time after the other, any dtype."""
    projected = F.linear(input, weight_ih, bias_ih)  # [T, 3 H]
    events, width, lengths = input.shape[0], weight_hh.shape[1], offsets.diff()
    longest = int(lengths.max()) if lengths.numel() and not offsets.is_meta else 0
    if longest == 0:  # no event, or none that has values: with a live graph
        return 0 * F.linear(projected[:, :width], weight_hh, bias_hh)[:, :width]
    h = projected.new_zeros(lengths.shape[0], width)
    rows, states = [], []
    for t in range(longest):
        running = (lengths > t).nonzero().squeeze(1)
        event = offsets[running] + t
        before = h[running]
        x_r, x_z, x_n = projected[event].chunk(3, 1)
        h_r, h_z, q = F.linear(before, weight_hh, bias_hh).chunk(3, 1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        state = (1 - z) * (x_n + r * q).tanh() + z * before
        h = h.index_copy(0, running, state)
        rows.append(event)
        states.append(state)
    return projected.new_zeros(events, width).index_copy(0, torch.cat(rows), torch.cat(states))


def _check(input, offsets, weight_ih, weight_hh, bias_ih, bias_hh):
    """offsets as int64."""
    check_tensor("input", input, ("T", "D"))
    device = input.device
    dtypes = (input.dtype,) if autocast_dtype(device) is None else FLOATS
    offsets = check_index("offsets", offsets, ("B + 1",), device)
    check_offsets("offsets", offsets, input.shape[0], "T")
    check_tensor("weight_hh", weight_hh, ("3 H", "H"), dtypes, device)
    width = weight_hh.shape[1]
    if width == 0 or weight_hh.shape[0] != 3 * width:
        raise ValueError(f"weight_hh must be [3 H, H] with H > 0, got {list(weight_hh.shape)}")
    check_tensor("weight_ih", weight_ih, (3 * width, input.shape[1]), dtypes, device)
    for name, bias in (("bias_ih", bias_ih), ("bias_hh", bias_hh)):
        if bias is not None:
            check_tensor(name, bias, (3 * width,), dtypes, device)
    return offsets


def jagged_gru(
    input: Tensor,
    offsets: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One layer of `torch.nn.GRU` over each sequence, from a state of 0.

    Args:
        input: [T, D]: float64, float32, bfloat16 or float16.
        offsets: [B + 1], int64 or int32, from 0 to T; sequence b is rows offsets[b] to
            offsets[b + 1], oldest first.
        weight_ih, weight_hh: [3 H, D] and [3 H, H], the gates r, z and n one under the other, as in
            `torch.nn.GRU`. All parameters have the dtype of `input`, but for autocast.
        bias_ih, bias_hh: [3 H]; None adds nothing.
        backend: None (native to the device), "reference", "cpp" or "triton" (not for float64). The
            reference waits for the longest length and steps through time.

    Returns:
        [T, H], the state after each event, in the dtype of `input`, computed in float32 (float64
        for float64), also under autocast. On cpp a sequence has the same bits in any batch, and all
        gradients have for any number of threads.

    Raises:
        ValueError, TypeError: a shape or dtype is wrong, or `offsets` do not rise from 0 to T. That
            is not looked at on a GPU and under torch.compile, where events behind the last offset
            have a state and gradients of 0.
        RuntimeError: `backend` cannot run.
    """
    offsets = _check(input, offsets, weight_ih, weight_hh, bias_ih, bias_hh)
    backend, wide = resolve(backend, OP, input.device), accumulate_dtype(input)
    x, w_ih, w_hh, b_ih, b_hh = (
        None if t is None else t.to(wide) for t in (input, weight_ih, weight_hh, bias_ih, bias_hh)
    )
    if backend == "reference":
        with without_autocast(input.device):
            return jagged_gru_ref(x, offsets, w_ih, w_hh, b_ih, b_hh).to(input.dtype)
    tensors = (x, w_ih, w_hh, b_ih, b_hh)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    with without_autocast(input.device):
        return _JaggedGru.apply(*tensors, offsets, recorded, backend).to(input.dtype)
