# SPDX-License-Identifier: Apache-2.0
"""Submodules that are not what was built: adapters, hooks, pruning and parametrisations act."""

import pytest
import torch
from builders import FORMS, jagged, model_of
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastrec import ModelConfig, UserModel
from fastrec.nn.encoders.caser import Caser
from fastrec.nn.item_features import FeatureMap, ItemFeature
from fastrec.random import Rng

RNG = Rng(3, 5)
LINEAR = ("query_key_value", "attention_output", "ffn_inner", "ffn_output")


class Adapter(nn.Module):
    """A low-rank adapter around a linear layer, as LoRA libraries wrap it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        out = nn.Linear(self.base.in_features, self.base.out_features)
        with torch.no_grad():
            out.weight.copy_(self.base.weight + self.up.weight @ self.down.weight)
            out.bias.copy_(self.base.bias)
        return out


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_an_adapter_is_the_layer_with_its_product_added(name, pre_norm):
    model, batch = model_of(pre_norm=pre_norm), jagged([4, 0, 7], 20)
    layer = model.encoder.layers[0]
    plain = model.encode(batch, RNG).states
    adapter = Adapter(getattr(layer, name))
    setattr(layer, name, adapter)
    adapted = model.encode(batch, RNG).states
    adapted.square().sum().backward()
    assert adapter.up.weight.grad.abs().max() > 0
    setattr(layer, name, adapter.merged())
    torch.testing.assert_close(adapted, model.encode(batch, RNG).states)
    assert (adapted - plain).abs().max() > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_a_hook_sees_and_changes_every_submodule(form):
    model, batch = model_of(**FORMS[form]), jagged([4, 0, 7], 20)
    plain = model.encode(batch, RNG).states
    seen = set()
    names = {id(module): name for name, module in model.named_modules()}
    kinds = (nn.Linear, nn.LayerNorm, nn.Embedding)
    hooked = [m for m in model.modules() if isinstance(m, kinds)]
    handles = [m.register_forward_hook(lambda m, *_: seen.add(names[id(m)])) for m in hooked]
    watched = model.encode(batch, RNG).states
    torch.testing.assert_close(watched, plain)
    assert seen == {name for name in names.values() if name.startswith(("encoder", "item_input"))
                    and isinstance(model.get_submodule(name), kinds)}  # fmt: skip
    for handle in handles:
        handle.remove()
    assert torch.equal(model.encode(batch, RNG).states, plain)


@pytest.mark.parametrize("name", [*LINEAR, "ffn_norm", "attention_norm"])
def test_pruned_weights_are_zero_in_the_result(name):
    model, batch = model_of(), jagged([4, 7], 20)
    layer = getattr(model.encoder.layers[0], name)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    pruned = model.encode(batch, RNG).states
    with torch.no_grad():
        layer.weight_orig.mul_(layer.weight_mask)
    prune.remove(layer, "weight")
    torch.testing.assert_close(pruned, model.encode(batch, RNG).states)
    assert (pruned - model_of().encode(batch, RNG).states).abs().max() > 1e-5


def test_weight_normalisation_trains_its_own_parameters():
    model, batch = model_of(), jagged([4, 7], 20)
    layer = model.encoder.layers[0]
    parametrizations.weight_norm(layer.ffn_inner)
    model.encode(batch, RNG).states.square().sum().backward()
    parts = layer.ffn_inner.parametrizations.weight
    assert parts.original0.grad.abs().max() > 0 and parts.original1.grad.abs().max() > 0


def test_a_wrapped_item_embedding_is_read_and_scored_with():
    class Shifted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.shift = base, nn.Parameter(torch.linspace(0, 1, 8))

        def forward(self, ids):
            return self.base(ids) + self.shift

    model, batch = model_of(), jagged([4, 7], 20)
    table, states = model.item_table, model.encode(batch).states
    model.item_input.ids = Shifted(model.item_input.ids)
    torch.testing.assert_close(model.item_table, table + torch.linspace(0, 1, 8))
    assert (model.encode(batch).states - states).abs().max() > 1e-3
    assert model.ask(model.inputs_of([[1, 2]], ask=True)).dtype == torch.float32
    assert model.device == torch.device("cpu")


def test_an_adapter_around_the_map_of_features_acts_on_its_shifts_too():
    torch.manual_seed(3)
    features = FeatureMap(ItemFeature(width=4, experts=3), torch.randn(5, 6), 0)
    for parameter in features.parameters():
        nn.init.normal_(parameter)
    plain, adapter = features.whole(), Adapter(features.map)
    features.map = adapter
    adapted = features.whole()
    features.map = nn.Linear(6, 12, bias=False)
    with torch.no_grad():
        features.map.weight.copy_(adapter.base.weight + adapter.up.weight @ adapter.down.weight)
    torch.testing.assert_close(adapted, features.whole())
    assert (adapted - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", ["vertical", "horizontal.1"])
def test_filters_are_called_as_modules(name):
    model, batch = UserModel(20, ModelConfig(width=8, encoder=Caser())), jagged([4, 7], 20)
    filters = model.encoder.get_submodule(name)
    prune.l1_unstructured(filters, "weight", amount=0.5)
    for _ in range(2):
        model.encode(batch).states.sum().backward()
    before = model.encode(batch).states
    with torch.no_grad():
        filters.weight_orig.mul_(2)
    assert not torch.equal(model.encode(batch).states, before)
    seen = []
    filters.register_forward_hook(lambda *_: seen.append(name))
    model.encode(batch)
    assert seen == [name]
