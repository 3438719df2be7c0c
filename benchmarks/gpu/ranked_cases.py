# SPDX-License-Identifier: Apache-2.0
"""Cases of the ops that rank the items of a table or draw from them.

Legend: N rows, V items, D width, K results or negatives a row.
"""

import math

from benchmarks.bench import Entry
from benchmarks.gpu.measured import Counts, Measured, item_bytes

# Ranking: one product of N x V x D.


def _rank(n: int, v: int, d: int, dtype: str = "bfloat16", **more) -> Entry:
    return Entry("linear_rank", dict(N=n, V=v, D=d), dtype, "rank", **more)


def _topk(n: int, v: int, d: int, k: int, dtype: str = "bfloat16", **more) -> Entry:
    return Entry("linear_topk", dict(N=n, V=v, D=d, K=k), dtype, "top-k", **more)


def _ranked_floor(entry: Entry) -> dict[str, Counts]:
    n, v, d = (entry.sizes[name] for name in "NVD")
    return {"forward": (2 * n * v * d, v * d * item_bytes(entry), 0)}


# The reference sorts all scores.
_ONE_PRODUCT = ("fastrec", "eager", "torch.compile", "tiles")
_NO_SORT = ("fastrec", "eager", "torch.compile")
_ALONE = ("fastrec",)

RANK_TOPK = Measured(
    (
        _rank(4096, 1_000_000, 64, only=_ONE_PRODUCT),
        _topk(4096, 1_000_000, 64, 10, only=_NO_SORT),
        _topk(4096, 1_000_000, 64, 100, only=_NO_SORT),
        _rank(4096, 1_000_000, 128, only=("fastrec", "eager")),
        _topk(4096, 1_000_000, 128, 10, only=("fastrec", "eager")),
        _rank(512, 141_939, 64, "float32", only=_ONE_PRODUCT),
        _topk(512, 141_939, 64, 10, "float32", only=_NO_SORT),
        _rank(4096, 10_000_000, 64, rounds=3, only=_ALONE),
        _topk(4096, 10_000_000, 64, 10, rounds=3, only=_ALONE),
    ),
    _ranked_floor,
    "2 N V D operations, the table read once; the ranks of eager are those of scores rounded to"
    " bfloat16",
    memory=(_rank(4096, 10_000_000, 64), _topk(4096, 10_000_000, 64, 100)),
    columns=(
        ("eager", ("eager",)),
        ("torch.compile", ("torch.compile",)),
        ("tiles of 8,192 items", ("tiles",)),
    ),
)


# Softmax over a target and drawn items: random reads of the table, or a product with the drawn.


def _sampled(k: int, case: str, dtype: str = "bfloat16", v: int = 1_000_000, **more) -> Entry:
    sizes = dict(N=2560, K=k, V=v, D=64)
    return Entry("sampled_linear_cross_entropy", sizes, dtype, case, **more)


def _sampled_floor(entry: Entry) -> dict[str, Counts]:
    n, k, v, d = entry.sizes.values()
    pairs, row = n * (k + 1), d * item_bytes(entry)
    distinct = -v * math.expm1(pairs * math.log1p(-1 / v))
    written = (distinct if entry.case == "sparse" else v) * row
    if entry.case == "shared":
        read = 2 * (n + k) * row
        return {
            "forward": (2 * pairs * d, read, pairs),
            "both": (8 * pairs * d, 2 * read + written, 2 * pairs),
        }
    return {
        "forward": (2 * pairs * d, pairs * row, pairs),
        "both": (6 * pairs * d, pairs * row + written, pairs),
    }


# The compiler takes no sparse gradient.
_NO_COMPILER = ("fastrec", "eager")
_PEERS = (*_NO_COMPILER, "torch.compile")
SAMPLED = Measured(
    (
        _sampled(256, "own", only=_PEERS),
        _sampled(256, "own", "float32", only=_PEERS),
        _sampled(256, "sparse", "float32", only=_NO_COMPILER),
        _sampled(256, "shared", only=_PEERS),
        _sampled(4096, "shared", only=_PEERS),
        _sampled(4096, "shared", "float32", only=_PEERS),
    ),
    _sampled_floor,
    "P = N (K + 1) pairs. Own negatives: forward 2 P D operations, P exponentials, a row of the"
    " table read for each pair; with backward 6 P D, and the gradient written (sparse: the items"
    " that occur). Shared ones: 2 P D and 8 P D, P and 2 P exponentials, N + K rows",
    memory=(_sampled(256, "own", v=10_000_000), _sampled(4096, "shared", v=10_000_000)),
)
