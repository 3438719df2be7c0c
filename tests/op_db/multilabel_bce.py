# SPDX-License-Identifier: Apache-2.0
"""Samples of multilabel_bce.

Legend: N rows, A labels, D width, L lists of labels, E listed labels.
"""

import math
from collections.abc import Iterator

import torch

import fastrec
from fastrec.ops.multilabel_bce import multilabel_bce_ref
from op_db.case import Op, Sample, Types, generator, split_band


def label_lists(name, device, lists, a, most):
    """Lists of 0 to `most` labels that rise; the first list also has both ends."""
    g = generator(name + "lists", device)
    lengths = torch.randint(most + 1, (lists,), generator=g, device=device).clamp_max(a)
    rows = [torch.randperm(a, generator=g, device=device)[:n] for n in lengths.tolist()]
    if rows:
        rows[0] = torch.cat([rows[0], torch.tensor([0, a - 1], device=device)]).unique()
    offsets = torch.tensor([0] + [len(row) for row in rows], device=device).cumsum(0)
    values = torch.cat([row.sort().values for row in rows]) if rows else offsets[:0]
    return dict(label_values=values, label_offsets=offsets)


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    # Below, just below and above the tiles of rows, labels and width.
    n, a, d = (7, 45, 20) if interpret_small else (63, 509, 50)

    def problem(name, n=n, a=a, d=d, most=5, lists=None, **options):
        g = generator(name, device)
        x = torch.randn(n, d, generator=g, device=device)
        w = torch.randn(a, d, generator=g, device=device) * 2 * d**-0.5
        case = dict(input=x.to(types.input), linear_weight=w.to(types.table))
        case |= label_lists(name, device, n if lists is None else lists, a, most)
        if lists is not None:
            case["label_rows"] = torch.randint(max(lists, 1), (n,), generator=g, device=device)
        return case | options

    g = generator("bias", device)
    bias = torch.randn(a, generator=g, device=device).to(types.table)
    sizes = {
        "one_row": (1, a, d),
        "many_rows": (70, 20, d) if interpret_small else (3301, 61, d),
        "one_label": (n, 1, d),
        "one_row_one_label": (1, 1, 1),
        "width_64": (n, a, 64),
        "width_130": (n, a // 2, 130),
        "full_tiles": (64, 128, 16) if interpret_small else (192, 384, 64),
        "many_labels": (n, 5 * a if interpret_small else 4001, 16),
    }
    if not interpret_small and device == "cpu":
        sizes["width_300"] = (n, a // 2, 300)
    for name, size in sizes.items():
        yield Sample(name, problem(name, *size))
    yield Sample("no_row", problem("no_row", 0))
    yield Sample("no_list", problem("no_list", 0, lists=0))

    for reduction in ("mean", "sum", "none"):
        # Rows that share lists, two of them not scored.
        case = problem("everything", lists=5, linear_bias=bias, reduction=reduction)
        case["label_rows"][1::3] = -100
        yield Sample(f"everything_{reduction}", case)
    yield Sample("bias_none", problem("bias_none", linear_bias=bias, reduction="none"))
    yield Sample("no_labels", problem("no_labels", most=0, reduction="none"))
    yield Sample("half_labels", problem("half_labels", most=a, reduction="sum"))
    every = dict(
        label_values=torch.arange(a, device=device).repeat(n),
        label_offsets=torch.arange(n + 1, device=device) * a,
    )
    yield Sample("all_labels", problem("all_labels", reduction="none") | every)
    case = problem("none_scored", lists=3, linear_bias=bias)
    case["label_rows"].fill_(-100)
    yield Sample("none_scored", case)
    hidden = bias.clone()
    hidden[1 : a - 1] = -math.inf
    case = problem("bias_minus_inf", most=0, linear_bias=hidden, reduction="none")
    yield Sample("bias_minus_inf", case)

    # Scores of +-1e4, exact in every dtype, some of them of labels.
    for reduction in ("sum", "none"):
        case = problem("extreme", reduction=reduction)
        x, w = torch.zeros_like(case["input"]), torch.zeros_like(case["linear_weight"])
        x[:, 0], w[:, 0] = 128.0, -80.0
        w[::2, 0] = 80.0
        x[1::2] *= -1
        yield Sample(f"extreme_{reduction}", case | {"input": x, "linear_weight": w})
    # Losses far below the eps of 1: every label is one, and certain, or none is, and certain.
    for name, sign, most in (("certain", 1.0, every), ("certain_none", -1.0, {})):
        case = problem(name, most=0, reduction="none") | most
        x, w = torch.ones_like(case["input"]), torch.zeros_like(case["linear_weight"])
        w[:, 0] = (20 + torch.arange(a, device=device) % 16 / 8) * sign
        if not most:
            case["label_values"], case["label_offsets"] = (
                case["label_values"][:0], case["label_offsets"] * 0
            )  # fmt: skip
        yield Sample(name, case | {"input": x, "linear_weight": w})


def _private(device: str, op: str) -> Iterator[tuple]:
    """Arguments of the private ops; autograd sits above them, so nothing requires a gradient."""
    g = torch.Generator(device).manual_seed(0)
    rows = torch.tensor([0, 2, -1, 1, 2], device=device)
    lists = label_lists("private", device, 3, 7, 3).values()
    for dtype, biased in ((torch.float32, True), (torch.bfloat16, False)):
        x = torch.randn(5, 6, generator=g, device=device).to(dtype)
        w = torch.randn(7, 6, generator=g, device=device).to(dtype)
        bias = torch.randn(7, generator=g, device=device).to(dtype) if biased else None
        inputs = (x, w, bias, *lists, rows)
        if not op.endswith("_bwd"):
            yield *inputs, True
            yield *inputs, False
        else:
            yield *inputs, torch.randn(5, generator=g, device=device)


def _rounding_band(backend: str, sample: Sample) -> float:
    """As in linear_cross_entropy: the products take rounded or split operands on triton."""
    input, table = sample.kwargs["input"], sample.kwargs["linear_weight"]
    if backend == "triton" and table.dtype != input.dtype:
        return torch.finfo(input.dtype).eps
    return split_band(backend, input, table)


_FULL = ("everything_mean", "everything_none")

OP = Op(
    "multilabel_bce",
    fastrec.multilabel_bce,
    multilabel_bce_ref,
    _samples,
    differentiable=("input", "linear_weight", "linear_bias"),
    private=("multilabel_bce_fwd", "multilabel_bce_sum", "multilabel_bce_bwd"),
    private_samples=_private,
    representative=(*_FULL, "half_labels"),
    complete=_FULL,
    many_tasks=("many_rows", "many_labels"),
    refuses={("triton", "float64"): "float64"},
    rounding_band=_rounding_band,
)
