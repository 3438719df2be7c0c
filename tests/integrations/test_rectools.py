# SPDX-License-Identifier: Apache-2.0
"""Transformer models of RecTools with and without the patch: the original is the oracle."""

import random

import pytest
import torch

import fastrec
from fastrec.integrations.patching import keep_original

pytest.importorskip("rectools", reason="rectools is not installed")
pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

import pandas as pd
import pytorch_lightning as pl
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel, SASRecModel, load_model
from rectools.models.nn.transformers.lightning import TransformerLightningModule

ITEMS, LENGTH = 30, 8
KINDS = (SASRecModel, BERT4RecModel)
pytestmark = [
    pytest.mark.filterwarnings("error:fastrec leaves"),
    pytest.mark.filterwarnings("ignore::UserWarning:(?!fastrec)"),
]


def histories():
    draw = random.Random(0)
    rows = [
        (
            user,
            draw.randrange(ITEMS),
            draw.choice((0.5, 1.0, 2.0)),
            pd.Timestamp(2020, 1, 1 + place),
        )
        for user in range(40)
        for place in range(draw.randint(4, 14))
    ]
    names = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
    return Dataset.construct(pd.DataFrame(rows, columns=names))


def last_of_each(interactions):
    """RecTools' mask of what is held out for validation."""
    return interactions.groupby(Columns.User)[Columns.Datetime].rank(ascending=False).eq(1).values


def trainer():
    return pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip


def build(kind=SASRecModel, **more):
    settings = dict(
        n_blocks=2, n_heads=2, n_factors=16, session_max_len=LENGTH, batch_size=16,
        dropout_rate=0.0, loss="softmax", get_trainer_func=trainer,
    )  # fmt: skip
    return kind(**settings | more)


def fitted(kind=SASRecModel, **more):
    pl.seed_everything(0, verbose=False)
    return build(kind, **more).fit(histories())


def a_batch(model):
    torch.manual_seed(3)
    return next(iter(model.data_preparator.get_dataloader_train()))


def step(module, batch):
    module.zero_grad()
    module.log = lambda *args, **kwargs: None  # there is no trainer
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("distance", ["dot", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_original(kind, distance):
    model = fitted(
        kind, similarity_module_kwargs={"distance": distance}, dropout_rate=0.2,
        lightning_module_kwargs={"logits_t": 0.5},
    )  # fmt: skip
    module, batch = model.lightning_model.train(), a_batch(model)
    assert (batch["y"] == 0).any() and len(batch["yw"].unique()) > 2
    torch.manual_seed(1)
    loss, gradients = step(module, batch)
    with fastrec.patch("rectools"):
        torch.manual_seed(1)  # the dropout of the encoder is the original's
        found, others = step(module, batch)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in gradients.values()) > 1e-3
    torch.manual_seed(1)
    assert torch.equal(step(module, batch)[0], loss)  # undone


def test_places_without_a_target_are_not_scored(monkeypatch):
    from fastrec.integrations import rectools

    model = fitted()
    batch, rows, op = a_batch(model), [], rectools.linear_cross_entropy
    monkeypatch.setattr(
        rectools, "linear_cross_entropy", lambda x, *a, **k: rows.append(len(x)) or op(x, *a, **k)
    )
    with fastrec.patch("rectools"):
        step(model.lightning_model, batch)
    assert rows == [int((batch["y"] != 0).sum())] and rows[0] < batch["y"].numel()


def test_weights_of_0_are_not_counted_and_no_target_is_a_loss_of_0():
    model = fitted()
    module, batch = model.lightning_model, a_batch(model)
    batch["yw"][0] = 0
    loss, _ = step(module, batch)
    empty = batch | {"y": torch.zeros_like(batch["y"])}
    assert step(module, empty)[0].isnan()
    with fastrec.patch("rectools"):
        torch.testing.assert_close(step(module, batch)[0], loss, rtol=1e-5, atol=1e-6)
        loss, gradients = step(module, empty)
    assert loss == 0 and all((g == 0).all() for g in gradients.values())


def test_weights_of_a_session_and_targets_of_other_places():
    model = fitted()
    module, batch = model.lightning_model, a_batch(model)
    batch["yw"] = batch["yw"].amax(1, keepdim=True)  # the original broadcasts them
    loss, _ = step(module, batch)
    short = batch | {"y": batch["y"][:, :3].contiguous()}
    with fastrec.patch("rectools"):
        torch.testing.assert_close(step(module, batch)[0], loss, rtol=1e-5, atol=1e-6)
        number = len(batch["y"])
        with pytest.raises(ValueError, match=f"{number * LENGTH} places, {number * 3} targets"):
            step(module, short)


def test_training_and_validation_are_those_of_the_original():
    """Without dropout SASRec draws the order of users alone."""
    losses, models = [], []

    def with_losses():
        made = trainer()
        made.callbacks.append(
            pl.callbacks.LambdaCallback(
                on_validation_end=lambda trainer, module: losses.append(
                    float(trainer.callback_metrics["val_loss"])
                )
            )
        )
        return made

    for patched in (False, True):
        if patched:
            fastrec.patch("rectools")
        models.append(fitted(get_trainer_func=with_losses, get_val_mask_func=last_of_each))
        fastrec.unpatch()
    half = len(losses) // 2
    assert half >= 2 and losses[half:] == pytest.approx(losses[:half], rel=1e-3)
    expected, found = (model.recommend(range(40), histories(), 5, True) for model in models)
    same = (expected[Columns.Item] == found[Columns.Item]).mean()
    assert same > 0.9  # Adam scales up the rounding of gradients of 0


def test_what_validation_returns():
    model = fitted(get_val_mask_func=last_of_each)
    module = model.lightning_model.eval()
    module.log = lambda *args, **kwargs: None
    batch = next(iter(model.data_preparator.get_dataloader_val()))
    expected = module.validation_step(batch, 0)
    with fastrec.patch("rectools"):
        found = module.validation_step(batch, 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_others_keep_their_code_and_say_so():
    class Mine(TransformerLightningModule):
        def get_batch_logits(self, batch):
            return 2 * super().get_batch_logits(batch)

    sampled, mine = fitted(loss="BCE"), fitted(lightning_module_type=Mine)
    hooked = fitted()
    hooked.lightning_model.torch_model.register_forward_hook(lambda *args: None)
    expected = step(mine.lightning_model, batch := a_batch(mine))[0]
    with fastrec.patch("rectools"):
        with pytest.warns(UserWarning, match="loss is BCE, served is softmax"):
            step(sampled.lightning_model, a_batch(sampled))
        with pytest.warns(UserWarning, match="Mine as it is: it has a get_batch_logits"):
            assert torch.equal(step(mine.lightning_model, batch)[0], expected)
        with pytest.warns(UserWarning, match="hooks wait for calls of TransformerTorchBackbone"):
            step(hooked.lightning_model, a_batch(hooked))


def smoothed(logits, y, w):
    loss = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), y, ignore_index=0, reduction="none", label_smoothing=0.3
    )
    return (loss * w).sum() / (loss * w > 0).sum()


