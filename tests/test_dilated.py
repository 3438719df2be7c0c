# SPDX-License-Identifier: Apache-2.0
"""The encoder of dilated convolutions: equal to torch.nn.Conv1d on each sequence alone."""

from itertools import pairwise

import pytest
import torch
from builders import jagged
from test_encoder import FIRST, LENGTHS, gradients, take
from torch import nn
from torch.nn import functional as F

from fastrec.nn.encoders.dilated import Dilated, DilatedConvolution, Places
from fastrec.nn.items import ItemRows
from fastrec.nn.model_config import ModelConfig, num_parameters
from fastrec.nn.transfer import freeze
from fastrec.nn.user_model import UserModel
from fastrec.random import Rng


def model_of(dropout: float = 0.4, width: int = 16, **dilated) -> UserModel:
    torch.manual_seed(0)
    config = ModelConfig(width=width, max_len=70, dropout=dropout, encoder=Dilated(**dilated))
    return UserModel(50, config)


def convolved(convolution: nn.Conv1d, x: torch.Tensor, causal: bool) -> torch.Tensor:
    """[L, D] of one sequence, padded by zeros."""
    reach = (convolution.kernel_size[0] - 1) * convolution.dilation[0]
    sides = (reach, 0) if causal else (reach // 2, reach // 2)
    return convolution(F.pad(x.T, sides)).T


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel, dilation", [(3, 1), (3, 4), (5, 2), (1, 1), (3, 100)])
def test_a_convolution_is_that_of_each_sequence(causal, kernel, dilation):
    batch = jagged(LENGTHS)
    theirs = nn.Conv1d(6, 6, kernel, dilation=dilation).double()
    ours = DilatedConvolution(6, kernel, dilation, causal).double()
    with torch.no_grad():
        ours.taps.weight.copy_(theirs.weight.transpose(1, 2).reshape(6, -1))
        ours.taps.bias.copy_(theirs.bias)
    x = torch.randn(len(batch.values), 6, dtype=torch.float64, requires_grad=True)
    out = ours(x, Places(batch, batch.positions()))
    expected = torch.cat(
        [convolved(theirs, x[a:b], causal) for a, b in pairwise(batch.offsets) if b > a]
    )
    torch.testing.assert_close(out, expected)
    up = torch.randn_like(out)
    found = torch.autograd.grad(out, [x, ours.taps.weight, ours.taps.bias], up)
    exact = list(torch.autograd.grad(expected, [x, theirs.weight, theirs.bias], up))
    exact[1] = exact[1].transpose(1, 2).reshape(6, -1)
    for actual, reference in zip(found, exact, strict=True):
        torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_are_those_of_nextitnet(causal):
    """x + f(x), f: convolution, LayerNorm, ReLU, with the dilation and with twice as much."""
    model = model_of(dilations=[1, 3], causal=causal).double()
    batch = jagged(LENGTHS)
    table = torch.randn(len(batch.values), 16, dtype=torch.float64)
    found = model.encoder(ItemRows(table, None), batch)
    parts = []
    for a, b in pairwise(batch.offsets):
        x = table[a:b]
        for block, dilation in zip(model.encoder.blocks, (1, 3), strict=True):
            out = x
            for times, ours, norm in zip((1, 2), block.convolutions, block.norms, strict=True):
                theirs = nn.Conv1d(16, 16, 3, dilation=times * dilation).double()
                with torch.no_grad():
                    theirs.weight.copy_(ours.taps.weight.view(16, 3, 16).transpose(1, 2))
                    theirs.bias.copy_(ours.taps.bias)
                out = norm(convolved(theirs, out, causal)).relu() if len(x) else out
            x = x + out
        parts.append(x)
    torch.testing.assert_close(found, torch.cat(parts))


def test_no_sequence_sees_another():
    model, batch = model_of(causal=False), jagged(LENGTHS)
    x = torch.randn(len(batch.values), 16)
    expected = model.encoder(ItemRows(x, None), batch)
    begin, end = batch.offsets[2:4]
    assert end - begin > 1
    x = x.clone()
    x[begin:end] = torch.nan
    found = model.encoder(ItemRows(x, None), batch)
    others = torch.ones(len(x), dtype=torch.bool)
    others[begin:end] = False
    assert torch.equal(found[others], expected[others]) and found[begin:end].isnan().all()


def test_a_causal_state_does_not_see_what_comes_later():
    model, batch = model_of(), jagged([30])
    x = torch.randn(30, 16)
    whole = model.encoder(ItemRows(x, None), batch)
    for length in (1, 7, 29):
        part = model.encoder(ItemRows(x[:length], None), jagged([length]))
        torch.testing.assert_close(part, whole[:length])


def test_the_same_in_any_batch():
    model, batch = model_of(), jagged(LENGTHS, first_id=FIRST)
    rng = Rng(3, 5)
    whole = model.encode(batch, rng).states
    part, events = take(batch, [5, 1, 3])
    assert torch.equal(model.encode(part, rng).states, whole[events])
    assert not torch.equal(whole, model.encode(batch, Rng(3, 6)).states)


def test_patches_start_as_the_model_without_them_and_are_trained_alone():
    batch = jagged(LENGTHS)
    plain, patched = model_of(), model_of(patch=4)
    patched.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain.encode(batch).states, patched.encode(batch).states)
    freeze(patched, ["encoder"])
    names = [name for name, p in patched.encoder.named_parameters() if p.requires_grad]
    assert names and all(".patches." in name for name in names)


@pytest.mark.parametrize("form", ["serial", "parallel"])
def test_patches_stand_behind_convolutions_or_beside_them(form):
    """Serial: of what a convolution gives. Parallel: of its input, the input added too, before the
    LayerNorm (PeterRec, figure 3)."""
    model, batch = model_of(dilations=[2], patch=4, patch_form=form).double(), jagged(LENGTHS)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    table, block = torch.randn(len(batch.values), 16, dtype=torch.float64), model.encoder.blocks[0]
    places, out = Places(batch, batch.positions()), table
    for convolution, norm, patch in zip(
        block.convolutions, block.norms, block.patches, strict=True
    ):
        before, out = out, convolution(out, places)
        read = out if form == "serial" else before
        out = out + patch.up(F.gelu(patch.down(read)))
        out = out if form == "serial" else out + before
        out = norm(out).relu()
    torch.testing.assert_close(model.encoder(ItemRows(table, None), batch), table + out)


def test_a_convolution_that_was_replaced_is_called():
    model, batch = model_of(), jagged(LENGTHS)
    before = model.encode(batch).states
    taps = model.encoder.blocks[0].convolutions[0].taps

    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * taps(x) + 1

    model.encoder.blocks[0].convolutions[0].taps = Doubled()
    states = model.encode(batch).states
    assert not torch.equal(states, before)
    assert "encoder.blocks.0.norms.0.weight" in gradients(model, states)


@pytest.mark.parametrize("patch", [0, 4])
def test_number_of_parameters(patch):
    model = model_of(patch=patch)
    assert num_parameters(50, model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(dilations=[]), "dilations must be 1 to"),
        (dict(dilations=[0]), "dilations must be in"),
        (dict(kernel=2, causal=False), "kernel must be odd where causal is false, got 2"),
        (dict(kernel=0), "kernel must be in"),
        (dict(norm_eps=0.0), "norm_eps must be positive"),
        (dict(patch=-1), "patch must be at least 0"),
        (dict(patch_form="parallel"), "patch_form parallel has no effect: patch is 0"),
        (dict(patch=2, patch_form="both"), "patch_form must be one of"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Dilated(**settings)
