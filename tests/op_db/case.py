# SPDX-License-Identifier: Apache-2.0
"""What a case of an operator is, how it is run, and how far from float64 its results may be.

A sample is a named set of arguments; its floating point tensors are created in the tested type and
promoted to float64 for the oracle, so that both see the same values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Types:
    """Dtypes of the activations and of the parameters of one family of cases."""

    name: str
    input: torch.dtype
    table: torch.dtype

    def __str__(self) -> str:
        return self.name


TYPES = (
    Types("float32", torch.float32, torch.float32),
    Types("float64", torch.float64, torch.float64),
    Types("bfloat16", torch.bfloat16, torch.bfloat16),
    Types("float16", torch.float16, torch.float16),
    Types("bfloat16_input_float32_table", torch.bfloat16, torch.float32),
)


@dataclass(frozen=True)
class Sample:
    name: str
    kwargs: dict[str, Any]
    # Output or argument name -> size of the intermediate numbers whose rounding no implementation
    # of the documented formula avoids; `why` says which. Adds 4 eps x size to the budget.
    floor: dict[str, float] = field(default_factory=dict)
    why: str = ""

    def __post_init__(self):
        assert bool(self.floor) == bool(self.why), f"{self.name}: a budget override needs a reason"


def no_band(backend: str, sample: Sample) -> float:
    return 0.0


@dataclass(frozen=True)
class Op:
    """`function` and `reference` return a tensor or a tuple of tensors; those that are not floating
    point (indices, say) must be equal and have no gradient."""

    name: str
    function: Callable
    reference: Callable
    # (device, types, interpret_small) -> samples; interpret_small: every kind of case, at sizes for
    # the Triton interpreter.
    samples: Callable[[str, Types, bool], Iterator[Sample]]
    differentiable: tuple[str, ...]
    private: tuple[str, ...]
    # (device, private op) -> argument tuples for opcheck.
    private_samples: Callable[[str, str], Iterator[tuple]]
    # Names of the samples that every test of memory, graphs and compilers runs, and of those that
    # use every differentiable argument.
    representative: tuple[str, ...]
    complete: tuple[str, ...]
    # Of an op that drops: the arguments that are longer for a longer batch.
    per_row: tuple[str, ...] = ()
    # More names for the test of 1, 2 and 4 threads: those with many tasks.
    many_tasks: tuple[str, ...] = ()
    types: tuple[Types, ...] = TYPES
    # (backend, types name) -> the message of the error raised instead of computing.
    refuses: dict[tuple[str, str], str] = field(default_factory=dict)
    # Backends whose result is promised to have the same bits on every call and for every number of
    # threads.
    deterministic: tuple[str, ...] = ("cpp", "triton")
    # Backends that torch.compile(fullgraph=True) takes, of those that the suite compiles.
    compiles: tuple[str, ...] = ("reference", "cpp")
    # (backend, sample) -> what is added to the budget, relative to the largest exact value.
    rounding_band: Callable[[str, Sample], float] = no_band


def split_band(backend: str, input: Tensor, table: Tensor) -> float:
    """Triton multiplies float32 as sums of two bfloat16, unless "ieee" is asked for: each product
    is wrong by up to 2^-15 of it, which is that error in a score and, relatively, in what is
    computed from exponentials of it; once more in the product with these."""
    asked = torch.backends.cuda.matmul.fp32_precision == "ieee"
    if backend != "triton" or input.dtype != torch.float32 or asked or not table.numel():
        return 0.0
    score = input.double().norm(dim=-1).nan_to_num(0).max() if input.numel() else torch.zeros(())
    return 2.0**-15 * (1 + 2 * (score * table.double().norm(dim=-1).max()).item())


def generator(name: str, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(sum(map(ord, name)))


def outputs_of(function: Callable, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    result = function(**kwargs)
    if isinstance(result, Tensor):
        return {"output": result}
    return {f"output_{i}": value for i, value in enumerate(result)}


def run(
    function: Callable,
    sample: Sample,
    differentiable: tuple[str, ...],
    upstream: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Outputs and gradients, by name. `upstream`: the gradients of the outputs."""
    kwargs, leaves = dict(sample.kwargs), {}
    for name in differentiable:
        if kwargs.get(name) is not None:
            kwargs[name] = leaves[name] = kwargs[name].detach().requires_grad_()
    outputs = outputs_of(function, kwargs)
    if upstream is None:
        grads = gradients(outputs, leaves)
    else:
        roots = [outputs[name] for name in upstream]
        found = torch.autograd.grad(roots, list(leaves.values()), list(upstream.values()))
        grads = dict(zip(leaves, found, strict=True))
    return {name: value.detach() for name, value in outputs.items()} | grads


def gradients(
    outputs: dict[str, Tensor], leaves: dict[str, Tensor], scale: float = 1.0, **options
) -> dict[str, Tensor]:
    """Gradients of the leaves for `scale` times `upstream_of` every differentiable output."""
    if not leaves:
        return {}
    roots = [value for value in outputs.values() if value.requires_grad]
    upstream = [scale * upstream_of(value).to(value.dtype) for value in roots]
    grads = torch.autograd.grad(roots, list(leaves.values()), upstream, **options)
    return dict(zip(leaves, grads, strict=True))


def as_views(op: Op, sample: Sample, first: int, count: int) -> Sample:
    """The batch of a sample `count` times end to end, copy i as view `first` + i of it."""
    kwargs = dict(sample.kwargs)
    for name in op.per_row:
        if isinstance(value := kwargs[name], Tensor):
            copies = [value] * count
            if name == "keys":
                copies = [value + (first + i << 32) for i in range(count)]
            elif name == "offsets":
                copies = [value[:1], *(value[1:] + i * value[-1] for i in range(count))]
            kwargs[name] = torch.cat(copies)
    return Sample(sample.name, kwargs, sample.floor, sample.why)


def upstream_of(output: Tensor) -> Tensor:
    """A non-constant gradient of mixed sign, equal for every dtype."""
    index = torch.arange(output.numel(), device=output.device, dtype=torch.float64)
    return (torch.cos(3 * index) + 0.25).reshape(output.shape)


def promote(sample: Sample) -> Sample:
    """The same values in float64."""

    def double(value):
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return Sample(
        sample.name, {k: double(v) for k, v in sample.kwargs.items()}, sample.floor, sample.why
    )


def excess(actual: Tensor, low: Tensor, exact: Tensor, floor: float = 0.0) -> tuple[float, float]:
    """(error, budget): at most twice the error of the reference in the same dtype, and a rounding
    band of 4 eps relative to the largest exact value (or to `floor`, see Sample). 64 eps in
    float64, where the oracle is the reference in the same dtype and its own error is not seen."""
    if actual.numel() == 0:
        return 0.0, 0.0
    if not actual.is_floating_point():
        return float((actual != exact).sum()), 0.0
    error = (actual.double() - exact).abs()
    same = actual.double() == exact  # infinities
    error = error.masked_fill(same, 0).max().item()
    own = (low.double() - exact).abs().masked_fill(low.double() == exact, 0).max().item()
    size = max(exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0, floor)
    band = 64 if actual.dtype == torch.float64 else 4
    return error, 2 * own + band * torch.finfo(actual.dtype).eps * size