def test_functions_that_are_set_on_a_module_are_called():
    class Mine(TransformerLightningModule):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.loss_calculator = self.mine

        def mine(self, logits, y, w):
            return smoothed(logits, y, w)

    changed = [fitted(lightning_module_type=Mine), fitted(), fitted(), fitted()]
    modules = [model.lightning_model for model in changed]
    modules[1].loss_calculator = smoothed
    logits, forward = modules[2].get_batch_logits, modules[3].torch_model.forward
    modules[2].get_batch_logits = lambda batch: logits(batch) / 2
    modules[3].torch_model.forward = lambda **given: forward(**given) / 2
    reasons = 2 * ["its loss_calculator is another"]
    reasons += ["it has a get_batch_logits of its", "TransformerTorchBackbone has a forward of its"]
    for model, module, why in zip(changed, modules, reasons, strict=True):
        batch = a_batch(model)
        expected, _ = step(module, batch)
        keep_original.cache_clear()
        with fastrec.patch("rectools"), pytest.warns(UserWarning, match=why):
            found, _ = step(module, batch)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_models_load_both_ways(kind, tmp_path):
    for patched in (False, True):
        if patched:
            fastrec.patch("rectools")
        model = fitted(kind, get_trainer_func=None, epochs=1)
        model.save(tmp_path / "model")
        expected = model.recommend(range(40), histories(), 5, True)
        (fastrec.unpatch if patched else fastrec.patch)("rectools")
        pd.testing.assert_frame_equal(
            load_model(tmp_path / "model").recommend(range(40), histories(), 5, True), expected
        )
        fastrec.unpatch()


def test_parity_and_undo(capsys):
    before = dict(TransformerLightningModule.__dict__)
    handle = fastrec.patch("rectools", parity=True)
    fitted(dropout_rate=0.5)
    (report,) = handle.reports
    assert report.model == "TransformerLightningModule" and report.loss_difference < 1e-5
    assert capsys.readouterr().out.count("fastrec, parity of") == 1
    assert len(handle.replaced) == 2
    handle.undo()
    assert dict(TransformerLightningModule.__dict__) == before
