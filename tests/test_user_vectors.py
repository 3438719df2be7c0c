# SPDX-License-Identifier: Apache-2.0
"""A table of the head's own, and vectors of users beside the states that it scores: scores, losses,
who is unknown, and whose vectors a saved model has."""

import json
from dataclasses import replace

import numpy as np
import polars
import pytest
import torch
from builders import (
    Known,
    dataset_of,
    jagged,
    loader_of,
    model_of,
    recipe,
    run,
    six_users,
    social_side,
    synthetic,
)
from torch.nn import functional as F

from fastrec import serve
from fastrec.cli import main
from fastrec.data.dataset import SequenceDataset
from fastrec.data.dataset_files import digest
from fastrec.data.negatives import NegativeSampler
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.mask import Mask
from fastrec.data.steps.next_item import NextItem
from fastrec.data.views import Again
from fastrec.evaluation.next_item import NextItemJudge
from fastrec.evaluation.protocol import Protocol
from fastrec.nn.model_config import ModelConfig, num_parameters
from fastrec.nn.model_files import write_digests
from fastrec.nn.pool import Encoded
from fastrec.nn.transfer import freeze, take
from fastrec.nn.user_model import UserModel
from fastrec.objectives.item import Item, Sampled
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.random import Rng
from fastrec.training.stage import Init
from fastrec.training.start import started_model

# Tables and transforms that have a place for user vectors of width 3.
HEADS = {
    "own": {"head_table": "own", "head_transform": False},
    "own_transform": {"head_table": "own", "head_transform": True},
    "tied_transform": {"head_table": "tied", "head_transform": True},
}
CAUSAL = {"causal": True, "pre_norm": True}


def with_vectors(head: str = "own", users: int = 6, **config) -> UserModel:
    """A model whose user vectors and biases are all different from 0."""
    model = model_of(num_users=users, user_width=3, **HEADS[head], **config)
    torch.nn.init.normal_(model.item_head.users.weight)
    torch.nn.init.normal_(model.item_head.bias)
    return model


def score(model: UserModel, state, user: int | None, item: int):
    """Of one item for one state, from the parameters alone."""
    head = model.item_head
    vector = torch.zeros(3) if user is None else head.users.weight[user]
    query = torch.cat([state, vector])
    if head.dense is not None:
        query = F.gelu(head.dense.weight @ query + head.dense.bias)
        query = F.layer_norm(query, query.shape, head.norm.weight, head.norm.bias)
    table = model.item_embedding.weight if head.table is None else head.table.weight
    return query @ table[item] + head.bias[item]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["softmax", "sampled", "bce", "bpr_max"])
def test_every_item_loss_scores_with_the_vector_of_the_user(head, kind):
    """Users 4, 1 and one who is unknown; two targets an event."""
    model = with_vectors(head, num_items=9)
    side = Known(dataset_of([[0, 1, 2, 3, 4, 5, 6, 7, 8]] * 6, 9))
    batch = NextItem(ahead=2)(jagged([4, 3, 3], num_items=9), Rng(0, 0), side)
    batch = replace(batch, users={"user": torch.tensor([4, 1, -1])})
    view = Encoded(batch, torch.randn(len(batch.values), 8, requires_grad=True))
    settings = {
        "softmax": Item(),
        "sampled": Item(sampled=Sampled(5, shared=True, log_q=False)),
        "bce": Item(loss="bce", sampled=Sampled(5, shared=False)),
        "bpr_max": Item(loss="bpr_max", sampled=Sampled(5)),
    }[kind]
    loss, _ = settings.build(model, side)(model, Rng(1, 2), view)["item"]
    drawn, users, losses = NegativeSampler.uniform(9), [4, 1, None], []
    shared = drawn.shared(5, Rng(1, 2)).tolist()
    for t, (b, place) in enumerate(
        zip(batch.segment_ids().tolist(), batch.positions().tolist(), strict=True)
    ):
        for a in range(2):
            y = int(batch.events["target"][t, a])
            if y < 0:
                continue
            spot = torch.tensor([2 * place + a])
            own = drawn.own(5, Rng(1, 2), batch.keys[b : b + 1], spot)[0].tolist()
            others = {"softmax": range(9), "bce": own}.get(kind, shared)
            s = [score(model, view.states[t], users[b], j) for j in others if j != y]
            s, top = torch.stack(s), score(model, view.states[t], users[b], y)
            if kind == "bce":
                losses.append((F.softplus(-top) + F.softplus(s).sum()) / 6)
            elif kind == "bpr_max":
                a_j = s.softmax(0)
                losses.append(-(a_j * (top - s).sigmoid()).sum().log() + (a_j * s**2).sum())
            else:
                losses.append(torch.cat([s, top[None]]).logsumexp(0) - top)
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected)
    tensors = [view.states, *(p for n, p in model.named_parameters() if n.startswith("item_head"))]
    pairs = zip(
        torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors), strict=True
    )
    for actual, exact in pairs:
        torch.testing.assert_close(actual, exact)
    (users_grad,) = torch.autograd.grad(
        settings.build(model, side)(model, Rng(1, 2), view)["item"][0], model.item_head.users.weight
    )
    assert users_grad[[1, 4]].any(1).all() and not users_grad[[0, 2, 3, 5]].any()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("causal", [True, False])
