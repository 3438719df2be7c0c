# SPDX-License-Identifier: Apache-2.0
"""The parts of S3-Rec against one event at a time in plain Python: segments, attributes of items,
the target above drawn items, and a bidirectional model that goes on as a causal one."""

import math

import polars as pl
import pytest
import torch
import torch.nn.functional as F
from builders import Known, dataset_of, jagged, lists_of, loader_of, model_of, six_users, synthetic

from fastrec.data.batch import from_sequences
from fastrec.data.dataset import SequenceDataset
from fastrec.data.item_categories import CategoryLists, category_lists
from fastrec.data.prepare import prepare
from fastrec.data.side import SideData
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.segment import Segment
from fastrec.nn.encoders.parts import settings_of
from fastrec.nn.pool import Encoded
from fastrec.objectives.bpr import bpr
from fastrec.objectives.item import Item, Sampled
from fastrec.objectives.item_attributes import ItemAttributePrediction, ItemAttributes
from fastrec.objectives.joint import JointObjective
from fastrec.objectives.segments import SegmentPrediction, Segments
from fastrec.random import Rng, draws
from fastrec.training.config import Recipe
from fastrec.training.fit import fit
from fastrec.training.heads_file import load_heads, save_heads

V = 50
RNG = Rng(3, 5)
SIDE = Known(dataset_of([[0, 1, 2]], V))
LISTS = CategoryLists(torch.tensor([0, 2, 1, 0, 1, 3]), torch.tensor([0, 2, 3, 3, 6]), 4)


# Segments


