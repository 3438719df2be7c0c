# SPDX-License-Identifier: Apache-2.0
"""What a run says and keeps for people: lines, CSV files, its recipe; and Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import polars
import pytest
import torch
from builders import assert_same_weights, synthetic, trained_weights
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

import fastrec
from fastrec.backend import device_of
from fastrec.cli import main
from fastrec.data.batch import from_sequences
from fastrec.data.output import write_json
from fastrec.evaluation.report import plot_sweep
from fastrec.training.config import Recipe
from fastrec.training.fit import fit
from fastrec.training.logs import Speed
from fastrec.training.module import StageModule

SHORT = dict(
    steps=40, batch_size=64, validate_every=20, warmup_steps=2,
    model={"width": 16, "max_len": 8}, users={"fraction": 1.0},
)  # fmt: skip
FLAGS = [
    "--config", "sasrec", "--model.width", "16", "--model.max_len", "8",
    "--pretraining.batch_size", "64", "--pretraining.validate_every", "20",
    "--pretraining.warmup_steps", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data, and the run of a recipe on it in `run`."""
    folder = tmp_path_factory.mktemp("reports")
    synthetic(folder, num_users=200)
    return folder


class Remembers(CSVLogger):
    def log_hyperparams(self, params):
        self.settings = params


@pytest.fixture(scope="module")
def run(folder):
    dataset = fastrec.SequenceDataset.load(folder / "data")
    seen = []

    class Count(Callback):
        def on_train_batch_end(self, *args):
            seen.append(1)

    mine = Remembers(folder, name="mine")
    recipe = Recipe.load("sasrec", **SHORT)
    fit(dataset, recipe=recipe, output=folder / "run", callbacks=[Count()], loggers=[mine])
    assert len(seen) == 40 and list((folder / "mine").rglob("metrics.csv")), "what was passed ran"
    assert mine.settings["pretraining.steps"] == 40 and mine.settings["model.width"] == 16
    assert mine.settings["model.encoder.transformer.causal"] is True
    return folder / "run"


def test_lines_without_a_terminal(folder, capfd):
    dataset = fastrec.SequenceDataset.load(folder / "data")
    fit(dataset, recipe=Recipe.load("sasrec", **SHORT))
    lines = capfd.readouterr().out.splitlines()
    users = len(dataset.users("train"))
    assert lines[0] == f"step 0 of 40: {users} users, 64 a step, validated every 20 steps"
    pattern = r"step \d0 of 40: loss \d\.\d{4}, NDCG@10 0\.\d{4}( \(best\))?, \d+ s"
    assert len(lines) == 3 and all(re.fullmatch(pattern, line) for line in lines[1:]), lines
    assert "(best)" in lines[1]
    fit(dataset, recipe=Recipe.load("sasrec", **SHORT), progress=False)
    assert capfd.readouterr().out == ""


def test_a_run_that_no_longer_improves_stops_and_says_so(folder, capfd):
    dataset = fastrec.SequenceDataset.load(folder / "data")
    settings = SHORT | dict(steps=60, validate_every=4, learning_rate=1e-12, patience=3)
    fit(dataset, recipe=Recipe.load("sasrec", **settings))
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "stopped: no better NDCG@10 in 3 validations (patience)"
    assert 3 <= len(lines) - 2 < 15 and Recipe.load("sasrec").pretraining.patience == 10


def test_csv_files_have_numbers_alone(run):
    for name in ("metrics", "validation"):
        frame = polars.read_csv(run / name / "version_0" / "metrics.csv")
        assert all(kind.is_numeric() for kind in frame.dtypes), frame.schema
        assert frame.null_count().sum_horizontal().item() == 0
    assert frame["step"].to_list() == [19, 39] and "valid/NDCG@10" in frame.columns
    frame = polars.read_csv(run / "metrics" / "version_0" / "metrics.csv")
    assert frame["step"].to_list() == [9, 19, 29, 39]
    assert (frame["events_per_second"] > 0).all()
    assert frame["learning_rate"].to_list() == pytest.approx(
        [0.002 * (1 - (step - 2) / 38) for step in (10, 20, 30, 40)]
    )


