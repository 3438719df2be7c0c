# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of the kernels of sampled_linear_cross_entropy: no GPU is needed."""

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

from fastrec.kernels import sampled_linear_cross_entropy as kernels

VECTOR, IDS = "*fp32:16", "*i64:16"
# The plain suite compiles the target device; the other architectures, types and widths are slow.
CASES = [
    case(
        kernel,
        types,
        width,
        softmax,
        capability,
        plain=(width, softmax, capability) == (64, True, 90)
        and (types == "bf16" or (types != "bf16-fp32" and kernel.startswith("shared"))),
    )
    for kernel in ("own_fwd", "shared_fwd", "shared_bwd", "sum")
    for types in (*TYPES, "fp32-ieee")
    if types in TYPES or kernel.startswith("shared")
    for width in WIDTHS
    for softmax in (True, False)
    if softmax or kernel != "sum"
    for capability in SHARED_LIMIT
]


def build(kernel: str, types: str, width: int, softmax: bool, capability: int) -> Binary:
    """The kernel as the launcher specialises it: contiguous tensors, `width` a multiple of 16."""
    dtype, table = TYPES[types.removesuffix("-ieee")]
    if kernel == "sum":
        config = {"BLOCK_T": kernels.BLOCK_T, **kernels.sum_config(width, capability)}
    elif kernel == "own_fwd":
        config = kernels.own_config(width)
    else:
        precision = "ieee" if types == "fp32-ieee" else "bf16x3"
        backward = kernel == "shared_bwd"
        config = kernels.shared_config(width, dtype, backward, precision, capability)
    options = take_options(config)
    x, w = POINTER[dtype], POINTER[table]
    shared = dict(x=x, d="i32:16", stride_xn="i32:16", stride_xd=1, **config)
    vectors = dict.fromkeys(("loss_out", "grad_x", "grad_target", "lse_out"), VECTOR)
    if kernel == "own_fwd":
        arguments = vectors | dict(
            w=w, bias=w, log_q=VECTOR, target=IDS, negatives=IDS, grad_negatives=VECTOR,
            k="i32:16", beta="fp32", stride_wv="i32:16", stride_wd=1,
            SOFTMAX=softmax, WITH_INPUT=True, WITH_WEIGHT=True,
        )  # fmt: skip
    elif kernel == "shared_fwd":
        arguments = vectors | dict(
            w=w, offset=VECTOR, negatives=IDS, target=IDS, w_target=w, s_target=VECTOR, n="i32",
            k="i32", beta="fp32", stride_td="i32:16", SOFTMAX=softmax, WITH_INPUT=True,
        )  # fmt: skip
    elif kernel == "shared_bwd":
        names = ("offset", "lse", "grad_loss", "scale", "grad_w", "grad_offset")
        arguments = dict.fromkeys(names, VECTOR)
        arguments |= dict(w=w, negatives=IDS, target=IDS, n="i32", k="i32", SOFTMAX=softmax)
        arguments["per_range"] = "i32"
    else:
        arguments = dict.fromkeys(("coefficient", "head", "tail"), VECTOR)
        arguments |= dict(order=IDS, index=IDS, out=w, t="i32", per_row="i32", spare="i32")
    function = getattr(kernels, f"_{kernel}_kernel")
    tile = {"sum": "BLOCK_T BLOCK_D", "own_fwd": "BLOCK_K"}.get(kernel, "BLOCK_N BLOCK_K")
    return compile_for(capability, function, shared | arguments, tile, **options)


def _wgmma(kernel: str, types: str, width: int, *_) -> bool:
    return kernel.startswith("shared") and types != "fp32-ieee" and width <= 128


OP = Op("sampled_linear_cross_entropy", "kernel types D softmax sm", CASES, build, _wgmma)
test_machine_code = machine_code_test(OP)
