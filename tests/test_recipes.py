# SPDX-License-Identifier: Apache-2.0
"""Every recipe: what its file is, that it trains in both precisions, resumes and is shared by two
processes; how bases merge; keys that are wrong or have no effect."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars
import pytest
import torch
from builders import (
    Killed,
    assert_same_weights,
    dataset_of,
    killed_at,
    synthetic,
    trained_weights,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fastrec import recipes
from fastrec.cli import main
from fastrec.data.batch import from_sequences
from fastrec.data.dataset import SequenceDataset
from fastrec.data.dataset_files import digest
from fastrec.data.loader import SequenceLoader
from fastrec.data.settings import from_values
from fastrec.data.side import SideData
from fastrec.data.steps.next_item import NextItem
from fastrec.data.views import Views
from fastrec.nn.encoders.parts import settings_of
from fastrec.nn.items import item_features
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective, of_all_ranks, total_loss
from fastrec.random import Rng
from fastrec.training.config import Recipe, Users
from fastrec.training.fit import fit
from fastrec.training.stage import Init
from fastrec.training.stage_data import stage_data
from fastrec.training.start import filler_of, text_data

NAMES = recipes.names()
# Recipes that need a package which may not be here: tests/test_recformer.py says so.
ABSENT = set() if find_spec("tokenizers") else {"recformer"}


def small(name: str, **stage) -> Recipe:
    """A recipe with a tiny model and short stages, each from random weights; what makes the system
    is as it is."""
    chosen = from_values(Recipe, recipes.load(name))
    changes = {"batch_size": 400, "learning_rate": 5e-3, "warmup_steps": 0, **stage}
    shorter = {
        n: replace(part, init=Init(causal=part.init.causal), **changes)
        for n, part in chosen.stages.items()
    }
    protocol = chosen.evaluation
    if protocol.candidates == "sampled":
        protocol = replace(protocol, negatives=20)
    if any(part.judge == "friends" for part in shorter.values()):
        protocol = replace(protocol, friend_negatives=9)
    items = chosen.model.items
    features = {name: replace(part, width=16) for name, part in items.features.items()}
    items = replace(items, features=features)
    for part in ("segment", "item_place"):
        if items.combine == "sum" and getattr(items, part) is not None:
            items = replace(items, **{part: replace(getattr(items, part), width=16)})
    model = replace(chosen.model, width=16, max_len=12, items=items)
    return replace(chosen, model=model, evaluation=protocol, **shorter)


def filled(chosen: Recipe, data: Path) -> Recipe:
    """Its stages that fill draw from the masked-item model beside the data."""
    folder = str(data.parent / "masked" / "model")
    stages = {n: replace(part, filler=folder) for n, part in chosen.stages.items() if part.fills}
    return replace(chosen, **stages)


def distinct() -> list[tuple[str, str]]:
    """(recipe, stage), without those whose model, views and objectives another recipe has. Recipes
    of few stages come first: the fine-tuning of ccl is the whole of sasrec."""
    found = {}
    for name, chosen in sorted(
        ((name, small(name)) for name in NAMES if name not in ABSENT),
        key=lambda pair: len(pair[1].stages),
    ):
        for stage, part in chosen.stages.items():
            found.setdefault(repr((chosen.model, part.views, part.parts)), (name, stage))
    return list(found.values())


STAGES = distinct()


def kinds(name: str, stage: str) -> set[str]:
    """What a stage is made of: steps, objectives and their losses, encoder, judge."""
    chosen = small(name)
    part, encoder = chosen.stage(stage), settings_of(chosen.model.encoder)
    made = [*part.steps_of_views, *part.parts.values(), encoder]
    found = {type(each).__name__ for each in made} | {part.judge, getattr(encoder, "layer", "")}
    for each in part.parts.values():
        sampled = getattr(each, "sampled", None)
        found.add(f"{getattr(each, 'loss', '')}, {sampled and (sampled.by, sampled.in_batch)}")
        found.add(str(getattr(each, "pool", "")))
    return found


def marked() -> list:
    """STAGES; those that are made of what earlier ones are made of are exhaustive."""
    known: set[str] = set()
    made = []
    for pair in STAGES:
        marks = [] if kinds(*pair) - known else [pytest.mark.exhaustive]
        known |= kinds(*pair)
        made.append(pytest.param(*pair, marks=marks))
    return made


MARKED = marked()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data set, and a masked-item model beside it."""
    folder = synthetic(tmp_path_factory.mktemp("synthetic"), mean_friends=30)
    folder = with_ratings(with_text(folder))
    masked, short = small("bert4rec", steps=3, validate_every=3), folder.parent / "masked"
    masked = replace(masked, users=Users(0.9))  # no model has seen the users who are held out
    fit(SequenceDataset.load(folder), recipe=masked, output=short, progress=False)
    return folder


