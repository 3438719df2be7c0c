"""The weighted sum of objectives that a stage trains (UPRec eq. 15), from one encoder pass."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastrec.data.attributes import EncodedAttribute, missing_value
from fastrec.data.batch import JaggedBatch
from fastrec.data.errors import check_choices
from fastrec.nn.pool import max_pool
from fastrec.nn.user_model import UserModel
from fastrec.objectives.masked_item import ItemLoss, MaskedItemPrediction, Masking
from fastrec.objectives.social_relation import SocialRelationDetection
from fastrec.objectives.user_attribute import UserAttributePrediction
from fastrec.random import Rng


@dataclass(frozen=True)
class Objectives:
    """Weights of the objectives of a stage; 0 leaves one out.

    Attributes:
        masked_item: masked item prediction. Without it no item is masked.
        user_attribute: user attribute prediction.
        social_relation: social relation detection.
        attribute_pool: the user vector of attribute prediction: "max" over the items, or the state
            of [CLS] (UPRec section 3.4, fine-tuning).
        similarity_weight: where the weights of the similarity of two users start; None is
            1 / model.width.
        friends_in_all: drawn friends also take part in the other objectives; otherwise only in
            social relation detection.
        item_loss: the loss of masked item prediction.
    """

    masked_item: float = 1.0
    user_attribute: float = 0.0
    social_relation: float = 0.0
    attribute_pool: Literal["max", "cls"] = "max"
    similarity_weight: float | None = None
    friends_in_all: bool = True
    item_loss: ItemLoss = field(default_factory=ItemLoss)

    def __post_init__(self):
        check_choices(self)
        for name in ("masked_item", "user_attribute", "social_relation"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"the weight of {name} is negative: {getattr(self, name)}")


class Term(NamedTuple):
    """`weight` times the mean of a loss over `number` things."""

    objective: str
    weight: float
    loss: Tensor
    number: Tensor | int


@dataclass(frozen=True)
class Prepared:
    """A batch as the losses read it.

    batch: before items were masked; columns hold the values that are predicted, missing ones
        included (NaN or -1).
    masked: int64 [T], its values with items masked.
    rows, targets: int64 [N], the masked events and the items that stood there; -100 as a target
        is not counted. Empty where no item is predicted.
    """

    batch: JaggedBatch
    masked: Tensor
    rows: Tensor
    targets: Tensor


class JointObjective(nn.Module):
    """Corrupts and encodes a batch once and gives every objective what it needs of that.

    Args:
        objectives: the weights.
        model: only its sizes are read.
        attributes: of user attribute prediction.
        item_counts: the training events of each item [V], asked for negatives by popularity.
    """

    def __init__(
        self,
        objectives: Objectives,
        model: UserModel,
        attributes: list[EncodedAttribute],
        item_counts: Callable[[], Tensor] | None = None,
    ):
        super().__init__()
        self.objectives, width = objectives, model.config.width
        if max(objectives.masked_item, objectives.user_attribute, objectives.social_relation) <= 0:
            raise ValueError("no objective has a positive weight")
        if objectives.attribute_pool == "cls" and not model.config.use_cls:
            raise ValueError("attribute_pool 'cls' needs a model with use_cls")
        self.masked_item = None
        if objectives.masked_item:
            sampler = objectives.item_loss.make_sampler(model.num_items, item_counts)
            self.masked_item = MaskedItemPrediction(objectives.item_loss, sampler)
        self.user_attribute = (
            UserAttributePrediction(width, attributes) if objectives.user_attribute else None
        )
        self.social_relation = None
        if objectives.social_relation:
            self.social_relation = SocialRelationDetection(width, objectives.similarity_weight)

    def user_vectors(self, model: UserModel, states: Tensor, batch: JaggedBatch) -> dict:
        """The [B, D] vectors that the heads read, by name of the pool; only those that are used."""
        weights, vectors = self.objectives, {}
        by_cls = weights.attribute_pool == "cls"
        if weights.user_attribute and by_cls:
            vectors["cls"] = states[batch.offsets[:-1]]
        if weights.social_relation or (weights.user_attribute and not by_cls):
            vectors["max"] = max_pool(states, batch, model.num_items)
        return vectors

    def forward(
        self,
        model: UserModel,
        batch: JaggedBatch,
        masking: Masking,
        seed: int,
        step: int,
        backend=None,
    ) -> list[Term]:
        """The terms of the loss: the sum of weight times loss, in one process."""
        prepared = self.prepare(model, batch, masking, seed, step)
        return self.losses(model, prepared, seed, step, backend)

    def prepare(
        self, model: UserModel, batch: JaggedBatch, masking: Masking, seed: int, step: int
    ) -> Prepared:
        """The batch with items masked. What depends on values, like the number of masked items, is
        decided here; `losses` depends on shapes."""
        if self.masked_item is None:
            none = batch.values.new_empty(0)
            masked, rows, targets = batch, none, none
        else:
            masked, rows, targets = masking(batch, model, seed, step)
        if batch.own is not None and not self.objectives.friends_in_all:
            kept = rows < batch.offsets[batch.own]
            rows, targets = rows[kept], targets[kept]
            drawn = torch.arange(len(batch), device=rows.device) >= batch.own
            columns = {
                name: column.masked_fill(drawn, missing_value(column))
                for name, column in batch.columns.items()
            }
            batch = replace(batch, columns=columns)
        return Prepared(batch, masked.values, rows, targets)

    def losses(
        self,
        model: UserModel,
        prepared: Prepared,
        seed: Tensor | int,
        step: Tensor | int,
        backend=None,
    ) -> list[Term]:
        """The terms of a prepared batch. Seed and step may be tensors on the device."""
        weights, terms, batch = self.objectives, [], prepared.batch
        rows, targets = prepared.rows, prepared.targets
        masked = replace(batch, values=prepared.masked)
        states = model.encode(masked, Rng(seed, step))
        vectors = self.user_vectors(model, states, batch)
        if self.masked_item is not None:
            loss = self.masked_item(
                model, states, rows, targets, masked, seed, step, backend=backend
            )
            terms.append(Term("masked_item", weights.masked_item, loss, len(rows)))
        if self.user_attribute is not None:
            users = vectors[weights.attribute_pool]
            for loss, count in self.user_attribute(users, batch.columns).values():
                terms.append(Term("user_attribute", weights.user_attribute, loss, count))
        if self.social_relation is not None:
            loss = self.social_relation(vectors["max"], batch.pairs, backend=backend)
            count = len(batch.pairs.positive)  # type: ignore[union-attr]
            terms.append(Term("social_relation", weights.social_relation, loss, count))
        return terms


def total_loss(terms: list[Term], world_size: int = 1) -> Tensor:
    """The weighted sum. With several processes, scaled so that the average over ranks (DDP's) is
    the weighted sum of the means over the things of all ranks."""
    if world_size == 1:
        return torch.stack([term.weight * term.loss for term in terms]).sum()
    device = terms[0].loss.device
    counts = torch.stack(
        [torch.as_tensor(t.number, dtype=torch.float64, device=device) for t in terms]
    )
    totals = counts.clone()
    torch.distributed.all_reduce(totals)
    scale = (counts * world_size / totals.clamp_min(1)).to(terms[0].loss.dtype)
    return sum(t.weight * t.loss * share for t, share in zip(terms, scale, strict=True))  # type: ignore[return-value]