def test_the_loss_beside_a_validation_is_that_of_its_step(folder, monkeypatch, capfd):
    """Also of a step that is not logged, every tenth is."""
    step, losses = StageModule.training_step, []

    def kept(self, *arguments):
        losses.append(step(self, *arguments))
        return losses[-1]

    monkeypatch.setattr(StageModule, "training_step", kept)
    dataset = fastrec.SequenceDataset.load(folder / "data")
    fit(dataset, recipe=Recipe.load("sasrec", **SHORT | dict(steps=13, validate_every=13)))
    assert f"step 13 of 13: loss {losses[12].item():.4f}, " in capfd.readouterr().out


def test_speed_is_of_all_views_and_processes_without_validations(monkeypatch):
    clock = SimpleNamespace(now=7.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr("fastrec.training.logs.time", clock)
    views = {"a": from_sequences([[1, 2, 3], [4]]), "b": from_sequences([[5, 6], [7]])}
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    trainer = SimpleNamespace(log_every_n_steps=2, world_size=3, optimizers=[optimizer])
    found = []
    module = SimpleNamespace(log_dict=lambda values, batch_size: found.append((values, batch_size)))
    speed = Speed()
    speed.on_train_start(trainer, module)
    for trainer.global_step in range(1, 7):
        clock.now += trainer.global_step
        speed.on_train_batch_end(trainer, module, None, views, trainer.global_step)
        if trainer.global_step == 3:
            clock.now += 100
            speed.on_validation_end(trainer, module)
    speeds = [3 * 14 / (1 + 2), 3 * 7 / 4, 3 * 14 / (5 + 6)]
    assert found == [({"learning_rate": 0.5, "events_per_second": each}, 2) for each in speeds]


def test_the_summary_has_the_best_step_and_its_metrics(run):
    summary = json.loads((run / "summary.json").read_text())
    frame = polars.read_csv(run / "validation" / "version_0" / "metrics.csv")
    best = frame[frame["valid/NDCG@10"].arg_max()]
    assert summary["best_step"] == best["step"].item() + 1
    for name, value in summary["valid"].items():
        assert value == pytest.approx(best[f"valid/{name}"].item())


def test_a_model_remembers_its_protocol_and_its_events(folder, run, tmp_path, capsys):
    data = ["--data", str(folder / "data"), "--pretrained", str(run / "model")]
    main(["evaluate", *data])
    said = capsys.readouterr().out
    assert "the target ranked among all items but those of the user's history" in said
    assert "another protocol" not in said and "other events" not in said
    main(["evaluate", *data, "--evaluation.seen", "none"])
    said = capsys.readouterr().out
    assert "the model was chosen by another protocol: the target ranked among all items but" in said
    assert "the target ranked among all items, those of the user's history included" in said
    other = synthetic(tmp_path, num_users=50, seed=5)
    main(["evaluate", "--data", str(other), *data[2:]])
    said = capsys.readouterr().out
    assert "was trained on other events or another split: it may have seen these" in said
    with pytest.warns(UserWarning, match="the model keeps its own settings: width 16, not 64"):
        main(["evaluate", *data, "--config", "sasrec"])
    assert "another protocol" not in capsys.readouterr().out


def test_commands_say_what_they_wrote(folder, run, capsys):
    shared = ["--data", str(folder / "data"), "--pretrained", str(run / "model")]
    best, vectors = folder / "best.csv", folder / "users.parquet"
    main(["recommend", *shared, "--output", str(best), "--k", "3", "--device", "cpu"])
    rows = polars.read_csv(best).height
    said = capsys.readouterr().out
    assert f"{best}: {rows} rows, the 3 best items of 200 of 200 users, items of their h" in said
    main(["embed", *shared, "--output", str(vectors)])
    assert f"{vectors}: 200 user vectors of 16 numbers" in capsys.readouterr().out


def test_ctrl_c_keeps_every_step(folder, tmp_path):
    """The run that was interrupted and goes on ends with the bits of one that was not."""
    command = [
        sys.executable, "-m", "fastrec", "pretrain", *FLAGS, "--pretraining.steps", "2000",
        "--pretraining.checkpoint_every", "100000", "--data", str(folder / "data"),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "cut")], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 20 of"):
            process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == 130 and "Traceback" not in said, said
    found = re.search(r"Ctrl-C: the run ended after (\d+) of 2000 steps", said)
    assert found, said
    step = int(found.group(1))
    assert trained_weights(tmp_path / "cut")["step"] == step
    # Another interruption at the same step, without one: the same weights.
    dataset = fastrec.SequenceDataset.load(folder / "data")
    whole = Recipe.load("sasrec", **(SHORT | {"steps": 2000, "checkpoint_every": step}))

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == step + 1:
                raise RuntimeError("far enough")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(RuntimeError, match="far enough"):
            fit(dataset, recipe=whole, output=tmp_path / "whole", callbacks=[Stop()])
    finally:
        torch.set_num_threads(threads)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_recipes_from_python():
    recipe = Recipe.load("sasrec", steps=500, model={"width": 32}, seed=3)
    assert recipe.pretraining.steps == 500 and recipe.model.width == 32 and recipe.seed == 3
    assert recipe.model.encoder.transformer.causal and recipe.pretraining.batch_size == 256
    with pytest.raises(TypeError, match="'stepz' is no key of a recipe"):
        Recipe.load("sasrec", stepz=1)
    with pytest.raises(FileNotFoundError, match="the recipes are adaptssr, .*sasrec"):
        Recipe.load("sasrek")


