# SPDX-License-Identifier: Apache-2.0
"""The environment of the command line, which a script that imports fastrec does not get."""

import json
import os
import subprocess
import sys

import pytest

from fastrec.threads import prepare_command, processors_of_quota

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
CLEAN = {key: value for key, value in os.environ.items() if key not in NAMES}


def test_what_the_user_has_chosen_stays(tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    chosen = {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "7"}
    prepare_command(environment := dict(chosen), tmp_path)
    assert environment == chosen
    prepare_command(environment := {}, tmp_path)
    assert environment["OMP_WAIT_POLICY"] == "passive"
    several = len(os.sched_getaffinity(0)) > 1
    assert environment.get("OMP_NUM_THREADS") == ("1" if several else None)
    prepare_command(environment := {"GOMP_SPINCOUNT": "5"}, tmp_path / "none")
    assert environment["GOMP_SPINCOUNT"] == "5" and "OMP_NUM_THREADS" not in environment


@pytest.mark.parametrize(
    "files, processors",
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "what is this"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "210000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({}, None),
    ],
)
def test_processors_of_a_quota(tmp_path, files, processors):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    assert processors_of_quota(tmp_path) == processors


@pytest.mark.parametrize(
    "how, passive",
    [
        (["-m", "fastrec", "recipes"], True),
        (["{folder}/fastrec"], True),
        (["{folder}/other"], False),
    ],
)
def test_the_command_and_nothing_else_sets_it_before_torch_loads(tmp_path, how, passive):
    """What torch finds when it is imported, by a module of that name which says it and ends."""
    (tmp_path / "torch.py").write_text(
        "import json, os, sys\n"
        f"sys.exit(json.dumps([os.environ.get(name) for name in {NAMES[:2]}]))\n"
    )
    for name in ("fastrec", "other"):
        (tmp_path / name).write_text("import fastrec\nimport torch\n")
    arguments = [part.format(folder=tmp_path) for part in how]
    found = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True,
        env=CLEAN | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert json.loads(found.stderr) == (["passive", "3000"] if passive else [None, None])
