# SPDX-License-Identifier: Apache-2.0
"""Tiles and launchers of the Triton kernels of `linear_cross_entropy`, which are in
`linear_cross_entropy_sweeps`, and for widths above 256 in `linear_cross_entropy_wide`.

Legend: N rows, V items, D width.
"""

import math

import torch
import triton

from fastrec.kernels.common import linear_cross_entropy_wide as wide
from fastrec.kernels.common.linear_cross_entropy_sweeps import (
    _bwd_kernel,
    _combine_kernel,
    _fwd_kernel,
)
from fastrec.kernels.common.tiles import allow_tf32, capability_of, ranges_of, slots_of, sum_ranges

# (BLOCK_N, BLOCK_V, num_warps, num_stages) of the forward and of the backward kernel by BLOCK_D,
# the largest found that spill on none of sm_80, sm_90, sm_100. Registers on sm_90, of 255:
#   bf16: forward 252, 174, 255, backward 174, 222, 191 (D = 64, 128, 256)
#   fp32: forward 104, 128, 102, backward 92, 80, 120 (no tensor cores: operands are registers)
TILES = {
    "half": {
        64: ((64, 128, 4, 3), (64, 128, 8, 3)),
        128: ((128, 64, 8, 3), (64, 128, 8, 3)),
        256: ((128, 64, 8, 3), (64, 64, 8, 3)),
    },
    "mixed": {  # a float32 table: a tile takes twice the shared memory until it is converted
        64: ((64, 64, 4, 2), (64, 128, 8, 3)),
        128: ((128, 64, 8, 2), (64, 128, 8, 3)),
        256: ((64, 32, 8, 2), (64, 64, 8, 3)),
    },
    "float32": {
        64: ((32, 32, 4, 2), (32, 32, 4, 2)),
        128: ((32, 32, 4, 2), (32, 32, 8, 2)),
        256: ((16, 32, 4, 2), (16, 32, 8, 2)),
    },
}


WIDEST = max(TILES["half"])


def _config(width: int, dtype: torch.dtype, table: torch.dtype, capability: int = 90) -> dict:
    """Tile shapes and launch options of both kernels, for `capability` 10 * major + minor."""
    precision = {"PRECISION": "ieee" if dtype == torch.float32 else "tf32"}
    # float16 has 5 bits of exponent: p is kept near e^HEADROOM instead of near 1.
    fwd, bwd = (4.5, 10.0) if dtype == torch.float16 else (0.0, 0.0)
    config = {"fwd": {"HEADROOM": fwd, **precision}, "bwd": {"HEADROOM": bwd, **precision}}
    if width > WIDEST:
        return config
    block_d = max(triton.next_power_of_2(width), 16)
    kind = "float32" if dtype == torch.float32 else "half" if dtype == table else "mixed"
    tiles = TILES[kind][max(block_d, 64)]
    for name, (block_n, block_v, warps, stages) in zip(("fwd", "bwd"), tiles, strict=True):
        if block_n == 128 and block_d == 256 and capability >= 100:
            block_n = 64  # 128 rows spill 120 bytes there
        config[name] |= {
            "BLOCK_N": block_n,
            "BLOCK_V": block_v,
            "BLOCK_D": block_d,
            "num_warps": warps,
            "num_stages": stages,
        }
    return config


