# SPDX-License-Identifier: Apache-2.0
"""Sections that time an op against its peers, and section `memory`.

All implementations of a shape run in one process on the same inputs, in turn; every time stands
beside an error against float64. Where fastrec is wrong beyond the limit no time is reported.
"""

import functools
import time
from collections.abc import Callable

from benchmarks.bench import PASS, Entry, largest, module
from benchmarks.gpu.cases import MEASURED, Measured
from benchmarks.gpu.clock import Clock, spread
from benchmarks.gpu.context import NO_TIME, Context
from benchmarks.gpu.probe import MATRIX, sm_clock

FEW = 3  # rounds that are worth keeping when time is up
SLOW = 0.25  # seconds; slower implementations are called FEW times


def floor_seconds(ceilings: dict, dtype: str, operations: float, bytes_: float, exps: float):
    """(seconds, what limits), where the units overlap; (None, None) without the rates needed."""
    parts = {}
    for names, amount in ((MATRIX[dtype], operations), ({"copy": 1}, bytes_), ({"exp": 1}, exps)):
        rates = {name: ceilings[name] / work for name, work in names.items() if name in ceilings}
        if amount and not rates:
            return None, None
        if amount:
            name = max(rates, key=rates.__getitem__)
            parts[name] = amount / rates[name]
    limit = max(parts, key=parts.__getitem__)
    return parts[limit], limit


def implementations(measured: Measured, entry: Entry, context: Context) -> dict:
    """Name -> function, or the reason why there is none."""
    compiler = "eager" if context.tiny else "inductor"
    table = dict(module(entry.op).implementations(entry, compiler))
    table |= measured.designs(entry)
    if context.cuda:
        table |= measured.peers(entry)
    elif measured.peers(entry):
        table |= dict.fromkeys(measured.peers(entry), "needs CUDA")
    if entry.only and not context.tiny:
        table = {name: function for name, function in table.items() if name in entry.only}
    return table


def _first_calls(context, key, table, run, inputs, clock) -> tuple[dict, dict, dict]:
    """(results, peak bytes, rows of those that failed) of one warm-up and one call each."""
    results, peaks, failed = {}, {}, {}
    for name, function in table.items():
        if isinstance(function, str):
            failed[name] = {"absent": function}
            continue
        if why := context.announce(key, name):
            failed[name] = {"failed": why}
            continue
        if results and context.over():
            failed[name] = dict(NO_TIME)
            continue
        try:
            results[name] = run(function, inputs)
            peaks[name] = clock.peak_bytes(functools.partial(run, function, inputs))
        except Exception as error:
            results.pop(name, None)
            failed[name] = context.rescue(error)
        if name in failed:
            context.release()
    return results, peaks, failed


def _times(op, names: dict, inputs, clock: Clock, rounds: int, until: float) -> dict:
    seconds: dict = {name: {kind: [] for kind in op.PASSES} for name in names}
    for done in range(rounds):
        if done >= FEW and time.time() >= until:
            break
        for kind in op.PASSES:
            for name, function in names.items():
                taken = seconds[name][kind]
                if len(taken) >= FEW and taken[0] > SLOW:
                    continue
                taken.append(clock.seconds(lambda f=function, k=kind: PASS[k](f, inputs)))  # type: ignore[misc]
    return seconds


def measure(
    measured: Measured, entry: Entry, context: Context, clock: Clock, rounds: int, until: float
) -> dict:
    """{"floor", "implementations": {name: row}, ...} of one shape."""
    op, key = module(entry.op), entry.key
    table = implementations(measured, entry, context)
    inputs, main = op.problem(entry, context.device), op.PASSES[-1]
    results, peaks, rows = _first_calls(context, key, table, PASS[main], inputs, clock)
    if "fastrec" not in results:
        return {"implementations": rows}
    context.announce(key, "errors")
    errors = op.errors(entry, inputs, results)
    worst = largest(errors["fastrec"].values())
    names = {name: table[name] for name in results}
    results.clear()
    if not worst <= op.GRADIENT_LIMIT[entry.dtype]:
        rows["fastrec"] = {"failed": f"error {worst:.2g}: no times", **errors["fastrec"]}
        return {"implementations": rows}
    context.announce(key, "times")
    seconds = _times(op, names, inputs, clock, rounds, until)
    elements, counts = op.work(entry)["elements"], measured.floor(entry)
    floors = {
        kind: floor_seconds(context.ceilings(), entry.dtype, *counts[kind]) for kind in op.PASSES
    }
    for name in names:
        row = dict(errors[name], peak_bytes=peaks[name])
        for kind in op.PASSES:
            row[kind] = spread(seconds[name][kind])
            row[kind]["ps_per_element"] = row[kind]["median"] / elements * 1e12
            if floors[kind][0]:
                row[kind]["floor_share"] = floors[kind][0] / row[kind]["median"]
        rows[name] = row
    # What a user waits for who calls the op alone: the launches count.
    rows["fastrec"]["launched"] = spread(
        [
            clock.seconds(lambda: PASS[main](names["fastrec"], inputs), lead=False)
            for _ in range(1 if context.tiny else FEW)
        ]
    )
    for name in names:
        rows[name]["ratio"] = rows[name][main]["median"] / rows["fastrec"][main]["median"]
    return {
        "element": op.ELEMENT,
        "stored_bytes": op.work(entry)["materialised"],
        "floor": {
            kind: {"seconds": floors[kind][0], "limit": floors[kind][1], "counts": counts[kind]}
            for kind in op.PASSES
        },
        "implementations": rows,
    } | sm_clock(context)


def section_of(name: str) -> Callable[[Context], None]:
    def section(context: Context) -> None:
        measured, clock = MEASURED[name], Clock(context.device)
        entries = measured.entries
        if context.tiny:
            entries = tuple(entry for op in measured.ops for entry in module(op).SMOKE)
        entries = context.new_first(entries, lambda entry: entry.key)
        for index, entry in enumerate(entries):
            if context.over() or context.have(entry.key):
                continue
            # No shape uses up the time of those after it.
            until = time.time() + context.seconds_left() / (len(entries) - index)
            try:
                # More rounds than on a CPU: they are short, and stop with the section.
                rounds = 1 if context.tiny else 3 * entry.rounds
                row = measure(measured, entry, context, clock, rounds, until)
            except Exception as error:
                row = {"implementations": {"fastrec": context.rescue(error)}}
            context.save(entry.key, row)
            context.release()

    return section


def memory(context: Context) -> None:
    """Peak memory of forward + backward of every op at its big shape, beyond the inputs."""
    clock = Clock(context.device)
    for measured in MEASURED.values():
        tiny = tuple(module(op).SMOKE[0] for op in measured.ops)
        for entry in tiny if context.tiny else measured.memory:
            key = f"{entry.op} {entry.key}"
            call = functools.partial(_memory, entry, context, clock)
            context.attempt(key, call, "fastrec")


def _memory(entry: Entry, context: Context, clock: Clock) -> dict:
    op = module(entry.op)
    function = op.implementations(entry, "eager")["fastrec"]
    inputs, run = op.problem(entry, context.device), PASS[op.PASSES[-1]]
    leaves = [x for x in inputs if getattr(x, "requires_grad", False)]
    run(function, inputs)
    call = functools.partial(run, function, inputs)
    return {
        "peak_bytes": clock.peak_bytes(call),
        "gradient_bytes": sum(x.numel() * x.element_size() for x in leaves),
        "stored_bytes": op.work(entry)["materialised"],
        "element": op.ELEMENT,
        "seconds": spread([clock.seconds(call) for _ in range(1 if context.tiny else FEW)]),
    }
