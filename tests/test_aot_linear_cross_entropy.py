"""What ptxas makes of every shipped tile configuration: no GPU is needed.

The table of docs/kernels/linear_cross_entropy_gpu.md is what this file prints when run as a script.
"""

import sys

import pytest
import torch
from aot import SHARED_LIMIT, Binary, compile_for, needs_compiler

from fastrec.kernels import linear_cross_entropy as kernels

pytestmark = needs_compiler

# Name: dtypes of the activations and of the table.
TYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}
POINTER = {torch.bfloat16: "*bf16:16", torch.float32: "*fp32:16"}
WIDTHS = (64, 128, 256, 1024)  # above 256 in chunks
# The plain suite compiles the target device; the other architectures and types are slow.
CASES = [
    pytest.param(
        kernel, types, width, capability,
        marks=[] if (capability, types) == (90, "bf16") else [pytest.mark.slow],
    )
    for kernel in ("fwd", "combine", "bwd")
    for types in TYPES
    for width in WIDTHS
    for capability in SHARED_LIMIT
]  # fmt: skip


def build(kernel: str, types: str, width: int, capability: int) -> Binary:
    """The kernel as the launcher specialises it: contiguous tensors, `width` a multiple of 16."""
    dtype, table = TYPES[types]
    x, w, vector, ids = POINTER[dtype], POINTER[table], "*fp32:16", "*i64:16"
    config = kernels._config(width, dtype, table, capability)["bwd" if kernel == "bwd" else "fwd"]
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
    if kernel == "combine":
        options = {}
        config = {key: value for key, value in config.items() if "_" in key or key == "CHUNKS"}
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
            scale=vector, grad_w=w, grad_bias=vector,
        )  # fmt: skip
    function = getattr(kernels, f"_{kernel}_kernel")
    return compile_for(capability, function, shared | arguments, **options)


@pytest.mark.parametrize(("kernel", "types", "width", "capability"), CASES)
def test_no_spill(kernel, types, width, capability):
    binary = build(kernel, types, width, capability)
    assert not binary.spills, f"{binary.registers} registers, {binary.stack} bytes of stack"
    assert binary.shared <= SHARED_LIMIT[capability]
    if capability == 90 and types != "fp32" and width <= 256 and kernel != "combine":
        assert binary.count("HGMMA") > 0, "the products do not use wgmma"


def main() -> None:
    print("| kernel | types | D | sm | registers | stack | shared, bytes | matrix instruction |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        binary = build(*case.values)
        found = [o for o in ("HGMMA", "UTCHMMA", "HMMA", "FFMA") if binary.count(o)]
        cells = [*case.values, binary.registers, binary.stack, binary.shared]
        print("|", " | ".join(map(str, [*cells, *found[:1]])), "|", flush=True)


if __name__ == "__main__":
    sys.exit(main())
