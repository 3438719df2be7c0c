# SPDX-License-Identifier: Apache-2.0
"""Samples of jagged_attention.

Legend: B sequences, T events, H heads, D head width.
"""

from collections.abc import Iterator

import torch

from fastrec.ops.common.dropout import Mask
from fastrec.ops.jagged_attention import jagged_attention, jagged_attention_ref
from fastrec.random import Rng
from op_db.case import TYPES, Op, Sample, Types, generator, split_band


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    width = 6 if interpret_small else 20  # a tail of every vector and tile

    def problem(name, lengths, heads=2, width=width, **options):
        g = generator(name, device)
        offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
        shape = (int(offsets[-1]), heads, width)
        q, k, v = (torch.randn(shape, generator=g, device=device).to(types.input) for _ in range(3))
        longest = max(lengths, default=0)
        return dict(query=q, key=k, value=v, offsets=offsets, max_seq_len=longest) | options

    def dropout(name, lengths, p=0.5, heads=2, width=width, keys=None, layer=0, **options):
        keys = range(len(lengths)) if keys is None else keys
        return problem(
            name,
            lengths,
            heads,
            width,
            dropout_p=p,
            rng=Rng(torch.tensor(2**61 + 12345), torch.tensor(7)),
            keys=torch.tensor(list(keys), device=device),
            layer=layer,
            **options,
        )

    short = [3, 0, 7, 1] if interpret_small else [3, 0, 9, 16, 17, 1, 30, 8, 33, 7, 12, 50]
    for name, lengths in {
        "one_event": [1],
        "one_sequence": [7],
        "no_sequence": [],
        "no_event": [0, 0, 0],
        "empty_sequences": [0, 5, 0, 0, 3, 0],
        "plain": short,
        "equal_lengths": [9, 9, 9],
        "tile_edges": [31, 33] if interpret_small else [31, 32, 33, 47, 48, 49, 63, 64, 65],
        "one_long": [67] if interpret_small else [2, 200, 5],
        "huge_and_tiny": [70, 1] if interpret_small else [1, 521, 1, 128, 129],
        "key_tiles_long": [33, 7] if interpret_small else [479, 480, 481, 9, 963],
    }.items():
        yield Sample(name, problem(name, lengths))
        if "edges" in name or "long" in name:
            yield Sample(f"{name}_causal", problem(name, lengths, causal=True))
            name = f"{name}_dropout_causal"
            yield Sample(name, dropout(name, lengths, causal=True, width=16))
    yield Sample("bound_not_reached", problem("bound_not_reached", short) | {"max_seq_len": 100})
    yield Sample("causal", problem("causal", short, causal=True))

    yield Sample("dropout", dropout("dropout", short))
    yield Sample("dropout_causal", dropout("dropout_causal", short, p=0.3, causal=True))
    yield Sample("dropout_small", dropout("dropout_small", short, p=0.1, heads=3))
    yield Sample("dropout_almost_all", dropout("dropout_almost_all", short, p=0.99))
    yield Sample("dropout_below_1_512", dropout("dropout_below_1_512", short, p=0.0019))
    yield Sample("repeated_keys", dropout("repeated_keys", [5, 9, 5, 5], keys=[7, 7, 3, 7]))
    keys = [-1, 2**32 + 5, 65535 << 32, 5]
    case = dropout("large_keys", [4, 4, 17, 4], keys=keys, layer=255)
    yield Sample("large_keys", case | {"rng": Rng(-5, 2**40 + 1)})

    for name, scale in {"scale_1": 1.0, "scale_negative": -0.7, "scale_0": 0.0}.items():
        yield Sample(name, problem(name, short, scale=scale))
    for width in (1, 8, 16, 33, 64, 130, 256):
        name = f"width_{width}"
        lengths = [5, 2] if interpret_small else [9, 35, 2]
        yield Sample(name, dropout(name, lengths, heads=1 if width > 32 else 4, width=width))

    # Query, key and value as views of one packed tensor, and of one with the heads outside.
    case = dropout("packed", short, width=16)
    packed = torch.stack([case[name] for name in ("query", "key", "value")], 1)
    yield Sample(
        "packed", case | dict(zip(("query", "key", "value"), packed.unbind(1), strict=True))
    )
    outside = {n: case[n].transpose(0, 1).contiguous().transpose(0, 1) for n in ("query", "key")}
    yield Sample("heads_outside", case | outside)

    # Scores of +-10,240, exact in every dtype: one, two or all but those keys share the maximum.
    for name, top in (("extreme_single", 1), ("extreme_tied", 2)):
        case = problem(name, [6, 40] if interpret_small else [6, 40, 100], width=16, scale=1.0)
        q, k = torch.zeros_like(case["query"]), torch.zeros_like(case["key"])
        q[..., 0], k[..., 0] = 128.0, -80.0
        q[1::2] *= -1
        for start in case["offsets"][:-1].tolist():
            k[start : start + top, :, 0] = 80.0
        case |= {"query": q, "key": k}
        size = 10240.0 if types.input == torch.float64 else 8.0
        yield Sample(
            name,
            case,
            floor={"query": size * 80, "key": size * 128},
            why="dS = P (dP - delta), a difference of numbers of size 8, times K (Q); the float64"
            " oracle: P = exp(s - lse) inherits the rounding of lse",
        )
    case = problem("peaked", short, width=16)
    yield Sample("peaked", case | {"key": 10 * case["query"]})


def _private(device: str, op: str) -> Iterator[tuple]:
    """Arguments of the private ops; autograd sits above them, so nothing requires a gradient."""
    for dtype, drop in ((torch.float32, 128), (torch.bfloat16, 0)):
        g = torch.Generator(device).manual_seed(0)
        q, k, v = (torch.randn(7, 2, 5, generator=g, device=device).to(dtype) for _ in range(3))
        offsets = torch.tensor([0, 3, 3, 7], device=device)
        keys, rng = torch.arange(3, device=device), torch.tensor([5, 9], device=device)
        mask = Mask(keys, None, rng, drop, 1, 1) if drop else Mask()
        common = (offsets, 4, True, 0.4, *mask)
        if op.endswith("_fwd"):
            yield q, k, v, *common
        else:
            out, lse = torch.ops.fastrec.jagged_attention_fwd(q, k, v, *common)
            yield torch.ones_like(q), q, k, v, out, lse, *common


def _rounding_band(backend: str, sample: Sample) -> float:
    """On triton the products of float32 are split."""
    query, key = sample.kwargs["query"], sample.kwargs["key"]
    scale = sample.kwargs.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return split_band(backend, query * scale, key)


OP = Op(
    "jagged_attention",
    jagged_attention,
    jagged_attention_ref,
    _samples,
    differentiable=("query", "key", "value"),
    private=("jagged_attention_fwd", "jagged_attention_bwd"),
    private_samples=_private,
    per_row=("query", "key", "value", "offsets", "keys"),
    representative=("plain", "dropout_causal"),
    complete=("dropout_causal",),
    many_tasks=("huge_and_tiny", "tile_edges_dropout_causal", "key_tiles_long", "packed"),
    types=TYPES[:4],
    refuses={("triton", "float64"): "float64"},
    # The reference reads the lengths on the host.
    compiles=("cpp",),
    rounding_band=_rounding_band,
)
