# SPDX-License-Identifier: Apache-2.0
"""Samples of linear_cross_entropy.

Legend: N scored rows, V items, D width, T rows of `input` before selection.
"""

import math
from collections.abc import Iterator

import torch

import fastrec
from fastrec.ops.linear_cross_entropy import linear_cross_entropy_ref
from op_db.case import Op, Sample, Types, generator, split_band


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    low_precision = torch.finfo(types.input).bits == 16

    def problem(name, n, v, d, **options):
        g = generator(name, device)
        x = torch.randn(n, d, generator=g, device=device).to(types.input)
        w = (torch.randn(v, d, generator=g, device=device) * d**-0.5).to(types.table)
        y = torch.randint(v, (n,), generator=g, device=device)
        return dict(input=x, linear_weight=w, target=y, **options)

    def vector(name, v, dtype=None):
        g = generator(name, device)
        return torch.randn(v, generator=g, device=device).to(dtype or types.table)

    def class_weight(name, v):
        accumulate = torch.float64 if types.input == torch.float64 else torch.float32
        return vector(name, v, accumulate).abs() + 0.1

    def aligned(case, logit):
        """Every row has another target, whose score is `logit`."""
        rows, items = len(case["input"]), len(case["linear_weight"])
        g = generator("aligned", device)
        case["target"] = torch.randperm(items, generator=g, device=device)[:rows]
        direction = case["linear_weight"][case["target"]].double()
        direction = direction / direction.square().sum(1, keepdim=True)
        case["input"] = (logit * direction).to(types.input)
        return case

    # One size per kind of tail: below, just below and above the tiles of rows, items and width.
    n, v, d = (7, 45, 20) if interpret_small else (63, 1009, 50)

    # Sizes.
    sizes = {
        "one_row": (1, v, d),
        "many_rows": (35 if interpret_small else 507, v, d),
        "one_item": (n, 1, d),
        "two_items": (n, 2, d),
        "one_row_one_item": (1, 1, 1),
        "width_1": (n, v, 1),
        "width_64": (n, v, 64),
        "width_130": (n, v // 2, 130),
        "width_300": (n, v // 2, 300),  # triton: beyond what a program holds
        "full_tiles": (64, 64, 16) if interpret_small else (128, 1024, 64),
        "many_items": (n, 3 * v, 16),
        # cpp stores the exponentials of 96 rows, of 32 rows, of none.
        "stored_96": (100, v, 16),
        "stored_32": (70, v if interpret_small else 6001, 20),
        "not_stored": (9, v if interpret_small else 32771, 16),
    }
    for name, size in sizes.items():
        case, floor, why = problem(name, *size), {}, ""
        if size[1] == 1:
            logits = case["input"].double() @ case["linear_weight"].double().T
            floor = {
                "output": size[0] * logits.abs().max().item(),
                "input": case["linear_weight"].abs().max().item(),
                "linear_weight": case["input"].double().abs().sum(0).max().item(),
            }
            floor = {key: value / size[0] for key, value in floor.items()}
            why = "p = 1: loss and gradients are exactly 0, differences of numbers of these sizes"
        yield Sample(name, case, floor, why)

    # No scored row: the result is 0 and the graph is alive.
    for reduction in ("mean", "none"):
        name = f"zero_rows_{reduction}"
        yield Sample(name, problem(name, 0, v, d, reduction=reduction))
    for reduction in ("mean", "sum"):
        name = f"all_ignored_{reduction}"
        case = problem(name, n, v, d, reduction=reduction)
        yield Sample(name, case | {"target": torch.full_like(case["target"], -100)})

    # Ignored rows, with the default id, with an id inside the table and with reduction none.
    case = problem("some_ignored", n, v, d)
    case["target"][::3] = -100
    yield Sample("some_ignored", case)
    yield Sample("some_ignored_none", case | {"reduction": "none"})
    case = problem("ignore_item_0", n, v, d, ignore_index=0, reduction="sum")
    case["target"][1::4] = 0
    yield Sample("ignore_item_0", case)

    # Selection of rows.
    t = 2 * n + 3
    case = problem("rows_int64_repeats", t, v, d)
    picked = torch.randint(t, (n,), generator=generator("rows", device), device=device)
    picked[:3] = picked[0]
    yield Sample(
        "rows_int64_repeats", case | {"rows": picked, "target": case["target"][:n].clone()}
    )
    case = problem("rows_bool", t, v, d)
    mask = torch.arange(t, device=device) % 3 == 1
    case["target"][4] = -100
    outside = case["target"].masked_fill(~mask, -100)
    yield Sample("rows_bool", case | {"rows": mask, "target": outside})
    yield Sample("rows_bool_none", case | {"rows": mask, "target": outside, "reduction": "none"})
    yield Sample("rows_bool_empty", case | {"rows": torch.zeros_like(mask)})
    none = torch.empty(0, dtype=torch.int64, device=device)
    yield Sample("rows_int64_empty", case | {"rows": none, "target": none.clone()})

    # Bias. -inf takes an item out of the softmax; no target is such an item.
    bias = vector("bias", v)
    rows = 70  # several tiles
    yield Sample("bias", problem("bias", rows, v, d, linear_bias=bias))
    case = problem("bias_minus_inf", n, v, d)
    out = torch.zeros(v, dtype=torch.bool, device=device)
    out[::5] = True
    out[case["target"]] = False
    yield Sample("bias_minus_inf", case | {"linear_bias": bias.masked_fill(out, -math.inf)})
    # Far higher scores behind the first tile of a program's items than in it.
    case = problem("outgrown", n, 700, 16, reduction="none")
    step = 100.0 * (torch.arange(700, device=device) >= 128)
    yield Sample(
        "outgrown",
        case | {"linear_bias": step.to(types.table)},
        floor={"output": 100.0},
        why="the loss is the difference of two logits of this size",
    )
    # Four rows after whole tiles (of 192 and fewer, and of all chunks) that take no part: a table
    # whose last rows are special tokens.
    for name, items in {"tail_out": 388, "tail_out_not_stored": 32772}.items():
        items = 132 if interpret_small else items
        case = problem(name, n, items, 16)
        case["target"] = case["target"] % (items - 4)
        tail = vector(name, items)
        tail[-4:] = -math.inf
        yield Sample(name, case | {"linear_bias": tail})

    # Class weights, smoothing, z-loss.
    weight = class_weight("class_weight", v)
    holes = weight.clone()
    holes[::2] = 0
    yield Sample("class_weight", problem("class_weight", n, v, d, weight=weight))
    yield Sample("class_weight_zeros", problem("class_weight_zeros", n, v, d, weight=holes))
    yield Sample(
        "class_weight_all_zero",
        problem("class_weight_all_zero", n, v, d, weight=torch.zeros_like(weight)),
    )
    yield Sample("smoothing", problem("smoothing", n, v, d, label_smoothing=0.1))
    yield Sample("smoothing_1", problem("smoothing_1", n, v, d, label_smoothing=1.0))
    yield Sample("z_loss", problem("z_loss", n, v, d, z_loss=1e-2))
    case = problem("smoothing_weight", n, v, d, weight=holes, label_smoothing=0.2)
    case["target"][2::5] = -100
    yield Sample("smoothing_weight", case)
    everything = dict(weight=weight, label_smoothing=0.2, z_loss=1e-2, linear_bias=bias)
    for reduction in ("mean", "sum", "none"):
        name = f"everything_{reduction}"
        case = problem(name, t, v, d, rows=picked, reduction=reduction, **everything)
        case["target"] = case["target"][:n].clone()
        case["target"][n // 2] = -100
        yield Sample(name, case)

    # The same arithmetic beyond what a triton program holds.
    case = problem("width_300_everything", t, v, 300, rows=picked, **everything)
    case["target"] = case["target"][:n].clone()
    case["target"][n // 2] = -100
    yield Sample("width_300_everything", case)

    # Reductions.
    yield Sample("sum", problem("sum", n, v, d, reduction="sum"))
    yield Sample("none", problem("none", n, v, d, reduction="none"))

    # Targets: every item once or more, few items many times, one item always.
    case = problem("duplicate_targets", 3 * n, v, d)
    yield Sample("duplicate_targets", case | {"target": case["target"] % 3})
    case = problem("one_target", 64 if interpret_small else 507, v, d)
    yield Sample("one_target", case | {"target": torch.full_like(case["target"], v - 1)})

    # Logits of +-1e4, exact in every dtype (small integers), so that they carry no rounding that
    # differs between implementations: 2 items, 1 or all others share the maximum; a row is ignored.
    extremes = (("extreme_tied", 2, d), ("extreme_single", 1, d), ("width_300_extreme", 2, 300))
    for name, top, width in (*extremes, ("extreme_none", 2, d)):  # cpp: sums store, none sweeps
        case = problem(name, n, v, width, reduction="none" if name == "extreme_none" else "sum")
        x, w = torch.zeros_like(case["input"]), torch.zeros_like(case["linear_weight"])
        x[:, 0], w[:, 0] = 128.0, -80.0  # -10,240
        w[:top, 0] = 80.0
        x[1::2] *= -1  # these rows see the opposite sign: V - top items share the maximum
        target = torch.arange(n, device=device) % top
        target[1::2] = v - 1
        target[3] = -100
        floor, why = {}, ""
        if types.input == torch.float64:
            floor = {"output": 10240.0 * n, "input": 10240.0 * 80, "linear_weight": 10240.0 * 128}
            why = "the oracle itself, in float64, takes differences of numbers of size 1e4"
        elif low_precision:
            floor = {"output": 10240.0 * n}
            why = "triton: exp2(s log2 e - m log2 e) in one FMA, m log2 e of size 1e4 rounded"
        yield Sample(
            name, case | {"input": x, "linear_weight": w, "target": target}, floor=floor, why=why
        )

    # p_y -> 1: the target row of the table is aligned with the input. In low precision logits of
    # size 16 are rounded by up to 0.06 in the reference, which is its own (large) error.
    for name, logit in (("peaked", 10.0), ("saturated", 64.0)):
        case = aligned(problem(name, n, v, d), logit)
        yield Sample(
            name,
            case,
            floor={
                "output": logit,
                "input": logit * case["linear_weight"].abs().max().item() / n,
                "linear_weight": logit * case["input"].abs().max().item() / n,
            },
            why="the loss is lse - s_y, each as large as the logit; the gradients are differences"
            " of p W and W_y (p x and x), and p inherits the rounding of lse, logit times eps",
        )
    if low_precision:  # 1 - p is below the spacing of bfloat16 at 1: p - 1 must be taken in float32
        case = problem("almost_one", n, v, d, reduction="none")
        yield Sample("almost_one", aligned(case, math.log(v) + 6.5))  # 1 - p is about 0.0015


def _private(device: str, op: str) -> Iterator[tuple]:
    """Arguments of the private ops; autograd sits above them, so nothing requires a gradient."""
    for dtype, bias in ((torch.float32, True), (torch.bfloat16, False)):
        g = torch.Generator(device).manual_seed(0)
        x = torch.randn(5, 6, generator=g, device=device).to(dtype)
        w = torch.randn(7, 6, generator=g, device=device).to(dtype)
        b = torch.randn(7, generator=g, device=device).to(dtype) if bias else None
        y = torch.tensor([0, 6, -1, 3, 3], device=device)
        if op.endswith("_value_and_grad"):
            if dtype == torch.float32:
                yield x, w, b, y.abs(), None, 3, True, True, True
                yield (
                    x,
                    w,
                    None,
                    y,
                    torch.rand(7, generator=g, device=device),
                    -1,
                    False,
                    True,
                    False,
                )
        elif op.endswith("_fwd"):
            yield x, w, b, y, True
            yield x, w, b, y, False
        else:
            lse = torch.logsumexp(x.float() @ w.float().T + (0 if b is None else b.float()), 1)
            both = torch.stack([lse * (y >= 0), torch.zeros_like(lse)])
            yield x, w, b, y, both, torch.ones_like(lse), -torch.ones_like(lse)


def _rounding_band(backend: str, sample: Sample) -> float:
    """Where activations are low-precision and the table float32, the products of triton, and of cpp
    on a processor with AVX512_BF16, take the table and the probabilities rounded to the dtype of
    the activations (one eps of it), though the results are float32."""
    input = sample.kwargs["input"]
    mixed = sample.kwargs["linear_weight"].dtype != input.dtype
    rounds = backend == "triton" or (backend == "cpp" and input.dtype == torch.bfloat16)
    if rounds and mixed:
        return torch.finfo(input.dtype).eps
    return split_band(backend, input, sample.kwargs["linear_weight"])


OP = Op(
    "linear_cross_entropy",
    fastrec.linear_cross_entropy,
    linear_cross_entropy_ref,
    _samples,
    differentiable=("input", "linear_weight", "linear_bias"),
    private=tuple(f"linear_cross_entropy_{part}" for part in ("fwd", "bwd", "value_and_grad")),
    private_samples=_private,
    representative=("some_ignored_none", "everything_mean", "everything_none", "rows_bool"),
    complete=("everything_mean", "everything_none"),
    many_tasks=("many_items", "one_target", "many_rows", "stored_32", "not_stored"),
    refuses={("triton", "float64"): "float64"},
    rounding_band=_rounding_band,
)
