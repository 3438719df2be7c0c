# SPDX-License-Identifier: Apache-2.0
"""Ranking of four views (AdaptSSR) against a loop over the anchors in float64, on one process and
on two; the views of the recipe in one encoder pass and in four; its stages."""

import json

import pytest
import torch
import torch.distributed as dist
from backends import backends
from builders import AGE, CITY, Known, jagged, loader_of, model_of, six_users, synthetic
from safetensors.torch import load_file

from benchmarks.encoders import ranking
from fastrec.cli import main
from fastrec.data.dataset import SequenceDataset
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.mask import Mask
from fastrec.data.steps.parts import Step
from fastrec.data.steps.reorder import Reorder
from fastrec.data.views import Again
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.model_files import write_digests
from fastrec.nn.pool import Encoded
from fastrec.nn.user_model import UserModel
from fastrec.objectives.item import Item
from fastrec.objectives.joint import JointObjective, Term, of_all_ranks, total_loss
from fastrec.objectives.rank import Rank, ViewRanking
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.random import Rng
from fastrec.training.config import Recipe
from fastrec.training.fit import fit
from fastrec.training.heads_file import load_pool, save_heads

WIDTH = 8
VIEWS = ["a", "b", "c", "d"]


def cosine(x, y):
    return (x @ y) / (x.norm() * y.norm())


def one_by_one(vectors, ids, fusion="sample", real=None):
    """(mean loss, number of anchors) of user vectors a, b, a', b', an anchor at a time."""
    users = [i for i in range(len(ids)) if real is None or real[i]]
    a, b, a2, b2 = vectors
    losses = []
    for one, two, one_again, two_again in ((a, b, a2, b2), (b, a, b2, a2)):
        pairs = [(cosine(one[j], two[j]), cosine(one[j], two_again[j])) for j in users]
        batch = 1 - sum(x + y for x, y in pairs) / (2 * len(users))
        for i in users:
            others = [v[j] for v in vectors for j in users if ids[j] != ids[i]]
            if not others:
                continue
            four = [cosine(x[i], y[i]) for x in (one, one_again) for y in (two, two_again)]
            sample = 1 - sum(max(s.item(), 0.0) for s in four) / 4
            share = sample if fusion == "sample" else batch.item()
            semi = [cosine(one[i], two[i]), cosine(one[i], two_again[i])]
            hardest = max(cosine(one[i], w) for w in others)
            first = cosine(one[i], one_again[i]) - max(semi)
            second = min(semi) - hardest
            losses.append(-(share * first + (1 - share) * second).sigmoid().log())
    return (torch.stack(losses).mean() if losses else torch.zeros(())), len(losses)


def part_of(backend=None, **settings) -> ViewRanking:
    part = Rank(VIEWS, pool="mean", **settings).build(model_of(), None)
    part.backend = backend
    return part


def vectors(users: int) -> list[torch.Tensor]:
    made = torch.randn(4, users, WIDTH, dtype=torch.float64)
    made[1:] += 1.5 * made[0]  # the vectors of a user are alike, some of them are not
    return [each.clone().requires_grad_() for each in made]


