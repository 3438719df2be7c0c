# SPDX-License-Identifier: Apache-2.0
"""Tiles and launchers of the Triton kernels of `in_batch_cross_entropy`, which are in
`in_batch_cross_entropy_sweeps`.

Legend: B queries, C candidates, D width.
"""

import math

import torch
import triton

from fastrec.kernels.common.in_batch_cross_entropy_sweeps import (
    _bwd_kernel,
    _combine_kernel,
    _fwd_kernel,
)
from fastrec.kernels.common.in_batch_pairs import by_column, lists_of
from fastrec.kernels.common.rows import cut_columns, pad_columns
from fastrec.kernels.common.tiles import (
    FUSED,
    capability_of,
    float32_products,
    ranges_of,
    sum_ranges,
    that_fit,
)
from fastrec.ops.common.in_batch_pairs import transposed_lists

# (BLOCK_B, BLOCK_C, num_warps, num_stages) of the forward and of the backward kernel by BLOCK_D,
# found by compiling: no spills on sm_80, sm_90 and sm_100 with Triton 3.9 and any exclusions.
TILES = {
    "half": {
        64: ((64, 64, 4, 3), (32, 128, 8, 3)),
        128: ((64, 64, 8, 3), (64, 64, 8, 3)),
        256: ((64, 64, 8, 3), (64, 64, 8, 2)),
    },
    "split": {  # float32 as sums of two bfloat16
        64: ((64, 64, 4, 2), (64, 64, 4, 2)),
        128: ((128, 32, 8, 2), (32, 128, 8, 2)),
    },
    "float32": {
        64: ((32, 32, 8, 2), (16, 32, 4, 2)),
        128: ((32, 32, 4, 2), (32, 32, 8, 2)),
        256: ((16, 32, 4, 2), (16, 32, 8, 2)),
    },
}


def config_of(width: int, dtype: torch.dtype, precision: str, capability: int = 90) -> dict:
    """Tile shapes and launch options of both kernels, for `capability` 10 * major + minor.
    `precision`: of the products of float32, "ieee" where they are not split: above 128 columns, and
    below sm_90, where operands are registers and every warp would split all of a tile."""
    kind = "half"
    if dtype == torch.float32:
        # sm_100: 128 columns need more tensor memory than there is (Triton 3.6).
        widest = 0 if capability < 90 else 128 if capability < 100 else 64
        kind = "split" if precision == "bf16x3" and width <= widest else "float32"
        precision = "ieee" if precision == "bf16x3" and kind == "float32" else precision
    if width > 256:  # in chunks of 64 columns, with the products of all chunks recomputed for each
        block_d, block_b = 64, 16 if dtype == torch.float32 else 32
        tiles = ((32, 32, 4, 1), (block_b, 32, 8, 1))
    else:
        block_d = max(triton.next_power_of_2(width), 16)
        tiles = TILES[kind][max(block_d, 64)]
    config = {}
    for name, (block_b, block_c, warps, stages) in zip(("fwd", "bwd"), tiles, strict=True):
        if (block_b, block_c) == (32, 128) and capability >= 100:
            block_b = 64  # 32 spill 8 bytes there, 64 spill on sm_80
        if name == "bwd" and kind == "float32" and block_d == 128 and capability >= 100:
            block_b, warps = 16, 4  # 32 and 8 warps spill 16 bytes there
        if (block_b, block_c, warps) == (64, 64, 4) and capability >= 100:  # spill 16 bytes there
            block_b, block_c, warps = (128, 64, 8) if name == "fwd" else (64, 128, 8)
        block_b, stages = that_fit(block_b, stages, block_d, capability)
        config[name] = {
            "BLOCK_B": block_b,
            "BLOCK_C": block_c,
            "BLOCK_D": block_d,
            "CHUNKS": triton.cdiv(width, block_d),
            "num_warps": warps,
            "num_stages": stages,
            # float16 has 5 bits of exponent: p is kept near e^HEADROOM instead of near 1.
            "HEADROOM": {"fwd": 4.5, "bwd": 10.0}[name] if dtype == torch.float16 else 0.0,
            "PRECISION": precision if dtype == torch.float32 else "tf32",
        }
    # Without tensor cores a second loop for sums that outgrow their shift spills.
    config["fwd"]["RUNNING"] = dtype == torch.float16 or kind == "float32"
    return config


def options_of(query: torch.Tensor, precision: str) -> dict[str, dict]:
    if query.dtype == torch.float64:
        raise RuntimeError("in_batch ops have no float64 triton kernel, query is float64")
    return config_of(query.shape[1], query.dtype, precision, capability_of(query.device))


