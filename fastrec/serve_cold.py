# SPDX-License-Identifier: Apache-2.0
"""The items of another catalogue, as a model that was trained for cold start scores them.

Legend: N users or histories, V items of the other catalogue, D width.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastrec.data.batch import JaggedBatch, offsets_of
from fastrec.data.cold_items import ColdRows
from fastrec.data.ids import Ids
from fastrec.data.settings import from_values
from fastrec.data.side import SideData
from fastrec.nn.model_files import HEADS
from fastrec.nn.pool import Pooling
from fastrec.objectives.cold_start import COLUMN, ColdItemPrediction, ColdStart
from fastrec.objectives.joint import JointObjective
from fastrec.training.heads_file import load_heads, saved_scales


class OtherCatalogue:
    """What `Recommender(model, dataset, other=...)` recommends in place of the model's own items:
    those of the data set's `cold_items`, in their original ids.

    Args:
        folder: of the model, or adapter, whose heads.safetensors has the objective cold_start.
        model: on any device.
        dataset: with the catalogue that it was trained for (`prepare --cold_items`).

    Raises ValueError for a model that was trained for something else, or for other items;
    DataError for a data set without another catalogue.
    """

    def __init__(self, folder: Path | str, model, dataset):
        folder, rows = Path(folder), ColdRows(dataset)
        scales = saved_scales(folder)
        known = [name for name, part in scales.items() if part and part[0].get("name") == COLUMN]
        if not known:
            raise ValueError(f"{folder / HEADS} holds no cold_start: it was trained otherwise")
        pool = from_values(Pooling, scales[known[0]][0]["pool"], "the pool of cold_start")
        side = SideData(rows, "all", event_columns=model.event_columns)
        objective = JointObjective({known[0]: ColdStart(pool=pool)}, model, side)
        load_heads(objective, folder)
        head = objective.require(ColdItemPrediction, "cold_start", "cold_start")
        self._head = head.to(model.device).requires_grad_(False)
        self.ids, self.table, self.bias = Ids(rows.ids), head.linear.weight, head.linear.bias
        order = np.lexsort((rows.items.numpy(), rows.owners.numpy()))
        self._items = rows.items[order]
        self._offsets = offsets_of(rows.owners.bincount(minlength=dataset.num_users))

    def query(self, model, batch: JaggedBatch) -> Tensor:
        """[N, D]: the user vectors of a batch, which are compared with `table` [V, D]."""
        return self._head.pool(model, model.encode(batch)).to(self.table.dtype)

    def taken(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """(items, offsets [N + 1]) int64: what `users` have in this catalogue, sorted."""
        begin, number = self._offsets[users], self._offsets.diff()[users]
        offsets = offsets_of(number)
        places = (begin - offsets[:-1]).repeat_interleave(number)
        return self._items[places + torch.arange(len(places), device="cpu")], offsets


def other_catalogue(model, dataset, folder: Path) -> OtherCatalogue | None:
    """The catalogue that `fit` has trained a model for, last; None for the model's own items."""
    stage = (model.recipe or {}).get(model.trained_on.get("stage")) or {}
    if stage.get("judge") != "cold_start":
        return None
    return OtherCatalogue(folder, model, dataset)
