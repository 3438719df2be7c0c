"""User-aware objectives by hand and against dense PyTorch; the joint loss of one encoder pass."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_evaluation import dataset_of

from fastrec.data.attributes import EncodedAttribute
from fastrec.data.batch import JaggedBatch
from fastrec.data.loader import SequenceLoader
from fastrec.data.negatives import NegativeSampler
from fastrec.data.relations import FriendSampler, SocialGraph
from fastrec.nn.pool import max_pool
from fastrec.nn.user_model import ModelConfig, UserModel
from fastrec.objectives.joint import JointObjective, Objectives, total_loss
from fastrec.objectives.masked_item import ItemLoss, Masking
from fastrec.objectives.social_relation import SocialRelationDetection
from fastrec.objectives.user_attribute import UserAttributePrediction
from fastrec.ops.sampled_linear_cross_entropy import sampled_linear_cross_entropy
from fastrec.random import Rng

AGE = EncodedAttribute("age", torch.tensor([0.5, -3.0, float("nan"), 1.0, 0.0, 0.25]))
CITY = EncodedAttribute("city", torch.tensor([0, 2, 1, -1, 2, 0]), ("a", "b", "c"))
#   0 - 1 - 2    3 - 4    5
GRAPH = SocialGraph.from_pairs(np.array([[0, 1], [1, 2], [3, 4]]), 6)
WEIGHTS = Objectives(masked_item=1.0, user_attribute=0.3, social_relation=0.5)


def six_users():
    generator = np.random.default_rng(0)
    sequences = [generator.integers(20, size=n).tolist() for n in (5, 9, 6, 7, 12, 3)]
    return dataset_of(sequences, 20)


def model_of(dropout: float = 0.3, **config) -> UserModel:
    torch.manual_seed(1)
    return UserModel(20, ModelConfig(width=8, layers=1, max_len=10, dropout=dropout, **config))


def loader_of(model: UserModel, **changes) -> SequenceLoader:
    options = dict(
        batch_size=6,
        max_len=10,
        friends=FriendSampler(GRAPH, hops=2),
        columns={"age": AGE.values, "city": CITY.values},
        **model.sequence_tokens,
    )
    return SequenceLoader(six_users(), "train", **{**options, **changes})


def test_max_pool_takes_items_only_and_spreads_the_gradient_to_the_maximum():
    batch = JaggedBatch(
        values=torch.tensor([9, 3, 4, 8, 9, 8]),  # items 0..7; the last user has none
        offsets=torch.tensor([0, 4, 6]),
        keys=torch.arange(2),
        max_seq_len=4,
    )
    states = torch.tensor([[9.0, 9], [1, 5], [2, -5], [7, 7], [8, 8], [8, 8]], requires_grad=True)
    pooled = max_pool(states, batch, num_items=8)
    assert pooled.tolist() == [[2, 5], [0, 0]]
    pooled.sum().backward()
    assert states.grad.tolist() == [[0, 0], [0, 1], [1, 0], [0, 0], [0, 0], [0, 0]]


def test_attributes_by_hand():
    head = UserAttributePrediction(2, [AGE, CITY])
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 0]]))
    users = torch.tensor([[1.0, 0], [0, math.log(2)], [5, 5], [1, 0], [0, 0], [0, 0]])
    losses = head(users, {"age": AGE.values, "city": CITY.values})
    # Errors of the five known ages: 0.5, 3 (beyond delta: 3 - 0.5), 0, 0 and -0.25.
    age, count = losses["age"]
    assert count == 5 and age.item() == pytest.approx((0.125 + 2.5 + 0.03125) / 5)
    # Classes 0, 2, 1, -, 2, 0 with logits (0, 0, 0), (ln 2, 0, 0), (5, 0, 0), (0, 0, 0).
    city, count = losses["city"]
    third = math.log(3)
    expected = third + math.log(4) + math.log(2 + math.exp(5)) + 2 * third
    assert count == 5 and city.item() == pytest.approx(expected / 5)


def test_attributes_that_nobody_has_give_zero_with_a_live_graph():
    head = UserAttributePrediction(2, [AGE, CITY])
    users = torch.ones(2, 2, requires_grad=True)
    columns = {"age": torch.full((2,), float("nan")), "city": torch.full((2,), -1)}
    losses = head(users, columns)
    total = sum(loss for loss, _ in losses.values())
    total.backward()
    assert total == 0 and [int(n) for _, n in losses.values()] == [0, 0]
    assert not users.grad.any() and not head.linear.weight.grad.any()
    with pytest.raises(ValueError, match="no column 'city', it has \\['age'\\]"):
        head(users, {"age": columns["age"]})


def test_relations_equal_dense_pytorch():
    """Eq. 13-14 on six users, with differences, loops and a mask."""
    users = np.array([5, 3, 0, 1, 4, 2])
    profile = np.array([0, 1, 2, 2, 3, 4])
    sequences, pairs = FriendSampler(GRAPH, hops=1, profile=profile).pairs_at(users, 0, 0)
    head = SocialRelationDetection(3).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([0.5, -0.2, 1.5]))
        head.bias.fill_(0.7)
    vectors = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    loss = head(vectors, pairs)
    grads = torch.autograd.grad(loss, [vectors, head.weight, head.bias])

    rows, friends = GRAPH.draw_friends(users, 0, 0)
    place = {user: i for i, user in enumerate(sequences)}
    near = {0: {0, 1}, 1: {0, 1, 2}, 2: {1, 2}, 3: {3, 4}, 4: {3, 4}}
    terms = []
    for user, friend in zip(users[rows], friends, strict=True):
        logits = []
        for other in [friend, *friends[friends != friend]]:
            if other != friend and (other in near[user] or profile[other] == profile[user]):
                continue
            difference = vectors[place[user]] - vectors[place[other]]
            logits.append(-((head.weight * difference**2).sum() + head.bias))
        terms.append(torch.stack(logits).logsumexp(0) - logits[0])
    expected = torch.stack(terms).mean()
    wanted = torch.autograd.grad(expected, [vectors, head.weight, head.bias])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for grad, reference in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-12)
    assert grads[2] == 0


def test_similarity_weights_start_at_one_over_width_or_as_told():
    weights = replace(WEIGHTS, similarity_weight=1.0)
    for chosen, expected in ((WEIGHTS, 1 / 8), (weights, 1.0)):
        joint = JointObjective(chosen, model_of(), [AGE])
        assert joint.social_relation.weight.tolist() == [expected] * 8


def test_no_friends_give_zero_with_a_live_graph():
    lonely = FriendSampler(SocialGraph.from_pairs(np.empty((0, 2)), 6))
    _, pairs = lonely.pairs_at(np.arange(6), 0, 0)
    head, vectors = SocialRelationDetection(3), torch.randn(6, 3, requires_grad=True)
    loss = head(vectors, pairs)
    loss.backward()
    assert loss == 0 and not vectors.grad.any() and not head.weight.grad.any()
    with pytest.raises(ValueError, match="no pairs: give the loader a FriendSampler"):
        head(vectors, None)


def test_the_joint_loss_is_the_weighted_sum_from_one_encoder_pass(monkeypatch):
    model = model_of()
    batch = loader_of(model).batch_at(0)
    assert len(batch) == batch.own == 6  # all friends are in the batch
    joint = JointObjective(WEIGHTS, model, [AGE, CITY])
    calls = []
    encode = UserModel.encode
    monkeypatch.setattr(UserModel, "encode", lambda *a: calls.append(1) or encode(*a))
    terms = joint(model, batch, Masking(), seed=3, step=4)
    assert len(calls) == 1

    masked, rows, targets = Masking()(batch, model, 3, 4)
    states = model.encode(masked, Rng(3, 4))
    logits = F.linear(model.item_head.query(states[rows]), model.item_table, model.item_head.bias)
    mip = F.cross_entropy(logits, targets)
    pooled = torch.stack(
        [
            states[a + 1 : b - 1].amax(0)  # without [CLS] and [SEP]
            for a, b in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True)
        ]
    )
    users = batch.keys
    age, city = joint.user_attribute.linear(pooled).split([1, 3], 1)
    known = ~AGE.values[users].isnan()
    uap = F.huber_loss(age.squeeze(1)[known], AGE.values[users][known])
    uap = uap + F.cross_entropy(city, CITY.values[users], ignore_index=-1)
    srd = joint.social_relation(pooled, batch.pairs, backend="reference")
    torch.testing.assert_close(total_loss(terms), mip + 0.3 * uap + 0.5 * srd)
    assert [t.objective for t in terms] == [
        "masked_item",
        *2 * ["user_attribute"],
        "social_relation",
    ]


def test_the_loss_does_not_depend_on_the_order_of_the_batch():
    model = model_of()
    joint = JointObjective(WEIGHTS, model, [AGE, CITY])
    losses = []
    for users in ([0, 1, 2, 3, 4, 5], [4, 2, 5, 0, 3, 1]):
        batch = loader_of(model, users=users, shuffle=False).batch_at(0)
        terms = joint(model, batch, Masking(), seed=3, step=0)
        losses.append(torch.stack([term.loss for term in terms]))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_friends_from_outside_the_batch_are_encoded_once_and_may_train_the_rest_or_not():
    model = model_of()
    loader = loader_of(model, users=[1, 5], batch_size=2, shuffle=False)
    batch = loader.batch_at(0)
    assert batch.own == 2 and len(batch) == 3 and batch.keys[2] in (0, 2)
    assert len(batch.columns["city"]) == 3
    own = loader_of(model, users=[1, 5], batch_size=2, shuffle=False, friends=None).batch_at(0)
    for friends_in_all in (True, False):
        weights = replace(WEIGHTS, friends_in_all=friends_in_all)
        joint = JointObjective(weights, model, [AGE, CITY])
        terms = joint(model, batch, Masking(), 0, 0)
        alone = JointObjective(replace(weights, social_relation=0.0), model, [AGE, CITY])
        alone.load_state_dict(joint.state_dict(), strict=False)
        expected = alone(model, own, Masking(), 0, 0)
        same = [torch.allclose(a.loss, b.loss) for a, b in zip(terms, expected, strict=False)]
        # Masked items, age, city; the friend has no age.
        assert same == ([False, True, False] if friends_in_all else [True, True, True])
        assert int(terms[0].number) > int(expected[0].number) or not friends_in_all


def test_without_masked_items_nothing_is_masked():
    model = model_of(dropout=0.0)
    batch = loader_of(model).batch_at(0)
    weights = Objectives(masked_item=0.0, user_attribute=1.0, attribute_pool="cls")
    joint = JointObjective(weights, model, [CITY])
    (term,) = joint(model, batch, Masking(), 0, 0)
    cls = model.encode(batch)[batch.offsets[:-1]]
    logits, target = joint.user_attribute.linear(cls), CITY.values[batch.keys]
    torch.testing.assert_close(term.loss, F.cross_entropy(logits, target, ignore_index=-1))


def test_errors_name_the_problem():
    model = model_of()
    with pytest.raises(ValueError, match="no objective has a positive weight"):
        JointObjective(Objectives(masked_item=0.0), model, [])
    with pytest.raises(ValueError, match="'cls' needs a model with use_cls"):
        JointObjective(replace(WEIGHTS, attribute_pool="cls"), model_of(use_cls=False), [AGE])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("loss", ["softmax", "gbce"])
def test_sampled_item_loss_in_the_joint_objective(shared, loss):
    """The negatives depend on seed, step, sequence and position: not on the rest of the batch."""
    how = ItemLoss(
        kind="sampled", loss=loss, negatives=6, sampler="popularity", alpha=0.5, shared=shared
    )
    model, counts = model_of(dropout=0.0), torch.arange(20)
    joint = JointObjective(Objectives(item_loss=how), model, [], lambda: counts)
    batch = loader_of(model, friends=None, columns={}).batch_at(0)
    (term,) = joint(model, batch, Masking(last_only=True), seed=3, step=5)
    _, rows, targets = Masking(last_only=True)(batch, model, 3, 5)
    masked = replace(batch, values=batch.values.index_fill(0, rows, model.token("mask")))
    states = model.encode(masked)[rows]
    sampler = NegativeSampler.popularity(counts, 0.5)
    position = batch.positions()[rows]
    if shared:
        negatives = sampler.shared(6, 3, 5)
    else:
        negatives = torch.cat(
            [sampler.own(6, 3, 5, batch.keys[i : i + 1], position[i : i + 1]) for i in range(6)]
        )
    expected = sampled_linear_cross_entropy(
        model.item_head.query(states), model.item_table, targets, negatives,
        linear_bias=model.item_head.bias, loss=loss, backend="reference",
        log_q=sampler.log_q if loss == "softmax" else None,
    )  # fmt: skip
    torch.testing.assert_close(term.loss, expected)
    (other,) = joint(model, batch, Masking(last_only=True), seed=3, step=6)
    assert other.loss.item() != term.loss.item()


def test_negatives_by_popularity_need_the_counts():
    how = ItemLoss(kind="sampled", sampler="popularity")
    with pytest.raises(ValueError, match="needs the item counts"):
        JointObjective(Objectives(item_loss=how), model_of(), [])
