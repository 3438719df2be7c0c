# SPDX-License-Identifier: Apache-2.0
"""The objective `item`: all items or sampled ones, against plain PyTorch."""

from dataclasses import replace

import pytest
import torch
from builders import (
    Known,
    dataset_of,
    loader_of,
    model_of,
    six_users,
)
from torch import nn

from fastrec.data.batch import JaggedBatch, from_sequences
from fastrec.data.negatives import NegativeSampler
from fastrec.data.steps.mask import MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.nn.pool import Encoded
from fastrec.objectives.bpr_max import bpr_max
from fastrec.objectives.item import Item, ItemPrediction, Sampled
from fastrec.objectives.joint import JointObjective
from fastrec.ops.sampled_linear_cross_entropy import sampled_linear_cross_entropy
from fastrec.random import Rng


def states_of(batch: JaggedBatch) -> Encoded:
    return Encoded(batch, torch.randn(len(batch.values), 8, requires_grad=True))


def dense_item_loss(model, states, targets):
    """Mean over (state, item) pairs of -log softmax."""
    losses = []
    for state, row in zip(states, targets.view(len(states), -1), strict=True):
        scores = model.item_table @ model.item_head.query(state) + model.item_head.bias
        losses += [scores.logsumexp(0) - scores[item] for item in row if item >= 0]
    return torch.stack(losses).mean() if losses else states.sum() * 0, len(losses)


