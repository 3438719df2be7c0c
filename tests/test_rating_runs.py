# SPDX-License-Identifier: Apache-2.0
"""Runs that predict ratings: from a file to errors, what is refused, the benchmark."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import model_of
from rated import batch_of, rated, rating_model

import fastrec
from benchmarks import encoders
from benchmarks.padded import PaddedRating
from fastrec.cli import main
from fastrec.data.dataset import SequenceDataset
from fastrec.data.side import SideData
from fastrec.data.steps.mask_rating import MaskRating
from fastrec.evaluation.rating import RatingJudge
from fastrec.nn.encoders.bag import Bag
from fastrec.nn.item_parts import Rating as Levels
from fastrec.nn.items import Items
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective
from fastrec.objectives.parts import Objectives
from fastrec.objectives.rating import Rating
from fastrec.random import Rng
from fastrec.training.config import Recipe
from fastrec.training.heads_file import load_heads, save_heads
from fastrec.training.stage import Stage
from fastrec.training.sweep import sweep


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


def test_vectors_of_items_belong_to_their_items(tmp_path):
    """DACF has one for each item beside the model: of others, or in another order, they would be
    somebody else's."""
    dataset, model = rated(), rating_model()
    other = replace(dataset)
    other.__dict__["items_hash"] = "the same in another order"
    one, two = (
        JointObjective({"rating": Rating(by="item")}, model, SideData(each))
        for each in (dataset, other)
    )
    save_heads(one, tmp_path)
    assert load_heads(one, tmp_path) == ["rating.items.weight"]
    for only in (None, ["rating"]):
        with pytest.raises(ValueError, match="it was trained to predict .* another order"):
            load_heads(two, tmp_path, only)


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
