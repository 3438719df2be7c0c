# SPDX-License-Identifier: Apache-2.0
"""Batches padded to a capacity, as CUDA graphs take them: the same losses and gradients, constant
shapes, and nothing that waits for a value. The capture itself needs a GPU, see `benchmarks/gpu`."""

import functools

import numpy as np
import pytest
import torch
from builders import (
    FORMS,
    JOINT,
    SOCIAL_VIEWS,
    Known,
    dataset_of,
    jagged,
    loader_of,
    model_of,
    recipe,
    run,
    social_side,
    trained_weights,
)

from fastrec import backend
from fastrec.data.graph import SocialGraph
from fastrec.data.item_categories import CategoryLists
from fastrec.data.pairs import Pairs
from fastrec.data.prepare.synthetic import generate
from fastrec.data.steps.click import Click as Labelled
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.insert import Insert
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.mask_rating import MaskRating
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.same_target import SameTarget
from fastrec.data.steps.segment import Segment
from fastrec.data.steps.substitute import Substitute
from fastrec.data.views import Again
from fastrec.nn.item_parts import Rating as Levels
from fastrec.nn.items import Items
from fastrec.nn.pool import Interests
from fastrec.objectives.align import Align
from fastrec.objectives.click import Click
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.item import Item, Sampled
from fastrec.objectives.item_attributes import ItemAttributePrediction, ItemAttributes
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.objectives.rank import Rank
from fastrec.objectives.rating import Rating
from fastrec.objectives.segments import Segments
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.ops.common.in_batch_pairs import transposed_lists
from fastrec.random import Rng
from fastrec.training.graphed import (
    Capacity,
    GraphedObjective,
    _Losses,
    _padded_pairs,
    padded,
    spare_sequences,
)

MASKED = {"main": [Mask()]}
PAIR = {"a": [Crop()], "b": [Mask()]}
RANKED = PAIR | {"c": [Again("a")], "d": [Again("b")]}
RUNS = {"a": [Segment()], "b": [Segment(keep=True)]}


class Attributes(ItemAttributes):
    """Two of five attributes for each of 20 items."""

    def build(self, model, side):
        labels = torch.stack([torch.arange(20) % 4, torch.full((20,), 4)], 1).flatten()
        lists = CategoryLists(labels, torch.arange(21) * 2, 5)
        return ItemAttributePrediction(self, lists, model.config.width)


