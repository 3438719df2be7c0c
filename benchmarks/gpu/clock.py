# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a call: CUDA events and the caching allocator, or the clock of the host.

On CUDA every timed call starts with a cold L2 cache, and the device is kept busy while the host
enqueues the call, so that the events see the device and not the launches. The whole step is timed
without that lead (`lead=False`): there the launches count.
"""

import gc
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import bench

L2_BYTES = 256 * 2**20  # several times the cache of any device
LEAD_CYCLES = 2_000_000  # about a millisecond


def spread(times: list[float]) -> dict:
    """Median, 10, 20 and 80 %: a device that is throttled shows as a median far above its 10 %."""
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times
    return bench.spread(times) | {"p10": tenths[0]}


class Clock:
    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.scratch = torch.empty(L2_BYTES if self.cuda else 1, dtype=torch.int8, device=device)

    def seconds(self, call: Callable, lead: bool = True) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.zero_()
        if lead:
            torch.cuda._sleep(LEAD_CYCLES)
        else:
            torch.cuda.synchronize()
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Callable) -> int | None:
        """Most memory in use at a time beyond what was in use before, results included; None where
        nothing counts it."""
        if not self.cuda:
            return None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before


def rate(clock: Clock, call: Callable, amount: float, rounds: int) -> dict:
    """{"rate": amount per second at the median, "seconds"} after two warm-up calls."""
    for _ in range(2):
        call()
    found = spread([clock.seconds(call) for _ in range(rounds)])
    return {"rate": amount / found["median"], "seconds": found}
