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

from benchmarks.papers.cells import Cell, folder_of, result_of
from benchmarks.papers.contrastive import DATA, cells

KEY = "user_id"


def gains(ranks: np.ndarray) -> np.ndarray:
    """[2, users] HR@10 and NDCG@10 of ranks that begin at 1, x 100."""
    hits = ranks <= 10
    return 100 * np.stack((hits, hits / np.log2(ranks + 1)))


def read(folders: dict[int, Path], name: str) -> dict[int, np.ndarray]:
    """Gains by seed, of the seeds that are finished."""
    found = {}
    for seed, folder in folders.items():
        result = result_of(name, folder)
        if result.is_file():
            table = pl.read_parquet(result.with_name(f"{name}.parquet")).sort(KEY)
            found[seed] = gains(table["rank"].to_numpy())
    return found


def minutes(folder: Path, cell: Cell) -> float:
    files = [folder / run.name / "summary.json" for run in cell.runs]
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


def table(folders: dict[int, Path], data: str) -> str:
    """folders: of the runs, by seed."""
    lines = [
        "| cell | seeds | HR@10 | NDCG@10 | HR@10 - SASRec's | NDCG@10 - SASRec's | minutes |",
        "|---" * 7 + "|",
    ]
    base = read(folders, f"{data}.sasrec")
    for name, cell in cells().items():
        own = read(folders, name) if name.startswith(f"{data}.") else {}
        both = own.keys() & base.keys()
        if both:
            spent = [minutes(folders[seed], cell) for seed in both]
            lines.append(line(name, own, base, spent))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="that of `contrastive`")
    parser.add_argument("--data", required=True, choices=DATA)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--short", type=int, help="of the trials of so many steps")
    asked = parser.parse_args(arguments)
    folders = {seed: folder_of(asked.output, seed, asked.short) for seed in asked.seeds}
    print(table(folders, asked.data))


if __name__ == "__main__":
    main()
