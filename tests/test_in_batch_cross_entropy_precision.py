# SPDX-License-Identifier: Apache-2.0
"""Precision of in_batch_cross_entropy: losses near zero, embeddings far from the origin."""

import math

import pytest
import torch
from in_batch_problem import cpp, every_backend

from fastrec import in_batch_cross_entropy
from fastrec.ops.common.in_batch_pairs import operands, similarity_ref


@cpp
def test_a_loss_far_below_the_rounding_of_the_logits(backend):
    """log(1 + exp(-40)) = 4e-18, where lse - logit would be 0; so for the gradient."""
    q = torch.tensor([[40.0]], requires_grad=True)
    c = torch.tensor([[1.0], [0.0]])
    loss = in_batch_cross_entropy(q, c, backend=backend)
    (grad,) = torch.autograd.grad(loss, q)
    assert loss.item() == pytest.approx(math.exp(-40), rel=1e-5)
    assert grad.item() == pytest.approx(-math.exp(-40), rel=1e-5)


def offset_problem(similarity):
    """A mean of 100 times the spread, and weights that put the logits between -45 and 0."""
    g = torch.Generator().manual_seed(1)
    d = 64
    spread = 0.3
    centre = 100 * spread * torch.randn(d, generator=g)
    q, c = (spread * torch.randn(512, d, generator=g) for _ in range(2))
    if similarity == "weighted_l2":
        w = torch.rand(d, generator=g) * 4
        return q + centre, c + centre, w
    return 8 * q, c + centre, None


@pytest.mark.parametrize("similarity", ["dot", "weighted_l2"])
@pytest.mark.parametrize(
    "dtype, limit", [(None, 1e-2), (torch.float32, 1e-2), (torch.bfloat16, 0.2)]
)
def test_logits_of_offset_embeddings(similarity, dtype, limit):
    """Differences of the logits of a query, as the softmax sees them: of the reference (None), and
    of the operands of the kernels in the dtype that these multiply."""
    q, c, w = offset_problem(similarity)
    exact_w = None if w is None else w.double()
    exact = similarity_ref(q.double(), c.double(), similarity, exact_w)
    assert 20 < (exact - exact[:, :1]).abs().max() < 60
    if dtype is None:
        got = similarity_ref(q, c, similarity, w).double()
    else:
        x, k, bias = operands(q, c, similarity, w, 1.0)
        got = x.to(dtype).double() @ k.to(dtype).double().T
        got = got if bias is None else got + bias.double()
    error = (got - got[:, :1]) - (exact - exact[:, :1])
    assert error.abs().max() < limit


@every_backend
def test_offset_does_not_change_the_loss(backend):
    q, c, w = offset_problem("weighted_l2")
    options = dict(similarity="weighted_l2", reduction="none", positive=torch.arange(512) // 2)
    got = in_batch_cross_entropy(q, c, weight=w, **options, backend=backend)
    exact = in_batch_cross_entropy(
        q.double(), c.double(), weight=w.double(), **options, backend="reference"
    )
    assert (got - exact).abs().max() < 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        got = in_batch_cross_entropy(q, c, weight=w, **options, backend=backend)
        mixed = in_batch_cross_entropy(q, c.bfloat16(), weight=w, **options, backend=backend)
        both = in_batch_cross_entropy(q, c.bfloat16().float(), weight=w, **options, backend=backend)
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() < 0.2
    assert mixed.equal(both)
