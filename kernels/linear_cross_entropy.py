# SPDX-License-Identifier: Apache-2.0
"""Tiles and launchers of the Triton kernels of `linear_cross_entropy`, which are in
`linear_cross_entropy_sweeps`, and for greater widths in `linear_cross_entropy_wide`.

Legend: N rows, V items, D width.
"""

import math

import torch
import triton

from fastrec import backend
from fastrec.kernels.common import linear_cross_entropy_wide as wide
from fastrec.kernels.common.linear_cross_entropy_plan import backward_plan, forward_plan
from fastrec.kernels.common.linear_cross_entropy_sweeps import (
    _bwd_kernel,
    _combine_kernel,
    _fwd_kernel,
)
from fastrec.kernels.common.rows import cut_columns, pad_columns
from fastrec.kernels.common.tiles import (
    FUSED,
    capability_of,
    float32_products,
    ranges_of,
    slots_of,
    sum_ranges,
    that_fit,
)

# (BLOCK_N, BLOCK_V, num_warps, num_stages) of the forward and of the backward kernel by BLOCK_D,
# the largest found that spill on none of sm_80, sm_90, sm_100 with Triton 3.9.
TILES = {
    "half": {
        64: ((64, 128, 4, 3), (64, 128, 8, 3)),
        128: ((128, 64, 8, 3), (64, 128, 8, 3)),
        256: ((128, 64, 8, 2), (64, 64, 8, 3)),
    },
    "mixed": {  # a float32 table: a tile takes twice the shared memory until it is converted
        64: ((64, 64, 4, 2), (64, 128, 8, 3)),
        128: ((128, 64, 8, 2), (64, 128, 8, 3)),
        256: ((64, 32, 8, 2), (64, 64, 8, 3)),
    },
    "split": {  # float32 as sums of two bfloat16: a tile and its two parts
        64: ((64, 64, 4, 2), (64, 128, 8, 2)),
        128: ((128, 64, 8, 2), (32, 128, 8, 2)),
    },
    "float32": {  # no tensor cores: operands are registers
        64: ((32, 32, 4, 2), (32, 32, 4, 2)),
        128: ((32, 32, 4, 2), (32, 32, 8, 2)),
        256: ((16, 32, 4, 2), (16, 32, 8, 2)),
    },
}
# Below sm_90 operands of a product are registers: every warp splits all of the table's tile.
SMALLER = {
    ("split", 64): ((32, 32, 4, 2), (64, 64, 8, 2)),
    ("mixed", 128): ((64, 64, 8, 2), (64, 128, 8, 3)),
}


def _kind(dtype: torch.dtype, table: torch.dtype, precision: str) -> str:
    if dtype == torch.float32:
        return "split" if precision == "bf16x3" else "float32"
    return "half" if dtype == table else "mixed"


def _widest(kind: str, capability: int) -> int:
    """Above it the scores are stored."""
    if kind == "split" and not 90 <= capability < 100:
        return 64  # sm_100: 128 columns need more tensor memory than there is (Triton 3.6)
    return max(TILES[kind])


def _config(
    width: int, dtype: torch.dtype, table: torch.dtype, precision: str, capability: int = 90
) -> dict:
    """Tile shapes and launch options of both kernels, for `capability` 10 * major + minor.
    `precision`: of the products of float32."""
    products = {"PRECISION": precision if dtype == torch.float32 else "tf32"}
    # float16 has 5 bits of exponent: p is kept near e^HEADROOM instead of near 1.
    fwd, bwd = (4.5, 10.0) if dtype == torch.float16 else (0.0, 0.0)
    config = {"fwd": {"HEADROOM": fwd, **products}, "bwd": {"HEADROOM": bwd, **products}}
    kind = _kind(dtype, table, precision)
    if width > _widest(kind, capability):
        return config
    block_d = max(triton.next_power_of_2(width), 16)
    tiles = TILES[kind][max(block_d, 64)]
    if capability < 90:
        tiles = SMALLER.get((kind, max(block_d, 64)), tiles)
    for name, (block_n, block_v, warps, stages) in zip(("fwd", "bwd"), tiles, strict=True):
        if block_n == 128 and block_d == 256 and capability >= 100:
            block_n = 64  # 128 rows spill 120 bytes there
        block_n, stages = that_fit(block_n, stages, block_d, capability)
        if name == "bwd" and block_d <= 64 and kind in ("half", "mixed") and capability == 90:
            warps = 4  # two blocks a processor in the place of one, fewer instructions; spills else
        config[name] |= {
            "BLOCK_N": block_n,
            "BLOCK_V": block_v,
            "BLOCK_D": block_d,
            "num_warps": warps,
            "num_stages": stages,
        }
    # Without tensor cores a second loop for sums that outgrow their shift spills.
    config["fwd"]["RUNNING"] = dtype == torch.float16 or kind == "float32"
    return config


