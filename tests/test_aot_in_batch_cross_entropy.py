# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of every shipped tile configuration: no GPU is needed."""

from aot import (
    POINTER,
    SHARED_LIMIT,
    TYPES,
    WIDTHS,
    Binary,
    Op,
    case,
    compile_for,
    machine_code_test,
    take_options,
)

from fastrec.kernels import in_batch_cross_entropy as kernels

# The plain suite compiles the target device at the common widths; the rest is slow.
CASES = [
    case(
        kernel,
        types,
        width,
        rules,
        capability,
        plain=(capability, types) == (90, "bf16")
        and (width == 64 or (rules == "all" and width < 256)),
    )
    for kernel in ("fwd", "combine", "bwd")
    for types in ("bf16", "fp32", "fp32-ieee")
    for width in WIDTHS
    for rules in (("none",) if kernel == "combine" else ("none", "all"))
    for capability in SHARED_LIMIT
]


def build(kernel: str, types: str, width: int, rules: str, capability: int) -> Binary:
    """The kernel as the launcher specialises it. `rules`: none, or two columns of ids and lists."""
    dtype = TYPES[types.removesuffix("-ieee")][0]
    precision = "ieee" if types == "fp32-ieee" else "bf16x3"
    matrix, vector, ids = POINTER[dtype], "*fp32:16", "*i64:16"
    config = kernels.config_of(width, dtype, precision, capability)
    config = config["bwd" if kernel == "bwd" else "fwd"]
    options = take_options(config)
    shared = dict(x=matrix, c=matrix, bias=vector, positive=ids, n="i32", d="i32:16")
    if kernel == "combine":
        options = {}
        arguments = dict.fromkeys(("shift_in", "sum_in", "mean_in", "loss_out"), vector) | dict(
            lse_out=vector, direction_out=vector, ranges="i32", WITH_MEAN=True,
            BLOCK_R=kernels._combine_rows(config["BLOCK_D"]),
            **{key: config[key] for key in ("BLOCK_B", "BLOCK_D", "CHUNKS")},
        )  # fmt: skip
    else:
        names = ("row_group", "item_group", "listed", "offsets")
        arguments = dict.fromkeys(names, ids if rules == "all" else None)
        arguments |= config | dict(COLUMNS=2 if rules == "all" else 0, v="i32", per_range="i32")
        if kernel == "fwd":
            arguments |= dict.fromkeys(("shift_out", "sum_out", "mean_out"), vector)
            arguments |= {"WITH_MEAN": True}
        else:
            # The gradients are rows of one [2, B] tensor: aligned only when B is a multiple of 4.
            arguments |= dict(grad=vector, grad_positive="*fp32", scale=vector, lse=vector)
            arguments |= dict(grad_c=vector, grad_bias=vector)
    function = getattr(kernels, f"_{kernel}_kernel")
    tile = "BLOCK_R BLOCK_D" if kernel == "combine" else "BLOCK_B BLOCK_C"
    return compile_for(capability, function, shared | arguments, tile, **options)


def _wgmma(kernel: str, types: str, width: int, *_) -> bool:
    widest = {"bf16": 256, "fp32": 128}.get(types, 0)  # of the tiles of tensor cores
    return kernel != "combine" and width <= widest


OP = Op("in_batch_cross_entropy", "kernel types D exclusions sm", CASES, build, _wgmma)
test_machine_code = machine_code_test(OP)
