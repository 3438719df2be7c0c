# SPDX-License-Identifier: Apache-2.0
"""User vectors of two dropout passes, which need neither labels nor targets: is a user found again
among others? What chooses a model that is pre-trained without targets.

Legend: N users, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrec.evaluation.blocks import finite
from fastrec.nn.pool import Pool
from fastrec.nn.sphere import alignment, feature_std, uniformity
from fastrec.ops.linear_rank import linear_rank
from fastrec.random import Rng

MOST = 4096  # users: pairs of them are counted


class VectorsJudge:
    """Two vectors of each user, from the same input with two dropouts, the same in every
    validation.

    users: at most `MOST` of them are asked, drawn at random.
    split: input of the users, see `SequenceDataset`.

    Raises ValueError for fewer than 2 users.
    """

    metric_names = ("MRR", "alignment", "uniformity", "std")

    def __init__(self, dataset, users: Tensor, split: str):
        if len(users) < 2:
            raise ValueError(f"vectors of users are compared: there are {len(users)} of them")
        order = torch.randperm(len(users), generator=torch.Generator().manual_seed(0), device="cpu")
        self.users = users[order[:MOST]].sort().values
        self.dataset, self.split = dataset, split

    def __len__(self) -> int:
        return len(self.users)

    def score(self, model, objective, rows: slice) -> Tensor:
        """float32 [N, 2 D]: both vectors of each user, pooled as the first objective with a pool
        does, on the CPU."""
        pools = (getattr(part, "pool", None) for part in objective.parts.values())
        pool = next((each for each in pools if isinstance(each, Pool)), None)
        if pool is None:
            raise ValueError("the judge vectors needs an objective with a pool")
        with torch.no_grad():
            batch = model.inputs(self.dataset, self.users[rows], self.split)
            batch = batch.as_views(2).to(model.device)
            vectors = finite(pool(model, model.encode(batch, Rng(0, 0))), "user vectors")
        return torch.cat(vectors.float().cpu().chunk(2), dim=1)

    def metrics(self, scores: Tensor, objective=None) -> dict[str, float]:
        """Of the vectors at length 1: "MRR" is the mean of 1 / the rank of a user's second vector
        among those of all, by the cosine with the first: 1 where every user is found again, chance
        where vectors are one or differ by their dropout alone, which "alignment", "uniformity" and
        "std" (`fastrec.nn.sphere`, Wang and Isola, 2020) do not tell from a spread of users.

        scores: what `score` gives for all rows.
        """
        a, b = (F.normalize(part, dim=1) for part in scores.chunk(2, dim=1))
        ranks = linear_rank(a, b, torch.arange(len(a), device="cpu")).double()
        return {
            "MRR": ranks.reciprocal().mean().item(),
            "alignment": alignment(a, b).item(),
            "uniformity": (uniformity(a) + uniformity(b)).item() / 2,
            "std": (feature_std(a) + feature_std(b)).item() / 2,
        }
