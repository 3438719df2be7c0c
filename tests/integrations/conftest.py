# SPDX-License-Identifier: Apache-2.0
"""No patch, and no reason said once, outlives a test."""

import pytest

import fastrec
from fastrec.integrations.patching import keep_original


@pytest.fixture(autouse=True)
def _undo():
    keep_original.cache_clear()
    yield
    fastrec.unpatch()
