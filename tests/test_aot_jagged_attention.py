# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of the tile configurations of jagged_attention: no GPU is needed."""

import pytest
from aot import (
    SHARED_LIMIT,
    TYPES,
    Binary,
    Op,
    case,
    compile_for,
    machine_code_test,
    needs_compiler,
    take_options,
)

from fastrec.kernels import jagged_attention as kernels

# (head width, longest sequence): one tile of 16, 32 and 64 events, and more than one.
SHAPES = ((16, 16), (32, 30), (32, 50), (32, 200), (64, 50), (64, 200), (128, 200), (256, 200))
# The plain suite compiles the target device at the widths of the recipes; the rest is slow.
PLAIN = ((32, 30), (32, 50), (32, 200))
CASES = [
    case(
        kernel,
        dtype,
        width,
        length,
        capability,
        plain=capability == 90
        and (width, length) in PLAIN
        and (dtype == "bf16" or (kernel, length) == ("fwd", 50)),
    )
    for kernel in ("fwd", "bwd")
    for dtype in ("bf16", "fp32", "fp32-ieee")
    if kernel == "fwd" or dtype != "fp32-ieee"  # backward is "ieee"
    for width, length in SHAPES
    for capability in SHARED_LIMIT
    # The kernels are made for widths up to 128; this one is correct and spills 550 bytes.
    if (kernel, dtype, width) != ("bwd", "fp32", 256)
]


def build(
    kernel: str, dtype: str, width: int, length: int, capability: int, vector: int = 16
) -> Binary:
    """The kernel with dropout as the launcher specialises it: views of a packed [T, 3, H, D].
    `vector`: divides the width; below 16, what the kernel is told."""
    size, vector = ("i32:16", 1) if vector == 16 else ("i32", vector)
    precision = "ieee" if dtype == "fp32-ieee" else "bf16x3"
    dtype = dtype.removesuffix("-ieee")
    config = kernels._config(kernel, width, TYPES[dtype][0], length, precision, capability)
    options = take_options(config)
    x, ids = f"*{dtype}:16", "*i64:16"
    tensors = ("q", "k", "v")
    arguments = dict.fromkeys((*tensors, "out"), x) | dict.fromkeys(("offsets", "keys"), ids)
    arguments |= dict(
        rng=ids, lse="*fp32:16", events="i32", heads="i32", d=size, scale="fp32",
        keep_scale="fp32",
        drop="i32", layer="i32", SITE=1, CAUSAL=False, VEC=vector, **config,
    )  # fmt: skip
    if kernel == "bwd":
        tensors += ("g",)
        arguments |= dict(g=x, grad=x, ONE_TILE=length <= config["BLOCK"])
    for name in tensors:
        arguments |= {f"stride_{name}t": size, f"stride_{name}h": size}
    return compile_for(
        capability, getattr(kernels, f"_{kernel}_kernel"), arguments, "BLOCK BLOCK", **options
    )


OP = Op("jagged_attention", "kernel type D longest sm", CASES, build)
test_machine_code = machine_code_test(OP)


@needs_compiler
@pytest.mark.parametrize(("kernel", "vector"), [("fwd", 2), ("fwd", 4), ("bwd", 4)])
def test_widths_that_are_no_multiple_of_16_are_read_in_vectors(kernel, vector):
    """Number by number the forward pass spills 232 bytes, and makes twice the instructions."""
    binary = build(kernel, "bf16", 64, 50, 90, vector)
    binary.assert_fits()
    whole = build(kernel, "bf16", 64, 50, 90)
    most = {2: 1.5, 4: 1.2}[vector] * whole.loop.length
    assert binary.loop.length <= most < build(kernel, "bf16", 64, 50, 90, 1).loop.length
