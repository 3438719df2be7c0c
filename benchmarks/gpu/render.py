# SPDX-License-Identifier: Apache-2.0
"""Markdown tables from a results file of `gpu_evidence`, and the blocks of the documents.

A document takes the table of a section between `<!-- gpu:<section> -->` and `<!-- /gpu -->`.
"""

import json
import re
from pathlib import Path

from benchmarks.gpu import targets
from benchmarks.gpu.cases import MEASURED

BLOCK = re.compile(r"(<!-- gpu:(\w+) -->\n).*?(<!-- /gpu -->)", re.DOTALL)
DOCUMENTS = ("README.md", "docs/gpu.md", "docs/kernels/*.md")
UNITS = {"copy": (1e-12, "TB/s"), "exp": (1e-12, "T exponentials/s")}


def newest(folder: Path) -> Path | None:
    """The results of the fastest known device; None where no GPU has been measured."""
    for name in ("h200", "h100"):
        if (folder / f"{name}.json").exists():
            return folder / f"{name}.json"
    known = {"cpu.json", "cpu_tensors.json"}
    return next((path for path in sorted(folder.glob("*.json")) if path.name not in known), None)


def _ms(found: dict | None) -> str:
    if not found:
        return "-"
    return f"{1e3 * found['median']:.3g} ({1e3 * found['p10']:.3g})"


def _mib(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f}"


def _share(found: dict) -> str:
    share = found.get("floor_share")
    return "-" if share is None else f"{100 * share:.0f} %"


def _best(rows: dict, names: tuple[str, ...]) -> str:
    """The smallest ratio of `names`; else why there is none."""
    ratios = [rows[name]["ratio"] for name in names if "ratio" in rows.get(name, {})]
    if ratios:
        return f"{min(ratios):.2f}x"
    why = [rows[name].get("absent") or rows[name].get("failed") for name in names if name in rows]
    return (why[0] or "-")[:60] if why else "-"


