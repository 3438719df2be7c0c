"""What ptxas makes of every tile configuration of linear_rank: no GPU is needed.

The table of docs/kernels/linear_rank.md is what this file prints when run as a script.
"""

import sys

import pytest
import torch
from aot import SHARED_LIMIT, Binary, compile_for, needs_compiler

from fastrec.kernels import linear_rank as kernels
from fastrec.kernels.linear_scores import config_of

pytestmark = needs_compiler

# Name: dtypes of the activations and of the table.
TYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}
POINTER = {torch.bfloat16: "*bf16:16", torch.float32: "*fp32:16"}
WIDTHS = (64, 128, 256, 1024)  # above 256 in chunks
CASES = [
    pytest.param(
        types, width, capability,
        marks=[] if (types, width, capability) == ("bf16", 64, 90) else [pytest.mark.slow],
    )
    for types in TYPES
    for width in WIDTHS
    for capability in SHARED_LIMIT
]  # fmt: skip


def arguments_of(types: str, width: int, capability: int) -> tuple[dict, dict]:
    """What both ranking ops pass: contiguous tensors, a bias, exclusions. (arguments, options)"""
    dtype, table = TYPES[types]
    config = config_of(width, table, capability)
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
    arguments = dict(x=POINTER[dtype], w=POINTER[table], bias=POINTER[table], d="i32:16")
    arguments |= dict(stride_xn="i32:16", stride_xd=1, stride_wv="i32:16", stride_wd=1, stride_b=1)
    arguments |= dict(listed="*i64:16", offsets="*i64:16", n="i32", v="i32", per_range="i32")
    return arguments | config, options


def build(types: str, width: int, capability: int) -> Binary:
    arguments, options = arguments_of(types, width, capability)
    arguments |= dict(order="*i64:16", target="*i64:16", ahead_out="*i32:16")
    return compile_for(capability, kernels._fwd_kernel, arguments, **options)


@pytest.mark.parametrize(("types", "width", "capability"), CASES)
def test_no_spill(types, width, capability):
    binary = build(types, width, capability)
    assert not binary.spills, f"{binary.registers} registers, {binary.stack} bytes of stack"
    assert binary.shared <= SHARED_LIMIT[capability]
    if capability == 90 and types == "bf16":
        assert binary.count("HGMMA") > 0, "the products do not use wgmma"


def main() -> None:
    print("| types | D | sm | registers | stack | shared, bytes | matrix instruction |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        binary = build(*case.values)
        found = [o for o in ("HGMMA", "UTCHMMA", "HMMA", "FFMA") if binary.count(o)]
        cells = [*case.values, binary.registers, binary.stack, binary.shared]
        print("|", " | ".join(map(str, [*cells, *found[:1]])), "|", flush=True)


if __name__ == "__main__":
    sys.exit(main())