def with_text(folder: Path) -> Path:
    """The data set with vectors of its items, as `prepare --item_features` writes them."""
    schema = json.loads((folder / "schema.json").read_text())
    vectors = np.random.default_rng(0).normal(size=(schema["num_items"], 12)).astype(np.float32)
    np.save(folder / "features.text.npy", vectors)
    schema["item_features"] = {"text": {"width": 12, "missing": 0}}
    schema["digests"]["features.text.npy"] = digest(folder / "features.text.npy")
    (folder / "schema.json").write_text(json.dumps(schema))
    return folder


def with_ratings(folder: Path) -> Path:
    """The data set with ratings of its events, of items that are liked by all or by none."""
    schema = json.loads((folder / "schema.json").read_text())
    file = folder / "interactions.parquet"
    ratings = (polars.col("item") % 5 + 1).cast(polars.Float64).alias("rating")
    polars.read_parquet(file).with_columns(ratings).write_parquet(file)
    schema["digests"][file.name] = digest(file)
    (folder / "schema.json").write_text(json.dumps(schema))
    return folder


def test_the_recipes_are_those_of_the_folder():
    files = [path.stem for path in recipes.FOLDER.iterdir() if path.suffix == ".yaml"]
    assert sorted(files) == NAMES
    assert {"bert4rec", "cl4srec", "sasrec", "uprec", "uprec-mip"} <= set(NAMES)
    assert {
        "caser",
        "coserec",
        "duorec",
        "dupn",
        "esasrec",
        "gsasrec",
        "sasrec-bce",
        "sasrec-sampled",
    } <= set(NAMES)
    own = set(NAMES) - ABSENT
    assert {name for name, _ in STAGES} == own, "every recipe is something of its own"
    assert {stage for _, stage in STAGES} == {
        "pretraining",
        "ranking",
        "recommendation",
        "profile",
        "relation",
        "cold_start",
        "click",
    }


def losses(folder: Path) -> list[float]:
    (file,) = folder.glob("metrics/version_0/metrics.csv")
    return polars.read_csv(file)["train_loss"].to_list()


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_every_stage_of_every_recipe_trains(data, tmp_path, name, stage):
    trains(data, tmp_path, name, stage, "32-true")


@pytest.mark.parametrize(("name", "stage"), MARKED)
def test_every_kind_of_stage_trains_under_autocast(data, tmp_path, name, stage):
    trains(data, tmp_path, name, stage, "bf16-mixed")


def trains(data, tmp_path, name: str, stage: str, precision: str) -> None:
    dataset, folder = SequenceDataset.load(data), tmp_path / "run"
    chosen = filled(small(name, steps=20, validate_every=5, precision=precision), data)
    trained = fit(dataset, recipe=chosen, stage=stage, output=folder, progress=False)
    first, *_, last = losses(folder)  # of steps 5 and 20
    assert last < first
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    (optimizer,) = checkpoint["optimizer_states"]
    moments = [m for state in optimizer["state"].values() for m in state.values()]
    weights = list(checkpoint["state_dict"].values())
    assert len(moments) > 15 and checkpoint["global_step"] == 20
    kept = getattr(trained, "model", trained).state_dict().values()  # a TextModel has a model
    for tensor in (*weights, *moments, *kept):
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()


