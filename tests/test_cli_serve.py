# SPDX-License-Identifier: Apache-2.0
"""The commands that ask a trained model."""

import json

import numpy as np
import polars
import pytest
import torch
from builders import synthetic

from fastrec import Recommender, UserModel, item_vectors, recipes
from fastrec.cli import main
from fastrec.cli_serve import read_histories, read_ids
from fastrec.data.dataset import SequenceDataset
from fastrec.data.settings import from_values
from fastrec.training.config import Recipe

SMALL = {"width": 8, "max_len": 6, "encoder": {"transformer": {"layers": 1}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of integer ids, a causal model and one with [MASK]."""
    folder = tmp_path_factory.mktemp("serve")
    dataset = SequenceDataset.load(synthetic(folder, num_users=50, num_items=40))
    for recipe in ("sasrec", "uprec-mip"):
        torch.manual_seed(0)
        config = from_values(Recipe, recipes.merged(recipes.load(recipe), {"model": SMALL})).model
        UserModel(dataset.num_items, config).save_pretrained(folder / recipe)
    return folder


@pytest.fixture
def call(folder, tmp_path, capsys):
    """Run a command; what it wrote as a frame, and what it said."""

    def run(command, name, recipe="sasrec", **flags):
        output = tmp_path / name
        flags = {"data": folder / "data", "pretrained": folder / recipe, "output": output, **flags}
        main([command, *(f"--{flag}={value}" for flag, value in flags.items())])
        read = polars.read_csv if output.suffix == ".csv" else polars.read_parquet
        return read(output), capsys.readouterr().out.removeprefix(f"{output}: ").strip()

    return run


def asked(folder, recipe="sasrec"):
    dataset = SequenceDataset.load(folder / "data")
    return Recommender(UserModel.from_pretrained(folder / recipe), dataset), dataset


def test_recommend_for_histories_with_allowed_and_blocked_items(folder, tmp_path, call):
    histories = [[3, "5", 3], [], ["x", 7]]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(each) + "\n" for each in histories))
    (tmp_path / "some.txt").write_text("".join(f"{item}\n" for item in range(20)))
    (tmp_path / "never.txt").write_text("2\n\n30\n")
    files = dict(histories=tmp_path / "h.jsonl", allowed=tmp_path / "some.txt",
                 blocked=tmp_path / "never.txt")  # fmt: skip
    with pytest.warns(UserWarning, match="1 of 5 items .* 'x'; 1 of 3 histories have no known"):
        found, said = call("recommend", "best.parquet", k=4, **files)
    assert said == (
        "8 rows, the 4 best items of 2 of 3 histories, items of the history left out,"
        " 20 items allowed, 2 blocked"
    )
    options = dict(allowed=range(20), blocked=[2, 30])
    recommender, _ = asked(folder)
    assert found["user_id"].to_list() == [0] * 4 + [2] * 4
    expected = recommender.recommend(4, histories=[[3, 5, 3]], **options)
    assert found[:4].equals(expected)
    assert not {2, 3, 5} & set(found["item_id"][:4]) and max(found["item_id"]) < 20
    (tmp_path / "never.txt").write_text("")  # today nothing is
    with pytest.warns(UserWarning):
        assert call("recommend", "nothing.parquet", k=4, **files)[1].endswith("allowed, 0 blocked")
    with pytest.warns(UserWarning, match=r"1 of 5 items of the histories are not known.*'x'$"):
        _, said = call("recommend", "m.csv", "uprec-mip", histories=files["histories"], seen="none")
    assert said == "30 rows, the 10 best items of 3 of 3 histories, items of the history included"


def test_an_id_is_a_line_as_it_stands(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_bytes(b" a\n\na \r\n\xc2\xa0b\n \n")
    assert read_ids(file) == [" a", "a ", "\u00a0b"]


def test_a_plot_that_cannot_be_drawn_leaves_nothing(folder, tmp_path, call):
    (tmp_path / "one.txt").write_text("3\n")
    flags = dict(users=tmp_path / "one.txt", plot=tmp_path / "new" / "u.png")
    with pytest.raises(SystemExit, match="a plane needs 2 vectors"):
        call("embed", "u.parquet", **flags)
    assert not (tmp_path / "u.parquet").exists()
    (tmp_path / "one.txt").write_text("3\n4\n")
    call("embed", "u.parquet", **flags)
    assert flags["plot"].is_file()


def test_similar_writes_the_nearest_items(folder, tmp_path, call):
    (tmp_path / "items.txt").write_text("7\n1\n")
    found, said = call("similar", "like.csv", items=tmp_path / "items.txt", k=3)
    assert said == "6 rows, the 3 most similar items of 2 items"
    assert found.columns == ["item_id", "rank", "similar_item_id", "score"]
    assert found["item_id"].to_list() == [7, 7, 7, 1, 1, 1]
    everything, said = call("similar", "all.parquet", k=3)
    assert said == "120 rows, the 3 most similar items of 40 items"
    assert everything.equals(asked(folder)[0].similar(k=3))
    np.testing.assert_allclose(found[:3]["score"], everything[21:24]["score"], rtol=1e-5)


@pytest.mark.parametrize("recipe", ["sasrec", "uprec-mip"])
def test_embed_writes_users_items_and_queries(folder, tmp_path, call, recipe):
    (tmp_path / "users.txt").write_text("7\n3\n")
    recommender, dataset = asked(folder, recipe)
    items, said = call("embed", "items.parquet", recipe, what="items")
    assert said == "40 item vectors of 8 numbers, with biases"
    assert items.equals(item_vectors(recommender.model, dataset))
    queries, said = call("embed", "q.parquet", recipe, what="queries", users=tmp_path / "users.txt")
    assert said == "2 queries of 8 numbers" and queries["user_id"].to_list() == [7, 3]
    assert queries.equals(recommender.queries([7, 3]))
    users, said = call("embed", "users.parquet", recipe, pool="mean")
    assert said == "50 user vectors of 8 numbers, mean of the states"
    assert users.columns == ["user_id", "vector"] and users.height == 50


@pytest.mark.parametrize(
    "command, flags, message",
    [
        ("embed", ["--what=items", "--pool=max"], "--pool has no effect on --what items"),
        ("embed", ["--what=queries", "--pool=max"], "--pool has no effect on --what queries"),
        ("embed", ["--what=items", "--users=ids"], "--users has no effect on --what items"),
        ("recommend", ["--users=ids", "--histories=h"], "takes --users or --histories, not both"),
        ("recommend", ["--allowed=ids"], "1 of 1 allowed items are not in the data set"),
        ("recommend", ["--blocked=ids"], "first is 'nobody'"),
        ("similar", ["--items=ids"], "1 of 1 items are not in the data set, the first is 'nobody'"),
        ("similar", ["--k=0"], "k must be a whole number, at least 1, got 0"),
        ("recommend", ["--histories=ids"], "ids: row 1: no JSON"),
        ("recommend", ["--histories=none"], "none: file is missing"),
    ],
)
def test_errors_are_one_line(folder, tmp_path, monkeypatch, command, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ids").write_text("nobody\n")
    shared = [
        f"--data={folder / 'data'}",
        f"--pretrained={folder / 'sasrec'}",
        "--output=x.parquet",
    ]
    with pytest.raises(SystemExit) as stopped:
        main([command, *shared, *flags])
    assert message in str(stopped.value) and "\n" not in str(stopped.value)
    assert not (tmp_path / "x.parquet").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("7", "row 2: expected a list of item ids, got 7"),
        ('["a", 1.5]', "row 2: expected a list of item ids"),
        ('["a", true]', "row 2: expected a list of item ids"),
        ("[[1]]", "row 2: expected a list of item ids"),
        ("", "row 2: no JSON"),
        ("a b", "row 2: no JSON"),
        ("[" * 100_000, "row 2: no JSON"),
    ],
)
def test_lines_that_are_no_history(tmp_path, line, message):
    file = tmp_path / "h.jsonl"
    file.write_text(f'["a", 1]\n{line}\n[]\n')
    with pytest.raises(ValueError, match=message) as refused:
        read_histories(file)
    assert len(str(refused.value)) < 1000 and "\n" not in str(refused.value)
    file.write_text('["a b", 1]\n[]\n')
    assert read_histories(file) == [["a b", 1], []] and read_histories(None) is None
