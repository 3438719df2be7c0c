# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark entries: `pytest benchmarks/ --benchmark-only`."""

import pytest

from benchmarks.bench import PASS, entries, module


@pytest.mark.parametrize(
    "entry, kind, name",
    [
        pytest.param(entry, kind, name, id=f"{entry.op}-{kind}-{entry.key}-{name}")
        for entry in entries("QUICK")
        for kind in module(entry.op).PASSES
        for name in module(entry.op).implementations(entry, "inductor")
        if "default" not in name  # seconds per call
    ],
)
def test_op(benchmark, entry, kind, name):
    op = module(entry.op)
    function, inputs = op.implementations(entry, "inductor")[name], op.problem(entry)
    benchmark.group = f"{entry.op} {kind} {entry.key}"
    benchmark.pedantic(PASS[kind], args=(function, inputs), rounds=5, warmup_rounds=1)
