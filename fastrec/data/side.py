# SPDX-License-Identifier: Apache-2.0
"""What steps, objectives and judges know beside the sequences: computed when it is first asked for.

Legend: U users, V items.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrec.data.attributes import Attribute, EncodedAttribute, encode_attributes, profile_ids
from fastrec.data.batch import SPECIAL_TOKENS, JaggedBatch
from fastrec.data.errors import DataError
from fastrec.data.graph import SocialGraph
from fastrec.data.similar_items import most_similar
from fastrec.data.target_index import TargetIndex


class Shard(NamedTuple):
    """users: int64 [N], those of a step on all processes. This process holds every
    world_size-th from `rank` on. view: number of the view that is made, whose sequences begin with
    the last `max_len` items."""

    users: np.ndarray
    rank: int = 0
    world_size: int = 1
    view: int = 0
    max_len: int | None = None


class SideData:
    """Side data of a training run, read lazily; an error names the file.

    Args:
        dataset: of the run.
        split: whose inputs are trained on.
        attributes: settings of user attributes; an empty list takes all that have a type for it.
        users: int64, the users that standardise and class the attributes; default all.
        labelled: int64, the users whose attributes and friends may be seen, and whose sequences are
            counted and drawn for others (`similar_items`, `target_index`); default all.
        event_columns: that the model reads beside the items: `UserModel.event_columns`.
    """

    def __init__(
        self,
        dataset,
        split: str = "train",
        *,
        attributes: Sequence[Attribute] = (),
        users=None,
        labelled=None,
        event_columns: Sequence[str] = (),
    ):
        self.dataset, self.split = dataset, split
        self.num_items = dataset.num_items
        self.mask_id = self.num_items + SPECIAL_TOKENS.index("mask")
        everyone = torch.arange(dataset.num_users, device="cpu")
        self._settings = list(attributes)
        self.event_columns = list(event_columns)
        for name in self.event_columns:  # polars waits for ever in the forked worker of a loader
            dataset.event_column(name)
        self._users = everyone if users is None else torch.as_tensor(users, device="cpu")
        self._labelled = everyone if labelled is None else torch.as_tensor(labelled, device="cpu")
        self.shard = Shard(np.empty(0, np.int64))
        # [U, ...] by name: `gather` gives every batch the rows of its sequences. Objectives add
        # what they predict.
        self.user_columns: dict[str, Tensor] = {}
        # What the step `fill` asks: (batch with masked targets [N], K) -> (items int64 [N, K],
        # scores [N, K]). Models are above data: training sets it, `nn.filler.Filler`.
        self.filler: Callable[[JaggedBatch, int], tuple[Tensor, Tensor]] | None = None
        # What says which items are similar in place of `most_similar`, whose arguments and result
        # it has: `nn.similar.SimilarItems`.
        self.similar: Callable[..., Tensor] = most_similar

    def gather(self, users, max_len: int | None = None) -> JaggedBatch:
        """The sequences of `users`, the last `max_len` items, with the columns of events and of
        users."""
        batch = self.dataset.gather(users, self.split, max_len, self.event_columns)
        for name, column in self.user_columns.items():
            batch.users[name] = column[batch.keys]
        return batch

    @cached_property
    def item_counts(self) -> Tensor:
        """int64 [V]: how often each item occurs in the inputs of the split."""
        return self.dataset.item_counts(self.split)

    @cached_property
    def mean_rating(self) -> float:
        """Of the events in the split of the `labelled` users. Raises ValueError without any."""
        rows = self.dataset.gather(self.trained_users, self.split, columns=["rating"])
        mean = rows.events["rating"].double().nanmean().item()
        if math.isnan(mean):
            raise ValueError(
                f"no event of the {len(self.trained_users)} trained users has a rating"
            )
        return mean

    @cached_property
    def rating_deviations(self) -> tuple[Tensor, Tensor]:
        """float64 [V] both: by item, the sum of the deviations of its ratings in the split from
        `mean_rating`, and how many there are. Of all users whom a step may have, so that what is
        trained on is a part of them."""
        users = torch.cat([self._users, self._labelled]).unique()
        there = torch.as_tensor(self.dataset.users(self.split), device="cpu")
        rows = self.dataset.gather(there[torch.isin(there, users)], self.split, columns=["rating"])
        left = rows.events["rating"].double() - self.mean_rating
        rated = ~left.isnan()
        values, zeros = rows.values[rated], left.new_zeros(self.num_items)
        totals = zeros.index_add(0, values, left[rated])
        return totals, values.bincount(minlength=self.num_items).double()

    @cached_property
    def trained_users(self) -> Tensor:
        """int64, ascending: the `labelled` users with events in the split, whose sequences a step
        may draw."""
        there = torch.as_tensor(self.dataset.users(self.split), device="cpu")
        return there[torch.isin(there, self._labelled)]

    @cached_property
    def attributes(self) -> list[EncodedAttribute]:
        """The attributes of users, missing for those who are not `labelled`."""
        hidden = torch.ones(self.dataset.num_users, dtype=torch.bool, device="cpu")
        hidden[self._labelled] = False
        hidden = hidden.nonzero().squeeze(1)
        return [attribute.without(hidden) for attribute in self.encoded]

    @cached_property
    def profile_ids(self) -> np.ndarray | None:
        """int64 [U]: equal for `labelled` users with the same discrete attributes, -1 where one is
        missing; None where no attribute is discrete, or there is none."""
        if not self._settings and len(self.dataset.user_attributes().columns) <= 2:
            return None
        try:
            return profile_ids(self.attributes)
        except DataError as error:
            if self._settings:
                raise
            raise ValueError(
                f"{error}. Users are compared by all columns: list `attributes`, or leave profiles"
                " out (same_profile of the step `friend`, false_negatives of `contrast`)"
            ) from error

    @cached_property
    def graph(self) -> SocialGraph:
        """Friendships among the labelled users. Raises ValueError where there is none."""
        graph = SocialGraph.from_dataset(self.dataset, self._labelled)
        if len(graph.values) == 0:
            raise ValueError(f"no two of the {len(self._labelled)} trained users are friends")
        return graph

    @cached_property
    def target_index(self) -> TargetIndex:
        """The training prefixes of the labelled users by the item that they end with."""
        return TargetIndex.from_dataset(self.dataset, self.split, self._labelled)

    @cached_property
    def similar_items(self) -> Tensor:
        """int64 [V]: the item that is most like each item, by the labelled users who have both
        (`most_similar`) or as `similar` says; -1 where there is none."""
        return self.similar(self.dataset, self.split, self._labelled)

    @cached_property
    def encoded(self) -> list[EncodedAttribute]:
        """The attributes of all users, for a judge."""
        return encode_attributes(self.dataset, self._settings, self._users)
