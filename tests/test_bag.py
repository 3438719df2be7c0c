# SPDX-License-Identifier: Apache-2.0
"""Encoders of bags, `bag` (DACF) and `fm` (NFM, DeepFM): against a dense autoencoder and sums over
all pairs, the same in any batch and order, saved and loaded."""

import math
from dataclasses import replace

import pytest
import torch
from builders import jagged
from torch.nn import functional as F

from fastrec import recipes
from fastrec.data.settings import from_values
from fastrec.nn.encoders.bag import Bag
from fastrec.nn.encoders.fm import Fm
from fastrec.nn.item_parts import Rating as Levels
from fastrec.nn.items import ItemRows, Items
from fastrec.nn.model_config import ModelConfig, num_parameters
from fastrec.nn.user_model import UserModel
from fastrec.objectives.rating import RatingPrediction
from fastrec.random import Rng, keep_mask
from fastrec.training.config import Recipe

V, D = 50, 8
LENGTHS = [4, 1, 7, 0, 12]


def model_of(encoder, dropout: float = 0.0, **config) -> UserModel:
    torch.manual_seed(0)
    model = UserModel(
        V, ModelConfig(width=D, max_len=30, dropout=dropout, encoder=encoder, **config)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def rated(model, lengths=LENGTHS, first_id: int = 0):
    """Random items, a third without a rating, with [MASK] behind them."""
    batch = jagged(lengths, V, first_id)
    ratings = torch.randint(1, 6, batch.values.shape).float()
    ratings[torch.rand(len(ratings)) < 0.3] = math.nan
    return model.frame(replace(batch, events={"rating": ratings}), ask=True)


def dense_autoencoder(model, batch, decoder) -> torch.Tensor:
    """[B, V + S]: what DACF gives for all items, from a matrix of ratings, 0 for none."""
    encoder, rows = model.encoder, torch.zeros(len(batch), V + 4)
    for row in range(len(batch)):
        for event in range(int(batch.offsets[row]), int(batch.offsets[row + 1])):
            rating = float(batch.events["rating"][event])
            rows[row, batch.values[event]] += 0.0 if math.isnan(rating) else rating
    x = torch.sigmoid(rows @ model.item_embedding.weight + encoder.bias)
    for layer in encoder.layers:
        x = torch.sigmoid(x @ layer.weight.T + layer.bias)
    return x @ decoder.T


@pytest.mark.parametrize("hidden", [[5], [], [6, 3, 6]])
@pytest.mark.parametrize("sparse", [False, True])
def test_an_autoencoder_gives_the_asked_columns_of_a_dense_one(hidden, sparse):
    model = model_of(Bag(hidden=hidden))
    model.item_input.ids.sparse = sparse
    batch, head = rated(model), RatingPrediction(D, num_items=V)
    found = head.predict(model.encode(batch))
    whole = dense_autoencoder(model, batch, head.items.weight)
    real = batch.values < V
    expected = whole[batch.segment_ids()[real], batch.values[real]]
    torch.testing.assert_close(found[real], expected, rtol=1e-4, atol=1e-5)
    weights, names = torch.randn_like(expected), [*model.encoder.parameters(), head.items.weight]
    names.append(model.item_embedding.weight)
    wanted = torch.autograd.grad((expected * weights).sum(), names, retain_graph=True)
    grads = torch.autograd.grad((found[real] * weights).sum(), names)
    for actual, reference in zip(grads, wanted, strict=True):
        actual = actual.to_dense() if actual.is_sparse else actual
        torch.testing.assert_close(actual, reference, rtol=1e-3, atol=1e-5)


def layered(encoder, x: torch.Tensor) -> torch.Tensor:
    for number, layer in enumerate(encoder.layers):
        x = layer.weight @ (F.relu(x) if number else x) + layer.bias
    return x


@pytest.mark.parametrize("deep", ["interactions", "items"])
@pytest.mark.parametrize("hidden", [[5], [], [6, 4]])
@pytest.mark.parametrize("rating", [False, True])
def test_a_factorization_machine_sums_over_all_pairs(deep, hidden, rating):
    items = Items(rating=Levels(width=3)) if rating else Items()
    model = model_of(Fm(hidden=hidden, deep=deep), items=items)
    batch, encoder = rated(model), model.encoder
    states, rows = model.encode(batch).states, model.item_input(batch).dense()
    assert (states[:1] != states[-1:]).any()
    for row in range(len(batch)):
        events = range(int(batch.offsets[row]), int(batch.offsets[row + 1]))
        vectors = [rows[event] for event in events if batch.values[event] < V]
        pairs, total = torch.zeros(D), torch.zeros(D)
        for i, one in enumerate(vectors):
            total = total + one
            for other in vectors[:i]:
                pairs = pairs + one * other
        pairs = F.layer_norm(pairs, (D,), encoder.norm.weight, encoder.norm.bias)
        expected = encoder.first.weight @ total
        if deep == "interactions":
            expected = expected + layered(encoder, pairs)
        else:
            mean = total / max(1, len(vectors))
            expected = expected + encoder.second.weight @ pairs + layered(encoder, mean)
        for event in events:
            torch.testing.assert_close(states[event], expected, rtol=2e-3, atol=2e-4)


ENCODERS = [Bag(hidden=[5]), Fm(hidden=[5]), Fm(hidden=[5, 3], deep="items")]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_user_is_the_same_in_any_batch_and_order_with_dropout(encoder):
    model, rng = model_of(encoder, dropout=0.5), Rng(1, 2)
    whole = rated(model)
    states = model.encode(whole, rng).states
    alone = whole.select(torch.tensor([4, 0]))
    last = slice(int(whole.offsets[4]), int(whole.offsets[5]))
    found = model.encode(alone, rng).states
    torch.testing.assert_close(found[:13], states[last], rtol=1e-4, atol=1e-5)
    order = torch.cat([torch.randperm(12), torch.tensor([12])])
    other = alone.select(torch.tensor([0]))
    other = other.with_events(order, other.offsets, other.max_seq_len)
    torch.testing.assert_close(model.encode(other, rng).states, states[last], rtol=1e-4, atol=1e-5)
    assert (model.encode(whole, Rng(1, 3)).states != states).any()
    views = model.encode(whole.as_views(2), rng).states.chunk(2)
    # Bit for bit but for torch's sigmoid, of which the last elements of a tensor are other bits.
    exact = dict(rtol=0, atol=0 if isinstance(encoder, Fm) else 1e-6)
    torch.testing.assert_close(views[0], states, **exact)
    torch.testing.assert_close(views[1], model.encode(whole.as_view(1), rng).states, **exact)
    assert (views[1] != states).any()


def test_dropout_of_layers_is_the_mask_of_the_contract():
    model, rng = model_of(Bag(hidden=[5]), dropout=0.5), Rng(1, 2)
    batch, encoder = rated(model), model.encoder
    weight = batch.events["rating"].nan_to_num()
    rows = model.item_embedding.weight[batch.values] * weight[:, None]
    x = torch.stack([part.sum(0) for part in rows.split(batch.lengths.tolist())]) + encoder.bias
    x = torch.sigmoid(x)
    for number, layer in enumerate(encoder.layers):
        zero = torch.zeros_like(batch.keys)
        keep, scale = keep_mask(
            rng, 0.5, batch.keys, zero, x.shape[1], site="ffn_inner", layer=number
        )
        x = torch.sigmoid(layer(x * keep * scale))
    expected = x[batch.segment_ids()]
    torch.testing.assert_close(model.encode(batch, rng).states, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_models_are_counted_saved_and_loaded(encoder, tmp_path):
    model = model_of(encoder)
    assert num_parameters(V, model.config) == sum(p.numel() for p in model.parameters())
    assert not model.config.causal
    model.save_pretrained(tmp_path)
    again, batch = UserModel.from_pretrained(tmp_path), rated(model)
    assert again.config == model.config
    assert torch.equal(again.encode(batch).states, model.encode(batch).states)


def test_an_empty_batch_and_special_tokens_alone():
    for encoder in ENCODERS:
        model = model_of(encoder)
        batch = rated(model, [0, 0])  # [MASK] alone
        states = model.encode(batch).states
        assert states.shape == (2, D) and states.isfinite().all()
        torch.testing.assert_close(states[0], states[1])


def test_histories_have_no_ratings_and_are_asked_at_the_mask():
    for encoder in ENCODERS:
        model = model_of(encoder)
        query = model.ask(model.inputs_of([[1, 2, 3], [4]], ask=True))
        assert query.shape == (2, D) and query.isfinite().all()
        alike = torch.allclose(query[0], query[1], atol=1e-5)
        assert alike == isinstance(encoder, Bag), "nothing is rated"


def test_vectors_without_a_table_know_no_special_tokens():
    model, batch = model_of(Fm()), jagged([3, 2], V)
    x = torch.randn(5, D)
    found = model.encoder(ItemRows(x, None), batch)
    wanted = model.encoder(ItemRows(x, None, num_items=V), batch)
    assert torch.equal(found, wanted)


def test_wrong_settings_and_batches_are_refused():
    for kind in (Bag, Fm):
        with pytest.raises(ValueError, match="hidden must be widths of at least 1, got"):
            kind(hidden=[4, 0])
    with pytest.raises(ValueError, match="deep must be"):
        Fm(deep="both")
    model = model_of(Bag())
    with pytest.raises(ValueError, match="the encoder bag needs the event column 'rating'"):
        model.encode(jagged([3], V))


def test_the_recipes():
    names = ("dacf", "dacf-original", "nfm", "deepfm")
    dacf, original, nfm, deepfm = (from_values(Recipe, recipes.load(name)) for name in names)
    assert dacf.model.encoder.bag == Bag(hidden=[128]) and dacf.model.width == 256
    assert dacf.model.event_columns == ["rating"]
    assert not dacf.pretraining.views["main"][0].mask_rating.hide
    heads = [recipe.pretraining.parts["rating"] for recipe in (dacf, original)]
    assert [head.by for head in heads] == ["item", "item"]
    assert [head.biases for head in heads] == [5.0, None]
    plain = replace(dacf.pretraining, objectives=original.pretraining.objectives)
    assert replace(dacf, pretraining=plain) == original
    assert nfm.model.encoder.fm.deep == "interactions" and deepfm.model.encoder.fm.deep == "items"
    assert {"pretraining", "profile", "cold_start"} == {*nfm.stages}


@pytest.mark.parametrize("name", ["nfm", "deepfm"])
def test_every_head_is_linear_in_the_vector_of_the_user(name):
    """So that w_c A v_i is what item i adds to class c, of items as of attributes."""
    model = UserModel(V, Recipe.load(name).model)
    one, other = torch.randn(2, 3, model.config.width)
    query = model.item_head.query
    torch.testing.assert_close(query(one + other), query(one) + query(other) - query(0 * one))
