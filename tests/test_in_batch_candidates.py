# SPDX-License-Identifier: Apache-2.0
"""`sampled.in_batch`: the targets of a step as candidates beside drawn ones (GRU4Rec)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from backends import backends
from builders import Known, dataset_of, jagged, model_of
from torch.nn import functional as F

from fastrec.data.batch import NO_TARGET
from fastrec.data.steps.next_item import NextItem
from fastrec.nn.pool import Encoded
from fastrec.objectives.item import Item, Sampled
from fastrec.random import Rng

EVENTS = [[0, 1, 2, 3, 3, 3], [4, 0, 0, 5], [6, 1, 3]]  # item 7 has none
HEADS = {
    "tied": {},
    "own": {"head_table": "own", "head_transform": False, "user_width": 3, "num_users": 3},
}


def side_of() -> Known:
    return Known(dataset_of(EVENTS, 8), split="all")


def views_of(ahead: int) -> list[Encoded]:
    """Two views of different users, random states."""
    found = []
    for view, lengths in enumerate(([4, 2, 3], [3, 1])):
        batch = NextItem(ahead=ahead)(jagged(lengths, num_items=8), Rng(0, 0), side_of())
        batch = replace(batch.as_view(view), users={"user": torch.arange(len(lengths))})
        states = torch.randn(len(batch.values), 8, requires_grad=True)
        found.append(Encoded(batch, states))
    return found


def predictions(model, views):
    """(output state, target) of every target, in order."""
    found = []
    for view in views:
        target = view.batch.events["target"]
        target = target.view(len(target), -1).tolist()
        for event, items in enumerate(target):
            if all(item == NO_TARGET for item in items):
                continue
            state = model.output(view, torch.tensor([event]))[0]
            found += [(state, item) for item in items if item != NO_TARGET]
    return found


@backends("sampled_linear_cross_entropy", "reference", "cpp")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("loss", ["softmax", "uncorrected", "bpr_max"])
@pytest.mark.parametrize("number", [5, 0])
def test_equals_its_definition_row_by_row(number, loss, ahead, head, backend):
    """Targets of all views and 5 drawn items or none, the same for all rows; one that is the target
    of a row does not count there, one that occurs twice counts twice, and -100 is no candidate."""
    model, side = model_of(num_items=8, dropout=0.0, **HEADS[head]), side_of()
    torch.nn.init.normal_(model.item_head.bias)
    views = views_of(ahead)
    how = Sampled(5, by="popularity", alpha=0.5, in_batch=True)
    if not number:
        how = Sampled(0, in_batch=True)
    if loss == "uncorrected":
        how = replace(how, log_q=False)
    settings = Item(loss="bpr_max" if loss == "bpr_max" else "softmax", sampled=how)
    part = settings.build(model, side)
    part.backend = backend
    found, count = part(model, Rng(1, 2), *views)["item"]
    rows = predictions(model, views)
    drawn = how.sampler(side).shared(5, Rng(1, 2)).tolist()[:number]
    candidates = [target for _, target in rows] + drawn
    events = np.concatenate(EVENTS)
    p = torch.from_numpy(np.bincount(events, minlength=8) / len(events))
    q = how.sampler(side).log_q.double().exp()
    if not number:  # item 7, which is no candidate of a step of training, has the lowest share
        p = p.clamp_min(p[p > 0].min())
    correction = (len(rows) * p + number * q).log().float()
    assert len(set(candidates)) < len(candidates)
    losses = []
    for state, target in rows:
        s = model.item_table @ model.item_head.query(state) + model.item_head.bias
        if loss == "softmax":
            s = s - correction
        others = s[[j for j in candidates if j != target]]
        if loss == "bpr_max":
            a = others.softmax(0)
            losses.append(-(a * (s[target] - others).sigmoid()).sum().log())
            losses[-1] = losses[-1] + (a * others**2).sum()
        else:
            losses.append(torch.cat([others, s[target, None]]).logsumexp(0) - s[target])
    expected = torch.stack(losses).mean()
    assert int(count) == len(losses) and (ahead == 1 or (count < 2 * 10).item())
    torch.testing.assert_close(found, expected)
    tensors = [view.states for view in views] + [model.item_table, model.item_head.bias]
    tensors[-2] = model.item_embedding.weight if head == "tied" else model.item_head.table.weight
    pairs = zip(
        torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors), strict=True
    )
    for actual, exact in pairs:
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-6)


def test_the_correction_is_the_number_of_an_item_that_is_expected():
    """Targets by the share of events, negatives by the law of the sampler: mean of 500 steps."""
    how = Sampled(30, by="popularity", alpha=0.25, in_batch=True)
    part = Item(sampled=how).build(model_of(), side_of())
    events = torch.from_numpy(np.concatenate(EVENTS))
    targets = torch.cat([events.repeat(5), torch.full((9,), NO_TARGET)])
    expected = part._log_counts(how, targets).exp()
    # Item 7, which is no candidate, has a number too, so that its correction is finite.
    torch.testing.assert_close(expected[:7].sum(), torch.tensor(len(events) * 5 + 30.0))
    counted = torch.zeros(8)
    for step in range(500):
        seen = events[torch.randint(len(events), (5 * len(events),))]
        drawn = part.sampler.shared(30, Rng(0, step))
        counted += torch.bincount(torch.cat([seen, drawn]), minlength=8)
    deviation = (expected / 500).sqrt()
    assert ((counted / 500 - expected).abs()[:7] < 5 * deviation[:7]).all()
    assert counted[7] == 0 and expected[7] > 0


@pytest.mark.parametrize("number", [4, 0])
@pytest.mark.parametrize("loss", ["softmax", "bpr_max"])
def test_nothing_to_predict_gives_zero_with_a_live_graph(loss, number):
    model, side = model_of(num_items=8), side_of()
    batch = NextItem(ahead=2)(jagged([1, 0], num_items=8), Rng(0, 0), side)
    view = Encoded(batch, torch.randn(0, 8, requires_grad=True))
    settings = Item(loss=loss, sampled=Sampled(number, in_batch=True))
    found, count = settings.build(model, side)(model, Rng(0, 0), view)["item"]
    found.backward()
    assert found == 0 and int(count) == 0


def test_candidates_that_are_none_have_no_gradient():
    """Rows of padding: the scores of their place are out of the sum in any precision."""
    model = model_of(num_items=8, head_transform=False)
    states, targets = torch.randn(3, 8), torch.tensor([2, 5, NO_TARGET])
    table = F.pad(model.item_table.detach(), (0, 0, 0, 1)).requires_grad_()
    only = torch.full((300,), 8)
    loss = model.item_head.sampled_loss(states, table, targets, only)
    loss.backward()
    assert loss == 0 and not table.grad.any() and not model.item_head.bias.grad.any()


def test_what_has_no_meaning_is_refused():
    for loss in ("bce", "gbce"):
        with pytest.raises(ValueError, match=rf"in_batch: {loss} would be a sum over all targets"):
            Item(loss=loss, sampled=Sampled(in_batch=True))
    with pytest.raises(ValueError, match=r"in_batch needs shared negatives: sampled\.shared: true"):
        Sampled(in_batch=True, shared=False)
    with pytest.raises(ValueError, match=r"at least 1, or 0 with sampled\.in_batch, got -1"):
        Sampled(-1, in_batch=True)
    with pytest.raises(ValueError, match=r"sampled\.by has no effect: sampled\.negatives is 0"):
        Sampled(0, by="popularity", in_batch=True)