def test_users_of_a_data_set_are_asked_with_their_vectors_and_histories_without(head, causal):
    model = with_vectors(head, **(CAUSAL if causal else {"tokens": ["cls", "sep"]}))
    dataset = six_users()
    users = torch.tensor([3, 0, 5])
    batch = model.inputs(dataset, users, "test", ask=True)
    assert torch.equal(batch.users["user"], users)
    encoded = model.encode(batch)
    asked = encoded.states[batch.offsets[1:] - 1 - (0 if causal else 1)]
    expected = torch.stack(
        [
            torch.stack([score(model, state, user, item) for item in range(20)])
            for state, user in zip(asked, users.tolist(), strict=True)
        ]
    )
    query = model.next_item_query(encoded)
    found = query @ model.item_table.T + model.item_head.bias
    torch.testing.assert_close(found, expected)
    judge = NextItemJudge(dataset, users, "test", Protocol())
    target = dataset.targets("test")[users]
    above = (expected > expected.gather(1, target[:, None])).sum(1) + 1
    assert judge.ranks(model).tolist() == above.tolist()
    histories = [dataset.gather([user], "test").values.tolist() for user in users.tolist()]
    alone = model.encode(model.inputs_of(histories, ask=True))
    nobody = torch.stack([score(model, state, None, 7) for state in asked])
    at_seven = model.next_item_query(alone) @ model.item_table[7] + model.item_head.bias[7]
    torch.testing.assert_close(at_seven, nobody)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.next_item_query(model.encode(batch)).dtype == torch.float32


def test_users_start_unknown():
    """A user who was never trained has the scores of an unknown one."""
    model = model_of(num_users=6, user_width=3, **HEADS["own"], **CAUSAL)
    assert model.item_head.table.weight.shape == (20, 11) and model.item_table.shape == (20, 11)
    assert not model.item_head.users.weight.any() and model.item_head.table.weight.all()


@pytest.mark.parametrize(
    "steps", [[NextItem()], [Friend(hops=0, same_profile=False), NextItem(ahead=2)]]
)
def test_the_column_follows_users_and_friends_through_views(steps):
    model, side = with_vectors(**CAUSAL), social_side()
    joint = JointObjective({"item": Item(views=["main", "again"])}, model, side)
    views = {"main": steps, "again": [Again("main")]}
    made = loader_of(model, views, side, batch_size=4).batch_at(0)
    assert len(made["main"]) >= 4
    for view in made.values():
        assert torch.equal(view.users["user"], view.sample_ids)
        part = view.select(torch.tensor([2, 0]))
        assert torch.equal(part.users["user"], part.sample_ids)
    (term,) = joint(model, made, Rng(0, 0))
    total_loss([term]).backward()
    trained = model.item_head.users.weight.grad.any(1)
    events = torch.cat([v.sample_ids[(v.lengths > 0)] for v in made.values()])
    assert trained.nonzero().flatten().tolist() == events.unique().tolist()


@pytest.mark.parametrize("head", HEADS)
def test_sizes_and_files(tmp_path, head):
    model = with_vectors(head, tokens=["cls"])
    assert num_parameters(20, model.config, 6) == sum(part.numel() for part in model.parameters())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_users"] == 6
    again = UserModel.from_pretrained(tmp_path)
    assert again.config == model.config and again.num_users == 6
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_model_of_before_has_a_tied_table_and_no_users(tmp_path):
    model_of().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for name in ("head_table", "user_width"):
        del values[name]
    file.write_text(json.dumps(values))
    write_digests(tmp_path)
    again = UserModel.from_pretrained(tmp_path)
    assert again.config == model_of().config and again.num_users == 0
    assert not [name for name in again.state_dict() if "users" in name or "item_head.table" in name]
    file.write_text(json.dumps(values | {"num_users": "6"}))
    write_digests(tmp_path)
    with pytest.raises(ValueError, match="num_users is '6', and users have no vectors"):
        UserModel.from_pretrained(tmp_path)
    with_vectors().save_pretrained(tmp_path)
    values = json.loads(file.read_text())
    for wrong, message in (
        ("6", "number above 0, got '6'"),
        (7, "a model of .* numbers, model.sa"),
    ):
        file.write_text(json.dumps(values | {"num_users": wrong}))
        write_digests(tmp_path)
        with pytest.raises(ValueError, match=message):
            UserModel.from_pretrained(tmp_path)


