# SPDX-License-Identifier: Apache-2.0
"""Every file of a model and of a run, damaged in every way: one line that names it, and nothing is
written."""

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import polars
import pytest
import torch
from builders import assert_same_weights, recipe, run, synthetic
from safetensors.torch import load_file, save_file

from fastrec.cli import main
from fastrec.cli_serve import recommend
from fastrec.data.dataset_files import digest
from fastrec.data.output import locked
from fastrec.nn.model_files import NAMES, TOKENIZER, write_digests
from fastrec.nn.user_model import UserModel
from fastrec.objectives.item import Item
from fastrec.objectives.parts import Objectives
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.training.checkpoint import write_checkpoint

FLAGS = [
    "--model.width=16", "--model.dropout=0.3", "--model.max_len=12", "--model.tokens=[cls, sep]",
    "--model.encoder.transformer.layers=1", "--users.fraction=0.7",
    "--pretraining={steps: 4, batch_size: 64, validate_every: 2, views: {main: [mask: {}]},"
    " objectives: {item: {}, user_attributes: {}}}",
]  # fmt: skip
EVERY = [*(name for name in NAMES if name != TOKENIZER), "digests.json"]


def flip(part: float):
    """Another bit at this part of a file."""

    def damage(file: Path, other: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(part * (len(content) - 1))] ^= 4
        file.write_bytes(content)

    return damage


def cut(part: float):
    return lambda file, other: file.write_bytes(
        file.read_bytes()[: int(part * file.stat().st_size)]
    )


