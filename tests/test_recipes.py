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


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_short_and_says_what_it_is(name):
    text = recipes.path(name).read_text()
    assert len(text.splitlines()) <= 30
    summary = recipes.summary(name)
    assert 20 < len(summary) <= 110 and "\n" not in summary and text.startswith("# ")
    stages = from_values(Recipe, recipes.load(name)).stages
    assert ("pretraining" in stages) == (name != "clue-zero")


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


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_base_is_merged_key_by_key(tmp_path):
    base = written(
        tmp_path, "base.yaml",
        "model: {width: 8, tokens: [cls, sep]}\nseed: 3\n"
        "pretraining:\n  views: {a: [mask: {}], b: [mask: {share: 0.5}]}\n"
        "  objectives: {item: {views: [a, b]}, user_attributes: {views: [a]}}\n",
    )  # fmt: skip
    top = written(
        tmp_path, "top.yaml",
        f"base: {base}\nmodel: {{tokens: [ur]}}\n"
        "pretraining:\n  views: {b: null}\n"
        "  objectives: {item: {views: [a]}, user_attributes: null}\n",
    )  # fmt: skip
    assert recipes.load(top) == {
        "model": {"width": 8, "tokens": ["ur"]}, "seed": 3,
        "pretraining": {
            "views": {"a": [{"mask": {}}], "b": None},
            "objectives": {"item": {"views": ["a"]}, "user_attributes": None},
        },
    }  # fmt: skip
    found = from_values(Recipe, recipes.load(top))
    assert (found.model.width, found.model.tokens, found.seed) == (8, ["ur"], 3)
    assert list(found.pretraining.views) == ["a"] and list(found.pretraining.parts) == ["item"]
    assert recipes.load(base)["model"]["tokens"] == ["cls", "sep"], "the base is left as it is"


def test_an_objective_without_settings_that_is_null_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: sasrec\npretraining: {objectives: {item: {}, friends: }}\n")
    with pytest.raises(ValueError, match=r"objectives\.friends is null, .* it is friends: {}"):
        recipes.load(str(file))


def test_a_base_is_a_recipe_or_a_file_relative_to_the_file(tmp_path, monkeypatch):
    written(tmp_path, "inner/first.yaml", "seed: 1\nusers: {fraction: 0.5}\n")
    written(tmp_path, "inner/second.yaml", "base: first.yaml\nseed: 2\n")
    last = written(tmp_path, "last.yaml", "base: inner/second.yaml\nusers: {seed: 9}\n")
    monkeypatch.chdir(tmp_path / "inner")
    assert recipes.load(last) == {"seed": 2, "users": {"fraction": 0.5, "seed": 9}}
    mine = written(tmp_path, "mine.yaml", "base: cl4srec\npretraining: {steps: 250}\n")
    assert recipes.load(mine)["pretraining"]["views"].keys() == {"main", "a", "b"}
    assert recipes.load(mine)["pretraining"]["steps"] == 250


def test_a_base_that_is_itself_or_nothing_is_named(tmp_path):
    one = written(tmp_path, "one.yaml", "base: two.yaml\n")
    written(tmp_path, "two.yaml", "base: one.yaml\n")
    with pytest.raises(ValueError, match=r"one.yaml is its own base: .*one.yaml -> .*two.yaml ->"):
        recipes.load(one)
    lost = written(tmp_path, "lost.yaml", "base: uprek\n")
    with pytest.raises(FileNotFoundError, match="'uprek' is neither a file nor a recipe; the reci"):
        recipes.load(lost)


