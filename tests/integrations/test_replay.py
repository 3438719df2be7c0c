# SPDX-License-Identifier: Apache-2.0
"""SasRec and TwoTower of RePlay with and without the patch: the original is the oracle."""

import copy

import pytest
import torch

import fastrec
from fastrec.integrations.patching import keep_original

pytest.importorskip("replay", reason="replay-rec is not installed")
pytest.importorskip("lightning", reason="lightning is not installed")

import lightning
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn import loss as losses
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import (
    ComputeMetricsCallback,
    HiddenStatesCallback,
    PandasTopItemsCallback,
    TorchTopItemsCallback,
)
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.lightning.postprocessor import SeenItemsFilter
from replay.nn.sequential import DiffTransformerLayer, SasRec, TwoTower

ITEMS, LENGTH, SEQUENCES = 40, 10, 12
MODELS = ("SasRec", "TwoTower")
pytestmark = [
    pytest.mark.filterwarnings("error:fastrec leaves"),
    pytest.mark.filterwarnings("ignore::UserWarning:(?!fastrec)", "ignore::DeprecationWarning"),
]


def feature(name, kind=FeatureType.CATEGORICAL, count=ITEMS, **more):
    sized = {} if kind == FeatureType.NUMERICAL else dict(padding_value=count, cardinality=count)
    return TensorFeatureInfo(
        name, feature_type=kind, is_seq=True, embedding_dim=16, **sized, **more,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, name)],
    )  # fmt: skip


ID = feature("item_id", feature_hint=FeatureHint.ITEM_ID)
WIDE = [
    ID,
    feature("genre", count=5),
    feature("tags", FeatureType.CATEGORICAL_LIST, count=6),
    feature("price", FeatureType.NUMERICAL, tensor_dim=1),
]


class Features:
    """What TwoTower reads of its items."""

    feature_names = ("item_id",)

    def __getitem__(self, name):
        return torch.arange(ITEMS)


def model_of(name="SasRec", features=(ID,), dropout=0.0, loss=None):
    torch.manual_seed(0)
    settings = dict(
        embedding_dim=16, num_heads=2, num_blocks=2, max_sequence_length=LENGTH + 2,
        dropout=dropout, hidden_dim=24,
    )  # fmt: skip
    schema = TensorSchema(list(features))
    if name == "SasRec":
        model = SasRec.from_params(schema, **settings)
    else:
        model = TwoTower.from_params(schema, Features(), **settings)
    for parameter in model.parameters():  # biases of 0 would not be seen to be missing
        parameter.data += 0.2 * torch.randn_like(parameter)
    return with_loss(model, loss) if loss else model.train()


def with_loss(model, loss):
    model.loss = loss
    loss.logits_callback = model.get_logits
    return model.train()


def batch(negatives=None, shift=1, features=(ID,)):
    """Histories of 0 to 11 items, padded on the left, each place with the item behind it."""
    torch.manual_seed(3)
    lengths = torch.tensor([1, 3, LENGTH + 1, 5, 0, 2, 7, 4, 9, 6, LENGTH, 8])
    size = LENGTH + shift
    mask = torch.arange(size) >= size - lengths[:, None]
    values = {}
    for info in features:
        if info.name == "price":
            values[info.name] = torch.randn(mask.shape) * mask
            continue
        shape = (*mask.shape, 3) if info.name == "tags" else mask.shape
        held = mask[..., None] if info.name == "tags" else mask
        drawn = torch.randint(0, info.cardinality, shape)
        values[info.name] = drawn.where(held, info.padding_value)
    return dict(
        feature_tensors={name: value[:, :-shift].contiguous() for name, value in values.items()},
        padding_mask=mask[:, :-shift],
        positive_labels=values["item_id"][:, shift:, None],
        negative_labels=negatives,
        target_padding_mask=mask[:, shift:, None],
    )


def step(model, given, seed=1):
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(**copy.deepcopy(given))  # BCE changes the shape of a mask
    output["loss"].backward()
    return output["loss"].detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def same_step(model, given):
    expected, gradients = step(model, given)
    with fastrec.patch("replay"):
        found, others = step(model, given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-5)
    assert max(g.abs().max() for g in gradients.values()) > 1e-2
    assert torch.equal(step(model, given)[0], expected)  # undone