def run_of(batch, share: float) -> list[range]:
    """The run of each sequence, from the draws."""
    zero = torch.zeros(len(batch), dtype=torch.int64)
    size, place = (
        draws(RNG, batch.sample_ids, row, zero, site="segment").tolist() for row in (0, 1)
    )
    runs = []
    for i, n in enumerate(batch.lengths.tolist()):
        most = max(1, math.floor(n * share + 1e-9))
        length = min(1 + size[i] * most // 65536, n)
        start = place[i] * (n - length + 1) // 65536
        runs.append(range(start, start + length))
    return runs


@pytest.mark.parametrize("share", [0.5, 1.0, 0.1])
def test_segment_masks_a_run_or_all_others(share):
    batch = jagged([9, 1, 0, 2, 30, 5, 7], V)
    context = lists_of(Segment(share=share)(batch.as_view(1), RNG, SIDE))
    kept = lists_of(Segment(keep=True, share=share)(batch.as_view(2), RNG, SIDE))
    for items, run, a, b in zip(lists_of(batch), run_of(batch, share), context, kept, strict=True):
        assert a == [V if place in run else item for place, item in enumerate(items)]
        assert b == [item if place in run else V for place, item in enumerate(items)]


def test_lengths_of_runs_are_uniform():
    batch = jagged([9] * 4000, V)
    masked = Segment()(batch, RNG, SIDE).values.view(-1, 9) == V
    counts = masked.sum(1).bincount(minlength=5)
    assert counts[0] == 0 and len(counts) == 5  # 1 to 4 of 9
    assert (counts[1:] - 1000).abs().max() < 120  # 4 standard deviations


def test_segment_leaves_its_input_and_hides_ratings():
    batch = jagged([6, 3], V)
    batch.events["rating"] = torch.arange(9.0)
    before = batch.values.clone()
    made = Segment()(batch, RNG, SIDE)
    assert torch.equal(batch.values, before) and not batch.events["rating"].isnan().any()
    assert torch.equal(made.events["rating"].isnan(), made.values == V)


def segments_oracle(query, run, ids, how, squash=False, real=None):
    losses = []
    real = [True] * len(ids) if real is None else real
    count = sum(real)
    for i in range(len(ids)):
        if not real[i]:
            continue
        if how == "batch":
            others = [j for j in range(len(ids)) if real[j] and (j == i or ids[j] != ids[i])]
            scores = torch.stack([query[i] @ run[j] for j in others])
            losses.append(scores.logsumexp(0) - query[i] @ run[i])
        elif ids[j := (i + 1) % count] != ids[i]:
            own, other = query[i] @ run[i], query[i] @ run[j]
            if squash:
                own, other = own.sigmoid(), other.sigmoid()
            losses.append(-torch.log(torch.sigmoid(own - other)))
    return torch.stack(losses).mean(), len(losses)


@pytest.mark.parametrize(
    "how, squash", [("batch", False), ("next", False), ("next", True)], ids=str
)
@pytest.mark.parametrize("padded", [False, True])
def test_segments_against_a_pair_at_a_time(how, squash, padded):
    g = torch.Generator().manual_seed(0)
    query, run = (torch.randn(7, 8, generator=g, dtype=torch.float64) for _ in range(2))
    query.requires_grad_(), run.requires_grad_()
    ids = torch.tensor([4, 4, 1, 2, 3, 9, 0])
    real = torch.tensor([True] * 5 + [False] * 2) if padded else None
    part = SegmentPrediction(Segments(["a", "b"], negatives=how, squash=squash), 8)
    loss, count = part.loss(query, run, ids, real)
    expected, number = segments_oracle(query, run, ids.tolist(), how, squash, real)
    assert int(count) == number
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    for found, wanted in zip(
        torch.autograd.grad(loss, [query, run]),
        torch.autograd.grad(expected, [query, run]),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_a_user_alone_has_no_next():
    part = SegmentPrediction(Segments(["a", "b"], negatives="next"), 8)
    loss, count = part.loss(
        torch.ones(1, 8, requires_grad=True), torch.ones(1, 8), torch.tensor([3])
    )
    assert loss.item() == 0 and count == 0 and loss.requires_grad


# Attributes of items


def encoded(model, values, targets):
    batch = from_sequences([values])
    batch.events["target"] = torch.tensor(targets)
    return Encoded(batch.with_scored(), torch.randn(len(values), 8, generator=_generator()))


def _generator():
    return torch.Generator().manual_seed(1)


def attribute_loss(part, name, state, item):
    query = part.maps[name](state)
    lists, total = LISTS.offsets.tolist(), 0.0
    for a in range(LISTS.classes):
        hot = a in LISTS.values[lists[item] : lists[item + 1]].tolist()
        p = torch.sigmoid(query @ part.table.weight[a])
        total = total - torch.log(p if hot else 1 - p)
    return total


def test_item_attributes_against_an_event_at_a_time():
    """Item 2 has no attributes; [MASK] is 4; event 5 predicts the item that it holds."""
    part = ItemAttributePrediction(ItemAttributes(masked=1.5, unmasked=0.3), LISTS, 8)
    torch.nn.init.normal_(part.table.weight), torch.nn.init.normal_(part.maps["masked"].weight)
    model = model_of(num_items=4)
    values, targets = [0, 4, 3, 2, 4, 3, 1], [-100, 1, -100, -100, 2, 3, -100]
    view = encoded(model, values, targets)
    losses = part(model, RNG, view)
    masked = [(1, 1), (5, 3)]  # (event, item)
    unmasked = [(0, 0), (2, 3), (6, 1)]
    for name, weight, pairs in (("masked", 1.5, masked), ("unmasked", 0.3, unmasked)):
        loss, count = losses[name]
        wanted = sum(attribute_loss(part, name, view.states[t], v) for t, v in pairs) / len(pairs)
        assert int(count) == len(pairs)
        torch.testing.assert_close(loss, weight * wanted)


def test_events_of_no_attributes_are_a_live_zero():
    part = ItemAttributePrediction(ItemAttributes(), LISTS, 8)
    view = encoded(model_of(num_items=4), [2, 4], [-100, 2])
    for loss, count in part(model_of(num_items=4), RNG, view).values():
        assert loss.item() == 0 and count == 0 and loss.requires_grad


def test_a_weight_of_0_leaves_a_task_and_its_parameters_out():
    part = ItemAttributePrediction(ItemAttributes(masked=0), LISTS, 8)
    view = encoded(model_of(num_items=4), [0, 1], [-100, -100])
    assert [*part(model_of(num_items=4), RNG, view)] == ["unmasked"] and len(part.maps) == 1


def test_category_lists_of_columns(tmp_path):
    """Lists of all columns, numbered one after the other, against the frame."""
    dataset = SequenceDataset.load(synthetic(tmp_path / "data"))
    found = category_lists(dataset, ["attributes", "category"])
    frame = dataset.item_attributes()
    tags = sorted({tag for row in frame["attributes"].to_list() for tag in row or []})
    kinds = sorted({kind for kind in frame["category"] if kind is not None})
    assert found.classes == len(tags) + len(kinds)
    offsets = found.offsets.tolist()
    assert len(offsets) == dataset.num_items + 1
    for v, (row, kind) in enumerate(frame.select("attributes", "category").iter_rows()):
        wanted = sorted({tags.index(tag) for tag in row or []})
        wanted += [] if kind is None else [len(tags) + kinds.index(kind)]
        assert found.values[offsets[v] : offsets[v + 1]].tolist() == wanted


def test_lists_are_of_all_their_categories():
    class Frame:
        path = SIDE.dataset.path

        def item_attributes(self):
            return pl.DataFrame({"item": range(3), "tags": [[5, 1, 5], None, [9, 1, 7, 5]]})

    found = category_lists(Frame(), ["tags"])
    assert found.values.tolist() == [0, 1, 0, 1, 2, 3] and found.offsets.tolist() == [0, 2, 2, 6]


# The target above drawn items


@pytest.mark.parametrize("squash", [False, True])
def test_bpr_against_a_pair_at_a_time(squash):
    g = torch.Generator().manual_seed(0)
    query = torch.randn(5, 6, generator=g, dtype=torch.float64, requires_grad=True)
    table = torch.randn(9, 6, generator=g, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, -100, 8, 3])
    negatives = torch.tensor([[1, 2], [3, 4], [5, 6], [0, 0], [3, 3]])
    losses = []
    for i, y in enumerate(target.tolist()):
        for j in negatives[i].tolist():
            if y in (-100, j):
                continue
            own, other = (query[i] @ table[v] + bias[v] for v in (y, j))
            if squash:
                own, other = own.sigmoid(), other.sigmoid()
            losses.append(-torch.log(torch.sigmoid(own - other)))
    expected = torch.stack(losses).mean()
    loss, count = bpr(query, table, bias, target, negatives, squash)
    assert int(count) == len(losses)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    for found, wanted in zip(
        torch.autograd.grad(loss, [query, table, bias]),
        torch.autograd.grad(expected, [query, table, bias]),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_item_maps_the_states_of_its_own_task():
    model, side = model_of(dropout=0.0, head_transform=False), Known(six_users())
    part = Item(loss="bpr", project=True, sampled=Sampled(3)).build(model, side)
    (view,) = model.encode_views(
        loader_of(model, {"main": [MaskLast(), Mask()]}, side).batch_at(0)
    ).values()
    loss, _ = part(model, RNG, view)["item"]
    states, rows = view.states[view.batch.scored], view.batch.scored
    keys = view.batch.keys[view.batch.segment_ids()[rows]]
    drawn = part.sampler.own(3, RNG, keys, view.batch.positions()[rows])
    expected, _ = bpr(
        F.linear(states, part.linear.weight, part.linear.bias),
        model.item_table, model.item_head.bias, view.batch.events["target"][rows], drawn,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    assert sum(p.numel() for p in part.parameters()) == 8 * 8 + 8


# Keys without an effect, and wrong ones


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Segment(share=0), r"segment.share must be in \(0, 1\]"),
        (lambda: Segments(["a"]), "compares two views"),
        (lambda: Segments(["a", "b"], squash=True), "squash has no effect"),
        (lambda: ItemAttributes(masked=0, unmasked=0), "nothing is trained"),
        (lambda: ItemAttributes(unmasked=-1), "unmasked must be at least 0"),
        (lambda: ItemAttributes(columns=[]), "names no column"),
        (lambda: Item(loss="bpr"), "bpr needs negatives"),
        (lambda: Item(loss="bpr", sampled=Sampled(1, shared=True)), "negatives of each target"),
        (lambda: Item(squash=True), "squash has no effect on the loss softmax"),
    ],
)
def test_settings_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_views_without_what_attributes_read():
    part = ItemAttributePrediction(ItemAttributes(), LISTS, 8)
    model, batch = model_of(num_items=4), from_sequences([[0, 1]])
    with pytest.raises(ValueError, match="has no targets"):
        part(model, RNG, Encoded(batch, torch.zeros(2, 8)))
    batch.events["target"] = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="one target an event"):
        part(model, RNG, Encoded(batch, torch.zeros(2, 8)))


