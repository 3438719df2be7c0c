# SPDX-License-Identifier: Apache-2.0
"""A trained masked-item model as the step `fill` asks it.

Legend: N masked events, K candidates.
"""

import torch
from torch import Tensor

from fastrec.data.batch import JaggedBatch
from fastrec.nn.user_model import UserModel
from fastrec.ops.linear_topk import linear_topk


class Filler:
    """The most likely items at [MASK], by a model that is not trained any more. On the host.

    Raises ValueError for a causal model, which reads no [MASK].
    """

    def __init__(self, model: UserModel):
        if model.config.causal:
            raise ValueError("filler must be a masked-item model, and this one is causal")
        self.model = model.to("cpu").requires_grad_(False)
        self.table = self.model.item_table  # may cost a product over all items

    @torch.no_grad()
    def __call__(self, batch: JaggedBatch, among: int) -> tuple[Tensor, Tensor]:
        """(items int64 [N, K], scores [N, K]), best first, at the events of a batch of sequences of
        items, on the host, that have a target. The scores of all items are not stored.

        Raises ValueError for a sequence with more items than the model reads.
        """
        model = self.model
        longest = int(batch.lengths.max()) if len(batch) else 0
        if longest > model.config.max_len:
            raise ValueError(
                f"the filler reads {model.config.max_len} items and a view has {longest}: train one"
                f" with model.max_len {longest}"
            )
        framed = model.frame(batch).with_scored()
        assert framed.scored is not None
        states = model.output(model.encode(framed), framed.scored)
        query = model.item_head.query(states).to(self.table.dtype)
        best = linear_topk(query, self.table, among, linear_bias=model.item_head.bias)
        return best.indices, best.values
