# SPDX-License-Identifier: Apache-2.0
"""Item tables on several processes: rows that travel, and the models of one process."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars
import pytest
import torch
import torch.distributed as dist
from builders import (
    MODEL,
    Killed,
    assert_same_weights,
    dataset_of,
    loader_of,
    model_of,
    run,
    synthetic,
    trained_weights,
)
from groups import trained
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastrec.data.prepare import prepare
from fastrec.data.side import SideData
from fastrec.data.steps.next_item import NextItem
from fastrec.evaluation.next_item import NextItemJudge
from fastrec.evaluation.protocol import Protocol
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.sharded import part_of, shard_tables, sharded_parameters, whole_state
from fastrec.nn.user_model import UserModel
from fastrec.objectives.item import Item, Sampled
from fastrec.objectives.joint import JointObjective, of_all_ranks, total_loss
from fastrec.random import Rng
from fastrec.training.checkpoint import write_checkpoint
from fastrec.training.config import Recipe
from fastrec.training.module import StageModule
from fastrec.training.rows import Tables, clip_, share_gradients, tables_of, use_rows
from fastrec.training.stage import Stage

SEQUENCES = [[1, 2, 3, 4, 2], [5, 6, 7], [1, 9, 3], [8, 8, 2, 11], [14, 2, 1], [17, 3]]
LOSSES = {
    "whole": Item(),
    "softmax": Item(sampled=Sampled(3)),
    "shared": Item(sampled=Sampled(3, shared=True)),
    "gbce": Item(loss="gbce", sampled=Sampled(3)),
}


def step_of(group, loss: str, own: bool, kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients as DDP averages them) of a step; of one process without a group."""
    config = dict(head_table="own", head_transform=False) if own else {}
    model = model_of(causal=True, **config)
    side = SideData(dataset_of(SEQUENCES, 20))
    objective = JointObjective({"item": LOSSES[loss]}, model, side)
    if kind == "rows":
        use_rows(model, objective.parts.values())
    world = 1 if group is None else dist.get_world_size(group)
    if "spread" in kind and group is not None:
        shard_tables(model, group)
    if "fsdp" in kind and group is not None:
        for layer in model.encoder.layers:
            fully_shard(layer, mesh=DeviceMesh.from_group(group, "cpu"))
    rank = 0 if group is None else dist.get_rank(group)
    loader = loader_of(model, {"main": [NextItem()]}, side, rank=rank, world_size=world)
    value = total_loss(of_all_ranks(objective(model, loader.batch_at(2), Rng(0, 2)), world))
    value.backward()
    if kind == "rows" and group is not None:
        share_gradients(tables_of(model))
    blocks, grads = sharded_parameters(model), {}
    ours = {
        *blocks,
        *(n for n, p in model.named_parameters() if p.grad is not None and p.grad.is_sparse),
    }
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if isinstance(grad, DTensor):
            grads[name] = grad.full_tensor()
            continue
        grads[name] = grad.to_dense() if grad.is_sparse else grad
        if group is not None and name not in ours:
            dist.all_reduce(grads[name])
            grads[name] /= world
    value = value.detach().clone()
    if group is not None:
        dist.all_reduce(value)
    return value.item() / world, grads


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("world", [2, 3])
def test_gradients_of_spread_tables(world, loss, own, ranks):
    value, expected = step_of(None, loss, own, "spread")
    made = ranks(world, step_of, loss, own, "spread")
    for other, _ in made:
        assert other == pytest.approx(value, rel=1e-5)
    for name, grad in expected.items():
        parts = [grads[name] for _, grads in made]
        blocks = name in ("item_input.ids.weight", "item_head.table.weight", "item_head.bias")
        whole = torch.cat(parts) if blocks else parts[0]
        torch.testing.assert_close(whole, grad, rtol=2e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss", ["softmax", "shared", "gbce"])
def test_touched_rows_are_shared(ranks, loss):
    value, expected = step_of(None, loss, False, "rows")
    made = ranks(2, step_of, loss, False, "rows")
    for other, grads in made:
        assert other == pytest.approx(value, rel=1e-5)
        for name, grad in expected.items():
            torch.testing.assert_close(grads[name], grad, rtol=2e-5, atol=1e-6, msg=name)
            assert torch.equal(grads[name], made[0][1][name]), "the same bits on all"


@pytest.mark.parametrize("kind", ["fsdp", "fsdp spread"])
def test_an_encoder_that_fsdp_shards(ranks, kind):
    """Its weights are pieces, and gathered where they are used; tables are whole, or spread too."""
    value, expected = step_of(None, "softmax", False, kind)
    made = ranks(2, step_of, "softmax", False, kind)
    for other, grads in made:
        assert other == pytest.approx(value, rel=1e-5)
        for name, grad in expected.items():
            if name.startswith("encoder") or kind == "fsdp":
                torch.testing.assert_close(grads[name], grad, rtol=2e-5, atol=1e-6, msg=name)


def clipped(group) -> list[torch.Tensor]:
    rank = dist.get_rank(group)
    block, common = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    block.grad = torch.tensor([3.0, 0.0]) if rank == 0 else torch.tensor([0.0, 4.0])
    common.grad = torch.tensor([12.0, 0.0])
    clip_([block, common], 6.5, [block])
    return [block.grad, common.grad]


def test_gradients_of_all_blocks_are_clipped_together(ranks):
    first, second = ranks(2, clipped)
    torch.testing.assert_close(torch.stack(first), torch.tensor([[1.5, 0.0], [6.0, 0.0]]))
    torch.testing.assert_close(torch.stack(second), torch.tensor([[0.0, 2.0], [6.0, 0.0]]))


PROTOCOLS = [
    Protocol(),
    Protocol(seen="exclude"),
    Protocol(seen="zero", logit_adjustment=0.5),
    Protocol("sampled", negatives=5),
]


def ranked(group, protocol: Protocol, folder: Path) -> tuple[torch.Tensor, dict | None]:
    model = model_of(causal=True, num_items=40)
    torch.nn.init.normal_(model.item_head.bias)
    sequences = torch.randint(40, (9, 7), generator=torch.Generator().manual_seed(0)).tolist()
    judge = NextItemJudge(dataset_of(sequences, 40), torch.arange(9), "test", protocol)
    rows = slice(0, 9)
    if group is None:
        return judge.score(model, None, rows), dict(model.state_dict())
    shard_tables(model, group)
    assert len(model.item_input.ids.weight) < 44
    rank = dist.get_rank(group)
    rows = slice(0, 5) if rank == 0 else slice(5, 9) if rank == 1 else slice(8, 9)
    found = judge.score(model, None, rows)
    with whole_state(model, folder) as state:
        kept = None if state is None else {name: value.clone() for name, value in state.items()}
    return found, kept


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_among_spread_items(world, protocol, tmp_path, ranks):
    torch.manual_seed(0)
    expected, weights = ranked(None, protocol, tmp_path)
    made = ranks(world, ranked, protocol, tmp_path)
    assert torch.equal(torch.cat([made[0][0], made[1][0]]), expected)
    if world == 3:
        assert made[2][0].tolist() == expected[8:].tolist()
    assert [state is None for _, state in made] == [False, *[True] * (len(made) - 1)]
    for name, value in weights.items():
        assert torch.equal(made[0][1][name], value), name
    assert not list(tmp_path.iterdir())


def parts(group) -> list[tuple]:
    return [(p.first, p.last) for p in (part_of(n, group) for n in (0, 1, 2, 5, 7))]


def test_blocks_are_those_of_torch(ranks):
    for place, total in enumerate((0, 1, 2, 5, 7)):
        made = [each[place] for each in ranks(3, parts)]
        chunks = torch.arange(total).chunk(3) if total else []
        assert [b - a for a, b in made if b > a] == [len(c) for c in chunks]
        assert made[-1][1] == total


def sharded_recipe(update: str, **changes) -> Recipe:
    sampled = Sampled(4, by="popularity") if update == "rows" else None
    stage = dict(steps=12, batch_size=64, validate_every=6, checkpoint_every=5)
    tables = {"update": update, "shard": True, **changes.pop("tables", {})}
    stage |= {"tables": Tables(**tables), "objectives": {"item": Item(sampled=sampled)}, **changes}
    encoder = Transformer(layers=1, heads=2, causal=True)
    return Recipe(
        model=replace(MODEL, encoder=encoder, tokens=[]),
        pretraining=Stage(views={"main": [NextItem()]}, **stage),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("synthetic"))


CASES = {
    "whole": ("dense", {"weight_decay": 0.01, "gradient_clip": 0.3}),
    "rows": ("rows", {"gradient_clip": 0.3}),
    "adagrad": ("rows", {"tables": {"optimizer": "adagrad", "learning_rate": 0.05}}),
    "shared": ("rows", {"tables": {"shard": False}}),
}


def close_models(one: Path, other: Path) -> None:
    first, second = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.shape == second[name].shape
        # Sums in another order; Adam magnifies that where a gradient is near 0.
        error = (value - second[name]).norm() / value.norm().clamp_min(1e-2)
        assert error < 2e-3, (name, error)


def killed(group, data: Path, output: Path, chosen: Recipe, step: int) -> None:
    original = StageModule.training_step

    def dies(self, *given):
        if self.global_step >= step:
            raise Killed
        return original(self, *given)

    StageModule.training_step = dies
    try:
        trained(group, data, output, chosen)
    except Killed:
        return
    finally:
        StageModule.training_step = original
    raise AssertionError("it ended")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_the_model_of_one(data, ranks, tmp_path, case):
    update, changes = CASES[case]
    chosen = sharded_recipe(update, monitor="steps", **changes)
    pair = replace(chosen, pretraining=replace(chosen.pretraining, devices=2))
    run(data, tmp_path / "one", chosen)
    ranks(2, trained, data, tmp_path / "two", pair)
    close_models(tmp_path / "one", tmp_path / "two")
    ranks(2, killed, data, tmp_path / "cut", pair, 7)
    ranks(2, trained, data, tmp_path / "cut", pair, {"resume": True})
    if chosen.pretraining.tables.shard:
        assert_same_models(tmp_path / "two", tmp_path / "cut")
        (shards,) = (tmp_path / "cut").glob("last.shards-*")
        assert torch.load(tmp_path / "cut" / "last.ckpt")["shards"] == shards.name
    else:
        assert_same_weights(tmp_path / "two", tmp_path / "cut")
    # and on with one process
    ranks(2, killed, data, tmp_path / "fewer", pair, 7)
    run(data, tmp_path / "fewer", chosen, resume=True)
    close_models(tmp_path / "one", tmp_path / "fewer")


@pytest.mark.parametrize("shared", [True, False], ids=["few", "nobody"])
def test_steps_count_also_where_a_process_has_no_row_that_is_touched(ranks, tmp_path, shared):
    """Few steps, or none, read an item of the second process's block."""
    generator, rows = np.random.default_rng(0), []
    for user in range(30):
        low, high = (20, 40) if shared and user < 2 else (0, 20)
        rows += [(user, int(item), t) for t, item in enumerate(generator.integers(low, high, 8))]
    rows += [(100 + item, item, 0) for item in range(40)]  # users of one event, trained on nothing
    frame = polars.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    prepare(frame, tmp_path / "data", on_duplicate="keep")
    by_popularity = Item(sampled=Sampled(negatives=1, by="popularity", alpha=2.0))
    chosen = sharded_recipe(
        "rows", monitor="steps", batch_size=4, steps=20, validate_every=20, checkpoint_every=5,
        objectives={"item": by_popularity},
    )  # fmt: skip
    pair = replace(chosen, pretraining=replace(chosen.pretraining, devices=2))
    run(tmp_path / "data", tmp_path / "one", chosen)
    ranks(2, trained, tmp_path / "data", tmp_path / "two", pair)
    one, both = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("one", "two"))
    for name in ("item_input.ids.weight", "item_head.bias"):
        assert (one[name] - both[name]).abs().max() < 3e-4, name  # a step is 1e-3
    ranks(2, killed, tmp_path / "data", tmp_path / "cut", pair, 12)
    ranks(2, trained, tmp_path / "data", tmp_path / "cut", pair, {"resume": True})
    assert_same_models(tmp_path / "two", tmp_path / "cut")


