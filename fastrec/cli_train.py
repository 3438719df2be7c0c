# SPDX-License-Identifier: Apache-2.0
"""The commands that take a recipe: `pretrain`, `finetune` and `evaluate`."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Literal

from fastrec import threads
from fastrec.backend import device_of
from fastrec.data.dataset import SequenceDataset
from fastrec.data.output import check_absent, check_table_path, locked_file, write_json
from fastrec.evaluation.protocol import protocol_of
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.model_files import read_json
from fastrec.nn.model_reading import check_model_folder
from fastrec.nn.text_model import TextModel
from fastrec.nn.user_model import UserModel
from fastrec.training.checkpoint import MODEL, SUMMARY
from fastrec.training.config import Recipe, Users
from fastrec.training.evaluate import evaluate_stage
from fastrec.training.model_folder import load_model, read_trained_on
from fastrec.training.processes import first_process, group_of_launcher
from fastrec.training.stage import Stage
from fastrec.training.start import warn_of_settings


def pretrain(recipe: Recipe, data: Path, output: Path, resume: bool = False, device: str = "auto"):
    """Train the first stage of a recipe, `pretraining`, on a prepared data set.

    Args:
        data: folder written by `fastrec prepare`.
        output: folder of the run; the best model on validation is in `output/model`.
        resume: go on from the last checkpoint in `output`.
        device: cpu, cuda or cuda:N; auto is all GPUs, or the CPU.
    """
    from fastrec.training.fit import fit  # Lightning, 3 s: other commands do without it

    dataset = SequenceDataset.load(data)
    recipe.stage("pretraining")
    _print_threads()
    fit(dataset, recipe=recipe, stage="pretraining", output=output, resume=resume, device=device)
    _print_run(output)


def finetune(
    recipe: Recipe,
    data: Path,
    output: Path,
    task: str | None = None,
    init: Path | None = None,
    new_items_like: str | None = None,
    resume: bool = False,
    device: str = "auto",
):
    """Train another stage of a recipe: next-item recommendation, user profiles, friends, or items
    of another catalogue.

    Args:
        data: folder written by `fastrec prepare`.
        output: folder of the run; the best model on validation is in `output/model`.
        task: name of the stage, such as recommendation, profile, relation, cold_start or click;
            recommendation if the recipe has it, else pretraining.
        init: folder of a pre-trained model; random weights without it.
        new_items_like: column of item attributes: items that the model does not know begin as the
            mean of known ones of the same category; without it as the mean of all.
        resume: go on from the last checkpoint in `output`.
        device: cpu, cuda or cuda:N; auto is all GPUs, or the CPU.
    """
    from fastrec.training.fit import fit

    dataset = SequenceDataset.load(data)
    task = task or _default_task(recipe)
    stage = recipe.stage(task)
    initial = None
    if init is not None:
        same_items = bool({"items", "head"} & set(stage.init.take))
        held_out = _held_out(recipe, stage) if stage.init.users == "same" else None
        # Other people have no vectors there: theirs start anew.
        same_users = bool({"head", "users"} & set(stage.init.take)) and stage.init.users == "same"
        initial = load_model(init, dataset, held_out, same_items, same_users, new_items_like)
    _print_threads()
    if first_process():
        print(f"stage {task}: {'from random weights' if init is None else f'from {init}'}")
    fit(
        dataset,
        initial,
        recipe=recipe,
        stage=task,
        output=output,
        initial_folder=init,
        resume=resume,
        device=device,
    )
    _print_run(output)


def evaluate(
    recipe: Recipe,
    data: Path,
    pretrained: Path,
    task: str | None = None,
    split: Literal["valid", "test"] = "test",
    output: Path | None = None,
    ranks: Path | None = None,
    adapter: Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
):
    """Measure a model as a stage of the recipe judges it, beside a baseline. Without --config the
    recipe is that of the model. The processes of torchrun share the users.

    Args:
        data: folder written by `fastrec prepare`.
        pretrained: folder of a model (`RUN/model`).
        task: name of the stage whose judge is asked; the one that the model was trained by, if the
            recipe has it. The next item of each user is ranked beside popularity and by length of
            the sequence; attributes of held-out users are predicted beside mean and most frequent
            class; their friends are found beside shared items ("Sim"); items of another catalogue
            are ranked beside popularity; clicks are told from other items beside popularity or the
            share of clicks of an item; ratings are predicted beside their mean and beside biases
            of items and users; of the judge vectors, two dropout passes of a user are
            compared, and users with each other.
        split: which held-out events, for the next item, ratings and clicks; which input, for
            vectors; which rows, for cold start.
        output: JSON file for the metrics.
        ranks: .csv or .parquet file for user_id, item_id (the held-out item) and its rank, of
            next items and cold start.
        adapter: folder of `fastrec adapter`: patches and heads that the model gets.
        overwrite: replace a file `output` or `ranks`.
        device: cpu, cuda or cuda:N; auto is a GPU, or the CPU.
    """
    if ranks is not None:
        check_table_path(ranks)
        check_absent(ranks, overwrite)
    written = output if first_process() else None
    with contextlib.nullcontext() if written is None else locked_file(written, overwrite):
        with group_of_launcher(device_of(device)) as group:
            ranks = ranks if first_process() else None
            result = _evaluate(recipe, data, pretrained, task, split, ranks, adapter, device, group)
        if written is not None:
            write_json(written, result)


def _evaluate(
    recipe: Recipe,
    data: Path,
    pretrained: Path,
    task: str | None,
    split: str,
    ranks: Path | None,
    adapter: Path | None,
    device: str,
    group,
) -> dict:
    dataset = SequenceDataset.load(data)
    check_model_folder(pretrained)  # without it there is no recipe, which would be missed first
    heads = adapter or pretrained  # the folder that says what the model was trained for
    made = read_trained_on(heads).get("stage")
    task = task or (made if made in recipe.stages else _default_task(recipe))
    stage = recipe.stage(task)
    asked = stage.judge_kind.next_item  # other judges read no user vectors
    held_out = _held_out(recipe, stage)
    trained = load_model(pretrained, dataset, held_out, same_users=asked, adapter=adapter)
    config = trained.config  # a stage may have another dropout, and patches
    asks = dataclasses.replace(recipe.model, dropout=config.dropout, encoder=config.encoder)
    if recipe.model != ModelConfig():
        warn_of_settings(asks, config)
    if recipe.texts is not None and isinstance(trained, TextModel):
        warn_of_settings(recipe.texts, trained.texts.settings, "texts")
    if asked:
        _say_other_protocol(trained, recipe)
        _say_other_events(trained, dataset)
    trained = trained.to(device_of(device))
    return evaluate_stage(dataset, recipe, stage, trained, heads, split, ranks, group)


def _default_task(recipe: Recipe) -> str:
    return "recommendation" if "recommendation" in recipe.stages else "pretraining"


def _print_threads() -> None:
    if first_process():
        print(threads.described())


def _print_run(output: Path) -> None:
    """The best step, its metrics, and where everything is."""
    if not first_process():
        return
    run = read_json(output / SUMMARY)
    known = {name: value for name, value in run["valid"].items() if value is not None}
    best = ", ".join(f"{name} {value:.4f}" for name, value in known.items())
    print(f"best on validation: step {run['best_step']:,} of {run['steps']:,}: {best}")
    print(f"model: {output / MODEL}\nlogs: {output}/metrics, /validation and /tensorboard")


def _say_other_protocol(model: UserModel | TextModel, recipe: Recipe) -> None:
    """A model remembers how it was validated: numbers under two protocols are not compared."""
    chosen = protocol_of(model)
    if chosen is not None and str(chosen) != str(recipe.evaluation):
        print(f"the model was chosen by another protocol: {chosen}")


def _say_other_events(model: UserModel | TextModel, dataset) -> None:
    """A model may have been trained on events that another split holds out."""
    known = model.trained_on.get("events")
    if known is not None and known != dataset.events_hash:
        print("the model was trained on other events or another split: it may have seen these")


def _held_out(recipe: Recipe, stage: Stage) -> Users | None:
    """The users that a stage is tested on, where these are not trained on."""
    return recipe.users if stage.judge_kind.held_out else None
