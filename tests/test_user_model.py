# SPDX-License-Identifier: Apache-2.0
"""The user model: what it reads, whom it is asked about, and how it is kept."""

import json
import os
import re
from dataclasses import dataclass, replace

import pytest
import torch
from builders import dataset_of, jagged, model_of, six_users
from torch import nn
from torch.nn.utils import parametrizations

from fastrec.data.batch import from_sequences
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.model_config import ModelConfig, num_parameters
from fastrec.nn.model_files import write_digests
from fastrec.nn.pool import Encoded
from fastrec.nn.user_model import UserModel
from fastrec.random import Rng

MASK, CLS, SEP, UR = 20, 21, 22, 23


def lists(batch) -> list[list[int]]:
    return [part.tolist() for part in batch.values.split(batch.lengths.tolist())]


@pytest.mark.parametrize(
    "tokens, causal, plain, asked",
    [
        ([], False, [3, 4, 5, 6], [4, 5, 6, MASK]),
        (["sep", "cls"], False, [CLS, 3, 4, 5, 6, SEP], [CLS, 4, 5, 6, MASK, SEP]),
        (["ur", "cls"], False, [CLS, 3, 4, 5, 6, UR], [CLS, 4, 5, 6, MASK, UR]),
        (
            ["cls", "ur", "sep"],
            False,
            [CLS, 3, 4, 5, 6, SEP, UR],
            [CLS, 4, 5, 6, MASK, SEP, UR],
        ),
        ([], True, [3, 4, 5, 6], [3, 4, 5, 6]),
        (["ur"], True, [3, 4, 5, 6, UR], [3, 4, 5, 6, UR]),
    ],
)
def test_inputs_hold_the_last_items_and_the_tokens(tokens, causal, plain, asked):
    """max_len counts items; the [MASK] that asks takes the place of one."""
    model = model_of(max_len=4, tokens=tokens, causal=causal)
    data = dataset_of([[9, 1, 2, 3, 4, 5, 6], [7]], 20)
    around = [token for token in plain if token >= MASK]
    for ask, long, short in (
        (False, plain, [token for token in around if token == CLS] + [7]),
        (True, asked, [token for token in around if token == CLS] + [7]),
    ):
        short = short + [MASK] * (ask and not causal) + [t for t in around if t != CLS]
        batch = model.inputs(data, [0, 1, 0], "all", ask=ask)
        assert lists(batch) == [long, short, long]
        assert batch.keys.tolist() == [0, 1, 0]
        assert batch.max_seq_len >= max(map(len, (long, short)))
        assert max(map(len, (long, short))) <= model.max_positions == 4 + len(tokens)
        model.encode(batch)
        given = model.inputs_of([[9, 1, 2, 3, 4, 5, 6], [7], [3, 4, 5, 6]], ask=ask)
        assert lists(given) == [long, short, long]
        assert given.keys.tolist() == [0, 1, 2]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("split", ["train", "valid", "test", "all"])
def test_inputs_of_histories_are_inputs_of_a_data_set(split, causal):
    model, data = model_of(tokens=[] if causal else ["cls", "sep"], causal=causal), six_users()
    hidden = {"train": 2, "valid": 2, "test": 1, "all": 0}[split]
    histories = [data.gather([user], "all").values.tolist() for user in range(6)]
    histories = [history[: len(history) - hidden] for history in histories]
    for ask in (False, True):
        ours, theirs = (
            model.inputs(data, range(6), split, ask=ask),
            model.inputs_of(histories, ask=ask),
        )
        assert torch.equal(ours.values, theirs.values)
        assert torch.equal(ours.offsets, theirs.offsets)
        assert torch.equal(model.encode(ours).states, model.encode(theirs).states)


def test_a_model_that_could_not_be_read_again_is_not_written(tmp_path):
    model = model_of()
    parametrizations.weight_norm(model.encoder.layers[0].ffn_inner)
    with pytest.raises(ValueError, match="the model is not what its config makes"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@dataclass(frozen=True)
class Valued:
    """Settings of an encoder that asks values of tensors where it is made."""

    causal: bool = True

    def build(self, width, max_positions, dropout):
        made = Bag(width, float(torch.arange(3).sum()))
        made.wrapped = parametrizations.weight_norm(nn.Linear(2, 2))
        return made


def test_an_encoder_of_ones_own_is_written_whatever_it_is_made_of(tmp_path):
    model = UserModel(20, ModelConfig(width=8, max_len=6, encoder=Valued()))
    model.save_pretrained(tmp_path)
    again = UserModel.from_pretrained(tmp_path, encoder=Valued())
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())


