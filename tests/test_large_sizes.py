# SPDX-License-Identifier: Apache-2.0
"""Sizes beyond 2^31: of the logits, of the table, of the pairs."""

import math

import pytest
import torch
from backends import backends, needs

from fastrec import in_batch_cross_entropy, linear_cross_entropy, linear_rank, linear_topk


@pytest.mark.slow
@backends("linear_cross_entropy", "cpp")
def test_logits_of_linear_cross_entropy(backend):
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
@backends("linear_cross_entropy", "cpp")
def test_table_of_linear_cross_entropy(backend):
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


@pytest.mark.slow
@backends("in_batch_cross_entropy", "cpp")
def test_pairs_of_in_batch_cross_entropy(backend):
    """B C > 2^31, width 1: the candidates take four values, so the sums are tables."""
    torch.set_num_threads(2)
    b = 46_400
    assert b * b > 2**31
    values = torch.tensor([-1.0, 0.5, 2.0, 0.0])
    c = values[torch.arange(b) % 4][:, None].requires_grad_()
    q = torch.linspace(-1, 1, b)[:, None].requires_grad_()
    loss = in_batch_cross_entropy(q, c, reduction="none", backend=backend)
    exact = q.detach().double() * values.double()
    own = exact.gather(1, (torch.arange(b) % 4)[:, None])[:, 0]
    torch.testing.assert_close(
        loss.double(), exact.logsumexp(1) + math.log(b / 4) - own, rtol=1e-6, atol=1e-5
    )
    loss.sum().backward()
    p = torch.softmax(exact, 1) / (b / 4)
    grad_c = (p.T @ q.detach().double())[torch.arange(b) % 4, 0] - q.detach().double()[:, 0]
    torch.testing.assert_close(c.grad[:, 0].double(), grad_c, rtol=1e-5, atol=1e-5)


@needs("cpp", "linear_topk")
def test_linear_topk():
    """N x V and V x D: a table of equal rows without its memory, so the ids decide."""
    v, n, d, k = 2**27 + 5, 17, 17, 3
    assert v * n > 2**31 and v * d > 2**31
    weight = torch.ones(1, d).expand(v, d)
    bias = torch.zeros(v, dtype=torch.float16)
    bias[[v - 2, v // 2]] = 1
    best = linear_topk(torch.ones(n, d), weight, k, linear_bias=bias.float(), backend="cpp")
    assert best.indices.tolist() == [[v // 2, v - 2, 0]] * n
    assert best.values.tolist() == [[d + 1, d + 1, d]] * n


@needs("cpp", "linear_rank")
def test_linear_rank():
    """N x V and V x D: a table of equal rows without its memory."""
    v, n, d = 2**27 + 5, 17, 17
    assert v * n > 2**31 and v * d > 2**31
    weight = torch.randn(1, d).expand(v, d)
    y = torch.arange(n) * (v // n)
    y[-1] = v - 1
    exclude = (torch.tensor([0, v - 3, v - 2]), torch.tensor([0] * n + [3]))
    ranks = linear_rank(torch.randn(n, d), weight, y, exclude=exclude, backend="cpp")
    assert ranks[:-1].tolist() == (y[:-1] + 1).tolist() and ranks[-1] == v - 3
