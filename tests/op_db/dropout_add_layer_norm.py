# SPDX-License-Identifier: Apache-2.0
"""Legend: T rows, D width."""

from collections.abc import Iterator

import torch

import fastrec
from fastrec.ops.common.dropout import Mask
from fastrec.ops.dropout_add_layer_norm import dropout_add_layer_norm_ref
from fastrec.random import Rng
from op_db.case import Op, Sample, Types, generator


def events(name: str, rows: int, device: str) -> dict:
    """Rows of samples of 1 to 7 events, as a batch lays them out, several views and ids
    above 2^31 among them."""
    lengths = torch.randint(1, 8, (rows,), generator=generator(name, "cpu"))
    owner = torch.repeat_interleave(torch.arange(rows), lengths)[:rows]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])[owner]
    keys = (owner * 37 + 5) + (owner % 2 << 31) + ((owner % 3 * 32767) << 32)
    return dict(
        keys=keys.to(device),
        positions=(torch.arange(rows) - starts).to(device),
        rng=Rng(2**40 + 3, 7),
        layer=3,
    )


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    t, d = (37, 20) if interpret_small else (150, 50)

    def problem(name, t=t, d=d, residual=None, affine=True, **options):
        g = generator(name, device)

        def random(*size, dtype):
            return torch.randn(*size, generator=g, device=device).to(dtype)

        case = dict(input=random(t, d, dtype=types.input), residual=None, weight=None, bias=None)
        if residual is not None:
            case["residual"] = random(t, d, dtype=residual)
        if affine:
            case["weight"] = 1 + 0.3 * random(d, dtype=types.table)
            case["bias"] = random(d, dtype=types.table)
        return Sample(name, case | options)

    stream = types.table  # under autocast a float32 residual meets a low-precision sublayer
    drop = dict(dropout_p=0.3, **events("drop", t, device))
    yield problem("everything", residual=stream, **drop)
    yield problem("plain")
    yield problem("dropout_only", **drop)
    yield problem("residual_only", residual=types.input)
    yield problem("no_affine", residual=stream, affine=False, **drop)
    yield problem("p_rounds_to_0", residual=stream, **(drop | dict(dropout_p=0.001)))
    yield problem("p_half", residual=stream, **(drop | dict(dropout_p=0.5, site="ffn_output")))
    yield problem("p_255_of_256", residual=stream, **(drop | dict(dropout_p=0.996)))
    single = dict(dropout_p=0.3, **events("single", 1, device))
    yield problem("one_row", t=1, residual=stream, **single)
    yield problem("zero_rows", t=0, residual=stream, **(drop | events("none", 0, device)))
    if types.input == torch.float64:  # elsewhere the float64 oracle has digits to spare
        one = problem("width_1", d=1, residual=stream, **drop).kwargs
        size = one["input"].abs().max().item() * 1e-5**-0.5
        floor = {"input": size, "residual": size, "weight": size * t}
        why = "the sum equals its mean: every gradient is 0, a difference of numbers of size rstd"
        yield Sample("width_1", one, floor, why)
    else:
        yield problem("width_1", d=1, residual=stream, **drop)
    for width in (16, 64, 130):
        yield problem(f"width_{width}", d=width, residual=stream, **drop)
    rows = 70 if interpret_small else 1200
    many = dict(dropout_p=0.3, **events("many_rows", rows, device))
    yield problem("many_rows", t=rows, d=16, residual=stream, **many)
    # The same sample twice, positions in no order: the mask follows the key, not the place.
    shuffled = dict(drop, positions=drop["positions"].flip(0), keys=drop["keys"] % 3)
    yield problem("shuffled_rows", residual=stream, **shuffled)
    large = problem("offset_1000", residual=stream, affine=False)
    large.kwargs["input"] += 1000  # the variance of numbers of size 1000
    yield Sample(
        "offset_1000",
        large.kwargs,
        floor={"output_0": 1000.0, "input": 1000.0, "residual": 1000.0},
        why="z - mean cancels three digits of z, whose own rounding is eps x 1000",
    )


def _private(device: str, op: str) -> Iterator[tuple]:
    for dtype, affine, p in ((torch.float32, True, 0.3), (torch.bfloat16, False, 0.0)):
        g = generator(op, device)
        x, r = (torch.randn(5, 18, generator=g, device=device).to(dtype) for _ in range(2))
        w = torch.randn(18, generator=g, device=device) if affine else None
        key = events("private", 5, device)
        mask = Mask()
        if p:
            seed = torch.tensor([9, 4], device=device)
            mask = Mask(key["keys"], key["positions"], seed, 77, 3, 1)
        if op.endswith("_fwd"):
            yield x, r, w, w, 1e-5, *mask
            yield x, None, w, None, 1e-5, *mask
        else:
            mean = x.float().mean(1)
            yield x, r, x, mean, mean.abs() + 0.5, w, w, torch.bfloat16, *mask
            yield None, r, x, mean, mean.abs() + 0.5, w, None, x.dtype, *mask


OP = Op(
    "dropout_add_layer_norm",
    fastrec.dropout_add_layer_norm,
    dropout_add_layer_norm_ref,
    _samples,
    differentiable=("input", "residual", "weight", "bias"),
    private=("dropout_add_layer_norm_fwd", "dropout_add_layer_norm_bwd"),
    private_samples=_private,
    per_row=("input", "residual", "keys", "positions"),
    representative=("everything", "plain"),
    complete=("everything",),
    many_tasks=("many_rows",),
    refuses={("triton", "float64"): "float64"},
)
