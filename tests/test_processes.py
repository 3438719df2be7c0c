# SPDX-License-Identifier: Apache-2.0
"""Runs of several processes: who they are, and that they train the model of one."""

import os
import subprocess
from pathlib import Path

import polars
import pytest
import torch
from builders import command, recipe, run, synthetic, trained_weights
from groups import Ranks, launched, trained

from fastrec.training.processes import first_process, processes_of, started_outside

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("synthetic"), num_users=1300)


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


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


def test_two_nodes_train_one_model(data, two, tmp_path):
    chosen = recipe(steps=6, validate_every=6, devices=1, num_nodes=2)
    run(data, tmp_path / "one", recipe(steps=6, validate_every=6))
    models = two.run(trained, data, tmp_path / "two", chosen, None, 2)
    assert_close_weights(tmp_path / "one", tmp_path / "two")
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
    assert len(valid(tmp_path / "two")) == 1, "the second node writes no logs"


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
