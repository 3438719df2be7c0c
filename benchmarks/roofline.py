# SPDX-License-Identifier: Apache-2.0
"""What the machine can do, and a plot of the ops below it: `python -m benchmarks.roofline`.

Measures the ceilings and fastrec's float32 entries, all on one machine and day, writes
benchmarks/results/roofline.json and docs/results/roofline.png. `--op` measures one op again and
keeps the others, `--render` measures nothing.

Intensity and rate of an op count the mathematical function (`work` of its module): recomputation
makes an op look slower, not busier.
"""

import argparse
import ctypes
import functools
import json
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.bench import OPS, ROOT, Entry, entries, measure, module
from benchmarks.gpu.clock import Clock, rate
from benchmarks.run import environment
from fastrec.data.output import write_text

SIZES = (1024, 2048)  # of square products; the best counts
COPIED = 1 << 26  # float32: beyond every cache
LOOPS = 20_000_000  # of the chains below: 0.05 s
ROUNDS = 7
LARGEST = 1 << 28  # bytes that eager stores for an entry: its error takes several times that
CHAINS = 10  # independent sums: two units of latency 4 need 8
# Names, not an array, and different values: gcc keeps them in registers and merges none of them.
_SUMS = [f"s{k}" for k in range(CHAINS)]
FMA = f"""
#ifdef __AVX512F__
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float lanes __attribute__((vector_size(BYTES)));
extern "C" long fma_chains(long loops, float x, float y, float* sink) {{
  lanes a = x - (lanes){{}}, b = y - (lanes){{}};
  lanes {", ".join(f"{s} = a * {k}" for k, s in enumerate(_SUMS))};
  for (long i = 0; i < loops; ++i) {{ {" ".join(f"{s} = {s} * a + b;" for s in _SUMS)} }}
  lanes total = {" + ".join(_SUMS)};
  for (int k = 0; k < BYTES / 4; ++k) *sink += total[k];
  return loops * {CHAINS} * (BYTES / 4) * 2;
}}
"""


