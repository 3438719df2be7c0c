# SPDX-License-Identifier: Apache-2.0
"""The jagged encoder: equal to torch.nn.TransformerEncoder, batch-invariant, length-agnostic."""

import dataclasses

import pytest
import torch
from builders import FORMS, jagged
from op_db.case import excess
from torch import nn

import fastrec.backend
from fastrec.data.batch import JaggedBatch, from_sequences, offsets_of
from fastrec.data.settings import from_values
from fastrec.nn.encoders.parts import Encoders, settings_of, wrapped
from fastrec.nn.encoders.sublayers import EventDropout
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.ops.jagged_attention import jagged_attention
from fastrec.ops.jagged_embedding import jagged_embedding
from fastrec.random import Rng, keep_mask

# Keys of view 3, whose ids use the highest of their 32 bits.
FIRST = 3 << 32 | 2**31


def model_of(width: int = 16, dropout: float = 0.4, max_len: int = 70, **transformer) -> UserModel:
    config = ModelConfig(
        width=width, max_len=max_len, dropout=dropout, encoder=Transformer(**transformer)
    )
    return UserModel(50, config)


def take(batch: JaggedBatch, order: list[int]) -> tuple[JaggedBatch, torch.Tensor]:
    """The sequences `order` of a batch, and the events of the batch that they hold."""
    events = torch.cat(
        [torch.arange(int(batch.offsets[i]), int(batch.offsets[i + 1])) for i in order]
    )
    lengths = batch.lengths[order]
    part = JaggedBatch(
        batch.values[events], offsets_of(lengths), batch.keys[order], int(lengths.max())
    )
    return part, events


def load_torch_layer(layer: nn.TransformerEncoderLayer, ours) -> None:
    with torch.no_grad():
        ours.query_key_value.weight.copy_(layer.self_attn.in_proj_weight)
        ours.query_key_value.bias.copy_(layer.self_attn.in_proj_bias)
        for mine, theirs in (
            (ours.attention_output, layer.self_attn.out_proj),
            (ours.attention_norm, layer.norm1),
            (ours.ffn_inner, layer.linear1),
            (ours.ffn_output, layer.linear2),
            (ours.ffn_norm, layer.norm2),
        ):
            mine.weight.copy_(theirs.weight)
            mine.bias.copy_(theirs.bias)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_transformer_layer(pre_norm, causal):
    settings = Transformer(layers=1, heads=4, causal=causal, pre_norm=pre_norm)
    encoder = settings.build(16, 40, 0.0)
    theirs = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=pre_norm
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    load_torch_layer(theirs, encoder.layers[0])
    batch = jagged([5, 1, 33, 8, 9])
    x = torch.randn(len(batch.values), 16)
    ours, pending = encoder.layers[0](x, batch, causal, EventDropout(batch, 0.0, None), 0)
    if pre_norm:
        ours = ours + pending
    for start, end in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
        mask = nn.Transformer.generate_square_subsequent_mask(end - start) if causal else None
        expected = theirs(x[None, start:end], src_mask=mask, is_causal=causal)[0]
        torch.testing.assert_close(ours[start:end], expected, rtol=1e-4, atol=1e-5)


def test_dropout_does_not_depend_on_the_batch():
    """Promise 3: the same states for a user alone, in another order, beside longer sequences."""
    torch.manual_seed(0)
    model = model_of(dropout=0.5)
    batch = jagged([3, 60, 17, 1, 8], first_id=FIRST)
    whole = model.encode(batch, Rng(seed=2**40 + 3, step=7)).states
    for order in ([2], [4, 0], [1, 3, 2, 0, 4]):
        part, events = take(batch, order)
        states = model.encode(part, Rng(seed=2**40 + 3, step=7)).states
        torch.testing.assert_close(states, whole[events], rtol=1e-5, atol=1e-6)
    other = model.encode(batch, Rng(seed=2**40 + 3, step=8)).states
    assert (other - whole).abs().max() > 0.1