def _grid(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _measured(section: str, rows: dict) -> str:
    measured = MEASURED[section]
    names = [title for title, _ in measured.columns]
    head = ["shape", "fastrec, forward, ms", "forward + backward, ms", "ps/element", "of the floor"]
    head += [*names, "peak, MiB", "output, gradient error (eager)"]
    lines = []
    for key, row in rows.items():
        found = row.get("implementations", {})
        ours, eager = found.get("fastrec", {}), found.get("eager", {})
        main = "both" if "both" in ours else "forward"
        if main not in ours:
            why = ours.get("failed") or row.get("failed") or "not measured"
            lines.append([key, why[:80], *["-"] * (len(head) - 2)])
            continue
        errors = f"{ours['output_error']:.1e}, {ours['gradient_error']:.1e}"
        if "output_error" in eager:
            errors += f" ({eager['output_error']:.1e}, {eager['gradient_error']:.1e})"
        shares = ", ".join(_share(ours[kind]) for kind in ("forward", "both") if kind in ours)
        times = [_ms(ours.get("forward")), _ms(ours.get("both"))]
        times.append(f"{ours[main]['ps_per_element']:.3g}")
        peers = [_best(found, columns) for _, columns in measured.columns]
        lines.append([key, *times, shares, *peers, _mib(ours.get("peak_bytes")), errors])
    notes = (
        "Median (10 %), device time with a cold L2 cache. Columns of peers: their time over"
        " that of fastrec, forward + backward where there is one, alternating in one process on the"
        " same inputs."
        f" Floor, from the rates of `probe`: {measured.formula}."
    )
    return f"{_grid(head, lines)}\n\n{notes}"


def _probe(rows: dict) -> str:
    lines = []
    for key, row in rows.items():
        if "rate" in row:
            scale, unit = UNITS.get(key, (1e-12, "TFLOP/s"))
            lines.append([key, f"{row['rate'] * scale:.4g} {unit}"])
        else:
            lines.append([key, ", ".join(f"{name} {value}" for name, value in row.items())])
    return _grid(["ceiling", "measured"], lines)


def _step(rows: dict) -> str:
    lines = []
    for key, row in rows.items():
        for name, found in row.get("implementations", {"-": row}).items():
            kernels = found.get("kernels", {}).get("seconds")
            time = _ms(found["step"]) if "step" in found else found.get("failed", "-")
            ratio = f"{found['ratio']:.2f}x" if "ratio" in found else "-"
            total = f"{1e3 * kernels:.3g}" if kernels else "-"
            lines.append([key, name, time, ratio, _mib(found.get("peak_bytes")), total])
    head = ["step", "implementation", "ms", "over fastrec", "peak, MiB", "sum of its kernels, ms"]
    return _grid(head, lines)


def _memory(rows: dict) -> str:
    lines = []
    for key, row in rows.items():
        if "failed" in row:
            lines.append([key, row["failed"][:60], *["-"] * 4])
            continue
        sizes = [_mib(row[name]) for name in ("peak_bytes", "gradient_bytes", "stored_bytes")]
        lines.append([key, row["element"], *sizes, _ms(row["seconds"])])
    head = ["shape", "element", "peak beyond the inputs, MiB", "of these gradients"]
    return _grid([*head, "all elements stored, MiB", "forward + backward, ms"], lines)


def _tuned(rows: dict) -> str:
    lines = [
        [key, name, _ms(found["seconds"]) if "seconds" in found else found["failed"][:80]]
        for key, row in rows.items()
        for name, found in row.get("implementations", {"-": row}).items()
    ]
    return _grid(["kernel", "configuration", "ms"], lines)


def _checked(rows: dict) -> str:
    """Counts, and every failure by name."""
    failed = {key: row["failed"] for key, row in rows.items() if "failed" in row}
    absent = {key: row["absent"] for key, row in rows.items() if "absent" in row}
    lines = [[key, why[:160]] for key, why in (failed | absent).items()]
    good = len(rows) - len(failed) - len(absent)
    text = f"{good} passed, {len(failed)} failed, {len(absent)} not possible."
    for key, row in rows.items():
        if "counts" in row:
            numbers = ", ".join(f"{name.lower()} {count}" for name, count in row["counts"].items())
            text += f" {key}: {numbers}{', ' + row['ended'] if row['ended'] else ''}."
    return f"{text}\n\n{_grid(['case', 'why'], lines)}" if lines else text


def table(stored: dict, section: str) -> str:
    """Markdown of one section, of the "targets", or of "all" that was measured."""
    if section == "targets":
        return _grid(["case", "target", "measured"], targets.lines(stored))
    if section == "all":
        names = [name for name, found in stored.get("sections", {}).items() if found["rows"]]
        parts = [f"### `{name}`\n\n{table(stored, name)}" for name in names]
        return "\n\n".join(parts) or "No GPU has been measured yet."
    found = stored.get("sections", {}).get(section)
    if not found or not found["rows"]:
        return f"No GPU has been measured in section `{section}` yet."
    rows = found["rows"]
    known = {"probe": _probe, "step": _step, "uprec_step": _step, "memory": _memory}
    if section in MEASURED:
        text = _measured(section, rows)
    elif section.startswith("tune"):
        text = _tuned(rows)
    else:
        text = known.get(section, _checked)(rows)
    machine = found["environment"]
    where = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "device")
    return f"{text}\n\n{machine['device']}, {where}, {found['date']}."


def update(root: Path, path: Path | None) -> list[str]:
    """Rewrites the blocks of the documents from the results file; names of those that have any."""
    stored = json.loads(path.read_text()) if path else {}
    if not path:
        print("no GPU has been measured: the tables say so")
    changed = []
    for pattern in DOCUMENTS:
        for document in sorted(root.glob(pattern)):
            text = document.read_text()
            fresh, count = BLOCK.subn(
                lambda block: f"{block[1]}\n{table(stored, block[2])}\n\n{block[3]}", text
            )
            if count:
                document.write_text(fresh)
                changed.append(document.name)
                print(f"{document.relative_to(root)}: {count} tables")
    return changed
