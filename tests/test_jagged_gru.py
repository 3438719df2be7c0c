# SPDX-License-Identifier: Apache-2.0
"""The recurrent layer and the encoder made of it: equal to torch.nn.GRU, the same in any batch."""

from itertools import pairwise

import pytest
import torch
from backends import backends, needs
from builders import jagged
from op_db.case import excess
from test_encoder import FIRST, LENGTHS, gradients, take
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from fastrec.nn.encoders.gru import Gru, GruEncoder
from fastrec.nn.items import ItemRows
from fastrec.nn.model_config import ModelConfig, num_parameters
from fastrec.nn.user_model import UserModel
from fastrec.ops.jagged_gru import jagged_gru
from fastrec.random import Rng, keep_mask

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def model_of(dropout: float = 0.4, width: int = 16, **gru) -> UserModel:
    torch.manual_seed(0)
    config = ModelConfig(width=width, max_len=70, dropout=dropout, encoder=Gru(**gru))
    return UserModel(50, config)


def packed(gru: nn.GRU, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[T, H] of torch's layers on the sequences that have events."""
    parts = [x[a:b] for a, b in pairwise(offsets) if b > a]
    out, lengths = pad_packed_sequence(
        gru(pack_sequence(parts, enforce_sorted=False))[0], batch_first=True
    )
    return torch.cat([row[:n] for row, n in zip(out, lengths, strict=True)])


@backends("jagged_gru", "reference", "cpp")
def test_equals_torch(backend):
    offsets = jagged(LENGTHS).offsets
    gru = nn.GRU(6, 10).double()
    x = torch.randn(int(offsets[-1]), 6, dtype=torch.float64, requires_grad=True)
    own = [getattr(gru, f"{name}_l0") for name in NAMES]
    states = jagged_gru(x, offsets, *own, backend=backend)
    expected = packed(gru, x, offsets)
    torch.testing.assert_close(states, expected)
    up = torch.randn_like(states)
    found = torch.autograd.grad(states, [x, *own], up)
    for actual, exact in zip(found, torch.autograd.grad(expected, [x, *own], up), strict=True):
        torch.testing.assert_close(actual, exact)


def load_torch(gru: nn.GRU, encoder: GruEncoder) -> None:
    with torch.no_grad():
        for index, layer in enumerate(encoder.layers):
            for name in NAMES:
                getattr(layer, name).copy_(getattr(gru, f"{name}_l{index}"))


@pytest.mark.parametrize("hidden", [None, 24])
def test_encoder_equals_torch_layers(hidden):
    encoder = Gru(layers=3, hidden=hidden).build(16, 70, 0.5)
    gru = nn.GRU(16, hidden or 16, num_layers=3)
    assert sum(p.numel() for p in encoder.layers.parameters()) == sum(
        p.numel() for p in gru.parameters()
    )
    load_torch(gru, encoder)
    batch = jagged(LENGTHS)
    x = torch.randn(len(batch.values), 16)
    expected = packed(gru, x, batch.offsets)
    if hidden:
        expected = encoder.output(expected)
    torch.testing.assert_close(encoder(ItemRows(x, None), batch), expected, rtol=1e-5, atol=1e-6)


def test_dropout_is_on_the_items_and_between_layers():
    model, batch, rng = model_of(layers=2).double(), jagged(LENGTHS), Rng(5, 7)
    keys, place = batch.keys[batch.segment_ids()], batch.positions()

    def drop(x, site):
        keep, scale = keep_mask(rng, 0.4, keys, place, 16, site=site)
        return x * keep * scale

    x = drop(model.item_embedding.weight[batch.values], "embedding")
    first, second = model.encoder.layers
    x = drop(first(x, batch.offsets), "ffn_output")
    states = model.encode(batch, rng).states
    torch.testing.assert_close(states, second(x, batch.offsets))
    assert not torch.equal(states, model.encode(batch).states)


@needs("cpp", "jagged_gru")
def test_bits_do_not_depend_on_the_batch():
    model = model_of(width=24, layers=2, hidden=20)
    batch, rng = jagged(LENGTHS, first_id=FIRST), Rng(2**40 + 3, 7)
    whole = model.encode(batch, rng).states
    for order in ([2], [1], [12, 6], [0, 1, 2, 3, 4, 5], list(range(12, -1, -1))):
        part, events = take(batch, order)
        assert torch.equal(model.encode(part, rng).states, whole[events]), order


@needs("cpp", "jagged_gru")
def test_the_future_changes_no_bit():
    model, batch = model_of(width=24), jagged([9, 5])
    whole = model.encode(batch).states
    batch.values[8] = (batch.values[8] + 1) % 50
    states = model.encode(batch).states
    assert torch.equal(states[:8], whole[:8]) and torch.equal(states[9:], whole[9:])
    assert not torch.equal(states[8], whole[8])


@backends("jagged_gru", "reference", "cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing_but_the_dtypes_that_fit(backend, dtype):
    """The recurrence is float32 whatever came before it."""
    offsets, layer = torch.tensor([0, 5, 6, 20]), nn.GRU(6, 10)
    own = [getattr(layer, f"{name}_l0") for name in NAMES]
    x = torch.randn(20, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        states = jagged_gru(x, offsets, *own, backend=backend)
    expected = jagged_gru(x.float(), offsets, *own, backend=backend)
    assert states.dtype == dtype and torch.equal(states, expected.to(dtype))


@needs("cpp", "jagged_gru")
def test_compiled_without_graph_break():
    model, rng = model_of(layers=2), Rng(5, 7)

    def states_of(batch):
        return model.encode(batch, rng).states

    torch._dynamo.reset()
    compiled = torch.compile(states_of, fullgraph=True, backend="aot_eager")
    batch = jagged(LENGTHS)
    expected, actual = states_of(batch), compiled(batch)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    wanted, found = gradients(model, expected), gradients(model, actual)
    assert wanted.keys() == found.keys() and len(found) > 8
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5, msg=name)


@needs("cpp", "jagged_gru")
def test_small_states_keep_their_digits():
    """tanh of 1e-4 has an error of 1e-11, not that of 1 - exp(-2e-4)."""
    x = torch.logspace(-6, 1.5, 300)[:, None] * torch.tensor([1.0, -1.0]).repeat(150)[:, None]
    weight = torch.tensor([[0.0], [0.0], [1.0]])
    states = jagged_gru(x, torch.arange(301), weight, torch.zeros(3, 1), backend="cpp")
    exact = 0.5 * x.double().tanh()
    error = ((states - exact) / exact).abs().max()
    assert error < 4 * torch.finfo(torch.float32).eps


def test_offsets_behind_which_events_are_left():
    """Under torch.compile nobody looks at the offsets: the rest has a state and gradients of 0."""
    x, w = torch.randn(6, 3, requires_grad=True), torch.randn(15, 3)
    torch._dynamo.reset()
    run = torch.compile(jagged_gru, fullgraph=True, backend="aot_eager")
    states = run(x, torch.tensor([0, 2, 4]), w, torch.randn(15, 5))
    (grad,) = torch.autograd.grad(states.sum(), x)
    assert states[:4].all() and not states[4:].any()
    assert grad[:4].any(1).all() and not grad[4:].any()


def test_parameters_are_counted_before_they_are_made():
    for settings in (Gru(), Gru(layers=3), Gru(layers=2, hidden=24)):
        model = UserModel(50, ModelConfig(width=16, encoder=settings))
        expected = sum(p.numel() for p in model.parameters())
        assert num_parameters(50, model.config) == expected


def test_a_saved_model_reads_back(tmp_path):
    model, batch = model_of(layers=2, hidden=24), jagged([3, 5])
    model.save_pretrained(tmp_path)
    again = UserModel.from_pretrained(tmp_path)
    assert again.config == model.config and again.config.causal
    assert torch.equal(again.encode(batch).states, model.encode(batch).states)


def test_float32_encoder_is_within_its_budget():
    """States and gradients of two layers against float64, beside torch's own error."""
    encoder, batch = Gru(layers=2).build(32, 70, 0.0), jagged(LENGTHS)
    x, up = torch.randn(len(batch.values), 32), torch.randn(len(batch.values), 32)

    def grads(dtype, states_of, *modules):
        leaf = x.detach().to(dtype).requires_grad_()
        states = states_of(leaf)
        return states, *torch.autograd.grad(states, leaf, up.to(dtype))

    gru = nn.GRU(32, 32, num_layers=2)
    load_torch(gru, encoder)
    actual = grads(torch.float32, lambda x: encoder(ItemRows(x, None), batch))
    low = grads(torch.float32, lambda x: packed(gru, x, batch.offsets))
    exact = grads(torch.float64, lambda x: packed(gru.double(), x, batch.offsets))
    for one, torchs, truth in zip(actual, low, exact, strict=True):
        error, budget = excess(one, torchs, truth)
        assert error <= budget


def test_errors_name_the_problem():
    x, offsets = torch.randn(4, 3), torch.tensor([0, 4])
    w_ih, w_hh = torch.randn(15, 3), torch.randn(15, 5)
    with pytest.raises(ValueError, match=r"weight_hh must be \[3 H, H\] with H > 0, got \[14, 5\]"):
        jagged_gru(x, offsets, w_ih, w_hh[:14])
    with pytest.raises(ValueError, match=r"weight_hh must be .* H > 0, got \[0, 0\]"):
        jagged_gru(x, offsets, w_ih, w_hh[:0, :0])
    with pytest.raises(ValueError, match=r"weight_ih must be \[15, 3\], got \[12, 3\]"):
        jagged_gru(x, offsets, w_ih[:12], w_hh)
    with pytest.raises(ValueError, match=r"bias_hh must be \[15\], got \[5\]"):
        jagged_gru(x, offsets, w_ih, w_hh, bias_hh=torch.zeros(5))
    with pytest.raises(TypeError, match="weight_ih must be float32, got"):
        jagged_gru(x, offsets, w_ih.double(), w_hh)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        Gru(layers=0)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        Gru(hidden=0)
    with pytest.raises(ValueError, match="layers must be at most 255, got 256"):
        Gru(layers=256)
