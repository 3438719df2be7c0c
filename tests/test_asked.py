# SPDX-License-Identifier: Apache-2.0
"""`UserModel.ask`: the queries of `next_item_query(encode(batch))` from fewer states."""

import pytest
import torch
from builders import FORMS
from torch import nn

from fastrec.nn.encoders import sublayers
from fastrec.nn.encoders.gru import Gru
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.random import Rng

LENGTHS = [5, 1, 33, 8, 9, 60, 2, 17, 31, 1, 4, 12]


@pytest.fixture(autouse=True, params=["some", "all"])
def attention(request, monkeypatch):
    """Attention of the events that are asked alone, as in a large batch, or of all."""
    few = 0 if request.param == "some" else 10**9
    monkeypatch.setattr(sublayers, "FEW_EVENTS", few)


def model_of(tokens=(), dtype=torch.float32, **transformer) -> UserModel:
    torch.manual_seed(1)
    encoder = Transformer(**transformer)
    model = UserModel(50, ModelConfig(width=24, max_len=70, encoder=encoder, tokens=list(tokens)))
    for parameter in model.parameters():  # weights under which attention is not uniform
        nn.init.normal_(parameter, std=0.4)
    return model.to(dtype)


def histories(lengths=LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(50, (length,), generator=generator).tolist() for length in lengths]


def both(model: UserModel, batch):
    return model.ask(batch), model.next_item_query(model.encode(batch))


@pytest.mark.parametrize("patch", [{}, {"patch": 3}, {"patch": 3, "patch_form": "parallel"}])
@pytest.mark.parametrize("causal, tokens", [(True, []), (True, ["ur"]), (False, ["cls", "sep"])])
@pytest.mark.parametrize("form", FORMS)
def test_asked_states_are_those_of_the_whole_batch(form, causal, tokens, patch):
    """The one layer that is shortened, and one behind another; float64."""
    for layers in (1, 3):
        settings = FORMS[form] | dict(causal=causal, layers=layers, **patch)
        model = model_of(tokens, torch.float64, **settings)
        asked, whole = both(model, model.inputs_of(histories(), ask=True))
        torch.testing.assert_close(asked, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_rounding_is_that_of_float32(form):
    model, settings = model_of(**FORMS[form], causal=True), FORMS[form]
    batch = model.inputs_of(histories(), ask=True)
    asked, whole = both(model, batch)
    exact = model_of(dtype=torch.float64, **settings, causal=True)
    exact.load_state_dict(model.state_dict())
    right = exact.ask(batch)
    budget = 2 * (whole.double() - right).abs().max() + 1e-6 * right.abs().max()
    assert (asked.double() - right).abs().max() <= budget


@pytest.mark.parametrize("causal", [True, False])
# The gates of LiGR are plain PyTorch, whose sigmoid rounds the end of a tensor otherwise.
@pytest.mark.parametrize("form", [form for form in FORMS if form != "ligr"])
def test_bits_do_not_depend_on_the_batch(form, causal):
    """Who is asked about beside others has the state of who is asked alone."""
    model = model_of(**FORMS[form], causal=causal)
    known = histories()

    def states(order):
        batch = model.inputs_of([known[i] for i in order], ask=True)
        return model.encoder(model.item_input(batch), batch, rows=batch.offsets[1:] - 1)

    whole = states(range(12))
    for order in ([2], [0], [5, 2], list(range(6, 12)), list(range(11, -1, -1))):
        assert torch.equal(states(order), whole[order]), order


PROJECTIONS = [("sasrec", "key_value"), ("sasrec", "query")] + [
    (form, "query_key_value") for form in FORMS if form != "sasrec"
]


@pytest.mark.parametrize("form, name", PROJECTIONS)
def test_hooked_modules_are_called(form, name):
    """Somebody's own projection is not read past."""
    model = model_of([], torch.float64, **FORMS[form], causal=True)
    layer = model.encoder.layers[-1]
    batch = model.inputs_of(histories(), ask=True)
    before = model.ask(batch)
    getattr(layer, name).register_forward_hook(lambda module, inputs, output: 2 * output)
    asked, whole = both(model, batch)
    torch.testing.assert_close(asked, whole, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(asked, before)


def test_other_encoders_and_autocast():
    torch.manual_seed(1)
    recurrent = UserModel(50, ModelConfig(width=24, max_len=70, encoder=Gru()))
    assert torch.equal(*both(recurrent, recurrent.inputs_of(histories(), ask=True)))
    model = model_of(causal=True, pre_norm=True)
    batch = model.inputs_of(histories(), ask=True)
    whole = model.next_item_query(model.encode(batch))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model.ask(batch)
    assert low.dtype == torch.float32
    assert (low - whole).abs().max() < 0.05 * whole.abs().max()


def test_no_sequence_and_dropout():
    model = model_of(causal=True)
    assert model.ask(model.inputs_of([], ask=True)).shape == (0, 24)
    batch = model.inputs_of(histories(), ask=True)
    with pytest.raises(ValueError, match="give rows or rng, not both"):
        model.encoder(model.item_input(batch), batch, Rng(1, 2), batch.offsets[1:] - 1)
