# SPDX-License-Identifier: Apache-2.0
"""The Lightning module of one stage: one joint loss; validation by a judge."""

import math
from typing import Any

import lightning
import torch

from fastrec.data.loader import SequenceLoader
from fastrec.evaluation.next_item import row_blocks
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.random import Rng
from fastrec.training.graphed import GraphedObjective
from fastrec.training.rows import RowAdamW, clip_, tables_of
from fastrec.training.stage import Stage


class StageModule(lightning.LightningModule):
    """Trains `model` and the heads of `objective` for one stage.

    judge: has `len()`, `score(model, objective, rows)`, a tensor for a slice of its rows,
        `metrics(scores, objective)`, a dict of numbers from the scores of all rows, and their
        `metric_names`.

    Raises ValueError if what the stage monitors is none of these, nor "steps".

    Batch, views and dropout of a step depend on (seed of the loader, global step) only, so a
    resumed run repeats the interrupted one bit for bit without saving any generator state.
    """

    def __init__(
        self,
        model: UserModel,
        objective: JointObjective,
        stage: Stage,
        loader: SequenceLoader,
        judge,
    ):
        super().__init__()
        if stage.monitored not in (*judge.metric_names, "steps"):
            raise ValueError(
                f"monitor is {stage.monitored!r}, the metrics of this task are {judge.metric_names}"
            )
        self.model, self.stage, self.loader, self.judge = model, stage, loader, judge
        self.objective = objective
        self.validation_scores: list[torch.Tensor] = []
        self.graphed: GraphedObjective | None = None

    def train_dataloader(self):
        self.loader.set_step(self.trainer.global_step)
        self.loader.rank, self.loader.world_size = self.trainer.global_rank, self.trainer.world_size
        return self.loader

    def val_dataloader(self):
        blocks = [(rows.start, rows.stop) for rows in row_blocks(len(self.judge))]
        return torch.utils.data.DataLoader(blocks, batch_size=None)  # type: ignore[arg-type]

    def on_fit_start(self):
        if self.stage.cuda_graph:
            self.graphed = GraphedObjective(self.model, self.objective, self.loader.seed)

    def training_step(self, views, batch_index):
        if self.graphed is not None:
            terms = self.graphed(views, self.global_step)
        else:
            terms = self.objective(self.model, views, Rng(self.loader.seed, self.global_step))
        loss = total_loss(terms, self.trainer.world_size)
        # Of several processes the mean: `total_loss` has scaled the share of each for DDP.
        several = self.trainer.world_size > 1
        size = len(next(iter(views.values())))
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=size, sync_dist=several)
        for term in terms if len(terms) > 1 else ():
            value = term.loss.detach()
            self.log(f"train/{term.name}", value, batch_size=size, sync_dist=several)
        return loss

    def validation_step(self, rows, batch_index):
        scores = self.judge.score(self.model, self.objective, slice(*rows))
        self.validation_scores.append(scores)

    def on_validation_epoch_end(self):
        metrics = self.judge.metrics(torch.cat(self.validation_scores), self.objective)
        self.validation_scores.clear()
        self.log_dict({f"valid/{name}": value for name, value in metrics.items()}, prog_bar=False)
        chosen = {**metrics, "steps": float(self.global_step)}[self.stage.monitored]
        self.log("valid", chosen, prog_bar=True, logger=False)

    def transfer_batch_to_device(self, batch, device, dataloader_index):
        if self.graphed is not None or not isinstance(batch, dict):
            return batch  # a graph takes it from the host
        return {name: view.to(device) for name, view in batch.items()}

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        # Lightning's own refuses a fused optimizer in mixed precision, for the sake of a loss
        # scale that bfloat16 does not need.
        if self.stage.gradient_clip:
            clip_(self.parameters(), self.stage.gradient_clip)

    def configure_optimizers(self):
        stage, tables = self.stage, self.stage.tables
        settings: dict[str, Any] = dict(
            lr=stage.learning_rate,
            betas=stage.betas,
            weight_decay=stage.weight_decay,
            fused=True,
        )
        optimizer: torch.optim.AdamW
        if tables.update == "rows":
            by_row = tables_of(self.model)
            known = set(map(id, by_row))
            rest = [p for p in self.parameters() if id(p) not in known]
            rate = stage.learning_rate if tables.learning_rate is None else tables.learning_rate
            optimizer = RowAdamW(rest, by_row, tables.optimizer or "adam", rate, settings)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), **settings)

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
