# SPDX-License-Identifier: Apache-2.0
"""Item prediction: every event with a target predicts an item. With masked items it is UPRec's MIP
(section 3.3.1, eq. 6-7) and BERT4Rec, with the next items SASRec.

Legend: T events, N predicted items, V items, D width, K negatives.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import NO_TARGET
from fastrec.data.negatives import NegativeSampler
from fastrec.data.settings import check_fields
from fastrec.data.side import SideData
from fastrec.nn.init import init_bert
from fastrec.nn.plain import first_rows
from fastrec.nn.pool import Encoded
from fastrec.objectives.bpr import bpr
from fastrec.objectives.bpr_max import bpr_max
from fastrec.objectives.predicted import may_lack_targets, places_of, predicted
from fastrec.random import Rng


@dataclass(frozen=True)
class Sampled:
    """Negatives that stand for all items in the loss.

    Attributes:
        negatives: K, drawn with replacement; 0 with `in_batch`: the batch alone.
        by: "uniform", or "popularity": by (number of training events)^alpha.
        alpha: exponent of the popularity; 1 if None.
        shared: the same negatives for all predicted items of a step, much cheaper and with few
            negatives much worse; otherwise each has its own. None: shared for bpr_max and in_batch.
        in_batch: the predicted items of a step, those of all views, are negatives as well (GRU4Rec,
            Hidasi et al., 2016, section 3.1.2); softmax or bpr_max, shared.
        log_q: correct the scores of the softmax by the log of the sampling probability, or of the
            expected number of an item among the candidates; true for the softmax if None.
        gbce_t: calibration of gbce (Petrov and Macdonald, 2023); 0.75 if None.
        bpr_reg: weight of the squared scores of negatives in bpr_max; 1 if None.
    """

    negatives: int = 256
    by: Literal["uniform", "popularity"] = "uniform"
    alpha: float | None = None
    shared: bool | None = None
    in_batch: bool = False
    log_q: bool | None = None
    gbce_t: float | None = None
    bpr_reg: float | None = None

    def __post_init__(self):
        check_fields(self)
        if self.negatives < (0 if self.in_batch else 1):
            raise ValueError(
                "sampled.negatives must be at least 1, or 0 with sampled.in_batch, got"
                f" {self.negatives}"
            )
        if not self.negatives and self.by != "uniform":
            raise ValueError("sampled.by has no effect: sampled.negatives is 0")
        if self.alpha is not None and self.by != "popularity":
            raise ValueError(
                "sampled.alpha has no effect: negatives are uniform (by: popularity uses it)"
            )
        if self.in_batch and self.shared is False:
            raise ValueError("sampled.in_batch needs shared negatives: sampled.shared: true")
        if self.bpr_reg is not None and self.bpr_reg < 0:
            raise ValueError(f"sampled.bpr_reg must be at least 0, got {self.bpr_reg}")

    def sampler(self, side: SideData) -> NegativeSampler:
        return NegativeSampler.of(self.by, side, 1.0 if self.alpha is None else self.alpha)


@dataclass(frozen=True)
class Item:
    """Prediction of the targets of events.

    Attributes:
        views: whose targets are predicted.
        weight: in the joint loss.
        loss: "softmax", "bce" or "gbce", see `sampled_linear_cross_entropy`, "bpr": the target
            above each of a few negatives of its own, or "bpr_max".
        sampled: negatives; None: the softmax over all items.
        project: a linear map of this objective between states and scores, as S3-Rec has for each of
            its tasks. It is no part of the model: the next item is asked without it.
        squash: sigmoid(s) in the place of a score s in bpr, as in the program of S3-Rec.
    """

    views: list[str] = field(default_factory=lambda: ["main"])
    weight: float = 1.0
    loss: Literal["softmax", "bce", "gbce", "bpr", "bpr_max"] = "softmax"
    sampled: Sampled | None = None
    project: bool = False
    squash: bool = False

    def __post_init__(self):
        check_fields(self)
        how = self.sampled
        if how is None and self.loss != "softmax":
            raise ValueError(f"item.loss {self.loss} needs negatives: set item.sampled")
        if how is not None and how.log_q is not None and self.loss != "softmax":
            raise ValueError(f"sampled.log_q has no effect on the loss {self.loss}")
        if how is not None and how.in_batch and self.loss not in ("softmax", "bpr_max"):
            raise ValueError(
                f"sampled.in_batch: {self.loss} would be a sum over all targets of the step; its"
                " loss is softmax or bpr_max"
            )
        if how is not None and how.gbce_t is not None and self.loss != "gbce":
            raise ValueError(f"sampled.gbce_t has no effect on the loss {self.loss}")
        if how is not None and how.bpr_reg is not None and self.loss != "bpr_max":
            raise ValueError(f"sampled.bpr_reg has no effect on the loss {self.loss}")
        if how is not None and how.shared is False and self.loss == "bpr_max":
            raise ValueError("item.loss bpr_max needs shared negatives: sampled.shared: true")
        if how is not None and how.shared and self.loss == "bpr":
            raise ValueError("item.loss bpr needs negatives of each target: sampled.shared: false")
        if self.squash and self.loss != "bpr":
            raise ValueError(f"item.squash has no effect on the loss {self.loss}")

    @property
    def shares(self) -> bool:
        """Whether the negatives of a step are the same for all predicted items."""
        how = self.sampled
        if how is None or how.shared is not None:
            return how is not None and bool(how.shared)
        return how.in_batch or self.loss == "bpr_max"

    def build(self, model, side: SideData) -> "ItemPrediction":
        if getattr(model, "num_users", 0):  # it has a vector of each user
            model.check_users(side.dataset)
            side.user_columns["user"] = torch.arange(model.num_users, device="cpu")
        width = model.config.width + model.config.user_width if self.project else 0
        if self.sampled is None:
            return ItemPrediction(self, width=width)
        share = None
        if self.sampled.in_batch and self.loss == "softmax" and self.sampled.log_q is not False:
            share = side.item_counts / side.item_counts.sum()
            if not self.sampled.negatives:  # a number for what is no candidate, as a sampler has
                share = share.clamp_min(share[share > 0].min())
        return ItemPrediction(self, self.sampled.sampler(side), share, width)


class ItemPrediction(nn.Module):
    """Mean over the predicted items of -log softmax(query(h_t) . E + b)[item], or of the sampled
    loss in its place.

    Args:
        settings: of the loss.
        sampler: of the negatives that `settings` asks for.
        share: float32 [V], of the training events, for candidates in batch whose scores are
            corrected.
        width: of the states, where `settings` maps them.
    """

    backend: str | None = None

    def __init__(
        self,
        settings: Item,
        sampler: NegativeSampler | None = None,
        share: Tensor | None = None,
        width: int = 0,
    ):
        super().__init__()
        self.settings, self.sampler, self.share = settings, sampler, share
        self.linear = init_bert(nn.Linear(width, width)) if settings.project else None

    def forward(self, model, rng: Rng, *views: Encoded) -> dict[str, tuple[Tensor, Tensor | int]]:
        """{"item": (loss, N)}, of bpr the number of pairs; 0 with a live graph when nothing is
        predicted. Sampled negatives are a function of (seed, step) and, if not shared, of the key
        and the position of an event.
        Candidates in batch are the targets of this process."""
        parts = [predicted(model, view, "item") for view in views]
        states, targets = parts[0]
        if len(parts) > 1:
            states, targets = (torch.cat(part) for part in zip(*parts, strict=True))
        if self.linear is not None:
            states = self.linear(states)
        count: Tensor | int = len(targets)
        if any(view.batch.events["target"].dim() > 1 for view in views):
            count = (targets != NO_TARGET).sum()  # an event may have fewer than A targets
        sharded = model.sharded_table
        if self.sampler is None or self.settings.sampled is None:
            if sharded is not None:
                query = model.item_head.query(states)
                return {"item": sharded.cross_entropy(query, targets, self.backend)}
            table = model.scoring(views[0])
            loss = model.item_head.loss(states, table, targets, backend=self.backend)
            return {"item": (loss, count)}
        how, self.sampler = self.settings.sampled, self.sampler.to(states.device)
        negatives = self._negatives(how, rng, views)
        if sharded is not None:
            loss = self._over_rows(model, sharded.rows(targets, negatives), states)
            return {"item": (loss, count)}
        head, table = model.item_head, model.scoring(views[0])
        if self.settings.loss == "bpr":
            query, squash = head.query(states), self.settings.squash
            return {"item": bpr(query, table, head.bias, targets, negatives, squash)}
        if how.in_batch:
            negatives = torch.cat([targets, negatives])
            if not len(negatives):
                negatives = targets.new_full((1,), NO_TARGET)
        if self.settings.loss == "bpr_max":
            items, reg = table[: model.num_items], 1.0 if how.bpr_reg is None else how.bpr_reg
            loss = bpr_max(head.query(states), items, head.bias, targets, negatives, reg)
        else:
            lacks = not len(targets) or any(may_lack_targets(view.batch) for view in views)
            loss = self._over_drawn(
                model, table, states, targets, negatives, how.in_batch and lacks
            )
        return {"item": (loss, count)}

    def _negatives(self, how: Sampled, rng: Rng, views: tuple[Encoded, ...]) -> Tensor:
        """Drawn items, int64 [K] or [N, K]."""
        assert self.sampler is not None
        if not how.negatives:
            return torch.empty(0, dtype=torch.int64, device=self.sampler.log_q.device)
        if self.settings.shares:
            return self.sampler.shared(how.negatives, rng)
        places = [places_of(view.batch) for view in views]
        keys, events = (torch.cat(part) for part in zip(*places, strict=True))
        return self.sampler.own(how.negatives, rng, keys, events)

    def _over_drawn(
        self, model, table: Tensor, states: Tensor, targets: Tensor, negatives: Tensor, lacks: bool
    ) -> Tensor:
        """The sampled loss over the rows of a table. lacks: a negative may be -100, the target of a
        row that has none."""
        how = self.settings.sampled
        assert how is not None and self.sampler is not None
        if lacks:  # a row of the table that is no item, and scores nothing, stands for no target
            negatives = negatives.masked_fill(negatives == NO_TARGET, model.num_items)
            if len(table) == model.num_items:  # the head's own: a copy
                table = F.pad(table, (0, 0, 0, 1))
        else:
            table = first_rows(table, model.num_items, model.sparse_tables)
        log_q = None
        if self.settings.loss == "softmax" and how.log_q is not False:
            log_q = self.sampler.log_q
            if how.in_batch:
                log_q = F.pad(self._log_counts(how, targets), (0, len(table) - model.num_items))
        return model.item_head.sampled_loss(
            states,
            table,
            targets,
            negatives,
            log_q=log_q,
            loss=self.settings.loss,
            gbce_t=0.75 if how.gbce_t is None else how.gbce_t,
            sparse_grad=model.sparse_tables,
            backend=self.backend,
        )

    def _over_rows(self, model, rows, states: Tensor) -> Tensor:
        """The sampled loss over the rows of a sharded table, `nn.sharded.Candidates`."""
        how = self.settings.sampled
        assert how is not None and self.sampler is not None
        correct = self.settings.loss == "softmax" and how.log_q is not False
        return model.item_head.sampled_loss(
            states,
            rows.table,
            rows.targets,
            rows.negatives,
            bias=rows.bias,
            log_q=self.sampler.log_q[rows.ids] if correct else None,
            loss=self.settings.loss,
            gbce_t=0.75 if how.gbce_t is None else how.gbce_t,
            num_items=model.num_items,
            backend=self.backend,
        )

    def _log_counts(self, how: Sampled, targets: Tensor) -> Tensor:
        """[V], log(N p_j + K q_j): how often item j is expected among N targets and K negatives, p
        its share of the training events and q the law of the sampler."""
        assert self.sampler is not None and self.share is not None
        self.share = self.share.to(targets.device)
        number = (targets != NO_TARGET).sum().clamp_min(1)
        return (number * self.share + how.negatives * self.sampler.log_q.exp()).log()
