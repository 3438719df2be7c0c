# SPDX-License-Identifier: Apache-2.0
"""What the kernels compile to, as tables in docs/kernels/, and upper bounds of it.

    python tests/aot_tables.py              # the installed Triton's rows of every page
    python tests/aot_tables.py linear_rank  # of one op
    python tests/aot_tables.py --bounds     # aot_bounds.csv anew from the rows of the pages

Rows of other versions of Triton stay. Bounds are written on demand only: a change that needs more
of something has to say so there.
"""

import argparse
import csv
import functools
import importlib
import math
import re
from pathlib import Path

import triton
from aot import Binary, Op

TESTS = Path(__file__).resolve().parent
PAGES = TESTS.parent / "docs" / "kernels"
BOUNDS = TESTS / "aot_bounds.csv"
COLUMNS = (
    "Triton", "registers", "stack", "shared, KB", "blocks per SM", "product", "barriers", "LDG",
    "MUFU/element", "instructions/element", "shortest way",
)  # fmt: skip
# Column of COLUMNS -> of the bounds; the first is a lower one.
BOUNDED = ("blocks per SM", "barriers", "LDG", "MUFU/element", "instructions/element")
ROOM = 1.05  # above what is measured, of counts that are no small integers
Key = tuple[str, ...]  # the values of a case and the version of Triton


def cells(binary: Binary) -> list[str]:
    loop, each = binary.loop, binary.per_element
    return [
        triton.__version__, str(binary.registers), str(binary.stack),
        f"{binary.shared / 1024:.1f}", str(binary.blocks), binary.product or "-",
        str(loop.opcodes["BAR"]), str(loop.opcodes["LDG"]), f"{each(loop.opcodes['MUFU']):.2f}",
        f"{each(loop.length):.1f}", f"{each(loop.shortest):.1f}",
    ]  # fmt: skip


def _block(op: Op) -> re.Pattern:
    return re.compile(rf"(<!-- aot:{op.name} -->\n).*?(<!-- /aot -->)", re.DOTALL)


def _path(op: Op) -> Path:
    return PAGES / f"{op.page or op.name}.md"


@functools.cache
def _page(path: Path) -> str:
    return path.read_text()


def rows_of(op: Op) -> dict[Key, list[str]]:
    """(values, Triton) -> cells from the version on, as the page has them."""
    path, width = _path(op), len(op.heads.split())
    block = _block(op).search(_page(path))
    assert block, f"{path.name} has no block aot:{op.name}"
    lines = [line.strip("| ").split(" | ") for line in block[0].splitlines() if line[:1] == "|"]
    return {(*line[:width], line[width]): line[width:] for line in lines[2:]}


def table(op: Op, rows: dict[Key, list[str]]) -> str:
    """Cases in their order, the newest Triton first."""
    order = [tuple(map(str, values)) for values in op.shown]

    def rank(key: Key) -> tuple:
        return order.index(key[:-1]), [-int(part) for part in re.findall(r"\d+", key[-1])]

    kept = sorted((key for key in rows if key[:-1] in order), key=rank)
    head = [*op.heads.split(), *COLUMNS]
    lines = [head, ["---"] * len(head), *([*key[:-1], *rows[key]] for key in kept)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(op: Op) -> None:
    """Compiles the shown cases and replaces the rows of the installed Triton."""
    path = _path(op)
    rows = {key: row for key, row in rows_of(op).items() if key[-1] != triton.__version__}
    for values in op.shown:
        row = cells(op.build(*values))
        rows[(*map(str, values), row[0])] = row
    fresh = table(op, rows)
    path.write_text(_block(op).sub(lambda found: f"{found[1]}\n{fresh}\n\n{found[2]}", _page(path)))
    _page.cache_clear()
    print(f"{path.name}: {op.name}, {len(rows)} rows", flush=True)


def bounds_of(rows: dict[Key, list[str]]) -> dict[Key, list[str]]:
    """Values of a case -> bounds: the worst of all versions of Triton, with a little room."""
    found: dict[Key, list[list[float]]] = {}
    for key, row in rows.items():
        numbers = dict(zip(COLUMNS, row, strict=True))
        found.setdefault(key[:-1], []).append([float(numbers[name]) for name in BOUNDED])
    worst = {}
    for case, numbers in found.items():
        least, *most = zip(*numbers, strict=True)
        barriers, loads, *counts = map(max, most)
        rounded = [f"{math.ceil(100 * ROOM * count) / 100:g}" for count in counts]
        worst[case] = [f"{min(least):g}", f"{barriers:g}", f"{loads:g}", *rounded]
    return worst


@functools.cache
def bounds() -> dict[tuple[str, str], dict[str, float]]:
    with BOUNDS.open(newline="") as lines:
        return {
            (row["op"], row["case"]): {name: float(row[name]) for name in BOUNDED}
            for row in csv.DictReader(lines)
        }


def write_bounds(ops: list[Op]) -> None:
    with BOUNDS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["op", "case", *BOUNDED])
        for op in ops:
            for case, limits in bounds_of(rows_of(op)).items():
                writer.writerow([op.name, " ".join(case), *limits])


def check(op: Op, values: tuple, binary: Binary) -> None:
    """The binary stays within its bounds, and the page shows it where the page knows the installed
    version of Triton."""
    case, row = tuple(map(str, values)), cells(binary)
    found, name = dict(zip(COLUMNS, row, strict=True)), f"{op.name} {' '.join(case)}"
    limits = bounds().get((op.name, " ".join(case)))
    assert limits, f"aot_bounds.csv has no row for {name}: run `make kernel-tables`, then --bounds"
    for column, limit in limits.items():
        value = float(found[column])
        good = value >= limit if column == BOUNDED[0] else value <= limit
        assert good, f"{name}: {column} {value:g}, the bound in aot_bounds.csv is {limit:g}"
    rows = rows_of(op)
    if any(key[-1] == row[0] for key in rows):
        shown = rows.get((*case, row[0]))
        assert shown == row, f"{_path(op).name} is stale: run `make kernel-tables`\n{shown}\n{row}"


def ops() -> list[Op]:
    names = sorted(path.stem for path in TESTS.glob("test_aot_*.py"))
    return [importlib.import_module(name).OP for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", help="all if none is named")
    parser.add_argument("--bounds", action="store_true", help="compile nothing, write the bounds")
    arguments = parser.parse_args()
    known = ops()
    if unknown := set(arguments.ops) - {op.name for op in known}:
        parser.error(f"{min(unknown)!r} is none of {', '.join(op.name for op in known)}")
    if arguments.bounds:
        write_bounds(known)
        return
    for op in known:
        if not arguments.ops or op.name in arguments.ops:
            write(op)


if __name__ == "__main__":
    main()
