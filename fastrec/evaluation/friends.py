# SPDX-License-Identifier: Apache-2.0
"""Social relation detection: find the friend among sampled users (UPRec section 4.4).

Legend: N users, P (user, friend) pairs, C = 1 + negatives.
"""

import numpy as np
import torch
from torch import Tensor

from fastrec.data.graph import SocialGraph
from fastrec.evaluation.blocks import finite
from fastrec.objectives.friends import SocialRelationDetection

_CHUNK = 1024


class FriendsJudge:
    """Every link with both ends among `users`, in both directions: the friend against `negatives`
    users drawn uniformly from those who are not friends, the same for every model.

    split: input of the users, see `SequenceDataset`.

    Raises ValueError without links among the users, or with too few users to draw from.
    """

    def __init__(self, dataset, users: Tensor, split: str, negatives: int = 99, seed: int = 0):
        self.dataset, self.split = dataset, split
        self.users = torch.as_tensor(users, device="cpu").sort().values
        ids = self.users.numpy()
        graph = SocialGraph.from_dataset(dataset, ids)
        degree = graph.degrees(ids)
        if not degree.any():
            raise ValueError(f"there is no friendship among the {len(ids)} evaluated users")
        if len(ids) - 1 - degree.max() < negatives:
            raise ValueError(
                f"a user has {len(ids) - 1 - degree.max()} evaluated users who are not friends,"
                f" {negatives} negatives were asked for: lower --evaluation.friend_negatives"
            )
        queries = np.repeat(np.arange(len(ids)), degree)
        friends = [graph.values[graph.offsets[u] : graph.offsets[u + 1]] for u in ids]
        positives = np.searchsorted(ids, np.concatenate(friends))
        candidates = np.empty((len(queries), 1 + negatives), dtype=np.int64)
        candidates[:, 0] = positives
        last, before = None, np.empty(0, np.int64)
        for i, (query, positive) in enumerate(zip(queries, positives, strict=True)):
            if query != last:  # once a user: somebody may have thousands of friends
                refused = np.sort(np.append(np.searchsorted(ids, friends[query]), query))
                last, before = query, refused - np.arange(len(refused))
            generator = np.random.Generator(
                np.random.Philox(key=(seed, ids[query] * dataset.num_users + ids[positive]))
            )
            # Places among the users that are left, without a list of them: the p-th is behind as
            # many refused ones as have at most p others before them.
            left = generator.choice(len(ids) - len(before), negatives, replace=False)
            candidates[i, 1:] = left + np.searchsorted(before, left, side="right")
        self.queries = torch.from_numpy(queries)
        self.candidates = torch.from_numpy(candidates)  # [P, C] places in `users`
        everyone = SocialGraph.from_dataset(dataset)
        self.two_hop = torch.from_numpy(_within_two(everyone, ids, queries, candidates))

    def __len__(self) -> int:
        return len(self.users)

    def score(self, model, objective, rows: slice) -> Tensor:
        """[N, D]: user vectors of a slice of the users, on the CPU: pooled as the objective friends
        does, max-pooled without it."""
        head = objective.find(SocialRelationDetection)
        with torch.no_grad():
            batch = model.inputs(self.dataset, self.users[rows], self.split)
            encoded = model.encode(batch.to(model.device))
            vectors = model.pool(encoded, "max") if head is None else head.pool(model, encoded)
            return finite(vectors, "user vectors").float().cpu()

    @property
    def metric_names(self) -> list[str]:
        return list(
            friend_metrics(
                torch.zeros(1, 2, dtype=torch.float32, device="cpu"),
                torch.zeros(1, 1, dtype=torch.bool, device="cpu"),
            )
        )

    def metrics(self, vectors: Tensor, objective) -> dict[str, float]:
        """`friend_metrics` under the trained similarity (equal weights without one).

        vectors: [N, D], what `score` gives for all users.
        """
        head = objective.find(SocialRelationDetection)
        weight = torch.ones(vectors.shape[1], dtype=torch.float32, device="cpu")
        if head is not None:
            weight = head.weight.detach().float().cpu()
        scores = []
        for start in range(0, len(self.queries), _CHUNK):
            rows = slice(start, start + _CHUNK)
            query = vectors[self.queries[rows]].unsqueeze(1)
            scores.append(-((query - vectors[self.candidates[rows]]).square() @ weight))
        return friend_metrics(torch.cat(scores), self.two_hop)

    def shared_items(self) -> dict[str, float]:
        """The metrics of "Sim": the candidate with the most items in common (UPRec, table 5)."""
        batch = self.dataset.gather(self.users, self.split, max_len=None)
        items = self.dataset.num_items
        owned = torch.unique(batch.segment_ids() * items + batch.values)
        owner = owned // items
        lengths = torch.bincount(owner, minlength=len(self.users))
        starts = lengths.cumsum(0) - lengths
        scores = torch.empty(self.candidates.shape, dtype=torch.float32, device="cpu")
        for row, query in enumerate(self.queries.tolist()):
            mine = owned[starts[query] : starts[query] + lengths[query]] % items
            wanted = self.candidates[row, :, None] * items + mine
            place = torch.searchsorted(owned, wanted).clamp_max(len(owned) - 1)
            scores[row] = (owned[place] == wanted).sum(1)
        return friend_metrics(scores, self.two_hop)


def friend_metrics(scores: Tensor, two_hop: Tensor) -> dict[str, float]:
    """Means over pairs: "accuracy" (the friend is first; a tie of n counts 1/n), "MRR" (ties at the
    middle), and the accuracy without the candidates that are friends of friends.

    scores: [P, C], the friend in column 0; two_hop: bool [P, C - 1]. A NaN loses.
    """
    friend, others = scores[:, :1], scores[:, 1:]
    ahead, tied = ~(others <= friend), others == friend

    def accuracy(ahead: Tensor, tied: Tensor) -> float:
        return ((~ahead.any(1)).double() / (1 + tied.sum(1))).mean().item()

    rank = 1 + ahead.sum(1).double() + tied.sum(1).double() / 2
    return {
        "accuracy": accuracy(ahead, tied),
        "MRR": rank.reciprocal().mean().item(),
        "accuracy without two-hop": accuracy(ahead & ~two_hop, tied & ~two_hop),
    }


def _within_two(graph: SocialGraph, ids, queries, candidates) -> np.ndarray:
    """bool [P, C - 1]: the negatives that share a friend with the query, whoever that is."""
    asked = np.unique(queries)
    values, offsets = graph.exclusions(ids[asked], ids[asked], ids, hops=2)
    near = np.repeat(asked, np.diff(offsets)) * len(ids) + values
    return np.isin(queries[:, None] * len(ids) + candidates[:, 1:], near)
