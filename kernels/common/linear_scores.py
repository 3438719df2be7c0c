# SPDX-License-Identifier: Apache-2.0
"""Scores of rows against all items, one tile at a time, for the Triton kernels of `linear_rank` and
`linear_topk`.

Legend: N rows, V items, D width.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.common.tiles import (
    allow_tf32,
    capability_of,
    dot_t,
    load_rows,
    product_in_chunks,
)


@triton.jit
def load_x(x, row, live, d, stride_xn, stride_xd, TYPE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of a program in TYPE, the type of the table, which holds them exactly. Only the
    first chunk of columns, which nobody reads where there are several."""
    return load_rows(x, row, live, stride_xn, stride_xd, 0, d, BLOCK_D).to(TYPE)


@triton.jit
def score_tile(
    x_tile, x, w, bias, row, live, item, real, d,
    stride_xn, stride_xd, stride_wv, stride_wd, stride_b,
    BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[len(row), len(item)] scores, x_tile from `load_x`. Always the same products of the same
    shapes: equal rows of w give equal bits, wherever they stand."""
    if CHUNKS == 1:
        w_tile = load_rows(w, item, real, stride_wv, stride_wd, 0, d, BLOCK_D)
        s = dot_t(x_tile, w_tile, None, PRECISION)
    else:
        s = product_in_chunks(
            x, row, live, stride_xn, stride_xd, w, item, real, stride_wv, stride_wd, d,
            w.dtype.element_ty, False, BLOCK_D, CHUNKS, PRECISION,
        )  # fmt: skip
    if bias is not None:
        b = tl.load(bias + item.to(tl.int64) * stride_b, mask=real, other=0.0)
        s += b.to(tl.float32)[None, :]
    return s


# (BLOCK_N, BLOCK_V, num_warps, num_stages) of a 16-bit table by BLOCK_D, the largest found that
# spill on none of sm_80, sm_90, sm_100 with Triton 3.9. BLOCK_V >= BLOCK_N: the scores of the
# targets of a program are one tile.
# With 4 warps each has whole rows, and a reduction over the items of a tile no barrier.
TILES = {64: (64, 128, 4, 3), 128: (64, 128, 8, 3), 256: (64, 64, 4, 2)}
# A float32 table is multiplied in float32, without tensor cores: rounding it to the 16 bits of the
# rows would reorder items, and three products of tf32 need too many registers. In chunks of 32
# columns, because the compiler takes a product of float32 apart into its single terms.
FLOAT32, FLOAT32_WIDTH = (32, 32, 4, 2), 32
CHUNKED, CHUNK_WIDTH = (64, 64, 4, 2), 64  # of a 16-bit table wider than 256


def config_of(width: int, table: torch.dtype, capability: int = 90) -> dict:
    """Tile shapes and launch options, for `capability` 10 * major + minor."""
    block_d = max(triton.next_power_of_2(width), 16)
    if table == torch.float32:
        block_d, tile = min(block_d, FLOAT32_WIDTH), FLOAT32
    elif width > 256:
        block_d, tile = CHUNK_WIDTH, CHUNKED
    else:
        tile = TILES[max(block_d, 64)]
        if capability >= 100 and block_d <= 64:
            tile = (64, 128, 8, 3)  # 4 warps spill 152 bytes there
        elif capability < 90 and block_d == 128:
            tile = (64, 64, 8, 3)  # 128 items spill 40 bytes there
        elif capability < 90 and block_d == 256:
            tile = (64, 64, 8, 2)  # 4 warps spill 120 bytes there, 8 spill 16 bytes on sm_100
    block_n, block_v, warps, stages = tile
    return {
        "BLOCK_N": block_n,
        "BLOCK_V": block_v,
        "BLOCK_D": block_d,
        "CHUNKS": triton.cdiv(width, block_d),
        "PRECISION": "ieee" if table == torch.float32 else "tf32",
        "num_warps": warps,
        "num_stages": stages,
    }


def options_of(op: str, input: torch.Tensor, linear_weight: torch.Tensor) -> dict:
    if input.dtype == torch.float64:
        raise RuntimeError(f"{op} has no float64 triton kernel, input is float64")
    config = config_of(input.shape[1], linear_weight.dtype, capability_of(input.device))
    allow_tf32(config)
    return config
