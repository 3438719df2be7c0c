# SPDX-License-Identifier: Apache-2.0
"""Which item is like another one by a trained model, for `substitute` and `insert` (CoSeRec, Liu et
al., 2021, section 3.1).

Legend: V items, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrec.data.similar_items import nearest
from fastrec.nn.user_model import UserModel
from fastrec.ops.linear_topk import linear_topk


class SimilarItems:
    """The most similar item of each item by e_i . e_j of a model that is not trained any more; with
    `users` the more similar one of this and of `nearest`, each similarity scaled to 0 .. 1 by the
    smallest and the largest of all pairs that it knows: pairs of different items, and those that
    some user has both of. Of equal ones that by users.

    Computed once, on the host, from vectors that do not change: the same in a resumed run.
    """

    def __init__(self, model: UserModel, users: bool = True):
        with torch.no_grad():
            self.table = model.to("cpu").item_table.detach().float()
        self.users = users

    def __call__(self, dataset, split: str, people=None) -> Tensor:
        """int64 [V], -1 where there is none; arguments as those of `nearest`."""
        best = _extreme(self.table, 1)
        if not self.users:
            return best.items
        common = nearest(dataset, split, people)
        lowest = -_extreme(self.table, -1).scores.max()
        by_model = _scaled(best.scores, lowest, best.scores.max())
        by_users = _scaled(common.scores, common.lowest, common.scores.max())
        nearer = (common.items >= 0) & (by_users >= by_model)
        return torch.where(nearer, common.items, best.items)


class Nearest(NamedTuple):
    """Of each item the other one that is best: items int64 [V], -1 for none, scores [V]."""

    items: Tensor
    scores: Tensor


def _extreme(table: Tensor, sign: int) -> Nearest:
    """The largest sign * e_i . e_j over j other than i. The scores of all pairs are not stored."""
    itself = torch.arange(len(table) + 1, device="cpu")
    found = linear_topk(table * sign, table, 1, exclude=(itself[:-1], itself))
    return Nearest(found.indices.squeeze(1), found.values.squeeze(1))


def _scaled(scores: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """0 at `low`, 1 at `high`; where these are equal all are 1."""
    return torch.where(high > low, (scores - low) / (high - low), torch.ones_like(scores))