WEIGHTS = torch.linspace(0.5, 1.5, ITEMS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "loss",
    [
        losses.CE(ignore_index=ITEMS),
        losses.CE(label_smoothing=0.1, weight=WEIGHTS, reduction="sum"),
        losses.LogOutCE(ITEMS),
        losses.BCE(),
        losses.LogInCE(ITEMS),
    ],
    ids=["CE", "CE-weights", "LogOutCE", "BCE", "LogInCE"],
)
def test_losses_and_gradients_are_those_of_the_original(name, loss):
    same_step(model_of(name, loss=loss), batch())


@pytest.mark.parametrize("kind", [losses.CEWeighted, losses.LogOutCEWeighted])
def test_weighted_losses(kind):
    loss = kind("w") if kind is losses.CEWeighted else kind(ITEMS, "w")
    given = batch()
    given["feature_tensors"]["w"] = torch.rand(given["target_padding_mask"].shape)
    same_step(model_of(loss=loss), given)


@pytest.mark.parametrize(
    "shape", [(30,), (SEQUENCES, 4), (SEQUENCES, LENGTH, 4)], ids=["shared", "row", "place"]
)
@pytest.mark.parametrize("kind", ["CESampled", "BCESampled", "CESampledWeighted"])
def test_sampled_losses(kind, shape):
    given = batch(torch.randint(0, ITEMS, shape))
    given["feature_tensors"]["w"] = torch.rand(given["target_padding_mask"].shape)
    names = ("w",) if kind == "CESampledWeighted" else ()
    same_step(model_of(loss=getattr(losses, kind)(*names)), given)


def test_features_of_all_kinds():
    same_step(model_of(features=WIDE), batch(features=WIDE))


@pytest.mark.parametrize("shift", [2, 3])
def test_targets_of_more_than_one_place_of_padding(shift):
    """With a shift of s the s places in front of the first item predict items."""
    given = batch(shift=shift)
    assert (given["target_padding_mask"][..., 0] & ~given["padding_mask"]).sum() > SEQUENCES
    same_step(model_of(), given)


def test_padding_on_the_right():
    given = batch()
    padding = given["padding_mask"]
    for name in ("padding_mask", "target_padding_mask", "positive_labels"):
        given[name] = given[name].flip(1)
    given["feature_tensors"] = {n: v.flip(1) for n, v in given["feature_tensors"].items()}
    given["target_padding_mask"] = padding.flip(1)[..., None]
    same_step(model_of(), given)
    given["target_padding_mask"] = torch.ones_like(given["target_padding_mask"])
    given["positive_labels"] = torch.randint(0, ITEMS, given["positive_labels"].shape)
    with pytest.warns(UserWarning, match="SasRec as it is: a batch has targets at padding behind"):
        same_step(model_of(), given)


def test_places_without_an_item_and_a_target_are_not_computed(monkeypatch):
    from fastrec.integrations import replay_encoder

    rows, op = [], replay_encoder.attend
    monkeypatch.setattr(replay_encoder, "attend", lambda q, *a: rows.append(len(q)) or op(q, *a))
    given = batch()
    with fastrec.patch("replay"):
        step(model_of(), given)
    kept = given["padding_mask"] | given["target_padding_mask"][..., 0]
    assert rows == 2 * [int(kept.sum())] and rows[0] < kept.numel()


def test_no_target_is_a_loss_of_0():
    model, given = model_of(), batch()
    given["target_padding_mask"] = torch.zeros_like(given["target_padding_mask"])
    assert model(**given)["loss"].isnan()
    with fastrec.patch("replay"):
        loss, gradients = step(model, given)
        assert loss == 0 and all((g == 0).all() for g in gradients.values())
        given["padding_mask"] = torch.zeros_like(given["padding_mask"])
        assert step(model, given)[0] == 0


