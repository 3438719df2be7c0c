# SPDX-License-Identifier: Apache-2.0
"""Measure the operators, write the numbers as JSON, render them as tables.

Standard output has every implementation of an entry; docs/results/speed.md one line an entry, and
README.md the entries of HEADLINES.

python -m benchmarks.run --output benchmarks/results/cpu.json --table
python -m benchmarks.run --smoke --output smoke.json
"""

import argparse
import datetime
import gc
import json
import os
import platform
import re
from pathlib import Path

import torch

from benchmarks.bench import (
    OPS,
    ROOT,
    SLOW,
    Entry,
    entries,
    largest,
    measure,
    module,
    peak_memory,
)
from fastrec.data.output import write_text


def environment() -> dict:
    """What the numbers depend on. No host names, no paths."""
    flags, model = set(), platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("flags"):
                    flags = set(line.split())
                elif line.startswith("model name"):
                    model = line.split(":")[1].strip()
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": model,
        "flags": [flag for flag in wanted if flag in flags],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _milliseconds(values: dict | None) -> str:
    if values is None:
        return "-"
    scale = [
        f"{1e3 * values[k]:,.3g}" if values[k] < 1 else f"{1e3 * values[k]:,.0f}"
        for k in ("median", "p20", "p80")
    ]
    if values["rounds"] == 1:
        return f"{scale[0]} (one call)"
    return f"{scale[0]} ({scale[1]} to {scale[2]})"


TITLE = {"forward": "forward", "both": "forward + backward", "step": "step of training"}


def render(results: dict, op: str) -> str:
    """Markdown: one table per entry of `op`, with the environment below the last one."""
    parts = []
    element, passes = module(op).ELEMENT, module(op).PASSES
    for key, rows in results["ops"][op].items():
        lines = [
            f"**{key}**",
            "",
            f"| implementation | {' | '.join(f'{TITLE[kind]}, ms' for kind in passes)} |"
            f" x fastrec | GFLOP/s | ps/{element} | extra memory, MiB | output error |"
            " gradient error |",
            "|---" * (len(passes) + 7) + "|",
        ]
        for name, row in rows.items():
            if "failed" in row:
                lines.append(
                    f"| {name} | failed: {row['failed'][:60]} |" + " |" * (len(passes) + 5)
                )
                continue
            time, memory = row[passes[-1]], row.get("extra_bytes")
            lines.append(
                f"| {name} | {' | '.join(_milliseconds(row[kind]) for kind in passes)} |"
                f" {row['ratio']:.2f} | {time['gflops']:.1f} | {time['ps_per_element']:.1f} |"
                f" {'-' if memory is None else format(memory / 2**20, ',.0f')} |"
                f" {row['output_error']:.1e} | {row['gradient_error']:.1e} |"
            )
        parts.append("\n".join(lines))
    parts.append(
        f"Median of alternating rounds (20 % to 80 % in brackets); an implementation that needs"
        f" more than {SLOW:.0f} s is called once, without a separate forward. Extra memory: peak"
        " beyond the inputs, gradients included. Errors are relative to float64: max |error| / max"
        " |exact|. GFLOP/s: operations of the mathematical function, recomputation not counted."
        f" {_machine(results, op)}"
    )
    return "\n\n".join(parts)


def _machine(results: dict, *ops: str) -> str:
    """Processor and versions, with the days on which `ops` were measured there."""
    days: dict[str, list[str]] = {}
    for op in ops:
        env = results["environments"][op]
        where = f"{env['cpu']} ({', '.join(env['flags'])}), {env['threads']} threads"
        days.setdefault(f"{where}, torch {env['torch']}", []).append(env["date"])
    return " ".join(f"{where}, {', '.join(sorted(set(found)))}." for where, found in days.items())


def summary(results: dict, op: str) -> str:
    """Markdown: one line per entry of `op`, fastrec against each peer at its best."""
    peers, main = module(op).PEERS, module(op).PASSES[-1]
    lines = [
        f"| {TITLE[main]} | fastrec, ms | GFLOP/s | {' | '.join(peers)} | extra memory |"
        f" output, gradient error ({next(iter(peers))}) |",
        "|---" * (len(peers) + 5) + "|",
    ]
    for key, rows in results["ops"][op].items():
        ours, peer = rows["fastrec"], rows.get(next(iter(peers.values()))[0], {})

        def ratio(names, rows=rows):
            found = [rows[name]["ratio"] for name in names if "ratio" in rows.get(name, {})]
            return f"{min(found):.2f}x" if found else "-"

        def errors(row):
            kinds = ("output_error", "gradient_error")
            return ", ".join(f"{row[kind]:.1e}" if kind in row else "-" for kind in kinds)

        memory, plain = ours.get("extra_bytes"), ours["materialised"] / 2**20
        lines.append(
            f"| {key} | {_milliseconds(ours[main])} | {ours[main]['gflops']:.1f} |"
            f" {' | '.join(map(ratio, peers.values()))} |"
            f" {'-' if memory is None else format(memory / 2**20, ',.0f')} MiB"
            f" (stored {plain:,.0f}) | {errors(ours)} ({errors(peer)}) |"
        )
    stored = getattr(module(op), "STORED", f"{module(op).ELEMENT}s")
    lines.append("")
    lines.append(
        "Ratios: time of the peer / time of fastrec, alternating in one process on the same inputs."
        f" Extra memory: peak beyond the inputs, gradients included; in brackets the size of the"
        f" {stored}, which a plain implementation stores. Errors against float64."
        f" {_machine(results, op)}"
    )
    return "\n".join(lines)