def tuned(group, data: Path, output: Path, chosen: Recipe, start: Path) -> dict:
    return trained(group, data, output, chosen, {"model": UserModel.from_pretrained(start)})


def test_a_model_to_start_from_is_validated_and_spread(data, ranks, tmp_path):
    chosen = sharded_recipe("dense", steps=6, precision="bf16-mixed")
    start = run(data, tmp_path / "start", chosen)
    pair = replace(chosen, pretraining=replace(chosen.pretraining, devices=2))
    run(data, tmp_path / "one", chosen, model=start)
    ranks(2, tuned, data, tmp_path / "two", pair, tmp_path / "start" / "model")
    said = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert said[0]["parameters"] == said[1]["parameters"]
    first, second = (trained_losses(tmp_path / name) for name in ("one", "two"))
    assert first == pytest.approx(second, rel=2e-2), "bfloat16"


def trained_losses(folder: Path) -> list[float]:
    (file,) = (folder / "metrics").rglob("metrics.csv")
    return polars.read_csv(file)["train_loss"].drop_nulls().to_list()


def test_a_run_that_dies_between_its_shards_and_their_checkpoint(data, tmp_path, monkeypatch):
    chosen = sharded_recipe("rows", monitor="steps")
    run(data, tmp_path / "whole", chosen)
    written = []

    def dies(state, path):
        written.append(state["shards"])
        if len(written) == 2:
            raise Killed
        write_checkpoint(state, path)

    with monkeypatch.context() as context:
        context.setattr("fastrec.training.callbacks.write_checkpoint", dies)
        with pytest.raises(Killed):
            run(data, tmp_path / "cut", chosen)
    left = {path.name for path in (tmp_path / "cut").glob("last.shards-*")}
    assert left == set(written), "the first pair, and the shards of the second"
    run(data, tmp_path / "cut", chosen, resume=True)
    assert_same_models(tmp_path / "whole", tmp_path / "cut")
    (last,) = (tmp_path / "cut").glob("last.shards-*")
    assert last.name not in written


