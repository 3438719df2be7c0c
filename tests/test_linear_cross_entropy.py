"""What the generated tests of linear_cross_entropy cannot express: an exact table, PyTorch's own
loss, error texts, dtype rules, autocast, sizes beyond 2^31 and peak memory."""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_db.case import Sample, excess, promote, run

from fastrec import linear_cross_entropy
from fastrec.backend import unavailable_reason
from fastrec.ops.linear_cross_entropy import linear_cross_entropy_ref
from fastrec.ops.linear_cross_entropy_autograd import PlainLoss

OP = "linear_cross_entropy"
NAMES = ("input", "linear_weight", "linear_bias")


def backends(*names):
    cpu = torch.device("cpu")
    return pytest.mark.parametrize(
        "backend",
        [
            pytest.param(
                name,
                marks=pytest.mark.skipif(
                    unavailable_reason(name, OP, cpu) is not None,
                    reason=str(unavailable_reason(name, OP, cpu)),
                ),
            )
            for name in names
        ],
    )


every_backend = backends("reference", "cpp")
cpp = backends("cpp")


def problem(n=4, v=5, d=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(n + v + d)
    return {
        "input": torch.randn(n, d, generator=g).to(dtype),
        "linear_weight": torch.randn(v, d, generator=g).to(dtype),
        "target": torch.randint(v, (n,), generator=g),
    }


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

    got = run(function, Sample("table", case), NAMES, torch.ones(3, dtype=dtype))
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
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(target=[0, 5, 1, 1]), IndexError, r"target\[1\] is 5, expected .* \[0, 5\)"),
        (dict(target=[0, 1, 1, -1]), IndexError, r"target\[3\] is -1, expected .* \[0, 5\)"),
        (dict(target=[0, 1, 1, -100], ignore_index=0), IndexError, r"target\[3\] is -100"),
        (dict(target=[0, 1, 2**40, 1]), IndexError, rf"target\[2\] is {2**40}"),
        (dict(rows=[0, 4, 1, 1]), IndexError, r"rows\[1\] is 4, expected .* \[0, 4\)"),
        (dict(rows=[0, 1, 1, -1]), IndexError, r"rows\[3\] is -1"),
        (dict(input=torch.zeros(4)), ValueError, r"input must be \[rows, D\].* got \[4\]"),
        (dict(input=torch.zeros(4, 2)), ValueError, r"got \[4, 2\] and \[5, 3\]"),
        (dict(linear_weight=torch.zeros(5, 3, 1)), ValueError, r"and \[5, 3, 1\]"),
        (dict(linear_weight=torch.zeros(0, 3)), ValueError, "no item to score"),
        (dict(target=[0, 1]), ValueError, r"target must be \[4\].* got \[2\]"),
        (dict(rows=[0, 1]), ValueError, r"target must be \[2\].* got \[4\]"),
        (dict(rows=torch.ones(3, dtype=torch.bool)), ValueError, r"mask must be \[4\].* \[3\]"),
        (dict(linear_bias=torch.zeros(4)), ValueError, r"linear_bias must be \[5\], got \[4\]"),
        (dict(weight=torch.zeros(5, 1)), ValueError, r"weight must be \[5\], got \[5, 1\]"),
        (dict(reduction="avg"), ValueError, "'none', 'mean' or 'sum', got 'avg'"),
        (dict(label_smoothing=1.5), ValueError, r"in \[0, 1\], got 1.5"),
        (dict(label_smoothing=-0.1), ValueError, r"in \[0, 1\], got -0.1"),
        (dict(target=torch.zeros(4, dtype=torch.int32)), TypeError, "int64 item ids, got .*int32"),
        (dict(target=torch.zeros(4)), TypeError, "int64 item ids, got .*float32"),
        (dict(input=torch.zeros(4, 3, dtype=torch.int64)), TypeError, "input must be a floating"),
        (dict(linear_weight=torch.zeros(5, 3, dtype=torch.int8)), TypeError, "linear_weight must"),
        (dict(rows=torch.zeros(4, dtype=torch.int32)), TypeError, "rows must be int64 .*int32"),
        (dict(input=torch.zeros(4, 3, dtype=torch.float64)), TypeError, "linear_weight"),
        (dict(linear_weight=torch.zeros(5, 3, dtype=torch.bfloat16)), TypeError, "linear_weight"),
        (dict(linear_bias=torch.zeros(5, dtype=torch.int64)), TypeError, "linear_bias"),
    ],
)
def test_wrong_arguments(backend, change, error, message):
    change = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in change.items()}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(problem() | change), backend=backend)


def test_ignored_targets_are_not_range_checked():
    case = problem()
    case["target"][1] = 10**9
    assert linear_cross_entropy(**case, ignore_index=10**9).isfinite()


LOW = (torch.bfloat16, torch.float16)


@every_backend
@pytest.mark.parametrize(
    "input, table, bias, output",
    [
        (torch.float64, torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float32, torch.float32),
        *((low, low, low, torch.float32) for low in LOW),
        *((low, torch.float32, torch.float32, torch.float32) for low in LOW),
        *((low, low, torch.float32, torch.float32) for low in LOW),
    ],
)
def test_dtypes(backend, input, table, bias, output):
    case = problem()
    case["input"], case["linear_weight"] = case["input"].to(input), case["linear_weight"].to(table)
    case["linear_bias"] = torch.zeros(5, dtype=bias)
    for reduction in ("none", "mean"):
        got = run(
            lambda reduction=reduction, **kwargs: linear_cross_entropy(
                **kwargs, reduction=reduction, backend=backend
            ),
            Sample("dtypes", case),
            NAMES,
        )
        assert got["output"].dtype == output
        assert [got[name].dtype for name in NAMES] == [input, table, bias]


