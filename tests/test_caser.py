# SPDX-License-Identifier: Apache-2.0
"""The encoder of Caser: equal to torch.nn.Conv2d on explicit windows, the same in any batch."""

import pytest
import torch
from backends import needs
from builders import Known, dataset_of, jagged
from op_db.case import excess
from test_encoder import FIRST, LENGTHS, gradients, take
from torch import nn
from torch.nn import functional as F

from fastrec import recipes
from fastrec.data.negatives import NegativeSampler
from fastrec.data.settings import from_values
from fastrec.data.views import Views
from fastrec.nn.encoders.caser import Caser, CaserEncoder, _Columns, _Largest
from fastrec.nn.items import ItemRows
from fastrec.nn.model_config import ModelConfig, num_parameters
from fastrec.nn.user_model import UserModel
from fastrec.random import Rng, keep_mask
from fastrec.training.config import Recipe

WINDOWS = [1, 2, 5, 7]


def model_of(dropout: float = 0.4, width: int = 16, **caser) -> UserModel:
    torch.manual_seed(0)
    config = ModelConfig(width=width, max_len=70, dropout=dropout, encoder=Caser(**caser))
    return UserModel(50, config)


class Windows(nn.Module):
    """Caser on windows [N, L, D] with the convolutions of torch: o [N, n L + m D]."""

    def __init__(self, encoder: CaserEncoder):
        super().__init__()
        number, length = encoder.vertical.weight.shape[:2]
        width = encoder.output.out_features
        self.across = nn.ModuleList(
            nn.Conv2d(1, len(filters.bias), (height, width))
            for height, filters in enumerate(encoder.horizontal, 1)
        )
        self.down = nn.Conv2d(1, number, (length, 1))
        self.to(encoder.output.weight.dtype)
        pairs = zip([*self.across, self.down], [*encoder.horizontal, encoder.vertical], strict=True)
        with torch.no_grad():
            for convolution, filters in pairs:
                convolution.weight.copy_(filters.weight[:, None])
                convolution.bias.copy_(filters.bias)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        image = windows[:, None]
        found = [F.relu(convolution(image).squeeze(3)).amax(2) for convolution in self.across]
        return torch.cat([*found, self.down(image).flatten(1)], 1)


def windows_of(x: torch.Tensor, offsets: torch.Tensor, length: int) -> torch.Tensor:
    """[T, L, D]: the last items of each event, zeros before the first of its sequence."""
    found = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for event in range(start, end):
            seen = x[max(start, event - length + 1) : event + 1]
            found.append(F.pad(seen, (0, 0, length - len(seen), 0)))
    return torch.stack(found)


@pytest.mark.parametrize("length", WINDOWS)
def test_equals_convolutions_of_torch_on_explicit_windows(length):
    """States, and gradients of the items and of every parameter."""
    encoder = Caser(window=length, horizontal=3, vertical=2).build(6, 70, 0.0).double()
    theirs, batch = Windows(encoder), jagged(LENGTHS)
    x = torch.randn(len(batch.values), 6, dtype=torch.float64, requires_grad=True)
    states = encoder(ItemRows(x, None), batch)
    expected = F.relu(encoder.output(theirs(windows_of(x, batch.offsets, length))))
    torch.testing.assert_close(states, expected)
    up = torch.randn_like(states)
    ours = [x, *(p for f in [*encoder.horizontal, encoder.vertical] for p in f.parameters())]
    found = torch.autograd.grad(states, [*ours, *encoder.output.parameters()], up)
    wanted = torch.autograd.grad(
        expected, [x, *theirs.parameters(), *encoder.output.parameters()], up
    )
    for actual, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, exact.view_as(actual))
        assert actual.abs().max() > 0


def test_filters_start_as_convolutions():
    torch.manual_seed(0)
    encoder = Caser(horizontal=400, vertical=900).build(8, 70, 0.0)
    for filters in [*encoder.horizontal, encoder.vertical]:
        bound = filters.weight[0].numel() ** -0.5
        for parameter in filters.parameters():
            assert 0.95 * bound < parameter.abs().max() <= bound
            assert abs(parameter.std() * 3**0.5 / bound - 1) < 0.1


