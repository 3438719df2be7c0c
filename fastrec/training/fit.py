"""Run one stage with Lightning: loggers, checkpoints to resume from, the best model kept."""

import copy
import dataclasses
import json
import logging
import math
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fastrec.backend import unavailable_reason
from fastrec.data.loader import SequenceLoader
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective
from fastrec.training.config import Recipe, Stage
from fastrec.training.heads import load_heads, save_heads
from fastrec.training.module import StageModule
from fastrec.training.run_folder import (
    check_free,
    check_same_run,
    describe_model,
    describe_run,
    first_process,
)
from fastrec.training.tasks import Task, task_data


class KeepBest(Callback):
    """Save the model to `path` whenever the monitored metric improves (safetensors, no pickle), and
    the heads of the objectives beside it."""

    def __init__(self, path: Path, describe: Callable[[Path], None]):
        self.path, self.describe, self.best = path, describe, float("-inf")

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.best = state["best"]

    def on_validation_end(self, trainer, module) -> None:
        value = float(trainer.callback_metrics["valid"])
        loss = float(trainer.callback_metrics.get("train_loss", 0.0))
        if not (math.isfinite(value) and math.isfinite(loss)):
            raise ValueError(
                f"after {trainer.global_step} steps the loss is {loss}, {module.stage.monitor}"
                f" {value}: the training has diverged; a smaller learning_rate or a gradient_clip"
                " may help"
            )
        if value > self.best:
            self.best = value
            if trainer.is_global_zero:
                module.model.save_pretrained(self.path)
                save_heads(module.objective, self.path)
                self.describe(self.path)


class SaveToResume(Checkpoint):
    """Write `path` every so many steps and after each validation: a resumed run does not repeat the
    validation of its first step, whose outcome is the best so far and the patience left."""

    def __init__(self, path: Path, every: int, patience: int):
        self.path, self.every, self.patience = path, every, patience
        self.stopped: int | None = None

    def state_dict(self) -> dict:
        return {"stopped": self.stopped}

    def load_state_dict(self, state: dict) -> None:
        self.stopped = state["stopped"]

    def on_train_start(self, trainer, module) -> None:
        trainer.should_stop = self.stopped == self.patience  # the run had ended

    def on_train_batch_end(self, trainer, *args) -> None:
        # The last batch of a pass is followed by a validation.
        if trainer.global_step % self.every == 0 and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer, module) -> None:  # Lightning calls checkpoints last
        if trainer.state.fn == "fit":
            self.stopped = (trainer.should_stop and self.patience) or None
            trainer.save_checkpoint(self.path)


