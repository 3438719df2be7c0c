# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of every tile configuration of linear_rank: no GPU is needed."""

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

from fastrec.kernels import linear_rank as kernels

CASES = [
    case(types, width, capability, plain=(types, width, capability) == ("bf16", 64, 90))
    for types in TYPES
    for width in WIDTHS
    for capability in SHARED_LIMIT
]


def build(types: str, width: int, capability: int) -> Binary:
    arguments, options = score_arguments(types, width, capability)
    arguments |= dict(order="*i64:16", target="*i64:16", ahead_out="*i32:16")
    return compile_for(capability, kernels._fwd_kernel, arguments, **options)


OP = Op("linear_rank", "types D sm", CASES, build, lambda types, *_: types == "bf16")
test_machine_code = machine_code_test(OP)
