# SPDX-License-Identifier: Apache-2.0
"""Sections `graphs` and `compile`, on the representative samples of every op of tests/op_db."""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from itertools import islice, zip_longest

import torch
from torch import Tensor

from benchmarks.gpu.context import ROOT, Context
from fastrec.random import Rng

sys.path.insert(0, str(ROOT / "tests"))
TYPES = ("bfloat16", "float32")


def samples(device: str, tiny: bool) -> Iterator[tuple]:
    """(op, sample, key): the first sample of every op, then the second of every op, and so on, so
    that a section that is cut has seen all ops; in bfloat16 before float32."""
    by_op = []
    for op in importlib.import_module("op_db").OPS:
        chosen = []
        for types in sorted(op.types, key=lambda types: types.name):
            if types.name in TYPES:
                found = {sample.name: sample for sample in op.samples(device, types, tiny)}
                names = op.representative
                chosen += [(op, found[name], f"{op.name} {types.name} {name}") for name in names]
        by_op.append(chosen[: 1 if tiny else None])
    for group in zip_longest(*by_op):
        yield from filter(None, group)


def _each(context: Context, check: Callable[[object, object], dict]) -> None:
    for op, sample, key in islice(samples(context.device, context.tiny), context.limit):
        context.attempt(key, functools.partial(check, op, sample))


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


class _Again:
    """A graph without CUDA: `replay` calls the function again."""

    def __init__(self, call: Callable[[], dict[str, Tensor]]):
        self.call, self.results = call, call()

    def replay(self) -> None:
        for name, value in self.call().items():
            self.results[name].copy_(value)


def captured(call: Callable[[], dict[str, Tensor]], cuda: bool):
    """(graph, its results, which `replay` fills again)."""
    if not cuda:
        again = _Again(call)
        return again, again.results
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels, creates workspaces
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def graphs(context: Context) -> None:
    """Forward + backward captured once and replayed for three steps of the seed (two on CPU
    tensors): the same bits as without a graph, and other masks at every step."""
    run = importlib.import_module("op_db.case").run

    def check(op, sample) -> dict:
        kwargs, step = dict(sample.kwargs), None
        if kwargs.get("rng") is not None:
            step = torch.zeros((), dtype=torch.int64, device=context.device)
            seed = torch.full_like(step, 2**61 + 12345)
            kwargs["rng"] = Rng(seed, step)
        given = dataclasses.replace(sample, kwargs=kwargs)

        def call() -> dict[str, Tensor]:
            return run(op.function, given, op.differentiable)

        graph, results = captured(call, context.cuda)
        seen = []
        for now in range(2 if context.tiny else 3):
            if step is not None:
                step.fill_(now)
            for value in results.values():
                value.zero_()
            graph.replay()
            seen.append({name: value.clone() for name, value in results.items()})
            if not _equal(call(), seen[-1]):
                return {"failed": f"step {now}: other bits than without a graph"}
        if step is not None and _equal(seen[0], seen[1]):
            return {"failed": "the masks do not change with the step"}
        return {"passed": True, "seeded": step is not None}

    _each(context, check)


def compile(context: Context) -> None:
    """torch.compile(fullgraph=True) of the native backend: the same results within the budget."""
    case = importlib.import_module("op_db.case")
    compiler = "inductor" if context.cuda else "eager"

    def check(op, sample) -> dict:
        if not context.cuda and "cpp" not in op.compiles:
            return {"failed": "not on cpp"}
        torch._dynamo.reset()
        compiled = torch.compile(op.function, fullgraph=True, dynamic=True, backend=compiler)
        actual = case.run(compiled, sample, op.differentiable)
        plain = case.run(op.function, sample, op.differentiable)
        exact = case.run(op.reference, case.promote(sample), op.differentiable)
        for name, value in actual.items():
            error, budget = case.excess(value, plain[name], exact[name], sample.floor.get(name, 0))
            if not error <= budget:
                return {"failed": f"{name}: error {error:.3g}, budget {budget:.3g}"}
        return {"passed": True}

    _each(context, check)
