# SPDX-License-Identifier: Apache-2.0
"""Legend: T rows, D width."""

from collections.abc import Iterator

import torch

import fastrec
from fastrec.ops.bias_gelu_dropout import bias_gelu_dropout_ref
from fastrec.ops.common.dropout import Mask
from op_db.case import Op, Sample, Types, generator
from op_db.dropout_add_layer_norm import events


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    t, d = (37, 20) if interpret_small else (150, 50)

    def problem(name, t=t, d=d, bias=True, **options):
        g = generator(name, device)
        x = (2 * torch.randn(t, d, generator=g, device=device)).to(types.input)
        b = torch.randn(d, generator=g, device=device).to(types.table) if bias else None
        return Sample(name, dict(input=x, bias=b, **options))

    drop = dict(dropout_p=0.3, **events("drop", t, device))
    yield problem("everything", **drop)
    yield problem("plain")
    yield problem("no_bias", bias=False, **drop)
    yield problem("p_half", **(drop | dict(dropout_p=0.5, site="ffn_output")))
    # Places go on where one view ends and the next begins: a mask is drawn for runs of them.
    views = torch.arange(t, device=device) // (t // 3) << 32
    place = torch.arange(t, device=device)
    yield problem("views_of_one_sample", **(drop | dict(keys=views + 5, positions=place)))
    yield problem("one_row", t=1)
    yield problem("zero_rows", t=0, **(drop | events("none", 0, device)))
    for width in (1, 16, 64, 150):
        yield problem(f"width_{width}", d=width, **drop)
    rows = 70 if interpret_small else 1200
    many = dict(dropout_p=0.3, **events("many_rows", rows, device))
    yield problem("many_rows", t=rows, d=16, **many)
    # Both tails and the zero: GELU is 0 on the left, the identity on the right.
    sweep = torch.linspace(-12, 12, 2 * t, device=device).view(t, 2)
    yield Sample("sweep", dict(input=sweep.to(types.input), bias=None))
    tail = problem("left_tail", bias=False)
    tail.kwargs["input"] = -4 - tail.kwargs["input"].abs()
    if types.input == torch.float64:  # elsewhere the float64 oracle has digits to spare
        floor = {"output": tail.kwargs["input"].abs().max().item(), "input": 1.0}
        why = "the reference takes 1 + erf(z), numbers of size 1 whose rounding z multiplies"
        tail = Sample(tail.name, tail.kwargs, floor, why)
    yield tail
    big = torch.tensor([[0.0, 100.0, -100.0, 6e4, -6e4]], device=device).to(types.input)
    yield Sample("large", dict(input=big, bias=None))


def _private(device: str, op: str) -> Iterator[tuple]:
    for dtype, bias, p in ((torch.float32, True, 0.3), (torch.bfloat16, False, 0.0)):
        g = generator(op, device)
        x, grad = (torch.randn(5, 18, generator=g, device=device).to(dtype) for _ in range(2))
        b = torch.randn(18, generator=g, device=device) if bias else None
        key = events("private", 5, device)
        mask = Mask()
        if p:
            seed = torch.tensor([9, 4], device=device)
            mask = Mask(key["keys"], key["positions"], seed, 77, 4, 1)
        if op.endswith("_fwd"):
            yield x, b, *mask
        else:
            yield grad, x, b, *mask


OP = Op(
    "bias_gelu_dropout",
    fastrec.bias_gelu_dropout,
    bias_gelu_dropout_ref,
    _samples,
    differentiable=("input", "bias"),
    private=("bias_gelu_dropout_fwd", "bias_gelu_dropout_bwd"),
    private_samples=_private,
    per_row=("input", "keys", "positions"),
    representative=("everything", "plain"),
    complete=("everything",),
    many_tasks=("many_rows",),
    refuses={("triton", "float64"): "float64"},
)
