# SPDX-License-Identifier: Apache-2.0
"""Samples of in_batch_cross_entropy.

Legend: B queries, C candidates, D width, G id columns, E listed exclusions.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import fastrec
from fastrec.ops.in_batch_cross_entropy import in_batch_cross_entropy_ref
from op_db.case import Op, Sample, Types, generator, split_band

OFFSETS = "exclude_offsets"


def by_tensors(function):
    """`exclude` as two tensors, so that the tests of strides and memory see them; the `temperature`
    of a sample is a tensor, a number is `fixed_temperature`."""

    def call(*, exclude_values=None, exclude_offsets=None, fixed_temperature=None, **kwargs):
        if fixed_temperature is not None:
            kwargs["temperature"] = fixed_temperature
        exclude = None if exclude_values is None else (exclude_values, exclude_offsets)
        return function(**kwargs, exclude=exclude)

    return call


def embeddings(name, device, types, b, c, d):
    """Query and candidate; a positive is near its query, so that losses are neither 0 nor log C."""
    g = generator(name, device)
    q = torch.randn(b, d, generator=g, device=device)
    k = torch.randn(c, d, generator=g, device=device)
    k[: min(b, c)] = 0.7 * k[: min(b, c)] + 0.7 * q[: min(b, c)]
    return dict(query=q.to(types.input), candidate=k.to(types.input))


def parameters(name, device, types, c, d):
    """Weights of both signs of weighted_l2 that keep logits below about 10, and biases."""
    g = generator(name + "parameters", device)
    w = torch.randn(d, generator=g, device=device) * 0.3 + 0.5
    w = w * (2 / math.sqrt(d))
    bias = torch.randn(c, generator=g, device=device)
    return w.to(types.table), bias.to(types.table)


def ids(name, device, rows, c, columns, kinds):
    g = generator(name + "ids", device)
    shape = [columns] if columns else []
    return dict(
        query_group=torch.randint(-1, kinds, (rows, *shape), generator=g, device=device),
        candidate_group=torch.randint(-1, kinds, (c, *shape), generator=g, device=device),
    )


def lists(name, device, b, c, longest):
    """Rows of 0 to `longest` candidates with repeats; the first of them also lists candidate 0 and
    the last one. Positives are listed too: they must stay."""
    g = generator(name + "lists", device)
    lengths = torch.randint(longest + 1, (b,), generator=g, device=device)
    rows = [torch.randint(c, (n,), generator=g, device=device) for n in lengths.tolist()]
    if rows:
        rows[0] = torch.cat([rows[0], torch.tensor([0, c - 1, c - 1], device=device)])
    offsets = torch.tensor([0] + [len(row) for row in rows], device=device).cumsum(0)
    values = torch.cat([row.sort().values for row in rows]) if rows else offsets[:0]
    return {"exclude_values": values, OFFSETS: offsets}


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    # Below, just below and above the tiles of queries, candidates and width.
    b, c, d = (7, 19, 20) if interpret_small else (63, 211, 50)

    def problem(name, b=b, c=b, d=d, **options):
        return embeddings(name, device, types, b, c, d) | options

    def l2(name, b=b, c=b, d=d, **options):
        weight, _ = parameters(name, device, types, c, d)
        return problem(name, b, c, d, similarity="weighted_l2", weight=weight, **options)

    def sample(name, case):
        return Sample(
            name,
            case,
            floor={"output": 10.0},
            why="the loss is the difference of two logits of this size",
        )

    # Sizes.
    sizes = {
        "one_query": (1, c, d),
        "many_queries": (35 if interpret_small else 300, 2 * c, d),
        "width_1": (b, c, 1),
        "width_130": (b, c // 2, 130),
        "width_300": (b, c // 2, 300),
        "full_tiles": (32, 32, 16) if interpret_small else (192, 384, 64),
    }
    for name, (rows, columns, width) in sizes.items():
        # Distances grow with the width, and p inherits their rounding.
        temperature = math.sqrt(width) if width < 130 else float(width)
        yield sample(name, problem(name, rows, columns, width, fixed_temperature=temperature))
    yield sample("one_pair", l2("one_pair", 1, 1))
    for reduction in ("mean", "none"):
        yield Sample(f"no_query_{reduction}", l2("none", 0, 3, reduction=reduction))

    # Similarities. The default weight is 1; weights of both signs are the default of `l2`.
    yield sample("dot", problem("dot", fixed_temperature=math.sqrt(d), reduction="none"))
    yield sample("cosine", problem("cosine", similarity="cosine", fixed_temperature=0.1))
    yield sample("weighted_l2", l2("weighted_l2", c=c))
    case = problem("plain_l2", similarity="weighted_l2", fixed_temperature=math.sqrt(d))
    yield sample("plain_l2", case)
    case = l2("zero_weight")
    yield sample("zero_weight", case | {"weight": torch.zeros_like(case["weight"])})

    # The positive of each query: any candidate, the same one for several queries.
    g = generator("positive", device)
    positive = torch.randint(c, (b,), generator=g, device=device)
    positive[:3] = c - 1
    distinct = torch.randperm(c, generator=g, device=device)[:b]
    yield sample("positive", l2("positive", c=c, positive=positive, reduction="sum"))

    # Exclusions, alone and together.
    yield sample("groups", l2("groups", c=c, **ids("groups", device, b, c, 0, 4)))
    yield sample("group_columns", l2("columns", c=c, **ids("columns", device, b, c, 3, 9)))
    case = ids("wide", device, b, c, 2, 3)
    wide = {k: torch.where(v > 0, v + 2**40, v) for k, v in case.items()}
    yield sample("wide_ids", l2("wide", c=c, **wide, reduction="none"))
    yield sample("lists", l2("lists", c=c, **lists("lists", device, b, c, 6)))
    empty = dict(exclude_values=distinct[:0], exclude_offsets=torch.zeros_like(positive[:1]))
    empty[OFFSETS] = empty[OFFSETS].expand(b + 1).clone()
    yield sample("empty_lists", l2("empty_lists", c=c, **empty))
    every = ids("every", device, b, c, 2, 5) | lists("every", device, b, c, c)
    yield sample("groups_and_lists", l2("every", c=c, **every, reduction="none"))

    # All negatives left out: loss and gradients are 0. For all queries, and for every second one.
    same = dict(query_group=torch.zeros_like(positive), candidate_group=positive.new_zeros(c))
    for reduction in ("mean", "none"):
        yield Sample(f"all_excluded_{reduction}", l2("all", c=c, **same, reduction=reduction))
    half = same | {"query_group": torch.arange(b, device=device) % 2}
    yield sample("half_excluded", l2("half", c=c, **half, reduction="none"))

    # Bias, temperature.
    _, bias = parameters("bias", device, types, c, d)
    yield sample("bias", l2("bias", c=c, candidate_bias=bias))
    gone = torch.arange(c, device=device) % 3 == 1
    gone[positive] = False
    case = l2("gone", c=c, candidate_bias=bias.masked_fill(gone, -math.inf), positive=positive)
    yield sample("bias_minus_inf", case)
    # Positives far below all others, whose log-sum-exp then begins with them or is lost.
    for name, low in (("far_below", -1e30), ("minus_inf", -math.inf)):
        below = bias.clone()
        below[:2] = max(low, torch.finfo(types.table).min) if low > -math.inf else low
        case = problem(name, c=c, candidate_bias=below, fixed_temperature=math.sqrt(d))
        yield Sample(f"positive_{name}", case | {"reduction": "none"})
    # The maximum grows from tile to tile, also where 4 programs share the candidates of a query.
    rising = 80 * torch.arange(300, device=device) / 300
    yield Sample(
        "growing",
        problem("growing", c=300, fixed_temperature=math.sqrt(d), candidate_bias=rising),
        floor={"output": 80.0},
        why="the loss is the difference of two logits of this size",
    )
    # Far higher behind the first tile of a program's candidates than in it.
    step = 100.0 * (torch.arange(300, device=device) >= 64)
    yield Sample(
        "outgrown",
        problem("outgrown", c=300, fixed_temperature=math.sqrt(d), candidate_bias=step),
        floor={"output": 100.0},
        why="the loss is the difference of two logits of this size",
    )
    temperature = torch.tensor(0.7, device=device, dtype=types.table)
    yield sample("temperature", l2("temperature", c=c, temperature=temperature))

    # Both directions.
    yield sample("symmetric", l2("symmetric", symmetric=True))
    yield sample("symmetric_more", l2("more", c=c, symmetric=True, reduction="none"))
    # Candidates that are nobody's positive, with scores whose exponentials overflow.
    yield sample("symmetric_far", problem("far", c=c, symmetric=True, fixed_temperature=0.1))
    everything = dict(
        candidate_bias=bias, temperature=temperature, positive=distinct, symmetric=True
    ) | ids("everything", device, b, c, 2, 6) | lists("everything", device, b, c, 5)  # fmt: skip
    for reduction in ("mean", "none"):
        name = f"everything_{reduction}"
        yield sample(name, l2(name, c=c, **everything, reduction=reduction))

    # Logits of +-1e4, exact in every dtype (small integers): positives below or above the rest.
    case = problem("extreme", c=c, reduction="none")
    q, k = torch.zeros_like(case["query"]), torch.zeros_like(case["candidate"])
    q[:, 0], k[:, 0] = 128.0, -80.0
    k[: c // 2, 0] = 80.0
    q[1::2] *= -1
    oracle = types.input == torch.float64
    yield Sample(
        "extreme",
        case | {"query": q, "candidate": k},
        floor={"output": 1e4, "query": 1e4 * 80, "candidate": 1e4 * 128} if oracle else {},
        why="the oracle itself takes differences of numbers of size 1e4" if oracle else "",
    )

    # One candidate that is far away costs the others no precision.
    case = l2("far", c=c)
    case["candidate"][c // 2, 0] = 1e4
    yield Sample("far", case)

    # A mean of 100 times the spread: nothing is left without centring.
    if torch.finfo(types.input).bits > 16:
        for similarity in ("dot", "weighted_l2"):
            make = l2 if similarity == "weighted_l2" else problem
            case = make(f"offset_{similarity}", c=c)
            case["fixed_temperature"] = math.sqrt(d) if similarity == "dot" else 1.0
            case["candidate"] = case["candidate"] + 100
            if similarity == "weighted_l2":
                case["query"] = case["query"] + 100
            yield Sample(
                f"offset_{similarity}",
                case,
                floor={"output": 1000.0, "weight": 1.0}
                if similarity == "weighted_l2"
                else {"output": 10.0},
                why="100 eps is lost when the spread is stored beside the mean, times the logits",
            )


def _private(device: str, op: str) -> Iterator[tuple]:
    """Arguments of the private ops; autograd sits above them, so nothing requires a gradient."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(5, 6, generator=g, device=device)
    c = torch.randn(7, 6, generator=g, device=device)
    bias = torch.randn(7, generator=g, device=device)
    positive = torch.tensor([0, 6, -1, 3, 3], device=device)
    rows = torch.tensor([[0, 1], [1, 1], [2, 0], [-1, 3], [0, 0]], device=device)
    columns = torch.tensor([[0, 5], [3, 1], [2, 2], [0, 9], [7, 7], [1, 1], [2, 6]], device=device)
    values = torch.tensor([1, 2, 6, 0], device=device)
    offsets = torch.tensor([0, 2, 3, 3, 3, 4], device=device)
    for rules in ((rows, columns, values, offsets), (None,) * 4):
        pairs = (x, c, bias if rules[0] is not None else None, positive, *rules)
        if op.endswith("_fwd"):
            yield *pairs, True
            yield *pairs, False
        else:
            loss = torch.ones(5, device=device) * (positive >= 0)
            lse = torch.stack([3 * loss, torch.zeros_like(loss)])
            yield *pairs, loss, lse, torch.arange(5.0, device=device)


