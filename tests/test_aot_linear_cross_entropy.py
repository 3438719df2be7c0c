# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of every shipped tile configuration: no GPU is needed."""

import pytest
import torch
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
    needs_compiler,
    take_options,
)

from fastrec.kernels import linear_cross_entropy as kernels
from fastrec.kernels.common import linear_cross_entropy_plan as plan
from fastrec.kernels.common import linear_cross_entropy_wide as wide

# float32 products by tensor cores, unless "ieee" is asked for.
KINDS = {**TYPES, "fp32-ieee": TYPES["fp32"]}


def precision_of(types: str) -> str:
    return "ieee" if types == "fp32-ieee" else "bf16x3"


def stored(types: str, width: int, capability: int) -> bool:
    """Whether the scores are stored at this width."""
    kind = kernels._kind(*KINDS[types], precision_of(types))
    return width > kernels._widest(kind, capability)


# The plain suite compiles the target device; the other architectures and types are slow.
CASES = [
    case(
        kernel,
        types,
        width,
        capability,
        plain=capability == 90 and (types == "bf16" or (width == 64 and kernel in ("fwd", "bwd"))),
    )
    for kernel in ("fwd", "combine", "bwd", "bwd_ranges", "softmax", "gradient")
    for types in KINDS
    for width in WIDTHS
    if kernel != "bwd_ranges" or types == "bf16"  # elsewhere dW is float32 anyway
    for capability in SHARED_LIMIT
    if (kernel in ("softmax", "gradient")) == stored(types, width, capability)
]


def build_wide(kernel: str, types: str, width: int, capability: int) -> Binary:
    """The same for the kernels between products; chunks hold a multiple of 16 items."""
    dtype, table = KINDS[types]
    config = kernels._config(width, dtype, table, precision_of(types), capability)
    config = config["fwd" if kernel == "softmax" else "bwd"]
    vectors = ["shift", "sums", "fade", "logit", "lse", "grad_lse", "grad_logit"]
    arguments = dict.fromkeys(["scores", *vectors, "bias_out"], "*fp32:16") | config
    arguments |= dict(bias=POINTER[table], target="*i64:16", p_out=POINTER[dtype], stride_b=1)
    arguments |= dict(n="i32", first="i32", items="i32:16", WITH_MEAN=True, BLOCK=wide.BLOCK)
    arguments |= dict(zip(("BLOCK_N", "BLOCK_V"), wide.TILE, strict=True))
    function = getattr(wide, f"_{kernel}_kernel")
    arguments = {name: arguments[name] for name in function.arg_names}
    tile = "BLOCK" if kernel == "softmax" else "BLOCK_N BLOCK_V"  # of one row, of several
    return compile_for(capability, function, arguments, tile, num_warps=wide.WARPS[kernel])


def build(kernel: str, types: str, width: int, capability: int) -> Binary:
    """The kernel as the launcher specialises it: contiguous tensors, `width` a multiple of 16."""
    if stored(types, width, capability):
        return build_wide(kernel, types, width, capability)
    dtype, table = KINDS[types]
    x, w, vector, ids = POINTER[dtype], POINTER[table], "*fp32:16", "*i64:16"
    config = kernels._config(width, dtype, table, precision_of(types), capability)
    config = config["bwd" if "bwd" in kernel else "fwd"]
    options = take_options(config)
    if kernel == "combine":
        options = {}
        config = {key: config[key] for key in ("BLOCK_N", "BLOCK_V", "BLOCK_D", "PRECISION")}
        config |= {"BLOCK_R": kernels._combine_rows(config["BLOCK_D"]), "WITH_MEAN": True}
    shared = dict(x=x, w=w, bias=None, count=ids, v="i32", d="i32:16", stride_wv="i32:16", **config)
    shared |= {"stride_wd": 1, "stride_b": "i32:16"}  # 0 without a bias
    if kernel == "fwd":
        arguments = dict(
            order=ids, shift_out=vector, sum_out=vector, mean_out=vector, slots="i32",
            stride_xn="i32:16", stride_xd=1, WITH_MEAN=True,
        )  # fmt: skip
    elif kernel == "combine":
        outputs = ("shift_in", "sum_in", "mean_in", "lse_out", "logit_out", "offset_out")
        arguments = dict.fromkeys(outputs, vector) | dict(
            target=ids, order=ids, n="i32", slots="i32", stride_xn="i32:16", stride_xd=1
        )
    else:
        # The [N] vectors are rows of one [3, N] tensor: aligned only when N is a multiple of 4.
        arguments = dict(
            target=ids, lse=vector, grad_lse="*fp32", grad_logit="*fp32", offsets=ids,
            scale=vector, grad_w=w if kernel == "bwd" else vector, grad_bias=vector, ranges="i32",
        )  # fmt: skip
    function = getattr(kernels, f"_{kernel.removesuffix('_ranges')}_kernel")
    tile = "BLOCK_R BLOCK_D" if kernel == "combine" else "BLOCK_N BLOCK_V"
    return compile_for(capability, function, shared | arguments, tile, **options)


def _wgmma(kernel: str, types: str, *_) -> bool:
    return types != "fp32-ieee" and kernel in ("fwd", "bwd", "bwd_ranges")


OP = Op(
    "linear_cross_entropy", "kernel types D sm", CASES, build, _wgmma, "linear_cross_entropy_gpu"
)
test_machine_code = machine_code_test(OP)


@needs_compiler
@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("passed", ["forward", "backward"])
def test_the_plan_compiles(passed, capability):
    backward = passed == "backward"
    ids, vector, rows = "*i64:16", "*fp32:16", POINTER[torch.bfloat16]
    own = dict.fromkeys(("by_item", "offsets"), ids) | dict(x=rows, x_out=rows)
    own |= dict.fromkeys(("vectors", "vectors_out"), vector)
    arguments = own if backward else dict.fromkeys(own)
    arguments |= dict(target=ids, order=None if backward else ids, count=ids)
    arguments |= dict.fromkeys(("n", "v", "tiles"), "i32") | {"stride_xd": 1}
    arguments |= {"ITEMS": 128 if backward else None}
    arguments |= dict.fromkeys(("d", "stride_xn"), "i32:16") | {"BLOCK_D": 64}
    arguments |= {"BLOCK_R": plan.BLOCK_R, "BLOCK_J": plan.BLOCK_J}
    tile, options = "BLOCK_R BLOCK_D", {"num_warps": plan.WARPS}
    compile_for(capability, plan._plan_kernel, arguments, tile, **options).assert_fits()
