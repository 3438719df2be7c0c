"""Measure the operators, write the numbers as JSON, render them as tables.

python -m benchmarks.run --output benchmarks/results/cpu.json --table
python -m benchmarks.run --smoke --output /tmp/smoke.json
"""

import argparse
import datetime
import json
import os
import platform
import re
from pathlib import Path

import torch

from benchmarks.bench import ENTRIES, ROOT, SLOW, SMOKE, Entry, measure, peak_memory


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


def render(results: dict, op: str) -> str:
    """Markdown: one table per entry of `op`, with the environment below the last one."""
    parts = []
    for key, rows in results["ops"][op].items():
        lines = [
            f"**{key}**",
            "",
            "| implementation | forward, ms | forward + backward, ms | x fastrec | GFLOP/s |"
            " ps/logit | extra memory, MiB | loss error | gradient error |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            if "failed" in row:
                lines.append(f"| {name} | - | failed: {row['failed'][:60]} | | | | | | |")
                continue
            time, memory = row["both"], row.get("extra_bytes")
            lines.append(
                f"| {name} | {_milliseconds(row['forward'])} | {_milliseconds(time)} |"
                f" {row['ratio']:.2f} | {time['gflops']:.1f} | {time['ps_per_logit']:.1f} |"
                f" {'-' if memory is None else format(memory / 2**20, ',.0f')} |"
                f" {row['loss_error']:.1e} | {row['gradient_error']:.1e} |"
            )
        parts.append("\n".join(lines))
    parts.append(
        f"Median of alternating rounds (20 % to 80 % in brackets); an implementation that needs"
        f" more than {SLOW:.0f} s is called once, without a separate forward. Extra memory: peak"
        " beyond the inputs, gradients included. Errors are relative to float64: |loss error| /"
        " |loss|, max |gradient error| / max |gradient|. GFLOP/s: three products of N x V x D."
        f" {_machine(results)}"
    )
    return "\n\n".join(parts)


def _machine(results: dict) -> str:
    env = results["environment"]
    return (
        f"{env['cpu']} ({', '.join(env['flags'])}), {env['threads']} threads, torch {env['torch']},"
        f" {env['date']}."
    )


def summary(results: dict, op: str) -> str:
    """Markdown: one line per entry of `op`, fastrec against each peer at its best."""
    lines = [
        "| forward + backward | fastrec, ms | eager | `torch.compile` | torch op, default options |"
        " torch op, best chunk | extra memory | gradient error (eager) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, rows in results["ops"][op].items():
        ours, logits = rows["fastrec"], 4 * _logits(key)

        def ratio(*names, rows=rows):
            found = [rows[name]["ratio"] for name in names if "ratio" in rows.get(name, {})]
            return f"{min(found):.2f}x" if found else "-"

        memory = ours.get("extra_bytes")
        eager = rows.get("eager", {}).get("gradient_error")
        lines.append(
            f"| {key} | {_milliseconds(ours['both'])} | {ratio('eager')} | {ratio('torch.compile')}"
            f" | {ratio('torch default options')} |"
            f" {ratio(*(f'torch chunk {size}' for size in (128, 256, 512)))} |"
            f" {'-' if memory is None else format(memory / 2**20, ',.0f') + ' MiB'} of"
            f" {logits / 2**20:,.0f} | {ours['gradient_error']:.1e}"
            f" ({'-' if eager is None else format(eager, '.1e')}) |"
        )
    lines.append("")
    lines.append(
        "Ratios: time of the peer / time of fastrec, alternating in one process on the same inputs."
        " Extra memory: peak beyond the inputs, gradients included, beside the size of the float32"
        f" logits. Errors against float64. {_machine(results)}"
    )
    return "\n".join(lines)


def _logits(key: str) -> int:
    n, v = (int(re.search(rf"\b{name}=(\d+)", key)[1]) for name in "NV")  # type: ignore[index]
    return n * v


TABLES = {"README.md": summary, "docs/results.md": render}


def update(path: Path, op: str, table: str) -> bool:
    """Replace the block between the markers of `op`; False if the file has none."""
    if not path.exists():
        return False
    text = path.read_text()
    block = re.compile(rf"(<!-- bench:{op} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    changed, count = block.subn(lambda m: f"{m[1]}\n{table}\n\n{m[2]}", text)
    if count:
        path.write_text(changed)
    return count > 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=sorted({entry.op for entry in ENTRIES}))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: that it runs, not times")
    parser.add_argument("--rounds", type=int, help="instead of the rounds of each entry")
    parser.add_argument("--shape", help="only entries whose key contains this text")
    parser.add_argument("--output", type=Path, help="JSON file, merged with what it holds")
    parser.add_argument("--table", action="store_true", help=f"update {' and '.join(TABLES)}")
    parser.add_argument("--render", action="store_true", help="measure nothing, tables from output")
    parser.add_argument("--table-root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    results: dict = {"environment": environment(), "ops": {}}
    if arguments.output and arguments.output.exists():
        previous = json.loads(arguments.output.read_text())
        results["ops"] = previous["ops"]
        if arguments.render:
            results["environment"] = previous["environment"]
    for entry in () if arguments.render else SMOKE if arguments.smoke else ENTRIES:
        if arguments.op not in (None, entry.op) or (arguments.shape or "") not in entry.key:
            continue
        print(entry.key, flush=True)
        results["ops"].setdefault(entry.op, {})[entry.key] = measured(entry, arguments)
        if arguments.output:  # after every entry: an interrupted run keeps what it has
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    for op in results["ops"]:
        table = render(results, op)
        print(table)
        if arguments.table:
            for name, rendered in TABLES.items():
                if not update(arguments.table_root / name, op, rendered(results, op)):
                    print(f"{name} has no block for {op}")


def measured(entry: Entry, arguments: argparse.Namespace) -> dict:
    compiler = "aot_eager" if arguments.smoke else "inductor"  # inductor takes 20 s per shape
    rows = measure(entry, arguments.rounds, compiler)
    for name, row in rows.items():
        if "failed" in row or (arguments.smoke and name != "fastrec"):
            continue
        row["extra_bytes"] = peak_memory(entry, name)
        print(f"  {name}: {1e3 * row['both']['median']:.4g} ms", flush=True)
    return rows


if __name__ == "__main__":
    main()
