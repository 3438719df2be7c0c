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
    for kernel in ("maxima", "select", "take_tiles", "take_items")
    for types in TYPES
    for width in WIDTHS
    if kernel in ("maxima", "select") or (types, width) == ("bf16", 64)  # the same for all
    for capability in SHARED_LIMIT
]


def build_take(kernel: str, types: str, width: int, capability: int) -> Binary:
    items = kernel == "take_items"
    block_v = score_arguments(types, width, capability)[0]["BLOCK_V"]
    arguments = dict.fromkeys(("scores", "best"), "*fp32:16") | dict(place_out="*i64:16")
    arguments |= dict(count="i32", k="i32", BLOCK=kernels.BLOCK_TAKE, BLOCK_V=block_v)
    arguments |= dict(chosen="*i64:16" if items else None, value_out="*fp32:16" if items else None)
    return compile_for(capability, kernels._take_kernel, arguments, "BLOCK", num_warps=1)


def build(kernel: str, types: str, width: int, capability: int) -> Binary:
    if kernel.startswith("take"):
        return build_take(kernel, types, width, capability)
    arguments, options = score_arguments(types, width, capability)
    if kernel == "maxima":
        arguments |= dict(maxima="*fp32:16")
    else:
        for name in ("n", "per_range"):
            del arguments[name]
        arguments |= dict(chosen="*i64:16", slots="i32", scores="*fp32:16")
    return compile_for(capability, getattr(kernels, f"_{kernel}_kernel"), arguments, **options)


OP = Op(
    "linear_topk", "kernel types D sm", CASES, build,
    lambda kernel, types, *_: types == "bf16" and not kernel.startswith("take"),
)  # fmt: skip
test_machine_code = machine_code_test(OP)
