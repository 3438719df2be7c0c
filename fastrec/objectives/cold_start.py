# SPDX-License-Identifier: Apache-2.0
"""Cold-start recommendation: an item of another catalogue from what a user did here (CLUE, Cheng et
al., 2021, section V-A; PeterRec, Yuan et al., 2020).

Legend: B rows of a batch, V items of the other catalogue, D width.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from fastrec.data.batch import NO_TARGET
from fastrec.data.cold_items import ColdRows
from fastrec.data.settings import check_one
from fastrec.data.side import SideData
from fastrec.nn.init import init_bert
from fastrec.nn.pool import Encoded, Pool, Pooling, as_value
from fastrec.ops.linear_cross_entropy import linear_cross_entropy
from fastrec.random import Rng

COLUMN = "cold_item"  # of a batch: the item of each row


@dataclass(frozen=True)
class ColdStart:
    """Prediction of the item of each cold-start row.

    Attributes:
        views: whose rows are predicted.
        weight: in the joint loss.
        pool: the user vector; CLUE reads [UR].
    """

    views: list[str] = field(default_factory=lambda: ["main"])
    weight: float = 1.0
    pool: Pooling = "ur"

    def __post_init__(self):
        check_one("cold_start", self.views)

    def build(self, model, side: SideData) -> "ColdItemPrediction":
        rows = side.dataset
        if not isinstance(rows, ColdRows):
            raise ValueError("the objective cold_start needs a stage with judge: cold_start")
        model.check_pool(self.pool)
        side.user_columns[COLUMN] = rows.items
        return ColdItemPrediction(model.config.width, rows.num_cold_items, self.pool, rows.ids_hash)


class ColdItemPrediction(nn.Module):
    """Mean over the rows of -log softmax(W u + b)[item], u the user vector, over all V items. W and
    b are new: the catalogue shares no item with the model's.

    Args:
        width, num_items: D and V.
        pool: see `ColdStart`.
        ids_hash: of the original ids, which says what the rows of W mean where it is saved.
    """

    backend: str | None = None

    def __init__(self, width: int, num_items: int, pool: Pooling = "ur", ids_hash: str = ""):
        super().__init__()
        self.pool = Pool(pool, width)
        self.linear = init_bert(nn.Linear(width, num_items))
        self.scales = [{"name": COLUMN, "items": ids_hash, "pool": as_value(pool)}]

    def forward(self, model, rng: Rng, view: Encoded) -> dict[str, tuple[Tensor, Tensor]]:
        """{"cold_start": (loss, number of rows)}; padding is no row."""
        item = view.batch.users[COLUMN]
        known = item >= 0
        if view.batch.real is not None:
            known = known & view.batch.real
        loss = linear_cross_entropy(
            self.pool(model, view),
            self.linear.weight,
            item.masked_fill(~known, NO_TARGET),
            linear_bias=self.linear.bias,
            backend=self.backend,
        )
        return {"cold_start": (loss, known.sum())}
