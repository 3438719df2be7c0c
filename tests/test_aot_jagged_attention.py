"""What ptxas makes of the tile configurations of jagged_attention: no GPU is needed.

The table of docs/kernels/jagged_attention.md is what this file prints when run as a script.
"""

import sys

import pytest
import torch
from aot import SHARED_LIMIT, Binary, compile_for, needs_compiler

from fastrec.kernels import jagged_attention as kernels

pytestmark = needs_compiler

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# (head width, longest sequence): one tile of 16, 32 and 64 events, and more than one.
SHAPES = ((16, 16), (32, 30), (32, 50), (32, 200), (64, 50), (64, 200), (128, 200), (256, 200))
# The plain suite compiles the target device at the widths of the recipes; the rest is slow.
PLAIN = ((32, 30), (32, 200))
CASES = [
    pytest.param(
        kernel, dtype, width, length, capability,
        marks=[]
        if (capability, dtype) == (90, "bf16") and (width, length) in PLAIN
        else [pytest.mark.slow],
    )
    for kernel in ("fwd", "bwd")
    for dtype in DTYPES
    for width, length in SHAPES
    for capability in SHARED_LIMIT
    # The kernels are made for widths up to 128; this one is correct and spills 550 bytes.
    if (kernel, dtype, width) != ("bwd", "fp32", 256)
]  # fmt: skip


def build(kernel: str, dtype: str, width: int, length: int, capability: int) -> Binary:
    """The kernel with dropout as the launcher specialises it: views of a packed [T, 3, H, D]."""
    config = kernels._config(kernel, width, DTYPES[dtype], length)
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
    x, ids = f"*{dtype}:16", "*i64:16"
    tensors = ("q", "k", "v")
    arguments = dict.fromkeys((*tensors, "out"), x) | dict.fromkeys(("offsets", "sample_ids"), ids)
    arguments |= dict(
        rng=ids, lse="*fp32:16", heads="i32", d="i32:16", scale="fp32", keep_scale="fp32",
        drop="i32", view="i32", layer="i32", CAUSAL=False, **config,
    )  # fmt: skip
    if kernel == "bwd":
        tensors += ("g",)
        arguments |= dict(g=x, grad=x, ONE_TILE=length <= config["BLOCK"])
    for name in tensors:
        arguments |= {f"stride_{name}t": "i32:16", f"stride_{name}h": "i32:16"}
    return compile_for(capability, getattr(kernels, f"_{kernel}_kernel"), arguments, **options)


@pytest.mark.parametrize(("kernel", "dtype", "width", "length", "capability"), CASES)
def test_no_spill(kernel, dtype, width, length, capability):
    binary = build(kernel, dtype, width, length, capability)
    assert not binary.spills, f"{binary.registers} registers, {binary.stack} bytes of stack"
    assert binary.shared <= SHARED_LIMIT[capability]
    if dtype == "bf16":
        matrix = ("HMMA", "HGMMA", "UTCHMMA")
        assert any(binary.count(name) for name in matrix), "the products do not use tensor cores"


def main() -> None:
    print("| kernel | type | D | longest | sm | registers | stack | shared, bytes | products |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        binary = build(*case.values)
        found = [o for o in ("HGMMA", "UTCHMMA", "HMMA", "FFMA") if binary.count(o)]
        cells = [*case.values, binary.registers, binary.stack, binary.shared]
        print("|", " | ".join(map(str, [*cells, *found[:1]])), "|", flush=True)


if __name__ == "__main__":
    sys.exit(main())
