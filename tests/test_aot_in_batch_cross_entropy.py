"""What ptxas makes of every shipped tile configuration: no GPU is needed.

The table of docs/kernels/in_batch_cross_entropy.md is what this file prints when run as a script.
"""

import sys

import pytest
import torch
from aot import SHARED_LIMIT, Binary, compile_for, needs_compiler

from fastrec.kernels import in_batch_cross_entropy as kernels

pytestmark = needs_compiler

TYPES = {"bf16": (torch.bfloat16, "*bf16:16"), "fp32": (torch.float32, "*fp32:16")}
WIDTHS = (64, 128, 256, 1024)  # above 256 in chunks
# The plain suite compiles the target device at the common widths; the rest is slow.
CASES = [
    pytest.param(
        kernel, types, width, rules, capability,
        marks=[]
        if (capability, types, rules) == (90, "bf16", "all") and width < 256
        else [pytest.mark.slow],
    )
    for kernel in ("fwd", "combine", "bwd")
    for types in TYPES
    for width in WIDTHS
    for rules in (("none",) if kernel == "combine" else ("none", "all"))
    for capability in SHARED_LIMIT
]  # fmt: skip


def build(kernel: str, types: str, width: int, rules: str, capability: int) -> Binary:
    """The kernel as the launcher specialises it. `rules`: none, or two columns of ids and lists."""
    dtype, matrix = TYPES[types]
    vector, ids = "*fp32:16", "*i64:16"
    config = kernels.config_of(width, dtype, capability)["bwd" if kernel == "bwd" else "fwd"]
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
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
    return compile_for(capability, function, shared | arguments, **options)


@pytest.mark.parametrize(("kernel", "types", "width", "rules", "capability"), CASES)
def test_no_spill(kernel, types, width, rules, capability):
    binary = build(kernel, types, width, rules, capability)
    assert not binary.spills, f"{binary.registers} registers, {binary.stack} bytes of stack"
    assert binary.shared <= SHARED_LIMIT[capability]
    if capability == 90 and types != "fp32" and width <= 256 and kernel != "combine":
        assert binary.count("HGMMA") > 0, "the products do not use wgmma"


def main() -> None:
    print("| kernel | types | D | exclusions | sm | registers | stack | shared, bytes | product |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        binary = build(*case.values)
        found = [o for o in ("HGMMA", "UTCHMMA", "HMMA", "FFMA") if binary.count(o)]
        cells = [*case.values, binary.registers, binary.stack, binary.shared]
        print("|", " | ".join(map(str, [*cells, *found[:1]])), "|", flush=True)


if __name__ == "__main__":
    sys.exit(main())
