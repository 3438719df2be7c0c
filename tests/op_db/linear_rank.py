# SPDX-License-Identifier: Apache-2.0
"""Samples of linear_rank.

Legend: N rows, V items, D width, E listed exclusions.

Ranks are integers and must be those of the float64 oracle, so no sample may leave an order to the
rounding of float32. Two kinds of data do not:
- `whole`: embeddings that are small whole numbers. Scores are whole numbers below 2^24 and exact
  in every order of additions; a row has only some dozens of different scores: ties everywhere.
- `spread`: normal embeddings. The target of a row is the item of 16 whose score is farthest from
  all others; the distance is asserted to be beyond the rounding of float32.
"""

import math
from collections.abc import Iterator

import torch

import fastrec
from fastrec.ops.linear_rank import linear_rank_ref
from op_db.case import Op, Sample, Types, generator
from op_db.in_batch_cross_entropy import OFFSETS, by_tensors, lists


def whole(name, device, types, n, v, d):
    """Whole numbers from -3 to 3."""
    g = generator(name, device)
    x = torch.randint(-3, 4, (n, d), generator=g, device=device)
    w = torch.randint(-3, 4, (v, d), generator=g, device=device)
    return dict(input=x.to(types.input), linear_weight=w.to(types.table))


def normal(name, device, types, n, v, d):
    g = generator(name, device)
    x = torch.randn(n, d, generator=g, device=device)
    w = torch.randn(v, d, generator=g, device=device) * d**-0.5
    return dict(input=x.to(types.input), linear_weight=w.to(types.table))


def float64_scores(case):
    scores = case["input"].double() @ case["linear_weight"].double().T
    return scores if case.get("linear_bias") is None else scores + case["linear_bias"].double()


def rounding(case):
    """More than the error of any score in float32: eps (D + 1) sum_d |x_d w_d|, and the bias."""
    x, w = case["input"].double(), case["linear_weight"].double()
    size = x.norm(dim=1).max() * w.norm(dim=1).max() if len(x) else torch.zeros(())
    if case.get("linear_bias") is not None:
        bias = case["linear_bias"]
        size = size + bias[bias.isfinite()].abs().max()
    return (x.shape[1] + 2) * torch.finfo(torch.float32).eps * size.item()


def random_targets(name, device, n, v):
    return torch.randint(v, (n,), generator=generator(name + "y", device), device=device)


