# SPDX-License-Identifier: Apache-2.0
"""The commands that write what a trained model holds: `embed`, `index` and `adapter`."""

from math import prod
from pathlib import Path
from typing import Literal

from fastrec.backend import device_of
from fastrec.cli_serve import read_ids
from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.output import check_absent, locked_file, write_table
from fastrec.evaluation.report import plot_plane
from fastrec.index import index_recall, item_index, labels_of, write_index
from fastrec.nn.pool import Pool, Pooling
from fastrec.serve import Recommender
from fastrec.serve_cold import other_catalogue
from fastrec.training.adapters import save_adapter
from fastrec.training.heads_file import trained_pool
from fastrec.training.model_folder import load_model
from fastrec.vectors import item_vectors, principal_components, user_vectors


def embed(
    data: Path,
    pretrained: Path,
    output: Path,
    what: Literal["users", "items", "queries"] = "users",
    users: Path | None = None,
    pool: Literal["max", "mean", "cls", "ur", "last", "attention", "interests"] | None = None,
    adapter: Path | None = None,
    new_items_like: str | None = None,
    plot: Path | None = None,
    color_by: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
):
    """Write vectors of users or items to a Parquet file.

    Args:
        data: folder written by `fastrec prepare`.
        pretrained: folder of a model (`RUN/model`).
        output: .parquet file with columns user_id and vector; item_id, vector and bias; or user_id
            and query.
        what: users, pooled states; items, the vectors and biases that score them; queries of users,
            whose products with the vectors of items, plus the biases, are the scores.
        users: text file with one original user id a line; all users without it.
        pool: of users: max (UPRec, eq. 8) or mean over the items, the state of a token, or of the
            last item; attention or interests, as an objective of the model has trained it; the
            state of [UR] where the model has one, else max.
        adapter: folder of `fastrec adapter`: patches and heads that the model gets.
        new_items_like: column of item attributes: items that the model does not know begin as the
            mean of known ones of the same category; without it as the mean of all.
        plot: .png file for a picture of the user vectors: their two principal components.
        color_by: column of users.parquet, an attribute, for the colours of the picture.
        overwrite: replace a file `output` or `plot`.
        device: cpu, cuda or cuda:N; auto is a GPU, or the CPU.
    """
    if output.suffix != ".parquet":
        raise ValueError(f"{output}: vectors are written to a .parquet file")
    if pool is not None and what != "users":
        raise ValueError(f"--pool has no effect on --what {what}: it is of user vectors")
    if users is not None and what == "items":
        raise ValueError("--users has no effect on --what items: all of them are written")
    _check_plot(plot, color_by, what, overwrite)
    with locked_file(output, overwrite):
        dataset = SequenceDataset.load(data)
        column = None if color_by is None else _attribute(dataset, color_by)
        # Pools and items read no user vectors.
        model = load_model(
            pretrained, dataset, same_users=what == "queries", new_items_like=new_items_like,
            adapter=adapter,
        )  # fmt: skip
        model = model.to(device_of(device))
        width = model.config.width
        other = None if what == "users" else other_catalogue(model, dataset, adapter or pretrained)
        if what == "users":
            pool = pool or ("ur" if "ur" in model.config.tokens else "max")
            how: Pooling | Pool
            if pool == "attention" or pool == "interests":
                how = trained_pool(adapter or pretrained, pool, width).to(model.device)
            else:
                how = pool
            vectors = user_vectors(model, dataset, read_ids(users), how)
            said = f"user vectors of {width} numbers, {pool} of the states"
        elif what == "items":
            vectors = item_vectors(model, dataset, other)
            said = f"item vectors of {vectors['vector'].dtype.shape[0]} numbers, with biases"
        else:
            vectors = Recommender(model, dataset, other=other).queries(read_ids(users))
            said = f"queries of {vectors['query'].dtype.shape[0]} numbers"
        if plot is not None:
            if column is not None:
                column = vectors.select("user_id").join(
                    column, on="user_id", how="left", maintain_order="left"
                )[color_by]
            plot.parent.mkdir(parents=True, exist_ok=True)
            points, shares = principal_components(vectors["vector"].to_numpy())
            plot_plane(points, shares, plot, color_by, column)
        write_table(vectors, output, overwrite)
    print(f"{output}: {len(vectors):,} {said}")
    if plot is not None:
        print(f"plot: {plot}")


