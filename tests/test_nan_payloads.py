# SPDX-License-Identifier: Apache-2.0
"""Every NaN stays one in the C++ kernels, also one whose low bits say something: exponentials made
numbers of them."""

import numpy as np
import pytest
import torch

import fastrec

SINGLE = [0x7FC00000, 0xFFC00000, 0x7FC00001, 0x7FC00080, 0xFFFFFFFF]
DOUBLE = [0x7FF8000000000000, 0x7FF00000000007A2, 0xFFFFFFFFFFFFFFFF]  # the second is R's NA
CASES = [(np.uint32, np.float32, bits) for bits in SINGLE]
CASES += [(np.uint64, np.float64, bits) for bits in DOUBLE]


@pytest.fixture(params=CASES, ids=lambda case: hex(case[2]))
def events(request):
    """[2, 4]: ones but for a NaN in the first row."""
    words, floats, bits = request.param
    made = np.ones((2, 4), floats)
    made[:1, :1] = np.array([[bits]], words).view(floats)
    return torch.from_numpy(made)


def test_attention(events):
    query, ends = events.view(2, 1, 4), torch.tensor([0, 2])
    ones = torch.ones_like(query)
    seen = fastrec.jagged_attention(query, ones, ones, ends, max_seq_len=2, backend="cpp")
    assert seen[0].isnan().all() and not seen[1].isnan().any()


def test_gru(events):
    torch.manual_seed(0)
    weights = (torch.randn(6, n, dtype=events.dtype) for n in (4, 2))
    states = fastrec.jagged_gru(events, torch.tensor([0, 2]), *weights, backend="cpp")
    assert states.isnan().all()


def test_multilabel_bce(events):
    user, table = events.requires_grad_(), torch.ones(3, 4, dtype=events.dtype)
    labels = torch.tensor([0, 1]), torch.tensor([0, 1, 2])
    loss = fastrec.multilabel_bce(user, table, *labels, reduction="none", backend="cpp")
    (gradient,) = torch.autograd.grad(loss.sum(), user)
    assert loss[0].isnan() and loss[1].isfinite()
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()


def test_linear_cross_entropy(events):
    table, target = torch.ones(3, 4, dtype=events.dtype), torch.tensor([0, 2])
    loss = fastrec.linear_cross_entropy(events, table, target, reduction="none", backend="cpp")
    assert loss[0].isnan() and loss[1].isfinite()
