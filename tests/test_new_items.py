# SPDX-License-Identifier: Apache-2.0
"""Models of one catalogue on another: tomorrow's items, and those that are gone."""

from dataclasses import replace

import numpy as np
import polars
import pytest
import torch

import fastrec
from fastrec.cli import main
from fastrec.data.errors import DataError
from fastrec.data.item_categories import Categories
from fastrec.evaluation.protocol import Protocol
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.item_parts import ItemAttribute
from fastrec.nn.items import Items
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.transfer import with_items
from fastrec.nn.user_model import UserModel
from fastrec.training.model_folder import for_items_of

CONFIG = ModelConfig(width=8, max_len=6, encoder=Transformer(layers=1, heads=1))
ROWS = torch.tensor([3, -1, 0, 4, -1])


def model_of(config=CONFIG, **options) -> UserModel:
    torch.manual_seed(0)
    model = UserModel(6, config, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def scores(model: UserModel, history: list[int]) -> torch.Tensor:
    query = model.ask(model.inputs_of([history], ask=True))
    return (query @ model.item_table.T + model.item_head.bias)[0]


@pytest.mark.parametrize("table", ["tied", "own"])
def test_known_items_score_as_before(table):
    """Whatever their new numbers, also beside items that are new or gone."""
    before = model_of(replace(CONFIG, head_table=table))
    after = with_items(before, ROWS)
    assert after.num_items == 5
    new_history, old_history = [0, 2, 2, 3], [3, 0, 0, 4]
    torch.testing.assert_close(
        scores(after, new_history)[ROWS >= 0], scores(before, old_history)[ROWS[ROWS >= 0]]
    )
    for name, rows in (("item_table", after.item_table), ("input", after.item_embedding.weight)):
        old = before.item_table if name == "item_table" else before.item_embedding.weight
        assert torch.allclose(rows[1], old[:6].mean(0)) and torch.equal(rows[1], rows[4])
    assert torch.equal(after.item_embedding.weight[5:], before.item_embedding.weight[6:])
    assert after.item_head.bias[1].item() == pytest.approx(before.item_head.bias.mean().item())


def test_attributes_go_with_their_items(tmp_path):
    items = Items(attributes={"genre": ItemAttribute(most=2)})
    table = torch.tensor([[0, 1], [1, -1], [2, -1], [2, 0], [-1, -1], [0, -1]], dtype=torch.int32)
    features = {"genre": Categories(table, 3)}
    before = model_of(replace(CONFIG, items=items), item_features=features)
    after = with_items(before, ROWS)
    expected = table[ROWS.clamp_min(0)].clone()
    expected[ROWS < 0] = -1
    assert torch.equal(after.item_input.attributes[0].table, expected)
    after.save_pretrained(tmp_path / "model")
    again = UserModel.from_pretrained(tmp_path / "model")
    assert torch.equal(scores(again, [0, 2]), scores(after, [0, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_items_begin_like_those_of_their_categories(dtype):
    before = model_of(replace(CONFIG, head_table="own")).to(dtype)
    # By item of the new list; rows are [3, -1, 0, 4, -1] of the old one.
    table = torch.tensor([[0, 1], [0, 1], [0, -1], [-1, -1], [2, -1]], dtype=torch.int32)
    after = with_items(before, ROWS, like=Categories(table, 3))
    for new, old in ((after.item_embedding.weight, before.item_embedding.weight),
                     (after.item_table, before.item_table),
                     (after.item_head.bias[:, None], before.item_head.bias[:, None])):  # fmt: skip
        exact = old.double()
        first, second = exact[[3, 0]].mean(0), exact[3]  # of categories 0 and 1
        torch.testing.assert_close(new[1], ((first + second) / 2).to(dtype))
        torch.testing.assert_close(
            new[4], exact[:6].mean(0).to(dtype)
        )  # of category 2 none is known
        assert torch.equal(new[[0, 2, 3]], old[ROWS[ROWS >= 0]])


def log(users: int, first: int, last: int, seed: int = 0) -> polars.DataFrame:
    generator = np.random.default_rng(seed)
    rows = [
        (f"u{user}", f"i{item}", time)
        for user in range(users)
        for time, item in enumerate(generator.integers(first, last, 8))
    ]
    return polars.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def prepared(frame: polars.DataFrame, folder) -> fastrec.SequenceDataset:
    frame.write_csv(folder.with_suffix(".csv"))
    fastrec.prepare(
        folder.with_suffix(".csv"), folder, format="table", timestamp="timestamp",
        on_duplicate="keep",
    )  # fmt: skip
    return fastrec.SequenceDataset.load(folder)


def test_a_trained_model_goes_on_with_the_items_of_tomorrow(tmp_path):
    """From its folder by original ids; fine-tuning starts from it."""
    today, tomorrow = (
        prepared(log(60, *bounds), tmp_path / name)
        for name, bounds in (("today", (0, 30)), ("tomorrow", (10, 40)))
    )
    settings = dict(
        steps=4, batch_size=32, validate_every=4, warmup_steps=1, model={"width": 8, "max_len": 6}
    )
    recipe = fastrec.Recipe.load("sasrec", **settings)
    fastrec.fit(today, recipe=recipe, output=tmp_path / "run", progress=False)
    folder = tmp_path / "run" / "model"
    model = UserModel.from_pretrained(folder)
    assert for_items_of(model, folder, today) is model
    with pytest.warns(
        UserWarning, match="10 of the 30 items .* are new to it and begin as the mean"
    ):
        grown = for_items_of(model, folder, tomorrow)
    before, after = today.item_ids().tolist(), tomorrow.item_ids().tolist()
    for row, item in enumerate(after):
        expected = (
            model.item_table[before.index(item)] if item in before else model.item_table.mean(0)
        )
        torch.testing.assert_close(grown.item_table[row], expected)
    tuned = fastrec.fit(tomorrow, grown, recipe=recipe, progress=False)
    best = fastrec.recommend(tuned, tomorrow, k=3)
    assert set(best["item_id"]) <= set(after)
    (folder / "items.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"items\.npy is missing"):
        fastrec.load_model(folder, tomorrow)


def test_a_model_that_python_has_saved_finds_its_items(tmp_path):
    """`save_pretrained` keeps what `fit` has told of the model, and what is made of one goes on
    knowing it."""
    today = prepared(log(60, 0, 30), tmp_path / "today")
    renamed = log(60, 0, 30).with_columns(polars.col("item_id").replace({"i0": "j0"}))
    others = log(60, 0, 30).with_columns(polars.col("item_id").str.replace("i", "k"))
    stage = dict(steps=2, validate_every=2, warmup_steps=1, users={"fraction": 0.5})
    recipe = fastrec.Recipe.load("sasrec", model={"width": 8, "max_len": 6}, **stage)
    model = fastrec.fit(today, recipe=recipe, output=tmp_path / "run", progress=False)
    model.save_pretrained(tmp_path / "saved")
    kept = tmp_path / "run" / "model"
    for name in ("trained_on.json", "recipe.json", "items.npy", "users.npy"):
        assert (tmp_path / "saved" / name).read_bytes() == (kept / name).read_bytes(), name
    dataset = prepared(renamed, tmp_path / "renamed")
    with pytest.warns(UserWarning, match="1 of the 30 items"):
        first, second = (fastrec.load_model(each, dataset) for each in (kept, tmp_path / "saved"))
    assert torch.equal(first.item_table, second.item_table)
    assert not torch.equal(first.item_table, model.item_table)
    first.save_pretrained(tmp_path / "grown")
    again = fastrec.load_model(tmp_path / "grown", dataset)
    assert torch.equal(again.item_table, first.item_table)
    assert np.array_equal(again.seen_users, model.seen_users) and len(model.seen_users) == 30
    with pytest.raises(ValueError, match="it knows none of"):
        fastrec.load_model(tmp_path / "saved", prepared(others, tmp_path / "others"))


def test_a_catalogue_goes_on(tmp_path, capsys):
    """`--items_of`: today's users alone can be recommended every item of the model; new ones come
    behind; attributes of both days meet."""
    today = log(60, 0, 30)
    today.write_csv(tmp_path / "today.csv")
    polars.DataFrame(
        {"item_id": [f"i{n}" for n in range(30)], "brand": [f"b{n % 3}" for n in range(30)]}
    ).write_csv(tmp_path / "items.csv")
    shared = dict(format="table", timestamp="timestamp", on_duplicate="keep")
    fastrec.prepare(
        tmp_path / "today.csv", tmp_path / "today", item_attributes=tmp_path / "items.csv", **shared
    )
    first = fastrec.SequenceDataset.load(tmp_path / "today")
    few = polars.DataFrame(
        {"user_id": ["new"] * 4, "item_id": ["i3", "i99", "i4", "i98"], "timestamp": [1, 2, 3, 4]}
    )
    few.write_csv(tmp_path / "few.csv")
    polars.DataFrame({"item_id": ["i99", "i3"], "brand": ["b9", "b8"], "price": [1, 2]}).write_csv(
        tmp_path / "new.csv"
    )
    report = fastrec.prepare(
        few, tmp_path / "few", item_attributes=tmp_path / "new.csv", items_of=tmp_path / "today",
        **shared,
    )  # fmt: skip
    known = first.item_ids().tolist()
    assert f"{len(known)} of {tmp_path / 'today'}, and 2 new ones behind them" in str(report)
    second = fastrec.SequenceDataset.load(tmp_path / "few")
    assert second.item_ids().tolist() == [*known, "i98", "i99"]
    places = [second.item_ids().tolist().index(item) for item in ("i3", "i99", "i4", "i98")]
    assert second.values.tolist() == places
    table = second.item_attributes()
    brand = dict(zip(table["item_id"], table["brand"], strict=True))
    assert (brand["i3"], brand["i99"], brand["i98"], brand["i5"]) == ("b8", "b9", None, "b2")
    assert table["price"].drop_nulls().to_list() == [2, 1]
    assert second.schema["filters"]["items_of"] == str(tmp_path / "today")
    recipe = fastrec.Recipe.load(
        "sasrec", steps=2, validate_every=2, warmup_steps=1, model={"width": 8, "max_len": 6}
    )
    fastrec.fit(first, recipe=recipe, output=tmp_path / "run", progress=False)
    folder = tmp_path / "run" / "model"
    with pytest.warns(UserWarning, match="2 of the 32 items .* are new"):
        model = for_items_of(UserModel.from_pretrained(folder), folder, second)
    best = fastrec.recommend(model, second, k=32)
    assert set(best["item_id"]) == {*known, "i98", "i99"} - {"i3", "i99", "i4", "i98"}
    # i99 is the only item of its brand, i98 has none: nothing known is like them.
    like = fastrec.load_model(folder, second, new_items_like="brand")
    assert torch.equal(like.item_table, model.item_table)
    with pytest.raises(DataError, match="column 'colour'"):
        fastrec.load_model(folder, second, new_items_like="colour")
    main(
        ["embed", f"--data={tmp_path / 'few'}", f"--pretrained={folder}", "--what=items",
         "--new_items_like=brand", f"--output={tmp_path / 'items.parquet'}"]
    )  # fmt: skip
    assert polars.read_parquet(tmp_path / "items.parquet").height == 32


def test_a_catalogue_of_numbers_goes_on_with_text(tmp_path):
    """Ids are compared as they are written."""
    for name, items in (("a", [7, 5, 7]), ("b", ["5", "x", "7"])):
        frame = polars.DataFrame({"user_id": [1] * 3, "item_id": items, "timestamp": [1, 2, 3]})
        earlier = {"items_of": tmp_path / "a"} if name == "b" else {}
        fastrec.prepare(frame, tmp_path / name, timestamp="timestamp", **earlier)
    second = fastrec.SequenceDataset.load(tmp_path / "b")
    assert second.item_ids().tolist() == ["5", "7", "x"]
    assert second.values.tolist() == [0, 2, 1]


def test_a_catalogue_with_another_type_of_attribute_is_refused(tmp_path):
    frame = polars.DataFrame({"user_id": [1] * 3, "item_id": [7, 5, 7], "timestamp": [1, 2, 3]})
    for name, price in (("a", [1, 2]), ("b", ["cheap", "dear"])):
        items = polars.DataFrame({"item_id": [5, 7], "price": price})
        earlier = {"items_of": tmp_path / "a"} if name == "b" else {}
        options = dict(timestamp="timestamp", item_attributes=items, **earlier)
        if name == "a":
            fastrec.prepare(frame, tmp_path / name, **options)
    with pytest.raises(DataError, match="column 'price'.*is Int64 there, String here"):
        fastrec.prepare(frame, tmp_path / "b", **options)


def test_a_model_from_python_meets_its_own_items_alone(tmp_path):
    """Wherever it is asked: as many other items would be garbage. `load_model` is the way."""
    today, other = (
        prepared(log(60, *bounds), tmp_path / name)
        for name, bounds in (("today", (0, 30)), ("other", (1, 31)))
    )
    recipe = fastrec.Recipe.load(
        "sasrec", steps=2, validate_every=2, warmup_steps=1, model={"width": 8, "max_len": 6}
    )
    fastrec.fit(today, recipe=recipe, output=tmp_path / "run", progress=False)
    folder = tmp_path / "run" / "model"
    model = UserModel.from_pretrained(folder)
    assert model.num_items == other.num_items
    for ask in (
        lambda: fastrec.recommend(model, other, k=2),
        lambda: fastrec.evaluate(model, other),
        lambda: fastrec.user_vectors(model, other),
        lambda: fastrec.item_vectors(model, other),
        lambda: fastrec.fit(other, model, recipe=recipe, progress=False),
    ):
        with pytest.raises(
            ValueError, match=r"are others or in another order: fastrec\.load_model"
        ):
            ask()
    with pytest.warns(
        UserWarning, match="1 of the 30 items .* are new to it .* and 1 of its items"
    ):
        grown = fastrec.load_model(folder, other)
    assert fastrec.recommend(grown, other, k=2).height and fastrec.evaluate(grown, other)
    assert fastrec.load_model(folder, today).trained_on["items"] == today.items_hash


def test_the_protocol_of_a_model_is_the_default_of_python(tmp_path):
    today = prepared(log(60, 0, 30), tmp_path / "today")
    recipe = fastrec.Recipe.load(
        "sasrec", steps=2, validate_every=2, warmup_steps=1, model={"width": 8, "max_len": 6}
    )
    model = fastrec.fit(today, recipe=recipe, progress=False)
    own = fastrec.evaluate(model, today)
    assert own == fastrec.evaluate(model, today, recipe.evaluation)
    assert own != fastrec.evaluate(model, today, Protocol(seen="none"))
    with pytest.raises(TypeError, match="protocol must be a Protocol, got dict"):
        fastrec.evaluate(model, today, {"candidates": "full"})
