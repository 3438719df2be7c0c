# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy with the items sharded over 2 and 3 gloo processes, against one process.

The generated samples of the op run sharded, within the op's own error budget.
"""

import functools
import math
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from groups import Ranks, backends_here, cases_here, message_of, within_budget, worlds_and_types
from memory import needs_proc, peak_of
from op_db.case import TYPES, Sample, promote, run
from op_db.linear_cross_entropy import OP
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fastrec import (
    linear_cross_entropy,
    linear_rank,
    linear_topk,
    sampled_linear_cross_entropy,
)
from fastrec.ops.linear_cross_entropy import linear_cross_entropy_ref

BACKENDS = backends_here(OP.name)
# Parts of the items, by rank.
CUTS = {2: {"even": (0.5, 0.5), "uneven": (0.9, 0.1)}, 3: {"empty": (0.3, 0.0, 0.7)}}
SHARDED = ("linear_weight", "linear_bias", "weight")
TESTED = [t for t in TYPES if t.name in ("float32", "bfloat16", "bfloat16_input_float32_table")]


def bounds(cut: tuple[float, ...], items: int) -> list[int]:
    ends = [0]
    for share in cut:
        ends.append(min(items, ends[-1] + math.ceil(share * items)))
    return [*ends[:-1], items]


def sharded(group, cut, backend, **kwargs):
    """The op on this rank's slice of the items; slicing puts its gradients in their place."""
    rank, ends = dist.get_rank(group), bounds(cut, len(kwargs["linear_weight"]))
    for name in SHARDED:
        if kwargs.get(name) is not None:
            kwargs[name] = kwargs[name][ends[rank] : ends[rank + 1]]
    return linear_cross_entropy(**kwargs, group=group, backend=backend)


@functools.cache
def samples(types, backend):
    found = {s.name: s for s in OP.samples("cpu", types, backend == "triton")}
    # The last rank holds nothing but items that are out, however they are cut.
    case = dict(found["bias"].kwargs)
    items = len(case["linear_weight"])
    out = torch.arange(items) >= int(0.3 * items)
    case["linear_bias"] = case["linear_bias"].masked_fill(out, -torch.inf)
    case["target"] = case["target"] % int(0.3 * items)
    return found | {"last_rank_out": Sample("last_rank_out", case)}


def names_of(backend):
    """In the interpreter a part of the samples: it is slow."""
    every = list(samples(TYPES[0], backend))
    small = {*OP.representative, *OP.complete, "almost_one", "many_rows", "last_rank_out"}
    return [name for name in every if backend == "cpp" or name in small]


def every_sample(group, backends, types):
    cuts, found = CUTS[dist.get_world_size(group)], {}
    for backend in backends:
        for name, sample in samples(types, backend).items():
            for cut in cuts if name in names_of(backend) else ():
                function = functools.partial(sharded, group, cuts[cut], backend)
                found[backend, name, cut] = run(function, sample, OP.differentiable)
    return found


@pytest.fixture(scope="module", params=worlds_and_types(CUTS, TESTED))
def results(request, ranks):
    world, types = request.param
    return world, types, ranks(world, every_sample, BACKENDS, types)


@functools.cache
def expected(backend, types, name):
    sample = samples(types, backend)[name]
    exact = run(linear_cross_entropy_ref, promote(sample), OP.differentiable)
    return exact, run(linear_cross_entropy_ref, sample, OP.differentiable)


@pytest.mark.parametrize("backend, name", cases_here(OP.name, names_of))
def test_within_the_budget_of_one_process(results, backend, name):
    world, types, found = results
    sample, one = samples(types, backend)[name], expected(backend, types, name)
    for cut in CUTS[world]:
        parts = [rank[backend, name, cut] for rank in found]
        whole = dict(parts[0])
        for key, value in whole.items():
            if key in SHARDED:  # every rank filled its own items
                whole[key] = torch.stack([part[key] for part in parts]).sum(0)
            else:
                assert all(torch.equal(part[key], value) for part in parts), f"{key} differs"
        within_budget(OP, backend, sample, one, whole, cut)


def problem(n=6, v=10, d=4):
    g = torch.Generator().manual_seed(3)
    x, w, b = (torch.randn(*shape, generator=g) for shape in ((n, d), (v, d), (v,)))
    return dict(input=x, linear_weight=w, linear_bias=b, target=torch.arange(n) % v)


