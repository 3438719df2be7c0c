# SPDX-License-Identifier: Apache-2.0
"""What does not fit is said before the folder of a run is begun."""

import dataclasses

import numpy as np
import polars
import pytest
import torch
from builders import model_of, recipe, synthetic
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import fastrec
from fastrec import Recipe, SequenceDataset, UserModel, fit, load_model, user_vectors
from fastrec.cli import main
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.mask import Mask
from fastrec.data.steps.prefix import Prefix
from fastrec.data.steps.segment import Segment
from fastrec.nn.encoders.gru import Gru
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.pool import Interests, Pool
from fastrec.objectives.align import Align
from fastrec.objectives.cold_start import ColdStart
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.friends import Friends
from fastrec.objectives.item import Item
from fastrec.objectives.parts import Objectives
from fastrec.objectives.rank import Rank
from fastrec.objectives.segments import Segments
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.training.heads_file import trained_pool
from fastrec.training.stage import Init
from fastrec.training.start import warn_of_settings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return SequenceDataset.load(synthetic(folder, num_users=60, num_items=30))


class Halves:
    """A step of one's own that makes items that are none."""

    def __call__(self, batch, rng, side):
        return dataclasses.replace(batch, values=batch.values / 2)


@pytest.mark.parametrize(
    ("views", "objectives", "message"),
    [
        ([], {"item": Item()}, "a view of the objective item has no targets"),
        ([Halves(), Mask()], {"item": Item()}, "int|long|dtype"),
        ([Mask()], {"cold_start": ColdStart()}, "cold_start needs judge: cold_start"),
    ],
)
def test_no_folder_is_begun(data, tmp_path, views, objectives, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        fit(data, recipe=recipe(), views={"main": views}, objectives=objectives,
            output=tmp_path / "run", progress=False)  # fmt: skip
    assert not (tmp_path / "run").exists()


class Mine(UserModel):
    pass


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            dict(dataset="data"),
            TypeError,
            "got 'data': SequenceDataset.load reads it",
        ),
        (
            dict(model="run/model"),
            TypeError,
            "got 'run/model': fastrec.load_model reads it",
        ),
        (dict(model=recipe()), TypeError, r"model is a Recipe: fit\(dataset, recipe=\.\.\) trains"),
        (dict(model=Mine(30, recipe().model)), TypeError, "a UserModel: Mine is another class"),
        (dict(callbacks=Callback()), TypeError, "callbacks must be a list, got Callback"),
        (dict(loggers=CSVLogger(".")), TypeError, "loggers must be a list, got CSVLogger"),
        (
            dict(objectives=[Item()]),
            TypeError,
            r"objectives must be named, .* got",
        ),
        (
            dict(objectives={"item": {}}),
            TypeError,
            r"objectives.item: \{\} is no objective",
        ),
        (dict(views={"main": ["mask"]}), TypeError, "views.main: 'mask' is no step: Mask"),
        (
            dict(views={"main": [{"mask": {}}]}),
            TypeError,
            r"views.main: \{'mask': .* is no step",
        ),
        (dict(init={"freeze": ["all"]}), ValueError, "init.freeze.0 is 'all', expected one of"),
        (dict(tables={"updates": "rows"}), ValueError, "tables.updates is no key"),
        (dict(similar={"model": 3}), ValueError, "similar.model is 3, expected a word"),
    ],
)
def test_what_stands_in_the_place_of_something_else_is_named(data, arguments, error, message):
    with pytest.raises(error, match=message):
        fit(**{"dataset": data, "recipe": recipe(), "progress": False} | arguments)


def test_groups_of_keys_and_numbers_of_numpy_are_keys_too(data):
    few = dict(steps=np.int64(2), validate_every=np.int64(2), progress=False, batch_size=20)
    model = fit(data, recipe=recipe(), tables={"update": "dense"}, **few)
    tuned = fit(data, model, recipe=recipe(), init={"freeze": ["encoder"]}, **few, monitor="steps")
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]) or not name.startswith("encoder."), name


def test_a_checkpoint_callback_of_lightning_has_its_folder(data, tmp_path):
    keep = ModelCheckpoint(tmp_path / "mine", every_n_train_steps=1)
    fit(data, recipe=recipe(), steps=2, validate_every=2, callbacks=[keep], progress=False)
    assert [file.suffix for file in (tmp_path / "mine").iterdir()] == [".ckpt"]


def test_the_rehearsal_leaves_no_trace(data, tmp_path, monkeypatch):
    """Batch statistics, gradients and the backends of objectives."""
    from fastrec.objectives.joint import JointObjective

    before = {}
    whole = JointObjective.rehearse

    def watched(self, model, views):
        before["state"] = {name: part.clone() for name, part in self.state_dict().items()}
        before["backends"] = [getattr(part, "backend", 0) for part in self.parts.values()]
        whole(self, model, views)
        assert all(torch.equal(part, before["state"][n]) for n, part in self.state_dict().items())
        assert [getattr(part, "backend", 0) for part in self.parts.values()] == before["backends"]
        assert self.training and all(p.grad is None for p in model.parameters())

    monkeypatch.setattr(JointObjective, "rehearse", watched)
    fit(data, recipe=recipe(), views={"a": [Mask()], "b": []}, judge="vectors", steps=1,
        objectives={"align": Align(["a", "b"], pool="max"), "item": Item(["a"])},
        backend="reference", output=tmp_path / "run", progress=False)  # fmt: skip
    assert before["state"] and "reference" in before["backends"]


