"""Batches padded to a capacity, as CUDA graphs take them: the same losses and gradients, constant
shapes, and nothing that waits for a value. The capture itself needs a GPU, see `benchmarks/gpu`."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_device_paths import launches  # noqa: F401
from test_objectives import AGE, CITY, WEIGHTS, loader_of, model_of
from test_training import recipe, run, trained_weights

from fastrec import backend
from fastrec.data.relations import FriendSampler, SocialGraph
from fastrec.data.synthetic import generate
from fastrec.objectives.joint import JointObjective, Objectives, total_loss
from fastrec.objectives.masked_item import ItemLoss, Masking
from fastrec.training.graphed import GraphedObjective, _Losses

OBJECTIVES = {
    "joint": WEIGHTS,
    "friends_in_their_task_only": replace(WEIGHTS, friends_in_all=False),
    "attributes_by_cls": Objectives(masked_item=0.0, user_attribute=1.0, attribute_pool="cls"),
    "sampled_shared": Objectives(item_loss=ItemLoss(kind="sampled", negatives=6)),
    "sampled_own": Objectives(item_loss=ItemLoss(kind="sampled", negatives=6, shared=False)),
}


class Replay:
    """What a graph does with inputs and kernels: copies into places of fixed shapes, calls."""

    def __init__(self, losses: _Losses, packs: list[torch.Tensor]):
        self.losses, self.places = losses, [pack.clone() for pack in packs]

    def __call__(self, *packs: torch.Tensor) -> torch.Tensor:
        for place, pack in zip(self.places, packs, strict=True):
            assert place.shape == pack.shape
            place.copy_(pack)
        return self.losses(*self.places)


def counted():
    """(what was captured so far, the capture to give)."""
    captures: list[Replay] = []

    def capture(losses, packs):
        captures.append(Replay(losses, packs))
        return captures[-1]

    return captures, capture


def gradients(terms, *modules) -> list[torch.Tensor]:
    parameters = [p for module in modules for p in module.parameters()]
    found = torch.autograd.grad(total_loss(terms), parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return [torch.zeros_like(p) if grad is None else grad for grad, p in pairs]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padded_batches_give_the_same_losses_and_gradients(name):
    model = model_of()
    objective = JointObjective(OBJECTIVES[name], model, [AGE, CITY])
    loader = loader_of(model, batch_size=4)  # of six users: every second batch has two
    captures, capture = counted()
    graphed = GraphedObjective(model, objective, Masking(), seed=3, capture=capture)
    for step in range(8):
        batch = loader.batch_at(step)
        expected = objective(model, batch, Masking(), seed=3, step=step)
        actual = graphed(batch, step)
        assert [(t.objective, t.weight) for t in actual] == [
            (t.objective, t.weight) for t in expected
        ]
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-6)
        pairs = zip(
            gradients(actual, model, objective), gradients(expected, model, objective), strict=True
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert 1 <= len(captures) <= 4
    whole = loader_of(model).batch_at(0)
    first, second = ([t.loss.item() for t in graphed(whole, step)] for step in (0, 1))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_a_batch_without_friends_is_all_padding():
    model = model_of()
    lonely = FriendSampler(SocialGraph.from_pairs(np.empty((0, 2)), 6))
    objective = JointObjective(WEIGHTS, model, [AGE, CITY])
    graphed = GraphedObjective(model, objective, Masking(), seed=3, capture=Replay)
    terms = graphed(loader_of(model, friends=lonely).batch_at(0), 0)
    assert terms[-1].objective == "social_relation" and terms[-1].loss == 0
    assert all(grad.isfinite().all() for grad in gradients(terms, model, objective))


def test_a_full_capacity_is_kept_and_a_larger_batch_extends_it():
    model = model_of()
    objective = JointObjective(Objectives(), model, [])
    captures, capture = counted()
    graphed = GraphedObjective(model, objective, Masking(), seed=3, capture=capture)
    small, large = (
        loader_of(model, friends=None, columns={}, batch_size=n, shuffle=False).batch_at(0)
        for n in (1, 6)
    )
    graphed(small, 0)
    graphed(small, 0)
    assert len(captures) == 1
    graphed(large, 0)
    capacity = graphed.capacity
    assert len(captures) == 2 and capacity.events > len(large.values)
    graphed(small, 1)
    assert len(captures) == 2 and graphed.capacity == capacity


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_waits_for_a_value(name, launches, monkeypatch):  # noqa: F811
    """On meta tensors, which have no values: what asks for one raises. They stand for CUDA, up to
    the launch of a kernel."""
    monkeypatch.setitem(backend.NATIVE, "meta", "triton")
    seen = []

    def keep(losses, packs):
        seen.append((losses, packs))
        return losses

    model = model_of()
    objective = JointObjective(OBJECTIVES[name], model, [AGE, CITY])
    GraphedObjective(model, objective, Masking(), seed=3, capture=keep)(
        loader_of(model).batch_at(0), 0
    )
    losses, packs = seen[0]
    out = losses.to("meta")(*(pack.to("meta") for pack in packs))
    out.sum().backward()
    assert len(launches) > 10 and out.is_meta and model.item_embedding.weight.grad.is_meta


def test_training_with_replayed_steps_ends_with_the_same_weights(tmp_path, monkeypatch):
    generate(tmp_path / "data", num_users=100, num_items=50, seed=3)
    options = dict(steps=6, validate_every=3, checkpoint_every=3, learning_rate=1e-4)
    found = []
    for cuda_graph in (False, True):
        if cuda_graph:
            monkeypatch.setattr("fastrec.training.fit._check_one_gpu", lambda devices: None)
            graphed = functools.partial(GraphedObjective, capture=Replay)
            monkeypatch.setattr("fastrec.training.module.GraphedObjective", graphed)
        stage = recipe(**options, cuda_graph=cuda_graph).pretraining
        run(tmp_path / "data", tmp_path / str(cuda_graph), stage)
        found.append(trained_weights(tmp_path / str(cuda_graph)))
    assert found[0].keys() == found[1].keys() and found[1]["step"] == 6
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=2e-5, msg=name)


def test_without_one_gpu_nothing_is_written(tmp_path):
    if torch.cuda.device_count() == 1:
        pytest.skip("there is one GPU")
    generate(tmp_path / "data", num_users=20, num_items=10, seed=3)
    stage = recipe(cuda_graph=True).pretraining
    with pytest.raises(ValueError, match="one process on one GPU: devices is auto"):
        run(tmp_path / "data", tmp_path / "output", stage)
    assert not (tmp_path / "output").exists()
