# SPDX-License-Identifier: Apache-2.0
"""What the generated tests of multilabel_bce cannot express: exact values by hand, the function of
PyTorch on dense labels, shared lists, error texts."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import backends, params
from op_db.case import Sample
from op_db.multilabel_bce import OP

from fastrec import multilabel_bce
from fastrec.ops.multilabel_bce import NOT_SCORED

each_backend = backends("multilabel_bce", "reference", "cpp", "triton")
every_backend = backends("multilabel_bce", "reference", "cpp")
LOG3 = math.log(3.0)


def table(**change):
    """Two rows of scores (log 3, 0, -log 3); the first has the labels 0 and 2."""
    case = dict(
        input=torch.ones(2, 1),
        linear_weight=torch.tensor([[LOG3], [0.0], [-LOG3]]),
        label_values=torch.tensor([0, 2]),
        label_offsets=torch.tensor([0, 2, 2]),
    )
    return case | change


def by_hand(backend, *exact):
    """As near as float32 is, and the rounding that the budget of the op adds for a backend."""
    band = OP.rounding_band(backend, Sample("by_hand", table()))
    return pytest.approx(list(exact), rel=1e-6, abs=band * max(map(abs, exact)))


@each_backend
def test_values_by_hand(backend):
    # Probabilities 3/4, 1/2, 1/4.
    first = -math.log(3 / 4) - math.log(1 / 2) - math.log(1 / 4)
    second = -math.log(1 / 4) - math.log(1 / 2) - math.log(3 / 4)
    rows = multilabel_bce(**table(), reduction="none", backend=backend)
    assert rows.tolist() == by_hand(backend, first, second)
    total = multilabel_bce(**table(), reduction="sum", backend=backend)
    assert [total.item()] == by_hand(backend, first + second)
    mean = multilabel_bce(**table(), backend=backend)
    assert [mean.item()] == by_hand(backend, (first + second) / 6)


@each_backend
def test_gradients_by_hand(backend):
    case = table()
    x, w = (case[name].requires_grad_() for name in ("input", "linear_weight"))
    bias = torch.zeros(3, requires_grad=True)
    loss = multilabel_bce(**case, linear_bias=bias, reduction="sum", backend=backend)
    grads = torch.autograd.grad(loss, (x, w, bias))
    # Probability minus label: (-1/4, 1/2, -3/4) and (3/4, 1/2, 1/4).
    assert grads[0].flatten().tolist() == by_hand(backend, LOG3 / 2, LOG3 / 2)
    assert grads[1].flatten().tolist() == by_hand(backend, 0.5, 1.0, -0.5)
    assert grads[2].tolist() == by_hand(backend, 0.5, 1.0, -0.5)


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_is_the_function_of_pytorch_on_dense_labels(backend, reduction):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 20, generator=g), torch.randn(70, 20, generator=g)
    hot = (torch.rand(40, 70, generator=g) < 0.1).float()
    offsets = F.pad(hot.sum(1).long().cumsum(0), (1, 0))
    expected = F.binary_cross_entropy_with_logits(x @ w.T, hot, reduction=reduction)
    if reduction == "none":
        expected = expected.sum(1)
    loss = multilabel_bce(x, w, hot.nonzero()[:, 1], offsets, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("backend", params("multilabel_bce", "cpp"))
@pytest.mark.parametrize("labels", [70, 20_000, 40_000])
def test_a_sum_is_swept_once_and_is_what_two_sweeps_are(labels, backend, monkeypatch):
    """The sweep adds up the gradient of the table in parts, each of several blocks of rows, fewer
    parts where the table is large; a table of 2.2 million numbers is swept twice."""
    g = torch.Generator().manual_seed(0)
    rows = 3_400 if labels == 70 else 1_200
    x, w = torch.randn(rows, 56, generator=g), 0.2 * torch.randn(labels, 56, generator=g)
    values = torch.randint(labels, (300,), generator=g).unique()
    values = values[: len(values) // 5 * 5]
    offsets = torch.arange(0, len(values) + 1, 5)
    lists = torch.randint(-1, len(offsets) - 1, (rows,), generator=g)
    lists[lists < 0] = NOT_SCORED
    given = (x, w, torch.randn(labels, generator=g))
    called, op = [], torch.ops.fastrec.multilabel_bce_sum
    spied = lambda *a: called.append(1) or op(*a)  # noqa: E731
    monkeypatch.setattr(torch.ops.fastrec, "multilabel_bce_sum", spied)

    def gradients(reduction, threads):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        torch.set_num_threads(threads)
        loss = multilabel_bce(
            *leaves[:2], values, offsets, linear_bias=leaves[2], label_rows=lists,
            reduction=reduction, backend=backend,
        )  # fmt: skip
        loss.sum().mul(0.5).backward()
        return loss.detach().sum(), *(leaf.grad for leaf in leaves)

    swept = gradients("sum", 1)
    assert len(called) == (labels < 40_000)
    for once, twice in zip(swept, gradients("none", 1), strict=True):
        torch.testing.assert_close(once, twice, rtol=1e-5, atol=2e-5)
    assert all(map(torch.equal, swept, gradients("sum", 2)))


@every_backend
def test_rows_that_share_lists(backend):
    """Rows of other lists, or not scored, are as if their lists were written out."""
    x = torch.tensor([[1.0], [2.0], [-1.0], [0.5]], requires_grad=True)
    case = table(input=x, label_rows=torch.tensor([1, 0, -100, 0]))
    rows = multilabel_bce(**case, reduction="none", backend=backend)
    written = table(
        input=x[[0, 1, 3]],
        label_values=torch.tensor([0, 2, 0, 2]),
        label_offsets=torch.tensor([0, 0, 2, 4]),
    )
    expected = multilabel_bce(**written, reduction="none", backend="reference")
    torch.testing.assert_close(rows[[0, 1, 3]], expected)
    assert rows[2].item() == 0
    mean = multilabel_bce(**case, backend=backend)
    torch.testing.assert_close(mean, expected.sum() / 9)  # of the scored rows
    grad, other = (torch.autograd.grad(loss.sum(), x)[0] for loss in (rows, expected))
    torch.testing.assert_close(grad, other)


@every_backend
def test_nothing_scored_is_a_live_zero(backend):
    x = torch.ones(2, 1, requires_grad=True)
    loss = multilabel_bce(**table(input=x, label_rows=torch.full((2,), -100)), backend=backend)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.item() == 0 and not grad.any()


@every_backend
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(label_values=torch.tensor([0, 3])), IndexError, r"label_values\[1\] is 3"),
        (dict(label_values=torch.tensor([2, 0])), ValueError, "must rise within each list"),
        (dict(label_values=torch.tensor([2, 2])), ValueError, "each label once"),
        (dict(label_offsets=torch.tensor([0, 2])), ValueError, r"label_offsets must be \[3\]"),
        (dict(label_rows=torch.tensor([0, 2])), IndexError, r"label_rows\[1\] is 2"),
        (dict(label_rows=torch.tensor([0, -1])), IndexError, r"label_rows\[1\] is -1"),
        (dict(reduction="sums"), ValueError, "reduction must be"),
        (dict(backend="cuda"), RuntimeError, "unknown backend"),
    ],
)
def test_wrong_arguments(backend, change, error, message):
    with pytest.raises(error, match=message):
        multilabel_bce(**(table() | {"backend": backend} | change))
