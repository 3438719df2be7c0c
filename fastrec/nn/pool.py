# SPDX-License-Identifier: Apache-2.0
"""From states to user vectors. Legend: B sequences, T events, V items, D width, K interests."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import JaggedBatch
from fastrec.ops.common.arguments import accumulate_dtype
from fastrec.ops.jagged_max_pool import jagged_max_pool


@dataclass(frozen=True)
class Interests:
    """An attention pool with several queries: a dictionary of interests that all users share.

    Attributes:
        interests: K, how many queries are learned.
    """

    interests: int

    def __post_init__(self):
        if self.interests < 2:
            raise ValueError(
                f"interests must be at least 2, got {self.interests}: one is the pool attention"
            )


Named = Literal["max", "mean", "cls", "ur", "last", "attention"]
Pooling = Named | Interests


def as_value(pool: Pooling) -> str | dict:
    """A pool as JSON has it."""
    return asdict(pool) if isinstance(pool, Interests) else pool


@dataclass(frozen=True, eq=False)
class Encoded:
    """A batch and its states [T, D]. Pooled vectors are kept: several objectives may read them.

    items: [V + S, D], the sum of ids and features that the pass made, where this scores items: it
        is computed once a step.
    """

    batch: JaggedBatch
    states: Tensor
    pooled: dict[Pooling, Tensor] = field(default_factory=dict)
    items: Tensor | None = None


def real_in(*views: Encoded) -> Tensor | None:
    """bool [B], the users that count in every view; None: all. Raises ValueError for views that are
    not of the same users."""
    sizes = [len(view.batch) for view in views]
    if len(set(sizes)) > 1:
        raise ValueError(f"views of the same users have {sizes} sequences")
    known = [view.batch.real for view in views if view.batch.real is not None]
    return torch.stack(known).all(0) if known else None


def is_item(batch: JaggedBatch, num_items: int) -> Tensor:
    """bool [T]: the events that are items; [MASK], row V, stands for one."""
    return batch.values <= num_items


def max_pool(states: Tensor, batch: JaggedBatch, num_items: int) -> Tensor:
    """[B, D]: the largest of each feature over the items of a sequence (UPRec, eq. 8).

    Special tokens do not count, masked items do. A sequence without items gives 0. Of equal maxima
    the first one gets the gradient.
    """
    return jagged_max_pool(states, batch.offsets, mask=is_item(batch, num_items))


def mean_pool(states: Tensor, batch: JaggedBatch, num_items: int) -> Tensor:
    """[B, D]: the mean over the items of a sequence, 0 without items."""
    weight = is_item(batch, num_items).to(states.dtype)
    return weighted_sum(states, weight, batch) / weighted_sum(
        weight.unsqueeze(1), torch.ones_like(weight), batch
    ).clamp_min(1)


def weighted_sum(states: Tensor, weight: Tensor, batch: JaggedBatch) -> Tensor:
    """[B, D]: sum over the events of a sequence of weight [T] times state [T, D]."""
    rows = (states * weight.unsqueeze(1)).to(accumulate_dtype(states))
    return torch.segment_reduce(rows, "sum", offsets=batch.offsets, initial=0.0).to(states.dtype)


def softmax_of_sequences(scores: Tensor, batch: JaggedBatch) -> Tensor:
    """[T]: softmax of `scores` [T] over the events of each sequence. -inf leaves an event out; a
    sequence of nothing else gets 0."""
    segment = batch.segment_ids()
    top = scores.new_full((batch.keys.shape[0],), -torch.inf)
    top = top.scatter_reduce(0, segment, scores.detach(), "amax").clamp_min(-1e30)
    weight = (scores - top.index_select(0, segment)).exp()
    total = torch.segment_reduce(weight, "sum", offsets=batch.offsets, initial=0.0)
    return weight / total.clamp_min(1e-30).index_select(0, segment)


def last_pool(states: Tensor, batch: JaggedBatch, num_items: int) -> Tensor:
    """[B, D]: the state of the last item of a sequence; without items that of its last event, and
    0 without events."""
    states = states if len(states) else F.pad(states, (0, 0, 0, 1))
    last = last_event(is_item(batch, num_items), batch)
    last = states[torch.where(last >= 0, last, batch.offsets[1:] - 1).clamp_min(0)]
    return last.masked_fill((batch.lengths == 0).unsqueeze(1), 0.0)


def last_event(kept: Tensor, batch: JaggedBatch) -> Tensor:
    """int64 [B]: the last event of each sequence that is `kept`, bool [T]; -1 where none is."""
    place = torch.arange(kept.shape[0], device=kept.device).masked_fill(~kept, -1)
    last = torch.cat([place.new_full((1,), -1), place.cummax(0).values])[batch.offsets[1:]]
    return torch.where(last >= batch.offsets[:-1], last, -1)


class Pool(nn.Module):
    """User vectors [B, D] of an encoded view.

    how: "max" or "mean" over the items, the state of [CLS] or [UR], the state of the last item, or
        "attention": the mean weighted by the softmax over the items of q . tanh(W h + b), q learned
        (Yang et al., 2016, eq. 5-7), 0 without items; or `Interests`: such a mean for each of K
        queries, and a linear map without bias of the K means, end to end, to D.

    Raises ValueError for another word.
    """

    def __init__(self, how: Pooling, width: int):
        super().__init__()
        if not isinstance(how, Interests) and how not in get_args(Named):
            raise ValueError(f"pool must be one of {get_args(Named)} or Interests, got {how!r}")
        self.how = how
        if how == "attention":
            self.project = nn.Linear(width, width)
            self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        elif isinstance(how, Interests):
            self.project = nn.Linear(width, width)
            self.queries = nn.Parameter(torch.randn(how.interests, width) * width**-0.5)
            self.merge = nn.Linear(how.interests * width, width, bias=False)

    def forward(self, model, encoded: Encoded) -> Tensor:
        if self.how == "attention":
            return self._means(model, encoded, [self.query])[0]
        if isinstance(self.how, Interests):
            return self.merge(torch.cat(self._means(model, encoded, self.queries.unbind()), 1))
        return model.pool(encoded, self.how)

    def _means(self, model, encoded: Encoded, queries: Sequence[Tensor]) -> list[Tensor]:
        """[B, D] of each query [D]."""
        batch, states = encoded.batch, encoded.states
        hidden, outside = torch.tanh(self.project(states)), ~is_item(batch, model.num_items)
        means = []
        for query in queries:
            scores = hidden @ query
            scores = scores.to(accumulate_dtype(scores)).masked_fill(outside, -torch.inf)
            weight = softmax_of_sequences(scores, batch)
            means.append(weighted_sum(states, weight.to(states.dtype), batch))
        return means
