# SPDX-License-Identifier: Apache-2.0
"""What the generated tests of linear_cross_entropy cannot express: an exact table, PyTorch's own
loss, what is exactly zero, any shape, the contract of the kernels."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from item_problem import NAMES, cpp, every_backend, problem
from op_db.case import Sample, excess, promote, run

from fastrec import (
    in_batch_cross_entropy,
    linear_cross_entropy,
    sampled_linear_cross_entropy,
)
from fastrec.ops.linear_cross_entropy import linear_cross_entropy_ref

# With W = diag(ln 2, ln 3), the unit rows e_0, e_1 and 0 as input have the probabilities below.
LN2, LN3 = math.log(2.0), math.log(3.0)


def exact_problem(dtype=torch.float64):
    return {
        "input": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=dtype),
        "linear_weight": torch.tensor([[LN2, 0.0], [0.0, LN3]], dtype=dtype),
        "target": torch.tensor([0, 0, 1]),
    }


# Rows: p = (2/3, 1/3), (1/4, 3/4), (1/2, 1/2); lse = ln 3, ln 4, ln 2; y = 0, 0, 1.
LOSS = [math.log(1.5), math.log(4.0), math.log(2.0)]
GRAD_INPUT = [  # (p - onehot) W
    [-LN2 / 3, LN3 / 3],
    [-3 / 4 * LN2, 3 / 4 * LN3],
    [LN2 / 2, -LN3 / 2],
]
GRAD_WEIGHT = [[-1 / 3, -3 / 4], [1 / 3, 3 / 4]]  # (p - onehot)^T x; the third row is x = 0
GRAD_BIAS = [-1 / 3 - 3 / 4 + 1 / 2, 1 / 3 + 3 / 4 - 1 / 2]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hand_computed_table(backend, dtype):
    case = exact_problem(dtype) | {"linear_bias": torch.zeros(2, dtype=dtype)}

    def function(**kwargs):
        return linear_cross_entropy(**kwargs, reduction="none", backend=backend)

    got = run(function, Sample("table", case), NAMES, {"output": torch.ones(3, dtype=dtype)})
    expected = {
        "output": LOSS,
        "input": GRAD_INPUT,
        "linear_weight": GRAD_WEIGHT,
        "linear_bias": GRAD_BIAS,
    }
    for name, values in expected.items():
        torch.testing.assert_close(got[name], torch.tensor(values, dtype=dtype), msg=name)


@every_backend
@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(), sum(LOSS) / 3),
        (dict(reduction="sum"), sum(LOSS)),
        (dict(weight=[1.0, 2.0]), (LOSS[0] + LOSS[1] + 2 * LOSS[2]) / 4),
        (dict(weight=[0.0, 2.0]), LOSS[2]),
        (dict(z_loss=0.5, reduction="sum"), sum(LOSS) + 0.5 * (LN3**2 + 4 * LN2**2 + LN2**2)),
        # Smoothing 1 is the mean over the items of lse - s: each row's own two losses, halved.
        (
            dict(label_smoothing=1.0, reduction="sum"),
            (LOSS[0] + LN3) / 2 + (LOSS[1] + math.log(4 / 3)) / 2 + LN2,
        ),
        (dict(rows=torch.tensor([1]), target=torch.tensor([1])), math.log(4 / 3)),
        (dict(rows=torch.tensor([False, True, False])), LOSS[1]),
        (dict(ignore_index=0), LOSS[2]),
        (dict(linear_bias=[-math.inf, 0.0], target=torch.tensor([1, 1, 1])), 0.0),
        (dict(linear_bias=[LN3, LN2], rows=torch.tensor([2]), target=torch.tensor([0])), None),
    ],
)
def test_hand_computed_options(backend, options, expected):
    if expected is None:
        expected = math.log(5 / 3)
    options = {
        key: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
        for key, value in options.items()
    }
    loss = linear_cross_entropy(**(exact_problem() | options), backend=backend)
    assert loss.item() == pytest.approx(expected, rel=1e-14, abs=1e-15)


@every_backend
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_equals_torch_cross_entropy(backend, reduction, label_smoothing, weighted, ignore_index):
    case = problem(40, 11, 6, torch.float64)
    bias = torch.randn(11, dtype=torch.float64)
    weight = torch.rand(11, dtype=torch.float64) if weighted else None
    case["target"][::7] = ignore_index
    options = dict(
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )

    def torch_loss(input, linear_weight, target, linear_bias):
        return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)

    def ours(**kwargs):
        return linear_cross_entropy(**kwargs, **options, backend=backend)

    sample = Sample("torch", case | {"linear_bias": bias})
    expected, got = run(torch_loss, sample, NAMES), run(ours, sample, NAMES)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-11, atol=1e-13, msg=name)


@every_backend
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", ["no_rows", "ignored", "empty_index", "empty_mask", "weight_0"])
def test_nothing_scored_is_zero_with_a_live_graph(backend, reduction, kind):
    case = problem()
    if kind == "no_rows":
        case["input"], case["target"] = case["input"][:0], case["target"][:0]
    elif kind == "ignored":
        case["target"] = torch.full_like(case["target"], -100)
    elif kind == "empty_index":
        case["rows"] = case["target"] = torch.empty(0, dtype=torch.int64)
    elif kind == "empty_mask":
        case["rows"] = torch.zeros(4, dtype=torch.bool)
    else:
        case["weight"] = torch.zeros(5)
    x, w = case["input"].requires_grad_(), case["linear_weight"].requires_grad_()
    loss = linear_cross_entropy(**case, reduction=reduction, backend=backend)
    assert loss.requires_grad
    assert torch.equal(loss, torch.zeros_like(loss))
    grads = torch.autograd.grad(loss.sum(), (x, w))
    for grad, leaf in zip(grads, (x, w), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@every_backend
def test_smoothing_of_a_float16_table_with_a_large_column_sum(backend):
    """The sum of the item vectors, 1e5 here, is beyond float16; their mean is not."""
    case = problem(3, 50_000, 2, torch.float16)
    case["linear_weight"] = (case["linear_weight"] * 0.1 + 2).half()
    options = dict(label_smoothing=0.1)
    sample = Sample("large_sum", case | options)
    exact = run(linear_cross_entropy_ref, promote(sample), NAMES)
    low = run(linear_cross_entropy_ref, sample, NAMES)
    got = run(lambda **kw: linear_cross_entropy(**kw, backend=backend), sample, NAMES)
    for name, value in got.items():
        error, budget = excess(value, low[name], exact[name])
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"


@every_backend
def test_smoothing_beside_a_bias_of_minus_inf_leaves_ignored_rows_at_zero(backend):
    bias, target = torch.tensor([0.0, -math.inf, 0.0, 0.0, 0.0]), torch.tensor([0, -100, 2, 3])
    loss = linear_cross_entropy(
        **problem() | {"target": target}, linear_bias=bias, label_smoothing=0.1, reduction="none",
        backend=backend,
    )  # fmt: skip
    assert loss.tolist() == [math.inf, 0.0, math.inf, math.inf]


@cpp
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    n=st.integers(0, 70),
    v=st.integers(1, 140),
    d=st.integers(1, 70),
    ignored=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
)
def test_any_shape(backend, n, v, d, ignored, dtype, bias):
    """No shape reads or writes past a tail: every size around the tiles, in every combination."""
    case = problem(n, v, d, dtype)
    case["target"][::ignored] = -100
    if bias:
        case["linear_bias"] = torch.linspace(-1, 1, v).to(dtype)
    sample = Sample("any_shape", case | {"reduction": "none"})
    exact = run(linear_cross_entropy_ref, promote(sample), NAMES)
    low = run(linear_cross_entropy_ref, sample, NAMES)
    got = run(lambda **kw: linear_cross_entropy(**kw, backend=backend), sample, NAMES)
    size = max(1.0, case["input"].abs().max().item() if n else 1.0)  # one item: exact zeros
    for name, value in got.items():
        error, budget = excess(value, low[name], exact[name], size * n**0.5)
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"


@every_backend
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_a_row_without_a_target_holds_reaches_nothing(backend, smoothing):
    x, w = torch.randn(4, 8), torch.randn(20, 8)
    y, grads = torch.tensor([1, -100, 3, 4]), []
    for value in (0.0, torch.nan, torch.inf):
        x[1] = value
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = linear_cross_entropy(*leaves, y, label_smoothing=smoothing, backend=backend)
        grads.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for other in grads[1:]:
        for plain, found in zip(grads[0], other, strict=True):
            torch.testing.assert_close(found, plain)


@cpp
@pytest.mark.parametrize("ignored", [[1, 4], [0, 1, 2, 3, 4, 5]])
def test_private_op_leaves_rows_that_are_not_scored_at_zero(backend, ignored):
    """The contract of the kernels, below the masks of the public function: target -1 gives zeros
    and takes no part in the gradient, whatever stands in the other arguments of that row."""
    case = problem(6, 9, 4)
    x, w, y = case["input"], case["linear_weight"], case["target"]
    y[ignored] = -1
    op = torch.ops.fastrec
    outputs = op.linear_cross_entropy_fwd(x, w, None, y, True)
    outputs = [outputs[0].T, *outputs[1:]]
    for out in outputs:
        assert torch.equal(out[ignored], torch.zeros_like(out[ignored]))
    kept = [i for i in range(6) if i not in ignored]
    alone = op.linear_cross_entropy_fwd(x[kept], w, None, y[kept], True)
    for got, expected in zip(outputs, [alone[0].T, *alone[1:]], strict=True):
        torch.testing.assert_close(got[kept], expected)
    lse, ones = outputs[0].T, torch.ones(6)
    grad, _ = op.linear_cross_entropy_bwd(x, w, None, y, lse, ones, -ones)
    expected, _ = op.linear_cross_entropy_bwd(
        x[kept], w, None, y[kept], lse[:, kept], ones[kept], -ones[kept]
    )
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, w, y: linear_cross_entropy(x, w, y, weight=w[:, 0].detach().exp()),
        lambda x, w, y: linear_cross_entropy(x, w, y, label_smoothing=0.1, z_loss=1e-3),
        lambda x, w, y: sampled_linear_cross_entropy(x, w, y, y[:3], weight=w[:, 0].detach().exp()),
        lambda x, w, y: in_batch_cross_entropy(x, w, positive=y, similarity="weighted_l2"),
    ],
    ids=["weight", "smoothing_z_loss", "sampled_weight", "in_batch"],
)
def test_bits_of_many_rows_do_not_depend_on_the_number_of_threads(loss):
    """torch splits a sum of more than 32,768 numbers among its threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            bits = []
            for seed in range(3):
                g = torch.Generator().manual_seed(seed)
                x = torch.randn(70_000 + 37 * seed, 8, generator=g, requires_grad=True)
                w = torch.randn(40, 8, generator=g, requires_grad=True)
                value = loss(x, w, torch.randint(40, (len(x),), generator=g))
                value.backward()
                bits += [value.detach()[None], x.grad.flatten(), w.grad.flatten()]
            results.append(torch.cat(bits))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@cpp
def test_products_of_pytorch_go_on_around_those_of_the_kernel(backend):
    """On processors with AMX both set the shapes of the tile registers of a thread."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(300, 200, generator=g, dtype=torch.bfloat16)
    expected, case = a @ a.T, problem(70, 300, 40, torch.bfloat16)
    loss = linear_cross_entropy(**case, backend=backend)
    for _ in range(2):
        assert torch.equal(a @ a.T, expected)
        assert torch.equal(linear_cross_entropy(**case, backend=backend), loss)
