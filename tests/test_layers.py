# SPDX-License-Identifier: Apache-2.0
"""The layers of the original SASRec and of LiGR against plain PyTorch, a sequence at a time, in
float64; and the options of a model that come with them."""

import re

import pytest
import torch
from builders import FORMS, jagged, model_of
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.settings import from_values
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.layouts import load_torch_encoder, torch_encoder_state
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.random import Rng, keep_mask

LENGTHS = [4, 0, 7, 1, 3]
P = 0.3


class Oracle:
    """What a model makes of one sequence. The masks are those of the Philox contract, which the
    tests of the ops hold; everything else is written out."""

    def __init__(self, model: UserModel, key: Tensor, length: int, rng: Rng | None):
        self.model, self.key, self.length, self.rng = model, key, length, rng
        self.places = torch.arange(length)
        self.settings = model.config.encoder.transformer

    def drop(self, x: Tensor, site: str, layer: int = 0) -> Tensor:
        if self.rng is None:
            return x
        keys = self.key.expand(self.length)
        keep, scale = keep_mask(
            self.rng, P, keys, self.places, x.shape[1], site=site, layer=layer
        )  # fmt: skip
        return x * keep * scale

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        heads, out = self.settings.heads, []
        ahead = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        for head, (q, k, v) in enumerate(zip(*(t.chunk(heads, 1) for t in (q, k, v)), strict=True)):  # noqa: B020
            scores = q @ k.T / q.shape[1] ** 0.5
            if self.settings.causal:
                scores = scores.masked_fill(ahead, -torch.inf)
            shares = scores.softmax(1)
            if self.rng is not None:
                keep, scale = keep_mask(
                    self.rng, P, self.key, self.places, self.length,
                    site="attention", layer=layer, head=head,
                )  # fmt: skip
                shares = shares * keep * scale
            out.append(shares @ v)
        return torch.cat(out, 1)

    def norm(self, x: Tensor, module: nn.LayerNorm) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
        return centred / (variance + module.eps).sqrt() * module.weight + module.bias

    def patched(self, input: Tensor, x: Tensor, layer: nn.Module, number: int) -> Tensor:
        if not layer.patches:
            return x
        patch = layer.patches[number]
        if self.settings.patch_form == "parallel":
            return x + input + patch.up(F.gelu(patch.down(input)))
        return x + patch.up(F.gelu(patch.down(x)))

    def sasrec(self, layer, x: Tensor, i: int) -> Tensor:
        q = self.norm(x, layer.attention_norm)
        key, value = layer.key_value(x).chunk(2, 1)
        attended = self.attention(layer.query(q), key, value, i)
        f = self.norm(q + self.patched(q, attended, layer, 0), layer.ffn_norm)
        inner = self.drop(layer.ffn_inner(f).clamp_min(0), "ffn_inner", i)
        out = self.patched(f, layer.ffn_output(inner), layer, 1)
        return f + self.drop(out, "ffn_output", i)

    def ligr(self, layer, x: Tensor, i: int) -> Tensor:
        n = self.norm(x, layer.attention_norm)
        packed = layer.query_key_value(n)
        out = layer.attention_output(self.attention(*packed.chunk(3, 1), i))
        out = self.drop(self.patched(n, out, layer, 0), "attention_output", i)
        x = x + out / (1 + (-layer.attention_gate(x)).exp())
        n = self.norm(x, layer.ffn_norm)
        one, two = layer.ffn_inner(n).chunk(2, 1)
        inner = self.drop(one / (1 + (-one).exp()) * two, "ffn_inner", i)
        out = self.drop(self.patched(n, layer.ffn_output(inner), layer, 1), "ffn_output", i)
        return x + out / (1 + (-layer.ffn_gate(x)).exp())

    def states(self, items: Tensor) -> Tensor:
        model, encoder, scaled = self.model, self.model.encoder, self.model.config.items.scale
        x = model.item_embedding.weight[items] * (model.config.width**0.5 if scaled else 1.0)
        x = self.drop(x + encoder.positions.weight[: self.length], "embedding")
        for i, layer in enumerate(encoder.layers):
            x = getattr(self, self.settings.layer)(layer, x, i)
        return self.norm(x, encoder.final_norm) if self.settings.normed_at_the_end else x


def expected(model: UserModel, batch, rng: Rng | None) -> Tensor:
    parts = zip(batch.keys, batch.values.split(batch.lengths.tolist()), strict=True)
    return torch.cat([Oracle(model, key, len(items), rng).states(items) for key, items in parts])