def test_dropout_is_on_what_the_filters_make():
    model, batch, rng = model_of().double(), jagged(LENGTHS), Rng(5, 7)
    encoder = model.encoder
    features = Windows(encoder)(
        windows_of(model.item_embedding.weight[batch.values], batch.offsets, 5)
    )
    keys, place = batch.keys[batch.segment_ids()], batch.positions()
    width = features.shape[1]
    assert width == 16 * 5 + 4 * 16
    keep, scale = keep_mask(rng, 0.4, keys, place, width, site="ffn_inner")
    states = model.encode(batch, rng).states
    torch.testing.assert_close(states, F.relu(encoder.output(features * keep * scale)))
    assert not torch.equal(states, model.encode(batch).states)


@needs("cpp", "linear")
def test_bits_do_not_depend_on_the_batch():
    model = model_of(width=24)
    batch, rng = jagged(LENGTHS, first_id=FIRST), Rng(2**40 + 3, 7)
    whole = model.encode(batch, rng).states
    for order in ([2], [1], [12, 6], [0, 1, 2, 3, 4, 5], list(range(12, -1, -1))):
        part, events = take(batch, order)
        assert torch.equal(model.encode(part, rng).states, whole[events]), order


@needs("cpp", "linear")
def test_an_item_is_seen_by_the_window_behind_it_and_by_no_other_sequence():
    model, batch = model_of(width=24), jagged([9, 7, 3])
    whole = model.encode(batch).states
    batch.values[9] = (batch.values[9] + 1) % 50  # the first item of the second sequence
    changed = (model.encode(batch).states != whole).any(1)
    assert changed.nonzero().flatten().tolist() == [9, 10, 11, 12, 13]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 1]])
def test_nothing_or_next_to_nothing(lengths):
    model, batch = model_of(), jagged(lengths)
    states = model.encode(batch, Rng(0, 0)).states
    assert states.shape == (sum(lengths), 16)
    states.sum().backward()
    assert model.encoder.output.weight.grad.isfinite().all()


def test_of_equal_maxima_the_first_gets_the_gradient():
    products = torch.tensor([[1.0, 0.0], [5.0, 0.0], [5.0, 0.0]])[:, [0, 0, 1]].requires_grad_()
    top = _Largest.apply(products, 2, 1)
    (grad,) = torch.autograd.grad(top[1, 0], products)
    assert top.shape == (2, 2) and grad[:, 0].tolist() == [0.0, 1.0, 0.0]


def test_second_derivatives():
    rows, weight = torch.randn(9, 3).double(), torch.randn(2, 4).double()
    products = torch.randn(7, 12).double()
    for leaf in (rows, weight, products):
        leaf.requires_grad_()
    assert torch.autograd.gradgradcheck(_Columns.apply, (rows, weight))
    assert torch.autograd.gradgradcheck(lambda p: _Largest.apply(p, 3, 2).square(), (products,))


def test_float32_encoder_is_within_its_budget():
    """States and gradients against float64, beside torch's own error."""
    encoder, batch = Caser().build(32, 70, 0.0), jagged(LENGTHS)
    x, up = torch.randn(len(batch.values), 32), torch.randn(len(batch.values), 32)

    def grads(dtype, states_of):
        leaf = x.detach().to(dtype).requires_grad_()
        states = states_of(leaf)
        return states, *torch.autograd.grad(states, leaf, up.to(dtype))

    def by_torch(leaf):
        own = encoder.to(leaf.dtype)
        return F.relu(own.output(Windows(own)(windows_of(leaf, batch.offsets, 5))))

    actual = grads(torch.float32, lambda x: encoder(ItemRows(x, None), batch))
    low, exact = grads(torch.float32, by_torch), grads(torch.float64, by_torch)
    for one, torchs, truth in zip(actual, low, exact, strict=True):
        error, budget = excess(one, torchs, truth)
        assert error <= budget


def test_autocast_sums_in_float32():
    """Products are bfloat16, what is made of them is not."""
    model, batch = model_of(dropout=0.0), jagged(LENGTHS)
    exact = model.encode(batch).states
    with torch.autocast("cpu", torch.bfloat16):
        low = model.encode(batch).states
        products = torch.randn(9, 30).bfloat16()
        assert _Largest.apply(products, 3, 5).dtype == torch.float32
    assert 0 < (low.float() - exact).norm() < 2**-6 * exact.norm()


