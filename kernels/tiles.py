"""What the kernels do to a tile: load it, multiply it, round it, take its exponential. And what
their launch options depend on beside the shapes."""

import torch
import triton
import triton.language as tl

from fastrec.backend import interpreting

LOG2E = tl.constexpr(1.4426950408889634)
SLACK = tl.constexpr(5.5)  # the running shift of a row follows its maximum in steps above e^5.5
# The interpreter (Triton 3.6 to 3.9) truncates to bfloat16 and multiplies the bits of bfloat16.
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def round_to(value, DTYPE: tl.constexpr):
    """To the nearest number of DTYPE, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE and value.dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def exp_shifted(s, shift, PRECISION: tl.constexpr):
    """exp(s - shift). One FMA a logit; for float32 inputs two operations that round less."""
    if PRECISION == "ieee":
        return tl.exp2((s - shift) * LOG2E)
    return tl.exp2(tl.fma(s, LOG2E, -shift * LOG2E))


@triton.jit
def load_rows(base, row, keep, stride_row, stride_col, first, d, BLOCK_D: tl.constexpr):
    """[len(row), BLOCK_D] tile of a [?, d] matrix, columns from `first`; 0 where not kept."""
    col = first + tl.arange(0, BLOCK_D)
    offset = row.to(tl.int64)[:, None] * stride_row + col.to(tl.int64)[None, :] * stride_col
    return tl.load(base + offset, mask=keep[:, None] & (col < d)[None, :], other=0.0)


def capability_of(device: torch.device) -> int:
    """10 * major + minor; without a GPU (interpreter, meta tensors) that of the target device."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def allow_tf32(*configs: dict) -> None:
    """Products of float32 lose digits only where torch's own may."""
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        for config in configs:
            config["PRECISION"] = "tf32"
