"""Masked item prediction (MIP): UPRec section 3.3, eq. 6-7; also BERT4Rec's objective.

Legend: T events, N masked positions, V items, D width, K negatives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastrec.data.batch import JaggedBatch
from fastrec.data.corruptions import mask_items, mask_last
from fastrec.data.errors import check_choices
from fastrec.data.negatives import NegativeSampler
from fastrec.nn.user_model import UserModel


@dataclass(frozen=True)
class Masking:
    """Which items become [MASK].

    Attributes:
        last_only: mask only the last item of each sequence (fine-tuning, UPRec section 3.5).
        probability: chance of each item otherwise; one item is forced where none was drawn.
        replace_probability, random_probability: chance that a chosen item becomes [MASK] or a
            random item; otherwise it stays (BERT: 0.8 and 0.1).
    """

    last_only: bool = False
    probability: float = 0.2
    replace_probability: float = 1.0
    random_probability: float = 0.0

    def __post_init__(self):
        for name in ("probability", "replace_probability", "random_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"masking.{name} must be in [0, 1], got {getattr(self, name)}")

    def __call__(
        self, batch: JaggedBatch, model: UserModel, seed: int, step: int
    ) -> tuple[JaggedBatch, Tensor, Tensor]:
        """(masked batch, masked positions int64 [N] of [T], their items int64 [N])."""
        num_items, mask_id = model.num_items, model.token("mask")
        if self.last_only:
            return mask_last(batch, num_items=num_items, mask_id=mask_id)
        return mask_items(
            batch,
            seed=seed,
            step=step,
            probability=self.probability,
            replace_probability=self.replace_probability,
            random_probability=self.random_probability,
            num_items=num_items,
            mask_id=mask_id,
        )


@dataclass(frozen=True)
class ItemLoss:
    """The loss of a predicted item: over all items, or over it and sampled negatives.

    Attributes:
        kind: "full", the softmax over all items, or "sampled". The others are of "sampled".
        loss: "softmax", "bce" or "gbce", see `sampled_linear_cross_entropy`.
        negatives: K, drawn with replacement.
        sampler: "uniform", or "popularity": by (number of training events)^alpha.
        alpha: exponent of the popularity.
        shared: the same negatives for all predicted items of a step; otherwise each has its own.
        log_q: correct the scores of the softmax by the log of the sampling probability.
        gbce_t: calibration of gbce.
    """

    kind: Literal["full", "sampled"] = "full"
    loss: Literal["softmax", "bce", "gbce"] = "softmax"
    negatives: int = 256
    sampler: Literal["uniform", "popularity"] = "uniform"
    alpha: float = 1.0
    shared: bool = True
    log_q: bool = True
    gbce_t: float = 0.75

    def __post_init__(self):
        check_choices(self)
        if self.negatives < 1:
            raise ValueError(f"item_loss.negatives must be at least 1, got {self.negatives}")

    def make_sampler(
        self, num_items: int, item_counts: Callable[[], Tensor] | None
    ) -> NegativeSampler | None:
        """None for the full softmax. Raises ValueError where the counts [V] are needed and None."""
        if self.kind == "full":
            return None
        if self.sampler == "uniform":
            return NegativeSampler.uniform(num_items)
        if item_counts is None:
            raise ValueError("item_loss.sampler is 'popularity', which needs the item counts")
        return NegativeSampler.popularity(item_counts(), self.alpha)


class MaskedItemPrediction(nn.Module):
    """Mean over the masked positions of the batch of -log softmax(query(h_j) . E + b)[item_j], or
    of the sampled loss in its place."""

    def __init__(self, item_loss: ItemLoss | None = None, sampler: NegativeSampler | None = None):
        super().__init__()
        self.item_loss, self.sampler = item_loss or ItemLoss(), sampler

    def forward(
        self,
        model: UserModel,
        states: Tensor,
        rows: Tensor,
        targets: Tensor,
        batch: JaggedBatch | None = None,
        seed: int = 0,
        step: int = 0,
        backend=None,
    ) -> Tensor:
        """A scalar loss from states [T, D]; 0 with a live graph when nothing is masked. Sampled
        negatives are a function of (seed, step) and, if not shared, of the sequence in `batch` and
        the position that a row is."""
        masked = states.index_select(0, rows)
        if self.sampler is None:
            table = model.item_embedding.weight
            return model.item_head.loss(masked, table, targets, backend=backend)
        how, self.sampler = self.item_loss, self.sampler.to(states.device)
        if how.shared:
            negatives = self.sampler.shared(how.negatives, seed, step)
        elif batch is None:
            raise ValueError("negatives of each row need the batch that the rows are of")
        else:
            keys = batch.keys[batch.segment_ids()[rows]]
            positions = batch.positions()[rows]
            negatives = self.sampler.own(how.negatives, seed, step, keys, positions)
        return model.item_head.sampled_loss(
            masked,
            model.item_table,
            targets,
            negatives,
            log_q=self.sampler.log_q if how.log_q and how.loss == "softmax" else None,
            loss=how.loss,
            gbce_t=how.gbce_t,
            backend=backend,
        )
