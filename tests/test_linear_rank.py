# SPDX-License-Identifier: Apache-2.0
"""What the generated tests of linear_rank cannot express: an exact table, ties of equal vectors
under rounding, error texts, autocast."""

import pytest
import torch
from backends import backends, needs

from fastrec import linear_rank
from fastrec.backend import unavailable_reason

needs_cpp = needs("cpp", "linear_rank")
every_backend = backends("linear_rank", "reference", "cpp")


def table(**options):
    """Scores: 3 1 3 -1; 0 2 0 0; 3 3 3 -1."""
    input = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0]])
    weight = torch.tensor([[3.0, 0.0], [1.0, 1.0], [3.0, 0.0], [-1.0, 0.0]])
    return dict(input=input, linear_weight=weight, target=torch.tensor([2, 2, 1])) | options


LISTS = (torch.tensor([0, 2, 1]), torch.tensor([0, 2, 2, 3]))  # 0 and 2; none; 1


@every_backend
@pytest.mark.parametrize(
    "options, ranks",
    [
        (dict(), [2, 3, 2]),
        (dict(target=torch.tensor([0, 3, 0])), [1, 4, 1]),
        (dict(exclude=LISTS), [1, 3, 2]),  # the targets are listed and stay
        (dict(target=torch.tensor([3, 0, 2]), exclude=LISTS), [2, 2, 2]),
        (dict(linear_bias=torch.tensor([0.0, 9.0, 0.0, 0.0])), [3, 3, 1]),
        (dict(linear_bias=torch.tensor([-torch.inf, 0.0, 0.0, 0.0])), [1, 2, 1]),
        (dict(linear_bias=torch.full((4,), -torch.inf)), [3, 3, 2]),
        (dict(linear_bias=torch.full((4,), torch.nan)), [4, 4, 4]),
    ],
)
def test_hand_computed_table(backend, options, ranks):
    assert linear_rank(**table(**options), backend=backend).tolist() == ranks


@pytest.mark.parametrize("d", [3, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 4, 70])
@pytest.mark.parametrize("backend, device", [("cpp", "cpu"), ("triton", "cuda")])
def test_equal_vectors_tie_whatever_their_scores_round_to(backend, device, n, d, dtype):
    """The table is five copies of 331 vectors: from copy to copy the rank of a vector rises by 1.
    Not on the reference and in Triton's interpreter: torch and numpy may add up the products of
    equal columns in different orders."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("triton runs on cuda, no device")
    if why := unavailable_reason(backend, "linear_rank", torch.device(device)):
        pytest.skip(why)
    if (backend, dtype) == ("triton", torch.float64):
        pytest.skip("linear_rank has no float64 triton kernel")
    vectors, copies = 331, 5
    weight = torch.randn(vectors, d).to(device, dtype).repeat(copies, 1)
    input, y = torch.randn(n, d).to(device, dtype), torch.randint(vectors, (n,)).to(device)
    ranks = torch.stack(
        [linear_rank(input, weight, y + c * vectors, backend=backend) for c in range(copies)]
    )
    assert (ranks - ranks[0] == torch.arange(copies, device=device)[:, None]).all()
    assert (ranks[0] % copies == 1).all()


@every_backend
def test_no_gradient_and_no_autocast(backend):
    """bfloat16 scores of 256.5 and 257 would be one number."""
    case = table(input=torch.ones(3, 2, requires_grad=True))
    case["linear_weight"] = torch.tensor([[256.5, 0], [257, 0], [256, 0.25], [0, 0]])
    with torch.autocast("cpu", torch.bfloat16):
        ranks = linear_rank(**case, backend=backend)
    assert ranks.tolist() == [3, 3, 1] and not ranks.requires_grad


@every_backend
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(exclude=(LISTS[0] + 2, LISTS[1])), IndexError, r"values\[1\] is 4"),
        (dict(exclude=(LISTS[0].roll(1), LISTS[1])), ValueError, "must be sorted"),
        (dict(backend="cuda"), RuntimeError, "unknown backend"),
    ],
)
def test_wrong_arguments(backend, change, error, message):
    with pytest.raises(error, match=message):
        linear_rank(**(table() | {"backend": backend} | change))
