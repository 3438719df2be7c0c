# SPDX-License-Identifier: Apache-2.0
"""What the events of a view predict: their states and targets.

Legend: N predicted items, A targets of an event, D width.
"""

import torch
from torch import Tensor

from fastrec.data.batch import JaggedBatch
from fastrec.nn.pool import Encoded


def may_lack_targets(batch: JaggedBatch) -> bool:
    """Whether a predicted row may have no target: one of several, or padding. Known on the host."""
    return batch.events["target"].dim() > 1 or batch.real is not None


def _rows(batch: JaggedBatch) -> Tensor:
    """int64 [N]: the event of each prediction; an event with A targets has A of them."""
    if batch.scored is None:
        batch = batch.with_scored()
    scored, target = batch.scored, batch.events["target"]
    assert scored is not None
    return scored if target.dim() == 1 else scored.repeat_interleave(target.shape[1])


def predicted(model, view: Encoded, objective: str) -> tuple[Tensor, Tensor]:
    """(output states [N, D + user_width], targets int64 [N], -100 where none). Raises ValueError
    that names the `objective` of a view without targets."""
    if "target" not in view.batch.events:
        raise ValueError(
            f"a view of the objective {objective} has no targets: it needs mask, mask_last or"
            " next_item"
        )
    rows, target = _rows(view.batch), view.batch.events["target"]
    scored = rows if target.dim() == 1 else rows[:: target.shape[1]]
    return model.output(view, rows), target[scored].flatten()


def places_of(batch: JaggedBatch) -> tuple[Tensor, Tensor]:
    """(keys, places) int64 [N] of the predictions: the position of the event, or A times it and the
    number of the target where an event has A."""
    rows, target = _rows(batch), batch.events["target"]
    places = batch.positions()[rows]
    if target.dim() > 1:
        number = torch.arange(len(rows), device=rows.device) % target.shape[1]
        places = places * target.shape[1] + number
    return batch.keys[batch.segment_ids()[rows]], places
