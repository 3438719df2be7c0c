# SPDX-License-Identifier: Apache-2.0
"""Arguments of in_batch_cross_entropy that do not fit each other, dtype rules, what needs a
gradient. Single wrong arguments are those of test_wrong_arguments.py."""

import pytest
import torch
from in_batch_problem import NAMES, every_backend, on, problem
from op_db.case import Sample, run

from fastrec import in_batch_cross_entropy


def pair(values, offsets):
    return torch.tensor(values), torch.tensor(offsets)


@every_backend
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(weight=torch.ones(3)), ValueError, "weight belongs to .*'weighted_l2', got 'dot'"),
        (dict(candidate=torch.zeros(3, 3)), ValueError, "3 candidates for 4 queries: pass `posi"),
        (dict(positive=torch.tensor([0, 2, 1, 2]), symmetric=True), ValueError, "different positi"),
        (dict(query_group=torch.zeros(4).long()), ValueError, "go together"),
        (
            dict(query_group=torch.zeros(4).long(), candidate_group=torch.zeros(4).long()),
            ValueError,
            r"candidate_group must be \[5\], got \[4\]",
        ),
        (
            dict(query_group=torch.zeros(4, 2).long(), candidate_group=torch.zeros(5, 3).long()),
            ValueError,
            r"candidate_group must be \[5, 2\], got \[5, 3\]",
        ),
        (dict(exclude=torch.zeros(4)), TypeError, r"exclude must be a pair \(values, offsets\)"),
        (dict(exclude=pair([1, 0], [0, 0, 2, 2, 2])), ValueError, "sorted within each query"),
    ],
)
def test_wrong_arguments(backend, change, error, message):
    with pytest.raises(error, match=message):
        in_batch_cross_entropy(**(problem() | change), backend=backend)


def test_lists_may_start_anew_at_every_query():
    """Sorted within a query, not across: also where empty lists lie between."""
    exclude = pair([3, 4, 0, 0, 1], [0, 2, 2, 2, 5])
    assert in_batch_cross_entropy(**problem(), exclude=exclude, backend="reference").isfinite()


LOW = (torch.bfloat16, torch.float16)


@every_backend
@pytest.mark.parametrize(
    "input, table, output",
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float32),
        *((low, low, torch.float32) for low in LOW),
        *((low, torch.float32, torch.float32) for low in LOW),
    ],
)
def test_dtypes(backend, input, table, output):
    case = problem(dtype=input) | {"similarity": "weighted_l2", "weight": torch.ones(3).to(table)}
    case |= {
        "candidate_bias": torch.zeros(5, dtype=table),
        "temperature": torch.tensor(1.0).to(table),
    }
    for reduction in ("none", "mean"):
        got = run(on(backend), Sample("dtypes", case | {"reduction": reduction}), NAMES)
        assert got["output"].dtype == output
        assert [got[name].dtype for name in NAMES] == [input, input, table, table, table]


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_learnt_stays_positive(number):
    query, candidate = torch.randn(3, 4), torch.randn(5, 4)
    temperature = torch.tensor(number, requires_grad=True)
    with pytest.raises(ValueError, match="temperature must be positive"):
        in_batch_cross_entropy(query, candidate, temperature=temperature)
