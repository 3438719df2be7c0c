# SPDX-License-Identifier: Apache-2.0
"""in_batch_cross_entropy with the candidates of 2 and 3 gloo processes, against one with the
whole batch.

The generated samples of the op run split, within the op's own error budget.
"""

import functools
import re

import pytest
import torch
import torch.distributed as dist
from groups import backends_here, cases_here, message_of, within_budget, worlds_and_types
from op_db.case import TYPES, promote, run, upstream_of
from op_db.in_batch_cross_entropy import OP
from torch.distributed.device_mesh import init_device_mesh

from fastrec import in_batch_cross_entropy

BACKENDS = backends_here(OP.name)
# Parts of the queries and of the candidates, by rank. Equal parts keep the default positives.
CUTS = {
    2: {"even": ((0.5, 0.5), (0.5, 0.5)), "uneven": ((0.8, 0.2), (0.8, 0.2))},
    3: {"apart": ((0.2, 0.8, 0.0), (0.3, 0.0, 0.7))},
}
TESTED = [t for t in TYPES if t.name in ("float32", "bfloat16")]
ROWS = ("query", "query_group", "positive")
COLUMNS = ("candidate", "candidate_group", "candidate_bias")


def part_of(shares, size, rank):
    ends = [0]
    for share in shares[:-1]:
        ends.append(min(size, ends[-1] + round(share * size)))
    ends.append(size)
    return slice(ends[rank], ends[rank + 1])


def slices_of(cut, kwargs, rank):
    sizes = len(kwargs["query"]), len(kwargs["candidate"])
    return (part_of(shares, size, rank) for shares, size in zip(cut, sizes, strict=True))


def split(group, cut, **kwargs):
    """The op on this rank's slices; slicing puts the gradients in their place."""
    rows, columns = slices_of(cut, kwargs, dist.get_rank(group))
    if kwargs.get("positive") is None and (cut[0] != cut[1] or rows != columns):
        kwargs["positive"] = torch.arange(len(kwargs["query"]))
    for names, own in ((ROWS, rows), (COLUMNS, columns)):
        for name in names:
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][own]
    values, offsets = (kwargs.pop(name, None) for name in ("exclude_values", "exclude_offsets"))
    if values is not None:
        offsets = offsets[rows.start : rows.stop + 1]
        kwargs["exclude"] = values[offsets[0] : offsets[-1]], offsets - offsets[0]
    return in_batch_cross_entropy(**kwargs, group=group)


def samples(types, backend):
    return {s.name: s for s in OP.samples("cpu", types, backend == "triton")}


def names_of(backend):
    """Where it is slow, a part of the samples."""
    names = list(samples(TYPES[0], backend))
    small = {*OP.representative, *OP.complete, "dot", "cosine", "groups_and_lists", "symmetric"}
    return [name for name in names if backend == "cpp" or name in small]


def of_sample(group, sample, cut, backend):
    """This rank's losses and gradients, for the upstream gradient of one process."""
    kwargs, leaves = dict(sample.kwargs), {}
    for name in OP.differentiable:
        if kwargs.get(name) is not None:
            kwargs[name] = leaves[name] = kwargs[name].detach().requires_grad_()
    if (fixed := kwargs.pop("fixed_temperature", None)) is not None:
        kwargs["temperature"] = fixed
    rows, _ = slices_of(cut, kwargs, dist.get_rank(group))
    loss = split(group, cut, **kwargs, backend=backend)
    # The losses of one process: all of them, their sum, or their mean.
    size, upstream = len(kwargs["query"]), upstream_of(loss.detach())
    if kwargs.get("reduction") == "none":
        upstream = upstream_of(torch.empty(size))[rows]
    elif kwargs.get("reduction") != "sum":
        loss = loss * ((rows.stop - rows.start) / max(size, 1))
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream.to(loss.dtype))
    return {"output": loss.detach()} | dict(zip(leaves, grads, strict=True))


def every_sample(group, backends, types):
    cuts, found = CUTS[dist.get_world_size(group)], {}
    for backend in backends:
        for name in names_of(backend):
            if name in samples(types, backend):
                for cut in cuts:
                    sample = samples(types, backend)[name]
                    found[backend, name, cut] = of_sample(group, sample, cuts[cut], backend)
    return found


@pytest.fixture(scope="module", params=worlds_and_types(CUTS, TESTED))
def results(request, ranks):
    world, types = request.param
    return world, types, ranks(world, every_sample, BACKENDS, types)


@functools.cache
def expected(backend, types, name):
    sample = samples(types, backend)[name]
    exact = run(OP.reference, promote(sample), OP.differentiable)
    return exact, run(OP.reference, sample, OP.differentiable)


