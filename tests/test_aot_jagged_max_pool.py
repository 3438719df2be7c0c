# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of the kernels of jagged_max_pool: no GPU is needed."""

from aot import SHARED_LIMIT, Binary, Op, case, compile_for, machine_code_test, take_options

from fastrec.kernels import jagged_max_pool as kernels

# The plain suite compiles the target device; the other architectures are slow.
CASES = [
    case(kernel, dtype, width, capability, plain=(capability, dtype, width) == (90, "fp32", 64))
    for kernel in ("fwd", "bwd")
    for dtype in ("bf16", "fp32", "fp64")
    for width in (16, 64)
    for capability in SHARED_LIMIT
]


def build(kernel: str, dtype: str, width: int, capability: int) -> Binary:
    config = kernels._config(width)
    options = take_options(config)
    values, ids = f"*{dtype}:16", "*i64:16"
    arguments = dict(offsets=ids, index="*i32:16", d="i32:16", stride="i32:16", **config)
    if kernel == "fwd":
        arguments |= dict(values=values, counted="*u8:16", output=values)
    else:
        arguments |= dict(grad_output=values, grad=values, events="i32")
    return compile_for(
        capability, getattr(kernels, f"_{kernel}_kernel"), arguments, "BLOCK_T BLOCK_D", **options
    )


OP = Op("jagged_max_pool", "kernel dtype D sm", CASES, build)
test_machine_code = machine_code_test(OP)