def _combine_rows(block_d: int) -> int:
    return 4 if block_d == 64 else 8  # 8 rows of 64 columns spill 8 bytes on sm_90


def in_batch_cross_entropy_fwd(
    query, candidate, bias, positive, query_group, candidate_group, exclude_values,
    exclude_offsets, with_direction,
):  # fmt: skip
    width = query.shape[1]
    query, candidate = pad_columns(query, candidate)
    config = options_of(query, float32_products(query.device))["fwd"]
    query, candidate, positive = query.contiguous(), candidate.contiguous(), positive.contiguous()
    bias = None if bias is None else bias.contiguous()
    (n, d), v = query.shape, candidate.shape[0]
    vector = {"dtype": torch.float32, "device": query.device}
    loss, lse = torch.empty(n, **vector), torch.empty(2, n, **vector)
    direction = torch.empty(n if with_direction else 0, d, **vector)
    if n == 0:
        return loss, lse, cut_columns(direction, width)
    blocks = triton.cdiv(n, config["BLOCK_B"])
    ranges, per_range = ranges_of(query.device, blocks, triton.cdiv(v, config["BLOCK_C"]))
    places = ranges * blocks * config["BLOCK_B"]
    shift, sums = torch.empty(places, **vector), torch.empty(places, 2, **vector)
    means = torch.empty(places if with_direction else 0, d, **vector)
    with torch.cuda.device_of(query):
        _fwd_kernel[(ranges * blocks, config["CHUNKS"] if with_direction else 1)](
            query, candidate, bias, positive, by_column(query_group), by_column(candidate_group),
            *lists_of(exclude_values, exclude_offsets), shift, sums, means, n, v, d, per_range,
            COLUMNS=0 if query_group is None else query_group.shape[1],
            WITH_MEAN=with_direction, **config, **FUSED,
        )  # fmt: skip
        block_r = _combine_rows(config["BLOCK_D"])
        _combine_kernel[(triton.cdiv(n, block_r),)](
            query, candidate, bias, positive, shift, sums, means, loss, lse, direction,
            n, d, ranges, BLOCK_R=block_r,
            **{key: config[key] for key in ("BLOCK_B", "BLOCK_D", "CHUNKS")},
            WITH_MEAN=with_direction, **FUSED,
        )  # fmt: skip
    return loss, lse, cut_columns(direction, width)


def in_batch_cross_entropy_bwd(
    query, candidate, bias, positive, query_group, candidate_group, exclude_values,
    exclude_offsets, loss, lse, grad_loss,
):  # fmt: skip
    width = query.shape[1]
    query, candidate = pad_columns(query, candidate)
    config = options_of(query, float32_products(query.device))["bwd"]
    query, candidate, positive = query.contiguous(), candidate.contiguous(), positive.contiguous()
    (n, d), v = query.shape, candidate.shape[0]
    # -g (1 - p of the positive); its own vector, because p - 1 would cancel.
    vectors = torch.stack([grad_loss * torch.exp(-lse[1]), torch.expm1(-loss) * grad_loss])
    vectors = vectors.masked_fill(positive < 0, 0)
    # Theirs is 0, and exp(s - 0) may overflow: inf times their gradient 0.
    lse = lse[0].masked_fill(positive < 0, math.inf)
    scale = torch.ones((), dtype=torch.float32, device=query.device)
    if query.dtype == torch.float16 and n > 0:
        # A power of two that brings the gradients of the rows to at most 1 (and back in the end).
        scale = torch.ldexp(scale, torch.frexp(vectors.abs().amax()).exponent)
        vectors /= scale
        vectors[1] *= math.exp(config["HEADROOM"])
        scale = scale * math.exp(-config["HEADROOM"])
    blocks = triton.cdiv(v, config["BLOCK_C"])
    ranges, per_range = ranges_of(query.device, blocks, triton.cdiv(n, config["BLOCK_B"]))
    grad_candidate = loss.new_empty(ranges, v, d)
    grad_bias = loss.new_empty(ranges, 0 if bias is None else v)
    lists: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
    if exclude_values is not None:
        lists = transposed_lists((exclude_values, exclude_offsets), v)
    with torch.cuda.device_of(query):
        _bwd_kernel[(ranges * blocks, config["CHUNKS"])](
            query, candidate, None if bias is None else bias.contiguous(), positive,
            by_column(query_group), by_column(candidate_group), *lists, lse, *vectors, scale,
            grad_candidate, grad_bias, n, v, d, per_range,
            COLUMNS=0 if query_group is None else query_group.shape[1], **config, **FUSED,
        )  # fmt: skip
    return cut_columns(sum_ranges(grad_candidate), width), sum_ranges(grad_bias)
