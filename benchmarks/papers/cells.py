# SPDX-License-Identifier: Apache-2.0
"""A table of a paper as named cells, and each cell as `fastrec` commands that end with a JSON file.

Runs that several cells share, such as a pre-training, are done once. A finished run is not done
again and an interrupted one is resumed, so that every command can be repeated.
"""

import argparse
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastrec.cli import main

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """A training run in the folder `name` of the output: `fastrec COMMAND FLAGS`.

    stage: that it trains. init: name of the run whose model it starts from.
    """

    name: str
    command: str
    stage: str
    flags: tuple[str, ...]
    init: str | None = None


@dataclass(frozen=True)
class Cell:
    """Runs in their order, and the flags of `fastrec evaluate` of the last one."""

    runs: tuple[Run, ...]
    flags: tuple[str, ...] = ()


def commands(cell: Cell, output: Path, seed: int, short: int | None) -> list[list[str]]:
    """The command lines of a cell, without those of runs that are finished. `{output}` in a flag
    is the folder of the data sets, `{runs}` that of the runs of this seed."""
    folder, made = folder_of(output, seed, short), []

    def filled(flags: Sequence[str]) -> list[str]:
        known = {"{runs}": str(folder), "{output}": str(output)}
        for name, path in known.items():
            flags = [flag.replace(name, path) for flag in flags]
        return [*flags]

    for run in cell.runs:
        out = folder / run.name
        if (out / "summary.json").is_file():
            continue
        line = [run.command, *filled(run.flags), f"--seed={seed}", f"--output={out}"]
        if run.command == "finetune":
            line.append(f"--task={run.stage}")
        if run.init is not None:
            line.append(f"--init={folder / run.init / 'model'}")
        if short is not None:
            line += [f"--{run.stage}.steps={short}", f"--{run.stage}.validate_every={short}"]
            line.append(f"--{run.stage}.warmup_steps=0")
        if (out / "last.ckpt").is_file():
            line.append("--resume=true")
        made.append(line)
    last = cell.runs[-1]
    result = result_of(last.name, folder)
    if not result.is_file():
        model = folder / last.name / "model"
        line = ["evaluate", *filled(cell.flags), f"--pretrained={model}", f"--task={last.stage}"]
        made.append([*line, f"--output={result}"])
    return made


def folder_of(output: Path, seed: int, short: int | None) -> Path:
    """Of the runs of a seed. A trial has one of its own: what is finished there is no result."""
    return output / (f"seed-{seed}" if short is None else f"seed-{seed}-short-{short}")


def result_of(run: str, folder: Path) -> Path:
    return folder / f"{run}.json"


def table(cells: Mapping[str, Cell], folder: Path) -> str:
    """The metrics of the finished cells, as lines of Markdown."""
    found = {}
    for name, cell in cells.items():
        file = result_of(cell.runs[-1].name, folder)
        if file.is_file():
            found[name] = json.loads(file.read_text())["metrics"]["model"]
    lines = []
    for kind in dict.fromkeys(tuple(metrics) for metrics in found.values()):
        lines += ["", f"| cell | {' | '.join(kind)} |", "|---" * (len(kind) + 1) + "|"]
        for name, metrics in found.items():
            if tuple(metrics) == kind:
                numbers = " | ".join(f"{metrics[key]:.4f}" for key in kind)
                lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines[1:])


def run_table(
    description: str,
    cells: Mapping[str, Cell],
    prepare: Callable[[Path, Path], None],
    arguments: Sequence[str] | None = None,
) -> None:
    """The command line of a table. prepare: (folder of the source, output) writes the data sets
    that are not there."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--source", type=Path, required=True, help="folder of the raw data")
    parser.add_argument("--output", type=Path, required=True, help="folder of data sets and runs")
    parser.add_argument("--cells", nargs="+", help="names, or what they begin with; all without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", type=int, help="steps of every run: a trial, beside the results")
    parser.add_argument("--list", action="store_true", help="names of the cells")
    parser.add_argument("--print", action="store_true", help="the commands, which are not run")
    parser.add_argument("--table", action="store_true", help="what is finished")
    asked = parser.parse_args(arguments)
    chosen = {
        name: cell
        for name, cell in cells.items()
        if asked.cells is None or any(name.startswith(each) for each in asked.cells)
    }
    if not chosen:
        parser.error(f"no cell begins with {asked.cells}; --list names them")
    if asked.list:
        return print("\n".join(chosen))
    if asked.table:
        return print(table(chosen, folder_of(asked.output, asked.seed, asked.short)))
    if not asked.print:
        prepare(asked.source, asked.output)
    for name, cell in chosen.items():
        began = time.perf_counter()
        for line in commands(cell, asked.output, asked.seed, asked.short):
            print("fastrec", shlex.join(line), flush=True)
            if not asked.print:
                main(line)
        print(f"# {name}: {time.perf_counter() - began:,.0f} s", flush=True)
