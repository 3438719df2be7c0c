"""The user's path: a killed run resumes to the same bits, broken checkpoints are named."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import polars
import pytest
import torch
from safetensors.torch import load_file

from fastrec.data.dataset import SequenceDataset
from fastrec.data.loader import SequenceLoader
from fastrec.data.prepare import prepare
from fastrec.data.readers import RawData
from fastrec.data.synthetic import generate
from fastrec.evaluation.profile import ProfileEvaluator
from fastrec.evaluation.protocols import Protocol
from fastrec.nn.user_model import ModelConfig, UserModel
from fastrec.objectives.joint import Objectives
from fastrec.objectives.masked_item import ItemLoss, Masking
from fastrec.random import Rng
from fastrec.training.config import Recipe, Social, Stage, Users
from fastrec.training.fit import fit
from fastrec.training.tasks import task_data

MODEL = ModelConfig(width=16, layers=1, dropout=0.3, max_len=12)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "data"
    generate(path, num_users=400, num_items=150, seed=3)
    return path


def recipe(**stage) -> Recipe:
    defaults = dict(steps=30, batch_size=64, validate_every=10, checkpoint_every=7)
    return Recipe(
        model=MODEL,
        pretraining=Stage(**{**defaults, **stage}),
        evaluation=Protocol(candidates="full"),
    )


def trained_weights(run: Path) -> dict:
    """The weights after the last step, from the checkpoint to resume from."""
    state = torch.load(run / "last.ckpt", weights_only=True)
    return {"step": state["global_step"], **state["state_dict"]}


def run(data: Path, output: Path, stage: Stage | None = None, **kwargs) -> UserModel:
    chosen = recipe()
    return fit(
        SequenceDataset.load(data),
        chosen,
        stage or chosen.pretraining,
        output,
        progress=False,
        **kwargs,
    )


FLAGS = [
    "--model.width=16", "--model.layers=1", "--model.dropout=0.3", "--model.max_len=12",
    "--pretraining.steps=300", "--pretraining.batch_size=64", "--pretraining.validate_every=100",
    "--pretraining.checkpoint_every=20", "--evaluation.candidates=full",
    "--pretraining.objectives.user_attribute=0.3", "--pretraining.objectives.social_relation=0.5",
]  # fmt: skip


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "fastrec", *map(str, arguments)]


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
    expected, resumed = trained_weights(whole), trained_weights(killed)
    assert expected.keys() == resumed.keys() and resumed["step"] == 300
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed[name])), name
    best, best_resumed = (load_file(p / "model" / "model.safetensors") for p in (whole, killed))
    for name, value in best.items():
        assert torch.equal(value, best_resumed[name]), name


def test_training_is_reproducible_and_the_seed_matters(data, tmp_path):
    first, second = run(data, tmp_path / "a"), run(data, tmp_path / "b")
    other = run(data, tmp_path / "c", recipe(seed=1).pretraining)
    assert torch.equal(first.item_table, second.item_table)
    assert not torch.equal(first.item_table, other.item_table)


def test_all_three_losses_of_the_joint_training_fall(data, tmp_path):
    weights = Objectives(masked_item=1.0, user_attribute=0.3, social_relation=0.5)
    stage = recipe(
        objectives=weights, steps=40, validate_every=40, batch_size=400, learning_rate=5e-3
    )
    run(data, tmp_path / "joint", stage.pretraining)
    (file,) = tmp_path.glob("joint/metrics/version_0/metrics.csv")
    log = polars.read_csv(file).filter(polars.col("train_loss").is_not_null())
    for name in ("masked_item", "user_attribute", "social_relation"):
        losses = log[f"train/{name}"].to_numpy()
        assert losses[-1] < 0.99 * losses[0], name
    assert log["train/negatives"].min() > 5
    heads = load_file(tmp_path / "joint" / "model" / "heads.safetensors")
    # One numeric attribute and six regions; w and b of the similarity.
    assert heads["user_attribute.linear.weight"].shape == (7, 16)
    assert heads["social_relation.bias"] == 0 and heads["social_relation.weight"].std() > 0


@pytest.mark.parametrize(
    "loss, sampler, shared, steps",
    [
        ("softmax", "popularity", True, 40),
        ("softmax", "uniform", False, 40),
        ("gbce", "uniform", False, 120),  # must first learn how rare a positive is
    ],
)
def test_training_with_sampled_negatives_lowers_the_full_softmax(
    data, tmp_path, loss, sampler, shared, steps
):
    how = ItemLoss(kind="sampled", loss=loss, negatives=20, sampler=sampler, shared=shared)
    chosen = recipe(
        objectives=Objectives(item_loss=how), steps=steps, validate_every=steps, batch_size=400,
        learning_rate=5e-3,
    )  # fmt: skip
    dataset = SequenceDataset.load(data)
    torch.manual_seed(chosen.pretraining.seed)
    start = UserModel(dataset.num_items, MODEL)
    trained = run(data, tmp_path / "run", chosen.pretraining)
    batch = dataset.gather(dataset.users("train"), "train", max_len=12, **start.sequence_tokens)
    masked, rows, targets = Masking()(batch, start, 99, 0)

    def full(model):
        with torch.no_grad():
            states = model.encode(masked)
            return model.item_head.loss(states[rows], model.item_table, targets).item()

    assert full(trained) < full(start) - 0.05, (full(trained), full(start))


def test_an_interrupted_run_with_sampled_negatives_resumes_to_the_same_bits(data, tmp_path):
    how = ItemLoss(kind="sampled", negatives=20, sampler="popularity", shared=False)
    options = dict(objectives=Objectives(item_loss=how), validate_every=10, checkpoint_every=10)
    whole = recipe(steps=20, **options).pretraining
    run(data, tmp_path / "whole", whole)
    run(data, tmp_path / "cut", recipe(steps=10, **options).pretraining)
    run(data, tmp_path / "cut", whole, resume=True)
    expected, resumed = (trained_weights(tmp_path / name) for name in ("whole", "cut"))
    assert expected.keys() == resumed.keys() and expected["step"] == resumed["step"] == 20
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed[name])), name


def losses(run: Path) -> np.ndarray:
    """The logged training losses: every tenth step."""
    log = polars.read_csv(run / "metrics" / "version_0" / "metrics.csv")
    return log["train_loss"].drop_nulls().to_numpy()


def test_backends_train_alike(data, tmp_path):
    """The fused backend follows the reference's loss curve."""
    weights = {
        backend: run(data, tmp_path / str(backend), recipe(backend=backend).pretraining)
        for backend in ("reference", None)
    }
    np.testing.assert_allclose(*(losses(tmp_path / str(b)) for b in weights), rtol=1e-3)
    fused, reference = weights[None].item_table, weights["reference"].item_table
    assert (fused - reference).abs().max() < 1e-2 * reference.abs().max()


