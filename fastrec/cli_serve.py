# SPDX-License-Identifier: Apache-2.0
"""The commands that ask a trained model: `embed`, `recommend`, `similar`, `index`; `adapter`."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal

from fastrec.backend import device_of
from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.output import (
    check_absent,
    check_table_path,
    locked_file,
    write_parts,
    write_table,
)
from fastrec.data.prepare.text import read_lines
from fastrec.evaluation.blocks import row_blocks
from fastrec.evaluation.report import plot_plane
from fastrec.index import index_recall, item_index, labels_of, write_index
from fastrec.nn.pool import Pool, Pooling
from fastrec.serve import Recommender
from fastrec.serve_cold import OtherCatalogue, judges_cold_start
from fastrec.training.adapters import save_adapter
from fastrec.training.model_folder import load_model, trained_pool
from fastrec.vectors import item_vectors, principal_components, user_vectors

USERS = 1 << 16  # whose recommendations are in memory at a time


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
        other = None if what == "users" else _other(model, dataset, adapter or pretrained)
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


def _other(model, dataset, folder: Path) -> OtherCatalogue | None:
    """The catalogue that a model was trained for, last; None for its own items."""
    return OtherCatalogue(folder, model, dataset) if judges_cold_start(model) else None


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


def recommend(
    data: Path,
    pretrained: Path,
    output: Path,
    users: Path | None = None,
    histories: Path | None = None,
    part: str | None = None,
    k: int = 10,
    seen: Literal["exclude", "none"] = "exclude",
    logit_adjustment: float = 0.0,
    allowed: Path | None = None,
    blocked: Path | None = None,
    adapter: Path | None = None,
    new_items_like: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
):
    """Write the k best next items of each user, in the ids of the original data; of a model that
    was trained for cold start, items of the other catalogue.

    Args:
        data: folder written by `fastrec prepare`.
        pretrained: folder of a model (`RUN/model`).
        output: .csv or .parquet file with columns user_id, rank, item_id, score.
        users: text file with one original user id a line; all users without it.
        histories: JSON lines in place of users of the data set: a list of original item ids a line,
            oldest first; their user_id is the number of the line, from 0. Items that the model does
            not know are left out and counted.
        part: 2/8 for the second eighth of the users, in their order: each of several processes or
            machines writes a file of its own.
        k: items a user.
        seen: leave out or keep the items that a user already has, in the other catalogue if these
            are recommended.
        logit_adjustment: what is taken from a score is this times the log of the item's share of
            the training events; with 1, items are ranked by how much likelier the user makes them.
        allowed: text file with one original item id a line; only these are scored.
        blocked: the same; these are never recommended.
        adapter: folder of `fastrec adapter`: patches and heads that the model gets.
        new_items_like: column of item attributes: items that the model does not know begin as the
            mean of known ones of the same category; without it as the mean of all.
        overwrite: replace a file `output`.
        device: cpu, cuda or cuda:N; auto is a GPU, or the CPU.
    """
    check_table_path(output)
    if users is not None and histories is not None:
        raise ValueError("recommend takes --users or --histories, not both")
    if part is not None and histories is not None:
        raise ValueError("--part is of users, not of --histories")
    with locked_file(output, overwrite):
        dataset = SequenceDataset.load(data)
        asked, given = read_ids(users), read_histories(histories)
        some, never = read_ids(allowed), read_ids(blocked)
        model = load_model(
            pretrained, dataset, same_users=histories is None, new_items_like=new_items_like,
            adapter=adapter,
        ).to(device_of(device))  # fmt: skip
        other = _other(model, dataset, adapter or pretrained)
        recommender = Recommender(model, dataset, other=other)
        ask = partial(
            recommender.recommend, k, seen=seen, logit_adjustment=logit_adjustment, allowed=some,
            blocked=never,
        )  # fmt: skip
        parts: Iterable
        if given is None:
            recommender.check_users(asked)  # of all parts, before any work
            everyone = _part_of(dataset.user_ids().tolist() if asked is None else asked, part)
            blocks = row_blocks(len(everyone), USERS)
            parts = (ask(everyone[block]) for block in blocks)
            if not blocks:  # a part without users is a table without rows
                parts = [ask(dataset.user_ids()[:1].tolist()).clear()]
        else:
            everyone, parts = given, [ask(histories=given)]
        counts: list[tuple[int, int]] = []
        write_parts(_counted(parts, counts), output, overwrite)
    rows, found = map(sum, zip(*counts, strict=True))
    who = "users" if histories is None else "histories"
    said = f"items of {'their history' if who == 'users' else 'the history'} "
    said = said if other is None else "of the other catalogue, those that they have there "
    said += "left out" if seen == "exclude" else "included"
    if some is not None:
        said += f", {len(set(some)):,} items allowed"
    if never is not None:
        said += f", {len(set(never)):,} blocked"
    print(
        f"{output}: {rows:,} rows, the {k} best items of {found:,} of {len(everyone):,} {who},"
        f" {said}"
    )


def _counted(frames: Iterable, counts: list[tuple[int, int]]) -> Iterator:
    """The frames, after (rows, users) of each was appended to `counts`."""
    for frame in frames:
        counts.append((len(frame), frame["user_id"].n_unique()))
        yield frame


def _part_of(users: Sequence, part: str | None) -> Sequence:
    """Those of `users` that are meant by "2/8"."""
    if part is None:
        return users
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", part)
    number, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= of:
        raise ValueError(f"part must be like 2/8, from 1/8 to 8/8, got {part!r}")
    return users[len(users) * (number - 1) // of : len(users) * number // of]


def similar(
    data: Path,
    pretrained: Path,
    output: Path,
    items: Path | None = None,
    k: int = 10,
    new_items_like: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
):
    """Write the k most similar items of each item: the cosine of item vectors.

    Args:
        data: folder written by `fastrec prepare`.
        pretrained: folder of a model (`RUN/model`).
        output: .csv or .parquet file with columns item_id, rank, similar_item_id, score.
        items: text file with one original item id a line; all items without it.
        k: similar items of an item, which is none of its own.
        new_items_like: column of item attributes: items that the model does not know begin as the
            mean of known ones of the same category; without it as the mean of all.
        overwrite: replace a file `output`.
        device: cpu, cuda or cuda:N; auto is a GPU, or the CPU.
    """
    check_table_path(output)
    with locked_file(output, overwrite):
        dataset = SequenceDataset.load(data)
        asked = read_ids(items)
        model = load_model(pretrained, dataset, same_users=False, new_items_like=new_items_like).to(
            device_of(device)
        )
        best = Recommender(model, dataset).similar(asked, k)
        write_table(best, output, overwrite)
    count = dataset.num_items if asked is None else len(asked)
    print(f"{output}: {len(best):,} rows, the {k} most similar items of {count:,} items")


def index(
    data: Path,
    pretrained: Path,
    output: Path,
    factory: str = "Flat",
    search: str = "",
    k: int = 10,
    queries: int = 1000,
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
        k: items a user of whom the share that is found is said.
        queries: users, spread over all, whose answers are compared.
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
        model = load_model(pretrained, dataset, new_items_like=new_items_like).to(device_of(device))
        other = _other(model, dataset, pretrained)
        made = item_index(model, dataset, factory, search, other)
        recommender, users = Recommender(model, dataset, other=other), dataset.user_ids()
        some = users[:: max(1, len(users) // queries)][:queries].tolist()
        recall = index_recall(made, recommender, recommender.queries(some), k)
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


def read_ids(path: Path | None) -> list[str] | None:
    """The ids of a text file, one a line as it stands, blanks included, without empty lines; None
    for no file."""
    if path is None:
        return None
    return [line.removesuffix("\r") for line in read_lines(path) if line.strip()]


def read_histories(path: Path | None) -> Sequence[Sequence[int | str]] | None:
    """The lists of a file of JSON lines; None for no file. Raises DataError that names the line
    that is no list of texts and integers."""
    if path is None:
        return None
    histories = []
    for row, line in enumerate(read_lines(path), 1):
        try:
            history = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(path, f"no JSON: {error}", row=row) from None
        if not isinstance(history, list) or not all(type(each) in (int, str) for each in history):
            raise DataError(path, f"expected a list of item ids, got {line}", row=row)
        histories.append(history)
    return histories
