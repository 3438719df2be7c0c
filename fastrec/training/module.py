# SPDX-License-Identifier: Apache-2.0
"""The Lightning module of one stage: one joint loss; validation by a judge."""

import math
from pathlib import Path
from typing import Any

import lightning
import torch

from fastrec.data.loader import SequenceLoader
from fastrec.evaluation.blocks import Block, gathered, own_blocks
from fastrec.evaluation.judges import Judge
from fastrec.nn.sharded import shard_tables, sharded_parameters
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective, of_all_ranks, total_loss
from fastrec.random import Rng
from fastrec.training.graphed import GraphedObjective
from fastrec.training.rows import RowAdamW, clip_, share_gradients, swept_of, tables_of
from fastrec.training.stage import Stage


class StageModule(lightning.LightningModule):
    """Trains `model` and the heads of `objective` for one stage.

    judge: asked in every validation.
    folder: of the run, for what a checkpoint has beside its file.

    Raises ValueError if what the stage monitors is no metric of the judge, nor "steps".

    Batch, views and dropout of a step depend on (seed of the loader, global step) only, so a
    resumed run repeats the interrupted one bit for bit without saving any generator state.
    """

    def __init__(
        self,
        model: UserModel,
        objective: JointObjective,
        stage: Stage,
        loader: SequenceLoader,
        judge: Judge,
        folder: Path = Path(),
    ):
        super().__init__()
        if stage.monitored not in (*judge.metric_names, "steps"):
            raise ValueError(
                f"monitor is {stage.monitored!r}, the metrics of this task are {judge.metric_names}"
            )
        self.model, self.stage, self.loader, self.judge = model, stage, loader, judge
        self.folder = folder
        self.objective = objective
        self.validation_scores: list[torch.Tensor] = []
        self.graphed: GraphedObjective | None = None
        self.shared: list[torch.nn.Parameter] = []  # tables with sparse gradients, on all processes

    def configure_model(self):
        """Called where the processes know each other, and DDP does not yet know the model."""
        how, several = self.stage.tables, self.trainer.world_size > 1
        if not several or (how.update == "dense" and not how.shard):
            return
        if how.shard and self.model.sharded_table is None:
            world = torch.distributed.group.WORLD
            assert world is not None  # Lightning has made it
            shard_tables(self.model, world)
        ours = set(map(id, self._sharded()))
        if how.update == "rows":
            self.shared = [table for table in tables_of(self.model) if id(table) not in ours]
            for table in self.shared:  # as DDP does with the others
                torch.distributed.broadcast(table.detach(), 0)
        ours |= set(map(id, self.shared))
        names = [name for name, p in self.named_parameters() if id(p) in ours]
        self._ddp_params_and_buffers_to_ignore = names  # its own word for it

    def _sharded(self) -> list[torch.nn.Parameter]:
        """The parameters of which this process has a block."""
        if self.model.sharded_table is None:
            return []
        return [block for block, _ in sharded_parameters(self.model).values()]

    def on_after_backward(self):
        if self.shared:
            share_gradients(self.shared)
        if self.stage.tables.update == "dense":
            for block in self._sharded():
                if block.grad is not None and block.grad.is_sparse:  # no loss over all items
                    block.grad = block.grad.to_dense()

    def on_save_checkpoint(self, checkpoint):
        if self.stage.tables.shard:
            from fastrec.training.shards import save_shards

            save_shards(checkpoint, self, self.folder)

    def on_load_checkpoint(self, checkpoint):
        if "shards" in checkpoint:
            from fastrec.training.shards import load_shards

            load_shards(checkpoint, self, self.folder)

    def train_dataloader(self):
        self.loader.set_step(self.trainer.global_step)
        self.loader.rank, self.loader.world_size = self.trainer.global_rank, self.trainer.world_size
        return self.loader

    def val_dataloader(self):
        trainer = self.trainer
        blocks = own_blocks(len(self.judge), trainer.global_rank, trainer.world_size)
        return torch.utils.data.DataLoader(blocks, batch_size=None)  # type: ignore[arg-type]

    def on_fit_start(self):
        if self.stage.cuda_graph:
            self.graphed = GraphedObjective(self.model, self.objective, self.loader.seed)

    def training_step(self, views, batch_index):
        if self.graphed is not None:
            terms = self.graphed(views, self.global_step)
        else:
            terms = self.objective(self.model, views, Rng(self.loader.seed, self.global_step))
        terms = of_all_ranks(terms, self.trainer.world_size)
        loss = total_loss(terms)
        if self._logs(self.global_step + 1):
            # Of several processes the mean: the share of each is scaled for it, as for DDP.
            several = self.trainer.world_size > 1
            size = len(next(iter(views.values())))
            self.log("train_loss", loss.detach(), prog_bar=True, batch_size=size, sync_dist=several)
            for term in terms if len(terms) > 1 else ():
                value = term.loss.detach()
                self.log(f"train/{term.name}", value, batch_size=size, sync_dist=several)
        return loss

    def _logs(self, step: int) -> bool:
        """Whether a step is written to the logs or said beside a validation: what a trainer is told
        of others costs it 0.6 ms a number (AMD EPYC, Zen 3) and leaves no trace."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return not step % every or not step % self.stage.pass_steps

    def validation_step(self, block: Block, batch_index):
        scores = self.judge.score(self.model, self.objective, block.rows)
        if block.counts:
            self.validation_scores.append(scores)

    def on_validation_epoch_end(self):
        group = torch.distributed.group.WORLD if self.trainer.world_size > 1 else None
        scores = gathered(self.validation_scores, group)
        self.validation_scores.clear()
        metrics = self.judge.metrics(scores, self.objective)
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
            clip_(self.parameters(), self.stage.gradient_clip, self._sharded())

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
            how, swept = tables.optimizer or "adam", swept_of(self.model)
            optimizer = RowAdamW(rest, by_row, how, rate, settings, swept)
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