def test_bf16_mixed_trains(data, tmp_path):
    model = run(data, tmp_path / "bf16", recipe(precision="bf16-mixed").pretraining)
    run(data, tmp_path / "float32")
    assert model.item_table.dtype == torch.float32
    coarse, exact = losses(tmp_path / "bf16"), losses(tmp_path / "float32")
    np.testing.assert_allclose(coarse, exact, rtol=0.02)
    assert (coarse != exact).any(), "it ran in float32"


def test_masking_the_last_item_and_starting_from_a_model(data, tmp_path):
    pretrained = run(data, tmp_path / "pretrain")
    stage = recipe(masking=Masking(last_only=True), learning_rate=0.0, steps=10).pretraining
    start = pretrained.item_table.clone()
    tuned = run(data, tmp_path / "finetune", stage, initial=pretrained)
    assert torch.equal(tuned.item_table, start)
    # The loss of its last step, by hand: one row a sequence, its last.
    dataset = SequenceDataset.load(data)
    loader = SequenceLoader(
        dataset, "train", batch_size=64, max_len=12, users=torch.as_tensor(dataset.users("test")),
        **pretrained.sequence_tokens,
    )  # fmt: skip
    step = 9  # the one that is logged
    masked, rows, targets = stage.masking(loader.batch_at(step), pretrained, 0, step)
    assert torch.equal(rows, masked.offsets[1:] - 1 - int(pretrained.config.use_sep))
    states = pretrained.train().encode(masked, Rng(0, step))
    expected = pretrained.item_head.loss(states[rows], pretrained.item_table, targets)
    np.testing.assert_allclose(losses(tmp_path / "finetune"), [expected.item()], rtol=1e-4)


def test_a_model_to_start_from_keeps_its_settings(data, tmp_path):
    start = UserModel(150, ModelConfig(width=8, layers=1, dropout=0.1, max_len=20))
    with pytest.warns(UserWarning, match="keeps its own settings: width 8, not 16"):
        tuned = run(data, tmp_path / "run", initial=start)
    assert tuned.config == start.config
    written = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert written["model"] == asdict(start.config), "and not what the recipe says"


def test_users_too_short_to_hold_anything_out_are_trained(tmp_path):
    rows = [(user, item) for user in range(30) for item in range(2 if user % 3 else 7)]
    frame = polars.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    report = prepare(RawData("rows", frame, ordered=True), tmp_path / "data")
    assert report.num_short_users == 20 and "train only" in str(report)
    dataset = SequenceDataset.load(tmp_path / "data")
    chosen = Recipe(evaluation=Protocol(candidates="full"))
    found = task_data(dataset, chosen, Objectives(), "recommendation")
    assert len(found.users) == 30 and len(found.evaluator) == 10


def test_a_start_that_training_only_spoils_is_kept(data, tmp_path):
    pretrained = run(data, tmp_path / "pretrain", recipe(steps=60).pretraining)
    stage = recipe(learning_rate=3.0, steps=10).pretraining
    tuned = run(data, tmp_path / "finetune", stage, initial=pretrained)
    assert torch.equal(tuned.item_table, pretrained.item_table)
    summary = json.loads((tmp_path / "finetune" / "summary.json").read_text())
    assert summary["steps"] == 10


