# SPDX-License-Identifier: Apache-2.0
"""The tool that reads compiled kernels sees a spill where there is one; programs of GPUs with 99 KB
of shared memory."""

import aot
import aot_tables
import pytest
import torch
import triton
import triton.language as tl
from aot import GPUTarget, compile_for, needs_compiler

from fastrec.kernels.common.tiles import capability_of, shared_memory


@triton.jit
def _too_large_kernel(x, y):
    at = tl.arange(0, 16384)  # 512 values a thread with one warp
    value = tl.load(x + at)
    tl.store(y + at, value / tl.sum(value, 0))


@needs_compiler
def test_a_spill_is_detected():
    binary = compile_for(90, _too_large_kernel, {"x": "*fp32:16", "y": "*fp32:16"}, "", num_warps=1)
    assert binary.stack > 0
    assert binary.count("LDL") > 0
    assert binary.spills


@pytest.mark.parametrize("device, wanted, memory", [
    ((8, 0), 80, 163), ((8, 6), 86, 99), ((8, 9), 89, 99), ((9, 0), 90, 227), ((10, 3), 103, 227),
    ((12, 0), 89, 99), ((12, 1), 89, 99),
])  # fmt: skip
def test_the_capability_by_which_tiles_are_chosen(device, wanted, memory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: device)
    assert capability_of(torch.device("cuda")) == wanted
    assert shared_memory(wanted) == memory * 1024
    for capability, limit in aot.SHARED_LIMIT.items():
        assert shared_memory(capability) == limit


def small_cases():
    """Those of sm_80 for its successors with 99 KB; `make test` has what needed more."""
    for op in aot_tables.ops():
        for case in op.cases:
            *values, capability = case.values
            large = op.name.endswith("_cross_entropy") and {"bf16", 256} <= {*values}
            for target in (89, 120) if capability == 80 else ():
                name = "-".join(map(str, (op.name, *values, target)))
                marks = [pytest.mark.slow]
                if not large or target == 120:
                    marks.append(pytest.mark.exhaustive)
                yield pytest.param(op, values, target, id=name, marks=marks)


@needs_compiler
@pytest.mark.parametrize("op, values, target", [*small_cases()])
def test_every_program_fits_into_99_kb(op, values, target, monkeypatch):
    monkeypatch.setattr(aot, "GPUTarget", lambda kind, _, warp: GPUTarget(kind, target, warp))
    binary = op.build(*values, 89)
    assert binary.shared <= shared_memory(89), f"{binary.shared} bytes of shared memory"
    assert not binary.wgmma and binary.columns == 0
