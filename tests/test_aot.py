# SPDX-License-Identifier: Apache-2.0
"""The tool that reads compiled kernels sees a spill where there is one."""

import triton
import triton.language as tl
from aot import compile_for, needs_compiler

pytestmark = needs_compiler


@triton.jit
def _too_large_kernel(x, y):
    at = tl.arange(0, 16384)  # 512 values a thread with one warp
    value = tl.load(x + at)
    tl.store(y + at, value / tl.sum(value, 0))


def test_a_spill_is_detected():
    binary = compile_for(90, _too_large_kernel, {"x": "*fp32:16", "y": "*fp32:16"}, "", num_warps=1)
    assert binary.stack > 0
    assert binary.count("LDL") > 0
    assert binary.spills
