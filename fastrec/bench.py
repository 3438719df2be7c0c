# SPDX-License-Identifier: Apache-2.0
"""Time of the fused softmax cross-entropy beside eager PyTorch, measured on this machine."""

import time
from statistics import median

import torch
import torch.nn.functional as F

from fastrec.ops.linear_cross_entropy import linear_cross_entropy


def alternate(functions: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each function, called in turn `rounds` times after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for done in range(rounds + 1):
        for name, function in functions.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if done:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def loss_times(
    rows: int, items: int, width: int, rounds: int = 5, device: str | None = None
) -> dict[str, float]:
    """Median seconds of forward + backward of the item softmax: "fused" and "eager".

    float32 [rows, width] states against an [items, width] table, gradients of both. Raises
    ValueError for a number below 1.
    """
    for name, value in (("rows", rows), ("items", items), ("width", width), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator, device="cpu").to(device).requires_grad_()
    table = (
        (0.1 * torch.randn(items, width, generator=generator, device="cpu"))
        .to(device)
        .requires_grad_()
    )
    target = torch.randint(items, (rows,), generator=generator, device="cpu").to(device)

    def run(loss):
        def step():
            x.grad = table.grad = None
            loss().backward()

        return step

    return alternate(
        {
            "fused": run(lambda: linear_cross_entropy(x, table, target)),
            "eager": run(lambda: F.cross_entropy(F.linear(x, table), target)),
        },
        rounds,
    )


def bench(rows: int = 2560, items: int = 141939, width: int = 64, rounds: int = 5) -> None:
    """Time the fused item softmax beside eager PyTorch, forward + backward, float32.

    Args:
        rows: N, scored positions.
        items: V, size of the vocabulary.
        width: D.
        rounds: timed calls of each, alternating.
    """
    times = loss_times(rows, items, width, rounds)
    print(
        f"item softmax, forward + backward, N={rows} V={items} D={width},"
        f" {torch.get_num_threads()} threads:"
        f" fused {1e3 * times['fused']:.1f} ms, eager {1e3 * times['eager']:.1f} ms,"
        f" {times['eager'] / times['fused']:.2f}x"
    )
