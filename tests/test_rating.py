# SPDX-License-Identifier: Apache-2.0
"""Rating prediction: the step `mask_rating`, the objective and the judge `rating`, against one
event at a time; from a file to errors that are printed."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import dataset_of, lists_of, model_of, tensors_of
from test_data_prepare import shared

import fastrec
from benchmarks import encoders
from benchmarks.padded import PaddedRating
from fastrec.cli import main
from fastrec.data.dataset import SequenceDataset
from fastrec.data.prepare import prepare
from fastrec.data.side import SideData
from fastrec.data.steps.mask import Mask
from fastrec.data.steps.mask_rating import TARGET, MaskRating
from fastrec.data.steps.share import Schedule
from fastrec.evaluation.rating import RatingJudge
from fastrec.nn.encoders.bag import Bag
from fastrec.nn.item_parts import Rating as Levels
from fastrec.nn.items import Items
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.model_files import write_digests
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective
from fastrec.objectives.parts import Objectives
from fastrec.objectives.rating import Rating
from fastrec.random import Rng, draws, threshold
from fastrec.training.config import Recipe
from fastrec.training.model_folder import load_heads, save_heads
from fastrec.training.stage import Stage
from fastrec.training.sweep import sweep

V = 20
LENGTHS = (5, 9, 6, 7, 12, 3)


def rated(lengths=LENGTHS, missing: float = 0.2, seed: int = 0) -> SequenceDataset:
    """A data set in memory with ratings 1 to 5, some missing; of user 2 all."""
    generator = np.random.default_rng(seed)
    dataset = dataset_of([generator.integers(V, size=n).tolist() for n in lengths], V)
    ratings = generator.integers(1, 6, size=sum(lengths)).astype(np.float32)
    ratings[generator.random(len(ratings)) < missing] = np.nan
    if missing and len(lengths) > 2:
        ratings[dataset.offsets[2] : dataset.offsets[3]] = np.nan
    dataset._event_columns["rating"] = ratings
    return dataset


def rating_model(**config) -> UserModel:
    settings = {"dropout": 0.0, "items": Items(rating=Levels(width=4)), **config}
    return model_of(num_items=V, **settings)


def batch_of(dataset, users=(0, 1, 2, 3, 4, 5), view: int = 0):
    batch = dataset.gather(list(users), "all", columns=["rating"])
    return replace(batch, keys=batch.keys | view << 32)


# The step


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


def test_special_tokens_have_no_target():
    dataset = rated()
    made = MaskRating(1.0)(batch_of(dataset), Rng(0, 0), SideData(dataset))
    framed = rating_model(tokens=["cls", "sep"], max_len=12).frame(made)
    assert framed.events[TARGET][framed.values >= V].isnan().all()
    known = framed.events[TARGET][framed.values < V]
    assert torch.equal(known.nan_to_num(-1), made.events[TARGET].nan_to_num(-1))


# The objective


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


# The line of the biases below the states


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
    torch.nn.init.zeros_(objective.parts["rating"].linear.weight)
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


# The judge


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


# Bad input


def stage(**changes) -> Stage:
    settings = {
        "views": {"main": [MaskRating()]},
        "objectives": Objectives(rating=Rating()),
        "judge": "rating",
        **changes,
    }
    return Stage(**settings)


def test_what_means_nothing_is_refused():
    with pytest.raises(ValueError, match=r"mask_rating.share must be in \(0, 1\], got 0"):
        MaskRating(0.0)
    with pytest.raises(ValueError, match="by must be one of"):
        Rating(by="user")
    for shrinkage in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="rating.biases must be above 0, got"):
            Rating(biases=shrinkage)
    with pytest.raises(ValueError, match="monitor RMSE: the largest would be kept"):
        stage(monitor="RMSE")
    dataset = rated()
    with pytest.raises(ValueError, match="needs the event column 'rating'"):
        MaskRating()(dataset.gather([0], "all"), Rng(0, 0), SideData(dataset))
    with pytest.raises(ValueError, match="a model that reads ratings: set model.items.rating"):
        Rating().build(model_of(), SideData(dataset))
    hidden = {"main": [MaskRating(hide=False)]}
    with pytest.raises(ValueError, match="hide false needs the encoder bag"):
        Recipe(model=ModelConfig(items=Items(rating=Levels())), pretraining=stage(views=hidden))
    Recipe(model=ModelConfig(encoder=Bag()), pretraining=stage(views=hidden))
    side = SideData(dataset, event_columns=["rating"])
    objective = JointObjective({"rating": Rating()}, rating_model(), side)
    with pytest.raises(ValueError, match="a view without the step mask_rating"):
        objective(rating_model(), {"main": batch_of(dataset, [0])}, Rng(0, 0))
    other = JointObjective({"x": torch.nn.Identity()}, rating_model(), side)
    everyone = torch.arange(6)
    judge = RatingJudge(dataset, everyone, "test", everyone)
    with pytest.raises(ValueError, match="the judge rating needs the objective rating"):
        judge.score(rating_model(), other, slice(0, 6))


def test_a_sweep_does_not_rank_by_a_model_of_ratings(tmp_path):
    chosen = Recipe(model=ModelConfig(encoder=Bag()), pretraining=stage())
    with pytest.raises(ValueError, match="this recipe trains ratings alone"):
        sweep(chosen, tmp_path / "data", tmp_path / "out", "model.width", [8, 16])


def test_data_that_cannot_be_judged_is_named():
    dataset, everyone = rated(), torch.arange(6)
    with pytest.raises(ValueError, match="there is no user to evaluate in split 'test'"):
        RatingJudge(dataset, everyone[:0], "test", everyone)
    with pytest.raises(ValueError, match="no held-out event of split 'test' has a rating"):
        RatingJudge(dataset, everyone[2:3], "test", everyone)
    with pytest.raises(ValueError, match="no event of the 1 trained users has a rating"):
        _ = SideData(dataset, labelled=[2]).mean_rating
    full = rated(missing=0.0)
    wide = replace(full, splits=np.array([[1, 1]] * 6))
    wide._event_columns["rating"] = full.event_column("rating")
    judge = RatingJudge(wide, everyone, "test", everyone)
    side = SideData(wide, event_columns=["rating"])
    model = rating_model(max_len=10)
    objective = JointObjective({"rating": Rating()}, model, side)
    with pytest.raises(ValueError, match="a user has 11 held-out events, and model.max_len is 10"):
        judge.score(model, objective, slice(0, 6))


# From a file to errors


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """150 users, ratings by a taste of the item alone, and 50 who have too few to hold any out."""
    folder, generator = tmp_path_factory.mktemp("rated"), np.random.default_rng(0)
    lines = ["user_id,item_id,rating,timestamp"]
    for user in range(200):
        for time, item in enumerate(generator.permutation(30)[: 12 if user < 150 else 3]):
            rating = 1 + (item % 5 + generator.integers(2)) * 4 / 5
            lines.append(f"{user},{item},{rating:.2f},{time}")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    main(["prepare", f"--source={folder / 'log.csv'}", f"--output={folder / 'data'}",
          "--split=last", "--valid=1", "--test=3", "--time_unit=s"])  # fmt: skip
    return folder / "data"


SMALL = ["--model.width=16", "--pretraining.steps=120", "--pretraining.validate_every=40",
         "--pretraining.learning_rate=0.01", "--pretraining.batch_size=64"]  # fmt: skip


@pytest.mark.parametrize("name", ["bert4rec-rating", "dacf"])
def test_from_a_file_to_errors(data, tmp_path, name, capsys):
    flags = [f"--config={name}", *SMALL, f"--data={data}"]
    if name == "bert4rec-rating":
        flags += ["--pretraining.warmup_steps=0", "--model.encoder.transformer.layers=1"]
    main(["pretrain", *flags, f"--output={tmp_path / 'run'}"])
    folder, file = tmp_path / "run" / "model", tmp_path / "metrics.json"
    main(["evaluate", f"--data={data}", f"--pretrained={folder}", f"--output={file}"])
    found = json.loads(file.read_text())
    assert (found["users"], found["ratings"]) == (150, 450)
    # On validation it counts the ratings that the run counted, those of short users too.
    valid = tmp_path / "valid.json"
    main(["evaluate", f"--data={data}", f"--pretrained={folder}", f"--output={valid}",
          "--split=valid"])  # fmt: skip
    known = json.loads((tmp_path / "run" / "summary.json").read_text())["valid"]
    assert json.loads(valid.read_text())["metrics"]["model"] == pytest.approx(known, rel=1e-6)
    metrics = found["metrics"]
    assert metrics["model"]["RMSE"] < metrics["constant"]["RMSE"]
    again = UserModel.from_pretrained(folder)
    assert again.config.event_columns == ["rating"]
    capsys.readouterr()
    with pytest.raises((SystemExit, ValueError)) as error:
        main(["recommend", f"--data={data}", f"--pretrained={folder}",
              f"--output={tmp_path / 'best.csv'}"])  # fmt: skip
    assert "trained for rating" in str(error.value) + capsys.readouterr().err
    for ask in (fastrec.evaluate, fastrec.item_vectors):
        with pytest.raises(ValueError, match="trained for rating"):
            ask(again, SequenceDataset.load(data))


def test_the_default_device_changes_nothing():
    dataset, everyone = rated(), torch.arange(6, device="cpu")
    model, side = rating_model(), SideData(dataset, event_columns=["rating"])
    objective = JointObjective({"rating": Rating()}, model, side)
    torch.nn.init.normal_(objective.parts["rating"].linear.weight)

    def found():
        made = MaskRating()(batch_of(dataset, [0, 1]), Rng(0, 0), SideData(dataset))
        (term,) = objective(model, {"main": model.frame(made)}, Rng(0, 0))
        judge = RatingJudge(dataset, everyone, "test", everyone)
        scores = judge.score(model, objective, slice(0, 6))
        return term.loss, scores, judge.biases, SideData(dataset).mean_rating

    expected = found()
    torch.set_default_device("meta")
    try:
        actual = found()
    finally:
        torch.set_default_device(None)
    for one, other in zip(actual[:3], expected[:3], strict=True):
        assert torch.equal(one, other)
    assert actual[3] == expected[3]


def test_the_benchmark_runs(data, monkeypatch, capsys):
    options = ["rating", "--data", str(data), "--length", "12", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["encoders.py", *options])
    encoders.main()
    assert "nn.TransformerEncoder, padded" in capsys.readouterr().out


def test_the_padded_peer_of_the_benchmark_has_the_same_loss():
    dataset, model = rated(), rating_model(max_len=12)
    side = SideData(dataset, event_columns=["rating"])
    objective = JointObjective({"rating": Rating()}, model, side)
    head = objective.parts["rating"]
    torch.nn.init.normal_(head.linear.weight)
    view = model.frame(MaskRating()(batch_of(dataset), Rng(0, 0), side))
    peer = PaddedRating(model, head, view, 0.0)
    expected = objective(model, {"main": view}, Rng(0, 0))[0].loss
    torch.testing.assert_close(peer(), expected, rtol=1e-4, atol=1e-5)
