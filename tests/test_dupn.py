# SPDX-License-Identifier: Apache-2.0
"""Several heads on one recurrent user model (recipe `dupn`): attention pool, weights of heads and
users without labels, against plain PyTorch; from a file to predictions."""

import json
import re

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from builders import AGE, CITY, Known, loader_of, model_of, six_users
from safetensors.torch import load_file

from fastrec import recipes
from fastrec.cli import main
from fastrec.data.attributes import EncodedAttribute
from fastrec.data.settings import from_values
from fastrec.data.steps.next_item import NextItem
from fastrec.nn.encoders.gru import Gru
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.objectives.item import Item
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.random import Rng
from fastrec.training.config import Recipe
from fastrec.training.heads_file import saved_scales

SEX = EncodedAttribute("sex", torch.tensor([1, -1, 0, 0, -1, 1]), ("f", "m"))  # a binary column
WEIGHTS = {"sex": 2.5, "age": 0.25}


def system(attributes=(AGE, CITY, SEX), weights=None, dropout: float = 0.0):
    """(model, joint objective, loader) of next items and attributes, as the recipe has them."""
    torch.manual_seed(0)
    model = UserModel(20, ModelConfig(width=8, max_len=10, dropout=dropout, encoder=Gru()))
    side = Known(six_users(), list(attributes))
    attributes = UserAttributes(weight=0.5, weights=weights or {}, pool="attention")
    objective = JointObjective({"item": Item(), "user_attributes": attributes}, model, side)
    return model, objective, loader_of(model, {"main": [NextItem()]}, side)


def plain(model, objective, batch) -> torch.Tensor:
    """The joint loss from states, a user and a head at a time."""
    states, head = model.encode(batch).states, objective.parts["user_attributes"]
    table, bias = model.item_table, model.item_head.bias
    query = model.item_head.query(states)
    item = F.cross_entropy(query @ table.T + bias, batch.events["target"], ignore_index=-100)
    rows, losses = head.linear.weight.split(head.sizes), []
    biases = head.linear.bias.split(head.sizes)
    for attribute, weight, bias in zip((AGE, CITY, SEX), rows, biases, strict=True):
        found = []
        for user, sample in enumerate(batch.sample_ids.tolist()):
            if batch.lengths[user] == 0:
                continue
            own = states[batch.offsets[user] : batch.offsets[user + 1]]
            score = torch.tanh(own @ head.pool.project.weight.T + head.pool.project.bias)
            vector = (score @ head.pool.query).softmax(0) @ own
            output, target = weight @ vector + bias, attribute.values[sample]
            if attribute.labels and target >= 0:
                found.append(F.cross_entropy(output, target))
            elif not attribute.labels and not target.isnan():
                found.append(F.huber_loss(output[0], target))
        losses.append(torch.stack(found).mean())
    age, city, sex = losses
    return item + 0.5 * (0.25 * age + city + 2.5 * sex)


def test_the_loss_is_the_weighted_sum_of_all_heads():
    model, objective, loader = system(weights=WEIGHTS)
    batch = loader.batch_at(0)["main"]
    terms = objective(model, {"main": batch}, Rng(0, 0))
    assert [term.name.removeprefix("user_attributes.") for term in terms] == [
        "item", "age", "city", "sex"]  # fmt: skip
    # Users with a label and an event: of one, `next_item` has left none.
    assert [int(term.number) for term in terms[1:]] == [4, 4, 3]
    parameters = [*model.parameters(), *objective.parameters()]
    found = torch.autograd.grad(total_loss(terms), parameters, allow_unused=True)
    expected = plain(model, objective, batch)
    torch.testing.assert_close(total_loss(terms), expected)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert sum(grad is not None for grad in found) > 10
    for actual, reference in zip(found, wanted, strict=True):
        if actual is not None or reference is not None:
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-6)


def test_a_weight_scales_its_head_alone():
    losses = {}
    for weights in ({}, {"city": 3.0}):
        model, objective, loader = system(weights=weights)
        terms = objective(model, loader.batch_at(0), Rng(0, 0))
        losses[bool(weights)] = {term.name: term.loss.item() for term in terms}
    before, after = losses[False], losses[True]
    assert after.pop("user_attributes.city") == pytest.approx(
        3 * before.pop("user_attributes.city")
    )
    assert after == before