SYSTEMS = {
    "joint": (SOCIAL_VIEWS, JOINT),
    "joint_and_contrast": (SOCIAL_VIEWS | PAIR, JOINT | {"contrast": Contrast(["a", "b"])}),
    "attributes_by_cls": ({"main": []}, {"user_attributes": UserAttributes(pool="cls")}),
    "attributes_by_mean": ({"main": []}, {"user_attributes": UserAttributes(pool="mean")}),
    "attributes_by_attention": (
        {"main": []},
        {"user_attributes": UserAttributes(pool="attention")},
    ),
    "sampled_shared": (MASKED, {"item": Item(sampled=Sampled(6, shared=True))}),
    "sampled_own": (MASKED, {"item": Item(sampled=Sampled(6, shared=False))}),
    "next_item": ({"main": [NextItem()]}, {"item": Item()}),
    "next_by_bpr_max": (
        {"main": [NextItem()]},
        {"item": Item(loss="bpr_max", sampled=Sampled(6))},
    ),
    "next_in_batch": (
        {"main": [NextItem()]},
        {"item": Item(sampled=Sampled(6, by="popularity", in_batch=True))},
    ),
    "next_in_batch_by_bpr_max": (
        {"main": [NextItem(ahead=2)]},
        {"item": Item(loss="bpr_max", sampled=Sampled(6, in_batch=True))},
    ),
    "next_in_batch_users": (
        {"main": [NextItem(ahead=2)]},
        {"item": Item(sampled=Sampled(6, in_batch=True))},
    ),
    "next_three": (
        {"main": [NextItem(positions="last", ahead=3)]},
        {"item": Item(loss="bce", sampled=Sampled(6, shared=False))},
    ),
    "next_clicks": ({"main": [NextItem()]}, {"click": Click(negatives=3)}),
    "rating_clicks": ({"main": [Labelled(3), MaskLast()]}, {"click": Click(negatives=2)}),
    "next_item_users": ({"main": [NextItem(ahead=2)]}, {"item": Item()}),
    "next_item_sasrec": ({"main": [NextItem()]}, {"item": Item()}),
    "next_item_ligr": ({"main": [NextItem()]}, {"item": Item()}),
    "contrast": (PAIR, {"contrast": Contrast(["a", "b"])}),
    "contrast_of_interests": (PAIR, {"contrast": Contrast(["a", "b"], pool=Interests(3))}),
    "contrast_of_the_first": (
        PAIR,
        {
            "contrast": Contrast(
                ["a", "b"], pool="max", similarity="cosine", temperature=0.2, anchors="first"
            )
        },
    ),
    "contrast_of_means": (
        PAIR,
        {"contrast": Contrast(["a", "b"], pool="mean", similarity="cosine", temperature=0.5)},
    ),
    "align": ({"a": [], "b": []}, {"align": Align(["a", "b"])}),
    "rank": (RANKED, {"rank": Rank(["a", "b", "c", "d"])}),
    "rank_by_one_weight": (
        RANKED,
        {"rank": Rank(["a", "b", "c", "d"], pool="mean", fusion="batch")},
    ),
    "next_item_and_contrast": (
        {"main": [NextItem()], "a": [Again("main")], "b": [SameTarget(), NextItem()]},
        {"item": Item(), "contrast": Contrast(["a", "b"], false_negatives=["target", "profile"])},
    ),
    "contrast_with_the_other_view": (
        {"a": [Substitute()], "b": [Insert()]},
        {"contrast": Contrast(["a", "b"], candidates="other")},
    ),
    "next_by_bpr": (
        {"main": [NextItem()]},
        {"item": Item(loss="bpr", project=True, sampled=Sampled(2))},
    ),
    "item_attributes": (MASKED, {"item_attributes": Attributes()}),
    "segments": (RUNS, {"segments": Segments(["a", "b"])}),
    "segments_of_the_next": (RUNS, {"segments": Segments(["a", "b"], negatives="next")}),
    "rating": ({"main": [MaskRating()]}, {"rating": Rating()}),
    "rating_by_item": ({"main": [MaskRating()]}, {"rating": Rating(by="item")}),
    "again": (
        {"a": [Mask()], "again": [Again("a")]},
        {"item": Item(views=["a", "again"]), "contrast": Contrast(["a", "again"])},
    ),
}


def system_of(name: str):
    """(model, objective, side data, views) of a system."""
    views, objectives = SYSTEMS[name]
    causal = name.startswith(("next", "align"))
    form = FORMS.get(name.removeprefix("next_item_"), {})
    if name.endswith("_users"):
        form = {"head_table": "own", "head_transform": False, "user_width": 3, "num_users": 6}
    tokens, side = [] if causal else ["cls", "sep"], social_side()
    tokens = ["ur"] if name == "align" else tokens
    if name.startswith("rating"):
        ratings = np.random.default_rng(0).integers(1, 6, side.dataset.num_events)
        side.dataset._event_columns["rating"] = ratings.astype(np.float32)
        side.event_columns, form = ["rating"], {"items": Items(rating=Levels(width=4))}
    side.profile_ids = np.array([0, 1, 0, 1, -1, 0])
    model = model_of(tokens=tokens, causal=causal, **form)
    return model, JointObjective(objectives, model, side), side, views


class Replay:
    """What a graph does with inputs and kernels: copies into places of fixed shapes, calls."""

    def __init__(self, losses: _Losses, packs: list[torch.Tensor]):
        self.losses, self.places = losses, [pack.clone() for pack in packs]

    def __call__(self, *packs: torch.Tensor) -> torch.Tensor:
        for place, pack in zip(self.places, packs, strict=True):
            assert place.shape == pack.shape
            place.copy_(pack)
        return self.losses(*self.places)


