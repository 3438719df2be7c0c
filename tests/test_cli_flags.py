# SPDX-License-Identifier: Apache-2.0
"""Flags, `--config` and `--help` of the command line, without a run."""

import inspect
import re
from dataclasses import fields

import pytest

from fastrec import recipes
from fastrec.cli import RECIPE_COMMANDS, _recipe_settings, main
from fastrec.cli_help import recipe_keys
from fastrec.data.attributes import Attribute
from fastrec.data.settings import from_values
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.parts import Step
from fastrec.evaluation.protocol import Protocol
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.model_config import ModelConfig
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.item import Item, Sampled
from fastrec.training.config import Recipe, Users
from fastrec.training.stage import Init, Stage
from fastrec.training.sweep import with_value


def test_a_sweep_of_a_switch_and_of_a_step():
    switch = "model.encoder.transformer.pre_norm"
    assert with_value(Recipe(), switch, True).model.encoder.transformer.pre_norm is True
    with pytest.raises(ValueError, match="expected another bool, got 1"):
        with_value(Recipe(), switch, 1)
    with pytest.raises(ValueError, match="expected another float, got True"):
        with_value(Recipe(), "model.dropout", True)
    for key, value in (("pretraining.dropout", "a"), ("pretraining.monitor", 5)):
        with pytest.raises(ValueError, match=rf"{key.split('.')[1]} is {value!r}, expected a"):
            with_value(Recipe(pretraining=Stage()), key, value)
    chosen = Recipe(pretraining=from_values(Stage, recipes.load("uprec")["pretraining"]))
    assert with_value(chosen, "pretraining.dropout", 0).pretraining.dropout == 0.0
    swept = with_value(chosen, "pretraining.views.main.1.mask.share", 1)
    assert [step.part for step in swept.pretraining.views["main"]] == [Friend(), Mask(share=1.0)]
    assert chosen.pretraining.views["main"][1].part == Mask(share=0.2), "it is left as it was"


def test_help_fits_a_screen_and_names_keys_that_exist(capsys):
    known = set(recipe_keys())
    for command in ("pretrain", "finetune", "evaluate", "sweep"):
        main([command, "--help"])
        text = capsys.readouterr().out
        assert len(text.splitlines()) <= 45 and max(map(len, text.splitlines())) <= 110
        assert "SUPPRESS" not in text and "--pretraining.seed" not in text
        own = set(inspect.signature(RECIPE_COMMANDS[command]).parameters) | {"config"}
        named = re.findall(r"^  --([^ ]+) +(.*)$", text, re.MULTILINE)
        assert {"data", "output", "model.width", "STAGE.learning_rate"} <= {n for n, _ in named}
        for name, sentence in named:
            assert (name in known or name in own) and sentence, name


def test_help_all_lists_every_key_of_every_part(capsys):
    main(["pretrain", "--help-all"])
    lines = dict(re.findall(r"^  (?:--)?([\w.]+) +(\S.*)$", capsys.readouterr().out, re.MULTILINE))
    parts = {
        "model": ModelConfig, "model.encoder.transformer": Transformer, "STAGE": Stage,
        "STAGE.init": Init, "STAGE.objectives.item": Item, "STAGE.objectives.item.sampled": Sampled,
        "STAGE.objectives.contrast": Contrast, "STEP": Step, "STEP.mask": Mask,
        "STEP.friend": Friend, "attributes.N": Attribute, "evaluation": Protocol, "users": Users,
    }  # fmt: skip
    for path, kind in parts.items():
        for field in fields(kind):
            assert f"{path}.{field.name}" in lines
    for name in ("pretraining", "seed", "data", "resume"):
        assert name in lines


def test_print_config_is_a_recipe_that_config_reads(tmp_path, capsys):
    main(["pretrain", "--config", "uprec", "--print_config", "--model.width=32", "--seed=4"])
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert "fraction: 0.9" in file.read_text() and "width: 32" in file.read_text()
    changed = recipes.merged(recipes.load("uprec"), {"model": {"width": 32}, "seed": 4})
    assert from_values(Recipe, recipes.load(str(file))) == from_values(Recipe, changed)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.width=24", "--config=uprec-mip"],
        ["--config", "uprec-mip", "--model.width", "24"],
        ["--model.width", "24", "--config", "uprec-mip"],
    ],
)
def test_flags_win_over_config_wherever_they_stand(arguments):
    settings, rest = _recipe_settings([*arguments, "--resume=true"])
    model = from_values(Recipe, settings).model
    assert rest == ["--resume=true"] and model.width == 24 and model.tokens == ["cls", "sep"]


def test_flags_of_lists_replace_and_of_groups_merge():
    """A list is no patch: the first step of a view that is given as a flag is not laid over the
    first step of the recipe."""
    settings, _ = _recipe_settings(
        ["--config=uprec", "--pretraining.views.main=[mask_last: {}]", "--model.tokens=[ur]",
         "--pretraining.objectives={friends: null, user_attributes: {weight: 2}}",
         "--pretraining.learning_rate=1e-4", "--pretraining.learning_rate", "3e-4"]
    )  # fmt: skip
    found = from_values(Recipe, settings)
    assert [step.part for step in found.pretraining.views["main"]] == [MaskLast()]
    assert found.model.tokens == ["ur"] and found.pretraining.learning_rate == 3e-4
    parts = found.pretraining.parts
    assert list(parts) == ["item", "user_attributes"] and parts["user_attributes"].weight == 2.0


def test_recipes_lists_every_recipe(capsys):
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names() and len(lines) >= 7
    for line, name in zip(lines, recipes.names(), strict=True):
        assert line.endswith(recipes.summary(name))
