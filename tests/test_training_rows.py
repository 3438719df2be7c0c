# SPDX-License-Identifier: Apache-2.0
"""Training by rows: the gradients of the dense tables, and row-wise updates of what was touched."""

import copy
from dataclasses import replace

import pytest
import torch
from backends import needs
from builders import (
    MODEL,
    Killed,
    assert_same_weights,
    dataset_of,
    killed_at,
    loader_of,
    model_of,
    run,
    synthetic,
)

from fastrec.data.side import SideData
from fastrec.data.steps.mask import Mask
from fastrec.data.steps.next_item import NextItem
from fastrec.nn.encoders.caser import Caser
from fastrec.nn.encoders.dilated import Dilated
from fastrec.nn.encoders.gru import Gru
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.items import Items
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.objectives.item import Item, Sampled
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.random import Rng
from fastrec.training.config import Recipe
from fastrec.training.rows import (
    RowAdamW,
    Tables,
    check_tables,
    clip_,
    swept_of,
    tables_of,
    use_rows,
)
from fastrec.training.stage import Stage

needs_cpp = needs("cpp", "linear_cross_entropy")
SEQUENCES = [[1, 2, 3, 4, 2], [5, 6, 7], [1, 9, 3], [8, 8, 2, 11], [14, 2, 1], [17, 3]]
OWN = dict(head_table="own", user_width=3, head_transform=False)


def encoder(settings, **config) -> UserModel:
    torch.manual_seed(0)
    config = ModelConfig(width=8, max_len=10, dropout=0.2, encoder=settings, **config)
    return UserModel(20, config, num_users=6)


MODELS = {
    "transformer": lambda: model_of(causal=True, pre_norm=True),
    "post_norm": lambda: model_of(causal=True),
    "scaled": lambda: model_of(causal=True, items=Items(scale=True)),
    "sasrec": lambda: model_of(causal=True, pre_norm=True, layer="sasrec"),
    "gru": lambda: encoder(Gru()),
    "dilated": lambda: encoder(Dilated()),
    "caser": lambda: encoder(Caser(), **OWN),
    "no_bias": lambda: model_of(causal=True, head_bias=False),
}


def terms_of(model: UserModel, loss: str, ahead: int = 1):
    side = SideData(dataset_of(SEQUENCES, 20))
    objective = JointObjective({"item": Item(loss=loss, sampled=Sampled(3))}, model, side)
    loader = loader_of(model, {"main": [NextItem(ahead=ahead)]}, side, batch_size=6)
    return objective, lambda: total_loss(objective(model, loader.batch_at(2), Rng(0, 2)))