def _check_plot(plot: Path | None, color_by: str | None, what: str, overwrite: bool) -> None:
    if plot is None:
        if color_by is not None:
            raise ValueError("--color_by has no effect without --plot")
        return
    if what != "users":
        raise ValueError(f"--plot has no effect on --what {what}: it is of user vectors")
    if plot.suffix != ".png":
        raise ValueError(f"{plot}: a plot is written to a .png file")
    check_absent(plot, overwrite)


def _attribute(dataset, name: str):
    """polars.DataFrame of user_id and a column of users.parquet."""
    frame = dataset.user_attributes()
    there = [column for column in frame.columns if column not in ("user", "user_id")]
    if name not in there:
        raise DataError(
            dataset.path / "users.parquet", f"column is missing; the attributes are {there}",
            column=name,
        )  # fmt: skip
    if frame[name].dtype.is_nested():
        raise DataError(
            dataset.path / "users.parquet", f"{frame[name].dtype} has no colour", column=name
        )
    return frame.select("user_id", name)


def index(
    data: Path,
    pretrained: Path,
    output: Path,
    factory: str = "Flat",
    search: str = "",
    k: int = 10,
    queries: int = 1000,
    adapter: Path | None = None,
    new_items_like: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
):
    """Write the items as an index of FAISS, and say how much of the exact answer it finds.

    Args:
        data: folder written by `fastrec prepare`.
        pretrained: folder of a model (`RUN/model`).
        output: .faiss file. Beside it, OUTPUT.parquet has the column item_id: its row i is the item
            with label i. An index is asked for vectors of `fastrec embed --what queries` with a 1
            behind them.
        factory: how to search, in the words of faiss.index_factory: Flat, HNSW32, "IVF1024,Flat".
        search: parameters of the search, in the words of faiss.ParameterSpace: nprobe=16.
        k: of recall@k, the share of the k best items that the index finds.
        queries: number of users that recall is measured on, spread over all.
        adapter: folder of `fastrec adapter`: patches and heads that the model gets.
        new_items_like: column of item attributes: items that the model does not know begin as the
            mean of known ones of the same category; without it as the mean of all.
        overwrite: replace the files.
        device: cpu, cuda or cuda:N; auto is a GPU, or the CPU.
    """
    if output.suffix != ".faiss":
        raise ValueError(f"{output}: an index is written to a .faiss file")
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    labels = labels_of(output)
    with locked_file(output, overwrite), locked_file(labels, overwrite):
        dataset = SequenceDataset.load(data)
        model = load_model(pretrained, dataset, new_items_like=new_items_like, adapter=adapter)
        model = model.to(device_of(device))
        other = other_catalogue(model, dataset, adapter or pretrained)
        made = item_index(model, dataset, factory, search, other)
        recommender, users = Recommender(model, dataset, other=other), dataset.user_ids()
        some = users[:: max(1, len(users) // queries)][:queries].tolist()
        recall = index_recall(made, recommender, recommender.queries(some), min(k, made.ntotal))
        write_index(made, output, item_vectors(model, dataset, other).select("item_id"))
    print(
        f"{output}: {made.ntotal:,} items, {factory}; {labels}: their ids by label;"
        f" recall@{recall.k} of {recall.queries:,} users, against the exact answer:"
        f" {recall.share:.4f}"
    )


def adapter(pretrained: Path, base: Path, output: Path, overwrite: bool = False):
    """Save what a task has trained beside a frozen model, without that model.

    Args:
        pretrained: folder of the trained model (`RUN/model`).
        base: folder of the model that it started from, with items and encoder frozen.
        output: folder of the adapter: `--adapter` of recommend, embed and evaluate, beside
            `--pretrained` with the base.
        overwrite: replace an adapter in `output`.
    """
    check_absent(output, overwrite)
    tensors, whole = save_adapter(output, pretrained, base)
    some = sum(prod(shape) for shape in tensors.values())
    for name, shape in tensors.items():
        print(f"{name} {shape}")
    print(
        f"{output}: {len(tensors)} tensors, {some:,} of {whole:,} parameters ({some / whole:.1%})"
    )