# Rows of the README: (op, entry), the smallest problem included.
HEADLINES = (
    ("linear_cross_entropy", "N=2560 V=141939 D=64 float32 flat"),
    ("linear_cross_entropy", "N=64 V=1000 D=64 float32 flat"),
    ("linear_rank", "N=512 V=141939 D=64 float32"),
    ("in_batch_cross_entropy", "B=8192 D=64 float32 weighted_l2 lists"),
    ("jagged_attention", "B=768 N=30 H=2 D=32 float32 yelp"),
    ("uprec_step", "B=768 L=30 V=20033 D=64 U=30431 float32 Yelp sizes"),
)


def unmeasured(results: dict) -> list[str]:
    """The entries of HEADLINES that `results` lacks."""
    return [f"{op} {key}" for op, key in HEADLINES if key not in results["ops"].get(op, {})]


def headlines(results: dict) -> str:
    """Markdown: the entries of HEADLINES, against eager and the compiler."""
    lines = [
        "| op | sizes | fastrec, ms | eager | `torch.compile` | extra memory (stored by eager)"
        " | error (eager) |",
        "|---" * 7 + "|",
    ]
    for op, key in HEADLINES:
        rows = results["ops"][op][key]
        eager = rows.get(next(iter(module(op).PEERS.values()))[0], {})
        ours, main = rows["fastrec"], module(op).PASSES[-1]

        def ratio(row):
            return f"{row['ratio']:.2f}x" if "ratio" in row else "-"

        def error(row):
            kinds = ("output_error", "gradient_error")
            return f"{largest(row[kind] for kind in kinds):.1e}" if kinds[0] in row else "-"

        memory, plain = ours.get("extra_bytes"), ours["materialised"] / 2**20
        lines.append(
            f"| `{op}`, {TITLE[main]} | {key.replace(' float32', '')} |"
            f" {_milliseconds(ours[main]).partition(' (')[0]} | {ratio(eager)} |"
            f" {ratio(rows.get('torch.compile', {}))} |"
            f" {'-' if memory is None else format(memory / 2**20, ',.0f')} MiB ({plain:,.0f}) |"
            f" {error(ours)} ({error(eager)}) |"
        )
    note = "float32. Ratios: time of the peer / time of fastrec."
    lines += ["", note, _machine(results, *(op for op, _ in HEADLINES))]
    return "\n".join(lines)


SPEED, README = Path("docs", "results", "speed.md"), Path("README.md")


def update(path: Path, name: str, table: str) -> bool:
    """Replace the block between the markers of `name`; False if the file has none."""
    if not path.exists():
        return False
    text = path.read_text()
    block = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    changed, count = block.subn(lambda m: f"{m[1]}\n{table}\n\n{m[2]}", text)
    if count:
        path.write_text(changed)
    return count > 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: that it runs, not times")
    parser.add_argument("--rounds", type=int, help="instead of the rounds of each entry")
    parser.add_argument("--shape", help="only entries whose key contains this text")
    parser.add_argument("--output", type=Path, help="JSON file, merged with what it holds")
    parser.add_argument(
        "--table", action="store_true", help=f"update {README} and {SPEED} from what --output holds"
    )
    parser.add_argument("--render", action="store_true", help="measure nothing, tables from output")
    parser.add_argument("--table-root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.table and arguments.output is None:
        parser.error("--table needs --output: the tables are of all that was measured")
    if arguments.table and arguments.smoke and arguments.table_root is None:
        parser.error("--table is not for --smoke, whose times are no results")
    results: dict = {"environments": {}, "ops": {}}
    if arguments.output and arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    kept, shape = entries("SMOKE" if arguments.smoke else "ENTRIES"), arguments.shape or ""
    chosen = [e for e in kept if arguments.op in (None, e.op) and shape in e.key]
    if not chosen:
        known = [e.key for e in kept if arguments.op in (None, e.op)]
        parser.error(f"no entry contains {shape!r}; there are: {', '.join(known)}")
    for entry in () if arguments.render else chosen:
        print(entry.key, flush=True)
        weighed = not arguments.smoke or entry is chosen[0]  # a process each, of seconds
        results["ops"].setdefault(entry.op, {})[entry.key] = measured(entry, arguments, weighed)
        results["environments"][entry.op] = environment()
        if arguments.output:  # after every entry: an interrupted run keeps what it has
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            write_text(arguments.output, json.dumps(results, indent=1) + "\n")
    for op in results["ops"]:
        print(render(results, op))
    if arguments.table:
        write_tables(results, arguments.table_root or ROOT)


def write_tables(results: dict, root: Path) -> None:
    tables = {(SPEED, op): summary(results, op) for op in results["ops"]}
    if missing := unmeasured(results):
        print(f"{README} keeps its table: not measured are {', '.join(missing)}")
    else:
        tables[README, "headlines"] = headlines(results)
    for (path, name), table in tables.items():
        if not update(root / path, name, table):
            print(f"{path} has no block for {name}")


def measured(entry: Entry, arguments: argparse.Namespace, weighed: bool) -> dict:
    """What `measure` gives, with the sizes in bytes. weighed: the peak memory too; of a smoke run
    that of fastrec alone."""
    compiler = "aot_eager" if arguments.smoke else "inductor"  # inductor takes 20 s per shape
    if arguments.smoke:  # a collection between two calls walks all that was imported: 0.2 s
        gc.freeze()
    rows = measure(entry, arguments.rounds, compiler)
    rows["fastrec"]["materialised"] = module(entry.op).work(entry)["materialised"]
    for name, row in rows.items():
        if "failed" in row:
            continue
        if weighed and (name == "fastrec" or not arguments.smoke):
            row["extra_bytes"] = peak_memory(entry, name)
        print(f"  {name}: {1e3 * row[module(entry.op).PASSES[-1]]['median']:.4g} ms", flush=True)
    return rows


if __name__ == "__main__":
    main()
    gc.unfreeze()  # or Triton's bindings complain of leaks at the end
