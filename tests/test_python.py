# SPDX-License-Identifier: Apache-2.0
"""A system from Python: ten lines, with a step, an objective and an encoder of one's own."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from builders import assert_same_weights, six_users, synthetic, trained_weights
from torch import nn

from fastrec.data.dataset import SequenceDataset
from fastrec.data.steps.mask import Mask
from fastrec.data.steps.next_item import NextItem
from fastrec.data.views import Again
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.item import Item
from fastrec.objectives.parts import Objectives
from fastrec.training.config import Recipe
from fastrec.training.fit import fit
from fastrec.training.stage import Stage

ROOT = Path(__file__).parent.parent
CONFIG = ModelConfig(
    width=16, max_len=8, dropout=0.2, encoder=Transformer(layers=1, heads=1, causal=True)
)
SHORT = dict(steps=12, batch_size=64, validate_every=6, learning_rate=5e-3)


@dataclass(frozen=True)
class Reversed:
    """A step of somebody's own: the newest item first."""

    def __call__(self, batch, rng, side):
        ends = (batch.offsets[:-1] + batch.offsets[1:] - 1)[batch.segment_ids()]
        index = ends - torch.arange(len(batch.values))
        return batch.with_events(index, batch.offsets, batch.max_seq_len)


class Narrow(nn.Module):
    """An objective of somebody's own: user vectors are near a learned point."""

    weight, views = 0.5, ("main", "back")

    def __init__(self):
        super().__init__()
        self.point = nn.Parameter(torch.ones(16))
        self.seen: list[list[int]] = []

    def forward(self, model, rng, main, back):
        distance = [(model.pool(v, "mean") - self.point).square().mean() for v in (main, back)]
        self.seen.append(back.batch.values[: int(back.batch.offsets[1])].tolist())
        return {
            "mine": (sum(distance), len(main.batch)),
            "point": (self.point.detach().mean(), None),
        }