@pytest.mark.parametrize("ahead", [1, 3])
def test_item_prediction_with_several_targets_and_several_views(ahead):
    """Targets [T] or [T, A] of two views against a loop over all of them."""
    model, side = model_of(), Known(six_users())
    nn.init.normal_(model.item_head.bias)
    batches = [from_sequences([[3, 1, 4, 1, 5], [9, 2], [6], []]), from_sequences([[7, 8, 9]])]
    views = [
        states_of(NextItem(ahead=ahead)(batch, Rng(0, 0), side).with_scored()) for batch in batches
    ]
    assert [len(view.batch.values) for view in views] == [5, 2]
    part = Item(views=["a", "b"]).build(model, side)
    for chosen in (views, views[:1]):
        ((name, (loss, count)),) = part(model, Rng(0, 0), *chosen).items()
        states = torch.cat([view.states for view in chosen])
        targets = torch.cat([view.batch.events["target"] for view in chosen])
        expected, number = dense_item_loss(model, states, targets)
        assert name == "item" and int(count) == number
        torch.testing.assert_close(loss, expected)
        leaves = [view.states for view in chosen]
        for got, wanted in zip(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(got, wanted)
    last = NextItem(positions="last", ahead=ahead)(batches[0], Rng(0, 0), side)
    view = states_of(last)  # without `with_scored`
    loss, count = part(model, Rng(0, 0), view)["item"]
    expected, number = dense_item_loss(model, view.states, last.events["target"])
    assert int(count) == number == 2
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("sampled", [None, Sampled(negatives=4, shared=False)])
def test_nothing_to_predict_gives_zero_with_a_live_graph(sampled):
    model, side = model_of(), Known(six_users())
    batch = NextItem()(from_sequences([[3], []]), Rng(0, 0), side)
    view = states_of(replace(batch, values=batch.values))
    loss, count = Item(sampled=sampled).build(model, side)(model, Rng(0, 0), view)["item"]
    loss.backward()
    assert loss == 0 and int(count) == 0 and not view.states.grad.any()


@pytest.mark.parametrize("reg", [None, 0.0, 0.3])
def test_bpr_max_by_hand(reg):
    """Row by row over lists: hits are no negatives, repeats count twice, and a row without a
    target, or with hits alone, has neither loss nor gradient."""
    model, side = model_of(dropout=0.0, num_items=5), Known(dataset_of([[0, 1, 2, 3, 4]], 5))
    torch.nn.init.normal_(model.item_head.bias)
    batch = from_sequences([[0, 3, 1], [2], [4, 4]])
    targets = torch.tensor([3, 1, -100, -100, 2, 0])
    view = states_of(replace(batch, events={"target": targets}))
    settings = Item(loss="bpr_max", sampled=Sampled(negatives=7, bpr_reg=reg))
    (loss, count) = settings.build(model, side)(model, Rng(1, 2), view)["item"]
    negatives = NegativeSampler.uniform(5).shared(7, Rng(1, 2)).tolist()
    assert len(set(negatives)) < 7 and 1 in negatives
    scores = model.item_head.query(view.states) @ model.item_table.T + model.item_head.bias
    total = 0.0
    for row, target in enumerate(targets.tolist()):
        if target != -100:
            s = scores[row, [j for j in negatives if j != target]]
            a, own = s.softmax(0), scores[row, target]
            total = total - (a * (own - s).sigmoid()).sum().log()
            total = total + (1.0 if reg is None else reg) * (a * s**2).sum()
    torch.testing.assert_close(loss, total / 4)
    assert int(count) == 4
    inputs = [view.states, model.item_embedding.weight, model.item_head.bias]
    found = torch.autograd.grad(loss, inputs, retain_graph=True)
    for actual, expected in zip(found, torch.autograd.grad(total / 4, inputs), strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.abs().max() > 0
    only = torch.full((7,), 3)
    args = (view.states[:3], model.item_table, model.item_head.bias, targets[:3], only, 1.0)
    loss = bpr_max(*args)
    (grad,) = torch.autograd.grad(loss, view.states)
    assert loss > 0 and not grad[0].any() and not grad[2].any() and grad[1].abs().max() > 0


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("loss", "gbce_t"), [("softmax", None), ("gbce", None), ("gbce", 0.2)])
def test_sampled_item_loss_in_the_joint_objective(shared, loss, gbce_t):
    """The negatives depend on seed, step, sequence and position: not on the rest of the batch."""
    how = Sampled(negatives=6, by="popularity", alpha=0.5, shared=shared, gbce_t=gbce_t)
    model, side = model_of(dropout=0.0, tokens=["cls", "sep"]), Known(six_users())
    joint = JointObjective({"item": Item(loss=loss, sampled=how)}, model, side)
    views = loader_of(model, {"main": [MaskLast()]}, side).batch_at(0)
    (term,) = joint(model, views, Rng(3, 5))
    batch = views["main"]
    rows = batch.offsets[1:] - 2  # before [SEP]
    assert (batch.values[rows] == model.token("mask")).all()
    states = model.encode(batch).states[rows]
    counts = torch.stack([(side.gather(range(6)).values == item).sum() for item in range(20)])
    sampler = NegativeSampler.popularity(counts, 0.5)
    position = batch.positions()[rows]
    if shared:
        negatives = sampler.shared(6, Rng(3, 5))
    else:
        negatives = torch.cat(
            [
                sampler.own(6, Rng(3, 5), batch.keys[i : i + 1], position[i : i + 1])
                for i in range(6)
            ]
        )
    expected = sampled_linear_cross_entropy(
        model.item_head.query(states), model.item_table, batch.events["target"][rows], negatives,
        linear_bias=model.item_head.bias, loss=loss, backend="reference",
        log_q=sampler.log_q if loss == "softmax" else None, gbce_t=gbce_t or 0.75,
    )  # fmt: skip
    torch.testing.assert_close(term.loss, expected)
    (other,) = joint(model, views, Rng(3, 6))
    assert other.loss.item() != term.loss.item()


def test_own_negatives_of_several_targets_and_views():
    """Target a of A of the event at p has the negatives of place A p + a, those of its view."""
    model, side = model_of(), Known(six_users())
    how = Sampled(negatives=5, by="popularity", shared=False, log_q=False)
    batch = NextItem(ahead=2)(from_sequences([[3, 1, 4, 1], [9, 2]], [4, 0]), Rng(0, 0), side)
    views = [states_of(batch.as_view(number)) for number in (0, 3)]
    part = ItemPrediction(Item(sampled=how), how.sampler(side))
    loss, count = part(model, Rng(3, 5), *views)["item"]
    sampler, losses = NegativeSampler.popularity(side.item_counts), []
    for view in views:
        for t, (key, p) in enumerate(zip([4, 4, 4, 0], [0, 1, 2, 0], strict=True)):
            for a in range(2):
                target = view.batch.events["target"][t, a]
                if target < 0:
                    continue
                key_of_view = view.batch.keys[:1] - 4 + key
                negatives = sampler.own(5, Rng(3, 5), key_of_view, torch.tensor([2 * p + a]))
                query = model.item_head.query(view.states[t])
                items = torch.cat([target[None], negatives[0][negatives[0] != target]])
                scores = model.item_table[items] @ query + model.item_head.bias[items]
                losses.append(scores.logsumexp(0) - scores[0])
    assert int(count) == len(losses) == 12
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_popularity_is_that_of_the_training_inputs():
    model, side = model_of(), Known(six_users(), split="train")
    part = Item(sampled=Sampled(by="popularity")).build(model, side)
    values = six_users().gather(range(6), "train").values
    counts = torch.bincount(values, minlength=20)
    assert torch.equal(part.sampler.log_q, NegativeSampler.popularity(counts).log_q)
    uniform = Item(sampled=Sampled()).build(model, side)
    assert uniform.sampler.threshold is None and uniform.sampler.num_items == 20
