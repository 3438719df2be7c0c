# SPDX-License-Identifier: Apache-2.0
"""What the sections that time an op measure: a section is one `Measured` here, an op a module of
`benchmarks/` (see benchmarks/bench.py), a shape one entry.

Legend: N rows, V items, D width, B queries or sequences, L padded length, H heads, T events.
"""

import functools

from benchmarks import encoder_pieces as pieces
from benchmarks import peers as others
from benchmarks.bench import Entry, module
from benchmarks.gpu.measured import Counts, Measured, item_bytes
from benchmarks.gpu.ranked_cases import RANK_TOPK, SAMPLED
from benchmarks.linear_cross_entropy import FLOAT32_TABLE

# Softmax over a table: products of N x V x D, an exponential a logit and sweep.


def linear_ce_entry(
    n: int, v: int, d: int, dtype: str = "bfloat16", case: str = "flat", **more
) -> Entry:
    return Entry("linear_cross_entropy", dict(N=n, V=v, D=d), dtype, case, **more)


def _linear_ce_floor(entry: Entry) -> dict[str, Counts]:
    n, v, d = entry.sizes.values()
    table = v * d * (4 if entry.case == FLOAT32_TABLE else item_bytes(entry))
    return {
        "forward": (2 * n * v * d, table, n * v),
        "both": (8 * n * v * d, 3 * table, 2 * n * v),
    }


def _stored(entry: Entry) -> others.Peers:
    from benchmarks.gpu.stored import stored

    same = entry.dtype == "bfloat16" and entry.case != FLOAT32_TABLE
    fits = same and entry.sizes["D"] <= 256
    return {"stored": stored if fits else "bfloat16 only"}


_LIGER = tuple(f"liger chunk {rows}" for rows in ("512", "1024", "512 fp32"))
_CHUNKED = (
    "fastrec", "stored", *_LIGER, "cce", "cce exact", "quack", "quack largest chunk",
    "quack chunk 1024",
)  # fmt: skip
# At its defaults liger takes 1M items a row at a time, which is seconds.
_NO_COMPILER = (*_CHUNKED, "eager")
_SMALL = (*_NO_COMPILER, "liger", "torch.compile")
_MILLION = functools.partial(linear_ce_entry, 4096, 1_000_000, 64)

LINEAR_CE = Measured(
    (
        _MILLION(only=_NO_COMPILER),
        _MILLION(case=FLOAT32_TABLE, only=("fastrec", "eager")),
        _MILLION("float32", only=("fastrec", "eager", "liger chunk 512", "liger chunk 1024")),
        linear_ce_entry(1317, 20_033, 64, only=_SMALL),
        # QuACK has its fast path where V is a multiple of 128.
        linear_ce_entry(4096, 2**20, 64, only=_NO_COMPILER),
        linear_ce_entry(4096, 1_000_000, 128, only=_NO_COMPILER),
        linear_ce_entry(4096, 1_000_000, 256, only=_NO_COMPILER),
        linear_ce_entry(4096, 100_000, 128),
        linear_ce_entry(4096, 100_000, 512),  # beyond 256 fastrec stores the scores of a chunk
        _MILLION(case="peaked", only=("fastrec", "stored", "cce", "cce exact")),
        linear_ce_entry(2560, 141_939, 64),
        linear_ce_entry(4096, 10_000_000, 64, rounds=3, only=_CHUNKED),
        linear_ce_entry(1317, 20_033, 64, "float32", only=_SMALL),
    ),
    _linear_ce_floor,
    "forward 2 N V D operations, N V exponentials, the table read once; with backward 8 N V D,"
    " 2 N V, the table read twice and its gradient written once",
    memory=(linear_ce_entry(4096, 10_000_000, 64), linear_ce_entry(10_000, 10_000_000, 128)),
    designs=_stored,
    peers=others.linear_cross_entropy,
    columns=(
        ("stored exponentials", ("stored",)),
        ("eager", ("eager",)),
        ("torch.compile", ("torch.compile",)),
        ("liger, defaults", ("liger",)),
        ("liger, best", ("liger", *_LIGER)),
        ("cce, defaults (filters)", ("cce",)),
        ("cce, exact", ("cce exact",)),
        ("quack, defaults", ("quack",)),
        ("quack, best", ("quack", "quack largest chunk", "quack chunk 1024")),
    ),
)


# Softmax over the candidates of a batch.


def in_batch_entry(b: int, d: int, case: str, dtype: str = "bfloat16", **more) -> Entry:
    return Entry("in_batch_cross_entropy", dict(B=b, D=d), dtype, case, **more)


def _in_batch_floor(entry: Entry) -> dict[str, Counts]:
    b, d = entry.sizes.values()
    table = b * d * item_bytes(entry)
    return {
        "forward": (2 * b * b * d, 2 * table, b * b),
        "both": (8 * b * b * d, 6 * table, 2 * b * b),
    }


