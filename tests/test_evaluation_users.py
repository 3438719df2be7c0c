# SPDX-License-Identifier: Apache-2.0
"""Evaluation of profiles and friends: ties, candidates, shared items; groups by length."""

import numpy as np
import pytest
import torch
from builders import AGE, CITY, Known, dataset_of, model_of, six_users

from fastrec.data.attributes import EncodedAttribute
from fastrec.evaluation.attributes import AttributesJudge
from fastrec.evaluation.friends import FriendsJudge, friend_metrics
from fastrec.evaluation.metrics import length_groups
from fastrec.objectives.friends import Friends
from fastrec.objectives.item import Item
from fastrec.objectives.joint import JointObjective
from fastrec.objectives.user_attributes import UserAttributes

NONE = torch.zeros(1, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("scores", "two_hop", "expected"),
    [
        ([2.0, 1, 0, 1], NONE, (1, 1, 1)),
        ([2.0, 2, 0, 2], NONE, (1 / 3, 1 / 2, 1 / 3)),  # ties share the first place
        ([1.0, 2, 0, 1], NONE, (0, 1 / 2.5, 0)),
        ([1.0, 2, 0, 0], torch.tensor([[True, False, False]]), (0, 1 / 2, 1)),
        ([float("nan"), 0, 0, 0], NONE, (0, 1 / 4, 0)),
    ],
)
def test_friend_metrics_by_hand(scores, two_hop, expected):
    assert tuple(friend_metrics(torch.tensor([scores]), two_hop).values()) == pytest.approx(
        expected
    )


class Society:
    """dataset_of with relations."""

    def __init__(self, sequences, items, pairs):
        self.data, self.pairs = dataset_of(sequences, items), np.array(pairs)

    def __getattr__(self, name):
        return getattr(self.data, name)

    def relations(self):
        return self.pairs


def ring(count: int) -> Society:
    """User u has items u, u + 1, u + 2 and the friends u - 1 and u + 1."""
    sequences = [[u, (u + 1) % count, (u + 2) % count] for u in range(count)]
    return Society(sequences, count, [[u, (u + 1) % count] for u in range(count)])


def test_candidates_are_a_friend_and_strangers():
    society = ring(30)
    users = torch.arange(25)  # a path, 24 links
    judge = FriendsJudge(society, users, "all", negatives=10)
    assert judge.candidates.shape == (48, 11)
    queries, candidates = judge.queries.numpy(), judge.candidates.numpy()
    distance = np.abs(queries[:, None] - candidates)
    assert (distance[:, 0] == 1).all() and (distance[:, 1:] > 1).all()
    assert all(len(set(row)) == 11 for row in candidates.tolist())
    # Users 0 and 24 are 6 links apart over the users that are not evaluated.
    assert (judge.two_hop.numpy() == (distance[:, 1:] == 2)).all()
    again = FriendsJudge(society, users, "all", negatives=10)
    assert torch.equal(again.candidates, judge.candidates)
    other = FriendsJudge(society, users, "all", negatives=10, seed=1)
    assert not torch.equal(other.candidates, judge.candidates)


@pytest.mark.parametrize("users", [range(25), range(3, 30, 2), [0, 1, 7, 8, 9, 20, 21, 22, 29]])
def test_the_strangers_of_a_link_are_drawn_by_the_ids_of_its_users(users):
    society = ring(30)
    society.pairs = np.concatenate([society.pairs, [[3, 9], [9, 21], [0, 7]]])
    links = {tuple(pair) for pair in society.pairs.tolist()}
    places, expected = list(users), []
    for query, u in enumerate(places):
        friends = [v for v in places if (u, v) in links or (v, u) in links]
        strangers = [p for p, v in enumerate(places) if v not in (u, *friends)]
        for friend in friends:
            generator = np.random.Generator(np.random.Philox(key=(7, u * 30 + friend)))
            drawn = generator.choice(len(strangers), 4, replace=False)
            expected.append((query, [places.index(friend), *(strangers[i] for i in drawn)]))
    judge = FriendsJudge(society, torch.tensor(places), "all", negatives=4, seed=7)
    found = zip(judge.queries.tolist(), judge.candidates.tolist(), strict=True)
    assert list(found) == expected


