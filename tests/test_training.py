# SPDX-License-Identifier: Apache-2.0
"""The user's path: a killed run resumes to the same bits, broken checkpoints are named."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import polars
import pytest
import torch
from builders import (
    FLAGS,
    MODEL,
    assert_same_weights,
    command,
    loader_of,
    recipe,
    run,
    synthetic,
    trained_weights,
)
from safetensors.torch import load_file

from fastrec.data.dataset import SequenceDataset
from fastrec.data.prepare import prepare
from fastrec.data.prepare.readers import RawData
from fastrec.data.side import SideData
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.views import Again
from fastrec.evaluation.attributes import AttributesJudge
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.objectives.friends import Friends
from fastrec.objectives.item import Item, Sampled
from fastrec.objectives.parts import Objectives
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.random import Rng
from fastrec.training.config import Recipe, Users
from fastrec.training.fit import fit
from fastrec.training.stage import Init, Stage
from fastrec.training.stage_data import held_out_users, select_users, stage_data

UPREC = Objectives(
    item=Item(), user_attributes=UserAttributes(weight=0.3), friends=Friends(weight=0.5)
)
UPREC_VIEWS = {"main": [Friend(), Mask()]}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return synthetic(tmp_path_factory.mktemp("synthetic"))


@pytest.mark.slow
def test_sigkill_in_pretraining_and_resume_ends_with_the_same_bits(data, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(
        command("pretrain", "--data", data, "--output", whole, *FLAGS),
        check=True, env=environment, capture_output=True, timeout=900,
    )  # fmt: skip
    process = subprocess.Popen(
        command("pretrain", "--data", data, "--output", killed, *FLAGS),
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not (killed / "last.ckpt").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.5)  # somewhere between two checkpoints
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    reached = trained_weights(killed)["step"]
    assert 0 < reached < 300
    subprocess.run(
        command("pretrain", "--data", data, "--output", killed, "--resume=true", *FLAGS),
        check=True, env=environment, capture_output=True, timeout=900,
    )  # fmt: skip
    assert trained_weights(killed)["step"] == 300
    assert_same_weights(whole, killed)


def test_training_is_reproducible_and_the_seed_matters(data, tmp_path):
    first, second = run(data, tmp_path / "a"), run(data, tmp_path / "b")
    other = run(data, tmp_path / "c", replace(recipe(), seed=1))
    assert torch.equal(first.item_table, second.item_table)
    assert not torch.equal(first.item_table, other.item_table)


def test_all_three_losses_of_the_joint_training_fall(data, tmp_path):
    chosen = recipe(
        views=UPREC_VIEWS, objectives=UPREC, steps=80, validate_every=80, batch_size=400,
        learning_rate=5e-3,
    )  # fmt: skip
    run(data, tmp_path / "joint", chosen)
    log = metrics_log(tmp_path / "joint").filter(polars.col("train_loss").is_not_null())
    names = (
        "item", "user_attributes.mean_rating", "user_attributes.region", "friends",
    )  # fmt: skip
    for name in names:
        losses = log[f"train/{name}"].to_numpy()
        assert losses[-1] < 0.99 * losses[0], name
    weighted = [(1.0, 0.3, 0.3, 0.5)[i] * log[f"train/{name}"] for i, name in enumerate(names)]
    np.testing.assert_allclose(sum(weighted), log["train_loss"], rtol=1e-5)
    assert log["train/friends.negatives"].min() > 5
    heads = load_file(tmp_path / "joint" / "model" / "heads.safetensors")
    # One numeric attribute and six regions; w and b of the similarity.
    assert heads["user_attributes.linear.weight"].shape == (7, 16)
    assert heads["friends.bias"] == 0 and heads["friends.weight"].std() > 0


@pytest.mark.parametrize(
    "loss, by, shared, steps",
    [
        ("softmax", "popularity", True, 80),
        ("softmax", "uniform", False, 40),
        ("gbce", "uniform", False, 120),  # must first learn how rare a positive is
    ],
)
def test_training_with_sampled_negatives_lowers_the_full_softmax(
    data, tmp_path, loss, by, shared, steps
):
    how = Item(loss=loss, sampled=Sampled(negatives=20, by=by, shared=shared))
    chosen = recipe(
        objectives=Objectives(item=how), steps=steps, validate_every=steps, batch_size=400,
        learning_rate=5e-3,
    )  # fmt: skip
    dataset = SequenceDataset.load(data)
    torch.manual_seed(chosen.seed)
    start = UserModel(dataset.num_items, MODEL)
    trained = run(data, tmp_path / "run", chosen)
    users = torch.as_tensor(dataset.users("train"))
    batch = Mask()(dataset.gather(users, "train", 12), Rng(99, 0), SideData(dataset))
    masked = start.frame(batch).with_scored()
    assert len(masked.scored) > 400

    def full(model):
        with torch.no_grad():
            states = model.encode(masked).states[masked.scored]
            targets = masked.events["target"][masked.scored]
            return model.item_head.loss(states, model.item_table, targets).item()

    assert full(trained) < full(start) - 0.05, (full(trained), full(start))


def test_an_interrupted_run_with_sampled_negatives_resumes_to_the_same_bits(data, tmp_path):
    how = Item(sampled=Sampled(negatives=20, by="popularity", shared=False))
    options = dict(objectives=Objectives(item=how), validate_every=10, checkpoint_every=10)
    whole = recipe(steps=20, **options)
    run(data, tmp_path / "whole", whole)
    run(data, tmp_path / "cut", recipe(steps=10, **options))
    run(data, tmp_path / "cut", whole, resume=True)
    assert trained_weights(tmp_path / "cut")["step"] == 20
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def metrics_log(run: Path, name: str = "metrics") -> polars.DataFrame:
    return polars.read_csv(run / name / "version_0" / "metrics.csv")


def losses(run: Path) -> np.ndarray:
    """The logged training losses: every tenth step."""
    return metrics_log(run)["train_loss"].to_numpy()


def test_backends_train_alike(data, tmp_path):
    """The fused backend follows the reference's loss curve."""
    weights = {
        backend: run(data, tmp_path / str(backend), recipe(backend=backend))
        for backend in ("reference", None)
    }
    np.testing.assert_allclose(*(losses(tmp_path / str(b)) for b in weights), rtol=1e-3)
    fused, reference = weights[None].item_table, weights["reference"].item_table
    assert (fused - reference).abs().max() < 1e-2 * reference.abs().max()


