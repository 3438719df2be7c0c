# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of every tile configuration of linear_topk: no GPU is needed."""

from aot import (
    SHARED_LIMIT,
    TYPES,
    WIDTHS,
    Binary,
    Op,
    case,
    compile_for,
    machine_code_test,
    score_arguments,
)

from fastrec.kernels import linear_topk as kernels

CASES = [
    case(kernel, types, width, capability, plain=(types, width, capability) == ("bf16", 64, 90))
    for kernel in ("maxima", "select")
    for types in TYPES
    for width in WIDTHS
    for capability in SHARED_LIMIT
]


def build(kernel: str, types: str, width: int, capability: int) -> Binary:
    arguments, options = score_arguments(types, width, capability)
    arguments |= dict(keys="*i64:16")
    if kernel == "select":
        for name in ("n", "per_range"):
            del arguments[name]
        arguments |= dict(chosen="*i64:16", slots="i32")
    return compile_for(capability, getattr(kernels, f"_{kernel}_kernel"), arguments, **options)


OP = Op("linear_topk", "kernel types D sm", CASES, build, lambda kernel, types, *_: types == "bf16")
test_machine_code = machine_code_test(OP)
