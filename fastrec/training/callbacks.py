"""What a run keeps: the best model, and checkpoints to resume from."""

import math
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.callbacks import Callback, Checkpoint

from fastrec.training.checkpoint import save_heads


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
                f"after {trainer.global_step} steps the loss is {loss}, {module.stage.monitored}"
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
