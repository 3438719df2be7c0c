# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of the kernels of multilabel_bce: no GPU is needed.

Run as a script it prints the numbers of docs/kernels/multilabel_bce.md.
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

from fastrec.kernels import multilabel_bce as kernels

pytestmark = needs_compiler

CASES = [
    case(kernel, types, width, capability, plain=(types, width, capability) == ("bf16", 64, 90))
    for kernel in ("fwd", "bwd")
    for types in TYPES
    for width in WIDTHS
    if width <= kernels.WIDEST
    for capability in SHARED_LIMIT
]


def build(kernel: str, types: str, width: int, capability: int) -> Binary:
    """The kernel as the launcher specialises it: contiguous tensors, `width` a multiple of 16."""
    dtype, table = TYPES[types]
    config = kernels._config(width, dtype, capability)[kernel]
    options = take_options(config)
    vector, ids = "*fp32:16", "*i64:16"
    arguments = dict.fromkeys(("order", "count", "lists", "listed", "offsets"), ids)
    arguments |= dict.fromkeys(("loss_out", "grad_out", "grad_loss", "scale"), vector)
    arguments |= dict.fromkeys(("w", "bias", "grad_w", "grad_bias"), POINTER[table])
    arguments |= dict(x=POINTER[dtype], n="i32", v="i32", d="i32:16", per_range="i32")
    arguments |= dict(stride_xn="i32:16", stride_xd=1, stride_wv="i32:16", stride_wd=1, stride_b=1)
    arguments |= dict(WITH_INPUT=True, **config)
    function = getattr(kernels, f"_{kernel}_kernel")
    arguments = {name: arguments[name] for name in function.arg_names}
    return compile_for(capability, function, arguments, **options)


@pytest.mark.parametrize(("kernel", "types", "width", "capability"), CASES)
def test_no_spill(kernel, types, width, capability):
    binary = build(kernel, types, width, capability)
    binary.assert_fits(capability)
    if capability == 90 and types != "fp32":
        binary.assert_wgmma()


if __name__ == "__main__":
    print_table("kernel types D", CASES, build, product="matrix instruction")