def test_users_without_a_label_give_no_gradient():
    _, objective, loader = system([SEX])
    batch = loader.batch_at(0)["main"]
    head = objective.parts["user_attributes"]
    vectors = torch.randn(6, 8, requires_grad=True)
    loss, count = head.losses(vectors, batch.users)["sex"]
    (grad,) = torch.autograd.grad(loss, vectors)
    missing = SEX.values[batch.sample_ids] < 0
    assert count == 4 and missing.sum() == 2
    assert not grad[missing].any() and grad[~missing].abs().sum(1).min() > 0


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"gender": 1.0}, "weights names 'gender'; the attributes that are predicted are ['age', "),
        ({"age": 0.0}, "weights.age must be above 0 and finite, got 0.0"),
        ({"age": float("inf")}, "weights.age must be above 0 and finite, got inf"),
        ({"age": float("nan")}, "weights.age must be above 0 and finite, got nan"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        UserAttributes(weights=weights).build(model_of(), Known(six_users(), [AGE, CITY]))


def test_the_recipe_is_recurrent_and_pools_by_attention():
    chosen = from_values(Recipe, recipes.load("dupn"))
    assert chosen.model.causal and chosen.model.encoder.gru == Gru(layers=1)
    assert [*chosen.pretraining.parts] == ["item", "user_attributes"]
    for stage in (chosen.pretraining, chosen.profile):
        assert stage.parts["user_attributes"].pool == "attention"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """150 users of two kinds, who take items of their half; a quarter does not say which kind."""
    folder, generator = tmp_path_factory.mktemp("dupn"), np.random.default_rng(0)
    kinds = generator.integers(2, size=150)
    lines = [
        f"{user} " + " ".join(str(1 + 20 * kind + i) for i in generator.permutation(20)[:8])
        for user, kind in enumerate(kinds, 1)
    ]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    known = generator.random(150) < 0.75
    users = pl.DataFrame({"user_id": range(1, 151), "kind": ["ab"[kind] for kind in kinds],
                          "age": generator.integers(20, 60, 150).astype(float)})  # fmt: skip
    users = users.with_columns(pl.when(pl.Series(known)).then("kind").alias("kind"))
    users.write_csv(folder / "users.csv")
    main(["prepare", f"--source={folder / 'log.txt'}", f"--output={folder / 'data'}",
          "--format=s3rec", f"--user_attributes={folder / 'users.csv'}"])  # fmt: skip
    return folder


SMALL = ["--config=dupn", "--model.width=16", "--pretraining.batch_size=60",
         "--pretraining.steps=5", "--pretraining.validate_every=5", "--pretraining.warmup_steps=0",
         "--profile.steps=60", "--profile.validate_every=20", "--profile.batch_size=60",
         "--profile.learning_rate=0.01",
         "--pretraining.objectives.user_attributes.weights.kind=2"]  # fmt: skip


def test_from_five_steps_of_pretraining_to_the_kind_of_a_user(folder, tmp_path, capsys):
    flags = [*SMALL, f"--data={folder / 'data'}"]
    main(["pretrain", *flags, f"--output={tmp_path / 'pre'}"])
    (log,) = (tmp_path / "pre").glob("metrics/version_0/metrics.csv")
    columns = pl.read_csv(log).columns
    assert {"train/item", "train/user_attributes.kind", "train/user_attributes.age"} <= {*columns}
    (scale,) = [s for s in saved_scales(tmp_path / "pre" / "model")["user_attributes"]
                if s["name"] == "kind"]  # fmt: skip
    assert scale["labels"] == ["a", "b"] and scale["pool"] == "attention"
    main(["finetune", *flags, "--task=profile", f"--init={tmp_path / 'pre' / 'model'}",
          f"--output={tmp_path / 'profile'}"])  # fmt: skip
    taken = json.loads((tmp_path / "profile" / "summary.json").read_text())["taken"]
    assert {"user_attributes.linear.weight", "user_attributes.pool.query"} <= set(taken)
    before, after = (
        load_file(tmp_path / run / "model" / "heads.safetensors")["user_attributes.pool.query"]
        for run in ("pre", "profile")
    )
    assert not torch.equal(before, after), "the pool is trained"
    main(["evaluate", *flags, "--task=profile", f"--pretrained={tmp_path / 'profile' / 'model'}",
          f"--output={tmp_path / 'metrics.json'}"])  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert metrics["model"]["kind accuracy"] > 0.9 > metrics["constant"]["kind accuracy"]
    capsys.readouterr()
    with pytest.raises((SystemExit, ValueError)) as error:
        main(["pretrain", *flags, "--pretraining.objectives.user_attributes.weights.kid=1",
              f"--output={tmp_path / 'wrong'}"])  # fmt: skip
    said = str(error.value) + capsys.readouterr().err
    assert "weights names 'kid'; the attributes that are predicted are ['kind', 'age']" in said
    assert not (tmp_path / "wrong").exists()