def spread(model: UserModel) -> UserModel:
    """Weights of which none is as it starts: biases, LayerNorms and patches count."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.4)
    return model


@pytest.mark.parametrize("layer", ["sasrec", "ligr"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rng", [None, Rng(2**40 + 3, 7)], ids=["plain", "dropout"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"scale": True, "ffn_width": 5, "heads": 4, "patch": 3, "norm_eps": 1e-8},
        {"patch": 3, "patch_form": "parallel"},
        {"final_norm": True},
    ],
)
def test_a_layer_is_what_plain_pytorch_makes_of_a_sequence(layer, causal, rng, more):
    if layer == "sasrec" and "final_norm" in more:
        pytest.skip("it always has one")
    scale = more.get("scale", False)
    settings = {"layers": 2, "heads": 2, **{n: v for n, v in more.items() if n != "scale"}}
    config = {"items": {"scale": scale}, "encoder": {"transformer": {
        "layer": layer, "pre_norm": True, "causal": causal, **settings}}}  # fmt: skip
    model = UserModel(
        20, from_values(ModelConfig, {"width": 8, "max_len": 10, "dropout": P, **config})
    )
    spread(model.double())
    batch = jagged(LENGTHS, 20, first_id=3 << 32 | 2**31)
    actual, oracle = model.encode(batch, rng).states, expected(model, batch, rng)
    torch.testing.assert_close(actual, oracle, rtol=1e-10, atol=1e-10)
    named = [(name, p) for name, p in model.named_parameters() if "item_head" not in name]
    up = torch.randn(actual.shape, dtype=torch.float64)
    for (name, _), ours, theirs in zip(
        named,
        torch.autograd.grad(actual, [p for _, p in named], up),
        torch.autograd.grad(oracle, [p for _, p in named], up),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)
        assert theirs.abs().max() > 0, name


def test_a_norm_behind_the_last_layer():
    """Where it is, and the number of weights that the settings know."""
    for settings, expected in (
        (Transformer(), False),
        (Transformer(pre_norm=True), True),
        (Transformer(pre_norm=True, layer="sasrec"), True),
        (Transformer(pre_norm=True, layer="ligr"), False),
        (Transformer(pre_norm=True, layer="ligr", final_norm=True), True),
    ):
        encoder = settings.build(8, 10, 0.0)
        assert isinstance(encoder.final_norm, nn.LayerNorm if expected else nn.Identity)
        assert sum(p.numel() for p in encoder.parameters()) == settings.num_parameters(8, 10)
    with pytest.raises(ValueError, match="final_norm is of the layer ligr"):
        Transformer(pre_norm=True, final_norm=True)


@pytest.mark.parametrize("layer", ["standard", "sasrec", "ligr"])
def test_items_are_scaled_for_the_encoder_and_not_for_their_scores(layer):
    config = {"width": 16, "encoder": {"transformer": {"layer": layer, "pre_norm": True}}}
    plain = UserModel(20, from_values(ModelConfig, config))
    scaled = UserModel(20, from_values(ModelConfig, {**config, "items": {"scale": True}}))
    scaled.load_state_dict(plain.state_dict())
    batch = jagged(LENGTHS, 20)
    assert torch.equal(scaled.item_table, plain.item_table)
    with torch.no_grad():
        plain.item_embedding.weight.mul_(4)  # sqrt(16)
    torch.testing.assert_close(scaled.encode(batch).states, plain.encode(batch).states)


def test_a_layer_without_another_form_is_refused_as_post_norm():
    for layer in ("sasrec", "ligr"):
        with pytest.raises(ValueError, match=f"pre_norm must be true for the layer {layer}"):
            Transformer(layer=layer)
    with pytest.raises(ValueError, match=r"layer must be one of \['standard', 'sasrec', 'ligr'\]"):
        Transformer(layer="caser")
    values = {"encoder": {"transformer": {"layer": "ligr"}}}
    with pytest.raises(ValueError, match=r"model\.encoder\.transformer\.pre_norm must be true"):
        from_values(ModelConfig, values, "model")


@pytest.mark.parametrize("form", ["sasrec", "ligr"])
def test_a_layer_that_torch_has_not_is_not_exported(form):
    model = model_of(**FORMS[form])
    kind = re.escape(type(model.encoder.layers[0]).__name__)
    with pytest.raises(ValueError, match=f"torch.nn.TransformerEncoder has no {kind}"):
        torch_encoder_state(model.encoder)
    with pytest.raises(ValueError, match=f"torch.nn.TransformerEncoder has no {kind}"):
        load_torch_encoder(model.encoder, {})
