# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of every tile configuration of linear_topk: no GPU is needed.

Run as a script it prints the numbers of docs/kernels/linear_topk.md.
"""

import pytest
from aot import (
    SHARED_LIMIT,
    TYPES,
    WIDTHS,
    Binary,
    case,
    compile_for,
    needs_compiler,
    print_table,
    score_arguments,
)

from fastrec.kernels import linear_topk as kernels

pytestmark = needs_compiler

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


@pytest.mark.parametrize(("kernel", "types", "width", "capability"), CASES)
def test_no_spill(kernel, types, width, capability):
    binary = build(kernel, types, width, capability)
    binary.assert_fits(capability)
    if capability == 90 and types == "bf16":
        binary.assert_wgmma()


if __name__ == "__main__":
    print_table("kernel types D", CASES, build, product="matrix instruction")