def certain_rows(dtype):
    """Rows whose target has 1 - p of about 1e-6."""
    case = problem(n=6, v=9, d=64)
    w = F.normalize(case["linear_weight"].double())
    x, w = (16 * w[:6]).to(dtype), w.to(dtype)
    return dict(input=x.requires_grad_(), linear_weight=w, target=case["target"])


def grads(loss, *tensors, **options):
    return torch.autograd.grad(loss, tensors, **options)


def behaviour(group):
    """What each rank sees, by name of the test that reads it."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    case, seen = problem(), {}
    call = functools.partial(sharded, group, CUTS[world]["even" if world == 2 else "empty"], None)
    x, w, b = (case[name].requires_grad_() for name in OP.differentiable)
    options = dict(label_smoothing=0.1, z_loss=0.01)

    loss = call(**case, **options)
    first = grads(loss, x, w, b, retain_graph=True)
    again = grads(loss, x, w, b)
    second = grads(call(**case, **options), x, w, b)
    seen["same_bits"] = [*map(torch.equal, first, again), *map(torch.equal, first, second)]

    total = call(**case) + call(**case, **options)
    seen["used_twice"] = [total.detach(), *grads(total, x, w, b)]
    seen["table_only"] = grads(call(**case | {"input": x.detach()}), w, b)
    frozen = {"linear_weight": w.detach(), "linear_bias": b.detach()}
    seen["input_only"] = grads(call(**case | frozen), x)
    with torch.no_grad():
        seen["no_grad"] = call(**case)
    with torch.autocast("cpu", torch.bfloat16):
        loss = call(**case)
    seen["autocast"] = [loss.detach(), *grads(loss, x, w, b)]

    evenly = functools.partial(sharded, group, (1 / world,) * world, None)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("items",))
    for items in (10, 4):  # uneven, and for 3 ranks 2, 2 and 0 items
        table, vector = w[:items].detach(), b[:items].detach()
        table, vector = (
            distribute_tensor(tensor, mesh, [Shard(0)]).requires_grad_()
            for tensor in (table, vector)
        )
        target = case["target"] % items
        loss = linear_cross_entropy(x, table, target, linear_bias=vector, label_smoothing=0.1)
        found = grads(loss, x, table, vector)
        assert all(isinstance(grad, DTensor) for grad in found[1:])
        assert found[1].placements == (Shard(0),)
        whole = [grad.full_tensor() for grad in found[1:]]
        same = linear_cross_entropy(
            x, table, target, linear_bias=vector, label_smoothing=0.1, group=mesh
        )
        seen["dtensor", items] = [loss.detach(), found[0], *whole, torch.equal(same, loss)]

    # What the error about other tables advises, as FSDP has them: other rows on every rank.
    table = distribute_tensor(w.detach(), mesh, [Shard(0)]).requires_grad_()
    gathered = table.full_tensor(grad_placements=[Partial("avg")])
    own = slice(rank, None, world)
    loss = sampled_linear_cross_entropy(x[own], gathered, case["target"][own], torch.arange(10))
    seen["advice"] = grads(loss, table)[0].full_tensor()

    def error(name, **change):
        arguments = {"group": group} | case | change
        seen["error", name] = message_of(lambda: linear_cross_entropy(**arguments))

    short = dict(input=x[: 6 - rank], target=case["target"][: 6 - rank])
    ones = torch.ones(10) if rank == 0 else None
    other = (case["target"] + rank) % 10
    unequal = {"width": dict(linear_weight=w[:, : 4 - rank], input=x[:, : 4 - rank])}
    unequal |= {"rows": short, "targets": dict(target=other), "weight": dict(weight=ones)}
    unequal["picked"] = dict(rows=(torch.arange(6) + rank) % 6)
    unequal["grad"] = dict(input=x if rank else x.detach())
    for name, change in unequal.items():
        error(name, **change)
    seen["error", "recorded"] = message_of(lambda: grads(call(**case), x, create_graph=True))
    error("outside", target=case["target"] + 10 * world - 4)
    error("nothing", linear_weight=w[:0], linear_bias=b[:0])
    error("replicate", linear_weight=distribute_tensor(w.detach(), mesh, [Replicate()]))
    error("columns", linear_weight=distribute_tensor(w.detach(), mesh, [Shard(1)]))
    error("bias", linear_bias=distribute_tensor(b.detach(), mesh, [Shard(0)]))
    error("input", input=distribute_tensor(x.detach(), mesh, [Replicate()]))
    error("kind", group="items")
    error("flat", group=init_device_mesh("cpu", (world, 1), mesh_dim_names=("items", "more")))
    alone = [dist.new_group([r]) for r in range(world)]
    error("member", group=alone[1 - min(rank, 1)])
    table = distribute_tensor(w.detach(), mesh, [Shard(0)])
    error("other", linear_weight=table, linear_bias=None, group=alone[rank])
    rows, target = x.detach(), case["target"]
    others = {
        "rank": lambda: linear_rank(rows, table, target),
        "topk": lambda: linear_topk(rows, table, 2),
        "sampled": lambda: sampled_linear_cross_entropy(rows, table, target, target),
    }
    for name, call_of in others.items():
        seen["error", name] = message_of(call_of)

    for dtype in (torch.float32, torch.bfloat16):
        certain = certain_rows(dtype)
        loss = evenly(**certain, reduction="sum")
        seen["certain", str(dtype)] = grads(loss, certain["input"])[0]

    step = functools.partial(call, target=case["target"], label_smoothing=0.1)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = {name: case[name] for name in OP.differentiable}
    seen["compiled"] = [
        *map(torch.equal, *(grads(f(**arguments), x, w, b) for f in (step, compiled)))
    ]

    plain = linear_cross_entropy(**case)
    one = linear_cross_entropy(**case, group=alone[rank])
    seen["one_rank"] = [*grads(plain, x, w, b), *grads(one, x, w, b)]
    return seen


@pytest.fixture(scope="module", params=CUTS)
def seen(request, ranks):
    return ranks(request.param, behaviour)


def whole(seen, name):
    """The gradients of one process from those of the ranks: the input's is everywhere the same."""
    parts = [rank[name] for rank in seen]
    for part in parts:
        assert torch.equal(part[0], parts[0][0]) and torch.equal(part[1], parts[0][1])
    tables = list(zip(*parts, strict=True))[2:]
    return [*parts[0][:2], *(torch.stack(grads).sum(0) for grads in tables)]