def test_early_stopping_keeps_the_best(data, tmp_path):
    stage = recipe(learning_rate=0.1, steps=100, patience=2).pretraining
    model = run(data, tmp_path / "run", stage)
    last = trained_weights(tmp_path / "run")
    assert last["step"] == 30, "the first validation was the best"
    evaluator = task_data(
        SequenceDataset.load(data), recipe(), stage.objectives, "recommendation"
    ).evaluator
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    kept = evaluator.metrics(evaluator.ranks(model))["NDCG@10"]
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
    with pytest.raises(
        ValueError, match=r"steps \(30\) must be a multiple of validate_every \(8\)"
    ):
        recipe(validate_every=8)
    for name in ("steps", "batch_size", "validate_every", "checkpoint_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            recipe(**{name: 0})
    with pytest.raises(ValueError, match="learning_rate must not be negative, got nan"):
        recipe(learning_rate=float("nan"))
    for fraction in (-0.1, 0.0, 2.0):
        with pytest.raises(ValueError, match=r"users.fraction must be in \(0, 1\], got"):
            Users(fraction=fraction)
    with pytest.raises(ValueError, match="after 10 steps the loss is nan, score nan: the training"):
        weights = Objectives(masked_item=0.0, user_attribute=1.0)
        stage = recipe(objectives=weights, learning_rate=1e38, monitor="score").pretraining
        run(data, tmp_path / "diverges", stage, task="profile")
    with pytest.raises(ValueError, match="after 10 steps the loss is nan, NDCG@10 0.0"):
        run(data, tmp_path / "lost", recipe(learning_rate=1e30).pretraining)
    new = tmp_path / "free"
    with pytest.raises(ValueError, match="backend is 'triton': triton runs on cuda"):
        run(data, new, recipe(backend="triton").pretraining)
    with pytest.raises(ValueError, match="monitor is 'NDCG@20', the metrics of this task are"):
        run(data, new, recipe(monitor="NDCG@20").pretraining)
    assert not new.exists(), "a corrected run can take the folder"
    dataset = SequenceDataset.load(data)
    with (
        patch.object(SequenceDataset, "users", lambda self, split: np.empty(0, np.int64)),
        pytest.raises(ValueError, match="no user has 3 events or more"),
    ):
        task_data(dataset, recipe(), Objectives(), "recommendation")
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        run(data, tmp_path / "new", resume=True)
    run(data, tmp_path / "run")
    with pytest.raises(FileExistsError, match="is not empty"):
        run(data, tmp_path / "run")
    checkpoint = tmp_path / "run" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read"):
        run(data, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Stage(schedule="cosin"),
            r"schedule must be one of \['constant', 'cosine', 'linear'\]",
        ),
        (lambda: Stage(backend="c"), "backend must be one of"),
        (lambda: Stage(devices=0), "devices must be at least 1 or 'auto', got 0"),
        (lambda: Protocol(candidates="ful"), "candidates must be one of"),
        (lambda: Protocol(negatives=0), "evaluation.negatives must be at least 1"),
        (lambda: Social(hops=3), r"hops must be one of \[0, 1, 2\], got 3"),
        (lambda: ItemLoss(kind="sampeld"), "kind must be one of"),
        (lambda: Masking(probability=1.5), r"masking.probability must be in \[0, 1\], got 1.5"),
        (lambda: Objectives(social_relation=-1.0), "the weight of social_relation is negative"),
        (lambda: ModelConfig(width=0), "model.width must be at least 1, got 0"),
        (lambda: ModelConfig(dropout=1.0), r"model.dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_are_checked_where_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("fraction", [0.9, 1.0])
def test_pretraining_does_not_see_the_users_that_choose_a_model_of_users(data, fraction):
    """Else a model that remembered their attributes and friends would be chosen for it."""
    dataset = SequenceDataset.load(data)
    chosen = Recipe(users=Users(fraction=fraction), evaluation=Protocol(candidates="full"))
    wanted = Objectives(user_attribute=0.3, social_relation=0.5)
    pretraining = task_data(dataset, chosen, wanted, "recommendation")
    profile = task_data(dataset, chosen, Objectives(0.0, 1.0), "profile")
    assert isinstance(profile.evaluator, ProfileEvaluator)
    judged = profile.evaluator.users
    assert len(judged) == 40 * fraction and not torch.isin(judged, profile.users).any()
    assert torch.isin(judged, pretraining.users).all(), "their sequences are trained on"
    hidden = fraction < 1.0  # with no user held out there is nothing to choose a model for
    rest = profile.users
    for before, own in zip(pretraining.attributes, profile.attributes, strict=True):
        assert before.known(judged).any() != hidden and own.known(judged).all()
        assert torch.equal(before.values[rest], own.values[rest])
    assert pretraining.friends is not None
    degrees = np.diff(pretraining.friends.graph.offsets)
    assert (degrees[judged].sum() == 0) == hidden and degrees[rest].sum() > 0
