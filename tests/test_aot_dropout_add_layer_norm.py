# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of the kernels of dropout_add_layer_norm: no GPU is needed."""

from aot import SHARED_LIMIT, Binary, Op, case, compile_for, machine_code_test, take_options

from fastrec.kernels import dropout_add_layer_norm as kernels

# The plain suite compiles the target device; the other architectures are slow.
CASES = [
    case(
        kernel, dtype, width, capability, plain=(capability, dtype) == (90, "bf16") and width != 256
    )
    for kernel in ("fwd", "bwd")
    for dtype in ("bf16", "fp32")
    for width in (64, 256, kernels.WIDEST)
    for capability in SHARED_LIMIT
]


def build(kernel: str, dtype: str, width: int, capability: int) -> Binary:
    """A low-precision sublayer beside a float32 residual stream, with dropout."""
    config = kernels._config(width)
    options = take_options(config)
    x, wide, ids, step = f"*{dtype}:16", "*fp32:16", "*i64:16", "i32:16"
    arguments = dict.fromkeys(("keys", "positions", "rng"), ids)
    arguments |= dict(weight=wide, n="i32", d=step, scale="fp32", drop="i32", layer="i32")
    arguments |= dict(SITE=3, VEC=1, **config)
    if kernel == "fwd":
        arguments |= dict.fromkeys(("residual", "bias", "output", "sum_out"), wide)
        arguments |= dict(input=x, mean_out=wide, rstd_out=wide, eps="fp32")
        arguments |= dict(stride_input=step, stride_residual=step)
    else:
        names = ("grad_output", "grad_sum", "sum", "mean", "rstd", "grad_residual", "partials")
        arguments |= dict.fromkeys(names, wide) | dict(grad_input=x, per_program="i32")
        arguments |= dict.fromkeys(("stride_output", "stride_gsum", "stride_sum"), step)
    return compile_for(
        capability, getattr(kernels, f"_{kernel}_kernel"), arguments, "BLOCK_N BLOCK_D", **options
    )


OP = Op("dropout_add_layer_norm", "kernel sublayer D sm", CASES, build)
test_machine_code = machine_code_test(OP)