@pytest.mark.parametrize("backend, name", cases_here(OP.name, names_of))
def test_the_ranks_together_are_one_process(results, backend, name):
    world, types, found = results
    if name not in samples(types, backend):
        pytest.skip(f"no such sample in {types}")
    sample, one = samples(types, backend)[name], expected(backend, types, name)
    for cut in CUTS[world]:
        parts, whole = [rank[backend, name, cut] for rank in found], {}
        for key in parts[0]:
            values = [part[key] for part in parts]
            if key == "output" and values[0].dim():
                whole[key] = torch.cat(values)
            else:  # a scalar, a parameter of all ranks, or zero but for the own rows
                whole[key] = torch.stack(values).double().sum(0).to(values[0].dtype)
        within_budget(OP, backend, sample, one, whole, cut)


def problem(rows=7, columns=9, width=4):
    g = torch.Generator().manual_seed(5)
    return dict(
        query=torch.randn(rows, width, generator=g),
        candidate=torch.randn(columns, width, generator=g),
        candidate_bias=torch.randn(columns, generator=g),
        weight=torch.rand(width, generator=g),
        similarity="weighted_l2",
        query_group=torch.arange(rows) % 3,
        candidate_group=torch.arange(columns) % 4,
        exclude_values=torch.tensor([1, 4, 8, 0, 2, 3]),
        exclude_offsets=torch.tensor([0, 3, 3, 4, 4, 6, 6, 6]),
        positive=torch.tensor([8, 0, 2, 1, 5, 7, 3]),
        symmetric=True,
    )


