"""pytest-benchmark entries: `pytest benchmarks/ --benchmark-only`."""

import pytest
from bench import CE, PASSES, Entry, implementations, problem

SHAPES = ((256, 5_000, 64), (1317, 20_033, 64))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", [n for n in implementations() if "default" not in n])
def test_linear_cross_entropy(benchmark, name, kind, shape):
    inputs = problem(Entry(CE, *shape))
    benchmark.group = f"{CE} {kind} {shape}"
    benchmark.pedantic(
        PASSES[kind],
        args=(implementations()[name], *inputs),
        rounds=5,
        warmup_rounds=1,
    )
