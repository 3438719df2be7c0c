# SPDX-License-Identifier: Apache-2.0
"""What a recipe is written in: bases, keys, flags, and the one line that says what is wrong."""

from pathlib import Path

import pytest

from fastrec import recipes
from fastrec.cli import main
from fastrec.data.settings import from_values
from fastrec.training.config import Recipe


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_short_and_says_what_it_is(name):
    text = recipes.path(name).read_text()
    assert len(text.splitlines()) <= 30
    summary = recipes.summary(name)
    assert 20 < len(summary) <= 110 and "\n" not in summary and text.startswith("# ")
    stages = from_values(Recipe, recipes.load(name)).stages
    assert ("pretraining" in stages) == (name != "clue-zero")


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", r"the key 'seed' \(line 2\) stands twice"),
        ("pretraining: {steps: 4}\nseed: 1\npretraining: {seed: 2}\n", "'pretraining' .line 3"),
        ("pretraining:\n  steps: 4\n  batch_size: 2\n  steps: 5\n", "'steps' .line 4"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        recipes.load(written(tmp_path, "twice.yaml", text))


def test_a_later_config_takes_a_part_of_an_earlier_one_out(tmp_path, capsys):
    later = "pretraining: {objectives: {contrast: null}, views: {a: null, b: null}}\n"
    file = written(tmp_path, "later.yaml", later)
    main(["pretrain", "--config", "cl4srec", "--config", file, "--print_config"])
    assert "contrast" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="takes a part of a base out, and there is none"):
        main(["pretrain", "--config", file, "--config", "cl4srec", "--print_config"])


def test_a_base_is_merged_key_by_key(tmp_path):
    base = written(
        tmp_path, "base.yaml",
        "model: {width: 8, tokens: [cls, sep]}\nseed: 3\n"
        "pretraining:\n  views: {a: [mask: {}], b: [mask: {share: 0.5}]}\n"
        "  objectives: {item: {views: [a, b]}, user_attributes: {views: [a]}}\n",
    )  # fmt: skip
    top = written(
        tmp_path, "top.yaml",
        f"base: {base}\nmodel: {{tokens: [ur]}}\n"
        "pretraining:\n  views: {b: null}\n"
        "  objectives: {item: {views: [a]}, user_attributes: null}\n",
    )  # fmt: skip
    assert recipes.load(top) == {
        "model": {"width": 8, "tokens": ["ur"]}, "seed": 3,
        "pretraining": {
            "views": {"a": [{"mask": {}}], "b": None},
            "objectives": {"item": {"views": ["a"]}, "user_attributes": None},
        },
    }  # fmt: skip
    found = from_values(Recipe, recipes.load(top))
    assert (found.model.width, found.model.tokens, found.seed) == (8, ["ur"], 3)
    assert list(found.pretraining.views) == ["a"] and list(found.pretraining.parts) == ["item"]
    assert recipes.load(base)["model"]["tokens"] == ["cls", "sep"], "the base is left as it is"


def test_an_objective_without_settings_that_is_null_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: sasrec\npretraining: {objectives: {item: {}, friends: }}\n")
    with pytest.raises(ValueError, match=r"objectives\.friends is null, .* it is friends: {}"):
        recipes.load(str(file))


def test_a_base_is_a_recipe_or_a_file_relative_to_the_file(tmp_path, monkeypatch):
    written(tmp_path, "inner/first.yaml", "seed: 1\nusers: {fraction: 0.5}\n")
    written(tmp_path, "inner/second.yaml", "base: first.yaml\nseed: 2\n")
    last = written(tmp_path, "last.yaml", "base: inner/second.yaml\nusers: {seed: 9}\n")
    monkeypatch.chdir(tmp_path / "inner")
    assert recipes.load(last) == {"seed": 2, "users": {"fraction": 0.5, "seed": 9}}
    mine = written(tmp_path, "mine.yaml", "base: cl4srec\npretraining: {steps: 250}\n")
    assert recipes.load(mine)["pretraining"]["views"].keys() == {"main", "a", "b"}
    assert recipes.load(mine)["pretraining"]["steps"] == 250


