# SPDX-License-Identifier: Apache-2.0
"""Run one stage with Lightning: loggers, checkpoints to resume from, the best model kept."""

import contextlib
import dataclasses
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fastrec.backend import device_of, unavailable_reason
from fastrec.data.output import locked, write_json
from fastrec.nn.encoders.parts import settings_of
from fastrec.nn.model_reading import check_built
from fastrec.nn.sharded import whole_state
from fastrec.nn.text_model import TextModel
from fastrec.nn.transfer import report, trained_share
from fastrec.nn.user_model import UserModel
from fastrec.training.assembly import assembled, check_arguments
from fastrec.training.callbacks import Interrupted, KeepBest
from fastrec.training.checkpoint import (
    LAST,
    MODEL,
    SUMMARY,
    TRANSFER,
    check_free,
    check_resumed,
    identity,
    plain,
    short,
    start_run,
    started_from,
    tidy_run,
)
from fastrec.training.config import STAGES, Recipe, from_groups
from fastrec.training.logs import flat
from fastrec.training.model_folder import hashes, save_model
from fastrec.training.module import StageModule
from fastrec.training.processes import (
    Processes,
    check_one_gpu,
    first_process,
    let_go_at_exit,
    on_its_own,
    processes_of,
)
from fastrec.training.stage import STAGE_KEYS, Stage
from fastrec.training.start import (
    check_dtype,
    scores_items,
    seen_by_run,
    text_data,
    with_causal,
    with_dropout,
    with_model,
    with_texts,
)
from fastrec.training.trainer import Around, trainer_of


def fit(
    dataset,
    model: UserModel | TextModel | None = None,
    *,
    recipe: Recipe | None = None,
    stage: str = "pretraining",
    output: Path | str | None = None,
    initial_folder: Path | str | None = None,
    resume: bool = False,
    device: str = "auto",
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    **settings,
) -> UserModel | TextModel:
    """Train one stage and return the model that was best on validation; where it reads the texts
    of items, as a `TextModel`.

    From Python, `fit(dataset, model, views=.., objectives=.., steps=..)` is a stage of its own; a
    recipe and the name of one of its stages is what the command line gives.

    Writes into `output`: `model/` (best on validation, `UserModel.from_pretrained`, with the
    parameters of the objectives in heads.safetensors), `last.ckpt` (to resume from), `metrics/` and
    `validation/` (CSV), `tensorboard/`, `recipe.json` (the whole recipe), `stage.json` (the stage),
    `summary.json`, and `transfer.json` (the tensors that were taken from `model`, those that are
    new, and those that are trained, by name).

    Args:
        model: start from this model instead of random weights of `recipe.model`; it is not changed
            and keeps its own settings. It is validated first, and kept if training does not improve
            on it. What is taken from it and what is frozen is `init` of the stage; a parameter that
            is taken and needs no gradient is frozen too.
        recipe: model, stages, users, evaluation, seed.
        stage: of the recipe.
        output: folder of the run; None: a temporary one, nothing is kept but the model, which one
            process trains.
        initial_folder: of `model`: objectives that `init.take` names are taken over from there,
            and the users that it was trained on count as seen.
        resume: go on from `output/last.ckpt`; ends with the same bits as an uninterrupted run. What
            the run was started with must be the same but for `checkpoint.MAY_CHANGE`.
        device: "cpu", "cuda", "cuda:1", ..; "auto": all GPUs, or the CPU.
        progress: a bar in a terminal, elsewhere a line for each validation.
        callbacks, loggers: Lightning's, beside those of fastrec.
        settings: fields of `Stage`, which replace those of the stage.

    Raises:
        FileExistsError: `output` holds a run and `resume` is off, or another process is writing it.
        FileNotFoundError: nothing to resume.
        ValueError: `last.ckpt` or the best model is damaged or of a run with other settings, or the
            stage cannot run as it says. Nothing is written then.
        KeyboardInterrupt: Ctrl-C; `output/last.ckpt` holds all steps that were done.
    """
    check_arguments(dataset, model, callbacks=callbacks, loggers=loggers)
    around = Around(device, progress, callbacks, loggers)
    if recipe is not None and not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, Recipe.load({recipe!r}) for one")
    whole = recipe or Recipe()
    initial_folder = None if initial_folder is None else Path(initial_folder)
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
    if stage not in whole.stages and "objectives" not in settings:
        lacks = f"the recipe has no stage {stage!r}" if recipe else "no recipe is given"
        raise ValueError(f"there is no objective to train: {lacks}, nor views and objectives")
    if unknown := [key for key in settings if key not in STAGE_KEYS]:
        raise TypeError(f"{unknown[0]!r} is no key of a stage; those are {STAGE_KEYS}")
    chosen = dataclasses.replace(whole.stages.get(stage) or Stage(), **from_groups(settings))
    if not chosen.parts:
        having = [name for name, each in whole.stages.items() if each.parts]
        raise ValueError(f"there is no objective to train in stage {stage!r}; stages are {having}")
    with contextlib.ExitStack() as inside:
        if output is None:
            chosen = _alone(chosen, resume)
            folder = Path(inside.enter_context(tempfile.TemporaryDirectory())) / "run"
        else:
            folder = Path(output)
            inside.enter_context(locked(folder) if first_process() else contextlib.nullcontext())
        inside.enter_context(on_its_own())
        try:
            return _fit(
                dataset, model, whole, stage, chosen, folder, initial_folder, resume, around
            )
        except KeyboardInterrupt:
            if output is not None:
                raise
            message = "Ctrl-C: nothing is kept of a run without an output folder"
            raise KeyboardInterrupt(message) from None


