# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of every tile configuration of linear_rank: no GPU is needed.

Run as a script it prints the numbers of docs/kernels/linear_rank.md.
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

from fastrec.kernels import linear_rank as kernels

pytestmark = needs_compiler

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


@pytest.mark.parametrize(("types", "width", "capability"), CASES)
def test_no_spill(types, width, capability):
    binary = build(types, width, capability)
    binary.assert_fits(capability)
    if capability == 90 and types == "bf16":
        binary.assert_wgmma()


if __name__ == "__main__":
    print_table("types D", CASES, build, product="matrix instruction")
