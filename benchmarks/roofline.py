"""What the machine can do, and a plot of the measured ops below it.

Intensity and rate of an op count the mathematical function (`work` of its module): recomputation
makes an op look slower, not busier.
"""

import functools
from pathlib import Path

import torch

from benchmarks.bench import Entry, module
from benchmarks.gpu.clock import Clock, rate

SIZES = (1024, 2048)  # of square products; the best counts
COPIED = 1 << 26  # float32: beyond every cache
ROUNDS = 7


def ceilings() -> dict[str, float]:
    """gflops: of `torch.mm` in float32; gbytes_per_s: of a copy, both directions counted."""
    clock, rates = Clock("cpu"), []
    for size in SIZES:
        a, b = torch.randn(2, size, size)
        out = torch.empty(size, size)
        product = functools.partial(torch.mm, a, b, out=out)
        rates.append(rate(clock, product, 2 * size**3, ROUNDS)["rate"])
    source = torch.zeros(COPIED)
    target = torch.zeros(COPIED)
    moved = rate(clock, lambda: target.copy_(source), 2 * source.nbytes, ROUNDS)
    return {"gflops": max(rates) / 1e9, "gbytes_per_s": moved["rate"] / 1e9}


def points(results: dict) -> list[tuple[str, str, float, float]]:
    """(op, entry, operations per byte, GFLOP/s) of fastrec in float32."""
    found = []
    for op, rows in results["ops"].items():
        passes = module(op).PASSES[-1]
        for entry in (*module(op).ENTRIES, *module(op).SMOKE):
            row = rows.get(entry.key, {}).get("fastrec", {}).get(passes)
            if row is None or entry.dtype != "float32":
                continue
            work = module(op).work(entry)
            found.append((op, _label(entry), work[passes] / work["bytes"], row["gflops"]))
    return found


def _label(entry: Entry) -> str:
    return " ".join([*map(str, entry.sizes.values()), entry.case])


def plot(results: dict, path: Path) -> None:
    """The two ceilings and the points, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    peak, bandwidth = results["ceilings"]["gflops"], results["ceilings"]["gbytes_per_s"]
    measured = points(results)
    intensities = [point[2] for point in measured] + [peak / bandwidth]
    left, right = min(intensities) / 3, max(intensities) * 10
    figure, axes = plt.subplots(figsize=(9, 6))
    ridge = peak / bandwidth
    axes.plot([left, ridge, right], [left * bandwidth, peak, peak], "k-", linewidth=1)
    axes.text(right, peak, f"torch.mm {peak:.0f} GFLOP/s ", ha="right", va="bottom")
    axes.text(left, left * bandwidth, f"  copy {bandwidth:.0f} GB/s", va="center")
    for op in results["ops"]:
        own = [point for point in measured if point[0] == op]
        if own:
            axes.plot([p[2] for p in own], [p[3] for p in own], "o", label=op)
        for _, label, intensity, reached in own:
            axes.annotate(label, (intensity, reached), fontsize=6, xytext=(3, 3),
                          textcoords="offset points")  # fmt: skip
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(left, right),
        xlabel="operations of the mathematical function per byte that must move",
        ylabel="GFLOP/s, float32",
    )
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
