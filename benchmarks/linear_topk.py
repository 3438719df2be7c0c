# SPDX-License-Identifier: Apache-2.0
"""Entries of linear_topk: the k best items of each row, against PyTorch's ways.

Legend: N rows, V items, D width, K results a row; a score is one (row, item) pair. There is no
gradient.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench import Entry
from benchmarks.linear_rank import TILE, work
from fastrec import linear_topk
from fastrec.ops.linear_topk import linear_topk_ref

__all__ = ["work"]


def _entry(n: int, v: int, d: int, k: int, **options) -> Entry:
    return Entry("linear_topk", dict(N=n, V=v, D=d, K=k), **options)


REQUEST = ("fastrec", "eager", "FAISS flat")  # of one user, as a service has them

ENTRIES = (
    _entry(512, 20_033, 64, 10, rounds=15),
    _entry(512, 141_939, 64, 10, rounds=5),
    _entry(512, 141_939, 64, 100, rounds=5),
    _entry(512, 141_939, 64, 10, dtype="bfloat16", rounds=1, only=("fastrec", "eager")),
    _entry(512, 500_000, 128, 10, rounds=3),
    _entry(512, 10_000_000, 64, 10, rounds=1, only=("fastrec",)),
    _entry(1, 100_000, 64, 10, rounds=101, only=REQUEST),
    _entry(1, 1_000_000, 64, 10, rounds=25, only=REQUEST),
)
SMOKE = (
    _entry(33, 257, 16, 5, rounds=2),
    _entry(33, 257, 16, 5, dtype="bfloat16", rounds=2, only=("fastrec", "eager", "reference")),
)
QUICK = (_entry(512, 20_033, 64, 10),)
ELEMENT = "score"
PASSES = ("forward",)
PEERS = {
    "eager": ("eager",),
    "`torch.compile`": ("torch.compile",),
    "eager tiles": ("tiles",),
    "FAISS flat": ("FAISS flat",),
}
# fastrec's scores are sums in float32, of bfloat16 operands too; a peer's are rounded to bfloat16.
GRADIENT_LIMIT = {"float32": 1e-5, "bfloat16": 1e-5}


def eager(x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.topk(x @ w.T, k)


def tiles(x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What recommend did before there was an op: the best so far join the scores of a tile."""
    values = x.new_empty(len(x), 0)
    indices = torch.empty_like(values, dtype=torch.int64)
    for start in range(0, len(w), TILE):
        scores = x @ w[start : start + TILE].T
        ids = torch.arange(start, start + scores.shape[1], device=x.device).expand(len(x), -1)
        scores, ids = torch.cat([values, scores], 1), torch.cat([indices, ids], 1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        values, indices = scores.gather(1, order), ids.gather(1, order)
    return values, indices


@functools.lru_cache(maxsize=1)
def flat_index(w: Tensor):
    """An index that compares all items."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(w.shape[1])
    index.add(w.numpy())
    return index


def faiss_flat(x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = flat_index(w).search(x.numpy(), k)
    return torch.from_numpy(values), torch.from_numpy(indices)


def implementations(entry: Entry, compiler: str) -> dict[str, Callable]:
    """Name -> (values, indices)(input, linear_weight, k). FAISS where it is installed, and where it
    is asked for: it searches float32 on a CPU."""
    found: dict[str, Callable] = {
        "fastrec": linear_topk,
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False, backend=compiler),
        "tiles": tiles,
        "reference": linear_topk_ref,
    }
    if "FAISS flat" in entry.only and importlib.util.find_spec("faiss") is not None:
        found["FAISS flat"] = faiss_flat
    return found


def problem(entry: Entry, device: str = "cpu") -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator(device).manual_seed(0)
    dtype, options = getattr(torch, entry.dtype), {"generator": generator, "device": device}
    n, v, d, k = entry.sizes.values()
    w = torch.randn(v, d, **options).mul_(d**-0.5).to(dtype)
    return torch.randn(n, d, **options).to(dtype), w, k


def errors(
    entry: Entry, inputs: tuple[Tensor, Tensor, int], results: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, dict[str, float]]:
    """max |error| / max |exact| of the scores: the returned ones against those of the items in
    float64, and these against the best ones, so that another item or order is an error."""
    x, w, k = inputs[0].double(), inputs[1], inputs[2]
    best = x.new_empty(len(x), 0)
    for start in range(0, len(w), TILE):
        scores = x @ w[start : start + TILE].double().T
        best = torch.cat([best, scores.topk(min(k, scores.shape[1])).values], 1)
        best = best.topk(min(k, best.shape[1])).values

    def error(values: Tensor, indices: Tensor) -> float:
        found = torch.stack([(x * w[column].double()).sum(1) for column in indices.T], 1)
        wrong = torch.stack([found - best, values.double() - found])
        return (wrong.abs().max() / best.abs().max()).item()

    return {
        name: {"output_error": error(*found), "gradient_error": 0.0}
        for name, found in results.items()
    }
