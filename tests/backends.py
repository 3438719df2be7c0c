# SPDX-License-Identifier: Apache-2.0
"""Tests by backend: one that cannot run here is skipped with its reason, not left out.

A pytest plugin too. The cases of Triton on CPU tensors have the marker `triton`: `make test` runs
those of the files `TRITON_TESTS` once more, in Triton's interpreter. Where it is not there they are
skipped, and one that would not be among them fails.
"""

import functools
import re
from pathlib import Path

import pytest
import torch

from fastrec.backend import unavailable_reason

CPU = torch.device("cpu")


def needs(backend: str, op: str) -> pytest.MarkDecorator:
    why = unavailable_reason(backend, op, CPU)
    return pytest.mark.skipif(why is not None, reason=str(why))


def interpreted(backend: str) -> list[pytest.MarkDecorator]:
    """Of a case of `backend` on CPU tensors."""
    return [pytest.mark.triton] if backend == "triton" else []


def params(op: str, *names: str) -> list:
    return [pytest.param(name, marks=[needs(name, op), *interpreted(name)]) for name in names]


def backends(op: str, *names: str) -> pytest.MarkDecorator:
    """The test runs with `backend` as each of `names`."""
    return pytest.mark.parametrize("backend", params(op, *names))


def pytest_configure(config):
    config.addinivalue_line("markers", "triton: waits for Triton's interpreter, see backends.py")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    waits = unavailable_reason("triton", "linear_cross_entropy", CPU)  # None in the interpreter
    if report.skipped and waits and waits in str(report.longrepr) and (why := _left_out(item)):
        report.outcome, report.longrepr = "failed", why
    return report


def _left_out(item: pytest.Item) -> str | None:
    """Why `make test` does not run the case in the interpreter; None if it does."""
    if item.get_closest_marker("triton") is None:
        return "waits for Triton's interpreter without the marker `triton`"
    if item.path not in _interpreted_files(item.config.rootpath):
        return "waits for Triton's interpreter in a file that TRITON_TESTS of the Makefile lacks"
    return None


@functools.cache
def _interpreted_files(root: Path) -> set[Path]:
    (names,) = re.findall(
        r"^TRITON_TESTS := ((?:.*\\\n)*.*)", (root / "Makefile").read_text(), re.M
    )
    return {root / name for name in names.split()}
