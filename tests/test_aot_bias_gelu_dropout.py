# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of the kernels of bias_gelu_dropout: no GPU is needed."""

from aot import SHARED_LIMIT, Binary, Op, case, compile_for, machine_code_test, take_options

from fastrec.kernels import bias_gelu_dropout as kernels

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
    arguments |= dict(drop="i32", layer="i32", SITE=4, VEC=1, **config)
    if kernel == "fwd":
        arguments |= dict(output=x)
    else:
        arguments |= dict(grad_output=x, grad_input=x, partials=wide)
        arguments |= dict(per_program="i32", stride_output=step)
    return compile_for(
        capability, getattr(kernels, f"_{kernel}_kernel"), arguments, "BLOCK_N BLOCK_D", **options
    )


OP = Op("bias_gelu_dropout", "kernel dtype dropout sm", CASES, build)
test_machine_code = machine_code_test(OP)