def test_bf16_mixed_trains(data, tmp_path):
    model = run(data, tmp_path / "bf16", recipe(precision="bf16-mixed"))
    run(data, tmp_path / "float32")
    assert model.item_table.dtype == torch.float32
    coarse, exact = losses(tmp_path / "bf16"), losses(tmp_path / "float32")
    np.testing.assert_allclose(coarse, exact, rtol=0.02)
    assert (coarse != exact).any(), "it ran in float32"


def test_masking_the_last_item_and_starting_from_a_model(data, tmp_path):
    pretrained = run(data, tmp_path / "pretrain")
    chosen = recipe(views={"main": [MaskLast()]}, learning_rate=0.0, steps=10)
    start = pretrained.item_table.clone()
    tuned = run(data, tmp_path / "finetune", chosen, model=pretrained)
    assert torch.equal(tuned.item_table, start)
    # The loss of its last step, by hand: one row a sequence, its last item.
    dataset = SequenceDataset.load(data)
    users = torch.as_tensor(dataset.users("test"))
    loader = loader_of(
        pretrained, {"main": [MaskLast()]}, SideData(dataset), batch_size=64, users=users
    )
    step = 9  # the one that is logged
    (view,) = loader.batch_at(step).values()
    rows = view.offsets[1:] - 2  # [SEP] is the last
    assert torch.equal(view.scored, rows) and (view.values[rows] == dataset.num_items).all()
    targets = view.events["target"][rows]
    lasts = [dataset.offsets[user + 1] - 3 for user in view.sample_ids.tolist()]
    assert targets.tolist() == dataset.values[lasts].tolist()
    states = pretrained.encode(view, Rng(0, step)).states[rows]
    expected = pretrained.item_head.loss(states, pretrained.item_table, targets)
    np.testing.assert_allclose(losses(tmp_path / "finetune"), [expected.item()], rtol=1e-4)


def test_a_model_to_start_from_keeps_its_settings(data, tmp_path):
    config = ModelConfig(
        width=8, encoder=Transformer(layers=1), dropout=0.1, max_len=20, tokens=["sep"]
    )
    start = UserModel(150, config)
    with pytest.warns(UserWarning, match="keeps its own settings: width 8, not 16"):
        tuned = run(data, tmp_path / "run", model=start)
    assert tuned.config == start.config
    written = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert written["model"]["width"] == 8, "and not what the recipe says"
    named = {key: value for key, value in written["model"]["encoder"].items() if value}
    assert named == {"transformer": vars(Transformer(layers=1))}
    assert written["model"]["tokens"] == ["sep"] and written["model"]["max_len"] == 20