def behaviour(group):
    """What each rank sees, by name of the test that reads it."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    case, seen, cut = problem(), {}, next(reversed(CUTS[world].values()))
    names = ("query", "candidate", "candidate_bias", "weight")
    leaves = [case[name].requires_grad_() for name in names]
    rows, columns = slices_of(cut, case, rank)

    def loss_of(**change):
        return split(group, cut, **case | {"reduction": "sum"} | change)

    def grads(loss, *tensors, **options):
        return torch.autograd.grad(loss, tensors or leaves, **options)

    loss = loss_of()
    first = grads(loss, retain_graph=True)
    again, second = grads(loss), grads(loss_of())
    seen["same_bits"] = [*map(torch.equal, first, again), *map(torch.equal, first, second)]
    seen["used_twice"] = grads(loss_of() + loss_of(temperature=0.5))
    seen["query_only"] = grads(loss_of(candidate=case["candidate"].detach()), leaves[0])
    seen["candidate_only"] = grads(loss_of(query=case["query"].detach()), leaves[1])
    for symmetric in (False, True):
        first = grads(loss_of(symmetric=symmetric), *leaves[:2], create_graph=True)
        seen["penalty", symmetric] = grads(sum(grad.square().sum() for grad in first))
    counts = [part_of(cut[1], 9, r) for r in range(world)]
    counts = [part.stop - part.start for part in counts]
    known = loss_of(symmetric=False, candidates_per_rank=counts)
    seen["counts"] = torch.equal(known, loss_of(symmetric=False))
    seen["counts"] &= torch.equal(loss, loss_of(candidates_per_rank=counts))
    mesh = init_device_mesh("cpu", (world,))
    own = dict(query=case["query"][rows], candidate=case["candidate"][columns])
    own["positive"] = case["positive"][rows]
    seen["mesh"] = torch.equal(
        in_batch_cross_entropy(**own, group=mesh), in_batch_cross_entropy(**own, group=group)
    )
    with torch.no_grad():
        seen["no_grad"] = loss_of()
    with torch.autocast("cpu", torch.bfloat16):
        seen["autocast"] = loss_of().detach()

    # Data parallel: the same module on all ranks, equally many users each.
    torch.manual_seed(1)
    tower, users = torch.nn.Linear(5, 4), torch.randn(4 * world, 2, 5)
    parallel = torch.nn.parallel.DistributedDataParallel(tower)
    own = users[4 * rank : 4 * rank + 4]
    in_batch_cross_entropy(parallel(own[:, 0]), parallel(own[:, 1]), group=group).backward()
    one = torch.nn.Linear(5, 4)
    one.load_state_dict(tower.state_dict())
    in_batch_cross_entropy(one(users[:, 0]), one(users[:, 1])).backward()
    pairs = zip(tower.parameters(), one.parameters(), strict=True)
    seen["ddp"] = [(a.grad, b.grad) for a, b in pairs]

    plain = dict(query=leaves[0][:3], candidate=leaves[1][: 4 + rank])

    def error(name, **change):
        arguments = {"group": group} | plain | change
        seen["error", name] = message_of(lambda: in_batch_cross_entropy(**arguments))

    ids, one_rank = torch.arange(3), rank == 0
    error("width", query=leaves[0][:3, : 4 - rank], candidate=leaves[1][:, : 4 - rank])
    error("dtype", **{k: v.double() if one_rank else v for k, v in plain.items()})
    error("bias", candidate_bias=torch.zeros(4) if one_rank else None)
    error("columns", query_group=ids[:, None].expand(3, 1 + rank),
          candidate_group=torch.zeros(4 + rank, 1 + rank).long())  # fmt: skip
    error("exclude", exclude=(ids[:0], torch.zeros(4).long()) if one_rank else None)
    error("symmetric", symmetric=one_rank)
    error("grad", candidate=plain["candidate"].detach() if one_rank else plain["candidate"])
    error("fewer", query=leaves[0][:4], candidate=leaves[1][:3])
    error("positive", positive=torch.tensor([0, 1, 99]))
    error("twice", positive=torch.tensor([0, 1, 1]), symmetric=True)
    error("listed", exclude=(torch.tensor([99]), torch.tensor([0, 0, 0, 1])))
    error("ranks", candidates_per_rank=[4 + rank] * (world + 1))
    error("told", candidates_per_rank=[7] * world, symmetric=True)
    error("alone", candidates_per_rank=[4 + rank] * world, group=None)
    return seen


@pytest.fixture(scope="module", params=CUTS)
def seen(request, ranks):
    return ranks(request.param, behaviour)


def one_process(names, **change):
    case = {k: v for k, v in problem().items() if not k.startswith("exclude")}
    case["exclude"] = tuple(problem()[f"exclude_{part}"] for part in ("values", "offsets"))
    leaves = {name: case[name].requires_grad_() for name in names}
    loss = in_batch_cross_entropy(**case | {"reduction": "sum"} | change)
    return loss.detach(), leaves, loss


def summed(seen, name):
    return [torch.stack(parts).sum(0) for parts in zip(*(rank[name] for rank in seen), strict=True)]


NAMES = ("query", "candidate", "candidate_bias", "weight")


def test_twice_the_same_bits_also_from_one_graph(seen):
    assert all(rank["same_bits"] == [True] * 8 for rank in seen)


def test_two_losses_of_the_same_candidates(seen):
    _, leaves, loss = one_process(NAMES)
    first = torch.autograd.grad(loss, list(leaves.values()))
    _, leaves, loss = one_process(NAMES, temperature=0.5)
    second = torch.autograd.grad(loss, list(leaves.values()))
    for got, a, b in zip(summed(seen, "used_twice"), first, second, strict=True):
        torch.testing.assert_close(got, a + b)


@pytest.mark.parametrize("symmetric", [False, True])
def test_second_derivatives_are_those_of_one_process(seen, symmetric):
    _, leaves, loss = one_process(NAMES, symmetric=symmetric)
    sides = [leaves["query"], leaves["candidate"]]
    first = torch.autograd.grad(loss, sides, create_graph=True)
    penalty = sum(grad.square().sum() for grad in first)
    expected = torch.autograd.grad(penalty, list(leaves.values()))
    for got, whole in zip(summed(seen, ("penalty", symmetric)), expected, strict=True):
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["query", "candidate"])
def test_one_side_frozen(seen, name):
    _, leaves, loss = one_process((name,))
    (expected,) = torch.autograd.grad(loss, list(leaves.values()))
    (got,) = summed(seen, f"{name}_only")
    torch.testing.assert_close(got, expected)


def test_without_a_graph_and_under_autocast(seen):
    loss, *_ = one_process(())
    total = torch.stack([rank["no_grad"] for rank in seen]).sum()
    torch.testing.assert_close(total, loss)
    assert not any(rank["no_grad"].requires_grad for rank in seen)
    low = torch.stack([rank["autocast"] for rank in seen])
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.sum(), loss, rtol=2e-2, atol=2e-2)


def test_known_counts_and_a_mesh_change_nothing(seen):
    assert all(rank["counts"] and rank["mesh"] for rank in seen)


def test_the_average_of_ddp_is_the_gradient_of_the_mean_over_all_queries(seen):
    for rank in seen:
        for got, expected in rank["ddp"]:
            torch.testing.assert_close(got, expected)


ERRORS = {
    "width": r"ValueError: ranks of the group differ in the width: \[4, 3",
    "dtype": r"differ in the dtype of query: \[0, 1",
    "bias": r"differ in having a candidate_bias: \[1, 0",
    "columns": r"differ in the columns of query_group: \[1, 2",
    "exclude": r"differ in having exclude: \[1, 0",
    "symmetric": r"differ in symmetric: \[1, 0",
    "grad": r"differ in whether candidate needs a gradient: \[0, 1",
    "fewer": "ValueError: 3 candidates for 4 queries",
    "positive": r"IndexError: positive\[2\] is 99, expected a value in \[0, (9|15)\)",
    "twice": "ValueError: symmetric needs a different positive for each query",
    "listed": r"IndexError: exclude values\[0\] is 99, expected a value in \[0, (9|15)\)",
    "ranks": r"ValueError: candidates_per_rank must be of \d ranks with \d on rank \d, got",
    "told": r"ValueError: candidates_per_rank is \[7, 7.*, the ranks have \[4, 5",
    "alone": "ValueError: candidates_per_rank belongs to a group, got none",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong_on_every_rank(seen, name):
    for rank in seen:
        assert re.search(ERRORS[name], rank["error", name]), rank["error", name]
