# SPDX-License-Identifier: Apache-2.0
"""Patches of classes that stand for those of a library, and what is refused."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastrec
from fastrec.integrations import patching
from fastrec.integrations.patching import (
    Patch,
    Replacement,
    compare,
    keep_original,
    own_method,
    scored_rows,
)


class Base:
    def inherited(self):
        return "base"


class Model(Base):
    def loss(self):
        return "original"


def fused(self):
    return "fused"


@pytest.fixture
def active(monkeypatch):
    monkeypatch.setattr(patching, "_ACTIVE", {})
    places = [Replacement(Model, "loss", fused), Replacement(Model, "inherited", fused)]
    handle = patching._ACTIVE["recbole"] = Patch("recbole", places)
    yield handle
    handle.undo()


def test_undo_restores_own_and_inherited_functions(active):
    model, own = Model(), "loss" in Model.__dict__
    assert (model.loss(), model.inherited()) == ("fused", "fused") and own
    assert fastrec.patched() == ["recbole"] and fastrec.patch("recbole") is active
    assert active.replaced[0] == f"{__name__}.Model.loss" and "active, 2" in repr(active)
    active.undo()
    assert (model.loss(), model.inherited()) == ("original", "base")
    assert "inherited" not in Model.__dict__ and fastrec.patched() == []
    active.undo()  # a second time does nothing
    assert "undone" in repr(active)


def test_leaving_the_context_and_unpatch_undo(active):
    with active:
        assert Model().loss() == "fused"
    assert Model().loss() == "original"
    fastrec.unpatch("recbole")  # nothing happens where there is no patch
    fastrec.unpatch()


def test_the_end_of_a_with_leaves_a_patch_that_was_active(active):
    with fastrec.patch("recbole") as inner, fastrec.patch("recbole"):
        assert inner is active
    with pytest.raises(ZeroDivisionError), fastrec.patch("recbole"):
        1 / 0  # noqa: B018
    assert Model().loss() == "fused" and fastrec.patched() == ["recbole"]
    with active, fastrec.patch("recbole"):
        pass
    assert Model().loss() == "original" and fastrec.patched() == []


def test_undo_refuses_what_was_replaced_since(active, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(Model, "loss", lambda self: "another")
        with pytest.raises(RuntimeError, match=r"Model\.loss was replaced by something else"):
            active.undo()
        assert Model().inherited() == "fused"  # nothing was put back


def test_wrong_names_and_missing_libraries(monkeypatch):
    for call in (fastrec.patch, fastrec.unpatch):
        with pytest.raises(
            ValueError, match="recbole, rectools, replay, transformers, got 'keras'"
        ):
            call("keras")
    monkeypatch.setitem(patching.LIBRARIES, "recbole", ("no-such-distribution", "1"))
    monkeypatch.setattr(patching, "_ACTIVE", {})
    with pytest.raises(ModuleNotFoundError, match="no-such-distribution, which is not installed"):
        fastrec.patch("recbole")
    assert fastrec.patched() == []


def test_reasons_are_said_once():
    with pytest.warns(UserWarning, match="leaves Model as it is: a test says so"):
        keep_original("Model", "a test says so")
    keep_original("Model", "a test says so")  # an error if it warned: see filterwarnings below


pytestmark = pytest.mark.filterwarnings("error:fastrec leaves")


def test_compare_is_without_dropout_and_leaves_modes_and_gradients():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    model[0].eval()
    x = torch.randn(4, 3)
    report = compare(model, lambda: model(x).sum(), lambda: 2 * model(x).sum())
    assert report.loss_difference == pytest.approx(abs(report.loss), rel=1e-5)
    largest, difference = report.gradients["2.bias"]
    assert (largest, difference) == (4, 4)
    assert [module.training for module in model] == [False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert "2.bias: gradient up to 4.0e+00, difference 4.0e+00" in str(report)


def test_compare_has_no_gradients_where_nothing_takes_one():
    model = nn.Linear(3, 1).requires_grad_(False)
    x = torch.randn(4, 3)
    report = compare(model, lambda: model(x).sum(), lambda: model(x).sum() + 1)
    assert report.gradients == {} and report.loss_difference == pytest.approx(1, rel=1e-5)
    prompt = x.clone().requires_grad_()  # a loss with a gradient, of no parameter
    report = compare(model, lambda: model(prompt).sum(), lambda: model(prompt).sum())
    assert report.gradients == {} and report.loss_difference == 0
    model.extra = nn.Parameter(torch.ones(2))  # a parameter that no loss reads
    report = compare(model, lambda: model(x).sum(), lambda: model(x).sum())
    assert report.gradients == {"extra": (0, 0)}


def test_methods_of_an_object_count_as_those_of_its_class():
    class Mine(Model):
        def loss(self):
            return "mine"

    model = Model()
    assert own_method(model, Model, ("loss", "inherited")) is None
    assert own_method(Mine(), Model, ("loss",)) == "it has a loss of its own"
    model.loss = model.loss  # as Lightning does around a step
    assert own_method(model, Model, ("loss",)) is None
    model.inherited = lambda: "mine"
    assert own_method(model, Model, ("loss", "inherited")) == "it has a inherited of its own"


@pytest.mark.parametrize("number", [2, 4])
def test_rows_of_other_places_are_refused(number):
    with pytest.raises(ValueError, match=f"each place: 3 places, {number} targets"):
        scored_rows(torch.arange(number), 0, torch.randn(3, 2))


def test_the_environment_of_a_library_must_have_it():
    absent = [name for name in patching.LIBRARIES if importlib.util.find_spec(name) is None]
    if not absent:
        pytest.skip("every library is installed")
    file = Path(__file__).with_name(f"test_{absent[0]}.py")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", file, __file__],
        env=os.environ | {"FASTREC_LIBRARY": absent[0]}, text=True, capture_output=True,
        cwd=file.parents[2],
    )  # fmt: skip
    assert ran.returncode == 1 and "is not installed" in ran.stdout, ran.stdout + ran.stderr
