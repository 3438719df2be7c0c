# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of the kernel of in_batch_hardest: no GPU is needed."""

import torch
from aot import SHARED_LIMIT, WIDTHS, Binary, Op, case, compile_for, machine_code_test, take_options

from fastrec.kernels import in_batch_hardest as kernels
from fastrec.kernels.in_batch_cross_entropy import config_of

# The public function computes in float32.
CASES = [
    case(width, capability, plain=(width, capability) == (64, 90))
    for width in WIDTHS
    for capability in SHARED_LIMIT
]


def build(width: int, capability: int) -> Binary:
    config = config_of(width, torch.float32, "ieee", capability)["fwd"]
    options = take_options(config)
    del config["HEADROOM"], config["RUNNING"]
    vector, ids = "*fp32:16", "*i64:16"
    arguments = dict.fromkeys(("x", "c", "bias", "best_out"), vector) | config
    arguments |= dict.fromkeys(("row_group", "item_group", "listed", "offsets"), ids)
    arguments |= dict(index_out="*i32:16", n="i32", v="i32", d="i32:16", per_range="i32", COLUMNS=2)
    return compile_for(capability, kernels._fwd_kernel, arguments, "BLOCK_B BLOCK_C", **options)


OP = Op("in_batch_hardest", "D sm", CASES, build, page="in_batch_cross_entropy")
test_machine_code = machine_code_test(OP)
