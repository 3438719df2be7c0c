# SPDX-License-Identifier: Apache-2.0
"""The Lightning trainer of a run: callbacks, loggers, devices."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from rich.console import Console

from fastrec.training.callbacks import (
    CheckpointFile,
    EndAtOnce,
    KeepBest,
    Patience,
    SaveToResume,
)
from fastrec.training.checkpoint import LAST
from fastrec.training.logs import TRAINING, VALIDATION, Csv, Lines, Speed
from fastrec.training.processes import Processes, started_outside
from fastrec.training.stage import Stage


class Around(NamedTuple):
    """What the weights of a run do not depend on."""

    device: str = "auto"
    progress: bool = True
    callbacks: Sequence[Callback] = ()
    loggers: Sequence[Logger] = ()


def trainer_of(
    output: Path,
    run: dict,
    stage: Stage,
    keep: KeepBest,
    who: str,
    around: Around,
    where: Processes,
) -> lightning.Trainer:
    callbacks: list[Callback] = [
        *around.callbacks,
        keep,
        Speed(),
        SaveToResume(output / LAST, run, stage.checkpoint_every, stage.patience),
        EndAtOnce(output),
    ]
    if stage.patience:
        callbacks.append(
            Patience(
                "valid",
                mode="max",
                patience=stage.patience,
                check_on_train_epoch_end=False,  # but after validation, before SaveToResume
            )
        )
    console = Console()
    bar = around.progress and (console.is_terminal or console.is_jupyter)
    if around.progress:
        callbacks.append(RichProgressBar() if bar else Lines(keep, who))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    noises = (
        ".*does not have many workers.*", ".*exists and is not empty.*", ".*LeafSpec.*",
        ".*your dataloader is not resumable.*",  # it is: the batch of a step is a function of it
        ".*torch.distributed is disabled, unavailable or uninitialized.*",  # shards of one process
        ".*Please add the following callbacks.*",  # patience 0 of a run that had some
    )  # fmt: skip
    for noise in noises:
        warnings.filterwarnings("ignore", noise)
    plugins: list = [CheckpointFile()]
    if where.total > 1 and started_outside():
        plugins.append(TorchElasticEnvironment())  # also where another launcher says the same
    return lightning.Trainer(
        max_steps=stage.steps,
        max_epochs=stage.steps // stage.pass_steps,
        accelerator=where.device.type,
        devices=where.each if where.device.index is None else [where.device.index],
        num_nodes=where.nodes,
        # Which parameters the objectives read is theirs to know: the item head of a stage without
        # item prediction has no gradient, and DDP would wait for it.
        strategy="ddp_find_unused_parameters_true" if where.total > 1 else "auto",
        precision=stage.precision,
        callbacks=callbacks,
        plugins=plugins,
        logger=[
            *around.loggers,
            Csv(output, TRAINING),
            Csv(output, VALIDATION),
            TensorBoardLogger(output, name="tensorboard", version=""),
        ],
        num_sanity_val_steps=0,
        enable_progress_bar=bar,
        enable_model_summary=False,
        log_every_n_steps=min(10, stage.pass_steps),
        use_distributed_sampler=False,
    )
