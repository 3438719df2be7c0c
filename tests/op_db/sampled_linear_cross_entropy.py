# SPDX-License-Identifier: Apache-2.0
"""Samples of sampled_linear_cross_entropy.

Legend: N scored rows, V items, D width, K negatives, T rows of `input` before selection.
"""

from collections.abc import Iterator

import torch

import fastrec
from fastrec.ops.sampled_linear_cross_entropy import sampled_linear_cross_entropy_ref
from op_db.case import Op, Sample, Types, generator, split_band


class _Dense(torch.autograd.Function):
    """The gradient of the table as a dense tensor, so that sparse ones can be compared."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad.to_dense() if grad.is_sparse else grad


def _dense(function):
    def call(**kwargs):
        if kwargs.get("sparse_grad"):
            for name in ("linear_weight", "linear_bias"):
                if kwargs.get(name) is not None:
                    kwargs[name] = _Dense.apply(kwargs[name])
        return function(**kwargs)

    return call


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    def problem(name, n, v, d, k, own=True, **options):
        g = generator(name, device)
        x = torch.randn(n, d, generator=g, device=device).to(types.input)
        w = (torch.randn(v, d, generator=g, device=device) * d**-0.5).to(types.table)
        y = torch.randint(v, (n,), generator=g, device=device)
        drawn = torch.randint(v, (n, k) if own else (k,), generator=g, device=device)
        return dict(input=x, linear_weight=w, target=y, negatives=drawn, **options)

    def vector(name, v, dtype=None):
        g = generator(name, device)
        return torch.randn(v, generator=g, device=device).to(dtype or types.table)

    accumulate = torch.float64 if types.input == torch.float64 else torch.float32
    n, v, d, k = (7, 45, 20, 19) if interpret_small else (63, 1009, 50, 101)
    forms = {"own": True, "shared": False}

    sizes = {
        "one_row": (1, v, d, k),
        "one_negative": (n, v, d, 1),
        "width_1": (n, v, 1, k),
        "width_64": (n, v, 64, k),
        "width_130": (n, v, 130, k),
        "width_300": (n, v, 300, k),
        "whole_lines": (n, v, 32, 64),
        "many_rows": (130 if interpret_small else 507, v, d, k),  # several tiles of rows
        "many_negatives": (n, v, 16, 5 * k),
        # Ids of more bits than one pass of the sort on cpp.
        "large_table": (n, (10 if interpret_small else 20) * v, 8, k),
    }
    for form, own in forms.items():
        for name, size in sizes.items():
            yield Sample(f"{name}_{form}", problem(name, *size, own=own))
        for reduction in ("mean", "none"):
            name = f"zero_rows_{reduction}_{form}"
            yield Sample(name, problem(name, 0, v, d, k, own, reduction=reduction))

        # Few items: hits, repeated negatives, long sums of a row of the table.
        yield Sample(f"few_items_{form}", problem("few_items", 3 * n, 5, d, k, own))
        case = problem("one_target", 3 * n, v, d, k, own)
        case["target"].fill_(v - 1)
        yield Sample(f"one_target_{form}", case)
        # Nothing but hits in every row, and in the row 3.
        case = problem("all_hits", n, v, d, k, own, reduction="none")
        case["target"].fill_(v // 2)
        case["negatives"].fill_(v // 2)
        why = "loss and gradients are exactly 0, differences of numbers of these sizes"
        floor = {
            "output": case["input"].double().norm(dim=1).max().item() * 3,
            "input": case["linear_weight"].abs().max().item(),
            "linear_weight": case["input"].double().abs().sum(0).max().item(),
        }
        yield Sample(f"all_hits_{form}", case, floor, why)
        case = problem("some_hits", n, v, d, k, own, reduction="none")
        if own:
            case["negatives"][3] = case["target"][3]
        else:
            case["negatives"][::2] = case["target"][3]
        most = case["input"].double().abs().sum(0).max().item()
        why = "one item takes most of the probability of every row: sums of this size that cancel"
        yield Sample(f"some_hits_{form}", case, {"linear_weight": most}, why)

        # Everything that a call can say, for each loss and reduction.
        options = dict(
            linear_bias=vector("bias", v),
            log_q=torch.log_softmax(2 * vector("log_q", v, accumulate), 0),
            weight=vector("weight", v, accumulate).abs() + 0.1,
        )
        t = 2 * n + 3
        picked = torch.randint(t, (n,), generator=generator("rows", device), device=device)
        picked[:3] = picked[0]
        for loss in ("softmax", "bce", "gbce"):
            for reduction in ("mean", "sum", "none"):
                name = f"everything_{loss}_{reduction}_{form}"
                case = problem(name, t, v, d, k, own, loss=loss, reduction=reduction, **options)
                case["target"] = case["target"][:n].clone()
                case["target"][n // 2] = -100
                case["negatives"] = case["negatives"][:n].clone() if own else case["negatives"]
                yield Sample(name, case | {"rows": picked})
        yield Sample(f"bias_{form}", problem("bias", n, v, d, k, own, linear_bias=vector("b", v)))
        log_q = options["log_q"]
        yield Sample(f"log_q_{form}", problem("log_q", n, v, d, k, own, log_q=log_q))
        yield Sample(f"gbce_t1_{form}", problem("t1", n, v, d, k, own, loss="gbce", gbce_t=1.0))
        for loss in ("softmax", "bce"):
            case = problem("sparse", n, v, d, k, own, loss=loss, sparse_grad=True)
            case["target"][1] = -100
            yield Sample(f"sparse_{loss}_{form}", case | {"linear_bias": options["linear_bias"]})

        # Selection of rows; ignored rows.
        mask = torch.arange(t, device=device) % 3 == 1
        case = problem("rows_bool", t, v, d, k, own, rows=mask, reduction="none")
        case["target"][4] = -100
        case["target"].masked_fill_(~mask, -100)
        yield Sample(f"rows_bool_{form}", case)
        case = problem("all_ignored", n, v, d, k, own)
        case["target"].fill_(-100)
        yield Sample(f"all_ignored_{form}", case)
        case = problem("ignore_item_0", n, v, d, k, own, ignore_index=0, reduction="sum")
        case["target"][1::4] = 0
        yield Sample(f"ignore_item_0_{form}", case)

        # Scores of +-1e4, exact in every dtype, of two signs of rows.
        floor = {"output": 20480.0 * n, "input": 10240.0 * 80, "linear_weight": 10240.0 * 128}
        for loss in ("softmax", "bce"):
            case = problem("extreme", n, v, d, k, own, loss=loss, reduction="sum")
            x, w = torch.zeros_like(case["input"]), torch.zeros_like(case["linear_weight"])
            x[:, 0], w[:, 0] = 128.0, -80.0
            w[::2, 0] = 80.0
            x[1::2] *= -1
            yield Sample(
                f"extreme_{loss}_{form}",
                case | {"input": x, "linear_weight": w},
                floor=floor if types.input == torch.float64 else {},
                why="the oracle itself takes differences of numbers of size 1e4"
                if types.input == torch.float64
                else "",
            )


def _private(device: str, op: str) -> Iterator[tuple]:
    """Arguments of the private ops; autograd sits above them, so nothing requires a gradient."""
    g = torch.Generator(device).manual_seed(0)
    y = torch.tensor([0, 6, -1, 3, 3], device=device)
    for dtype, own, beta in (
        (torch.float32, True, -1.0),
        (torch.float32, False, -1.0),
        (torch.bfloat16, True, 0.5),
        (torch.bfloat16, False, 0.5),
    ):
        x = torch.randn(5, 6, generator=g, device=device).to(dtype)
        w = torch.randn(7, 6, generator=g, device=device).to(dtype)
        bias = torch.randn(7, generator=g, device=device).to(dtype) if own else None
        log_q = None if own else torch.randn(7, generator=g, device=device)
        drawn = torch.randint(7, (5, 4) if own else (4,), generator=g, device=device)
        inputs = (x, w, bias, log_q, y, drawn)
        if op.endswith("_fwd"):
            yield *inputs, beta, True, True
            yield *inputs, beta, False, False
        else:
            fwd = torch.ops.fastrec.sampled_linear_cross_entropy_fwd
            loss, _, *grads = fwd(*inputs, beta, True, True)
            for sparse in (False, True):
                yield *inputs, *grads, torch.ones_like(loss), beta, sparse


def _rounding_band(backend: str, sample: Sample) -> float:
    """As in linear_cross_entropy: products of shared negatives take rounded or split operands on
    triton; those of own negatives are sums of float32."""
    input, table = sample.kwargs["input"], sample.kwargs["linear_weight"]
    if backend == "triton" and table.dtype != input.dtype:
        return torch.finfo(input.dtype).eps
    own = sample.kwargs["negatives"].dim() == 2
    return 0.0 if own else split_band(backend, input, table)


_FULL = tuple(
    f"everything_{case}" for case in ("bce_mean_own", "softmax_none_own", "softmax_mean_shared")
)

OP = Op(
    "sampled_linear_cross_entropy",
    _dense(fastrec.sampled_linear_cross_entropy),
    _dense(sampled_linear_cross_entropy_ref),
    _samples,
    differentiable=("input", "linear_weight", "linear_bias"),
    private=("sampled_linear_cross_entropy_fwd", "sampled_linear_cross_entropy_bwd"),
    private_samples=_private,
    representative=(*_FULL, "everything_gbce_none_shared", "some_hits_own"),
    complete=_FULL,
    many_tasks=("many_rows_own", "many_rows_shared", "few_items_own", "many_negatives_shared"),
    refuses={("triton", "float64"): "float64"},
    rounding_band=_rounding_band,
)
