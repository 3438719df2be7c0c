# SPDX-License-Identifier: Apache-2.0
"""Legend: T rows, D input width, F inner width, E output width."""

from collections.abc import Iterator

import torch

from fastrec.ops.gelu_ffn import gelu_ffn, gelu_ffn_ref
from op_db.case import TYPES, Op, Sample, Types, generator


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    def problem(name, t=150, d=50, f=70, e=None):
        g, e = generator(name, device), e or d

        def random(*size, scale=1.0):
            return (scale * torch.randn(*size, generator=g, device=device)).to(types.input)

        return Sample(
            name,
            dict(
                input=random(t, d),
                weight_in=random(f, d, scale=d**-0.5),
                bias_in=random(f),
                weight_out=random(e, f, scale=f**-0.5),
                bias_out=random(e),
            ),
        )

    # Small: every element of every argument is moved for a numerical gradient.
    yield problem("everything", *((30, 20, 35) if interpret_small else ()))
    yield problem("whole_vectors", t=193, d=64, f=256)
    rows, width = (13, 5) if interpret_small else (97, 20)
    yield problem("inner_tail", rows, width, f=300)  # 2 whole blocks of features and 44
    for t in (0, 1, 11, 13, 95, 96):
        yield problem(f"rows_{t}", t=t, d=16, f=32)
    for width in (1, 7, 17, 33):
        yield problem(f"width_{width}", d=width)
        yield problem(f"inner_width_{width}", f=width)
        yield problem(f"output_width_{width}", e=width)
    yield problem("one_number", t=1, d=1, f=1)
    yield problem("many_rows", t=3100, d=20, f=33)  # more than one range of partial sums


def _private(device: str, op: str) -> Iterator[tuple]:
    g = generator(op, device)
    sizes = ((5, 18), (7, 18), (7,), (9, 7), (9,), (5, 9))
    x, w_in, b_in, w_out, b_out, up = (
        torch.randn(size, generator=g, device=device) for size in sizes
    )
    if op.endswith("_fwd"):
        yield x, w_in, b_in, w_out, b_out
    else:
        yield up, x, w_in, b_in, w_out, True, True
        yield up, x, w_in, b_in, w_out, False, True
        yield up, x, w_in, b_in, w_out, True, False


OP = Op(
    "gelu_ffn",
    gelu_ffn,
    gelu_ffn_ref,
    _samples,
    differentiable=("input", "weight_in", "bias_in", "weight_out", "bias_out"),
    private=("gelu_ffn_fwd", "gelu_ffn_bwd"),
    private_samples=_private,
    representative=("everything", "inner_tail"),
    complete=("everything",),
    many_tasks=("many_rows", "whole_vectors"),
    types=TYPES[:4],
    refuses={("cpp", "bfloat16"): "takes float32 or float64", ("cpp", "float16"): "takes float32"},
)
