# SPDX-License-Identifier: Apache-2.0
"""What does not fit is said before the folder of a run is begun."""

import dataclasses

import polars
import pytest
import torch
from builders import model_of, recipe, synthetic

from fastrec import Recipe, SequenceDataset, UserModel, fit, user_vectors
from fastrec.cli import main
from fastrec.data.steps.mask import Mask
from fastrec.nn.pool import Interests, Pool
from fastrec.objectives.align import Align
from fastrec.objectives.cold_start import ColdStart
from fastrec.objectives.item import Item
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.training.model_folder import trained_pool


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
