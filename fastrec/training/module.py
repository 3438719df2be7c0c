"""The Lightning module of one stage: corrupt, encode, objective; validation by ranking."""

import math

import lightning
import torch

from fastrec.data.loader import SequenceLoader
from fastrec.evaluation.metrics import ranking_metrics
from fastrec.evaluation.protocols import Evaluator
from fastrec.nn.user_model import UserModel
from fastrec.objectives.masked_item import MaskedItemPrediction
from fastrec.random import Rng
from fastrec.training.config import Stage

VALIDATION_BATCH = 512


class StageModule(lightning.LightningModule):
    """Trains `model` for one stage.

    Batch, masks and dropout of a step depend on (seed, global step) only, so a resumed run repeats
    the interrupted one bit for bit without saving any generator state.
    """

    def __init__(
        self, model: UserModel, stage: Stage, loader: SequenceLoader, evaluator: Evaluator
    ):
        super().__init__()
        self.model, self.stage, self.loader, self.evaluator = model, stage, loader, evaluator
        self.objective = MaskedItemPrediction()
        self.validation_ranks: list[torch.Tensor] = []

    def train_dataloader(self):
        self.loader.set_step(self.trainer.global_step)
        self.loader.rank, self.loader.world_size = self.trainer.global_rank, self.trainer.world_size
        return self.loader

    def val_dataloader(self):
        users = len(self.evaluator.users)
        starts = range(0, users, VALIDATION_BATCH)
        rows = [(start, min(start + VALIDATION_BATCH, users)) for start in starts]
        return torch.utils.data.DataLoader(rows, batch_size=None)  # type: ignore[arg-type]

    def training_step(self, batch, batch_index):
        stage, step = self.stage, self.global_step
        masked, rows, targets = stage.masking(batch, self.model, stage.seed, step)
        states = self.model.encode(masked, Rng(stage.seed, step))
        loss = self.objective(self.model, states, rows, targets, backend=stage.backend)
        if self.trainer.world_size > 1:
            # DDP averages over ranks; the mean over all rows needs each rank's share of them.
            total = rows.new_tensor(float(len(rows)), dtype=loss.dtype)
            torch.distributed.all_reduce(total)
            loss = loss * (len(rows) * self.trainer.world_size) / total.clamp_min(1)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, rows, batch_index):
        self.validation_ranks.append(self.evaluator.rank_rows(self.model, slice(*rows)))

    def on_validation_epoch_end(self):
        metrics = ranking_metrics(torch.cat(self.validation_ranks))
        self.validation_ranks.clear()
        self.log_dict({f"valid/{name}": value for name, value in metrics.items()}, prog_bar=False)
        self.log("valid", metrics[self.stage.monitor], prog_bar=True, logger=False)

    def transfer_batch_to_device(self, batch, device, dataloader_index):
        return batch.to(device) if hasattr(batch, "to") else batch

    def configure_optimizers(self):
        stage = self.stage
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=stage.learning_rate,
            weight_decay=stage.weight_decay,
            fused=True,
        )

        def factor(step: int) -> float:
            if step < stage.warmup_steps:
                return (step + 1) / stage.warmup_steps
            done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
            if stage.schedule == "cosine":
                return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            return max(0.0, 1 - done) if stage.schedule == "linear" else 1.0

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