def _rounding_band(backend: str, sample: Sample) -> float:
    """On triton the centred operands and the probabilities are rounded to the dtype of the query
    (one eps of it) for the tensor cores; the loss and the parameters may be float32."""
    given = sample.kwargs
    query, candidate = given["query"], given["candidate"]
    if torch.finfo(query.dtype).bits == 16:
        return torch.finfo(query.dtype).eps if backend == "triton" else 0.0
    # The operands whose products are the scores.
    similarity = given.get("similarity", "dot")
    if similarity == "cosine":
        query, candidate = F.normalize(query), F.normalize(candidate)
    if similarity == "weighted_l2":
        weight = given.get("weight")
        query = 2 * query * (1 if weight is None else weight.detach().abs().max())
    temperature = given.get("fixed_temperature", given.get("temperature"))
    temperature = 1.0 if temperature is None else float(temperature)
    return split_band(backend, query.detach() / temperature, candidate.detach())


OP = Op(
    "in_batch_cross_entropy",
    by_tensors(fastrec.in_batch_cross_entropy),
    by_tensors(in_batch_cross_entropy_ref),
    _samples,
    differentiable=("query", "candidate", "weight", "candidate_bias", "temperature"),
    private=("in_batch_cross_entropy_fwd", "in_batch_cross_entropy_bwd"),
    private_samples=_private,
    representative=("groups_and_lists", "everything_none"),
    complete=("everything_none",),
    many_tasks=("many_queries", "symmetric_more"),
    refuses={("triton", "float64"): "float64"},
    rounding_band=_rounding_band,
)
