# SPDX-License-Identifier: Apache-2.0
"""Legend: T rows, K input width, N output width."""

from collections.abc import Iterator

import torch

from fastrec.ops.linear import linear, linear_ref
from op_db.case import TYPES, Op, Sample, Types, generator


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    def problem(name, t=150, k=50, n=70, bias=True):
        g = generator(name, device)

        def random(*size):
            return torch.randn(*size, generator=g, device=device).to(types.input)

        case = dict(input=random(t, k), weight=random(n, k), bias=random(n) if bias else None)
        return Sample(name, case)

    # Small: every element of every argument is moved for a numerical gradient.
    sizes = (30, 20, 35) if interpret_small else (150, 50, 70)
    yield problem("everything", *sizes)
    yield problem("no_bias", *sizes, bias=False)
    yield problem("whole_vectors", t=193, k=64, n=192)
    yield problem("deep", t=97, k=300, n=64)  # more than one chain of additions
    for t in (0, 1, 11, 12, 13, 95, 129):
        yield problem(f"rows_{t}", t=t, k=16, n=32)
    for width in (1, 7, 17, 33):
        yield problem(f"input_width_{width}", k=width)
        yield problem(f"output_width_{width}", n=width)
    yield problem("one_number", t=1, k=1, n=1)
    yield problem("no_column", k=0)
    case = problem("three_dimensions", t=6, k=7).kwargs
    yield Sample("three_dimensions", case | {"input": case["input"].view(2, 3, 7)})
    case = problem("three_dimensions_no_column", t=6, k=0).kwargs
    yield Sample("three_dimensions_no_column", case | {"input": case["input"].view(2, 3, 0)})
    yield problem("many_rows", t=3100, k=33, n=20)  # more than one range of partial sums


def _private(device: str, op: str) -> Iterator[tuple]:
    g = generator(op, device)
    x, w, b, up = (
        torch.randn(size, generator=g, device=device) for size in ((5, 18), (7, 18), (7,), (5, 7))
    )
    if op.endswith("_fwd"):
        yield x, w, b
        yield x, w, None
    else:
        yield up, x, w, True, True, True
        yield up, x, w, False, True, False


OP = Op(
    "linear",
    linear,
    linear_ref,
    _samples,
    differentiable=("input", "weight", "bias"),
    private=("linear_fwd", "linear_bwd"),
    private_samples=_private,
    representative=("everything", "no_bias"),
    complete=("everything",),
    many_tasks=("many_rows", "whole_vectors"),
    types=TYPES[:4],
    refuses={("cpp", "bfloat16"): "takes float32 or float64", ("cpp", "float16"): "takes float32"},
)
