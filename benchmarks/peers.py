# SPDX-License-Identifier: Apache-2.0
"""Kernels of other projects, called as their documentation says: at their defaults and tuned.

Nothing here is a dependency. A peer that is not installed, or that does not take the sizes, is a
string that says so in the place of the function. Only for CUDA tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench import Entry

Peers = dict[str, Callable | str]


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"not installed ({error.name})"
    return f"does not import: {error}".splitlines()[0]


def _liger(entry: Entry) -> Peers:
    """liger-kernel 0.8.5. Its chunk of rows follows from `chunk_mem_const`, the 18th argument."""
    names = ("liger", "liger chunk 512", "liger chunk 1024", "liger chunk 512 fp32")
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Liger,
        )
    except Exception as error:
        return dict.fromkeys(names, _reason(error))
    n, v, d = entry.sizes.values()

    def chunked(rows: int, accumulate: torch.dtype | None) -> Callable:
        budget = max(1, -(-v * rows // (n * d)))
        rest = (None, None, -100, 0.0, 0.0, "mean", None, False, accumulate)
        rest += (False, False, False, None, None, budget)
        return lambda x, w, y: Liger.apply(x, w, y, *rest)[0]

    functions = (
        lambda x, w, y: Liger.apply(x, w, y)[0],
        chunked(512, None),
        chunked(1024, None),
        chunked(512, torch.float32),
    )
    return dict(zip(names, functions, strict=True))


def _cce(entry: Entry) -> Peers:
    """cut-cross-entropy 25.1.1: "cce" leaves out gradients that it takes for small, "cce exact"
    does not."""
    names, why = ("cce", "cce exact"), ""
    _, v, d = entry.sizes.values()
    if entry.dtype not in ("bfloat16", "float16"):
        why = "bfloat16 and float16 only"
    elif v * d >= 2**31:
        why = "32-bit index"
    try:
        from cut_cross_entropy import linear_cross_entropy as cce
    except Exception as error:
        why = _reason(error)
    if why:
        return dict.fromkeys(names, why)
    return {
        "cce": lambda x, w, y: cce(x, w, y),
        "cce exact": lambda x, w, y: cce(x, w, y, filter_eps=None),
    }


def _quack(entry: Entry) -> Peers:
    """quack-kernels: chunks of rows; chunk x V must stay below 2^31."""
    n, v, _ = entry.sizes.values()
    largest, why = (2**31 - 1) // v // 128 * 128, ""
    if n % 8 or entry.dtype != "bfloat16" or not largest:
        why = "bfloat16 and multiples of 8 rows only"
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack
    except Exception as error:
        why = _reason(error)
    if why:
        return dict.fromkeys(("quack", "quack largest chunk", "quack chunk 1024"), why)

    def chunked(rows: int) -> Callable:
        return lambda x, w, y: quack(x, w, y, chunk_size=rows)

    default: Callable | str = quack if v * min(n, 4096) < 2**31 else "32-bit index at its defaults"
    table: Peers = {"quack": default, "quack largest chunk": chunked(min(largest, n))}
    table["quack chunk 1024"] = chunked(1024) if largest >= 1024 else "32-bit index"
    return table


def linear_cross_entropy(entry: Entry) -> Peers:
    """Name -> loss(input, linear_weight, target)."""
    return _liger(entry) | _cce(entry) | _quack(entry)


def in_batch_cross_entropy(entry: Entry) -> Peers:
    """Name -> mean loss(query, candidate, ids, values, offsets); no exclusions are possible."""
    from benchmarks.in_batch_cross_entropy import TEMPERATURE

    names, scale = ("inf-cl", "cce exact", "liger"), 1 / TEMPERATURE
    if entry.case != "dot":
        return dict.fromkeys(names, "dot products without exclusions only")
    b, d = entry.sizes.values()
    rows = Entry("linear_cross_entropy", dict(N=b, V=b, D=d), entry.dtype)

    def labelled(function: Callable | str) -> Callable | str:
        if isinstance(function, str):
            return function
        return lambda q, c, *_: function(q * scale, c, torch.arange(b, device=q.device))

    table: Peers = {
        "cce exact": labelled(_cce(rows)["cce exact"]),
        "liger": labelled(_liger(rows)["liger"]),
    }
    try:
        from inf_cl import cal_flash_loss
    except Exception as error:
        return {"inf-cl": _reason(error)} | table
    return {"inf-cl": lambda q, c, *_: cal_flash_loss(q, c, None, scale, d).mean()} | table


def jagged_attention(entry: Entry) -> Peers:
    """Name -> out(packed, offsets, slots, N), with dropout on the probabilities. Jagged attention
    of PyTorch itself (the kernels of FlashAttention 2 and of CUTLASS), and padded attention with
    the memory-efficient kernel forced."""
    from benchmarks.jagged_attention import P, _sdpa

    def flash(packed: Tensor, offsets: Tensor, slots: Tensor, longest: int) -> Tensor:
        ends = offsets.int()
        return torch.ops.aten._flash_attention_forward(
            *packed.unbind(1), ends, ends, longest, longest, P, False, False
        )[0]

    def efficient(packed: Tensor, offsets: Tensor, slots: Tensor, longest: int) -> Tensor:
        ends, (q, k, v) = offsets.int(), packed[None].unbind(2)
        return torch.ops.aten._efficient_attention_forward(
            q, k, v, None, ends, ends, longest, longest, P, 0, True
        )[0][0]

    def padded(*inputs) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return _sdpa(*inputs)

    return {
        "flash varlen": flash if entry.dtype == "bfloat16" else "bfloat16 and float16 only",
        "efficient varlen": efficient,
        "sdpa efficient": padded,
    }
