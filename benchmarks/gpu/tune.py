# SPDX-License-Identifier: Apache-2.0
"""Sections `tune_*`: the time of a few tile configurations of a kernel, beside the one in use.

Nothing is chosen here: a better one is written into kernels/ with its reason. All candidates
compile for sm_90 (Triton 3.6); two of the in-batch backward kernel spill when all exclusions are
used at once (120 and 136 bytes), the others do not.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.bench import PASS, Entry, module
from benchmarks.gpu.cases import attention_entry, in_batch_entry, linear_ce_entry
from benchmarks.gpu.clock import Clock, spread
from benchmarks.gpu.context import Context


def _tile(names: str, *numbers: int) -> dict[str, int]:
    return dict(zip((*names.split(), "num_warps", "num_stages"), numbers, strict=True))


@dataclass(frozen=True)
class Tuned:
    """config: the function of kernels/<op>.py whose result is changed. candidates: (entry, kernel
    "fwd" or "bwd", changes)."""

    op: str
    config: str
    candidates: tuple[tuple[Entry, str, tuple[dict[str, int], ...]], ...]


def _rows_items(*tiles: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    return tuple(_tile("BLOCK_N BLOCK_V", *tile) for tile in tiles)


def _pairs(*tiles: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    return tuple(_tile("BLOCK_B BLOCK_C", *tile) for tile in tiles)


def _blocks(*tiles: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    return tuple(_tile("BLOCK", *tile) for tile in tiles)


_CE_64, _CE_128, _CE_256 = (linear_ce_entry(4096, 1_000_000, width) for width in (64, 128, 256))
_DOT = in_batch_entry(8192, 64, "dot groups")
_SHORT, _LONG = attention_entry(4096, 50, 2, 32), attention_entry(1024, 200, 2, 32)

# What each kernel is tried with, beside what it uses.
_CE_64_FWD = ((64, 128, 4, 2), (64, 128, 4, 4), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3))
_CE_64_BWD = ((64, 128, 4, 2), (64, 128, 8, 3), (64, 64, 4, 3), (32, 128, 4, 3), (128, 128, 8, 3))
_CE_128_FWD = ((128, 64, 8, 2), (128, 64, 8, 4), (64, 64, 4, 3), (64, 128, 8, 3))
_CE_128_BWD = ((64, 128, 8, 2), (64, 64, 4, 3), (64, 64, 8, 3))
_CE_256_FWD = ((128, 64, 8, 2), (64, 64, 8, 3), (64, 64, 4, 2))
_CE_256_BWD = ((64, 64, 8, 2), (32, 64, 8, 3))

TUNED = {
    "tune_linear_ce": Tuned(
        "linear_cross_entropy",
        "_config",
        (
            (_CE_64, "fwd", _rows_items(*_CE_64_FWD)),
            (_CE_64, "bwd", _rows_items(*_CE_64_BWD)),
            (_CE_128, "fwd", _rows_items(*_CE_128_FWD)),
            (_CE_128, "bwd", _rows_items(*_CE_128_BWD)),
            (_CE_256, "fwd", _rows_items(*_CE_256_FWD)),
            (_CE_256, "bwd", _rows_items(*_CE_256_BWD)),
        ),
    ),
    "tune_in_batch": Tuned(
        "in_batch_cross_entropy",
        "config_of",
        (
            (_DOT, "fwd", _pairs((128, 64, 8, 2), (64, 64, 4, 3), (64, 128, 8, 3))),
            (_DOT, "bwd", _pairs((32, 128, 8, 2), (64, 64, 4, 3), (64, 128, 8, 3))),
        ),
    ),
    "tune_attention": Tuned(
        "jagged_attention",
        "_config",
        (
            (_SHORT, "fwd", _blocks((64, 4, 2), (64, 8, 1), (32, 4, 1), (32, 2, 1))),
            (_SHORT, "bwd", _blocks((64, 8, 1), (32, 4, 1), (32, 2, 1))),
            (_LONG, "fwd", _blocks((64, 4, 2), (64, 8, 1), (32, 4, 1))),
            (_LONG, "bwd", _blocks((32, 8, 1), (16, 4, 1))),
        ),
    ),
}


@contextmanager
def changed(op: str, config: str, kernel: str, change: dict[str, int]) -> Iterator[None]:
    """kernels/<op>.py launches `kernel` with `change` in its configuration."""
    kernels = importlib.import_module(f"fastrec.kernels.{op}")
    original: Callable = getattr(kernels, config)

    def patched(*args, **options) -> dict:
        found = original(*args, **options)
        if kernel in found:  # {kernel: configuration}
            return found | {kernel: found[kernel] | change}
        return found | change if args[0] == kernel else found

    setattr(kernels, config, patched)
    try:
        yield
    finally:
        setattr(kernels, config, original)


def section_of(name: str) -> Callable[[Context], None]:
    def section(context: Context) -> None:
        tuned, clock = TUNED[name], Clock(context.device)
        for entry, kernel, candidates in tuned.candidates[: 1 if context.tiny else None]:
            if context.tiny:
                entry = module(tuned.op).SMOKE[0]
                candidates = tuple({"num_stages": tile["num_stages"]} for tile in candidates[:1])
            _candidates(context, tuned, clock, entry, kernel, candidates)
            context.release()

    return section


def _candidates(context, tuned: Tuned, clock: Clock, entry: Entry, kernel: str, candidates) -> None:
    """Rows of all candidates of a kernel, timed in turn; the first one is the one in use."""
    op, key = module(tuned.op), f"{entry.key} {kernel}"
    if context.over() or context.have(key):
        return
    function = op.implementations(entry, "eager")["fastrec"]
    inputs = op.problem(entry, context.device)
    run = PASS["forward" if kernel == "fwd" else "both"]
    call = functools.partial(run, function, inputs)
    rows: dict[str, dict] = {}
    seconds: dict[str, list[float]] = {}
    table = {"in use": {}} | {" ".join(f"{k}={v}" for k, v in c.items()): c for c in candidates}
    expected = None
    for name, change in table.items():
        if why := context.announce(key, name):
            rows[name] = {"failed": why}
            continue
        try:
            with changed(tuned.op, tuned.config, kernel, change):
                result = call()
                result = result[-1] if isinstance(result, tuple) else result
                expected = result if expected is None else expected
                wrong = (result - expected).abs().max() / expected.abs().max()
                if not wrong < 0.05:
                    raise RuntimeError(f"differs by {wrong:.2g} from the configuration in use")
                call()
            seconds[name] = []
        except Exception as error:
            rows[name] = context.rescue(error)
    for _ in range(1 if context.tiny else 7):
        for name in seconds:
            with changed(tuned.op, tuned.config, kernel, table[name]):
                seconds[name].append(clock.seconds(call))
    rows |= {name: {"seconds": spread(times)} for name, times in seconds.items()}
    context.save(key, {"implementations": rows})
