"""Arguments of linear_cross_entropy: error texts, dtype rules, autocast, what needs a gradient."""

import pytest
import torch
from backends import backends
from item_problem import NAMES, every_backend, problem
from op_db.case import Sample, run

from fastrec import linear_cross_entropy
from fastrec.ops.common.linear_cross_entropy_autograd import PlainLoss


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


def test_no_gradients_are_computed_under_no_grad(monkeypatch):
    """autograd.Function reports needs_input_grad from the tensors, whatever the grad mode is."""
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y = torch.tensor([0, 4, 2])
    expected = linear_cross_entropy(x, w, y, backend="reference").detach()
    monkeypatch.setattr(PlainLoss, "apply", lambda *_: pytest.fail("gradients in evaluation"))
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, w, y), expected)


@backends("linear_cross_entropy", "reference", "cpp")
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_label_smoothing_under_autocast_sums_the_table_in_float32(backend, low):
    """A sum over the items in the low dtype overflows float16 and loses digits in bfloat16."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(16, 32, generator=g), torch.randn(40_000, 32, generator=g) * 0.1
    w[:, 0] += 2.0
    y = torch.randint(40_000, (16,), generator=g)
    x = x.to(low).float()  # what autocast rounds
    grads = {}
    for autocast in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", low, enabled=autocast):
            loss = linear_cross_entropy(leaf, w, y, label_smoothing=1.0, backend=backend)
            loss.backward()
        grads[autocast] = torch.cat([loss.detach()[None], leaf.grad.flatten()])
    torch.testing.assert_close(grads[True], grads[False], rtol=2**-7, atol=2e-3)
