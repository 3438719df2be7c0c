# SPDX-License-Identifier: Apache-2.0
"""The items of a trained model as an index of FAISS, and how much of the exact answer it finds.

Legend: N queries, V items, D width of an item vector, k results a query.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastrec.data.output import new_file
from fastrec.ops.linear_topk import linear_topk
from fastrec.vectors import item_vectors


class Recall(NamedTuple):
    """share: of the k best items of a query, those that the index finds; k and N."""

    share: float
    k: int
    queries: int


def item_index(model, dataset, factory: str = "Flat", search: str = "", other=None):
    """The faiss.Index whose inner products with `index_queries` are the scores of a model: the bias
    of an item is one more number of its vector. Its labels are rows of `item_vectors`, which for a
    model's own items are those of `dataset.item_ids()`. It needs the package faiss
    (`pip install 'fastrec[faiss]'`).

    Args:
        factory: how to search, in the words of `faiss.index_factory`: "Flat" compares all items,
            "HNSW32" walks a graph, "IVF1024,Flat" looks into some of 1,024 cells. All but the first
            miss some items; an index that is trained is trained on all vectors.
        search: parameters of the search, in the words of `faiss.ParameterSpace`: "nprobe=16",
            "efSearch=128".
        other: `fastrec.OtherCatalogue`: its items, for the queries of a `Recommender` with it.

    Raises ModuleNotFoundError without faiss, and ValueError for a data set with other items and, in
    the words of FAISS, for a factory or parameters that it does not know.
    """
    faiss = _faiss()
    items = item_vectors(model, dataset, other)
    vectors = np.column_stack([items["vector"].to_numpy(), items["bias"].to_numpy()])
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        if search:
            faiss.ParameterSpace().set_index_parameters(index, search)
    except RuntimeError as error:
        asked = f"{factory!r}, {search!r}" if search else repr(factory)
        raise ValueError(f"an index {asked} of {len(vectors):,} items: {_said(error)}") from None
    return index


def index_queries(queries) -> np.ndarray:
    """float32 [N, D + 1], what an index of `item_index` is asked: the frame of
    `Recommender.queries`, with the 1 that the bias is multiplied with."""
    return np.pad(queries["query"].to_numpy(), ((0, 0), (0, 1)), constant_values=1)


def index_recall(index, recommender, queries, k: int = 10) -> Recall:
    """What an index of `item_index` finds of the exact answer of a `Recommender`, seen items
    included. queries: a frame of `Recommender.queries`.

    Raises ValueError for a wrong k.
    """
    items, bias = recommender.scoring
    if not 1 <= k <= len(items):
        raise ValueError(f"k must be from 1 to {len(items)}, the items, got {k}")
    asked = index_queries(queries)
    _, found = index.search(asked, k)
    query = torch.from_numpy(asked[:, :-1]).to(items)
    exact = linear_topk(query, items, k, linear_bias=bias).indices.cpu().numpy()
    both = [len(np.intersect1d(one, other)) for one, other in zip(found, exact, strict=True)]
    return Recall(sum(both) / max(1, exact.size), k, len(exact))


def write_index(index, path: Path | str, labels) -> None:
    """`faiss.write_index`, and `labels`, a frame with a row per label, as PATH.parquet.

    Both are complete or not there, and a process that is killed leaves no index beside the labels
    of another.
    """
    path = Path(path)
    with new_file(path) as work:
        _faiss().write_index(index, str(work))
        with new_file(labels_of(path)) as named:
            labels.write_parquet(named, compression="zstd")
            path.resolve().unlink(missing_ok=True)  # until both are in place there is none


def labels_of(path: Path) -> Path:
    """The file of the labels of an index."""
    return path.with_name(path.name + ".parquet")


def _faiss():
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "an index needs the package faiss: pip install 'fastrec[faiss]'"
        ) from error
    return faiss


def _said(error: RuntimeError) -> str:
    """The message of a C++ exception, without the place that threw it."""
    return re.sub(r"^Error in .*?\.(cpp|h):\d+: (Error: )?", "", str(error))
