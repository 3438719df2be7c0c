"""Arguments of in_batch_cross_entropy: error texts, dtype rules, what needs a gradient."""

import math

import pytest
import torch
from in_batch_problem import NAMES, every_backend, on, problem
from op_db.case import Sample, run

from fastrec import in_batch_cross_entropy


def pair(values, offsets):
    return torch.tensor(values), torch.tensor(offsets)


L2 = dict(similarity="weighted_l2")


@every_backend
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(query=torch.zeros(4)), ValueError, r"query must be \[B, D\].* got \[4\]"),
        (dict(query=torch.zeros(4, 2)), ValueError, r"got \[4, 2\] and \[5, 3\]"),
        (dict(query=torch.zeros(4, 3, dtype=torch.int64)), TypeError, "query must be a floating"),
        (dict(candidate=torch.zeros(5, 3).half()), TypeError, "float32 like query, got .*float16"),
        (dict(similarity="l2"), ValueError, r"one of \('dot', .*got 'l2'"),
        (dict(weight=torch.ones(3)), ValueError, "weight belongs to .*'weighted_l2', got 'dot'"),
        (L2 | dict(weight=torch.ones(2)), ValueError, r"weight must be \[3\], got \[2\]"),
        (L2 | dict(weight=torch.ones(3).long()), TypeError, "weight must be a floating"),
        (dict(temperature=0.0), ValueError, "temperature must be positive and finite, got 0.0"),
        (dict(temperature=math.inf), ValueError, "positive and finite, got inf"),
        (dict(temperature=torch.ones(2)), ValueError, r"without dimensions, got .* \[2\]"),
        (dict(candidate_bias=torch.ones(4)), ValueError, r"must be \[5\], got \[4\]"),
        (dict(candidate_bias=torch.ones(5).long()), TypeError, "candidate_bias must be a floating"),
        (dict(candidate=torch.zeros(3, 3)), ValueError, "3 candidates for 4 queries: pass `posi"),
        (dict(positive=torch.zeros(4)), TypeError, "int64 candidate positions, got .*float32"),
        (dict(positive=torch.zeros(3).long()), ValueError, r"positive must be \[4\], got \[3\]"),
        (dict(positive=torch.tensor([0, 5, 1, 1])), IndexError, r"positive\[1\] is 5, .* \[0, 5\)"),
        (dict(positive=torch.tensor([0, -1, 1, 1])), IndexError, r"positive\[1\] is -1"),
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
        (
            dict(query_group=torch.zeros(4), candidate_group=torch.zeros(5)),
            TypeError,
            "query_group must be int64 ids, got .*float32",
        ),
        (dict(exclude=torch.zeros(4)), TypeError, r"exclude must be a pair \(values, offsets\)"),
        (dict(exclude=pair([0.0], [0, 0, 0, 0, 1])), TypeError, "values must be int64 .*float32"),
        (dict(exclude=pair([0], [0, 0, 0, 1])), ValueError, r"offsets must be \[5\], got \[4\]"),
        (dict(exclude=pair([5], [0, 0, 0, 0, 1])), IndexError, r"values\[0\] is 5, .* \[0, 5\)"),
        (dict(exclude=pair([0], [0, 0, 0, 0, 2])), ValueError, "rise from 0 to 1"),
        (dict(exclude=pair([0, 1], [0, 2, 1, 2, 2])), ValueError, "rise from 0 to 2"),
        (dict(exclude=pair([1, 0], [0, 0, 2, 2, 2])), ValueError, "sorted within each query"),
        (dict(reduction="avg"), ValueError, "'none', 'mean' or 'sum', got 'avg'"),
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
