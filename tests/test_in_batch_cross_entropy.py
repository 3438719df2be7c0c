# SPDX-License-Identifier: Apache-2.0
"""What the generated tests of in_batch_cross_entropy cannot express: its definition pair by pair,
an exact table, what is exactly zero, any shape, the contract of the kernels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_batch_problem import NAMES, cpp, every_backend, on, problem
from op_db.case import Sample, excess, promote, run
from op_db.in_batch_cross_entropy import by_tensors, embeddings, ids, lists, parameters

from fastrec import in_batch_cross_entropy
from fastrec.ops.common.in_batch_pairs import SIMILARITIES
from fastrec.ops.in_batch_cross_entropy import in_batch_cross_entropy_ref


class Double:
    input = table = torch.float64


def by_definition(
    query, candidate, weight, candidate_bias, temperature, positive, similarity, exclude_values,
    exclude_offsets, query_group, candidate_group, symmetric,
):  # fmt: skip
    """One pair at a time, with differences instead of products."""
    b, c = len(query), len(candidate)
    s = query.new_empty(b, c)
    rows = []
    for i in range(b):
        row = []
        for j in range(c):
            if similarity == "weighted_l2":
                value = -(weight * (query[i] - candidate[j]) ** 2).sum()
            else:
                value = (query[i] * candidate[j]).sum()
                if similarity == "cosine":
                    value = value / (query[i].norm() * candidate[j].norm())
            row.append(value / temperature)
        rows.append(torch.stack(row))
    s = torch.stack(rows)

    def allowed(i, j):
        listed = exclude_values[exclude_offsets[i] : exclude_offsets[i + 1]].tolist()
        shared = any(
            x == y and x >= 0
            for x, y in zip(query_group[i].tolist(), candidate_group[j].tolist(), strict=True)
        )
        return j == positive[i] or not (shared or j in listed)

    losses = []
    for i in range(b):
        t = int(positive[i])
        kept = [j for j in range(c) if allowed(i, j)]
        loss = (s[i] + candidate_bias)[kept].logsumexp(0) - (s[i] + candidate_bias)[t]
        if symmetric:
            kept = [k for k in range(b) if allowed(k, t)]
            loss = (loss + s[kept, t].logsumexp(0) - s[i, t]) / 2
        losses.append(loss)
    return torch.stack(losses)


@every_backend
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_the_definition(backend, similarity, symmetric):
    b, c, d = 6, 9, 4
    case = embeddings("definition", "cpu", Double, b, c, d)
    weight, bias = parameters("definition", "cpu", Double, c, d)
    case |= dict(candidate_bias=bias, temperature=torch.tensor(0.7, dtype=torch.float64))
    case |= dict(positive=torch.tensor([3, 0, 8, 1, 2, 7]), similarity=similarity)
    case |= ids("definition", "cpu", b, c, 2, 4) | lists("definition", "cpu", b, c, 4)
    case |= dict(symmetric=symmetric, weight=weight)
    expected = run(
        by_definition, Sample("definition", case), NAMES[: 5 if "l2" in similarity else 2]
    )
    if similarity != "weighted_l2":
        case["weight"] = None
    function = on(backend)
    got = run(lambda **kw: function(**kw, reduction="none"), Sample("ours", case), NAMES)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-13, msg=name)


# With w = ln 2 and D = 1 the powers of two below are exp(s). Queries 0, 1; candidates 0, 1, 2:
# exp(s) = (1, 1/2, 1/16), (1/2, 1, 1/2).
LN2 = math.log(2.0)


def table(dtype=torch.float64, candidates=3):
    return {
        "query": torch.tensor([[0.0], [1.0]], dtype=dtype),
        "candidate": torch.arange(candidates, dtype=dtype)[:, None],
        "weight": torch.tensor([LN2], dtype=dtype),
        "similarity": "weighted_l2",
    }


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hand_computed_gradients(backend, dtype):
    """Two candidates: p = (2/3, 1/3), so G = (-1/3, 1/3), (1/3, -1/3)."""
    case = table(dtype, 2) | {
        "candidate_bias": torch.zeros(2, dtype=dtype),
        "temperature": torch.tensor(1.0, dtype=dtype),
        "reduction": "sum",
    }
    expected = {
        "output": 2 * math.log(1.5),
        "query": [[2 / 3 * LN2], [-2 / 3 * LN2]],
        "candidate": [[2 / 3 * LN2], [-2 / 3 * LN2]],
        "weight": [-2 / 3],
        "candidate_bias": [0.0, 0.0],
        "temperature": 2 / 3 * LN2,
    }
    function = on(backend)
    leaves = {name: case[name].requires_grad_() for name in NAMES}
    loss = function(**case)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    got = {"output": loss.detach(), **dict(zip(leaves, grads, strict=True))}
    for name, values in expected.items():
        exact = torch.tensor(values, dtype=dtype)
        torch.testing.assert_close(got[name], exact, rtol=1e-6, atol=1e-7, msg=name)


EXCLUDED = [17 / 16, 1.5]
LISTS = (
    torch.tensor([1, 0, 2]),
    torch.tensor([0, 1, 3]),
)  # query 0 without 1, query 1 without both


@every_backend
@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(), [25 / 16, 2]),
        (dict(temperature=0.5), [1 + 1 / 4 + 1 / 256, 1.5]),
        (dict(candidate_bias=[0.0, 0.0, LN2]), [1 + 1 / 2 + 1 / 8, 2.5]),
        (dict(candidate_bias=[0.0, 0.0, -math.inf]), [1.5, 1.5]),
        (dict(positive=[1, 2]), [25 / 8, 4]),
        (dict(positive=[2, 2]), [25, 4]),
        (dict(exclude=LISTS), [17 / 16, 1]),
        (dict(exclude=LISTS, positive=[1, 2]), [25 / 8, 3]),
        (dict(query_group=[5, 6], candidate_group=[9, 5, 6]), [17 / 16, 1.5]),
        (dict(query_group=[-1, -1], candidate_group=[-1, -1, -1]), [25 / 16, 2]),
        (dict(query_group=[7, 7], candidate_group=[7, 7, 7]), [1, 1]),
        (dict(query_group=[[5, 1], [6, 2]], candidate_group=[[0, 0], [5, 9], [4, 2]]), EXCLUDED),
        # Two ids that agree in their low 32 bits differ.
        (dict(query_group=[5, 6], candidate_group=[9, 5 + 2**32, 6]), [25 / 16, 1.5]),
        (dict(weight=[0.0]), [3, 3]),
        (dict(weight=[-LN2]), [1 + 2 + 16, 5]),
        # The other direction: candidates 0 and 1 against both queries, (1, 1/2) and (1/2, 1).
        (dict(symmetric=True), [(25 / 16 * 1.5) ** 0.5, (2 * 1.5) ** 0.5]),
        # Of candidate 0 query 1 is left out, of candidate 1 query 0: nothing is left.
        (dict(symmetric=True, exclude=LISTS), [(17 / 16) ** 0.5, 1]),
        (dict(symmetric=True, positive=[0, 2]), [(25 / 16 * 1.5) ** 0.5, (4 * 9 / 8) ** 0.5]),
    ],
)  # fmt: skip
def test_hand_computed_options(backend, options, expected):
    """`expected` is exp(loss)."""
    case = table()
    for name, value in options.items():
        if isinstance(value, list):
            floating = name in ("weight", "candidate_bias")
            value = torch.tensor(value, dtype=torch.float64 if floating else torch.int64)
        case[name] = value
    loss = in_batch_cross_entropy(**case, reduction="none", backend=backend)
    assert loss.exp().tolist() == pytest.approx(expected, rel=1e-14)
    for reduction, scale in (("sum", 1), ("mean", 1 / 2)):
        total = in_batch_cross_entropy(**case, reduction=reduction, backend=backend)
        assert total.item() == pytest.approx(scale * sum(map(math.log, expected)), abs=1e-14)


@every_backend
def test_cosine_and_dot(backend):
    case = dict(query=torch.tensor([[3.0, 0.0]]), candidate=torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
    dot = in_batch_cross_entropy(**case, backend=backend)
    assert dot.item() == pytest.approx(math.log1p(math.exp(-6)), rel=1e-4)
    cosine = in_batch_cross_entropy(**case, similarity="cosine", temperature=0.5, backend=backend)
    assert cosine.item() == pytest.approx(math.log1p(math.exp(-2)), rel=1e-5)


@every_backend
@pytest.mark.parametrize(
    "bias, loss",
    [
        ([math.inf, 0.0, 0.0], math.nan),
        ([-math.inf] * 3, math.nan),
        ([math.nan, -math.inf, -math.inf], math.nan),
        ([-math.inf, 0.0, 0.0], math.inf),
        ([0.0, -math.inf, -math.inf], 0.0),
    ],
)
def test_a_difference_of_infinities_is_nan(backend, bias, loss):
    query, candidate = problem(1, 3).values()
    leaves = query.requires_grad_(), candidate.requires_grad_()
    got = in_batch_cross_entropy(
        query, candidate, candidate_bias=torch.tensor(bias), reduction="none", backend=backend
    )
    assert got.item() == pytest.approx(loss, nan_ok=True)
    for grad in torch.autograd.grad(got, leaves):
        assert grad.isnan().all() if math.isnan(loss) else grad.isfinite().all()


@every_backend
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("how", ["groups", "lists", "alone"])
def test_all_negatives_left_out_is_exactly_zero(backend, symmetric, how):
    b = 1 if how == "alone" else 5
    case = embeddings("zero", "cpu", Double, b, b, 3)
    case = {name: value.float().requires_grad_() for name, value in case.items()}
    options = {}
    if how == "groups":
        zeros = torch.zeros(b, dtype=torch.int64)
        options = dict(query_group=zeros, candidate_group=zeros)
    elif how == "lists":
        options = dict(exclude=(torch.arange(b).repeat(b), torch.arange(b + 1) * b))
    weight = torch.rand(3, requires_grad=True)
    loss = in_batch_cross_entropy(
        **case, **options, similarity="weighted_l2", weight=weight, symmetric=symmetric,
        reduction="none", backend=backend,
    )  # fmt: skip
    assert torch.equal(loss, torch.zeros(b))
    for grad in torch.autograd.grad(loss.sum(), (*case.values(), weight)):
        assert torch.equal(grad, torch.zeros_like(grad))


@cpp
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    b=st.integers(0, 220),
    more=st.integers(0, 210),
    d=st.integers(1, 70),
    columns=st.integers(0, 3),
    listed=st.integers(0, 5),
    symmetric=st.booleans(),
)
def test_any_shape(backend, b, more, d, columns, listed, symmetric):
    """No shape reads or writes past a tail: every size around the tiles, in every combination."""

    class Float:
        input = table = torch.float32

    c = max(b + more, 1)
    case = embeddings("any", "cpu", Float, b, c, d)
    case["weight"], case["candidate_bias"] = parameters("any", "cpu", Float, c, d)
    case |= dict(similarity="weighted_l2", symmetric=symmetric, reduction="none")
    case |= ids("any", "cpu", b, c, columns, 6) | lists("any", "cpu", b, c, listed)
    sample, names = Sample("any_shape", case), NAMES[:4]
    exact = run(by_tensors(in_batch_cross_entropy_ref), promote(sample), names)
    low = run(by_tensors(in_batch_cross_entropy_ref), sample, names)
    got = run(on(backend), sample, names)
    for name, value in got.items():
        error, budget = excess(value, low[name], exact[name], 20.0)
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"


@cpp
@pytest.mark.parametrize("left", [[1, 4], [0, 1, 2, 3, 4, 5]])
def test_private_op_leaves_rows_without_a_positive_at_zero(backend, left):
    """The contract of the kernels: positive -1 gives zeros and takes no part in the gradient."""
    case = problem(6, 9, 4)
    x, c, y = case["query"], case["candidate"], torch.arange(6)
    rules = (
        torch.arange(6)[:, None] % 2,
        torch.arange(9)[:, None] % 4,
        torch.tensor([8] * 6),
        torch.arange(7),
    )
    y[left] = -1
    kept = [i for i in range(6) if i not in left]
    ids, columns, values, _ = rules
    alone = ids[kept], columns, values[kept], torch.arange(len(kept) + 1)
    op = torch.ops.fastrec
    loss, lse, direction = op.in_batch_cross_entropy_fwd(x, c, None, y, *rules, True)
    expected = op.in_batch_cross_entropy_fwd(x[kept], c, None, y[kept], *alone, True)
    expected = [expected[0], expected[1].T, expected[2]]
    for got, part in zip((loss, lse.T, direction), expected, strict=True):
        assert torch.equal(got[left], torch.zeros_like(got[left]))
        torch.testing.assert_close(got[kept], part)
    grad, _ = op.in_batch_cross_entropy_bwd(x, c, None, y, *rules, loss, lse, torch.ones(6))
    part, _ = op.in_batch_cross_entropy_bwd(
        x[kept], c, None, y[kept], *alone, loss[kept], lse[:, kept], torch.ones(len(kept))
    )
    torch.testing.assert_close(grad, part)