def test_devices_by_name():
    assert device_of("cpu") == torch.device("cpu")
    gpus = torch.cuda.device_count()
    assert device_of("auto").type == ("cuda" if gpus else "cpu")
    with pytest.raises(ValueError, match="device is 'cuda:99', and PyTorch finds"):
        device_of("cuda:99")
    for name in ("gpu", "meta", "cuda:x"):
        with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N"):
            device_of(name)


def test_a_device_of_its_own_number_is_one_process_before_anything_is_written(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    dataset = fastrec.SequenceDataset.load(folder / "data")
    recipe = Recipe.load("sasrec", **SHORT)
    with pytest.raises(ValueError, match="devices is 2, and device names one, cuda:1"):
        fit(dataset, recipe=recipe, output=tmp_path / "run", device="cuda:1", devices=2)
    assert not (tmp_path / "run").exists()


def test_names_of_the_package_are_there_when_they_are_asked_for():
    script = "import sys, fastrec; assert 'polars' not in sys.modules, 'import fastrec is light'"
    script += (
        "\nassert 'lightning' not in sys.modules; assert fastrec.Recipe and 'fit' in dir(fastrec)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert all(getattr(fastrec, name) is not None for name in fastrec.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        fastrec.fitt  # noqa: B018


def test_what_fit_cannot_run_is_said_at_once(folder):
    dataset = fastrec.SequenceDataset.load(folder / "data")
    recipe = Recipe.load("sasrec", **SHORT)
    for ask, kind, error in (
        (lambda: fit(dataset), ValueError, "no objective to train: no recipe is given"),
        (
            lambda: fit(dataset, recipe=recipe, stage="profile"),
            ValueError,
            "has no stage 'profile'",
        ),
        (lambda: fit(dataset, recipe=recipe, stage="finetune"), ValueError, "stage must be one of"),
        (lambda: fit(dataset, recipe="sasrec"), TypeError, r"Recipe\.load\('sasrec'\) for one"),
        (lambda: fit(dataset, recipe=recipe, stepz=3), TypeError, "'stepz' is no key of a stage"),
    ):
        with pytest.raises(kind, match=error):
            ask()


def test_several_processes_meet_in_a_folder(folder):
    with pytest.raises(ValueError, match="several processes need an output folder, the same for"):
        fit(fastrec.SequenceDataset.load(folder / "data"), recipe=Recipe.load("sasrec"), devices=2)


def test_ctrl_c_without_an_output_folder_promises_nothing(folder):
    class Stop(Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 3:
                signal.raise_signal(signal.SIGINT)

    dataset = fastrec.SequenceDataset.load(folder / "data")
    with pytest.raises(KeyboardInterrupt, match="nothing is kept of a run without an output"):
        fit(dataset, recipe=Recipe.load("sasrec", **SHORT), callbacks=[Stop()])


def test_hints_of_the_command_line(folder, run, capsys):
    data = f"--data={folder / 'data'}"
    for arguments, said in (
        (["pretrain", data, "--output=x"], "--config names a recipe"),
        (
            ["recommend", data, f"--pretrained={run}", "--output=x.csv", "--user=x"],
            "unrecognized arguments: --user=x$",
        ),
        (
            ["evaluate", data, "--pretrained=x", "--split=train"],
            "--split must be one of 'valid', 'test', got train",
        ),
        (["pretrain", data, "--output=x", "--config=sasrec", "--steps=3"], "--pretraining.steps=3"),
        (["evaluate", data, f"--pretrained={run}"], "but its folder model does"),
    ):
        with pytest.raises(SystemExit, match=said):
            main(arguments)
    main(["finetune", *FLAGS, "--pretraining.steps=20", data, f"--init={run / 'model'}",
          f"--output={folder / 'again'}"])  # fmt: skip
    assert "best on validation" in capsys.readouterr().out, "the one stage that the recipe has"


@pytest.mark.parametrize("patience, scores, end", [
    (2, {0: 0.5, **{4 * i: 0.01 * i for i in range(1, 9)}}, 8),
    (2, {0: 0.5, **{4 * i: 0.3 - 0.01 * i for i in range(1, 9)}}, 8),
    (2, {0: 0.1, **{4 * i: 0.3 - 0.01 * i for i in range(1, 9)}}, 12),
])  # fmt: skip
def test_patience_counts_from_the_model_that_a_run_starts_from(
    folder, tmp_path, monkeypatch, patience, scores, end
):
    """It is kept until another one is better, whether or not they get better from each other."""
    log = StageModule.log

    def given(self, name, value, *arguments, **options):
        value = scores[self.global_step] if name == "valid" else value
        log(self, name, value, *arguments, **options)

    dataset = fastrec.SequenceDataset.load(folder / "data")
    started = fit(dataset, recipe=Recipe.load("sasrec", **SHORT | dict(steps=1)), progress=False)
    monkeypatch.setattr(StageModule, "log", given)
    settings = SHORT | dict(steps=32, validate_every=4, patience=patience)
    chosen = Recipe.load("sasrec", **settings)
    tuned = fit(dataset, started, recipe=chosen, progress=False, output=tmp_path / "run")
    assert tuned.trained_on["steps"] == max(scores, key=scores.get)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == end


def test_of_equally_good_models_the_first_is_kept(folder, tmp_path, monkeypatch):
    log = StageModule.log

    def equal(self, name, value, *arguments, **options):
        log(self, name, 0.5 if name == "valid" else value, *arguments, **options)

    monkeypatch.setattr(StageModule, "log", equal)
    dataset = fastrec.SequenceDataset.load(folder / "data")
    chosen = Recipe.load("sasrec", **SHORT | dict(steps=12, validate_every=4))
    fit(dataset, recipe=chosen, progress=False, output=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_step"] == 4


@pytest.mark.parametrize("cutoffs", [(5, 10), (10, 5)])
def test_the_plot_of_a_sweep_shows_the_largest_cutoff(tmp_path, monkeypatch, cutoffs):
    drawn = []
    monkeypatch.setattr(
        "fastrec.evaluation.report._finish",
        lambda figure, axes, path: drawn.extend(axes.get_legend_handles_labels()[1]),
    )
    metrics = {f"NDCG@{k}": 0.1 for k in cutoffs} | {"MRR": 0.1}
    plot_sweep("model.dropout", {"0.1": [metrics]}, tmp_path / "plot.png")
    assert drawn == ["NDCG@10", "MRR"]


def test_what_is_no_number_is_null_in_json(tmp_path):
    metrics = {"AUC": float("nan"), "by": [{"x": float("inf")}, (1, 2.5)], "none": None}
    write_json(tmp_path / "a.json", metrics)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"AUC": None, "by": [{"x": None}, [1, 2.5]], "none": None}
    assert "NaN" not in text and "Infinity" not in text