def test_a_base_that_is_itself_or_nothing_is_named(tmp_path):
    one = written(tmp_path, "one.yaml", "base: two.yaml\n")
    written(tmp_path, "two.yaml", "base: one.yaml\n")
    with pytest.raises(ValueError, match=r"one.yaml is its own base: .*one.yaml -> .*two.yaml ->"):
        recipes.load(one)
    lost = written(tmp_path, "lost.yaml", "base: uprek\n")
    with pytest.raises(FileNotFoundError, match="'uprek' is neither a file nor a recipe; the reci"):
        recipes.load(lost)


# A recipe, what is changed in it, and the one line that says why it is wrong.
WRONG = [
    ("uprec-mip", "views: {main: [masc: {}]}", "pretraining.views.main.0.masc is no key; pret"),
    ("uprec-mip", "views: {main: [mask: {shar: 1}]}", "pretraining.views.main.0.mask.shar is no "),
    ("uprec-mip", "views: {main: [mask: {share: a}]}", "main.0.mask.share is 'a', expected a num"),
    ("uprec-mip", "views: {main: [mask: {exact: 1}]}", "exact is 1, expected true or false"),
    ("uprec-mip", "views: {main: [mask: {share: 2}]}", "main.0.mask.share must be in [0, 1], got"),
    ("uprec-mip", "views: {main: [{}]}", "pretraining.views.main.0: step names none: one of ['"),
    ("uprec-mip", "views: {main: [mask: ]}", "pretraining.views.main.0: step names none: one of"),
    ("uprec-mip", "views: {main: [{mask: {}, crop: {}}]}", "main.0: step names mask and crop: on"),
    ("uprec-mip", "views: {main: [mask]}", "views.main.0 is 'mask', expected a group of keys: m"),
    ("uprec-mip", "views: [mask: {}]", "pretraining.views is [{'mask': {}}], expected a mapping"),
    ("uprec-mip", "views: {main: {mask: {}}}", "main is {'mask': {}}, expected a list"),
    ("cl4srec", "views: {a: [one_of: [mask: {}]]}", "pretraining.views.a.0.one_of has 1 steps, "),
    ("cl4srec", "views: {a: [one_of: [crop: {keep: 0}, mask: {}]]}", "0.one_of.0.crop.keep must"),
    ("cl4srec", "views: {a: [one_of: [crap: {}, mask: {}]]}", "views.a.0.one_of.0.crap is no key"),
    ("cl4srec", "views: {a: [crop: {keep: {start: 1}}]}", "views.a.0.crop.keep.end is missing"),
    ("cl4srec", "views: {a: [crop: {keep: x}]}", "0.crop.keep is 'x', expected a number or a gr"),
    ("cl4srec", "views: {a: [fill: {among: 0}]}", "pretraining.views.a.0.fill.among must be at le"),
    ("cl4srec", "views: {a: [window: {}]}", "views.a.0.window.share and window.count: exactly o"),
    ("cl4srec", "objectives: {contrast: {pool: top}}", "contrast.pool is 'top', expected one of '"),
    ("cl4srec", "objectives: {contrast: {pool: {interests: 1}}}", "pool.interests must be at lea"),
    ("cl4srec", "filler: run", "pretraining.filler has no effect: no view has the step fill"),
    ("cl4srec", "views: {a: [any_of: [mask: {}]]}", "pretraining.views.a.0.any_of has 1 steps, e"),
    ("cl4srec", "views: {a: [mask: {round: up}]}", "mask.round has no effect: mask.exact is false"),
    ("cl4srec", "views: {a: [reorder: {share: 0}]}", "a.0.reorder.share must be in (0, 1], got"),
    ("sasrec", "views: {main: [next_item: {ahead: 0}]}", "next_item.ahead must be at least 1"),
    ("uprec-mip", "views: {main: [mask_last: {number: 0}]}", "mask_last.number must be at least 1"),
    ("uprec", "views: {main: [friend: {hops: 3}, mask: {}]}", "friend.hops is 3, expected one of"),
    ("uprec-mip", "objectives: {itm: {}}", "pretraining.objectives.itm is no key; pretraining.ob"),
    ("uprec-mip", "objectives: {item: {los: bce}}", "pretraining.objectives.item.los is no key;"),
    ("coserec", "views: {a: [substitute: {share: 2}]}", "a.0.substitute.share must be in (0, 1], "),
    ("coserec", "views: {a: [insert: {share: 0}]}", "views.a.0.insert.share must be in (0, 1], go"),
    ("coserec", "views: {a: [crop: {least: 0}]}", "views.a.0.crop.least must be at least 1, got 0"),
    ("duorec", "views: {b: [same_target: {hops: 1}]}", "same_target.hops is no key; pretraining.v"),
    ("duorec", "objectives: {contrast: {false_negatives: [item]}}", "false_negatives.0 is 'item',"),
    ("duorec", "objectives: {contrast: {candidates: first}}", "contrast.candidates is 'first', ex"),
    ("sasrec", "objectives: {contrast: {}}", "pretraining.objectives.contrast.views is missing"),
    ("sasrec", "objectives: {contrast: {views: [main]}}", "contrast compares two views, got"),
    ("uprec-mip", "steps: many", "pretraining.steps is 'many', expected a whole number"),
    ("uprec-mip", "steps: true", "pretraining.steps is True, expected a whole number"),
    ("uprec-mip", "steps: 0", "pretraining.steps must be at least 1, got 0"),
    ("uprec-mip", "devices: many", "pretraining.devices is 'many', expected a whole number or 'a"),
    ("uprec-mip", "betas: [0.9, 1.0]", "pretraining.betas must be in [0, 1), got [0.9, 1.0]"),
    ("uprec-mip", "betas: 0.9", "pretraining.betas is 0.9, expected a list of 2"),
    ("uprec-mip", "schedule: cosin", "pretraining.schedule is 'cosin', expected one of 'constant'"),
    ("uprec-mip", "init: {take: [itms]}", "pretraining.init.take names 'itms', expected some of"),
    ("uprec-mip", "init: {pool: itm}", "pretraining.init.pool is 'itm', expected one of ['item',"),
    ("uprec-mip", "dropout: 1", "pretraining.dropout must be in [0, 1), got 1.0"),
    # Views that nobody makes or reads.
    ("uprec-mip", "views: {b: [mask: {}]}", "no objective reads the view 'b': it has no effect"),
    ("uprec-mip", "objectives: {item: {views: [b]}}", "reads the view 'b'; views are ['main']"),
    # Keys without effect.
    (
        "uprec-mip", "objectives: {item: {loss: bce}}",
        "pretraining.objectives.item.loss bce needs negatives: set item.sampled",
    ),
    (
        "uprec-mip", "objectives: {item: {sampled: {alpha: 0.5}}}",
        "sampled.alpha has no effect: negatives are uniform (by: popularity uses it)",
    ),
    (
        "uprec-mip", "objectives: {item: {loss: bce, sampled: {log_q: true}}}",
        "sampled.log_q has no effect on the loss bce",
    ),
    (
        "uprec-mip", "objectives: {item: {loss: bce, sampled: {gbce_t: 0.5}}}",
        "sampled.gbce_t has no effect on the loss bce",
    ),
    ("uprec-mip", "init: {take: [items], freeze: [encoder]}", "init.freeze names 'encoder', which"),
    # Training asks what the judge does not, or the other way round.
    (
        "sasrec", "views: {main: [mask: {}]}",
        "pretraining: a causal encoder is asked for the next item at its last item, and trained at"
        " [MASK] alone in ['main']: use next_item, or causal: false",
    ),
    (
        "bert4rec", "views: {main: [next_item: {}]}",
        "pretraining: next_item needs a causal encoder: here every event of the view 'main' would"
        " see the item that it is to predict",
    ),
]  # fmt: skip
# The same for keys outside of the first stage.
OUTSIDE = [
    ("uprec-mip", "pretrainin: {steps: 3}", "pretrainin is no key; a recipe has model, texts"),
    ("uprec-mip", "pretraining: 3", "pretraining is 3, expected a group of keys: views, object"),
    ("uprec-mip", "model: {widht: 3}", "model.widht is no key; model has width, max_len"),
    ("uprec-mip", "model: {width: x}", "model.width is 'x', expected a whole number"),
    ("uprec-mip", "model: {tokens: [cls, foo]}", "model.tokens.1 is 'foo', expected one of 'cls'"),
    ("uprec-mip", "model: {encoder: {transfromer: {}}}", "model.encoder.transfromer is no key; mo"),
    ("uprec-mip", "model: {encoder: {transformer: {layers: 0}}}", "transformer.layers must be at "),
    ("sasrec", "model: {encoder: {transformer: {layer: caser}}}", "transformer.layer is 'caser', "),
    ("bert4rec", "model: {encoder: {transformer: {layer: ligr}}}", "transformer.pre_norm must be "),
    ("uprec-mip", "model: {encoder: {transformer: null}}", "model.encoder: encoders names none: o"),
    ("uprec", "attributes: [{nam: region}]", "attributes.0.nam is no key; attributes.0 has name"),
    ("uprec", "attributes: [{kind: numeric}]", "attributes.0.name is missing"),
    ("uprec", "attributes: [{name: a, range: [1]}]", "attributes.0.range is [1], expected a list "),
    ("uprec", "attributes: [{name: a, range: [2, 1]}]", "attributes.0: attribute 'a': range must "),
    ("uprec", "recommendation: {init: {patch: -1}}", "recommendation.init.patch must not be nega"),
    ("ptum", "model: {encoder: {transformer: {causal: true}}}", "['masked', 'next']: use next_it"),
    ("sasrec", "model: {tokens: [cls]}", "model.tokens: [CLS] stands first and sees nothing unde"),
    ("sasrec", "model: {tokens: [sep]}", "model.tokens: [SEP] stands last and no item sees it un"),
    ("bert4rec", "evaluation: {negatives: 9}", "evaluation.negatives has no effect: candidates is"),
    ("uprec-mip", "evaluation: {seen: exclude}", "evaluation.seen has no effect: sampled candida"),
    ("bert4rec", "evaluation: {seed: 1}", "evaluation.seed has no effect: candidates is full"),
    ("dacf", "evaluation: {seen: exclude}", "evaluation.seen has no effect: no stage ranks items"),
    ("dacf", "evaluation: {cutoffs: [3]}", "evaluation.cutoffs has no effect: no stage ranks"),
    ("dacf", "evaluation: {candidates: sampled}", "evaluation.candidates has no effect: no stage"),
    ("bert4rec", "evaluation: {friend_negatives: 9}", "evaluation.friend_negatives has no effect"),
    ("bert4rec", "users: {seed: 1}", "users.seed has no effect: users.fraction is 1"),
    ("bert4rec", "attributes: [{name: region}]", "attributes has no effect: no stage predicts the"),
    ("uprec", "users: {fraction: 2}", "users.fraction must be in (0, 1], got 2.0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [(name, f"pretraining: {{{text}}}", message) for name, text, message in WRONG] + OUTSIDE,
)
def test_a_wrong_recipe_ends_in_one_line_that_names_the_key(tmp_path, name, text, message):
    file = written(tmp_path, "bad.yaml", f"base: {name}\n{text}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", f"--config={file}", "--data=nowhere", "--output=nowhere"])
    said = str(stopped.value)
    assert said.startswith("fastrec: error: ") and message in said
    assert "\n" not in said and len(said) < 450