class Mean(nn.Module):
    """An encoder of somebody's own: each event sees the mean of those up to it."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, rows, batch, rng):
        table = self.linear(rows.dense())
        total = torch.cat([table.new_zeros(1, table.shape[1]), table.cumsum(0)])
        before = total[batch.offsets[:-1]][batch.segment_ids()]
        return (total[1:] - before) / (batch.positions() + 1).unsqueeze(1)


@dataclass(frozen=True)
class MeanSettings:
    causal = True

    def build(self, width: int, max_positions: int, dropout: float) -> Mean:
        return Mean(width)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> SequenceDataset:
    return SequenceDataset.load(synthetic(tmp_path_factory.mktemp("synthetic"), num_users=200))


def test_the_lines_of_the_design_note(dataset):
    """No output folder: what is kept is the model."""
    model = UserModel(dataset.num_items, CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mine = Narrow()
    trained = fit(
        dataset, model, views={"main": [NextItem()], "back": [Reversed()]},
        objectives={"item": Item(views=["main"]), "mine": mine}, progress=False, **SHORT,
    )  # fmt: skip
    assert trained.config == CONFIG and all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    ), "the model that is given is not changed"
    assert not torch.equal(trained.item_table, model.item_table)
    assert len(mine.seen) == 12 and mine.point.std() > 0, "its parameters are trained as well"
    trains = [dataset.gather([user], "train", 9).values.tolist() for user in range(200)]
    assert all(seen in [train[:0:-1] if len(train) > 8 else train[::-1] for train in trains]
               for seen in mine.seen)  # fmt: skip


def test_what_is_written_in_python_is_what_a_recipe_writes(dataset, tmp_path):
    """The same system as settings of a stage and as keywords: the same bits."""
    stage = Stage(
        views={"main": [NextItem()], "a": [Mask()], "b": [Again("a")]},
        objectives=Objectives(item=Item(), contrast=Contrast(views=["a", "b"])),
        **SHORT,
    )
    recipe = Recipe(model=CONFIG, pretraining=stage)
    fit(dataset, recipe=recipe, output=tmp_path / "recipe", progress=False)
    fit(
        dataset, recipe=Recipe(model=CONFIG), output=tmp_path / "keywords", progress=False,
        views=stage.views, objectives=stage.parts, **SHORT,
    )  # fmt: skip
    assert_same_weights(tmp_path / "recipe", tmp_path / "keywords")


def test_keywords_replace_fields_of_the_stage(dataset, tmp_path):
    stage = Stage(views={"main": [NextItem()]}, objectives=Objectives(item=Item()), **SHORT)
    recipe = Recipe(model=CONFIG, pretraining=stage)
    fit(dataset, recipe=recipe, output=tmp_path / "run", progress=False, steps=6)
    assert trained_weights(tmp_path / "run")["step"] == 6
    written = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert written["pretraining"]["steps"] == 6 and stage.steps == 12
    with pytest.raises(TypeError, match="stepps"):
        fit(dataset, recipe=recipe, stepps=6)


def test_a_run_with_own_parts_is_resumed_and_described(dataset, tmp_path):
    def train(folder, steps, **more):
        torch.manual_seed(0)
        return fit(
            dataset, recipe=Recipe(model=CONFIG), output=tmp_path / folder, progress=False,
            views={"main": [NextItem()], "back": [Reversed()]},
            objectives={"item": Item(views=["main"]), "mine": Narrow()},
            **{**SHORT, "steps": steps}, **more,
        )  # fmt: skip

    train("whole", 12)
    train("cut", 6)
    train("cut", 12, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    written = json.loads((tmp_path / "whole" / "stage.json").read_text())
    assert written["objectives"]["mine"].endswith("Narrow")
    assert "objective.parts.mine.point" in trained_weights(tmp_path / "whole")


def test_an_encoder_of_ones_own(dataset, tmp_path):
    config = replace(CONFIG, encoder=MeanSettings())
    assert config.causal
    trained = fit(
        dataset, UserModel(dataset.num_items, config), output=tmp_path / "run", progress=False,
        views={"main": [NextItem()]}, objectives={"item": Item()}, **SHORT,
    )  # fmt: skip
    assert isinstance(trained.encoder, Mean)
    history = dataset.gather([0], "all", 8).values
    with torch.no_grad():
        query = trained.next_item_query(trained.encode(trained.inputs_of([history.tolist()], True)))
        mean = trained.encoder.linear(trained.item_table[history]).mean(0)
        torch.testing.assert_close(query[0], trained.item_head.query(mean), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the encoder is .*MeanSettings: give from_pretrained its"):
        UserModel.from_pretrained(tmp_path / "run" / "model")
    again = UserModel.from_pretrained(tmp_path / "run" / "model", MeanSettings())
    assert torch.equal(again.item_table, trained.item_table)


def test_errors_of_parts_name_them():
    data = six_users()
    with pytest.raises(ValueError, match="the objective mine reads the view 'back'; views are"):
        fit(data, views={"main": []}, objectives={"mine": Narrow()})
    with pytest.raises(ValueError, match="next_item needs a causal encoder"):
        fit(data, views={"main": [NextItem()]}, objectives={"item": Item()})


def test_the_snippets_of_the_pages_run(tmp_path, monkeypatch):
    """As they stand: ten lines, then a step, an objective and an encoder of one's own."""
    synthetic(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "snippet"}
    for page, marks in {"recommend.md": ("python", "search"), "objective.md": ("own",)}.items():
        text = (ROOT / "docs" / page).read_text()
        for mark in marks:
            if mark == "search":
                pytest.importorskip("optuna", reason="the search of the page needs optuna")
            block = text.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]
            exec(compile(block.split("```python")[1].split("```")[0], mark, "exec"), names)
    assert names["best"].columns == ["user_id", "rank", "item_id", "score"]
    assert set(names["study"].best_params) == {"learning_rate", "dropout"}
    assert names["best"].height and type(names["model"].encoder).__name__ == "RunningMean"
    batch = names["model"].inputs_of([[1, 2, 3], [], [7]])
    table = names["model"].item_table
    expected = torch.stack([table[1], table[[1, 2]].mean(0), table[[1, 2, 3]].mean(0), table[7]])
    torch.testing.assert_close(names["model"].encode(batch).states, expected)


def test_the_objective_with_settings_trains_and_is_its_formula(tmp_path):
    text = (ROOT / "docs" / "objective.md").read_text().split("<!-- size -->")[1]
    names: dict = {"__name__": "objective"}
    exec(compile(text.split("```python")[1].split("```")[0], "size", "exec"), names)
    dataset = SequenceDataset.load(synthetic(tmp_path))
    model = UserModel(dataset.num_items, CONFIG)
    parts = {"item": Item(), "size": names["Size"](weight=0.1)}
    fit(dataset, model, views={"main": [NextItem()]}, objectives=parts, progress=False, **SHORT)
    objective = names["Size"]().build(model, None)
    view = model.encode(model.inputs_of([[1, 2, 3], [4]]))
    loss, count = objective(model, None, view)["size"]
    users = [view.states[:3].max(0).values, view.states[3]]
    assert count == 2
    assert loss.item() == pytest.approx(sum(user.square().sum().item() for user in users) / 2)
    half = replace(view.batch, real=torch.tensor([True, False]))
    loss, count = objective(model, None, replace(view, batch=half, pooled={}))["size"]
    assert count == 1 and loss.item() == pytest.approx(users[0].square().sum().item())
