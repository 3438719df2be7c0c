# SPDX-License-Identifier: Apache-2.0
"""Runs of several processes: who they are, and that they train the model of one."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import polars
import pytest
import torch
from builders import command, recipe, run, synthetic, trained_weights
from groups import launched, trained

from fastrec.data.dataset import SequenceDataset
from fastrec.evaluation.blocks import own_blocks, row_blocks
from fastrec.evaluation.next_item import NextItemJudge
from fastrec.evaluation.protocol import Protocol
from fastrec.nn.user_model import UserModel
from fastrec.training.evaluate import evaluate_stage
from fastrec.training.processes import first_process, processes_of, started_outside
from fastrec.training.stage_data import stage_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("synthetic"), num_users=1300)


def valid(folder: Path) -> polars.DataFrame:
    """What each validation measured."""
    (file,) = (folder / "validation").rglob("metrics.csv")
    return polars.read_csv(file).select("^valid/.*$")


def assert_close_weights(one: Path, other: Path) -> None:
    first, second = trained_weights(one), trained_weights(other)
    assert first.keys() == second.keys() and first.pop("step") == second.pop("step")
    for name, value in first.items():
        # Sums in another order; Adam magnifies that where a gradient is near 0.
        error = (value - second[name]).norm() / value.norm().clamp_min(1e-3)
        assert error < 1e-3, (name, error)


def test_two_nodes_train_one_model(data, ranks, tmp_path):
    chosen = recipe(steps=6, validate_every=6, devices=1, num_nodes=2)
    run(data, tmp_path / "one", recipe(steps=6, validate_every=6))
    models = ranks(2, trained, data, tmp_path / "two", chosen, None, 2)
    assert_close_weights(tmp_path / "one", tmp_path / "two")
    one, other = (valid(tmp_path / name) for name in ("one", "two"))
    assert one.columns == other.columns and np.allclose(one.to_numpy(), other.to_numpy(), atol=2e-3)
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
    assert len(valid(tmp_path / "two")) == 1, "the second node writes no logs"


def metrics_of(group, data: Path, folder: Path, chosen) -> tuple[dict, int]:
    """What `evaluate` finds on this process, and how many users it has ranked."""
    judge, asked = NextItemJudge.rank_rows, []

    def counted(self, model, rows, *table):
        asked.append(rows.stop - rows.start)
        return judge(self, model, rows, *table)

    with patch.object(NextItemJudge, "rank_rows", counted):
        dataset, model = SequenceDataset.load(data), UserModel.from_pretrained(folder)
        stage = chosen.stage("pretraining")
        found = evaluate_stage(dataset, chosen, stage, model, folder, group=group)
    return found, sum(asked)


@pytest.mark.parametrize("judged", [{}, {"candidates": "sampled", "negatives": 20}])
def test_the_users_of_an_evaluation_are_shared(data, ranks, tmp_path, judged):
    chosen = replace(recipe(steps=1, validate_every=1), evaluation=Protocol(**judged))
    model = run(data, tmp_path / "run", chosen)
    assert model.num_items == 150
    expected, _ = metrics_of(None, data, tmp_path / "run" / "model", chosen)
    made = ranks(2, metrics_of, data, tmp_path / "run" / "model", chosen)
    assert [found for found, _ in made] == [expected, expected], "to the last bit"
    assert sum(asked for _, asked in made) == 1300 and all(asked for _, asked in made)


def test_evaluate_under_a_launcher_prints_once(data, tmp_path):
    run(data, tmp_path / "run", recipe(steps=1, validate_every=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = {"MASTER_PORT": str(free.getsockname()[1])}
    flags = ("--config=bert4rec", "--data", data, "--device=cpu")
    flags += ("--pretrained", tmp_path / "run" / "model")
    files = ("--output", tmp_path / "found.json", "--ranks", tmp_path / "ranks.csv")
    made = [
        subprocess.Popen(
            command("evaluate", *flags, *files), stdout=subprocess.PIPE, text=True,
            env={**os.environ, **launched(rank, 2, 2), **port},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in made]
    assert [process.returncode for process in made] == [0, 0]
    assert "1,300 users" in said[0] and said[1] == ""
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["users"] == 1300 and len(polars.read_csv(tmp_path / "ranks.csv")) == 1300


@pytest.mark.parametrize(("count", "world"), [(1, 2), (512, 2), (513, 2), (5000, 3), (1300, 1)])
def test_rows_are_shared_by_blocks(count, world):
    made = [own_blocks(count, rank, world) for rank in range(world)]
    assert len({len(blocks) for blocks in made}) == 1, "a model over several processes needs all"
    rows = [row for blocks in made for b in blocks if b.counts for row in range(count)[b.rows]]
    assert sorted(rows) == list(range(count))
    assert [b.rows for blocks in zip(*made, strict=True) for b in blocks if b.counts] == (
        row_blocks(count)
    )


def test_a_validation_of_some_users(data):
    dataset, chosen = SequenceDataset.load(data), recipe(validate_users=100)
    some, whole = (stage_data(dataset, each, each.pretraining) for each in (chosen, recipe()))
    assert len(some.judge) == 100 and len(whole.judge) == 1300
    assert torch.isin(some.judge.users, whole.judge.users).all()
    assert torch.equal(some.users, whole.users), "all are trained"
    again = stage_data(dataset, chosen, chosen.pretraining)
    assert torch.equal(again.judge.users, some.judge.users)
    with pytest.raises(ValueError, match="validate_users must be at least 1, got 0"):
        recipe(validate_users=0)
    with pytest.raises(ValueError, match="validate_users has no effect on the judge friends"):
        recipe(validate_users=9, judge="friends")


def test_processes_that_nobody_asked_for_write_nothing(data, tmp_path):
    """Two machines with `devices 1` and no `num_nodes`, as torchrun starts them."""
    flags = ("--config=sasrec", "--pretraining.devices=1", "--device=cpu")
    asked = command("pretrain", "--data", data, "--output", tmp_path / "run", *flags)
    made = [
        subprocess.Popen(
            asked, env={**os.environ, **launched(rank, 2)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in made:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "started 2 processes (WORLD_SIZE), and devices x num_nodes is 1 x 1" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "nodes", "match"),
    [
        ({"WORLD_SIZE": "4"}, 1, r"4 processes \(WORLD_SIZE\), and devices x num_nodes is 2 x 1"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, 2, r"2 processes \(SLURM_STEP_NUM_TASKS\)"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, 1, r"1 processes \(OMPI_COMM_WORLD_SIZE\)"),
        ({"NODE_RANK": "2"}, 2, "NODE_RANK is 2, and num_nodes is 2"),
        ({}, 2, "num_nodes is 2: start the command on each machine by torchrun"),
    ],
)
def test_a_world_that_does_not_fit_is_refused(monkeypatch, environment, nodes, match):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=match):
        processes_of(CPU, 2, nodes)


def test_the_world_of_a_launcher(monkeypatch):
    assert first_process() and not started_outside()
    assert processes_of(CPU, "auto", 1) == (CPU, 1, 1)
    for rank in range(4):
        with monkeypatch.context() as patch:
            for name, value in launched(rank, 4, 2).items():
                patch.setenv(name, value)
            assert first_process() == (rank == 0) and started_outside()
            assert processes_of(CPU, 2, 2).total == 4
    with monkeypatch.context() as patch:  # a process that Lightning has started on the 2nd machine
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "1")
        patch.setenv("NODE_RANK", "1")
        assert not first_process() and processes_of(CPU, 2, 2).total == 4


_ENDS = """
import sys, time, torch
from fastrec.training.processes import let_go

class Slow:
    def __del__(self):
        time.sleep(0.03)

torch.distributed.init_process_group("gloo", init_method=sys.argv[1], rank=0, world_size=1)
tensor = torch.ones(3)
tensor.slow = Slow()
work = torch.distributed.all_reduce(tensor, async_op=True)
del tensor, work
let_go()
"""


def test_a_process_ends_behind_the_threads_of_gloo(tmp_path):
    """The last tensor of a collective is dropped by a thread of gloo, here slowly: without `let_go`
    the process aborts with "terminate called without an active exception"."""
    line = [sys.executable, "-c", _ENDS, f"file://{tmp_path}/store"]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
