# SPDX-License-Identifier: Apache-2.0
"""Whether the second basket of a user is the next one. Legend: B users, D width."""

from dataclasses import dataclass, field

from torch import nn
from torch.nn import functional as F

from fastrec.data.settings import check_one
from fastrec.data.side import SideData
from fastrec.nn.init import init_bert
from fastrec.nn.pool import Encoded, Pool, Pooling
from fastrec.random import Rng


@dataclass(frozen=True)
class Follows:
    """Next basket prediction (Zeng et al., 2021, section 3.2.2): two classes from the user vector.

    Attributes:
        views: made by the step `baskets`.
        weight: in the joint loss.
        pool: the user vector, the state of [CLS] in the paper.
    """

    views: list[str] = field(default_factory=lambda: ["main"])
    weight: float = 1.0
    pool: Pooling = "cls"

    def __post_init__(self):
        check_one("follows", self.views)

    def build(self, model, side: SideData) -> "BasketFollows":
        model.check_pool(self.pool)
        return BasketFollows(model.config.width, self.pool)


class BasketFollows(nn.Module):
    """Mean over the users with two baskets of -log sigmoid(+-(w u + b)), by the column `follows`
    [B]: 1 the next basket, 0 that of somebody else, -1 no second one."""

    def __init__(self, width: int, pool: Pooling):
        super().__init__()
        self.pool, self.linear = Pool(pool, width), init_bert(nn.Linear(width, 1))

    def forward(self, model, rng: Rng, view: Encoded) -> dict[str, tuple]:
        """{"follows": (loss, number of users with two baskets)}; 0 with a live graph for none."""
        if "follows" not in view.batch.users:
            raise ValueError("a view of the objective follows is not made by the step baskets")
        label = view.batch.users["follows"]
        known = label >= 0
        if view.batch.real is not None:
            known = known & view.batch.real
        score = self.linear(self.pool(model, view)).squeeze(1).float()
        loss = F.softplus(score * (1 - 2 * label.clamp_min(0))) * known
        count = known.sum()
        return {"follows": (loss.sum() / count.clamp_min(1), count)}