def fma_gflops() -> float:
    """Rate of multiply-adds on registers alone, one chain of sums per thread of PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "fma.cpp", Path(folder) / "fma.so"
        source.write_text(FMA)
        flags = ("-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
        command = [os.environ.get("CXX", "c++"), *flags, str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        chains = ctypes.CDLL(str(library)).fma_chains
    chains.restype = ctypes.c_long
    threads = torch.get_num_threads()

    def run(_=None) -> int:
        sink = ctypes.c_float()
        half = ctypes.c_float(0.5)
        return chains(ctypes.c_long(LOOPS), half, half, ctypes.byref(sink))

    with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
        work = sum(pool.map(run, range(threads)))
        both = lambda: list(pool.map(run, range(threads)))  # noqa: E731
        return rate(Clock("cpu"), both, work, ROUNDS)["rate"] / 1e9


def ceilings() -> dict:
    """fma_gflops: multiply-adds; gflops: `torch.mm`, float32; gbytes_per_s: a copy, both ways."""
    clock, rates = Clock("cpu"), []
    for size in SIZES:
        a, b = torch.randn(2, size, size)
        out = torch.empty(size, size)
        product = functools.partial(torch.mm, a, b, out=out)
        rates.append(rate(clock, product, 2 * size**3, ROUNDS)["rate"])
    source = torch.zeros(COPIED)
    target = torch.zeros(COPIED)
    moved = rate(clock, lambda: target.copy_(source), 2 * source.nbytes, ROUNDS)
    return {
        "fma_gflops": fma_gflops(),
        "gflops": max(rates) / 1e9,
        "gbytes_per_s": moved["rate"] / 1e9,
    }


def measured(entry: Entry, rounds: int | None) -> dict:
    """Rate of fastrec, with its error, which `measure` refuses where it is too large."""
    row = measure(replace(entry, only=("fastrec",)), rounds)["fastrec"]
    keep = ("output_error", "gradient_error", module(entry.op).PASSES[-1])
    return {key: row[key] for key in keep if key in row}


def points(results: dict) -> list[tuple[str, str, float, float]]:
    """(op, entry, operations per byte, GFLOP/s) of fastrec."""
    found = []
    for entry in (*entries("ENTRIES"), *entries("SMOKE")):
        row = results["ops"].get(entry.op, {}).get(entry.key)
        if row is not None:
            passes, work = module(entry.op).PASSES[-1], module(entry.op).work(entry)
            rate = row[passes]["gflops"]
            found.append((entry.op, _label(entry), work[passes] / work["bytes"], rate))
    return found


def _label(entry: Entry) -> str:
    return " ".join([*map(str, entry.sizes.values()), entry.case]).strip()


PLACES = ((9, -3, "left"), (-9, -3, "right"), (0, 9, "center"), (0, -15, "center"))


def _annotate(axes, measured: list[tuple[str, str, float, float]], line: float) -> None:
    """A label beside each point where it covers no point, no label and no line; else none."""
    figure = axes.figure
    figure.draw_without_rendering()
    spots = [axes.transData.transform((point[2], point[3])) for point in measured]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    frame = axes.get_window_extent().extents
    height = axes.transData.transform((1, line))[1]
    taken.append((frame[0], height - 1, frame[2], height + 1))
    for _, label, intensity, reached in measured:
        for x, y, align in PLACES:
            text = axes.annotate(label, (intensity, reached), xytext=(x, y), fontsize=8,
                                 textcoords="offset points", ha=align)  # fmt: skip
            box = text.get_window_extent().padded(3).extents
            inside = box[0] >= frame[0] and box[2] <= frame[2]
            if inside and not any(
                box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken
            ):
                taken.append(tuple(box))
                break
            text.remove()


def plot(results: dict, path: Path) -> None:
    """The roof, `torch.mm` as a dashed line, and the points, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = results["ceilings"]
    peak, bandwidth, product = found["fma_gflops"], found["gbytes_per_s"], found["gflops"]
    measured = points(results)
    ridge = peak / bandwidth
    intensities = [point[2] for point in measured] + [ridge]
    left, right = min(intensities) / 2, max(intensities) * 4
    figure, axes = plt.subplots(figsize=(11, 7.5), layout="constrained")
    axes.plot([left, ridge, right], [left * bandwidth, peak, peak], "k-", linewidth=1)
    axes.axhline(product, color="0.5", linestyle="--", linewidth=1)
    small = {"fontsize": 9}
    axes.text(right, 1.04 * peak, f"multiply-adds: {peak:.0f} GFLOP/s ", ha="right", **small)
    axes.text(left, 1.04 * product, f" torch.mm: {product:.0f} GFLOP/s", color="0.4", **small)
    axes.text(1.2 * left, 0.9 * left * bandwidth, f"copy: {bandwidth:.0f} GB/s", va="top", **small)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(left, right),
        ylim=(min([point[3] for point in measured]) / 2, 2 * peak),
        xlabel="operations of the mathematical function per byte that must move",
        ylabel="GFLOP/s, float32",
    )
    for op, marker in zip(results["ops"], "osD^vP*Xh<>dp", strict=False):
        own = [point for point in measured if point[0] == op]
        if own:
            axes.plot([p[2] for p in own], [p[3] for p in own], marker, label=op, markersize=6)
    figure.legend(loc="outside upper center", ncols=4, fontsize=9)
    _annotate(axes, measured, product)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, nargs="+", default=OPS)
    parser.add_argument("--rounds", type=int, help="instead of the rounds of each entry")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: that it runs, not times")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/roofline.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/results/roofline.png")
    arguments = parser.parse_args(argv)
    results: dict = {"ops": {}}
    if arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    if not arguments.render:
        results |= {"environment": environment(), "ceilings": ceilings()}
        print(results["ceilings"])
    for entry in () if arguments.render else entries("SMOKE" if arguments.smoke else "ENTRIES"):
        small = module(entry.op).work(entry)["materialised"] <= LARGEST
        if entry.op in arguments.op and entry.dtype == "float32" and small:
            row = measured(entry, arguments.rounds)
            results["ops"].setdefault(entry.op, {})[entry.key] = row
            print(entry.op, entry.key, f"{row[module(entry.op).PASSES[-1]]['gflops']:.1f} GFLOP/s")
            write_text(arguments.output, json.dumps(results, indent=1) + "\n")
    plot(results, arguments.picture)


if __name__ == "__main__":
    main()