# A recipe, what is changed in it, and the one line that says why it is wrong.
WRONG = [
    ("uprec-mip", "views: {main: [masc: {}]}", "pretraining.views.main.0.masc is no key; pret"),
    ("uprec-mip", "views: {main: [mask: {shar: 1}]}", "pretraining.views.main.0.mask.shar is no "),
    ("uprec-mip", "views: {main: [mask: {share: a}]}", "main.0.mask.share is 'a', expected a num"),
    ("uprec-mip", "views: {main: [mask: {exact: 1}]}", "exact is 1, expected true or false"),
    ("uprec-mip", "views: {main: [mask: {share: 2}]}", "main.0.mask.share must be in [0, 1], got"),
    ("uprec-mip", "views: {main: [{}]}", "pretraining.views.main.0: step names none: one of ['"),
    ("uprec-mip", "views: {main: [mask: ]}", "pretraining.views.main.0: step names none: one of"),
    ("uprec-mip", "views: {main: [{mask: {}, crop: {}}]}", "main.0: step names mask and crop: on"),
    ("uprec-mip", "views: {main: [mask]}", "views.main.0 is 'mask', expected a group of keys: m"),
    ("uprec-mip", "views: [mask: {}]", "pretraining.views is [{'mask': {}}], expected a mapping"),
    ("uprec-mip", "views: {main: {mask: {}}}", "main is {'mask': {}}, expected a list"),
    ("cl4srec", "views: {a: [one_of: [mask: {}]]}", "pretraining.views.a.0.one_of has 1 steps, "),
    ("cl4srec", "views: {a: [one_of: [crop: {keep: 0}, mask: {}]]}", "0.one_of.0.crop.keep must"),
    ("cl4srec", "views: {a: [one_of: [crap: {}, mask: {}]]}", "views.a.0.one_of.0.crap is no key"),
    ("cl4srec", "views: {a: [crop: {keep: {start: 1}}]}", "views.a.0.crop.keep.end is missing"),
    ("cl4srec", "views: {a: [crop: {keep: x}]}", "0.crop.keep is 'x', expected a number or a gr"),
    ("cl4srec", "views: {a: [fill: {among: 0}]}", "pretraining.views.a.0.fill.among must be at le"),
    ("cl4srec", "views: {a: [window: {}]}", "views.a.0.window.share and window.count: exactly o"),
    ("cl4srec", "objectives: {contrast: {pool: top}}", "contrast.pool is 'top', expected one of '"),
    ("cl4srec", "objectives: {contrast: {pool: {interests: 1}}}", "pool.interests must be at lea"),
    ("cl4srec", "filler: run", "pretraining.filler has no effect: no view has the step fill"),
    ("cl4srec", "views: {a: [any_of: [mask: {}]]}", "pretraining.views.a.0.any_of has 1 steps, e"),
    ("cl4srec", "views: {a: [mask: {round: up}]}", "mask.round has no effect: mask.exact is false"),
    ("cl4srec", "views: {a: [reorder: {share: 0}]}", "a.0.reorder.share must be in (0, 1], got"),
    ("sasrec", "views: {main: [next_item: {ahead: 0}]}", "next_item.ahead must be at least 1"),
    ("uprec-mip", "views: {main: [mask_last: {number: 0}]}", "mask_last.number must be at least 1"),
    ("uprec", "views: {main: [friend: {hops: 3}, mask: {}]}", "friend.hops is 3, expected one of"),
    ("uprec-mip", "objectives: {itm: {}}", "pretraining.objectives.itm is no key; pretraining.ob"),
    ("uprec-mip", "objectives: {item: {los: bce}}", "pretraining.objectives.item.los is no key;"),
    ("coserec", "views: {a: [substitute: {share: 2}]}", "a.0.substitute.share must be in (0, 1], "),
    ("coserec", "views: {a: [insert: {share: 0}]}", "views.a.0.insert.share must be in (0, 1], go"),
    ("coserec", "views: {a: [crop: {least: 0}]}", "views.a.0.crop.least must be at least 1, got 0"),
    ("duorec", "views: {b: [same_target: {hops: 1}]}", "same_target.hops is no key; pretraining.v"),
    ("duorec", "objectives: {contrast: {false_negatives: [item]}}", "false_negatives.0 is 'item',"),
    ("duorec", "objectives: {contrast: {candidates: first}}", "contrast.candidates is 'first', ex"),
    ("sasrec", "objectives: {contrast: {}}", "pretraining.objectives.contrast.views is missing"),
    ("sasrec", "objectives: {contrast: {views: [main]}}", "contrast compares two views, got"),
    ("uprec-mip", "steps: many", "pretraining.steps is 'many', expected a whole number"),
    ("uprec-mip", "steps: true", "pretraining.steps is True, expected a whole number"),
    ("uprec-mip", "steps: 0", "pretraining.steps must be at least 1, got 0"),
    ("uprec-mip", "devices: many", "pretraining.devices is 'many', expected a whole number or 'a"),
    ("uprec-mip", "betas: [0.9, 1.0]", "pretraining.betas must be in [0, 1), got [0.9, 1.0]"),
    ("uprec-mip", "betas: 0.9", "pretraining.betas is 0.9, expected a list of 2"),
    ("uprec-mip", "schedule: cosin", "pretraining.schedule is 'cosin', expected one of 'constant'"),
    ("uprec-mip", "init: {take: [itms]}", "pretraining.init.take names 'itms', expected some of"),
    ("uprec-mip", "init: {pool: itm}", "pretraining.init.pool is 'itm', expected one of ['item',"),
    ("uprec-mip", "dropout: 1", "pretraining.dropout must be in [0, 1), got 1.0"),
    # Views that nobody makes or reads.
    ("uprec-mip", "views: {b: [mask: {}]}", "no objective reads the view 'b': it has no effect"),
    ("uprec-mip", "objectives: {item: {views: [b]}}", "reads the view 'b'; views are ['main']"),
    # Keys without effect.
    (
        "uprec-mip", "objectives: {item: {loss: bce}}",
        "pretraining.objectives.item.loss bce needs negatives: set item.sampled",
    ),
    (
        "uprec-mip", "objectives: {item: {sampled: {alpha: 0.5}}}",
        "sampled.alpha has no effect: negatives are uniform (by: popularity uses it)",
    ),
    (
        "uprec-mip", "objectives: {item: {loss: bce, sampled: {log_q: true}}}",
        "sampled.log_q has no effect on the loss bce",
    ),
    (
        "uprec-mip", "objectives: {item: {loss: bce, sampled: {gbce_t: 0.5}}}",
        "sampled.gbce_t has no effect on the loss bce",
    ),
    ("uprec-mip", "init: {take: [items], freeze: [encoder]}", "init.freeze names 'encoder', which"),
    # Training asks what the judge does not, or the other way round.
    (
        "sasrec", "views: {main: [mask: {}]}",
        "pretraining: a causal encoder is asked for the next item at its last item, and the view"
        " 'main' trains it at [MASK] alone: use next_item, or causal: false",
    ),
    (
        "bert4rec", "views: {main: [next_item: {}]}",
        "pretraining: next_item needs a causal encoder: here every event of the view 'main' would"
        " see the item that it is to predict",
    ),
]  # fmt: skip
# The same for keys outside of the first stage.
OUTSIDE = [
    ("uprec-mip", "pretrainin: {steps: 3}", "pretrainin is no key; a recipe has model, texts"),
    ("uprec-mip", "pretraining: 3", "pretraining is 3, expected a group of keys: views, object"),
    ("uprec-mip", "model: {widht: 3}", "model.widht is no key; model has width, max_len"),
    ("uprec-mip", "model: {width: x}", "model.width is 'x', expected a whole number"),
    ("uprec-mip", "model: {tokens: [cls, foo]}", "model.tokens.1 is 'foo', expected one of 'cls'"),
    ("uprec-mip", "model: {encoder: {transfromer: {}}}", "model.encoder.transfromer is no key; mo"),
    ("uprec-mip", "model: {encoder: {transformer: {layers: 0}}}", "transformer.layers must be at "),
    ("sasrec", "model: {encoder: {transformer: {layer: caser}}}", "transformer.layer is 'caser', "),
    ("bert4rec", "model: {encoder: {transformer: {layer: ligr}}}", "transformer.pre_norm must be "),
    ("uprec-mip", "model: {encoder: {transformer: null}}", "model.encoder: encoders names none: o"),
    ("uprec", "attributes: [{nam: region}]", "attributes.0.nam is no key; attributes.0 has name"),
    ("uprec", "attributes: [{kind: numeric}]", "attributes.0.name is missing"),
    ("uprec", "attributes: [{name: a, range: [1]}]", "attributes.0.range is [1], expected a list "),
    ("uprec", "attributes: [{name: a, range: [2, 1]}]", "attributes.0: attribute 'a': range must "),
    ("uprec", "recommendation: {init: {patch: -1}}", "recommendation.init.patch must not be nega"),
    ("sasrec", "model: {tokens: [cls]}", "model.tokens: [CLS] stands first and sees nothing unde"),
    ("sasrec", "model: {tokens: [sep]}", "model.tokens: [SEP] stands last and no item sees it un"),
    ("bert4rec", "evaluation: {negatives: 9}", "evaluation.negatives has no effect: candidates is"),
    ("uprec-mip", "evaluation: {seen: exclude}", "evaluation.seen has no effect: sampled candida"),
    ("bert4rec", "evaluation: {seed: 1}", "evaluation.seed has no effect: candidates is full"),
    ("dacf", "evaluation: {seen: exclude}", "evaluation.seen has no effect: no stage ranks items"),
    ("dacf", "evaluation: {cutoffs: [3]}", "evaluation.cutoffs has no effect: no stage ranks"),
    ("dacf", "evaluation: {candidates: sampled}", "evaluation.candidates has no effect: no stage"),
    ("bert4rec", "evaluation: {friend_negatives: 9}", "evaluation.friend_negatives has no effect"),
    ("bert4rec", "users: {seed: 1}", "users.seed has no effect: users.fraction is 1"),
    ("bert4rec", "attributes: [{name: region}]", "attributes has no effect: no stage predicts the"),
    ("uprec", "users: {fraction: 2}", "users.fraction must be in (0, 1], got 2.0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [(name, f"pretraining: {{{text}}}", message) for name, text, message in WRONG] + OUTSIDE,
)
def test_a_wrong_recipe_ends_in_one_line_that_names_the_key(tmp_path, name, text, message):
    file = written(tmp_path, "bad.yaml", f"base: {name}\n{text}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", f"--config={file}", "--data=nowhere", "--output=nowhere"])
    said = str(stopped.value)
    assert said.startswith("fastrec: error: ") and message in said
    assert "\n" not in said and len(said) < 450


