"""Benchmarks as data: entries (op, shape, dtype, distribution) x implementations.

All implementations of an entry run in one process on the same inputs, in turn, and every time
stands beside the error of its result against float64. Peak memory comes from a fresh process each.

Legend: N scored rows, V items, D width; a logit is one (row, item) pair.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec import linear_cross_entropy
from fastrec.ops.linear_cross_entropy import linear_cross_entropy_ref

ROOT = Path(__file__).resolve().parent.parent
SLOW = 10.0  # seconds; an implementation slower than this per call is measured once


@dataclass(frozen=True)
class Entry:
    """`only`: names of the implementations that fit this size (all if empty)."""

    op: str
    n: int
    v: int
    d: int
    dtype: str = "float32"
    distribution: str = "flat"
    rounds: int = 7
    only: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"N={self.n} V={self.v} D={self.d} {self.dtype} {self.distribution}"

    # Work of the mathematical function, whatever an implementation spends on it: three products
    # forward + backward (logits, gradient of the input, gradient of the table), one forward.
    @property
    def flops(self) -> dict[str, int]:
        product = 2 * self.n * self.v * self.d
        return {"forward": product, "both": 3 * product}

    @property
    def exps(self) -> int:
        return self.n * self.v

    @property
    def bytes(self) -> int:
        """Compulsory traffic of forward + backward: the table twice, its gradient once."""
        return 3 * self.v * self.d * getattr(torch, self.dtype).itemsize


CE = "linear_cross_entropy"
ENTRIES = (
    Entry(CE, 1317, 20_033, 64),
    Entry(CE, 1317, 20_033, 64, distribution="peaked"),
    Entry(CE, 1317, 20_033, 64, dtype="bfloat16", rounds=1),
    Entry(CE, 2560, 141_939, 64, rounds=2),
    Entry(CE, 512, 500_000, 128, rounds=2),
    Entry(CE, 512, 10_000_000, 64, rounds=1, only=("fastrec",)),
)
SMOKE = (
    Entry(CE, 33, 257, 16, rounds=2),
    Entry(CE, 33, 257, 16, distribution="peaked", rounds=2, only=("fastrec", "eager")),
    Entry(CE, 33, 257, 16, dtype="bfloat16", rounds=2, only=("fastrec", "eager", "reference")),
)
# Largest accepted max |error| / max |exact| of a gradient of fastrec; beyond it no time is printed.
GRADIENT_LIMIT = {"float32": 1e-4, "bfloat16": 5e-2}


def eager(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w).float(), y)


def implementations(
    compiler: str = "inductor",
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name -> loss(input, linear_weight, target). "fastrec" comes first: ratios refer to it."""
    table = {
        "fastrec": linear_cross_entropy,
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False, backend=compiler),
        "reference": linear_cross_entropy_ref,
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch >= 2.13
        chunked, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions
        table["torch default options"] = lambda x, w, y: chunked(x, w, y, options=options())
        for size in (128, 256, 512):
            choice = options(batch_chunk_size=size, chunking_method=None)
            table[f"torch chunk {size}"] = lambda x, w, y, choice=choice: chunked(
                x, w, y, options=choice
            )
    return table


