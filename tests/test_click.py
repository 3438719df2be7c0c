# SPDX-License-Identifier: Apache-2.0
"""Click prediction: labels of events, the loss, the judge and its metrics, a whole run."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import dataset_of, jagged, lists_of, model_of, synthetic

from fastrec.cli import main
from fastrec.data.batch import from_sequences
from fastrec.data.negatives import NegativeSampler
from fastrec.data.side import SideData
from fastrec.data.steps.click import Click as Labelled
from fastrec.data.steps.cut import Cut
from fastrec.data.steps.mask import MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.permute import Permute
from fastrec.data.steps.substitute import Substitute
from fastrec.evaluation.click import ClickJudge
from fastrec.evaluation.metrics import auc
from fastrec.evaluation.protocol import Protocol
from fastrec.nn.item_parts import Rating as Levels
from fastrec.nn.items import Items
from fastrec.objectives.click import Click, contents
from fastrec.objectives.joint import JointObjective
from fastrec.random import Rng
from fastrec.training.stage import Stage

NONE = math.nan
V = 20
RATINGS = [[5.0, 1.0, NONE, 4.0], [2.0], [4.5, 3.5, 4.0], [1.0, 5.0]]
ITEMS = [[1, 2, 3, 4], [5], [6, 7, 8], [9, 9]]
SEQUENCES = [[3, 1, 4, 1, 5], [9, 2, 6, 5], [3, 5, 8, 9, 7, 9], [3, 2, 3]]


def rated(sequences, ratings):
    batch = from_sequences(sequences)
    column = torch.tensor([each for row in ratings for each in row])
    return replace(batch, events={"rating": column})


def data_of(sequences=SEQUENCES, ratings=None):
    dataset = dataset_of(sequences, V)
    generator = np.random.default_rng(1)
    if ratings is None:
        ratings = generator.integers(1, 6, dataset.num_events).astype(np.float32)
    dataset._event_columns["rating"] = np.asarray(ratings, dtype=np.float32)
    return dataset


SIDE = SideData(data_of())


def test_a_label_is_that_of_the_item_that_is_predicted():
    batch = Labelled(4)(rated(ITEMS, RATINGS), Rng(0, 0), SIDE)
    assert lists_of(batch, batch.events["click"]) == [[1, 0, -1, 1], [0], [1, 0, 1], [0, 1]]
    after = NextItem()(batch, Rng(0, 0), SIDE)
    assert lists_of(after, after.events["click"]) == [[0, -1, 1], [], [0, 1], [1]]
    ahead = NextItem(ahead=2)(batch, Rng(0, 0), SIDE)
    assert lists_of(ahead, ahead.events["click"])[0] == [[0, -1], [-1, 1], [1, -1]]
    last = NextItem(positions="last")(batch, Rng(0, 0), SIDE)
    assert lists_of(last, last.events["click"]) == [[-1, -1, 1], [], [-1, 1], [1]]
    masked = MaskLast()(batch, Rng(0, 0), SIDE)
    assert lists_of(masked, masked.events["click"]) == lists_of(batch, batch.events["click"])
    assert lists_of(masked, masked.events["rating"])[1] == pytest.approx([NONE], nan_ok=True)
    moved = Permute()(batch, Rng(0, 0), SIDE)
    known = dict(zip(batch.values.tolist()[:8], batch.events["click"].tolist()[:8], strict=True))
    for target, label in zip(moved.events["target"], moved.events["click"], strict=True):
        assert int(target) in (9, -100) or known[int(target)] == int(label)
    assert "click" not in rated(ITEMS, RATINGS).events, "a step leaves its input"


def test_of_another_item_nothing_is_known():
    side = SideData(data_of())
    side.similar_items = torch.arange(V).roll(1)
    batch = Labelled(4)(rated(ITEMS, RATINGS), Rng(0, 0), side)
    made = Substitute(0.5)(batch, Rng(0, 0), side)
    changed = made.values != batch.values
    assert changed.any() and not changed.all()
    assert (made.events["click"][changed] == -1).all()
    assert torch.equal(made.events["click"][~changed], batch.events["click"][~changed])


def system(given: bool, negatives: int, **config):
    """(model, encoded view, module, its objective)."""
    causal = config.get("causal", True)
    model = model_of(num_items=V, **config)
    side = SideData(data_of(), event_columns=["rating"])
    settings = Click(negatives=negatives, hidden=[5, 4])
    objective = JointObjective({"click": settings}, model, side)
    torch.manual_seed(4)
    for parameter in [*objective.parameters(), *model.parameters()]:
        torch.nn.init.normal_(parameter, std=0.5)
    steps = [Labelled(4)] if given else []
    steps += [NextItem() if causal else MaskLast()]
    batch = side.gather([0, 1, 2, 3])
    for step in steps:
        batch = step(batch, Rng(3, 7), side)
    view = model.encode(model.frame(batch).with_scored())
    return model, view, objective.parts["click"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("given", "negatives"), [(True, 0), (True, 3), (False, 3), (False, 40)])
def test_loss_is_that_of_one_network_of_user_and_item(given, negatives, causal):
    """A slow pass over events: MLP of [u; v], and -log of what it gives the label."""
    items = Items(rating=Levels(width=4)) if not causal else Items()
    model, view, module = system(given, negatives, causal=causal, items=items)
    rng, batch = Rng(3, 7), view.batch
    first = torch.cat([module.user.weight, module.item.weight], 1)

    def score(u, item):
        v = contents(model, torch.tensor([item]))[0]
        hidden = torch.relu(first @ torch.cat([u, v]) + module.user.bias)
        hidden = torch.relu(module.rest[0](hidden))
        return module.rest[1](hidden)[0]

    total, count = 0.0, 0
    sampler = NegativeSampler.uniform(V)
    owner, place = batch.segment_ids(), batch.positions()
    for event in range(len(batch.values)):
        target = int(batch.events["target"][event])
        if target < 0:
            continue
        pairs = [(target, int(batch.events["click"][event]) if given else 1)]
        if negatives:
            key, at = batch.keys[owner[event]][None], place[event][None]
            drawn = sampler.own(negatives, rng, key, at, site="negatives_click")[0].tolist()
            pairs += [(item, 0) for item in drawn if item != target]
        for item, label in pairs:
            if label >= 0:
                p = torch.sigmoid(score(view.states[event], item).double())
                total, count = total - (p if label else 1 - p).log().item(), count + 1
    (loss, number) = module(model, rng, view)["click"]
    known = int((batch.events["target"] >= 0).sum())
    assert negatives < 40 or count < known * 41, "a target is drawn: it is no negative"
    assert int(number) == count and loss.item() == pytest.approx(total / count, rel=1e-5)
    loss.backward()
    assert model.item_embedding.weight.grad.any() and module.item.weight.grad.any()


def test_content_is_what_the_encoder_reads_of_an_item():
    """Attributes and all; of ratings that of an event without one."""
    model = model_of(num_items=V, items=Items(rating=Levels(width=4)))
    torch.nn.init.normal_(model.item_input.join.weight)
    items = torch.tensor([3, 0, 3])
    batch = rated([[3], [0], [3]], [[NONE], [NONE], [NONE]])
    assert torch.equal(contents(model, items), model.item_input(batch).dense())


def test_what_cannot_be_trained_is_named():
    model, view, module = system(True, 0)
    plain = replace(view.batch, events={"target": view.batch.events["target"]})
    with pytest.raises(ValueError, match="the objective click needs negatives, or the step click"):
        module(model, Rng(0, 0), replace(view, batch=plain))
    batch = Cut(2)(Labelled(4)(rated(SEQUENCES, [[1.0] * len(s) for s in SEQUENCES]), None, SIDE),
                   Rng(0, 0), SIDE)  # fmt: skip
    view = model.encode(model.frame(batch).with_scored())
    with pytest.raises(ValueError, match="the labels of the step click are lost"):
        module(model, Rng(0, 0), view)
    with pytest.raises(ValueError, match="needs the event column 'rating'"):
        Labelled()(jagged([3]), Rng(0, 0), SIDE)
    for make, message in (
        (lambda: Labelled(NONE), "click.least must be finite"),
        (lambda: Click(negatives=-1), "click.negatives must not be negative"),
        (lambda: Click(negatives=0, by="popularity"), "click.by has no effect"),
        (lambda: Click(hidden=[]), "click.hidden must be widths"),
        (lambda: Stage(judge="click"), "the judge click needs the objective click"),
        (lambda: Stage(views={"main": [Labelled()]}), "view 'main'|the step click has no effect"),
        (lambda: Stage(views={"a": [Labelled(3)], "b": [Labelled(4)]},
                       objectives={"c": Click(["a", "b"])}), "clicks from other ratings on"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_order(seed):
    generator = np.random.default_rng(seed)
    scores = torch.tensor(generator.integers(0, 5, 40) / 7)
    labels, owner = (torch.tensor(generator.integers(0, n, 40)) for n in (2, 6))

    def slow(rows):
        pairs = [(a, b) for a in rows for b in rows if labels[a] and not labels[b]]
        wins = [
            float(scores[a] > scores[b]) + 0.5 * float(scores[a] == scores[b]) for a, b in pairs
        ]
        return [sum(wins) / len(pairs)] if pairs else []

    assert auc(scores, labels).tolist() == pytest.approx(slow(range(40)))
    expected = [x for u in range(6) for x in slow([i for i in range(40) if owner[i] == u])]
    assert auc(scores, labels, owner).tolist() == pytest.approx(expected)
    assert auc(scores, torch.ones(40, dtype=torch.int64)).tolist() == []


def test_held_out_events_with_labels_are_asked_of_the_history_before_them():
    ratings = [5, 1, 2, NONE, 4, 3, 4, 2, 5, 1, 1, 1, 1, 4, 5, 2, 2, 1]
    dataset = data_of(ratings=ratings)
    dataset = replace(dataset, splits=np.array([[2, 3], [2, 3], [2, 3], [2, 2]]))
    dataset._event_columns["rating"] = np.array(ratings, dtype=np.float32)
    users = torch.tensor([0, 1, 2])
    judge = ClickJudge(dataset, users, "test", Protocol(), 4.0, users)
    assert judge.items.tolist() == [5, 5, 9, 7, 9]
    assert judge.owner.tolist() == [0, 1, 2, 2, 2] and judge.labels.tolist() == [1, 1, 0, 1, 1]
    model, _, module = system(True, 0)
    objective = JointObjective({"click": Click(negatives=0, hidden=[5, 4])}, model, SIDE)
    objective.parts["click"].load_state_dict(module.state_dict())
    found = torch.cat([judge.score(model, objective, rows) for rows in (slice(0, 2), slice(2, 3))])
    for pair, (item, owner) in enumerate(zip(judge.items, judge.owner, strict=True)):
        history = dataset.gather(users[owner][None], "test").values.tolist()
        state = model.encode(model.inputs_of([history], ask=True)).states[-1]
        score = module.score(state, contents(model, item[None])[0])
        assert found[pair].item() == pytest.approx(score.item(), rel=1e-5)
    metrics = judge.metrics(found)
    assert list(metrics) == judge.metric_names == ["AUC", "user AUC", "log loss"]
    p = torch.sigmoid(found)
    right = torch.where(judge.labels == 1, p, 1 - p).log().mean()
    assert metrics["log loss"] == pytest.approx(-right.item())
    # Of the training events of these users, the first two, item 9 is one.
    trained = [r for u, n in ((0, 2), (1, 2), (2, 2)) for r in ratings[[0, 5, 9][u] :][:n]]
    mean = np.mean([r >= 4 for r in trained if not math.isnan(r)])
    theirs = [False]  # user 1, the first event
    rate = (sum(theirs) + 5 * mean) / (len(theirs) + 5)
    assert torch.sigmoid(judge.baseline[2]).item() == pytest.approx(rate)
    with pytest.raises(ValueError, match="candidates: sampled has no effect: the step click"):
        ClickJudge(dataset, users, "test", Protocol(candidates="sampled"), 4.0, users)
    with pytest.raises(ValueError, match="no held-out event of split 'test' differs in whether"):
        ClickJudge(dataset, users, "test", Protocol(), 0.0, users)
    with pytest.raises(ValueError, match="there is no user to evaluate"):
        ClickJudge(dataset, users[:0], "test", Protocol(), 4.0, users)


def test_without_labels_drawn_items_are_no_clicks():
    dataset, users = data_of(), torch.tensor([2, 0, 1])
    how = Protocol(candidates="sampled", negatives=3, negatives_by="uniform")
    judge = ClickJudge(dataset, users, "test", how, None, users)
    assert judge.owner.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert judge.labels.tolist() == [1, 0, 0, 0] * 3
    assert judge.items[::4].tolist() == [9, 5, 5]
    for owner, user in enumerate(users.tolist()):
        drawn = judge.items[judge.owner == owner][1:].tolist()
        assert len(set(drawn)) == 3 and not set(drawn) & set(SEQUENCES[user])
    assert judge.metric_names == ["AUC", "user AUC"]
    assert judge.baseline.tolist() == dataset.item_counts("train")[judge.items].tolist()
    with pytest.raises(ValueError, match="the judge click has nothing that is no click"):
        ClickJudge(dataset, users, "test", Protocol(), None, users)


def test_from_the_command_line(tmp_path, capsys):
    """Pre-training, clicks with drawn negatives, and clicks by rating; a model learns."""
    data = synthetic(tmp_path, num_users=300, num_items=100)
    flags = [f"--data={data}", "--config=bert4sessrec", "--model.width=16", "--model.max_len=12",
             "--evaluation.negatives=20", "--model.dropout=0.1"]  # fmt: skip
    first, run = tmp_path / "first", tmp_path / "run"
    main(["pretrain", *flags, f"--output={first}", "--pretraining.steps=2"])
    task = ["--task=click", "--click.steps=60", "--click.validate_every=30",
            "--click.learning_rate=0.02", "--click.batch_size=100"]  # fmt: skip
    main(["finetune", *flags, *task, f"--init={first / 'model'}", f"--output={run}"])
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["valid"]) == {"AUC", "user AUC"}
    main(["evaluate", f"--data={data}", f"--pretrained={run / 'model'}",
          f"--output={tmp_path / 'found.json'}"])  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["pairs"] == 21 * found["clicks"] == 21 * found["users"]
    assert found["metrics"]["model"]["AUC"] > 0.55  # by 3 standard errors
    said = "items of 300 users, split test, 300 clicks (held out, the others drawn)"
    assert said in capsys.readouterr().out
    given = ["--evaluation.candidates=full", "--evaluation.negatives=null",
             "--evaluation.negatives_by=null", "--click.objectives.click.negatives=0",
             "--click.views.main=[click: {least: 4}, mask_last: {}]"]  # fmt: skip
    start = f"--init={first / 'model'}"
    main(["finetune", *flags, *task, *given, start, f"--output={tmp_path / 'given'}"])
    main(["evaluate", f"--data={data}", f"--pretrained={tmp_path / 'given' / 'model'}",
          f"--output={tmp_path / 'given.json'}"])  # fmt: skip
    found = json.loads((tmp_path / "given.json").read_text())
    assert 0 < found["clicks"] < found["pairs"] == found["users"] == 300
    assert {*found["metrics"]["model"]} == {"AUC", "user AUC", "log loss"}
    assert "clicks (rated from 4 on)" in capsys.readouterr().out