@backends("in_batch_hardest", "reference", "cpp")
@pytest.mark.parametrize("fusion", ["sample", "batch"])
@pytest.mark.parametrize(
    "ids", [[4, 0, 9, 2, 7], [4, 0, 4, 2, 4]], ids=["distinct_users", "repeated_users"]
)
@pytest.mark.parametrize("padding", [False, True])
def test_equals_a_loop_over_the_anchors(backend, fusion, ids, padding):
    """Of padding nothing is seen: neither as anchor nor as candidate, whatever stands there."""
    given, real = vectors(7 if padding else 5), None
    if padding:
        ids, real = [*ids, 0, 0], torch.arange(7) < 5  # padding has the key 0, that of a user
    found, count = part_of(backend, fusion=fusion).loss(*given, torch.tensor(ids), real)
    expected, number = one_by_one(given, ids, fusion, real)
    assert int(count) == number == 10
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(
        torch.autograd.grad(found, given), torch.autograd.grad(expected, given), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_by_hand():
    """Two users on the axes: a = a' = b, b' the opposite. With l = 1 - (1 + 0 + 1 + 0) / 4 the
    anchor a has l (1 - 1) + (1 - l) (-1 - 0), and b, whose others are a and a', its own copy -1."""
    a = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    loss, count = part_of().loss(a, a, a, -a, torch.tensor([5, 6]))
    margins = torch.tensor([0.5 * (1 - 1) + 0.5 * (-1 - 0), 0.5 * (-1 - 1) + 0.5 * (1 - 0)])
    torch.testing.assert_close(loss, -margins.sigmoid().log().mean())
    assert count == 4


@pytest.mark.parametrize("ids", [[], [3], [3, 3]])
@pytest.mark.parametrize("fusion", ["sample", "batch"])
def test_a_user_alone_gives_zero_with_a_live_graph(ids, fusion):
    given = vectors(len(ids))
    loss, count = part_of(fusion=fusion).loss(*given, torch.tensor(ids, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and count == 0
    for each in given:
        assert each.grad is not None and not each.grad.any()


def test_a_user_without_items_has_finite_gradients():
    """A pooled vector of zeros has no direction."""
    given = vectors(3)
    with torch.no_grad():
        for each in given:
            each[1] = 0
    loss, _ = part_of().loss(*given, torch.arange(3))
    loss.backward()
    assert loss.isfinite() and all(each.grad.isfinite().all() for each in given)


def recipe_views() -> dict:
    return Recipe.load("adaptssr").stage("ranking").views


@pytest.mark.parametrize("pool", ["attention", "mean", "last"])
def test_one_encoder_pass_is_four(pool):
    """The views of the recipe: bit for bit the states of each view encoded by itself, and the loss
    is that of the pooled vectors."""
    model, side = model_of(dropout=0.4), Known(six_users())
    views = loader_of(model, recipe_views(), side).batch_at(3)
    assert list(views) == ["a", "b", "a_again", "b_again"]
    encoded, rng = model.encode_views(views, Rng(3, 4)), Rng(3, 4)
    for name, view in views.items():
        assert torch.equal(encoded[name].states, model.encode(view, rng).states), name
    for name in ("a", "b"):
        copy = views[f"{name}_again"]
        assert torch.equal(views[name].values, copy.values), "the same events"
        assert not torch.equal(encoded[name].states, encoded[f"{name}_again"].states)
    joint = JointObjective({"rank": Rank(list(views), pool=pool)}, model, side)
    (term,) = joint(model, views, rng)
    given = [joint.parts["rank"].pool(model, encoded[name]) for name in views]
    expected, number = one_by_one(given, views["a"].sample_ids.tolist())
    torch.testing.assert_close(term.loss, expected)
    assert int(term.number) == number == 12
    term.loss.backward()
    assert all(p.grad is not None for p in joint.parameters())


@pytest.mark.filterwarnings("error:the model to start from")
def test_from_masked_items_by_ranking_to_user_attributes(tmp_path, capsys):
    """Each stage has its dropout, the ranking keeps its last model, and what predicts attributes
    begins with the pool that the ranking trained."""
    data = synthetic(tmp_path)
    flags = ["--config=adaptssr", f"--data={data}", "--model.width=16", "--model.max_len=12"]
    flags += [f"--{stage}.{key}" for stage in ("pretraining", "ranking", "profile")
              for key in ("steps=4", "validate_every=2", "batch_size=100")]  # fmt: skip
    runs = {name: tmp_path / name for name in ("pretraining", "ranking", "profile")}
    main(["pretrain", *flags, f"--output={runs['pretraining']}"])
    before = runs["pretraining"] / "model"
    for task in ("ranking", "profile"):
        main(["finetune", *flags, f"--task={task}", f"--init={before}", f"--output={runs[task]}"])
        before = runs[task] / "model"
    found = {
        name: json.loads((run / "model/config.json").read_text()) for name, run in runs.items()
    }
    assert {name: config["dropout"] for name, config in found.items()} == {
        "pretraining": 0.5, "ranking": 0.1, "profile": 0.5,
    }  # fmt: skip
    ranking, profile = (
        json.loads((runs[name] / "summary.json").read_text()) for name in ("ranking", "profile")
    )
    assert ranking["best_step"] == ranking["steps"] == ranking["valid steps"] == 4
    assert "item_input.ids.weight" in ranking["taken"]
    pool = {"user_attributes.pool.query", "user_attributes.pool.project.weight"}
    assert pool < set(profile["taken"]) and "user_attributes.linear.weight" not in profile["taken"]
    heads = load_file(runs["profile"] / "model/heads.safetensors")
    assert heads["user_attributes.hidden.weight"].shape == (64, 16)
    metrics = tmp_path / "metrics.json"
    main(["evaluate", *flags, "--task=profile", f"--pretrained={before}", f"--output={metrics}"])
    assert "model" in json.loads(metrics.read_text())["metrics"]
    again = [*flags, "--task=profile", f"--output={tmp_path / 'none'}"]
    pooled = "--profile.objectives.user_attributes.pool=mean"
    with pytest.raises(SystemExit, match="init.pool: .*heads.safetensors holds no parameters of a"):
        main(["finetune", *again, f"--init={runs['pretraining'] / 'model'}"])
    with pytest.raises(SystemExit, match="init.pool has no effect: no objective of this stage poo"):
        main(["finetune", *again, f"--init={runs['ranking'] / 'model'}", pooled])


def test_a_stage_from_a_model_of_another_dropout(tmp_path, recwarn):
    """Nothing of it is asked for twice, and all weights are taken."""
    data = SequenceDataset.load(synthetic(tmp_path))
    model = UserModel(data.num_items, ModelConfig(width=16, max_len=12, encoder=Transformer(1)))
    how = {"views": {"main": [Mask()]}, "objectives": {"item": Item()}, "steps": 1,
           "learning_rate": 0.0, "progress": False}  # fmt: skip
    trained = fit(data, model, dropout=0.2, **how)
    assert trained.config.dropout == trained.encoder.dropout == 0.2
    assert model.config.dropout == 0.5, "the model that it starts from is left as it is"
    before, after = model.state_dict(), trained.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert fit(data, trained, **how).config.dropout == 0.2
    assert not [w for w in recwarn if "the model to start from" in str(w.message)]


def test_a_profile_begins_with_the_pool_of_the_ranking(tmp_path):
    model, side = model_of(), Known(six_users(), [AGE, CITY])
    ranking = JointObjective({"rank": Rank(VIEWS)}, model, side)
    save_heads(ranking, tmp_path)
    write_digests(tmp_path)
    profile = JointObjective({"user_attributes": UserAttributes(pool="attention")}, model, side)
    names = ("query", "project.weight", "project.bias")
    taken = load_pool(profile, tmp_path, "rank")
    assert sorted(taken) == sorted(f"user_attributes.pool.{name}" for name in names)
    one, other = (joint.parts[name].pool.state_dict() for joint, name in (
        (ranking, "rank"), (profile, "user_attributes")
    ))  # fmt: skip
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_hidden_layer_of_attributes():
    part = UserAttributes(pool="mean", hidden=5).build(model_of(), Known(six_users(), [AGE, CITY]))
    users = torch.randn(6, WIDTH)
    hidden = (users @ part.hidden.weight.T + part.hidden.bias).clamp_min(0)
    expected = hidden @ part.linear.weight.T + part.linear.bias
    found = part.predict(users)
    torch.testing.assert_close(torch.cat([found["age"], found["city"]], 1), expected)
    with pytest.raises(ValueError, match="hidden must not be negative, got -1"):
        UserAttributes(hidden=-1)


def test_the_padded_loss_of_the_benchmark_is_the_same():
    model, side = model_of(dropout=0.4), Known(six_users())
    joint = JointObjective({"rank": Rank(VIEWS)}, model, side)
    views = {"a": [Crop(0.5)], "b": [Reorder()], "c": [Again("a")], "d": [Again("b")]}
    made = loader_of(model, views, side).batch_at(0)
    model.encoder.dropout = 0.0
    found, padded = total_loss(joint(model, made, Rng(0, 0))), ranking(model, joint, made, 0.0)
    torch.testing.assert_close(found, padded(), rtol=1e-5, atol=1e-6)


def test_errors_name_the_problem():
    with pytest.raises(ValueError, match=r"rank compares four views, .*, got \['a', 'b'\]"):
        Rank(["a", "b"])
    with pytest.raises(ValueError, match=r"four views, .* got \['a', 'b', 'a', 'b'\]"):
        Rank(["a", "b", "a", "b"])
    with pytest.raises(ValueError, match="fusion must be one of .*, got 'user'"):
        Rank(VIEWS, fusion="user")
    with pytest.raises(ValueError, match="rank has no effect without dropout"):
        Rank(VIEWS).build(model_of(dropout=0.0), None)
    with pytest.raises(ValueError, match="pool 'cls' needs cls in model.tokens"):
        Rank(VIEWS, pool="cls").build(model_of(), None)
    batches = [jagged([1, 2]), jagged([1, 2]), jagged([1]), jagged([1, 2])]
    states = (Encoded(batch, torch.zeros(len(batch.values), WIDTH)) for batch in batches)
    with pytest.raises(ValueError, match=r"views of the same users have \[2, 2, 1, 2\] sequences"):
        part_of()(model_of(), Rng(0, 0), *states)


# User 4 is on both ranks of two.
IDS = [4, 0, 9, 4, 7]


def group_losses(group, emptied=False, **settings):
    """(loss of all ranks, gradients of the vectors of all views), averaged like DDP does."""
    world = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    torch.manual_seed(0)
    given = vectors(len(IDS))
    mine = torch.arange(rank, len(IDS), world)  # three users and two
    own = [each[mine] for each in given]
    # A step has left the last user without an event: one process of two has nobody like that.
    real = torch.arange(len(IDS)) != 4
    real = real[mine] if emptied and not real[mine].all() else None
    loss, count = part_of(**settings).loss(*own, torch.tensor(IDS)[mine], real)
    total = total_loss(of_all_ranks([Term("rank", 0.5, loss, count)], world))
    total.backward()
    found = [total.detach(), *(each.grad for each in given)]
    if group is not None:
        for value in found:
            dist.all_reduce(value)
    return [value / world for value in found]


SETTINGS = [{}, {"fusion": "batch"}, {"emptied": True}]


def all_settings(group):
    return [group_losses(group, **settings) for settings in SETTINGS]


def test_two_processes_are_one_with_all_users(ranks):
    for found in ranks(2, all_settings):
        for got, settings in zip(found, SETTINGS, strict=True):
            for value, expected in zip(got, group_losses(None, **settings), strict=True):
                torch.testing.assert_close(value, expected)


def test_the_users_of_the_other_process_matter():
    """Two processes that did not tell each other of their users would find another loss."""
    torch.manual_seed(0)
    given, part = vectors(len(IDS)), part_of()
    alone = [part.loss(*(v[r::2] for v in given), torch.tensor(IDS)[r::2]) for r in range(2)]
    mean = sum(loss * count for loss, count in alone) / 10
    assert not torch.isclose(0.5 * mean, group_losses(None)[0], rtol=1e-3)


def test_views_that_are_not_again_have_other_events():
    """`again` is what makes a copy: the same steps under another name draw anew."""
    model, side = model_of(), Known(six_users())
    made = loader_of(
        model, {"a": [Crop(0.4)], "same": [Step(crop=Crop(0.4))], "again": [Again("a")]}, side
    ).batch_at(0)
    assert torch.equal(made["a"].values, made["again"].values)
    assert not torch.equal(made["a"].values, made["same"].values)
