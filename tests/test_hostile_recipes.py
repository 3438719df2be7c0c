# SPDX-License-Identifier: Apache-2.0
"""Recipes and flags that nobody means well: a line at once, before memory or time is spent."""

import dataclasses
import math
import time
from typing import get_args, get_type_hints

import pytest

from fastrec import recipes
from fastrec.cli import main
from fastrec.data.attributes import Attribute
from fastrec.data.prepare.synthetic import generate
from fastrec.data.settings import from_values
from fastrec.data.steps.parts import Step
from fastrec.objectives.contrast import Contrast
from fastrec.training.config import Recipe

# Ten lines that stand for ten thousand million values.
BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 11)
)
TEXTS = {
    "bomb": (BOMB, "holds more than 20000 values"),
    "ring": ("a: &a [*a]", "holds more than 20000 values"),
    "deep": ("a: " + "[" * 20_000, "is not YAML"),
    "long": (f"a: [{'x, ' * 20_000}]", "holds more than 20000 values"),
    "digits": ("a: " + "7" * 5000, "is not YAML: Exceeds the limit"),
    "bytes": ("\x00", "is not YAML"),
    "object": ("a: !!python/object/apply:os.system [ls]", "is not YAML: could not determine"),
    "key": ("? {a: 1}\n: 2", "is not YAML"),
    "list": ("[]", "a recipe is a mapping of keys, not list"),
}


def said(arguments: list[str]) -> str:
    start = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    text = str(stopped.value)
    assert text.startswith("fastrec: error: ") and "\n" not in text and len(text) < 1500
    assert time.monotonic() - start < 20
    return text


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_is_no_recipe(tmp_path, name):
    text, expected = TEXTS[name]
    (tmp_path / "r.yaml").write_text(text)
    message = said(["pretrain", f"--config={tmp_path / 'r.yaml'}", "--data=x", "--output=y"])
    assert expected in message and str(tmp_path / "r.yaml") in message


def test_a_bomb_in_a_flag_and_in_the_file_of_another_command(tmp_path):
    flow = "{" + ", ".join(BOMB.strip().split("\n")) + "}"
    message = said(["pretrain", "--config=uprec", f"--model={flow}", "--data=x", "--output=y"])
    assert "model holds more than 20000 values" in message
    (tmp_path / "r.yaml").write_text(f"data: x\npretrained: y\noutput: z.parquet\n{BOMB}")
    said(["embed", f"--config={tmp_path / 'r.yaml'}"])
    said(["sweep", "--config=uprec", "--data=x", "--output=y", "--key=seed", f"--values={flow}"])


def test_references_and_merged_keys_are_read(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: &m {width: 8}\nother: {<<: *m, max_len: 3}\n")
    read = recipes.load(str(file))
    assert read == {"model": {"width": 8}, "other": {"width": 8, "max_len": 3}}


def sections(hint, found: dict) -> dict:
    """Every class of settings that a recipe can name."""
    if dataclasses.is_dataclass(hint) and hint not in found:
        found[hint] = get_type_hints(hint)
        for inner in found[hint].values():
            sections(inner, found)
    for inner in get_args(hint):
        sections(inner, found)
    return found


NUMBERS = [
    pytest.param(kind, name, id=f"{kind.__name__}.{name}")
    for start in (Recipe, Step)
    for kind, hints in sections(start, {}).items()
    for name, hint in hints.items()
    if {int, float} & {hint, *get_args(hint)}
]


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_no_number_is_nan_infinite_or_longer_than_a_word(kind, name):
    whole = {Attribute: {"name": "x"}, Contrast: {"views": ["a", "b"]}}.get(kind, {})
    hint = get_type_hints(kind)[name]
    whole_numbers = (2**63, -(10**30)) if int in (hint, *get_args(hint)) else ()
    for wrong in (math.nan, math.inf, -math.inf, "nan", "1e999", *whole_numbers):
        with pytest.raises(ValueError, match=name):
            from_values(kind, {**whole, name: wrong}, "section")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--attributes=[{name: a, bins: [.nan, 1]}]", "attributes.0.bins.0 is nan, expected"),
        ("--attributes=[{name: a, bins: [2, 1]}]", "attribute 'a': bins must ascend, got [2.0"),
        ("--attributes=[{name: a, bins: []}]", "attribute 'a': bins must ascend, got []"),
        ("--attributes=[{name: a, top: -1}]", "attribute 'a': top must be at least 1, got -1"),
        ("--model.encoder.transformer.layers=1000000", "layers must be at most 255, got 1000000"),
        ("--model.encoder.transformer.ffn_width=0", "ffn_width must be at least 1, got 0"),
        ("--model.encoder.transformer.norm_eps=0", "norm_eps must be positive and finite, got 0"),
        ("--model.width=1000000000000", "GB, this machine has"),
        ("--model.max_len=4000000000000000", "GB, this machine has"),
        ("--pretraining.devices=1000000", "devices must be in [1, 1024] or 'auto', got 1000000"),
        ("--pretraining.init.users=new", "init.users is 'new', expected one of 'same', 'other'"),
    ],
)
def test_a_number_that_no_model_has(tmp_path, wrong, message):
    generate(tmp_path / "data", num_users=20, num_items=10)
    flags = ["--config=uprec", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'run'}"]
    assert message in said(["pretrain", *flags, wrong])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
