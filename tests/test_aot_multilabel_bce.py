# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of the kernels of multilabel_bce: no GPU is needed."""

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

from fastrec.kernels import multilabel_bce as kernels

SHOWN = ("bf16", "fp32", "fp32-ieee")
CASES = [
    case(kernel, types, width, capability, plain=(width, capability) == (64, 90) and types in SHOWN)
    for kernel in ("fwd", "bwd")
    for types in (*TYPES, "fp32-ieee")
    for width in WIDTHS
    if width <= kernels.WIDEST
    for capability in SHARED_LIMIT
]


def build(kernel: str, types: str, width: int, capability: int) -> Binary:
    """The kernel as the launcher specialises it: contiguous tensors, `width` a multiple of 16."""
    dtype, table = TYPES[types.removesuffix("-ieee")]
    precision = "ieee" if types == "fp32-ieee" else "bf16x3"
    config = kernels._config(width, dtype, precision, capability)[kernel]
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


def _wgmma(kernel: str, types: str, width: int, *_) -> bool:
    return width <= {"fp32": 128, "fp32-ieee": 0}.get(types, 256)


OP = Op("multilabel_bce", "kernel types D sm", CASES, build, _wgmma)
test_machine_code = machine_code_test(OP)
