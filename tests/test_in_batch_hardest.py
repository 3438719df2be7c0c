# SPDX-License-Identifier: Apache-2.0
"""What the generated tests of in_batch_hardest cannot express: an exact table and error texts."""

import math

import pytest
import torch
from backends import backends

from fastrec import in_batch_hardest

every_backend = backends("in_batch_hardest", "reference", "cpp")


def table(**options):
    query = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], requires_grad=True)
    candidate = torch.tensor([[3.0, 0.0], [0.0, 1.0], [3.0, 0.0]], requires_grad=True)
    return dict(query=query, candidate=candidate) | options


LISTS = (torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 4]))


@every_backend
@pytest.mark.parametrize(
    "options, values, indices",
    [
        (dict(), [3, 2, 3], [0, 1, 0]),  # candidates 0 and 2 are equal
        (dict(exclude=LISTS), [3, 2, -math.inf], [2, 1, -1]),
        (
            dict(query_group=torch.tensor([7, 1, 5]), candidate_group=torch.tensor([7, 1, 5])),
            [3, 0, 3],
            [2, 0, 0],
        ),
        (dict(similarity="cosine"), [1, 1, math.sqrt(0.5)], [0, 1, 0]),
        (dict(similarity="weighted_l2"), [-2, -1, -1], [1, 1, 1]),
        (
            dict(similarity="weighted_l2", weight=torch.tensor([-1.0, 1.0])),
            [4, 5, 3],
            [0, 0, 0],
        ),
        (
            dict(similarity="weighted_l2", weight=torch.tensor([1.0, -1.0])),
            [0, 1, -1],
            [1, 1, 1],
        ),
    ],
)
def test_hand_computed_table(backend, options, values, indices):
    got = in_batch_hardest(**table(**options), backend=backend)
    assert got.indices.tolist() == indices
    assert got.values.tolist() == pytest.approx(values, rel=1e-6)


@every_backend
def test_gradient_goes_to_the_selected_pairs_only(backend):
    case = table(exclude=LISTS)
    values, _ = in_batch_hardest(**case, backend=backend)
    grads = torch.autograd.grad(values[:2].sum(), (case["query"], case["candidate"]))
    assert grads[0].tolist() == [[3, 0], [0, 1], [0, 0]]  # the candidates 2 and 1, none
    assert grads[1].tolist() == [[0, 0], [0, 2], [1, 0]]  # the queries 1 and 0


@every_backend
def test_several_queries_select_one_candidate(backend):
    query = torch.ones(500, 1, requires_grad=True)
    candidate = torch.tensor([[1.0], [2.0]], requires_grad=True)
    values, indices = in_batch_hardest(query, candidate, backend=backend)
    assert indices.tolist() == [1] * 500
    (grad,) = torch.autograd.grad(values.sum(), candidate)
    assert grad.tolist() == [[0.0], [500.0]]


@every_backend
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(candidate=torch.zeros(0, 2)), ValueError, "candidate has no rows"),
        (dict(query_group=torch.zeros(3).long()), ValueError, "go together"),
    ],
)
def test_wrong_arguments(backend, change, error, message):
    with pytest.raises(error, match=message):
        in_batch_hardest(**(table() | change), backend=backend)


@backends("in_batch_hardest", "reference", "cpp", "triton")
def test_nan_is_never_the_largest(backend):
    query = torch.tensor([[1.0, 0.0], [float("nan"), 0.0]])
    candidate = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    values, indices = in_batch_hardest(query, candidate, backend=backend)
    assert values.tolist() == [2.0, -math.inf] and indices.tolist() == [1, -1]
    candidate[0, 1] = float("nan")
    assert in_batch_hardest(query, candidate, backend=backend).indices.tolist() == [1, -1]


@backends("in_batch_hardest", "cpp")
@pytest.mark.parametrize("similarity", ["dot", "weighted_l2"])
def test_infinite_candidates_leave_the_others_as_they_are(backend, similarity):
    torch.manual_seed(0)
    query, candidate = torch.randn(6, 8), torch.randn(9, 8)
    query[:, 0] = -query[:, 0].abs() - 0.1  # the similarity of what is infinite is -inf
    alone = in_batch_hardest(query, candidate[1:], similarity=similarity, backend=backend)
    candidate[0, 0] = math.inf
    beside = in_batch_hardest(query, candidate, similarity=similarity, backend=backend)
    assert beside.indices.tolist() == (alone.indices + 1).tolist()
    torch.testing.assert_close(beside.values, alone.values)


@every_backend
def test_autocast_takes_one_side_of_another_dtype(backend):
    q, c = torch.randn(5, 4), torch.randn(6, 4, dtype=torch.bfloat16)
    expected = in_batch_hardest(q, c.float(), backend=backend)
    with pytest.raises(TypeError, match="candidate must be"):
        in_batch_hardest(q, c, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = in_batch_hardest(q, c, backend=backend)
    assert got.indices.equal(expected.indices) and got.values.equal(expected.values)
