# SPDX-License-Identifier: Apache-2.0
"""torch.set_default_device changes nothing but where the parameters of a new model are; nor does
torch.set_default_dtype change a step of training or its evaluation (ops: test_default_dtype.py)."""

import ast
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils._device
from builders import JOINT, SOCIAL_VIEWS, loader_of, model_of, six_users, social_side
from op_check import need, on
from op_db import OPS
from op_db.case import run
from wrong_arguments import covering

import fastrec
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.fill import Fill
from fastrec.data.steps.insert import Insert
from fastrec.data.steps.mask import Mask
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.reorder import Reorder
from fastrec.data.steps.same_target import SameTarget
from fastrec.data.steps.share import Schedule
from fastrec.data.steps.substitute import Substitute
from fastrec.data.steps.window import Window
from fastrec.data.views import Again
from fastrec.evaluation.next_item import NextItemJudge
from fastrec.evaluation.protocol import Protocol
from fastrec.nn.encoders.caser import Caser
from fastrec.nn.filler import Filler
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.item import Item, Sampled
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.objectives.rank import Rank
from fastrec.random import Rng

HALF = torch.float16
FACTORIES = {function.__name__ for function in torch.utils._device._device_constructors()}


@pytest.fixture
def on_meta():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture(params=["device", "dtype"])
def use_another(request):
    """Sets another default device or dtype."""
    device = request.param == "device"
    yield lambda: torch.set_default_device("meta") if device else torch.set_default_dtype(HALF)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def without(key: str, tree: ast.AST, factories: Collection[str] = FACTORIES) -> list[int]:
    """Lines of calls torch.<factory>(...) without a key, but for those of a new Parameter."""
    lines = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "Parameter":
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            given = {keyword.arg for keyword in node.keywords}
            named = key in given or None in given  # None: of **options
            if of_torch and node.func.attr in factories and not named:
                lines.append(node.lineno)
        lines += without(key, node, factories)
    return lines


def everywhere(key: str, *factories) -> dict[str, list[int]]:
    """Lines of fastrec by file, see `without`."""
    root = Path(fastrec.__file__).parent
    files = [*sorted(root.rglob("*.py")), *sorted((root.parent / "kernels").rglob("*.py"))]
    found = {
        str(path.relative_to(root.parent)): without(key, ast.parse(path.read_text()), *factories)
        for path in files
    }
    return {file: lines for file, lines in found.items() if lines}


def test_every_factory_call_names_its_device():
    source = "nn.Parameter(torch.zeros(3))\ntorch.zeros(3)\ntorch.zeros(3, device=x)"
    assert without("device", ast.parse(source)) == [2]
    assert not everywhere("device")


def test_every_factory_of_fractions_names_its_dtype():
    """Beside those of new models, and of what is compared with other libraries."""
    found = everywhere("dtype", ("zeros", "ones", "empty", "rand", "randn", "eye", "linspace"))
    assert found.keys() <= {"fastrec/bench.py", "fastrec/integrations/recbole_mask.py"}, found


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    "op, sample",
    [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS for case in covering(op)],
)
def test_ops(op, backend, sample, request):
    need(op, backend, "cpu")
    expected = run(on(op, backend), sample, op.differentiable)
    request.getfixturevalue("on_meta")
    actual = run(on(op, backend), sample, op.differentiable)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=name)


def step_and_ranks(model, objective, side, views):
    """The loss and the gradients of a step of training, and the ranks of the judge."""
    views = loader_of(model, views, side).batch_at(0)
    loss = total_loss(objective(model, views, Rng(0, 0)))
    found = {"loss": loss.detach()}
    parameters = dict([*model.named_parameters(), *objective.named_parameters()])
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found |= {k: v for k, v in zip(parameters, grads, strict=True) if v is not None}
    users = torch.arange(5, device="cpu")
    judge = NextItemJudge(side.dataset, users, "test", Protocol(candidates="full"))
    return found | {"ranks": judge.score(model, objective, slice(0, 5))}


def caser() -> UserModel:
    """With user vectors of its own table."""
    head = {"head_table": "own", "head_transform": False, "user_width": 3}
    model = UserModel(20, ModelConfig(width=8, max_len=10, encoder=Caser(), **head), num_users=6)
    torch.nn.init.normal_(model.item_head.users.weight)
    return model


# Views of the steps that run a model, move with the training and round up.
RANKED = {
    "a": [Window(share=Schedule(0.5, 0.9, 9)), Fill(0.5)],
    "b": [OneOf([Crop(0.4, round="up"), Mask(0.6, True, "up", 1), Reorder()], independent=True)],
    "a_again": [Again("a")],
    "b_again": [Again("b")],
}
TWO_VIEWS = {
    "main": [NextItem()],
    "a": [Substitute(), Insert()],
    "b": [SameTarget(), OneOf([Crop(least=4), Reorder()]), NextItem()],
}
CONTRAST = {"item": Item(), "contrast": Contrast(["main", "b"], false_negatives=["target"])}
CONTRAST |= {"other": Contrast(["main", "a"], candidates="other")}
IN_BATCH = {"item": Item(sampled=Sampled(6, by="popularity", in_batch=True))}


@pytest.mark.parametrize(
    ("make", "views", "objectives"),
    [
        (lambda: model_of(tokens=["cls", "sep"]), SOCIAL_VIEWS, JOINT),
        (caser, {"main": [NextItem(ahead=2)]}, IN_BATCH),
        (model_of, RANKED, {"rank": Rank(list(RANKED))}),
        (lambda: model_of(causal=True), TWO_VIEWS, CONTRAST),
    ],
    ids=["uprec", "caser", "ranked", "two views"],
)
def test_a_step_of_training_and_its_evaluation(make, views, objectives, use_another):
    model, side = make(), social_side()
    side.filler = Filler(model_of())
    objective = JointObjective(objectives, model, side)
    expected = step_and_ranks(model, objective, side, views)
    use_another()
    actual = step_and_ranks(model, objective, side, views)
    assert len(expected) > 10
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "protocol", [Protocol(seen="exclude"), Protocol(seen="zero"), Protocol("sampled", negatives=3)]
)
def test_several_targets_are_ranked_and_averaged(protocol, use_another):
    model, dataset = model_of(), six_users()
    splits = np.stack([dataset.lengths - 5, dataset.lengths - 3], axis=1).clip(1)
    dataset = replace(dataset, splits=splits)

    def found():
        judge = NextItemJudge(dataset, torch.arange(5, device="cpu"), "test", protocol)
        ranks = judge.ranks(model)
        return ranks, judge.metrics(ranks), judge.popularity_ranks(), judge.lists(model, 3)

    expected = found()
    use_another()
    for ours, theirs in zip(found(), expected, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert "Recall@5" in expected[1]
