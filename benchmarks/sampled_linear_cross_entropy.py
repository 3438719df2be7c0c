# SPDX-License-Identifier: Apache-2.0
"""Entries of sampled_linear_cross_entropy: the softmax over a target and K negatives.

Legend: N rows, K negatives, V items, D width; an element is a (row, candidate) pair. Cases: "own"
negatives of each row, "shared" ones, and "sparse": own ones with a sparse gradient of the table.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Entry, largest
from fastrec.ops.sampled_linear_cross_entropy import (
    sampled_linear_cross_entropy,
    sampled_linear_cross_entropy_ref,
)


def _entry(n: int, k: int, v: int, d: int, case: str, **options) -> Entry:
    sizes = dict(N=n, K=k, V=v, D=d)
    return Entry("sampled_linear_cross_entropy", sizes, case=case, **options)


# The compiler takes no sparse gradient.
_NO_COMPILER = ("fastrec", "eager", "reference")
ENTRIES = (
    _entry(2560, 256, 1_000_000, 64, "own"),
    _entry(2560, 256, 1_000_000, 64, "sparse", only=_NO_COMPILER),
    _entry(2560, 256, 1_000_000, 64, "shared"),
    _entry(2560, 4096, 1_000_000, 64, "shared"),
)
SMOKE = (
    _entry(9, 5, 257, 16, "own", rounds=2),
    _entry(9, 5, 257, 16, "sparse", rounds=2, only=_NO_COMPILER),
    _entry(9, 5, 257, 16, "shared", rounds=2),
    _entry(9, 5, 257, 16, "own", rounds=2, dtype="bfloat16", only=("fastrec", "eager")),
)
QUICK = (_entry(2560, 256, 100_000, 64, "own"),)
ELEMENT = "pair"
PASSES = ("forward", "both")
PEERS = {"eager": ("eager",), "`torch.compile`": ("torch.compile",)}
GRADIENT_LIMIT = {"float32": 1e-5, "bfloat16": 5e-2}


def work(entry: Entry) -> dict[str, int]:
    """A product for the scores and one for each gradient; the row of a pair is read once, that of
    the gradient written once for every distinct item (here: for all pairs)."""
    n, k, _, d = entry.sizes.values()
    pairs, item = n * (k + 1), getattr(torch, entry.dtype).itemsize
    shared = entry.case == "shared"
    return {
        "elements": pairs,
        "exps": pairs * (2 if shared else 1),
        "bytes": 2 * item * d * (n + k if shared else pairs),
        "materialised": item * (pairs if shared else pairs * d),
        "forward": 2 * pairs * d,
        "both": 6 * pairs * d,
    }


def _eager(sparse: bool) -> Callable:
    def loss(x: Tensor, w: Tensor, y: Tensor, negatives: Tensor) -> Tensor:
        own = F.embedding(y, w, sparse=sparse)
        positive = (x * own).sum(1, keepdim=True)
        rows = F.embedding(negatives, w, sparse=sparse)
        shared = negatives.dim() == 1
        scores = x @ rows.T if shared else torch.bmm(rows, x[:, :, None]).squeeze(2)
        scores = scores.masked_fill(negatives == y[:, None], -torch.inf)
        return (torch.logsumexp(torch.cat([positive, scores], 1), 1) - positive[:, 0]).mean()

    return loss


def implementations(entry: Entry, compiler: str) -> dict[str, Callable]:
    """Name -> loss(input, linear_weight, target, negatives)."""
    sparse = entry.case == "sparse"
    eager = _eager(sparse)

    def with_gradient(function: Callable) -> Callable:
        return lambda *inputs: function(*inputs, sparse_grad=sparse)

    return {
        "fastrec": with_gradient(sampled_linear_cross_entropy),
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False, backend=compiler),
        "reference": with_gradient(sampled_linear_cross_entropy_ref),
    }


def problem(entry: Entry, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    dtype, options = getattr(torch, entry.dtype), {"generator": generator, "device": device}
    n, k, v, d = entry.sizes.values()
    w = torch.randn(v, d, **options).mul_(d**-0.5).to(dtype)
    x = torch.randn(n, d, **options).to(dtype)
    y = torch.randint(v, (n,), **options)
    shape = (k,) if entry.case == "shared" else (n, k)
    negatives = torch.randint(v, shape, **options)
    return x.requires_grad_(), w.requires_grad_(), y, negatives


def errors(
    entry: Entry, inputs: tuple, results: dict[str, tuple[Tensor, ...]]
) -> dict[str, dict[str, float]]:
    """Against float64, in which the rows of the table that occur are a table of their own."""
    x, w, y, negatives = inputs
    items, index = torch.cat([y, negatives.flatten()]).unique(return_inverse=True)
    exact_x = x.detach().double().requires_grad_()
    table = w.detach()[items].double().requires_grad_()
    own, drawn = index[: len(y)], index[len(y) :].view(negatives.shape)
    exact = _eager(False)(exact_x, table, own, drawn)
    grads = torch.autograd.grad(exact, (exact_x, table))

    def error(given: Tensor, wanted: Tensor) -> float:
        return ((given.double() - wanted).abs().max() / wanted.abs().max()).item()

    def rows(grad: Tensor) -> Tensor:
        return grad.coalesce().values() if grad.is_sparse else grad[items]

    return {
        name: {
            "output_error": error(loss, exact.detach()),
            "gradient_error": largest((error(grad_x, grads[0]), error(rows(grad_w), grads[1]))),
        }
        for name, (loss, grad_x, grad_w) in results.items()
    }
