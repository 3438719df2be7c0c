# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of the kernels of jagged_gru: no GPU is needed."""

import pytest
from aot import (
    SHARED_LIMIT,
    Binary,
    Op,
    case,
    compile_for,
    machine_code_test,
    needs_compiler,
    take_options,
)

from fastrec.kernels import jagged_gru as kernels

# The plain suite compiles the target device; the other architectures are slow.
CASES = [
    case(kernel, capability, plain=capability == 90)
    for kernel in ("fwd", "bwd")
    for capability in SHARED_LIMIT
]


def build(kernel: str, capability: int) -> Binary:
    config = dict(kernels.CONFIG)
    options = take_options(config)
    rows, ids = "*fp32:16", "*i64:16"
    arguments = dict(offsets=ids, order=ids, sequences="i32", width="i32:16", VEC=1, **config)
    names = dict.fromkeys(("weight", "states", "gates"), rows)
    if kernel == "fwd":
        arguments |= names | dict(projected=rows, bias=rows)
    else:
        names |= dict.fromkeys(("grad_states", "grads", "previous", "carry"), rows)
        arguments |= names | dict(stride="i32:16")
    return compile_for(
        capability, getattr(kernels, f"_{kernel}_kernel"), arguments, "BLOCK_B BLOCK_D", **options
    )


OP = Op("jagged_gru", "kernel sm", CASES, build)
test_machine_code = machine_code_test(OP)


@needs_compiler
@pytest.mark.parametrize("kernel", ["fwd", "bwd"])
def test_a_barrier_stands_behind_the_stores_of_a_step(kernel):
    """What a step stores, all threads of the block read in the next one. The interpreter cannot
    tell, where a program is one thread."""
    sass = build(kernel, 90).sass
    assert sass.rindex(" BAR.SYNC") > sass.rindex(" STG.")