def test_attributes_that_tell_who_is_no_negative_have_an_effect(tmp_path):
    text = (
        "base: cl4srec\nattributes: [{name: region}]\n"
        "pretraining: {objectives: {contrast: {false_negatives: [profile]}}}\n"
    )
    chosen = from_values(Recipe, recipes.load(written(tmp_path, "mine.yaml", text)))
    assert chosen.pretraining.objectives.contrast.false_negatives == ["profile"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [", "bad.yaml is not YAML: while parsing a flow node"),
        ("- a\n- b", "bad.yaml: a recipe is a mapping of keys, not list"),
        ("seed", "bad.yaml: a recipe is a mapping of keys, not str"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        recipes.load(written(tmp_path, "bad.yaml", text))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--pretraining.steps=x", "pretraining.steps is 'x', expected a whole number"),
        ("--pretraining.stepps=3", "pretraining.stepps is no key; pretraining has views, obj"),
        ("--pretraining.views.main=[msk: {}]", "pretraining.views.main.0.msk is no key"),
        ("--pretraining.objectives.itm.loss=bce", "pretraining.objectives.itm is no key"),
        ("--pretraining.views=[", "pretraining.views is not YAML: while parsing a flow node"),
        ("--model.width=8.5", "model.width is 8.5, expected a whole number"),
    ],
)
def test_a_wrong_flag_ends_in_one_line_that_names_the_key(flag, message):
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "--config=uprec", flag, "--data=nowhere", "--output=nowhere"])
    assert message in str(stopped.value) and "\n" not in str(stopped.value)


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
