"""Triton kernels of `linear_cross_entropy`: the N x V logits exist one tile at a time.

Legend: N rows, V items, D width. Rows are visited in the order of `_plan`: the scored ones first,
sorted by target.

Forward: a program owns BLOCK_N rows and a range of items. It streams tiles of W and keeps
sum_j p_ij and sum_j p_ij W_j relative to a running row shift; `_combine_kernel` adds the ranges in
a fixed order. Backward: a program owns BLOCK_V items, streams all rows and writes its rows of dW
once. No atomics and no locks: equal inputs give equal bits.

The number of scored rows stays on the device, so the host never waits; programs without work exit.
"""

import math

import torch
import triton
import triton.language as tl

from fastrec.backend import interpreting

LOG2E = tl.constexpr(1.4426950408889634)
SLACK = tl.constexpr(5.5)  # the running shift of a row follows its maximum in steps above e^5.5
# The interpreter (Triton 3.6 to 3.9) truncates to bfloat16 and multiplies the bits of bfloat16.
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def _round(value, DTYPE: tl.constexpr):
    """To the nearest number of DTYPE, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE and value.dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _exp(s, shift, PRECISION: tl.constexpr):
    """exp(s - shift). One FMA a logit; for float32 inputs two operations that round less."""
    if PRECISION == "ieee":
        return tl.exp2((s - shift) * LOG2E)
    return tl.exp2(tl.fma(s, LOG2E, -shift * LOG2E))


@triton.jit
def _load_rows(base, row, keep, stride_row, stride_col, first, d, BLOCK_D: tl.constexpr):
    """[len(row), BLOCK_D] tile of a [?, d] matrix, columns from `first`; 0 where not kept."""
    col = first + tl.arange(0, BLOCK_D)
    offset = row.to(tl.int64)[:, None] * stride_row + col.to(tl.int64)[None, :] * stride_col
    return tl.load(base + offset, mask=keep[:, None] & (col < d)[None, :], other=0.0)


@triton.jit
def _schedule(count, v, slots, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """(row blocks, item ranges, tiles per range) that spread the scored rows over `slots`."""
    blocks = tl.cdiv(tl.load(count).to(tl.int32), BLOCK_N)
    tiles = tl.cdiv(v, BLOCK_V)
    ranges = tl.maximum(tl.minimum(slots // tl.maximum(blocks, 1), tl.minimum(tiles, 128)), 1)
    per_range = tl.cdiv(tiles, ranges)
    return blocks, tl.cdiv(tiles, per_range), per_range


@triton.jit(do_not_specialize=["v", "slots"])
def _fwd_kernel(
    x, w, bias, order, count, shift_out, sum_out, mean_out,
    v, d, slots, stride_xn, stride_xd, stride_wv, stride_wd, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    WITH_MEAN: tl.constexpr, HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read the same items, so that a W tile comes from HBM once.
    blocks, ranges, per_range = _schedule(count, v, slots, BLOCK_N, BLOCK_V)
    slot = tl.program_id(0)
    if slot >= blocks * ranges:
        return
    own = tl.program_id(1) * BLOCK_D  # columns of W whose mean this program accumulates
    at = (slot % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = at < tl.load(count)
    row = tl.load(order + at, mask=live, other=0)
    if CHUNKS == 1:
        x_tile = _load_rows(x, row, live, stride_xn, stride_xd, 0, d, BLOCK_D)

    # p = exp(s - shift) stays below e^(SLACK + HEADROOM).
    shift = tl.full([BLOCK_N], -1e30, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    rounded = tl.zeros([BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin = (slot // blocks) * per_range * BLOCK_V
    for first in range(begin, tl.minimum(begin + per_range * BLOCK_V, v), BLOCK_V):
        item = first + tl.arange(0, BLOCK_V)
        real = item < v
        w_tile = _load_rows(w, item, real, stride_wv, stride_wd, own, d, BLOCK_D)
        w_tile = _round(w_tile, x.dtype.element_ty)
        if CHUNKS == 1:
            s = _dot(x_tile, tl.trans(w_tile), None, PRECISION)
        else:
            s = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            for c in range(CHUNKS):
                x_part = _load_rows(x, row, live, stride_xn, stride_xd, c * BLOCK_D, d, BLOCK_D)
                w_part = _load_rows(w, item, real, stride_wv, stride_wd, c * BLOCK_D, d, BLOCK_D)
                w_part = _round(w_part, x.dtype.element_ty)
                s = _dot(x_part, tl.trans(w_part), s, PRECISION)
        if bias is not None:
            b = tl.load(bias + item.to(tl.int64) * stride_b, mask=real, other=float("-inf"))
            s += b.to(tl.float32)[None, :]
        elif first + BLOCK_V > v:
            s = tl.where(real[None, :], s, float("-inf"))
        peak = tl.max(s, 1)
        grown = peak > shift + (SLACK + HEADROOM)
        if tl.max(grown.to(tl.int32), 0) > 0:
            new = tl.where(grown, peak - HEADROOM, shift)
            fade = tl.exp2((shift - new) * LOG2E)
            total *= fade
            if WITH_MEAN:
                rounded *= fade
                mean *= fade[:, None]
            shift = new
        p = _exp(s, shift[:, None], PRECISION)
        total += tl.sum(p, 1)
        if WITH_MEAN:
            q = _round(p, x.dtype.element_ty)
            rounded += tl.sum(q.to(tl.float32), 1)
            mean = _dot(q, w_tile, mean, PRECISION)

    place = slot.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if own == 0:
        tl.store(shift_out + place, shift)
        tl.store(sum_out + 2 * place, total)
        tl.store(sum_out + 2 * place + 1, rounded)
    if WITH_MEAN:
        col = own + tl.arange(0, BLOCK_D)
        tl.store(mean_out + place[:, None] * d + col[None, :], mean, mask=(col < d)[None, :])


@triton.jit(do_not_specialize=["n", "v", "slots"])
def _combine_kernel(
    x, w, bias, target, order, count, shift_in, sum_in, mean_in, lse_out, logit_out, offset_out,
    n, v, d, slots, stride_xn, stride_xd, stride_wv, stride_wd, stride_b,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr, WITH_MEAN: tl.constexpr,
):  # fmt: skip
    """lse, target_logit and mean_offset of BLOCK_R rows; 0 for rows that are not scored."""
    blocks, ranges, _ = _schedule(count, v, slots, BLOCK_N, BLOCK_V)
    at = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.load(order + at, mask=at < n, other=0)
    live = at < tl.load(count)
    place = (at // BLOCK_N).to(tl.int64) * BLOCK_N + at % BLOCK_N
    step = blocks.to(tl.int64) * BLOCK_N

    shift = tl.full([BLOCK_R], -1e30, tl.float32)
    for r in range(ranges):
        shift = tl.maximum(shift, tl.load(shift_in + place + r * step, mask=live, other=-1e30))
    total = tl.zeros([BLOCK_R], tl.float32)
    rounded = tl.zeros([BLOCK_R], tl.float32)
    for r in range(ranges):
        here = place + r * step
        scale = _exp(tl.load(shift_in + here, mask=live, other=-1e30), shift, "ieee")
        total += scale * tl.load(sum_in + 2 * here, mask=live, other=1.0)
        rounded += scale * tl.load(sum_in + 2 * here + 1, mask=live, other=1.0)

    y = tl.load(target + row, mask=live, other=0)
    logit = tl.zeros([BLOCK_R], tl.float32)
    for c in range(CHUNKS):
        x_tile = _load_rows(x, row, live, stride_xn, stride_xd, c * BLOCK_D, d, BLOCK_D)
        w_tile = _load_rows(w, y, live, stride_wv, stride_wd, c * BLOCK_D, d, BLOCK_D)
        w_tile = _round(w_tile, x.dtype.element_ty)  # the value that the forward kernel multiplies
        logit += tl.sum(x_tile.to(tl.float32) * w_tile.to(tl.float32), 1)
        if WITH_MEAN:
            col = c * BLOCK_D + tl.arange(0, BLOCK_D)
            mean = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
            for r in range(ranges):
                here = place + r * step
                scale = _exp(tl.load(shift_in + here, mask=live, other=-1e30), shift, "ieee")
                part = _load_rows(mean_in, here, live, d, 1, c * BLOCK_D, d, BLOCK_D)
                mean += scale[:, None] * part
            offset = mean / rounded[:, None] - w_tile.to(tl.float32)
            offset = tl.where(live[:, None], offset, 0.0)
            keep = (at < n)[:, None] & (col < d)[None, :]
            tl.store(offset_out + row[:, None] * d + col[None, :], offset, mask=keep)
    if bias is not None:
        logit += tl.load(bias + y * stride_b, mask=live, other=0.0).to(tl.float32)

    lse = shift + tl.log(total)
    lse = tl.where(lse < logit, logit, lse)  # p_y <= 1 and loss >= 0 in spite of rounding
    tl.store(lse_out + row, tl.where(live, lse, 0.0), mask=at < n)
    tl.store(logit_out + row, tl.where(live, logit, 0.0), mask=at < n)


@triton.jit(do_not_specialize=["v"])
def _bwd_kernel(
    x, w, bias, target, lse, grad_lse, grad_logit, offsets, count, scale, grad_w, grad_bias,
    v, d, stride_wv, stride_wd, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW and db of BLOCK_V items. x and the [N] vectors are contiguous, in the order of `_plan`."""
    tile = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1) * BLOCK_D
    item = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    real = item < v
    if CHUNKS == 1:
        w_tile = _load_rows(w, item, real, stride_wv, stride_wd, 0, d, BLOCK_D)
        w_tile = _round(w_tile, x.dtype.element_ty)
    if bias is not None:
        b = tl.load(bias + item * stride_b, mask=real, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    acc_bias = tl.zeros([BLOCK_V], tl.float32)

    # Rows are sorted by target: those of this tile are neighbours.
    hit = tl.load(offsets + tile).to(tl.int32)
    end = tl.load(offsets + tile + 1).to(tl.int32)
    rows = tl.load(count).to(tl.int32)
    for first in range(0, rows, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        live = at < rows
        x_tile = _load_rows(x, at, live, d, 1, own, d, BLOCK_D)
        if CHUNKS == 1:
            s = _dot(w_tile, tl.trans(x_tile), None, PRECISION)
        else:
            s = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
            for c in range(CHUNKS):
                x_part = _load_rows(x, at, live, d, 1, c * BLOCK_D, d, BLOCK_D)
                w_part = _load_rows(w, item, real, stride_wv, stride_wd, c * BLOCK_D, d, BLOCK_D)
                w_part = _round(w_part, x.dtype.element_ty)
                s = _dot(w_part, tl.trans(x_part), s, PRECISION)
        shift = tl.load(lse + at, mask=live, other=float("inf")) - HEADROOM
        if bias is not None:
            s += b[:, None]
        p = _exp(s, shift[None, :], PRECISION)
        p *= tl.load(grad_lse + at, mask=live, other=0.0)[None, :]
        if (first < end) & (first + BLOCK_N > hit):
            # Before p is rounded: at p_y near 1 the sum is smaller than the rounding of p_y.
            y = tl.load(target + at, mask=live, other=-1)
            grad = tl.load(grad_logit + at, mask=live, other=0.0)
            p += tl.where(item[:, None] == y[None, :], grad[None, :], 0.0)
        if bias is not None:
            acc_bias += tl.sum(p, 1)
        acc = _dot(_round(p, x.dtype.element_ty), x_tile, acc, PRECISION)

    unit = tl.load(scale)
    col = own + tl.arange(0, BLOCK_D)
    keep = real[:, None] & (col < d)[None, :]
    tl.store(
        grad_w + item[:, None] * d + col[None, :],
        _round(acc * unit, grad_w.dtype.element_ty),
        mask=keep,
    )
    if bias is not None and own == 0:
        grad_b = _round(acc_bias * unit, grad_bias.dtype.element_ty)
        tl.store(grad_bias + item, grad_b, mask=real)


# (BLOCK_N, BLOCK_V, num_warps, num_stages) of the forward and of the backward kernel by BLOCK_D,
# the largest found that spill on none of sm_80, sm_90, sm_100. Registers on sm_90, of 255:
#   bf16: forward 252, 174, 254, backward 174, 213, 163 (D = 64, 128, 256)
#   fp32: forward 104, 128, 104, backward 80, 68, 112 (no tensor cores: operands are registers)
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


def _config(width: int, dtype: torch.dtype, table: torch.dtype, capability: int = 90) -> dict:
    """Tile shapes and launch options of both kernels, for `capability` 10 * major + minor."""
    if width > 256:  # in chunks of 64 columns, with the products of all chunks recomputed for each
        warps = 8 if dtype == torch.float32 else 4  # 4 spill 8 bytes on sm_80; 8 do so in bf16
        block_d, tiles = 64, ((32, 32, 4, 1), (32, 32, warps, 1))
    else:
        block_d = max(triton.next_power_of_2(width), 16)
        kind = "float32" if dtype == torch.float32 else "half" if dtype == table else "mixed"
        tiles = TILES[kind][max(block_d, 64)]
    config = {}
    for name, (block_n, block_v, warps, stages) in zip(("fwd", "bwd"), tiles, strict=True):
        if block_n == 128 and block_d == 256 and capability >= 100:
            block_n = 64  # 128 rows spill 120 bytes there
        config[name] = {
            "BLOCK_N": block_n,
            "BLOCK_V": block_v,
            "BLOCK_D": block_d,
            "CHUNKS": triton.cdiv(width, block_d),
            "num_warps": warps,
            "num_stages": stages,
            # float16 has 5 bits of exponent: p is kept near e^HEADROOM instead of near 1.
            "HEADROOM": {"fwd": 4.5, "bwd": 10.0}[name] if dtype == torch.float16 else 0.0,
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
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
    capability = 90
    if input.is_cuda:
        major, minor = torch.cuda.get_device_capability(input.device)
        capability = 10 * major + minor
    config = _config(input.shape[1], input.dtype, linear_weight.dtype, capability)
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        for options in config.values():
            options["PRECISION"] = "tf32"
    return config


def _plan(target: torch.Tensor, items: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows by target with the unscored ones last: (sorted target, order, number of scored rows)."""
    by_item, order = torch.where(target < 0, items, target).sort(stable=True)
    return by_item, order, (target >= 0).sum()


def linear_cross_entropy_fwd(input, linear_weight, linear_bias, target, with_offset):
    config = _options(input, linear_weight)["fwd"]
    (n, d), v = input.shape, linear_weight.shape[0]
    vector = {"dtype": torch.float32, "device": input.device}
    lse, logit = torch.empty(n, **vector), torch.empty(n, **vector)
    offset = torch.empty(n if with_offset else 0, d, **vector)
    if n == 0:
        return lse, logit, offset
    _, order, count = _plan(target, v)
    processors = 1
    if input.is_cuda:
        processors = torch.cuda.get_device_properties(input.device).multi_processor_count
    # About four programs a processor: two fit at a time, and two rounds even out the last one.
    slots = max(4 * processors, triton.cdiv(n, config["BLOCK_N"]))
    places = slots * config["BLOCK_N"]
    shift, sums = torch.empty(places, **vector), torch.empty(places, 2, **vector)
    means = torch.empty(places if with_offset else 0, d, **vector)
    strides = (*input.stride(), *linear_weight.stride())
    strides += (0 if linear_bias is None else linear_bias.stride(0),)
    with torch.cuda.device_of(input):
        _fwd_kernel[(slots, config["CHUNKS"] if with_offset else 1)](
            input, linear_weight, linear_bias, order, count, shift, sums, means,
            v, d, slots, *strides, WITH_MEAN=with_offset, **config,
        )  # fmt: skip
        block_r = _combine_rows(config["BLOCK_D"])
        _combine_kernel[(triton.cdiv(n, block_r),)](
            input, linear_weight, linear_bias, target, order, count, shift, sums, means,
            lse, logit, offset, n, v, d, slots, *strides, BLOCK_R=block_r,
            **{k: config[k] for k in ("BLOCK_N", "BLOCK_V", "BLOCK_D", "CHUNKS")},
            WITH_MEAN=with_offset,
        )  # fmt: skip
    return lse, logit, offset


def linear_cross_entropy_bwd(
    input, linear_weight, linear_bias, target, lse, grad_lse, grad_target_logit
):
    config = _options(input, linear_weight)["bwd"]
    (n, d), v = input.shape, linear_weight.shape[0]
    grad_weight = linear_weight.new_empty(v, d)
    grad_bias = lse.new_empty(0) if linear_bias is None else linear_bias.new_empty(v)
    by_item, order, count = _plan(target, v)
    tiles = triton.cdiv(v, config["BLOCK_V"])
    bounds = torch.arange(tiles + 1, device=input.device) * config["BLOCK_V"]
    offsets = torch.searchsorted(by_item, bounds.clamp_max(v))
    vectors = torch.stack([lse, grad_lse, grad_target_logit]).index_select(1, order)
    scale = torch.ones((), device=input.device)
    if input.dtype == torch.float16 and n > 0:
        # A power of two that brings the gradients of the rows to at most 1 (and back in the end).
        exponent = torch.frexp(vectors[1:].abs().amax()).exponent
        scale = torch.ldexp(scale, exponent)
        vectors[1:] /= scale
        vectors[2] *= math.exp(config["HEADROOM"])
        scale = scale * math.exp(-config["HEADROOM"])
    with torch.cuda.device_of(input):
        _bwd_kernel[(tiles, config["CHUNKS"])](
            input.index_select(0, order), linear_weight, linear_bias, by_item, *vectors, offsets,
            count, scale, grad_weight, grad_bias, v, d, *linear_weight.stride(),
            0 if linear_bias is None else linear_bias.stride(0),
            **config,
        )  # fmt: skip
    return grad_weight, grad_bias