def _apart(name, device, case):
    """A target of each row whose score is far from all others."""
    scores = float64_scores(case)
    n, v = scores.shape
    drawn = torch.rand(n, v, generator=generator(name + "y", device), device=device)
    if case.get("linear_bias") is not None:
        drawn = drawn.masked_fill(case["linear_bias"] == -math.inf, -1)
    drawn = drawn.topk(min(16, v), dim=1).indices
    gap = (scores.gather(1, drawn)[:, :, None] - scores[:, None, :]).abs()
    gap = gap.scatter(2, drawn[:, :, None], math.inf).amin(2)
    widest, at = gap.max(1)
    assert (widest > rounding(case)).all(), f"{name}: scores too close to tell apart in float32"
    return drawn.gather(1, at[:, None]).squeeze(1)


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    # Below, just below and above the tiles of rows, items and width.
    n, v, d = (7, 45, 20) if interpret_small else (63, 1009, 50)

    def spread(name, n=n, v=v, d=d, **options):
        case = normal(name, device, types, n, v, d) | options
        return case | {"target": _apart(name, device, case)}

    def tied(name, n=n, v=v, d=d, **options):
        case = whole(name, device, types, n, v, d) | options
        return case | {"target": random_targets(name, device, n, v)}

    sizes = {
        "one_row": (1, v, d),
        "many_rows": (100 if interpret_small else 300, v, d),
        "one_item": (n, 1, d),
        "two_items": (n, 2, d),
        "one_row_one_item": (1, 1, 1),
        "width_64": (n, v, 64),
        "width_130": (n, v // 2, 130),
        "width_300": (n, v // 2, 300),
        "full_tiles": (64, 128, 16) if interpret_small else (192, 1536, 64),
        # On cpp this is cut into ranges of items.
        "many_items": (n, 5 * v if interpret_small else 20011, 16),
    }
    for name, size in sizes.items():
        yield Sample(f"spread_{name}", spread(f"spread_{name}", *size))
        yield Sample(f"ties_{name}", tied(f"ties_{name}", *size))
    yield Sample("ties_width_1", tied("ties_width_1", n, v, 1))
    yield Sample("ties_width_300", tied("ties_width_300", 5, 70, 300))
    yield Sample("no_row", tied("no_row", 0, v, d))

    g = generator("bias", device)
    bias = torch.randn(v, generator=g, device=device).to(types.table)
    whole_bias = torch.randint(-3, 4, (v,), generator=g, device=device).to(types.table)
    hidden = bias.clone()
    hidden[::3] = -math.inf
    yield Sample("bias", spread("bias", linear_bias=bias))
    yield Sample("ties_bias", tied("ties_bias", linear_bias=whole_bias))
    yield Sample("bias_minus_inf", spread("bias_minus_inf", linear_bias=hidden))

    # Targets of score -inf tie with the other items of score -inf, not with the excluded ones.
    case = tied("target_minus_inf", linear_bias=hidden.nan_to_num(0, 0, -math.inf).trunc())
    case["target"] = case["target"] // 3 * 3
    yield Sample("target_minus_inf", case)
    yield Sample("target_minus_inf_lists", case | lists("minus_inf", device, n, v, v // 2))

    # Exclusions, some of them the target itself, which stays in the ranking.
    yield Sample("lists", spread("lists", **lists("lists", device, n, v, 6)))
    case = tied("ties_lists", linear_bias=whole_bias)
    listed = lists("ties_lists", device, n, v, v // 2)
    owner = torch.repeat_interleave(listed[OFFSETS].diff())
    assert (listed["exclude_values"] == case["target"][owner]).any() or interpret_small
    yield Sample("ties_lists", case | listed)
    every = {
        "exclude_values": torch.arange(v, device=device).repeat(n),
        OFFSETS: torch.arange(n + 1, device=device) * v,
    }
    yield Sample("all_excluded", tied("all_excluded", **every))
    none = {"exclude_values": torch.arange(0, device=device), OFFSETS: every[OFFSETS] * 0}
    yield Sample("none_excluded", tied("none_excluded", **none))

    # The first and the last item; a score of 0 everywhere; targets in descending order.
    case = tied("ends")
    case["target"] = torch.arange(n, device=device) % 2 * (v - 1)
    yield Sample("ends", case)
    yield Sample("zeros", case | {"input": torch.zeros_like(case["input"])})
    case["target"] = torch.arange(n, device=device).flip(0) * (v // n)
    yield Sample("descending", case)

    # Extreme: scores of up to +-1e9 (1e4 in float16); infinite ones of both signs.
    case = tied("large")
    case["input"] = case["input"] * (2**10 if types.input == torch.float16 else 2**25)
    yield Sample("large", case)
    case = tied("infinite", linear_bias=whole_bias.clone())
    case["linear_bias"][::2], case["linear_bias"][1::4] = math.inf, -math.inf
    yield Sample("infinite", case)

    # NaN rows rank last; NaN items are behind everything else, unless they are the target.
    case = tied("nan")
    case["input"][::3] = math.nan
    case["linear_weight"][1::5] = math.nan
    yield Sample("nan", case)


def _private(device: str, op: str) -> Iterator[tuple]:
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(5, 6, generator=g, device=device)
    w = torch.randn(7, 6, generator=g, device=device)
    y = torch.randint(7, (5,), generator=g, device=device)
    listed = lists("private", device, 5, 7, 2).values()
    yield x, w, torch.randn(7, generator=g, device=device), y, *listed
    yield x, w, None, y, None, None


OP = Op(
    "linear_rank",
    by_tensors(fastrec.linear_rank),
    by_tensors(linear_rank_ref),
    _samples,
    differentiable=(),
    private=("linear_rank_fwd",),
    private_samples=_private,
    representative=("lists", "ties_lists"),
    complete=("ties_lists",),
    many_tasks=("ties_many_items", "spread_many_items", "ties_many_rows"),
    refuses={("triton", "float64"): "float64"},
)