def test_vectors_of_other_attributes_are_not_taken_over(tmp_path):
    model, side = model_of(num_items=4), SideData(six_users())

    def joint(labels):
        lists = LISTS._replace(digests={"genre": labels})
        part = ItemAttributePrediction(ItemAttributes(), lists, 8)
        return JointObjective({"a": part}, model, side)

    save_heads(joint("one"), tmp_path)
    assert load_heads(joint("one"), tmp_path, only=["a"])
    for only in (None, ["a"]):
        with pytest.raises(ValueError, match="trained to predict .*'one'.*here .*'two'"):
            load_heads(joint("two"), tmp_path, only=only)


def test_a_digest_is_of_the_categories_in_their_order(tmp_path):
    digests = []
    for number, genres in enumerate((["a", "b"], ["b", "a"], ["a", "c"])):
        (tmp_path / f"{number}.csv").write_text("user_id,item_id\n1,x\n1,y\n")
        rows = "".join(f"{i},{g}\n" for i, g in zip("xy", genres, strict=True))
        (tmp_path / "items.csv").write_text(f"item_id,genre\n{rows}")
        source, data = tmp_path / f"{number}.csv", tmp_path / f"data{number}"
        prepare(source, data, item_attributes=tmp_path / "items.csv", ordered=True)
        dataset = SequenceDataset.load(data)
        digests.append(category_lists(dataset, ["genre"]).digests["genre"])
    assert digests[0] == digests[1] != digests[2]


