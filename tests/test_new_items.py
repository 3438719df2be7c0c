"""Models of one catalogue on another: tomorrow's items, and those that are gone."""

from dataclasses import replace

import numpy as np
import polars
import pytest
import torch

import fastrec
from fastrec.data.item_categories import Categories
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
        for_items_of(model, folder, tomorrow)