def started(dataset, name: str, stage: str, rank: int = 0, world_size: int = 1):
    """Model, objective and loader of a stage, as `fit` starts it."""
    chosen = filled(small(name, batch_size=100), dataset.path)
    if chosen.texts is not None:
        dataset = text_data(dataset, chosen.texts, None)
    part = chosen.stage(stage)
    torch.manual_seed(chosen.seed)
    features = item_features(dataset, chosen.model.items)
    model = UserModel(dataset.num_items, chosen.model, dataset.num_users, features)
    found = stage_data(dataset, chosen, part)
    found.side.filler = filler_of(dataset, chosen, part)
    objective = JointObjective(part.parts, model, found.side)
    views = Views(part.views, model.frame, found.side, chosen.model.max_len)
    loader = SequenceLoader(
        views, batch_size=part.batch_size, users=found.users, rank=rank, world_size=world_size
    )
    return model, objective, loader


class Copies(TorchDispatchMode):
    """Shapes of float32 tensors that are converted to bfloat16."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16:
            name = function.name()
            if name in ("aten::_to_copy", "aten::copy_"):
                self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("name", [name for name, stage in STAGES if stage == "pretraining"])
def test_autocast_converts_no_item_table(data, name):
    """A step under bf16 reads the float32 table as it is: a copy of it would cost more than the
    step saves."""
    dataset = SequenceDataset.load(data)
    model, objective, loader = started(dataset, name, "pretraining")
    for layer in objective.modules():  # one that starts at 0 has no gradient for what is below it
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.02)
    views = loader.batch_at(0)
    with Copies() as seen, torch.autocast("cpu", torch.bfloat16):
        loss = total_loss(objective(model, views, Rng(0, 0)))
    loss.backward()
    assert seen.shapes, "nothing ran in bfloat16"
    assert not [shape for shape in seen.shapes if shape[:1] in ((150,), (154,))]
    part = model.item_input  # what items are made of: their ids, or a map of their vectors
    grad = part.ids.weight.grad if part.settings.ids else part.features[0].map.weight.grad
    assert grad.dtype == torch.float32 and grad.isfinite().all() and grad.abs().max() > 0


@pytest.mark.parametrize(("name", "stage"), MARKED)
def test_every_stage_of_every_recipe_resumes_to_the_same_bits(
    data, tmp_path, monkeypatch, name, stage
):
    dataset = SequenceDataset.load(data)
    chosen = small(name, batch_size=64, steps=6, validate_every=6, checkpoint_every=2)
    chosen = filled(chosen, data)
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def train(folder, **more):
        fit(dataset, recipe=chosen, stage=stage, output=folder, progress=False, **more)

    train(whole)
    with monkeypatch.context() as patch:
        killed_at(patch, "training_step", 5)
        with pytest.raises(Killed):
            train(cut)
    assert trained_weights(cut)["step"] == 4
    train(cut, resume=True)
    assert trained_weights(cut)["step"] == 6
    assert_same_weights(whole, cut)


def first_steps(group, path: Path, rank: int, world_size: int) -> dict:
    """By (recipe, stage): the losses of two steps and of their terms, and the gradients of the sum
    of both, of one rank."""
    dataset, found = SequenceDataset.load(path), {}
    for name, stage in STAGES:
        model, objective, loader = started(dataset, name, stage, rank, world_size)
        values = []
        for step in range(2):
            terms = objective(model, loader.batch_at(step), Rng(0, step))
            terms = of_all_ranks(terms, world_size)
            loss = total_loss(terms)
            loss.backward()
            values += [loss.detach(), *(t.loss.detach() for t in terms if t.number is not None)]
        parameters = [*model.named_parameters(), *objective.named_parameters()]
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters}
        found[name, stage] = torch.stack(values), grads
    return found


def shared_steps(group, path: Path) -> dict:
    return first_steps(group, path, torch.distributed.get_rank(), 2)


@pytest.fixture(scope="module")
def shares(ranks, data) -> tuple[dict, dict, dict]:
    """What one process finds, and each of two."""
    return first_steps(None, data, 0, 1), *ranks(2, shared_steps, data)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_two_processes_have_the_loss_and_the_gradients_of_one(shares, name, stage):
    """The mean over ranks is what DDP makes of them."""
    (loss, grads), *both = (found[name, stage] for found in shares)
    torch.testing.assert_close((both[0][0] + both[1][0]) / 2, loss, rtol=2e-6, atol=1e-6)
    assert any(grad.abs().max() > 0 for grad in grads.values())
    for key, grad in grads.items():
        mean = (both[0][1][key] + both[1][1][key]) / 2
        assert (mean - grad).norm() <= 1e-4 * grad.norm() + 1e-7, key


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_a_step_without_users_has_the_loss_0_and_gradients(data, name, stage):
    """What a process has of a last step of fewer users than processes."""
    model, objective, loader = started(SequenceDataset.load(data), name, stage)
    if name == "clue" and stage == "pretraining":  # its statistics are of the users of all ranks
        with pytest.raises(ValueError, match="needs at least 2 users a step, got 0"):
            objective(model, loader.few(0), Rng(0, 0))
        return
    loss = total_loss(objective(model, loader.few(0), Rng(0, 0)))
    loss.backward()
    assert loss == 0
    for parameter in (*model.parameters(), *objective.parameters()):
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("name", ["esasrec", "gsasrec", "sasrec-bce", "sasrec-sampled"])
def test_a_causal_recipe_from_the_command_line(data, tmp_path, name):
    """Trained, evaluated and asked: the best items are those of the largest products."""
    flags = [f"--config={name}", f"--data={data}", "--model.width=16", "--model.max_len=12"]
    short = [f"--pretraining.{key}" for key in ("steps=4", "validate_every=4", "batch_size=50")]
    main(["pretrain", *flags, *short, f"--output={tmp_path / 'run'}"])
    folder, found = tmp_path / "run" / "model", tmp_path / "found.json"
    main(["evaluate", *flags, *short, f"--pretrained={folder}", f"--output={found}"])
    assert "model" in json.loads(found.read_text())["metrics"]
    best = tmp_path / "best.csv"
    main(["recommend", f"--data={data}", f"--pretrained={folder}", "--k=3", f"--output={best}"])
    rows = polars.read_csv(best, schema_overrides={"user_id": str, "item_id": str})
    dataset, model = SequenceDataset.load(data), UserModel.from_pretrained(folder)
    users = torch.arange(dataset.num_users)
    query = model.next_item_query(model.encode(model.inputs(dataset, users, "all", ask=True)))
    scores = query @ model.item_table.T + model.item_head.bias
    seen = dataset.gather(users, "all", max_len=None)
    scores[seen.segment_ids(), seen.values] = -torch.inf
    expected = dataset.item_ids()[scores.topk(3).indices.flatten()]
    assert rows["item_id"].to_list() == [str(item) for item in expected]


def test_gsasrec_starts_where_a_target_pulls_as_hard_as_its_negatives_push():
    """From scores of 0 the push is 900 times the pull: the table learns to lower all of them."""
    chosen, side = from_values(Recipe, recipes.load("gsasrec")), SideData(dataset_of([[0]], 12101))
    batch = NextItem()(from_sequences([list(range(40)), list(range(50, 99))]), Rng(0, 0), side)
    ratios = []
    for start in (chosen.model.head_bias_start, 0.0):
        model = UserModel(12101, replace(chosen.model, head_bias_start=start))
        part = chosen.pretraining.objectives.item.build(model, side)
        part(model, Rng(0, 0), model.encode(batch))["item"][0].backward()
        grad = model.item_head.bias.grad
        ratios.append(-float(grad[grad > 0].sum() / grad[grad < 0].sum()))
    assert 0.9 < ratios[0] < 1.1 and ratios[1] > 500
