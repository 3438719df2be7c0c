# SPDX-License-Identifier: Apache-2.0
"""A run that ends anywhere goes on as if it had not ended, and only as the run that it was."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import (
    FLAGS,
    MODEL,
    Killed,
    assert_same_weights,
    command,
    killed_at,
    model_of,
    recipe,
    run,
    synthetic,
    trained_weights,
)
from lightning.pytorch.callbacks import Callback

from fastrec.data.dataset import SequenceDataset
from fastrec.data.dataset_files import digest
from fastrec.data.prepare.synthetic import generate
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.demo import RECIPE, demo
from fastrec.evaluation.next_item import NextItemJudge
from fastrec.evaluation.protocol import Protocol
from fastrec.objectives.item import Item
from fastrec.objectives.parts import Objectives
from fastrec.training.fit import fit
from fastrec.training.module import StageModule
from fastrec.training.stage import Init
from fastrec.training.sweep import sweep

FOUR = dict(steps=40, validate_every=10, checkpoint_every=5)


@pytest.fixture
def falling_scores(monkeypatch):
    """The first validation finds the best model: a resumed run could forget that it did."""
    log = StageModule.log

    def fall(self, name, value, *arguments, **options):
        value = 1 / (1 + self.global_step) if name == "valid" else value
        log(self, name, value, *arguments, **options)

    monkeypatch.setattr(StageModule, "log", fall)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("synthetic"))


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
def test_a_resumed_run_keeps_the_same_model(
    data, tmp_path, monkeypatch, falling_scores, hook, step, patience
):
    stage = recipe(**FOUR, patience=patience)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(data, whole, stage)
    with monkeypatch.context() as patch:
        killed_at(patch, hook, step)
        with pytest.raises(Killed):
            run(data, cut, stage)
    run(data, cut, stage, resume=True)
    assert json.loads((whole / "summary.json").read_text())["valid NDCG@10"] == pytest.approx(
        1 / 11
    )
    assert_same_weights(whole, cut)
    assert trained_weights(whole)["step"] == (30 if patience else 40)
    said = [json.loads((path / "summary.json").read_text()) for path in (whole, cut)]
    key = "valid NDCG@10"
    assert said[0][key] == said[1][key] and said[0]["steps"] == said[1]["steps"]


def test_a_run_is_resumed_with_the_settings_that_it_was_started_with(data, tmp_path):
    folder = tmp_path / "run"
    run(data, folder)
    other = recipe(learning_rate=0.1, views={"main": [Mask(share=0.9)]})
    with pytest.raises(ValueError, match="learning_rate was 0.001, not 0.1") as refused:
        run(data, folder, other, resume=True)
    assert "0.9" in str(refused.value), "nor are other views the same run"
    with pytest.raises(ValueError, match="seed was 0, not 1"):
        run(data, folder, replace(recipe(), seed=1), resume=True)
    with pytest.raises(ValueError, match="model.dropout was 0.3, not 0.1"):
        run(data, folder, replace(recipe(), model=replace(MODEL, dropout=0.1)), resume=True)
    with pytest.raises(ValueError, match="stage was 'pretraining', not 'recommendation'"):
        both = replace(recipe(), recommendation=recipe().pretraining)
        run(data, folder, both, stage="recommendation", resume=True)
    before = (folder / "stage.json").read_text()
    assert json.loads(before)["learning_rate"] == 0.001, "what was refused has left no trace"
    run(data, folder, recipe(steps=40, patience=9), resume=True)
    assert trained_weights(folder)["step"] == 40


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop |= trainer.global_step == self.step


@pytest.mark.parametrize("step", [5, 13])
def test_a_run_that_somebody_elses_callback_stops_goes_on(data, tmp_path, capsys, step):
    """Before a loss was logged, and behind a validation."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(data, whole, recipe(**FOUR))
    stop = dict(output=cut, callbacks=[StopAt(step)], device="cpu")
    fit(SequenceDataset.load(data), recipe=recipe(**FOUR), **stop)
    assert trained_weights(cut)["step"] == step
    assert "stopped: no better" not in capsys.readouterr().out
    run(data, cut, recipe(**FOUR), resume=True)
    assert trained_weights(cut)["step"] == 40
    assert_same_weights(whole, cut)


