# SPDX-License-Identifier: Apache-2.0
"""What a cell of `contrastive` is worth beside SASRec, user by user, as lines of Markdown.

    python -m benchmarks.papers.differences --output runs/contrast --data beauty

HR@10 and NDCG@10 x 100 as mean and standard deviation of the seeds that have both cells; the
difference of the same users and seeds, averaged over seeds, and its standard error over users; and
the minutes of a core that one seed took to train; of a run that was resumed, since then.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.papers.cells import Cell, result_of
from benchmarks.papers.contrastive import cells

KEY = "user_id"


def gains(ranks: np.ndarray) -> np.ndarray:
    """[2, users] HR@10 and NDCG@10 of ranks that begin at 1, x 100."""
    hits = ranks <= 10
    return 100 * np.stack((hits, hits / np.log2(ranks + 1)))


def read(output: Path, name: str, seeds: list[int]) -> dict[int, np.ndarray]:
    """Gains by seed, of the seeds that are finished."""
    found = {}
    for seed in seeds:
        result = result_of(name, output, seed)
        if result.is_file():
            table = pl.read_parquet(result.with_name(f"{name}.parquet")).sort(KEY)
            found[seed] = gains(table["rank"].to_numpy())
    return found


def minutes(output: Path, cell: Cell, seed: int) -> float:
    files = [output / f"seed-{seed}" / run.name / "summary.json" for run in cell.runs]
    return sum(json.loads(file.read_text())["cpu_seconds"] for file in files) / 60


def line(name: str, own: dict, base: dict, spent: list[float]) -> str:
    seeds = sorted(own.keys() & base.keys())
    each = np.stack([own[seed] for seed in seeds])
    spread = each.mean(2).std(0, ddof=1) if len(seeds) > 1 else None
    texts = [name, " ".join(map(str, seeds))]
    for k, mean in enumerate(each.mean((0, 2))):
        texts.append(f"{mean:.2f}" + ("" if spread is None else f" ± {spread[k]:.2f}"))
    apart = (each - np.stack([base[seed] for seed in seeds])).mean(0)
    error = apart.std(1, ddof=1) / np.sqrt(apart.shape[1])
    for difference, one in zip(apart.mean(1), error, strict=True):
        texts.append(f"{difference:+.2f} ± {one:.2f}" if one else "")
    return f"| {' | '.join([*texts, f'{np.mean(spent):.1f}'])} |"


def table(output: Path, data: str, seeds: list[int]) -> str:
    lines = [
        "| cell | seeds | HR@10 | NDCG@10 | HR@10 - SASRec's | NDCG@10 - SASRec's | minutes |",
        "|---" * 7 + "|",
    ]
    base = read(output, f"{data}.sasrec", seeds)
    for name, cell in cells().items():
        own = read(output, name, seeds) if name.startswith(f"{data}.") else {}
        both = own.keys() & base.keys()
        if both:
            spent = [minutes(output, cell, seed) for seed in both]
            lines.append(line(name, own, base, spent))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="that of `contrastive`")
    parser.add_argument("--data", required=True, help="beauty, lastfm, yelp or ml-1m")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    print(table(asked.output, asked.data, asked.seeds))