def test_attributes_that_tell_who_is_no_negative_have_an_effect(tmp_path):
    text = (
        "base: cl4srec\nattributes: [{name: region}]\n"
        "pretraining: {objectives: {contrast: {false_negatives: [profile]}}}\n"
    )
    chosen = from_values(Recipe, recipes.load(written(tmp_path, "mine.yaml", text)))
    assert chosen.pretraining.objectives.contrast.false_negatives == ["profile"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [", "bad.yaml is not YAML: while parsing a flow node"),
        ("- a\n- b", "bad.yaml: a recipe is a mapping of keys, not list"),
        ("seed", "bad.yaml: a recipe is a mapping of keys, not str"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        recipes.load(written(tmp_path, "bad.yaml", text))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--pretraining.steps=x", "pretraining.steps is 'x', expected a whole number"),
        ("--seed=9223372036854775808", "9223372036854775808, expected a whole number of 64 bits"),
        ("--pretraining.stepps=3", "pretraining.stepps is no key; pretraining has views, obj"),
        ("--pretraining.views.main=[msk: {}]", "pretraining.views.main.0.msk is no key"),
        ("--pretraining.objectives.itm.loss=bce", "pretraining.objectives.itm is no key"),
        ("--pretraining.views=[", "pretraining.views is not YAML: while parsing a flow node"),
        ("--model.width=8.5", "model.width is 8.5, expected a whole number"),
    ],
)
def test_a_wrong_flag_ends_in_one_line_that_names_the_key(flag, message):
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "--config=uprec", flag, "--data=nowhere", "--output=nowhere"])
    assert message in str(stopped.value) and "\n" not in str(stopped.value)
