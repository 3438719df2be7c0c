"""Evaluation of profiles and friends: ties, candidates, shared items; groups by length."""

import numpy as np
import pytest
import torch
from test_evaluation import dataset_of

from fastrec.data.attributes import EncodedAttribute
from fastrec.evaluation.metrics import length_groups
from fastrec.evaluation.profile import ProfileEvaluator
from fastrec.evaluation.relation import RelationEvaluator, friend_metrics
from fastrec.objectives.social_relation import SocialRelationDetection

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
    evaluator = RelationEvaluator(society, users, "all", negatives=10)
    assert evaluator.candidates.shape == (48, 11)
    queries, candidates = evaluator.queries.numpy(), evaluator.candidates.numpy()
    distance = np.abs(queries[:, None] - candidates)
    assert (distance[:, 0] == 1).all() and (distance[:, 1:] > 1).all()
    assert all(len(set(row)) == 11 for row in candidates.tolist())
    # Users 0 and 24 are 6 links apart over the users that are not evaluated.
    assert (evaluator.two_hop.numpy() == (distance[:, 1:] == 2)).all()
    again = RelationEvaluator(society, users, "all", negatives=10)
    assert torch.equal(again.candidates, evaluator.candidates)
    other = RelationEvaluator(society, users, "all", negatives=10, seed=1)
    assert not torch.equal(other.candidates, evaluator.candidates)


def test_shared_items_and_trained_weights_find_the_friend():
    evaluator = RelationEvaluator(ring(30), torch.arange(30), "all", negatives=27)
    # Two items are shared with a friend, one with a friend of a friend, none with the others.
    assert evaluator.shared_items() == {
        "accuracy": 1, "MRR": 1, "accuracy without two-hop": 1
    }  # fmt: skip
    angle = torch.arange(30) * (2 * torch.pi / 30)
    vectors = torch.stack([angle.cos(), angle.sin(), 100 * torch.randn(30)], dim=1)

    class Trained:
        social_relation = SocialRelationDetection(3)

    assert evaluator.metrics(vectors, None)["accuracy"] < 0.5
    Trained.social_relation.weight.data = torch.tensor([1.0, 1.0, 0.0])
    assert evaluator.metrics(vectors, Trained)["accuracy"] == 1


def test_relation_errors():
    with pytest.raises(ValueError, match="no friendship among the 2 evaluated users"):
        RelationEvaluator(ring(30), torch.tensor([0, 5]), "all")
    with pytest.raises(ValueError, match="has 27 evaluated users who are not friends, 28 negat"):
        RelationEvaluator(ring(30), torch.arange(30), "all", negatives=28)


def test_profile_metrics_by_hand():
    # A standard deviation of 2 stars on the range 1-5: unit 2 / 4.
    stars = EncodedAttribute(
        "stars", torch.tensor([1.0, -1, 1, 2, float("nan"), -1]), mean=3, std=2, unit=0.5
    )
    city = EncodedAttribute("city", torch.tensor([1, 1, 0, 1, 0, -1]), ("a", "b"))
    training, judged = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    evaluator = ProfileEvaluator(None, judged, "all", [stars, city], training)
    metrics = evaluator.metrics(torch.tensor([[1.0, 1], [9, 1], [-1, 0]]))
    # Squared errors of the two known stars: 1 and 0; of the constant 4 and 1. Cities: 1 of 2.
    assert metrics == {
        "score": pytest.approx((0.8 + 0.5) / 2), "stars MSE": 0.125, "city accuracy": 0.5
    }  # fmt: skip
    baseline = evaluator.metrics(evaluator.baseline())
    assert baseline == {"score": 0.25, "stars MSE": 0.625, "city accuracy": 0.5}
    with pytest.raises(ValueError, match="no evaluated user has a value of 'city'"):
        ProfileEvaluator(None, judged[2:], "all", [city], training)


def test_length_groups_of_the_paper():
    lengths = np.array([5, 7, 8, 14, 15, 100])
    groups = {label: mask.tolist() for label, mask in length_groups(lengths)}
    assert groups == {
        "< 8": [True, True, False, False, False, False],
        "8-14": [False, False, True, True, False, False],
        ">= 15": [False, False, False, False, True, True],
    }
    assert [label for label, _ in length_groups(lengths[:2])] == ["< 8"]
