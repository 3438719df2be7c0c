# SPDX-License-Identifier: Apache-2.0
"""Entries of linear_cross_entropy: softmax loss of a linear layer against PyTorch's ways.

Legend: N scored rows, V items, D width; a logit is one (row, item) pair.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Entry, largest
from fastrec import linear_cross_entropy
from fastrec.ops.linear_cross_entropy import linear_cross_entropy_ref


def _entry(n: int, v: int, d: int, case: str = "flat", **options) -> Entry:
    return Entry("linear_cross_entropy", dict(N=n, V=v, D=d), case=case, **options)


CHUNKS = (128, 256, 512)
FLOAT32_TABLE = "float32 table"  # beside rows of another type
# Of the largest entries: those that fit in memory and in minutes.
_NO_COMPILER = ("fastrec", "eager", "torch default options", *(f"torch chunk {n}" for n in CHUNKS))
ENTRIES = (
    _entry(64, 1000, 64, rounds=51),
    _entry(1317, 20_033, 64),
    _entry(1317, 20_033, 64, case="peaked"),
    _entry(1317, 20_033, 64, dtype="bfloat16", rounds=1),
    _entry(2560, 141_939, 64, rounds=3),
    _entry(2560, 141_939, 64, dtype="bfloat16", rounds=3, only=_NO_COMPILER),
    _entry(512, 500_000, 128, rounds=3),
    _entry(512, 1_000_000, 128, rounds=3, only=_NO_COMPILER),
    _entry(512, 10_000_000, 64, rounds=1, only=("fastrec",)),
)
SMOKE = (
    _entry(33, 257, 16, rounds=2),
    _entry(33, 257, 16, case="peaked", rounds=2, only=("fastrec", "eager")),
    _entry(33, 257, 16, dtype="bfloat16", rounds=2, only=("fastrec", "eager", "reference")),
    _entry(33, 257, 16, FLOAT32_TABLE, dtype="bfloat16", rounds=2, only=("fastrec", "eager")),
)
QUICK = (_entry(256, 5_000, 64), _entry(1317, 20_033, 64))
ELEMENT = "logit"
PASSES = ("forward", "both")
PEERS = {
    "eager": ("eager",),
    "`torch.compile`": ("torch.compile",),
    "torch op, default options": ("torch default options",),
    "torch op, best chunk": tuple(f"torch chunk {size}" for size in CHUNKS),
}
GRADIENT_LIMIT = {"float32": 1e-4, "bfloat16": 5e-2}


def work(entry: Entry) -> dict[str, int]:
    """Three products forward + backward (logits, gradient of the input, gradient of the table), one
    forward; the table is read twice, its gradient is written once."""
    n, v, d = entry.sizes.values()
    product, item = 2 * n * v * d, getattr(torch, entry.dtype).itemsize
    return {
        "elements": n * v,
        "exps": n * v,
        "bytes": 3 * v * d * item,
        "materialised": 4 * n * v,
        "forward": product,
        "both": 3 * product,
    }


def eager(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w.to(x.dtype)).float(), y)  # as autocast does


def implementations(entry: Entry, compiler: str) -> dict[str, Callable]:
    """Name -> loss(input, linear_weight, target)."""
    table = {
        "fastrec": linear_cross_entropy,
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False, backend=compiler),
        "reference": linear_cross_entropy_ref,
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch >= 2.13
        chunked, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions
        table["torch default options"] = lambda x, w, y: chunked(x, w, y, options=options())
        for size in CHUNKS:
            choice = options(batch_chunk_size=size, chunking_method=None)
            table[f"torch chunk {size}"] = lambda x, w, y, choice=choice: chunked(
                x, w, y, options=choice
            )
    return table


def problem(entry: Entry, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """flat: logits of standard deviation 1. peaked: the logit of the target is 14 higher.
    FLOAT32_TABLE: flat, the table in float32."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, options = getattr(torch, entry.dtype), {"generator": generator, "device": device}
    n, v, d = entry.sizes.values()
    w = torch.randn(v, d, **options).mul_(d**-0.5)
    w = w if entry.case == FLOAT32_TABLE else w.to(dtype)
    y = torch.randint(v, (n,), **options)
    x = torch.randn(n, d, **options)
    if entry.case == "peaked":
        x = 14 * F.normalize(w[y].float(), dim=1) + x * 0.1
    return x.to(dtype).requires_grad_(), w.requires_grad_(), y


def errors(
    entry: Entry, inputs: tuple[Tensor, Tensor, Tensor], results: dict[str, tuple[Tensor, ...]]
) -> dict[str, dict[str, float]]:
    """Relative error of the loss, and of each gradient max |error| / max |exact| (the larger one),
    against float64 computed in pieces of the table."""
    x, w, y = inputs[0].detach().double(), inputs[1].detach(), inputs[2]
    rows = torch.arange(len(y), device=y.device)
    starts = range(0, len(w), 16384)
    lse = x.new_full((len(y),), -torch.inf)
    for start in starts:
        logits = x @ w[start : start + 16384].double().T
        lse = torch.logaddexp(lse, torch.logsumexp(logits, 1))
    exact_loss = (lse - (x * w[y].double()).sum(1)).mean().item()
    grad_x = torch.zeros_like(x)
    scale, worst = 0.0, dict.fromkeys(results, 0.0)
    for start in starts:
        block = w[start : start + 16384].double()
        p = torch.exp(x @ block.T - lse[:, None])
        here = (y >= start) & (y < start + len(block))
        p[rows[here], y[here] - start] -= 1
        p /= len(y)
        grad_x += p @ block
        grad_w = p.T @ x
        scale = max(scale, grad_w.abs().max().item())
        for name, (_, _, given) in results.items():
            error = (given[start : start + 16384] - grad_w).abs().max().item()
            worst[name] = largest((worst[name], error))
    return {
        name: {
            "output_error": abs(loss.item() - exact_loss) / abs(exact_loss),
            "gradient_error": largest(
                (
                    worst[name] / scale,
                    ((given - grad_x).abs().max() / grad_x.abs().max()).item(),
                )
            ),
        }
        for name, (loss, given, _) in results.items()
    }
