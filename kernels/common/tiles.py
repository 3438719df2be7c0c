# SPDX-License-Identifier: Apache-2.0
"""What the kernels do to a tile: load it, multiply it, round it, take its exponential. And what
their launch options depend on beside the shapes."""

import torch
import triton
import triton.language as tl

from fastrec.backend import interpreting

LOG2E = tl.constexpr(1.4426950408889634)
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
SLACK = tl.constexpr(5.5)  # the running shift of a row follows its maximum in steps above e^5.5
MOST = tl.constexpr(2.0**64)  # of a sum relative to the first tile: e^44 above its maximum
REST = tl.constexpr(32)  # programs for what belongs to no sequence, mostly nothing
# Of every launch: a product and a sum are one instruction. Up to 3.9 this is Triton's own default,
# whose end 3.9 announces (triton-lang/triton#11270).
FUSED = {"enable_fp_fusion": True}
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
def split(x):
    """float32 as a sum of two bfloat16: (high, low), |x - high - low| <= 2^-17 |x|."""
    bits = x.to(tl.int32, bitcast=True)
    high = ((bits + 0x8000) & -65536).to(tl.float32, bitcast=True)  # a half goes away from 0
    return round_to(high, tl.bfloat16), round_to(x - high, tl.bfloat16)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. "bf16x3": float32 as sums of two bfloat16, without the product of the low
    ones: each product is exact to 2^-15."""
    if PRECISION == "bf16x3" and a.dtype == tl.float32:
        a_high, a_low = split(a)
        b_high, b_low = split(b)
        acc = _dot(a_low, b_high, acc, "tf32")
        acc = _dot(a_high, b_low, acc, "tf32")
        return _dot(a_high, b_high, acc, "tf32")
    else:
        return _dot(a, b, acc, PRECISION)


@triton.jit
def dot_t(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b^T. b is split before it is turned: a later product with b finds the parts."""
    if PRECISION == "bf16x3" and a.dtype == tl.float32:
        a_high, a_low = split(a)
        b_high, b_low = split(b)
        acc = _dot(a_low, tl.trans(b_high), acc, "tf32")
        acc = _dot(a_high, tl.trans(b_low), acc, "tf32")
        return _dot(a_high, tl.trans(b_high), acc, "tf32")
    else:
        return _dot(a, tl.trans(b), acc, PRECISION)


@triton.jit
def exp_shifted(s, shift, PRECISION: tl.constexpr):
    """exp(s - shift). One FMA a logit; for float32 inputs two operations that round less."""
    if PRECISION == "ieee":
        return tl.exp2((s - shift) * LOG2E)
    return tl.exp2(tl.fma(s, LOG2E, -shift * LOG2E))


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, also where 1 + x rounds."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def softplus_and_sigmoid(z):
    """Both of z. log(1 + e) = e times a polynomial: a logarithm of 1 + e loses the digits of e."""
    e = tl.exp2(-tl.abs(z) * LOG2E)
    y = tl.fma(e, 0.0019866965937, -0.013187826566)
    y = tl.fma(y, e, 0.041006573694)
    y = tl.fma(y, e, -0.081880409236)
    y = tl.fma(y, e, 0.12377995868)
    y = tl.fma(y, e, -0.16087623009)
    y = tl.fma(y, e, 0.19885820285)
    y = tl.fma(y, e, -0.24986496459)
    y = tl.fma(y, e, 0.33332497544)
    y = tl.fma(y, e, -0.49999979491)
    y = tl.fma(y, e, 0.99999999916)
    loss = tl.where(z > 0, z, 0.0) + e * y
    loss = tl.where(z == z, loss, z)
    return loss, tl.where(z > 0, 1.0, e) / (1.0 + e)


@triton.jit
def split_lse(shift, log_sum, least):
    """lse = shift + log_sum, and what its rounding left out: at large scores that is far more than
    an eps of exp(s - lse). Both together are at least `least`."""
    lse = shift + log_sum
    part = lse - shift
    rest = (shift - (lse - part)) + (log_sum - part)
    rest = tl.where(rest == rest, rest, 0.0)  # of an infinite lse
    low = lse < least
    return tl.where(low, least, lse), tl.where(low, 0.0, tl.maximum(rest, least - lse))


