# SPDX-License-Identifier: Apache-2.0
"""No case of Triton's interpreter is left out of the part of `make test` that runs it."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
CASES = """
import pytest
from backends import backends, needs

@backends("linear_cross_entropy", "reference", "triton")
def test_parameter(backend): pass

@needs("triton", "linear_cross_entropy")
@pytest.mark.parametrize("x", [pytest.param("marked", marks=pytest.mark.triton), "bare"])
def test_inside(x): pass
"""
LACKS = "waits for Triton's interpreter in a file that TRITON_TESTS of the Makefile lacks"
BARE = "waits for Triton's interpreter without the marker `triton`"


def test_a_case_that_would_not_be_interpreted_fails(tmp_path):
    """In a file that the Makefile does not name, and without the marker in one that it names."""
    (tmp_path / "Makefile").write_text(
        "TRITON_TESTS := tests/test_a.py \\\n  tests/test_named.py\n"
    )
    (tmp_path / "tests").mkdir()
    for name in ("named", "other"):
        (tmp_path / "tests" / f"test_{name}.py").write_text(CASES)
    command = [sys.executable, "-m", "pytest", "-qra", "-p", "backends", "-p", "no:cacheprovider"]
    environment = dict(PYTHONPATH=f"{TESTS}:{TESTS.parent}", TRITON_INTERPRET="0", COLUMNS="200")
    process = subprocess.run(
        [*command, "--strict-markers", "-c", os.devnull, "--rootdir", tmp_path, "tests"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=600,
    )
    lines = process.stdout.splitlines()
    assert {line for line in lines if line.startswith("ERROR ")} == {
        f"ERROR tests/test_other.py::test_parameter[triton] - {LACKS}",
        f"ERROR tests/test_other.py::test_inside[marked] - {LACKS}",
        f"ERROR tests/test_other.py::test_inside[bare] - {BARE}",
        f"ERROR tests/test_named.py::test_inside[bare] - {BARE}",
    }
    assert lines[-1].startswith("2 passed, 2 skipped, 4 errors")
