"""What a trained model is for: user vectors and ranked recommendations, in original ids.

Legend: U users, D width, k recommendations a user.
"""

from pathlib import Path

import numpy as np
import torch

from fastrec.evaluation.protocols import adjustment, next_item_queries, row_blocks, seen_items
from fastrec.nn.pool import max_pool
from fastrec.ops.linear_topk import linear_topk


def _indices(dataset, user_ids) -> np.ndarray:
    """Row numbers of original user ids; all users for None. Raises ValueError for an unknown id."""
    known = dataset.user_ids()
    if user_ids is None:
        return np.arange(dataset.num_users)
    if len(user_ids) == 0:
        raise ValueError("the list of users is empty")
    row = {str(user): index for index, user in enumerate(known.tolist())}
    unknown = [user for user in user_ids if str(user) not in row]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(user_ids)} users are not in the data set, the first is"
            f" {unknown[0]!r}"
        )
    return np.array([row[str(user)] for user in user_ids])


def user_vectors(model, dataset, user_ids=None):
    """User vectors: states max-pooled over the last `max_len` items of the history (UPRec, eq. 8).

    Returns a polars frame: user_id, vector (array of D float32).
    """
    import polars

    indices, vectors = _indices(dataset, user_ids), []
    with torch.no_grad():
        for rows in row_blocks(len(indices)):
            users = torch.as_tensor(indices[rows])
            batch = dataset.gather(
                users, "all", max_len=model.config.max_len, **model.sequence_tokens
            ).to(model.item_table.device)
            states = model.encode(batch)
            vectors.append(max_pool(states, batch, model.num_items).float().cpu())
    ids = dataset.user_ids()[indices]
    return polars.DataFrame({"user_id": ids, "vector": torch.cat(vectors).numpy()})


def recommend(
    model, dataset, k: int, user_ids=None, seen: str = "exclude", logit_adjustment: float = 0.0
):
    """The k best next items of each user, given the last `max_len` - 1 items of the history.

    seen: "exclude" leaves out items that the user already has, "none" keeps them.
    logit_adjustment: tau of `adjustment`: above 0 popular items fall.

    Returns a polars frame: user_id, rank (from 1), item_id, score; fewer than k rows for a user
    with fewer than k items left.
    """
    import polars

    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if seen not in ("exclude", "none"):
        raise ValueError(f"seen must be 'exclude' or 'none', got {seen!r}")
    indices, item_ids = _indices(dataset, user_ids), dataset.item_ids()
    known = dataset.user_ids()
    table = model.item_table
    bias = model.item_head.bias.detach() - adjustment(dataset, logit_adjustment).to(table.device)
    parts = []
    with torch.no_grad():
        for rows in row_blocks(len(indices)):
            users = torch.as_tensor(indices[rows])
            query = next_item_queries(model, dataset, users, "all")
            exclude = None
            if seen == "exclude":
                past, offsets = seen_items(dataset, users, "all")
                exclude = past.to(table.device), offsets.to(table.device)
            best = min(k, len(table))
            found = linear_topk(query, table, best, linear_bias=bias, exclude=exclude)
            scores, items = (part.cpu().numpy() for part in found)
            kept = items >= 0
            ranks = np.broadcast_to(np.arange(1, best + 1), kept.shape)
            owners = np.broadcast_to(indices[rows, None], kept.shape)
            parts.append(
                polars.DataFrame(
                    {
                        "user_id": known[owners[kept]],
                        "rank": ranks[kept],
                        "item_id": item_ids[items[kept]],
                        "score": scores[kept],
                    }
                )
            )
    return polars.concat(parts)


def write_table(frame, path: Path | str) -> None:
    """Write a frame as .csv or .parquet, by the ending. Raises ValueError for another one."""
    path = Path(path)
    check_table_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path)


def check_table_path(path: Path) -> None:
    """Raise ValueError for a file that `write_table` cannot write."""
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"{path}: expected a name that ends in .csv or .parquet")
