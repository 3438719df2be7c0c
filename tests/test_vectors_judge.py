# SPDX-License-Identifier: Apache-2.0
"""The judge `vectors`: users found again, and how their vectors lie, against pairs one by one;
and CLUE from the command line, from pre-training to recommendations."""

import json
import math

import polars
import pytest
import torch
import torch.nn.functional as F
from builders import Known, model_of, recipe, run, six_users, synthetic

from fastrec.cli import main
from fastrec.data.dataset import SequenceDataset
from fastrec.evaluation.vectors import MOST, VectorsJudge
from fastrec.nn.user_model import UserModel
from fastrec.objectives.align import Align
from fastrec.objectives.item import Item
from fastrec.objectives.joint import JointObjective
from fastrec.objectives.parts import Objectives
from fastrec.random import Rng

USERS = torch.arange(5)


def joint_of(model, **objectives) -> JointObjective:
    return JointObjective(objectives, model, Known(six_users()))


def test_vectors_are_two_dropout_passes():
    model, dataset = model_of(tokens=["ur"], causal=True, pre_norm=True), six_users()
    judge, objective = VectorsJudge(dataset, USERS, "valid"), joint_of(
        model, item=Item(), align=Align(["a", "b"])
    )  # fmt: skip
    scores = torch.cat([judge.score(model, objective, slice(a, b)) for a, b in ((0, 2), (2, 5))])
    batch = model.inputs(dataset, USERS, "valid")
    one, two = (
        model.pool(model.encode(batch.as_view(view), Rng(0, 0)), "ur").detach() for view in (0, 1)
    )
    torch.testing.assert_close(scores, torch.cat([one, two], dim=1))
    a, b = (F.normalize(part.double(), dim=1) for part in (one, two))
    near = sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True)) / 5

    def log_mean(z):
        pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
        far = [math.exp(-2 * float((z[i] - z[j]).square().sum())) for i, j in pairs]
        return math.log(sum(far) / len(far))

    far = (log_mean(a) + log_mean(b)) / 2
    metrics = judge.metrics(scores)
    assert list(metrics) == list(judge.metric_names)
    assert metrics["alignment"] == pytest.approx(near, rel=1e-4)
    assert metrics["uniformity"] == pytest.approx(far, rel=1e-3)
    cosine = a @ b.T
    ranks = [1 + int((row > row[place]).sum()) for place, row in enumerate(cosine)]
    assert metrics["MRR"] == pytest.approx(sum(1 / rank for rank in ranks) / 5)
    std = (a.std(0, unbiased=False).mean() + b.std(0, unbiased=False).mean()) / 2
    assert metrics["std"] == pytest.approx(float(std), rel=1e-4)


def test_neither_a_collapse_nor_noise_finds_users_again():
    """Where all users are one point and dropout scatters them, alignment and uniformity look as if
    users were apart: pairs of one user are as far from each other as those of two."""
    judge, chance = (
        VectorsJudge(six_users(), USERS, "valid"),
        sum(1 / r for r in range(1, 201)) / 200,
    )
    torch.manual_seed(0)
    spread, one = torch.randn(200, 8), torch.randn(1, 8).expand(200, -1)
    noise = [0.3 * torch.randn(200, 8) for _ in range(2)]
    good = judge.metrics(torch.cat([spread + noise[0], spread + noise[1]], dim=1))
    bad = judge.metrics(torch.cat([one, one], dim=1))
    scattered = judge.metrics(torch.cat([one + noise[0], one + noise[1]], dim=1))
    assert good["MRR"] > 0.8
    assert bad["MRR"] == pytest.approx(chance) and bad["std"] < 1e-6
    assert scattered["MRR"] < 3 * chance and scattered["std"] > 0.05


def test_few_and_many_users():
    with pytest.raises(ValueError, match="vectors of users are compared: there are 1 of them"):
        VectorsJudge(six_users(), USERS[:1], "valid")
    judge = VectorsJudge(six_users(), torch.arange(MOST + 100), "valid")
    assert len(judge) == MOST and (judge.users.diff() > 0).all() and judge.users.max() > MOST - 1


def test_an_objective_without_a_pool_is_refused(tmp_path):
    chosen = recipe(objectives=Objectives(item=Item()), judge="vectors", steps=2, validate_every=2)
    with pytest.raises(ValueError, match="the judge vectors needs an objective with a pool"):
        run(synthetic(tmp_path), tmp_path / "run", chosen)


def test_clue_from_the_command_line(tmp_path):
    """Pre-trained on dropout views, fine-tuned for next items and profiles, asked at the last item:
    what trains a causal model with [UR] behind its items is what is asked of it."""
    data = synthetic(tmp_path)
    flags = [f"--data={data}", "--config=clue", "--model.width=16", "--model.max_len=12"]

    def short(stage):
        return [f"--{stage}.{key}" for key in ("steps=4", "validate_every=2")]

    start = tmp_path / "start"
    main(["pretrain", *flags, *short("pretraining"), f"--output={start}"])
    log = polars.read_csv(next(start.glob("metrics/version_0/metrics.csv")))
    assert {"train/align", "train/align.alignment", "train/align.std"} <= {*log.columns}
    assert json.loads((start / "summary.json").read_text())["valid"].keys() == {
        *VectorsJudge.metric_names
    }
    found, init = tmp_path / "found.json", f"--init={start / 'model'}"
    main(["evaluate", *flags, "--task=pretraining", f"--pretrained={start / 'model'}",
          f"--output={found}"])  # fmt: skip
    assert json.loads(found.read_text())["metrics"]["model"]["alignment"] > 0
    for task in ("recommendation", "profile"):
        run_ = tmp_path / task
        main(["finetune", *flags, *short(task), f"--task={task}", init, f"--output={run_}"])
        taken = json.loads((run_ / "summary.json").read_text())["taken"]
        assert any(name.startswith("encoder.") for name in taken)
        main(["evaluate", *flags, f"--task={task}", f"--pretrained={run_ / 'model'}"])
    dataset, model = SequenceDataset.load(data), UserModel.from_pretrained(
        tmp_path / "recommendation" / "model"
    )  # fmt: skip
    users = torch.arange(3)
    batch = model.inputs(dataset, users, "all", ask=True)
    assert (batch.values[batch.offsets[1:] - 1] == model.token("ur")).all()
    states = model.encode(batch).states
    last = states[batch.offsets[1:] - 2]
    torch.testing.assert_close(model.next_item_query(model.encode(batch)), last)
    torch.testing.assert_close(model.ask(batch), last, rtol=1e-4, atol=1e-5)
    out = tmp_path / "best.csv"
    main(["recommend", f"--data={data}", f"--pretrained={tmp_path / 'recommendation' / 'model'}",
          "--k=3", f"--output={out}"])  # fmt: skip
    assert polars.read_csv(out).height == 3 * dataset.num_users


def test_clue_zero_starts_at_random(tmp_path):
    data = synthetic(tmp_path)
    with pytest.raises(SystemExit, match="this recipe has no stage 'pretraining'"):
        main(["pretrain", f"--data={data}", "--config=clue-zero", f"--output={tmp_path / 'a'}"])
    main(["finetune", f"--data={data}", "--config=clue-zero", f"--output={tmp_path / 'b'}",
          "--model.width=16", "--recommendation.steps=2"])  # fmt: skip
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["taken"] == []
