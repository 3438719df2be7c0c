# SPDX-License-Identifier: Apache-2.0
"""A run does not go on with other tables of users, items or friends than it was started with."""

import json

import polars as pl
import pytest
import torch

from fastrec import recipes
from fastrec.cli import main
from fastrec.data.dataset import SequenceDataset
from fastrec.data.prepare import prepare
from fastrec.data.settings import from_values
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.training.checkpoint import identity
from fastrec.training.config import Recipe
from fastrec.training.sweep import sweep

USERS, ITEMS = [f"u{u}" for u in range(40)], [f"i{i}" for i in range(17)]
EVENTS = [(USERS[u], ITEMS[(3 * u + k) % 17], k) for u in range(40) for k in range(6)]


def tables(turned: str | None) -> dict[str, pl.DataFrame]:
    """Those of users, items and friends; one of them has other values."""
    by = {name: int(name == turned) for name in ("users", "items", "relations")}
    ages = [(u + by["users"]) % 3 for u in range(40)]
    genres = [f"g{(i + by['items']) % 4}" for i in range(17)]
    friends = [USERS[(u + 1 + by["relations"]) % 40] for u in range(40)]
    return {
        "users": pl.DataFrame({"user_id": USERS, "age": ages}),
        "items": pl.DataFrame({"item_id": ITEMS, "genre": genres}),
        "relations": pl.DataFrame({"user": USERS, "friend": friends}),
    }


# Recipe, stage, what is set, and the tables that it reads.
READS = [
    ("uprec", "pretraining", {}, {"users", "relations"}),
    ("uprec-no-rel", "pretraining", {}, {"users"}),
    ("uprec", "relation", {}, {"users", "relations"}),
    ("sasrec", "pretraining", {}, set()),
    ("idicl", "profile", {}, {"users"}),
    ("bert4rec", "pretraining", {"model": {"items": {"attributes": {"genre": {}}}}}, {"items"}),
    ("s3rec", "pretraining", {}, {"items"}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data set, and three in which one table is another."""
    root = tmp_path_factory.mktemp("data")
    events = pl.DataFrame(EVENTS, schema=["user", "item", "time"], orient="row")
    for other in (None, *tables(None)):
        made = tables(other)
        prepare(
            events, root / str(other), user_attributes=made["users"],
            item_attributes=made["items"], relations=made["relations"],
        )  # fmt: skip
    return root


@pytest.mark.parametrize(("name", "stage", "flags", "read"), READS)
def test_the_identity_of_a_run_has_the_tables_that_it_reads(folders, name, stage, flags, read):
    values = recipes.load(name)
    values["model"] = {**values.get("model", {}), **flags.get("model", {})}
    recipe = from_values(Recipe, values)
    whole = identity(SequenceDataset.load(folders / "None"), recipe, stage)
    for other in tables(None):
        run = identity(SequenceDataset.load(folders / other), recipe, stage)
        assert (run != whole) == (other in read), other


def test_a_run_with_other_friends_is_not_resumed(folders, tmp_path):
    flags = [
        "pretrain", "--config=uprec", f"--output={tmp_path / 'run'}",
        "--pretraining.schedule=constant", "--pretraining.warmup_steps=0",
        "--pretraining.validate_every=2", "--pretraining.batch_size=20", "--model.max_len=8",
        "--evaluation.negatives=5", "--attributes=[{name: age}]",
    ]  # fmt: skip
    main([*flags, f"--data={folders / 'None'}", "--pretraining.steps=2"])
    for other in ("users", "relations"):
        with pytest.raises(SystemExit, match=rf"{other}\.parquet"):
            main([*flags, f"--data={folders / other}", "--pretraining.steps=4", "--resume=true"])
    main([*flags, f"--data={folders / 'items'}", "--pretraining.steps=4", "--resume=true"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4


@pytest.mark.parametrize("name", ["ccl", "coserec"])
def test_another_model_behind_the_same_path_is_another_run(folders, tmp_path, name):
    """The masked-item model of CCL, and that of similar items."""
    dataset, folder = SequenceDataset.load(folders / "None"), tmp_path / "model"
    values = recipes.load(name)
    key = {"filler": str(folder)} if name == "ccl" else {"similar": {"model": str(folder)}}
    values["pretraining"] |= key
    recipe, runs = from_values(Recipe, values), []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        UserModel(dataset.num_items, ModelConfig(width=8, max_len=8)).save_pretrained(folder)
        runs.append(identity(dataset, recipe, "pretraining"))
    assert runs[0] == runs[2] != runs[1]


def test_other_negatives_in_the_same_file_are_another_run(folders, tmp_path):
    dataset, file, runs = SequenceDataset.load(folders / "None"), tmp_path / "negatives.txt", []
    evaluation = {"candidates": "sampled", "negatives_file": str(file)}
    recipe = from_values(Recipe, recipes.load("sasrec") | {"evaluation": evaluation})
    for text in ("u0 i1 i2", "u0 i1 i3", "u0 i1 i2"):
        file.write_text(text)
        runs.append(identity(dataset, recipe, "pretraining"))
    assert runs[0] == runs[2] != runs[1]


def test_a_sweep_keeps_no_point_of_other_tables(folders, tmp_path):
    items = {"attributes": {"genre": {}}}
    chosen = Recipe.load("sasrec", model={"items": items, "width": 8}, steps=1, validate_every=1)
    asked = tmp_path / "sweep", "model.dropout", [0.1]
    sweep(chosen, folders / "None", *asked)
    with pytest.raises(ValueError, match="is from another recipe or data set"):
        sweep(chosen, folders / "items", *asked)
    sweep(chosen, folders / "users", *asked)  # which it does not read