def test_users_too_short_to_hold_anything_out_are_trained(tmp_path):
    rows = [(user, item) for user in range(30) for item in range(2 if user % 3 else 7)]
    frame = polars.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    report = prepare(RawData("rows", frame, ordered=True), tmp_path / "data")
    assert report.num_short_users == 20 and "train only" in str(report)
    dataset = SequenceDataset.load(tmp_path / "data")
    found = stage_data(dataset, Recipe(), Stage())
    assert len(found.users) == 30 and len(found.judge) == 10


def test_a_start_that_training_only_spoils_is_kept(data, tmp_path):
    pretrained = run(data, tmp_path / "pretrain", recipe(steps=60))
    tuned = run(data, tmp_path / "finetune", recipe(learning_rate=3.0, steps=10), model=pretrained)
    assert torch.equal(tuned.item_table, pretrained.item_table)
    last = trained_weights(tmp_path / "finetune")["model.item_input.ids.weight"]
    assert not torch.equal(last, pretrained.item_embedding.weight)
    summary = json.loads((tmp_path / "finetune" / "summary.json").read_text())
    assert summary["steps"] == 10


def test_early_stopping_keeps_the_best(data, tmp_path):
    chosen = recipe(learning_rate=0.1, steps=100, patience=2)
    model = run(data, tmp_path / "run", chosen)
    last = trained_weights(tmp_path / "run")
    scores = metrics_log(tmp_path / "run", "validation")["valid/NDCG@10"].to_list()
    best = scores.index(max(scores))
    assert best < 6 and len(scores) == best + 3 and last["step"] == 10 * len(scores)
    judge = stage_data(SequenceDataset.load(data), chosen, chosen.pretraining).judge
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    kept = judge.metrics(judge.ranks(model))["NDCG@10"]
    assert kept == pytest.approx(summary["valid NDCG@10"], rel=1e-5)
    assert not torch.equal(last["model.item_head.bias"], model.item_head.bias)