# Bidirectional, then causal


def small(name: str, **changes) -> Recipe:
    stages = {"steps": 4, "validate_every": 4, "batch_size": 100}
    return Recipe.load(
        name,
        model={"width": 8, "max_len": 8},
        pretraining=stages,
        recommendation={**stages, **changes.pop("recommendation", {})},
        evaluation={"candidates": "sampled", "negatives": 20},
        **changes,
    )


def test_a_causal_stage_goes_on_from_a_bidirectional_model(tmp_path):
    dataset = SequenceDataset.load(synthetic(tmp_path / "data"))
    recipe = small("s3rec")
    first = fit(dataset, recipe=recipe, output=tmp_path / "first", progress=False)
    assert not first.config.causal
    folder = tmp_path / "second"
    second = fit(
        dataset, first, recipe=recipe, stage="recommendation", output=folder, progress=False,
        learning_rate=0.0,
    )  # fmt: skip
    assert second.config.causal and not first.config.causal
    assert settings_of(second.config.encoder).heads == settings_of(first.config.encoder).heads
    for name, tensor in first.state_dict().items():  # the same weights at a rate of 0
        assert torch.equal(tensor, second.state_dict()[name]), name
    loaded = type(first).from_pretrained(folder / "model")
    assert loaded.config == second.config
    # From there the stage goes on, with the model as it is.
    third = fit(dataset, loaded, recipe=recipe, stage="recommendation", progress=False)
    assert third.config == second.config
    # And without a model to start from it is causal too.
    alone = fit(dataset, recipe=recipe, stage="recommendation", progress=False)
    assert alone.config.causal


def test_causal_is_of_encoders_that_can_be_either():
    recipe = Recipe.load("gru4rec", pretraining={"init": {"causal": True}})
    with pytest.raises(ValueError, match="init.causal: Gru"):
        fit(six_users(), recipe=recipe, progress=False)


def test_next_items_of_a_bidirectional_stage_are_still_an_error():
    with pytest.raises(ValueError, match="next_item needs a causal encoder"):
        small("s3rec", recommendation={"init": {"causal": False}})
