# SPDX-License-Identifier: Apache-2.0
"""Cold-start recommendation: the item of each row ranked among all of the other catalogue.

Legend: N rows, V items of the other catalogue, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrec.data.cold_items import ColdRows
from fastrec.evaluation.blocks import finite
from fastrec.evaluation.metrics import ranking_metrics
from fastrec.objectives.cold_start import ColdItemPrediction
from fastrec.ops.linear_rank import linear_rank


class ColdStartJudge:
    """Ranks the items of `chosen` rows by the scores of the objective cold_start, with the whole
    history of a user as input. No item is left out: a row has one relevant item, and others that
    the user took rank where they rank. Equal scores are in the order of the items.

    chosen, trained: int64, rows; those that train are the baseline.
    cutoffs: k of HR@k (here Recall@k), NDCG@k; MRR@k of the largest.
    """

    def __init__(self, rows: ColdRows, chosen: Tensor, trained: Tensor, cutoffs: Sequence[int]):
        self.rows, self.chosen, self.cutoffs = rows, chosen, tuple(cutoffs)
        self.counts = rows.items[trained].bincount(minlength=rows.num_cold_items)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def metric_names(self) -> list[str]:
        return list(self.metrics(torch.ones(1, dtype=torch.float32, device="cpu")))

    def score(self, model, objective, rows: slice) -> Tensor:
        """float64 [N]: ranks, from 1, on the CPU."""
        head = objective.require(ColdItemPrediction, "cold_start", "cold_start")
        with torch.no_grad():
            batch = model.inputs(self.rows, self.chosen[rows], "all")
            query = finite(head.pool(model, model.encode(batch.to(model.device))), "user vectors")
            weight = head.linear.weight
            item = self.rows.items[self.chosen[rows]].to(weight.device)
            # Scores in full precision also in bf16-mixed validation: coarse ones would tie.
            with torch.autocast(weight.device.type, enabled=False):
                query = query.to(weight.dtype)
                ranks = linear_rank(query, weight, item, linear_bias=head.linear.bias)
        return ranks.double().cpu()

    def metrics(self, scores: Tensor, objective=None) -> dict[str, float]:
        """`ranking_metrics`, averaged over the rows. scores: what `score` gives for all rows."""
        return ranking_metrics(scores, self.cutoffs)

    def popularity_ranks(self) -> Tensor:
        """float64 [rows]: ranks by how often an item trains, the baseline."""
        order = self.counts.argsort(descending=True, stable=True)  # equal ones in their order
        ranks = torch.empty(len(order), dtype=torch.float64, device="cpu")
        ranks[order] = torch.arange(1, len(order) + 1, dtype=torch.float64, device="cpu")
        return ranks[self.rows.items[self.chosen]]
