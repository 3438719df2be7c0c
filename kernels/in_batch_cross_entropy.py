"""Triton kernels of `in_batch_cross_entropy`: the B x C logits exist one tile at a time.

Legend: B queries, C candidates, D width, G id columns.

Forward: a program owns BLOCK_B queries and a range of candidates, and keeps sum_j p_ij and
sum_j p_ij c_j without the positive, relative to a running row shift; `_combine_kernel` adds the
ranges in a fixed order and puts the positive in. Backward: a program owns BLOCK_C candidates and a
range of queries; the ranges are added by torch. No atomics and no locks: equal inputs give equal
bits. The tiles are those of `linear_cross_entropy`, with the exclusions applied to the scores:

    ids      one comparison per logit and column
    lists    every row keeps the position in its sorted list; tiles without an entry cost nothing
    positive in the few tiles that hold one
"""

import math

import torch
import triton
import triton.language as tl

from fastrec.kernels.linear_cross_entropy import LOG2E, SLACK, _dot, _exp, _load_rows, _round


@triton.jit
def leave_out_groups(
    s, row, column, row_live, column_live, row_group, column_group, rows, columns,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """-inf where an id of the row equals the id of the column; negative ids equal none."""
    for g in tl.static_range(COLUMNS):
        i = tl.load(row_group + g * rows + row, mask=row_live, other=-1)
        j = tl.load(column_group + g * columns + column, mask=column_live, other=-1)
        i = tl.where(i < 0, -1, i)
        j = tl.where(j < 0, -2, j)
        s = tl.where(i[:, None] == j[None, :], float("-inf"), s)
    return s


@triton.jit
def seek(values, place, end, first):
    """The first position from `place` on whose value is not below `first`, for every row."""
    high = end
    while tl.max((place < high).to(tl.int32), 0) > 0:
        searching = place < high
        middle = (place + high) // 2
        value = tl.load(values + middle, mask=searching, other=0)
        place = tl.where(searching & (value < first), middle + 1, place)
        high = tl.where(searching & (value >= first), middle, high)
    return place


@triton.jit
def leave_out_listed(s, column, values, place, end, last, OUT: tl.constexpr = float("-inf")):
    """OUT for the listed columns below `last`; also the position of every row after them."""
    value = tl.load(values + place, mask=place < end, other=last)
    if tl.min(value, 0) < last:  # the compiler pipelines no loop that holds a bare `while`
        while tl.min(value, 0) < last:
            s = tl.where(value[:, None] == column[None, :], OUT, s)
            place += (value < last).to(tl.int64)
            value = tl.load(values + place, mask=place < end, other=last)
    return s, place


@triton.jit
def list_bounds(offsets, row, live):
    return tl.load(offsets + row, mask=live, other=0), tl.load(
        offsets + row + 1, mask=live, other=0
    )


@triton.jit(do_not_specialize=["n", "v", "per_range"])
def _fwd_kernel(
    x, c, bias, positive, row_group, item_group, listed, offsets, shift_out, sum_out, mean_out,
    n, v, d, per_range,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr, WITH_MEAN: tl.constexpr, HEADROOM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read the same candidates.
    blocks = tl.cdiv(n, BLOCK_B)
    slot = tl.program_id(0)
    own = tl.program_id(1) * BLOCK_D  # columns of c whose mean this program accumulates
    row = ((slot % blocks) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    live = row < n
    begin = (slot // blocks) * per_range * BLOCK_C
    y = tl.load(positive + row, mask=live, other=-1)
    if listed is not None:
        place, end = list_bounds(offsets, row, live)
        if begin > 0:
            place = seek(listed, place, end, begin)
    if CHUNKS == 1:
        x_tile = _load_rows(x, row, live, d, 1, 0, d, BLOCK_D)

    # p = exp(s - shift) stays below e^(SLACK + HEADROOM).
    shift = tl.full([BLOCK_B], -1e30, tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    rounded = tl.zeros([BLOCK_B], tl.float32)
    mean = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for first in range(begin, tl.minimum(begin + per_range * BLOCK_C, v), BLOCK_C):
        item = first + tl.arange(0, BLOCK_C)
        real = item < v
        c_tile = _load_rows(c, item, real, d, 1, own, d, BLOCK_D)
        if CHUNKS == 1:
            s = _dot(x_tile, tl.trans(c_tile), None, PRECISION)
        else:
            s = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
            for k in range(CHUNKS):
                x_part = _load_rows(x, row, live, d, 1, k * BLOCK_D, d, BLOCK_D)
                c_part = _load_rows(c, item, real, d, 1, k * BLOCK_D, d, BLOCK_D)
                s = _dot(x_part, tl.trans(c_part), s, PRECISION)
        if bias is not None:
            s += tl.load(bias + item, mask=real, other=float("-inf"))[None, :]
        elif first + BLOCK_C > v:
            s = tl.where(real[None, :], s, float("-inf"))
        s = leave_out_groups(s, row, item, live, real, row_group, item_group, n, v, COLUMNS)
        if listed is not None:
            s, place = leave_out_listed(s, item, listed, place, end, first + BLOCK_C)
        inside = (y >= first) & (y < first + BLOCK_C)
        if tl.max(inside.to(tl.int32), 0) > 0:
            s = tl.where(y[:, None] == item[None, :], float("-inf"), s)
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
            mean = _dot(q, c_tile, mean, PRECISION)

    at = slot.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    if own == 0:
        tl.store(shift_out + at, shift)
        tl.store(sum_out + 2 * at, total)
        tl.store(sum_out + 2 * at + 1, rounded)
    if WITH_MEAN:
        col = own + tl.arange(0, BLOCK_D)
        tl.store(mean_out + at[:, None] * d + col[None, :], mean, mask=(col < d)[None, :])


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, also where 1 + x rounds."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit(do_not_specialize=["n", "ranges"])
def _combine_kernel(
    x, c, bias, positive, shift_in, sum_in, mean_in, loss_out, lse_out, direction_out, n, d, ranges,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    WITH_MEAN: tl.constexpr,
):  # fmt: skip
    """loss, lse and direction of BLOCK_R queries; 0 for those without a positive."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    y = tl.load(positive + row, mask=row < n, other=-1)
    live = y >= 0
    y = tl.where(live, y, 0)
    step = tl.cdiv(n, BLOCK_B).to(tl.int64) * BLOCK_B  # places of one range

    shift = tl.full([BLOCK_R], -1e30, tl.float32)
    for r in range(ranges):
        shift = tl.maximum(shift, tl.load(shift_in + row + r * step, mask=live, other=-1e30))
    total = tl.zeros([BLOCK_R], tl.float32)
    rounded = tl.zeros([BLOCK_R], tl.float32)
    for r in range(ranges):
        at = row + r * step
        scale = _exp(tl.load(shift_in + at, mask=live, other=-1e30), shift, "ieee")
        total += scale * tl.load(sum_in + 2 * at, mask=live, other=1.0)
        rounded += scale * tl.load(sum_in + 2 * at + 1, mask=live, other=1.0)

    logit = tl.zeros([BLOCK_R], tl.float32)
    for k in range(CHUNKS):
        x_tile = _load_rows(x, row, live, d, 1, k * BLOCK_D, d, BLOCK_D).to(tl.float32)
        logit += tl.sum(x_tile * _load_rows(c, y, live, d, 1, k * BLOCK_D, d, BLOCK_D), 1)
    if bias is not None:
        logit += tl.load(bias + y, mask=live, other=0.0)

    # others = log(sum of the others / exp(logit)), -inf when all are left out.
    alone = total == 0.0
    peak = shift + tl.log(tl.where(alone, 1.0, total))
    others = tl.where(alone, float("-inf"), peak - logit)
    small = tl.exp(-tl.abs(others))
    extra = _log1p(small)
    loss = tl.where(others > 0, others, 0.0) + extra
    lse = tl.where(others > 0, peak, logit) + extra
    rest = tl.where(others > 0, 1.0, small) / (1.0 + small)  # 1 - p of the positive
    tl.store(loss_out + row, tl.where(live, loss, 0.0), mask=row < n)
    tl.store(lse_out + row, tl.where(live, lse, 0.0), mask=row < n)

    if WITH_MEAN:
        share = tl.where(rounded > 0, rest / tl.where(rounded > 0, rounded, 1.0), 0.0)
        for k in range(CHUNKS):
            col = k * BLOCK_D + tl.arange(0, BLOCK_D)
            mean = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
            for r in range(ranges):
                at = row + r * step
                scale = _exp(tl.load(shift_in + at, mask=live, other=-1e30), shift, "ieee")
                mean += scale[:, None] * _load_rows(
                    mean_in, at, live, d, 1, k * BLOCK_D, d, BLOCK_D
                )
            c_tile = _load_rows(c, y, live, d, 1, k * BLOCK_D, d, BLOCK_D).to(tl.float32)
            direction = mean * share[:, None] - c_tile * rest[:, None]
            direction = tl.where(live[:, None], direction, 0.0)
            keep = (row < n)[:, None] & (col < d)[None, :]
            tl.store(direction_out + row[:, None] * d + col[None, :], direction, mask=keep)


@triton.jit(do_not_specialize=["n", "v", "per_range"])
def _bwd_kernel(
    x, c, bias, positive, row_group, item_group, listed, offsets, lse, grad, grad_positive, scale,
    grad_c, grad_bias, n, v, d, per_range,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr, HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dc and db of BLOCK_C candidates from a range of queries: [ranges, C, D] and [ranges, C].
    `listed` holds the queries that leave a candidate out, `offsets` [C + 1]."""
    blocks = tl.cdiv(v, BLOCK_C)
    slot = tl.program_id(0)
    own = tl.program_id(1) * BLOCK_D
    item = ((slot % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    real = item < v
    begin = (slot // blocks) * per_range * BLOCK_B
    if listed is not None:
        place, end = list_bounds(offsets, item, real)
        if begin > 0:
            place = seek(listed, place, end, begin)
    if CHUNKS == 1:
        c_tile = _load_rows(c, item, real, d, 1, 0, d, BLOCK_D)
    if bias is not None:
        b = tl.load(bias + item, mask=real, other=0.0)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    acc_bias = tl.zeros([BLOCK_C], tl.float32)

    for first in range(begin, tl.minimum(begin + per_range * BLOCK_B, n), BLOCK_B):
        row = first + tl.arange(0, BLOCK_B)
        live = row < n
        x_tile = _load_rows(x, row, live, d, 1, own, d, BLOCK_D)
        if CHUNKS == 1:
            s = _dot(c_tile, tl.trans(x_tile), None, PRECISION)
        else:
            s = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
            for k in range(CHUNKS):
                x_part = _load_rows(x, row, live, d, 1, k * BLOCK_D, d, BLOCK_D)
                c_part = _load_rows(c, item, real, d, 1, k * BLOCK_D, d, BLOCK_D)
                s = _dot(c_part, tl.trans(x_part), s, PRECISION)
        if bias is not None:
            s += b[:, None]
        s = leave_out_groups(s, item, row, real, live, item_group, row_group, v, n, COLUMNS)
        if listed is not None:
            s, place = leave_out_listed(s, row, listed, place, end, first + BLOCK_B)
        shift = tl.load(lse + row, mask=live, other=float("inf")) - HEADROOM
        p = _exp(s, shift[None, :], PRECISION)
        p *= tl.load(grad + row, mask=live, other=0.0)[None, :]
        y = tl.load(positive + row, mask=live, other=-1)
        hit = item[:, None] == y[None, :]
        if tl.max(tl.max(hit.to(tl.int32), 1), 0) > 0:
            g = tl.load(grad_positive + row, mask=live, other=0.0)
            p = tl.where(hit, g[None, :], p)
        if bias is not None:
            acc_bias += tl.sum(p, 1)
        acc = _dot(_round(p, x.dtype.element_ty), x_tile, acc, PRECISION)

    unit = tl.load(scale)
    at = (slot // blocks).to(tl.int64) * v + item
    col = own + tl.arange(0, BLOCK_D)
    keep = real[:, None] & (col < d)[None, :]
    tl.store(grad_c + at[:, None] * d + col[None, :], acc * unit, mask=keep)
    if bias is not None and own == 0:
        tl.store(grad_bias + at, acc_bias * unit, mask=real)


# (BLOCK_B, BLOCK_C, num_warps, num_stages) of the forward and of the backward kernel by BLOCK_D,
# found by compiling: no spills on sm_80, sm_90 and sm_100 with every kind of exclusion.
TILES = {
    "half": {
        64: ((128, 64, 8, 3), (32, 128, 8, 3)),
        128: ((64, 64, 8, 3), (64, 64, 8, 3)),
        256: ((64, 64, 8, 3), (64, 64, 8, 2)),
    },
    "float32": {
        64: ((32, 32, 8, 2), (16, 32, 4, 2)),
        128: ((32, 32, 4, 2), (32, 32, 8, 2)),
        256: ((16, 32, 4, 2), (16, 32, 8, 2)),
    },
}


def config_of(width: int, dtype: torch.dtype, capability: int = 90) -> dict:
    """Tile shapes and launch options of both kernels, for `capability` 10 * major + minor."""
    if width > 256:  # in chunks of 64 columns, with the products of all chunks recomputed for each
        block_d, block_b = 64, 16 if dtype == torch.float32 else 32
        tiles = ((32, 32, 4, 1), (block_b, 32, 8, 1))
    else:
        block_d = max(triton.next_power_of_2(width), 16)
        tiles = TILES["float32" if dtype == torch.float32 else "half"][max(block_d, 64)]
    config = {}
    for name, (block_b, block_c, warps, stages) in zip(("fwd", "bwd"), tiles, strict=True):
        if (block_b, block_c) == (32, 128) and capability >= 100:
            block_b = 64  # 32 spill 8 bytes there, 64 spill on sm_80
        config[name] = {
            "BLOCK_B": block_b,
            "BLOCK_C": block_c,
            "BLOCK_D": block_d,
            "CHUNKS": triton.cdiv(width, block_d),
            "num_warps": warps,
            "num_stages": stages,
            # float16 has 5 bits of exponent: p is kept near e^HEADROOM instead of near 1.
            "HEADROOM": {"fwd": 4.5, "bwd": 10.0}[name] if dtype == torch.float16 else 0.0,
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        }
    return config


def options_of(query: torch.Tensor) -> dict[str, dict]:
    if query.dtype == torch.float64:
        raise RuntimeError("in_batch ops have no float64 triton kernel, query is float64")
    capability = 90
    if query.is_cuda:
        major, minor = torch.cuda.get_device_capability(query.device)
        capability = 10 * major + minor
    config = config_of(query.shape[1], query.dtype, capability)
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        for options in config.values():
            options["PRECISION"] = "tf32"
    return config


def ranges_of(device: torch.device, blocks: int, tiles: int) -> tuple[int, int]:
    """(ranges, tiles per range) of the streamed side: about four programs a processor, because two
    fit at a time and two rounds even out the last one."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    ranges = max(1, min(4 * processors // max(blocks, 1), tiles, 32))
    per_range = max(1, triton.cdiv(tiles, ranges))
    return max(1, triton.cdiv(tiles, per_range)), per_range


def by_column(ids: torch.Tensor | None) -> torch.Tensor | None:
    return None if ids is None else ids.t().contiguous()


def _combine_rows(block_d: int) -> int:
    return 4 if block_d == 128 else 8  # 8 rows of 128 columns spill 8 bytes on sm_100


def in_batch_cross_entropy_fwd(
    query, candidate, bias, positive, query_group, candidate_group, exclude_values,
    exclude_offsets, with_direction,
):  # fmt: skip
    config = options_of(query)["fwd"]
    query, candidate, positive = query.contiguous(), candidate.contiguous(), positive.contiguous()
    bias = None if bias is None else bias.contiguous()
    (n, d), v = query.shape, candidate.shape[0]
    vector = {"dtype": torch.float32, "device": query.device}
    loss, lse = torch.empty(n, **vector), torch.empty(n, **vector)
    direction = torch.empty(n if with_direction else 0, d, **vector)
    if n == 0:
        return loss, lse, direction
    blocks = triton.cdiv(n, config["BLOCK_B"])
    ranges, per_range = ranges_of(query.device, blocks, triton.cdiv(v, config["BLOCK_C"]))
    places = ranges * blocks * config["BLOCK_B"]
    shift, sums = torch.empty(places, **vector), torch.empty(places, 2, **vector)
    means = torch.empty(places if with_direction else 0, d, **vector)
    lists = (None, None)
    if exclude_values is not None:
        lists = (exclude_values.contiguous(), exclude_offsets.contiguous())
    with torch.cuda.device_of(query):
        _fwd_kernel[(ranges * blocks, config["CHUNKS"] if with_direction else 1)](
            query, candidate, bias, positive, by_column(query_group), by_column(candidate_group),
            *lists, shift, sums, means, n, v, d, per_range,
            COLUMNS=0 if query_group is None else query_group.shape[1],
            WITH_MEAN=with_direction, **config,
        )  # fmt: skip
        block_r = _combine_rows(config["BLOCK_D"])
        _combine_kernel[(triton.cdiv(n, block_r),)](
            query, candidate, bias, positive, shift, sums, means, loss, lse, direction,
            n, d, ranges, BLOCK_R=block_r,
            **{key: config[key] for key in ("BLOCK_B", "BLOCK_D", "CHUNKS")},
            WITH_MEAN=with_direction,
        )  # fmt: skip
    return loss, lse, direction


def _by_candidate(values, offsets, candidates: int):
    """Listed candidates by query -> listed queries by candidate."""
    rows = torch.repeat_interleave(offsets.diff(), output_size=values.shape[0])
    sorted_values, order = values.sort(stable=True)
    bounds = torch.arange(candidates + 1, device=values.device)
    return rows[order], torch.searchsorted(sorted_values, bounds)


def in_batch_cross_entropy_bwd(
    query, candidate, bias, positive, query_group, candidate_group, exclude_values,
    exclude_offsets, loss, lse, grad_loss,
):  # fmt: skip
    config = options_of(query)["bwd"]
    query, candidate, positive = query.contiguous(), candidate.contiguous(), positive.contiguous()
    (n, d), v = query.shape, candidate.shape[0]
    # -g (1 - p of the positive); its own vector, because p - 1 would cancel.
    vectors = torch.stack([grad_loss, torch.expm1(-loss) * grad_loss])
    vectors = vectors.masked_fill(positive < 0, 0)
    scale = torch.ones((), device=query.device)
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
    lists = (None, None)
    if exclude_values is not None:
        lists = _by_candidate(exclude_values, exclude_offsets, v)
    with torch.cuda.device_of(query):
        _bwd_kernel[(ranges * blocks, config["CHUNKS"])](
            query, candidate, None if bias is None else bias.contiguous(), positive,
            by_column(query_group), by_column(candidate_group), *lists, lse, *vectors, scale,
            grad_candidate, grad_bias, n, v, d, per_range,
            COLUMNS=0 if query_group is None else query_group.shape[1], **config,
        )  # fmt: skip
    if ranges > 1:
        return grad_candidate.sum(0), grad_bias.sum(0)
    return grad_candidate[0], grad_bias[0]
