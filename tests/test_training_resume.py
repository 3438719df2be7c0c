"""A run that ends anywhere goes on as if it had not ended, and only as the run that it was."""

import json
import os
import subprocess
import time

import polars
import pytest
import torch
from safetensors.torch import load_file
from test_training import FLAGS, command, data, recipe, run, trained_weights  # noqa: F401

from fastrec.evaluation.protocols import Protocol
from fastrec.nn.user_model import ModelConfig
from fastrec.objectives.masked_item import Masking
from fastrec.training.config import Recipe
from fastrec.training.module import StageModule
from fastrec.training.sweep import sweep

# The first of the four validations finds the best model.
SPOILS = dict(steps=40, validate_every=10, checkpoint_every=5, learning_rate=0.1)


class Killed(Exception):
    pass


def killed_at(monkeypatch, hook: str, step: int) -> None:
    """Every later call of `hook` of the training module raises from this global step on."""
    original = getattr(StageModule, hook)

    def dies(self, *args):
        if self.global_step >= step:
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(StageModule, hook, dies)


@pytest.mark.parametrize(
    ("hook", "step", "patience"),
    [
        pytest.param("training_step", 13, 0, id="after_a_validation"),
        pytest.param("training_step", 17, 0, id="after_a_checkpoint_after_a_validation"),
        pytest.param("validation_step", 20, 0, id="in_a_validation"),
        pytest.param("validation_step", 40, 0, id="in_the_last_validation"),
        pytest.param("training_step", 23, 2, id="after_a_validation_without_patience_left"),
        pytest.param("validation_step", 30, 2, id="in_the_validation_that_stops"),
    ],
)
def test_a_resumed_run_keeps_the_same_model(data, tmp_path, monkeypatch, hook, step, patience):  # noqa: F811
    stage = recipe(**SPOILS, patience=patience).pretraining
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(data, whole, stage)
    with monkeypatch.context() as patch:
        killed_at(patch, hook, step)
        with pytest.raises(Killed):
            run(data, cut, stage)
    run(data, cut, stage, resume=True)
    log = polars.read_csv(whole / "metrics" / "version_0" / "metrics.csv")
    scores = log["valid/NDCG@10"].drop_nulls().to_list()
    assert scores[0] == max(scores), "or the resumed run could not forget it"
    best, resumed = (load_file(path / "model" / "model.safetensors") for path in (whole, cut))
    assert all(torch.equal(value, resumed[name]) for name, value in best.items())
    last, again = trained_weights(whole), trained_weights(cut)
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(again[n])) for n, v in last.items())
    assert last["step"] == (30 if patience else 40)
    said = [json.loads((path / "summary.json").read_text()) for path in (whole, cut)]
    key = "valid NDCG@10"
    assert said[0][key] == said[1][key] and said[0]["steps"] == said[1]["steps"]


def test_a_run_is_resumed_with_the_settings_that_it_was_started_with(data, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    run(data, folder)
    with pytest.raises(
        ValueError,
        match=r"masking\.probability was 0\.2, not 0\.9, learning_rate was 0\.001, not 0\.1",
    ):
        other = recipe(learning_rate=0.1, masking=Masking(probability=0.9)).pretraining
        run(data, folder, other, resume=True)
    with pytest.raises(ValueError, match="task was 'recommendation', not 'profile'"):
        run(data, folder, task="profile", resume=True)
    before = (folder / "stage.json").read_text()
    assert json.loads(before)["learning_rate"] == 0.001, "what was refused has left no trace"
    run(data, folder, recipe(steps=40, patience=9).pretraining, resume=True)
    assert trained_weights(folder)["step"] == 40


def test_a_run_that_stopped_early_is_at_its_end(data, tmp_path):  # noqa: F811
    stage = recipe(**{**SPOILS, "steps": 100}, patience=2).pretraining
    run(data, tmp_path / "run", stage)
    last, model = (tmp_path / "run" / name for name in ("last.ckpt", "model/model.safetensors"))
    before = trained_weights(tmp_path / "run")["step"], model.read_bytes()
    run(data, tmp_path / "run", stage, resume=True)
    assert before == (trained_weights(tmp_path / "run")["step"], model.read_bytes())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == before[0] == 30
    with pytest.raises(ValueError, match=r"last\.ckpt holds 30 steps, the run is to have 20"):
        run(data, tmp_path / "run", recipe(**{**SPOILS, "steps": 20}).pretraining, resume=True)
    assert last.is_file()


def test_more_steps_are_another_run_under_a_schedule(data, tmp_path):  # noqa: F811
    run(data, tmp_path / "run", recipe(schedule="linear").pretraining)
    with pytest.raises(ValueError, match="steps was 30, not 60"):
        stage = recipe(schedule="linear", steps=60).pretraining
        run(data, tmp_path / "run", stage, resume=True)


def test_a_folder_without_a_checkpoint_can_be_used_again(data, tmp_path, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        killed_at(patch, "training_step", 3)
        with pytest.raises(Killed):
            run(data, tmp_path / "run")
    assert (tmp_path / "run" / "stage.json").is_file()
    run(data, tmp_path / "run")


@pytest.mark.slow
def test_sigterm_is_no_success(data, tmp_path):  # noqa: F811
    process = subprocess.Popen(
        command("pretrain", "--data", data, "--output", tmp_path / "run", *FLAGS,
                "--pretraining.steps=100000"),
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not (tmp_path / "run" / "last.ckpt").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=600)
    assert process.returncode == 143 and "SIGTERM ended the run in" in said


def test_a_sweep_goes_on_wherever_it_ended(data, tmp_path, monkeypatch):  # noqa: F811
    short = dict(steps=10, batch_size=64, validate_every=5)
    chosen = Recipe(
        model=ModelConfig(width=16, layers=1, max_len=12),
        pretraining=recipe(**short).pretraining,
        finetuning=recipe(**short, checkpoint_every=100).pretraining,
        evaluation=Protocol(candidates="full"),
    )
    ways = {"never": None, "before_a_checkpoint": 3, "after_one": 7}
    for name, step in ways.items():
        with monkeypatch.context() as patch:
            if step is not None:
                killed_at(patch, "training_step", step)
                with pytest.raises(Killed):
                    sweep(chosen, data, tmp_path / name, "model.dropout", [0.1])
        sweep(chosen, data, tmp_path / name, "model.dropout", [0.1])
    results = {name: (tmp_path / name / "sweep.json").read_text() for name in ways}
    assert len(set(results.values())) == 1, results
