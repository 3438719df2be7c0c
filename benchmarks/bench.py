# SPDX-License-Identifier: Apache-2.0
"""Benchmarks as data: entries (op, sizes, dtype, case) x implementations.

All implementations of an entry run in one process on the same inputs, in turn, and every time
stands beside the error of its result against float64. Peak memory comes from a fresh process each.

The module of an op (`benchmarks/<op>.py`, listed in OPS) provides
    ENTRIES, SMOKE, QUICK     entries of `make bench`, of the suite, of pytest-benchmark
    ELEMENT                   what the table counts ("logit", "pair", ...)
    STORED                    what a plain implementation stores, if not the elements
    PASSES                    ("forward", "both"), one of them, or ("step",): training changes state
    PEERS                     {column of the summary: names of implementations, the best counts}
    GRADIENT_LIMIT            {dtype: largest error of fastrec that is accepted}: beyond it no times
    implementations(entry, compiler) -> {name: function(*inputs)}, "fastrec" first
    problem(entry, device) -> inputs; gradients are taken of those that require one
    errors(entry, inputs, results) -> {name: {"output_error", "gradient_error"}}
    work(entry) -> {"elements", "exps", "bytes", "materialised", "forward", "both"}: counts of the
        mathematical function, whatever an implementation spends on it; "materialised": bytes of
        what a plain implementation stores; one of every pass: floating point operations
"""

import ctypes
import functools
import gc
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SLOW = 10.0  # seconds; an implementation slower than this per call is measured once
OPS = (
    "linear_cross_entropy",
    "linear_rank",
    "linear_topk",
    "multilabel_bce",
    "sampled_linear_cross_entropy",
    "in_batch_cross_entropy",
    "in_batch_hardest",
    "jagged_attention",
    "jagged_gru",
    "uprec_step",
)


@dataclass(frozen=True)
class Entry:
    """`only`: names of the implementations that fit this size (all if empty)."""

    op: str
    sizes: dict[str, int]
    dtype: str = "float32"
    case: str = ""
    rounds: int = 7
    only: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"{sizes} {self.dtype} {self.case}".strip()


def module(op: str):
    return importlib.import_module(f"benchmarks.{op}")


def entries(kind: str) -> list[Entry]:
    return [entry for op in OPS for entry in getattr(module(op), kind)]


def forward(function: Callable, inputs: tuple):
    with torch.no_grad():
        return function(*inputs)


@functools.lru_cache(maxsize=4)
def _upstream(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Gradient of an output: none for a scalar; not constant, which a softmax would cancel."""
    if not shape:
        return None
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def both(function: Callable, inputs: tuple) -> tuple[Tensor, ...]:
    """(output, gradients of the inputs that require one)."""
    output = function(*inputs)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    upstream = _upstream(output.shape, output.dtype, output.device)
    return output.detach(), *torch.autograd.grad(output, leaves, upstream)


def step(function: Callable, inputs: tuple):
    return function(*inputs)


PASS = {"forward": forward, "both": both, "step": step}


def measure(entry: Entry, rounds: int | None = None, compiler: str = "inductor") -> dict:
    """{implementation: row}; see `row` for the fields."""
    torch.compiler.reset()  # beyond 8 shapes of one function the compiler runs it eagerly
    op = module(entry.op)
    table = op.implementations(entry, compiler)
    table = {k: f for k, f in table.items() if not entry.only or k in entry.only}
    inputs, main = op.problem(entry), op.PASSES[-1]
    results, failures = {}, {}
    seconds: dict = {name: {kind: [] for kind in op.PASSES} for name in table}
    for name, function in list(table.items()):  # warm-up, and the results whose error is reported
        try:
            start = time.perf_counter()
            results[name] = PASS[main](function, inputs)
            first = time.perf_counter() - start
            if first > SLOW and name != "torch.compile":
                seconds[name][main].append(first)
            elif main == "both":
                forward(function, inputs)
        except (RuntimeError, MemoryError) as error:
            failures[name] = {"failed": str(error).splitlines()[0]}
            del table[name]
    for _ in range(rounds or entry.rounds):
        for kind in op.PASSES:
            for name, function in table.items():
                if seconds[name][main][:1] and seconds[name][main][0] > SLOW:
                    continue
                start = time.perf_counter()
                PASS[kind](function, inputs)
                seconds[name][kind].append(time.perf_counter() - start)
                gc.collect()
    errors, work = op.errors(entry, inputs, results), op.work(entry)
    rows = {name: row(work, seconds[name], errors[name]) for name in table}
    for values in rows.values():
        values["ratio"] = values[main]["median"] / rows["fastrec"][main]["median"]
    wrong = largest(errors["fastrec"].values())
    if not wrong <= op.GRADIENT_LIMIT[entry.dtype]:
        raise SystemExit(f"{entry.key}: error {wrong:.2g} of fastrec, no times reported")
    return rows | failures


def largest(values: Iterable[float]) -> float:
    """The largest, 0 of none; NaN where one is NaN, which `max` passes over: max(1, nan) is 1."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def spread(times: list[float]) -> dict:
    """Median, 20 % and 80 % of the times, in seconds."""
    cuts = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    return {
        "median": statistics.median(times),
        "p20": cuts[0],
        "p80": cuts[3],
        "rounds": len(times),
    }


def row(work: dict, seconds: dict[str, list[float]], errors: dict[str, float]) -> dict:
    values: dict = dict(errors)
    for kind, times in seconds.items():
        if not times:
            values[kind] = None
            continue
        values[kind] = spread(times)
        median = values[kind]["median"]
        values[kind] |= {
            "gflops": work[kind] / median / 1e9,
            "ps_per_element": median / work["elements"] * 1e12,
            "gbytes_per_s": work["bytes"] / median / 1e9 if kind == "both" else None,
        }
    return values


def errors_against(
    exact: tuple[Tensor, ...], results: dict[str, tuple[Tensor, ...]]
) -> dict[str, dict[str, float]]:
    """max |error| / max |exact| of the output, and the largest one of the gradients."""

    def error(given, exact):
        return ((given.double() - exact).abs().max() / exact.abs().max()).item()

    return {
        name: {
            "output_error": error(given[0], exact[0]),
            "gradient_error": largest(
                error(a, b) for a, b in zip(given[1:], exact[1:], strict=True)
            ),
        }
        for name, given in results.items()
    }


def _status(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _peak_here(entry: Entry, name: str) -> int:
    """High-water mark of this process during the last pass, beyond the inputs; the gradients are
    part of it. A small call before it creates the threads and the workspaces of libraries."""
    op = module(entry.op)
    compiler = "inductor" if name == "torch.compile" else "eager"  # imported also where not called
    function, run = op.implementations(entry, compiler)[name], PASS[op.PASSES[-1]]
    if name != "torch.compile":
        run(function, op.problem(op.SMOKE[0]))
    inputs = op.problem(entry)
    if name == "torch.compile":  # compiling needs memory of its own, and leaves what a step keeps
        compiled, inputs = inputs, op.problem(entry)
        run(function, compiled)
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # or the pass finds room that the process already has
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = run(function, inputs)
    del result
    return _status("VmHWM") - before


def peak_memory(entry: Entry, name: str) -> int | None:
    """Bytes beyond the inputs, from a fresh process; None where Linux's /proc is missing."""
    if sys.platform != "linux":
        return None
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench", json.dumps(asdict(entry)), name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        raise RuntimeError(f"{entry.key}, {name}: {lines[-1] if lines else process.returncode}")
    return int(process.stdout)


if __name__ == "__main__":
    print(_peak_here(Entry(**json.loads(sys.argv[1])), sys.argv[2]))
