"""What ptxas makes of every tile configuration of linear_rank: no GPU is needed.

Run as a script it prints the numbers of docs/kernels/linear_rank.md.
"""

import pytest
from aot import (
    POINTER,
    SHARED_LIMIT,
    TYPES,
    WIDTHS,
    Binary,
    case,
    compile_for,
    needs_compiler,
    print_table,
    take_options,
)

from fastrec.kernels import linear_rank as kernels
from fastrec.kernels.common.linear_scores import config_of

pytestmark = needs_compiler

CASES = [
    case(types, width, capability, plain=(types, width, capability) == ("bf16", 64, 90))
    for types in TYPES
    for width in WIDTHS
    for capability in SHARED_LIMIT
]


def arguments_of(types: str, width: int, capability: int) -> tuple[dict, dict]:
    """What both ranking ops pass: contiguous tensors, a bias, exclusions. (arguments, options)"""
    dtype, table = TYPES[types]
    config = config_of(width, table, capability)
    options = take_options(config)
    arguments = dict(x=POINTER[dtype], w=POINTER[table], bias=POINTER[table], d="i32:16")
    arguments |= dict(stride_xn="i32:16", stride_xd=1, stride_wv="i32:16", stride_wd=1, stride_b=1)
    arguments |= dict(listed="*i64:16", offsets="*i64:16", n="i32", v="i32", per_range="i32")
    return arguments | config, options


def build(types: str, width: int, capability: int) -> Binary:
    arguments, options = arguments_of(types, width, capability)
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