def test_damaged_shards_are_named(data, tmp_path):
    chosen = sharded_recipe("rows", steps=2, validate_every=2, monitor="steps")
    run(data, tmp_path / "run", chosen)
    (shards,) = (tmp_path / "run").glob("last.shards-*")
    for file in shards.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    longer = replace(chosen, pretraining=replace(chosen.pretraining, steps=4))
    with pytest.raises(ValueError, match=f"{shards.name} cannot be read"):
        run(data, tmp_path / "run", longer, resume=True)


@pytest.mark.parametrize(
    ("update", "objective", "match"),
    [
        ("dense", Item(sampled=Sampled(4, in_batch=True)), "tables.shard needs an item loss"),
        ("rows", Item(), "rows with shard needs item losses over sampled"),
        ("dense", Item(loss="bpr_max", sampled=Sampled(4)), "others have a gradient of every"),
    ],
)
def test_what_reads_other_rows_is_refused(data, tmp_path, update, objective, match):
    chosen = sharded_recipe(update, objectives={"item": objective})
    with pytest.raises(ValueError, match=match):
        run(data, tmp_path / "run", chosen)
    assert not (tmp_path / "run").exists()


def assert_same_models(one: Path, other: Path) -> None:
    first, second = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    state, again = trained_weights(one), trained_weights(other)
    assert state.keys() == again.keys()
