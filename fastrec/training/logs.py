# SPDX-License-Identifier: Apache-2.0
"""What a run says while it goes on: lines, and CSV files that have a number in every field."""

import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from fastrec.training.callbacks import KeepBest, out_of_patience

TRAINING, VALIDATION = "metrics", "validation"


class Lines(Callback):
    """Print a line at the start and for each validation, where no terminal shows a progress bar."""

    def __init__(self, keep: KeepBest, who: str):
        self.keep, self.who = keep, who

    def on_train_start(self, trainer, module) -> None:
        self.start = time.perf_counter()
        stage = module.stage
        self._print(
            trainer, f"step {trainer.global_step:,} of {stage.steps:,}: {self.who},"
            f" {stage.batch_size} a step, validated every {stage.pass_steps:,} steps",
        )  # fmt: skip

    def on_validation_end(self, trainer, module) -> None:
        if trainer.state.fn != "fit":
            return
        found = trainer.callback_metrics  # no loss where a callback has stopped before the first
        loss, value = float(found.get("train_loss", math.nan)), float(found["valid"])
        best = " (best)" if self.keep.step == trainer.global_step else ""
        seconds = time.perf_counter() - self.start
        monitored = module.stage.monitored
        # "steps" keeps the last model, whatever it is worth.
        best = "" if monitored == "steps" else f", {monitored} {value:.4f}{best}"
        self._print(
            trainer, f"step {trainer.global_step:,} of {module.stage.steps:,}: loss {loss:.4f}"
            f"{best}, {seconds:.0f} s",
        )  # fmt: skip

    def on_train_end(self, trainer, module) -> None:
        stage = module.stage
        if trainer.global_step < stage.steps and out_of_patience(trainer):
            self._print(
                trainer, f"stopped: no better {stage.monitored} in {stage.patience} validations"
                " (patience)",
            )  # fmt: skip

    def _print(self, trainer, text: str) -> None:
        if trainer.is_global_zero:
            print(text, flush=True)  # a log is read while the run goes on


class Speed(Callback):
    """Log the learning rate and the events a second, of all views, since the last logged step."""

    def on_train_start(self, trainer, module) -> None:
        self._begin()

    def on_validation_end(self, trainer, module) -> None:
        self._begin()

    def _begin(self) -> None:
        self.events, self.start = 0, time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        self.events += sum(view.values.shape[0] for view in batch.values())
        if trainer.global_step % trainer.log_every_n_steps:
            return
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        speed = trainer.world_size * self.events / (time.perf_counter() - self.start)
        size = len(next(iter(batch.values())))
        module.log_dict({"learning_rate": rate, "events_per_second": speed}, batch_size=size)
        self._begin()


class Csv(CSVLogger):
    """Training in one file and validation in another: a file with both has empty fields, from whose
    first rows readers take numbers for text. Lightning deletes the file of an earlier run in the
    same folder: a new version each time."""

    def __init__(self, output: Path, name: str):
        super().__init__(output, name=name, version=_next_version(output / name))

    def log_hyperparams(self, params=None) -> None:
        """They are in recipe.json."""

    def log_metrics(self, metrics, step=None) -> None:
        validation = any(name.startswith("valid/") for name in metrics)
        if validation == (self.name == VALIDATION):
            super().log_metrics(metrics, step)


def flat(settings: dict, path: str = "") -> dict[str, Any]:
    """{"pretraining.steps": 1000, ..} of nested settings, as loggers take hyperparameters."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{path}.{name}".lstrip(".")
        if isinstance(value, dict):
            found |= flat(value, key)
        elif value is not None:
            found[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def _next_version(folder: Path) -> int:
    versions = [path.name.removeprefix("version_") for path in folder.glob("version_*")]
    return max((int(each) for each in versions if each.isdecimal()), default=-1) + 1
