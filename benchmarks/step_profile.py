# SPDX-License-Identifier: Apache-2.0
"""Where the time of a pre-training step of UPRec goes: `python -m benchmarks.step_profile --table`.

Profiles the entries of `uprec_step` (fastrec alone), prints one table and, with --table, writes it
into docs/results/speed.md with a plot beside it (step.png).
"""

import argparse
import re
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks import uprec_step
from benchmarks.bench import ROOT, Entry
from benchmarks.run import SPEED, update

ROUNDS = 5
# Part -> how the names of its operators begin; the first that fits.
PARTS = {
    "softmax over the items": ("fastrec::linear_cross_entropy",),
    "feed-forward network": ("fastrec::gelu_ffn",),
    "attention": ("fastrec::jagged_attention",),
    "projections": ("fastrec::linear_fwd", "fastrec::linear_bwd"),
    "residual, LayerNorm, dropout": ("fastrec::dropout_add_layer_norm",),
    "embedding": ("fastrec::jagged_embedding",),
    "friends": ("fastrec::in_batch_cross_entropy",),
    "pooling": ("fastrec::jagged_max_pool",),
    "optimiser": ("aten::_fused_adamw_", "Optimizer."),
}
REST = "everything else"
# Light enough for a number, and apart for eyes that do not tell red from green.
COLOURS = ("#88ccee", "#ddcc77", "#44aa99", "#cc6677", "#999933", "#aa4499", "#bbbbbb", "#117733",
           "#ee8866", "#dddddd")  # fmt: skip
WRITTEN = 3  # per cent: narrower parts have no room for their number


def seconds(entry: Entry) -> dict[str, float]:
    """Self time of one step by part, from the mean of ROUNDS steps after two."""
    step = uprec_step.implementations(entry, "aot_eager")["fastrec"]
    inputs = uprec_step.problem(entry)
    for _ in range(2):
        step(*inputs)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(ROUNDS):
            step(*inputs)
    parts = dict.fromkeys((*PARTS, REST), 0.0)
    for event in found.key_averages():
        fits = (part for part, names in PARTS.items() if event.key.startswith(names))
        parts[next(fits, REST)] += event.self_cpu_time_total / 1e6 / ROUNDS
    return parts


def render(profiles: dict[str, dict[str, float]]) -> str:
    lines = [f"| part of a step | {' | '.join(profiles)} |", "|---" * (len(profiles) + 1) + "|"]
    totals = {key: sum(parts.values()) for key, parts in profiles.items()}
    for part in next(iter(profiles.values())):
        cells = (
            f"{1e3 * parts[part]:.1f} ms, {100 * parts[part] / totals[key]:.0f} %"
            for key, parts in profiles.items()
        )
        lines.append(f"| {part} | {' | '.join(cells)} |")
    lines.append(f"| all | {' | '.join(f'{1e3 * total:.0f} ms' for total in totals.values())} |")
    return "\n".join(lines)


def stored(page: str) -> dict[str, dict[str, float]]:
    """The profiles of the table that `render` has written into a page, in ms."""
    _, table = page.split("<!-- bench:step_profile -->")
    head, *rows, _ = re.findall(r"(?m)^\| (.*) \|$", table.split("<!-- /bench -->")[0])
    profiles: dict[str, dict[str, float]] = {key: {} for key in head.split(" | ")[1:]}
    for part, *cells in (row.split(" | ") for row in rows):
        for parts, cell in zip(profiles.values(), cells, strict=True):
            parts[part] = float(cell.split(" ms")[0])
    return profiles


def plot(profiles: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.8 * len(profiles)), layout="constrained")
    axes = figure.add_subplot()
    for row, parts in enumerate(profiles.values()):
        total, left = sum(parts.values()), 0.0
        for index, (part, taken) in enumerate(parts.items()):
            share = 100 * taken / total
            label = part if row == 0 else None
            bar = axes.barh(row, share, left=left, color=COLOURS[index], label=label)
            if share >= WRITTEN:
                axes.bar_label(bar, [f"{share:.0f}"], label_type="center", fontsize=9)
            left += share
    names = [key.replace(" float32 ", "\n") for key in profiles]
    axes.set_yticks(range(len(profiles)), names, fontsize=8)
    axes.set_xlabel("% of a step")
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: that it runs, not times")
    parser.add_argument("--table", action="store_true", help="update speed.md and step.png")
    parser.add_argument("--table-root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--render", action="store_true", help="step.png from the table alone")
    arguments = parser.parse_args()
    page = arguments.table_root / SPEED
    if arguments.render:
        return plot(stored(page.read_text()), page.with_name("step.png"))
    entries = uprec_step.SMOKE if arguments.smoke else uprec_step.ENTRIES
    profiles = {entry.key: seconds(entry) for entry in entries}
    print(render(profiles))
    if arguments.table:
        update(page, "step_profile", render(profiles))
        plot(profiles, page.with_name("step.png"))


if __name__ == "__main__":
    main()