IN_BATCH = Measured(
    (
        in_batch_entry(8192, 64, "dot"),
        in_batch_entry(8192, 64, "dot groups"),
        in_batch_entry(8192, 64, "dot lists"),
        in_batch_entry(8192, 64, "weighted_l2 groups"),
        in_batch_entry(8192, 64, "dot", "float32"),
        in_batch_entry(8192, 128, "dot", only=("fastrec", "eager", "cce exact", "inf-cl")),
        in_batch_entry(1024, 64, "dot groups", only=("fastrec", "eager")),
        in_batch_entry(32768, 64, "dot groups", only=("fastrec", "eager")),
    ),
    _in_batch_floor,
    "forward 2 B B D operations, B B exponentials, both operands read; with backward 8 B B D,"
    " 2 B B, operands read twice and both gradients written",
    memory=(in_batch_entry(65536, 64, "dot groups"),),
    peers=others.in_batch_cross_entropy,
    columns=(
        ("eager", ("eager",)),
        ("torch.compile", ("torch.compile",)),
        ("inf-cl", ("inf-cl",)),
        ("cce, exact", ("cce exact",)),
        ("liger", ("liger",)),
    ),
)


# Attention inside sequences.


def attention_entry(b: int, n: int, h: int, d: int, case: str = "full", **more) -> Entry:
    dtype = more.pop("dtype", "bfloat16")
    return Entry("jagged_attention", dict(B=b, N=n, H=h, D=d), dtype, case, **more)


def _attention_floor(entry: Entry) -> dict[str, Counts]:
    from benchmarks.jagged_attention import lengths_of

    lengths, (_, _, h, d) = lengths_of(entry), entry.sizes.values()
    pairs = int(lengths.square().sum()) * h
    tensor = int(lengths.sum()) * h * d * item_bytes(entry)
    return {
        "forward": (4 * pairs * d, 4 * tensor, pairs),
        "both": (14 * pairs * d, 11 * tensor, 2 * pairs),
    }


_WITHOUT_REFERENCE = ("fastrec", "sdpa", "sdpa efficient", "flash varlen", "efficient varlen")
ATTENTION = Measured(
    (
        attention_entry(4096, 50, 2, 32, only=(*_WITHOUT_REFERENCE, "torch.compile")),
        attention_entry(4096, 50, 2, 32, "yelp", only=_WITHOUT_REFERENCE),
        attention_entry(768, 30, 2, 32, "yelp", only=_WITHOUT_REFERENCE),
        attention_entry(8192, 30, 2, 32, only=_WITHOUT_REFERENCE),
        attention_entry(8192, 50, 2, 16, only=_WITHOUT_REFERENCE),
        attention_entry(1024, 128, 2, 32, only=_WITHOUT_REFERENCE),
        attention_entry(1024, 200, 2, 32, only=_WITHOUT_REFERENCE),
        attention_entry(512, 200, 4, 64, only=_WITHOUT_REFERENCE),
        attention_entry(4096, 50, 2, 32, dtype="float32", only=_WITHOUT_REFERENCE),
    ),
    _attention_floor,
    "forward 4 operations an element of P and feature, one exponential, Q, K, V read and O written;"
    " with backward 14, two, and seven more tensors; the draws of the masks are not counted",
    memory=(attention_entry(8192, 200, 4, 64),),
    peers=others.jagged_attention,
    columns=(
        ("padded SDPA", ("sdpa",)),
        ("padded, memory-efficient kernel", ("sdpa efficient",)),
        ("padded, torch.compile", ("torch.compile",)),
        ("flash varlen", ("flash varlen",)),
        ("efficient varlen", ("efficient varlen",)),
    ),
)


# Elementwise ops of the encoder: bytes only.


def _bytes_only(entry: Entry) -> dict[str, Counts]:
    t, d, _ = entry.sizes.values()
    share = {pieces.NORM: 4, pieces.GELU: 2, pieces.EMBEDDING: 2, pieces.POOL: 1}[entry.case]
    total = module("encoder_pieces").work(entry)["bytes"]
    return {"forward": (0, share * t * d * item_bytes(entry), 0), "both": (0, total, 0)}


ENCODER = Measured(
    (
        pieces.entry(pieces.NORM, 204_800, 64, dtype="bfloat16"),
        pieces.entry(pieces.GELU, 204_800, 256, dtype="bfloat16"),
        pieces.entry(pieces.EMBEDDING, 204_800, 64, 141_939, dtype="bfloat16"),
        pieces.entry(pieces.POOL, 204_800, 64, dtype="bfloat16"),
        pieces.entry(pieces.NORM, 204_800, 64),
        pieces.entry(pieces.EMBEDDING, 204_800, 64, 141_939),
    ),
    _bytes_only,
    "bytes alone: what is read and written once forward and once backward",
    memory=(pieces.entry(pieces.EMBEDDING, 2_000_000, 64, 10_000_000, dtype="bfloat16"),),
)

MEASURED = {
    "linear_ce": LINEAR_CE,
    "in_batch": IN_BATCH,
    "attention": ATTENTION,
    "encoder": ENCODER,
    "rank_topk": RANK_TOPK,
    "sampled": SAMPLED,
}
