# SPDX-License-Identifier: Apache-2.0
"""A worker of a kernel that gets no memory: the call ends, in a MemoryError."""

import os
import subprocess
import sys

import pytest
from backends import needs
from memory import needs_proc

# 60 items, whose losses alone are asked for: 13 + 128 rows for all workers, then 60 for each.
CODE = """
import resource
from pathlib import Path
import torch
import fastrec.ops.linear_cross_entropy

op = torch.ops.fastrec.linear_cross_entropy_value_and_grad
asked = None, -100, True, False, False
width, limit = 1 << 18, {rows}
torch.set_num_threads(2)
x, w, y = torch.zeros(1, width), torch.zeros(60, width), torch.zeros(1, dtype=torch.int64)
op(x[:, :64], w[:, :64], None, y, *asked)  # starts the threads
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + limit * width * 4, -1))
for _ in range(5):
    try:
        op(x, w, None, y, *asked)
        print("fine")
    except Exception as error:
        print(type(error).__name__)
"""


@needs_proc
@needs("cpp", "linear_cross_entropy")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_without_memory_ends_the_call(workers):
    """`workers` of two get theirs. The other may come when the first is done, and has it then."""
    code = CODE.format(rows=13 + 128 + 30 + 60 * workers)
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    seen = said.stdout.split()
    assert len(seen) == 5, said.stderr
    assert set(seen) <= ({"fine", "MemoryError"} if workers else {"MemoryError"}), seen