def fit(
    dataset,
    recipe: Recipe,
    stage: Stage,
    output: Path,
    *,
    task: Task = "recommendation",
    initial: UserModel | None = None,
    initial_folder: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> UserModel:
    """Train one stage and return the model that was best on validation.

    Writes into `output`: `model/` (best on validation, `UserModel.from_pretrained`, with the heads
    of the objectives in heads.safetensors), `last.ckpt` (to resume from), `metrics/` (CSV),
    `tensorboard/`, `recipe.json` (the whole recipe), `stage.json` (the stage), `summary.json`.

    Args:
        task: what validation measures, and with it which users are trained, see `task_data`.
        initial: start from this model instead of random weights; it is not changed and keeps its
            own `recipe.model`. It is validated first, and kept if training does not improve on it.
        initial_folder: of that model: its social relation head is taken over, if it has one, and
            the users that it was trained on count as seen.
        resume: go on from `output/last.ckpt`; ends with the same bits as an uninterrupted run. What
            the run was started with must be the same but for `run_folder.MAY_CHANGE`.

    Raises:
        FileExistsError: `output` holds a run and `resume` is off. FileNotFoundError: nothing to
        resume. ValueError: `last.ckpt` cannot be read, is of a run with other settings, or the
        stage cannot run as it says. Nothing is written then.
    """
    output = Path(output)
    checkpoint = output / "last.ckpt"
    if resume and not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint} is missing: there is no run to resume in {output}")
    if not resume and first_process():
        check_free(output)
    if initial is not None:
        recipe = _with_model(recipe, initial)
    if resume:
        check_same_run(output, dataset, recipe, stage, task)
        _check_checkpoint(checkpoint, stage.steps)
    if stage.cuda_graph:
        _check_one_gpu(stage.devices)
    if stage.backend is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if why := unavailable_reason(stage.backend, "linear_cross_entropy", device):
            raise ValueError(f"backend is {stage.backend!r}: {why}")

    torch.manual_seed(stage.seed)
    model = copy.deepcopy(initial) or UserModel(dataset.num_items, recipe.model)
    data = task_data(dataset, recipe, stage.objectives, task)
    objective = JointObjective(stage.objectives, model, data.attributes, dataset.item_counts)
    if not stage.objectives.masked_item:
        model.item_head.requires_grad_(False)  # DDP waits for the gradient of every parameter
    if initial_folder is not None:
        load_heads(objective, initial_folder, only="social_relation.")
    loader = SequenceLoader(
        dataset,
        "train",
        batch_size=stage.batch_size,
        max_len=recipe.model.max_len,
        seed=stage.seed,
        users=data.users,
        friends=data.friends,
        columns={attribute.name: attribute.values for attribute in data.attributes},
        steps_per_pass=stage.pass_steps,
        **model.sequence_tokens,  # type: ignore[arg-type]
    )
    module = StageModule(model, objective, stage, loader, data.evaluator)
    output.mkdir(parents=True, exist_ok=True)
    if first_process():
        describe_run(output, dataset, recipe, stage, task)
        (output / "summary.json").unlink(missing_ok=True)
    keep = KeepBest(
        output / "model",
        lambda folder: describe_model(folder, dataset, recipe, stage, initial_folder),
    )
    save = SaveToResume(checkpoint, stage.checkpoint_every, stage.patience)
    callbacks: list[Callback] = [keep, save]
    if stage.patience:
        callbacks.append(
            EarlyStopping(
                "valid",
                mode="max",
                patience=stage.patience,
                check_on_train_epoch_end=False,  # but after validation, before SaveToResume
            )
        )
    if progress:
        callbacks.append(RichProgressBar())
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for noise in (".*does not have many workers.*", ".*exists and is not empty.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", noise)
    trainer = lightning.Trainer(
        max_steps=stage.steps,
        max_epochs=stage.steps // stage.pass_steps,
        devices=stage.devices,
        precision=stage.precision,
        gradient_clip_val=stage.gradient_clip or None,
        callbacks=callbacks,
        logger=[
            # Lightning deletes the CSV of an earlier run in the same folder: a new one each time.
            CSVLogger(output, name="metrics", version=_next_version(output / "metrics")),
            TensorBoardLogger(output, name="tensorboard", version=""),
        ],
        num_sanity_val_steps=0,
        enable_progress_bar=progress,
        enable_model_summary=False,
        log_every_n_steps=min(10, loader.steps_per_pass),
        use_distributed_sampler=False,
    )
    start = time.perf_counter()
    if initial is not None and not resume:
        trainer.validate(module, verbose=False)
    try:
        trainer.fit(module, ckpt_path=checkpoint if resume else None, weights_only=True)
    except SIGTERMException as stop:  # a SystemExit with status 0
        print(f"fastrec: SIGTERM ended the run in {output}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from stop
    summary = {
        "steps": trainer.global_step,
        "seconds": round(time.perf_counter() - start, 1),
        f"valid {stage.monitor}": keep.best,
        "users": len(data.users),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if trainer.is_global_zero:
        (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    trainer.strategy.barrier()
    return UserModel.from_pretrained(output / "model")


def _next_version(folder: Path) -> int:
    versions = [int(path.name.removeprefix("version_")) for path in folder.glob("version_*")]
    return max(versions, default=-1) + 1


def _check_one_gpu(devices: int | str) -> None:
    gpus = torch.cuda.device_count()
    used = gpus if devices == "auto" else min(int(devices), gpus)
    if used != 1:
        raise ValueError(
            f"cuda_graph needs one process on one GPU: devices is {devices}, {gpus} GPUs are here"
        )


def _with_model(recipe: Recipe, initial: UserModel) -> Recipe:
    """The recipe with the settings of the model that a stage starts from, and a warning if they
    differ."""
    asked, kept = dataclasses.asdict(recipe.model), dataclasses.asdict(initial.config)
    other = [
        f"{name} {kept[name]!r}, not {asked[name]!r}" for name in kept if kept[name] != asked[name]
    ]
    if other:
        warnings.warn(
            f"the model to start from keeps its own settings: {', '.join(other)}", stacklevel=3
        )
    return dataclasses.replace(recipe, model=initial.config)


def _check_checkpoint(path: Path, steps: int) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read, is it truncated? {error}") from error
    if state["global_step"] > steps:
        raise ValueError(f"{path} holds {state['global_step']} steps, the run is to have {steps}")
