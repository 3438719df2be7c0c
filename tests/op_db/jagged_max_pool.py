# SPDX-License-Identifier: Apache-2.0
"""Legend: B sequences, T events, D width."""

from collections.abc import Iterator

import torch

import fastrec
from fastrec.ops.jagged_max_pool import jagged_max_pool_ref
from op_db.case import TYPES, Op, Sample, Types, generator


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    width = 20 if interpret_small else 50

    def problem(name, lengths, d=width, masked=False, **options):
        g = generator(name, device)
        offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
        values = torch.randn(int(offsets[-1]), d, generator=g, device=device).to(types.input)
        case = dict(values=values, offsets=offsets)
        if masked:
            case["mask"] = torch.rand(len(values), generator=g, device=device) < 0.6
        return Sample(name, case | options)

    short = [3, 0, 17, 1, 16] if interpret_small else [3, 0, 9, 16, 17, 1, 30, 8, 33, 7, 12, 50]
    yield problem("plain", short)
    yield problem("masked", short, masked=True)
    yield problem("none_counts", [4, 3], mask=torch.zeros(7, dtype=torch.bool, device=device))
    some = torch.tensor([False, False, True, False, False, False, True], device=device)
    yield problem("one_counts", [3, 2, 2], mask=some)
    yield problem("one_event", [1])
    yield problem("no_sequence", [])
    yield problem("no_event", [0, 0, 0])
    yield problem("empty_sequences", [0, 5, 0, 0, 3, 0])
    yield problem("huge_and_tiny", [70, 1, 40] if interpret_small else [1, 5210, 1, 128, 129])
    yield problem("many", [2, 1, 3] * 10 if interpret_small else [9, 1, 4, 30] * 300, d=16)
    for d in (1, 16, 64, 130):
        yield problem(f"width_{d}", short[:5], d=d, masked=True)

    # Small integers: most maxima are attained more than once, and the first one gets the gradient.
    ties = problem("ties", short, masked=True)
    ties.kwargs["values"].round_().clamp_(-1, 1)
    yield ties
    zeros = problem("signed_zeros", [4, 6])
    zeros.kwargs["values"].mul_(0)
    yield zeros
    low = problem("minus_infinity", [3, 2, 4], masked=True)
    low.kwargs["values"][:3] = -torch.inf
    low.kwargs["mask"][:3] = torch.tensor([False, True, True], device=device)
    yield low


def _private(device: str, op: str) -> Iterator[tuple]:
    offsets = torch.tensor([0, 3, 3, 7], device=device)
    mask = torch.tensor([True, False, True, True, False, True, True], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(7, 18, generator=generator(op, device), device=device).to(dtype)
        if op.endswith("_fwd"):
            yield x, offsets, mask
            yield x, offsets, None
        else:
            index = torch.zeros(3, 18, dtype=torch.int32, device=device)
            index[1] = -1  # of an empty sequence, as forward gives it
            yield x[:3], index, offsets, 7


OP = Op(
    "jagged_max_pool",
    fastrec.jagged_max_pool,
    jagged_max_pool_ref,
    _samples,
    differentiable=("values",),
    private=("jagged_max_pool_fwd", "jagged_max_pool_bwd"),
    private_samples=_private,
    representative=("plain", "masked"),
    complete=("masked",),
    many_tasks=("many", "huge_and_tiny"),
    types=TYPES[:4],
)