@every_backend
@pytest.mark.parametrize("input", [torch.float32, torch.bfloat16])
def test_autocast(backend, input):
    """Under autocast float32 activations are cast, the table stays float32: the same result as the
    cast written out, and gradients in the dtype of their tensors."""
    case = problem(20, 31, 8)
    case["input"] = case["input"].to(input)

    def cast(input, **kwargs):
        return linear_cross_entropy(input.to(torch.bfloat16), **kwargs, backend=backend)

    def automatic(**kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(**kwargs, backend=backend)

    expected = run(cast, Sample("autocast", case), NAMES)
    got = run(automatic, Sample("autocast", case), NAMES)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
    assert got["output"].dtype == torch.float32
    assert got["input"].dtype == input and got["linear_weight"].dtype == torch.float32


@every_backend
def test_autocast_leaves_float64_alone(backend):
    case = problem(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(**case, backend=backend)
    assert loss.dtype == torch.float64
    assert loss == linear_cross_entropy(**case, backend=backend)


@cpp
def test_second_derivative_is_refused(backend):
    case = problem()
    x = case["input"].requires_grad_()
    loss = linear_cross_entropy(**case, backend=backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad|once_differentiable"):
        grad.sum().backward()


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


@pytest.mark.slow
@cpp
def test_logits_beyond_2_to_the_31(backend):
    """N V > 2^31, with targets at both ends of the table: the width is 1, so that the logits of row
    i are x_i w and the sum over the items is a table of few values."""
    torch.set_num_threads(2)
    n, v = 1100, 2_000_000
    values = torch.tensor([-1.0, 0.5, 2.0, 0.0])
    w = values[torch.arange(v) % 4][:, None].requires_grad_()
    x = torch.linspace(-1, 1, n)[:, None].requires_grad_()
    y = torch.where(torch.arange(n) % 2 == 0, v - 1 - torch.arange(n), torch.arange(n))
    loss = linear_cross_entropy(x, w, y, reduction="none", backend=backend)
    logits = x.detach().double() * values.double()
    lse = torch.logsumexp(logits, 1) + math.log(v / 4)
    target_logit = (x.detach().double() * w.detach().double()[y])[:, 0]
    torch.testing.assert_close(loss.double(), lse - target_logit, rtol=1e-6, atol=1e-5)
    loss.sum().backward()
    p = torch.softmax(logits, 1)  # [N, 4], shared by v / 4 items each
    grad_x = (p * values).sum(1) - w.detach().double()[y, 0]
    torch.testing.assert_close(x.grad[:, 0].double(), grad_x, rtol=1e-5, atol=1e-5)
    grad_w = ((p / (v / 4)).T @ x.detach().double())[torch.arange(v) % 4, 0]
    grad_w = grad_w.index_add(0, y, -x.detach().double()[:, 0])
    torch.testing.assert_close(w.grad[:, 0].double(), grad_w, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@cpp
def test_table_beyond_2_to_the_31(backend):
    """V D > 2^31: a bfloat16 table of 4.3 GB whose rows beyond the limit differ from the others."""
    torch.set_num_threads(2)
    v, d = 33_600_000, 64
    assert v * d > 2**31
    w = torch.zeros(v, d, dtype=torch.bfloat16)
    w[-4:] = 0.25
    x = torch.full((2, d), 1.0, dtype=torch.bfloat16)
    target = torch.tensor([v - 1, 0])
    with torch.no_grad():
        loss = linear_cross_entropy(x, w, target, reduction="none", backend=backend)
    lse = math.log(v - 4 + 4 * math.exp(16.0))
    assert loss.tolist() == pytest.approx([lse - 16, lse], rel=1e-6)


PEAK = """
    import torch
    from fastrec import linear_cross_entropy

    torch.set_num_threads(2)

    def status(key):
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    def step(n, v, d):
        x = torch.randn(n, d, requires_grad=True)
        w = torch.randn(v, d, requires_grad=True)
        y = torch.randint(v, (n,))
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
        before = status("VmRSS")
        linear_cross_entropy(x, w, y, backend="cpp").backward()
        return status("VmHWM") - before - w.grad.nbytes - x.grad.nbytes

    step(64, 64, 16)
    print(step({n}, {v}, {d}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@cpp
def test_no_buffer_of_the_size_of_the_logits(backend):
    """Peak memory of forward and backward beyond the gradients, against the logits of 1.6 GB."""
    n, v, d = 4000, 100_000, 8
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK.format(n=n, v=v, d=d))],
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 0.02 * n * v * 4


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
    for out in outputs:
        assert torch.equal(out[ignored], torch.zeros_like(out[ignored]))
    kept = [i for i in range(6) if i not in ignored]
    alone = op.linear_cross_entropy_fwd(x[kept], w, None, y[kept], True)
    for got, expected in zip(outputs, alone, strict=True):
        torch.testing.assert_close(got[kept], expected)
    lse, ones = outputs[0], torch.ones(6)
    grad, _ = op.linear_cross_entropy_bwd(x, w, None, y, lse, ones, -ones)
    expected, _ = op.linear_cross_entropy_bwd(
        x[kept], w, None, y[kept], lse[kept], ones[kept], -ones[kept]
    )
    torch.testing.assert_close(grad, expected)


def test_no_gradients_are_computed_under_no_grad(monkeypatch):
    """autograd.Function reports needs_input_grad from the tensors, whatever the grad mode is."""
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y = torch.tensor([0, 4, 2])
    expected = linear_cross_entropy(x, w, y, backend="reference").detach()
    monkeypatch.setattr(PlainLoss, "apply", lambda *_: pytest.fail("gradients in evaluation"))
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, w, y), expected)
