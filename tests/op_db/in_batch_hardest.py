# SPDX-License-Identifier: Apache-2.0
"""Samples of in_batch_hardest.

Legend: B queries, C candidates, D width, G id columns, E listed exclusions.
"""

from collections.abc import Iterator

import torch

import fastrec
from fastrec.ops.in_batch_hardest import in_batch_hardest_ref
from op_db.case import TYPES, Op, Sample, Types
from op_db.in_batch_cross_entropy import OFFSETS, by_tensors, embeddings, ids, lists, parameters


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    b, c, d = (7, 37, 20) if interpret_small else (63, 211, 50)

    def problem(name, b=b, c=c, d=d, **options):
        return embeddings(name, device, types, b, c, d) | options

    def l2(name, b=b, c=c, d=d, **options):
        weight, _ = parameters(name, device, types, c, d)
        return problem(name, b, c, d, similarity="weighted_l2", weight=weight, **options)

    sizes = {
        "one_pair": (1, 1, 1),
        "one_query": (1, c, d),
        "fewer_candidates": (b, 3, d),
        "many": (40 if interpret_small else 300, 2 * c, d),
        "width_130": (b, c, 130),
        "width_300": (b, c, 300),
        "full_tiles": (32, 64, 16) if interpret_small else (192, 384, 64),
    }
    for name, size in sizes.items():
        yield Sample(name, problem(name, *size))
    yield Sample("no_query", l2("no_query", 0, 3))

    yield Sample("cosine", problem("cosine", similarity="cosine"))
    yield Sample("weighted_l2", l2("weighted_l2"))
    yield Sample("plain_l2", problem("plain_l2", similarity="weighted_l2"))

    yield Sample("groups", l2("groups", **ids("groups", device, b, c, 0, 4)))
    yield Sample("lists", problem("lists", **lists("lists", device, b, c, 6)))
    every = ids("every", device, b, c, 2, 5) | lists("every", device, b, c, c)
    yield Sample("groups_and_lists", l2("every", **every))

    # The largest is listed, at every place of a tile.
    case = problem("best_listed", 150, 150, 16)
    case["query"] = 3 * case["candidate"]
    itself = torch.arange(151, device=device)
    yield Sample("best_listed", case | {"exclude_values": itself[:150], OFFSETS: itself})

    # Nothing is allowed for every second query: -inf, -1 and no gradient.
    half = dict(
        query_group=torch.arange(b, device=device) % 2,
        candidate_group=torch.zeros(c, dtype=torch.int64, device=device),
    )
    yield Sample("half_excluded", l2("half", **half))

    # Every candidate occurs three times, far apart: the lowest position that is allowed wins. Small
    # integers of mean 0, so that no order of additions tells equal candidates apart.
    case = problem("ties")
    k = (3 * case["candidate"][: c // 2]).round()
    case = {"query": (3 * case["query"]).round(), "candidate": torch.cat([k, -k] * 3)}
    yield Sample("ties", case)
    first = torch.arange(len(k), device=device).repeat(b)
    listed = {"exclude_values": first, OFFSETS: torch.arange(b + 1, device=device) * len(k)}
    yield Sample("ties_after_lists", case | listed)

    # All similarities negative, and a common offset of 100 times the spread.
    case = problem("negative")
    case["candidate"], case["query"] = -case["candidate"].abs(), case["query"].abs()
    yield Sample("negative", case)
    if torch.finfo(types.input).bits > 16:
        case = l2("offset")
        case = case | {name: case[name] + 100 for name in ("query", "candidate")}
        yield Sample("offset", case)

    # A NaN, between others and at the end of a tile, is not selected, nor does it hide what is.
    case = problem("nan", 3 * b, 3 * c, 16)
    case["candidate"] = case["candidate"].clone()
    case["candidate"][1::5, 3] = torch.nan
    case["candidate"][-c:, 3] = torch.nan
    yield Sample("nan", case)

    # One candidate that is far away costs the others no precision.
    case = l2("far")
    case["candidate"] = case["candidate"].clone()
    case["candidate"][c // 2, 0] = 1e4
    yield Sample("far", case)


def _private(device: str, op: str) -> Iterator[tuple]:
    """Arguments of the private ops; autograd sits above them, so nothing requires a gradient."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(5, 6, generator=g, device=device)
    c = torch.randn(7, 6, generator=g, device=device)
    if op.endswith("_bwd"):
        yield x, torch.tensor([6, 0, -1, 0, 3], device=device), 7
        return
    rules = ids("private", device, 5, 7, 2, 3).values()
    listed = lists("private", device, 5, 7, 2).values()
    yield x, c, torch.randn(7, generator=g, device=device), *rules, *listed
    yield x, c, None, None, None, None, None


OP = Op(
    "in_batch_hardest",
    by_tensors(fastrec.in_batch_hardest),
    by_tensors(in_batch_hardest_ref),
    _samples,
    differentiable=("query", "candidate", "weight"),
    private=("in_batch_hardest_fwd", "in_batch_hardest_bwd"),
    private_samples=_private,
    representative=("groups_and_lists", "nan"),
    complete=("groups_and_lists",),
    many_tasks=("many", "ties"),
    types=TYPES[:4],
    refuses={("triton", "float64"): "float64"},
)
