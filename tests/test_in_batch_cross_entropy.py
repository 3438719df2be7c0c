"""What the generated tests of in_batch_cross_entropy cannot express: its definition pair by pair,
an exact table, error texts, dtype rules, autocast, the precision of centring and peak memory."""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_db.case import Sample, excess, promote, run
from op_db.in_batch_cross_entropy import by_tensors, embeddings, ids, lists, parameters

from fastrec import in_batch_cross_entropy
from fastrec.backend import unavailable_reason
from fastrec.ops.in_batch_cross_entropy import in_batch_cross_entropy_ref
from fastrec.ops.in_batch_pairs import SIMILARITIES, operands, similarity_ref

OP = "in_batch_cross_entropy"
NAMES = ("query", "candidate", "weight", "candidate_bias", "temperature")


def backends(*names):
    why = {name: unavailable_reason(name, OP, torch.device("cpu")) for name in names}
    marks = {
        name: pytest.mark.skipif(why[name] is not None, reason=str(why[name])) for name in names
    }
    return pytest.mark.parametrize(
        "backend", [pytest.param(name, marks=marks[name]) for name in names]
    )


every_backend = backends("reference", "cpp")
cpp = backends("cpp")


def on(backend):
    return by_tensors(lambda **kwargs: in_batch_cross_entropy(**kwargs, backend=backend))


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
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() < 0.2


def problem(b=4, c=5, d=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(b + c + d)
    return {
        "query": torch.randn(b, d, generator=g).to(dtype),
        "candidate": torch.randn(c, d, generator=g).to(dtype),
    }


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


@cpp
def test_second_derivative_is_refused(backend):
    case = problem()
    q = case["query"].requires_grad_()
    (grad,) = torch.autograd.grad(
        in_batch_cross_entropy(**case, backend=backend), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="does not require grad|once_differentiable"):
        grad.sum().backward()


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
    rules = torch.arange(6)[:, None] % 2, torch.arange(9)[:, None] % 4, *pair([8] * 6, range(7))
    y[left] = -1
    kept = [i for i in range(6) if i not in left]
    ids, columns, values, _ = rules
    alone = ids[kept], columns, values[kept], torch.arange(len(kept) + 1)
    op = torch.ops.fastrec
    outputs = op.in_batch_cross_entropy_fwd(x, c, None, y, *rules, True)
    expected = op.in_batch_cross_entropy_fwd(x[kept], c, None, y[kept], *alone, True)
    for got, part in zip(outputs, expected, strict=True):
        assert torch.equal(got[left], torch.zeros_like(got[left]))
        torch.testing.assert_close(got[kept], part)
    loss, lse, _ = outputs
    grad, _ = op.in_batch_cross_entropy_bwd(x, c, None, y, *rules, loss, lse, torch.ones(6))
    part, _ = op.in_batch_cross_entropy_bwd(
        x[kept], c, None, y[kept], *alone, loss[kept], lse[kept], torch.ones(len(kept))
    )
    torch.testing.assert_close(grad, part)


PEAK = """
    import torch
    from fastrec import in_batch_cross_entropy

    torch.set_num_threads(2)

    def status(key):
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    def step(b, d):
        q, c = (torch.randn(b, d, requires_grad=True) for _ in range(2))
        w = torch.rand(d, requires_grad=True)
        group = torch.arange(b) // 2
        exclude = torch.arange(b), torch.arange(b + 1)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
        before = status("VmRSS")
        in_batch_cross_entropy(
            q, c, similarity="weighted_l2", weight=w, query_group=group, candidate_group=group,
            exclude=exclude, symmetric=True, backend="cpp",
        ).backward()
        return status("VmHWM") - before

    step(64, 16)
    print(step({b}, {d}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@cpp
def test_no_buffer_of_the_size_of_the_logits(backend):
    """Peak memory of forward and backward, gradients included, against the logits of 144 MB."""
    b, d = 6_000, 8
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK.format(b=b, d=d))],
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 0.05 * b * b * 4


@pytest.mark.slow
@cpp
def test_pairs_beyond_2_to_the_31(backend):
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
