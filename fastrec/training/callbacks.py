# SPDX-License-Identifier: Apache-2.0
"""What a run keeps: the best model, and checkpoints to resume from; and how it ends early."""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping

from fastrec.training.checkpoint import tidy_shards, write_checkpoint
from fastrec.training.processes import first_process


class KeepBest(Callback):
    """Call `save` with the number of steps, on every process, whenever the monitored metric
    improves. `metrics` are those of validation at that step."""

    def __init__(self, save: Callable[[int], None]):
        self.save, self.best, self.step = save, float("-inf"), 0
        self.metrics: dict[str, float] = {}

    def state_dict(self) -> dict:
        return {"best": self.best, "step": self.step, "metrics": self.metrics}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.step, self.metrics = (state[key] for key in ("best", "step", "metrics"))

    def on_save_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        checkpoint["kept"] = self.best > float("-inf")

    def on_validation_start(self, trainer, module) -> None:
        loss = float(trainer.callback_metrics.get("train_loss", 0.0))
        if not math.isfinite(loss):
            raise _diverged(trainer, f"loss is {loss}")
        _check_finite(trainer, module)

    def on_validation_end(self, trainer, module) -> None:
        value = float(trainer.callback_metrics["valid"])
        if not math.isfinite(value):
            raise _diverged(trainer, f"{module.stage.monitored} is {value}")
        if value > self.best:
            self.best, self.step = value, trainer.global_step
            found = {k: float(v) for k, v in trainer.callback_metrics.items() if "valid/" in k}
            self.metrics = {name.removeprefix("valid/"): value for name, value in found.items()}
            self.save(trainer.global_step)


class Patience(EarlyStopping):
    """Lightning's, whose patience is that of this run: a resumed one may have another. The model
    that a run starts from is one that others are to be better than."""

    def on_validation_end(self, trainer, module) -> None:
        if trainer.state.fn == "validate":  # before the first step
            self.best_score = trainer.callback_metrics["valid"].cpu()
        super().on_validation_end(trainer, module)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})


def out_of_patience(trainer) -> bool:
    """Whether a run ends because its validations are no better, and not because a callback of
    somebody else says so."""
    ours = (each for each in trainer.callbacks if isinstance(each, Patience))
    return any(each.wait_count >= each.patience for each in ours)


class Interrupted(Exception):
    """Ctrl-C has ended a run, and `last.ckpt` holds all its steps."""


class SaveToResume(Checkpoint):
    """Write `path` every so many steps and after each validation: a resumed run does not repeat the
    validation of its first step, whose outcome is the best so far and the patience left.

    Ctrl-C in a run of one process ends it behind the step, or the validation, that it is in, which
    `path` then holds: raises Interrupted. A second one ends it at once.

    run: what the run was started with, `checkpoint.identity`.
    """

    def __init__(self, path: Path, run: dict, every: int, patience: int):
        self.path, self.run, self.every, self.patience = path, run, every, patience
        self.stopped: int | None = None
        self.interrupted, self._before = False, cast(Any, None)

    def state_dict(self) -> dict:
        return {"stopped": self.stopped}

    def load_state_dict(self, state: dict) -> None:
        self.stopped = state["stopped"]

    def on_save_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        checkpoint["run"] = self.run

    def on_train_start(self, trainer, module) -> None:
        trainer.should_stop = self.stopped == self.patience  # the run had ended
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *args) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nfastrec: ending behind this step; Ctrl-C again ends at once", file=sys.stderr)

    def teardown(self, trainer, module, stage: str) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def on_train_batch_end(self, trainer, module, *args) -> None:
        # The last batch of a pass is followed by a validation.
        due = trainer.global_step % self.every == 0 or self.interrupted
        if due and not trainer.is_last_batch:
            self._save(trainer, module)

    def on_validation_end(self, trainer, module) -> None:  # Lightning calls checkpoints last
        if trainer.state.fn == "fit":
            self.stopped = self.patience if out_of_patience(trainer) else None
            self._save(trainer, module)

    def _save(self, trainer, module) -> None:
        _check_finite(trainer, module)
        trainer.save_checkpoint(self.path)
        if module.stage.tables.shard and trainer.is_global_zero:
            tidy_shards(self.path)
        if self.interrupted:
            raise Interrupted(
                f"Ctrl-C: the run ended after {trainer.global_step} of {module.stage.steps} steps,"
                f" and {self.path} holds them all; it goes on with --resume true"
            )


class CheckpointFile(TorchCheckpointIO):
    """Lightning's own writes in another folder first and moves the file."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)  # of a ModelCheckpoint of the caller
        write_checkpoint(checkpoint, Path(path))


class EndAtOnce(Callback):
    """SIGTERM ends all processes of a run. Lightning's handler waits for the others in a collective
    that they may never come to; what a run keeps is complete at any moment."""

    def __init__(self, output: Path):
        self.output = output

    def on_validation_start(self, trainer, module) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer, module) -> None:
        self._listen(trainer)

    def _listen(self, trainer) -> None:
        def end(*args) -> None:
            for process in getattr(trainer.strategy.launcher, "procs", []):
                process.kill()
            if first_process():
                print(f"fastrec: SIGTERM ended the run in {self.output}", file=sys.stderr)
            os._exit(128 + signal.SIGTERM)

        if trainer.world_size > 1:
            signal.signal(signal.SIGTERM, end)


def _check_finite(trainer, module) -> None:
    """All processes stop where one finds such weights: they may have other rows of a table."""
    state = module.state_dict().items()
    bad = [n for n, value in state if value.is_floating_point() and not value.isfinite().all()]
    if not trainer.strategy.reduce_boolean_decision(not bad, all=True):
        name = bad[0] if bad else "another process"
        if trainer.global_step == 0:
            raise ValueError(f"weights to start from are not finite, those of {name} for one")
        raise _diverged(trainer, f"weights are not finite, those of {name} for one")


def _diverged(trainer, what: str) -> ValueError:
    return ValueError(
        f"after {trainer.global_step} steps the {what}: the training has diverged; a smaller"
        " learning_rate or a gradient_clip may help. The model and checkpoint of before are kept"
    )
