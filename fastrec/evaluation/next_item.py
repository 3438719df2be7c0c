# SPDX-License-Identifier: Apache-2.0
"""The next item, ranked: targets of users among all items or sampled ones, as a `Protocol` says.

Where a user has several targets, all are in one ranking: each competes with the others.

Legend: U users, N users of a block, P pairs of a user and a target.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from fastrec.data.batch import offsets_of, spans
from fastrec.data.dataset import indices
from fastrec.evaluation.blocks import finite, row_blocks, scores_of
from fastrec.evaluation.candidates import (
    SampledNegatives,
    held_out_items,
    listed_negatives,
    sampled_negatives,
)
from fastrec.evaluation.metrics import ranking_metrics
from fastrec.evaluation.protocol import Protocol, protocol_of
from fastrec.evaluation.ranking import (
    candidate_scores,
    others_above,
    rank_candidates,
    seen_above,
)
from fastrec.nn.text_model import TextModel
from fastrec.ops.linear_rank import linear_rank
from fastrec.ops.linear_topk import linear_topk


def seen_items(dataset, users: Tensor, split: str) -> tuple[Tensor, Tensor]:
    """(items, offsets [N + 1]) int64: the items in the input of each user, sorted, for `exclude` of
    linear_rank and linear_topk."""
    batch = dataset.gather(users, split, max_len=None)
    rows = batch.segment_ids()
    order = (rows * dataset.num_items + batch.values).argsort()
    return batch.values[order], batch.offsets


MOST_ADJUSTED = 1e9  # from a score: float32 keeps no digit of what it was


def log_shares(dataset) -> Tensor:
    """float64 [V]: log of the share of an item in the training events. Items without a training
    event count as one."""
    counts = dataset.item_counts("train").double().clamp_min(1)
    return (counts / counts.sum()).log()


def adjustment(shares: Tensor, tau: float) -> Tensor:
    """float32 [V], tau times `log_shares`: what post-hoc logit adjustment (Menon et al., 2021,
    eq. 9) takes from the scores.

    A model trained by softmax scores items by log-probability. With tau = 1 they are ranked by how
    much likelier a user makes them than they are for everyone, the better ranking where candidates
    are drawn by popularity.
    """
    if not math.isfinite(tau):
        raise ValueError(f"logit_adjustment must be finite, got {tau}")
    taken = tau * shares
    if taken.abs().max() > MOST_ADJUSTED:
        raise ValueError(f"logit_adjustment is {tau}: scores would be lost in it")
    return taken.float()


def check_model(model) -> None:
    """Raise TypeError for the folder of a model in its place."""
    if isinstance(model, str | Path):
        raise TypeError(f"expected a model, got {str(model)!r}: fastrec.load_model reads it")


def check_adjusted(model, tau: float) -> None:
    """Raise ValueError for a `tau` of `adjustment` with a model of texts: scores are cosines."""
    if tau and isinstance(model, TextModel):
        raise ValueError("logit_adjustment must be 0: the scores of texts are cosines")


def next_item_queries(model, dataset, users: Tensor, split: str) -> Tensor:
    """[N, D] item-head queries for the item that follows the input of each user in `split`."""
    batch = model.inputs(dataset, users, split, ask=True).to(model.device)
    return finite(model.ask(batch), "states")  # a score that is no number would count as none


def check_scores(model) -> None:
    """Raise ValueError for a model that `fit` has trained for something else alone: what scores its
    items is as random as it began."""
    if not model.trained_on.get("scores_items", True):
        stage = model.trained_on.get("stage")
        trained = (model.recipe or {}).get(stage) or {}
        objectives = [
            name for name, part in (trained.get("objectives") or {}).items() if part is not None
        ]
        raise ValueError(
            f"the model was trained for {', '.join(objectives)} (stage {stage}) without the"
            " objective item: it scores no next items"
        )


def evaluate(
    model, dataset, protocol: Protocol | None = None, split: str = "test", users=None
) -> dict[str, float]:
    """`ranking_metrics` of the targets of `users` (int64 indices; all users of the split).

    protocol: None: that of the model (`protocol_of`), or the default one.
    split: "valid" or "test".
    """
    check_model(model)
    if protocol is None:
        protocol = protocol_of(model) or Protocol()
    if not isinstance(protocol, Protocol):
        raise TypeError(f"protocol must be a Protocol, got {type(protocol).__name__}")
    model.check_items(dataset)
    check_scores(model)
    check_adjusted(model, protocol.logit_adjustment)
    users = dataset.users(split) if users is None else users
    judge = NextItemJudge(dataset, torch.from_numpy(indices(users)), split, protocol)
    return judge.metrics(judge.ranks(model))


class NextItemJudge:
    """Ranks the targets of `split` of a dataset for a user set under a protocol.

    targets, owner: int64 [P], the items and the places of their users in `users`; user by user, an
        item once a user, in the order of the events. Leave-one-out has one a user.
    offsets: int64 [U + 1], the pairs of each user.

    Negatives are a function of the user, so that models and epochs are compared on the same
    candidates. `ranks`, `lists` and `popularity_ranks` take a process group, whose processes all
    ask and share the users. Raises ValueError without a user, or for one who is not in the split.
    """

    def __init__(self, dataset, users: Tensor, split: str, protocol: Protocol | None = None):
        protocol = protocol or Protocol()
        self.dataset, self.users, self.split, self.protocol = dataset, users, split, protocol
        if len(users) == 0:
            raise ValueError(f"there is no user to evaluate in split {split!r}")
        self.targets, self.owner = held_out_items(dataset, users, split)
        number = self.owner.bincount(minlength=len(users))
        self.offsets, self.several = offsets_of(number), bool((number > 1).any())
        self.adjustment = torch.zeros(dataset.num_items, dtype=torch.float32, device="cpu")
        if tau := protocol.logit_adjustment:
            self.adjustment = adjustment(log_shares(dataset), tau)
        self._listed: Tensor | None = None
        if protocol.negatives_file is not None:
            self._listed = listed_negatives(dataset, users, protocol.negatives_file)
        elif protocol.candidates == "sampled":
            how = protocol.others, protocol.seed, protocol.drawn_by
            self._drawn = SampledNegatives(dataset, *how)
            self._drawn.check(users)
        self._table: Tensor | None = None  # of the model that `score` is asked about

    def __len__(self) -> int:
        return len(self.users)

    def score(self, model, objective, rows: slice) -> Tensor:
        """`rank_rows`; the heads of the objective take no part. The item table, which may cost a
        product over all items, is kept until `metrics` ends a validation."""
        if model.sharded_table is not None:
            return self._rank_sharded(model, rows)
        if self._table is None:
            self._table = _item_table(model)
        return self.rank_rows(model, rows, self._table)

    @property
    def metric_names(self) -> list[str]:
        return list(self.metrics(torch.ones(len(self.targets), dtype=torch.float32, device="cpu")))

    def metrics(
        self, ranks: Tensor, objective=None, users: Tensor | None = None
    ) -> dict[str, float]:
        """`ranking_metrics` of what `score` gives for all rows. users: bool [U], whom to average
        over; None: all."""
        owner, self._table = self.owner, None
        if users is not None:
            kept = users[owner]
            ranks, owner = ranks[kept], owner[kept]
        return ranking_metrics(ranks, tuple(self.protocol.cutoffs), owner, self.several)

    def rank_rows(self, model, rows: slice, table: Tensor | None = None) -> Tensor:
        """float64 [P of the rows]: ranks of the targets of `users[rows]`, on the CPU. Dropout is
        off. table: `model.item_table`, where it is known."""
        with torch.no_grad():
            query, bias = self._asked(model, rows)
            # Scores in full precision also in bf16-mixed validation: coarse ones would tie.
            with torch.autocast(query.device.type, enabled=False):
                table = _item_table(model) if table is None else table
                return self._rank(query, table, bias, rows).cpu()

    @torch.no_grad()
    def _rank_sharded(self, model, rows: slice) -> Tensor:
        """`rank_rows` of a model whose item vectors are spread over processes, which all ask."""
        from fastrec.evaluation.sharded import sharded_ranks

        query = next_item_queries(model, self.dataset, self.users[rows], self.split)
        sharded, device = model.sharded_table, query.device
        pairs = slice(int(self.offsets[rows.start]), int(self.offsets[rows.stop]))
        owner, targets = self.owner[pairs], self.targets[pairs].to(device)
        query = query[(owner - rows.start).to(device)]
        adjustment, seen = self.adjustment.to(device), self.protocol.seen
        with torch.autocast(device.type, enabled=False):
            if self.protocol.candidates == "sampled":
                found = sharded.rows(targets, self.candidates(pairs)[:, 1:].to(device))
                table, bias = found.table, found.bias - adjustment[found.ids]
                among = torch.cat([found.targets[:, None], found.negatives], 1)
                ranks = rank_candidates(query, table, bias, among)
                if len(ranks) > rows.stop - rows.start:
                    scores = candidate_scores(query, table, bias, among[:, :1]).squeeze(1)
                    offsets = self.offsets[rows.start : rows.stop + 1] - pairs.start
                    ranks = others_above(ranks, scores, offsets)
                return ranks.cpu()
            left_out = self._left_out(owner, device) if seen == "exclude" else None
            zero = self._seen(self.users[owner], device) if seen == "zero" else None
            return sharded_ranks(query, targets, sharded, adjustment, left_out, zero).cpu()

    def lists(self, model, k: int, group=None) -> Tensor:
        """int64 [U, k]: the k best items of every user, -1 where there are fewer. Items of the
        input are among them where the protocol keeps them."""
        table = _item_table(model)

        def best(rows: slice) -> Tensor:
            with torch.no_grad():
                query, bias = self._asked(model, rows)
                some = self.protocol.seen != "none"
                exclude = self._seen(self.users[rows], query.device) if some else None
                most = min(k, len(table))
                found = linear_topk(query, table, most, linear_bias=bias, exclude=exclude)
                return found.indices.cpu()

        return scores_of(len(self), best, group)

    def _asked(self, model, rows: slice) -> tuple[Tensor, Tensor]:
        """(queries [N, D], biases [V]) of the scores."""
        query = next_item_queries(model, self.dataset, self.users[rows], self.split)
        return query, model.item_head.bias - self.adjustment.to(query.device)

    def _seen(self, users: Tensor, device) -> tuple[Tensor, Tensor]:
        items, offsets = seen_items(self.dataset, users, self.split)
        return items.to(device), offsets.to(device)

    def _left_out(self, owner: Tensor, device) -> tuple[Tensor, Tensor]:
        """What the users of pairs have seen, but for their targets: these stay in the ranking.

        owner: int64 [P], rising. The past of a user is read and sorted once, not once a pair: of
        somebody with thousands of targets it would be the square of their events.
        """
        people, place = owner.unique_consecutive(return_inverse=True)
        items, offsets = seen_items(self.dataset, self.users[people], self.split)
        width = self.dataset.num_items
        pairs = (people.repeat_interleave(offsets.diff()) * width + items).unique_consecutive()
        theirs = slice(int(self.offsets[owner[0]]), int(self.offsets[owner[-1] + 1]))
        targets = self.owner[theirs] * width + self.targets[theirs]
        pairs = pairs[~torch.isin(pairs, targets)]
        number = torch.searchsorted(people, pairs // width).bincount(minlength=len(people))
        starts, offsets = offsets_of(number)[place], offsets_of(number[place])
        items = (pairs % width)[spans(starts, number[place], offsets)]
        return items.to(device), offsets.to(device)

    def candidates(self, pairs: slice = slice(None)) -> Tensor:
        """int64 [P, 1 + negatives]: the target of each pair and the negatives of its user."""
        owner = self.owner[pairs]
        if self._listed is not None:
            negatives = self._listed[owner]
        else:
            users, place = owner.unique(return_inverse=True)
            negatives = self._drawn(self.users[users])[place]
        return torch.cat([self.targets[pairs, None], negatives], dim=1)

    def ranks(self, model, group=None) -> Tensor:
        """float64 [P]: ranks of the targets of all users, on the CPU."""
        table = _item_table(model)
        return scores_of(len(self), lambda rows: self.rank_rows(model, rows, table), group)

    def popularity_ranks(self, group=None) -> Tensor:
        """Ranks under a ranker by number of training interactions: the baseline and, for sampled
        negatives, the self-test of the protocol (it must fall to chance)."""
        counts = torch.as_tensor(
            self.dataset.item_counts("train"), dtype=torch.float64, device="cpu"
        )
        table = torch.zeros(len(counts), 1, dtype=torch.float64, device="cpu")

        def rank(rows: slice) -> Tensor:
            query = torch.ones(rows.stop - rows.start, 1, dtype=torch.float64, device="cpu")
            return self._rank(query, table, counts, rows)

        return scores_of(len(self), rank, group)

    def _rank(self, query: Tensor, table: Tensor, bias: Tensor, rows: slice) -> Tensor:
        """Ranks of the targets of `users[rows]`, whose queries are `query` [N, D]."""
        offsets = self.offsets[rows.start : rows.stop + 1]
        first, parts = int(offsets[0]), []
        for block in row_blocks(int(offsets[-1]) - first):  # a user may have many, and a long past
            pairs = slice(first + block.start, first + block.stop)
            asked = query[(self.owner[pairs] - rows.start).to(query.device)]
            parts.append(self._rank_pairs(asked, table, bias, pairs))
        ranks = torch.cat(parts)
        if self.protocol.candidates == "sampled" and len(ranks) > len(query):
            pairs = slice(first, int(offsets[-1]))
            asked = query[(self.owner[pairs] - rows.start).to(query.device)]
            targets = self.targets[pairs, None].to(query.device)
            scores = candidate_scores(asked, table, bias, targets).squeeze(1)
            ranks = others_above(ranks, scores, offsets - first)
        return ranks

    def _rank_pairs(self, query: Tensor, table: Tensor, bias: Tensor, pairs: slice) -> Tensor:
        """Ranks of the targets of `pairs`, the query [P, D] of each; where candidates are sampled,
        among the negatives."""
        device, seen = query.device, self.protocol.seen
        if self.protocol.candidates == "sampled":
            return rank_candidates(query, table, bias, self.candidates(pairs).to(device))
        owner, targets = self.owner[pairs], self.targets[pairs].to(device)
        exclude = self._left_out(owner, device) if seen == "exclude" else None
        if seen != "zero":
            return linear_rank(query, table, targets, linear_bias=bias, exclude=exclude).double()
        zeros = self._seen(self.users[owner], device)
        ranks = linear_rank(query, table, targets, linear_bias=bias, exclude=zeros).double()
        return seen_above(ranks, query, table, bias, targets, *zeros)


def _item_table(model) -> Tensor:
    """[V, D]: what scores the items, in full precision."""
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        return finite(model.item_table, "item vectors")


def negatives_of(dataset, users: Tensor, protocol: Protocol) -> Tensor:
    """int64 [U, C]: what the targets of `users` are compared with, of a sampled protocol."""
    if protocol.negatives_file is not None:
        return listed_negatives(dataset, users, protocol.negatives_file)
    return sampled_negatives(dataset, users, protocol.others, protocol.seed, protocol.drawn_by)
