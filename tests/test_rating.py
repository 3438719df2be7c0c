# SPDX-License-Identifier: Apache-2.0
"""Rating prediction: the step `mask_rating`, the objective and the judge `rating`, against one
event at a time; from a file to errors that are printed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import lists_of, tensors_of
from rated import V, batch_of, rated, rating_model

from fastrec.data.side import SideData
from fastrec.data.steps.cut import Cut
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.mask_rating import TARGET, MaskRating
from fastrec.data.steps.segment import Segment
from fastrec.data.steps.share import Schedule
from fastrec.data.steps.substitute import Substitute
from fastrec.evaluation.rating import RatingJudge
from fastrec.objectives.joint import JointObjective
from fastrec.objectives.rating import Rating
from fastrec.random import Rng, draws, threshold


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("hide", [True, False])
def test_ratings_are_chosen_one_event_at_a_time(share, hide):
    dataset, rng = rated(), Rng(3, 7)
    batch = batch_of(dataset, view=2)
    made = MaskRating(share, hide)(batch, rng, SideData(dataset))
    columns = (lists_of(batch, column) for column in (batch.events["rating"], batch.values))
    seen, targets = (lists_of(made, made.events[name]) for name in ("rating", TARGET))
    for row, (ratings, items) in enumerate(zip(*columns, strict=True)):
        known = [place for place, rating in enumerate(ratings) if not math.isnan(rating)]
        key = batch.keys[row : row + 1]

        def draw(site, place, key=key):
            return int(draws(rng, key, 0, torch.tensor([place]), site=site))

        chosen = [place for place in known if draw("mask_rating", place) < threshold(share)]
        if known and not chosen:
            chosen = [known[draw("mask_rating_forced", 0) * len(known) >> 16]]
        for place, rating in enumerate(ratings):
            target = rating if place in chosen else math.nan
            shown = math.nan if hide and place in chosen else rating
            assert repr(targets[row][place]) == repr(target)
            assert repr(seen[row][place]) == repr(shown)
        assert bool(chosen) == bool(known)
        assert lists_of(made)[row] == items, "items stay"


def test_a_sequence_is_chosen_alike_in_any_batch_and_the_input_stays():
    dataset, step = rated(missing=0.1), MaskRating(Schedule(0.1, 0.9, 10))
    batch = batch_of(dataset)
    before = {name: column.clone() for name, column in tensors_of(batch).items()}
    whole = step(batch, Rng(0, 5), SideData(dataset))
    for name, column in tensors_of(batch).items():
        assert torch.equal(column.nan_to_num(-1), before[name].nan_to_num(-1)), name
    alone = step(batch_of(dataset, [4, 1]), Rng(0, 5), SideData(dataset))
    for row, user in enumerate((4, 1)):
        for name in ("rating", TARGET):
            one, other = (
                torch.tensor(lists_of(made, made.events[name])[place])
                for made, place in ((alone, row), (whole, user))
            )
            assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
    harder = step(batch, Rng(0, 10), SideData(dataset))
    assert (~harder.events[TARGET].isnan()).sum() > (~whole.events[TARGET].isnan()).sum()


def test_beside_masked_items_ratings_of_both_are_hidden():
    dataset = rated(missing=0.0)
    side, batch = SideData(dataset), batch_of(dataset)
    masked = MaskRating(0.5)(Mask(0.5)(batch, Rng(0, 0), side), Rng(0, 0), side)
    gone = masked.values == V
    assert masked.events["rating"][gone].isnan().all()
    assert masked.events[TARGET][gone].isnan().all(), "an item that is hidden has no rating to find"
    assert (~masked.events[TARGET].isnan()).any()


@pytest.mark.parametrize(
    "step",
    [Mask(0.5), MaskLast(), Mask(0.9, replace=0.0, random=1.0), Cut(2), Segment(), Substitute()],
)
def test_nobody_is_asked_for_the_rating_of_an_item_that_is_gone(step):
    """In either order: behind a mask its events have no rating to predict."""
    dataset = rated(missing=0.1)
    side, batch, rng = SideData(dataset), batch_of(dataset), Rng(3, 7)
    side.similar_items = torch.arange(V).roll(1)
    for steps in ([MaskRating(1.0), step], [step, MaskRating(1.0)]):
        made = batch
        for each in steps:
            made = each(made, rng, side)
        asked = ~made.events[TARGET].isnan()
        there = {
            (int(key), int(item), float(rating))
            for key, item, rating in zip(
                batch.keys[batch.segment_ids()], batch.values, batch.events["rating"], strict=True
            )
        }
        for place in asked.nonzero().squeeze(1).tolist():
            key = int(made.keys[made.segment_ids()[place]])
            found = key, int(made.values[place]), float(made.events[TARGET][place])
            assert found in there, "the target is the rating of another item"
        assert 0 < asked.sum() < len(batch.values)


def test_special_tokens_have_no_target():
    dataset = rated()
    made = MaskRating(1.0)(batch_of(dataset), Rng(0, 0), SideData(dataset))
    framed = rating_model(tokens=["cls", "sep"], max_len=12).frame(made)
    assert framed.events[TARGET][framed.values >= V].isnan().all()
    known = framed.events[TARGET][framed.values < V]
    assert torch.equal(known.nan_to_num(-1), made.events[TARGET].nan_to_num(-1))


@pytest.mark.parametrize("by", ["state", "item"])
def test_the_loss_is_the_mean_squared_error_of_the_targets(by):
    dataset, model = rated(), rating_model(tokens=["cls"])
    side = SideData(dataset, event_columns=["rating"])
    objective = JointObjective({"rating": Rating(by=by)}, model, side)
    batch = model.frame(MaskRating(0.4)(batch_of(dataset), Rng(0, 0), side))
    (term,) = objective(model, {"main": batch}, Rng(0, 0))
    head, states = objective.parts["rating"], model.encode(batch).states
    errors = []
    for event, target in enumerate(batch.events[TARGET].tolist()):
        if not math.isnan(target):
            if by == "state":
                found = states[event] @ head.linear.weight[0] + head.linear.bias[0]
            else:
                found = states[event] @ head.items.weight[batch.values[event]]
            errors.append((found - target) ** 2)
    expected = torch.stack(errors).mean()
    assert term.name == "rating" and int(term.number) == len(errors) > 10
    torch.testing.assert_close(term.loss, expected)
    parameters = [*model.encoder.parameters(), *head.parameters()]
    for actual, wanted in zip(
        torch.autograd.grad(term.loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_a_linear_head_starts_at_the_mean_rating_of_training():
    dataset = rated(missing=0.0)
    side = SideData(dataset, labelled=[1, 4], event_columns=["rating"])
    head = Rating().build(rating_model(), side)
    column, offsets = dataset.event_column("rating"), dataset.offsets
    expected = np.concatenate([column[offsets[u] : offsets[u + 1] - 2] for u in (1, 4)]).mean()
    assert side.mean_rating == pytest.approx(float(expected))
    assert head.linear.bias.item() == pytest.approx(float(expected), rel=1e-6)


def test_without_targets_the_loss_is_zero_with_a_live_graph():
    dataset, model = rated(), rating_model()
    side = SideData(dataset, event_columns=["rating"])
    objective = JointObjective({"rating": Rating()}, model, side)
    batch = model.frame(MaskRating()(batch_of(dataset, [2]), Rng(0, 0), side))
    (term,) = objective(model, {"main": batch}, Rng(0, 0))
    term.loss.backward()
    assert term.loss == 0 and term.number == 0
    assert not objective.parts["rating"].linear.weight.grad.any()


def plain_predictions(dataset, model, head, split: str) -> list[float]:
    """The held-out ratings of each user, from a sequence of its own that holds no held-out one."""
    found = []
    for user in dataset.users(split):
        start = int(dataset.split_lengths(split)[user])
        targets = dataset.held_out([user], split)
        rows = slice(dataset.offsets[user], dataset.offsets[user] + start + len(targets.values))
        ratings = torch.from_numpy(dataset.event_column("rating")[rows].copy())
        known = ~ratings[start:].isnan()
        ratings[start:] = math.nan
        batch = dataset.gather([user], "all", columns=["rating"])
        batch = replace(
            batch, values=torch.from_numpy(np.array(dataset.values[rows])).long(),
            offsets=torch.tensor([0, len(ratings)]), max_seq_len=len(ratings),
            events={"rating": ratings},
        )  # fmt: skip
        states = model.encode(model.frame(batch)).states
        if "cls" in model.config.tokens:
            states = states[1:]
        states = states[-len(known) :]
        found += (states @ head.linear.weight[0] + head.linear.bias[0])[known].tolist()
    return found


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("tokens", [[], ["cls"]])
def test_the_judge_asks_for_each_held_out_rating(split, tokens):
    dataset = rated()
    dataset = replace(dataset, splits=np.array([[2, 4], [5, 6], [3, 4], [4, 5], [7, 9], [1, 2]]))
    dataset._event_columns["rating"] = rated().event_column("rating")
    model = rating_model(tokens=tokens, max_len=9)
    objective = JointObjective(
        {"rating": Rating()}, model, SideData(dataset, event_columns=["rating"])
    )
    head = objective.parts["rating"]
    torch.nn.init.normal_(head.linear.weight, std=3.0)
    everyone = torch.from_numpy(dataset.users(split))
    judge = RatingJudge(dataset, everyone, split, everyone)
    scores = torch.cat([judge.score(model, objective, rows) for rows in (slice(0, 2), slice(2, 6))])
    expected = torch.tensor(plain_predictions(dataset, model, head, split), dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert len(judge.ratings) == len(scores)
    low, high = judge.range
    errors = [min(max(s, low), high) - r for s, r in zip(scores, judge.ratings, strict=True)]
    metrics = judge.metrics(scores)
    assert metrics["RMSE"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(errors)))
    assert metrics["MAE"] == pytest.approx(sum(map(abs, errors)) / len(errors))
    assert max(scores) > high or min(scores) < low, "something is clipped"
    assert judge.metrics(judge.constant)["score"] == pytest.approx(0)


def test_no_held_out_rating_is_seen():
    dataset = rated(missing=0.0)
    model = rating_model()
    side = SideData(dataset, event_columns=["rating"])
    objective = JointObjective({"rating": Rating()}, model, side)
    torch.nn.init.normal_(objective.parts["rating"].linear.weight)
    everyone = torch.arange(6)
    before = RatingJudge(dataset, everyone, "test", everyone).score(model, objective, slice(0, 6))
    column = dataset.event_column("rating")
    last = dataset.offsets[1:] - 1
    column[last] = 6 - column[last]
    after = RatingJudge(dataset, everyone, "test", everyone).score(model, objective, slice(0, 6))
    assert torch.equal(before, after)
    column[last - 1] = column[last - 1] % 5 + 1  # of the input: the model reads it
    changed = RatingJudge(dataset, everyone, "test", everyone).score(model, objective, slice(0, 6))
    assert (changed != before).any()
