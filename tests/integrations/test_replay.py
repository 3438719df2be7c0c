# SPDX-License-Identifier: Apache-2.0
"""Losses of SasRec and TwoTower of RePlay with and without the patch."""

import pytest
import torch

import fastrec

pytest.importorskip("replay", reason="replay-rec is not installed")
pytest.importorskip("lightning", reason="lightning is not installed")

from replay.nn import loss as losses
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import ComputeMetricsCallback
from replay.nn.sequential import DiffTransformerLayer, SasRec, TwoTower
from replay_setting import (
    ITEMS,
    LENGTH,
    MODELS,
    SEQUENCES,
    WIDE,
    batch,
    kept,
    model_of,
    step,
    with_loss,
)

pytestmark = [
    pytest.mark.filterwarnings("error:fastrec leaves"),
    pytest.mark.filterwarnings("ignore::UserWarning:(?!fastrec)", "ignore::DeprecationWarning"),
]


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


def test_a_subclass_with_a_body_of_its_own():
    model, given = model_of(), batch()

    class Mine(type(model.body)):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    model.body.__class__ = Mine
    expected = step(model, given)[0]
    with fastrec.patch("replay"), pytest.warns(UserWarning, match="Mine has a forward of its own"):
        torch.testing.assert_close(step(model, given)[0], expected)


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
