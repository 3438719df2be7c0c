# SPDX-License-Identifier: Apache-2.0
"""User attribute prediction (UAP): UPRec section 3.3.2, eq. 8-12.

Legend: S users of a batch, D width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.attributes import EncodedAttribute
from fastrec.data.batch import OWN
from fastrec.data.settings import check_one
from fastrec.data.side import SideData
from fastrec.nn.init import init_bert
from fastrec.nn.pool import Encoded, Pool, Pooling, as_value
from fastrec.random import Rng


@dataclass(frozen=True)
class UserAttributes:
    """Prediction of the `attributes` of the recipe.

    Attributes:
        views: whose users are predicted.
        weight: in the joint loss.
        weights: of attributes in the sum of their losses, by name; 1 for the others.
        pool: the user vector; UPRec pre-trains with "max" (eq. 8) and fine-tunes with "cls"
            (section 3.4).
        hidden: width of a layer with ReLU that all attributes share, before the linear one; 0 for
            none.
    """

    views: list[str] = field(default_factory=lambda: ["main"])
    weight: float = 1.0
    weights: dict[str, float] = field(default_factory=dict)
    pool: Pooling = "max"
    hidden: int = 0

    def __post_init__(self):
        check_one("user_attributes", self.views)
        if self.hidden < 0:
            raise ValueError(f"hidden must not be negative, got {self.hidden}")
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"weights.{name} must be above 0 and finite, got {weight}")

    def build(self, model, side: SideData) -> "UserAttributePrediction":
        model.check_pool(self.pool)
        if taken := [attribute.name for attribute in side.attributes if attribute.name in OWN]:
            raise ValueError(
                f"attribute {taken[0]!r} has the name of a column of batches, {list(OWN)}: prepare"
                " the data set with another name, or list other attributes"
            )
        side.user_columns |= {attribute.name: attribute.values for attribute in side.attributes}
        return UserAttributePrediction(
            model.config.width, side.attributes, self.pool, self.weights, self.hidden
        )


class UserAttributePrediction(nn.Module):
    """One linear layer from user vectors to all attributes, or with `hidden` two.

    Numeric attributes: mean of huber(w u + b - a) with delta 1 over the users whose value a is
    known, a standardised (eq. 9-10). Discrete ones: mean of -log softmax(W u + b)[a] (eq. 11).

    Args:
        width: D.
        attributes: their order is that of the outputs; `scales` tells what these mean.
        pool, weights, hidden: see `UserAttributes`.

    Raises ValueError that lists the attributes for a weight of none of them.
    """

    def __init__(
        self,
        width: int,
        attributes: list[EncodedAttribute],
        pool: Pooling = "max",
        weights: Mapping[str, float] | None = None,
        hidden: int = 0,
    ):
        super().__init__()
        self.names = [attribute.name for attribute in attributes]
        self.weights = dict(weights or {})
        if unknown := [name for name in self.weights if name not in self.names]:
            raise ValueError(
                f"weights names {unknown[0]!r}; the attributes that are predicted are {self.names}"
            )
        self.sizes = [attribute.outputs for attribute in attributes]
        how: dict[str, Any] = {"pool": as_value(pool)}
        how |= {"hidden": hidden} if hidden else {}
        self.scales = [attribute.scale | how for attribute in attributes]
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.linear = init_bert(nn.Linear(hidden or width, sum(self.sizes)))
        self.pool = Pool(pool, width)

    def predict(self, users: Tensor) -> dict[str, Tensor]:
        """[S, D] to [S, 1] standardised values or [S, classes] logits of each attribute."""
        if self.hidden is not None:
            users = F.relu(self.hidden(users))
        parts = self.linear(users).split(self.sizes, dim=1)
        return dict(zip(self.names, parts, strict=True))

    def forward(self, model, rng: Rng, view: Encoded) -> dict[str, tuple[Tensor, Tensor]]:
        """(weighted mean loss, number of users with a value) of each attribute; eq. 12 is the sum.
        A user without a value has no part in that attribute."""
        return self.losses(self.pool(model, view), view.batch.users, view.batch.real)

    def losses(
        self, users: Tensor, columns: dict[str, Tensor], real: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """From user vectors [S, D] and the attributes of the same users, as `EncodedAttribute`
        holds them; real: bool [S], who counts. A loss over no user is 0 with a live graph."""
        missing = [name for name in self.names if name not in columns]
        if missing:
            raise ValueError(f"the batch has no column {missing[0]!r}, it has {sorted(columns)}")
        losses = {}
        for name, output in self.predict(users).items():
            target = columns[name]
            if target.is_floating_point():
                known = ~target.isnan()
                value = output.squeeze(1).float()
                loss = F.huber_loss(value, target.nan_to_num(), reduction="none")
            else:
                known = target >= 0
                loss = F.cross_entropy(output.float(), target, ignore_index=-1, reduction="none")
            known = known if real is None else known & real
            loss = loss * known
            count = known.sum()
            mean = loss.sum() / count.clamp_min(1)
            losses[name] = self.weights.get(name, 1.0) * mean, count
        return losses
