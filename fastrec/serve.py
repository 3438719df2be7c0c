# SPDX-License-Identifier: Apache-2.0
"""What a trained model is asked: the next items of users and histories, and similar items, all in
original ids.

Legend: U users, V items, M items that are scored, D width, k results a row.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastrec.data.batch import JaggedBatch
from fastrec.data.ids import Ids, listed
from fastrec.evaluation.blocks import finite, row_blocks
from fastrec.evaluation.next_item import (
    adjustment,
    check_adjusted,
    check_model,
    check_scores,
    log_shares,
    seen_items,
)
from fastrec.ops.linear_topk import TopK, linear_topk
from fastrec.serve_cold import OtherCatalogue
from fastrec.vectors import user_rows

Lists = tuple[Tensor, Tensor]  # values and offsets


class Asked(NamedTuple):
    """A block of those who are asked about: their numbers [N], the input of the model, and what
    they have seen, sorted within each of them."""

    owners: np.ndarray
    batch: JaggedBatch
    past: Lists | None


class Scored(NamedTuple):
    """The items that are scored: their vectors [M, D], biases [M], and rows [M] in the whole table,
    ascending, on the host; None for all."""

    table: Tensor
    bias: Tensor
    rows: Tensor | None


MOST_SAID = 1000  # different warnings that are remembered


class Recommender:
    """Answers requests. What all of them need is read once: the ids and their rows, the popularity
    of items, the item vectors of unit length. Of a model that has been trained further make another
    one: its vectors are others. Several threads may ask at a time.

    Args:
        model: on any device, which the requests run on.
        dataset: whose items the model was trained on, with the histories of its users.
        program: (values, offsets) -> queries, of `export_query`: it answers in place of
            `model.ask` where the input of the model is items alone. The model answers for users
            that have a vector, and where it reads ratings or time gaps.
        other: `fastrec.OtherCatalogue`: its items are recommended, by a model that was trained for
            cold start. `allowed`, `blocked` and `seen` are then of them.

    Raises ValueError for a data set whose items are not those of the model (`load_model` finds them
    by their ids).
    """

    def __init__(
        self,
        model,
        dataset,
        program: Callable[[Tensor, Tensor], Tensor] | None = None,
        other: OtherCatalogue | None = None,
    ):
        check_model(model)
        model.check_items(dataset)
        if program is not None and other is not None:
            raise ValueError("a program scores the model's own items, not those of other")
        self.model, self.dataset, self._program, self._other = model, dataset, program, other
        self._items = Ids(dataset.item_ids())
        self._offered = self._items if other is None else other.ids
        self._adjusted: tuple[float, Tensor] | None = None
        self._said: dict = {}  # of warnings, whose texts clients write

    def recommend(
        self,
        k: int,
        user_ids: Sequence | None = None,
        histories: Sequence[Sequence] | None = None,
        *,
        seen: str = "exclude",
        logit_adjustment: float = 0.0,
        allowed: Sequence | None = None,
        blocked: Sequence | None = None,
    ):
        """The k best next items of each user, given the most recent items of the history.

        user_ids: users of the data set; all of them where histories are not given either.
        histories: lists of original item ids, oldest first, in place of users of the data set;
            their user_id is their place in the list. A model that reads ratings or time gaps sees
            none there. Items that the model does not know are left out, with a warning that counts
            them. A causal model has nothing to go on where nothing is known, and gives no rows.
        seen: "exclude" leaves out items that the user already has, "none" keeps them.
        logit_adjustment: tau of `adjustment`: above 0 popular items fall.
        allowed: item ids; only these are scored.
        blocked: item ids that are never recommended.

        Returns a polars frame: user_id, rank (from 1), item_id, score; fewer than k rows for a user
        with fewer than k items left.

        Raises ValueError for a wrong k or seen, for users, allowed or blocked items that are not
        known, for scores that are not finite, and for a model that was trained for ratings alone.
        """
        _check_k(k)
        if seen not in ("exclude", "none"):
            raise ValueError(f"seen must be 'exclude' or 'none', got {seen!r}")
        check_adjusted(self.model, logit_adjustment)
        if logit_adjustment and self._other is not None:
            raise ValueError("logit_adjustment is of the model's own items, not of other")
        people, asked = self._asked(user_ids, histories, seen == "exclude")
        found = []
        with torch.no_grad():
            scored = self._scored(logit_adjustment, allowed, blocked)
            for owners, batch, past in asked:
                found.append((owners, _best(self._query(batch), scored, k, past)))
        return _table("user_id", people, "item_id", self._offered, found)

    def check_users(self, user_ids: Sequence | None) -> None:
        """Raises ValueError for users that `recommend` does not know, and for an empty list."""
        user_rows(self._users, user_ids)

    def queries(
        self, user_ids: Sequence | None = None, histories: Sequence[Sequence] | None = None
    ):
        """What is compared with the item vectors (`item_vectors`): with both, an index of somebody
        else finds what `recommend` does.

        Returns a polars frame: user_id, query (array of D float32); as in `recommend`, no row for
        somebody of whom a causal model knows nothing.
        """
        import polars

        people, asked = self._asked(user_ids, histories, False)
        owners, queries = [], [self._table[:0]]
        with torch.no_grad():
            for part, batch, _ in asked:
                owners.append(part)
                queries.append(self._query(batch))
        rows = _joined(owners, np.int64)
        numbers = torch.cat(queries).detach().float().cpu().numpy()
        return polars.DataFrame({"user_id": people.take(rows), "query": numbers})

    def similar(self, item_ids: Sequence | None = None, k: int = 10):
        """The k items whose vectors have the largest cosine with that of each item, never the item
        itself.

        item_ids: all items for None.

        Returns a polars frame: item_id, rank (from 1), similar_item_id, score (the cosine).

        Raises ValueError for a wrong k, and for items that are not known.
        """
        _check_k(k)
        if self._other is not None:
            raise ValueError("similar is of the model's own items, not of other")
        if item_ids is None:
            indices = np.arange(len(self._items))
        else:
            indices = self._items.rows(item_ids, "items")
        unit, found = self._unit, []
        for rows in row_blocks(len(indices)):
            own = torch.as_tensor(indices[rows], device=unit.device)
            itself = own, torch.arange(len(own) + 1, device=unit.device)
            best = linear_topk(unit[own], unit, min(k, len(unit)), exclude=itself)
            found.append((indices[rows], best))
        return _table("item_id", self._items, "similar_item_id", self._items, found)

    @cached_property
    def _unit(self) -> Tensor:
        """[V, D]: the item vectors in unit length; one of zeros, which has no direction, stays."""
        return F.normalize(finite(self._table.float(), "item vectors"), dim=1)

    @cached_property
    def _table(self) -> Tensor:
        """[V, D]: the vectors that score items."""
        if self._other is not None:
            return self._other.table
        with torch.no_grad():
            return self.model.item_table.detach()

    @property
    def scoring(self) -> tuple[Tensor, Tensor]:
        """(vectors [V, D], biases [V]): what scores the items that are recommended."""
        bias = self.model.item_head.bias if self._other is None else self._other.bias
        return self._table, bias.detach()

    @cached_property
    def _log_shares(self) -> Tensor:
        return log_shares(self.dataset)

    @cached_property
    def _users(self) -> Ids:
        return Ids(self.dataset.user_ids())

    def _query(self, batch: JaggedBatch) -> Tensor:
        batch = batch.to(self.model.device)
        if self._other is not None:
            query = self._other.query(self.model, batch)
        elif self._program is None or batch.events or batch.users:
            query = self.model.ask(batch)
        else:
            query = self._program(batch.values, batch.offsets).to(self._table.dtype)
        return finite(query, "states")  # a score that is no number would count as none

    def _asked(self, user_ids, histories, past: bool):
        """(the ids of those who may be asked about, blocks of those who are)."""
        if self._other is None:
            check_scores(self.model)
        if histories is None:
            return self._users, self._asked_users(user_rows(self._users, user_ids), past)
        if user_ids is not None:
            raise ValueError("recommend takes user_ids or histories, not both")
        histories = [listed(history) for history in listed(histories)]
        known = self._known(histories)
        return Ids(np.arange(len(histories))), self._asked_histories(known, past)

    def _asked_users(self, indices: np.ndarray, past: bool) -> Iterator[Asked]:
        for rows in row_blocks(len(indices)):
            users, seen = torch.as_tensor(indices[rows], device="cpu"), None
            if past and self._other is not None:
                seen = self._other.taken(users)
            elif past:
                seen = seen_items(self.dataset, users, "all")
            batch = self.model.inputs(self.dataset, users, "all", ask=self._other is None)
            yield Asked(indices[rows], batch, seen)

    def _asked_histories(self, known: dict[int, list[int]], past: bool) -> Iterator[Asked]:
        owners = np.fromiter(known, dtype=np.int64)
        for rows in row_blocks(len(known)):
            part = [known[owner] for owner in owners[rows].tolist()]
            seen = None
            if past and self._other is None:
                items = [item for history in part for item in sorted(history)]
                ends = np.cumsum([0, *map(len, part)])
                seen = torch.tensor(items, dtype=torch.int64, device="cpu"), torch.from_numpy(ends)
            yield Asked(owners[rows], self.model.inputs_of(part, ask=self._other is None), seen)

    def _known(self, histories: Sequence[Sequence]) -> dict[int, list[int]]:
        """By place, the rows of the items that are known of each history that can be asked."""
        known, unknown, total = {}, [], 0
        for place, history in enumerate(histories):
            rows = self._items.find(history)
            total += len(rows)
            if -1 in rows:
                unknown += [each for each, row in zip(history, rows, strict=True) if row < 0]
                rows = [row for row in rows if row >= 0]
            if rows or not self.model.config.causal:
                known[place] = rows
        said = []
        if unknown:
            said.append(
                f"{len(unknown)} of {total} items of the histories are not known, the first is"
                f" {repr(unknown[0])[:80]}"
            )
        if len(known) < len(histories):
            said.append(
                f"{len(histories) - len(known)} of {len(histories)} histories have no known item:"
                " a causal model has nothing to go on and gives them no rows"
            )
        if said:
            if len(self._said) > MOST_SAID:
                self._said.clear()
            text = "; ".join(said)
            warnings.warn_explicit(text, UserWarning, __file__, 0, __name__, self._said)
        return known

    def _scored(self, tau: float, allowed, blocked) -> Scored:
        table, bias = self.scoring
        if tau != 0:
            kept = self._adjusted  # read once: another thread may replace it
            if kept is None or kept[0] != tau:
                kept = self._adjusted = tau, adjustment(self._log_shares, tau)
            bias = bias - kept[1].to(bias.device)
        if blocked is not None and (blocked := listed(blocked)):
            never = torch.from_numpy(self._offered.rows(blocked, "blocked items"))
            bias = bias.index_fill(0, never.to(bias.device), -torch.inf)
        if allowed is None:
            return Scored(table, bias, None)
        rows = torch.from_numpy(np.unique(self._offered.rows(allowed, "allowed items")))
        there = rows.to(table.device)
        return Scored(table[there], bias[there], rows)


def recommend(model, dataset, k: int, user_ids=None, histories=None, *, other=None, **options):
    """`Recommender(model, dataset, other=other).recommend(k, user_ids, histories, **options)`: for
    a request alone. It reads the ids of the data set; for many requests keep a `Recommender`."""
    return Recommender(model, dataset, other=other).recommend(k, user_ids, histories, **options)


def _best(query: Tensor, scored: Scored, k: int, past: Lists | None) -> TopK:
    """The best of the items that are scored, as rows of the whole table, on the host."""
    if past is not None and scored.rows is not None:
        past = _among(scored.rows, past)
    best = min(k, len(scored.table))
    if best == 0:
        none = torch.empty(len(query), 0, dtype=torch.float32, device="cpu")
        return TopK(none, none.long())
    exclude = None
    if past is not None:
        exclude = past[0].to(query.device), past[1].to(query.device)
    found = linear_topk(query, scored.table, best, linear_bias=scored.bias, exclude=exclude)
    scores, items = found.values.cpu(), found.indices.cpu()
    if scored.rows is not None:
        items = torch.where(items < 0, items, scored.rows[items.clamp_min(0)])
    return TopK(scores, items)


def _among(rows: Tensor, lists: Lists) -> Lists:
    """The items of lists that are among `rows`, ascending, as places there."""
    items, offsets = lists
    if len(rows) == 0:
        return items[:0], torch.zeros_like(offsets)
    place = torch.searchsorted(rows, items).clamp_max(len(rows) - 1)
    here = rows[place] == items
    return place[here], F.pad(here.cumsum(0), (1, 0))[offsets]


def _table(owner: str, people: Ids, item: str, items: Ids, found: list[tuple[np.ndarray, TopK]]):
    """A frame of what was found for the rows of `people`, a block after the other."""
    import polars

    owners, ranks, best, scores = [], [], [], []
    for rows, (values, indices) in found:
        places = indices.cpu().numpy()
        kept = places >= 0
        row, rank = kept.nonzero()
        owners.append(rows[row])
        ranks.append(rank + 1)
        best.append(places[kept])
        scores.append(values.float().cpu().numpy()[kept])
        finite(torch.from_numpy(scores[-1]), "scores")
    whole = [_joined(column, np.int64) for column in (owners, ranks, best)]
    return polars.DataFrame(
        [
            people.take(whole[0]).alias(owner),
            polars.Series("rank", whole[1]),
            items.take(whole[2]).alias(item),
            polars.Series("score", _joined(scores, np.float32)),
        ]
    )


def _joined(parts: list[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _check_k(k: int) -> None:
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a whole number, at least 1, got {k!r}")
