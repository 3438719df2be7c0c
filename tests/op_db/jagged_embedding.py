# SPDX-License-Identifier: Apache-2.0
"""Legend: T events, V rows of the item table, P of the position table, D width."""

from collections.abc import Iterator

import torch

import fastrec
from fastrec.ops.common.dropout import Mask
from fastrec.ops.jagged_embedding import jagged_embedding_ref
from op_db.case import Op, Sample, Types, generator
from op_db.dropout_add_layer_norm import events

PLACES = 9  # events() has up to 7


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    t, v, d = (37, 23, 20) if interpret_small else (150, 61, 50)

    def problem(name, t=t, v=v, d=d, norm=True, place=True, drop=True, **options):
        g = generator(name, device)

        def random(*size, dtype=types.table):
            return torch.randn(*size, generator=g, device=device).to(dtype)

        case = events(name, t, device)
        rng, layer = case.pop("rng"), case.pop("layer")
        case |= dict(values=torch.randint(v, (t,), generator=g, device=device))
        case |= dict(weight=random(v, d, dtype=types.input), position_weight=None)
        case |= dict(norm_weight=None, norm_bias=None)
        if place:
            case["position_weight"] = random(PLACES, d)
        if norm:
            case |= dict(norm_weight=1 + 0.3 * random(d), norm_bias=random(d))
        if drop:
            case |= dict(rng=rng, layer=layer, dropout_p=0.3)
        return Sample(name, case | options)

    yield problem("everything")
    yield problem("plain", norm=False, place=False, drop=False)
    yield problem("no_norm", norm=False)
    yield problem("no_place", place=False)
    yield problem("no_drop", drop=False)
    yield problem("no_norm_bias", norm_bias=None)
    # Vectors made elsewhere: row t of the "table" is event t.
    yield problem("identity", v=t, values=None)
    yield problem("identity_plain", v=t, values=None, norm=False, place=False, drop=False)
    yield problem("sparse_rows", v=20 * v)  # most rows of the table have no event
    yield problem("one_event", t=1)
    yield problem("zero_events", t=0)
    yield problem("one_row", v=1)
    for width in (1, 16, 64, 130):
        # Of D = 1 the LayerNorm is its bias: exact zeros that no oracle computes exactly.
        yield problem(f"width_{width}", d=width, norm=width > 1)
    count = 100 if interpret_small else 1200
    yield problem("many_events", t=count, d=16)
    # Runs of equal rows that start, end and go on at every place of a block of sorted events.
    yield problem("few_rows", t=count, v=3, d=16, norm=False, drop=False)
    special = problem("half_masked", t=count, d=16)
    special.kwargs["values"][::2] = v - 1
    yield special
    blocks = problem("whole_blocks", t=96, v=3, d=16, norm=False, drop=False)
    blocks.kwargs["values"] = torch.arange(96, device=device) // 32
    yield blocks


def _private(device: str, op: str) -> Iterator[tuple]:
    for dtype, norm in ((torch.float32, True), (torch.bfloat16, False)):
        g = generator(op, device)
        weight, places, grad = (
            torch.randn(5, 18, generator=g, device=device).to(dtype) for _ in range(3)
        )
        values = torch.tensor([4, 0, 4, 1, 1], device=device)
        key = events("private", 5, device)
        scale = torch.randn(18, generator=g, device=device) if norm else None
        mean = torch.randn(5 if norm else 0, generator=g, device=device)
        inputs = (values, weight, places, scale, scale)
        mask = Mask(positions=key["positions"])
        if norm:
            seed = torch.tensor([9, 4], device=device)
            mask = Mask(key["keys"], key["positions"], seed, 77, 2, 1)
        if op.endswith("_fwd"):
            yield *inputs, 1e-5, *mask
            yield None, weight, None, scale, None, 1e-5, *mask
        elif op.endswith("_bwd"):
            yield grad, *inputs, mean, mean.abs() + 0.5, *mask
        else:
            yield grad.float(), values, 7, dtype


OP = Op(
    "jagged_embedding",
    fastrec.jagged_embedding,
    jagged_embedding_ref,
    _samples,
    differentiable=("weight", "position_weight", "norm_weight", "norm_bias"),
    private=("jagged_embedding_fwd", "jagged_embedding_bwd", "jagged_embedding_scatter"),
    private_samples=_private,
    per_row=("values", "keys", "positions"),
    representative=("everything", "plain"),
    complete=("everything",),
    many_tasks=("many_events", "few_rows", "half_masked"),
    refuses={("triton", "float64"): "float64"},
)