def _combine_rows(block_d: int) -> int:
    return min(8, 1024 // block_d)


def _options(input: torch.Tensor, linear_weight: torch.Tensor) -> dict[str, dict]:
    for name, tensor in (("input", input), ("linear_weight", linear_weight)):
        if tensor.dtype == torch.float64:
            raise RuntimeError(
                f"linear_cross_entropy has no float64 triton kernel, {name} is float64"
            )
    capability = capability_of(input.device)
    config = _config(input.shape[1], input.dtype, linear_weight.dtype, capability)
    allow_tf32(*config.values())
    return config


def _plan(target: torch.Tensor, items: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows by target with the unscored ones last: (sorted target, order, number of scored rows)."""
    by_item, order = torch.where(target < 0, items, target).sort(stable=True)
    return by_item, order, (target >= 0).sum()


def linear_cross_entropy_fwd(input, linear_weight, linear_bias, target, with_offset):
    config = _options(input, linear_weight)["fwd"]
    (n, d), v = input.shape, linear_weight.shape[0]
    if d > WIDEST and n > 0:
        with torch.cuda.device_of(input):
            return wide.forward(input, linear_weight, linear_bias, target, with_offset, config)
    vector = {"dtype": torch.float32, "device": input.device}
    lse, logit = torch.empty(2, n, **vector), torch.empty(n, **vector)
    offset = torch.empty(n if with_offset else 0, d, **vector)
    if n == 0:
        return lse, logit, offset
    _, order, count = _plan(target, v)
    slots = max(slots_of(input.device), triton.cdiv(n, config["BLOCK_N"]))
    places = slots * config["BLOCK_N"]
    shift, sums = torch.empty(places, **vector), torch.empty(places, 2, **vector)
    means = torch.empty(places if with_offset else 0, d, **vector)
    strides = (*input.stride(), *linear_weight.stride())
    strides += (0 if linear_bias is None else linear_bias.stride(0),)
    with torch.cuda.device_of(input):
        _fwd_kernel[(slots,)](
            input, linear_weight, linear_bias, order, count, shift, sums, means,
            v, d, slots, *strides, WITH_MEAN=with_offset, **config,
        )  # fmt: skip
        block_r = _combine_rows(config["BLOCK_D"])
        _combine_kernel[(triton.cdiv(n, block_r),)](
            input, linear_weight, linear_bias, target, order, count, shift, sums, means,
            lse, logit, offset, n, v, d, slots, *strides, BLOCK_R=block_r,
            **{k: config[k] for k in ("BLOCK_N", "BLOCK_V", "BLOCK_D")},
            WITH_MEAN=with_offset,
        )  # fmt: skip
    return lse, logit, offset


def linear_cross_entropy_bwd(
    input, linear_weight, linear_bias, target, lse, grad_lse, grad_target_logit
):
    config = _options(input, linear_weight)["bwd"]
    (n, d), v = input.shape, linear_weight.shape[0]
    vectors = torch.stack([lse[0], grad_lse * torch.exp(-lse[1]), grad_target_logit])
    scale = torch.ones((), device=input.device)
    if input.dtype == torch.float16 and n > 0:
        # A power of two that brings the gradients of the rows to at most 1 (and back in the end).
        exponent = torch.frexp(vectors[1:].abs().amax()).exponent
        scale = torch.ldexp(scale, exponent)
        vectors[1:] /= scale
        vectors[2] *= math.exp(config["HEADROOM"])
        scale = scale * math.exp(-config["HEADROOM"])
    if d > WIDEST:
        with torch.cuda.device_of(input):
            return wide.backward(input, linear_weight, linear_bias, target, vectors, scale, config)
    by_item, order, count = _plan(target, v)
    tiles = triton.cdiv(v, config["BLOCK_V"])
    bounds = torch.arange(tiles + 1, device=input.device) * config["BLOCK_V"]
    offsets = torch.searchsorted(by_item, bounds.clamp_max(v))
    # Few items are too few programs: rows in ranges as well, whose sums are added in order.
    ranges, _ = ranges_of(input.device, tiles, triton.cdiv(n, config["BLOCK_N"]))
    dtype, bias_dtype = linear_weight.dtype, (lse if linear_bias is None else linear_bias).dtype
    partial = lse.dtype if ranges > 1 else None
    grad_weight = lse.new_empty(ranges, v, d, dtype=partial or dtype)
    biases = 0 if linear_bias is None else v
    grad_bias = lse.new_empty(ranges, biases, dtype=partial or bias_dtype)
    with torch.cuda.device_of(input):
        _bwd_kernel[(ranges * tiles,)](
            input.index_select(0, order), linear_weight, linear_bias, by_item,
            *vectors.index_select(1, order), offsets, count, scale, grad_weight, grad_bias,
            v, d, ranges, *linear_weight.stride(),
            0 if linear_bias is None else linear_bias.stride(0), **config,
        )  # fmt: skip
    return sum_ranges(grad_weight).to(dtype), sum_ranges(grad_bias).to(bias_dtype)
