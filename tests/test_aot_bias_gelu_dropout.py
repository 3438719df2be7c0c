# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of the kernels of bias_gelu_dropout: no GPU is needed.

Run as a script it prints the numbers of docs/kernels/bias_gelu_dropout.md.
"""

import pytest
from aot import SHARED_LIMIT, Binary, case, compile_for, needs_compiler, print_table, take_options

from fastrec.kernels import bias_gelu_dropout as kernels

pytestmark = needs_compiler

# The plain suite compiles the target device; the other architectures are slow.
CASES = [
    case(kernel, dtype, dropout, capability, plain=(capability, dtype) == (90, "bf16"))
    for kernel in ("fwd", "bwd")
    for dtype in ("bf16", "fp32")
    for dropout in (False, True)
    for capability in SHARED_LIMIT
]


def build(kernel: str, dtype: str, dropout: bool, capability: int) -> Binary:
    """Every width of 128 and more has these tiles."""
    config = kernels._config(256)
    options = take_options(config)
    x, wide, step = f"*{dtype}:16", "*fp32:16", "i32:16"
    ids = "*i64:16" if dropout else None
    arguments = dict.fromkeys(("keys", "positions", "rng"), ids)
    arguments |= dict(input=x, bias=wide, n="i32", d=step, stride_input=step, scale="fp32")
    arguments |= dict(drop="i32", layer="i32", SITE=4, **config)
    if kernel == "fwd":
        arguments |= dict(output=x)
    else:
        arguments |= dict(grad_output=x, grad_input=x, partials=wide)
        arguments |= dict(per_program="i32", stride_output=step)
    return compile_for(capability, getattr(kernels, f"_{kernel}_kernel"), arguments, **options)


@pytest.mark.parametrize(("kernel", "dtype", "dropout", "capability"), CASES)
def test_no_spill(kernel, dtype, dropout, capability):
    binary = build(kernel, dtype, dropout, capability)
    binary.assert_fits(capability)


if __name__ == "__main__":
    print_table("kernel dtype dropout", CASES, build)