DAMAGES = {
    "missing": lambda file, other: file.unlink(),
    "empty": cut(0),
    "half": cut(0.5),
    "almost whole": cut(0.99),
    "longer": lambda file, other: file.write_bytes(file.read_bytes() + b"x"),
    "of another run": lambda file, other: shutil.copy(other, file),
    **{f"a bit at {part}": flip(part) for part in (0, 0.02, 0.3, 0.7, 1)},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set and two runs, with other settings, users and seeds."""
    folder = tmp_path_factory.mktemp("made")
    synthetic(folder, num_users=80, num_items=30)
    for name, seed in (("run", 0), ("other", 1)):
        dropout = "--model.dropout=0.3" if name == "run" else "--model.dropout=0.2"
        main(
            ["pretrain", *FLAGS, f"--data={folder / 'data'}", f"--output={folder / name}",
             f"--seed={seed}", f"--users.seed={seed}", dropout]
        )  # fmt: skip
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path


def tree(folder: Path) -> dict[str, str]:
    return {str(path): digest(path) if path.is_file() else "" for path in folder.rglob("*")}


def same(file: Path, other: Path) -> bool:
    return file.is_file() and digest(file) == digest(other)


def refused(where: Path, arguments: list[str], named: str) -> str:
    """The command ends with one line that names this file or folder, and changes nothing."""
    before = tree(where)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = str(stopped.value)
    assert said.startswith("fastrec: error: ") and "\n" not in said and len(said) < 1500
    assert named in said and tree(where) == before, said
    return said


def asks(made: Path, model: Path) -> dict[str, list[str]]:
    """The commands that read a model."""
    data, output = f"--data={made / 'data'}", model.parent.parent / "output"
    return {
        "recommend": ["recommend", data, f"--pretrained={model}", f"--output={output}.csv"],
        "embed": ["embed", data, f"--pretrained={model}", f"--output={output}.parquet"],
        "evaluate": ["evaluate", *FLAGS, data, f"--pretrained={model}", f"--output={output}.json"],
        "finetune": ["finetune", *FLAGS, data, f"--init={model}", f"--output={output}",
                     "--task=pretraining"],
    }  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_a_damaged_file_of_a_model(made, copy, name):
    model = copy / "run" / "model"
    for number, damage in enumerate(DAMAGES.values()):
        shutil.rmtree(model)
        shutil.copytree(made / "run" / "model", model)
        damage(model / name, made / "other" / "model" / name)
        if same(model / name, made / "run" / "model" / name):
            continue  # both runs are of the same items
        command = list(asks(made, model).values())[number % 4]
        refused(copy, command, str(model) if name == "digests.json" else str(model / name))


@pytest.mark.parametrize("command", ["recommend", "embed", "evaluate", "finetune"])
@pytest.mark.parametrize("name", ["model.safetensors", "heads.safetensors"])
def test_weights_that_are_not_finite(made, copy, command, name):
    model = copy / "run" / "model"
    state = load_file(model / name)
    state[sorted(state)[0]].view(-1)[-1] = torch.nan
    with_scales = {"scales": '{"user_attributes": []}'}
    save_file(state, model / name, with_scales)
    write_digests(model)  # as if it had been saved like this
    arguments = asks(made, model)[command]
    if name.startswith("heads"):
        if command != "finetune":
            return  # they do not read it
        arguments.append("--pretraining.init.take=[items, encoder, head, user_attributes]")
    assert "is not finite" in refused(copy, arguments, str(model / name))


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        ("recommend", "item_head.norm.weight", "states of the model are not finite"),
        ("embed", "encoder.layers.0.ffn_norm.weight", "user vectors of the model are not"),
    ],
)
def test_finite_weights_that_lead_to_infinite_numbers(made, copy, command, name, message):
    model = copy / "run" / "model"
    state = load_file(model / "model.safetensors")
    state[name] = torch.full_like(state[name], 3e38)
    save_file(state, model / "model.safetensors")
    write_digests(model)
    refused(copy, asks(made, model)[command], message)


def test_scores_beyond_what_a_number_can_be(made, copy):
    command = asks(made, copy / "run" / "model")["recommend"]
    refused(copy, [*command, "--logit_adjustment=1e300"], "logit_adjustment is 1e+300")


def places(values: dict, path: tuple = ()) -> list[tuple]:
    """The paths of all keys of a JSON object."""
    found = []
    for key, value in values.items():
        found.append((*path, key))
        found += places(value, (*path, key)) if isinstance(value, dict) else []
    return found


WRONG = (None, "x", "", -1, 0, 1.5, 10**30, float("nan"), float("inf"), True, [], [1], {}, {"a": 1})


@pytest.mark.parametrize("name", ["config.json", "trained_on.json", "digests.json"])
def test_wrong_values_in_the_json_of_a_model(made, copy, name):
    """As if they had been saved like this: the digest is right. What a model may be is read."""
    model = copy / "run" / "model"
    whole = json.loads((model / name).read_text())
    said, output = [], copy / "output.csv"
    for path, wrong in product(places(whole), WRONG):
        values = json.loads(json.dumps(whole))
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        if inner[path[-1]] == wrong and type(inner[path[-1]]) is type(wrong):
            continue
        inner[path[-1]] = wrong
        (model / name).write_text(json.dumps(values))
        if name != "digests.json":
            write_digests(model)
        before = tree(copy)
        try:
            recommend(made / "data", model, output)
        except ValueError as stopped:
            said.append(str(stopped))
            assert "\n" not in said[-1] and str(model) in said[-1] and tree(copy) == before
            assert len(said[-1]) < 1000
        else:
            output.unlink()
            allowed = {"heads", "causal", "pre_norm", "norm_eps", "scale", "dropout", "steps",
                       "stage", "run", "events", "patch", "layers", "head_bias_start",
                       "head_temperature"}  # fmt: skip
            # A group that names nothing has its defaults, as in a model of an earlier fastrec.
            assert name != "digests.json", (path, wrong)
            assert path[-1] in allowed or (path == ("items",) and wrong == {}), (path, wrong)
    assert len(said) > 30


@pytest.mark.parametrize("content", ["", "[]", "7", "{", '{"a": 1}', "[" * 100_000, "\xff\x00"])
@pytest.mark.parametrize("name", ["config.json", "trained_on.json", "digests.json"])
def test_json_that_is_none_or_another_one(made, copy, name, content):
    model = copy / "run" / "model"
    (model / name).write_bytes(content.encode("latin-1"))
    if name != "digests.json":
        write_digests(model)
    if (name, content) == ("trained_on.json", '{"a": 1}'):
        return  # of a model that was saved otherwise
    refused(copy, asks(made, model)["recommend"], str(model))


def resume(made: Path, folder: Path) -> list[str]:
    return ["pretrain", *FLAGS, f"--data={made / 'data'}", f"--output={folder}", "--resume=true"]


@pytest.mark.parametrize("name", ["last.ckpt", *(f"model/{name}" for name in EVERY)])
def test_a_damaged_file_of_a_run_that_is_resumed(made, copy, name):
    folder = copy / "run"
    for damage in DAMAGES.values():
        shutil.rmtree(folder)
        shutil.copytree(made / "run", folder)
        damage(folder / name, made / "other" / name)
        if same(folder / name, made / "run" / name):
            continue
        where = str(folder / ("model" if name.endswith("digests.json") else name))
        said = refused(copy, resume(made, folder), where)
        assert "digests" in said or "cannot be read" in said or "missing" in said or "seed" in said


def test_what_is_there_for_people_is_written_again(made, copy):
    names = ("recipe.json", "stage.json", "summary.json")
    folder, before = copy / "run", [(made / "run" / name).read_text() for name in names[:2]]
    for name in names:
        (folder / name).write_text("{")
    (folder / "metrics" / "version_mine").mkdir()
    main(resume(made, folder))
    assert [(folder / name).read_text() for name in names[:2]] == before
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4
    assert_same_weights(made / "run", folder)


def test_the_model_of_another_run_is_not_the_best_of_this_one(made, copy):
    shutil.rmtree(copy / "run" / "model")
    shutil.copytree(made / "other" / "model", copy / "run" / "model")
    said = refused(copy, resume(made, copy / "run"), str(copy / "run" / "model"))
    assert "is of another run than" in said


@pytest.mark.parametrize("state", [{"x": 1}, [1], {"global_step": "4", "run": {}, "kept": True}])
def test_the_checkpoint_of_something_else(made, copy, state):
    write_checkpoint(state, copy / "run" / "last.ckpt")
    refused(copy, resume(made, copy / "run"), "last.ckpt cannot be read")
    torch.save(state, copy / "run" / "last.ckpt")
    assert "of another or earlier program" in refused(copy, resume(made, copy / "run"), "last.ckpt")


def test_two_commands_in_one_folder(made, copy):
    for command in (resume(made, copy / "run"), resume(made, copy / "run")[:-1]):
        with locked(copy / "run"):
            assert "is being written by process" in refused(copy, command, str(copy / "run"))
    commands = asks(made, copy / "run" / "model").values()
    for command, ending in zip(commands, ("csv", "parquet", "json"), strict=False):
        with locked(copy / (output := f"output.{ending}")):
            assert "is being written by process" in refused(copy, command, output)
    with locked(copy / "sweep"):
        refused(
            copy, ["sweep", *FLAGS, f"--data={made / 'data'}", f"--output={copy / 'sweep'}",
                   "--key=model.dropout", "--values=[0.1]"], "sweep is being written by process"
        )  # fmt: skip
    with locked(copy / "demo"):
        refused(copy, ["demo", f"--output={copy / 'demo'}"], "demo is being written by process")


def test_an_output_that_is_there_is_replaced_where_it_is_said(made, copy):
    for name in ("recommend", "embed", "evaluate"):
        command = asks(made, copy / "run" / "model")[name]
        output = Path(command[-1].partition("=")[2])
        main(command)
        first = output.read_bytes()
        output.write_text("mine")
        said = refused(copy, command, str(output))
        assert "is there already; --overwrite true replaces it" in said
        main([*command, "--overwrite=true"])
        assert output.read_bytes() == first
    assert {path.name for path in copy.iterdir()} == {
        "run", "output.csv", "output.parquet", "output.json",
    }  # fmt: skip


def test_a_table_that_cannot_be_finished_is_not_there(made, copy, monkeypatch):
    def fails(frame, file):
        file.write(b"half a table")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(polars.DataFrame, "write_csv", fails)
    said = refused(copy, asks(made, copy / "run" / "model")["recommend"], str(copy / "output.csv"))
    assert "cannot be written: [Errno 28] No space left on device" in said


def test_weights_that_are_not_finite_replace_no_checkpoint(made, tmp_path):
    """This rate spoils the weights in some steps, and the losses are looked at after 40."""
    parts = Objectives(item=Item(), user_attributes=UserAttributes())
    spoilt = recipe(
        objectives=parts, learning_rate=1e36, steps=40, validate_every=40, checkpoint_every=1
    )
    with pytest.raises(ValueError, match=r"after [1-9]\d* steps the weights are not finite, those"):
        run(made / "data", tmp_path / "run", spoilt)
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert state["global_step"] > 0
    assert all(bool(value.isfinite().all()) for value in state["state_dict"].values())
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "last.ckpt", "metrics", "validation", "tensorboard", "recipe.json", "stage.json",
    }  # fmt: skip
    with pytest.raises(ValueError, match="the weights are not finite, those"):
        run(made / "data", tmp_path / "run", spoilt, resume=True)


def test_users_are_remembered_in_every_data_set(made, copy):
    """Other people join: the random share is drawn anew, and holds out users that were trained."""
    from fastrec.data.prepare import prepare
    from fastrec.data.prepare.readers import RawData

    frame = polars.read_parquet(made / "data" / "interactions.parquet")
    old = polars.read_parquet(made / "data" / "users.parquet")
    events = frame.select(user_id="user", item_id="item", timestamp="timestamp")
    new = events.filter(polars.col("user_id") < 40).with_columns(polars.col("user_id") + 1000)
    users = polars.concat([old, old.head(40).with_columns(polars.col("user_id") + 1000)])
    raw = RawData("here", polars.concat([events, new]), users=users.drop("user"))
    prepare(raw, copy / "more")
    model = made / "run" / "model"
    command = ["evaluate", *FLAGS, f"--pretrained={model}", "--pretraining.judge=attributes"]
    main([*command, f"--data={made / 'data'}"])
    said = refused(copy, [*command, f"--data={copy / 'more'}"], str(model))
    known = np.load(model / "users.npy")
    assert "would be tested on users that it has seen" in said and len(known) == 56
    tune = ["finetune", *FLAGS, "--task=pretraining", "--pretraining.judge=attributes",
            f"--init={model}", f"--data={copy / 'more'}", f"--output={copy / 'tuned'}"]  # fmt: skip
    refused(copy, tune, str(model))
    main([*tune, "--pretraining.init.users=other"])
    own = np.load(copy / "tuned" / "model" / "users.npy")
    assert len(own) == 84, "other people of the same names are not counted"


def test_a_model_that_does_not_say_whom_it_has_seen(made, tmp_path):
    """From Python, where the model that it started from does not know it."""
    start = UserModel.from_pretrained(made / "run" / "model")
    run(made / "data", tmp_path / "first", recipe(steps=1), model=start)
    seen, after = (np.load(f / "model" / "users.npy") for f in (made / "run", tmp_path / "first"))
    assert np.isin(seen, after).all()
    start.seen_users = None
    run(made / "data", tmp_path / "run", recipe(steps=1), model=start)
    model = tmp_path / "run" / "model"
    assert not (model / "users.npy").exists()
    command = asks(made, model)["evaluate"] + ["--pretraining.judge=friends"]
    command.append("--evaluation.friend_negatives=5")
    command = [part for part in command if not part.startswith("--output")]
    with pytest.warns(UserWarning, match="model does not say which users it has seen"):
        main(command)
