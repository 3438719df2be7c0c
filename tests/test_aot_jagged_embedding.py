# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of the kernels of jagged_embedding: no GPU is needed."""

from aot import SHARED_LIMIT, Binary, Op, case, compile_for, machine_code_test, take_options

from fastrec.kernels import jagged_embedding as kernels

# The plain suite compiles the target device; the other architectures are slow.
CASES = [
    case(kernel, dtype, width, capability, plain=(capability, dtype, width) == (90, "fp32", 64))
    for kernel in ("fwd", "bwd", "scatter", "carry")
    for dtype in ("bf16", "fp32")
    for width in (64, kernels.WIDEST)
    for capability in SHARED_LIMIT
]


def build(kernel: str, dtype: str, width: int, capability: int) -> Binary:
    """With positions, LayerNorm and dropout."""
    table, wide, ids, step = f"*{dtype}:16", "*fp32:16", "*i64:16", "i32:16"
    arguments: dict = dict(t="i32", d=step)
    rows = {"scatter": "BLOCK_T", "carry": "BLOCK_K"}.get(kernel, "BLOCK_N")
    if kernel in ("scatter", "carry"):
        options = {}
        arguments |= dict(index=ids, out=table, head=wide, tail=wide)
        arguments |= dict(BLOCK_T=kernels.BLOCK_T, BLOCK_D=64)
        if kernel == "scatter":
            arguments |= dict(grad=wide, order=ids, stride_grad=step, VEC=1)
        else:
            arguments |= dict(BLOCK_K=32, spare="i32")
    else:
        config = kernels._config(width)
        options = take_options(config)
        arguments |= dict.fromkeys(("values", "keys", "positions", "rng"), ids)
        arguments |= dict.fromkeys(("weight", "position_weight"), table)
        arguments |= dict(norm_weight=wide, stride_weight=step, stride_position=step, scale="fp32")
        arguments |= dict(drop="i32", layer="i32", SITE=2, VEC=1, **config)
        if kernel == "fwd":
            arguments |= dict(norm_bias=wide, output=table, mean_out=wide, rstd_out=wide)
            arguments |= dict(eps="fp32")
        else:
            arguments |= dict(grad_output=table, mean=wide, rstd=wide, grad_z=wide, partials=wide)
            arguments |= dict(per_program="i32", stride_output=step)
    function = kernels.carry_kernel if kernel == "carry" else getattr(kernels, f"_{kernel}_kernel")
    return compile_for(capability, function, arguments, f"{rows} BLOCK_D", **options)


OP = Op("jagged_embedding", "kernel table D sm", CASES, build)
test_machine_code = machine_code_test(OP)
