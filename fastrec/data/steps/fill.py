# SPDX-License-Identifier: Apache-2.0
"""Items that a masked-item model puts in the place of others.

Legend: B sequences, T events, N filled events, K candidates, V items.
"""

from dataclasses import dataclass, replace

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import SideData
from fastrec.data.steps.mask import chosen_items, with_targets
from fastrec.data.steps.share import Share, check_share, share_at
from fastrec.random import Rng, wide_draws


@dataclass(frozen=True)
class Fill:
    """Mask floor(share n) of the n items of a sequence, at least one, and draw an item for each
    from what a trained model expects there, P(. | the masked sequence) (mask and fill: CCL, Bian et
    al., 2021). It may be the item that was there.

    The model is `side.filler`, `filler` of a stage. It is not trained, and runs where steps do, on
    the host. What is drawn depends on (seed, step, key, position) and on its scores, whose last
    bits depend on the batch.

    Attributes:
        share: of the items, a number or one that moves with the step.
        among: K, the most likely items, which are drawn by the softmax of their scores; all items
            if there are fewer.
    """

    share: Share = 0.2
    among: int = 20

    def __post_init__(self):
        check_share("fill.share", self.share)
        if self.among < 1:
            raise ValueError(f"fill.among must be at least 1, got {self.among}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        if side.filler is None:
            raise ValueError("the step fill needs a masked-item model: the key filler of the stage")
        chosen = chosen_items(batch, rng, side, share_at(self.share, rng), "fill")
        events = {name: column for name, column in batch.events.items() if name != "target"}
        values = batch.values.masked_fill(chosen, side.mask_id)
        masked = with_targets(replace(batch, events=events), values, chosen)
        items, scores = side.filler(masked, min(self.among, side.num_items))  # [N, K]
        below = scores.double().softmax(1).cumsum(1)[:, :-1]
        keys, position = batch.keys[batch.segment_ids()[chosen]], batch.positions()[chosen]
        drawn = wide_draws(rng, keys, position, site="fill_item").double() / 2**32
        place = (below <= drawn.unsqueeze(1)).sum(1, keepdim=True)
        values = batch.values.masked_scatter(chosen, items.gather(1, place).squeeze(1))
        return batch.with_items(values, chosen)