def test_dropout_keeps_the_expectation():
    batch = jagged([6] * 64)
    ones, zeros = torch.ones(len(batch.values), 512), torch.zeros(6, 512)
    dropout = EventDropout(batch, 0.3, Rng(1, 2))
    dropped = jagged_embedding(None, ones, zeros, **dropout.at("embedding"))
    kept = (dropped > 0).double().mean()
    assert abs(kept - (256 - 77) / 256) < 4 * (0.21 / dropped.numel()) ** 0.5
    torch.testing.assert_close(dropped.max(), torch.tensor(256 / (256 - 77)))
    for off in (EventDropout(batch, 0.3, None), EventDropout(batch, 0.0, Rng(1, 2))):
        assert torch.equal(jagged_embedding(None, ones, zeros, **off.at("embedding")), ones)


def test_attention_gradient_and_empty_sequences():
    offsets = torch.tensor([0, 0, 3, 3, 4, 13, 13])
    q, k, v = (torch.randn(13, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(q, k, v):
        return jagged_attention(
            q,
            k,
            v,
            offsets,
            max_seq_len=9,
            dropout_p=0.25,
            rng=Rng(3, 4),
            keys=torch.arange(6),
        )

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_empty_batch():
    assert model_of(width=8).encode(from_sequences([]), Rng(0, 0)).states.shape == (0, 8)


def test_errors_name_the_problem():
    with pytest.raises(ValueError, match="width 10 is not divisible by heads 4"):
        Transformer(heads=4).build(10, 5, 0.0)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        Transformer(layers=0)
    with pytest.raises(ValueError, match="patch must be at least 0, got -1"):
        Transformer(patch=-1)
    model = UserModel(9, ModelConfig(width=8, max_len=4, tokens=["cls", "sep"]))
    with pytest.raises(ValueError, match="a sequence has 7 positions, the encoder was built for 6"):
        model.encode(jagged([7], num_items=9))
    x = torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match="needs rng and keys"):
        jagged_attention(x, x, x, torch.tensor([0, 3]), max_seq_len=3, dropout_p=0.1)
    with pytest.raises(RuntimeError, match="unknown backend"):
        jagged_attention(x, x, x, torch.tensor([0, 3]), max_seq_len=3, backend="c++")


def test_an_encoder_is_named():
    chosen = Transformer(layers=3)
    assert from_values(Encoders, {"transformer": {"layers": 3}}) == Encoders(transformer=chosen)
    assert wrapped(chosen) == Encoders(transformer=chosen)
    assert settings_of(wrapped(chosen)) == chosen
    with pytest.raises(ValueError, match=r"encoders names none: one of \['transformer'.* expected"):
        Encoders()
    own = object()  # settings of somebody else
    assert wrapped(own) is own and settings_of(own) is own


def on_backend(monkeypatch, backend):
    """The encoder asks for no backend: make its native one `backend`."""
    monkeypatch.setitem(fastrec.backend.NATIVE, "cpu", backend)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("form", FORMS)
def test_dropout_views_are_separate_calls(backend, form, monkeypatch):
    """Bit for bit forward; the gradient is the sum of theirs, up to the order of its additions."""
    on_backend(monkeypatch, backend)
    model = model_of(width=32, **FORMS[form], ffn_width=48)
    batch, views = jagged([5, 1, 33, 8, 0, 9, 60], first_id=2**31), 3
    upstream = torch.randn(views, len(batch.values), 32)

    def gradients(*states):
        for state, up in zip(states, upstream.flatten(0, 1).chunk(len(states)), strict=True):
            state.backward(up)
        grads = [parameter.grad for parameter in model.encoder.parameters()]
        grads.append(model.item_embedding.weight.grad)
        model.zero_grad(set_to_none=True)
        return grads

    together = model.encode(batch.as_views(views), Rng(3, 4)).states
    alone = [model.encode(batch.as_view(i), Rng(3, 4)).states for i in range(views)]
    assert not torch.equal(alone[0], alone[1])
    assert together.shape == (views * len(batch.values), 32)
    assert torch.equal(together, torch.cat(alone))
    exact = UserModel(50, model.config).double()
    exact.load_state_dict(model.state_dict())
    wide = exact.encode(batch.as_views(views), Rng(3, 4)).states
    wide.backward(upstream.flatten(0, 1).double())
    expected = [p.grad for p in exact.encoder.parameters()] + [exact.item_embedding.weight.grad]
    for one, sum_of, truth in zip(gradients(together), gradients(*alone), expected, strict=True):
        error, budget = excess(one, sum_of, truth)
        # The order of the sums of the reference is that of BLAS, another one for more rows.
        assert error <= (2 if backend == "reference" else 1) * budget


def test_views_without_dropout_are_copies():
    model, batch = model_of(), jagged([3, 0, 7])
    once, twice = model.encode(batch), model.encode(batch.as_views(2))
    assert torch.equal(twice.states, once.states.repeat(2, 1))
    assert torch.equal(model.pool(twice, "max"), model.pool(once, "max").repeat(2, 1))


def test_views_launch_every_kernel_once():
    model, batch = model_of(), jagged([3, 1, 7])
    counts = []
    for views in (1, 4):
        with torch.profiler.profile() as profile:
            model.encode(batch.as_views(views), Rng(1, 2)).states.sum().backward()
        events = [event for event in profile.key_averages() if event.key.startswith("fastrec::")]
        counts.append({event.key: event.count for event in events})
    assert counts[0] == counts[1] and len(counts[0]) >= 8


def test_keys_of_views():
    batch = dataclasses.replace(
        jagged([2, 0, 3], first_id=2**32 - 3),
        users={"age": torch.arange(3)},
        events={"time": torch.arange(5)},
    )
    ids = [2**32 - 3, 2**32 - 2, 2**32 - 1]
    twice = batch.as_views(2)
    assert twice.offsets.tolist() == [0, 2, 2, 5, 7, 7, 10] and len(twice) == 6
    assert twice.positions().tolist() == batch.positions().tolist() * 2
    assert twice.keys.tolist() == ids + [1 << 32 | i for i in ids]
    assert twice.sample_ids.tolist() == ids * 2
    assert twice.users["age"].tolist() == [0, 1, 2] * 2
    assert twice.events["time"].tolist() == [0, 1, 2, 3, 4] * 2
    assert twice.as_view(65534).keys.tolist() == [65534 << 32 | i for i in ids] * 2
    for view in (-1, 65535):
        with pytest.raises(ValueError, match=rf"a view is a number in \[0, 65535\), got {view}"):
            batch.as_view(view)


def shuffled(batch: JaggedBatch, seed: int) -> tuple[JaggedBatch, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return take(batch, torch.randperm(len(batch), generator=g).tolist())


LENGTHS = [5, 1, 33, 8, 0, 9, 60, 2, 17, 31, 1, 4, 12]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_bits_do_not_depend_on_the_batch(form, causal):
    """With the native kernels: any order, any part, one sequence alone; dropout on."""
    model = model_of(width=24, **FORMS[form], causal=causal)
    batch, rng = jagged(LENGTHS, first_id=FIRST), Rng(2**40 + 3, 7)
    whole = model.encode(batch, rng).states
    for seed in (0, 1):
        part, events = shuffled(batch, seed)
        assert torch.equal(model.encode(part, rng).states, whole[events])
    for order in ([2], [1], [0, 1, 2, 3, 4, 5], list(range(6, 13)), [12, 6]):
        part, events = take(batch, order)
        assert torch.equal(model.encode(part, rng).states, whole[events]), order


def padded(batch: JaggedBatch, length: int, fill: int) -> tuple[JaggedBatch, torch.Tensor]:
    """Every sequence filled up to `length` events, and where the real ones are."""
    real = torch.arange(length) < batch.lengths[:, None]
    values = torch.full(real.shape, fill)
    values[real] = batch.values
    offsets = torch.arange(len(batch) + 1) * length
    return JaggedBatch(values.flatten(), offsets, batch.keys, length), real.flatten()


def test_padding_behind_changes_no_bit_where_nobody_looks_ahead():
    """Causal: what stands behind an event is not seen, whatever it is."""
    model, batch, rng = model_of(width=24, causal=True), jagged(LENGTHS), Rng(5, 7)
    whole = model.encode(batch, rng).states
    for fill in (0, 49):
        wide, real = padded(batch, 60, fill)
        assert torch.equal(model.encode(wide, rng).states[real], whole)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_jagged_is_padded(pre_norm):
    """An eager padded encoder with the same masks: [B, L, D] with keys beyond the end left out."""
    model = model_of(width=24, pre_norm=pre_norm).double()
    batch, rng = jagged(LENGTHS), Rng(5, 7)
    wide, real = padded(batch, 60, 0)
    encoder, place = model.encoder, wide.positions()
    inside = real.view(len(batch), 1, 1, 60)

    def drop(x, site, index=0):
        keys = batch.keys.repeat_interleave(60)
        keep, scale = keep_mask(rng, 0.4, keys, place, 24, site=site, layer=index)
        return x * keep * scale

    def attend(layer, x, index):
        qkv = torch.nn.functional.linear(
            x, layer.query_key_value.weight, layer.query_key_value.bias
        )
        q, k, v = qkv.view(len(batch), 60, 3, 2, 12).permute(2, 0, 3, 1, 4)
        p = (q @ k.transpose(2, 3) / 12**0.5).masked_fill(~inside, -torch.inf).softmax(-1)
        keep, scale = keep_mask(
            rng, 0.4, batch.keys[:, None, None], torch.arange(60), 60, site="attention",
            layer=index, head=torch.arange(2)[:, None],
        )  # fmt: skip
        mixed = (p.nan_to_num() * keep * scale) @ v
        return layer.attention_output(mixed.transpose(1, 2).reshape(-1, 24))

    def forward(layer, x):
        inner = torch.nn.functional.gelu(layer.ffn_inner(x))
        return layer.ffn_output(inner)

    x = model.item_embedding.weight[wide.values] + encoder.positions.weight[place]
    x = drop(encoder.embedding_norm(x), "embedding")
    for i, layer in enumerate(encoder.layers):
        if pre_norm:
            x = x + drop(attend(layer, layer.attention_norm(x), i), "attention_output", i)
            x = x + drop(forward(layer, layer.ffn_norm(x)), "ffn_output", i)
        else:
            x = layer.attention_norm(x + drop(attend(layer, x, i), "attention_output", i))
            x = layer.ffn_norm(x + drop(forward(layer, x), "ffn_output", i))
    expected = encoder.final_norm(x)[real]
    torch.testing.assert_close(model.encode(batch, rng).states, expected, rtol=1e-10, atol=1e-10)


def gradients(model: UserModel, states: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    up = torch.cos(torch.arange(states.numel(), dtype=torch.float64)).view(states.shape)
    states.backward(up.to(states.dtype))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("form", FORMS)
def test_autocast_on_a_cpu(backend, form, monkeypatch):
    """bfloat16 products: states within 8 eps of bfloat16 of the largest float32 state (a product
    rounds its operands and result, 2 layers have 8 of them in a row), gradients within 16 of the
    largest of their tensor, with ReLU 32: what rounds to the other side of 0 loses or gains its
    whole gradient. Parameters and their gradients stay float32."""
    on_backend(monkeypatch, backend)
    model = model_of(width=32, **FORMS[form])
    batch, rng = jagged(LENGTHS), Rng(5, 7)
    plain = model.encode(batch, rng).states
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.encode(batch, rng).states
    eps = torch.finfo(torch.bfloat16).eps
    assert mixed.dtype == torch.float32
    difference = (mixed - plain).abs().max()
    assert 0 < difference < 8 * eps * plain.abs().max()
    expected, actual = gradients(model, plain), gradients(model, mixed)
    assert expected.keys() == actual.keys()
    for name, grad in expected.items():
        assert actual[name].dtype == torch.float32, name
        error = (actual[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-3)
        assert error < (32 if form == "sasrec" else 16) * eps, f"{name}: {error / eps:.1f} eps"


# Five seconds each: where the norms stand changes nothing that can break a graph.
@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, marks=() if form in ("pre_norm", "ligr") else pytest.mark.exhaustive)
        for form in FORMS
    ],
)
def test_compiled_without_graph_break(form):
    model, rng = model_of(**FORMS[form]), Rng(5, 7)

    def states_of(batch):
        return model.encode(batch, rng).states

    torch._dynamo.reset()
    compiled = torch.compile(states_of, fullgraph=True, backend="aot_eager")
    for batch in (jagged(LENGTHS), jagged([4, 7, 2]).as_views(2)):
        expected, actual = states_of(batch), compiled(batch)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        wanted, found = gradients(model, expected), gradients(model, actual)
        assert wanted.keys() == found.keys()
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5, msg=name)
