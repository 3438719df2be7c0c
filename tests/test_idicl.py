# SPDX-License-Identifier: Apache-2.0
"""The IDICL-like recipe from two windows of a user to attributes and next items."""

import json

import torch
from builders import synthetic
from safetensors.torch import load_file

from fastrec.cli import main
from fastrec.nn.pool import Interests
from fastrec.training.config import Recipe
from fastrec.training.heads_file import saved_scales

SMALL = ["--config=idicl", "--model.width=16", "--model.max_len=12"]


def short(stage: str) -> list[str]:
    keys = {"steps": 4, "validate_every": 2, "batch_size": 100, "warmup_steps": 0}
    return [f"--{stage}.{key}={value}" for key, value in keys.items()]


def test_the_interests_go_from_the_contrast_to_the_attributes(tmp_path):
    data = synthetic(tmp_path)
    flags = [*SMALL, f"--data={data}"]
    main(["pretrain", *flags, *short("pretraining"), f"--output={tmp_path / 'first'}"])
    model, profile = tmp_path / "first" / "model", tmp_path / "profile"
    queries = load_file(model / "heads.safetensors")["contrast.pool.queries"]
    assert queries.shape == (8, 16)
    task = [*flags, "--task=profile", *short("profile"), "--profile.learning_rate=0"]
    main(["finetune", *task, f"--init={model}", f"--output={profile}"])
    found = load_file(profile / "model" / "heads.safetensors")
    assert torch.equal(found["user_attributes.pool.queries"], queries)
    scales = saved_scales(profile / "model")["user_attributes"]
    assert {json.dumps(scale["pool"]) for scale in scales} == {'{"interests": 8}'}
    metrics = tmp_path / "metrics.json"
    main(["evaluate", *task, f"--pretrained={profile / 'model'}", f"--output={metrics}"])
    assert "model" in json.loads(metrics.read_text())["metrics"]
    last = [*flags, *short("recommendation"), f"--init={model}"]
    main(["finetune", *last, f"--output={tmp_path / 'next'}"])


def test_the_recipe_says_what_it_is():
    chosen = Recipe.load("idicl")
    pools = [chosen.pretraining.parts["contrast"].pool]
    pools += [chosen.profile.parts["user_attributes"].pool]
    assert pools == [Interests(8)] * 2 and chosen.model.causal
