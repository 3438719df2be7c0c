# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a call, beyond what the process held before it."""

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def peak_of(call: Callable[[], object]) -> int:
    """In bytes. Threads and the workspaces of libraries count unless a small call came before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def in_a_fresh_process(function: Callable, *arguments):
    """`function(*arguments)` where no earlier test has left memory for reuse."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result(timeout=300)