def test_autocast():
    model, given = model_of(), batch()
    expected = model(**given)["loss"]
    with fastrec.patch("replay"), torch.autocast("cpu", torch.bfloat16):
        found, gradients = step(model, given)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


def test_dropout_is_drawn_by_the_seed_and_of_the_same_distribution():
    model, given = model_of(dropout=0.5), batch()
    with fastrec.patch("replay"):
        found = [step(model, given, seed)[0] for seed in (1, 1, 2)]
        assert found[0] == found[1] != found[2]
        patched = torch.stack([step(model, given, seed)[0] for seed in range(200)])
    plain = torch.stack([step(model, given, seed)[0] for seed in range(200)])
    spread = (patched.var() / 200 + plain.var() / 200).sqrt()
    assert abs(patched.mean() - plain.mean()) < 5 * spread
    assert 0.7 < patched.std() / plain.std() < 1.4


def evaluation_batches():
    given = batch()
    torch.manual_seed(5)
    truth = torch.randint(0, ITEMS, (SEQUENCES, 2))
    seen = given["feature_tensors"]["item_id"]
    rows = dict(
        feature_tensors=given["feature_tensors"], padding_mask=given["padding_mask"],
        ground_truth=truth, train=seen.where(given["padding_mask"], -2), query_id=torch.arange(12),
        seen_ids=seen.where(given["padding_mask"], -1),
    )  # fmt: skip

    def part(value, where):
        return (
            {k: part(v, where) for k, v in value.items()}
            if isinstance(value, dict)
            else value[where]
        )

    return [part(rows, slice(0, 8)), part(rows, slice(8, 12))]


def trainer(*callbacks, **more):
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=list(callbacks), **more,
    )  # fmt: skip


