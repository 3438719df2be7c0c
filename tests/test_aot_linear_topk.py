"""What ptxas makes of every tile configuration of linear_topk: no GPU is needed.

The table of docs/kernels/linear_topk.md is what this file prints when run as a script.
"""

import sys

import pytest
from aot import SHARED_LIMIT, Binary, compile_for, needs_compiler
from test_aot_linear_rank import TYPES, WIDTHS, arguments_of

from fastrec.kernels import linear_topk as kernels

pytestmark = needs_compiler

CASES = [
    pytest.param(
        kernel, types, width, capability,
        marks=[] if (types, width, capability) == ("bf16", 64, 90) else [pytest.mark.slow],
    )
    for kernel in ("maxima", "select")
    for types in TYPES
    for width in WIDTHS
    for capability in SHARED_LIMIT
]  # fmt: skip


def build(kernel: str, types: str, width: int, capability: int) -> Binary:
    arguments, options = arguments_of(types, width, capability)
    arguments |= dict(keys="*i64:16")
    if kernel == "select":
        for name in ("n", "per_range"):
            del arguments[name]
        arguments |= dict(chosen="*i64:16", slots="i32")
    return compile_for(capability, getattr(kernels, f"_{kernel}_kernel"), arguments, **options)


@pytest.mark.parametrize(("kernel", "types", "width", "capability"), CASES)
def test_no_spill(kernel, types, width, capability):
    binary = build(kernel, types, width, capability)
    assert not binary.spills, f"{binary.registers} registers, {binary.stack} bytes of stack"
    assert binary.shared <= SHARED_LIMIT[capability]
    if capability == 90 and types == "bf16":
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