@pytest.mark.slow
def test_two_gloo_processes_train_like_one(data, tmp_path):
    """The ranks share the batch of one process: the same users, masks and dropout."""
    flags = [*FLAGS, "--pretraining.steps=20", "--pretraining.validate_every=20"]
    for devices in (1, 2):
        subprocess.run(
            command("pretrain", "--data", data, "--output", tmp_path / str(devices), *flags,
                    f"--pretraining.devices={devices}"),
            check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
            timeout=900,
        )  # fmt: skip
    one, two = (trained_weights(tmp_path / str(devices)) for devices in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name != "step":
            # Sums in another order; Adam magnifies that where a gradient is near 0.
            error = (value - two[name]).norm() / value.norm().clamp_min(1e-3)
            assert error < 1e-3, (name, error)


def test_errors_name_the_problem(data, tmp_path):
    with pytest.raises(ValueError, match="after 10 steps the loss is nan: the training has"):
        spoilt = recipe(
            views={"main": []}, objectives=Objectives(user_attributes=UserAttributes()),
            judge="attributes", learning_rate=1e38, checkpoint_every=10,
        )  # fmt: skip
        run(data, tmp_path / "diverges", spoilt)
    with pytest.raises(ValueError, match="after 10 steps the loss is nan: the training has"):
        run(data, tmp_path / "lost", recipe(learning_rate=1e30, checkpoint_every=10))
    new = tmp_path / "free"
    with pytest.raises(ValueError, match="backend is 'triton': triton runs on cuda"):
        run(data, new, recipe(backend="triton"))
    with pytest.raises(ValueError, match="monitor is 'NDCG@20', the metrics of this task are"):
        run(data, new, recipe(monitor="NDCG@20"))
    with pytest.raises(ValueError, match="there is no objective to train"):
        run(data, new, recipe(views={}, objectives=Objectives()))
    with pytest.raises(ValueError, match="the view of the objective friends has no pairs"):
        run(data, tmp_path / "alone", recipe(objectives=Objectives(friends=Friends())))
    with pytest.raises(ValueError, match="a view of the objective item has no targets"):
        run(data, tmp_path / "aimless", recipe(views={"main": []}))
    with pytest.raises(ValueError, match="cuda_graph needs one process on one GPU"):
        run(data, new, recipe(cuda_graph=True))
    with pytest.raises(ValueError, match="init freezes or patches a model, or gives it ids"):
        run(data, new, recipe(init=Init(patch=4)))
    with pytest.raises(ValueError, match="view 'b' takes 'c' again, which does not stand before"):
        views = {"b": [Again("c")], "c": [Mask()]}
        run(data, new, recipe(views=views, objectives=Objectives(item=Item(views=["b"]))))
    assert not new.exists(), "a corrected run can take the folder"
    dataset = SequenceDataset.load(data)
    with (
        patch.object(SequenceDataset, "users", lambda self, split: np.empty(0, np.int64)),
        pytest.raises(ValueError, match="no user has 3 events or more"),
    ):
        stage_data(dataset, recipe(), recipe().pretraining)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        run(data, tmp_path / "new", resume=True)
    with pytest.raises(ValueError, match="a run without an output folder cannot be resumed"):
        fit(dataset, recipe=recipe(), resume=True)
    run(data, tmp_path / "run")
    with pytest.raises(FileExistsError, match="is not empty"):
        run(data, tmp_path / "run")
    checkpoint = tmp_path / "run" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read"):
        run(data, tmp_path / "run", resume=True)


@pytest.mark.parametrize("fraction", [0.9, 1.0])
def test_pretraining_does_not_see_the_users_that_choose_a_model_of_users(data, fraction):
    """Else a model that remembered their attributes and friends would be chosen for it."""
    dataset = SequenceDataset.load(data)
    joint = Stage(views=UPREC_VIEWS, objectives=UPREC)
    own = Stage(
        views={"main": []},
        objectives=Objectives(user_attributes=UserAttributes()),
        judge="attributes",
    )
    chosen = Recipe(pretraining=joint, profile=own, users=Users(fraction=fraction))
    pretraining, profile = (stage_data(dataset, chosen, stage) for stage in (joint, own))
    assert isinstance(profile.judge, AttributesJudge)
    judged = profile.judge.users
    assert len(judged) == 40 * fraction and not torch.isin(judged, profile.users).any()
    assert torch.isin(judged, pretraining.users).all(), "their sequences are trained on"
    hidden = fraction < 1.0  # with no user held out there is nothing to choose a model for
    rest = profile.users
    encoded = zip(pretraining.side.attributes, profile.side.encoded, strict=True)
    for before, attribute in encoded:
        assert before.known(judged).any() != hidden and attribute.known(judged).all()
        assert torch.equal(before.values[rest], attribute.values[rest])
    assert not any(a.known(judged).any() for a in profile.side.attributes), "it trains without"
    degrees = np.diff(pretraining.side.graph.offsets)
    assert (degrees[judged].sum() == 0) == hidden and degrees[rest].sum() > 0


def test_held_out_users_are_nobody_that_is_trained(data):
    dataset = SequenceDataset.load(data)
    users = Users(fraction=0.75, seed=2)
    trained, rest = select_users(dataset, users), held_out_users(dataset, users)
    assert len(trained) == 300 and sorted([*trained.tolist(), *rest.tolist()]) == [*range(400)]
    assert not torch.equal(trained, select_users(dataset, replace(users, seed=3)))
    with pytest.raises(ValueError, match="users.fraction is 1.0: no user is held out to test on"):
        held_out_users(dataset, Users())


def test_a_stage_takes_freezes_and_patches_the_model_that_it_starts_from(data, tmp_path):
    """PeterRec: items and encoder as they were, bottlenecks and a new head trained."""
    pretrained = run(data, tmp_path / "pretrain")
    init = Init(take=["items", "encoder"], freeze=["items", "encoder"], patch=4)
    chosen = recipe(init=init, learning_rate=0.01)
    tuned = run(data, tmp_path / "tuned", chosen, model=pretrained)
    last, before = trained_weights(tmp_path / "tuned"), pretrained.state_dict()
    shared = [name for name in before if not name.startswith("item_head.")]
    assert len(shared) > 10 and all(torch.equal(last[f"model.{n}"], before[n]) for n in shared)
    patches = [value for name, value in last.items() if ".patches." in name and "up.weight" in name]
    assert patches and all(value.abs().max() > 0 for value in patches), "they start at 0"
    assert not torch.equal(last["model.item_head.bias"], before["item_head.bias"])
    assert tuned.config.encoder.transformer.patch == 4 and pretrained.config == MODEL
    said = json.loads((tmp_path / "tuned" / "summary.json").read_text())
    assert said["taken"] == shared and said["trained"] < said["parameters"] / 4