@pytest.mark.parametrize("loss", ["softmax", "bce", "gbce"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_dense_tables(name, loss):
    dense = MODELS[name]()
    sparse = copy.deepcopy(dense)
    ahead = 2 if name == "caser" else 1
    for model in (dense, sparse):
        objective, ask = terms_of(model, loss, ahead)
        if model is sparse:
            use_rows(model, objective.parts.values())
        ask().backward()
    tables = {id(p) for p in tables_of(sparse)}
    assert tables
    for (label, one), (_, other) in zip(
        dense.named_parameters(), sparse.named_parameters(), strict=True
    ):
        if other.grad is None:
            assert one.grad is None or not one.grad.any(), label
            continue
        assert other.grad.is_sparse == (id(other) in tables), label
        assert torch.equal(other.grad.to_dense(), one.grad), label
        if other.grad.is_sparse and label == "item_input.ids.weight":
            assert len(other.grad.coalesce().values()) < 20


def test_a_state_that_is_not_trained_is_not_a_table():
    model = model_of(causal=True)
    model.item_input.requires_grad_(False)
    assert [tuple(p.shape) for p in tables_of(model)] == [(20,)]


def expected(how: str, table, grads, rate: float, betas=(0.9, 0.99), eps=1e-8):
    """One row at a time in float64."""
    value = table.double().clone()
    total, mean, square = torch.zeros(len(value)), torch.zeros_like(value), torch.zeros_like(value)
    total = total.double()
    for step, grad in enumerate(grads, 1):
        for row in grad.coalesce().indices()[0].tolist():
            g = grad.to_dense()[row].double()
            if how == "sgd":
                value[row] -= rate * g
            elif how == "adagrad":
                total[row] += g.square().mean()
                value[row] -= rate * g / (total[row].sqrt() + eps)
            else:
                mean[row] = betas[0] * mean[row] + (1 - betas[0]) * g
                square[row] = betas[1] * square[row] + (1 - betas[1]) * g.square()
                size = rate * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)
                value[row] -= size * mean[row] / (square[row].sqrt() + eps)
    return value


def sparse_grads(shape, count: int, seed: int = 0) -> list[torch.Tensor]:
    """Some rows twice, as two losses touch them."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        rows = torch.randint(shape[0], (5,), generator=generator)
        values = torch.randn(5, *shape[1:], generator=generator)
        made.append(torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=True))
    return made


@pytest.mark.parametrize("how", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("shape", [(60, 4), (60,)])
def test_rows_are_updated_one_at_a_time(how, shape):
    table = torch.nn.Parameter(torch.randn(shape))
    dense = torch.nn.Parameter(torch.randn(3))
    plain = torch.nn.Parameter(dense.detach().clone())
    start, grads = table.detach().clone(), sparse_grads(shape, 6)
    settings = dict(lr=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    optimizer = RowAdamW([dense], [table], how, 0.05, settings)
    peer = torch.optim.AdamW([plain], **settings)
    theirs = {"adam": torch.optim.SparseAdam, "sgd": torch.optim.SGD}.get(how)
    copied = torch.nn.Parameter(start.clone())
    if theirs is not None:
        betas = {"betas": (0.9, 0.99)} if how == "adam" else {}
        theirs = theirs([copied], lr=0.05, **betas)
    for number, grad in enumerate(grads):
        table.grad, copied.grad = grad.clone(), grad.clone()
        dense.grad = plain.grad = torch.full((3,), float(number + 1))
        optimizer.step()
        peer.step()
        if theirs is not None:
            theirs.step()
        if number == 2:  # as a checkpoint does
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = RowAdamW([dense], [table], how, 0.05, settings)
            optimizer.load_state_dict(state)
    wanted = expected(how, start, grads, 0.05)
    torch.testing.assert_close(table.detach().double(), wanted, rtol=2e-5, atol=1e-6)
    if theirs is not None:
        torch.testing.assert_close(table, copied, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense, plain)
    touched = torch.cat([grad.coalesce().indices()[0] for grad in grads]).unique()
    rest = torch.ones(60, dtype=torch.bool).index_fill_(0, touched, False)
    assert rest.any() and torch.equal(table[rest], start[rest])
    none = torch.empty(1, 0, dtype=torch.int64), torch.empty(0, *shape[1:])
    table.grad = torch.sparse_coo_tensor(*none, shape, check_invariants=True)
    before = table.detach().clone()
    optimizer.step()
    assert torch.equal(table, before), "no row was touched"


def test_gradients_are_clipped_together():
    one = torch.nn.Parameter(torch.zeros(12, 4))
    two, three = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    (one.grad,) = sparse_grads((12, 4), 1)
    two.grad = torch.tensor([1.0, 2.0, 3.0])
    whole = torch.cat([one.grad.to_dense().flatten(), two.grad])
    clip_([one, two, three], 0.5)
    scaled = torch.cat([one.grad.to_dense().flatten(), two.grad])
    torch.testing.assert_close(scaled, whole * 0.5 / whole.norm())
    before = two.grad.clone()
    clip_([one, two, three], 10.0)
    assert torch.equal(two.grad, before), "it is below"


@needs_cpp
@pytest.mark.parametrize("how", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("name", [*MODELS, "mask"])
def test_a_loss_over_all_items_moves_what_its_gradient_would(name, how, monkeypatch):
    """The gradient of every item by the two sweeps, as rows that are all touched."""
    monkeypatch.setattr("fastrec.ops.linear_cross_entropy.STORED_ITEMS", 0)
    plain = model_of() if name == "mask" else MODELS[name]()
    torch.nn.init.normal_(plain.item_head.bias.data)
    swept, side = copy.deepcopy(plain), SideData(dataset_of(SEQUENCES, 20))
    step = Mask() if name == "mask" else NextItem(ahead=2 if name == "caser" else 1)
    settings = dict(lr=0.1, betas=(0.9, 0.99))
    updates = []
    for model in (plain, swept):
        objective = JointObjective({"item": Item()}, model, side)
        if model is swept:
            use_rows(model, objective.parts.values())
        tables = tables_of(model)
        rest = [p for p in model.parameters() if all(p is not table for table in tables)]
        optimizer = RowAdamW(rest, tables, how, 0.1, settings, swept_of(model))
        updates.append((model, objective, optimizer))
    for number in range(4):
        for model, objective, optimizer in updates:
            loader = loader_of(model, {"main": [step]}, side, batch_size=6)
            batch = loader.batch_at(number)
            optimizer.zero_grad(set_to_none=True)
            total_loss(objective(model, batch, Rng(0, number))).backward()
            if model is swept:
                scoring = swept_of(model).table
                assert scoring.grad is None or scoring.grad.is_sparse
                assert model.item_head.bias.grad is None and len(model.item_head.pending) == 1
            else:
                for table in tables_of(model):
                    seen = torch.ones(len(table), dtype=torch.bool)
                    seen[20:] = table.grad[20:].flatten(1).any(1) if table.dim() == 2 else False
                    rows = seen.nonzero().squeeze(1)
                    if len(table) < 20:  # of users
                        rows = table.grad.any(1).nonzero().squeeze(1)
                    table.grad = torch.sparse_coo_tensor(
                        rows[None], table.grad[rows], table.shape, check_invariants=True
                    )
            optimizer.step()
    before = MODELS["transformer"]() if name == "mask" else MODELS[name]()
    assert not torch.equal(before.item_embedding.weight, swept.item_embedding.weight)
    # Not the others: AdamW makes steps of the rounding of gradients that are 0, of biases of keys.
    for one, other in zip(tables_of(plain), tables_of(swept), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


ITEM = {"item": Item(sampled=Sampled(4))}


def by_rows(**changes) -> Recipe:
    """A recipe of a causal model whose tables are updated by rows."""
    tables = Tables(update="rows", **changes.pop("tables", {}))
    settings = dict(steps=30, batch_size=64, validate_every=10, checkpoint_every=7) | changes
    settings = {"views": {"main": [NextItem()]}, "objectives": ITEM} | settings
    stage = Stage(tables=tables, **settings)
    encoder = Transformer(layers=1, heads=2, causal=True)
    return Recipe(model=replace(MODEL, encoder=encoder, tokens=[]), pretraining=stage)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("synthetic"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tables": {"optimizer": "adagrad", "learning_rate": 0.05}, "precision": "bf16-mixed"},
        {"tables": {"optimizer": "sgd"}, "gradient_clip": 0.3, "schedule": "linear"},
        {"objectives": {"item": Item()}},
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(data, tmp_path, monkeypatch, changes):
    chosen = by_rows(steps=40, validate_every=10, checkpoint_every=5, **changes)
    run(data, tmp_path / "whole", chosen)
    with monkeypatch.context() as patch:
        killed_at(patch, "training_step", 23)
        with pytest.raises(Killed):
            run(data, tmp_path / "cut", chosen)
    model = run(data, tmp_path / "cut", chosen, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert not model.sparse_tables


def frozen():
    model = model_of(causal=True)
    model.item_input.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "objective", "match"),
    [
        (lambda: model_of(causal=True), Item(loss="bpr", sampled=Sampled(4)), "over all items"),
        (frozen, Item(), "needs an item table that is trained"),
        (
            lambda: model_of(causal=True),
            Item(sampled=Sampled(4, in_batch=True)),
            "not in_batch",
        ),
        (lambda: model_of(causal=True), Item(loss="bpr_max", sampled=Sampled(4)), "softmax, bce"),
        (
            lambda: model_of(causal=True, head_similarity="cosine"),
            Item(sampled=Sampled(4)),
            "a vector of every item",
        ),
    ],
)
def test_what_reads_every_row_is_refused(make, objective, match):
    model = make()
    joint = JointObjective({"item": objective}, model, SideData(dataset_of(SEQUENCES, 20)))
    with pytest.raises(ValueError, match=match):
        check_tables(Tables(update="rows"), model, joint.parts.values())


def test_settings_without_effect_are_refused(data, tmp_path):
    for name, value in (("optimizer", "adam"), ("learning_rate", 0.1)):
        with pytest.raises(ValueError, match=rf"tables\.{name} has no effect"):
            Tables(**{name: value})
    with pytest.raises(ValueError, match="must not be negative"):
        Tables(update="rows", learning_rate=-1.0)
    with pytest.raises(ValueError, match="cuda_graph needs"):
        run(data, tmp_path / "run", by_rows(cuda_graph=True))
    everything = {"objectives": {"item": Item()}}
    for name, value in (("gradient_clip", 1.0), ("precision", "bf16-mixed"), ("devices", 2)):
        with pytest.raises(ValueError, match="needs one process, gradient_clip 0.*32-true"):
            run(data, tmp_path / "run", by_rows(**everything, **{name: value}))
    with pytest.raises(ValueError, match="shard needs item losses over sampled"):
        run(data, tmp_path / "run", by_rows(**everything, tables={"shard": True}))
    assert not (tmp_path / "run").exists()
