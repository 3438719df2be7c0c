# SPDX-License-Identifier: Apache-2.0
"""Results for people: the metrics table and the plots."""

import csv
from pathlib import Path

import numpy as np

from fastrec.data.output import new_file

_CLASSES = 10  # colours that are told apart
_DRAWN = 20_000  # points of a picture


def print_metrics(
    rows: dict[str, dict[str, float]],
    title: str | None = None,
    scale: int = 100,
    digits: int = 2,
) -> None:
    """A table with one line a model, metrics times `scale`."""
    metrics = list(next(iter(rows.values())))
    print_table(
        [f"x {scale}" if scale != 1 else "", *metrics],
        {
            name: [f"{scale * values[metric]:.{digits}f}" for metric in metrics]
            for name, values in rows.items()
        },
        title,
    )


def print_table(header: list[str], rows: dict[str, list[str]], title: str | None = None) -> None:
    """A table of texts, the first column to the left."""
    from rich.console import Console
    from rich.table import Table

    table = Table(header[0], title=title)
    for name in header[1:]:
        table.add_column(name, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console(width=max(110, 12 * len(header))).print(table)  # no name of a metric is cut


def _axes(title: str, xlabel: str, ylabel: str):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _finish(figure, axes, path: Path) -> None:
    import matplotlib.pyplot as plt

    axes.legend()
    with new_file(path) as work:
        figure.savefig(work, dpi=120)
    plt.close(figure)


def plot_losses(runs: dict[str, Path], path: Path) -> None:
    """Training loss by step of each run folder (its `metrics/version_*/metrics.csv`), as PNG."""
    figure, axes = _axes("Training loss", "step", "cross-entropy (nats)")
    for name, folder in runs.items():
        points: dict[int, float] = {}
        for version in sorted(folder.glob("metrics/version_*/metrics.csv")):
            with open(version, newline="") as file:
                for row in csv.DictReader(file):
                    if row["train_loss"]:  # a resumed run repeats some steps
                        points[int(row["step"])] = float(row["train_loss"])
        steps = sorted(points)
        axes.plot(steps, [points[step] for step in steps], label=name, linewidth=1)
    _finish(figure, axes, path)


def plot_by_length(lengths: np.ndarray, ranks: dict[str, np.ndarray], path: Path) -> None:
    """NDCG@10 in groups of users of equal size by sequence length, as PNG.

    lengths: int64 [U] number of input events; ranks: model name to float64 [U].
    """
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, 7)).round().astype(int))
    groups = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(0, len(edges) - 2))
    present = np.unique(groups)
    labels = [
        f"{lengths[groups == group].min()}-{lengths[groups == group].max()}" for group in present
    ]
    figure, axes = _axes("NDCG@10 by sequence length", "events of the user", "NDCG@10")
    for name, values in ranks.items():
        gain = np.where(values <= 10, 1 / np.log2(values + 1), 0.0)
        axes.plot(labels, [gain[groups == group].mean() for group in present], "o-", label=name)
    _finish(figure, axes, path)


def plot_sweep(key: str, results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """NDCG of the largest cutoff and MRR by the values of a recipe key, as PNG; bars are standard
    deviations.

    results: metrics of the runs of each value.
    """
    figure, axes = _axes(f"Test metrics by {key}", key, "x 100")
    names = list(next(iter(results.values()))[0])
    cutoffs = [int(name.removeprefix("NDCG@")) for name in names if name.startswith("NDCG@")]
    for metric in [*(f"NDCG@{k}" for k in sorted(cutoffs)[-1:]), "MRR"]:
        runs = [np.array([100 * run[metric] for run in results[value]]) for value in results]
        deviations = [run.std(ddof=1) if len(run) > 1 else 0.0 for run in runs]
        axes.errorbar(
            list(results), [run.mean() for run in runs], deviations, fmt="o-", label=metric
        )
    _finish(figure, axes, path)


def plot_plane(
    points: np.ndarray, shares: np.ndarray, path: Path, name: str | None = None, column=None
) -> None:
    """Users in the plane of their two principal components, as PNG, coloured by an attribute: a
    scale for numbers with more than `_CLASSES` values, else a colour for each of the most frequent
    values. Of many users a part is drawn at random.

    points: [U, 2]; shares: of the variance, [2]; column: polars.Series [U] of the attribute `name`;
    users without a value are grey.
    """
    figure, axes = _axes(
        "User vectors" + (f" by {name}" if name else ""),
        f"first component ({100 * shares[0]:.0f} % of the variance)",
        f"second component ({100 * shares[1]:.0f} %)",
    )
    drawn = np.arange(len(points))
    if len(points) > _DRAWN:
        drawn = np.sort(np.random.default_rng(0).permutation(len(points))[:_DRAWN])
    x, y = points[drawn].T
    style = {"s": 6, "linewidths": 0}
    if column is None:
        axes.scatter(x, y, label=f"{len(drawn):,} of {len(points):,} users", **style)
        return _finish(figure, axes, path)
    column = column.gather(drawn)
    column = column.fill_nan(None) if column.dtype.is_float() else column
    known = column.is_not_null().to_numpy()
    if not known.all():
        axes.scatter(x[~known], y[~known], color="0.8", label="unknown", **style)
    values = column.drop_nulls()
    if column.dtype.is_numeric() and values.n_unique() > _CLASSES:
        values = values.to_numpy().astype(np.float64)
        shown = axes.scatter(x[known], y[known], c=values, cmap="viridis", label="known", **style)
        figure.colorbar(shown, label=name)
    else:
        counts = values.alias("value").value_counts(name="number")
        counts = counts.sort(["number", "value"], descending=[True, False])["value"]
        texts, top = column.cast(str).to_numpy(), counts.head(_CLASSES - 1).cast(str).to_list()
        rest = known & ~np.isin(texts, top)
        if rest.any():
            axes.scatter(x[rest], y[rest], color="0.5", label="other", **style)
        for place, value in enumerate(top):
            own = texts == value
            axes.scatter(x[own], y[own], color=f"C{place}", label=value, **style)
    _finish(figure, axes, path)
