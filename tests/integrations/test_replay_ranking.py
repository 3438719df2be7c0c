# SPDX-License-Identifier: Apache-2.0
"""Evaluation, prediction and training of RePlay's models by Lightning with the patch: without it is
the oracle."""

import pytest
import torch

import fastrec

pytest.importorskip("replay", reason="replay-rec is not installed")
pytest.importorskip("lightning", reason="lightning is not installed")

import lightning
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import (
    ComputeMetricsCallback,
    HiddenStatesCallback,
    PandasTopItemsCallback,
    TorchTopItemsCallback,
)
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.lightning.postprocessor import SeenItemsFilter
from replay_setting import ITEMS, LENGTH, MODELS, SEQUENCES, batch, kept, model_of

pytestmark = [
    pytest.mark.filterwarnings("error:fastrec leaves"),
    pytest.mark.filterwarnings("ignore::UserWarning:(?!fastrec)", "ignore::DeprecationWarning"),
]


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