def test_nothing_waits_for_a_value():
    """Tensors without values: forward, backward and every gradient."""
    model, batch = model_of().to("meta"), jagged(LENGTHS).to("meta")
    states = model.encode(batch, Rng(5, 7)).states
    states.sum().backward()
    assert states.shape == (sum(LENGTHS), 16) and states.device.type == "meta"
    for parameter in (*model.encoder.parameters(), model.item_embedding.weight):
        assert parameter.grad.shape == parameter.shape


def test_compiled_without_graph_break():
    model, rng = model_of(), Rng(5, 7)

    def states_of(batch):
        return model.encode(batch, rng).states

    torch._dynamo.reset()
    compiled = torch.compile(states_of, fullgraph=True, backend="aot_eager")
    batch = jagged(LENGTHS)
    expected, actual = states_of(batch), compiled(batch)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    wanted, found = gradients(model, expected), gradients(model, actual)
    assert wanted.keys() == found.keys() and len(found) > 12
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_recipe_is_the_model_and_the_loss_of_the_paper():
    """Three targets a window, score W' . [z; user] + b', binary cross-entropy with 3 negatives."""
    chosen = from_values(Recipe, recipes.load("caser"))
    torch.manual_seed(0)
    sequences = torch.randint(40, (4, 7)).tolist()
    dataset, stage = dataset_of(sequences, 40), chosen.pretraining
    model, side = UserModel(40, chosen.model, num_users=4), Known(dataset, split="all")
    torch.nn.init.normal_(model.item_head.users.weight)
    (objective,) = (part.build(model, side) for part in stage.parts.values())
    views = Views(stage.views, model.frame, side, chosen.model.max_len)
    shard = side.shard._replace(users=torch.arange(4).numpy())
    batch = views(side.gather(range(4)), Rng(1, 2), shard)["main"]
    encoded = model.encode(batch)
    loss, count = objective(model, Rng(1, 2), encoded)["item"]
    losses, head, event = [], model.item_head, 0
    draws, x = NegativeSampler.uniform(40), model.item_embedding.weight
    for user, items in enumerate(sequences):
        for place in range(6):
            seen = x[items[max(0, place - 4) : place + 1]]
            features = Windows(model.encoder)(F.pad(seen, (0, 0, 5 - len(seen), 0))[None])
            z = F.relu(model.encoder.output(features))[0]
            torch.testing.assert_close(encoded.states[event], z)
            query = torch.cat([z, head.users.weight[user]])
            for number, y in enumerate(items[place + 1 : place + 4]):
                spot = torch.tensor([3 * place + number])
                drawn = draws.own(3, Rng(1, 2), torch.tensor([user]), spot)[0]
                scores = head.table.weight @ query + head.bias
                missed = scores[drawn[drawn != y]].sigmoid()
                losses.append(-(scores[y].sigmoid().log() + (1 - missed).log().sum()) / 4)
            event += 1
    assert int(count) == len(losses) == 4 * (3 * 4 + 2 + 1)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_parameters_are_counted_before_they_are_made():
    for settings in (Caser(), Caser(window=1), Caser(window=7, horizontal=3, vertical=2)):
        model = UserModel(50, ModelConfig(width=16, encoder=settings))
        assert num_parameters(50, model.config) == sum(p.numel() for p in model.parameters())


def test_a_saved_model_reads_back(tmp_path):
    model, batch = model_of(window=4, vertical=1), jagged([3, 5])
    model.save_pretrained(tmp_path)
    again = UserModel.from_pretrained(tmp_path)
    assert again.config == model.config and again.config.causal
    assert torch.equal(again.encode(batch).states, model.encode(batch).states)


def test_errors_name_the_problem():
    for name in ("window", "horizontal", "vertical"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Caser(**{name: 0})
    with pytest.raises(ValueError, match="window must be at most 64, got 65"):
        Caser(window=65)
    with pytest.raises(
        ValueError, match="window is 9, the model reads 8 events: filters would see"
    ):
        UserModel(50, ModelConfig(width=16, max_len=8, encoder=Caser(window=9)))
