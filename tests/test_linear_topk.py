# SPDX-License-Identifier: Apache-2.0
"""What the generated tests of linear_topk cannot express: an exact table, ties under rounding,
large k, error texts, autocast."""

import math

import pytest
import torch
from backends import backends, needs

from fastrec import linear_topk
from fastrec.backend import unavailable_reason

needs_cpp = needs("cpp", "linear_topk")
every_backend = backends("linear_topk", "reference", "cpp")
INF, NAN = math.inf, math.nan


def table(**options):
    """Scores: 3 1 3 -1; 0 2 0 0; 3 3 3 -1."""
    input = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0]])
    weight = torch.tensor([[3.0, 0.0], [1.0, 1.0], [3.0, 0.0], [-1.0, 0.0]])
    return dict(input=input, linear_weight=weight, k=3) | options


LISTS = (torch.tensor([0, 2, 1]), torch.tensor([0, 2, 2, 3]))  # 0 and 2; none; 1


@every_backend
@pytest.mark.parametrize(
    "options, values, indices",
    [
        (dict(), [[3, 3, 1], [2, 0, 0], [3, 3, 3]], [[0, 2, 1], [1, 0, 2], [0, 1, 2]]),
        (dict(k=1), [[3], [2], [3]], [[0], [1], [0]]),
        (
            dict(exclude=LISTS),
            [[1, -1, -INF], [2, 0, 0], [3, 3, -1]],
            [[1, 3, -1], [1, 0, 2], [0, 2, 3]],
        ),
        (
            dict(linear_bias=torch.tensor([NAN, -INF, 5, 0]), k=4),
            [[8, -1, -INF, -INF], [5, 0, -INF, -INF], [8, -1, -INF, -INF]],
            [[2, 3, -1, -1]] * 3,
        ),
    ],
)
def test_hand_computed_table(backend, options, values, indices):
    best = linear_topk(**table(**options), backend=backend)
    assert best.indices.tolist() == indices
    assert best.values.tolist() == values


@pytest.mark.parametrize("backend, device", [("cpp", "cpu"), ("triton", "cuda")])
@pytest.mark.parametrize("d", [3, 64, 200])
@pytest.mark.parametrize("k", [1, 5, 33])
@pytest.mark.parametrize("n", [1, 4, 70])
def test_equal_vectors_tie_whatever_their_scores_round_to(backend, device, n, d, k):
    """Five copies of 331 vectors: ids of equal vectors follow each other in ascending order. Not on
    the reference and in Triton's interpreter: torch and numpy may add up the products of equal
    columns in different orders."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("triton runs on cuda, no device")
    if why := unavailable_reason(backend, "linear_topk", torch.device(device)):
        pytest.skip(why)
    vectors, copies = 331, 5
    distinct = torch.randn(vectors, d, device=device)
    input = torch.randn(n, d, device=device)
    best = linear_topk(input, distinct.repeat(copies, 1), k, backend=backend)
    one = linear_topk(input, distinct, -(-k // copies), backend=backend)
    steps = torch.arange(copies, device=device) * vectors
    assert torch.equal(best.indices, (one.indices[:, :, None] + steps).flatten(1)[:, :k])
    assert torch.equal(best.values, one.values.repeat_interleave(copies, 1)[:, :k])


@needs_cpp
@pytest.mark.parametrize("k", [1, 10, 500, 3000, 20_000])
def test_any_k_equals_a_stable_sort(k):
    """More items than a range, up to the whole table; the scores of the oracle are those of cpp."""
    v = 20_000
    input, weight = torch.randn(3, 4), torch.randn(v, 4)
    best = linear_topk(input, weight, k, backend="cpp")
    scores = input.double() @ weight.double().T
    assert (best.values.diff(dim=1) <= 0).all()
    for row in range(3):
        assert len(set(best.indices[row].tolist())) == k
    torch.testing.assert_close(scores.gather(1, best.indices).float(), best.values)
    torch.testing.assert_close(scores.topk(k).values.float(), best.values)


@every_backend
def test_no_gradient_and_no_autocast(backend):
    """bfloat16 scores of 256.5 and 257 would be one number."""
    case = table(input=torch.ones(3, 2, requires_grad=True), k=2)
    case["linear_weight"] = torch.tensor([[256.5, 0], [257, 0], [256, 0.25], [0, 0]])
    with torch.autocast("cpu", torch.bfloat16):
        best = linear_topk(**case, backend=backend)
    assert best.indices.tolist() == [[1, 0]] * 3 and best.values.dtype == torch.float32
    assert not best.values.requires_grad and not best.indices.requires_grad


@every_backend
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(k=0), ValueError, "k must be from 1 to 4, the items, got 0"),
        (dict(k=5), ValueError, "got 5"),
    ],
)
def test_wrong_arguments(backend, change, error, message):
    with pytest.raises(error, match=message):
        linear_topk(**table(**change), backend=backend)