def counted():
    """(what was captured so far, the capture to give)."""
    captures: list[Replay] = []

    def capture(losses, packs):
        captures.append(Replay(losses, packs))
        return captures[-1]

    return captures, capture


def gradients(terms, *modules) -> list[torch.Tensor]:
    parameters = [p for module in modules for p in module.parameters()]
    found = torch.autograd.grad(total_loss(terms), parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return [torch.zeros_like(p) if grad is None else grad for grad, p in pairs]


@pytest.mark.parametrize("name", SYSTEMS)
def test_padded_batches_give_the_same_losses_and_gradients(name):
    model, objective, side, views = system_of(name)
    loader = loader_of(model, views, side, batch_size=4)  # of six users: every second has two
    captures, capture = counted()
    graphed = GraphedObjective(model, objective, seed=3, capture=capture)
    for step in range(8):
        batch = loader.batch_at(step)
        found = objective(model, batch, Rng(3, step))
        expected = [term for term in found if term.number is not None]
        actual = graphed(batch, step)
        assert [(t.name, t.weight) for t in actual] == [(t.name, t.weight) for t in expected]
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-6)
        pairs = zip(
            gradients(actual, model, objective), gradients(expected, model, objective), strict=True
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert 1 <= len(captures) <= 5
    whole = loader_of(model, views, side).batch_at(0)
    first, second = ([t.loss.item() for t in graphed(whole, step)] for step in (0, 1))
    assert all(a != b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("queries, room", [(700, 1.1), (700, 1.0), (3, 1.1), (0, 1.1)])
def test_no_list_of_the_padding_is_long(queries, room):
    """Neither of a query nor, in backward, of a candidate: a program walks each."""
    candidates, listed = 2000, 8000 if queries else 0
    owner = torch.randint(max(queries, 1), (listed,)).sort().values
    offsets = torch.searchsorted(owner, torch.arange(queries + 1))
    values = torch.randint(candidates, (listed,))
    values = (owner * candidates + values).sort().values % candidates
    pairs = Pairs(
        torch.arange(queries), torch.arange(candidates), torch.zeros(queries, dtype=torch.int64),
        (candidates,), None, None, (values, offsets), 0.0,
    )  # fmt: skip
    capacity = Capacity(0, 0, 0, int((queries + 1) * room), int(candidates * room), 8000 + 800)
    values, offsets = _padded_pairs(pairs, capacity).exclude
    assert len(values) == capacity.excluded and len(offsets) == capacity.queries + 1
    spare, padding = capacity.excluded - listed, capacity.queries - queries
    assert offsets.diff()[queries:].max() <= -(-spare // padding)
    owner = torch.repeat_interleave(offsets.diff())
    assert (owner * capacity.candidates + values).diff().min() >= 0  # every list rises
    own = values[:listed].bincount(minlength=capacity.candidates)
    _, transposed = transposed_lists((values, offsets), capacity.candidates)
    assert (transposed.diff() - own).max() <= -(-spare // capacity.candidates)


@pytest.mark.parametrize("lengths", [[0, 0], [3, 0], [1]])
def test_padding_fills_whole_sequences(lengths):
    """The room of a view without events may be a multiple of the longest sequence."""
    length = 5
    for events in (length, 2 * length, 2 * length + 1):
        spare = spare_sequences(events, length)
        made = padded(jagged(lengths, 20), Capacity(len(lengths), events, 0), spare, length, 20)
        assert int(made.offsets[-1]) == len(made.values) == events
        assert made.offsets.diff().min() >= 0 and made.offsets.diff().max() <= length
        assert (made.offsets[:-1] < events).all()


def test_a_batch_without_friends_is_all_padding():
    model, side = model_of(), social_side()
    objective = JointObjective(JOINT, model, side)
    side.graph = SocialGraph.from_pairs(np.empty((0, 2)), 6)
    graphed = GraphedObjective(model, objective, seed=3, capture=Replay)
    terms = graphed(loader_of(model, SOCIAL_VIEWS, side).batch_at(0), 0)
    assert terms[-1].name == "friends" and terms[-1].loss == 0
    assert all(grad.isfinite().all() for grad in gradients(terms, model, objective))


def test_a_full_capacity_is_kept_and_a_larger_batch_extends_it():
    """Views of the same users grow together: contrast needs as many sequences in both."""
    data = dataset_of([[1, 2, 3]] * 10 + [[4, 5, 6, 7, 8]] * 13, 20)
    model, side = model_of(), Known(data, split="all")
    views = {"a": [Crop(0.1)], "b": [Mask()]}  # an item of each user, all items
    objective = JointObjective({"contrast": Contrast(["a", "b"])}, model, side)
    captures, capture = counted()
    graphed = GraphedObjective(model, objective, seed=3, capture=capture)
    # Eleven users fit the margin of ten, but not their events in `b`.
    few, more, many = (
        loader_of(model, views, side, users=users, batch_size=30, shuffle=False).batch_at(0)
        for users in (range(10), range(10, 21), range(23))
    )
    graphed(few, 0)
    graphed(few, 0)
    assert len(captures) == 1
    for batch, number in ((more, 2), (many, 3)):
        (term,), (expected,) = graphed(batch, 0), objective(model, batch, Rng(3, 0))
        torch.testing.assert_close(term.loss, expected.loss)
        assert len(captures) == number
        a, b = (graphed.capacities[name] for name in "ab")
        assert a.sequences == b.sequences >= len(batch["a"])
        assert b.events > len(batch["b"].values)
    kept = dict(graphed.capacities)
    graphed(few, 1)
    assert len(captures) == 3 and graphed.capacities == kept


@pytest.mark.parametrize("name", SYSTEMS)
def test_nothing_waits_for_a_value(name, launches, monkeypatch):
    """On meta tensors, which have no values: what asks for one raises. They stand for CUDA, up to
    the launch of a kernel."""
    monkeypatch.setitem(backend.NATIVE, "meta", "triton")
    seen = []

    def keep(losses, packs):
        seen.append((losses, packs))
        return losses

    model, objective, side, views = system_of(name)
    GraphedObjective(model, objective, seed=3, capture=keep)(
        loader_of(model, views, side).batch_at(0), 0
    )
    losses, packs = seen[0]
    out = losses.to("meta")(*(pack.to("meta") for pack in packs))
    out.sum().backward()
    assert len(launches) > 5 and out.is_meta and model.item_embedding.weight.grad.is_meta


def test_training_with_replayed_steps_ends_with_the_same_weights(tmp_path, monkeypatch):
    generate(tmp_path / "data", num_users=100, num_items=50, seed=3)
    options = dict(steps=6, validate_every=3, checkpoint_every=3, learning_rate=1e-4)
    found = []
    for cuda_graph in (False, True):
        if cuda_graph:
            monkeypatch.setattr("fastrec.training.fit.check_one_gpu", lambda *given: None)
            graphed = functools.partial(GraphedObjective, capture=Replay)
            monkeypatch.setattr("fastrec.training.module.GraphedObjective", graphed)
        chosen = recipe(**options, cuda_graph=cuda_graph)
        run(tmp_path / "data", tmp_path / str(cuda_graph), chosen)
        found.append(trained_weights(tmp_path / str(cuda_graph)))
    assert found[0].keys() == found[1].keys() and found[1]["step"] == 6
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=2e-5, msg=name)


def test_without_one_gpu_nothing_is_written(tmp_path):
    if torch.cuda.device_count() == 1:
        pytest.skip("there is one GPU")
    generate(tmp_path / "data", num_users=20, num_items=10, seed=3)
    with pytest.raises(ValueError, match="one process on one GPU: devices is auto"):
        run(tmp_path / "data", tmp_path / "output", recipe(cuda_graph=True))
    assert not (tmp_path / "output").exists()
