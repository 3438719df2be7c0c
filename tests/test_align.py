# SPDX-License-Identifier: Apache-2.0
"""Alignment of two views (CLUE) against plain PyTorch in float64, on one process and on two; its
batch normalisation against torch's; the numbers that show a collapse; and collapses."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from builders import Known, jagged, loader_of, model_of, recipe, run, six_users, synthetic
from safetensors.torch import load_file

from fastrec.data.steps.crop import Crop
from fastrec.data.steps.mask import Mask
from fastrec.nn.batch_norm import BatchNorm
from fastrec.nn.pool import Encoded
from fastrec.nn.sphere import alignment, feature_std, uniformity
from fastrec.objectives.align import Align, ViewAlignment
from fastrec.objectives.joint import JointObjective, Term, of_all_ranks, total_loss
from fastrec.objectives.parts import Objectives
from fastrec.random import Rng

WIDTH = 8


def part_of(**settings) -> ViewAlignment:
    torch.manual_seed(2)
    part = Align(["a", "b"], **{"pool": "max", **settings}).build(model_of(), None).double()
    for name, value in part.named_parameters():
        if "norm" in name:  # a start of 1 and 0 would hide a mistake
            torch.nn.init.normal_(value, 0.7, 0.3)
    return part


def normalised(layer, x):
    mean, var = x.mean(0), x.var(0, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias


def expected_loss(part: ViewAlignment, a, b):
    """The mean of L of eq. 7, a user and a direction at a time; BN statistics of a view."""

    def project(x):
        one, two, three = part.projector
        x = normalised(one, x @ one.linear.weight.T).relu()
        x = normalised(two, x @ two.linear.weight.T).relu()
        return normalised(three, x @ three.linear.weight.T)

    def predict(z):
        if part.predictor is None:
            return z
        inner = normalised(part.predictor, z @ part.predictor.linear.weight.T).relu()
        return inner @ part.out.weight.T + part.out.bias

    z, losses = [project(a), project(b)], []
    for p, target in ((predict(z[0]), z[1]), (predict(z[1]), z[0])):
        target = target.detach() if part.settings.stop_gradient else target
        losses += [-(x @ y) / (x.norm() * y.norm()) / 2 for x, y in zip(p, target, strict=True)]
    return torch.stack(losses).sum() / len(a), [z.detach() for z in z]


def vectors(users: int) -> list[torch.Tensor]:
    return [torch.randn(users, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]


SETTINGS = [
    {},
    {"width": 12, "bottleneck": 5},
    {"stop_gradient": False},
    {"predictor": False},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("padding", [False, True])
def test_equals_plain_pytorch(settings, padding):
    """Of padding nothing is seen, whatever stands there: not in a statistic, not in the mean."""
    part, (a, b) = part_of(**settings), vectors(5)
    wide, real = [a, b], None
    if padding:
        junk = torch.full((2, WIDTH), torch.inf, dtype=torch.float64)
        wide, real = [torch.cat([view, junk]) for view in (a, b)], torch.arange(7) < 5
    found = part.losses(*wide, real)
    loss, count = found["align"]
    expected, z = expected_loss(part, a, b)
    assert int(count) == 5 and all(number is None for _, number in list(found.values())[1:])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    leaves = [a, b, *part.parameters()]
    got_grads, wanted_grads = (torch.autograd.grad(each, leaves) for each in (loss, expected))
    for got, wanted in zip(got_grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["std"][0], feature_std(F.normalize(z[0], dim=1)))
    assert -1 - 1e-12 <= loss <= 1


def test_by_hand():
    """Projections that are given: |cos| of 3-4-5 triangles, no predictor."""
    part = part_of(predictor=False)
    part.project = lambda users, real=None: users
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    b = torch.tensor([[5.0, 0.0], [0.0, 2.0]])
    loss, count = part.losses(a, b)["align"]
    torch.testing.assert_close(loss, torch.tensor(-(3 / 5 + 0) / 2))
    assert count == 2


def test_stop_gradient_holds_what_is_predicted():
    """View b gets a gradient as a prediction alone: none where it is the target."""
    part, (a, b) = part_of(), vectors(5)
    z1, z2 = part.project(a), part.project(b)
    one_way = part._distance(part.predict(z1), z2).mean()
    assert torch.autograd.grad(one_way, b, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(one_way, a)[0].abs().max() > 0


def test_numbers_of_the_sphere_equal_pairs_of_users():
    torch.manual_seed(3)
    a, b = (F.normalize(torch.randn(9, WIDTH, dtype=torch.float64), dim=1) for _ in range(2))
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    mean = sum(math.exp(-2 * float((a[i] - a[j]).square().sum())) for i, j in pairs) / len(pairs)
    torch.testing.assert_close(float(uniformity(a)), math.log(mean), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        alignment(a, b), torch.stack([(a[i] - b[i]).norm() ** 2 for i in range(9)]).mean()
    )
    torch.testing.assert_close(feature_std(a), a.std(0, unbiased=False).mean())
    junk = torch.cat([a, torch.randn(3, WIDTH, dtype=torch.float64)])
    real = torch.arange(12) < 9
    torch.testing.assert_close(uniformity(junk, real), uniformity(a))
    torch.testing.assert_close(feature_std(junk, real), feature_std(a))
    torch.testing.assert_close(alignment(junk, junk.flip(1), real), alignment(a, a.flip(1)))
    one = a[:1].expand(9, -1)
    assert abs(float(uniformity(one))) < 1e-9 and float(feature_std(one)) < 1e-9


@pytest.mark.parametrize("users", [0, 1])
def test_the_uniformity_of_fewer_than_two_users_is_a_number(users):
    torch.manual_seed(3)
    z = F.normalize(torch.randn(4, WIDTH, dtype=torch.float64), dim=1)
    lowest = math.log(torch.finfo(torch.float64).tiny)
    for found in (uniformity(z[:users]), uniformity(z, torch.arange(4) < users)):
        assert found.item() == pytest.approx(lowest)


def test_batch_norm_is_that_of_torch():
    torch.manual_seed(4)
    ours, theirs = BatchNorm(WIDTH).double(), torch.nn.BatchNorm1d(WIDTH).double()
    for _ in range(3):
        x = torch.randn(6, WIDTH, dtype=torch.float64) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x[:1]), theirs(x[:1]))
    assert {*ours.state_dict()} == {*theirs.state_dict()} - {"num_batches_tracked"}


def test_statistics_of_16_bit_numbers_are_float32():
    x = torch.randn(64, WIDTH) + 100
    found = BatchNorm(WIDTH)(x.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.nn.BatchNorm1d(WIDTH)(x.bfloat16().float()))


@pytest.mark.parametrize("pool", ["last", "mean", "ur"])
def test_user_vectors_are_those_of_the_pool(pool):
    model = model_of(dropout=0.4, tokens=["ur"], causal=True, pre_norm=True)
    side = Known(six_users())
    joint = JointObjective({"align": Align(["b", "a"], pool=pool)}, model, side)
    views = loader_of(model, {"a": [], "b": []}, side).batch_at(0)
    terms = joint(model, views, Rng(3, 4))
    assert [t.name for t in terms] == ["align", "align.alignment", "align.uniformity", "align.std"]
    assert [t.number for t in terms] == [6, None, None, None]
    encoded = model.encode_views(views, Rng(3, 4))
    part = joint.parts["align"]
    a, b = (part.pool(model, encoded[name]) for name in "ab")
    assert not torch.equal(a, b), "two keys are two dropouts"
    if pool == "ur":
        assert torch.equal(a, encoded["a"].states[encoded["a"].batch.offsets[1:] - 1])
        assert (views["a"].values[views["a"].offsets[1:] - 1] == model.token("ur")).all()
    expected, _ = expected_loss(part, b, a)
    torch.testing.assert_close(terms[0].loss, expected)
    total_loss(terms).backward()
    assert all(p.grad is not None for p in part.parameters())


def test_errors_name_the_problem():
    with pytest.raises(ValueError, match=r"align compares two views, got \['a'\]"):
        Align(["a"])
    with pytest.raises(ValueError, match=r"align\.width must be at least 1, got 0"):
        Align(["a", "b"], width=0)
    with pytest.raises(ValueError, match="bottleneck has no effect: predictor is false"):
        Align(["a", "b"], bottleneck=4, predictor=False)
    with pytest.raises(ValueError, match="pool 'ur' needs ur in model.tokens"):
        Align(["a", "b"]).build(model_of(), None)
    three, two = (Encoded(batch, torch.zeros(len(batch.values), WIDTH)) for batch in map(
        jagged, ([1, 1, 1], [2, 1])
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"views of the same users have \[3, 2\] sequences"):
        part_of().float()(model_of(), Rng(0, 0), three, two)


@pytest.mark.parametrize("users, real", [(1, None), (0, None), (4, torch.arange(4) < 1)])
def test_a_step_of_one_user_is_refused(users, real):
    with pytest.raises(ValueError, match="at least 2 users a step, got .: choose another batch"):
        part_of().losses(*vectors(users), real)


def test_an_epoch_that_ends_with_one_user_is_refused_before_the_first_step(tmp_path):
    settings = {"views": {"a": [], "b": []}, "steps": 2, "validate_every": 2}
    chosen = recipe(
        objectives=Objectives(align=Align(["a", "b"], pool="max")), **settings, batch_size=19
    )
    data = synthetic(tmp_path, num_users=39)
    with pytest.raises(ValueError, match="align needs at least 2 users a step, and a step of an"):
        run(data, tmp_path / "run", chosen)
    assert not (tmp_path / "run").exists()


def test_running_statistics_are_saved_with_the_objective(tmp_path):
    chosen = recipe(
        views={"a": [], "b": []}, objectives=Objectives(align=Align(["a", "b"], pool="max")),
        steps=4, validate_every=4,
    )  # fmt: skip
    run(synthetic(tmp_path), tmp_path / "run", chosen)
    state = load_file(tmp_path / "run" / "model" / "heads.safetensors")
    mean = state["align.projector.2.norm.running_mean"]
    assert mean.shape == (16,) and mean.abs().max() > 0
    assert (state["align.predictor.norm.running_var"] != 1).all()


def group_losses(group, **settings):
    """(loss of all ranks, gradients, running statistics), averaged like DDP does."""
    world = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    part = part_of(**settings)
    a, b = vectors(5)
    mine = torch.arange(rank, 5, world)  # three users and two
    real = None
    if settings.get("width"):  # padding of another size on each rank
        mine, real = mine[:2], torch.tensor([True, rank == 0])
        if group is None:
            mine, real = torch.tensor([0, 2, 1]), None
    loss, count = part.losses(a[mine], b[mine], real)["align"]
    total = total_loss(of_all_ranks([Term("align", 0.5, loss, count)], world))
    total.backward()
    found = [total.detach(), a.grad, b.grad, *(p.grad for p in part.parameters())]
    if group is not None:
        for value in found:
            dist.all_reduce(value)
    running = list(part.buffers())
    return [value / world for value in found] + running


def all_settings(group):
    return [group_losses(group, **settings) for settings in SETTINGS]


def test_two_processes_are_one_with_all_users(ranks):
    expected = all_settings(None)
    for found in ranks(2, all_settings):
        for ours, theirs in zip(found, expected, strict=True):
            for value, wanted in zip(ours, theirs, strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)


def one_each(group):
    """A user on each rank: two users are enough. Then one on rank 0 and none on rank 1."""
    part, (a, b) = part_of(), vectors(2)
    rank = dist.get_rank(group)
    loss = part.losses(a[rank : rank + 1], b[rank : rank + 1])["align"][0]
    loss.backward()
    try:
        part.losses(a[: 1 - rank], b[: 1 - rank])
    except ValueError as error:
        return loss.detach(), str(error)


def test_users_of_all_processes_count(ranks):
    for loss, said in ranks(2, one_each):
        assert loss.isfinite() and "at least 2 users a step, got 1" in said


def collapsed(**settings) -> tuple[float, float]:
    """(loss, std) after 150 steps on noisy views of 64 users."""
    torch.manual_seed(0)
    part = Align(["a", "b"], pool="max", **settings).build(model_of(), None)
    encoder, users = torch.nn.Linear(WIDTH, WIDTH), torch.randn(64, WIDTH)
    optimizer = torch.optim.SGD([*part.parameters(), *encoder.parameters()], 0.1, 0.9)
    for _ in range(150):
        a, b = (encoder(users + 0.5 * torch.randn_like(users)) for _ in range(2))
        found = part.losses(a, b)
        optimizer.zero_grad()
        found["align"][0].backward()
        optimizer.step()
    return found["align"][0].item(), found["std"][0].item()


def test_without_stop_gradient_or_predictor_the_loss_runs_to_its_end():
    """CLUE, figure 6: the loss goes to -1. With both it stays away from it, and users apart."""
    whole, std = collapsed()
    without = [collapsed(stop_gradient=False)[0], collapsed(predictor=False)[0]]
    assert max(without) < -0.95 and whole > -0.9 and std > 0.9 * WIDTH**-0.5


def test_explicit_views_train_too():
    model, side = model_of(), Known(six_users())
    joint = JointObjective({"align": Align(["a", "b"], pool="mean")}, model, side)
    views = loader_of(model, {"a": [Crop(drop=0.3)], "b": [Mask()]}, side).batch_at(0)
    total_loss(joint(model, views, Rng(0, 0))).backward()
    assert model.item_embedding.weight.grad.abs().max() > 0
