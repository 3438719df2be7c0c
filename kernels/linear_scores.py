"""Scores of rows against all items, one tile at a time: what the Triton kernels of `linear_rank` and
`linear_topk` share.

Legend: N rows, V items, D width.
"""

import torch
import triton
import triton.language as tl

from fastrec.kernels.linear_cross_entropy import _dot, _load_rows


@triton.jit
def load_x(x, row, live, d, stride_xn, stride_xd, TYPE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of a program in TYPE, the type of the table, which holds them exactly. Only the
    first chunk of columns, which nobody reads where there are several."""
    return _load_rows(x, row, live, stride_xn, stride_xd, 0, d, BLOCK_D).to(TYPE)


@triton.jit
def score_tile(
    x_tile, x, w, bias, row, live, item, real, d,
    stride_xn, stride_xd, stride_wv, stride_wd, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_V] scores, x_tile from `load_x`. Always the same products of the same shapes:
    equal rows of w give equal bits, wherever they stand."""
    if CHUNKS == 1:
        w_tile = _load_rows(w, item, real, stride_wv, stride_wd, 0, d, BLOCK_D)
        s = _dot(x_tile, tl.trans(w_tile), None, PRECISION)
    else:
        s = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for c in range(CHUNKS):
            x_part = _load_rows(x, row, live, stride_xn, stride_xd, c * BLOCK_D, d, BLOCK_D)
            w_part = _load_rows(w, item, real, stride_wv, stride_wd, c * BLOCK_D, d, BLOCK_D)
            s = _dot(x_part.to(w.dtype.element_ty), tl.trans(w_part), s, PRECISION)
    if bias is not None:
        b = tl.load(bias + item.to(tl.int64) * stride_b, mask=real, other=0.0)
        s += b.to(tl.float32)[None, :]
    return s


# (BLOCK_N, BLOCK_V, num_warps, num_stages) by BLOCK_D, the largest found that spill on none of
# sm_80, sm_90, sm_100. BLOCK_V >= BLOCK_N: the scores of the targets of a program are one tile.
TILES = {
    "half": {64: (64, 128, 4, 3), 128: (64, 128, 4, 3), 256: (64, 128, 8, 2)},
    # A float32 table: the products are three of tf32 each, in which 16-bit rows are exact.
    "mixed": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)},
    "float32": {64: (32, 32, 4, 2), 128: (32, 32, 4, 2), 256: (16, 32, 4, 2)},
}


def config_of(width: int, dtype: torch.dtype, table: torch.dtype) -> dict:
    """Tile shapes and launch options."""
    kind = "float32" if dtype == torch.float32 else "half" if dtype == table else "mixed"
    if width > 256:  # in chunks of 64 columns
        block_d, (block_n, block_v, warps, stages) = 64, (32, 32, 4, 2)
    else:
        block_d = max(triton.next_power_of_2(width), 16)
        block_n, block_v, warps, stages = TILES[kind][max(block_d, 64)]
    return {
        "BLOCK_N": block_n,
        "BLOCK_V": block_v,
        "BLOCK_D": block_d,
        "CHUNKS": triton.cdiv(width, block_d),
        "PRECISION": {"float32": "ieee", "mixed": "tf32x3", "half": "tf32"}[kind],
        "num_warps": warps,
        "num_stages": stages,
    }


def options_of(op: str, input: torch.Tensor, linear_weight: torch.Tensor) -> dict:
    if input.dtype == torch.float64:
        raise RuntimeError(f"{op} has no float64 triton kernel, input is float64")
    config = config_of(input.shape[1], input.dtype, linear_weight.dtype)
    if linear_weight.dtype == torch.float32:
        if torch.backends.cuda.matmul.fp32_precision == "tf32":
            config["PRECISION"] = "tf32"
    return config


def strides_of(input, linear_weight, linear_bias) -> tuple[int, ...]:
    bias = 0 if linear_bias is None else linear_bias.stride(0)
    return (*input.stride(), *linear_weight.stride(), bias)


def lists_of(exclude_values, exclude_offsets):
    """The excluded items as the kernels read them; (None, None) for none."""
    if exclude_values is None:
        return None, None
    return exclude_values.contiguous(), exclude_offsets.contiguous()
