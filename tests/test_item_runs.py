# SPDX-License-Identifier: Apache-2.0
"""Models with attributes, ratings and time gaps on disk and on the command line."""

import json
import re

import polars as pl
import pytest
import torch
from builders import (
    Killed,
    assert_same_weights,
    killed_at,
    model_of,
)
from catalogue import PARTS, V, catalogue, model_with, summed
from safetensors.torch import load_file, save_file

from fastrec.cli import main
from fastrec.data.dataset import SequenceDataset
from fastrec.data.prepare import prepare
from fastrec.evaluation.next_item import next_item_queries
from fastrec.nn.item_parts import TimeGap
from fastrec.nn.items import Items
from fastrec.nn.model_config import num_parameters
from fastrec.nn.model_files import write_digests
from fastrec.nn.user_model import UserModel
from fastrec.serve import recommend


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return catalogue(tmp_path_factory.mktemp("items"))


@pytest.fixture(scope="module")
def dataset(folder):
    return SequenceDataset.load(folder / "data")


@pytest.mark.parametrize("items", [PARTS, summed(), Items(time_gap=TimeGap())])
def test_a_saved_model_needs_no_data_set(dataset, tmp_path, items):
    model = model_with(dataset, items)
    model.save_pretrained(tmp_path)
    again = UserModel.from_pretrained(tmp_path)
    batch = model.inputs(dataset, [1, 2, 3], "all", ask=True)
    assert torch.equal(model.encode(batch).states, again.encode(batch).states)
    assert again.config == model.config
    said = json.loads((tmp_path / "config.json").read_text())
    counts = {"genres": 4, "brand": 2}
    expected = {name: counts[name] for name in items.attributes}
    assert said.get("item_classes", {}) == expected == again.item_input.classes
    numbers = sum(part.numel() for part in load_file(tmp_path / "model.safetensors").values())
    assert num_parameters(V, model.config, item_sizes=expected) == numbers


def test_a_model_that_was_saved_before_there_were_parts_is_read(tmp_path):
    model_of(num_items=11).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    assert "item_classes" not in values
    values["items"] = {"scale": False}
    file.write_text(json.dumps(values))
    write_digests(tmp_path)
    assert UserModel.from_pretrained(tmp_path).config == model_of(num_items=11).config


def test_a_folder_that_does_not_fit_is_refused_by_name(dataset, tmp_path):
    model_with(dataset).save_pretrained(tmp_path)
    file, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole, state = json.loads(file.read_text()), load_file(weights)
    for change, message in (
        ({"item_classes": {"genres": 4}}, "item_classes must be the categories of ['genres', 'bra"),
        ({"item_classes": None}, "item_classes must be the categories of ['genres', 'brand'], got"),
        ({"item_classes": {"genres": 0, "brand": 2}}, "item_classes must be the categories of"),
        ({"item_classes": {"genres": 10**12, "brand": 2}}, "it describes a model of 300000000"),
    ):
        file.write_text(json.dumps(whole | change))
        write_digests(tmp_path)
        with pytest.raises(ValueError, match=re.escape(f"config.json: {message}")):
            UserModel.from_pretrained(tmp_path)
    file.write_text(json.dumps(whole))
    for wrong in (4, -2):
        table = state["item_input.attributes.0.table"].clone()
        table[5, 1] = wrong
        save_file(state | {"item_input.attributes.0.table": table}, weights)
        write_digests(tmp_path)
        with pytest.raises(ValueError, match=r"safetensors: the table of 'genres' has categories"):
            UserModel.from_pretrained(tmp_path)


RECIPE = """
base: cl4srec
model:
  width: 16
  max_len: 10
  encoder: {transformer: {layers: 1}}
  items:
    attributes: {genres: {width: 4, most: 2}, brand: {width: 4, most: 1}}
    rating: {low: 1, high: 5, step: 0.5, width: 4}
    time_gap: {width: 4}
pretraining: {steps: 6, batch_size: 20, validate_every: 3, checkpoint_every: 2, warmup_steps: 0}
"""


@pytest.fixture(scope="module")
def trained(folder):
    (folder / "recipe.yaml").write_text(RECIPE)
    main(["pretrain", f"--config={folder / 'recipe.yaml'}", f"--data={folder / 'data'}",
          f"--output={folder / 'run'}"])  # fmt: skip
    return folder


def test_a_model_with_parts_is_evaluated_asked_and_embedded(trained, dataset, tmp_path):
    model = UserModel.from_pretrained(trained / "run" / "model")
    assert model.item_input.classes == {"genres": 4, "brand": 2}
    asked = [f"--data={trained / 'data'}", f"--pretrained={trained / 'run' / 'model'}"]
    main(["evaluate", f"--config={trained / 'recipe.yaml'}", *asked,
          f"--output={tmp_path / 'metrics.json'}"])  # fmt: skip
    assert json.loads((tmp_path / "metrics.json").read_text())["users"] > 50
    main(["recommend", *asked, f"--output={tmp_path / 'best.csv'}", "--k=3", "--seen=none"])
    main(["embed", *asked, f"--output={tmp_path / 'users.parquet'}"])
    assert pl.read_parquet(tmp_path / "users.parquet").height == 61
    frame = pl.read_csv(tmp_path / "best.csv")
    users = torch.arange(dataset.num_users)
    query = next_item_queries(model, dataset, users, "all")
    best = (query @ model.item_table.T + model.item_head.bias).topk(3).indices
    assert frame["item_id"].to_list() == dataset.item_ids()[best.flatten().numpy()].tolist()
    # What else is known of the events is read: without it other items come first.
    alone = recommend(model, dataset, 3, seen="none", histories=[
        dataset.item_ids()[dataset.gather([user], "all").values.numpy()].tolist()
        for user in users.tolist()])  # fmt: skip
    assert alone["score"].to_list() != frame["score"].to_list()


def test_a_killed_run_with_parts_resumes_bit_for_bit(trained, tmp_path, monkeypatch):
    arguments = ["pretrain", f"--config={trained / 'recipe.yaml'}", f"--data={trained / 'data'}",
                 f"--output={tmp_path / 'run'}"]  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "training_step", 5)
        main(arguments)
    main([*arguments, "--resume=true"])
    assert_same_weights(trained / "run", tmp_path / "run")
    said = json.loads((tmp_path / "run" / "stage.json").read_text())
    assert {"rating", "time_gap"} <= said.keys(), "other ratings are another run"


def test_data_that_a_recipe_does_not_fit_ends_in_an_error_before_a_run(trained, tmp_path, capsys):
    def message(*flags, data=trained / "data") -> str:
        with pytest.raises((SystemExit, ValueError)) as error:
            main(["pretrain", f"--config={trained / 'recipe.yaml'}", f"--data={data}",
                  f"--output={tmp_path / 'run'}", *flags])  # fmt: skip
        assert not (tmp_path / "run" / "last.ckpt").exists()
        return str(error.value) + capsys.readouterr().err

    assert "model.items.rating has the levels 3 to 5" in message("--model.items.rating.low=3")
    assert "the attributes are ['genres', 'brand', 'price']" in message(
        "--model.items.attributes.director.width=4"
    )
    (tmp_path / "plain.txt").write_text("1 1 2 3 4\n2 4 3 2 1\n3 1 2 3 4\n")
    prepare(tmp_path / "plain.txt", tmp_path / "plain", format="s3rec")
    assert "the data set has no" in message(data=tmp_path / "plain")
