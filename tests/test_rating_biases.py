# SPDX-License-Identifier: Apache-2.0
"""Ratings predicted beside the biases of items and users: the line below the states."""

import math

import pytest
import torch
from builders import lists_of
from rated import V, batch_of, rated, rating_model
from test_data_prepare import shared

from fastrec.data.dataset import SequenceDataset
from fastrec.data.prepare import prepare
from fastrec.data.side import SideData
from fastrec.data.steps.mask_rating import TARGET, MaskRating
from fastrec.evaluation.rating import RatingJudge
from fastrec.nn.model_files import write_digests
from fastrec.objectives.joint import JointObjective
from fastrec.objectives.rating import Rating, RatingBiases, RatingPrediction
from fastrec.random import Rng
from fastrec.training.heads_file import load_heads, save_heads


def plain_deviations(dataset, users, split: str = "train") -> tuple[float, list[list[float]]]:
    """(mean of the ratings of `users` in the split, the deviations of each item)."""
    column, values = dataset.event_column("rating"), dataset.values
    events = [
        (int(values[event]), float(column[event]))
        for user in users
        for event in range(
            dataset.offsets[user],
            dataset.offsets[user] + int(dataset.split_lengths(split)[user]),
        )
        if not math.isnan(column[event])
    ]
    mean = sum(rating for _, rating in events) / len(events)
    return mean, [[rating - mean for other, rating in events if other == i] for i in range(V)]


def plain_line(batch, mean, deviations, shrinkage: float, own: bool) -> list[float]:
    """mean + bias of the item + bias of the user of each event, one at a time. own: of training,
    the target of an event is left out of the deviations of its item."""

    def shrunken(left: list[float]) -> float:
        return sum(left) / (len(left) + shrinkage)

    found = []
    items, seen = lists_of(batch), lists_of(batch, batch.events["rating"])
    targets = lists_of(batch, batch.events[TARGET]) if own else seen
    for row, history in enumerate(items):
        visible = [
            (place, rating - mean - shrunken(deviations[item]))
            for place, (item, rating) in enumerate(zip(history, seen[row], strict=True))
            if not math.isnan(rating)
        ]
        for place, item in enumerate(history):
            rest = list(deviations[item]) if item < V else []
            if own and not math.isnan(targets[row][place]):
                nearest = min(rest, key=lambda d: abs(d - (targets[row][place] - mean)))
                rest.remove(nearest)
            user = shrunken([left for other, left in visible if other != place])
            found.append(mean + shrunken(rest) + user)
    return found


@pytest.mark.parametrize("hide", [True, False])
@pytest.mark.parametrize("by", ["state", "item"])
def test_a_state_adds_to_the_biases_without_its_own_rating(by, hide):
    dataset, model = rated(), rating_model(tokens=["cls", "sep"], max_len=14)
    side = SideData(dataset, "all", event_columns=["rating"])
    objective = JointObjective({"rating": Rating(by=by, biases=2.5)}, model, side)
    plain = JointObjective({"rating": Rating(by=by)}, model, side).parts["rating"]
    head = objective.parts["rating"]
    if head.linear is not None:
        torch.nn.init.normal_(head.linear.weight)
    plain.load_state_dict({k: v for k, v in head.state_dict().items() if "biases" not in k})
    batch = model.frame(MaskRating(0.4, hide)(batch_of(dataset), Rng(0, 0), side))
    mean, deviations = plain_deviations(dataset, range(6), "all")
    encoded = model.encode(batch)
    with torch.no_grad():
        for own in (True, False):
            found = head.predict(encoded, batch.events[TARGET] if own else None)
            line = plain_line(batch, mean, deviations, 2.5, own)
            expected = plain.predict(encoded) + torch.tensor(line)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            if own:
                training = found
    (term,) = objective(model, {"main": batch}, Rng(0, 0))
    target = batch.events[TARGET]
    known = ~target.isnan()
    torch.testing.assert_close(term.loss, (training - target)[known].square().mean())
    assert int(term.number) == int(known.sum()) > 10
    assert not any(name.startswith("biases") for name, _ in head.named_parameters())


@pytest.mark.parametrize("split", ["valid", "test"])
def test_untrained_the_biases_are_those_of_the_judge(split):
    """Who counts ratings for it in all that are known: at test those of validation too, and those
    of users who are not trained on."""
    dataset, model = rated(missing=0.2), rating_model(max_len=20)
    side = SideData(dataset, users=[0, 1], event_columns=["rating"])
    objective = JointObjective({"rating": Rating(biases=5.0)}, model, side)
    judge = RatingJudge(dataset, torch.arange(1, 6), split, torch.tensor([0, 1]))
    scores = judge.score(model, objective, slice(0, 5))
    torch.testing.assert_close(scores, judge.biases, rtol=1e-5, atol=1e-5)
    assert judge.biases.std() > 0.05


