# SPDX-License-Identifier: Apache-2.0
"""What a trained model knows as vectors: of users, and of items."""

import numpy as np
import torch

from fastrec.data.ids import Ids, listed
from fastrec.evaluation.blocks import finite, row_blocks
from fastrec.evaluation.next_item import check_model, check_scores
from fastrec.nn.pool import Pool, Pooling


def user_vectors(model, dataset, user_ids=None, pool: Pooling | Pool = "max"):
    """User vectors: pooled states of the last `max_len` items of the history ("max": UPRec, eq. 8).
    pool: one with parameters is a module, of `training.heads_file.trained_pool`.

    Returns a polars frame: user_id, vector (array of D float32).

    Raises ValueError for a data set with other items, for users that are not in it, for a pool that
    the model does not have, and for vectors that are not finite.
    """
    import polars

    check_model(model)
    model.check_items(dataset)
    pooled = pool if isinstance(pool, Pool) else Pool(pool, model.config.width)
    if pooled is not pool and next(pooled.parameters(), None) is not None:
        raise ValueError(f"pool {pool!r} has parameters: give the module of trained_pool")
    users = Ids(dataset.user_ids())
    indices, vectors = user_rows(users, user_ids), []
    with torch.no_grad():
        for rows in row_blocks(len(indices)):
            batch = model.inputs(dataset, torch.as_tensor(indices[rows], device="cpu"), "all")
            encoded = model.encode(batch.to(model.device))
            vectors.append(finite(pooled(model, encoded).float().cpu(), "user vectors"))
    return polars.DataFrame({"user_id": users.take(indices), "vector": torch.cat(vectors).numpy()})


def item_vectors(model, dataset, other=None):
    """What scores items: the score of an item for the query q of a user or a history
    (`Recommender.queries`) is q . vector + bias. other: `fastrec.OtherCatalogue`: its items.

    Returns a polars frame with a row per item, in their order: item_id, vector (array of D float32,
    of a head's own table D + user_width), bias (float32).

    Raises ValueError for a data set with other items, for a model whose scores of items were never
    trained, and for vectors that are not finite.
    """
    import polars

    check_model(model)
    model.check_items(dataset)
    if other is None:
        check_scores(model)
        ids, table, bias = dataset.item_ids(), model.item_table, model.item_head.bias
    else:
        table, bias = other.table, other.bias
        ids = other.ids.take(np.arange(len(table)))
    table = finite(table.detach().float().cpu(), "item vectors")
    bias = finite(bias.detach().float().cpu(), "biases")
    return polars.DataFrame({"item_id": ids, "vector": table.numpy(), "bias": bias.numpy()})


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [N, 2], shares of the variance [2]): vectors [N, D] along their two directions of
    largest variance, centred. The largest entry of a direction is positive, so that a picture does
    not depend on a sign.

    Raises ValueError for fewer than 2 vectors, or 2 numbers a vector.
    """
    if min(vectors.shape) < 2:
        raise ValueError(f"a plane needs 2 vectors of 2 numbers, got {list(vectors.shape)}")
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    variance, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    directions = directions[:, [-1, -2]]
    largest = np.abs(directions).argmax(0)
    directions = directions * np.where(directions[largest, [0, 1]] < 0, -1.0, 1.0)
    whole = max(variance.clip(min=0).sum(), np.finfo(np.float64).tiny)
    return centred @ directions, variance[[-1, -2]].clip(min=0) / whole


def user_rows(users: Ids, asked) -> np.ndarray:
    """Rows of the users that are asked about by their original ids; all for None. Raises ValueError
    for ids that are not known, and for none."""
    if asked is None:
        return np.arange(len(users))
    asked = listed(asked)
    if not asked:
        raise ValueError("the list of users is empty")
    return users.rows(asked, "users")
