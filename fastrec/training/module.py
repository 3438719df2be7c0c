"""The Lightning module of one stage: one joint loss; validation by an evaluator."""

import math

import lightning
import torch

from fastrec.data.loader import SequenceLoader
from fastrec.evaluation.protocols import row_blocks
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.training.config import Stage
from fastrec.training.graphed import GraphedObjective


class StageModule(lightning.LightningModule):
    """Trains `model` and the heads of `objective` for one stage.

    evaluator: has `len()`, `score(model, objective, rows)`, a tensor for a slice of its rows,
        `metrics(scores, objective)`, a dict of numbers from the scores of all rows, and their
        `metric_names`.

    Raises ValueError if `stage.monitor` is none of these.

    Batch, masks and dropout of a step depend on (seed, global step) only, so a resumed run repeats
    the interrupted one bit for bit without saving any generator state.
    """

    def __init__(
        self,
        model: UserModel,
        objective: JointObjective,
        stage: Stage,
        loader: SequenceLoader,
        evaluator,
    ):
        super().__init__()
        if stage.monitor not in evaluator.metric_names:
            raise ValueError(
                f"monitor is {stage.monitor!r}, the metrics of this task are"
                f" {evaluator.metric_names}"
            )
        self.model, self.stage, self.loader, self.evaluator = model, stage, loader, evaluator
        self.objective = objective
        self.validation_scores: list[torch.Tensor] = []
        self.graphed: GraphedObjective | None = None

    def train_dataloader(self):
        self.loader.set_step(self.trainer.global_step)
        self.loader.rank, self.loader.world_size = self.trainer.global_rank, self.trainer.world_size
        return self.loader

    def val_dataloader(self):
        blocks = [(rows.start, rows.stop) for rows in row_blocks(len(self.evaluator))]
        return torch.utils.data.DataLoader(blocks, batch_size=None)  # type: ignore[arg-type]

    def on_fit_start(self):
        stage = self.stage
        if stage.cuda_graph:
            self.graphed = GraphedObjective(
                self.model, self.objective, stage.masking, stage.seed, stage.backend
            )

    def training_step(self, batch, batch_index):
        stage = self.stage
        if self.graphed is not None:
            terms = self.graphed(batch, self.global_step)
        else:
            terms = self.objective(
                self.model, batch, stage.masking, stage.seed, self.global_step, stage.backend
            )
        loss = total_loss(terms, self.trainer.world_size)
        # Of several processes the mean: `total_loss` has scaled the share of each for DDP.
        several = self.trainer.world_size > 1
        self.log(
            "train_loss", loss.detach(), prog_bar=True, batch_size=len(batch), sync_dist=several
        )
        parts: dict[str, torch.Tensor] = {}
        for term in terms:
            parts[term.objective] = parts.get(term.objective, 0) + term.loss.detach()
        if batch.pairs is not None:
            parts["negatives"] = torch.tensor(batch.pairs.negatives)
        for name, value in parts.items() if len(terms) > 1 else ():
            self.log(f"train/{name}", value, batch_size=len(batch), sync_dist=several)
        return loss

    def validation_step(self, rows, batch_index):
        scores = self.evaluator.score(self.model, self.objective, slice(*rows))
        self.validation_scores.append(scores)

    def on_validation_epoch_end(self):
        metrics = self.evaluator.metrics(torch.cat(self.validation_scores), self.objective)
        self.validation_scores.clear()
        self.log_dict({f"valid/{name}": value for name, value in metrics.items()}, prog_bar=False)
        self.log("valid", metrics[self.stage.monitor], prog_bar=True, logger=False)

    def transfer_batch_to_device(self, batch, device, dataloader_index):
        if self.graphed is not None or not hasattr(batch, "to"):
            return batch  # a graph takes it from the host
        return batch.to(device)

    def configure_optimizers(self):
        stage = self.stage
        optimizer = torch.optim.AdamW(
            self.parameters(),
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
