# SPDX-License-Identifier: Apache-2.0
"""What a stage takes from a model, leaves alone, and puts beside it (PeterRec's model patches)."""

import dataclasses
import json

import pytest
import torch
from builders import dataset_of, jagged, model_of, trained_weights
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastrec.data.dataset import SequenceDataset
from fastrec.data.prepare.synthetic import generate
from fastrec.data.steps.mask import Mask
from fastrec.nn.encoders.dilated import Dilated
from fastrec.nn.encoders.gru import Gru
from fastrec.nn.encoders.sublayers import Patch
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.item_features import ItemFeature
from fastrec.nn.item_parts import Rating
from fastrec.nn.items import Items
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.transfer import PARTS, WHOLE, freeze, take, trained_share
from fastrec.nn.user_model import UserModel
from fastrec.objectives.item import Item
from fastrec.training.fit import fit
from fastrec.training.stage import Init


def other(**config) -> UserModel:
    """A model whose parameters are all different from those of `model_of`."""
    model = model_of(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("parts", [["items"], ["encoder"], ["head", "items"], ["transform"]])
def test_the_parts_that_are_taken_are_copied_and_no_others(parts):
    model, initial = model_of(), other()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taken = take(model, initial, parts)
    prefixes = tuple(prefix for part in parts for prefix in PARTS[part])
    assert taken == [name for name in before if name.startswith(prefixes)]
    for name, value in model.state_dict().items():
        expected = initial.state_dict()[name] if name in taken else before[name]
        assert torch.equal(value, expected), name
    with torch.no_grad():
        initial.item_embedding.weight.zero_()
    assert model.item_embedding.weight.any()  # a copy


def test_what_does_not_fit_is_named_and_nothing_is_copied():
    model, initial = model_of(num_items=20), other(num_items=30)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"items cannot be taken over: item_input\.ids\.weight is \[24, 8\], the model to"
        r" start from has \[34, 8\]; leave items out of init\.take",
    ):
        take(model, initial, ["encoder", "items"])
    with pytest.raises(ValueError, match=r"head cannot .*: item_head\.bias is \[20\], .* \[30\]"):
        take(model, initial, ["encoder", "head"])
    with pytest.raises(
        ValueError, match=r"encoder\.layers\.1\..* the model to start from has nothing"
    ):
        take(model_of(layers=2), initial, ["encoder"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert take(model, initial, ["encoder"])  # of any item set


def test_a_patched_model_starts_as_the_unpatched_one():
    """Bit for bit: x + up(GELU(down(x))) with up = 0."""
    initial, batch = other(layers=2, heads=4), jagged([5, 1, 0, 9], num_items=20)
    model = model_of(layers=2, heads=4, patch=3)
    taken = take(model, initial, list(WHOLE))
    assert set(model.state_dict()) - set(taken) == {
        name for name in model.state_dict() if ".patches." in name
    }
    assert torch.equal(model.encode(batch).states, initial.encode(batch).states)
    patches = [module for module in model.modules() if isinstance(module, Patch)]
    assert len(patches) == 4  # after each of two sublayers
    with torch.no_grad():
        patches[0].up.weight.normal_()
    assert not torch.equal(model.encode(batch).states, initial.encode(batch).states)
    x, patch = torch.randn(3, 8), patches[0]
    expected = x + F.linear(F.gelu(F.linear(x, *patch.down.parameters())), *patch.up.parameters())
    torch.testing.assert_close(patch(x), expected)


def test_parts_that_belong_to_no_list_of_items():
    """From a model of other items: ratings' levels, what joins them, special tokens, the head's
    transform, the vectors of users."""
    parts = dict(items=Items(rating=Rating(width=3)), user_width=2, num_users=5)
    model, initial = model_of(num_items=20, **parts), other(num_items=30, **parts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taken = take(model, initial, ["input", "transform", "users"])
    theirs = initial.state_dict()
    assert torch.equal(model.item_embedding.weight[20:], theirs["item_input.ids.weight"][30:])
    assert torch.equal(model.item_embedding.weight[:20], before["item_input.ids.weight"][:20])
    names = [
        "item_input.levels.rating.weight", "item_input.join.weight", "item_input.join.bias",
        "item_head.dense.weight", "item_head.dense.bias", "item_head.norm.weight",
        "item_head.norm.bias", "item_head.users.weight",
    ]  # fmt: skip
    assert sorted(taken) == sorted([*names, "item_input.ids.weight: special tokens"])
    for name, value in model.state_dict().items():
        if name != "item_input.ids.weight":
            assert torch.equal(value, theirs[name] if name in names else before[name]), name
    freeze(model, ["input", "users"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in names if "input" in name or "users" in name}
    alone = Items(ids=False, combine="sum", features={"text": ItemFeature(width=8)})
    text = {"text": torch.randn(20, 3)}
    special = UserModel(
        20, ModelConfig(width=8, items=alone, head_table="features"), item_features=text
    )
    freeze(special, ["input"])
    assert not special.item_embedding.weight.requires_grad  # it has special tokens alone
    with pytest.raises(ValueError, match="init.take names 'users', and the model has nothing of"):
        take(model_of(), other(), ["users"])


def test_patches_are_taken_from_a_model_that_has_them():
    initial, model = other(patch=3), model_of(patch=3)
    assert take(model, initial, ["encoder"]) == [
        name for name in initial.state_dict() if name.startswith("encoder.")
    ]
    with pytest.raises(ValueError, match=r"patches\.0\.down\.weight is \[2, 8\], .* has \[3, 8\]"):
        take(model_of(patch=2), initial, ["encoder"])


def test_frozen_parts_are_not_trained_but_their_patches_are():
    model = model_of(patch=3)
    freeze(model, ["encoder", "items"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        name
        for name, _ in model.named_parameters()
        if ".patches." in name or name.startswith("item_head.")
    }
    patch = 2 * ((8 * 3 + 3) + (3 * 8 + 8))
    head = 8 * 8 + 8 + 2 * 8 + 20
    assert trained_share(model) == (patch + head, sum(p.numel() for p in model.parameters()))
    extra = torch.nn.Linear(2, 3)
    assert trained_share(model, extra)[0] == patch + head + 9


@pytest.mark.parametrize(
    "encoder, norms",
    [
        (Transformer(layers=2), {f"layers.{i}.ffn_norm" for i in range(2)}),
        (Transformer(pre_norm=True, layer="ligr"), {f"layers.{i}.ffn_norm" for i in range(2)}),
        (Transformer(pre_norm=True, layer="sasrec"), {f"layers.{i}.ffn_norm" for i in range(2)}),
        (Dilated(dilations=[1, 2]), {f"blocks.{i}.norms.1" for i in range(2)}),
    ],
)
def test_the_second_layer_norm_of_each_block_may_be_trained(encoder, norms):
    model = UserModel(20, ModelConfig(width=8, encoder=encoder))
    freeze(model, ["encoder"], second_norm=True)
    trained = {name for name, p in model.encoder.named_parameters() if p.requires_grad}
    assert trained == {f"{norm}.{name}" for norm in norms for name in ("weight", "bias")}
    with pytest.raises(ValueError, match="init.second_norm: GruEncoder has no such LayerNorm"):
        freeze(UserModel(20, ModelConfig(width=8, encoder=Gru())), ["encoder"], second_norm=True)


def test_fine_tuning_with_patches_trains_nothing_else(tmp_path):
    """Through `fit`: after the last step all that was taken is as it was."""
    generate(tmp_path / "data", num_users=30, num_items=20, seed=3)
    data = SequenceDataset.load(tmp_path / "data")
    initial = other(num_items=data.num_items)
    tuned = fit(
        data,
        initial,
        views={"main": [Mask()]},
        objectives={"item": Item()},
        init=Init(freeze=["items", "encoder", "head"], patch=3),
        output=tmp_path / "run",
        steps=2,
        validate_every=2,
        batch_size=8,
        progress=False,
    )
    assert tuned.config.encoder.transformer.patch == 3
    assert tuned.config == dataclasses.replace(initial.config, encoder=tuned.config.encoder)
    trained = trained_weights(tmp_path / "run")
    for name, value in initial.state_dict().items():
        assert torch.equal(trained[f"model.{name}"], value), name
    assert all(value.any() for name, value in trained.items() if name.endswith(".up.weight"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["trained"] == 2 * (8 * 3 + 3 + 3 * 8 + 8)
    assert set(summary["taken"]) == set(initial.state_dict())
    made = json.loads((tmp_path / "run" / "transfer.json").read_text())
    assert made["taken"] == {n: list(value.shape) for n, value in initial.state_dict().items()}
    patches = {n: list(v.shape) for n, v in tuned.state_dict().items() if ".patches." in n}
    assert made["new"] == patches and made["trained"] == list(patches)


def test_the_share_that_is_trained_is_said_before_training(tmp_path, capsys):
    generate(tmp_path / "data", num_users=30, num_items=20, seed=3)
    data = SequenceDataset.load(tmp_path / "data")
    run = dict(views={"main": [Mask()]}, objectives={"item": Item()}, steps=1, batch_size=8)
    init = Init(freeze=["items", "encoder"], patch=3, patch_form="parallel")
    tuned = fit(data, other(num_items=data.num_items), init=init, output=tmp_path / "run", **run)
    assert tuned.config.encoder.transformer.patch_form == "parallel"
    whole = sum(p.numel() for p in tuned.parameters())
    some = sum(p.numel() for n, p in tuned.named_parameters() if ".patches." in n or "head" in n)
    said = capsys.readouterr().out
    assert f"trained: {some:,} of {whole:,} parameters ({some / whole:.1%}); taken over: " in said
    assert said.index("trained:") < said.index("step 0 of 1")
    with pytest.raises(ValueError, match="is serial, the model to start from has patches that are"):
        fit(data, tuned, init=Init(patch=3), **run)
    fit(data, output=tmp_path / "new", **run)
    assert "trained:" not in capsys.readouterr().out
    assert not (tmp_path / "new" / "transfer.json").exists()


def test_a_model_of_other_items_is_refused_before_training():
    """All parts taken, or some: items beyond the model's would be special tokens to it."""
    data = dataset_of([[1, 29, 3, 4, 5]] * 4, 30)
    run = dict(views={"main": [Mask()]}, objectives={"item": Item()}, steps=1, progress=False)
    for init in (Init(), Init(patch=2), Init(take=["items", "encoder"])):
        with pytest.raises(ValueError, match=r"are others or in another order"):
            fit(data, model_of(num_items=20), init=init, **run)
    with pytest.raises(ValueError, match="init freezes or patches a model, or gives it ids"):
        fit(data, init=Init(freeze=["items"]), **run)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match=r"init\.take names 'heads', expected some of \['items'"):
        Init(take=["heads"])
    with pytest.raises(ValueError, match=r"init\.freeze names 'head', which init\.take does not"):
        Init(take=["items"], freeze=["head"])
    with pytest.raises(ValueError, match=r"init\.patch must not be negative, got -1"):
        Init(patch=-1)
    with pytest.raises(ValueError, match="init.patch_form has no effect: init.patch is 0"):
        Init(patch_form="parallel")
    with pytest.raises(ValueError, match="patch_form must be one of"):
        Init(patch=2, patch_form="both")
    with pytest.raises(ValueError, match="second_norm has no effect: init.freeze leaves the enc"):
        Init(second_norm=True)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """(items of a data set, a run of two steps on it from a model)."""
    folder = tmp_path_factory.mktemp("short")
    generate(folder / "data", num_users=30, num_items=20, seed=3)
    data = SequenceDataset.load(folder / "data")
    run = dict(views={"main": [Mask()]}, objectives={"item": Item()}, steps=2, validate_every=2,
               batch_size=8, progress=False, monitor="steps")  # fmt: skip
    return data.num_items, lambda initial, **changes: fit(data, initial, **run | changes)


def test_a_model_that_could_not_be_read_again_is_not_trained(short):
    items, run = short
    initial = other(num_items=items)
    parametrizations.weight_norm(initial.encoder.layers[0].ffn_inner)
    with pytest.raises(ValueError, match=r"its config makes.*ffn_inner\.parametrizations\S+ is \["):
        run(initial)
    initial = other(num_items=items)
    initial.encoder.layers[0].ffn_inner = torch.nn.Sequential(initial.encoder.layers[0].ffn_inner)
    with pytest.raises(ValueError, match=r"ffn_inner\.0\.weight is .*, expected no such tensor"):
        run(initial)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}, {"init": Init(patch=3)}], ids=str)
def test_what_the_caller_has_frozen_stays_so(short, changes):
    items, run = short
    initial = other(num_items=items)
    initial.encoder.requires_grad_(False)
    tuned = run(initial, **changes)
    for name, value in initial.state_dict().items():
        same = torch.equal(tuned.state_dict()[name], value)
        assert same == name.startswith("encoder."), name


def test_a_stage_with_nothing_to_train_is_refused(short):
    items, run = short
    with pytest.raises(ValueError, match=r"nothing is left to train: init.freeze is \['items', "):
        run(other(num_items=items), init=Init(freeze=["items", "encoder", "head"]))
