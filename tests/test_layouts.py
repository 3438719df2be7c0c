# SPDX-License-Identifier: Apache-2.0
"""Weights of other layouts: the same function as torch.nn.TransformerEncoder and as BERT, and clear
errors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import jagged
from torch import nn
from torch.nn import functional as F

from fastrec.data.batch import from_sequences
from fastrec.nn.encoders.gru import Gru
from fastrec.nn.encoders.transformer import Transformer, TransformerEncoder
from fastrec.nn.items import ItemRows
from fastrec.nn.layouts import bert_state, load_bert, load_torch_encoder, torch_encoder_state
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel

WIDTH, HEADS, INNER, LAYERS = 16, 4, 24, 3


def torch_encoder(pre_norm: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, INNER, dropout=0.0, activation="gelu", batch_first=True, norm_first=pre_norm
    )
    norm = nn.LayerNorm(WIDTH) if pre_norm else None
    theirs = nn.TransformerEncoder(layer, LAYERS, norm, enable_nested_tensor=False)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    return theirs


def our_encoder(pre_norm: bool) -> TransformerEncoder:
    settings = Transformer(layers=LAYERS, heads=HEADS, ffn_width=INNER, pre_norm=pre_norm)
    encoder = settings.build(WIDTH, 40, 0.0)
    nn.init.zeros_(encoder.positions.weight)
    return encoder


@pytest.mark.parametrize("pre_norm", [False, True])
def test_same_outputs_as_torch(pre_norm):
    theirs, ours = torch_encoder(pre_norm), our_encoder(pre_norm)
    left = load_torch_encoder(ours, theirs.state_dict())
    assert left == ["positions.weight"] + [
        name for name in ("embedding_norm.weight", "embedding_norm.bias") if not pre_norm
    ]
    batch = jagged([5, 1, 33, 8, 9])
    x = torch.randn(len(batch.values), WIDTH)
    seen = x if pre_norm else F.layer_norm(x, (WIDTH,))
    states = ours(ItemRows(x, None), batch)
    padded = nn.utils.rnn.pad_sequence(seen.split(batch.lengths.tolist()), batch_first=True)
    inside = torch.arange(padded.shape[1]) < batch.lengths[:, None]
    expected = theirs(padded, src_key_padding_mask=~inside)[inside]
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_to_torch_and_back(pre_norm):
    first, second, theirs = our_encoder(pre_norm), our_encoder(pre_norm), torch_encoder(pre_norm)
    theirs.load_state_dict(torch_encoder_state(first))
    assert torch_encoder_state(first).keys() == theirs.state_dict().keys()
    left = load_torch_encoder(second, theirs.state_dict())
    for name, value in first.state_dict().items():
        assert name in left or torch.equal(value, second.state_dict()[name]), name
    exported = torch_encoder_state(first)
    exported["layers.0.norm1.weight"].zero_()
    assert not (first.layers[0].attention_norm.weight == 0).any(), "a copy was asked for"


def test_torch_entries_that_do_not_fit_are_named():
    state, encoder = torch_encoder(False).state_dict(), our_encoder(False)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    del state["layers.1.norm2.bias"]
    state["norm.weight"] = torch.ones(WIDTH)
    state["layers.0.linear1.weight"] = torch.ones(INNER, WIDTH + 1)
    with pytest.raises(ValueError, match=r"missing layers\.1\.norm2\.bias \[16\]") as error:
        load_torch_encoder(encoder, state)
    assert "unexpected norm.weight" in str(error.value)
    assert "layers.0.linear1.weight is [24, 17], expected [24, 16]" in str(error.value)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(ValueError, match=r"missing norm\.weight"):
        load_torch_encoder(our_encoder(True), torch_encoder(False).state_dict())


def bert_model(**options) -> UserModel:
    encoder = Transformer(layers=LAYERS, heads=HEADS, ffn_width=INNER, norm_eps=1e-12, **options)
    return UserModel(50, ModelConfig(width=WIDTH, max_len=32, encoder=encoder))


def bert_weights(rows: int = 54, places: int = 32) -> dict[str, torch.Tensor]:
    """Names and shapes of BertModel (Hugging Face), random values."""
    shapes = {
        "embeddings.word_embeddings.weight": (rows, WIDTH),
        "embeddings.position_embeddings.weight": (places, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "embeddings.LayerNorm.weight": (WIDTH,),
        "embeddings.LayerNorm.bias": (WIDTH,),
        "pooler.dense.weight": (WIDTH, WIDTH),
        "pooler.dense.bias": (WIDTH,),
    }
    for i in range(LAYERS):
        for name, out, into in (
            ("attention.self.query", WIDTH, WIDTH),
            ("attention.self.key", WIDTH, WIDTH),
            ("attention.self.value", WIDTH, WIDTH),
            ("attention.output.dense", WIDTH, WIDTH),
            ("intermediate.dense", INNER, WIDTH),
            ("output.dense", WIDTH, INNER),
        ):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (out, into)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (out,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (WIDTH,)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (WIDTH,)
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def eager_bert(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """BertModel of one sequence without padding: [L] to [L, D] (Devlin et al., 2019)."""

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def split(x):
        return x.view(len(ids), HEADS, -1).transpose(0, 1)

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        q, k, v = (split(linear(x, f"{at}.attention.self.{n}")) for n in ("query", "key", "value"))
        p = (q @ k.transpose(1, 2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        mixed = (p @ v).transpose(0, 1).reshape(len(ids), WIDTH)
        out = linear(mixed, f"{at}.attention.output.dense")
        x = norm(out + x, f"{at}.attention.output.LayerNorm")
        inner = F.gelu(linear(x, f"{at}.intermediate.dense"))
        x = norm(linear(inner, f"{at}.output.dense") + x, f"{at}.output.LayerNorm")
    return x


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_same_outputs_as_bert(prefix):
    weights, model, batch = bert_weights(), bert_model(), jagged([5, 1, 30, 8])
    heads = {"cls.predictions.bias": torch.zeros(54)} if prefix else {}
    given = {prefix + name: value for name, value in weights.items()} | heads
    rest = load_bert(model, given)
    spare = ["embeddings.token_type_embeddings.weight", "pooler.dense.weight", "pooler.dense.bias"]
    assert set(rest) == {*spare, *heads}
    expected = [eager_bert(weights, ids) for ids in batch.values.split(batch.lengths.tolist())]
    torch.testing.assert_close(
        model.encode(batch).states, torch.cat(expected), rtol=1e-4, atol=1e-5
    )


def test_rows_of_the_word_embeddings():
    """Items and special tokens anywhere in a larger vocabulary: what is left out is returned."""
    weights, model = bert_weights(rows=90), bert_model()
    rows = torch.randperm(90)[:54]
    rest = load_bert(model, weights, rows=rows)
    batch = jagged([6, 3])
    expected = [eager_bert(weights, rows[ids]) for ids in batch.values.split([6, 3])]
    torch.testing.assert_close(
        model.encode(batch).states, torch.cat(expected), rtol=1e-4, atol=1e-5
    )
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(rest[words], weights[words])
    with pytest.raises(IndexError, match=r"rows must be in \[0, 90\)"):
        load_bert(model, weights, rows=rows + 60)
    with pytest.raises(ValueError, match=r"word_embeddings.weight is \[90, 16\], expected \[54"):
        load_bert(model, weights)


def test_to_bert_and_back():
    first, second = bert_model(), bert_model()
    state = bert_state(first)
    weights = bert_weights()
    named = {name for name in weights if "pooler" not in name}
    assert set(state) == named
    assert all(state[name].shape == weights[name].shape for name in named)
    assert list(load_bert(second, state)) == ["embeddings.token_type_embeddings.weight"]
    for name, value in first.state_dict().items():
        assert "item_head" in name or torch.equal(value, second.state_dict()[name]), name
    batch = jagged([7])
    torch.testing.assert_close(first.encode(batch).states, eager_bert(state, batch.values))


def test_bert_entries_that_do_not_fit_are_named():
    weights, model = bert_weights(places=512), bert_model()
    del weights["encoder.layer.2.attention.self.key.bias"]
    weights["encoder.layer.3.output.dense.bias"] = torch.zeros(WIDTH)
    with pytest.raises(
        ValueError, match=r"missing encoder\.layer\.2\.attention\.self\.key"
    ) as error:
        load_bert(model, weights)
    assert "unexpected encoder.layer.3.output.dense.bias" in str(error.value)
    assert "position_embeddings.weight is [512, 16], expected [32, 16]" in str(error.value)
    with pytest.raises(ValueError, match="post-norm, bidirectional"):
        bert_state(bert_model(pre_norm=True))


def test_eps_is_saved(tmp_path):
    model = bert_model()
    model.save_pretrained(tmp_path)
    again = UserModel.from_pretrained(tmp_path)
    assert (
        again.config.encoder.transformer.norm_eps == again.encoder.layers[0].ffn_norm.eps == 1e-12
    )


def test_a_bert_has_no_place_for_another_encoder_and_is_not_asked_for_the_head():
    gru = UserModel(50, ModelConfig(width=WIDTH, max_len=32, encoder=Gru()))
    with pytest.raises(ValueError, match="BertModel is a post-norm, bidirectional encoder; this"):
        bert_state(gru)
    plain = bert_model()
    model = UserModel(50, replace(plain.config, head_table="own", user_width=4), num_users=3)
    assert bert_state(model).keys() == bert_state(plain).keys()


def test_the_block_of_the_guide():
    """With the `BertModel` of the real package."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    page = (Path(__file__).parent.parent / "docs" / "guide.md").read_text()
    block = page.split("<!-- weights -->")[1].split("<!-- /weights -->")[0]
    config = transformers.BertConfig(
        vocab_size=54,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=32,
    )
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    model, rows, ids = bert_model(), torch.randperm(54), torch.randint(50, (1, 9))
    names = {"model": model, "bert": bert, "rows": rows, "torch_encoder": torch_encoder(False)}
    with torch.no_grad():
        before = bert(rows[ids]).last_hidden_state[0]
        exec(compile(block.split("```python")[1].split("```")[0], "guide", "exec"), names)
        ours = model.encode(from_sequences(ids.tolist())).states
        torch.testing.assert_close(ours, before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bert(ids).last_hidden_state[0], ours, rtol=1e-4, atol=1e-5)


def test_patches_have_no_place_in_another_layout():
    encoder = Transformer(layers=LAYERS, heads=HEADS, ffn_width=INNER, patch=3)
    model = UserModel(20, ModelConfig(width=WIDTH, encoder=encoder))
    with pytest.raises(ValueError, match="torch.nn.TransformerEncoder has no model patches"):
        torch_encoder_state(model.encoder)
    with pytest.raises(ValueError, match="BertModel has no model patches"):
        bert_state(model)
    left = load_torch_encoder(model.encoder, torch_encoder(False).state_dict())
    assert any(".patches." in name for name in left)
