# SPDX-License-Identifier: Apache-2.0
"""Arguments of linear_cross_entropy: shapes, dtype rules, autocast, what needs a gradient. Wrong
ones are those of test_wrong_arguments.py."""

import pytest
import torch
from backends import backends
from item_problem import NAMES, every_backend, problem
from op_db.case import Sample, run

from fastrec import linear_cross_entropy
from fastrec.ops.common.linear_cross_entropy_autograd import PlainLoss


@every_backend
def test_only_ignore_index_is_ignored(backend):
    case = problem() | dict(target=torch.tensor([0, 1, 1, -100]), ignore_index=0)
    with pytest.raises(IndexError, match=r"target\[3\] is -100, expected a value in \[0, 5\)"):
        linear_cross_entropy(**case, backend=backend)


@every_backend
@pytest.mark.parametrize("rows", [None, torch.eye(2, 3) > 0, torch.tensor([4, 1, 1, 5])])
def test_leading_dimensions_are_rows(backend, rows):
    """[..., D] beside targets [...]: the losses of the rows, in the shape of the targets."""
    case = problem(6) | dict(rows=rows, reduction="none", backend=backend)
    if rows is not None and rows.dtype == torch.int64:
        case["target"] = case["target"][:4]
    flat = linear_cross_entropy(**case | dict(rows=None if rows is None else rows.flatten()))
    case["input"] = case["input"].view(2, 3, 3)
    if rows is None or rows.dtype == torch.bool:
        case["target"] = case["target"].view(2, 3)
    loss = linear_cross_entropy(**case)
    assert loss.shape == case["target"].shape and torch.equal(loss.flatten(), flat)
    assert linear_cross_entropy(**case | dict(reduction="sum")).shape == ()


def test_one_row_without_other_dimensions():
    case = problem(1)
    loss = linear_cross_entropy(case["input"][0], case["linear_weight"], case["target"][0])
    torch.testing.assert_close(loss, linear_cross_entropy(**case))


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


def test_smoothed_classes_are_summed_alike_by_any_number_of_threads():
    """torch splits a sum of more than 32,768 numbers among its threads."""
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    items = 100_003
    table = torch.randn(items, 4, generator=generator)
    users = torch.randn(9, 4, generator=generator)
    weights = torch.rand(6, items, generator=generator)
    found: list = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([
                linear_cross_entropy(
                    users, table, torch.arange(9), weight=weight, label_smoothing=0.3,
                    reduction="none",
                )
                for weight in weights
            ])  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)