def test_the_deviations_of_items_are_of_whom_a_step_may_have():
    dataset = rated(missing=0.0)
    side = SideData(dataset, users=[0, 1], labelled=[1, 4], event_columns=["rating"])
    totals, counts = side.rating_deviations
    column, expected = dataset.event_column("rating"), [[] for _ in range(V)]
    for user in (0, 1, 4):
        for event in range(dataset.offsets[user], dataset.offsets[user + 1] - 2):
            expected[dataset.values[event]].append(float(column[event]) - side.mean_rating)
    assert counts.tolist() == [len(part) for part in expected]
    assert totals.tolist() == pytest.approx([sum(part) for part in expected])


def test_a_model_keeps_its_biases_and_another_catalogue_has_its_own(tmp_path):
    dataset, model = rated(missing=0.0), rating_model()
    side = SideData(dataset, event_columns=["rating"])
    saved = JointObjective({"rating": Rating(biases=5.0)}, model, side)
    model.save_pretrained(tmp_path)
    save_heads(saved, tmp_path)
    write_digests(tmp_path)
    other = SideData(rated(seed=1), event_columns=["rating"])
    again = JointObjective({"rating": Rating(biases=5.0)}, model, other)
    before = {name: part.clone() for name, part in again.parts.state_dict().items()}
    taken = load_heads(again, tmp_path, only=["rating"])
    assert taken == ["rating.linear.weight", "rating.linear.bias"]
    for name, tensor in again.parts.state_dict().items():
        source = saved.parts.state_dict() if name in taken else before
        assert torch.equal(tensor, source[name]), name
    assert not torch.equal(before["rating.biases.totals"], saved.parts["rating"].biases.totals)
    load_heads(again, tmp_path)
    batch = model.frame(batch_of(dataset))
    found = (part.parts["rating"].predict(model.encode(batch)) for part in (saved, again))
    assert torch.equal(*found)
    fewer = RatingBiases(5.0, 3.0, torch.zeros(V - 1), torch.zeros(V - 1))
    head = RatingPrediction(model.config.width, biases=fewer)
    own = JointObjective({"rating": Rating(biases=5.0)}, model, side)
    own.parts["rating"] = head
    load_heads(own, tmp_path)
    assert torch.equal(head.linear.weight, saved.parts["rating"].linear.weight)
    assert len(head.biases.totals) == V - 1 and not head.biases.totals.any()
    for settings in (Rating(), Rating(biases=4.0)):
        with pytest.raises(ValueError, match="it was trained to predict .*'biases': 5.0"):
            load_heads(JointObjective({"rating": settings}, model, side), tmp_path)


def test_without_ratings_in_sight_a_user_has_no_bias():
    dataset, model = rated(missing=0.0), rating_model()
    side = SideData(dataset, event_columns=["rating"])
    head = Rating(biases=5.0).build(model, side)
    batch = model.frame(MaskRating(1.0)(batch_of(dataset, [0, 1]), Rng(0, 0), side))
    totals, counts = side.rating_deviations
    expected = side.mean_rating + (totals / (counts + 5))[batch.values]
    torch.testing.assert_close(head.biases(batch), expected.float())
    empty = head.biases(batch.select(torch.tensor([], dtype=torch.int64)))
    assert empty.shape == (0,)


def test_the_biases_are_shrunken_means_of_what_is_known():
    dataset, asked = rated(missing=0.3), torch.tensor([1, 3, 4])
    judge = RatingJudge(dataset, asked, "test", torch.tensor([0, 1, 5]))
    column, known = dataset.event_column("rating"), []
    for user in (0, 1, 3, 4, 5):  # asked: up to the test event; trained: up to validation
        end = dataset.lengths[user] - (1 if user in (1, 3, 4) else 2)
        for event in range(dataset.offsets[user], dataset.offsets[user] + end):
            if not math.isnan(column[event]):
                known.append((user, int(dataset.values[event]), float(column[event])))
    mean = sum(r for _, _, r in known) / len(known)

    def bias(left):
        return sum(left) / (len(left) + 5)

    item = {i: bias([r - mean for _, j, r in known if j == i]) for i in range(V)}
    user = {u: bias([r - mean - item[j] for w, j, r in known if w == u]) for u in range(6)}
    expected, ratings = [], []
    for u in (1, 3, 4):
        last = dataset.offsets[u + 1] - 1
        if not math.isnan(column[last]):
            expected.append(mean + item[int(dataset.values[last])] + user[u])
            ratings.append(float(column[last]))
    assert judge.biases.tolist() == pytest.approx(expected)
    assert judge.constant.tolist() == pytest.approx([mean] * len(expected))
    assert judge.ratings.tolist() == ratings


def test_the_baselines_of_ml_100k(tmp_path):
    source = shared("ml-100k")
    prepare(source, tmp_path / "data", format="recbole", split="last", valid=1, test=3)
    dataset = SequenceDataset.load(tmp_path / "data")
    everyone = torch.from_numpy(dataset.users("test"))
    judge = RatingJudge(dataset, everyone, "test", everyone)
    assert len(judge.ratings) == 3 * 943 and judge.range == (1, 5)
    constant, biases = judge.metrics(judge.constant), judge.metrics(judge.biases)
    assert [round(constant[name], 3) for name in ("RMSE", "MAE")] == [1.206, 1.013]
    assert [round(biases[name], 3) for name in ("RMSE", "MAE")] == [1.029, 0.816]