def test_one_history_is_not_taken_for_several():
    with pytest.raises(TypeError, match="histories are lists of item indices, one of each user: "):
        model_of().inputs_of([1, 2, 3])


def test_histories_that_cannot_be_read():
    model = model_of()
    assert len(model.inputs_of([])) == 0 and lists(model.inputs_of([[]], ask=True)) == [[MASK]]
    for bad in (-1, 20):
        with pytest.raises(IndexError, match=rf"item {bad} of a history is out of \[0, 20\)"):
            model.inputs_of([[3], [4, bad]])
    causal = model_of(causal=True)
    with pytest.raises(ValueError, match="sequence 1 is empty: a causal model has nothing to go"):
        causal.inputs_of([[3], []], ask=True)
    assert lists(causal.inputs_of([[3], []])) == [[3], []]  # nobody is asked
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        causal.inputs(dataset_of([[3], []], 20), [0, 1], "all", ask=True)


def test_event_columns_follow_their_items():
    """Tokens have no target and a 0 in the columns of others; users' columns stay."""
    model = model_of(max_len=3, tokens=["cls", "sep"])
    batch = from_sequences([[1, 2, 3, 4], [5]])
    batch.events["target"] = torch.tensor([11, 12, 13, -100, 15])
    batch.events["time"] = torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5]])
    batch.users["age"] = torch.tensor([30, 40])
    framed = model.frame(batch, ask=True)
    assert lists(framed) == [[CLS, 3, 4, MASK, SEP], [CLS, 5, MASK, SEP]]
    assert framed.events["target"].tolist() == [
        *(-100, 13, -100, -100, -100),
        *(-100, 15, -100, -100),
    ]
    time = torch.tensor([0, 0.3, 0.4, 0, 0, 0, 0.5, 0, 0]).unsqueeze(1)
    assert torch.equal(framed.events["time"], time)
    assert framed.users["age"].tolist() == [30, 40]
    assert batch.values.tolist() == [1, 2, 3, 4, 5]  # the input stays as it is


@pytest.mark.parametrize(
    "tokens, causal",
    [
        ([], False),
        (["cls", "sep"], False),
        (["ur"], False),
        (["cls", "sep", "ur"], False),
        ([], True),
        (["ur"], True),
    ],
)
@pytest.mark.parametrize("transform", [False, True])
def test_the_query_is_that_of_the_mask_or_of_the_last_item(tokens, causal, transform):
    model = model_of(tokens=tokens, causal=causal, head_transform=transform)
    batch = model.inputs_of([[3, 1, 4, 1, 5], [9], list(range(15))], ask=True)
    encoded = model.encode(batch)
    rows = []
    for end, length in zip(batch.offsets[1:].tolist(), batch.lengths.tolist(), strict=True):
        values = batch.values[end - length : end].tolist()
        at = [i for i, v in enumerate(values) if (v < MASK if causal else v == MASK)][-1]
        rows.append(encoded.states[end - length + at])
    states = torch.stack(rows)
    head = model.item_head
    expected = head.norm(torch.nn.functional.gelu(head.dense(states))) if transform else states
    torch.testing.assert_close(model.next_item_query(encoded), expected)
    if causal:
        assert torch.equal(states, model.pool(encoded, "last"))


def test_the_query_has_the_type_of_the_table_whatever_the_states_have():
    model = model_of(head_transform=False)
    encoded = model.encode(model.inputs_of([[3, 1], [4]], ask=True))
    low = Encoded(encoded.batch, encoded.states.bfloat16())
    query = model.next_item_query(low)
    assert query.dtype == model.item_table.dtype == torch.float32
    torch.testing.assert_close(query, model.next_item_query(encoded), rtol=2**-7, atol=2**-7)


def test_a_causal_state_sees_the_past_alone_and_others_see_all():
    for causal in (True, False):
        model = model_of(causal=causal, layers=2)
        long, short = (model.encode(from_sequences([s])).states for s in ([1, 2, 3, 4], [1, 2, 3]))
        assert torch.allclose(long[:3], short, atol=1e-6) == causal