def test_shared_items_and_trained_weights_find_the_friend():
    judge = FriendsJudge(ring(30), torch.arange(30), "all", negatives=27)
    # Two items are shared with a friend, one with a friend of a friend, none with the others.
    assert judge.shared_items() == {
        "accuracy": 1, "MRR": 1, "accuracy without two-hop": 1
    }  # fmt: skip
    angle = torch.arange(30) * (2 * torch.pi / 30)
    vectors = torch.stack([angle.cos(), angle.sin(), 100 * torch.randn(30)], dim=1)

    untrained = JointObjective({"item": Item()}, None, None)
    assert judge.metrics(vectors, untrained)["accuracy"] < 0.5
    model = model_of(width=3, heads=1)
    trained = JointObjective({"friends": Friends()}, model, None)
    trained.parts["friends"].weight.data = torch.tensor([1.0, 1.0, 0.0])
    assert judge.metrics(vectors, trained)["accuracy"] == 1


def test_friends_errors():
    with pytest.raises(ValueError, match="no friendship among the 2 evaluated users"):
        FriendsJudge(ring(30), torch.tensor([0, 5]), "all")
    with pytest.raises(ValueError, match="has 27 evaluated users who are not friends, 28 negat"):
        FriendsJudge(ring(30), torch.arange(30), "all", negatives=28)


def test_attribute_metrics_by_hand():
    # A standard deviation of 2 stars on the range 1-5: unit 2 / 4.
    stars = EncodedAttribute(
        "stars", torch.tensor([1.0, -1, 1, 2, float("nan"), -1]), mean=3, std=2, unit=0.5
    )
    city = EncodedAttribute("city", torch.tensor([1, 1, 0, 1, 0, -1]), ("a", "b"))
    training, judged = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    judge = AttributesJudge(None, judged, "all", [stars, city], training)
    metrics = judge.metrics(torch.tensor([[1.0, 1], [9, 1], [-1, 0]]))
    # Squared errors of the two known stars: 1 and 0; of the constant 4 and 1. Cities: 1 of 2.
    assert metrics == {
        "score": pytest.approx((0.8 + 0.5) / 2), "stars MSE": 0.125, "city accuracy": 0.5
    }  # fmt: skip
    baseline = judge.metrics(judge.baseline())
    assert baseline == {"score": 0.25, "stars MSE": 0.625, "city accuracy": 0.5}
    with pytest.raises(ValueError, match="no evaluated user has a value of 'city'"):
        AttributesJudge(None, judged[2:], "all", [city], training)


@pytest.mark.parametrize("pool", ["max", "mean", "last", "cls", "attention"])
def test_judges_read_the_user_vector_that_the_objective_is_trained_on(pool):
    dataset, model = six_users(), model_of(num_items=20, tokens=["cls"])
    side = Known(dataset, [AGE, CITY])
    objective = JointObjective(
        {"friends": Friends(pool=pool), "user_attributes": UserAttributes(pool=pool)}, model, side
    )
    encoded = model.encode(model.inputs(dataset, torch.tensor([4, 1]), "train"))
    attributes, friends = objective.parts["user_attributes"], objective.parts["friends"]
    with torch.no_grad():
        by_attributes = attributes.linear(attributes.pool(model, encoded))
        by_friends = friends.pool(model, encoded)
    judge = AttributesJudge(dataset, torch.tensor([4, 1]), "train", [AGE, CITY], torch.arange(6))
    scores = judge.score(model, objective, slice(0, 2))
    torch.testing.assert_close(scores[:, 0], by_attributes[:, 0].double())
    assert scores[:, 1].tolist() == by_attributes[:, 1:].argmax(1).tolist()
    society = Society([dataset.gather([u], "all").values.tolist() for u in range(6)], 20, [[1, 4]])
    judge = FriendsJudge(society, torch.arange(6), "train", negatives=2)
    found = judge.score(model, objective, slice(0, 6))[[4, 1]]
    torch.testing.assert_close(found, by_friends, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match="the judge attributes needs the objective user_attributes"
    ):
        nothing = JointObjective({"friends": Friends()}, model, side)
        AttributesJudge(dataset, torch.arange(2), "train", [AGE], torch.arange(6)).score(
            model, nothing, slice(0, 2)
        )


def test_length_groups_of_the_paper():
    lengths = np.array([5, 7, 8, 14, 15, 100])
    groups = {label: mask.tolist() for label, mask in length_groups(lengths)}
    assert groups == {
        "< 8": [True, True, False, False, False, False],
        "8-14": [False, False, True, True, False, False],
        ">= 15": [False, False, False, False, True, True],
    }
    assert [label for label, _ in length_groups(lengths[:2])] == ["< 8"]