def loader(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


def metrics_of(model, stage="validate", **more):
    settings = dict(
        metrics=["recall", "ndcg", "map", "mrr", "precision", "novelty", "coverage"], ks=[3, 7],
        item_count=ITEMS, verbose=False, postprocessors=[SeenItemsFilter(ITEMS)],
    )  # fmt: skip
    callback = ComputeMetricsCallback(**settings | more)
    run = getattr(trainer(callback), stage)
    (found,) = run(LightningModule(model), loader(evaluation_batches()), verbose=False)
    return found


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("name", MODELS)
def test_metrics_are_those_of_the_original(name, stage):
    model = model_of(name)
    # Of 35 items a few users have seen some: the last of their best are seen ones.
    for more in ({}, {"postprocessors": []}, {"ks": [3, 7, 35]}):
        expected = metrics_of(model, stage, **more)
        with fastrec.patch("replay"):
            assert metrics_of(model, stage, **more) == pytest.approx(expected, abs=1e-7)
        assert len(expected) >= 14 and 0 < expected["recall@7"] < 1
    with torch.no_grad():  # a run that has diverged
        next(model.parameters()).fill_(torch.nan)
    expected = metrics_of(model, stage)
    with fastrec.patch("replay"):
        assert metrics_of(model, stage) == expected


def predictions(model, kind, **more):
    callback = kind(top_k=5, query_column="query_id", **more)
    batches = loader(evaluation_batches())
    trainer(callback).predict(LightningModule(model), batches, return_predictions=False)
    return callback.get_result()


@pytest.mark.parametrize("name", MODELS)
def test_the_best_items_are_those_of_the_scores(name):
    model = model_of(name)
    for filters in ([], [SeenItemsFilter(ITEMS)]):
        expected = predictions(model, TorchTopItemsCallback, postprocessors=filters)
        with fastrec.patch("replay"):
            users, items, scores = predictions(model, TorchTopItemsCallback, postprocessors=filters)
        assert torch.equal(users, expected[0]) and torch.equal(items, expected[1])
        torch.testing.assert_close(scores, expected[2], rtol=1e-5, atol=1e-5)
    with fastrec.patch("replay"):
        frame = predictions(model, PandasTopItemsCallback, item_column="item_id")
    assert len(frame) == 5 * SEQUENCES


def test_scores_are_not_made(monkeypatch):
    model = model_of()
    monkeypatch.setattr(model.head, "forward", lambda *args: 1 / 0)
    with fastrec.patch("replay"):
        metrics_of(model)
        predictions(model, TorchTopItemsCallback)
    with pytest.raises(ZeroDivisionError):
        metrics_of(model)


def fitted(name, dropout=0.0):
    model = LightningModule(model_of(name, dropout=dropout), OptimizerFactory(learning_rate=1e-3))
    callback = ComputeMetricsCallback(["ndcg"], [7], verbose=False)
    run = trainer(callback, max_epochs=2)
    run.fit(model, loader([batch(), batch()]), loader(evaluation_batches()))
    return model, run, callback.get_metrics()


@pytest.mark.parametrize("name", MODELS)
def test_an_epoch_of_the_trainer(name):
    """Without dropout nothing is drawn: the same parameters."""
    expected, _, metrics = fitted(name)
    with fastrec.patch("replay"):
        found, _, others = fitted(name)
    assert others[1] == pytest.approx(metrics[1], rel=1e-4) and len(metrics) == 2
    for key, value in expected.state_dict().items():
        if "in_proj_bias" not in key:  # of keys: the rounding of 0, which Adam scales up
            torch.testing.assert_close(found.state_dict()[key], value, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_load_both_ways(name, tmp_path):
    for patched in (False, True):
        if patched:
            fastrec.patch("replay")
        model, run, _ = fitted(name, dropout=0.3)
        run.save_checkpoint(tmp_path / "model.ckpt")
        expected = metrics_of(model.model)
        (fastrec.unpatch if patched else fastrec.patch)("replay")
        other = LightningModule.load_from_checkpoint(
            tmp_path / "model.ckpt", model=model_of(name), weights_only=False
        )
        assert metrics_of(other.model) == pytest.approx(expected, abs=1e-7)
        fastrec.unpatch()


def test_others_keep_their_code_and_say_so():
    model, given = model_of(), batch()
    fastrec.patch("replay")

    class Mine(torch.nn.Module):
        def forward(self, model_embeddings, **others):
            return self.logits_callback(model_embeddings).mean()

    with pytest.warns(UserWarning, match="encoder of SasRec as it is: its loss, Mine, may read"):
        step(with_loss(model, Mine()), given)
    several = {**given, "target_padding_mask": given["target_padding_mask"].repeat(1, 1, 2)}
    several["positive_labels"] = given["positive_labels"].repeat(1, 1, 2)
    several["negative_labels"] = torch.randint(0, ITEMS, (5,))
    with pytest.warns(UserWarning, match="loss CESampled as it is: a place has 2 targets"):
        step(with_loss(model, losses.CESampled()), several)
    ignored = {**given, "negative_labels": torch.tensor([3, -100])}
    with pytest.warns(UserWarning, match="CESampled as it is: some negatives are ignored"):
        step(model, ignored)
    hook = model.body.encoder.forward_layers[0].register_forward_hook(lambda *args: None)
    with_loss(model, losses.CE(ignore_index=ITEMS))
    with pytest.warns(UserWarning, match=r"hooks wait for calls of encoder\.forward_layers\.0"):
        step(model, given)
    hook.remove()
    layer = DiffTransformerLayer(embedding_dim=16, num_heads=2, num_blocks=1)
    model.body.encoder, encoder = layer, model.body.encoder
    with pytest.warns(UserWarning, match="its encoder is a DiffTransformerLayer"):
        step(model, given)
    model.body.encoder = encoder
    encoder.forward_layers[0].dropout1.p = 0.5
    with pytest.warns(UserWarning, match=r"the dropouts of its encoder differ: \[0.0, 0.5\]"):
        step(model, given)


def kept(model, given, why):
    """The original's loss and gradients, and the reason why it runs."""
    expected, gradients = step(model, given)
    keep_original.cache_clear()
    with fastrec.patch("replay"), pytest.warns(UserWarning, match=why):
        found, others = step(model, given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-5)
    return gradients


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [losses.LogOutCE, losses.LogOutCEWeighted])
def test_settings_of_logout_ce(name, kind):
    names = ("w",) if kind is losses.LogOutCEWeighted else ()
    given = batch()
    given["feature_tensors"]["w"] = torch.rand(given["target_padding_mask"].shape)
    padding = kind(ITEMS, *names, negative_labels_ignore_index=ITEMS)
    same_step(model_of(name, loss=padding), given)  # is served
    for item in (0, 3, ITEMS - 1):
        loss = kind(ITEMS, *names, negative_labels_ignore_index=item)
        kept(model_of(name, loss=loss), given, f"its negative_labels_ignore_index, {item}, is an")
    model = model_of(name, loss=kind(ITEMS - 1, *names))
    with (
        fastrec.patch("replay"),
        pytest.warns(UserWarning, match=f"its cardinality is {ITEMS - 1}, its model has {ITEMS}"),
        pytest.raises(RuntimeError, match=f"{ITEMS}.*{ITEMS - 1}"),
    ):
        step(model, given)


def test_items_of_an_item_tower_are_counted_without_their_vectors(monkeypatch):
    from fastrec.integrations import replay_models

    model, calls = model_of("TwoTower", loss=losses.LogOutCE(ITEMS)), []
    model.body.item_tower.encoder.register_forward_hook(lambda *args: calls.append(1))
    with fastrec.patch("replay"):
        step(model, batch())
    assert replay_models.number_of_items(model) == ITEMS and len(calls) == 1


@pytest.mark.parametrize("shape", [(5,), (SEQUENCES, 4), (SEQUENCES, LENGTH, 4)])
def test_padding_among_sampled_items_takes_no_gradient(shape):
    model, name = model_of(loss=losses.CESampled()), "body.embedder.feature_embedders"
    negatives = torch.randint(0, ITEMS, shape)
    given = batch(negatives)
    same_step(model, given)  # padding where no target is: served
    negatives.flatten()[-1] = ITEMS
    found = kept(model, given, "or some items are padding")
    assert not found[f"{name}.item_id.emb.weight"][ITEMS].any()
    negatives.flatten()[-1] = 3
    given["positive_labels"][given["target_padding_mask"].nonzero().unbind(1)] = ITEMS
    found = kept(model, given, "or some items are padding")
    assert not found[f"{name}.item_id.emb.weight"][ITEMS].any()


@pytest.mark.parametrize("kind", ["CE", "LogOutCE", "CESampled"])
def test_labels_of_other_places_are_left_to_the_original(kind):
    names = (ITEMS,) if kind == "LogOutCE" else ()
    model, given = model_of(loss=getattr(losses, kind)(*names)), batch(torch.tensor([3, 4]))
    states = torch.randn(SEQUENCES, LENGTH, 16)
    labels = given["positive_labels"][:, :3], given["negative_labels"], None
    with (
        fastrec.patch("replay"),
        pytest.warns(UserWarning, match="labels, masks and states are of different places"),
        pytest.raises((ValueError, IndexError, AssertionError)),
    ):
        model.loss(states, {}, *labels, given["target_padding_mask"][:, :3])


def test_a_get_logits_that_is_set_on_a_model():
    model, given = model_of(), batch()
    logits = model.get_logits
    model.get_logits = lambda *args: -logits(*args)
    expected = metrics_of(model)
    why = "validation of SasRec as it is: its logits_callback"
    with fastrec.patch("replay"), pytest.warns(UserWarning, match=why):
        assert metrics_of(model) == expected
    model.loss.logits_callback = model.get_logits
    model.train()
    kept(model, given, "CE as it is: its logits_callback is not get_logits of SasRec")


def test_a_subclass_with_a_body_of_its_own():
    model, given = model_of(), batch()

    class Mine(type(model.body)):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    model.body.__class__ = Mine
    expected = step(model, given)[0]
    with fastrec.patch("replay"), pytest.warns(UserWarning, match="Mine has a forward of its own"):
        torch.testing.assert_close(step(model, given)[0], expected)


def test_who_reads_the_scores_has_them():
    class Mine(lightning.Callback):
        def on_validation_batch_end(self, trainer, module, outputs, batch, *args):
            assert outputs["logits"].shape == (len(batch["query_id"]), ITEMS)

    class Counted(ComputeMetricsCallback):
        def _apply_postproccesors(self, batch, logits):
            return -logits

    model, batches = model_of(), loader(evaluation_batches())
    fastrec.patch("replay")
    with pytest.warns(UserWarning, match="validation of SasRec as it is: Mine may read the scores"):
        trainer(Mine()).validate(LightningModule(model), batches, verbose=False)
    with pytest.warns(UserWarning, match="Counted: it has a _apply_postproccesors of its own"):
        trainer(Counted(ks=[3])).validate(LightningModule(model), batches, verbose=False)
    with pytest.warns(UserWarning, match="scores are returned: predict"):
        found = trainer().predict(LightningModule(model), batches)
    assert found[0]["logits"].shape == (8, ITEMS)
    states = HiddenStatesCallback(0)
    with pytest.warns(UserWarning, match="HiddenStatesCallback may read the scores"):
        trainer(states).predict(LightningModule(model), batches, return_predictions=False)
    assert states.get_result().shape == (SEQUENCES, LENGTH, 16)
    module = LightningModule(model)
    module.candidates_to_score = torch.tensor([3, 1, 7])
    with pytest.warns(UserWarning, match="candidates are given"):
        trainer(ComputeMetricsCallback(ks=[2], verbose=False)).validate(
            module, batches, verbose=False
        )


def test_functions_that_are_set_on_a_callback_or_module_have_the_scores():
    shapes = []

    def read(*args):
        outputs = next(x for x in args if isinstance(x, (dict, tuple)))
        shapes.append(outputs["logits"].shape[1])

    model, batches = model_of(), loader(evaluation_batches())
    fastrec.patch("replay")
    reads = lightning.pytorch.callbacks.LambdaCallback(on_validation_batch_end=read)
    with pytest.warns(UserWarning, match="LambdaCallback may read the scores"):
        trainer(reads).validate(LightningModule(model), batches, verbose=False)
    module = LightningModule(model)
    module.on_test_batch_end = read
    with pytest.warns(UserWarning, match="LightningModule has an on_test_batch_end"):
        trainer().test(module, batches, verbose=False)
    metrics = ComputeMetricsCallback(ks=[3], verbose=False)
    metrics.on_test_batch_end = read
    with pytest.warns(UserWarning, match="Callback: it has a on_test_batch_end of its own"):
        trainer(metrics).test(LightningModule(model), batches, verbose=False)
    assert shapes == 6 * [ITEMS]
    other = lightning.pytorch.callbacks.LambdaCallback(on_test_batch_end=read)
    trainer(other).validate(LightningModule(model), batches, verbose=False)  # reads nothing: served


@pytest.mark.parametrize("name", MODELS)
def test_an_item_count_below_the_items_of_the_model(name):
    model = model_of(name)
    expected = metrics_of(model, item_count=ITEMS - 10)
    with fastrec.patch("replay"):
        with pytest.warns(UserWarning, match=f"MetricsCallback counts {ITEMS - 10} of {ITEMS}"):
            assert metrics_of(model, item_count=ITEMS - 10) == expected
        above = metrics_of(model, item_count=ITEMS + 10)  # served
    assert above == pytest.approx(metrics_of(model, item_count=ITEMS + 10), abs=1e-7)


def test_parity_and_undo(capsys):
    owners = (SasRec, TwoTower, LightningModule, ComputeMetricsCallback, losses.CE)
    before = [dict(owner.__dict__) for owner in owners]
    handle = fastrec.patch("replay", parity=True)
    for name in MODELS:
        model = model_of(name, dropout=0.5)
        model(**batch())
        model(**batch())
        assert model.training and model.body.embedder.training
    assert [report.model for report in handle.reports] == list(MODELS)
    for report in handle.reports:
        assert report.loss_difference < 1e-5
        assert all(d <= 1e-5 * max(g, 1e-1) for g, d in report.gradients.values())
    assert capsys.readouterr().out.count("fastrec, parity of") == 2
    assert len(handle.replaced) == 10
    handle.undo()
    assert [dict(owner.__dict__) for owner in owners] == before