@triton.jit
def load_rows(base, row, keep, stride_row, stride_col, first, d, BLOCK_D: tl.constexpr):
    """[len(row), BLOCK_D] tile of a [?, d] matrix, columns from `first`; 0 where not kept."""
    col = first + tl.arange(0, BLOCK_D)
    offset = row.to(tl.int64)[:, None] * stride_row + col.to(tl.int64)[None, :] * stride_col
    return tl.load(base + offset, mask=keep[:, None] & (col < d)[None, :], other=0.0)


@triton.jit
def zero_rest(out, offsets, events, columns, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros in the rows of a contiguous [events, columns] that belong to no sequence, those behind
    the last offset: the last REST programs of the first axis share them."""
    sequences = tl.num_programs(0) - REST
    used = tl.load(offsets + sequences)
    part = (tl.program_id(0) - sequences).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    parts = tl.num_programs(1).to(tl.int64) * REST
    for start in range(used + part * BLOCK, events, parts * BLOCK):
        row = start + tl.arange(0, BLOCK)
        for first in range(0, columns, BLOCK_D):
            col = first + tl.arange(0, BLOCK_D)
            keep = (row < events)[:, None] & (col < columns)[None, :]
            value = tl.zeros([BLOCK, BLOCK_D], out.dtype.element_ty)
            tl.store(out + row[:, None] * columns + col[None, :], value, mask=keep)


@triton.jit
def product_in_chunks(
    x, row, live, stride_xn, stride_xd, w, item, real, stride_wv, stride_wd, d,
    TYPE: tl.constexpr, BY_ITEM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[len(row), len(item)] products of rows of x and rows of w in TYPE, BLOCK_D columns at a time;
    [len(item), len(row)] if BY_ITEM. The order of the loads is the same: it decides registers."""
    if BY_ITEM:
        s = tl.zeros([item.shape[0], row.shape[0]], tl.float32)
    else:
        s = tl.zeros([row.shape[0], item.shape[0]], tl.float32)
    for chunk in range(CHUNKS):
        first = chunk * BLOCK_D
        x_part = load_rows(x, row, live, stride_xn, stride_xd, first, d, BLOCK_D)
        w_part = load_rows(w, item, real, stride_wv, stride_wd, first, d, BLOCK_D)
        x_part, w_part = round_to(x_part, TYPE), round_to(w_part, TYPE)
        s = dot_t(w_part, x_part, s, PRECISION) if BY_ITEM else dot_t(x_part, w_part, s, PRECISION)
    return s


@triton.jit
def outgrown(total):
    """Whether a row's sum, relative to the maximum of its first tile, has left the numbers that
    can be trusted: then the tiles are read again with a running shift."""
    return tl.max((total > MOST).to(tl.int32), 0) > 0


@triton.jit
def softmax_step(
    s, values, first, shift, total, rounded, mean,
    RUNNING: tl.constexpr, WITH_MEAN: tl.constexpr, HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the scores s [R, C] of `values` [C, D] to the sums of p = exp(s - shift): total [R], and
    of p rounded as the product takes it rounded [R, 8] and mean [R, D].

    The shift is the maximum of the tile where `first` is true. If RUNNING, p stays below
    e^(SLACK + HEADROOM): where a maximum outgrows that, shift and sums change. The branch is one
    for all rows, so all warps wait for each other."""
    if RUNNING:
        peak = tl.max(s, 1)
        grown = peak > shift + (SLACK + HEADROOM)
        if tl.max(grown.to(tl.int32), 0) > 0:
            new = tl.where(grown, peak - HEADROOM, shift)
            fade = tl.exp2((shift - new) * LOG2E)
            total *= fade
            if WITH_MEAN:
                rounded *= fade[:, None]
                mean *= fade[:, None]
            shift = new
    elif first:
        shift = tl.maximum(tl.max(s, 1), -1e30)
    p = exp_shifted(s, shift[:, None], PRECISION)
    total += tl.sum(p, 1)
    if WITH_MEAN:
        q = round_to(p, values.dtype)
        if values.dtype != tl.float32:  # by the tensor cores: taken apart, q costs 3 operations
            rounded = dot(q, tl.full([s.shape[1], 8], 1.0, q.dtype), rounded, PRECISION)
        mean = dot(q, values, mean, PRECISION)
    return shift, total, rounded, mean


@triton.jit
def store_sums(
    shift_out, sum_out, mean_out, at, own, shift, total, rounded, mean, d,
    WITH_MEAN: tl.constexpr, TYPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums of one range at the places `at`, for `join_sums`; of mean the columns from `own`."""
    if own == 0:
        tl.store(shift_out + at, shift)
        tl.store(sum_out + 2 * at, total)
        if tl.float32 != TYPE:
            tl.store(sum_out + 2 * at + 1, tl.max(rounded, 1))  # eight times the same
        else:
            tl.store(sum_out + 2 * at + 1, total)
    if WITH_MEAN:
        col = own + tl.arange(0, BLOCK_D)
        tl.store(mean_out + at[:, None] * d + col[None, :], mean, mask=(col < d)[None, :])


@triton.jit
def join_sums(shift_in, sum_in, place, step, ranges, live, BLOCK_R: tl.constexpr):
    """(shift, total, rounded) of BLOCK_R rows from those of the ranges, which lie `step` apart from
    `place` on; added in order."""
    shift = tl.full([BLOCK_R], -1e30, tl.float32)
    for r in range(ranges):
        shift = tl.maximum(shift, tl.load(shift_in + place + r * step, mask=live, other=-1e30))
    total = tl.zeros([BLOCK_R], tl.float32)
    rounded = tl.zeros([BLOCK_R], tl.float32)
    for r in range(ranges):
        at = place + r * step
        scale = exp_shifted(tl.load(shift_in + at, mask=live, other=-1e30), shift, "ieee")
        total += scale * tl.load(sum_in + 2 * at, mask=live, other=1.0)
        rounded += scale * tl.load(sum_in + 2 * at + 1, mask=live, other=1.0)
    return shift, total, rounded


@triton.jit
def join_means(
    shift_in, mean_in, shift, place, step, ranges, live, first, d,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_D] weighted sums of the same rows, columns from `first`, `shift` joined."""
    mean = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for r in range(ranges):
        at = place + r * step
        scale = exp_shifted(tl.load(shift_in + at, mask=live, other=-1e30), shift, "ieee")
        mean += scale[:, None] * load_rows(mean_in, at, live, d, 1, first, d, BLOCK_D)
    return mean


def capability_of(device: torch.device) -> int:
    """10 * major + minor; without a GPU (interpreter, meta tensors) that of the target device. 12.x
    counts as 8.9, whose matrix instructions and shared memory it has, and not those of 10.x."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 89 if major == 12 else 10 * major + minor


def shared_memory(capability: int) -> int:
    """Bytes that one program may have."""
    return 1024 * {80: 163, 87: 163}.get(capability, 99 if capability < 90 else 227)


def that_fit(rows: int, stages: int, block_d: int, capability: int) -> tuple[int, int]:
    """(rows, stages) of a tile of 16 bits: fewer of 256 columns where they are too many."""
    if block_d > 128 and shared_memory(capability) < 128 * 1024:
        return min(rows, 64), min(stages, 2)
    return rows, stages


def slots_of(device: torch.device) -> int:
    """How many programs keep a device busy: about four a processor, because two fit at a time and
    two rounds even out the last one."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def ranges_of(device: torch.device, blocks: int, tiles: int) -> tuple[int, int]:
    """(ranges, tiles per range) of the streamed side, whose `tiles` each of `blocks` programs would
    visit alone: as many as make `slots_of` programs."""
    ranges = max(1, min(slots_of(device) // max(blocks, 1), tiles, 32))
    per_range = max(1, triton.cdiv(tiles, ranges))
    return max(1, triton.cdiv(tiles, per_range)), per_range


def sum_ranges(parts: torch.Tensor) -> torch.Tensor:
    """Sums over the first dimension, the ranges, in order; of one range a view."""
    return parts.sum(0) if len(parts) > 1 else parts[0]


def float32_products(device: torch.device) -> str:
    """How float32 is multiplied, by `torch.backends.cuda.matmul.fp32_precision`: "ieee" where that
    was asked for, else by tensor cores with errors up to 2^-15 of a product (tf32: 2^-10).

    On Blackwell "ieee" before Triton 3.9: earlier ones overlap products that are added to the same
    numbers, and the result is wrong (triton#10821, mended by triton#10988)."""
    if torch.backends.cuda.matmul.fp32_precision == "ieee":
        return "ieee"
    return "ieee" if capability_of(device) >= 100 and TRITON < (3, 9) else "bf16x3"


def allow_tf32(*configs: dict) -> None:
    """Products of float32 lose digits only where torch's own may."""
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        for config in configs:
            config["PRECISION"] = "tf32"
