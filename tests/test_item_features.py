# SPDX-License-Identifier: Apache-2.0
"""Vectors of items from a file: how they are read and stored, mapped one item at a time in plain
PyTorch, as input and as what scores items; models of other items."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from builders import dataset_of, jagged, loader_of
from torch import nn
from torch.nn import functional as F

from fastrec.cli import main
from fastrec.data.batch import from_sequences
from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.item_vectors import item_vectors
from fastrec.data.prepare import prepare
from fastrec.data.side import SideData
from fastrec.data.steps.next_item import NextItem
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.item_features import FeatureMap, ItemFeature
from fastrec.nn.items import Items
from fastrec.nn.model_config import ModelConfig, num_parameters
from fastrec.nn.transfer import take, with_items
from fastrec.nn.user_model import UserModel
from fastrec.objectives.item import Item, Sampled
from fastrec.objectives.joint import JointObjective
from fastrec.random import Rng, keep_mask
from fastrec.serve import recommend
from fastrec.training.config import Recipe
from fastrec.training.model_folder import for_items_of
from fastrec.training.stage import Init, Stage
from fastrec.training.start import started_model, with_model

V, WIDTH = 12, 8
ENCODER = Transformer(layers=1, heads=1, causal=True, pre_norm=True)
LOG = pl.DataFrame(
    {"user": [u for u in range(6) for _ in range(4)], "item": [10 + i % 7 for i in range(24)]}
)


def vectors(items, width: int = 3) -> list[list[float]]:
    return np.random.default_rng(1).normal(size=(100, width))[list(items)].tolist()


def made(path, features, **options):
    return prepare(LOG, path, ordered=True, item_features=features, **options)


# Files.


def test_lists_are_a_vector_each_and_numbers_are_one_together(tmp_path):
    """Items 10 to 16 have events; 16 has no row, 15 no text, 99 no events."""
    items = [15, 12, 10, 99, 11, 13, 14]
    text = [None, *vectors(items[1:])]
    frame = pl.DataFrame({"item_id": items, "text": text, "image": vectors(items, 2)})
    frame = frame.with_columns(pl.col("image").cast(pl.Array(pl.Float64, 2)))
    frame.write_parquet(tmp_path / "f.parquet")
    report = made(tmp_path / "lists", tmp_path / "f.parquet")
    assert report.removed == {"feature rows of items without interactions": 1}
    assert "item features: text, 3 numbers; 2 items have none" in str(report)
    assert "item features: image, 2 numbers; 1 items have none" in str(report)
    data = SequenceDataset.load(tmp_path / "lists")
    assert data.schema["item_features"]["text"] == {"width": 3, "missing": 2}
    found = item_vectors(data, ["text", "image"])
    expected = np.zeros((7, 3), np.float32)
    for item, row in zip(items, text, strict=True):
        if row is not None and item != 99:
            expected[item - 10] = row
    assert found["text"].dtype == torch.float32
    np.testing.assert_array_equal(found["text"].numpy(), expected)
    np.testing.assert_array_equal(found["image"][5].numpy(), np.float32(frame["image"][0]))
    assert not found["image"][6].any()
    columns = pl.DataFrame(vectors(items), schema=["a", "b", "c"], orient="row")
    columns.insert_column(0, pl.Series("item", items)).write_csv(tmp_path / "graph.csv")
    made(tmp_path / "columns", tmp_path / "graph.csv")
    found = item_vectors(SequenceDataset.load(tmp_path / "columns"), ["graph"])["graph"]
    expected[5] = vectors([15])[0]
    np.testing.assert_array_equal(found.numpy(), expected)


def bad(**columns) -> pl.DataFrame:
    return pl.DataFrame({"item_id": [10, 11, 12], **columns}, strict=False)


@pytest.mark.parametrize(
    "frame, column, row, message",
    [
        (bad(v=[[1.0, 2.0], [1.0], [0.0, 0.0]]), "v", 2, "expected a list of 2 numbers"),
        (
            bad(v=[[1.0, 2.0], [1.0, 0.0], [0.0, np.nan]]),
            "v",
            3,
            r"got \[0.0, nan\]",
        ),
        (bad(v=[[1.0, np.inf], [1.0, 0.0], [0.0, 0.0]]), "v", 1, "expected finite numbers"),
        (bad(v=[None, [1.0, 0.0], [0.0, None]]), "v", 3, "expected finite numbers"),
        (bad(v=[[], [], []]), "v", None, "holds no vector"),
        (bad(v=[["a"], ["b"], ["c"]]), "v", None, "expected lists of numbers"),
        (bad(a=[1.0, np.nan, 2.0], b=[1, 2, 3]), "a", 2, "finite"),
        (bad(a=["x", "y", "z"]), "a", 1, "number"),
        (bad(v=[[1.0]] * 3, a=[1.0] * 3), "a", None, "is no list, as other columns are"),
        (bad(**{"a b": [[1.0]] * 3}), "a b", None, "must be made of letters"),
        (bad(), None, None, "has no column beside the ids"),
        (pl.DataFrame({"item_id": [10, 10], "a": [1.0, 2.0]}), "item_id", 2, "listed twice"),
        (pl.DataFrame({"item_id": [1, 2], "a": [1.0, 2.0]}), "item_id", None, "none of its 2 ids"),
        (pl.DataFrame({"movie": [10], "a": [1.0]}), "item_id", None, "column is missing"),
    ],
)
def test_what_is_no_vector_is_refused_by_place(tmp_path, frame, column, row, message):
    with pytest.raises(DataError, match=message) as caught:
        made(tmp_path / "d", frame)
    assert (caught.value.column, caught.value.row) == (column, row)
    assert not (tmp_path / "d").exists()


def test_files_are_checked_and_named(tmp_path):
    made(tmp_path / "d", bad(v=vectors(range(3))))
    data = SequenceDataset.load(tmp_path / "d")
    with pytest.raises(DataError, match=r"has no item features 'text', only \['v'\]"):
        item_vectors(data, ["text"])
    file = tmp_path / "d" / "features.v.npy"
    np.save(file, np.load(file) + 1)
    with pytest.raises(DataError, match=r"features\.v\.npy: is not the file that was written"):
        SequenceDataset.load(tmp_path / "d")
    file.unlink()
    with pytest.raises(DataError, match=r"features\.v\.npy: file is missing"):
        SequenceDataset.load(tmp_path / "d")


def test_items_of_an_earlier_data_set_keep_their_vectors(tmp_path):
    made(tmp_path / "old", bad(v=vectors(range(3))))
    made(tmp_path / "same", None, items_of=tmp_path / "old")
    old, same = (SequenceDataset.load(tmp_path / name) for name in ("old", "same"))
    assert torch.equal(item_vectors(old, ["v"])["v"], item_vectors(same, ["v"])["v"])
    new = pl.DataFrame({"item_id": [11, 16], "v": vectors([50, 51])})
    made(tmp_path / "new", new, items_of=tmp_path / "old")
    found = item_vectors(SequenceDataset.load(tmp_path / "new"), ["v"])["v"].numpy()
    expected = item_vectors(old, ["v"])["v"].numpy()
    expected[[1, 6]] = vectors([50, 51])
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(DataError, match="item features 'v' have 3 numbers there, 1 here"):
        made(tmp_path / "x", bad(v=[[1.0]] * 3), items_of=tmp_path / "old")


# The map.


def feature_map(size: int = 5, **settings) -> FeatureMap:
    torch.manual_seed(3)
    module = FeatureMap(ItemFeature(width=4, **settings), torch.randn(V, size), 1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def test_experts_are_what_their_formula_says_one_item_at_a_time():
    module = feature_map(experts=3)
    for item in (0, 7, V - 1):
        x, total = module.table[item], torch.zeros(4, dtype=torch.float64)
        gate = module.gate.weight @ x
        share = gate.exp() / gate.exp().sum()
        for g in range(3):
            weight = module.map.weight[4 * g : 4 * g + 4]
            total += share[g] * (weight @ (x - module.shift[g]))
        torch.testing.assert_close(module(torch.tensor([item]))[0], total)
    items = torch.tensor([3, 3, 9])
    torch.testing.assert_close(module.whole()[items], module(items))
    linear = feature_map()
    torch.testing.assert_close(linear.whole(), linear.table @ linear.map.weight.T)


def test_dropout_is_of_what_the_experts_read_and_not_of_what_the_gate_reads():
    module, rng, items = feature_map(experts=3, dropout=0.5), Rng(5, 2), torch.arange(V)
    keep, scale = keep_mask(rng, 0.5, items, 0 * items, 5, site="item_features", layer=1)
    x = module.table * keep * scale
    gate = (module.table @ module.gate.weight.T).softmax(1)
    maps = module.map.weight.unflatten(0, (3, 4))
    each = torch.einsum("gpf,ngf->ngp", maps, x[:, None] - module.shift)
    torch.testing.assert_close(module.whole(rng), torch.einsum("ng,ngp->np", gate, each))


def test_randomness_is_a_function_of_seed_step_and_item():
    module, rng = feature_map(experts=3, noise=True, dropout=0.4), Rng(5, 2)
    whole, items = module.whole(rng), torch.tensor([4, 4, 0, 11])
    torch.testing.assert_close(module(items, rng), whole[items])
    assert not torch.allclose(whole, module.whole(Rng(5, 3)))
    assert not torch.allclose(whole, module.whole())
    other = FeatureMap(module.settings, module.table, 2).double()
    other.load_state_dict(module.state_dict())
    assert not torch.allclose(whole, other.whole(rng)), "two features have randomness of their own"
    many = torch.arange(50_000)
    noise = module._normal(many, torch.zeros_like(many), rng)
    assert noise.shape == (50_000, 3)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(np.corrcoef(noise.T.numpy()) - np.eye(3)).max() < 0.02
    tails = (noise.abs() > 2).double().mean()
    assert abs(tails - 0.0455) < 0.003


# Models.


def model_of(num_items: int = V, table=None, num_users: int = 0, **changes) -> UserModel:
    torch.manual_seed(2)
    items = changes.pop("items", Items(features={"text": ItemFeature(WIDTH)}, combine="sum"))
    settings = {"width": WIDTH, "max_len": 10, "dropout": 0.2, "encoder": ENCODER, **changes}
    if table is None:
        table = torch.from_numpy(np.float32(vectors(range(num_items), 5)))
    given = {"text": table} if items.features else {}
    model = UserModel(num_items, ModelConfig(items=items, **settings), num_users, given)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


ADDED = Items(features={"text": ItemFeature(WIDTH)}, combine="sum")
JOINED = Items(features={"text": ItemFeature(3)})
ALONE = replace(ADDED, ids=False)


@pytest.mark.parametrize("items", [ADDED, JOINED, ALONE, replace(ADDED, scale=True)])
def test_the_input_of_an_event(items):
    head = {"head_table": "own"} if not items.ids else {}
    model = model_of(items=items, **head)
    batch = jagged([4, 0, 3], V)
    batch.values[[1, 5]] = torch.tensor([V, V + 3])  # [MASK] and [UR]
    actual, part = model.item_input(batch).dense(), model.item_input
    for event, value in enumerate(batch.values.tolist()):
        real = value < V
        row = value if items.ids else value - V
        id = part.ids.weight[row] if items.ids or not real else torch.zeros(WIDTH)
        feature = part.features[0]
        mapped = (
            feature.map.weight @ feature.table[value]
            if real
            else torch.zeros(items.features["text"].width)
        )
        if items.combine == "sum":
            expected = id + mapped
        else:
            expected = part.join.weight @ torch.cat([id, mapped]) + part.join.bias
        expected = expected * (WIDTH**0.5 if items.scale else 1)
        torch.testing.assert_close(actual[event], expected)


@pytest.mark.parametrize("sampled", [None, Sampled(6), Sampled(6, in_batch=True)])
@pytest.mark.parametrize("items", [ADDED, ALONE])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_features_score_items(items, similarity, sampled):
    """The loss and its gradients are those of scores that plain PyTorch computes; the table is made
    once for both sides."""
    how = dict(head_table="features", head_similarity=similarity, head_temperature=0.2)
    model = model_of(items=items, **how).double()
    data = dataset_of([[1, 2, 3, 4, 0], [5, 6, 7], [8, 9, 10, 11, 3]], V)
    side = SideData(data, split="all")
    views = loader_of(model, {"main": [NextItem()]}, side).batch_at(0)
    objective = JointObjective({"item": Item(sampled=sampled)}, model, side)
    calls = []
    model.item_input.features[0].register_forward_hook(lambda *_: calls.append("rows"))
    (term,) = objective(model, views, Rng(1, 0))
    assert not calls
    encoded = model.encode(views["main"], Rng(1, 0))
    batch, head, part = encoded.batch, model.item_head, model.item_input
    table = part.features[0].table @ part.features[0].map.weight.T
    table = table + part.ids.weight[:V] if items.ids else table
    torch.testing.assert_close(encoded.items[:V], table)
    query = head.norm(F.gelu(head.dense(encoded.states[batch.scored])))
    if similarity == "cosine":
        query = query / query.norm(dim=1, keepdim=True)
        table = table / table.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.item_table, table)
    target = batch.events["target"][batch.scored]
    if sampled is None:
        logits = query @ table.T / 0.2 + head.bias
        exact = F.cross_entropy(logits, target)
        torch.testing.assert_close(term.loss, exact)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        learned = [p for p in model.parameters() if p.requires_grad]
        ours, theirs = (
            torch.autograd.grad(loss, learned, allow_unused=True) for loss in (term.loss, exact)
        )
        for name, a, b in zip(names, ours, theirs, strict=True):
            torch.testing.assert_close(a, b, msg=name)
    else:
        term.loss.backward()
        assert term.loss.isfinite() and part.features[0].map.weight.grad.abs().sum() > 0


def test_the_vectors_that_score_are_those_of_now():
    """A fused optimizer changes weights without a word: nothing is kept in a model."""
    model = model_of(head_table="features")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model.item_table.sum().backward()
    with torch.no_grad():
        before = model.item_table.clone()
        optimizer.step()
        assert not torch.equal(model.item_table, before)


SETTINGS = [
    dict(),
    dict(items=JOINED),
    dict(items=ALONE, head_table="features", head_similarity="cosine", head_temperature=0.07),
    dict(
        items=Items(
            features={"text": ItemFeature(WIDTH, 3, noise=True, dropout=0.2)}, combine="sum"
        ),
        head_table="features",
    ),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_models_are_counted_saved_and_loaded(tmp_path, settings):
    model = model_of(**settings)
    numbers = sum(value.numel() for value in model.state_dict().values())
    assert num_parameters(V, model.config, 0, {"text": 5}) == numbers
    model.save_pretrained(tmp_path / "model")
    again, batch = UserModel.from_pretrained(tmp_path / "model"), jagged([3, 2], V)
    assert torch.equal(again.encode(batch).states, model.encode(batch).states)
    assert torch.equal(again.item_table, model.item_table)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["item_vectors"] == {"text": 5}


@pytest.mark.parametrize("settings", SETTINGS)
def test_tomorrows_items_have_their_vectors(settings):
    before, rows = model_of(**settings), torch.tensor([3, -1, 0])
    vectors = torch.randn(3, 5)
    after = with_items(before, rows, {"text": vectors})
    table = after.item_input.features[0].table
    assert torch.equal(table[[0, 2]], before.item_input.features[0].table[[3, 0]])
    assert torch.equal(table[1], vectors[1])
    assert not with_items(before, rows).item_input.features[0].table[1].any()
    old, new = ([[0, 3]], [[2, 0]])
    torch.testing.assert_close(
        after.encode(from_sequences(new)).states, before.encode(from_sequences(old)).states
    )
    if settings.get("head_table") == "features" and not before.config.items.ids:
        inside = before.item_input.features[0]
        expected = before.item_head.compared(inside._mapped(vectors[1:2], rows[:1], None))
        torch.testing.assert_close(after.item_table[1:2], expected)


def test_a_model_of_features_alone_goes_to_other_items():
    """What it learned of vectors is taken, and the vectors are those of the new items."""
    how = SETTINGS[2]
    model, initial = model_of(7, torch.randn(7, 5), **how), model_of(**how)
    nn.init.zeros_(model.item_input.ids.weight)
    own = model.item_input.features[0].table.clone()
    taken = take(model, initial, ["input", "encoder"])
    assert "item_input.features.0.map.weight" in taken
    assert torch.equal(model.item_input.features[0].table, own)
    assert torch.equal(model.item_input.ids.weight, initial.item_input.ids.weight)


def test_settings_that_cannot_be():
    for settings, message in (
        (dict(width=0), "width must be at least 1"),
        (dict(experts=-1), r"experts must be in \[0, 1024\]"),
        (dict(noise=True), "noise has no effect: a gate needs 2 experts, got 0"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ItemFeature(**settings)
    with pytest.raises(ValueError, match="ids false leaves nothing of an item"):
        Items(ids=False)
    with pytest.raises(ValueError, match="ids false needs combine: sum"):
        Items(ids=False, features={"text": ItemFeature()})
    for settings, message in (
        (dict(items=ALONE), "head_table tied: items.ids is false"),
        (dict(head_table="features"), "head_table: features needs items.features"),
        (dict(items=JOINED, head_table="features"), "and combine: sum"),
        (dict(items=Items(features={"text": ItemFeature(3)}, combine="sum")), "adds vectors of"),
        (dict(head_similarity="l2"), r"head_similarity must be one of \['dot', 'cosine'\]"),
        (dict(head_temperature=0.0), "head_temperature must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig(**{"width": WIDTH, **settings})
    with pytest.raises(ValueError, match=r"the vectors of 'text' must be \[12, F\], got \[3, 5\]"):
        model_of(table=torch.zeros(3, 5))


def test_unisrec_goes_to_other_items_with_and_without_ids(tmp_path):
    """By the command line: pre-training on one list of items; on another the map of the text is
    trained beside a frozen encoder, and with ids the model starts as without them."""
    generator = np.random.default_rng(0)
    for name, first in (("source", 0), ("target", 20)):
        walks = [(u, first + int(i), t) for u in range(40)
                 for t, i in enumerate(generator.integers(0, 15, 6))]  # fmt: skip
        frame = pl.DataFrame(walks, schema=["user", "item", "timestamp"], orient="row")
        frame.write_csv(tmp_path / f"{name}.csv")
        items = sorted(frame["item"].unique())
        pl.DataFrame({"item_id": items, "text": vectors(items, 5)}).write_parquet(
            tmp_path / f"{name}.parquet"
        )
        main(["prepare", f"--source={tmp_path / name}.csv", f"--output={tmp_path / name}",
              "--on_duplicate=keep", f"--item_features={tmp_path / name}.parquet"])  # fmt: skip
    small = ["--config=unisrec", "--device=cpu", "--model.width=8", "--model.max_len=6",
             "--model.items.features.text.width=8"]  # fmt: skip

    def short(stage: str, data: str, run: str) -> list[str]:
        return [*small, f"--data={tmp_path / data}", f"--output={tmp_path / run}",
                f"--{stage}.steps=4", f"--{stage}.validate_every=4"]  # fmt: skip

    main(["pretrain", *short("pretraining", "source", "run")])
    base, states = tmp_path / "run" / "model", []
    initial = UserModel.from_pretrained(base)
    for run in ("inductive", "transductive"):
        flags = [f"--init={base}", f"--recommendation.init.ids={run == 'transductive'}"]
        main(["finetune", *short("recommendation", "target", run), *flags])
        made = json.loads((tmp_path / run / "transfer.json").read_text())
        assert "item_input.features.0.map.weight" in made["taken"]
        assert not any(name.startswith("encoder.") for name in made["trained"])
        tuned = UserModel.from_pretrained(tmp_path / run / "model")
        assert tuned.config.items.ids == (run == "transductive") and tuned.num_items == 15
        for name, value in initial.encoder.state_dict().items():
            assert torch.equal(tuned.encoder.state_dict()[name], value)
    target = SequenceDataset.load(tmp_path / "target")
    for ids in (False, True):
        init = Init(take=["input", "encoder"], ids=ids)
        config = with_model(Recipe(), initial, Stage(init=init)).model
        model, _ = started_model(target, config, initial, init)
        with torch.no_grad():
            states.append((model.encode(from_sequences([[0, 3, 2]])).states, model.item_table))
    for inductive, transductive in zip(*states, strict=True):
        assert torch.equal(inductive, transductive)
    with pytest.raises(ValueError, match="init.ids has no effect: the model to start from has ids"):
        with_model(Recipe(), model, Stage(init=init))
    with pytest.raises(ValueError, match="init.ids needs init.take with input in place of items"):
        Init(ids=True)


def test_from_a_file_to_recommendations_of_tomorrow(tmp_path):
    """By the command line; the model needs no vectors of the data set that it answers for."""
    generator = np.random.default_rng(0)
    rows = [(u, int(i), t) for u in range(40) for t, i in enumerate(generator.integers(0, 15, 6))]
    log = pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")
    items = list(range(18))
    features = pl.DataFrame({"item_id": items, "text": vectors(items, 5)})
    features.write_parquet(tmp_path / "text.parquet")
    extra = pl.DataFrame({"user": [50] * 4, "item": [15, 16, 17, 3], "timestamp": [0, 1, 2, 3]})
    days = {"today": log, "tomorrow": pl.concat([log, extra]), "bare": log}
    for name, frame in days.items():
        frame.write_csv(tmp_path / f"{name}.csv")
        flags = [] if name == "bare" else [f"--item_features={tmp_path / 'text.parquet'}"]
        main(["prepare", f"--source={tmp_path / name}.csv", f"--output={tmp_path / name}",
              "--on_duplicate=keep", *flags])  # fmt: skip
    main(["pretrain", "--config=sasrec", f"--data={tmp_path / 'today'}", "--model.width=8",
          f"--output={tmp_path / 'run'}", "--pretraining.steps=4", "--pretraining.validate_every=4",
          "--model.items={features: {text: {width: 8}}, combine: sum, ids: false}",
          "--model.head_table=features", "--device=cpu"])  # fmt: skip
    folder = tmp_path / "run" / "model"
    model = UserModel.from_pretrained(folder)
    bare, tomorrow = (SequenceDataset.load(tmp_path / name) for name in ("bare", "tomorrow"))
    assert recommend(model, bare, 3).height == 120
    with pytest.warns(UserWarning, match="3 of the 18 items .* are new"):
        grown = for_items_of(model, folder, tomorrow)
    row = tomorrow.item_ids().tolist().index(16)
    mapped = model.item_input.features[0].map.weight @ torch.tensor(vectors([16], 5)[0])
    torch.testing.assert_close(grown.item_table[row], mapped)
