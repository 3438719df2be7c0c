"""Run one stage with Lightning: loggers, checkpoints to resume from, the best model kept."""

import copy
import dataclasses
import json
import logging
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fastrec.backend import unavailable_reason
from fastrec.data.loader import SequenceLoader
from fastrec.data.views import Views
from fastrec.nn.encoders.parts import settings_of
from fastrec.nn.transfer import PARTS, freeze, take, trained_share
from fastrec.nn.user_model import ModelConfig, UserModel
from fastrec.objectives.joint import JointObjective
from fastrec.training.callbacks import KeepBest, SaveToResume
from fastrec.training.checkpoint import (
    check_checkpoint,
    check_free,
    check_same_run,
    describe_model,
    describe_run,
    first_process,
    load_heads,
)
from fastrec.training.config import Init, Recipe, Stage
from fastrec.training.module import StageModule
from fastrec.training.stage_data import stage_data


def fit(
    dataset,
    model: UserModel | None = None,
    *,
    recipe: Recipe | None = None,
    stage: str = "pretraining",
    output: Path | str | None = None,
    initial_folder: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings,
) -> UserModel:
    """Train one stage and return the model that was best on validation.

    From Python, `fit(dataset, model, views=.., objectives=.., steps=..)` is a stage of its own; a
    recipe and the name of one of its stages is what the command line gives.

    Writes into `output`: `model/` (best on validation, `UserModel.from_pretrained`, with the
    parameters of the objectives in heads.safetensors), `last.ckpt` (to resume from), `metrics/`
    (CSV), `tensorboard/`, `recipe.json` (the whole recipe), `stage.json` (the stage),
    `summary.json`.

    Args:
        model: start from this model instead of random weights of `recipe.model`; it is not changed
            and keeps its own settings. It is validated first, and kept if training does not improve
            on it. What is taken from it and what is frozen is `init` of the stage.
        recipe: model, stages, users, evaluation, seed.
        stage: of the recipe.
        output: folder of the run; None: a temporary one, nothing is kept but the model.
        initial_folder: of `model`: objectives that `init.take` names are taken over from there,
            and the users that it was trained on count as seen.
        resume: go on from `output/last.ckpt`; ends with the same bits as an uninterrupted run. What
            the run was started with must be the same but for `checkpoint.MAY_CHANGE`.
        settings: fields of `Stage`, which replace those of the stage.

    Raises:
        FileExistsError: `output` holds a run and `resume` is off. FileNotFoundError: nothing to
        resume. ValueError: `last.ckpt` cannot be read, is of a run with other settings, or the
        stage cannot run as it says. Nothing is written then.
    """
    if output is None:
        if resume:
            raise ValueError("a run without an output folder cannot be resumed")
        with tempfile.TemporaryDirectory() as folder:
            return fit(
                dataset, model, recipe=recipe, stage=stage, output=Path(folder) / "run",
                initial_folder=initial_folder, progress=progress, **settings,
            )  # fmt: skip
    recipe, output, initial = recipe or Recipe(), Path(output), model
    current = dataclasses.replace(recipe.stages.get(stage) or Stage(), **settings)
    if initial is not None:
        recipe = _with_model(recipe, initial, current.init)
    elif current.init.freeze or current.init.patch:
        raise ValueError(
            f"{stage}: init freezes or patches a model, and there is none to start from"
        )
    recipe = dataclasses.replace(recipe, **{stage: current})  # type: ignore[arg-type]
    checkpoint = output / "last.ckpt"
    if resume and not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint} is missing: there is no run to resume in {output}")
    if not resume and first_process():
        check_free(output)
    if resume:
        check_same_run(output, dataset, recipe, stage)
        check_checkpoint(checkpoint, current.steps)
    if current.cuda_graph:
        _check_one_gpu(current.devices)
    if current.backend is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if why := unavailable_reason(current.backend, "linear_cross_entropy", device):
            raise ValueError(f"backend is {current.backend!r}: {why}")

    torch.manual_seed(recipe.seed)
    trained, taken = _started(dataset, recipe.model, initial, current.init)
    data = stage_data(dataset, recipe, current)
    objective = JointObjective(current.parts, trained, data.side, current.backend)
    if initial_folder is not None:
        heads = [name for name in current.init.take if name not in PARTS]
        taken += load_heads(objective, initial_folder, only=heads)
    views = Views(current.views, trained.frame, data.side, recipe.model.max_len)
    loader = SequenceLoader(
        views,
        batch_size=current.batch_size,
        seed=recipe.seed,
        users=data.users,
        steps_per_pass=current.pass_steps,
    )
    module = StageModule(trained, objective, current, loader, data.judge)
    output.mkdir(parents=True, exist_ok=True)
    if first_process():
        describe_run(output, dataset, recipe, stage)
        (output / "summary.json").unlink(missing_ok=True)
    keep = KeepBest(
        output / "model",
        lambda folder: describe_model(folder, dataset, recipe, stage, initial_folder),
    )
    trainer = _trainer(output, current, keep, loader.steps_per_pass, progress)
    start = time.perf_counter()
    if initial is not None and not resume:
        trainer.validate(module, verbose=False)
    try:
        trainer.fit(module, ckpt_path=checkpoint if resume else None, weights_only=True)
    except SIGTERMException as stop:  # a SystemExit with status 0
        print(f"fastrec: SIGTERM ended the run in {output}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from stop
    parameters = trained_share(trained, objective)
    summary = {
        "steps": trainer.global_step,
        "seconds": round(time.perf_counter() - start, 1),
        f"valid {current.monitored}": keep.best,
        "users": len(data.users),
        "parameters": parameters[1],
        "trained": parameters[0],
        "taken": taken,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if trainer.is_global_zero:
        (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    trainer.strategy.barrier()
    return UserModel.from_pretrained(output / "model", settings_of(recipe.model.encoder))


def _trainer(
    output: Path, stage: Stage, keep: KeepBest, steps_per_pass: int, progress: bool
) -> lightning.Trainer:
    callbacks: list[Callback] = [
        keep,
        SaveToResume(output / "last.ckpt", stage.checkpoint_every, stage.patience),
    ]
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
    noises = (
        ".*does not have many workers.*", ".*exists and is not empty.*", ".*LeafSpec.*",
        ".*your dataloader is not resumable.*",  # it is: the batch of a step is a function of it
    )  # fmt: skip
    for noise in noises:
        warnings.filterwarnings("ignore", noise)
    devices = max(1, torch.cuda.device_count()) if stage.devices == "auto" else int(stage.devices)
    return lightning.Trainer(
        max_steps=stage.steps,
        max_epochs=stage.steps // stage.pass_steps,
        devices=stage.devices,
        # Which parameters the objectives read is theirs to know: the item head of a stage without
        # item prediction has no gradient, and DDP would wait for it.
        strategy="ddp_find_unused_parameters_true" if devices > 1 else "auto",
        precision=stage.precision,
        callbacks=callbacks,
        logger=[
            # Lightning deletes the CSV of an earlier run in the same folder: a new one each time.
            CSVLogger(output, name="metrics", version=_next_version(output / "metrics")),
            TensorBoardLogger(output, name="tensorboard", version=""),
        ],
        num_sanity_val_steps=0,
        enable_progress_bar=progress,
        enable_model_summary=False,
        log_every_n_steps=min(10, steps_per_pass),
        use_distributed_sampler=False,
    )


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


def _started(
    dataset, config: ModelConfig, initial: UserModel | None, init: Init
) -> tuple[UserModel, list[str]]:
    """The model that a stage trains, and the names of the tensors that `initial` gave it."""
    if initial is None:
        return UserModel(dataset.num_items, config), []
    whole = set(PARTS) <= set(init.take) and not init.patch
    if whole and initial.num_items == dataset.num_items:
        model, taken = copy.deepcopy(initial), list(initial.state_dict())
    else:
        model = UserModel(dataset.num_items, config)
        taken = take(model, initial, init.take)
    freeze(model, init.freeze)
    return model, taken


def _with_model(recipe: Recipe, initial: UserModel, init: Init) -> Recipe:
    """The recipe with the settings of the model that a stage starts from, and a warning if they
    differ."""
    config = initial.config
    if recipe.model != config and recipe.model != ModelConfig():
        asked, kept = dataclasses.asdict(recipe.model), dataclasses.asdict(config)
        other = [f"{n} {kept[n]!r}, not {asked[n]!r}" for n in kept if kept[n] != asked[n]]
        warnings.warn(
            f"the model to start from keeps its own settings: {', '.join(other)}", stacklevel=3
        )
    if init.patch:
        encoder = settings_of(config.encoder)
        if not hasattr(encoder, "patch"):
            raise ValueError(f"init.patch: {type(encoder).__name__} has no model patches")
        config = dataclasses.replace(config, encoder=dataclasses.replace(encoder, patch=init.patch))
    return dataclasses.replace(recipe, model=config)
