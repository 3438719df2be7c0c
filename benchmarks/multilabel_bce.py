# SPDX-License-Identifier: Apache-2.0
"""Entries of multilabel_bce: the binary losses of all labels of a row, against PyTorch's on dense
labels.

Legend: N rows, A labels, D width; an element is a (row, label) pair. A row has 0 to 10 labels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Entry, errors_against
from fastrec.ops.multilabel_bce import multilabel_bce, multilabel_bce_ref


def _entry(n: int, a: int, d: int, **options) -> Entry:
    return Entry("multilabel_bce", dict(N=n, A=a, D=d), **options)


ENTRIES = (_entry(20_000, 1000, 64),)
SMOKE = (
    _entry(33, 70, 16, rounds=2),
    _entry(33, 70, 16, dtype="bfloat16", rounds=2, only=("fastrec", "eager", "reference")),
)
QUICK = (_entry(20_000, 1000, 64),)
ELEMENT = "logit"
PASSES = ("forward", "both")
PEERS = {"eager": ("eager",), "`torch.compile`": ("torch.compile",)}
GRADIENT_LIMIT = {"float32": 1e-5, "bfloat16": 5e-2}


def work(entry: Entry) -> dict[str, int]:
    """Three products and an exponential a logit; rows and table are read once."""
    n, a, d = (entry.sizes[name] for name in "NAD")
    return {
        "elements": n * a,
        "exps": n * a,
        "bytes": (n + a) * d * getattr(torch, entry.dtype).itemsize,
        "materialised": 2 * 4 * n * a,
        "forward": 2 * n * a * d,
        "both": 6 * n * a * d,
    }


def eager(x: Tensor, w: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    owner = torch.repeat_interleave(offsets.diff(), output_size=len(values))
    hot = x.new_zeros(len(x), len(w))
    hot[owner, values] = 1
    return F.binary_cross_entropy_with_logits(x @ w.T, hot)


def implementations(entry: Entry, compiler: str) -> dict[str, Callable]:
    """Name -> loss(input, linear_weight, label_values, label_offsets)."""
    return {
        "fastrec": multilabel_bce,
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False, backend=compiler),
        "reference": multilabel_bce_ref,
    }


def problem(entry: Entry, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    dtype, options = getattr(torch, entry.dtype), {"generator": generator, "device": device}
    n, a, d = entry.sizes.values()
    w = torch.randn(a, d, **options).mul_(d**-0.5).to(dtype)
    x = torch.randn(n, d, **options).to(dtype)
    # Up to 10 different labels of a row: draws with repeats, sorted, the repeats left out.
    drawn = torch.randint(a, (n, 10), **options).sort(1).values
    kept = torch.arange(10, device=device) < torch.randint(11, (n, 1), **options)
    kept[:, 1:] &= drawn.diff(dim=1) > 0
    offsets = F.pad(kept.sum(1).cumsum(0), (1, 0))
    return x.requires_grad_(), w.requires_grad_(), drawn[kept], offsets


def errors(
    entry: Entry, inputs: tuple, results: dict[str, tuple[Tensor, ...]]
) -> dict[str, dict[str, float]]:
    x, w, *lists = inputs
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, w)]
    loss = multilabel_bce_ref(*exact, *lists)
    return errors_against((loss.detach(), *torch.autograd.grad(loss, exact)), results)