def leaves():
    case = problem()
    return case, [case[name].requires_grad_() for name in OP.differentiable]


def test_twice_the_same_bits_also_from_one_graph(seen):
    assert all(all(rank["same_bits"]) and len(rank["same_bits"]) == 6 for rank in seen)


def test_compiled_without_a_graph_break(seen):
    assert all(rank["compiled"] == [True] * 3 for rank in seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_almost_nothing_keeps_its_digits(seen, dtype):
    """1 - p is 16 float32 roundings of 1, and lse - lse_r has errors of as many: the error of one
    process is 5 % here."""
    case = {k: v.double() if v.is_floating_point() else v for k, v in certain_rows(dtype).items()}
    case["input"] = case["input"].detach().requires_grad_()
    loss = linear_cross_entropy_ref(**case, reduction="sum")
    (exact,) = grads(loss, case["input"])
    assert (exact.abs().amax(1) < 1e-5).all() and (exact.abs().amax(1) > 1e-7).all()
    for rank in seen:
        error = (rank["certain", str(dtype)].double() - exact).abs().amax(1)
        assert (error < 0.06 * exact.abs().amax(1)).all()


def test_two_losses_of_one_table(seen):
    case, tensors = leaves()
    total = linear_cross_entropy(**case)
    total = total + linear_cross_entropy(**case, label_smoothing=0.1, z_loss=0.01)
    for got, value in zip(whole(seen, "used_twice"), [total, *grads(total, *tensors)], strict=True):
        torch.testing.assert_close(got, value)


def test_a_frozen_table_a_frozen_input_and_no_graph(seen):
    case, tensors = leaves()
    loss = linear_cross_entropy(**case)
    grad_x, grad_w, grad_b = grads(loss, *tensors)
    for rank in seen:
        torch.testing.assert_close(rank["input_only"][0], grad_x)
        torch.testing.assert_close(rank["no_grad"], loss.detach())
        assert not rank["no_grad"].requires_grad
    for i, value in enumerate((grad_w, grad_b)):
        got = torch.stack([rank["table_only"][i] for rank in seen]).sum(0)
        torch.testing.assert_close(got, value)


def test_autocast(seen):
    case, tensors = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(**case)
    for got, value in zip(whole(seen, "autocast"), [loss, *grads(loss, *tensors)], strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, value, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("items", [10, 4])
def test_a_table_that_is_a_dtensor(seen, items):
    case, (x, w, b) = leaves()
    loss = linear_cross_entropy(
        x, w[:items], case["target"] % items, linear_bias=b[:items], label_smoothing=0.1
    )
    grad_x, grad_w, grad_b = grads(loss, x, w, b)
    expected = [loss, grad_x, grad_w[:items], grad_b[:items]]
    for rank in seen:
        *got, same = rank["dtensor", items]
        assert same
        for value, reference in zip(got, expected, strict=True):
            torch.testing.assert_close(value, reference)


def test_the_advice_for_other_tables_that_are_dtensors(seen):
    case, (x, w, _) = leaves()
    losses = [
        sampled_linear_cross_entropy(
            x[r :: len(seen)], w, case["target"][r :: len(seen)], torch.arange(10)
        )
        for r in range(len(seen))
    ]
    (expected,) = grads(sum(losses) / len(seen), w)
    for rank in seen:
        torch.testing.assert_close(rank["advice"], expected)


def test_one_rank_is_the_plain_op(seen):
    for rank in seen:
        for plain, one in zip(rank["one_rank"][:3], rank["one_rank"][3:], strict=True):
            torch.testing.assert_close(plain, one)


ERRORS = {
    "recorded": "RuntimeError: linear_cross_entropy with a group has no second derivative",
    "width": r"ValueError: ranks of the group differ in the width: \[4, 3",
    "rows": r"ValueError: ranks of the group differ in the number of rows: \[6, 5",
    "targets": "ValueError: ranks of the group differ in the targets",
    "weight": r"differ in having class weights: \[1, 0",
    "picked": "differ in the scored rows",
    "grad": r"differ in whether input needs a gradient: \[0, 1",
    "outside": r"IndexError: target\[4\] is \d+, expected a value in \[0, [23]0\)",
    "nothing": "ValueError: linear_weight has no rows on any rank",
    "replicate": r"ValueError: linear_weight as a DTensor must be Shard\(0\) .* got \(Replicate",
    "columns": r"ValueError: linear_weight .* got \(Shard\(dim=1\)",
    "bias": "TypeError: linear_bias is a DTensor, linear_weight is not",
    "input": "TypeError: input is a DTensor: pass a tensor",
    "kind": "TypeError: group must be a torch.distributed process group, got <class 'str'>",
    "flat": r"ValueError: .* a mesh of 2 dimensions \('items', 'more'\)",
    **dict.fromkeys(("rank", "topk", "sampled"), "TypeError: linear_weight is a DTensor, which"),
    "member": "ValueError: this process is not a member of group",
    "other": "ValueError: group is not the mesh dimension over which linear_weight is sharded",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong_on_every_rank(seen, name):
    for rank in seen:
        assert re.search(ERRORS[name], rank["error", name]), rank["error", name]


PLAIN = """
    import sys, torch, fastrec
    before = set(sys.modules)
    x = torch.randn(4, 3, requires_grad=True)
    fastrec.linear_cross_entropy(x, torch.randn(9, 3), torch.tensor([0, 8, 1, 2])).backward()
    new = sorted(name for name in set(sys.modules) - before if "distributed" in name)
    assert not new and "fastrec.ops.common.collectives" not in sys.modules, new
"""


def test_without_a_group_nothing_of_it_is_imported():
    subprocess.run([sys.executable, "-c", textwrap.dedent(PLAIN)], check=True)


def peak(group, n, v, d):
    """Peak memory of forward and backward beyond the gradients, as a share of the logits."""
    torch.manual_seed(0)
    x = torch.randn(n, d, requires_grad=True)
    w = torch.randn(v // dist.get_world_size(group), d, requires_grad=True)
    y = torch.randint(v, (n,))

    def step(rows, items):
        return linear_cross_entropy(x[:rows], w[:items], y[:rows] % 64, group=group).backward()

    step(64, 64)
    extra = peak_of(lambda: linear_cross_entropy(x, w, y, group=group).backward())
    return (extra - w.nbytes - x.nbytes) / (4 * n * len(w))


@needs_proc
def test_no_buffer_of_the_size_of_the_logits():
    """In new processes: memory that earlier work left would be used again."""
    pool = Ranks(2)
    assert max(pool.run(peak, 4000, 100_000, 8)) < 0.03
    pool.close()
