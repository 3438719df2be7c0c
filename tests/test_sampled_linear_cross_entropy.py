# SPDX-License-Identifier: Apache-2.0
"""What the reference cannot express: exact values by hand, sparse gradients, error texts."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import backends, needs

from fastrec import linear_cross_entropy, sampled_linear_cross_entropy

OP = "sampled_linear_cross_entropy"
each_backend = backends(OP, "reference", "cpp", "triton")
LOG2, LOG3 = math.log(2.0), math.log(3.0)


def table(*scores):
    """Scores of the items for an input of 1."""
    return torch.tensor(scores, dtype=torch.float32)[:, None]


@each_backend
@pytest.mark.parametrize(
    "negatives, expected",
    [
        ([1], math.log(1 + 2 / 3)),  # item 0 scores log 3, item 1 log 2
        ([1, 1], math.log(1 + 4 / 3)),  # drawn twice, counted twice
        ([1, 0, 2], math.log(1 + 3 / 3)),  # the hit of item 0 is left out
        ([0, 0], 0.0),  # nothing but hits
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_softmax_by_hand(backend, negatives, expected, own):
    drawn = torch.tensor([negatives] if own else negatives)
    loss = sampled_linear_cross_entropy(
        torch.ones(1, 1), table(LOG3, LOG2, 0.0), torch.tensor([0]), drawn, backend=backend
    )
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@each_backend
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    "bias, loss",
    [
        ([math.inf, 0.0, 0.0], math.nan),
        ([-math.inf] * 3, math.nan),
        ([math.nan, -math.inf, -math.inf], math.nan),
        ([0.0, -math.inf, -math.inf], 0.0),
    ],
)
def test_a_difference_of_infinities_is_nan(backend, bias, loss, own):
    check_infinities(backend, bias, loss, own)


# Without triton, whose kernel for own negatives makes NaN of it.
@backends(OP, "reference", "cpp")
@pytest.mark.parametrize("own", [True, False])
def test_a_target_at_minus_inf_has_an_infinite_loss(backend, own):
    check_infinities(backend, [-math.inf, 0.0, 0.0], math.inf, own)


def check_infinities(backend, bias, loss, own):
    x, w = torch.ones(1, 1, requires_grad=True), table(LOG3, LOG2, 0.0).requires_grad_()
    drawn, bias = torch.tensor([[1, 2]] if own else [1, 2]), torch.tensor(bias)
    got = sampled_linear_cross_entropy(
        x, w, torch.tensor([0]), drawn, linear_bias=bias, backend=backend
    )
    assert got.item() == pytest.approx(loss, nan_ok=True)
    for grad in torch.autograd.grad(got, (x, w)):
        # Where all scores are -inf, triton gives negatives a gradient of 0 beside the loss of NaN.
        wrong = grad.isnan().any() if backend == "triton" else grad.isnan().all()
        assert wrong if math.isnan(loss) else grad.isfinite().all()


@each_backend
@pytest.mark.parametrize("own", [True, False])
def test_binary_losses_by_hand(backend, own):
    # sigmoid(log 3) = 3/4, sigmoid(log 2) = 2/3, sigmoid(0) = 1/2; the hit counts in K + 1 only.
    drawn = torch.tensor([1, 0, 2])
    arguments = (torch.ones(1, 1), table(LOG3, LOG2, 0.0, 7.0, 7.0, 7.0, 7.0), torch.tensor([0]))
    drawn = drawn[None] if own else drawn
    negative = -math.log(1 / 3) - math.log(1 / 2)
    positive = -math.log(3 / 4)
    for options, beta in (
        (dict(loss="bce"), 1.0),
        (dict(loss="gbce", gbce_t=0.0), 1.0),
        (dict(loss="gbce", gbce_t=1.0), 3 / 6),  # K / (V - 1)
        (dict(loss="gbce", gbce_t=0.5), 0.75),
        (dict(loss="gbce", gbce_t=1.0, num_items=10), 3 / 9),
    ):
        loss = sampled_linear_cross_entropy(*arguments, drawn, **options, backend=backend)
        assert loss.item() == pytest.approx((beta * positive + negative) / 4, rel=1e-6)


@each_backend
def test_power_of_gbce_is_that_of_the_paper(backend):
    items, drawn, t = 1000, 5, 0.75
    alpha = drawn / (items - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    weight = torch.zeros(items, 1)
    negatives = torch.arange(1, drawn + 1)
    loss = sampled_linear_cross_entropy(
        torch.ones(1, 1), weight, torch.tensor([0]), negatives, loss="gbce", gbce_t=t,
        backend=backend,
    )  # fmt: skip
    assert loss.item() == pytest.approx((beta + drawn) * LOG2 / (drawn + 1), rel=1e-6)


@backends(OP, "cpp", "triton")
@pytest.mark.parametrize("loss", ["softmax", "bce"])
@pytest.mark.parametrize("own", [True, False])
def test_small_losses_keep_their_digits(backend, own, loss):
    """log(1 + e) loses the digits of e: at 1e-4 it is right to 6e-4."""
    gaps = torch.arange(3, 12, 0.125)[:, None]  # exact in 8 bits, which split products have
    zeros = torch.zeros(len(gaps), dtype=torch.int64)
    got = sampled_linear_cross_entropy(
        gaps, table(1.0, -1.0), zeros, zeros[:, None] + 1 if own else zeros[:1] + 1, loss=loss,
        reduction="none", backend=backend,
    )  # fmt: skip
    gap = gaps[:, 0].double() * (2 if loss == "softmax" else 1)
    torch.testing.assert_close(got.double(), torch.exp(-gap).log1p(), rtol=2e-6, atol=0)


@each_backend
@pytest.mark.parametrize("loss", ["softmax", "bce"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("infinite", ["log_q", "linear_bias", "linear_weight"])
def test_item_0_does_not_reach_rows_that_are_not_scored(backend, own, loss, infinite):
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8)
    target, negatives = torch.tensor([3, -100, 5, -100]), torch.randint(1, 20, (4, 6))
    options = {name: torch.zeros(20) for name in ("log_q", "linear_bias")}
    (options | {"linear_weight": w})[infinite][0] = -math.inf
    value = sampled_linear_cross_entropy(
        x, w, target, negatives if own else negatives[0], loss=loss, backend=backend, **options
    )
    (grad,) = torch.autograd.grad(value, x)
    assert grad.isfinite().all() and not grad[1::2].any() and grad[::2].any(1).all()


@each_backend
@pytest.mark.parametrize("loss", ["softmax", "bce"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_a_row_without_a_target_holds_reaches_nothing(backend, own, loss, value):
    x, w = torch.randn(4, 8), torch.randn(20, 8, requires_grad=True)
    target, negatives = torch.tensor([3, -100, 5, -100]), torch.randint(1, 20, (4, 6))
    found = []
    for row in (torch.zeros(8), torch.full((8,), value)):
        x[1] = row
        kept = negatives if own else negatives[0]
        got = sampled_linear_cross_entropy(x, w, target, kept, loss=loss, backend=backend)
        found.append((got.detach(), *torch.autograd.grad(got, w)))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


@each_backend
@pytest.mark.parametrize("own", [True, False])
def test_all_items_once_is_the_full_softmax(backend, own):
    """With every item as a negative, and no correction, the loss and its gradients are those of
    the whole table; a constant log_q changes nothing."""
    items = 40
    x = torch.randn(9, 12, requires_grad=True)
    w = torch.randn(items, 12, requires_grad=True)
    bias = torch.randn(items, requires_grad=True)
    y = torch.randint(items, (9,))
    full = linear_cross_entropy(x, w, y, linear_bias=bias, backend="reference")
    expected = torch.autograd.grad(full, (x, w, bias))
    drawn = torch.randperm(items)
    for log_q in (None, torch.full((items,), 3.0)):
        loss = sampled_linear_cross_entropy(
            x, w, y, drawn.expand(9, -1) if own else drawn, linear_bias=bias, log_q=log_q,
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(loss, full)
        for grad, exact in zip(torch.autograd.grad(loss, (x, w, bias)), expected, strict=True):
            torch.testing.assert_close(grad, exact, atol=2e-6, rtol=1e-5)


@each_backend
def test_log_q_corrects_target_and_negatives(backend):
    scores, log_q = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([-1.0, -3.0, -0.5])
    loss = sampled_linear_cross_entropy(
        torch.ones(1, 1), table(*scores.tolist()), torch.tensor([0]), torch.tensor([1, 2]),
        log_q=log_q, backend=backend,
    )  # fmt: skip
    expected = F.cross_entropy((scores - log_q)[None], torch.tensor([0]))
    torch.testing.assert_close(loss, expected)


@each_backend
@pytest.mark.parametrize("own", [True, False])
def test_sparse_gradients_train_like_dense_ones(backend, own):
    """SparseAdam on the touched rows equals Adam on a table in which every row is touched; rows
    that do not occur are not in the gradient and do not move."""
    items, occurring = 60, torch.arange(0, 40, 2)
    start, x = torch.randn(items, 8), torch.randn(6, 8)
    y = occurring[torch.randint(20, (6,))]
    negatives = torch.stack([occurring[torch.randperm(20)] for _ in range(6)])
    negatives = negatives if own else negatives[0]
    moved = {}
    for sparse, kind in ((True, torch.optim.SparseAdam), (False, torch.optim.Adam)):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.1, eps=1e-12)  # added at different places
        for _ in range(3):
            optimizer.zero_grad()
            loss = sampled_linear_cross_entropy(
                x, weight, y, negatives, sparse_grad=sparse, backend=backend
            )
            (grad,) = torch.autograd.grad(loss, weight)
            assert grad.is_sparse == sparse
            if sparse:
                assert grad.is_coalesced() or backend == "reference"
                assert grad.coalesce().indices().tolist() == [occurring.tolist()]
            weight.grad = grad
            optimizer.step()
        moved[sparse] = weight.detach()
    assert torch.equal(moved[True][1::2], start[1::2]) and torch.equal(moved[True][40:], start[40:])
    torch.testing.assert_close(moved[True], moved[False], atol=1e-5, rtol=1e-5)


@needs("cpp", OP)
def test_bits_of_a_row_do_not_depend_on_its_batch():
    x, w = torch.randn(300, 24), torch.randn(500, 24)
    y, own = torch.randint(500, (300,)), torch.randint(500, (300, 70))
    for negatives in (own, own[0]):
        options = dict(reduction="none", backend="cpp")
        whole = sampled_linear_cross_entropy(x, w, y, negatives, **options)
        some = torch.tensor([299, 7, 120])
        part = sampled_linear_cross_entropy(
            x[some], w, y[some], negatives if negatives.dim() == 1 else negatives[some], **options
        )
        assert torch.equal(part, whole[some])


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(negatives=torch.zeros(3, 2).long().fill_diagonal_(9)), IndexError, r"\[0, 0\] is 9"),
        (dict(num_items=2), ValueError, "num_items is 2, linear_weight has"),
        (dict(gbce_t=1.5), ValueError, r"gbce_t must be in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = dict(
        input=torch.zeros(3, 2),
        linear_weight=torch.zeros(5, 2),
        target=torch.zeros(3, dtype=torch.int64),
        negatives=torch.zeros(4, dtype=torch.int64),
    )
    with pytest.raises(error, match=message):
        sampled_linear_cross_entropy(**arguments | change)


@pytest.mark.parametrize("shared", [True, False])
@backends("sampled_linear_cross_entropy", "reference", "cpp")
def test_leading_dimensions_are_rows(backend, shared):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 3, 4, generator=g), torch.randn(9, 4, generator=g)
    y = torch.randint(9, (2, 3), generator=g)
    negatives = torch.randint(9, (5,) if shared else (2, 3, 5), generator=g)
    options = dict(reduction="none", backend=backend)
    loss = sampled_linear_cross_entropy(x, w, y, negatives, **options)
    flat = negatives if shared else negatives.flatten(0, 1)
    expected = sampled_linear_cross_entropy(x.flatten(0, 1), w, y.flatten(), flat, **options)
    assert torch.equal(loss, expected.view(2, 3))
    low = (y.int(), negatives.int())
    assert torch.equal(sampled_linear_cross_entropy(x, w, *low, **options), loss)
