# SPDX-License-Identifier: Apache-2.0
"""Click prediction: how well clicks are told from what is none, by the area under the ROC curve.

Legend: U users, P pairs of a user and an item.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrec.data.batch import offsets_of
from fastrec.evaluation.blocks import finite
from fastrec.evaluation.candidates import held_out_items
from fastrec.evaluation.metrics import auc
from fastrec.evaluation.next_item import negatives_of
from fastrec.evaluation.protocol import Protocol
from fastrec.objectives.click import ClickPrediction, contents

SHRINKAGE = 5.0  # events at the mean rate that every item has beside its own


class ClickJudge:
    """Scores held-out events of `split`, each user asked once, from the input before them.

    least: rating of a click: all held-out events with a rating are asked about. None: the targets
        are clicks, and the negatives of `protocol`, whose candidates are sampled, are none.
    users: int64 [U] of the split. trained: int64, the users whose training events the baseline
        knows: how often an item was clicked of how often it was rated, or how often it occurs.

    Raises ValueError without a user, and where all pairs are clicks, or none is.
    """

    def __init__(
        self,
        dataset,
        users: Tensor,
        split: str,
        protocol: Protocol,
        least: float | None,
        trained: Tensor,
    ):
        self.dataset, self.users, self.split, self.least = dataset, users, split, least
        if len(users) == 0:
            raise ValueError(f"there is no user to evaluate in split {split!r}")
        if least is not None:
            if protocol.candidates == "sampled":
                raise ValueError(
                    "evaluation.candidates: sampled has no effect: the step click says what is no"
                    " click"
                )
            starts = dataset.input_ends(users, split)
            ends = starts + dataset.held_out(users, split).lengths.numpy()
            asked = dataset.between(users, starts, ends, ["rating"])
            rating = asked.events["rating"]
            known = ~rating.isnan()
            self.items, self.owner = asked.values[known], asked.segment_ids()[known]
            self.labels = (rating[known] >= least).long()
        else:
            if protocol.candidates != "sampled":
                raise ValueError(
                    "the judge click has nothing that is no click: set evaluation.candidates:"
                    " sampled, or label events by the step click"
                )
            targets, owner = held_out_items(dataset, users, split)
            negatives = negatives_of(dataset, users, protocol)
            owner = torch.cat([owner, _owners(len(users), negatives.shape[1])])
            order = owner.argsort(stable=True)
            self.owner = owner[order]
            self.items = torch.cat([targets, negatives.flatten()])[order]
            self.labels = (order < len(targets)).long()
        if len(self.labels.unique()) < 2:
            what = "has a rating" if len(self.labels) == 0 else "differs in whether it is a click"
            raise ValueError(f"no held-out event of split {split!r} {what}")
        self.offsets = offsets_of(self.owner.bincount(minlength=len(users)))
        self.baseline = self._baseline(trained)[self.items]

    def _baseline(self, trained: Tensor) -> Tensor:
        """float64 [V]."""
        counts = torch.as_tensor(self.dataset.item_counts("train"), device="cpu").double()
        if self.least is None:
            return counts
        there = torch.as_tensor(self.dataset.users("train"), device="cpu")
        rows = self.dataset.gather(trained[torch.isin(trained, there)], "train", columns=["rating"])
        rating = rows.events["rating"]
        known = ~rating.isnan()
        clicks = (rating[known] >= self.least).double()
        items, mean = rows.values[known], clicks.mean().nan_to_num(0.5)
        number = items.bincount(minlength=self.dataset.num_items)
        total = torch.zeros_like(counts).index_add_(0, items, clicks)
        return ((total + SHRINKAGE * mean) / (number + SHRINKAGE)).clamp(1e-6, 1 - 1e-6).logit()

    def __len__(self) -> int:
        return len(self.users)

    @property
    def metric_names(self) -> list[str]:
        return list(self.metrics(self.baseline))

    def score(self, model, objective, rows: slice) -> Tensor:
        """float64: log-odds of the pairs of `users[rows]`, on the CPU."""
        head = objective.require(ClickPrediction, "click", "click")
        pairs = slice(int(self.offsets[rows.start]), int(self.offsets[rows.stop]))
        with torch.no_grad():
            batch = self.model_input(model, rows)
            encoded = model.encode(batch)
            users = model.output(encoded, model.asked(batch))
            owner = (self.owner[pairs] - rows.start).to(users.device)
            items = contents(model, self.items[pairs].to(users.device))
            return finite(head.score(users[owner], items), "predictions").double().cpu()

    def model_input(self, model, rows: slice):
        """The batch that is asked for the next item of `users[rows]`."""
        batch = model.inputs(self.dataset, self.users[rows], self.split, ask=True)
        return batch.to(model.device)

    def metrics(self, scores: Tensor, objective=None) -> dict[str, float]:
        """AUC over all pairs; "user AUC", the mean over users with both kinds of them, NaN without
        any; of given labels the log loss, in nats.

        scores: float64 [P], what `score` gives for all rows.
        """
        found = {
            "AUC": auc(scores, self.labels).item(),
            "user AUC": auc(scores, self.labels, self.owner).mean().item(),
        }
        if self.least is not None:
            target = self.labels.to(scores.dtype)
            found["log loss"] = F.binary_cross_entropy_with_logits(scores, target).item()
        return found


def _owners(users: int, number: int) -> Tensor:
    return torch.arange(users, device="cpu").repeat_interleave(number)
