# SPDX-License-Identifier: Apache-2.0
"""Rating prediction: the error of the ratings of held-out events (Zeng et al., 2021, section 4).

Legend: U users, V items, T events, P held-out events with a rating.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastrec.data.batch import FILL, JaggedBatch
from fastrec.evaluation.blocks import finite
from fastrec.objectives.rating import RatingBiases, RatingPrediction

SHRINKAGE = 5.0  # ratings without a deviation that every item and user has beside its own


class RatingJudge:
    """Predicts the ratings of the events of `split` that are held out. Their items stand behind the
    input of their user without their ratings, all of a user in one sequence: the model sees which
    items are asked about together, and no rating that is held out.

    users: int64 [U] of the split. split: "valid" or "test". trained: int64, the users who are
    trained on, whose training ratings the baselines know too.

    What a model counts of ratings (`RatingBiases`) is counted here as for the baselines, in all
    that are known before the events of the split: at "test" also those of "valid".

    Predictions are clipped to the range of the known ratings, here and never in training. Held-out
    events without a rating are not asked about. Raises ValueError where none has one.
    """

    def __init__(self, dataset, users: Tensor, split: str, trained: Tensor):
        self.dataset, self.users = dataset, users
        if len(users) == 0:
            raise ValueError(f"there is no user to evaluate in split {split!r}")
        self.starts = dataset.input_ends(users, split)
        self.ends = self.starts + dataset.held_out(users, split).lengths.numpy()
        asked = dataset.between(users, self.starts, self.ends, ["rating"])
        rated = ~asked.events["rating"].isnan()
        self.ratings = asked.events["rating"][rated].double()  # [P]
        if len(self.ratings) == 0:
            raise ValueError(f"no held-out event of split {split!r} has a rating")
        known = _known(dataset, users, split, trained)
        self.range = known[2].min().item(), known[2].max().item()
        self.deviations = _deviations(*known[1:], dataset.num_items)
        owner = asked.sample_ids[asked.segment_ids()]
        self.constant, self.biases = _baselines(
            known, self.deviations, dataset.num_users, owner[rated], asked.values[rated]
        )

    def __len__(self) -> int:
        return len(self.users)

    @property
    def metric_names(self) -> list[str]:
        return list(self.metrics(self.constant))

    def score(self, model, objective, rows: slice) -> Tensor:
        """float64: the predicted ratings of the held-out events of `users[rows]`, user by user in
        the order of the events, on the CPU."""
        head = objective.require(RatingPrediction, "rating", "rating")
        batch = self._asked(model, rows).to(model.device)
        biases = None
        if head.biases is not None:
            biases = RatingBiases(head.biases.shrinkage, *self.deviations).to(model.device)
        with torch.no_grad():
            found = finite(head.predict(model.encode(batch), biases=biases), "predictions")
        return found.double().cpu()[batch.events["asked"].cpu()]

    def _asked(self, model, rows: slice) -> JaggedBatch:
        """The input of the model, with a column `asked`, bool [T]."""
        users, starts, ends = self.users[rows], self.starts[rows], self.ends[rows]
        room = model.config.max_len
        if (most := int((ends - starts).max())) > room:
            raise ValueError(f"a user has {most} held-out events, and model.max_len is {room}")
        first = np.maximum(ends - room, self.dataset.offsets[users.numpy()])
        batch = self.dataset.between(users, first, ends, model.event_columns)
        model.config.items.check_events(batch.events)
        held = batch.positions() >= torch.from_numpy(starts - first)[batch.segment_ids()]
        ratings = batch.events["rating"]
        columns = {
            "rating": ratings.masked_fill(held, FILL["rating"]),
            "asked": held & ~ratings.isnan(),
        }
        return model.frame(replace(batch, events={**batch.events, **columns}))

    def metrics(self, scores: Tensor, objective=None) -> dict[str, float]:
        """RMSE and MAE over the held-out events with a rating, in the unit of the data; "score" is
        1 - MSE / MSE of the constant.

        scores: float64 [P], what `score` gives for all rows.
        """
        error = scores.clamp(*self.range) - self.ratings
        worst = (self.constant - self.ratings).square().mean().clamp_min(1e-12)
        square = error.square().mean()
        return {
            "score": (1 - square / worst).item(),
            "RMSE": square.sqrt().item(),
            "MAE": error.abs().mean().item(),
        }


def _known(dataset, users: Tensor, split: str, trained: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(users, items, float64 ratings): the input of `users`, and the training of `trained`."""
    others = trained[~torch.isin(trained, users)]
    rows = [dataset.gather(users, split, columns=["rating"])]
    rows.append(dataset.gather(others, "train", columns=["rating"]))
    batch = JaggedBatch.cat(rows)
    rated = ~batch.events["rating"].isnan()
    if not rated.any():
        raise ValueError(f"no event before those of split {split!r} has a rating")
    owner = batch.sample_ids[batch.segment_ids()]
    return owner[rated], batch.values[rated], batch.events["rating"][rated].double()


def _deviations(items: Tensor, ratings: Tensor, number: int) -> tuple[float, Tensor, Tensor]:
    """(mean of the ratings; by item [number], sums of the deviations from it, and how many)."""
    mean = ratings.mean()
    return mean.item(), *_sums(items, ratings - mean, number)


def _sums(index: Tensor, values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """[number] both: sums of the values, and how many."""
    total = values.new_zeros(number).index_add_(0, index, values)
    return total, index.bincount(minlength=number)


def _baselines(
    known: tuple[Tensor, Tensor, Tensor],
    deviations: tuple[float, Tensor, Tensor],
    num_users: int,
    users: Tensor,
    items: Tensor,
) -> tuple[Tensor, Tensor]:
    """float64 [P] both: the mean of the known ratings, and mean + bias of the item + bias of the
    user. The bias of an item is the sum of its deviations from the mean over their number +
    `SHRINKAGE`; that of a user is made in the same way of what the biases of items leave."""
    owner, values, ratings = known
    mean, totals, counts = deviations
    by_item = totals / (counts + SHRINKAGE)
    left, rated = _sums(owner, ratings - mean - by_item[values], num_users)
    by_user = left / (rated + SHRINKAGE)
    return ratings.new_full((len(users),), mean), mean + by_item[items] + by_user[users]
