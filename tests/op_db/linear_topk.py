# SPDX-License-Identifier: Apache-2.0
"""Samples of linear_topk.

Legend: N rows, V items, D width, E listed exclusions.

Positions must be those of the float64 oracle, so the data is that of linear_rank: `whole` numbers
with exact scores and many ties, or normal embeddings, asserted to leave no order among the first
k + 1 scores to the rounding of float32 (`_spread`).
"""

import math
from collections.abc import Iterator

import torch

import fastrec
from fastrec.ops.linear_topk import linear_topk_ref
from op_db.case import Op, Sample, Types
from op_db.in_batch_cross_entropy import OFFSETS, by_tensors, lists
from op_db.linear_rank import float64_scores, normal, rounding, whole


def _spread(name, device, types, n, v, d, k, **options):
    """Rows whose first k + 1 scores are apart: those of three times as many that are most so."""
    case = normal(name, device, types, 3 * n, v, d) | options
    top = float64_scores(case).sort(dim=1, descending=True).values[:, : k + 2]
    gap = -top.diff(dim=1)[:, : k + 1]
    gap = gap.masked_fill(~gap.isfinite(), math.inf)
    apart = gap.amin(1) if gap.shape[1] else gap.new_full((3 * n,), math.inf)
    picked = apart.argsort(descending=True)[:n].sort().values
    assert (apart[picked] > rounding(case)).all(), f"{name}: scores too close for float32"
    return case | {"input": case["input"][picked].contiguous(), "k": k}


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    # Below, just below and above the tiles of rows, items and width.
    n, v, d = (7, 45, 20) if interpret_small else (63, 1009, 50)

    def spread(name, n=n, v=v, d=d, k=5, **options):
        return _spread(name, device, types, n, v, d, k, **options)

    def tied(name, n=n, v=v, d=d, k=5, **options):
        return whole(name, device, types, n, v, d) | {"k": k} | options

    sizes = {
        "one_row": (1, v, d, 5),
        "many_rows": (70 if interpret_small else 300, v, d, 5),
        "one_item": (n, 1, d, 1),
        "one_row_one_item": (1, 1, 1, 1),
        "width_64": (n, v, 64, 10),
        "width_130": (n, v // 2, 130, 10),
        "width_300": (n, v // 2, 300, 10),
        "full_tiles": (64, 128, 16, 8) if interpret_small else (192, 1536, 64, 8),
        "best": (n, v, d, 1),
        # On cpp this is cut into ranges of items; on triton more tiles than k.
        "many_items": (n, 9 * v if interpret_small else 20011, 16, 3),
    }
    for name, (*size, k) in sizes.items():
        yield Sample(f"spread_{name}", spread(f"spread_{name}", *size, k))
        yield Sample(f"ties_{name}", tied(f"ties_{name}", *size, k))
    # On cpp lists are cut back several times, and at 1000 never.
    yield Sample("ties_k_100", tied("ties_k_100", 9, 300 if interpret_small else 4001, d, 100))
    yield Sample("ties_every", tied("ties_every", 9, v, 8, v))
    # On triton equal scores, and equal maxima of tiles, in more than one block of `_take_kernel`.
    yield Sample("ties_blocks", tied("ties_blocks", 3, 700, 8, 40))
    yield Sample("ties_many_tiles", tied("ties_many_tiles", 1, 17_000, 4, 3))
    yield Sample("ties_width_1", tied("ties_width_1", n, v, 1))
    yield Sample("ties_width_300", tied("ties_width_300", 5, 70, 300))
    yield Sample("no_row", tied("no_row", 0, v, d))

    g = torch.Generator(device).manual_seed(1)
    bias = torch.randn(v, generator=g, device=device).to(types.table)
    whole_bias = torch.randint(-3, 4, (v,), generator=g, device=device).to(types.table)
    hidden = bias.clone()
    hidden[::3] = -math.inf
    yield Sample("bias", spread("bias", linear_bias=bias))
    yield Sample("ties_bias", tied("ties_bias", linear_bias=whole_bias))
    yield Sample("bias_minus_inf", spread("bias_minus_inf", linear_bias=hidden))
    few = torch.full_like(bias, -math.inf)
    few[[2, v // 2, v - 1]] = 0
    yield Sample("three_items_left", tied("three_items_left", linear_bias=few))
    yield Sample("no_item_left", tied("no_item_left", linear_bias=few - math.inf))

    listed = lists("lists", device, n, v, 6)
    yield Sample("lists", tied("lists", **listed, linear_bias=whole_bias))
    half = lists("half", device, n, v, v // 2)
    yield Sample("lists_half", tied("lists_half", **half))
    every = {
        "exclude_values": torch.arange(v, device=device).repeat(n),
        OFFSETS: torch.arange(n + 1, device=device) * v,
    }
    yield Sample("all_excluded", tied("all_excluded", **every))
    keep = torch.arange(n * v, device=device) % v < v - 3  # all but the last three
    left = {
        "exclude_values": every["exclude_values"][keep],
        OFFSETS: torch.arange(n + 1, device=device) * (v - 3),
    }
    yield Sample("three_not_excluded", tied("three_not_excluded", **left))

    # So few rows take a way of their own through the cpp kernel: whole vectors of a table are read
    # where they lie, several ranges, a last tile that is not full.
    items = 9 * v if interpret_small else 20011
    few_bias = torch.randint(-3, 4, (items,), generator=g, device=device).to(types.table)
    for rows in (1, 4, 5):
        listed = lists(f"few_{rows}", device, rows, items, 300)
        for width in (64, 50):
            name = f"ties_few_{rows}_{width}"
            yield Sample(name, tied(name, rows, items, width, 10, **listed, linear_bias=few_bias))
    yield Sample("spread_few", spread("spread_few", 3, items, 64, 7))
    case = tied("few_nan", 3, 200, 64, 9)
    case["input"][1] = math.nan
    case["linear_weight"][1::3] = math.nan
    yield Sample("few_nan", case)

    # Equal scores everywhere, and scores that rise or fall with the id.
    case = tied("zeros", v=2 * v, k=30)
    yield Sample("zeros", case | {"input": torch.zeros_like(case["input"])})
    for name, sign in (("rising", 1), ("falling", -1)):
        order = (sign * torch.arange(v, device=device, dtype=torch.float32)) / 4
        case = tied(name, d=1, k=20)
        case = case | {"input": torch.ones_like(case["input"])}
        case["linear_weight"] = (order // 8).to(types.table)[:, None].contiguous()
        yield Sample(name, case)

    case = tied("infinite", linear_bias=whole_bias.clone())
    case["linear_bias"][::2], case["linear_bias"][1::4] = math.inf, -math.inf
    yield Sample("infinite", case)

    # NaN is never a result: rows of NaN have none.
    case = tied("nan")
    case["input"][::3] = math.nan
    case["linear_weight"][1::5] = math.nan
    yield Sample("nan", case)
    # More tiles of nothing but NaN than results.
    case = tied("nan_tiles", v=9 * v if interpret_small else v, k=2)
    case["linear_weight"][:256] = math.nan
    yield Sample("nan_tiles", case)


def _private(device: str, op: str) -> Iterator[tuple]:
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(5, 6, generator=g, device=device)
    w = torch.randn(7, 6, generator=g, device=device)
    listed = lists("private", device, 5, 7, 2).values()
    yield x, w, torch.randn(7, generator=g, device=device), 3, *listed
    yield x, w, None, 7, None, None


OP = Op(
    "linear_topk",
    by_tensors(fastrec.linear_topk),
    by_tensors(linear_topk_ref),
    _samples,
    differentiable=(),
    private=("linear_topk_fwd",),
    private_samples=_private,
    representative=("lists", "spread_width_64"),
    complete=("lists",),
    many_tasks=("ties_many_items", "spread_many_items", "ties_many_rows", "zeros", "ties_few_1_64"),
    refuses={("triton", "float64"): "float64"},
)
