# SPDX-License-Identifier: Apache-2.0
"""The targets, each beside the measured rows that decide about it; printed last."""

from dataclasses import dataclass

from benchmarks.bench import Entry
from benchmarks.gpu.cases import MEASURED
from benchmarks.gpu.step import STEPS
from benchmarks.gpu.uprec import SIZES


@dataclass(frozen=True)
class Target:
    """keys: rows of the section; of a section of checks none, all rows count."""

    case: str
    goal: str
    section: str
    keys: tuple[str, ...] = ()


def _first(section: str, *numbers: int) -> tuple[str, ...]:
    entries: tuple[Entry, ...] = MEASURED[section].entries
    return tuple(entries[number].key for number in numbers)


_ALL, _CE, _RANK = "all pass", "linear_ce", "rank_topk"
TARGETS = (
    Target("attention backward on sm_90", _ALL, "attention_backward"),
    Target("budgets of all ops", _ALL, "budget"),
    Target("masks of the CPU", "the same bits", "masks"),
    Target("CUDA graphs", _ALL, "graphs"),
    Target("op tests", _ALL, "test"),
    Target("memcheck", _ALL, "sanitize"),
    Target(
        "CE 4096 x 1M x 64 bf16",
        "6.0 ms, then 4.8; no N x V buffer; 5x eager; 1.3x the fastest exact peer",
        _CE,
        _first(_CE, 0, 4),
    ),
    Target("the same, float32 table; float32", "6.5 ms; 12 ms", _CE, _first(_CE, 1, 2)),
    Target("CE 1317 x 20,033 x 64 bf16", "1.5 floors with launches", _CE, _first(_CE, 3)),
    Target("rank, top 10, 4096 x 1M x 64", "2 ms; 3 ms", _RANK, _first(_RANK, 0, 1)),
    Target(
        "attention, dropout, B 4096, L 50",
        "2x FA2 varlen; 1.5 floors",
        "attention",
        _first("attention", 0),
    ),
    Target(
        "in-batch, B 8192, without and with exclusions",
        "8x eager; 3x inf-cl; exclusions cost 10 %",
        "in_batch",
        _first("in_batch", 0, 1, 2),
    ),
    Target(
        "UPRec step in a graph",
        "5x eager; 2.5x torch.compile; 1.5x the sum of its kernels",
        "uprec_step",
        tuple(sizes.name for sizes in SIZES),
    ),
    Target(
        "masked items, a step in a graph",
        "1.5x the sum of its kernels",
        "step",
        tuple(sizes.name for sizes in STEPS),
    ),
    Target("sasrec, ml-1m to NDCG@10 .182", "minutes", "sasrec", ("ml-1m",)),
)


def _ms(found: dict) -> str:
    return f"{1e3 * found['median']:.3g} ms (10 %: {1e3 * found.get('p10', found['p20']):.3g})"


def _timed(section: str, key: str, row: dict) -> str:
    """Of an op: its time, floors, peers, memory."""
    table = row.get("implementations", {})
    ours = table.get("fastrec", {})
    main = "both" if "both" in ours else "forward"
    if main not in ours:
        return f"{key}: {ours.get('failed') or row.get('failed') or 'not measured'}"
    text = [_ms(ours[main])]
    if share := ours[main].get("floor_share"):
        text.append(f"{1 / share:.2f} floors")
    if "launched" in ours:
        text.append(f"with launches {1e3 * ours['launched']['median']:.3g} ms")
    for title, names in MEASURED[section].columns:
        ratios = [table[name]["ratio"] for name in names if "ratio" in table.get(name, {})]
        if ratios:
            text.append(f"{title} {min(ratios):.2f}x")
    if ours.get("peak_bytes") is not None:
        text.append(f"{ours['peak_bytes'] / 2**20:,.0f} MiB")
    if "clock_mhz" in row:
        text.append(f"{row['clock_mhz']} MHz")
    return f"{key}: {', '.join(text)}"


def _step(key: str, row: dict) -> str:
    parts = []
    for name, found in row.get("implementations", {"": row}).items():
        total = found.get("kernels", {}).get("seconds")
        time = _ms(found["step"]) if "step" in found else found.get("failed", "not measured")[:60]
        parts.append(f"{name} {time}" + (f", kernels {1e3 * total:.3g} ms" if total else ""))
    return f"{key}: {'; '.join(parts)}"


def _checked(rows: dict) -> str:
    bad = [key for key, row in rows.items() if "failed" in row]
    absent = sum("absent" in row for row in rows.values())
    text = f"{len(rows) - len(bad) - absent} of {len(rows)} pass"
    counted = next((row["counts"] for row in rows.values() if "counts" in row), None)
    if counted:
        text = ", ".join(f"{name.lower()} {number}" for name, number in counted.items())
    return text + (f"; failed: {', '.join(bad)[:160]}" if bad else "")


def _trained(row: dict) -> str:
    if "metrics" not in row:
        return row.get("absent") or row.get("failed") or "not measured"
    return f"{row['train_seconds'] / 60:.1f} minutes, NDCG@10 {row['metrics']['NDCG@10']:.4f}"


def lines(stored: dict) -> list[list[str]]:
    """[case, target, measured] of every target."""
    found = []
    for target in TARGETS:
        rows = stored.get("sections", {}).get(target.section, {}).get("rows", {})
        here = [(key, rows[key]) for key in target.keys if key in rows]
        if not rows or (target.keys and not here):
            measured = "not measured"
        elif not target.keys:
            measured = _checked(rows)
        elif target.section in MEASURED:
            measured = "<br>".join(_timed(target.section, *pair) for pair in here)
        elif target.section == "sasrec":
            measured = _trained(here[0][1])
        else:
            measured = "<br>".join(_step(*pair) for pair in here)
        found.append([target.case, target.goal, measured])
    return found