def problem(entry: Entry) -> tuple[Tensor, Tensor, Tensor]:
    """flat: logits of standard deviation 1. peaked: the logit of the target is 14 higher."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, entry.dtype)
    w = torch.randn(entry.v, entry.d, generator=generator).mul_(entry.d**-0.5).to(dtype)
    y = torch.randint(entry.v, (entry.n,), generator=generator)
    x = torch.randn(entry.n, entry.d, generator=generator)
    if entry.distribution == "peaked":
        x = 14 * F.normalize(w[y].float(), dim=1) + x * 0.1
    return x.to(dtype).requires_grad_(), w.requires_grad_(), y


def forward(loss_of, x, w, y):
    with torch.no_grad():
        return loss_of(x, w, y)


def both(loss_of, x, w, y):
    loss = loss_of(x, w, y)
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


PASSES = {"forward": forward, "both": both}


def measure(entry: Entry, rounds: int | None = None, compiler: str = "inductor") -> dict:
    """{implementation: row}; see `row` for the fields."""
    only = entry.only
    table = {k: f for k, f in implementations(compiler).items() if not only or k in only}
    inputs = problem(entry)
    results, seconds, failures = {}, {name: {p: [] for p in PASSES} for name in table}, {}
    for name, loss_of in list(table.items()):  # warm-up, and the results whose error is reported
        try:
            start = time.perf_counter()
            results[name] = both(loss_of, *inputs)
            first = time.perf_counter() - start
            if first > SLOW and name != "torch.compile":
                seconds[name]["both"].append(first)
            else:
                forward(loss_of, *inputs)
        except (RuntimeError, MemoryError) as error:
            failures[name] = {"failed": str(error).splitlines()[0]}
            del table[name]
    for _ in range(rounds or entry.rounds):
        for kind, run in PASSES.items():
            for name, loss_of in table.items():
                if seconds[name]["both"][:1] and seconds[name]["both"][0] > SLOW:
                    continue
                start = time.perf_counter()
                run(loss_of, *inputs)
                seconds[name][kind].append(time.perf_counter() - start)
                gc.collect()
    errors = errors_of(inputs, results)
    rows = {name: row(entry, seconds[name], errors[name]) for name in table}
    for values in rows.values():
        values["ratio"] = values["both"]["median"] / rows["fastrec"]["both"]["median"]
    wrong = rows["fastrec"]["gradient_error"]
    if not wrong <= GRADIENT_LIMIT[entry.dtype]:
        raise SystemExit(f"{entry.key}: gradient error {wrong:.2g} of fastrec, no times reported")
    return rows | failures


def row(entry: Entry, seconds: dict[str, list[float]], errors: dict[str, float]) -> dict:
    values: dict = dict(errors)
    for kind, times in seconds.items():
        if not times:
            values[kind] = None
            continue
        cuts = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
        median = statistics.median(times)
        values[kind] = {
            "median": median,
            "p20": cuts[0],
            "p80": cuts[3],
            "rounds": len(times),
            "gflops": entry.flops[kind] / median / 1e9,
            "ps_per_logit": median / entry.exps * 1e12,
            "gbytes_per_s": entry.bytes / median / 1e9 if kind == "both" else None,
        }
    return values


def errors_of(
    inputs: tuple[Tensor, Tensor, Tensor], results: dict[str, tuple[Tensor, Tensor, Tensor]]
) -> dict[str, dict[str, float]]:
    """Relative error of the loss, and of each gradient max |error| / max |exact| (the larger one),
    against float64 computed in pieces of the table."""
    x, w, y = inputs[0].detach().double(), inputs[1].detach(), inputs[2]
    rows = torch.arange(len(y))
    starts = range(0, len(w), 16384)
    lse = torch.full((len(y),), -torch.inf, dtype=torch.float64)
    for start in starts:
        logits = x @ w[start : start + 16384].double().T
        lse = torch.logaddexp(lse, torch.logsumexp(logits, 1))
    exact_loss = (lse - (x * w[y].double()).sum(1)).mean().item()
    grad_x = torch.zeros_like(x)
    largest, worst = 0.0, dict.fromkeys(results, 0.0)
    for start in starts:
        block = w[start : start + 16384].double()
        p = torch.exp(x @ block.T - lse[:, None])
        here = (y >= start) & (y < start + len(block))
        p[rows[here], y[here] - start] -= 1
        p /= len(y)
        grad_x += p @ block
        grad_w = p.T @ x
        largest = max(largest, grad_w.abs().max().item())
        for name, (_, _, given) in results.items():
            error = (given[start : start + 16384] - grad_w).abs().max().item()
            worst[name] = error if error != error else max(worst[name], error)
    return {
        name: {
            "loss_error": abs(loss.item() - exact_loss) / abs(exact_loss),
            "gradient_error": max(
                worst[name] / largest,
                ((given - grad_x).abs().max() / grad_x.abs().max()).item(),
            ),
        }
        for name, (loss, given, _) in results.items()
    }


def _status(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _peak_here(entry: Entry, name: str) -> int:
    """High-water mark of this process during forward + backward, beyond the inputs; the gradients
    are part of it. A small call before it creates the threads and the workspaces of libraries."""
    loss_of = implementations()[name]
    if name != "torch.compile":
        both(loss_of, *problem(Entry(entry.op, 8, 64, entry.d, entry.dtype)))
    inputs = problem(entry)
    if name == "torch.compile":  # compiling needs memory of its own
        both(loss_of, *inputs)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = both(loss_of, *inputs)
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