def _combine_rows(block_d: int) -> int:
    return min(8, 1024 // block_d)


def _options(input: torch.Tensor, linear_weight: torch.Tensor) -> dict[str, dict]:
    for name, tensor in (("input", input), ("linear_weight", linear_weight)):
        if tensor.dtype == torch.float64:
            raise RuntimeError(
                f"linear_cross_entropy has no float64 triton kernel, {name} is float64"
            )
    return _config(
        input.shape[1], input.dtype, linear_weight.dtype, float32_products(input.device),
        capability_of(input.device),
    )  # fmt: skip


def _table(input: torch.Tensor, linear_weight: torch.Tensor) -> torch.Tensor:
    """The table as the products read it: where `fastrec.backend.copy_tables` says so, a copy in the
    dtype of the rows. The numbers are those to which a tile would be rounded."""
    return linear_weight.to(input.dtype) if backend.copy_tables else linear_weight


def linear_cross_entropy_fwd(input, linear_weight, linear_bias, target, with_offset):
    width = input.shape[1]
    input, linear_weight = pad_columns(input, _table(input, linear_weight))
    config = _options(input, linear_weight)["fwd"]
    (n, d), v = input.shape, linear_weight.shape[0]
    if "BLOCK_N" not in config and n > 0:
        with torch.cuda.device_of(input):
            lse, logit, offset = wide.forward(
                input, linear_weight, linear_bias, target, with_offset, config
            )
        return lse, logit, cut_columns(offset, width)
    vector = {"dtype": torch.float32, "device": input.device}
    lse, logit = torch.empty(2, n, **vector), torch.empty(n, **vector)
    offset = torch.empty(n if with_offset else 0, d, **vector)
    if n == 0:
        return lse, logit, cut_columns(offset, width)
    slots = max(slots_of(input.device), triton.cdiv(n, config["BLOCK_N"]))
    places = slots * config["BLOCK_N"]
    shift, sums = torch.empty(places, **vector), torch.empty(places, 2, **vector)
    means = torch.empty(places if with_offset else 0, d, **vector)
    strides = (*input.stride(), *linear_weight.stride())
    strides += (0 if linear_bias is None else linear_bias.stride(0),)
    with torch.cuda.device_of(input):
        order, count = forward_plan(target, v)
        _fwd_kernel[(slots,)](
            input, linear_weight, linear_bias, order, count, shift, sums, means,
            v, d, slots, *strides, WITH_MEAN=with_offset, **config, **FUSED,
        )  # fmt: skip
        block_r = _combine_rows(config["BLOCK_D"])
        _combine_kernel[(triton.cdiv(n, block_r),)](
            input, linear_weight, linear_bias, target, order, count, shift, sums, means,
            lse, logit, offset, n, v, d, slots, *strides, BLOCK_R=block_r,
            **{k: config[k] for k in ("BLOCK_N", "BLOCK_V", "BLOCK_D", "PRECISION")},
            WITH_MEAN=with_offset, **FUSED,
        )  # fmt: skip
    return lse, logit, cut_columns(offset, width)


def linear_cross_entropy_bwd(
    input, linear_weight, linear_bias, target, lse, grad_lse, grad_target_logit
):
    dtype, bias_dtype = linear_weight.dtype, (lse if linear_bias is None else linear_bias).dtype
    width = input.shape[1]
    input, linear_weight = pad_columns(input, linear_weight)
    table = _table(input, linear_weight)
    config = _options(input, table)["bwd"]
    (n, d), v = input.shape, linear_weight.shape[0]
    vectors = torch.stack([lse[0], grad_lse * torch.exp(-lse[1]), grad_target_logit])
    scale = torch.ones((), dtype=torch.float32, device=input.device)
    if input.dtype == torch.float16 and n > 0:
        # A power of two that brings the gradients of the rows to at most 1 (and back in the end).
        exponent = torch.frexp(vectors[1:].abs().amax()).exponent
        scale = torch.ldexp(scale, exponent)
        vectors[1:] /= scale
        vectors[2] *= math.exp(config["HEADROOM"])
        scale = scale * math.exp(-config["HEADROOM"])
    if "BLOCK_N" not in config:
        with torch.cuda.device_of(input):
            grad_weight, grad_bias = wide.backward(
                input, linear_weight, linear_bias, target, vectors, scale, config
            )
        return cut_columns(grad_weight, width), grad_bias
    tiles = triton.cdiv(v, config["BLOCK_V"])
    # Few items are too few programs: rows in ranges as well, whose sums are added in order.
    ranges, _ = ranges_of(input.device, tiles, triton.cdiv(n, config["BLOCK_N"]))
    partial = lse.dtype if ranges > 1 else None
    grad_weight = lse.new_empty(ranges, v, d, dtype=partial or dtype)
    biases = 0 if linear_bias is None else v
    grad_bias = lse.new_empty(ranges, biases, dtype=partial or bias_dtype)
    with torch.cuda.device_of(input):
        by_item, offsets, count, rows, vectors = backward_plan(
            target, input, vectors, v, config["BLOCK_V"]
        )
        _bwd_kernel[(ranges * tiles,)](
            rows, table, linear_bias, by_item, *vectors, offsets, count, scale,
            grad_weight, grad_bias, v, d, ranges, *table.stride(),
            0 if linear_bias is None else linear_bias.stride(0), **config, **FUSED,
        )  # fmt: skip
    grad_weight = cut_columns(sum_ranges(grad_weight), width).to(dtype)
    return grad_weight, sum_ranges(grad_bias).to(bias_dtype)
