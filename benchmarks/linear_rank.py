# SPDX-License-Identifier: Apache-2.0
"""Entries of linear_rank: rank of a target among all items, against PyTorch's ways.

Legend: N rows, V items, D width; a score is one (row, item) pair. There is no gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench import Entry
from fastrec import linear_rank
from fastrec.ops.linear_rank import linear_rank_ref

TILE = 8192  # items: 512 rows x 8192 x 4 B = 16 MB of scores


def _entry(n: int, v: int, d: int, **options) -> Entry:
    return Entry("linear_rank", dict(N=n, V=v, D=d), **options)


ENTRIES = (
    _entry(512, 20_033, 64, rounds=15),
    _entry(512, 141_939, 64, rounds=5),
    _entry(512, 141_939, 64, dtype="bfloat16", rounds=1, only=("fastrec", "eager")),
    _entry(512, 500_000, 128, rounds=3),
    _entry(512, 10_000_000, 64, rounds=1, only=("fastrec",)),
)
SMOKE = (
    _entry(33, 257, 16, rounds=2),
    _entry(33, 257, 16, dtype="bfloat16", rounds=2, only=("fastrec", "eager", "reference")),
)
QUICK = (_entry(512, 20_033, 64),)
ELEMENT = "score"
PASSES = ("forward",)
PEERS = {"eager": ("eager",), "`torch.compile`": ("torch.compile",), "eager tiles": ("tiles",)}
# Of the rank, see `errors`: ten times the share of items that sums in float32 round past a target
# (1e-7), which are fastrec's of bfloat16 operands too. Scores rounded to bfloat16, a peer's: 4e-4.
GRADIENT_LIMIT = {"float32": 1e-6, "bfloat16": 1e-6}


def work(entry: Entry) -> dict[str, int]:
    """One product; the table is read once."""
    n, v, d = (entry.sizes[name] for name in "NVD")
    return {
        "elements": n * v,
        "exps": 0,
        "bytes": v * d * getattr(torch, entry.dtype).itemsize,
        "materialised": 4 * n * v,
        "forward": 2 * n * v * d,
        "both": 2 * n * v * d,
    }


def eager(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Ties are not broken, which saves it half of the comparisons."""
    scores = x @ w.T
    return 1 + (scores > scores.gather(1, y[:, None])).sum(1)


def tiles(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """What evaluation did before there was an op: two passes, the scores of the targets first."""
    own, ids = x.new_empty(len(x), 1), torch.arange(len(w), device=x.device)
    ranks = torch.ones_like(y)
    for count in (False, True):
        for start in range(0, len(w), TILE):
            scores = x @ w[start : start + TILE].T
            if count:
                here = ids[start : start + TILE] < y[:, None]
                ranks += ((scores > own) | ((scores == own) & here)).sum(1)
            else:
                rows = ((y >= start) & (y < start + TILE)).nonzero().squeeze(1)
                own[rows, 0] = scores[rows, y[rows] - start]
    return ranks


def implementations(entry: Entry, compiler: str) -> dict[str, Callable]:
    """Name -> rank(input, linear_weight, target)."""
    return {
        "fastrec": linear_rank,
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False, backend=compiler),
        "tiles": tiles,
        "reference": linear_rank_ref,
    }


def problem(entry: Entry, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    dtype, options = getattr(torch, entry.dtype), {"generator": generator, "device": device}
    n, v, d = entry.sizes.values()
    w = torch.randn(v, d, **options).mul_(d**-0.5).to(dtype)
    x = torch.randn(n, d, **options).to(dtype)
    return x, w, torch.randint(v, (n,), **options)


def errors(
    entry: Entry, inputs: tuple[Tensor, Tensor, Tensor], results: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Mean distance from the rank in float64, as a share of the items. Not 0 where two scores are
    closer than the rounding of float32."""
    x, w, y = inputs[0].double(), inputs[1], inputs[2]
    own = (x * w[y].double()).sum(1, keepdim=True)
    exact = torch.ones_like(y)
    for start in range(0, len(w), TILE):
        ids = torch.arange(start, min(start + TILE, len(w)), device=y.device)
        ahead = x @ w[start : start + TILE].double().T > own
        exact += (ahead & (ids != y[:, None])).sum(1)
    return {
        name: {
            "output_error": (ranks - exact).abs().double().mean().item() / len(w),
            "gradient_error": 0.0,
        }
        for name, ranks in results.items()
    }