def test_settings_that_have_no_place_are_refused():
    with pytest.raises(ValueError, match=r"user_width: the item embedding has no columns for user"):
        ModelConfig(user_width=4, head_transform=False)
    with pytest.raises(ValueError, match=r"user_width must not be negative, got -1"):
        ModelConfig(user_width=-1)
    with pytest.raises(ValueError, match=r"head_table must be one of .*, got 'both'"):
        ModelConfig(head_table="both")
    with pytest.raises(ValueError, match=r"model\.user_width is 4: num_users must be at least 1"):
        UserModel(20, ModelConfig(user_width=4))


def test_a_data_set_of_other_users_is_refused():
    model, dataset = with_vectors(users=7, **CAUSAL), six_users()
    message = "the model has vectors of 7 users, memory has 6: they are of other users"
    with pytest.raises(ValueError, match=message):
        model.inputs(dataset, [0], "test", ask=True)
    with pytest.raises(ValueError, match=message):
        JointObjective({"item": Item()}, model, Known(dataset))
    with pytest.raises(ValueError, match=message):
        started_model(dataset, model.config, model, Init())
    assert len(model.inputs(dataset, [0], "test")) == 1  # states need no vector of a user
    model = with_vectors(users=6, **CAUSAL)
    model.inputs(dataset, [0], "test", ask=True)
    dataset.__dict__["users_hash"], model.trained_on["users"] = "these", "six others"
    with pytest.raises(ValueError, match="the model has vectors of other users, or in another"):
        model.inputs(dataset, [0], "test", ask=True)


def test_vectors_are_taken_over_for_the_same_users():
    dataset, initial = six_users(), with_vectors(**CAUSAL)
    started, taken = started_model(dataset, initial.config, initial, Init(take=["head"]))
    assert {"item_head.users.weight", "item_head.table.weight"} <= set(taken)
    assert torch.equal(started.item_head.users.weight, initial.item_head.users.weight)
    for others in (6, 7):  # as many, or not
        initial = with_vectors(users=others, **CAUSAL)
        started, taken = started_model(dataset, initial.config, initial, Init(users="other"))
        assert "item_head.users.weight" not in taken and "item_head.table.weight" in taken
        assert started.num_users == 6 and not started.item_head.users.weight.any()
    with pytest.raises(ValueError, match=r"head cannot be taken over: item_head\.users\.weight is"):
        take(with_vectors(users=5, **CAUSAL), initial, ["head"])
    freeze(initial, ["head"])
    trained = [name for name, part in initial.named_parameters() if part.requires_grad]
    assert not [name for name in trained if name.startswith("item_head")]


def test_the_command_line_knows_whose_vectors_a_model_has(tmp_path):
    """As many users with other ids, in another data set, have no vectors in the model."""
    data = synthetic(tmp_path)
    dataset = SequenceDataset.load(data)
    model = ModelConfig(width=8, max_len=6, user_width=4, tokens=["cls"], dropout=0.1)
    chosen = replace(recipe(views={"main": [Mask()]}, steps=10, validate_every=5), model=model)
    trained = run(data, tmp_path / "run", chosen)
    folder, best = tmp_path / "run" / "model", str(tmp_path / "best.csv")
    assert trained.item_head.users.weight.any(1).sum() > 300  # of 400
    assert json.loads((folder / "trained_on.json").read_text())["users"] == dataset.users_hash
    ask = [f"--pretrained={folder}", f"--output={best}", "--overwrite=true"]
    main(["recommend", f"--data={data}", *ask])
    users = serve.recommend(trained, dataset, 3)
    ids = dataset.item_ids()
    histories = [ids[dataset.gather([user], "all").values].tolist() for user in range(400)]
    unknown = serve.recommend(trained, dataset, 3, histories=histories)
    assert not np.allclose(users["score"], unknown["score"], rtol=1e-4)

    file, schema = data / "users.parquet", json.loads((data / "schema.json").read_text())
    frame = polars.read_parquet(file)
    frame.with_columns(user_id=frame["user_id"].reverse()).write_parquet(file)
    schema["digests"]["users.parquet"] = digest(file)
    (data / "schema.json").write_text(json.dumps(schema))
    with pytest.raises(SystemExit, match="model has vectors of other users, or in another order"):
        main(["recommend", f"--data={data}", *ask])
    vectors = tmp_path / "vectors.parquet"  # pooled states: no vectors of users are read
    main(["embed", f"--data={data}", f"--pretrained={folder}", f"--output={vectors}"])
    assert polars.read_parquet(vectors)["user_id"][0] == dataset.num_users - 1