@pytest.mark.parametrize(("first", "then", "end"), [(2, 5, 12), (6, 3, 8)])
def test_a_resumed_run_has_the_patience_that_it_is_given(data, tmp_path, first, then, end):
    """Nothing improves: the best step is the first validation, step 2."""
    still = dict(learning_rate=0.0, validate_every=2, checkpoint_every=2)
    begun = recipe(**still, steps=20 if first < then else 6, patience=first)
    run(data, tmp_path / "run", begun)
    run(data, tmp_path / "run", recipe(**still, steps=20, patience=then), resume=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == end


def test_a_run_is_not_resumed_on_other_events(data, tmp_path):
    """As many users, items and events, and the same item ids: two events change places."""
    other = tmp_path / "data"
    shutil.copytree(data, other)
    values = np.load(other / "values.npy")
    place = int(np.flatnonzero(np.diff(values))[0])
    values[[place, place + 1]] = values[[place + 1, place]]
    np.save(other / "values.npy", values)
    schema = json.loads((other / "schema.json").read_text())
    schema["digests"]["values.npy"] = digest(other / "values.npy")  # as if prepared like this
    (other / "schema.json").write_text(json.dumps(schema))
    first, second = SequenceDataset.load(data), SequenceDataset.load(other)
    assert first.num_events == second.num_events and first.items_hash == second.items_hash
    run(data, tmp_path / "run", recipe(steps=20))
    with pytest.raises(ValueError, match="is of a run on another data set"):
        run(other, tmp_path / "run", resume=True)
    run(data, tmp_path / "run", resume=True)
    assert trained_weights(tmp_path / "run")["step"] == 30


def test_another_stage_may_change_before_a_run_is_resumed(data, tmp_path):
    run(data, tmp_path / "run", recipe(steps=20))
    later = replace(recipe(views={"main": [MaskLast()]}), pretraining=recipe().pretraining)
    later = replace(later, recommendation=recipe(views={"main": [MaskLast()]}).pretraining)
    run(data, tmp_path / "run", later, resume=True)
    assert trained_weights(tmp_path / "run")["step"] == 30


def test_a_run_goes_on_from_what_it_started_from(data, tmp_path):
    first, other = run(data, tmp_path / "first"), run(data, tmp_path / "other", recipe(steps=20))
    run(data, tmp_path / "run", model=first)
    with pytest.raises(ValueError, match="started from another model, not the one given"):
        run(data, tmp_path / "run", model=other, resume=True)
    run(data, tmp_path / "run", resume=True)  # need not name it, and keeps it
    run(data, tmp_path / "run", model=first, resume=True)
    with pytest.raises(ValueError, match="started from random weights, not the one given"):
        run(data, tmp_path / "first", model=other, resume=True)


def test_a_run_that_stopped_early_is_at_its_end(data, tmp_path, falling_scores):
    stage = recipe(**FOUR | {"steps": 100}, patience=2)
    run(data, tmp_path / "run", stage)
    last, model = (tmp_path / "run" / name for name in ("last.ckpt", "model/model.safetensors"))
    before = trained_weights(tmp_path / "run")["step"], model.read_bytes()
    run(data, tmp_path / "run", stage, resume=True)
    assert before == (trained_weights(tmp_path / "run")["step"], model.read_bytes())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == before[0] == 30
    with pytest.raises(ValueError, match=r"last\.ckpt holds 30 steps, the run is to have 20"):
        run(data, tmp_path / "run", recipe(**FOUR | {"steps": 20}), resume=True)
    assert last.is_file()


def test_more_steps_are_another_run_under_a_schedule(data, tmp_path):
    run(data, tmp_path / "run", recipe(schedule="linear"))
    with pytest.raises(ValueError, match="steps was 30, not 60"):
        stage = recipe(schedule="linear", steps=60)
        run(data, tmp_path / "run", stage, resume=True)


def test_a_folder_without_a_checkpoint_can_be_used_again(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_at(patch, "training_step", 3)
        with pytest.raises(Killed):
            run(data, tmp_path / "run")
    assert (tmp_path / "run" / "stage.json").is_file()
    run(data, tmp_path / "run")


@contextmanager
def started(data, folder, *flags):
    """A process that trains for ever, and has come to its first checkpoint."""
    process = subprocess.Popen(
        command("pretrain", "--data", data, "--output", folder, *FLAGS,
                "--pretraining.steps=100000", "--pretraining.patience=0", *flags),
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 600
        while not (folder / "last.ckpt").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def child(process) -> int:
    """The one process that this one has started, as Linux knows it."""
    (found,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(found)


def runs(pid: int) -> bool:
    """One that nobody has waited for yet, Z, has ended."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z"


@pytest.mark.slow
def test_sigterm_is_no_success_and_one_run_has_one_process(data, tmp_path):
    with started(data, tmp_path / "run") as process:
        second = subprocess.run(
            command("pretrain", "--data", data, "--output", tmp_path / "run", *FLAGS,
                    "--resume=true"), capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert second.returncode == 1
        assert f"run is being written by process {process.pid} on " in second.stderr
        process.terminate()
        _, said = process.communicate(timeout=600)
    assert process.returncode == 143 and "SIGTERM ended the run in" in said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_of_two_processes_ends_both(data, tmp_path, rank):
    with started(data, tmp_path / "run", "--pretraining.devices=2") as process:
        other = child(process)
        os.kill(process.pid if rank == 0 else other, signal.SIGTERM)
        _, said = process.communicate(timeout=20)
        assert process.returncode != 0
        if rank == 0:
            assert process.returncode == 143 and "SIGTERM ended the run in" in said
        deadline = time.monotonic() + 20
        while runs(other):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert trained_weights(tmp_path / "run")["step"] > 0


def test_a_sweep_goes_on_wherever_it_ended(data, tmp_path, monkeypatch):
    projected = Objectives(item=Item(project=True))
    short = dict(steps=10, batch_size=64, validate_every=5, objectives=projected)
    tuning = recipe(
        **short, views={"main": [MaskLast()]}, checkpoint_every=100,
        init=Init(take=["items", "encoder", "head", "item"]),  # of the folder before
    ).pretraining  # fmt: skip
    chosen = replace(recipe(**short), recommendation=tuning)
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


def test_a_sweep_has_one_process(data, tmp_path):
    two = recipe(devices=2)
    with pytest.raises(ValueError, match="a sweep trains in one process: pretraining.devices is 2"):
        sweep(two, data, tmp_path / "sweep", "model.dropout", [0.1])
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_keeps_points_of_its_own_data_and_whole_ones(data, tmp_path):
    chosen, output = recipe(steps=10, batch_size=64, validate_every=5), tmp_path / "sweep"
    sweep(chosen, data, output, "model.dropout", [0.1])
    other = synthetic(tmp_path, seed=4)
    with pytest.raises(ValueError, match="is from another recipe or data set"):
        sweep(chosen, other, output, "model.dropout", [0.1])
    metrics = output / "model.dropout=0.1" / "seed-0" / "metrics.json"
    before = metrics.read_text()
    for damage, message in (("{", "is not JSON"), ("{}", "holds no metrics; remove it")):
        metrics.write_text(damage)
        with pytest.raises(ValueError, match=f"metrics.json {message}"):
            sweep(chosen, data, output, "model.dropout", [0.1])
    metrics.unlink()
    sweep(chosen, data, output, "model.dropout", [0.1])
    assert metrics.read_text() == before


def test_a_demo_compares_what_it_trained(tmp_path, monkeypatch, capsys):
    """With models that nothing has trained: each by its own name in the table and the plots."""
    made, drawn = [], {}

    def given(dataset, initial=None, *, recipe, output, stage="pretraining"):
        model = model_of(num_items=dataset.num_items, tokens=["cls", "sep"])
        model.item_embedding.weight.data.normal_(generator=torch.Generator().manual_seed(len(made)))
        made.append(model)
        assert recipe is RECIPE and initial is (made[0] if len(made) == 2 else None)
        assert stage == ("pretraining" if len(made) == 1 else "recommendation")
        assert output == tmp_path / "demo" / ("pretrain", "finetune", "scratch")[len(made) - 1]
        return model

    monkeypatch.setattr("fastrec.training.fit.fit", given)
    monkeypatch.setattr("fastrec.demo.bench", lambda rounds: None)
    for name in ("plot_losses", "plot_by_length"):
        monkeypatch.setattr(f"fastrec.demo.{name}", lambda *a, name=name: drawn.update({name: a}))
    demo(tmp_path / "demo", users=30, items=40, seed=5)
    dataset = SequenceDataset.load(tmp_path / "demo" / "data")
    same = generate(tmp_path / "same", num_users=30, num_items=40, seed=5)
    assert dataset.num_items == 40 and np.array_equal(dataset.values, same.values)
    judge = NextItemJudge(dataset, torch.arange(30), "test", Protocol("full"))
    names = ("popularity", "fine-tuned from scratch", "pre-trained + fine-tuned")
    expected = [judge.popularity_ranks(), judge.ranks(made[2]), judge.ranks(made[1])]
    lengths, ranks, file = drawn["plot_by_length"]
    assert lengths.tolist() == (np.diff(dataset.offsets) - 1).tolist() and file.name == "length.png"
    assert list(ranks) == list(names)
    said = capsys.readouterr().out.splitlines()
    for name, found in zip(names, expected, strict=True):
        assert ranks[name].tolist() == found.tolist()
        (line,) = (line for line in said if name in line)
        assert re.findall(r"[\d.]+", line)[-1] == f"{100 * found.reciprocal().mean():.2f}", "MRR"
    runs, file = drawn["plot_losses"]
    assert [folder.name for folder in runs.values()] == ["pretrain", "finetune", "scratch"]
    assert list(runs) == ["pre-training", "fine-tuning", "from scratch"]
    assert file == tmp_path / "demo" / "loss.png"


def test_a_demo_replaces_a_demo_and_nothing_else(tmp_path, monkeypatch):
    def dies(*arguments, **options):
        raise Killed

    monkeypatch.setattr("fastrec.data.prepare.synthetic.generate", dies)
    for _ in range(2):
        with pytest.raises(Killed):
            demo(tmp_path / "demo")
        assert [path.name for path in (tmp_path / "demo").iterdir()] == [".fastrec-demo"]
        (tmp_path / "demo" / "data").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(FileExistsError, match="mine holds something else"):
        demo(tmp_path / "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "mine"}
