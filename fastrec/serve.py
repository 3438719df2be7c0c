"""What a trained model is for: user vectors and ranked recommendations, in original ids.

Legend: U users, D width, k recommendations a user.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastrec.data.batch import JaggedBatch
from fastrec.evaluation.next_item import adjustment, row_blocks, seen_items
from fastrec.nn.pool import Pooling
from fastrec.ops.linear_topk import linear_topk


def _indices(known, ids, what: str) -> np.ndarray:
    """Row numbers of original ids. Raises ValueError for an unknown id."""
    if len(ids) == 0:
        raise ValueError(f"the list of {what}s is empty")
    row = {str(each): index for index, each in enumerate(known.tolist())}
    unknown = [each for each in ids if str(each) not in row]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(ids)} {what}s are not in the data set, the first is"
            f" {unknown[0]!r}"
        )
    return np.array([row[str(each)] for each in ids])


def _users(dataset, user_ids) -> np.ndarray:
    """Row numbers of original user ids; all users for None."""
    if user_ids is None:
        return np.arange(dataset.num_users)
    return _indices(dataset.user_ids(), user_ids, "user")


def user_vectors(model, dataset, user_ids=None, pool: Pooling = "max"):
    """User vectors: pooled states of the last `max_len` items of the history ("max": UPRec, eq. 8).

    Returns a polars frame: user_id, vector (array of D float32).
    """
    import polars

    indices, vectors = _users(dataset, user_ids), []
    with torch.no_grad():
        for rows in row_blocks(len(indices)):
            batch = model.inputs(dataset, torch.as_tensor(indices[rows], device="cpu"), "all")
            encoded = model.encode(batch.to(model.item_table.device))
            vectors.append(_finite(model.pool(encoded, pool).float().cpu(), "user vectors"))
    ids = dataset.user_ids()[indices]
    return polars.DataFrame({"user_id": ids, "vector": torch.cat(vectors).numpy()})


def recommend(
    model,
    dataset,
    k: int,
    user_ids=None,
    seen: str = "exclude",
    logit_adjustment: float = 0.0,
    histories: Sequence[Sequence] | None = None,
):
    """The k best next items of each user, given the most recent items of the history.

    seen: "exclude" leaves out items that the user already has, "none" keeps them.
    logit_adjustment: tau of `adjustment`: above 0 popular items fall.
    histories: lists of original item ids, oldest first, in place of users of the data set; their
        user_id is their place in the list. A model that reads ratings or time gaps sees none there.

    Returns a polars frame: user_id, rank (from 1), item_id, score; fewer than k rows for a user
    with fewer than k items left.
    """
    import polars

    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if seen not in ("exclude", "none"):
        raise ValueError(f"seen must be 'exclude' or 'none', got {seen!r}")
    if histories is not None and user_ids is not None:
        raise ValueError("recommend takes user_ids or histories, not both")
    item_ids, table = dataset.item_ids(), model.item_table
    if histories is None:
        indices = _users(dataset, user_ids)
        known = dataset.user_ids()[indices]
        asked = _asked_users(model, dataset, indices)
    else:
        known = np.arange(len(histories))
        asked = _asked_histories(model, _numbered(item_ids, histories))
    # Series, which know the type of the ids where no row is left.
    users, items_of = polars.Series(known), polars.Series(item_ids)
    bias = model.item_head.bias.detach() - adjustment(dataset, logit_adjustment).to(table.device)
    best, parts = min(k, len(table)), [_no_rows(users, items_of)]
    with torch.no_grad():
        for rows, batch, past in asked:
            query = model.ask(batch.to(table.device))
            _finite(query, "states")  # a score that is no number counts as none
            exclude = None
            if seen == "exclude":
                exclude = past[0].to(table.device), past[1].to(table.device)
            found = linear_topk(query, table, best, linear_bias=bias, exclude=exclude)
            scores, items = (part.cpu().numpy() for part in found)
            kept = items >= 0
            _finite(torch.from_numpy(scores[kept]), "scores")
            ranks = np.broadcast_to(np.arange(1, best + 1), kept.shape)
            owners = np.broadcast_to(np.arange(rows.start, rows.stop)[:, None], kept.shape)
            parts.append(
                polars.DataFrame(
                    {
                        "user_id": users.gather(owners[kept]),
                        "rank": ranks[kept],
                        "item_id": items_of.gather(items[kept]),
                        "score": scores[kept],
                    }
                )
            )
    return polars.concat(parts)


def _finite(numbers: Tensor, what: str) -> Tensor:
    """Raises ValueError where finite weights have led beyond what a number can be."""
    if not numbers.isfinite().all():
        raise ValueError(f"{what} of the model are not finite: has its training diverged?")
    return numbers


def _no_rows(users, items):
    import polars

    types = {
        "user_id": users.dtype, "rank": polars.Int64, "item_id": items.dtype,
        "score": polars.Float32,
    }  # fmt: skip
    return polars.DataFrame(schema=types)


# A block of rows, the input of the model, and what has been seen as (items, offsets).
Asked = Iterator[tuple[slice, JaggedBatch, tuple[Tensor, Tensor]]]


def _asked_users(model, dataset, indices: np.ndarray) -> Asked:
    for rows in row_blocks(len(indices)):
        users = torch.as_tensor(indices[rows], device="cpu")
        yield rows, model.inputs(dataset, users, "all", ask=True), seen_items(dataset, users, "all")


def _asked_histories(model, histories: list[list[int]]) -> Asked:
    for rows in row_blocks(len(histories)):
        part = histories[rows]
        lengths = torch.tensor([0, *(len(history) for history in part)], device="cpu")
        past = torch.tensor(
            [item for history in part for item in sorted(history)], device="cpu"
        ).long()
        yield rows, model.inputs_of(part, ask=True), (past, lengths.cumsum(0))


def _numbered(item_ids: np.ndarray, histories: Sequence[Sequence]) -> list[list[int]]:
    asked = [item for history in histories for item in history]
    rows = iter(_indices(item_ids, asked, "item").tolist() if asked else [])
    return [[next(rows) for _ in history] for history in histories]
