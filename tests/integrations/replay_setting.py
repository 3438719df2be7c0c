# SPDX-License-Identifier: Apache-2.0
"""Small models of RePlay with every weight at work, and batches of them."""

import copy

import pytest
import torch

import fastrec
from fastrec.integrations.patching import keep_original

pytest.importorskip("replay", reason="replay-rec is not installed")
pytest.importorskip("lightning", reason="lightning is not installed")

from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.sequential import SasRec, TwoTower

ITEMS, LENGTH, SEQUENCES = 40, 10, 12
MODELS = ("SasRec", "TwoTower")


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


def kept(model, given, why):
    """The original's loss and gradients, and the reason why it runs."""
    expected, gradients = step(model, given)
    keep_original.cache_clear()
    with fastrec.patch("replay"), pytest.warns(UserWarning, match=why):
        found, others = step(model, given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-5)
    return gradients
