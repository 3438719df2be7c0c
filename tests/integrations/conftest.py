# SPDX-License-Identifier: Apache-2.0
"""No patch, and no reason said once, outlives a test. And an environment that is made for a library
runs its tests: where a package is missing they are skipped, and nothing would fail."""

import os
from pathlib import Path

import pytest

import fastrec
from fastrec.integrations.patching import keep_original

LIBRARY = os.environ.get("FASTREC_LIBRARY")  # `make test-integrations` sets it


@pytest.fixture(autouse=True)
def _undo():
    keep_original.cache_clear()
    yield
    fastrec.unpatch()


def pytest_collectreport(report):
    file = Path(report.nodeid).name
    if report.skipped and LIBRARY and file.startswith(f"test_{LIBRARY}"):
        pytest.exit(f"{report.nodeid} of FASTREC_LIBRARY: {report.longrepr[2]}", returncode=1)