def _alone(current: Stage, resume: bool) -> Stage:
    """A stage whose folder ends with it: of one process, others would have their own folders."""
    if resume:
        raise ValueError("a run without an output folder cannot be resumed")
    if current.devices not in ("auto", 1) or current.num_nodes > 1:
        raise ValueError(
            f"devices is {current.devices} and num_nodes {current.num_nodes}: several processes"
            " need an output folder, the same for all"
        )
    return dataclasses.replace(current, devices=1)


def _fit(
    dataset,
    given: UserModel | TextModel | None,
    recipe: Recipe,
    stage: str,
    current: Stage,
    output: Path,
    initial_folder: Path | None,
    resume: bool,
    around: Around,
) -> UserModel | TextModel:
    initial = given.model if isinstance(given, TextModel) else given
    if initial is not None:
        check_dtype(initial, "the model to start from")
        if type(initial) is not UserModel:  # a stage makes and reads the class itself
            raise TypeError(f"fit trains a UserModel: {type(initial).__name__} is another class")
        check_built(initial)
    recipe = with_texts(recipe, initial)
    if recipe.texts is not None:
        dataset = text_data(dataset, recipe.texts, initial, output / MODEL if resume else None)
    recipe = _with_start(recipe, stage, current, initial)
    recipe = dataclasses.replace(recipe, **{stage: current})  # type: ignore[arg-type]
    encoder = settings_of(with_causal(recipe.model, current.init.causal).encoder)
    where = _processes(around.device, current)
    start = _begun(dataset, recipe, stage, output, encoder, initial, resume)
    run = identity(dataset, recipe, stage)
    made = assembled(dataset, recipe, current, given, initial_folder, where)
    trained, objective = made.trained, made.objective
    module = StageModule(trained, objective, current, made.loader, made.data.judge, output)
    kept = output / MODEL if resume else None
    trained.trained_on = {
        "items": dataset.items_hash,
        "events": dataset.events_hash,
        "stage": stage,
        "run": short(run),
        "scores_items": scores_items(current, initial, kept),
    }
    if trained.num_users:
        trained.trained_on["users"] = dataset.users_hash
    trained.seen_users = seen_by_run(
        dataset, made.data.people, recipe, current, initial, initial_folder, kept
    )
    trained.known_items, trained.recipe = hashes(dataset.item_ids()), plain(recipe)

    def save(steps: int) -> None:
        trained.trained_on["steps"] = steps
        with whole_state(trained, output) as state:
            if first_process():
                save_model(output / MODEL, trained, objective, state)

    keep = KeepBest(save)
    output.mkdir(parents=True, exist_ok=True)
    if first_process():
        start_run(output, dataset, recipe, stage, resume)
        if initial is not None and not resume:
            _report(output, trained, objective, made.taken, around.progress)
    begun = {**run, "init": start}
    trainer = trainer_of(output, begun, current, keep, str(made.data), around, where)
    for logger in trainer.loggers:
        logger.log_hyperparams(flat(trained.recipe))
    parameters = trained_share(trained, objective)
    began, worked = time.perf_counter(), time.process_time()
    if initial is not None and not resume:
        trainer.validate(module, verbose=False)
    _train(trainer, module, output, resume)
    summary = {
        "steps": trainer.global_step,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
        f"valid {current.monitored}": keep.best,
        "best_step": keep.step,
        "valid": keep.metrics,
        "users": len(made.data.people),
        "parameters": parameters[1],
        "trained": parameters[0],
        "taken": made.taken,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if trainer.is_global_zero:
        write_json(output / SUMMARY, summary)
    trainer.strategy.barrier()
    best = UserModel.from_pretrained(output / MODEL, encoder)
    return best if recipe.texts is None else TextModel(best, dataset)


def _processes(device: str, current: Stage) -> Processes:
    """Where a stage runs. Raises ValueError for what cannot run there."""
    where = processes_of(device_of(device), current.devices, current.num_nodes)
    if where.total > 1:
        let_go_at_exit()
    if current.cuda_graph:
        check_one_gpu(where, current.devices)
    name = current.backend or "reference"
    if why := unavailable_reason(name, "linear_cross_entropy", where.device):
        raise ValueError(f"backend is {name!r}: {why}")
    return where


def _begun(
    dataset,
    recipe: Recipe,
    stage: str,
    output: Path,
    encoder,
    initial: UserModel | None,
    resume: bool,
) -> str | None:
    """What the run in `output` starts or started from, see `started_from`. Raises an error, as
    `fit` says, if the folder is not free or holds nothing that can be resumed."""
    if first_process():
        tidy_run(output)
    start = started_from(initial)
    if resume:
        run = identity(dataset, recipe, stage)
        return check_resumed(output, run, recipe.stage(stage).steps, encoder, start)
    if first_process():
        check_free(output, dataset, recipe, stage)
    return start


def _with_start(recipe: Recipe, stage: str, current: Stage, initial: UserModel | None) -> Recipe:
    """The recipe with the settings of the model that the stage starts from."""
    if initial is not None:
        try:
            return with_model(recipe, initial, current, stage)
        except ValueError as error:
            raise ValueError(f"{stage} cannot start from that model: {error}") from error
    if current.init.freeze or current.init.patch or current.init.ids:
        raise ValueError(
            f"{stage}: init freezes or patches a model, or gives it ids, and there is none to start"
            " from (--init)"
        )
    return dataclasses.replace(recipe, model=with_dropout(recipe.model, current))


def _train(trainer, module: StageModule, output: Path, resume: bool) -> None:
    """All steps of the run, in a process that a signal ends as one that it has stopped."""
    try:
        trainer.fit(module, ckpt_path=output / LAST if resume else None, weights_only=True)
    except SIGTERMException as stop:  # a SystemExit with status 0
        print(f"fastrec: SIGTERM ended the run in {output}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from stop
    except Interrupted as stop:  # Lightning would end the process for a KeyboardInterrupt
        raise KeyboardInterrupt(str(stop)) from None


def _report(output: Path, model: UserModel, objective, taken: list[str], say: bool) -> None:
    """Write transfer.json, and say how much of a model is taken and how much is trained."""
    made = report(taken, model, objective.parts)
    write_json(output / TRANSFER, made)
    if say:
        some, whole = trained_share(model, objective)
        # The vectors of special tokens are taken, and are rows of a table that is new.
        tensors = len({name.partition(":")[0] for name in [*made["taken"], *made["new"]]})
        print(
            f"trained: {some:,} of {whole:,} parameters ({some / whole:.1%}); taken over:"
            f" {len(made['taken'])} of {tensors} tensors, see {TRANSFER} of the run",
            flush=True,
        )