def test_a_start_that_does_not_fit_names_the_stage_that_is_run(data):
    causal, masked = (model_of(num_items=30, causal=c) for c in (True, False))
    both = Recipe.load("bert4rec")
    both = dataclasses.replace(both, model=masked.config)
    with pytest.raises(ValueError, match="recommendation cannot start from that model: recommenda"):
        fit(data, causal, recipe=both, stage="recommendation", steps=1)
    none = dataclasses.replace(both.stages["recommendation"], views={"main": []},
                               objectives={"p": UserAttributes()}, judge="attributes")  # fmt: skip
    with pytest.raises(ValueError, match="profile cannot start from that model: the recipe is for o"
                                         "ther models, in its pretraining: a causal"):  # fmt: skip
        fit(data, causal, recipe=dataclasses.replace(both, profile=none), stage="profile", steps=1)


def test_pools_that_an_objective_has_trained(data, tmp_path):
    """Vectors of `embed` are those of the module."""
    for how, name in (("attention", "attention"), (Interests(3), "interests")):
        run = tmp_path / name
        fit(data, recipe=recipe(), views={"main": []}, judge="attributes", steps=2,
            objectives={"user_attributes": UserAttributes(pool=how)}, output=run,
            validate_every=2, progress=False)  # fmt: skip
        main(["embed", f"--data={data.path}", f"--pretrained={run / 'model'}", f"--pool={name}",
              f"--output={run / 'users.parquet'}"])  # fmt: skip
        model = UserModel.from_pretrained(run / "model")
        pool = trained_pool(run / "model", name, model.config.width)
        with torch.no_grad():
            encoded = model.encode(model.inputs(data, torch.arange(60), "all"))
            expected = pool(model, encoded)
        found = polars.read_parquet(run / "users.parquet")["vector"].to_numpy()
        torch.testing.assert_close(torch.tensor(found), expected)
        fresh = Pool(how, model.config.width)
        assert fresh.state_dict().keys() == pool.state_dict().keys()
        assert user_vectors(model, data, pool=pool)["vector"].to_numpy().tolist() == found.tolist()
        with pytest.raises(ValueError, match="has parameters: give the module of trained_pool"):
            user_vectors(model, data, pool=how)
    other = "interests" if name == "attention" else "attention"
    with pytest.raises(SystemExit, match=f"pool {other}: no objective has one in"):
        main(["embed", f"--data={data.path}", f"--pretrained={run / 'model'}", f"--pool={other}",
              f"--output={run / 'x.parquet'}"])  # fmt: skip
    with pytest.raises(ValueError, match="pool interests of user_attributes: "):
        trained_pool(run / "model", "interests", 8)


def test_a_model_knows_whether_its_scores_of_items_are_trained(data, tmp_path):
    """By its own stage or one before it, whatever stages its recipe has beside them."""
    profile = dict(views={"main": []}, judge="attributes", steps=1, progress=False,
                   objectives={"user_attributes": UserAttributes(pool="max")})  # fmt: skip
    first = fit(data, recipe=recipe(), output=tmp_path / "a", **profile)
    again = fit(data, first, recipe=recipe(), output=tmp_path / "b", **profile,
                initial_folder=str(tmp_path / "a" / "model"))  # fmt: skip
    for model in (first, again, load_model(tmp_path / "b" / "model", data)):
        with pytest.raises(ValueError, match="trained for user_attributes .* scores no next items"):
            fastrec.recommend(model, data, 3)
    alone = dict(views={"a": [], "b": []}, objectives={"contrast": Contrast(["a", "b"])})
    views = fit(data, recipe=recipe(), steps=1, monitor="steps", progress=False, **alone)
    judged = fit(data, recipe=recipe(), steps=2, validate_every=2, progress=False, **alone)
    assert judged.trained_on["scores_items"] is False  # whatever its judge has asked
    with pytest.raises(ValueError, match="trained for contrast .stage pretraining. without the"):
        fastrec.recommend(views, data, 3)
    items = fit(data, again, recipe=recipe(), steps=1, output=tmp_path / "c", progress=False)
    later = fit(data, items, recipe=recipe(), output=tmp_path / "d", **profile)
    for model in (items, later):
        assert len(fastrec.recommend(model, data, 3)) == 180


@pytest.mark.parametrize(
    ("init", "what"),
    [
        (Init(pool="contrast"), "init.pool: contrast"),
        (Init(take=["items", "encoder", "contrast"]), "init.take: .'contrast'."),
    ],
)
def test_what_stands_beside_a_model_needs_its_folder(data, init, what):
    with pytest.raises(ValueError, match=f"{what} needs initial_folder, the folder"):
        fit(data, model_of(num_items=30), recipe=recipe(), init=init, steps=1, progress=False)


@pytest.mark.parametrize("name, views, settings", [
    ("contrast", {"a": [], "b": []}, Contrast(["a", "b"])),
    ("segments", {"a": [Prefix(), Segment()], "b": [Prefix(), Segment(keep=True)]},
     Segments(["a", "b"])),
    ("friends", {"main": [Friend(same_profile=False)]}, Friends()),
    ("rank", {name: [] for name in "abcd"}, Rank([*"abcd"])),
])  # fmt: skip
def test_objectives_that_tell_users_apart_refuse_steps_of_one(
    data, tmp_path, name, views, settings
):
    chosen = recipe(
        views=views, objectives=Objectives(**{name: settings}), steps=2, validate_every=2,
        batch_size=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"{name} tells the users of a step apart, and a step has"):
        fit(data, recipe=chosen, output=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_another_encoder_is_warned_of_by_its_name():
    said = "settings: encoder.transformer None, not given, encoder.gru given, not None$"
    with pytest.warns(UserWarning, match=said):
        warn_of_settings(ModelConfig(), ModelConfig(encoder=Gru()))