def test_configurations_that_cannot_be():
    for wrong, message in (
        (dict(width=0), r"model\.width must be at least 1, got 0"),
        (dict(max_len=0), r"model\.max_len must be at least 1, got 0"),
        (dict(dropout=1.0), r"model\.dropout must be in \[0, 1\), got 1\.0"),
        (dict(tokens=["mask"]), r"tokens must be one of \['cls', 'sep', 'ur'\], got 'mask'"),
        (dict(tokens=["cls", "cls"]), r"model\.tokens must be some of"),
        (dict(tokens=["cls"], encoder=Transformer(causal=True)), r"\[CLS\] stands first"),
        (dict(tokens=["sep"], encoder=Transformer(causal=True)), r"\[SEP\] stands last"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig(**wrong)
    config = ModelConfig(tokens=["ur", "sep", "cls"])
    assert config.tokens == ["cls", "sep", "ur"] and not config.causal
    assert ModelConfig(encoder=Transformer(causal=True)).causal


class Bag(nn.Module):
    """An encoder of one's own: the mean of what an event and those before it are."""

    def __init__(self, width: int, scale: float):
        super().__init__()
        self.linear, self.scale = nn.Linear(width, width), scale

    def forward(self, embedded, batch, rng=None):
        x, place = self.linear(embedded.dense()) * self.scale, batch.positions()
        total = x.cumsum(0)
        starts = torch.arange(len(x)) - place
        before = torch.cat([x.new_zeros(1, x.shape[1]), total])[starts]
        return (total - before) / (place + 1).unsqueeze(1)


@dataclass(frozen=True)
class BagSettings:
    scale: float = 1.0
    causal: bool = True

    def build(self, width, max_positions, dropout):
        assert (width, max_positions, dropout) == (8, 6, 0.25)
        return Bag(width, self.scale)


def test_an_encoder_of_ones_own(tmp_path):
    """It is asked as its `causal` says, and is loaded with its settings."""
    own = BagSettings(2.0)
    model = UserModel(20, ModelConfig(width=8, max_len=6, dropout=0.25, encoder=own))
    assert model.config.encoder is own and model.config.causal
    batch = model.inputs_of([[3, 1], list(range(9))], ask=True)
    assert lists(batch) == [[3, 1], [3, 4, 5, 6, 7, 8]]
    encoded = model.encode(batch, Rng(0, 0))
    vectors = 2.0 * model.encoder.linear(model.item_embedding.weight)
    expected = [vectors[[3, 1]].mean(0), vectors[3:9].mean(0)]
    torch.testing.assert_close(model.pool(encoded, "last"), torch.stack(expected))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the encoder is test_user_model\.BagSettings: give"):
        UserModel.from_pretrained(tmp_path)
    again = UserModel.from_pretrained(tmp_path, own)
    assert again.config == model.config
    assert torch.equal(again.encode(batch).states, model.encode(batch).states)


@pytest.mark.parametrize("tokens, causal", [(["cls", "sep"], False), (["ur"], True)])
def test_save_and_load(tmp_path, tokens, causal):
    model = model_of(
        num_items=11, tokens=tokens, causal=causal, heads=4, ffn_width=12, patch=3, norm_eps=1e-6
    )
    model.save_pretrained(tmp_path / "m")
    again = UserModel.from_pretrained(tmp_path / "m")
    assert again.config == model.config and again.num_items == 11
    assert again.config.encoder.transformer.ffn_width == 12
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    batch = jagged([3, 5], num_items=11)
    assert torch.equal(again.encode(batch).states, model.encode(batch).states)


def test_broken_model_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        UserModel.from_pretrained(tmp_path)
    model_of(num_items=11).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    encoder = {"transformer": {**whole["encoder"]["transformer"], "depth": 1}}
    for change, message in (
        ({"format": 1}, "config.json: unknown format version 1, expected 3"),
        ({"num_items": "11"}, "config.json: num_items must be a whole number above 0, got '11'"),
        ({"wdith": 8}, "config.json: model.wdith is no key; model has width"),
        ({"encoder": {"rnn": {}}}, "config.json: model.encoder.rnn is no key"),
        ({"encoder": encoder}, "config.json: model.encoder.transformer.depth is no key"),
        (
            {"width": 16},
            "config.json: it describes a model of 4027 numbers, model.saf",
        ),
        ({"max_len": 10**15}, "config.json: it describes a model of 80000000000"),
        ({"dropout": "0.3"}, "config.json: model.dropout is '0.3', expected 0.3"),
        ({"tokens": None}, "config.json: model.tokens is None, expected []"),
    ):
        path.write_text(json.dumps(whole | change))
        write_digests(tmp_path)  # as if it had been saved like this
        with pytest.raises(ValueError, match=re.escape(message)):
            UserModel.from_pretrained(tmp_path)


def test_a_setting_that_a_saved_model_does_not_name_has_its_default(tmp_path):
    """It was saved before fastrec had the setting."""
    model_of(num_items=11).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["head_bias"], values["encoder"]["transformer"]["layer"]
    path.write_text(json.dumps(values))
    write_digests(tmp_path)
    again = UserModel.from_pretrained(tmp_path)
    assert again.config == model_of(num_items=11).config and again.item_head.bias.requires_grad
    values["encoder"]["transformer"]["norm_eps"] = "1e-05"  # not as it was written
    path.write_text(json.dumps(values))
    write_digests(tmp_path)
    with pytest.raises(ValueError, match=r"model\.encoder is .*'1e-05'.*, expected "):
        UserModel.from_pretrained(tmp_path)


def test_without_a_bias_of_items_it_stays_zero(tmp_path):
    model = model_of(num_items=11, head_transform=False, head_bias=False)
    batch = model.inputs_of([[3, 1], [4]], ask=True)
    query, targets = model.next_item_query(model.encode(batch)), torch.tensor([5, 6])
    loss = model.item_head.loss(query, model.item_table, targets)
    expected = nn.functional.cross_entropy(query @ model.item_table.T, targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.item_head.bias.grad is None and not model.item_head.bias.requires_grad
    model.save_pretrained(tmp_path)
    again = UserModel.from_pretrained(tmp_path)
    assert not again.item_head.bias.requires_grad and not again.item_head.bias.any()


def test_biases_of_items_start_where_they_are_told_and_are_trained():
    model = model_of(num_items=11, head_bias_start=-2.5)
    assert torch.equal(model.item_head.bias, torch.full((11,), -2.5))
    query, targets = torch.randn(3, 8), torch.tensor([5, 6, 5])
    model.item_head.loss(query, model.item_table, targets).backward()
    assert model.item_head.bias.grad.abs().min() > 0
    with pytest.raises(ValueError, match=r"model\.head_bias_start has no effect: head_bias is fal"):
        ModelConfig(head_bias=False, head_bias_start=-1.0)
    with pytest.raises(ValueError, match=r"model\.head_bias_start must be finite, got nan"):
        ModelConfig(head_bias_start=float("nan"))


@pytest.mark.parametrize(
    "tokens, head_transform, encoder",
    [
        ([], True, Transformer()),
        (["cls", "ur"], False, Transformer(layers=3, heads=4, ffn_width=5, patch=3)),
        ([], True, Transformer(layers=1, heads=1, causal=True, pre_norm=True)),
        (["sep"], True, Transformer(pre_norm=True, layer="sasrec", patch=3)),
        ([], False, Transformer(layers=3, pre_norm=True, layer="ligr", ffn_width=5, patch=2)),
    ],
)
def test_the_size_of_a_model_is_known_before_it_is_made(tokens, head_transform, encoder):
    config = ModelConfig(
        width=12, max_len=7, tokens=tokens, head_transform=head_transform, encoder=encoder
    )
    made = UserModel(11, config)
    assert num_parameters(11, config) == sum(part.numel() for part in made.parameters())
    assert num_parameters(11, replace(config, tokens=[], encoder=BagSettings())) is None


def test_a_saved_model_takes_the_place_of_another_and_of_what_belongs_to_it(tmp_path):
    model_of(num_items=11).save_pretrained(tmp_path)
    (tmp_path / "heads.safetensors").write_text("of the other model")
    model_of(num_items=12).save_pretrained(tmp_path)
    names = {"config.json", "digests.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert UserModel.from_pretrained(tmp_path).num_items == 12
    old = os.umask(0o027)
    try:
        model_of(num_items=12).save_pretrained(tmp_path)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_a_model_of_an_earlier_fastrec_is_read_with_a_warning(tmp_path):
    model_of(num_items=11).save_pretrained(tmp_path)
    (tmp_path / "digests.json").unlink()
    with pytest.raises(ValueError, match=r"digests\.json is missing: the model was saved in part"):
        UserModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 2}))
    with pytest.warns(UserWarning, match="was saved by an earlier fastrec: without digests.json"):
        assert UserModel.from_pretrained(tmp_path).num_items == 11
